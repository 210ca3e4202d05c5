// linear.cu - linear layers on a GPU: packing, choice of a kernel, launch.
#include "linear_common.cuh"
#include "linear_launch.h"

#include <cstring>

namespace {

// --- Packing: one thread a lane of a unit, by the functions that define the order ---------------

struct pack_args {
    linear_weight w;
    qmatrix q;
    linear_layout l;
    uint8_t *code, *scale;
};

__device__ uint16_t code_at(const pack_args &a, int32_t row, int32_t col) {
    if (row < 0 || col >= a.w.k) return a.w.format == WF_INT4 && a.w.sym ? 8 : 0;
    const int64_t at = (int64_t)row * a.w.k + col;
    if (a.l.bits == 16) return reinterpret_cast<const uint16_t *>(a.q.code)[at];
    if (a.l.bits == 8) return a.q.code[at];
    return a.q.code[at / 2] >> (at % 2 * 4) & 15;
}

__global__ void pack_codes(const pack_args a) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (int64_t)a.l.blocks * a.l.units * 128) return;
    const int lane = (int)(i % 32), strip = (int)(i / 32 % 4);
    const int32_t u = (int32_t)(i / 128 % a.l.units), b = (int32_t)(i / 128 / a.l.units);
    for (int j = 0; j < 4; j++) {
        uint16_t c[8];
        for (int e = 0; e < 8; e++)
            c[e] = code_at(a, linear_row(&a.l, b, strip * 16 + linear_word_row(&a.l, j, lane, e)),
                           u * 64 + linear_word_col(&a.l, j, lane, e));
        uint8_t *to = a.code + linear_word_at(&a.l, b, u, strip, j, lane);
        if (a.l.bits == 4) {
            uint8_t n[8];
            for (int e = 0; e < 8; e++) n[e] = (uint8_t)c[e];
            *reinterpret_cast<uint32_t *>(to) =
                linear_pack4(n, a.w.format != WF_INT4, a.w.type == DT_BF16);
        } else if (a.l.bits == 8) {
            uint8_t n[8];
            for (int e = 0; e < 8; e++) n[e] = (uint8_t)c[e];
            linear_pack8(reinterpret_cast<uint32_t *>(to), n, a.w.format == WF_INT8,
                         a.w.type == DT_BF16);
        } else {
            for (int e = 0; e < 8; e++) reinterpret_cast<uint16_t *>(to)[e] = c[e];
        }
    }
}

__global__ void pack_scales(const pack_args a) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int granules = max(a.l.granules, 1);
    if (i >= (int64_t)a.l.blocks * granules * 64) return;
    const int in = (int)(i % 64);
    const int32_t j = (int32_t)(i / 64 % granules), b = (int32_t)(i / 64 / granules);
    const int32_t row = linear_row(&a.l, b, in), place = linear_scale_place(in);
    if (!a.l.granule) {
        reinterpret_cast<float *>(a.scale)[b * 64 + in] =
            row < 0 ? 0.f : static_cast<const float *>(a.q.scale)[row] * linear_channel_fold(&a.w);
        return;
    }
    const int32_t groups = (a.w.k + a.q.group - 1) / a.q.group;
    const bool pad = row < 0 || j * a.l.granule >= a.w.k;
    const int64_t at =
        pad ? 0 : (int64_t)(row / a.q.block_n) * groups + j * a.l.granule / a.q.group;
    uint8_t *to = a.scale + ((int64_t)b * a.l.granules + j) * a.l.granule_bytes;
    if (a.w.format == WF_INT4) {
        reinterpret_cast<uint16_t *>(to)[place] =
            pad ? 0x3c00 : static_cast<const uint16_t *>(a.q.scale)[at];
        if (!a.w.sym) to[128 + place] = pad ? 0 : a.q.zero[at];
    } else if (a.w.format == WF_FP8B) {
        if (in % 16 == 0)
            reinterpret_cast<float *>(to)[place / 16] =
                pad ? 1.f : static_cast<const float *>(a.q.scale)[at];
    } else {
        const bool e8m0 = a.w.format == WF_MXFP4;
        const uint8_t s = pad ? e8m0 ? 127 : 0x38 : static_cast<const uint8_t *>(a.q.scale)[at];
        to[place] = e8m0 ? linear_e8m0_pack(s, a.w.type == DT_BF16) : s;
    }
}

