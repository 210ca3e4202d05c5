/* utf8.h - UTF-8 decoding with the repair rule of Python and Rust, character classes, NFC. */
#ifndef AMALGAM_UTF8_H
#define AMALGAM_UTF8_H
#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Look at the character that starts at p[0] (n >= 1 bytes are there).
 *
 * Returns its length 1..4 and stores the code point, or
 *   -k  the first k bytes (1..3) are a maximal ill-formed part: one U+FFFD stands for them,
 *    0  the n bytes are a beginning that more bytes could complete.
 * Unicode 15, section 3.9, table 3-7: no surrogates, no overlong forms, nothing above U+10FFFF. */
int32_t utf8_next(const char *p, size_t n, uint32_t *code_point);

/* Append one code point (a scalar value). */
void utf8_put(text *t, uint32_t code_point);

/* Append the n bytes, each maximal ill-formed part as U+FFFD: what bytes.decode("utf-8", "replace")
 * and String::from_utf8_lossy give. Refused memory shows in text_status(out). */
void utf8_repair(text *out, const char *p, size_t n);

/* True when utf8_repair would change nothing. */
bool utf8_valid(const char *p, size_t n);

/* The White_Space property, and \w of Rust's regex crate (letters, marks, digits, connectors,
 * joiners). */
bool utf8_is_space(uint32_t code_point);
bool utf8_is_word(uint32_t code_point);

/* Append the canonical composition (NFC, Unicode 15) of n bytes of valid UTF-8. NOMEM when memory
 * is short. Linear time, also for a long run of combining marks. */
status utf8_nfc(text *out, const char *p, size_t n);

#ifdef __cplusplus
}
#endif
#endif
