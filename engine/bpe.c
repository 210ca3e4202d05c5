/* bpe.c - see bpe.h. */
#include "bpe.h"

#include "utf8.h"

#include <string.h>

/* --- Looking up ------------------------------------------------------------------------------- */

int32_t bpe_find(const bpe *m, const char *s, size_t n) {
    for (uint32_t at = (uint32_t)hash_bytes(s, n, 0) & m->slot_mask; m->slots[at] >= 0;
         at = (at + 1) & m->slot_mask) {
        const piece *p = &m->pieces[m->slots[at]];
        if ((size_t)p->length == n && !memcmp(p->data, s, n)) return m->slots[at];
    }
    return -1;
}

/* The slot of a pair: its merge, or the empty one where it would go. */
static bpe_merge *merge_slot(const bpe *m, int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15u;
    h ^= h >> 32; /* Fibonacci hashing; the high half knows of all bits */
    for (uint32_t at = (uint32_t)h & m->merge_mask;; at = (at + 1) & m->merge_mask) {
        bpe_merge *slot = &m->merges[at];
        if (slot->left < 0 || (slot->left == left && slot->right == right)) return slot;
    }
}

static const bpe_merge *find_merge(const bpe *m, int32_t left, int32_t right) {
    const bpe_merge *slot = merge_slot(m, left, right);
    return slot->left < 0 ? NULL : slot;
}

/* --- Reading ---------------------------------------------------------------------------------- */

/* A power of two with at least half of the slots free. */
static uint32_t table_size(size_t n) {
    uint32_t size = 16;
    while (size < 2 * n) size *= 2;
    return size;
}

static status read_vocab(bpe *m, const json_t *vocab, int32_t n_ids_min, arena *a) {
    const size_t n = json_object_size(vocab);
    if (n == 0 || n > 1 << 26) return FAIL(ST_RANGE, "model: vocabulary of %zu tokens", n);
    const int64_t id_limit = 4 * (int64_t)n + 65536; /* holes are normal, a far id is damage */
    if (n_ids_min > id_limit)
        return FAIL(ST_RANGE, "added_tokens: id %d with a vocabulary of %zu", n_ids_min - 1, n);
    const char *key;
    json_t *value;
    m->n_ids = n_ids_min;
    json_object_foreach((json_t *)(uintptr_t)vocab, key, value) {
        const json_int_t id = json_is_integer(value) ? json_integer_value(value) : -1;
        if (id < 0 || id >= id_limit)
            return FAIL(ST_RANGE, "model: token '%.60s' has no id within 0 to %lld", key,
                        (long long)id_limit - 1);
        m->n_ids = (int32_t)i64_max(m->n_ids, id + 1);
    }
    const uint32_t n_slots = table_size(n);
    m->slot_mask = n_slots - 1;
    m->pieces = arena_array(a, piece, (size_t)m->n_ids);
    m->slots = arena_array(a, int32_t, n_slots);
    if (!m->pieces || !m->slots) return FAIL(ST_NOMEM, "model: %zu tokens", n);
    memset(m->slots, 0xff, n_slots * sizeof *m->slots);
    json_object_foreach((json_t *)(uintptr_t)vocab, key, value) {
        const int32_t id = (int32_t)json_integer_value(value);
        const size_t length = strlen(key);
        piece *p = &m->pieces[id];
        if (p->data)
            return FAIL(ST_FORMAT, "model: tokens '%.60s' and '%.60s' share id %d", p->data, key,
                        id);
        *p = (piece){arena_string(a, key, length), (int32_t)length, false};
        if (!p->data) return FAIL(ST_NOMEM, "model: %zu tokens", n);
        uint32_t at = (uint32_t)hash_bytes(key, length, 0) & m->slot_mask;
        while (m->slots[at] >= 0) at = (at + 1) & m->slot_mask; /* keys of an object differ */
        m->slots[at] = id;
    }
    return ST_OK;
}

