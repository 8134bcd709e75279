/* The codec on AVX2, FMA and F16C: the scalar kernels' bits.
 *
 * quantize_row takes 8 blocks at a time: 16 elements x 8 -> one vector of 8 block amaxes -> 8 scales at once -> each block encoded with
 * its scale broadcast. Rounding to e2m1 is seven integer comparisons on the bits of the magnitude, exact by construction. */
#include "kernels.h"

#if defined(__x86_64__)
#include <float.h>
#include <immintrin.h>
#include <stdbool.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) AVX2

enum { GROUP = 8 }; /* blocks at a time */

/* ---- widen, narrow, amax: 8 elements at a time, the last ones through a buffer ---- */

INLINE __m256 widen8(const void *src, moe4_dtype dtype) {
    if (dtype == MOE4_F32) return _mm256_loadu_ps(src);
    __m128i half = _mm_loadu_si128(src);
    if (dtype == MOE4_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE void widen_as(float *dst, const char *src, moe4_dtype dtype, size_t n) {
    size_t i = 0, size = dtype == MOE4_F32 ? 4 : 2;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, widen8(src + i * size, dtype));
    if (i < n) {
        char in[32] = {0};
        float out[8];
        memcpy(in, src + i * size, (n - i) * size);
        _mm256_storeu_ps(out, widen8(in, dtype));
        memcpy(dst + i, out, (n - i) * sizeof *out);
    }
}

AVX2 static void widen_row(float *dst, const void *src, moe4_dtype dtype, size_t n) {
    if (dtype == MOE4_F32)
        widen_as(dst, src, MOE4_F32, n);
    else if (dtype == MOE4_F16)
        widen_as(dst, src, MOE4_F16, n);
    else
        widen_as(dst, src, MOE4_BF16, n);
}

INLINE __m128i bf16_from(__m256 x) {
    __m256i bits = _mm256_castps_si256(x), top = _mm256_srli_epi32(bits, 16);
    __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

INLINE void narrow8(void *dst, moe4_dtype dtype, __m256 x) {
    if (dtype == MOE4_F32)
        _mm256_storeu_ps(dst, x);
    else
        _mm_storeu_si128(dst, dtype == MOE4_F16 ? _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT) : bf16_from(x));
}

INLINE void narrow_as(char *dst, moe4_dtype dtype, const float *src, size_t n) {
    size_t i = 0, size = dtype == MOE4_F32 ? 4 : 2;
    for (; i + 8 <= n; i += 8) narrow8(dst + i * size, dtype, _mm256_loadu_ps(src + i));
    if (i < n) {
        float in[8] = {0};
        char out[32];
        memcpy(in, src + i, (n - i) * sizeof *in);
        narrow8(out, dtype, _mm256_loadu_ps(in));
        memcpy(dst + i * size, out, (n - i) * size);
    }
}

AVX2 static void narrow_row(void *dst, moe4_dtype dtype, const float *src, size_t n) {
    if (dtype == MOE4_F32)
        narrow_as(dst, MOE4_F32, src, n);
    else if (dtype == MOE4_F16)
        narrow_as(dst, MOE4_F16, src, n);
    else
        narrow_as(dst, MOE4_BF16, src, n);
}

INLINE __m256i magnitude_bits(const float *x) {
    return _mm256_and_si256(_mm256_loadu_si256((const __m256i *)x), _mm256_set1_epi32(0x7fffffff));
}

AVX2 static float amax_row(const float *x, size_t n) {
    __m256i most[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    size_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (size_t j = 0; j < 4; j++) most[j] = _mm256_max_epi32(most[j], magnitude_bits(x + i + 8 * j));
    for (; i < n; i += 8) {
        float last[8] = {0};
        memcpy(last, x + i, (n - i < 8 ? n - i : 8) * sizeof *last);
        most[0] = _mm256_max_epi32(most[0], magnitude_bits(last));
    }
    __m256i all = _mm256_max_epi32(_mm256_max_epi32(most[0], most[1]), _mm256_max_epi32(most[2], most[3]));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1))));
}

/* ---- quantize ---- */

/* What eight blocks need for their elements. */
struct scales {
    uint8_t byte[GROUP];
    float sf8[GROUP];
    float step[GROUP];    /* ACTIVATION: factor of the elements; otherwise their divisor */
    uint32_t sign[GROUP]; /* 8, or 0 in a block without signs */
};

