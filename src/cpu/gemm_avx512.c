/* w4a4 on AVX-512 VNNI: y = x @ W^T with both sides NVFP4, block dots exact in integers.
 *
 * int8 holds 2*e2m1 (0, 1, 2, 3, 4, 6, 8, 12 and negatives). vpdpbusd wants one unsigned side, so weights are decoded to 2w + 12; the
 * int32 sum of a block then starts from -12 * sum(2a), which the row carries, and the offset costs nothing.
 *
 *   per 16 columns x 16 k and row:   s  = start                          one broadcast load
 *                                    s += dot4(2w + 12, 2a)              4 vpdpbusd, activations broadcast from memory
 *                                    acc += float(s) * (sw * sa)         convert, permute, add, FMA
 *
 * The product of the two block scales is looked up: scale_products has 16 floats for each of the 128 activation scales, indexed by the
 * mantissa of the weight's scale; the weight's exponent is added to the float's bits. That moves a multiply off the two pipes that
 * VNNI and FMA share; five instructions a block on those pipes are the ceiling. No subnormal float appears, so flush-to-zero
 * changes nothing. The block sums are exact integers and the FMAs run over blocks in order of k: one chain for each element, whatever
 * the number of rows or columns in the call. */
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "tile16_x86.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* Rows of one pass: accumulators, decoded weights and scales fill the 32 registers. From 16 on a pass is as fast as it gets, and more
 * rows only take more of the second-level cache; but one pass of 22 is faster than two of 11, which decode twice. Up to EARLY_ROWS there
 * are registers for two decoded blocks. */
enum { MAX_ROWS = 22, BEST_ROWS = 16, EARLY_ROWS = 12 };

/* One row alone multiplies the two block scales, which saves a permute: the weight's scale byte becomes a float of (8 + mantissa) *
 * 2^(exponent + 96 - 130), the line's first entry is 8/2^15 of the activation's, and so the sums come out 2^31 too small. */
#define ONE_ROW_EXPONENT 96
#define ONE_ROW_FACTOR 0x1p31f

/* 64 k of an activation row. */
struct chunk {
    int8_t a[4][16];   /* 2*e2m1 of block b; k in the order 0 2 4 6 1 3 5 7 8 10 12 14 9 11 13 15, as the packed nibbles come out */
    int32_t start[4];  /* -12 * sum of a[b] */
    uint32_t table[4]; /* byte offset of the scale's line in scale_products */
};
_Static_assert(sizeof(struct chunk) == 96, "packed activation chunk");

/* scale_products[sa][i] = e4m3(sa) * (8 + i % 8) / 2^15: times 2^exponent of pack.h's scale byte that is the product of the two block
 * scales, divided by 4 for the two doubled codes. Exact. The line repeats because bit 3 of the index is the exponent's. */
#define SA(c) ((c) < 8 ? (float)(c) / 512 : (float)(8 + (c) % 8) * (float)(1 << (c) / 8) / 1024)
#define PRODUCT(c, i) (SA(c) * (8 + (i)) / 32768)
#define HALF(c) PRODUCT(c, 0), PRODUCT(c, 1), PRODUCT(c, 2), PRODUCT(c, 3), PRODUCT(c, 4), PRODUCT(c, 5), PRODUCT(c, 6), PRODUCT(c, 7)
#define LINE(c) \
    { HALF(c), HALF(c) }
#define LINES_8(c) LINE(c), LINE((c) + 1), LINE((c) + 2), LINE((c) + 3), LINE((c) + 4), LINE((c) + 5), LINE((c) + 6), LINE((c) + 7)
static const float scale_products[128][16] __attribute__((aligned(64))) = {
    LINES_8(0),  LINES_8(8),  LINES_8(16), LINES_8(24), LINES_8(32), LINES_8(40),  LINES_8(48),  LINES_8(56),
    LINES_8(64), LINES_8(72), LINES_8(80), LINES_8(88), LINES_8(96), LINES_8(104), LINES_8(112), LINES_8(120),
};

/* 2*e2m1 + 12 by code; bits 4 and 5 of a vpermb index are the neighbour nibble's, so the line repeats. */
#define WEIGHTS 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0
static const uint8_t weight_table[64] __attribute__((aligned(64))) = {WEIGHTS, WEIGHTS, WEIGHTS, WEIGHTS};

/* acc += dot4 of the unsigned bytes of w with 4 signed bytes at a, broadcast. Compilers do not fold the broadcast into the instruction. */
INLINE __m512i dot4(__m512i acc, __m512i w, const int8_t *a) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*(const int32_t *)(const void *)a));
    return acc;
}