/* The parts of a merge, "a b" in old files and ["a", "b"] in new ones. */
static bool merge_parts(const json_t *merge, const char *part[2], size_t length[2]) {
    if (json_is_string(merge)) {
        const char *s = json_string_value(merge);
        const size_t n = json_string_length(merge);
        const char *space = memchr(s, ' ', n);
        if (!space) return false;
        part[0] = s, length[0] = (size_t)(space - s);
        part[1] = space + 1, length[1] = n - length[0] - 1;
        return !memchr(part[1], ' ', length[1]);
    }
    if (json_array_size(merge) != 2) return false;
    for (size_t i = 0; i < 2; i++) {
        const json_t *s = json_array_get(merge, i);
        if (!json_is_string(s)) return false;
        part[i] = json_string_value(s), length[i] = json_string_length(s);
    }
    return true;
}

static status read_merge(bpe *m, const json_t *merge, int32_t rank, text *joined) {
    const char *part[2];
    size_t length[2];
    if (!merge_parts(merge, part, length))
        return FAIL(ST_FORMAT, "model: merge %d is neither \"a b\" nor [\"a\", \"b\"]", rank);
    int32_t id[2];
    text_clear(joined);
    for (int32_t i = 0; i < 2; i++) {
        text_bytes(joined, part[i], length[i]);
        id[i] = bpe_find(m, part[i], length[i]);
        if (id[i] < 0)
            return FAIL(ST_FORMAT, "model: merge %d needs the token '%.*s', which is not there",
                        rank, (int)i64_min(60, (int64_t)length[i]), part[i]);
    }
    TRY(text_status(joined));
    const int32_t made = bpe_find(m, joined->data, joined->length);
    if (made < 0)
        return FAIL(ST_FORMAT, "model: merge %d makes '%.60s', which is no token", rank,
                    joined->data);
    *merge_slot(m, id[0], id[1]) =
        (bpe_merge){id[0], id[1], rank, made}; /* a repeated pair: last */
    return ST_OK;
}

static status read_merges(bpe *m, const json_t *merges, arena *a) {
    const size_t n = json_array_size(merges);
    if (n > 1 << 26) return FAIL(ST_RANGE, "model: %zu merges", n);
    const uint32_t n_slots = table_size(n);
    m->merge_mask = n_slots - 1;
    m->merges = arena_array(a, bpe_merge, n_slots);
    if (!m->merges) return FAIL(ST_NOMEM, "model: %zu merges", n);
    for (uint32_t i = 0; i < n_slots; i++) m->merges[i].left = -1;
    text joined = {0};
    status st = ST_OK;
    for (size_t i = 0; i < n && st == ST_OK; i++)
        st = read_merge(m, json_array_get(merges, i), (int32_t)i, &joined);
    text_free(&joined);
    return st;
}

static status read_options(bpe *m, const json_t *spec) {
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    const char *unk = NULL;
    double dropout = 0;
    for (int32_t i = 0; i < COUNT_OF(affixes); i++) {
        const char *affix = "";
        TRY(json_opt_string(spec, affixes[i], "model", &affix));
        if (*affix) return FAIL(ST_UNSUPPORTED, "model: %s is not supported", affixes[i]);
    }
    TRY(json_opt_f64(spec, "dropout", "model", 0, 1, &dropout));
    if (dropout > 0) return FAIL(ST_UNSUPPORTED, "model: dropout is not supported");
    TRY(json_opt_bool(spec, "fuse_unk", "model", &m->fuse_unk));
    TRY(json_opt_bool(spec, "byte_fallback", "model", &m->byte_fallback));
    TRY(json_opt_bool(spec, "ignore_merges", "model", &m->ignore_merges));
    TRY(json_opt_string(spec, "unk_token", "model", &unk));
    m->unk = unk ? bpe_find(m, unk, strlen(unk)) : -1;
    if (unk && m->unk < 0) return FAIL(ST_FORMAT, "model: unk_token '%.60s' is no token", unk);
    return ST_OK;
}

static void index_characters(bpe *m) {
    char s[8];
    for (int32_t i = 0; i < COUNT_OF(m->char_ids); i++) {
        if (i < 0x80) s[0] = (char)i;
        if (i >= 0x80) s[0] = (char)(0xc0 | i >> 6), s[1] = (char)(0x80 | (i & 0x3f));
        m->char_ids[i] = bpe_find(m, s, i < 0x80 ? 1 : 2);
    }
    for (int32_t i = 0; i < 256; i++) {
        snprintf(s, sizeof s, "<0x%02X>", (unsigned)i);
        m->byte_ids[i] = bpe_find(m, s, 6);
    }
}