// Plain order: the canonical arrays, rows of block scales further apart.
status pack_plain(const linear_weight *w, const qmatrix *q, cudaStream_t stream) {
    const linear_layout l = linear_layout_of(w);
    const bool blocks = w->format == WF_FP8B;
    const size_t rows = blocks ? (size_t)(w->n + 127) / 128 : 1;
    const size_t cols = blocks ? (size_t)(w->k + 127) / 128 : (size_t)w->n;
    const size_t stride = blocks ? (size_t)linear_plain_stride(w->k) : cols;
    cudaError_t e =
        cudaMemcpyAsync(w->code, q->code, (size_t)l.code_bytes, cudaMemcpyDeviceToDevice, stream);
    if (e == cudaSuccess) e = cudaMemsetAsync(w->scale, 0, (size_t)l.scale_bytes, stream);
    if (e == cudaSuccess)
        e = cudaMemcpy2DAsync(w->scale, stride * 4, q->scale, cols * 4, cols * 4, rows,
                              cudaMemcpyDeviceToDevice, stream);
    if (e != cudaSuccess) return FAIL(ST_DEVICE, "linear_pack: %s", cudaGetErrorString(e));
    return linear_lt_ready();
}

// --- Choice ------------------------------------------------------------------------------------

// Where linear_tuned.def has nothing: best first for problems of up to `rows` x rows (an expert's,
// on average) and n k below two to the power `size`. ONE_WAVE: where there are tiles of 64 rows of
// W for one SM in eight at least and for all at most. FILLS: where there is no more than a tile an
// SM, and tiles, shared by as many SMs each as there are for it, leave one SM in sixteen idle at
// most. A gated epilogue wants two blocks a warpgroup and goes on to the next name that has them.
enum condition { ALWAYS, ONE_WAVE, FILLS };
struct preference {
    int32_t family, rows, size;
    const char *name;
    condition where;
};
const preference preferences[] = {
    {90, 8, 62, "short_8"},
    {90, 16, 62, "short_16"},
    {90, 8, 62, "hopper_8x2"},
    {90, 16, 62, "hopper_16x2"},
    {90, 32, 26, "short_32"},
    {90, 32, 62, "mid_32"},
    {90, 32, 62, "words_32"},
    {90, 32, 62, "hopper_32x2"},
    {90, 64, 62, "mid_64"},
    {90, 64, 62, "words_64"},
    {90, 64, 62, "hopper_64x2"},
    {90, 1 << 30, 62, "words_tall"},
    {90, 128, 62, "tall_128"},
    {90, 256, 27, "tall_128"},
    {90, 512, 25, "tall_128"},
    {90, 1 << 30, 62, "wide_256"},
    {90, 1 << 30, 62, "tall_128"},
    {80, 8, 62, "ampere_strips_8", ONE_WAVE},
    {80, 8, 62, "ampere_8x1"},
    {80, 16, 26, "ampere_strips_16", ONE_WAVE},
    {80, 16, 62, "ampere_split_16x2"},
    {80, 16, 62, "ampere_16x2"},
    {80, 32, 26, "ampere_strips_32", ONE_WAVE},
    {80, 32, 62, "ampere_32x2"},
    {80, 64, 25, "ampere_strips_32", ONE_WAVE},
    {80, 64, 62, "ampere_64x2"},
    {80, 512, 25, "ampere_units_64x128", FILLS},
    {80, 512, 25, "ampere_units_64x192", FILLS},
    {80, 512, 25, "ampere_units_128x128", FILLS},
    {80, 256, 26, "ampere_units_128x128", FILLS},
    {80, 512, 25, "ampere_64x2", FILLS},
    {80, 1 << 30, 62, "ampere_128x2"},
    {80, 1 << 30, 62, "ampere_128x1"},
};
// The same of problems with experts, before what linear_tuned.def has: that is of dense ones. With
// `full`, of a row each in the mean only where the experts that are hit have three tiles for two
// SMs at least.
struct preference_of_experts {
    int32_t rows, size;
    const char *name;
    bool full;
};
const preference_of_experts of_experts[] = {
    {1, 22, "experts_8", false},         {12, 62, "experts_32", true},
    {4, 24, "experts_8", false},         {8, 22, "experts_16", false},
    {4, 62, "hopper_8x2", false},        {8, 62, "hopper_16x2", false},
    {1 << 30, 62, "experts_128", false}, {40, 62, "experts_words", false},
    {100, 62, "tall_128", false},        {1 << 30, 62, "experts_words", false},
    {1 << 30, 62, "tall_128", false},
};

