/* linear_layout.h - the packed order of weights, as functions that host and device share.
 *
 * Every kernel puts weights on the M side of the tensor-core product, y^T = W x^T: mma.sync
 * m16n8k16 and wgmma m64nNk16 then want the same fragments in registers, and one order serves all
 * of them. Only 16 bits, which nothing converts, lie on Hopper as wgmma takes them from shared
 * memory.
 *
 *   block    64 output rows; all its bytes are contiguous along K, so a tile is a few linear
 *            streams
 *   unit     64 inputs of a block: 2 KB at 4 bits, 4 KB at 8, 8 KB at 16
 *   strip    16 rows of a block (one warp); four strips a unit
 *   word     the 8 codes of one lane in one 16 x 16 atom, in the order of the A fragment. With
 *            lane = 4 g + t: (row g, k 2t, 2t+1) (row g+8, the same) (row g, k 2t+8, +9)
 *            (row g+8, ...)
 *
 *   code   [count][block][unit][strip][16-byte chunk][lane][16 bytes]
 *          16 bits, family 90: [count][block][unit][64 rows][128 bytes], the 16-byte chunk c of a
 *          row's inputs at place c ^ row % 8. That is the tile with the 128-byte swizzle that wgmma
 *          reads from shared memory; ldmatrix makes the same fragments of it, as many bytes at once
 *   scale  [count][block][granule][...]: a granule holds the scales (and zeros) of 64 rows for 128,
 *          64, 32 or 16 inputs, whichever divides the group; rows in the order strip, g, (g, g+8)
 *          so that a lane's two rows are neighbours. Per-channel formats keep f32 [count][rows]
 *          instead and are scaled in the epilogue.
 *
 * Weights whose products take 8-bit operands (linear_plain) keep the canonical order instead: code
 * [n, k], scale f32 [n], or f32 [ceil(n / 128)][ceil(k / 128) rounded up to 4].
 *
 * A gated weight packs its gate and its up half each into whole blocks, so that one tile holds
 * block b of both. Rows past N and inputs past K hold the code that means zero, or any finite value
 * that meets a zero of x. */
#ifndef KERNEL_LINEAR_LAYOUT_H
#define KERNEL_LINEAR_LAYOUT_H
#include "linear.h"

#ifdef __CUDACC__
#define LAYOUT_FN __host__ __device__ static inline
#else
#define LAYOUT_FN static inline
#endif

enum { LINEAR_BLOCK = 64, LINEAR_UNIT = 64, LINEAR_STRIP = 16 };

typedef struct {
    int32_t half_rows, half_blocks; /* of gate and of up; all rows when not gated */
    int32_t blocks, units;
    int32_t bits, unit_bytes;        /* of one block */
    bool tiled;                      /* 16 bits: rows with the swizzle, not fragments */
    int32_t granule;                 /* inputs; 0 = per channel or none */
    int32_t granules;                /* of one block */
    int32_t granule_bytes;           /* of one block and granule */
    int64_t code_bytes, scale_bytes; /* of one matrix */
} linear_layout;

/* Are x and W multiplied as 8-bit codes? Then the weight lies in plain order. */
LAYOUT_FN bool linear_plain(const linear_weight *w) {
    const bool int8 = w->format == WF_INT8 && w->act == AF_INT8;
    const bool fp8 = (w->format == WF_FP8 || w->format == WF_FP8B) && w->act == AF_FP8;
    return (int8 || fp8) && w->family == 90 && w->count == 1;
}

/* Are codes of W4 multiplied with 8-bit x? They become bytes in registers, so W is packed as beside
 * 16-bit x, and fewer rows may be multiplied as those are. Other pairs with A8 or AFP8 multiply the
 * values that codes stand for, by the kernels of 16-bit x: groups under 64, or of experts under
 * 128, and the ampere family. */
LAYOUT_FN bool linear_nibbles(const linear_weight *w) {
    return w->format == WF_INT4 && w->act == AF_INT8 && w->family == 90 &&
           (w->group ? w->group : w->k) % (w->count > 1 ? 128 : 64) == 0;
}