/* A block of 16 columns x 16 k. */
struct block {
    __m512i w[4];     /* decoded weights, by the four k of each dot4 */
    __m512i mantissa; /* of the scales: the low three bits */
    __m512i scale;    /* in a float's place: of one row exponent and mantissa, otherwise the exponent */
};

INLINE struct block decode(const struct moe4_tile16 *w, int b, __m512i scales, const int n_rows) {
    const __m512i table = _mm512_load_si512(weight_table);
    const __m512i x = moe4_once(_mm512_load_si512(w->code[b][0])), z = moe4_once(_mm512_load_si512(w->code[b][1]));
    const __m512i sw = b < 3 ? _mm512_slli_epi32(scales, 20 - 8 * b) : _mm512_srli_epi32(scales, 4);
    struct block d;
    d.w[0] = moe4_once(_mm512_permutexvar_epi8(x, table));
    d.w[1] = moe4_once(_mm512_permutexvar_epi8(_mm512_srli_epi16(x, 4), table));
    d.w[2] = moe4_once(_mm512_permutexvar_epi8(z, table));
    d.w[3] = moe4_once(_mm512_permutexvar_epi8(_mm512_srli_epi16(z, 4), table));
    d.mantissa = moe4_once(_mm512_loadu_si512((const char *)w->scale + b));
    const __m512i bits = _mm512_set1_epi32(n_rows == 1 ? 0xff << 20 : 0x1f << 23);
    const __m512i bias = _mm512_set1_epi32(n_rows == 1 ? ONE_ROW_EXPONENT << 23 : 0);
    d.scale = moe4_once(_mm512_ternarylogic_epi32(sw, bits, bias, 0xea)); /* (sw & bits) | bias */
    return d;
}

/* acc += row a's block b times d. */
INLINE __m512 add_block(__m512 acc, const struct chunk *a, int b, const struct block *d, const int n_rows) {
    __m512i s = _mm512_set1_epi32(a->start[b]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) s = dot4(s, d->w[j], a->a[b] + 4 * j);
    const float *line = (const float *)(const void *)((const char *)scale_products + a->table[b]);
    __m512 p;
    if (n_rows == 1) {
        p = _mm512_mul_ps(_mm512_castsi512_ps(d->scale), _mm512_set1_ps(line[0]));
    } else {
        const __m512i f = _mm512_castps_si512(_mm512_permutexvar_ps(d->mantissa, _mm512_load_ps(line)));
        p = _mm512_castsi512_ps(_mm512_add_epi32(f, d->scale));
    }
    return _mm512_fmadd_ps(p, _mm512_cvtepi32_ps(s), acc);
}

/* y[m][0..16) = rows m < n_rows, all of K, against one tile. n_rows is a constant where this is inlined. */
INLINE void tile_pass(MOE4_TILE16_PARAMETERS, const int n_rows) {
    /* While registers last, a block is decoded before the rows of the block before it: decoding has the pipes that the dots leave. */
    const bool early = n_rows <= EARLY_ROWS;
    __m512 acc[MAX_ROWS];
#pragma GCC unroll 24
    for (int m = 0; m < n_rows; m++) acc[m] = _mm512_setzero_ps();
    const struct chunk *row[MAX_ROWS];
#pragma GCC unroll 24
    for (int m = 0; m < n_rows; m++) row[m] = rows[m];
    struct block d;
    if (early) d = decode(w, 0, _mm512_load_si512(w->scale), n_rows);
    for (size_t i = 0; i < n_chunks; i++) {
        const struct moe4_tile16 *after = w + (i + 1 < n_chunks);
        const __m512i scales = moe4_once(_mm512_load_si512(w->scale));
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
            struct block ahead;
            moe4_tile16_prefetch(w, i, n_chunks, next, b, n_rows > 1);
            if (!early) {
                d = decode(w, b, scales, n_rows);
            } else if (b < 3) {
                ahead = decode(w, b + 1, scales, n_rows);
            } else {
                ahead = decode(after, 0, _mm512_load_si512(after->scale), n_rows);
            }
#pragma GCC unroll 24
            for (int m = 0; m < n_rows; m++) acc[m] = add_block(acc[m], row[m], b, &d, n_rows);
            if (early) d = ahead;
        }
        w = early ? after : w + 1;
#pragma GCC unroll 24
        for (int m = 0; m < n_rows; m++) {
            row[m]++;
            if (n_rows <= 8) __asm__("" : "+r"(row[m])); /* a register each, not an index and bases that do not fit */
        }
    }
