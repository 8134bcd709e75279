/* The codec on NEON, as every AArch64 CPU has it: the scalar kernels' bits.
 *
 * quantize_row takes 4 blocks at a time: 16 elements x 4 -> one vector of 4 block amaxes -> 4 scales at once -> each block encoded with
 * its scale broadcast. Rounding to e2m1 is seven integer comparisons on the bits of the magnitude, exact by construction. */
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <float.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { GROUP = 4 /* blocks at a time */, VECTORS = MOE4_BLOCK / 4 /* of a block */ };

/* ---- widen, narrow, amax: 4 elements at a time, the last ones through a buffer ---- */

INLINE float32x4_t widen4(const void *src, moe4_dtype dtype) {
    if (dtype == MOE4_F32) return vreinterpretq_f32_u8(vld1q_u8(src));
    const uint16x4_t half = vreinterpret_u16_u8(vld1_u8(src));
    if (dtype == MOE4_F16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

INLINE void widen_as(float *dst, const char *src, moe4_dtype dtype, size_t n) {
    const size_t size = dtype == MOE4_F32 ? 4 : 2;
    size_t i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(dst + i, widen4(src + i * size, dtype));
    if (i < n) {
        char in[16] = {0};
        float out[4];
        memcpy(in, src + i * size, (n - i) * size);
        vst1q_f32(out, widen4(in, dtype));
        memcpy(dst + i, out, (n - i) * sizeof *out);
    }
}

static void widen_row(float *dst, const void *src, moe4_dtype dtype, size_t n) {
    if (dtype == MOE4_F32)
        widen_as(dst, src, MOE4_F32, n);
    else if (dtype == MOE4_F16)
        widen_as(dst, src, MOE4_F16, n);
    else
        widen_as(dst, src, MOE4_BF16, n);
}

INLINE uint16x4_t bf16_from(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), top = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(top, vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
    return vmovn_u32(vbslq_u32(vceqq_f32(x, x), rounded, vorrq_u32(top, vdupq_n_u32(0x40))));
}

INLINE void narrow4(void *dst, moe4_dtype dtype, float32x4_t x) {
    if (dtype == MOE4_F32)
        vst1q_u8(dst, vreinterpretq_u8_f32(x));
    else if (dtype == MOE4_F16)
        vst1_u8(dst, vreinterpret_u8_f16(vcvt_f16_f32(x)));
    else
        vst1_u8(dst, vreinterpret_u8_u16(bf16_from(x)));
}

INLINE void narrow_as(char *dst, moe4_dtype dtype, const float *src, size_t n) {
    const size_t size = dtype == MOE4_F32 ? 4 : 2;
    size_t i = 0;
    for (; i + 4 <= n; i += 4) narrow4(dst + i * size, dtype, vld1q_f32(src + i));
    if (i < n) {
        float in[4] = {0};
        char out[16];
        memcpy(in, src + i, (n - i) * sizeof *in);
        narrow4(out, dtype, vld1q_f32(in));
        memcpy(dst + i * size, out, (n - i) * size);
    }
}

static void narrow_row(void *dst, moe4_dtype dtype, const float *src, size_t n) {
    if (dtype == MOE4_F32)
        narrow_as(dst, MOE4_F32, src, n);
    else if (dtype == MOE4_F16)
        narrow_as(dst, MOE4_F16, src, n);
    else
        narrow_as(dst, MOE4_BF16, src, n);
}

INLINE uint32x4_t magnitude_bits(float32x4_t x) {
    return vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7fffffff));
}

static float amax_row(const float *x, size_t n) {
    uint32x4_t most[4] = {vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0)};
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (size_t j = 0; j < 4; j++) most[j] = vmaxq_u32(most[j], magnitude_bits(vld1q_f32(x + i + 4 * j)));
    for (; i < n; i += 4) {
        float last[4] = {0};
        memcpy(last, x + i, (n - i < 4 ? n - i : 4) * sizeof *last);
        most[0] = vmaxq_u32(most[0], magnitude_bits(vld1q_f32(last)));
    }
    const uint32x4_t all = vmaxq_u32(vmaxq_u32(most[0], most[1]), vmaxq_u32(most[2], most[3]));
    return vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32(vmaxvq_u32(all))), 0);
}

/* ---- quantize ---- */

/* What four blocks need for their elements. */
struct scales {
    uint32_t byte[GROUP];
    float sf8[GROUP];
    float step[GROUP];    /* ACTIVATION: factor of the elements; otherwise their divisor */
    uint32_t sign[GROUP]; /* 8, or 0 in a block without signs */
};