status bpe_open(bpe *m, const json_t *spec, int32_t n_ids_min, arena *a) {
    *m = (bpe){.unk = -1};
    const json_t *vocab = json_find(spec, "vocab"), *merges = json_find(spec, "merges");
    if (!json_is_object(spec)) return FAIL(ST_FORMAT, "'model' is missing");
    /* A model of another type may keep its vocabulary in another form: name the type first. */
    const char *type = "BPE";
    TRY(json_opt_string(spec, "type", "model", &type));
    if (strcmp(type, "BPE") != 0) return FAIL(ST_UNSUPPORTED, "model '%s' is not supported", type);
    if (!json_is_object(vocab)) return FAIL(ST_FORMAT, "model: 'vocab' is missing");
    if (!json_is_array(merges)) return FAIL(ST_FORMAT, "model: 'merges' is missing");
    TRY(read_vocab(m, vocab, n_ids_min, a));
    TRY(read_options(m, spec));
    TRY(read_merges(m, merges, a));
    index_characters(m);
    return ST_OK;
}

/* --- Encoding --------------------------------------------------------------------------------- */

void bpe_room_close(bpe_room *room) {
    mem_free(room->symbols);
    mem_free(room->heap);
    ids_free(&room->word);
    *room = (bpe_room){0};
}

static int32_t char_id(const bpe *m, const char *s, int32_t length, uint32_t c) {
    return c < (uint32_t)COUNT_OF(m->char_ids) ? m->char_ids[c] : bpe_find(m, s, (size_t)length);
}

static bool has_all_bytes(const bpe *m, const char *s, int32_t n) {
    for (int32_t i = 0; i < n; i++)
        if (m->byte_ids[(uint8_t)s[i]] < 0) return false;
    return true;
}

/* One id per character. A run of unknown characters gives one unk when they fuse; that unk is put
 * down before the next *known* character, so bytes of a fallback in between come first (as in the
 * reference). */
static void put_characters(const bpe *m, const char *s, size_t n, ids *word) {
    bool unk = false; /* one is waiting */
    for (size_t at = 0; at < n;) {
        uint32_t c = 0;
        const int32_t length = utf8_next(s + at, n - at, &c);
        CHECK(length > 0);
        const int32_t id = char_id(m, s + at, length, c);
        if (id >= 0) {
            if (unk) ids_add(word, m->unk);
            unk = false;
            ids_add(word, id);
        } else if (m->byte_fallback && has_all_bytes(m, s + at, length)) {
            for (int32_t i = 0; i < length; i++)
                ids_add(word, m->byte_ids[(uint8_t)s[at + (size_t)i]]);
        } else if (m->unk >= 0) {
            if (unk && !m->fuse_unk) ids_add(word, m->unk);
            unk = true;
        }
        at += (size_t)length;
    }
    if (unk) ids_add(word, m->unk);
}

/* A short word: keep the rank of each neighbouring pair, scan for the lowest. */
enum { SHORT_WORD = 48 };

static int32_t merge_short(const bpe *m, int32_t *id, int32_t n) {
    const bpe_merge *pair[SHORT_WORD]; /* of id[i] and id[i + 1] */
    for (int32_t i = 0; i + 1 < n; i++) pair[i] = find_merge(m, id[i], id[i + 1]);
    for (;;) {
        int32_t best = -1;
        for (int32_t i = 0; i + 1 < n; i++)
            if (pair[i] && (best < 0 || pair[i]->rank < pair[best]->rank)) best = i;
        if (best < 0) return n;
        id[best] = pair[best]->id;
        n--;
        for (int32_t i = best + 1; i < n; i++) id[i] = id[i + 1];
        for (int32_t i = best + 1; i + 1 < n; i++) pair[i] = pair[i + 1];
        if (best > 0) pair[best - 1] = find_merge(m, id[best - 1], id[best]);
        if (best + 1 < n) pair[best] = find_merge(m, id[best], id[best + 1]);
    }
}

/* A long word: linked symbols and a heap of candidate pairs. A candidate whose symbols have changed
 * since it was pushed is stale and dropped when it comes up. */