/* m[0..8) -> their eight maxima, in order. */
INLINE __m256i max_of_each(const __m256i m[GROUP]) {
    __m256i pair[4], four[2];
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++)
        pair[i] = _mm256_max_epi32(_mm256_unpacklo_epi32(m[2 * i], m[2 * i + 1]), _mm256_unpackhi_epi32(m[2 * i], m[2 * i + 1]));
#pragma GCC unroll 8
    for (int i = 0; i < 2; i++)
        four[i] =
            _mm256_max_epi32(_mm256_unpacklo_epi64(pair[2 * i], pair[2 * i + 1]), _mm256_unpackhi_epi64(pair[2 * i], pair[2 * i + 1]));
    return _mm256_max_epi32(_mm256_permute2x128_si256(four[0], four[1], 0x20), _mm256_permute2x128_si256(four[0], four[1], 0x31));
}

/* Amaxes of n_blocks blocks of x, zeros after them. */
INLINE __m256 block_amaxes(const float *x, size_t n_blocks) {
    __m256i m[GROUP];
#pragma GCC unroll 8
    for (size_t i = 0; i < GROUP; i++) {
        m[i] = _mm256_setzero_si256();
        if (i < n_blocks) m[i] = _mm256_max_epi32(magnitude_bits(x + i * MOE4_BLOCK), magnitude_bits(x + i * MOE4_BLOCK + 8));
    }
    return _mm256_castsi256_ps(max_of_each(m));
}

INLINE __m256 one_if_zero(__m256 x) {
    return _mm256_blendv_ps(x, _mm256_set1_ps(1.f), _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ));
}

INLINE __m256 block_q(__m256 b, const struct moe4_quantizer *z) {
    const __m256 six = _mm256_set1_ps(6.f), global = _mm256_set1_ps(z->global);
    switch (z->recipe) {
    case MOE4_RECIPE_MODELOPT: return one_if_zero(_mm256_div_ps(b, _mm256_mul_ps(six, global)));
    case MOE4_RECIPE_MODELOPT_STATIC:
        b = _mm256_mul_ps(one_if_zero(_mm256_div_ps(b, six)), _mm256_set1_ps(448.f));
        return _mm256_div_ps(b, _mm256_set1_ps(z->amax / 6.f));
    case MOE4_RECIPE_COMPRESSED_TENSORS: return _mm256_mul_ps(global, _mm256_div_ps(b, six));
    case MOE4_RECIPE_ACTIVATION: break;
    }
    return _mm256_mul_ps(b, _mm256_mul_ps(global, _mm256_set1_ps(1.f / 6.f)));
}

/* q >= 0 -> E4M3 codes, saturating at 448. Normal numbers: the mantissa cut to 3 bits by an addition that carries into the exponent.
 * Subnormal ones: adding 2^14, where fp32 steps by 2^-9, rounds them. */
INLINE __m256i e4m3_codes(__m256 q) {
    const __m256 shifter = _mm256_set1_ps(0x1p14f);
    q = _mm256_min_ps(q, _mm256_set1_ps(448.f));
    __m256i bits = _mm256_castps_si256(q), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
    __m256i normal = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7ffff)), odd), 20);
    normal = _mm256_sub_epi32(normal, _mm256_set1_epi32(120 << 3));
    __m256i subnormal = _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(q, shifter)), _mm256_castps_si256(shifter));
    return _mm256_blendv_epi8(normal, subnormal, _mm256_castps_si256(_mm256_cmp_ps(q, _mm256_set1_ps(0x1p-6f), _CMP_LT_OQ)));
}

/* Eight E4M3 bytes in 32-bit lanes -> fp32: exponent and mantissa dropped into fp32's, times the biases' difference. */
INLINE __m256 e4m3_values(__m256i code) {
    __m256i low = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
    __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(low, 20)), _mm256_set1_ps(0x1p120f));
    __m256i nan = _mm256_cmpeq_epi32(low, _mm256_set1_epi32(0x7f));
    __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(code, 7), 31);
    value = _mm256_blendv_ps(value, _mm256_set1_ps(__builtin_nanf("")), _mm256_castsi256_ps(nan));
    return _mm256_xor_ps(value, _mm256_castsi256_ps(sign));
}

INLINE void store_bytes(uint8_t bytes[GROUP], __m256i lanes) {
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    _mm_storel_epi64((__m128i *)bytes, _mm_packus_epi16(words, words));
}

