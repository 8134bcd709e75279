/* Rows of activations: loading 16 of them in any dtype, rounding them to what a product reads, and row maxima. */
#ifndef MOE4_CUDA_ACTIVATION_CUH
#define MOE4_CUDA_ACTIVATION_CUH

#include "kernels.h"
#include "nvfp4.cuh"

#define MOE4_INF_BITS 0x7F800000u /* as the largest |x| of a row: it has a NaN or Inf */

static __device__ __forceinline__ float load_1(const void *x, moe4_dtype dtype, size_t i) {
    if (dtype == MOE4_F32) return ((const float *)x)[i];
    uint16_t bits = ((const uint16_t *)x)[i];
    return dtype == MOE4_BF16 ? __uint_as_float((uint32_t)bits << 16) : __half2float(__ushort_as_half(bits));
}

/* v[16] = x[0..15] of the dtype; 16-byte loads where the address allows. */
static __device__ __forceinline__ void load_16(float v[16], const void *x, moe4_dtype dtype) {
    if (dtype == MOE4_F32) {
        const float *f = (const float *)x;
        if (((uintptr_t)f & 15) == 0) {
#pragma unroll
            for (int i = 0; i < 4; i++) *(float4 *)(v + 4 * i) = __ldcg((const float4 *)f + i);
        } else {
#pragma unroll
            for (int i = 0; i < 16; i++) v[i] = __ldcg(f + i);
        }
        return;
    }
    uint32_t raw[8];
    if (((uintptr_t)x & 15) == 0) {
        *(uint4 *)raw = __ldcg((const uint4 *)x);
        *(uint4 *)(raw + 4) = __ldcg((const uint4 *)x + 1);
    } else {
        const unsigned short *s = (const unsigned short *)x;
#pragma unroll
        for (int i = 0; i < 8; i++) raw[i] = __ldcg(s + 2 * i) | (uint32_t)__ldcg(s + 2 * i + 1) << 16;
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        uint16_t bits = (uint16_t)(raw[i / 2] >> 16 * (i & 1));
        v[i] = dtype == MOE4_BF16 ? __uint_as_float((uint32_t)bits << 16) : __half2float(__ushort_as_half(bits));
    }
}

static __device__ __forceinline__ uint32_t amax_bits_16(const float v[16]) {
    uint32_t a = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) a = max(a, __float_as_uint(v[i]) & 0x7FFFFFFFu);
    return a;
}

/* dst[16] = bf16(v), 16-byte aligned. */
static __device__ __forceinline__ void store_bf16_16(__nv_bfloat16 *dst, const float v[16]) {
    uint32_t raw[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
        raw[i] = *(uint32_t *)&pair;
    }
    *(uint4 *)dst = *(uint4 *)raw;
    *(uint4 *)(dst + 8) = *(uint4 *)(raw + 4);
}

/* v = the exact values e2m1 * scale of a block under encode scale S; 1 when the block saturates. */
static __device__ __forceinline__ int round_16(float v[16], float S) {
    activation_block b = activation_block_scale(__uint_as_float(amax_bits_16(v)), S);
#pragma unroll
    for (int i = 0; i < 16; i++) v[i] = activation_round(v[i], b);
    return b.saturated;
}

static __device__ __forceinline__ void fill_16(float v[16], float value) {
#pragma unroll
    for (int i = 0; i < 16; i++) v[i] = value;
}

/* The encode scale of a row and what it decodes by, from its mode: amax_bits is the row's (TOKEN) or the batch's (TENSOR). */
static __device__ __forceinline__ float encode_scale(moe4_act act, uint32_t amax_bits, const float *input_scale, int expert,
                                                     float *decode) {
    if (act == MOE4_ACT_STATIC) {
        *decode = input_scale[expert];
        return fminf(__fdiv_rn(1.f, *decode), FLT_MAX);
    }
    float S = activation_encode_scale(__uint_as_float(amax_bits));
    *decode = __fdiv_rn(1.f, S);
    return S;
}

/* Block `block` (16 values) of sorted row `row` of h_wide, rounded into h; what a row needs once is written by block 0. */
static __device__ __forceinline__ int round_h_block(const moe4_layer_run &run, int row, int block, int expert, uint32_t scale_bits) {
    size_t ld = (size_t)run.w.intermediate_units * MOE4_UNIT_K, at = (size_t)row * ld + (size_t)block * 16;
    float v[16], decode = 1.f;
    int saturated = 0;
    if (__ldcg(run.h_amax + row) >= MOE4_INF_BITS) {
        fill_16(v, __uint_as_float(0x7FFFFFFFu));
    } else {
        float S = encode_scale(run.act, scale_bits, run.w.scale_h, expert, &decode);
        load_16(v, run.h_wide + at, MOE4_F32);
        saturated = round_16(v, S);
    }
    store_bf16_16(run.h + at, v);
    if (block == 0) run.h_factor[row] = decode;
    return saturated;
}

#endif