bool gated(const linear_problem *p) {
    return p->epilogue == LINEAR_GATED || p->epilogue == LINEAR_GATED_OAI;
}

bool accepts(const linear_variant *v, const linear_problem *p, const linear_layout *l) {
    if (v->format != p->w->format || v->type != p->w->type) return false;
    if (p->sm < v->sm_min || p->sm > v->sm_max) return false;
    // Of 16 bits the families have orders of their own: what runs below sm_90 too reads fragments.
    if (v->format == WF_16 && l->tiled != (v->sm_min >= 90)) return false;
    if (v->granule_min && (l->granule < v->granule_min || l->granule > v->granule_max) &&
        l->granule)
        return false;
    if (v->units_max && l->units > v->units_max) return false;
    if (v->experts && (!p->expert_start || p->y_type == DT_F32 || p->epilogue == LINEAR_RESIDUAL))
        return false;
    if (v->rows_max && (p->m > v->rows_max || p->expert_start || p->x_row)) return false;
    return !gated(p) || v->blocks % (v->one_group ? 2 : 4) == 0;
}

// The variants of every file, and the family that they are of.
struct table_of {
    int32_t family;
    linear_table (*table)(void);
};
const table_of tables[] = {
    {90, linear_short_table},         {90, linear_short_32_table}, {90, linear_mid_table},
    {90, linear_words_table},         {90, linear_experts_table},  {90, linear_hopper_table},
    {90, linear_tall_table},          {90, linear_wide_table},     {90, linear_words_tall_table},
    {90, linear_experts_words_table}, {90, linear_strips_table},   {80, linear_ampere_table},
};

const linear_variant *named(const char *name, const linear_problem *p, const linear_layout *l) {
    for (const table_of &of : tables) {
        const linear_table t = of.table();
        for (int32_t i = 0; i < t.n; i++)
            if (strcmp(t.row[i].name, name) == 0 && accepts(&t.row[i], p, l)) return &t.row[i];
    }
    return nullptr;
}

bool holds(condition c, const linear_variant *v, const linear_problem *p, const linear_layout *l) {
    const int32_t tiles_x = (p->m + v->rows_x - 1) / v->rows_x, sms = p->n_sms;
    if (c == ONE_WAVE) return tiles_x * l->blocks <= sms && tiles_x * l->blocks * 8 >= sms;
    const int32_t tiles = tiles_x * ((l->blocks + v->blocks - 1) / v->blocks);
    return c == ALWAYS || (tiles <= sms && sms / tiles * tiles * 16 >= sms * 15);
}

// Of experts told of early: one token's, of small matrices two tokens'; not of much INT4 in large
// groups that experts_8 takes, whose rings read it faster.
const linear_variant *choose_told(const linear_problem *p, const linear_layout *l, int64_t size) {
    const bool rings =
        p->w->format == WF_INT4 && l->granule >= 128 && size >> 24 == 0 && size * p->m >> 25 > 0;
    const bool few = p->m <= (size >> 22 ? 8 : 16) && !rings;
    return p->told && few ? named("experts_strips", p, l) : nullptr;
}

