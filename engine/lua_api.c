/* lua_api.c - see lua_api.h. ORDER lua api: the table at the end, amalgam.meta.lua. */
#include "lua_api.h"

#include "cli.h"
#include "engine.h"
#include "evaluate.h"
#include "formats.h"
#include "isolate.h"
#include "kernel.h"
#include "load.h"
#include "lua_json.h"
#include "nvml.h"
#include "progress.h"
#include "quantise.h"
#include "results.h"
#include "sampler.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <lauxlib.h>
#include <lualib.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* --- Options ---------------------------------------------------------------------------------- */

static int32_t count_keys(const char *const *list) {
    int32_t n = 0;
    while (list[n]) n++;
    return n;
}

/* A misspelt option must not take its default, nor one that this call does not read go for nothing:
 * every key of the table at `index` is one of `known`, which ends with NULL. */
static void check_keys(lua_State *L, int index, const char *what, const char *const *known) {
    luaL_checktype(L, index, LUA_TTABLE);
    index = lua_absindex(L, index);
    const int32_t n = count_keys(known);
    lua_pushnil(L);
    while (lua_next(L, index)) {
        if (lua_type(L, -2) != LUA_TSTRING) luaL_error(L, "%s: a key is no string", what);
        const char *key = lua_tostring(L, -2);
        const char *nearest = nearest_name(key, strlen(key), known, sizeof *known, n);
        if (strcmp(nearest, key) != 0)
            luaL_error(L, "%s: unknown key '%s': the nearest is '%s'", what, key, nearest);
        lua_pop(L, 1);
    }
}

/* Each reads field `key` of the table at `t`, and leaves *out as it was when it is nil. */
static void opt_int(lua_State *L, int t, const char *key, int64_t lo, int64_t hi, int64_t *out) {
    lua_getfield(L, t, key);
    if (!lua_isnil(L, -1)) {
        int ok;
        const lua_Integer v = lua_tointegerx(L, -1, &ok);
        if (!ok) luaL_error(L, "'%s' is no integer", key);
        if (v < lo || v > hi)
            luaL_error(L, "%s = %I is outside %I to %I", key, v, (lua_Integer)lo, (lua_Integer)hi);
        *out = v;
    }
    lua_pop(L, 1);
}

static void opt_i32(lua_State *L, int t, const char *key, int32_t lo, int32_t hi, int32_t *out) {
    int64_t wide = *out;
    opt_int(L, t, key, lo, hi, &wide);
    *out = (int32_t)wide;
}

static void opt_num(lua_State *L, int t, const char *key, double lo, double hi, double *out) {
    lua_getfield(L, t, key);
    if (!lua_isnil(L, -1)) {
        int ok;
        const double v = lua_tonumberx(L, -1, &ok);
        if (!ok || !(v >= lo && v <= hi))
            luaL_error(L, "'%s' is no number from %f to %f", key, lo, hi);
        *out = v;
    }
    lua_pop(L, 1);
}

static void opt_bool(lua_State *L, int t, const char *key, bool *out) {
    lua_getfield(L, t, key);
    if (!lua_isnil(L, -1)) {
        if (!lua_isboolean(L, -1)) luaL_error(L, "'%s' is neither true nor false", key);
        *out = lua_toboolean(L, -1);
    }
    lua_pop(L, 1);
}

/* The string stays alive as long as the table does. */
static void opt_str(lua_State *L, int t, const char *key, const char **out) {
    lua_getfield(L, t, key);
    if (!lua_isnil(L, -1)) {
        if (lua_type(L, -1) != LUA_TSTRING) luaL_error(L, "'%s' is no string", key);
        *out = lua_tostring(L, -1);
    }
    lua_pop(L, 1);
}

/* Push the sub-table `key` (true) or nothing (false). */
static bool opt_table(lua_State *L, int t, const char *key) {
    lua_getfield(L, t, key);
    if (lua_isnil(L, -1)) {
        lua_pop(L, 1);
        return false;
    }
    if (!lua_istable(L, -1)) luaL_error(L, "'%s' is no table", key);
    return true;
}

/* Keys of every call that opens an engine, and of each what it reads beside them. */
#define ENGINE_KEYS                                                                                \
    "model", "weights", "weights_seed", "precision", "device", "gpu", "tp", "threads",             \
        "memory_fraction", "ctx_max", "pages", "scheduler", "dequant_first", "kernel_family",      \
        "no_graphs", "lockstep", "trace"

/* Options shared by every call that opens an engine. `t` is the option table, `keys` what it may
 * hold. */
static void read_engine_options(lua_State *L, int t, const char *what, const char *const *keys,
                                engine_options *o) {
    check_keys(L, t, what, keys);
    *o = ENGINE_OPTIONS_DEFAULT;
    opt_str(L, t, "model", &o->model);
    if (!o->model) luaL_error(L, "'model' is missing");
    const char *weights = "checkpoint";
    opt_str(L, t, "weights", &weights);
    o->synthetic = strcmp(weights, "synthetic") == 0;
    if (!o->synthetic && strcmp(weights, "checkpoint") != 0)
        luaL_error(L, "weights = '%s' is neither 'checkpoint' nor 'synthetic'", weights);
    int64_t seed = 0;
    opt_int(L, t, "weights_seed", 0, INT64_MAX, &seed);
    o->weights_seed = (uint64_t)seed;
    opt_str(L, t, "precision", &o->precision);
    opt_str(L, t, "device", &o->device);
    const device_ops *built; /* else every point would count as skipped, and as done */
    if (o->device && device_find(&built, o->device) != ST_OK) luaL_error(L, "%s", fail_message());
    opt_str(L, t, "gpu", &o->device_options.gpu);
    opt_i32(L, t, "tp", 1, 64, &o->device_options.tp);
    opt_i32(L, t, "threads", 0, 1024, &o->device_options.threads);
    opt_bool(L, t, "dequant_first", &o->device_options.dequant_first);
    opt_bool(L, t, "no_graphs", &o->device_options.no_graphs);
    opt_bool(L, t, "lockstep", &o->device_options.lockstep);
    const char *family = NULL;
    opt_str(L, t, "kernel_family", &family);
    if (device_family(&o->device_options.kernel_family, family) != ST_OK)
        luaL_error(L, "%s", fail_message());
    opt_num(L, t, "memory_fraction", 0.01, 1, &o->memory_fraction);
    opt_i32(L, t, "ctx_max", 1, 1 << 24, &o->ctx_max);
    opt_i32(L, t, "pages", 1, 1 << 24, &o->pages);
    opt_str(L, t, "trace", &o->trace);
    if (opt_table(L, t, "scheduler")) {
        static const char *const known[] = {
            "token_budget", "max_seqs",        "max_queue", "chunked_prefill",
            "prefix_cache", "static_batching", NULL};
        const int s = lua_gettop(L);
        check_keys(L, s, "scheduler", known);
        opt_i32(L, s, "token_budget", 1, 1 << 20, &o->policy.token_budget);
        opt_i32(L, s, "max_seqs", 1, 65536, &o->policy.max_seqs);
        opt_i32(L, s, "max_queue", 0, 1 << 24, &o->policy.max_queue);
        opt_bool(L, s, "chunked_prefill", &o->policy.chunked_prefill);
        opt_bool(L, s, "prefix_cache", &o->policy.prefix_cache);
        opt_bool(L, s, "static_batching", &o->policy.static_batching);
        lua_pop(L, 1);
    }
}

