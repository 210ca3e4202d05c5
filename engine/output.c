/* output.c - see output.h. */
#include "output.h"

#include <string.h>

void output_open(output *o, const tokenizer *t, const char *const *stop, int32_t n_stops,
                 bool continues) {
    *o = (output){.stop = stop, .n_stops = n_stops};
    for (int32_t i = 0; i < n_stops; i++) CHECK(stop[i][0]);
    tokenizer_stream_open(&o->stream, t, true);
    if (continues) tokenizer_stream_continue(&o->stream);
}

void output_close(output *o) {
    tokenizer_stream_close(&o->stream);
    text_free(&o->text);
}

/* Cut at the earliest stop string that ends in the bytes added since `from`. */
static void find_stop(output *o, size_t from) {
    size_t cut = SIZE_MAX;
    for (int32_t i = 0; i < o->n_stops; i++) {
        const size_t n = strlen(o->stop[i]);
        for (size_t at = from >= n ? from - n + 1 : 0; at + n <= o->text.length && at < cut; at++)
            if (memcmp(o->text.data + at, o->stop[i], n) == 0) cut = at;
    }
    if (cut == SIZE_MAX) return;
    o->text.length = cut;
    o->text.data[cut] = 0;
    o->stopped = true;
}

status output_push(output *o, int32_t token, bool *stopped) {
    if (!o->stopped) {
        const size_t from = o->text.length;
        TRY(tokenizer_stream_push(&o->stream, token, &o->text));
        if (o->min_tokens > 0)
            o->min_tokens--;
        else if (o->n_stops && o->text.length > from)
            find_stop(o, from);
    }
    *stopped = o->stopped;
    return text_status(&o->text);
}

status output_finish(output *o) {
    if (o->stopped) return ST_OK;
    const size_t from = o->text.length;
    TRY(tokenizer_stream_flush(&o->stream, &o->text));
    if (o->n_stops && o->text.length > from) find_stop(o, from);
    o->n_stops = 0; /* nothing more can follow: hold nothing back */
    return text_status(&o->text);
}

/* Length of the longest suffix of the text that begins a stop string. */
static size_t held_back(const output *o) {
    size_t held = 0;
    for (int32_t i = 0; i < o->n_stops && !o->stopped; i++) {
        const size_t n = strlen(o->stop[i]) - 1, most = n < o->text.length ? n : o->text.length;
        for (size_t k = most; k > held; k--)
            if (memcmp(o->text.data + o->text.length - k, o->stop[i], k) == 0) held = k;
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
