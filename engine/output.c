/* output.c - see output.h. */
#include "output.h"

#include <string.h>

void output_open(output *o, const tokenizer *t, const output_options *options) {
    *o = (output){.options = *options};
    for (int32_t i = 0; i < options->n_stops; i++) CHECK(options->stop[i][0]);
    tokenizer_stream_open(&o->stream, t, !options->keep_special);
    if (options->continues) tokenizer_stream_continue(&o->stream);
}

void output_close(output *o) {
    tokenizer_stream_close(&o->stream);
    text_free(&o->text);
}

/* Cut at the earliest stop string that ends in the bytes added since `from`: before it, or, where
 * it is kept, after it (of two that begin there the one that ends first). */
static void find_stop(output *o, size_t from) {
    const output_options *p = &o->options;
    size_t cut = SIZE_MAX, least = 0;
    for (int32_t i = 0; i < p->n_stops; i++) {
        const size_t n = strlen(p->stop[i]);
        for (size_t at = from >= n ? from - n + 1 : 0; at + n <= o->text.length && at <= cut; at++)
            if (memcmp(o->text.data + at, p->stop[i], n) == 0) {
                least = at < cut || n < least ? n : least;
                cut = at;
            }
    }
    if (cut == SIZE_MAX) return;
    if (p->keep_stop) cut += least;
    o->text.length = cut;
    o->text.data[cut] = 0;
    o->stopped = true;
}

status output_push(output *o, int32_t token, bool ends, bool *stopped) {
    output_options *p = &o->options;
    if (!o->stopped && (!ends || p->keep_stop)) {
        const size_t from = o->text.length;
        TRY(tokenizer_stream_push(&o->stream, token, &o->text));
        if (p->min_tokens > 0)
            p->min_tokens--;
        else if (p->n_stops && o->text.length > from)
            find_stop(o, from);
    }
    *stopped = o->stopped;
    return text_status(&o->text);
}

status output_finish(output *o) {
    if (o->stopped) return ST_OK;
    const size_t from = o->text.length;
    TRY(tokenizer_stream_flush(&o->stream, &o->text));
    if (o->options.n_stops && o->text.length > from) find_stop(o, from);
    o->options.n_stops = 0; /* nothing more can follow: hold nothing back */
    return text_status(&o->text);
}

/* Length of the longest suffix of the text that begins a stop string and may have to go. */
static size_t held_back(const output *o) {
    const output_options *p = &o->options;
    size_t held = 0;
    for (int32_t i = 0; i < p->n_stops && !o->stopped && !p->keep_stop; i++) {
        const size_t n = strlen(p->stop[i]) - 1, most = n < o->text.length ? n : o->text.length;
        for (size_t k = most; k > held; k--)
            if (memcmp(o->text.data + o->text.length - k, p->stop[i], k) == 0) held = k;
    }
    return held;
}

const char *output_take(output *o, size_t *n) {
    const size_t ready = o->text.length - held_back(o);
    const char *from = o->text.data ? o->text.data + o->shown : "";
    *n = ready > o->shown ? ready - o->shown : 0;
    o->shown += *n;
    return from;
}

void output_print(output *o) {
    size_t n;
    const char *bytes = output_take(o, &n);
    fwrite(bytes, 1, n, stdout);
    fflush(stdout);
}
