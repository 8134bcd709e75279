/* Rows of activations: loading 16 of them in any dtype, rounding them to what a product reads, and row maxima. */
#ifndef MOE4_CUDA_ACTIVATION_CUH
#define MOE4_CUDA_ACTIVATION_CUH

#include "kernels.h"
#include "nvfp4.cuh"
#include "ptx.cuh"

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

static __device__ __forceinline__ void pack_bf16_16(uint32_t w[8], const float v[16]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
        w[i] = *(uint32_t *)&pair;
    }
}

/* dst[16] = w, 16-byte aligned. */
static __device__ __forceinline__ void store_bf16_16(__nv_bfloat16 *dst, const uint32_t w[8]) {
    *(uint4 *)dst = make_uint4(w[0], w[1], w[2], w[3]);
    *(uint4 *)(dst + 8) = make_uint4(w[4], w[5], w[6], w[7]);
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
        return fminf(divide(1.f, *decode), FLT_MAX);
    }
    float S = activation_encode_scale(__uint_as_float(amax_bits));
    *decode = divide(1.f, S);
    return S;
}

/* Half a block of a sorted row of h_wide, on its way to h; its neighbouring lane has the other half. */
struct half_block {
    int row, i; /* which of the row's */
    uint32_t row_amax;
    float v[8];
};

static __device__ __forceinline__ size_t half_block_at(const half_block *b, const moe4_layer_run &run) {
    return ((size_t)b->row * (size_t)run.w.intermediate_units * 8 + (size_t)b->i) * 8;
}

static __device__ __forceinline__ void load_half_block(half_block *b, const moe4_layer_run &run, int end_row) {
    if (b->row >= end_row) return;
    const float4 *from = (const float4 *)(run.h_wide + half_block_at(b, run));
    *(float4 *)b->v = __ldcg(from);
    *(float4 *)(b->v + 4) = __ldcg(from + 1);
    b->row_amax = __ldcg(run.h_amax + b->row);
}

static __device__ __forceinline__ uint32_t amax_bits_8(const float v[8]) {
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) amax = max(amax, __float_as_uint(v[i]) & 0x7FFFFFFFu);
    return amax;
}

/* Rounds it; what a row needs once is written with its first half block. `lanes`: those that are here; batch_amax: TENSOR's, or NULL. */
static __device__ __forceinline__ void round_half_block(const half_block *b, const moe4_layer_run &run, int expert,
                                                        const uint32_t *batch_amax, uint32_t lanes) {
    uint32_t amax = amax_bits_8(b->v), raw[4];
    amax = max(amax, __shfl_xor_sync(lanes, amax, 1));
    bool bad = b->row_amax >= MOE4_INF_BITS;
    float decode = 1.f, S = 1.f;
    if (!bad) S = encode_scale(run.act, batch_amax ? *batch_amax : b->row_amax, run.w.scale_h, expert, &decode);
    activation_block block = activation_block_scale(__uint_as_float(amax), S);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(activation_round(b->v[2 * i], block), activation_round(b->v[2 * i + 1], block));
        raw[i] = bad ? 0x7FFF7FFFu : *(uint32_t *)&pair;
    }
    if (!(b->i & 1) && block.saturated && !bad) atomicAdd(run.h_saturated + b->row, 1);
    if (b->i == 0) run.h_factor[b->row] = decode;
    *(uint4 *)(run.h + half_block_at(b, run)) = make_uint4(raw[0], raw[1], raw[2], raw[3]);
}

/* A column tile's rows of h, by n_threads (whole warps) of which this is one. The next half block loads while one is rounded. */
static __device__ __forceinline__ void round_h_rows(const moe4_layer_run &run, const moe4_tile &tile, int thread, int n_threads,
                                                    const uint32_t *batch_amax) {
    int halves = run.w.intermediate_units * 8, end = tile.first + tile.n;
    half_block b = {tile.first + thread / halves, thread % halves, 0, {0.f}};
    load_half_block(&b, run, end);
    for (int begun = thread & ~31; begun < tile.n * halves; begun += n_threads) { /* alike for a warp's lanes */
        half_block next = b;
        for (next.i += n_threads; next.i >= halves; next.i -= halves) next.row++;
        load_half_block(&next, run, end);
        uint32_t lanes = __ballot_sync(0xFFFFFFFFu, b.row < end);
        if (b.row < end) round_half_block(&b, run, tile.expert, batch_amax, lanes);
        b = next;
    }
}

#endif
