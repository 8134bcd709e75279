/* w4a16 on AVX-512 BF16: y = x @ W^T, weights NVFP4, activations bf16, sums fp32.
 *
 * e2m1 is exact in bf16, so a block of 16 columns x 16 k is eight vdpbf16ps and one FMA for the block scale:
 *
 *   t0 = sum over four pairs of k, t1 = over the other four     4 + 4 vdpbf16ps, activations broadcast from memory
 *   acc += (t0 + t1) * sw                                       add, FMA
 *
 * Nine instructions on the two pipes that multiply are the ceiling; the add and the decoding run beside them. (Weights that carry their
 * block scale would be exact in bf16 too and save the FMA, but decoding them costs more than one token can hide behind memory.)
 *
 * vdpbf16ps takes subnormal inputs and results for zero, whatever the caller's control register says. A packed row is therefore scaled by
 * a power of two that brings its largest value to about 2^64: only products 2^180 below the row's largest vanish. The order of a sum is
 * fixed: pairs in a chain, the two chains of a block, blocks in order of k. */
#include "pack.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "tile16_x86.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16")))
#define INLINE TARGET static inline __attribute__((always_inline))

enum { EARLY_ROWS = 8, MAX_ROWS = 14 /* rows of one pass: accumulators, eight decoded weights, temporaries fill the 32 registers */ };

/* 64 k of a row: pair [b][h][j] is k = 16b + 8h + j and 4 further on, as shifting packed nibbles yields them. */
struct chunk {
    uint16_t pair[4][2][4][2];
};
_Static_assert(sizeof(struct chunk) == 128, "packed activation chunk");

/* e2m1 * 2^21 in bf16 by code; bit 4 of a vpermw index is the neighbour nibble's, so the line repeats. The 2^21 undoes SCALE_BIAS. */
#define BF16(bits) ((bits) + (21 << 7))
#define MAGNITUDES(sign)                                                                                                             \
    0, sign | BF16(0x3f00), sign | BF16(0x3f80), sign | BF16(0x3fc0), sign | BF16(0x4000), sign | BF16(0x4040), sign | BF16(0x4080), \
        sign | BF16(0x40c0)
static const uint16_t weight_table[32]
    __attribute__((aligned(64))) = {MAGNITUDES(0), MAGNITUDES(0x8000), MAGNITUDES(0), MAGNITUDES(0x8000)};

/* pack.h's scale byte at bits 20..27 of a float is (8 + mantissa) * 2^(exponent - 130); with 96 more in the exponent it is normal, and 2^21
 * short of the block scale. */
enum { SCALE_BIAS = 96 };

/* acc += the products of two bf16 pairs, those of a broadcast. Compilers do not fold the broadcast into the instruction. */
INLINE __m512 dot2(__m512 acc, __m512i w, const uint16_t *a) {
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*(const uint32_t *)(const void *)a));
    return acc;
}

/* A block of 16 columns x 16 k. */
struct block {
    __m512i w[2][4]; /* decoded weights */
    __m512 scale;    /* 2^21 short of the block scales */
};

/* Four vectors of 64 bytes of codes: the low nibbles of their words, the next ones, and so on. Reading a byte further on is a shift that
 * costs nothing, where there is a byte further on. */
INLINE void decode_half(__m512i v[4], const uint8_t *codes, const bool last) {
    const __m512i table = _mm512_load_si512(weight_table);
    const __m512i x = moe4_once(_mm512_load_si512(codes));
    const __m512i high = moe4_once(last ? _mm512_srli_epi16(x, 8) : _mm512_loadu_si512(codes + 1));
    v[0] = moe4_once(_mm512_permutexvar_epi16(x, table));
    v[1] = moe4_once(_mm512_permutexvar_epi16(_mm512_srli_epi16(x, 4), table));
    v[2] = moe4_once(_mm512_permutexvar_epi16(high, table));
    v[3] = moe4_once(_mm512_permutexvar_epi16(_mm512_srli_epi16(high, 4), table));
}

INLINE struct block decode(const struct moe4_tile16 *w, int b, __m512i scales) {
    struct block d;
    decode_half(d.w[0], w->code[b][0], false);
    decode_half(d.w[1], w->code[b][1], b == 3);
    const __m512i bits = b < 3 ? _mm512_slli_epi32(scales, 20 - 8 * b) : _mm512_srli_epi32(scales, 4);
    const __m512i mask = _mm512_set1_epi32(0xff << 20), bias = _mm512_set1_epi32(SCALE_BIAS << 23);
    d.scale = _mm512_castsi512_ps(moe4_once(_mm512_ternarylogic_epi32(bits, mask, bias, 0xea))); /* (bits & mask) | bias */
    return d;
}

/* acc += row a's block b times d. */
INLINE __m512 add_block(__m512 acc, const struct chunk *a, int b, const struct block *d) {
    __m512 t0 = _mm512_setzero_ps(), t1 = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        t0 = dot2(t0, d->w[0][j], a->pair[b][0][j]);
        t1 = dot2(t1, d->w[1][j], a->pair[b][1][j]);
    }
    return _mm512_fmadd_ps(_mm512_add_ps(t0, t1), d->scale, acc);
}