INLINE void find_scales(struct scales *s, __m256 q, const struct moe4_quantizer *z) {
    const __m256 global = _mm256_set1_ps(z->global);
    __m256i sign = _mm256_set1_epi32(8);
    if (z->recipe == MOE4_RECIPE_MODELOPT || z->recipe == MOE4_RECIPE_MODELOPT_STATIC) q = _mm256_max_ps(q, _mm256_set1_ps(0x1p-9f));
    __m256i byte = e4m3_codes(q), zero = _mm256_cmpeq_epi32(byte, _mm256_setzero_si256());
    if (z->recipe == MOE4_RECIPE_COMPRESSED_TENSORS) byte = _mm256_blendv_epi8(byte, _mm256_set1_epi32(0x20), zero);
    __m256 sf8 = e4m3_values(byte), step;
    if (z->recipe == MOE4_RECIPE_ACTIVATION) {
        step = _mm256_mul_ps(sf8, _mm256_set1_ps(1.f / z->global));
        step = _mm256_min_ps(_mm256_div_ps(_mm256_set1_ps(1.f), step), _mm256_set1_ps(FLT_MAX));
        step = _mm256_andnot_ps(_mm256_castsi256_ps(zero), step); /* x * 0, and no sign: code 0 */
        sign = _mm256_andnot_si256(zero, sign);
    } else if (z->recipe == MOE4_RECIPE_COMPRESSED_TENSORS) {
        step = _mm256_div_ps(sf8, global);
    } else {
        step = _mm256_mul_ps(sf8, global);
    }
    store_bytes(s->byte, byte);
    _mm256_storeu_ps(s->sf8, sf8);
    _mm256_storeu_ps(s->step, step);
    _mm256_storeu_si256((__m256i *)s->sign, sign);
}

/* Eight e2m1 codes in 32-bit lanes. */
INLINE __m256i encode8(__m256 x, const struct scales *s, size_t block, moe4_recipe recipe) {
    /* The middles between values as bits of fp32; where a tie goes up, to the even code, the bits below it. A NaN exceeds them all. */
    static const int32_t middle[7] = {0x3e800000, 0x3f3fffff, 0x3fa00000, 0x3fdfffff, 0x40200000, 0x405fffff, 0x40a00000};
    const __m256 step = _mm256_broadcast_ss(&s->step[block]);
    const __m256i sign_mask = _mm256_castps_si256(_mm256_broadcast_ss((const float *)&s->sign[block]));
    __m256 v;
    __m256i sign;
    if (recipe == MOE4_RECIPE_ACTIVATION) { /* the sign bit; otherwise x < 0 */
        v = _mm256_mul_ps(x, step);
        sign = _mm256_srli_epi32(_mm256_castps_si256(x), 28);
    } else {
        v = _mm256_div_ps(x, step);
        sign = _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
    }
    __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
    __m256i code = _mm256_and_si256(sign, sign_mask);
#pragma GCC unroll 8
    for (int i = 0; i < 7; i++) code = _mm256_sub_epi32(code, _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(middle[i])));
    return code;
}

/* Sixteen codes in 32-bit lanes -> 8 bytes, low nibble first. */
INLINE void store_codes(uint8_t *codes, __m256i first, __m256i second) {
    const __m128i low_bytes = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    first = _mm256_or_si256(first, _mm256_srli_epi64(first, 28)); /* a pair's byte at the bottom of each 64 bits */
    second = _mm256_or_si256(second, _mm256_srli_epi64(second, 28));
    __m256i pairs = _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(first), _mm256_castsi256_ps(second), 0x88));
    __m128i even = _mm_shuffle_epi8(_mm256_castsi256_si128(pairs), low_bytes); /* bytes 0 1 of first, of second */
    __m128i odd = _mm_shuffle_epi8(_mm256_extracti128_si256(pairs, 1), low_bytes);
    _mm_storel_epi64((__m128i *)codes, _mm_unpacklo_epi16(even, odd));
}

INLINE __m256 e2m1_values(void) {
    return _mm256_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f);
}

/* codes in 32-bit lanes; only bits 3..0 count. */
INLINE __m256 look_up(__m256 values, __m256i code) {
    __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(code, 3), 31);
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(values, code), _mm256_castsi256_ps(sign));
}

INLINE void squares4(double out[4], __m128 x, __m128 decoded, double global) {
    __m256d value = _mm256_mul_pd(_mm256_cvtps_pd(decoded), _mm256_set1_pd(global));
    __m256d error = _mm256_sub_pd(_mm256_cvtps_pd(x), value);
    _mm256_storeu_pd(out, _mm256_mul_pd(error, error));
}