static void read_length(lua_State *L, int t, const char *key, length_law *law) {
    if (!opt_table(L, t, key)) return;
    static const char *const known[] = {"fixed", "lo", "hi", "mu", "sigma", "min", "max", NULL};
    const int s = lua_gettop(L);
    check_keys(L, s, key, known);
    int64_t fixed = -1, lo = -1, hi = -1;
    double mu = -1, sigma = 0;
    opt_int(L, s, "fixed", 1, 1 << 24, &fixed);
    opt_int(L, s, "lo", 1, 1 << 24, &lo);
    opt_int(L, s, "hi", 1, 1 << 24, &hi);
    opt_num(L, s, "mu", 0, 20, &mu);
    opt_num(L, s, "sigma", 0, 10, &sigma);
    *law = (length_law){.min = 1, .max = 1 << 24};
    if (fixed > 0)
        law->kind = LENGTH_FIXED, law->a = (double)fixed;
    else if (lo > 0 && hi >= lo)
        law->kind = LENGTH_UNIFORM, law->a = (double)lo, law->b = (double)hi;
    else if (mu >= 0)
        law->kind = LENGTH_LOGNORMAL, law->a = mu, law->b = sigma;
    else
        luaL_error(L, "%s: give fixed, or lo and hi, or mu and sigma", key);
    opt_i32(L, s, "min", 1, 1 << 24, &law->min);
    opt_i32(L, s, "max", 1, 1 << 24, &law->max);
    lua_pop(L, 1);
}

/* {[token id] = bias}, which goes to `a`. */
static void read_bias(lua_State *L, int t, arena *a, sampling *p) {
    if (!opt_table(L, t, "logit_bias")) return;
    int32_t n = 0;
    logit_bias *bias = arena_array(a, logit_bias, LOGIT_BIAS_MAX);
    if (!bias) luaL_error(L, "out of memory");
    for (lua_pushnil(L); lua_next(L, -2); lua_pop(L, 1)) {
        int is_id, is_bias;
        const lua_Integer id = lua_tointegerx(L, -2, &is_id);
        const double v = lua_tonumberx(L, -1, &is_bias);
        if (!is_id || lua_type(L, -2) != LUA_TNUMBER || id < 0 || id > INT32_MAX)
            luaL_error(L, "logit_bias: a key is no token id");
        if (!is_bias) luaL_error(L, "logit_bias: that of %I is no number", id);
        if (n == LOGIT_BIAS_MAX)
            luaL_error(L, "logit_bias: more than %d tokens", (int)LOGIT_BIAS_MAX);
        bias[n++] = (logit_bias){.token = (int32_t)id, .bias = (float)v};
    }
    logit_bias_sort(bias, n);
    p->bias = bias;
    p->n_bias = n;
    if (sampling_check(p) != ST_OK) luaL_error(L, "%s", fail_message());
    lua_pop(L, 1);
}

static void read_sampling(lua_State *L, int t, arena *a, sampling *p) {
    if (!opt_table(L, t, "sampling")) return;
    static const char *const known[] = {"temperature",
                                        "top_k",
                                        "top_p",
                                        "min_p",
                                        "repetition_penalty",
                                        "presence_penalty",
                                        "frequency_penalty",
                                        "min_tokens",
                                        "logit_bias",
                                        "seed",
                                        NULL};
    const int s = lua_gettop(L);
    check_keys(L, s, "sampling", known);
    double temperature = (double)p->temperature, top_p = (double)p->top_p, min_p = (double)p->min_p,
           penalty = (double)p->repetition_penalty, presence = (double)p->presence_penalty,
           frequency = (double)p->frequency_penalty;
    int64_t seed = (int64_t)p->seed;
    opt_num(L, s, "temperature", 0, 100, &temperature);
    opt_i32(L, s, "top_k", 0, 1 << 24, &p->top_k);
    opt_num(L, s, "top_p", 0, 1, &top_p);
    opt_num(L, s, "min_p", 0, 1, &min_p);
    opt_num(L, s, "repetition_penalty", 0.01, 100, &penalty);
    opt_num(L, s, "presence_penalty", -2, 2, &presence);
    opt_num(L, s, "frequency_penalty", -2, 2, &frequency);
    opt_i32(L, s, "min_tokens", 0, 1 << 24, &p->min_tokens);
    opt_int(L, s, "seed", 0, INT64_MAX, &seed);
    p->temperature = (float)temperature;
    p->top_p = (float)top_p;
    p->min_p = (float)min_p;
    p->repetition_penalty = (float)penalty;
    p->presence_penalty = (float)presence;
    p->frequency_penalty = (float)frequency;
    p->seed = (uint64_t)seed;
    read_bias(L, s, a, p);
    lua_pop(L, 1);
}

/* The table "workload" at `t`; what is of no fixed size goes to `a`. */
static void read_workload(lua_State *L, int t, int32_t vocab, arena *a, workload_options *o) {
    static const char *const known[] = {
        "preset", "name",       "file",     "format",     "n_requests", "prompt", "output",
        "prefix", "n_prefixes", "arrival",  "rate_per_s", "burstiness", "speed",  "users",
        "seed",   "salted",     "sampling", "ignore_eos", "contents",   NULL};
    check_keys(L, t, "workload", known);
    const char *preset = "fixed", *name = NULL, *file = "", *format = "", *arrival = NULL;
    opt_str(L, t, "preset", &preset);
    if (workload_preset(o, preset) != ST_OK) luaL_error(L, "%s", fail_message());
    opt_str(L, t, "name", &name);
    opt_str(L, t, "file", &file);
    opt_str(L, t, "format", &format);
    if (name) snprintf(o->name, sizeof o->name, "%s", name);
    if (file[0]) snprintf(o->file, sizeof o->file, "%s", file);
    if (format[0]) snprintf(o->format, sizeof o->format, "%s", format);
    opt_i32(L, t, "n_requests", 0, 1 << 24, &o->n_requests);
    read_length(L, t, "prompt", &o->prompt);
    read_length(L, t, "output", &o->output);
    opt_i32(L, t, "prefix", 0, 1 << 24, &o->shared_prefix);
    opt_i32(L, t, "n_prefixes", 1, 1 << 20, &o->n_prefixes);
    opt_str(L, t, "arrival", &arrival);
    if (arrival) {
        static const struct {
            const char *name;
            arrival_kind kind;
        } kinds[] = {{"at_once", ARRIVE_AT_ONCE}, {"poisson", ARRIVE_POISSON},
                     {"gamma", ARRIVE_GAMMA},     {"constant", ARRIVE_CONSTANT},
                     {"trace", ARRIVE_TRACE},     {"closed", ARRIVE_CLOSED}};
        int32_t at = -1;
        for (int32_t i = 0; i < COUNT_OF(kinds); i++)
            if (strcmp(kinds[i].name, arrival) == 0) at = i;
        if (at < 0) luaL_error(L, "workload: unknown arrival '%s'", arrival);
        o->arrival = kinds[at].kind;
    }
    opt_num(L, t, "rate_per_s", 1e-6, 1e9, &o->rate_per_s);
    opt_num(L, t, "burstiness", 1e-3, 1e6, &o->burstiness);
    opt_num(L, t, "speed", 1e-6, 1e6, &o->speed);
    opt_i32(L, t, "users", 1, 1 << 20, &o->users);
    int64_t seed = (int64_t)o->seed;
    opt_int(L, t, "seed", 0, INT64_MAX, &seed);
    o->seed = (uint64_t)seed;
    opt_bool(L, t, "salted", &o->salted);
    opt_bool(L, t, "ignore_eos", &o->ignore_eos);
    read_sampling(L, t, a, &o->sampling);
    o->vocab = vocab;
}