const linear_variant *choose_of_experts(const linear_problem *p, const linear_layout *l,
                                        int32_t rows, int64_t size) {
    for (const preference_of_experts &c : of_experts) {
        if (c.rows < rows || size >> c.size) continue;
        const linear_variant *v = named(c.name, p, l);
        if (!v) continue;
        const int32_t tiles = (l->blocks + v->blocks - 1) / v->blocks;
        if (!c.full || rows > 1 ||
            linear_experts_hit(p->w->count, p->m) * tiles * 2 >= 3 * p->n_sms)
            return v;
    }
    return nullptr;
}

const linear_variant *choose(const linear_problem *p, const linear_layout *l) {
    if (p->kernel) return named(p->kernel, p, l);
    const int32_t rows = p->expert_start ? (p->m + p->w->count - 1) / p->w->count : p->m;
    const int64_t size = (int64_t)p->w->n * p->w->k;
    const linear_variant *of = nullptr;
    if (p->w->family >= 90) of = choose_told(p, l, size);
    if (p->w->family >= 90 && p->expert_start && !of) of = choose_of_experts(p, l, rows, size);
    if (of) return of;
    // Of one row and a small matrix within a step, where CTAs wait beside other kernels.
    if (p->m == 1 && p->apart && p->w->family >= 90 && size <= 1 << 24)
        if (const linear_variant *v = named("strips", p, l)) return v;
    const char *name;
    for (int32_t i = 0; p->w->family == 90 && (name = linear_tuned(p, i)) != nullptr; i++) {
        const linear_variant *v = named(name, p, l);
        if (v) return v;
    }
    for (const preference &c : preferences) {
        if (c.rows < rows || c.family > p->w->family || size >> c.size) continue;
        const linear_variant *v = named(c.name, p, l);
        if (!v) continue;
        if (holds(c.where, v, p, l)) return v;
    }
    return nullptr;
}

status check(const linear_problem *p) {
    const linear_weight *w = p->w;
    int64_t code_bytes, scale_bytes;
    TRY(linear_pack_bytes(w, &code_bytes, &scale_bytes));
    const bool f32 = p->y_type == DT_F32;
    if (!f32 && p->y_type != w->type)
        return FAIL(ST_UNSUPPORTED, "linear of %s into %s", dtype_text(w->type),
                    dtype_text(p->y_type));
    if (p->act != w->act)
        return FAIL(ST_UNSUPPORTED, "linear with A%s of a weight packed for A%s",
                    act_format_text(p->act), act_format_text(w->act));
    if (p->ldx % 8 || p->ldy % 4)
        return FAIL(ST_SHAPE, "linear: row strides %lld, %lld must be multiples of 8 and 4",
                    (long long)p->ldx, (long long)p->ldy);
    if (gated(p) && f32) return FAIL(ST_UNSUPPORTED, "gated linear into F32");
    if (gated(p) && !w->gated && (w->n / 2) % LINEAR_BLOCK)
        return FAIL(ST_UNSUPPORTED, "gated linear with N=%d: pack the weight as gated", w->n);
    if ((p->expert_start && w->count > LINEAR_EXPERTS_MAX) || (!p->expert_start && w->count != 1))
        return FAIL(ST_UNSUPPORTED, "linear of %d experts", w->count);
    return ST_OK;
}

// Of the workspace: flags; of each SM, sums that are zeros between launches, and two tiles of the
// CTAs of an SM.
constexpr int64_t kFlagBytes = 64 * 1024, kSumsBytes = LINEAR_SUMS_BYTES, kTileBytes = 256 * 1024;
uint8_t *tiles_of(const linear_problem *p) {
    return static_cast<uint8_t *>(p->workspace) + kFlagBytes + p->n_sms * kSumsBytes;
}