struct bpe_symbol {
    int32_t id, prev, next; /* -1 = none; id -1 = swallowed by its left neighbour */
};

struct bpe_candidate {
    int32_t rank, at;    /* order of the heap; `at` is the left symbol */
    int32_t left, right; /* ids at the time of pushing */
    int32_t id;
};

static bool before(const bpe_candidate *a, const bpe_candidate *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(bpe_candidate *heap, size_t *n, bpe_candidate c) {
    size_t i = (*n)++;
    while (i > 0 && before(&c, &heap[(i - 1) / 2])) {
        heap[i] = heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap[i] = c;
}

static bpe_candidate heap_pop(bpe_candidate *heap, size_t *n) {
    const bpe_candidate top = heap[0], last = heap[--*n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < *n; i = child) {
        if (child + 1 < *n && before(&heap[child + 1], &heap[child])) child++;
        if (!before(&heap[child], &last)) break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return top;
}

static void push_pair(const bpe *m, bpe_room *room, size_t *n_heap, int32_t at) {
    const bpe_symbol *left = &room->symbols[at];
    if (left->next < 0) return;
    const int32_t right = room->symbols[left->next].id;
    const bpe_merge *merge = find_merge(m, left->id, right);
    if (merge)
        heap_push(room->heap, n_heap, (bpe_candidate){merge->rank, at, left->id, right, merge->id});
}

/* Room for n symbols and the at most 3 n candidates that they can make: n - 1 at the start, two for
 * each of at most n - 1 merges. */
static status grow_room(bpe_room *room, size_t n) {
    if (n > room->n_symbols_max) {
        bpe_symbol *p = mem_resize(room->symbols, n, sizeof *p);
        if (!p) return FAIL(ST_NOMEM, "word of %zu characters", n);
        room->symbols = p;
        room->n_symbols_max = n;
    }
    if (3 * n > room->heap_max) {
        bpe_candidate *p = mem_resize(room->heap, 3 * n, sizeof *p);
        if (!p) return FAIL(ST_NOMEM, "word of %zu characters", n);
        room->heap = p;
        room->heap_max = 3 * n;
    }
    return ST_OK;
}

static status merge_long(const bpe *m, bpe_room *room, int32_t *id, int32_t *n) {
    TRY(grow_room(room, (size_t)*n));
    bpe_symbol *symbols = room->symbols;
    size_t n_heap = 0;
    for (int32_t i = 0; i < *n; i++)
        symbols[i] = (bpe_symbol){id[i], i - 1, i + 1 < *n ? i + 1 : -1};
    for (int32_t i = 0; i < *n; i++) push_pair(m, room, &n_heap, i);
    while (n_heap > 0) {
        const bpe_candidate c = heap_pop(room->heap, &n_heap);
        bpe_symbol *left = &symbols[c.at];
        if (left->id != c.left || left->next < 0) continue;
        bpe_symbol *right = &symbols[left->next];
        if (right->id != c.right) continue;
        right->id = -1;
        left->id = c.id;
        left->next = right->next;
        if (right->next >= 0) symbols[right->next].prev = c.at;
        if (left->prev >= 0) push_pair(m, room, &n_heap, left->prev);
        push_pair(m, room, &n_heap, c.at);
    }
    int32_t kept = 0;
    for (int32_t i = 0; i >= 0; i = symbols[i].next) id[kept++] = symbols[i].id;
    *n = kept;
    return ST_OK;
}

status bpe_encode(const bpe *m, bpe_room *room, const char *s, size_t n, ids *out) {
    if (n > 1 << 30) return FAIL(ST_RANGE, "a word of %zu bytes", n);
    if (m->ignore_merges) {
        const int32_t id = bpe_find(m, s, n);
        if (id >= 0) {
            ids_add(out, id);
            return ids_status(out);
        }
    }
    ids *word = &room->word;
    ids_clear(word);
    put_characters(m, s, n, word);
    TRY(ids_status(word));
    int32_t length = (int32_t)word->length;
    if (length == 0) return ST_OK;
    if (length <= SHORT_WORD)
        length = merge_short(m, word->data, length);
    else
        TRY(merge_long(m, room, word->data, &length));
    ids_add_all(out, word->data, length);
    return ids_status(out);
}