/* Sum of the squared errors of a decoded block, in fp64 and in order of k. */
INLINE double block_error(const float *x, const __m256i code[2], float sf8, float global) {
    double square[MOE4_BLOCK], sum = 0;
    for (int i = 0; i < 2; i++) {
        __m256 in = _mm256_loadu_ps(x + 8 * i), value = _mm256_mul_ps(look_up(e2m1_values(), code[i]), _mm256_set1_ps(sf8));
        squares4(square + 8 * i, _mm256_castps256_ps128(in), _mm256_castps256_ps128(value), global);
        squares4(square + 8 * i + 4, _mm256_extractf128_ps(in, 1), _mm256_extractf128_ps(value, 1), global);
    }
    for (int k = 0; k < MOE4_BLOCK; k++) sum += square[k];
    return sum;
}

/* The group with q and with 1.5 q, the better of both for each block. Returns the saturated blocks as bits. */
INLINE unsigned four_over_six(struct scales *s, uint8_t *codes, const float *x, __m256 q, size_t n_blocks, const struct moe4_quantizer *z) {
    const __m256 most = _mm256_set1_ps(464.f), wider_q = _mm256_mul_ps(_mm256_set1_ps(1.5f), q);
    unsigned saturated = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(q, most, _CMP_GT_OQ));
    unsigned wider_saturated = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(wider_q, most, _CMP_GT_OQ));
    struct scales wider;
    find_scales(s, q, z);
    find_scales(&wider, wider_q, z);
    for (size_t i = 0; i < n_blocks; i++, x += MOE4_BLOCK, codes += MOE4_BLOCK / 2) {
        __m256 in[2] = {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
        __m256i a[2] = {encode8(in[0], s, i, z->recipe), encode8(in[1], s, i, z->recipe)};
        __m256i b[2] = {encode8(in[0], &wider, i, z->recipe), encode8(in[1], &wider, i, z->recipe)};
        if (block_error(x, b, wider.sf8[i], z->global) < block_error(x, a, s->sf8[i], z->global)) {
            store_codes(codes, b[0], b[1]);
            s->byte[i] = wider.byte[i];
            saturated = (saturated & ~(1u << i)) | (wider_saturated & 1u << i);
        } else {
            store_codes(codes, a[0], a[1]);
        }
    }
    return saturated;
}

INLINE uint64_t quantize_group(uint8_t *codes, uint8_t *scales, const float *x, size_t n_blocks, const struct moe4_quantizer *z) {
    struct scales s;
    __m256 q = block_q(block_amaxes(x, n_blocks), z);
    unsigned saturated;
    if (z->four_over_six) {
        saturated = four_over_six(&s, codes, x, q, n_blocks, z);
    } else {
        saturated = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(q, _mm256_set1_ps(464.f), _CMP_GT_OQ));
        find_scales(&s, q, z);
        for (size_t i = 0; i < n_blocks; i++) {
            const float *at = x + i * MOE4_BLOCK;
            store_codes(codes + i * MOE4_BLOCK / 2, encode8(_mm256_loadu_ps(at), &s, i, z->recipe),
                        encode8(_mm256_loadu_ps(at + 8), &s, i, z->recipe));
        }
    }
    memcpy(scales, s.byte, n_blocks);
    return (uint64_t)__builtin_popcount(saturated & ((1u << n_blocks) - 1));
}

INLINE uint64_t quantize_as(uint8_t *codes, uint8_t *scales, const float *x, size_t n, struct moe4_quantizer z) {
    uint64_t n_saturated = 0;
    size_t n_blocks = n / MOE4_BLOCK, i = 0;
    for (; i + GROUP <= n_blocks; i += GROUP)
        n_saturated += quantize_group(codes + i * MOE4_BLOCK / 2, scales + i, x + i * MOE4_BLOCK, GROUP, &z);
    if (i < n_blocks) n_saturated += quantize_group(codes + i * MOE4_BLOCK / 2, scales + i, x + i * MOE4_BLOCK, n_blocks - i, &z);
    return n_saturated;
}

