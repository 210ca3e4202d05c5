/* tokenizer.h - text to token ids and back, as Hugging Face's tokenizers library does it.
 *
 * Everything comes from the files of a checkpoint folder, nothing from the model's name:
 *
 *     tokenizer.json            the pipeline: added tokens, normalizer, pre_tokenizer, model (BPE),
 *                               post_processor, decoder
 *     tokenizer_config.json     bos_token, eos_token, chat_template       (each file may be absent)
 *     special_tokens_map.json   bos_token, eos_token where the former has none
 *     generation_config.json    bos_token_id, eos_token_id (one or a list)
 *     chat_template.jinja       chat template, before that of tokenizer_config.json
 *
 *     text -> repair UTF-8 -> cut at added tokens -> normalise -> cut at added tokens
 *     ("normalized")
 *          -> pre-tokenise into words -> BPE -> template (bos ... eos)
 *
 * "truncation" and "padding" of tokenizer.json are settings of a training run and are not applied.
 * A tokenizer is read-only: any number of threads may encode and decode with one. */
#ifndef AMALGAM_TOKENIZER_H
#define AMALGAM_TOKENIZER_H
#include "detokenize.h"
#include "ids.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { TOKENIZER_EOS_MAX = 32 };

typedef struct tokenizer tokenizer;

/* Open the folder. IO when tokenizer.json cannot be read; FORMAT, RANGE, UNSUPPORTED (with the name
 * of a part that is not known) or NOMEM with one line that begins with the file. */
status tokenizer_open(tokenizer **out, const char *dir);
void tokenizer_close(tokenizer *t); /* NULL is fine */

/* Bits for tokenizer_encode. A chat template's output wants PARSE_SPECIAL alone; text that a user
 * typed wants no special tokens parsed. */
enum {
    TOKENIZER_ADD_SPECIAL = 1,  /* what the post_processor puts around a sequence (bos, eos) */
    TOKENIZER_PARSE_SPECIAL = 2 /* "<|im_end|>" in the text is that token, not its characters */
};

/* Append the ids of n bytes. Ill-formed UTF-8 is replaced first, as bytes.decode("utf-8",
 * "replace") does. Added tokens that are not special are always recognised. NOMEM; RANGE when a
 * regular expression gives up. Empty text gives only what ADD_SPECIAL adds. */
status tokenizer_encode(const tokenizer *t, const char *s, size_t n, uint32_t flags, ids *out);

/* Append the text of n ids: always valid UTF-8. Ids without a token give nothing; with
 * `skip_special` special tokens give nothing. An added token gives its content; tokenizers 0.23
 * gives the *normalised* content of a "normalized" one ("▁<s>") and then no longer skips it, which
 * earlier versions do not and we take for an error. */
status tokenizer_decode(const tokenizer *t, const int32_t *id, int64_t n, bool skip_special,
                        text *out);

/* Decoding as the tokens come. Only complete characters are appended; all pieces together are what
 * tokenizer_decode gives for the whole sequence (detokenize.h says what is held back). */
typedef struct {
    const tokenizer *t;
    bool skip_special;
    detokenize_state state;
} tokenizer_stream;

void tokenizer_stream_open(tokenizer_stream *s, const tokenizer *t, bool skip_special);
/* Before the first push: the text is the continuation of another (detokenize_continue). */
void tokenizer_stream_continue(tokenizer_stream *s);
status tokenizer_stream_push(tokenizer_stream *s, int32_t id, text *out);
/* End of the sequence: append what was held back, then be ready for the next one. */
status tokenizer_stream_flush(tokenizer_stream *s, text *out);
void tokenizer_stream_close(tokenizer_stream *s); /* idempotent */

/* Append the bytes of one token within a text (detokenize_bytes); an id without one has none. */
status tokenizer_token_bytes(const tokenizer *t, int32_t id, text *out);

/* Highest id + 1, holes included. A model's embedding may have more rows. */
int32_t tokenizer_vocab_size(const tokenizer *t);
/* The id of exactly this token ("<|im_end|>", "Ġthe"), or -1. */
int32_t tokenizer_id(const tokenizer *t, const char *token);
/* The token as the file writes it, or NULL for an id without one. */
const char *tokenizer_piece(const tokenizer *t, int32_t id);
bool tokenizer_is_special(const tokenizer *t, int32_t id);

/* The id that begins a sequence, or -1. */
int32_t tokenizer_bos(const tokenizer *t);
/* The ids that end one: eos_token first, then those of generation_config.json. n may be 0. */
const int32_t *tokenizer_eos(const tokenizer *t, int32_t *n);
bool tokenizer_is_eos(const tokenizer *t, int32_t id);
/* The first of each as templates are given them; "" where there is none, or no tokenizer. */
const char *tokenizer_bos_text(const tokenizer *t);
const char *tokenizer_eos_text(const tokenizer *t);

/* The Jinja source of the template called `name` (NULL = "default"), or NULL. */
const char *tokenizer_chat_template(const tokenizer *t, const char *name);

#ifdef __cplusplus
}
#endif
#endif