/* Amaxes of n_blocks blocks of x, zeros after them. */
INLINE float32x4_t block_amaxes(const float *x, size_t n_blocks) {
    uint32_t most[GROUP] = {0};
    for (size_t i = 0; i < n_blocks; i++, x += MOE4_BLOCK) {
        const uint32x4_t first = vmaxq_u32(magnitude_bits(vld1q_f32(x)), magnitude_bits(vld1q_f32(x + 4)));
        const uint32x4_t second = vmaxq_u32(magnitude_bits(vld1q_f32(x + 8)), magnitude_bits(vld1q_f32(x + 12)));
        most[i] = vmaxvq_u32(vmaxq_u32(first, second));
    }
    return vreinterpretq_f32_u32(vld1q_u32(most));
}

INLINE float32x4_t one_if_zero(float32x4_t x) {
    return vbslq_f32(vceqzq_f32(x), vdupq_n_f32(1.f), x);
}

INLINE float32x4_t block_q(float32x4_t b, const struct moe4_quantizer *z) {
    const float32x4_t six = vdupq_n_f32(6.f), global = vdupq_n_f32(z->global);
    switch (z->recipe) {
    case MOE4_RECIPE_MODELOPT: return one_if_zero(vdivq_f32(b, vmulq_f32(six, global)));
    case MOE4_RECIPE_MODELOPT_STATIC:
        b = vmulq_f32(one_if_zero(vdivq_f32(b, six)), vdupq_n_f32(448.f));
        return vdivq_f32(b, vdupq_n_f32(z->amax / 6.f));
    case MOE4_RECIPE_COMPRESSED_TENSORS: return vmulq_f32(global, vdivq_f32(b, six));
    case MOE4_RECIPE_ACTIVATION: break;
    }
    return vmulq_f32(b, vmulq_f32(global, vdupq_n_f32(1.f / 6.f)));
}

/* q >= 0 -> E4M3 codes, saturating at 448. Normal numbers: the mantissa cut to 3 bits by an addition that carries into the exponent.
 * Subnormal ones: adding 2^14, where fp32 steps by 2^-9, rounds them. */
INLINE uint32x4_t e4m3_codes(float32x4_t q) {
    const float32x4_t shifter = vdupq_n_f32(0x1p14f);
    q = vminq_f32(q, vdupq_n_f32(448.f));
    const uint32x4_t bits = vreinterpretq_u32_f32(q), odd = vandq_u32(vshrq_n_u32(bits, 20), vdupq_n_u32(1));
    uint32x4_t normal = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7ffff)), odd), 20);
    normal = vsubq_u32(normal, vdupq_n_u32(120 << 3));
    const uint32x4_t subnormal = vsubq_u32(vreinterpretq_u32_f32(vaddq_f32(q, shifter)), vreinterpretq_u32_f32(shifter));
    return vbslq_u32(vcltq_f32(q, vdupq_n_f32(0x1p-6f)), subnormal, normal);
}

/* Four E4M3 bytes in 32-bit lanes -> fp32: exponent and mantissa dropped into fp32's, times the biases' difference. */
INLINE float32x4_t e4m3_values(uint32x4_t code) {
    const uint32x4_t low = vandq_u32(code, vdupq_n_u32(0x7f)), sign = vshlq_n_u32(vshrq_n_u32(code, 7), 31);
    float32x4_t value = vmulq_f32(vreinterpretq_f32_u32(vshlq_n_u32(low, 20)), vdupq_n_f32(0x1p120f));
    value = vbslq_f32(vceqq_u32(low, vdupq_n_u32(0x7f)), vdupq_n_f32(__builtin_nanf("")), value);
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(value), sign));
}

INLINE void find_scales(struct scales *s, float32x4_t q, const struct moe4_quantizer *z) {
    const float32x4_t global = vdupq_n_f32(z->global);
    uint32x4_t sign = vdupq_n_u32(8);
    if (z->recipe == MOE4_RECIPE_MODELOPT || z->recipe == MOE4_RECIPE_MODELOPT_STATIC) q = vmaxq_f32(q, vdupq_n_f32(0x1p-9f));
    uint32x4_t byte = e4m3_codes(q);
    const uint32x4_t zero = vceqzq_u32(byte);
    if (z->recipe == MOE4_RECIPE_COMPRESSED_TENSORS) byte = vbslq_u32(zero, vdupq_n_u32(0x20), byte);
    const float32x4_t sf8 = e4m3_values(byte);
    float32x4_t step;
    if (z->recipe == MOE4_RECIPE_ACTIVATION) {
        step = vmulq_f32(sf8, vdupq_n_f32(1.f / z->global));
        step = vminq_f32(vdivq_f32(vdupq_n_f32(1.f), step), vdupq_n_f32(FLT_MAX));
        step = vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(step), zero)); /* x * 0, and no sign: code 0 */
        sign = vbicq_u32(sign, zero);
    } else if (z->recipe == MOE4_RECIPE_COMPRESSED_TENSORS) {
        step = vdivq_f32(sf8, global);
    } else {
        step = vmulq_f32(sf8, global);
    }
    vst1q_u32(s->byte, byte);
    vst1q_f32(s->sf8, sf8);
    vst1q_f32(s->step, step);
    vst1q_u32(s->sign, sign);
}

