/* w4a16 on AVX-512 without BF16: y = x @ W^T, weights NVFP4, activations bf16 held as fp32, sums fp32.
 *
 *   per 16 columns x 16 k:            16 weights decoded, one k for all columns each      14 shifts, 16 vpermps
 *   and row:                          t0, t1 = sums over 8 k each                         16 multiplies or FMAs, activations broadcast
 *                                     acc += (t0 + t1) * sw                               add, FMA
 *
 * Seventeen instructions on the two pipes that multiply are the ceiling. The order of a sum is fixed: eight k in a chain, the two chains of
 * a block, blocks in order of k. */
#include "pack.h"
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "tile16_x86.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")))
#define INLINE TARGET static inline __attribute__((always_inline))

enum { MAX_ROWS = 11 /* rows of one pass: accumulators, sixteen decoded weights, temporaries fill the 32 registers */ };

/* The value is 2^21 short of the block scale, as in gemm_avx512bf16.c; the table of weights makes up for it. */
enum { SCALE_BIAS = 96 };
#define V(x) ((x)*0x1p21f)
static const float weight_table[16]
    __attribute__((aligned(64))) = {V(0.f),  V(.5f),  V(1.f),  V(1.5f),  V(2.f),  V(3.f),  V(4.f),  V(6.f),
                                    V(-0.f), V(-.5f), V(-1.f), V(-1.5f), V(-2.f), V(-3.f), V(-4.f), V(-6.f)};

/* w[j] = k j of eight, for 16 columns: only the low four bits of an index count. */
INLINE void decode8(__m512 w[8], __m512i codes, __m512 table) {
    w[0] = _mm512_permutexvar_ps(codes, table);
#pragma GCC unroll 8
    for (unsigned j = 1; j < 8; j++) w[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), table);
}

/* The products of eight k, summed in order. */
INLINE __m512 sum8(const __m512 w[8], const float *a) {
    __m512 t = _mm512_mul_ps(w[0], _mm512_set1_ps(a[0]));
#pragma GCC unroll 8
    for (int j = 1; j < 8; j++) t = _mm512_fmadd_ps(w[j], _mm512_set1_ps(a[j]), t);
    return t;
}

/* y[m][0..16) = rows m < n_rows, all of K, against one tile. n_rows is a constant where this is inlined. */
INLINE void tile_pass(MOE4_TILE16_PARAMETERS, const int n_rows) {
    const __m512 table = _mm512_load_ps(weight_table);
    const __m512i scale_bits = _mm512_set1_epi32(0xff << 20), bias = _mm512_set1_epi32(SCALE_BIAS << 23);
    __m512 acc[MAX_ROWS];
#pragma GCC unroll 16
    for (int m = 0; m < n_rows; m++) acc[m] = _mm512_setzero_ps();
    for (size_t i = 0; i < n_chunks; i++, w++) {
        const __m512i scales = moe4_once(_mm512_load_si512(w->scale));
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
            moe4_tile16_prefetch(w, i, n_chunks, next, b, n_rows > 1);
            __m512 v[2][8];
            decode8(v[0], moe4_once(_mm512_load_si512(w->code[b][0])), table);
            decode8(v[1], moe4_once(_mm512_load_si512(w->code[b][1])), table);
            const __m512i shifted = b < 3 ? _mm512_slli_epi32(scales, 20 - 8 * b) : _mm512_srli_epi32(scales, 4);
            const __m512 sw = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(shifted, scale_bits, bias, 0xea)); /* (shifted & bits) | bias */
#pragma GCC unroll 16
            for (int m = 0; m < n_rows; m++) {
                const float *a = (const float *)rows[m] + 64 * i + 16 * b;
                acc[m] = _mm512_fmadd_ps(_mm512_add_ps(sum8(v[0], a), sum8(v[1], a + 8)), sw, acc[m]);
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < n_rows; m++) _mm512_mask_storeu_ps(y + (size_t)m * y_ld, cols, acc[m]);
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
static const moe4_tile16_pass passes[MAX_ROWS + 1] = {NULL,   pass_1, pass_2, pass_3, pass_4,  pass_5,
                                                      pass_6, pass_7, pass_8, pass_9, pass_10, pass_11};

static void gemm(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0, size_t n_cols,
                 const void *next, void *scratch) {
    (void)scratch;
    moe4_tile16_gemm(y, y_ld, rows, n_rows, w, col0, n_cols, next, passes, MAX_ROWS, MAX_ROWS);
}

/* fp32 rows with zeros up to a multiple of 64. */
static size_t row_bytes(size_t k) {
    return (k + 63) / 64 * 64 * sizeof(float);
}

static uint64_t pack_row(const struct moe4_kernels *kernels, void *row, float *factor_ret, const float *x, size_t k,
                         const struct moe4_rounding *rounding) {
    const size_t own = moe4_fp32_row_bytes(k);
    memset((char *)row + own, 0, row_bytes(k) - own);
    return moe4_fp32_pack_row(kernels, row, factor_ret, x, k, rounding);
}

static const struct moe4_gemm w4a16 = {
    .name = "w4a16 fp32, AVX-512",
    .tile_cols = 16,
    .layout = MOE4_TILE16_LAYOUT,
    .packed_bytes = moe4_tile16_bytes,
    .pack = moe4_tile16_pack_avx512,
    .row_bytes = row_bytes,
    .pack_row = pack_row,
    .gemm = gemm,
};

void moe4_kernels_gemm_avx512fp32(struct moe4_kernels *k) {
    k->w4a16 = &w4a16;
}
#endif