/* --- Outcomes --------------------------------------------------------------------------------- */

/* Some failures are results of the point, not errors of the script: it does not fit, or the device
 * cannot do it. Push {status, reason}; raise anything else. */
static int outcome(lua_State *L, status st) {
    const char *word = st == ST_OOM                             ? "oom"
                       : st == ST_UNSUPPORTED || st == ST_SHAPE ? "skipped"
                                                                : NULL;
    if (!word) return luaL_error(L, "%s", fail_message());
    lua_createtable(L, 0, 2);
    lua_pushstring(L, word);
    lua_setfield(L, -2, "status");
    lua_pushstring(L, fail_message());
    lua_setfield(L, -2, "reason");
    return 1;
}

static void set_num(lua_State *L, const char *key, double v) {
    lua_pushnumber(L, v);
    lua_setfield(L, -2, key);
}

static void set_int(lua_State *L, const char *key, int64_t v) {
    lua_pushinteger(L, v);
    lua_setfield(L, -2, key);
}

static void set_str(lua_State *L, const char *key, const char *v) {
    lua_pushstring(L, v);
    lua_setfield(L, -2, key);
}

static void set_digest(lua_State *L, uint64_t digest) {
    char hex[24];
    snprintf(hex, sizeof hex, "%016llx", (unsigned long long)digest);
    set_str(L, "checkpoint", hex);
}

static void set_capacity(lua_State *L, const capacity *c) {
    set_int(L, "weight_bytes", c->weight_bytes);
    set_int(L, "workspace_bytes", c->workspace_bytes);
    set_int(L, "kv_page_bytes", c->page_bytes);
    set_int(L, "kv_bytes", c->kv_bytes);
    set_int(L, "kv_tokens", c->kv_tokens);
}

static const char *origin_of(const engine_options *o) {
    if (strcmp(o->device, "sim") == 0) return "predicted";
    return strcmp(o->device, "null") == 0 ? "reference" : "measured";
}

/* Everything a call opens, closed on every way out by luaL_error or return: a to-be-closed slot of
 * the call. The collector would come too late for a second engine beside it on a GPU, and never in
 * a point's process, where the last line of a trace waits for it. */
typedef struct {
    arena memory;
    engine *engine;
    tokenizer *tokenizer;
} session;

static const char session_name[] = "amalgam.session";

static int session_close(lua_State *L) {
    session *s = luaL_checkudata(L, 1, session_name);
    engine_close(s->engine);
    s->engine = NULL;
    if (s->tokenizer) tokenizer_close(s->tokenizer);
    s->tokenizer = NULL;
    arena_close(&s->memory);
    return 0;
}

static session *session_new(lua_State *L) {
    session *s = lua_newuserdatauv(L, sizeof *s, 0);
    memset(s, 0, sizeof *s);
    luaL_setmetatable(L, session_name);
    lua_toclose(L, -1);
    if (arena_open(&s->memory, (size_t)64 << 30) != ST_OK) luaL_error(L, "%s", fail_message());
    return s;
}

/* Model and precision of an option table, without opening an engine. The config is large and calls
 * are never concurrent within a state. */
static model_config *load_config(lua_State *L, const engine_options *o) {
    static model_config config;
    char dir[1024];
    if (model_dir(dir, sizeof dir, o->model) != ST_OK || model_config_load(&config, dir) != ST_OK)
        luaL_error(L, "%s", fail_message());
    return &config;
}

/* --- serve ------------------------------------------------------------------------------------ */

/* Prompts of generated lengths become slices of held-out text, one after the other, so that a real
 * checkpoint reads real text. Common prefixes are slices of its beginning, taken in turn. */
static status fill_prompts(session *s, const char *dir, workload *w, uint64_t seed) {
    TRY(tokenizer_open(&s->tokenizer, dir));
    text corpus = {0};
    ids tokens = {0};
    status st = corpus_text(&corpus, NULL, CORPUS_SEED_HELD_OUT + seed,
                            (size_t)w->prompt_tokens * 6 + 4096);
    if (st == ST_OK)
        st = tokenizer_encode(s->tokenizer, corpus.data, corpus.length, TOKENIZER_PARSE_SPECIAL,
                              &tokens);
    int32_t *all = st == ST_OK ? arena_array(&s->memory, int32_t, (size_t)w->prompt_tokens) : NULL;
    if (st == ST_OK && !all)
        st = FAIL(ST_NOMEM, "prompts of %lld tokens", (long long)w->prompt_tokens);
    if (st == ST_OK && tokens.length < 1) st = FAIL(ST_FORMAT, "%s: no tokens in the corpus", dir);
    int64_t at = 0;
    for (int32_t i = 0; st == ST_OK && i < w->n; i++) {
        request *r = &w->request[i];
        const int64_t prefix = w->options.shared_prefix,
                      common = prefix > 0 ? i % w->options.n_prefixes * prefix : 0;
        for (int64_t j = 0; j < r->n_prompt; j++)
            all[at + j] = tokens.data[(j < prefix ? common + j : at + j) % tokens.length];
        r->prompt = all + at;
        at += r->n_prompt;
    }
    text_free(&corpus);
    ids_free(&tokens);
    return st;
}

static void push_stats(lua_State *L, const engine_stats *s) {
    set_int(L, "steps", s->n_steps);
    set_int(L, "decode_steps", s->n_decode_steps);
    set_num(L, "batch_mean", s->batch_mean);
    set_int(L, "kv_pages_peak", s->pages_peak);
    if (s->n_steps) set_num(L, "step_mean_ms", (double)s->busy_ns / (double)s->n_steps * 1e-6);
}

static metric_limits read_limits(lua_State *L, int index) {
    static const char *const known[] = {"ttft_ms", "tpot_ms", "e2e_ms", NULL};
    double ttft_ms = 0, tpot_ms = 0, e2e_ms = 0;
    if (!opt_table(L, index, "limits")) return (metric_limits){0};
    const int t = lua_gettop(L);
    check_keys(L, t, "limits", known);
    opt_num(L, t, "ttft_ms", 0, 1e9, &ttft_ms);
    opt_num(L, t, "tpot_ms", 0, 1e9, &tpot_ms);
    opt_num(L, t, "e2e_ms", 0, 1e9, &e2e_ms);
    lua_pop(L, 1);
    return (metric_limits){ttft_ms * 1e-3, tpot_ms * 1e-3, e2e_ms * 1e-3};
}

/* What NVML says in the middle of a run, when half of the requests are done. */
typedef struct {
    int32_t n, n_done;
    char gpu[NVML_JSON_MAX];
} observed;

static void observe_finished(void *user, const request_log *log, const int32_t *token) {
    observed *o = user;
    (void)log;
    (void)token;
    if (++o->n_done == (o->n + 1) / 2) nvml_json(o->gpu);
}

/* Field "gpu" of the table on the stack's top. */
static void set_gpu(lua_State *L, const char *gpu) {
    json_t *value = gpu[0] ? json_loads(gpu, 0, NULL) : NULL;
    if (!value) return;
    lua_push_json(L, value);
    json_decref(value);
    lua_setfield(L, -2, "gpu");
}

/* The table at `workload` of the call's options, made; *contents: what prompts are of, where it
 * says. Raises. */
static void open_workload(lua_State *L, session *s, int32_t vocab, workload *w,
                          const char **contents) {
    workload_options o;
    if (!opt_table(L, 1, "workload")) luaL_error(L, "'workload' is missing");
    read_workload(L, lua_gettop(L), vocab, &s->memory, &o);
    if (contents) opt_str(L, lua_gettop(L), "contents", contents);
    lua_pop(L, 1);
    if (workload_make(w, &s->memory, &o) != ST_OK) luaL_error(L, "%s", fail_message());
}