/* y[m][0..16) = rows m < n_rows, all of K, against one tile. n_rows is a constant where this is inlined. */
INLINE void tile_pass(MOE4_TILE16_PARAMETERS, const int n_rows) {
    /* As in gemm_avx512.c: decoding one block ahead while registers last. */
    const bool early = n_rows <= EARLY_ROWS;
    const struct chunk *row[MAX_ROWS];
    __m512 acc[MAX_ROWS];
#pragma GCC unroll 16
    for (int m = 0; m < n_rows; m++) {
        acc[m] = _mm512_setzero_ps();
        row[m] = rows[m];
    }
    struct block d;
    if (early) d = decode(w, 0, _mm512_load_si512(w->scale));
    for (size_t i = 0; i < n_chunks; i++) {
        const struct moe4_tile16 *after = w + (i + 1 < n_chunks);
        const __m512i scales = moe4_once(_mm512_load_si512(w->scale));
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
            struct block ahead;
            moe4_tile16_prefetch(w, i, n_chunks, next, b, n_rows > 1);
            if (!early) {
                d = decode(w, b, scales);
            } else if (b < 3) {
                ahead = decode(w, b + 1, scales);
            } else {
                ahead = decode(after, 0, _mm512_load_si512(after->scale));
            }
#pragma GCC unroll 16
            for (int m = 0; m < n_rows; m++) acc[m] = add_block(acc[m], row[m], b, &d);
            if (early) d = ahead;
        }
        w = early ? after : w + 1;
#pragma GCC unroll 16
        for (int m = 0; m < n_rows; m++) {
            row[m]++;
            if (n_rows <= 8) __asm__("" : "+r"(row[m])); /* a register each, not an index and bases that do not fit */
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < n_rows; m++) _mm512_mask_storeu_ps(y + m * y_ld, cols, acc[m]);
}

MOE4_TILE16_PASS(TARGET, 1)
MOE4_TILE16_PASS(TARGET, 2)
MOE4_TILE16_PASS(TARGET, 3)
MOE4_TILE16_PASS(TARGET, 4)
MOE4_TILE16_PASS(TARGET, 5)
MOE4_TILE16_PASS(TARGET, 6)
MOE4_TILE16_PASS(TARGET, 7)
MOE4_TILE16_PASS(TARGET, 8)
MOE4_TILE16_PASS(TARGET, 9)
MOE4_TILE16_PASS(TARGET, 10)
MOE4_TILE16_PASS(TARGET, 11)
MOE4_TILE16_PASS(TARGET, 12)
MOE4_TILE16_PASS(TARGET, 13)
MOE4_TILE16_PASS(TARGET, 14)
static const moe4_tile16_pass passes[MAX_ROWS + 1] = {NULL,   pass_1, pass_2,  pass_3,  pass_4,  pass_5,  pass_6, pass_7,
                                                      pass_8, pass_9, pass_10, pass_11, pass_12, pass_13, pass_14};

static void gemm(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0, size_t n_cols,
                 const void *next, void *scratch) {
    (void)scratch;
    moe4_tile16_gemm(y, y_ld, rows, n_rows, w, col0, n_cols, next, passes, MAX_ROWS, MAX_ROWS);
}

static size_t row_bytes(size_t k) {
    return (k + 63) / 64 * sizeof(struct chunk);
}

/* 64 bf16 into the order of struct chunk. */
TARGET static void pack_chunk(struct chunk *a, const uint16_t half[64]) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    _mm512_storeu_si512(a->pair[0], _mm512_shuffle_epi8(_mm512_loadu_si512(half), order));
    _mm512_storeu_si512(a->pair[2], _mm512_shuffle_epi8(_mm512_loadu_si512(half + 32), order));
}

static uint64_t pack_row(const struct moe4_kernels *kernels, void *row, float *factor_ret, const float *x, size_t k,
                         const struct moe4_rounding *rounding) {
    enum { STEP = 512 };
    (void)rounding;
    const float amax = kernels->amax_row(x, k);
    const int up = amax > 0 && ilogbf(amax) > 64 - 126 ? 64 - ilogbf(amax) : amax > 0 ? 126 : 0;
    const float scale = ldexpf(1, up);
    struct chunk *a = row;
    for (size_t at = 0; at < k; at += STEP) {
        _Alignas(64) uint16_t half[STEP];
        float wide[STEP];
        const size_t n = k - at < STEP ? k - at : STEP;
        kernels->narrow_row(half, MOE4_BF16, x + at, n); /* the rounding; what follows is exact */
        kernels->widen_row(wide, half, MOE4_BF16, n);
        for (size_t i = 0; i < n; i++) wide[i] *= scale;
        kernels->narrow_row(half, MOE4_BF16, wide, n);
        if (n % 64) memset(half + n, 0, sizeof half - n * sizeof *half);
        for (size_t i = 0; i < n; i += 64) pack_chunk(a++, half + i);
    }
    *factor_ret = ldexpf(1, -up);
    return 0;
}

static const struct moe4_gemm w4a16 = {
    .name = "w4a16 avx512bf16",
    .tile_cols = 16,
    .layout = MOE4_TILE16_LAYOUT,
    .packed_bytes = moe4_tile16_bytes,
    .pack = moe4_tile16_pack_avx512,
    .row_bytes = row_bytes,
    .pack_row = pack_row,
    .gemm = gemm,
};

void moe4_kernels_gemm_avx512bf16(struct moe4_kernels *k) {
    k->w4a16 = &w4a16;
}
#endif