/* f32 between the scales of two rows of 128 x 128 blocks, plain order: cuBLASLt wants 16 bytes. */
LAYOUT_FN int32_t linear_plain_stride(int32_t k) { return ((k + 127) / 128 + 3) / 4 * 4; }

LAYOUT_FN linear_layout linear_layout_of(const linear_weight *w) {
    linear_layout l;
    const int32_t halves = w->gated ? 2 : 1;
    const bool fp4 = w->format == WF_MXFP4 || w->format == WF_NVFP4;
    l.half_rows = w->n / halves;
    l.half_blocks = (l.half_rows + LINEAR_BLOCK - 1) / LINEAR_BLOCK;
    l.blocks = halves * l.half_blocks;
    l.units = (w->k + LINEAR_UNIT - 1) / LINEAR_UNIT;
    l.bits = w->format == WF_16 ? 16 : (fp4 || w->format == WF_INT4) ? 4 : 8;
    l.unit_bytes = LINEAR_BLOCK * LINEAR_UNIT / 8 * l.bits;
    l.tiled = l.bits == 16 && w->family == 90;
    l.granule = 0;
    l.granule_bytes = 0;
    if (w->format == WF_INT4) {
        const int32_t group = w->group ? w->group : w->k;
        l.granule = group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : group % 32 == 0 ? 32 : 16;
        l.granule_bytes = LINEAR_BLOCK * (w->sym ? 2 : 3);
    } else if (w->format == WF_MXFP4 || w->format == WF_NVFP4) {
        l.granule = w->format == WF_MXFP4 ? 32 : 16;
        l.granule_bytes = LINEAR_BLOCK;
    } else if (w->format == WF_FP8B) {
        l.granule = 128;
        l.granule_bytes = 16; /* f32 of each strip, which never straddles two scales */
    }
    l.granules = l.granule ? (l.units * LINEAR_UNIT + l.granule - 1) / l.granule : 0;
    l.code_bytes = (int64_t)l.blocks * l.units * l.unit_bytes;
    l.scale_bytes = (int64_t)l.blocks * l.granules * l.granule_bytes;
    if (w->format == WF_INT8 || w->format == WF_FP8)
        l.scale_bytes = (int64_t)l.blocks * LINEAR_BLOCK * 4;
    if (linear_plain(w)) {
        l.code_bytes = (int64_t)w->n * w->k;
        l.scale_bytes = w->format == WF_FP8B
                            ? (int64_t)((w->n + 127) / 128) * linear_plain_stride(w->k) * 4
                            : (int64_t)w->n * 4;
    }
    return l;
}

/* Row of the canonical matrix that row i of block b holds, or -1. */
LAYOUT_FN int32_t linear_row(const linear_layout *l, int32_t b, int32_t i) {
    const int32_t half = b / l->half_blocks, at = (b - half * l->half_blocks) * LINEAR_BLOCK + i;
    return at < l->half_rows ? half * l->half_rows + at : -1;
}

/* Row within a strip and input within 16 of code i of a lane's word. */
LAYOUT_FN int32_t linear_atom_row(int32_t lane, int32_t i) { return lane / 4 + (i / 2 % 2) * 8; }
LAYOUT_FN int32_t linear_atom_col(int32_t lane, int32_t i) {
    return lane % 4 * 2 + i % 2 + i / 4 * 8;
}

/* Products of 4-bit codes and 8-bit x: of the word of an atom the low and the high nibbles of its
 * bytes are row g and row g + 8 of A of wgmma m64nNk32, whose lane wants neighbours 4 t .. 4 t + 3.
 * So place i = 0..15 of x beside the atom has this input of its 16. */
LAYOUT_FN int32_t linear_byte_input(int32_t i) { return i / 4 * 2 + i % 4 / 2 + i % 2 * 8; }

/* The same, input within the unit, of atom j's word: with the swizzle it is neighbours of a row. */
LAYOUT_FN int32_t linear_word_row(const linear_layout *l, int32_t j, int32_t lane, int32_t i) {
    return l->tiled ? (j * 32 + lane) / 8 : linear_atom_row(lane, i);
}
LAYOUT_FN int32_t linear_word_col(const linear_layout *l, int32_t j, int32_t lane, int32_t i) {
    if (l->tiled) return (lane % 8 ^ linear_word_row(l, j, lane, i) % 8) * 8 + i;
    return j * 16 + linear_atom_col(lane, i);
}