/* A log of the workload's requests. Raises. */
static request_log *new_log(lua_State *L, session *s, const workload *w) {
    request_log *log = arena_array(&s->memory, request_log, (size_t)w->n + 1);
    if (!log) luaL_error(L, "out of memory");
    return log;
}

/* Push the metrics as a table. Raises. */
static void push_metrics(lua_State *L, const metrics *m) {
    json_t *object = json_object();
    if (!object || metrics_json(m, object) != ST_OK) luaL_error(L, "out of memory");
    lua_push_json(L, object);
    json_decref(object);
}

/* What contents = "corpus" wants, of the workload's own table. Raises. */
static void take_contents(lua_State *L, session *s, const char *model, const char *contents,
                          workload *w) {
    char dir[1024];
    if (strcmp(contents, "random") == 0) return;
    if (strcmp(contents, "corpus") != 0)
        luaL_error(L, "workload: contents = '%s' is neither 'random' nor 'corpus'", contents);
    if (model_dir(dir, sizeof dir, model) != ST_OK ||
        fill_prompts(s, dir, w, w->options.seed) != ST_OK)
        luaL_error(L, "%s", fail_message());
}

static int l_serve(lua_State *L) {
    static const char *const known[] = {ENGINE_KEYS, "workload", "limits", NULL};
    engine_options o;
    workload w;
    const char *contents = "random";
    lua_settop(L, 1);
    read_engine_options(L, 1, "serve", known, &o);
    session *s = session_new(L);
    const model_config *config = load_config(L, &o);
    open_workload(L, s, config->vocab, &w, &contents);
    const metric_limits limits = read_limits(L, 1);
    take_contents(L, s, o.model, contents, &w);
    o.max_requests = w.n > 0 ? w.n : 1;
    o.max_tokens = w.prompt_tokens + w.output_tokens + 64;

    const status st = engine_open(&s->engine, &o, NULL, NULL);
    if (st != ST_OK) return outcome(L, st);
    request_log *log = new_log(L, s, &w);
    metrics m;
    observed seen = {.n = w.n};
    const engine_hooks hooks = {.user = &seen, .finished = observe_finished};
    if (strcmp(o.device, "cuda") == 0) engine_set_hooks(s->engine, &hooks);
    if (engine_warm(s->engine) != ST_OK || engine_serve(s->engine, &s->memory, &w, log) != ST_OK ||
        metrics_compute(&m, log, w.n, &limits) != ST_OK)
        return luaL_error(L, "%s", fail_message());

    lua_createtable(L, 0, 8);
    set_str(L, "status", "ok");
    set_str(L, "origin", origin_of(&o));
    set_digest(L, engine_digest(s->engine));
    set_gpu(L, seen.gpu);
    push_metrics(L, &m);
    push_stats(L, engine_statistics(s->engine));
    set_capacity(L, engine_capacity(s->engine));
    lua_setfield(L, -2, "metrics");
    return 1;
}

/* --- bench_serve ------------------------------------------------------------------------------ */

/* A workload against a server that runs already: load.h. A run whose load generator was late is a
 * result of status "invalid". */
static int l_bench_serve(lua_State *L) {
    static const char *const known[] = {"url",         "path",      "model",  "api_key",
                                        "concurrency", "timeout_s", "limits", "tokenizer",
                                        "vocab",       "workload",  NULL};
    load_options o = {0};
    lua_settop(L, 1);
    check_keys(L, 1, "bench_serve", known);
    session *s = session_new(L);
    const char *dir = NULL;
    opt_str(L, 1, "url", &o.url);
    if (!o.url) return luaL_error(L, "'url' is missing");
    opt_str(L, 1, "path", &o.path);
    opt_str(L, 1, "model", &o.model);
    opt_str(L, 1, "api_key", &o.api_key);
    opt_str(L, 1, "tokenizer", &dir);
    opt_i32(L, 1, "concurrency", 0, 1 << 20, &o.max_concurrency);
    opt_num(L, 1, "timeout_s", 0, 1e6, &o.timeout_s);
    if (dir && tokenizer_open(&s->tokenizer, dir) != ST_OK)
        return luaL_error(L, "%s", fail_message());
    o.tok = s->tokenizer;
    char name[LOAD_NAME_MAX];
    int32_t vocab = 0;
    opt_i32(L, 1, "vocab", 0, 1 << 24, &vocab);
    if (!vocab && dir) vocab = tokenizer_vocab_size(s->tokenizer);
    if (!vocab && load_ask_model(name, sizeof name, &vocab, &o) != ST_OK)
        return luaL_error(L, "%s", fail_message());
    if (!vocab) return luaL_error(L, "the server does not tell its vocabulary: give 'vocab'");
    const metric_limits limits = read_limits(L, 1);

    workload w;
    open_workload(L, s, vocab, &w, NULL);
    request_log *log = new_log(L, s, &w);
    load_report r;
    metrics m;
    if (load_run(&r, &s->memory, &o, &w, log) != ST_OK ||
        metrics_compute(&m, log, w.n, &limits) != ST_OK)
        return luaL_error(L, "%s", fail_message());
    const bool failed = r.n_failed > 0;
    lua_createtable(L, 0, 4);
    set_str(L, "status", failed ? "failed" : r.valid ? "ok" : "invalid");
    if (failed) set_str(L, "reason", r.failure);
    if (!failed && !r.valid) set_str(L, "reason", "the load generator was late");
    set_str(L, "origin", "measured");
    push_metrics(L, &m);
    set_num(L, "own_lag_p99_ms", r.lag_p99_s * 1e3);
    lua_setfield(L, -2, "metrics");
    return 1;
}

/* --- capacity --------------------------------------------------------------------------------- */

/* What fits where, with nothing loaded: {weight_bytes, kv_tokens, …} or the outcome. With tp absent
 * the smallest degree on which it fits is chosen. */
static int l_capacity(lua_State *L) {
    static const char *const known[] = {ENGINE_KEYS, NULL};
    engine_options o;
    lua_settop(L, 1);
    read_engine_options(L, 1, "capacity", known, &o);
    const model_config *config = load_config(L, &o);
    gpu_sheet gpu;
    precision p;
    if (!o.device_options.gpu) return luaL_error(L, "'gpu' is missing");
    if (gpu_load(&gpu, o.device_options.gpu) != ST_OK || precision_parse(&p, o.precision) != ST_OK)
        return luaL_error(L, "%s", fail_message());
    const int64_t usable = gpu.memory_bytes - gpu.reserved_bytes;
    const int32_t ctx = o.ctx_max > 0 ? o.ctx_max : 4096;
    const int32_t pages_least = (int32_t)div_up(ctx, KV_PAGE_TOKENS);
    lua_getfield(L, 1, "tp");
    const bool choose = lua_isnil(L, -1);
    lua_pop(L, 1);
    int32_t tp = o.device_options.tp;
    if (format_supported(&p, gpu.sm) != ST_OK) return outcome(L, ST_UNSUPPORTED);
    status st = ST_OK;
    if (choose)
        st = capacity_choose_tp(&tp, config, &p, usable, o.memory_fraction, o.policy.token_budget,
                                o.policy.max_seqs, pages_least);
    if (st == ST_OK) st = model_fits_precision(config, &p, tp);
    capacity c;
    if (st == ST_OK)
        st = capacity_compute(&c, config, &p, tp, usable, o.memory_fraction, o.policy.token_budget,
                              o.policy.max_seqs, 0, pages_least);
    if (st != ST_OK) return outcome(L, st);
    lua_createtable(L, 0, 4);
    set_str(L, "status", "ok");
    set_str(L, "origin", "predicted");
    set_int(L, "tp", tp);
    lua_createtable(L, 0, 8);
    set_capacity(L, &c);
    lua_setfield(L, -2, "metrics");
    return 1;
}