/* Four e2m1 codes in 32-bit lanes. */
INLINE uint32x4_t encode4(float32x4_t x, const struct scales *s, size_t block, moe4_recipe recipe) {
    /* The middles between values as bits of fp32; where a tie goes up, to the even code, the bits below it. A NaN exceeds them all. */
    static const uint32_t middle[7] = {0x3e800000, 0x3f3fffff, 0x3fa00000, 0x3fdfffff, 0x40200000, 0x405fffff, 0x40a00000};
    const float32x4_t step = vdupq_n_f32(s->step[block]);
    float32x4_t v;
    uint32x4_t sign;
    if (recipe == MOE4_RECIPE_ACTIVATION) { /* the sign bit; otherwise x < 0 */
        v = vmulq_f32(x, step);
        sign = vshrq_n_u32(vreinterpretq_u32_f32(x), 28);
    } else {
        v = vdivq_f32(x, step);
        sign = vcltzq_f32(x);
    }
    const uint32x4_t magnitude = magnitude_bits(v);
    uint32x4_t code = vandq_u32(sign, vdupq_n_u32(s->sign[block]));
    for (int i = 0; i < 7; i++) code = vsubq_u32(code, vcgtq_u32(magnitude, vdupq_n_u32(middle[i])));
    return code;
}

/* Sixteen e2m1 codes of a block, one to a byte. */
INLINE uint8x16_t encode_block(const float *x, const struct scales *s, size_t block, moe4_recipe recipe) {
    uint16x4_t half[VECTORS];
    for (size_t i = 0; i < VECTORS; i++) half[i] = vmovn_u32(encode4(vld1q_f32(x + 4 * i), s, block, recipe));
    return vcombine_u8(vmovn_u16(vcombine_u16(half[0], half[1])), vmovn_u16(vcombine_u16(half[2], half[3])));
}

/* -> 8 bytes, low nibble first. */
INLINE void store_codes(uint8_t *codes, uint8x16_t code) {
    const uint8x16_t even = vuzp1q_u8(code, code), odd = vuzp2q_u8(code, code);
    vst1_u8(codes, vget_low_u8(vorrq_u8(even, vshlq_n_u8(odd, 4))));
}

/* e2m1 values of sixteen codes: the two bytes of their bf16 are looked up. */
INLINE void e2m1_values(float32x4_t value[VECTORS], uint8x16_t code) {
    static const uint8_t low[16] = {0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0, 0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0};
    static const uint8_t high[16] = {0,    0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, /* 0.5 is 0x3f00, 1 is 0x3f80 */
                                     0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
    const uint8x16_t l = vqtbl1q_u8(vld1q_u8(low), code), h = vqtbl1q_u8(vld1q_u8(high), code);
    const uint16x8_t first = vreinterpretq_u16_u8(vzip1q_u8(l, h)), second = vreinterpretq_u16_u8(vzip2q_u8(l, h));
    value[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(first), 16));
    value[1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(first), 16));
    value[2] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(second), 16));
    value[3] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(second), 16));
}

INLINE float64x2_t squares2(float32x2_t x, float32x2_t decoded, double global) {
    const float64x2_t error = vsubq_f64(vcvt_f64_f32(x), vmulq_f64(vcvt_f64_f32(decoded), vdupq_n_f64(global)));
    return vmulq_f64(error, error);
}

/* Sum of the squared errors of a decoded block, in fp64 and in order of k. */
INLINE double block_error(const float *x, uint8x16_t code, float sf8, float global) {
    float32x4_t value[VECTORS];
    double square[MOE4_BLOCK], sum = 0;
    e2m1_values(value, code);
    for (size_t i = 0; i < VECTORS; i++) {
        const float32x4_t in = vld1q_f32(x + 4 * i), decoded = vmulq_n_f32(value[i], sf8);
        vst1q_f64(square + 4 * i, squares2(vget_low_f32(in), vget_low_f32(decoded), global));
        vst1q_f64(square + 4 * i + 2, squares2(vget_high_f32(in), vget_high_f32(decoded), global));
    }
    for (int k = 0; k < MOE4_BLOCK; k++) sum += square[k];
    return sum;
}

