/* w4a4 on AArch64 with the int8 dot product: both sides as 2*e2m1 in int8, block dots exact in int32, sums over blocks in order of k.
 *
 *   per 4 columns x 16 k and row:   s = dot4(2w, 2a)                  4 SDOT, an activation lane each
 *                                   acc += (float(s) * sw) * sa       convert, multiply, FMA by a scalar
 *
 * With I8MM two rows share an instruction: SMMLA multiplies 2 rows x 8 k by 2 columns x 8 k, so 4 SMMLA do what 8 SDOT do. Both give the
 * same integers, so the same bits. */
#include "pack.h"
#include "rows.h"

#if defined(MOE4_NEON_DOT)
#include <arm_neon.h>
#include <string.h>

/* Every function here has one of these targets, I8MM with all that DOT has: only so can one be inlined into the other, whatever the file
 * is compiled for. */
#if defined(__clang__)
#define DOT __attribute__((target("dotprod")))
#define I8MM __attribute__((target("dotprod,i8mm")))
#elif defined(__ARM_FEATURE_DOTPROD)
#define DOT
#define I8MM __attribute__((target("+i8mm")))
#else
#define DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#define I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#endif
#define INLINE static inline __attribute__((always_inline))

enum { MAX_ROWS = 4 /* rows of one pass: 16 accumulators of 4 columns, four decoded weights and the rows fill the 32 registers */ };

/* 64 k of an activation row; k in the order 0 2 4 6 1 3 5 7 8 10 12 14 9 11 13 15, as the packed nibbles come out. */
struct chunk {
    int8_t a[4][16];
    float scale[4];
};
_Static_assert(sizeof(struct chunk) == 80, "packed activation chunk");

/* 2*e2m1 by code. */
static const int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* pack.h's scale byte at bits 20..27 of a float is (8 + mantissa) * 2^(exponent - 130). With 96 more in the exponent it is normal and 2^21
 * short of the block scale; both codes were doubled. */
#define SCALE_BIAS 96
#define LAST_FACTOR 0x1p19f

INLINE DOT int8x16_t zip_words(int8x16_t a, int8x16_t b, const int high) {
    const int32x4_t x = vreinterpretq_s32_s8(a), y = vreinterpretq_s32_s8(b);
    return vreinterpretq_s8_s32(high ? vzip2q_s32(x, y) : vzip1q_s32(x, y));
}

INLINE DOT int8x16_t zip_halves(int8x16_t a, int8x16_t b, const int high) {
    const int64x2_t x = vreinterpretq_s64_s8(a), y = vreinterpretq_s64_s8(b);
    return vreinterpretq_s8_s64(high ? vzip2q_s64(x, y) : vzip1q_s64(x, y));
}

/* Block b of four columns: their weights in the order of a chunk, four k to a vector, and 2^-21 of their block scales. */
struct block {
    int8x16_t w[4];
    float32x4_t scale;
};

INLINE DOT struct block decode(const struct moe4_tile16 *tile, const int b, const int group) {
    const int8x16_t table = vld1q_s8(twice);
    const uint8x16_t nibble = vdupq_n_u8(15);
    const uint8x16_t x = vld1q_u8(tile->code[b][0] + 16 * group), z = vld1q_u8(tile->code[b][1] + 16 * group);
    const uint32x4_t scales = vreinterpretq_u32_u8(vld1q_u8(tile->scale[4 * group]));
    const uint32x4_t bits = vandq_u32(vshlq_u32(scales, vdupq_n_s32(20 - 8 * b)), vdupq_n_u32(0xff << 20));
    return (struct block){
        .w = {vqtbl1q_s8(table, vandq_u8(x, nibble)), vqtbl1q_s8(table, vshrq_n_u8(x, 4)), vqtbl1q_s8(table, vandq_u8(z, nibble)),
              vqtbl1q_s8(table, vshrq_n_u8(z, 4))},
        .scale = vreinterpretq_f32_u32(vorrq_u32(bits, vdupq_n_u32(SCALE_BIAS << 23))),
    };
}