/* --- evaluate --------------------------------------------------------------------------------- */

/* `against` names a checkpoint that is run in 16 bit beside the engine: how often both find the
 * same token most likely, and how far their distributions are apart. */
static status evaluate_against(session *s, const engine_options *o, const char *against,
                               const ids *tokens, int32_t window, int32_t stride,
                               agreement_result *out) {
    engine_options ro = *o;
    engine *reference;
    ro.model = against;
    ro.precision = "W16A16KV16";
    TRY(engine_open(&reference, &ro, NULL, NULL));
    const status st =
        evaluate_agreement(s->engine, reference, tokens->data, tokens->length, window, stride, out);
    engine_close(reference);
    return st;
}

static void evaluate_text(lua_State *L, session *s, const engine_options *o, int t, int32_t window,
                          int32_t stride) {
    static const char *const known[] = {"seed", "bytes", NULL};
    const int at = lua_gettop(L);
    int64_t seed = 0, bytes = 65536;
    check_keys(L, at, "text", known);
    opt_int(L, at, "seed", 0, INT32_MAX, &seed);
    opt_int(L, at, "bytes", 1, 1 << 30, &bytes);
    lua_pop(L, 1);
    const char *against = NULL;
    opt_str(L, 1, "against", &against);
    agreement_result a = {0};
    text corpus = {0};
    ids tokens = {0};
    perplexity_result r = {0};
    status st = corpus_text(&corpus, NULL, CORPUS_SEED_HELD_OUT + (uint64_t)seed, (size_t)bytes);
    if (st == ST_OK)
        st = tokenizer_encode(s->tokenizer, corpus.data, corpus.length, TOKENIZER_PARSE_SPECIAL,
                              &tokens);
    if (st == ST_OK && against) { /* the same windows, and the engine's perplexity beside */
        st = evaluate_against(s, o, against, &tokens, window, stride, &a);
        r = (perplexity_result){a.n, log(a.perplexity), a.perplexity};
    } else if (st == ST_OK) {
        st = evaluate_perplexity(s->engine, tokens.data, tokens.length, window, stride, &r);
    }
    text_free(&corpus);
    ids_free(&tokens);
    if (st != ST_OK) luaL_error(L, "%s", fail_message());
    lua_getfield(L, t, "metrics");
    set_num(L, "perplexity", r.perplexity);
    set_num(L, "nll_nats", r.nll);
    set_int(L, "scored_tokens", r.n_scored);
    if (against) {
        set_num(L, "greedy_agreement", a.agreement);
        set_num(L, "kl_nats", a.kl_nats);
        set_num(L, "kl_nats_max", a.kl_nats_max);
        set_num(L, "reference_perplexity", a.reference_perplexity);
    }
    lua_pop(L, 1);
}

static void evaluate_task_list(lua_State *L, session *s, int t) {
    const int list = lua_gettop(L);
    if (lua_rawlen(L, list) == 0)
        luaL_error(L, "tasks: a list of tables, each with 'kind' and 'n'");
    for (lua_Integer i = 1; i <= (lua_Integer)lua_rawlen(L, list); i++) {
        static const char *const known[] = {"kind", "n", "seed", NULL};
        lua_rawgeti(L, list, i);
        const int at = lua_gettop(L);
        const char *kind_name = "arithmetic";
        int64_t n = 100, seed = 0;
        corpus_kind kind;
        check_keys(L, at, "tasks", known);
        opt_str(L, at, "kind", &kind_name);
        opt_int(L, at, "n", 1, 1 << 20, &n);
        opt_int(L, at, "seed", 0, INT32_MAX, &seed);
        if (!corpus_kind_parse(kind_name, &kind)) luaL_error(L, "unknown task '%s'", kind_name);
        task_result r;
        if (evaluate_tasks(s->engine, s->tokenizer, kind, CORPUS_SEED_HELD_OUT + (uint64_t)seed,
                           (int32_t)n, &r) != ST_OK)
            luaL_error(L, "%s", fail_message());
        lua_getfield(L, t, "metrics");
        lua_pushfstring(L, "%s_accuracy", kind_name);
        lua_pushnumber(L, r.accuracy);
        lua_settable(L, -3);
        lua_pushfstring(L, "%s_n", kind_name);
        lua_pushinteger(L, r.n);
        lua_settable(L, -3);
        lua_settop(L, list);
    }
    lua_pop(L, 1);
}

static int l_evaluate(lua_State *L) {
    static const char *const known[] = {ENGINE_KEYS, "text",    "window", "stride",
                                        "tasks",     "against", NULL};
    engine_options o;
    lua_settop(L, 1);
    read_engine_options(L, 1, "evaluate", known, &o);
    int32_t window = 512, stride = 256;
    opt_i32(L, 1, "window", 2, 1 << 20, &window);
    opt_i32(L, 1, "stride", 1, 1 << 20, &stride);
    o.policy.token_budget = window > 2048 ? window : 2048;
    o.policy.max_seqs = 64;
    o.max_samples = o.policy.token_budget;
    session *s = session_new(L);
    char dir[1024];
    if (model_dir(dir, sizeof dir, o.model) != ST_OK || tokenizer_open(&s->tokenizer, dir) != ST_OK)
        return luaL_error(L, "%s", fail_message());
    const status st = engine_open(&s->engine, &o, NULL, NULL);
    if (st != ST_OK) return outcome(L, st);
    lua_createtable(L, 0, 4);
    const int t = lua_gettop(L);
    set_str(L, "status", "ok");
    set_str(L, "origin", "reference");
    set_digest(L, engine_digest(s->engine));
    lua_newtable(L);
    lua_setfield(L, t, "metrics");
    if (opt_table(L, 1, "text")) evaluate_text(L, s, &o, t, window, stride);
    if (opt_table(L, 1, "tasks")) evaluate_task_list(L, s, t);
    lua_settop(L, t);
    return 1;
}

/* --- quantize --------------------------------------------------------------------------------- */

/* amalgam.quantize { model =, out =, method =, precision =, layout =, device =, threads =,
 * calibration = {seed =, bytes =} }: writes a checkpoint; the text is the seeded generator's under
 * a training seed. */
