// attention.cu - which attention kernel runs: checks, the table of variants, and the launch.
#include "attention_plan.h"
#include <cstring>
#include <cuda_runtime.h>

namespace {

bool any(const attention_problem *) { return true; }
bool wide(const attention_problem *p) { return p->l.head_dim >= 64; }
// K of 4 bits beside V of 16 in tiles of 16 heads would take more registers than there are.
bool decodes(const attention_problem *p) {
    const int ratio = p->l.n_heads / p->l.n_kv_heads;
    return wide(p) &&
           !(p->c.k == KF_4 && p->c.v == KF_16 && attention_tile_heads(ratio, p->l.head_dim) > 8);
}

// Best first: the first that accepts is launched, once for decodes and once for prefill chunks if
// no single one takes both.
const attention_variant variants[] = {
    {"decode_bulk", 90, 90, 129, true, false, WIDE_NEVER, decodes, attention_decode_bulk_launch},
    {"prefill_wgmma", 90, 90, 90, false, true, WIDE_NIBBLES, wide, attention_prefill_sm90_launch},
    {"decode_async", 80, 80, 129, true, false, WIDE_NEVER, decodes, attention_decode_async_launch},
    {"prefill_mma", 80, 80, 129, false, true, WIDE_ORDER, attention_prefill_mma_accepts,
     attention_prefill_mma_launch},
    {"plain", 80, 80, 129, true, true, WIDE_NEVER, any, attention_plain_launch},
};
constexpr int kVariants = (int)(sizeof variants / sizeof *variants);

// Shared memory of an SM (CUDA C++ Programming Guide, table of compute capabilities).
int shared_bytes_of(int sm) { return (sm == 80 ? 164 : sm >= 90 && sm < 120 ? 228 : 100) * 1024; }

const attention_variant *choose(const attention_problem *p, bool decode, const char *name,
                                int family) {
    for (const attention_variant &v : variants)
        if ((!name || !strcmp(name, v.name)) && (!family || family == v.family) &&
            p->sm >= v.sm_min && p->sm <= v.sm_max && (decode ? v.decode : v.prefill) &&
            v.accepts(p))
            return &v;
    return nullptr;
}

status check(const attention_problem *p) {
    const attention_layer_params *l = &p->l;
    if (l->type != DT_F16 && l->type != DT_BF16)
        return FAIL(ST_UNSUPPORTED, "attention of %s", dtype_text(l->type));
    if (l->n_kv_heads <= 0 || l->n_heads <= 0 || l->n_heads % l->n_kv_heads)
        return FAIL(ST_SHAPE, "attention of %d heads over %d", l->n_heads, l->n_kv_heads);
    if (l->head_dim != 32 && l->head_dim != 64 && l->head_dim != 128 && l->head_dim != 256)
        return FAIL(ST_UNSUPPORTED, "attention with head_dim %d", l->head_dim);
    return ST_OK;
}

// Chunks of many rows over their pages written out, then the others.
status launch_prefills(attention_problem *p, const attention_variant *f) {
    const bool codes = p->c.k != KF_16 && p->c.v != KF_16;
    if (f->wide == WIDE_NEVER || !p->wide.base || !codes || p->counts.n_wide == 0)
        return f->launch(p, false, true);
    TRY(attention_widen(p, f->wide));
    p->tiles = TILES_WIDE;
    TRY(f->launch(p, false, true));
    p->tiles = TILES_NARROW;
    return p->counts.n_tiles > p->counts.n_wide ? f->launch(p, false, true) : ST_OK;
}

} // namespace

extern "C" const char *const *attention_variants(void) {
    static const char *names[kVariants + 1];
    for (int i = 0; i < kVariants; i++) names[i] = variants[i].name;
    return names;
}

extern "C" status kernel_attention(void *out, const void *qkv, const attention_layer_params *l,
                                   const attention_cache *c, const attention_batch *b,
                                   const attention_work *work, const char *kernel, int32_t family,
                                   int32_t sm, int32_t n_sms, kernel_stream stream) {
    attention_problem p = {
        out,
        qkv,
        *l,
        *c,
        *b,
        attention_layout_of(c->k, c->v, l->n_kv_heads, l->head_dim),
        {work->wide, attention_page_bytes(KF_16, KF_16, l->n_kv_heads, l->head_dim), KF_16, KF_16},
        (const attention_plan *)work->plan,
        work->counts,
        TILES_ALL,
        work->workspace,
        sm,
        n_sms,
        shared_bytes_of(sm),
        stream,
    };
    TRY(check(&p));
    const bool decodes = b->n_decodes > 0, prefills = b->n_seqs > b->n_decodes;
    const attention_variant *d = decodes ? choose(&p, true, kernel, family) : nullptr;
    const attention_variant *f = prefills ? choose(&p, false, kernel, family) : nullptr;
    if ((decodes && !d) || (prefills && !f))
        return FAIL(ST_UNSUPPORTED, "no attention kernel %s for K%sV%s on sm_%d",
                    kernel ? kernel : "", kv_format_text(c->k), kv_format_text(c->v), sm);
    if (d && d == f) return d->launch(&p, true, true);
    if (d) TRY(d->launch(&p, true, false));
    return f ? launch_prefills(&p, f) : ST_OK;
}
