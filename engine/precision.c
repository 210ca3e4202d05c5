/* precision.c - see precision.h. A hand parser over one cursor: each part either moves the cursor
 * past itself or fails naming the rest of the name from where it stood, because that is where the
 * reader's typing error is. */
#include "precision.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *text;
    int32_t code_bits, group, scale_bits, zero_bits;
} weight_row;

typedef struct {
    const char *text;
    int32_t code_bits, param_bits;
} kv_row;

static const weight_row weight_rows[WF_COUNT] = {
#define WEIGHT(name, text, bits, group, scale, zero) [WF_##name] = {text, bits, group, scale, zero},
#include "precision.def"
};

static const char *const act_texts[AF_COUNT] = {
#define ACT(name, text, bits) [AF_##name] = text,
#include "precision.def"
};

static const kv_row kv_rows[KF_COUNT] = {
#define KV(name, text, bits, param) [KF_##name] = {text, bits, param},
#include "precision.def"
};

enum {
    FP8B_BLOCK = 128, /* DeepSeek-V3 (arXiv 2412.19437, section 3.3.1): 128 x 128 weight blocks */
    MMA_STEP = 16,    /* no matrix instruction takes fewer outputs or inputs at once */
    GROUP_MAX = 65536,
};

const char *weight_format_text(weight_format f) {
    CHECK((unsigned)f < WF_COUNT);
    return weight_rows[f].text;
}

const char *act_format_text(act_format f) {
    CHECK((unsigned)f < AF_COUNT);
    return act_texts[f];
}

const char *kv_format_text(kv_format f) {
    CHECK((unsigned)f < KF_COUNT);
    return kv_rows[f].text;
}

int32_t weight_format_bits(weight_format f) {
    CHECK((unsigned)f < WF_COUNT);
    return weight_rows[f].code_bits;
}

int32_t kv_format_bits(kv_format f) {
    CHECK((unsigned)f < KF_COUNT);
    return kv_rows[f].code_bits;
}

int64_t kv_format_bytes(kv_format f, int32_t head_dim) {
    CHECK((unsigned)f < KF_COUNT);
    CHECK(head_dim > 0);
    return div_up((int64_t)head_dim * kv_rows[f].code_bits, 8) + kv_rows[f].param_bits / 8;
}

kv_pair precision_kv(const precision *p, int32_t layer) {
    CHECK(layer >= 0);
    if (p->n_kv_layers == 0) return p->kv;
    CHECK(layer < p->n_kv_layers);
    return p->kv_layer[layer];
}

/* --- Parsing ---------------------------------------------------------------------------------- */

typedef struct {
    const char *name, *at;
} cursor;

/* One line: the name, why, and the rest of the name from where it stops making sense; long names
 * cut. */
#define REFUSE(c, st, at, why) FAIL((st), "precision '%.48s': " why ", at '%.32s'", (c)->name, (at))

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

static bool skip(cursor *c, const char *word) {
    const size_t n = strlen(word);
    if (strncmp(c->at, word, n) != 0) return false;
    c->at += n;
    return true;
}

/* The longest text of a table that the rest starts with, as its index; -1 when none does. */
static int32_t longest(const cursor *c, const char *(*text_of)(int32_t), int32_t count) {
    int32_t best = -1;
    size_t best_length = 0;
    for (int32_t i = 0; i < count; i++) {
        const size_t n = strlen(text_of(i));
        if (n <= best_length || strncmp(c->at, text_of(i), n) != 0) continue;
        best = i;
        best_length = n;
    }
    return best;
}

static const char *weight_text_at(int32_t i) { return weight_rows[i].text; }
static const char *act_text_at(int32_t i) { return act_texts[i]; }
static const char *kv_text_at(int32_t i) { return kv_rows[i].text; }

/* Decimal digits, at least one; values past `max` read as max + 1, for the caller to refuse. */
static bool take_number(cursor *c, int32_t max, int32_t *out) {
    if (!is_digit(*c->at)) return false;
    int32_t v = 0;
    for (; is_digit(*c->at); c->at++)
        v = v > max ? v : (int32_t)i64_min((int64_t)v * 10 + (*c->at - '0'), (int64_t)max + 1);
    *out = v;
    return true;
}