INLINE DOT float32x4_t add(float32x4_t acc, int32x4_t s, float32x4_t w_scale, float a_scale) {
    return vfmaq_n_f32(acc, vmulq_f32(vcvtq_f32_s32(s), w_scale), a_scale);
}

INLINE DOT void store(float *y, const float32x4_t acc[4], uint16_t cols) {
    float out[16];
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) vst1q_f32(out + 4 * g, vmulq_n_f32(acc[g], LAST_FACTOR));
    memcpy(y, out, (size_t)__builtin_popcount(cols) * sizeof *y);
}

/* ---- SDOT ---- */

/* One row against four columns. */
INLINE DOT int32x4_t dot(const struct block *w, int8x16_t a) {
    int32x4_t s = vdotq_laneq_s32(vdupq_n_s32(0), w->w[0], a, 0);
    s = vdotq_laneq_s32(s, w->w[1], a, 1);
    s = vdotq_laneq_s32(s, w->w[2], a, 2);
    return vdotq_laneq_s32(s, w->w[3], a, 3);
}

/* y[m][0..16) = rows m < n_rows, all of K, against one tile. */
INLINE DOT void dot_pass(float *y, size_t y_ld, const void *const *rows, const struct moe4_tile16 *w, size_t n_chunks, uint16_t cols,
                         const int n_rows) {
    float32x4_t acc[MAX_ROWS][4];
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++)
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) acc[m][g] = vdupq_n_f32(0);
    for (size_t i = 0; i < n_chunks; i++)
        for (int b = 0; b < 4; b++)
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) {
                const struct block block = decode(&w[i], b, g);
#pragma GCC unroll 4
                for (int m = 0; m < n_rows; m++) {
                    const struct chunk *a = (const struct chunk *)rows[m] + i;
                    acc[m][g] = add(acc[m][g], dot(&block, vld1q_s8(a->a[b])), block.scale, a->scale[b]);
                }
            }
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++) store(y + (size_t)m * y_ld, acc[m], cols);
}

#define DOT_PASS(n)                                    \
    DOT static void dot_##n(MOE4_TILE16_PARAMETERS) {  \
        (void)next;                                    \
        dot_pass(y, y_ld, rows, w, n_chunks, cols, n); \
    }
DOT_PASS(1)
DOT_PASS(2)
DOT_PASS(3)
DOT_PASS(4)
static const moe4_tile16_pass dot_passes[MAX_ROWS + 1] = {NULL, dot_1, dot_2, dot_3, dot_4};

/* ---- SMMLA ---- */

/* s[r] = row r of two against four columns. */
INLINE I8MM void dot_pair(int32x4_t s[2], const struct block *w, int8x16_t a0, int8x16_t a1) {
    const int8x16_t first = zip_halves(a0, a1, 0), second = zip_halves(a0, a1, 1);
    int32x4_t c01 = vdupq_n_s32(0), c23 = vdupq_n_s32(0); /* columns 0 and 1 of both rows, 2 and 3 */
    c01 = vmmlaq_s32(c01, first, zip_words(w->w[0], w->w[1], 0));
    c23 = vmmlaq_s32(c23, first, zip_words(w->w[0], w->w[1], 1));
    c01 = vmmlaq_s32(c01, second, zip_words(w->w[2], w->w[3], 0));
    c23 = vmmlaq_s32(c23, second, zip_words(w->w[2], w->w[3], 1));
    s[0] = vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(c01), vreinterpretq_s64_s32(c23)));
    s[1] = vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(c01), vreinterpretq_s64_s32(c23)));
}