// Variant v of p; x, of rows `ldx` elements apart, are codes with scales or not.
status launch(const linear_variant *v, const linear_problem *p, linear_layout l, const void *x,
              int64_t ldx, const float *x_scale, kernel_stream stream) {
    const linear_weight *w = p->w;
    linear_args a = {};
    a.paired = gated(p);
    if (a.paired && !w->gated) {
        l.half_rows = w->n / 2;
        l.half_blocks = l.blocks / 2;
    }
    const bool channel = w->format == WF_INT8 || w->format == WF_FP8;
    a.code = static_cast<const uint8_t *>(w->code);
    a.scale = static_cast<const uint8_t *>(w->scale);
    a.bias = w->bias;
    a.channel = channel ? static_cast<const float *>(w->scale) : nullptr;
    a.global_scale = w->format == WF_NVFP4 ? w->global_scale : nullptr;
    a.x = x;
    a.x_scale = x_scale;
    a.y = p->y;
    a.ldx = ldx;
    a.ldy = p->ldy;
    a.code_bytes = l.code_bytes;
    a.scale_bytes = l.scale_bytes;
    a.expert_start = p->expert_start;
    a.x_row = p->x_row;
    a.counters = static_cast<int32_t *>(p->workspace);
    a.sums = linear_sums(p);
    a.partial = reinterpret_cast<float *>(tiles_of(p));
    a.m = p->m;
    a.n = w->n;
    a.k = w->k;
    a.count = w->count;
    a.half_rows = l.half_rows;
    a.half_blocks = l.half_blocks;
    a.blocks = l.blocks;
    a.units = l.units;
    a.granules = l.granules;
    a.granule_bytes = l.granule_bytes;
    a.granule = l.granule;
    a.granule_shift = l.granule == 128 ? 7 : l.granule == 64 ? 6 : l.granule == 32 ? 5 : 4;
    a.epilogue = p->epilogue;
    a.sym = w->sym;
    a.y_f32 = p->y_type == DT_F32;
    a.apart = p->apart;
    a.routed = p->routed;
    a.limit = p->limit;
    a.ahead = p->ahead;
    a.told = p->told;
    a.act = p->act;
    a.n_tiles = a.paired ? (l.half_blocks + v->blocks / 2 - 1) / (v->blocks / 2)
                         : (l.blocks + v->blocks - 1) / v->blocks;
    a.steps = (l.units + v->step_units - 1) / v->step_units;
    return v->launch(&a, p->n_sms, v->ctas_per_sm, stream);
}

} // namespace

extern "C" float *linear_sums(const linear_problem *p) {
    return reinterpret_cast<float *>(static_cast<uint8_t *>(p->workspace) + kFlagBytes);
}

// What quantised x needs lies behind the tiles.
extern "C" int64_t linear_workspace_bytes(const linear_weight *w, int32_t max_x, int32_t n_sms) {
    return kFlagBytes + n_sms * (kSumsBytes + kTileBytes) + linear_quantised_bytes(w, max_x);
}

extern "C" status linear_pack(const linear_weight *w, int32_t index, const qmatrix *q,
                              kernel_stream stream) {
    int64_t code_bytes, scale_bytes;
    TRY(linear_pack_bytes(w, &code_bytes, &scale_bytes));
    if (index < 0 || index >= w->count) return FAIL(ST_SHAPE, "matrix %d of %d", index, w->count);
    if (linear_plain(w)) return pack_plain(w, q, (cudaStream_t)stream);
    pack_args a = {*w, *q, linear_layout_of(w), nullptr, nullptr};
    a.code = static_cast<uint8_t *>(w->code) + index * a.l.code_bytes;
    a.scale = static_cast<uint8_t *>(w->scale) + index * a.l.scale_bytes;
    const int64_t codes = (int64_t)a.l.blocks * a.l.units * 128;
    pack_codes<<<(unsigned)((codes + 255) / 256), 256, 0, (cudaStream_t)stream>>>(a);
    const int64_t scales = (int64_t)a.l.blocks * (a.l.granules > 1 ? a.l.granules : 1) * 64;
    if (w->format != WF_16)
        pack_scales<<<(unsigned)((scales + 255) / 256), 256, 0, (cudaStream_t)stream>>>(a);
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_pack: %s", cudaGetErrorString(e));
}