static status take_weight(cursor *c, precision *p) {
    if (!skip(c, "W"))
        return REFUSE(c, ST_FORMAT, c->at, "does not start with W, as W4A16KV8 does");
    const int32_t f = longest(c, weight_text_at, WF_COUNT);
    if (f < 0)
        return REFUSE(c, ST_FORMAT, c->at, "unknown weight format (16 8 4 FP8 FP8b MXFP4 NVFP4)");
    c->at += strlen(weight_rows[f].text);
    p->weight = (weight_format)f;
    p->group = weight_rows[f].group;
    const char *options = c->at;
    if (skip(c, "g")) {
        if (skip(c, "K")) {
            p->group = 0;
        } else if (!take_number(c, GROUP_MAX, &p->group)) {
            return REFUSE(c, ST_FORMAT, options, "no group size");
        } else if (p->group == 0 || p->group % MMA_STEP || p->group > GROUP_MAX) {
            return REFUSE(c, ST_UNSUPPORTED, options, "the group is no multiple of 16 up to 65536");
        }
    }
    if (c->at != options && f != WF_INT4 && f != WF_INT8)
        return REFUSE(c, ST_UNSUPPORTED, options, "only W4 and W8 take a group");
    options = c->at;
    p->sym = skip(c, "sym");
    if (p->sym && f != WF_INT4)
        return REFUSE(c, ST_UNSUPPORTED, options, "only W4 has zero points that sym could drop");
    return ST_OK;
}

static status take_act(cursor *c, precision *p) {
    if (!skip(c, "A")) return ST_OK;
    const int32_t f = longest(c, act_text_at, AF_COUNT);
    if (f < 0) return REFUSE(c, ST_FORMAT, c->at, "unknown activation format (16 8 FP8)");
    c->at += strlen(act_texts[f]);
    p->act = (act_format)f;
    return ST_OK;
}

static status take_kv_format(cursor *c, uint8_t *out) {
    const int32_t f = longest(c, kv_text_at, KF_COUNT);
    if (f < 0) return REFUSE(c, ST_FORMAT, c->at, "unknown KV format (16 FP8 8 4)");
    c->at += strlen(kv_rows[f].text);
    *out = (uint8_t)f;
    return ST_OK;
}

/* "K" f "V" f, the K being taken already. */
static status take_halves(cursor *c, kv_pair *kv) {
    TRY(take_kv_format(c, &kv->k));
    if (!skip(c, "V")) return REFUSE(c, ST_FORMAT, c->at, "a K format without its V");
    return take_kv_format(c, &kv->v);
}

static status take_item(cursor *c, precision *p) {
    kv_pair kv;
    const char *item = c->at;
    if (*item == ']' || *item == ',' || *item == 0)
        return REFUSE(c, ST_FORMAT, item, "empty item in the KV list");
    if (skip(c, "K")) {
        TRY(take_halves(c, &kv));
    } else {
        TRY(take_kv_format(c, &kv.k));
        kv.v = kv.k;
    }
    int32_t count = 1;
    if (skip(c, "x") && (!take_number(c, PRECISION_LAYERS_MAX, &count) || count == 0))
        return REFUSE(c, ST_FORMAT, item, "no count of layers after x");
    if (count > PRECISION_LAYERS_MAX - p->n_kv_layers)
        return REFUSE(c, ST_UNSUPPORTED, item, "the KV list passes 256 layers");
    while (count--) p->kv_layer[p->n_kv_layers++] = kv;
    return ST_OK;
}

static status take_kv(cursor *c, precision *p) {
    if (skip(c, "KV[")) {
        do TRY(take_item(c, p));
        while (skip(c, ","));
        if (!skip(c, "]")) return REFUSE(c, ST_FORMAT, c->at, "the KV list lacks , or ]");
        return ST_OK;
    }
    if (skip(c, "KV")) {
        TRY(take_kv_format(c, &p->kv.k));
        p->kv.v = p->kv.k;
        return ST_OK;
    }
    return skip(c, "K") ? take_halves(c, &p->kv) : ST_OK;
}

status precision_parse(precision *out, const char *name) {
    precision p = {.weight = WF_16, .act = AF_16, .kv = {KF_16, KF_16}};
    cursor c = {name, strcmp(name, "FP8") == 0 ? "WFP8AFP8KVFP8" : name};
    TRY(take_weight(&c, &p));
    TRY(take_act(&c, &p));
    TRY(take_kv(&c, &p));
    if (*c.at) return REFUSE(&c, ST_FORMAT, c.at, "cannot be read to its end");
    *out = p;
    return ST_OK;
}