/* One copy of the loop for each recipe: the constants below decide its branches. */
AVX2 uint64_t moe4_quantize_row_avx2(uint8_t *codes, uint8_t *scales, const float *x, size_t n, const struct moe4_quantizer *q) {
    struct moe4_quantizer z = {.global = q->global, .amax = q->amax};
    switch (q->recipe) {
    case MOE4_RECIPE_MODELOPT:
        z.recipe = MOE4_RECIPE_MODELOPT;
        z.four_over_six = 1;
        if (q->four_over_six) return quantize_as(codes, scales, x, n, z);
        z.four_over_six = 0;
        break;
    case MOE4_RECIPE_MODELOPT_STATIC: z.recipe = MOE4_RECIPE_MODELOPT_STATIC; return quantize_as(codes, scales, x, n, z);
    case MOE4_RECIPE_COMPRESSED_TENSORS: z.recipe = MOE4_RECIPE_COMPRESSED_TENSORS; return quantize_as(codes, scales, x, n, z);
    case MOE4_RECIPE_ACTIVATION: z.recipe = MOE4_RECIPE_ACTIVATION; return quantize_as(codes, scales, x, n, z);
    }
    return quantize_as(codes, scales, x, n, z);
}

/* ---- dequantize ---- */

AVX2 static void dequant_row(float *dst, const uint8_t *codes, const uint8_t *scales, size_t n, float factor) {
    const __m128i low = _mm_set1_epi8(15);
    for (size_t i = 0; i < n / MOE4_BLOCK; i += GROUP) {
        size_t n_blocks = n / MOE4_BLOCK - i < GROUP ? n / MOE4_BLOCK - i : GROUP;
        uint8_t bytes[GROUP] = {0};
        float sf8[GROUP];
        memcpy(bytes, scales + i, n_blocks);
        _mm256_storeu_ps(sf8, e4m3_values(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes))));
        for (size_t j = 0; j < n_blocks; j++, codes += MOE4_BLOCK / 2, dst += MOE4_BLOCK) {
            /* the block's eight magnitudes, finished; its sixteen elements pick theirs */
            __m256 values = _mm256_mul_ps(_mm256_mul_ps(e2m1_values(), _mm256_set1_ps(sf8[j])), _mm256_set1_ps(factor));
            __m128i pairs = _mm_loadl_epi64((const __m128i *)codes);
            __m128i code = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
            _mm256_storeu_ps(dst, look_up(values, _mm256_cvtepu8_epi32(code)));
            _mm256_storeu_ps(dst + 8, look_up(values, _mm256_cvtepu8_epi32(_mm_srli_si128(code, 8))));
        }
    }
}

/* Four at a time in fp64; where rounding to nearest went up, the last bit is taken off again. */
INLINE __m128 to_odd(__m256d d) {
    const __m128 f = _mm256_cvtpd_ps(d);
    const __m256d back = _mm256_cvtps_pd(f), magnitude = _mm256_castsi256_pd(_mm256_set1_epi64x(INT64_MAX));
    const __m256d inexact = _mm256_cmp_pd(back, d, _CMP_NEQ_UQ);
    const __m256d above = _mm256_cmp_pd(_mm256_and_pd(back, magnitude), _mm256_and_pd(d, magnitude), _CMP_GT_OQ);
    const __m128i minus = _mm_castps_si128(
        _mm_shuffle_ps(_mm_castpd_ps(_mm256_castpd256_pd128(above)), _mm_castpd_ps(_mm256_extractf128_pd(above, 1)), 0x88));
    const __m128i odd = _mm_castps_si128(
        _mm_shuffle_ps(_mm_castpd_ps(_mm256_castpd256_pd128(inexact)), _mm_castpd_ps(_mm256_extractf128_pd(inexact, 1)), 0x88));
    return _mm_castsi128_ps(_mm_or_si128(_mm_add_epi32(_mm_castps_si128(f), minus), _mm_srli_epi32(odd, 31)));
}

AVX2 static void scale_row_to_odd(float *y, float a, int divides, size_t n) {
    const __m256d by = _mm256_set1_pd(a);
    for (size_t i = 0; i < n; i += 4) {
        float last[4] = {0};
        float *at = n - i < 4 ? memcpy(last, y + i, (n - i) * sizeof *last) : y + i;
        const __m256d x = _mm256_cvtps_pd(_mm_loadu_ps(at));
        _mm_storeu_ps(at, to_odd(divides ? _mm256_div_pd(x, by) : _mm256_mul_pd(x, by)));
        if (at == last) memcpy(y + i, last, (n - i) * sizeof *last);
    }
}

void moe4_kernels_codec_avx2(struct moe4_kernels *k) {
    k->widen_row = widen_row;
    k->narrow_row = narrow_row;
    k->amax_row = amax_row;
    k->quantize_row = moe4_quantize_row_avx2;
    k->dequant_row = dequant_row;
    k->scale_row_to_odd = scale_row_to_odd;
}
#else
typedef int moe4_no_avx2; /* a translation unit may not be empty */
#endif