/* Bytes from a unit's start to the chunk of inputs 8 c .. 8 c + 7 of a row, 16 bits with the
 * swizzle. */
LAYOUT_FN int32_t linear_chunk_at(int32_t row, int32_t c) {
    return row * 128 + ((c ^ row % 8) << 4);
}

/* Place of row i (0..63) among the 64 entries of a granule. */
LAYOUT_FN int32_t linear_scale_place(int32_t i) { return i / 16 * 16 + i % 8 * 2 + i / 8 % 2; }

/* Bytes from the start of a matrix to the word of (block, unit, strip, atom j = 0..3, lane). */
LAYOUT_FN int64_t linear_word_at(const linear_layout *l, int32_t b, int32_t u, int32_t strip,
                                 int32_t j, int32_t lane) {
    const int32_t word = l->bits, in = j * word; /* 8 codes of `bits` bits are `bits` bytes */
    return ((int64_t)b * l->units + u) * l->unit_bytes + strip * (l->unit_bytes / 4) +
           in / 16 * 512 + lane * 16 + in % 16;
}

/* Pair p = 0..3 of a word of e2m1 codes as two halves of the type: the sign where it belongs, the
 * three bits of the magnitude on the lowest two of the exponent and the highest of the mantissa
 * (11..9 in f16, 8..6 in bf16), which is the value times 2^-14 or 2^-126, subnormals included. A
 * word shifted four ways is the least that shows all of its bits in those places; where two of the
 * five are needed, they meet in an exclusive or, which shares the instruction of the mask. */
LAYOUT_FN uint32_t linear_e2m1_mask(bool bf16) { return bf16 ? 0x81c081c0u : 0x8e008e00u; }
LAYOUT_FN uint32_t linear_e2m1_pair(uint32_t v, bool bf16, int32_t p) {
    const uint32_t mask = linear_e2m1_mask(bf16);
    if (bf16)
        return mask & (p == 0 ? v : p == 1 ? v << 6 : p == 2 ? v << 12 | v >> 20 : v << 2 ^ v >> 6);
    return mask & (p == 0 ? v << 6 : p == 1 ? v << 9 : p == 2 ? v ^ v << 2 : v ^ v >> 3);
}

/* The bits of a word that turn those bits d of pair p: one for each. Other pairs may turn as
 * well. */
LAYOUT_FN uint32_t linear_e2m1_home(uint32_t d, bool bf16, int32_t p) {
    if (bf16)
        return p == 0   ? d
               : p == 1 ? d >> 6
               : p == 2 ? d >> 12 | d << 20
                        : (d & 0x80c080c0u) >> 2 | (d & 0x01000100u) << 6;
    return p == 0   ? d >> 6
           : p == 1 ? d >> 9
           : p == 2 ? (d & 0x86008600u) >> 2 | (d & 0x08000800u)
                    : (d & 0x84008400u) | (d & 0x0a000a00u) << 3;
}

/* Eight 4-bit codes as one word. Integers: pair p in nibble p of each half. */
LAYOUT_FN uint32_t linear_pack4(const uint8_t code[8], bool e2m1, bool bf16) {
    uint32_t word = 0, pair[4] = {0, 0, 0, 0};
    for (int32_t i = 0; i < 8; i++) {
        const uint32_t c = code[i];
        if (e2m1)
            pair[i / 2] |= (c >> 3 << 15 | (c & 7) << (bf16 ? 6 : 9)) << (i % 2 * 16);
        else
            word |= c << (4 * (i / 2) + i % 2 * 16);
    }
    /* Each round makes right what follows from bits that are. */
    for (int32_t round = 0; e2m1 && round < 4; round++)
        for (int32_t p = 0; p < 4; p++)
            word ^= linear_e2m1_home(linear_e2m1_pair(word, bf16, p) ^ pair[p], bf16, p);
    return word;
}

