/* utf8.c - see utf8.h. Property tables and compositions come from utf8proc. */
#include "utf8.h"

#include <string.h>
#include <utf8proc.h>

int32_t utf8_next(const char *bytes, size_t n, uint32_t *code_point) {
    const uint8_t *p = (const uint8_t *)bytes;
    const uint8_t lead = p[0];
    if (lead < 0x80) {
        *code_point = lead;
        return 1;
    }
    int32_t length;
    uint32_t c;
    uint8_t lo = 0x80, hi = 0xbf; /* of the second byte */
    if (lead >= 0xc2 && lead <= 0xdf) {
        length = 2, c = lead & 0x1fu;
    } else if (lead >= 0xe0 && lead <= 0xef) {
        length = 3, c = lead & 0x0fu;
        if (lead == 0xe0) lo = 0xa0; /* overlong below */
        if (lead == 0xed) hi = 0x9f; /* surrogates above */
    } else if (lead >= 0xf0 && lead <= 0xf4) {
        length = 4, c = lead & 0x07u;
        if (lead == 0xf0) lo = 0x90;
        if (lead == 0xf4) hi = 0x8f; /* U+10FFFF */
    } else {
        return -1;
    }
    for (int32_t i = 1; i < length; i++) {
        if ((size_t)i >= n) return 0;
        if (p[i] < lo || p[i] > hi) return -i;
        lo = 0x80, hi = 0xbf;
        c = c << 6 | (p[i] & 0x3fu);
    }
    *code_point = c;
    return length;
}

void utf8_put(text *t, uint32_t c) {
    char b[4];
    size_t n;
    if (c < 0x80) {
        b[0] = (char)c, n = 1;
    } else if (c < 0x800) {
        b[0] = (char)(0xc0 | c >> 6), b[1] = (char)(0x80 | (c & 0x3f)), n = 2;
    } else if (c < 0x10000) {
        b[0] = (char)(0xe0 | c >> 12), b[1] = (char)(0x80 | (c >> 6 & 0x3f));
        b[2] = (char)(0x80 | (c & 0x3f)), n = 3;
    } else {
        CHECK(c <= 0x10ffff);
        b[0] = (char)(0xf0 | c >> 18), b[1] = (char)(0x80 | (c >> 12 & 0x3f));
        b[2] = (char)(0x80 | (c >> 6 & 0x3f)), b[3] = (char)(0x80 | (c & 0x3f)), n = 4;
    }
    text_bytes(t, b, n);
}

/* Bytes at p that are well-formed, up to the first ill-formed or unfinished character. */
static size_t valid_prefix(const char *p, size_t n) {
    size_t at = 0;
    uint32_t c;
    while (at < n) {
        const int32_t k = utf8_next(p + at, n - at, &c);
        if (k <= 0) break;
        at += (size_t)k;
    }
    return at;
}

bool utf8_valid(const char *p, size_t n) { return valid_prefix(p, n) == n; }

void utf8_repair(text *out, const char *p, size_t n) {
    size_t at = 0;
    while (at < n) {
        const size_t good = valid_prefix(p + at, n - at);
        text_bytes(out, p + at, good);
        at += good;
        if (at == n) break;
        uint32_t c;
        const int32_t k = utf8_next(p + at, n - at, &c);
        text_bytes(out, "\xef\xbf\xbd", 3);
        at = k < 0 ? at + (size_t)-k : n; /* an unfinished end is one part */
    }
}

bool utf8_is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

bool utf8_is_word(uint32_t c) {
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    default:
        return c == 0x200c || c == 0x200d || /* join controls; the rest is Other_Alphabetic */
               (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) ||
               (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189);
    }
}

/* --- NFC -------------------------------------------------------------------------------------- */

static uint8_t combining_class(utf8proc_int32_t c) {
    return (uint8_t)utf8proc_get_property(c)->combining_class;
}

/* Sort [n] code points of non-zero combining class by class, equal ones in order: a counting sort,
 * because a hostile text is one long run. `copy` has room for n. */
static void order_marks(utf8proc_int32_t *marks, utf8proc_int32_t *copy, size_t n) {
    size_t at[257] = {0};
    for (size_t i = 0; i < n; i++) at[combining_class(marks[i]) + 1]++;
    for (int32_t k = 1; k < 257; k++) at[k] += at[k - 1];
    memcpy(copy, marks, n * sizeof *marks);
    for (size_t i = 0; i < n; i++) marks[at[combining_class(copy[i])]++] = copy[i];
}

static void order_all_marks(utf8proc_int32_t *points, utf8proc_int32_t *copy, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t end = i;
        while (end < n && combining_class(points[end]) != 0) end++;
        if (end - i > 1) order_marks(points + i, copy, end - i);
        i = end > i ? end : i + 1;
    }
}

/* U+0300 is the first character that NFC may change or reorder. */
static bool below_u0300(const char *p, size_t n) {
    for (size_t i = 0; i < n; i++)
        if ((uint8_t)p[i] >= 0xcc) return false;
    return true;
}

/* A canonical decomposition has at most 4 code points (Unicode Standard Annex 15); the widest gain
 * per input byte is 3 points from 2 bytes, so 2 a byte is a bound. */
status utf8_nfc(text *out, const char *p, size_t n) {
    if (below_u0300(p, n)) {
        text_bytes(out, p, n);
        return text_status(out);
    }
    const size_t room = 2 * n + 4;
    utf8proc_int32_t *points = mem_resize(NULL, 2 * room, sizeof *points);
    if (!points) return FAIL(ST_NOMEM, "NFC of %zu bytes", n);
    size_t n_points = 0;
    for (size_t at = 0; at < n;) {
        uint32_t c = 0;
        const int32_t k = utf8_next(p + at, n - at, &c);
        CHECK(k > 0);
        at += (size_t)k;
        int boundary = 0;
        const utf8proc_ssize_t made = utf8proc_decompose_char(
            (utf8proc_int32_t)c, points + n_points, (utf8proc_ssize_t)(room - n_points),
            UTF8PROC_STABLE | UTF8PROC_COMPOSE, &boundary);
        CHECK(made >= 0);
        n_points += (size_t)made;
        CHECK(n_points <= room);
    }
    order_all_marks(points, points + room, n_points);
    const utf8proc_ssize_t left = utf8proc_normalize_utf32(points, (utf8proc_ssize_t)n_points,
                                                           UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    CHECK(left >= 0);
    for (utf8proc_ssize_t i = 0; i < left; i++) utf8_put(out, (uint32_t)points[i]);
    mem_free(points);
    return text_status(out);
}