/* n_blocks blocks with q, or with 1.5 q where that is better. Returns the number of saturated blocks. */
INLINE uint64_t four_over_six(uint8_t *codes, uint8_t *scales, const float *x, float32x4_t q, size_t n_blocks,
                              const struct moe4_quantizer *z) {
    struct scales s[2];
    float block_q[2][GROUP];
    uint64_t n_saturated = 0;
    const float32x4_t wider_q = vmulq_n_f32(q, 1.5f);
    vst1q_f32(block_q[0], q);
    vst1q_f32(block_q[1], wider_q);
    find_scales(&s[0], q, z);
    find_scales(&s[1], wider_q, z);
    for (size_t i = 0; i < n_blocks; i++, x += MOE4_BLOCK, codes += MOE4_BLOCK / 2) {
        const uint8x16_t code[2] = {encode_block(x, &s[0], i, z->recipe), encode_block(x, &s[1], i, z->recipe)};
        const int wider = block_error(x, code[1], s[1].sf8[i], z->global) < block_error(x, code[0], s[0].sf8[i], z->global);
        store_codes(codes, code[wider]);
        scales[i] = (uint8_t)s[wider].byte[i];
        n_saturated += block_q[wider][i] > 464.f;
    }
    return n_saturated;
}

INLINE uint64_t quantize_group(uint8_t *codes, uint8_t *scales, const float *x, size_t n_blocks, const struct moe4_quantizer *z) {
    const float32x4_t q = block_q(block_amaxes(x, n_blocks), z);
    if (z->four_over_six) return four_over_six(codes, scales, x, q, n_blocks, z);
    struct scales s;
    float each_q[GROUP];
    uint64_t n_saturated = 0;
    find_scales(&s, q, z);
    vst1q_f32(each_q, q);
    for (size_t i = 0; i < n_blocks; i++, x += MOE4_BLOCK, codes += MOE4_BLOCK / 2) {
        store_codes(codes, encode_block(x, &s, i, z->recipe));
        scales[i] = (uint8_t)s.byte[i];
        n_saturated += each_q[i] > 464.f;
    }
    return n_saturated;
}

INLINE uint64_t quantize_as(uint8_t *codes, uint8_t *scales, const float *x, size_t n, struct moe4_quantizer z) {
    uint64_t n_saturated = 0;
    const size_t n_blocks = n / MOE4_BLOCK;
    size_t i = 0;
    for (; i + GROUP <= n_blocks; i += GROUP)
        n_saturated += quantize_group(codes + i * MOE4_BLOCK / 2, scales + i, x + i * MOE4_BLOCK, GROUP, &z);
    if (i < n_blocks) n_saturated += quantize_group(codes + i * MOE4_BLOCK / 2, scales + i, x + i * MOE4_BLOCK, n_blocks - i, &z);
    return n_saturated;
}

/* One copy of the loop for each recipe: the constants below decide its branches. */
static uint64_t quantize_row(uint8_t *codes, uint8_t *scales, const float *x, size_t n, const struct moe4_quantizer *q) {
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

static void dequant_row(float *dst, const uint8_t *codes, const uint8_t *scales, size_t n, float factor) {
    for (size_t i = 0; i < n / MOE4_BLOCK; i++, codes += MOE4_BLOCK / 2, dst += MOE4_BLOCK) {
        const float sf8 = vgetq_lane_f32(e4m3_values(vdupq_n_u32(scales[i])), 0);
        const uint8x8_t pairs = vld1_u8(codes), even = vand_u8(pairs, vdup_n_u8(15)), odd = vshr_n_u8(pairs, 4);
        float32x4_t value[VECTORS];
        e2m1_values(value, vcombine_u8(vzip1_u8(even, odd), vzip2_u8(even, odd)));
        for (size_t v = 0; v < VECTORS; v++) vst1q_f32(dst + 4 * v, vmulq_n_f32(vmulq_n_f32(value[v], sf8), factor));
    }
}

static void scale_row_to_odd(float *y, float a, int divides, size_t n) {
    const float64x2_t by = vdupq_n_f64(a);
    for (size_t i = 0; i < n; i += 2) {
        float last[2] = {0};
        float *at = n - i < 2 ? memcpy(last, y + i, sizeof *last) : y + i;
        const float64x2_t x = vcvt_f64_f32(vld1_f32(at));
        vst1_f32(at, vcvtx_f32_f64(divides ? vdivq_f64(x, by) : vmulq_f64(x, by)));
        if (at == last) y[i] = last[0];
    }
}

void moe4_kernels_codec_neon(struct moe4_kernels *k) {
    k->widen_row = widen_row;
    k->narrow_row = narrow_row;
    k->amax_row = amax_row;
    k->quantize_row = quantize_row;
    k->dequant_row = dequant_row;
    k->scale_row_to_odd = scale_row_to_odd;
}
#else
typedef int moe4_no_neon; /* a translation unit may not be empty */
#endif