static int l_quantize(lua_State *L) {
    static const char *const known[] = {"model",       "out",    "method",  "precision", "layout",
                                        "calibration", "device", "threads", NULL};
    quantise_options o = QUANTISE_OPTIONS_DEFAULT;
    const char *model = NULL, *method = "rtn", *format = "W4", *layout = "compressed-tensors";
    int64_t seed = 0, bytes = 65536;
    check_keys(L, 1, "quantize", known);
    opt_str(L, 1, "model", &model);
    opt_str(L, 1, "out", &o.out);
    opt_str(L, 1, "method", &method);
    opt_str(L, 1, "precision", &format);
    opt_str(L, 1, "layout", &layout);
    opt_str(L, 1, "device", &o.device);
    opt_i32(L, 1, "threads", 0, 1024, &o.threads);
    if (!model || !o.out) return luaL_error(L, "quantize needs 'model' and 'out'");
    if (opt_table(L, 1, "calibration")) {
        static const char *const text_keys[] = {"seed", "bytes", NULL};
        check_keys(L, lua_gettop(L), "calibration", text_keys);
        opt_int(L, lua_gettop(L), "seed", 0, INT32_MAX, &seed);
        opt_int(L, lua_gettop(L), "bytes", 1, 1 << 30, &bytes);
        lua_pop(L, 1);
    }
    char dir[1024];
    tokenizer *t = NULL;
    text corpus = {0};
    ids tokens = {0};
    status st = quantise_method_parse(&o.method, method);
    if (st == ST_OK) st = save_layout_parse(&o.layout, layout);
    if (st == ST_OK) st = precision_parse(&o.precision, format);
    if (st == ST_OK) st = model_dir(dir, sizeof dir, model);
    if (st == ST_OK) st = tokenizer_open(&t, dir);
    if (st == ST_OK) st = corpus_text(&corpus, NULL, (uint64_t)seed, (size_t)bytes);
    if (st == ST_OK)
        st = tokenizer_encode(t, corpus.data, corpus.length, TOKENIZER_PARSE_SPECIAL, &tokens);
    if (st == ST_OK) {
        o.model = dir;
        o.token = tokens.data;
        o.n_tokens = tokens.length;
        st = quantise_checkpoint(&o);
    }
    tokenizer_close(t);
    text_free(&corpus);
    ids_free(&tokens);
    return st == ST_OK ? 0 : luaL_error(L, "%s", fail_message());
}

/* --- bench ------------------------------------------------------------------------------------ */

enum { BENCH_ARGS_MAX = 64 };

/* The words "--m", "1,16" of option key = value on the stack's top; lists join with commas, true is
 * a flag. The words stay in the table at `words`. */
static void bench_option(lua_State *L, int words, const char *key) {
    lua_Integer n = luaL_len(L, words);
    lua_pushfstring(L, "--%s", luaL_gsub(L, key, "_", "-"));
    lua_rawseti(L, words, ++n);
    lua_pop(L, 1); /* what luaL_gsub left */
    if (lua_isboolean(L, -1)) {
        if (!lua_toboolean(L, -1)) luaL_error(L, "bench: %s = false: leave it out", key);
        return;
    }
    text joined = {0};
    if (lua_istable(L, -1)) {
        for (lua_Integer i = 1; i <= luaL_len(L, -1); i++) {
            lua_rawgeti(L, -1, i);
            text_add(&joined, i > 1 ? ",%s" : "%s", luaL_tolstring(L, -1, NULL));
            lua_pop(L, 2);
        }
    } else {
        text_add(&joined, "%s", luaL_tolstring(L, -1, NULL));
        lua_pop(L, 1);
    }
    lua_pushlstring(L, joined.data ? joined.data : "", joined.length);
    text_free(&joined);
    lua_rawseti(L, words, ++n);
}

/* This program again with `argv`; all that it writes goes to `out`. The exit status, or -1. */
static int run_self(char **argv, text *out) {
    int ends[2];
    if (pipe(ends) != 0) return -1;
    fflush(NULL);
    const pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* outlives exec: no benchmark without who reads it */
        dup2(ends[1], STDOUT_FILENO);
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        close(ends[1]);
        execv("/proc/self/exe", argv);
        _exit(127);
    }
    close(ends[1]);
    char chunk[4096];
    for (ssize_t n = 1; pid > 0 && n != 0;) {
        n = read(ends[0], chunk, sizeof chunk);
        if (n < 0 && errno == EINTR)
            n = 1;
        else if (n < 0)
            break;
        else
            text_bytes(out, chunk, (size_t)n);
    }
    close(ends[0]);
    int how = 0;
    if (pid < 0 || waitpid(pid, &how, 0) != pid) return -1;
    return WIFEXITED(how) ? WEXITSTATUS(how) : 128 + WTERMSIG(how);
}

/* bench(name, options): `amalgam bench name --json` with the options; its lines as a list. Nil, the
 * status of a result and the reason when it does not fit or cannot be done here. */
static int l_bench(lua_State *L) {
    const char *name = luaL_checkstring(L, 1);
    luaL_checktype(L, 2, LUA_TTABLE);
    lua_settop(L, 2);
    lua_newtable(L);
    lua_pushnil(L);
    while (lua_next(L, 2)) {
        if (lua_type(L, -2) != LUA_TSTRING) return luaL_error(L, "bench: options have names");
        bench_option(L, 3, lua_tostring(L, -2));
        lua_pop(L, 1);
    }
    const int32_t n = (int32_t)luaL_len(L, 3);
    char *argv[BENCH_ARGS_MAX] = {"amalgam", "bench", (char *)(uintptr_t)name, "--json"};
    if (n > BENCH_ARGS_MAX - 5) return luaL_error(L, "bench: too many options");
    for (int32_t i = 0; i < n; i++) {
        lua_rawgeti(L, 3, i + 1);
        argv[4 + i] = (char *)(uintptr_t)lua_tostring(L, -1); /* alive in the table */
        lua_pop(L, 1);
    }
    text out = {0};
    const int code = run_self(argv, &out);
    char why[512] = "";
    lua_newtable(L);
    lua_Integer rows = 0;
    for (char *line = out.data ? strtok(out.data, "\n") : NULL; line; line = strtok(NULL, "\n")) {
        json_t *value = NULL;
        if (line[0] == '{' && json_parse(&value, line, strlen(line), name) == ST_OK) {
            lua_push_json(L, value);
            lua_rawseti(L, -2, ++rows);
            json_decref(value);
        } else {
            snprintf(why, sizeof why, "%s", strncmp(line, "amalgam: ", 9) ? line : line + 9);
        }
    }
    text_free(&out);
    if (code == 0) return 1;
    if (code != 3 && code != 4)
        return luaL_error(L, "bench %s: %s (exit status %d)", name, why[0] ? why : "no message",
                          code);
    lua_pushnil(L);
    lua_pushstring(L, code == 3 ? "oom" : "skipped");
    lua_pushstring(L, why);
    return 3;
}

/* --- Registry --------------------------------------------------------------------------------- */

static int push_names(lua_State *L, status (*names)(arena *, const char ***, int32_t *)) {
    arena a;
    const char **list;
    int32_t n;
    if (arena_open(&a, 1 << 20) != ST_OK) return luaL_error(L, "%s", fail_message());
    const status st = names(&a, &list, &n);
    lua_newtable(L);
    for (int32_t i = 0; st == ST_OK && i < n; i++) {
        lua_pushstring(L, list[i]);
        lua_rawseti(L, -2, i + 1);
    }
    arena_close(&a);
    return st == ST_OK ? 1 : luaL_error(L, "%s", fail_message());
}

static int l_models(lua_State *L) { return push_names(L, model_names); }
static int l_gpus(lua_State *L) { return push_names(L, gpu_names); }