/* --- Naming ----------------------------------------------------------------------------------- */

typedef struct {
    char *buf;
    size_t n;
} name_buf;

static void put(name_buf *b, const char *word) {
    const size_t n = strlen(word);
    CHECK(b->n + n < PRECISION_NAME_MAX);
    memcpy(b->buf + b->n, word, n + 1);
    b->n += n;
}

static void put_number(name_buf *b, const char *before, int32_t v) {
    char digits[16];
    snprintf(digits, sizeof digits, "%s%d", before, v);
    put(b, digits);
}

static void put_halves(name_buf *b, kv_pair kv) {
    put(b, "K");
    put(b, kv_format_text(kv.k));
    put(b, "V");
    put(b, kv_format_text(kv.v));
}

const char *precision_name(const precision *p, char *buf) {
    name_buf b = {buf, 0};
    put(&b, "W");
    put(&b, weight_format_text(p->weight));
    if (p->weight == WF_INT4 || p->weight == WF_INT8) {
        if (p->group == weight_rows[p->weight].group)
            ; /* the default has no letters */
        else if (p->group == 0)
            put(&b, "gK");
        else
            put_number(&b, "g", p->group);
        if (p->sym) put(&b, "sym");
    }
    put(&b, "A");
    put(&b, act_format_text(p->act));
    if (p->n_kv_layers == 0) {
        if (p->kv.k != p->kv.v) {
            put_halves(&b, p->kv);
        } else {
            put(&b, "KV");
            put(&b, kv_format_text(p->kv.k));
        }
        return buf;
    }
    for (int32_t i = 0, run; i < p->n_kv_layers; i += run) {
        const kv_pair kv = p->kv_layer[i];
        for (run = 1; i + run < p->n_kv_layers; run++)
            if (p->kv_layer[i + run].k != kv.k || p->kv_layer[i + run].v != kv.v) break;
        put(&b, i ? "," : "KV[");
        if (kv.k != kv.v)
            put_halves(&b, kv);
        else
            put(&b, kv_format_text(kv.k));
        if (run > 1) put_number(&b, "x", run);
    }
    put(&b, "]");
    return buf;
}

/* --- Sizes ------------------------------------------------------------------------------------ */

int64_t precision_scale_count(const precision *p, int64_t n, int64_t k) {
    CHECK(n > 0);
    CHECK(k > 0);
    if (p->weight == WF_16) return 0;
    const int64_t per_row = p->group ? div_up(k, p->group) : 1;
    return per_row * (p->weight == WF_FP8B ? div_up(n, FP8B_BLOCK) : n);
}

int64_t precision_zero_count(const precision *p, int64_t n, int64_t k) {
    const bool has_zero = weight_rows[p->weight].zero_bits && !p->sym;
    return has_zero ? precision_scale_count(p, n, k) : 0;
}

int64_t precision_weight_bytes(const precision *p, int64_t n, int64_t k) {
    const weight_row *w = &weight_rows[p->weight];
    return div_up(n * k * w->code_bits, 8) + precision_scale_count(p, n, k) * (w->scale_bits / 8) +
           precision_zero_count(p, n, k) * (w->zero_bits / 8);
}

status precision_fits_shape(const precision *p, int32_t n, int32_t k) {
    if (n <= 0 || k <= 0) return FAIL(ST_SHAPE, "a linear of %d x %d", n, k);
    if (p->weight == WF_16) return ST_OK;
    const char *format = weight_format_text(p->weight);
    if (n % MMA_STEP)
        return FAIL(ST_SHAPE, "W%s: n=%d outputs are no multiple of %d", format, n, MMA_STEP);
    if (k % MMA_STEP)
        return FAIL(ST_SHAPE, "W%s: k=%d inputs are no multiple of %d", format, k, MMA_STEP);
    if (p->weight != WF_FP8B && p->group && k % p->group)
        return FAIL(ST_SHAPE, "W%s: k=%d inputs are no multiple of the group of %d", format, k,
                    p->group);
    return ST_OK;
}