extern "C" const char *linear_choice(const linear_problem *p) {
    if (check(p) != ST_OK) return nullptr;
    return p->act == AF_16 ? linear_choice_16(p) : linear_quantised_choice(p);
}

extern "C" const char *linear_choice_16(const linear_problem *p) {
    const linear_layout l = linear_layout_of(p->w);
    const linear_variant *v = choose(p, &l);
    if (!v)
        FAIL(ST_UNSUPPORTED, "no linear kernel for W%s on sm_%d", weight_format_text(p->w->format),
             p->sm);
    return v ? v->name : nullptr;
}

extern "C" bool linear_rounds(const linear_problem *p) {
    const linear_layout l = linear_layout_of(p->w);
    const linear_variant *v = choose(p, &l);
    return v && v->rounds;
}

extern "C" const char *const *linear_variants(int32_t family) {
    static const char *names[2][64];
    const char **out = names[family == 80 ? 0 : 1];
    int n = 0;
    for (const table_of &of : tables) {
        const linear_table t = of.table();
        for (int32_t i = 0; of.family == (family == 80 ? 80 : 90) && i < t.n && n < 63; i++) {
            bool seen = false;
            for (int k = 0; k < n; k++) seen = seen || strcmp(out[k], t.row[i].name) == 0;
            if (!seen) out[n++] = t.row[i].name;
        }
    }
    for (int32_t i = 0; family == 90 && linear_quantised_name(i) && n < 63; i++)
        out[n++] = linear_quantised_name(i);
    out[n] = nullptr;
    return out;
}

extern "C" status kernel_linear(const linear_problem *p, kernel_stream stream) {
    if (p->m == 0) return ST_OK;
    TRY(check(p));
    if (p->act == AF_16) return linear_launch_16(p, stream);
    uint8_t *tiles = tiles_of(p);
    const int64_t bytes = p->n_sms * kTileBytes;
    return linear_quantised(p, tiles + bytes, tiles, bytes, stream);
}

extern "C" activation_codes linear_x_codes(const linear_problem *p) {
    if (p->act == AF_16 || p->m == 0) return {};
    return linear_quantised_x(p, tiles_of(p) + p->n_sms * kTileBytes);
}

extern "C" status linear_launch_16(const linear_problem *p, kernel_stream stream) {
    const linear_weight *w = p->w;
    const linear_layout l = linear_layout_of(w);
    const linear_variant *v = choose(p, &l);
    if (!v)
        return FAIL(ST_UNSUPPORTED, "no linear kernel %s for W%s on sm_%d",
                    p->kernel ? p->kernel : "", weight_format_text(w->format), p->sm);
    return launch(v, p, l, p->x, p->ldx, nullptr, stream);
}

extern "C" status linear_w4a8_launch(const char *name, const linear_problem *p, const void *code,
                                     const float *x_scale, kernel_stream stream) {
    const linear_layout l = linear_layout_of(p->w);
    linear_problem q = *p;
    if (!p->expert_start) q.x_row = nullptr; // codes are of the rows taken
    q.apart = true;                          // behind the quantiser
    for (const linear_table &t : {linear_w4a8_table(), linear_experts_codes_table()})
        for (int32_t i = 0; i < t.n; i++)
            if (strcmp(t.row[i].name, name) == 0 && accepts(&t.row[i], &q, &l))
                return launch(&t.row[i], &q, l, code, p->w->k, x_scale, stream);
    return FAIL(ST_UNSUPPORTED, "no kernel %s for %d rows of W%s", name, p->m,
                weight_format_text(p->w->format));
}