static int l_devices(lua_State *L) {
    lua_newtable(L);
    for (int32_t i = 0; devices[i]; i++) {
        lua_pushstring(L, devices[i]->name);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

static int l_model(lua_State *L) {
    const engine_options o = {.model = luaL_checkstring(L, 1)};
    const model_config *c = load_config(L, &o);
    lua_createtable(L, 0, 14);
    set_str(L, "name", c->name);
    set_str(L, "arch", c->arch);
    set_int(L, "dim", c->dim);
    set_int(L, "layers", c->n_layers);
    set_int(L, "heads", c->n_heads);
    set_int(L, "kv_heads", c->n_kv_heads);
    set_int(L, "head_dim", c->head_dim);
    set_int(L, "vocab", c->vocab);
    set_int(L, "ctx_max", c->ctx_max);
    set_int(L, "experts", c->n_experts);
    set_int(L, "top_k", c->top_k);
    set_int(L, "expert_ffn", c->expert_dim);
    set_int(L, "parameters", model_parameters(c));
    set_int(L, "active_parameters", model_active_parameters(c));
    return 1;
}

static int l_gpu(lua_State *L) {
    gpu_sheet g;
    if (gpu_load(&g, luaL_checkstring(L, 1)) != ST_OK) return luaL_error(L, "%s", fail_message());
    lua_createtable(L, 0, 12);
    set_str(L, "name", g.name);
    set_str(L, "title", g.title);
    set_int(L, "sm", g.sm);
    set_int(L, "memory_bytes", g.memory_bytes);
    set_num(L, "dram_bytes_per_s", g.dram_bytes_per_s);
    set_num(L, "f16_flops", g.f16_flops);
    set_num(L, "int8_ops", g.int8_ops);
    set_num(L, "fp8_flops", g.fp8_flops);
    set_str(L, "calibrated", g.calibrated);
    return 1;
}

/* Canonical name, or nil and the reason. */
static int l_precision(lua_State *L) {
    precision p;
    char name[PRECISION_NAME_MAX];
    if (precision_parse(&p, luaL_checkstring(L, 1)) != ST_OK) {
        lua_pushnil(L);
        lua_pushstring(L, fail_message());
        return 2;
    }
    lua_pushstring(L, precision_name(&p, name));
    return 1;
}

/* --- Suite services --------------------------------------------------------------------------- */

static int l_json_encode(lua_State *L) {
    json_t *value = lua_to_json(L, 1);
    if (!value) return luaL_error(L, "%s", fail_message());
    /* 15 digits bring every decimal of that length back unchanged and keep 0.1 readable. */
    char *line = json_dumps(value, JSON_COMPACT | JSON_SORT_KEYS | JSON_ENCODE_ANY |
                                       JSON_REAL_PRECISION(15));
    json_decref(value);
    if (!line) return luaL_error(L, "json_encode: out of memory");
    lua_pushstring(L, line);
    free(line);
    return 1;
}

static int l_json_decode(lua_State *L) {
    size_t n;
    const char *s = luaL_checklstring(L, 1, &n);
    json_t *value;
    if (json_parse(&value, s, n, "json") != ST_OK) return luaL_error(L, "%s", fail_message());
    lua_push_json(L, value);
    json_decref(value);
    return 1;
}

/* nearest(word, names): nearest_name. */
static int l_nearest(lua_State *L) {
    size_t length;
    const char *word = luaL_checklstring(L, 1, &length), **names;
    luaL_checktype(L, 2, LUA_TTABLE);
    const int32_t n = (int32_t)luaL_len(L, 2);
    names = lua_newuserdatauv(L, ((size_t)n + 1) * sizeof *names, 0);
    for (int32_t i = 0; i < n; i++) {
        if (lua_rawgeti(L, 2, i + 1) != LUA_TSTRING) return luaL_error(L, "nearest: no string");
        names[i] = lua_tostring(L, -1); /* alive in the table */
        lua_pop(L, 1);
    }
    lua_pushstring(L, nearest_name(word, length, names, sizeof *names, n));
    return 1;
}

static int l_hash(lua_State *L) {
    size_t n;
    const char *s = luaL_checklstring(L, 1, &n);
    char hex[24];
    snprintf(hex, sizeof hex, "%016llx", (unsigned long long)hash_bytes(s, n, 0));
    lua_pushstring(L, hex);
    return 1;
}

static int l_identity(lua_State *L) {
    identity id;
    identity_get(&id);
    lua_createtable(L, 0, 8);
    set_str(L, "commit", id.commit);
    set_str(L, "diff", id.diff);
    set_str(L, "version", id.version);
    set_str(L, "machine", id.machine);
    set_int(L, "schema", RESULTS_SCHEMA);
    set_str(L, "root", root_dir());
    char now[21];
    timeline_utc(now);
    set_str(L, "time", now);
    json_t *provenance = identity_provenance();
    lua_push_json(L, provenance);
    json_decref(provenance);
    lua_setfield(L, -2, "provenance");
    return 1;
}

static int l_append(lua_State *L) {
    size_t n;
    const char *path = luaL_checkstring(L, 1), *line = luaL_checklstring(L, 2, &n);
    if (results_append(path, line, n) != ST_OK) return luaL_error(L, "%s", fail_message());
    return 0;
}

typedef struct {
    lua_State *L;
    lua_Integer n;
} row_list;

static status add_row(void *user, const json_t *value) {
    row_list *r = user;
    lua_push_json(r->L, value);
    lua_rawseti(r->L, -2, ++r->n);
    return ST_OK;
}

/* rows, n_broken */
static int l_rows(lua_State *L) {
    row_list r = {.L = L};
    int64_t broken;
    lua_newtable(L);
    if (results_read(luaL_checkstring(L, 1), add_row, &r, &broken) != ST_OK)
        return luaL_error(L, "%s", fail_message());
    lua_pushinteger(L, broken);
    return 2;
}

static int l_read_file(lua_State *L) {
    char *data;
    size_t n;
    if (file_read(&data, &n, luaL_checkstring(L, 1)) != ST_OK)
        return luaL_error(L, "%s", fail_message());
    lua_pushlstring(L, data, n);
    mem_free(data);
    return 1;
}

static int l_write_file(lua_State *L) {
    size_t n;
    const char *path = luaL_checkstring(L, 1), *data = luaL_checklstring(L, 2, &n);
    if (file_write(path, data, n) != ST_OK) return luaL_error(L, "%s", fail_message());
    return 0;
}

/* lock(path, "exclusive", "shared" or "none", wait): flock on the file, held until "none" or the
 * end of the program. False when another program has it and `wait` is false. */
static int l_lock(lua_State *L) {
    static const char *const kinds[] = {"exclusive", "shared", "none", NULL};
    static const int operations[] = {LOCK_EX, LOCK_SH, LOCK_UN};
    static struct {
        char path[4096];
        int fd;
    } held[4];
    const char *path = luaL_checkstring(L, 1);
    const int operation = operations[luaL_checkoption(L, 2, NULL, kinds)];
    const bool wait = lua_toboolean(L, 3);
    int32_t i = 0, vacant = -1;
    for (; i < COUNT_OF(held) && strcmp(held[i].path, path) != 0; i++)
        if (!held[i].path[0]) vacant = i;
    if (i == COUNT_OF(held)) {
        const char *slash = strrchr(path, '/');
        char dir[4096];
        if (vacant < 0 || strlen(path) >= sizeof dir) return luaL_error(L, "%s: no lock", path);
        snprintf(dir, sizeof dir, "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
        if (file_make_dirs(dir) != ST_OK) return luaL_error(L, "%s", fail_message());
        i = vacant;
        held[i].fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
        if (held[i].fd < 0) return luaL_error(L, "%s: %s", path, strerror(errno));
        snprintf(held[i].path, sizeof held[i].path, "%s", path);
    }
    int result;
    do result = flock(held[i].fd, operation | (wait ? 0 : LOCK_NB));
    while (result != 0 && errno == EINTR && wait);
    if (result != 0 && errno != EWOULDBLOCK) return luaL_error(L, "%s: %s", path, strerror(errno));
    if (operation == LOCK_UN) {
        close(held[i].fd);
        held[i].path[0] = 0;
    }
    lua_pushboolean(L, result == 0);
    return 1;
}

/* Sorted names in a folder, without hidden ones; folders end in "/". A missing folder is empty. */
static int l_list(lua_State *L) {
    struct dirent **entry = NULL;
    const char *dir = luaL_checkstring(L, 1);
    const int n = scandir(dir, &entry, NULL, alphasort);
    lua_newtable(L);
    lua_Integer used = 0;
    for (int i = 0; i < n; i++) {
        if (entry[i]->d_name[0] != '.') {
            char path[4096];
            struct stat st;
            snprintf(path, sizeof path, "%s/%s", dir, entry[i]->d_name);
            const bool folder = stat(path, &st) == 0 && S_ISDIR(st.st_mode);
            lua_pushfstring(L, "%s%s", entry[i]->d_name, folder ? "/" : "");
            lua_rawseti(L, -2, ++used);
        }
        free(entry[i]);
    }
    free(entry);
    return 1;
}

/* isolate(n, jobs, timeout_s, run, done): run(i) for i = 1..n in child processes, `jobs` at a time;
 * its result (a table) comes back as JSON and done(i, result or nil, reason, wall_s) is called
 * here. */
static int isolated_job(void *user, int64_t index, int fd) {
    lua_State *L = user;
    lua_pushvalue(L, 4);
    lua_pushinteger(L, index);
    text out = {0};
    if (lua_pcall(L, 1, 1, 0) != LUA_OK) {
        text_add(&out, "!%s",
                 lua_tostring(L, -1) ? lua_tostring(L, -1) : "error without a message");
    } else {
        json_t *value = lua_to_json(L, -1);
        char *line = value ? json_dumps(value, JSON_COMPACT | JSON_SORT_KEYS) : NULL;
        if (line)
            text_add(&out, "=%s", line);
        else
            text_add(&out, "!the result cannot be stored: %s", fail_message());
        free(line);
        json_decref(value);
    }
    size_t done = 0;
    while (!out.failed && done < out.length) {
        const ssize_t n = write(fd, out.data + done, out.length - done);
        if (n <= 0) return 1;
        done += (size_t)n;
    }
    return out.failed;
}

static int l_isolate(lua_State *L) {
    const lua_Integer n = luaL_checkinteger(L, 1), jobs = luaL_checkinteger(L, 2);
    const double timeout_s = luaL_checknumber(L, 3);
    luaL_checktype(L, 4, LUA_TFUNCTION);
    luaL_checktype(L, 5, LUA_TFUNCTION);
    luaL_argcheck(L, jobs >= 1 && jobs <= ISOLATE_JOBS_MAX, 2, "out of range");
    lua_settop(L, 5);
    static isolate_pool pool;
    isolate_open(&pool, (int32_t)jobs, timeout_s);
    for (lua_Integer next = 1, done = 0; done < n; done++) {
        while (next <= n && pool.n_busy < pool.n_slots) {
            if (isolate_start(&pool, next, isolated_job, L) != ST_OK) {
                isolate_close(&pool);
                return luaL_error(L, "%s", fail_message());
            }
            next++;
        }
        isolate_result r;
        if (isolate_wait(&pool, &r) != ST_OK) {
            isolate_close(&pool);
            return luaL_error(L, "%s", fail_message());
        }
        lua_pushvalue(L, 5);
        lua_pushinteger(L, r.index);
        json_t *value = NULL;
        const bool good =
            r.ok && r.output.length && r.output.data[0] == '=' &&
            json_parse(&value, r.output.data + 1, r.output.length - 1, "result") == ST_OK;
        if (good)
            lua_push_json(L, value);
        else
            lua_pushnil(L);
        if (good)
            lua_pushnil(L);
        else if (r.ok && r.output.length > 1)
            lua_pushstring(L, r.output.data + 1);
        else
            lua_pushstring(L, r.reason[0] ? r.reason : "left no result");
        json_decref(value);
        text_free(&r.output);
        lua_pushnumber(L, r.wall_s);
        if (lua_pcall(L, 4, 0, 0) != LUA_OK) {
            isolate_close(&pool);
            return lua_error(L);
        }
    }
    isolate_close(&pool);
    return 0;
}

static progress bar; /* one at a time: progress is of the whole program */

static int l_progress_start(lua_State *L) {
    progress_start(&bar, luaL_checkstring(L, 1), luaL_checkinteger(L, 2));
    return 0;
}
static int l_progress_show(lua_State *L) {
    progress_show(&bar, luaL_checkinteger(L, 1), luaL_optstring(L, 2, ""));
    return 0;
}
static int l_progress_line(lua_State *L) {
    progress_line(&bar, "%s", luaL_checkstring(L, 1));
    return 0;
}
static int l_progress_end(lua_State *L) {
    (void)L;
    progress_end(&bar);
    return 0;
}

/* --- The module ------------------------------------------------------------------------------- */

static const luaL_Reg functions[] = {
    {"serve", l_serve},
    {"bench_serve", l_bench_serve},
    {"capacity", l_capacity},
    {"evaluate", l_evaluate},
    {"models", l_models},
    {"gpus", l_gpus},
    {"devices", l_devices},
    {"model", l_model},
    {"gpu", l_gpu},
    {"precision", l_precision},
    {"quantize", l_quantize},
    {"bench", l_bench},
    {"json_encode", l_json_encode},
    {"json_decode", l_json_decode},
    {"nearest", l_nearest},
    {"hash", l_hash},
    {"identity", l_identity},
    {"append", l_append},
    {"rows", l_rows},
    {"read_file", l_read_file},
    {"write_file", l_write_file},
    {"list", l_list},
    {"lock", l_lock},
    {"isolate", l_isolate},
    {"progress_start", l_progress_start},
    {"progress_show", l_progress_show},
    {"progress_line", l_progress_line},
    {"progress_end", l_progress_end},
    {NULL, NULL},
};

static int open_module(lua_State *L) {
    if (luaL_newmetatable(L, session_name)) {
        lua_pushcfunction(L, session_close);
        lua_setfield(L, -2, "__close");
    }
    luaL_newlib(L, functions);
    return 1;
}

lua_State *lua_api_open(void) {
    lua_State *L = luaL_newstate();
    if (!L) return NULL;
    luaL_openlibs(L);
    luaL_requiref(L, "amalgam", open_module, 0);
    lua_pop(L, 1);
    const char *root = root_dir();
    lua_getglobal(L, "package");
    lua_pushfstring(L, "%s/experiments/?.lua;%s/baselines/?.lua;%s/plots/?.lua;%s/tests/?.lua",
                    root, root, root, root);
    lua_setfield(L, -2, "path");
    lua_pushstring(L, ""); /* no C modules: nothing is loaded that the checkout does not hold */
    lua_setfield(L, -2, "cpath");
    lua_pop(L, 1);
    return L;
}

int lua_api_main(const char *module, int argc, char **argv) {
    lua_State *L = lua_api_open();
    if (!L) {
        fprintf(stderr, "amalgam: out of memory\n");
        return 1;
    }
    int result = 2;
    lua_getglobal(L, "require");
    lua_pushstring(L, module);
    if (lua_pcall(L, 1, 1, 0) == LUA_OK) {
        lua_getfield(L, -1, "main");
        lua_createtable(L, argc, 0);
        for (int i = 0; i < argc; i++) {
            lua_pushstring(L, argv[i]);
            lua_rawseti(L, -2, i + 1);
        }
        if (lua_pcall(L, 1, 1, 0) == LUA_OK) {
            result = (int)luaL_optinteger(L, -1, 0);
            lua_close(L);
            return result;
        }
    }
    const char *why = lua_tostring(L, -1);
    fprintf(stderr, "amalgam: %s\n", why ? why : "error without a message");
    lua_close(L);
    return result;
}
