/* NVFP4 on the device: rounding to it (bit-equal to docs/numerics.md) and the exact decode of packed weights to bf16.
 *
 * Packed weights. A unit is 64 rows x 64 k in 2304 contiguous bytes: 2048 of codes, then 256 of scales. Units are ordered
 * [expert][row tile of 64][k / 64], K and N padded with zeros. k is permuted inside a unit so that lane 4g+c of a warp owns the
 * scale block c (k = 16c .. 16c+15) of rows g and g+8 of each 16-row tile m:
 *
 *   codes  at 512m + 16 lane: four words, word q = an A fragment of m16n8k16 with
 *          element pairs 0: row g,   k 16c+4q+0,1     1: row g+8, the same k
 *                        2: row g,   k 16c+4q+2,3     3: row g+8, the same k
 *   scales at 2048 + 8 lane: byte 2m = row g, byte 2m+1 = row g+8
 *
 * The B fragment of step q is then x[16c+4q .. 16c+4q+3]: a lane reads 16 consecutive activations for the four steps of a unit.
 *
 * nvfp4_word.h has the bits of words and scales, which the host knows too. */
#ifndef MOE4_CUDA_NVFP4_CUH
#define MOE4_CUDA_NVFP4_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <float.h>
#include <stdint.h>

#include "nvfp4_layout.h"
#include "nvfp4_word.h"

/* ---- decode ---- */

static __device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t r;
#if __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u)); /* a * b + -0: the same bits */
#endif
    return r;
}

/* Multipliers that the compiler cannot see through: shifts go to the multipliers, while masks, rotates and selections fill the integer
 * units, which are the ones that run short. */
static __constant__ uint32_t multiplier[2] = {MOE4_WORD_SPREAD, 1u << MOE4_SCALE_SHIFT};

/* Half `I` of a bf16x2 in both halves. */
template <int I> static __device__ __forceinline__ uint32_t both_halves(uint32_t v) {
    uint32_t r;
    if (I)
        asm("{\n.reg .b16 lo, hi;\nmov.b32 {lo, hi}, %1;\nmov.b32 %0, {hi, hi};\n}" : "=r"(r) : "r"(v));
    else
        asm("{\n.reg .b16 lo, hi;\nmov.b32 {lo, hi}, %1;\nmov.b32 %0, {lo, lo};\n}" : "=r"(r) : "r"(v));
    return r;
}

/* Bytes `I` and `I` + 1 of packed scales, of rows g and g+8, as multipliers: bf16, scale * 2^118, in the halves. */
template <int I> static __device__ __forceinline__ uint32_t scale_multipliers(uint32_t scales) {
    uint32_t both = __byte_perm(scales, 0, 0x4040 | I | (I + 1) << 8);
    return both * multiplier[1] + (MOE4_SCALE_BASE << 16 | MOE4_SCALE_BASE);
}

/* One packed word -> an A fragment: pairs 0 and 2 are row g's, 1 and 3 row g+8's. */
static __device__ __forceinline__ void decode_word(uint32_t a[4], uint32_t w, uint32_t scale_g, uint32_t scale_g8) {
    a[0] = mul_bf16x2(word_pair(w, 0, multiplier[0]), scale_g);
    a[1] = mul_bf16x2(word_pair(w, 1, multiplier[0]), scale_g8);
    a[2] = mul_bf16x2(word_pair(w, 2, multiplier[0]), scale_g);
    a[3] = mul_bf16x2(word_pair(w, 3, multiplier[0]), scale_g8);
}

/* ---- rounding ---- */

/* The code of a >= 0: to nearest, ties to the even code, saturating; NaN -> 7. Adding 2^22, 2^23 or 2^24 rounds to the step of a's range,
 * 0.5, 1 or 2, and leaves the count of steps in the low bits. */
static __device__ __forceinline__ uint32_t e2m1_magnitude(float a) {
    a = fminf(a, 6.f); /* of a NaN, too */
    bool from_2 = a >= 2.f, from_4 = a >= 4.f;
    float magic = from_4 ? 0x1p24f : from_2 ? 0x1p23f : 0x1p22f;
    uint32_t origin = from_4 ? 0x4B800000u - 4 : from_2 ? 0x4B000000u - 2 : 0x4A800000u;
    return __float_as_uint(__fadd_rn(a, magic)) - origin;
}
static __device__ __forceinline__ float e2m1_value(uint32_t magnitude) {
    return __uint_as_float(magnitude << 22) * 0x1p126f; /* the fields of an fp32, subnormal for 0.5 */
}

static __device__ __forceinline__ uint8_t e4m3_round(float x) {
    return (uint8_t)__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}
static __device__ __forceinline__ float e4m3_value(uint8_t byte) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)));
}

/* a / b to nearest even, b not 0. */
static __device__ __forceinline__ float divide(float a, float b) {
#ifdef MOE4_NO_CALLS /* ptxas serialises wgmma beside one */
    double y, d = b; /* a quotient is no nearer than 2^-49 of itself to the middle of two fp32 numbers, and q is off by less than 2^-51 */
    asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(d));
    y = fma(y, fma(-d, y, 1.), y);
    y = fma(y, fma(-d, y, 1.), y);
    double q = __dmul_rn(a, y);
    return (float)fma(y, fma(-d, q, (double)a), q);
#else
    return __fdiv_rn(a, b);
#endif
}

/* Recipe `activation` of docs/numerics.md. */
static __device__ __forceinline__ float activation_encode_scale(float amax) {
    return amax == 0.f ? 1.f : fminf(divide(2688.f, amax), FLT_MAX);
}

struct activation_block {
    float scale;   /* the rounded block scale, 0 for a block of zeros */
    float factor;  /* what an element is multiplied by before it is rounded */
    uint8_t byte;  /* the scale as E4M3 */
    int saturated; /* its scale before rounding was past what E4M3 holds */
};

static __device__ __forceinline__ activation_block activation_block_scale(float block_amax, float S) {
    activation_block b;
    float q = __fmul_rn(block_amax, __fmul_rn(S, 1.f / 6.f));
    b.byte = e4m3_round(q);
    b.saturated = q > 464.f;
    b.scale = e4m3_value(b.byte);
    b.factor = b.byte ? fminf(divide(1.f, __fmul_rn(b.scale, divide(1.f, S))), FLT_MAX) : 0.f;
    return b;
}

/* The E2M1 value nearest to a, which is not negative: ties to the even code, 6 for what is larger and for a NaN. From 1 up that is one bit
 * of mantissa, below it multiples of 0.5: an ulp of the number that is added and taken away. */
static __device__ __forceinline__ float e2m1_nearest(float a) {
    a = fminf(a, 6.f);
    float grid = __uint_as_float(max(__float_as_uint(a) & 0x7F800000u, 0x3F800000u) + (22u << 23));
    return __fsub_rn(__fadd_rn(a, grid), grid);
}

/* The value e2m1 * scale of one element, exact in bf16; the global scale is left out. */
static __device__ __forceinline__ float activation_round(float x, const activation_block &b) {
    float y = __fmul_rn(x, b.factor), v = copysignf(e2m1_nearest(fabsf(y)) * b.scale, y);
    return b.byte ? v : 0.f;
}

#endif