/* The same for an even number of rows. */
INLINE I8MM void pairs_pass(float *y, size_t y_ld, const void *const *rows, const struct moe4_tile16 *w, size_t n_chunks, uint16_t cols,
                            const int n_rows) {
    float32x4_t acc[MAX_ROWS][4];
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++)
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) acc[m][g] = vdupq_n_f32(0);
    for (size_t i = 0; i < n_chunks; i++)
        for (int b = 0; b < 4; b++)
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) {
                const struct block block = decode(&w[i], b, g);
#pragma GCC unroll 4
                for (int m = 0; m < n_rows; m += 2) {
                    const struct chunk *a0 = (const struct chunk *)rows[m] + i, *a1 = (const struct chunk *)rows[m + 1] + i;
                    int32x4_t s[2];
                    dot_pair(s, &block, vld1q_s8(a0->a[b]), vld1q_s8(a1->a[b]));
                    acc[m][g] = add(acc[m][g], s[0], block.scale, a0->scale[b]);
                    acc[m + 1][g] = add(acc[m + 1][g], s[1], block.scale, a1->scale[b]);
                }
            }
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++) store(y + (size_t)m * y_ld, acc[m], cols);
}

I8MM static void pairs_2(MOE4_TILE16_PARAMETERS) {
    (void)next;
    pairs_pass(y, y_ld, rows, w, n_chunks, cols, 2);
}

I8MM static void pairs_4(MOE4_TILE16_PARAMETERS) {
    (void)next;
    pairs_pass(y, y_ld, rows, w, n_chunks, cols, 4);
}

static void pairs_3(MOE4_TILE16_PARAMETERS) {
    pairs_2(y, y_ld, rows, w, n_chunks, cols, next);
    dot_1(y + 2 * y_ld, y_ld, rows + 2, w, n_chunks, cols, next);
}
static const moe4_tile16_pass i8mm_passes[MAX_ROWS + 1] = {NULL, dot_1, pairs_2, pairs_3, pairs_4};

/* ---- the families ---- */

static void gemm_dot(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0, size_t n_cols,
                     const void *next, void *scratch) {
    (void)scratch;
    moe4_tile16_gemm(y, y_ld, rows, n_rows, w, col0, n_cols, next, dot_passes, MAX_ROWS, MAX_ROWS);
}

static void gemm_i8mm(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0,
                      size_t n_cols, const void *next, void *scratch) {
    (void)scratch;
    moe4_tile16_gemm(y, y_ld, rows, n_rows, w, col0, n_cols, next, i8mm_passes, MAX_ROWS, MAX_ROWS);
}

/* ---- activation rows ---- */

static size_t row_bytes(size_t k) {
    return ((k + 63) / 64 * sizeof(struct chunk) + 63) / 64 * 64;
}

/* One chunk from 32 bytes of codes and 4 scales. */
DOT static void pack_chunk(void *chunk, const uint8_t codes[32], const uint8_t scales[4]) {
    struct chunk *a = chunk;
    const int8x16_t table = vld1q_s8(twice);
    for (int b = 0; b < 4; b += 2) {
        const uint8x16_t x = vld1q_u8(codes + 8 * b);
        const int8x16_t even = vqtbl1q_s8(table, vandq_u8(x, vdupq_n_u8(15))), odd = vqtbl1q_s8(table, vshrq_n_u8(x, 4));
        vst1q_s8(a->a[b], zip_words(even, odd, 0));
        vst1q_s8(a->a[b + 1], zip_words(even, odd, 1));
    }
    for (int b = 0; b < 4; b++) a->scale[b] = moe4_e4m3_to_float(scales[b]);
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

#define FAMILY(title, product)                                                                                                     \
    {                                                                                                                              \
        .name = title, .tile_cols = 16, .layout = MOE4_TILE16_LAYOUT, .packed_bytes = moe4_tile16_bytes, .pack = moe4_tile16_pack, \
        .row_bytes = row_bytes, .pack_row = pack_row, .pack_codes = pack_codes, .gemm = product,                                   \
    }
static const struct moe4_gemm w4a4_dot = FAMILY("w4a4 neondot", gemm_dot);
static const struct moe4_gemm w4a4_i8mm = FAMILY("w4a4 neoni8mm", gemm_i8mm);

void moe4_kernels_gemm_neondot(struct moe4_kernels *k) {
    k->w4a4 = &w4a4_dot;
}

void moe4_kernels_gemm_neoni8mm(struct moe4_kernels *k) {
    k->w4a4 = &w4a4_i8mm;
}
#else
typedef int moe4_no_neon; /* a translation unit may not be empty */
#endif