#pragma GCC unroll 24
    for (int m = 0; m < n_rows; m++) {
        if (n_rows == 1) acc[m] = _mm512_mul_ps(acc[m], _mm512_set1_ps(ONE_ROW_FACTOR));
        _mm512_mask_storeu_ps(y + m * y_ld, cols, acc[m]);
    }
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
MOE4_TILE16_PASS(TARGET, 15)
MOE4_TILE16_PASS(TARGET, 16)
MOE4_TILE16_PASS(TARGET, 17)
MOE4_TILE16_PASS(TARGET, 18)
MOE4_TILE16_PASS(TARGET, 19)
MOE4_TILE16_PASS(TARGET, 20)
MOE4_TILE16_PASS(TARGET, 21)
MOE4_TILE16_PASS(TARGET, 22)
static const moe4_tile16_pass passes[MAX_ROWS + 1] = {NULL,    pass_1,  pass_2,  pass_3,  pass_4,  pass_5,  pass_6,  pass_7,
                                                      pass_8,  pass_9,  pass_10, pass_11, pass_12, pass_13, pass_14, pass_15,
                                                      pass_16, pass_17, pass_18, pass_19, pass_20, pass_21, pass_22};

static void gemm(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0, size_t n_cols,
                 const void *next, void *scratch) {
    (void)scratch;
    moe4_tile16_gemm(y, y_ld, rows, n_rows, w, col0, n_cols, next, passes, MAX_ROWS, BEST_ROWS);
}

static size_t row_bytes(size_t k) {
    return ((k + 63) / 64 * sizeof(struct chunk) + 63) / 64 * 64;
}

/* One chunk from 32 bytes of codes and 4 scales. */
TARGET static void pack_chunk(void *chunk, const uint8_t codes[32], const uint8_t scales[4]) {
    struct chunk *a = chunk;
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const __m256i nibble = _mm256_set1_epi8(15), x = _mm256_loadu_si256((const __m256i *)(const void *)codes);
    const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(x, nibble));
    const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble));
    const __m256i b02 = _mm256_unpacklo_epi32(even, odd), b13 = _mm256_unpackhi_epi32(even, odd);
    _mm_storeu_si128((__m128i *)(void *)a->a[0], _mm256_castsi256_si128(b02));
    _mm_storeu_si128((__m128i *)(void *)a->a[1], _mm256_castsi256_si128(b13));
    _mm_storeu_si128((__m128i *)(void *)a->a[2], _mm256_extracti128_si256(b02, 1));
    _mm_storeu_si128((__m128i *)(void *)a->a[3], _mm256_extracti128_si256(b13, 1));
    const __m256i twelve = _mm256_set1_epi8(12), zero = _mm256_setzero_si256();
    const __m256i s02 = _mm256_dpbusd_epi32(zero, twelve, b02), s13 = _mm256_dpbusd_epi32(zero, twelve, b13);
    const __m256i pairs = _mm256_hadd_epi32(s02, s13), sums = _mm256_hadd_epi32(pairs, pairs); /* 0 1 0 1 | 2 3 2 3 */
    const __m128i all = _mm_unpacklo_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    _mm_storeu_si128((__m128i *)(void *)a->start, _mm_sub_epi32(_mm_setzero_si128(), all));
    uint32_t four;
    memcpy(&four, scales, sizeof four);
    _mm_storeu_si128((__m128i *)(void *)a->table, _mm_slli_epi32(_mm_cvtepu8_epi32(_mm_cvtsi32_si128((int)four)), 6));
}

static uint64_t pack_row(const struct moe4_kernels *kernels, void *row, float *factor_ret, const float *x, size_t k,
                         const struct moe4_rounding *rounding) {
    return moe4_chunks_pack_row(kernels, row, factor_ret, x, k, rounding, pack_chunk, sizeof(struct chunk));
}

static void pack_codes(const struct moe4_kernels *kernels, void *row, float *factor_ret, const uint8_t *codes, const uint8_t *scales,
                       size_t k) {
    (void)kernels;
    moe4_chunks_pack_codes(row, factor_ret, codes, scales, k, pack_chunk, sizeof(struct chunk));
}

static const struct moe4_gemm w4a4 = {
    .name = "w4a4 avx512vnni",
    .tile_cols = 16,
    .layout = MOE4_TILE16_LAYOUT,
    .packed_bytes = moe4_tile16_bytes,
    .pack = moe4_tile16_pack_avx512,
    .row_bytes = row_bytes,
    .pack_row = pack_row,
    .pack_codes = pack_codes,
    .gemm = gemm,
};

void moe4_kernels_gemm_avx512vnni(struct moe4_kernels *k) {
    k->w4a4 = &w4a4;
}
#endif
