/* Quantizing activations on AVX-512: the scalar kernel's bits. The other recipes stay with AVX2.
 *
 * Sixteen blocks at a time: a transpose that keeps the larger of two leaves one vector of block amaxes, their scales are found together,
 * and each block is encoded by one addition: v + c rounds to the grid of e2m1 where c is as large as the grid is coarse. */
#include "kernels.h"

#if defined(__x86_64__)
#include <float.h>
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define INLINE TARGET static inline __attribute__((always_inline))

enum { GROUP = 16 }; /* blocks at a time */

/* What sixteen blocks need for their elements. */
struct scales {
    uint8_t byte[GROUP];
    float step[GROUP];    /* factor of the elements */
    uint32_t sign[GROUP]; /* 8, or 0 in a block without signs */
};

INLINE __m512i magnitude(__m512 x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

INLINE __m512i larger(__m512i a, __m512i b) {
    return _mm512_max_epi32(a, b); /* bits of non-negative floats order as the floats do */
}

/* m[0..16) -> their sixteen maxima, in order. */
INLINE __m512 max_of_each(__m512i m[GROUP]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) m[i] = larger(_mm512_unpacklo_epi32(m[2 * i], m[2 * i + 1]), _mm512_unpackhi_epi32(m[2 * i], m[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) m[i] = larger(_mm512_unpacklo_epi64(m[2 * i], m[2 * i + 1]), _mm512_unpackhi_epi64(m[2 * i], m[2 * i + 1]));
#pragma GCC unroll 2
    for (int step = 2; step >= 1; step--)
#pragma GCC unroll 2
        for (int i = 0; i < step; i++)
            m[i] = larger(_mm512_shuffle_i32x4(m[2 * i], m[2 * i + 1], 0x88), _mm512_shuffle_i32x4(m[2 * i], m[2 * i + 1], 0xdd));
    return _mm512_castsi512_ps(m[0]);
}

/* q >= 0 -> E4M3 codes, saturating at 448. Normal numbers: the mantissa cut to 3 bits by an addition that carries into the exponent.
 * Subnormal ones: adding 2^14, where fp32 steps by 2^-9, rounds them. */
INLINE __m512i e4m3_codes(__m512 q) {
    const __m512 shifter = _mm512_set1_ps(0x1p14f);
    q = _mm512_min_ps(q, _mm512_set1_ps(448.f));
    const __m512i bits = _mm512_castps_si512(q), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7ffff)), odd);
    const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(up, 20), _mm512_set1_epi32(120 << 3));
    const __m512i subnormal = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(q, shifter)), _mm512_castps_si512(shifter));
    return _mm512_mask_mov_epi32(normal, _mm512_cmp_ps_mask(q, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ), subnormal);
}

/* Returns the saturated blocks as bits. */
INLINE unsigned find_scales(struct scales *s, __m512 amax, float global) {
    const __m512 q = _mm512_mul_ps(amax, _mm512_set1_ps(global * (1.f / 6.f)));
    const __m512i byte = e4m3_codes(q);
    const __mmask16 some = _mm512_test_epi32_mask(byte, byte);
    const __m512 sf8 = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(byte, 20)), _mm512_set1_ps(0x1p120f));
    const __m512 step = _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_mul_ps(sf8, _mm512_set1_ps(1.f / global)));
    _mm_storeu_si128((__m128i *)(void *)s->byte, _mm512_cvtepi32_epi8(byte));
    _mm512_storeu_ps(s->step, _mm512_maskz_min_ps(some, step, _mm512_set1_ps(FLT_MAX)));
    _mm512_storeu_si512(s->sign, _mm512_maskz_set1_epi32(some, 8));
    return _mm512_cmp_ps_mask(q, _mm512_set1_ps(464.f), _CMP_GT_OQ);
}

/* By the low bits of the exponent of a magnitude from 1 to 6: what to add so that fp32 rounds to the grid there and the code is in the low
 * bits. Below 2 the grid is 0.5 and the code 2v; from 2 on it is 1, v + 2; from 4 on it is 2, v / 2 + 4. */
INLINE __m512 grids(void) {
    const float below_2 = 0x1.8p22f, below_4 = 0x1.8p23f + 2, rest = 0x1.8p24f + 8;
    return _mm512_setr_ps(below_4, rest, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, below_2);
}

INLINE void encode_block(uint8_t *codes, const float *x, float step, uint32_t sign_mask) {
    const __m512 in = _mm512_loadu_ps(x), scaled = _mm512_mul_ps(in, _mm512_set1_ps(step));
    const __m512 v = _mm512_min_ps(_mm512_castsi512_ps(magnitude(scaled)), _mm512_set1_ps(6.f));
    const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(_mm512_max_ps(v, _mm512_set1_ps(1.f))), 23);
    const __m512i sum = _mm512_castps_si512(_mm512_add_ps(v, _mm512_permutexvar_ps(exponent, grids())));
    const __m512i sign = _mm512_srli_epi32(_mm512_castps_si512(in), 28);
    const __m512i low = _mm512_and_si512(sum, _mm512_set1_epi32(7));
    const __m512i code = _mm512_ternarylogic_epi32(sign, _mm512_set1_epi32((int)sign_mask), low, 0xea); /* (sign & mask) | low */
    const __m512i pairs = _mm512_or_si512(code, _mm512_srli_epi64(code, 28)); /* a pair's byte at the bottom of each 64 bits */
    _mm_storel_epi64((__m128i *)(void *)codes, _mm512_cvtepi64_epi8(pairs));
}

INLINE uint64_t quantize_group(uint8_t *codes, uint8_t *scales, const float *x, size_t n_blocks, float global) {
    struct scales s;
    __m512i m[GROUP];
#pragma GCC unroll 16
    for (size_t i = 0; i < GROUP; i++) m[i] = i < n_blocks ? magnitude(_mm512_loadu_ps(x + i * MOE4_BLOCK)) : _mm512_setzero_si512();
    const unsigned saturated = find_scales(&s, max_of_each(m), global);
    for (size_t i = 0; i < n_blocks; i++) encode_block(codes + i * MOE4_BLOCK / 2, x + i * MOE4_BLOCK, s.step[i], s.sign[i]);
    memcpy(scales, s.byte, n_blocks);
    return (uint64_t)__builtin_popcount(saturated & ((1u << n_blocks) - 1));
}

TARGET static uint64_t quantize_row(uint8_t *codes, uint8_t *scales, const float *x, size_t n, const struct moe4_quantizer *q) {
    if (q->recipe != MOE4_RECIPE_ACTIVATION) return moe4_quantize_row_avx2(codes, scales, x, n, q);
    const size_t n_blocks = n / MOE4_BLOCK;
    uint64_t n_saturated = 0;
    size_t i = 0;
    for (; i + GROUP <= n_blocks; i += GROUP)
        n_saturated += quantize_group(codes + i * MOE4_BLOCK / 2, scales + i, x + i * MOE4_BLOCK, GROUP, q->global);
    if (i < n_blocks) n_saturated += quantize_group(codes + i * MOE4_BLOCK / 2, scales + i, x + i * MOE4_BLOCK, n_blocks - i, q->global);
    return n_saturated;
}

void moe4_kernels_codec_avx512(struct moe4_kernels *k) {
    k->quantize_row = quantize_row;
}
#endif