LAYOUT_FN void linear_unpack4(uint8_t code[8], uint32_t word, bool e2m1, bool bf16) {
    for (int32_t i = 0; i < 8; i++) {
        const uint32_t v = e2m1 ? linear_e2m1_pair(word, bf16, i / 2) : word;
        const uint32_t h = v >> (i % 2 * 16);
        if (e2m1)
            code[i] = (uint8_t)((h >> 15 & 1) << 3 | (h >> (bf16 ? 6 : 9) & 7));
        else
            code[i] = (uint8_t)(h >> 4 * (i / 2) & 15);
    }
}

/* The scale of MXFP4 in its granule. With f16 the upper byte of a half, 2^(e - 115), which takes in
 * what mends the exponents of its words; 0 and infinity where e (100 to 131) is beyond them. */
LAYOUT_FN uint8_t linear_e8m0_pack(uint8_t e, bool bf16) {
    return (uint8_t)(bf16 ? e : (e < 100 ? 0 : e > 131 ? 31 : e - 100) << 2);
}
LAYOUT_FN uint8_t linear_e8m0_unpack(uint8_t scale, bool bf16) {
    return bf16 ? scale : (uint8_t)((scale >> 2) + 100);
}

/* Pair p = 0, 1 of a word of four e4m3 codes as two halves of bf16 times 2^-120: the sign where it
 * belongs, the rest on bits 10..4. As with e2m1 no single shift shows what the mask leaves out. */
LAYOUT_FN uint32_t linear_e4m3_pair(uint32_t v, int32_t p) {
    return 0x87f087f0u & (p == 0 ? v : v << 4 ^ v >> 4);
}
LAYOUT_FN uint32_t linear_e4m3_home(uint32_t d, int32_t p) {
    return p == 0 ? d : (d & 0x80f080f0u) >> 4 | (d & 0x07000700u) << 4;
}

/* Place of code i (0..7) among the 8 bytes of its two words. int8: pairs in the low, then the high
 * bytes of the halves, so that masks or byte permutes give both; e4m3 with f16: in order, as the
 * conversion instruction takes them. int8 codes are stored plus 128. */
LAYOUT_FN int32_t linear_byte_place(bool int8, int32_t i) {
    return int8 ? i / 4 * 4 + i % 2 * 2 + i / 2 % 2 : i;
}

/* Eight 8-bit codes as two words. */
LAYOUT_FN void linear_pack8(uint32_t word[2], const uint8_t code[8], bool int8, bool bf16) {
    for (int32_t w = 0; w < 2; w++) {
        uint32_t v = 0, pair[2] = {0, 0};
        for (int32_t i = 0; i < 4; i++) {
            const uint32_t c = code[4 * w + i] ^ (int8 ? 128u : 0);
            v |= c << 8 * linear_byte_place(int8, i);
            pair[i / 2] |= (c >> 7 << 15 | (c & 127) << 4) << (i % 2 * 16);
        }
        for (int32_t round = 0; !int8 && bf16 && round < 4; round++)
            for (int32_t p = 0; p < 2; p++)
                v ^= linear_e4m3_home(linear_e4m3_pair(v, p) ^ pair[p], p);
        word[w] = v;
    }
}

LAYOUT_FN void linear_unpack8(uint8_t code[8], const uint32_t word[2], bool int8, bool bf16) {
    for (int32_t i = 0; i < 8; i++) {
        const uint32_t v = word[i / 4], h = linear_e4m3_pair(v, i / 2 % 2) >> (i % 2 * 16);
        if (!int8 && bf16)
            code[i] = (uint8_t)((h >> 15 & 1) << 7 | (h >> 4 & 127));
        else
            code[i] = (uint8_t)(v >> 8 * linear_byte_place(int8, i % 4) ^ (int8 ? 128u : 0));
    }
}

/* Scales of a channel are packed times this: words of int8 come out as bf16 of 1/64 of the code. */
LAYOUT_FN float linear_channel_fold(const linear_weight *w) {
    return w->format == WF_INT8 && w->type == DT_BF16 ? 64.f : 1.f;
}
#endif
