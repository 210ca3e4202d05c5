/* server.h - OpenAI's HTTP interface over a service.
 *
 *   GET  /v1/models /health /ping /version /metrics
 *   POST /v1/completions /v1/chat/completions /tokenize /detokenize /reset_prefix_cache
 *
 * libmicrohttpd reads and writes; each connection is suspended while its body waits for the thread
 * that reads long ones, and while its job has nothing new, so idle and slow clients cost a socket
 * and nothing else. A stream carries one event a token.
 *
 * A client that has closed the side it sends on has left, whether it would still read or not: while
 * nothing is written to it, one that is gone shows nothing else, and its work must not go on. */
#ifndef AMALGAM_SERVER_H
#define AMALGAM_SERVER_H
#include "service.h"

typedef struct {
    const char *host;    /* "127.0.0.1"; IPv4 or IPv6 address */
    int32_t port;        /* 0 = any free one: server_port */
    const char *api_key; /* NULL = none; wanted everywhere but on /health and /ping */
    int64_t max_body_bytes;
    int32_t max_connections;
    double request_timeout_s; /* to deliver a whole request, and for an idle connection */
    double stall_timeout_s;   /* a reader that takes nothing for so long is dropped */
    int32_t threads;          /* of the HTTP side */
} server_options;

#define SERVER_OPTIONS_DEFAULT                                                                     \
    ((server_options){.host = "127.0.0.1",                                                         \
                      .port = 8000,                                                                \
                      .max_body_bytes = 8 << 20,                                                   \
                      .max_connections = 4096,                                                     \
                      .request_timeout_s = 30,                                                     \
                      .stall_timeout_s = 60,                                                       \
                      .threads = 1})

typedef struct server server;

/* Could server_open listen at this address now? IO with the reason, RANGE. */
status server_check(const server_options *o);
/* Listen and serve from threads of its own. The service and all of `model` stay the caller's. IO
 * when the address cannot be had; RANGE. */
status server_open(server **out, const server_options *o, service *s, const api_model *model);
int32_t server_port(const server *s);
/* Stop listening, let the service finish its jobs for grace_s, tell the rest, close all
 * connections. */
void server_close(server *s, double grace_s);
#endif
