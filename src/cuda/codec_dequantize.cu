/* NVFP4 to fp32, fp16 and bf16, rounded once. */
#include "codec.cuh"

/* A number that was rounded to p and has `rest` left, as fp32 with an odd last bit where that is inexact: a second rounding is then as
 * good as one. */
static __device__ __forceinline__ float round_to_odd(float p, float rest) {
    uint32_t bits = __float_as_uint(p);
    if (rest == 0.f) return p;
    if ((__float_as_uint(rest) ^ bits) >> 31) bits--; /* p was rounded away from zero */
    return __uint_as_float(bits | 1);
}

/* The same from fp64, for numbers at the ends of fp32's range. */
static __device__ float narrow_to_odd(double d) {
    float f = __double2float_rn(d);
    if ((double)f == d) return f;
    uint32_t bits = __float_as_uint(f);
    if (fabs((double)f) > fabs(d)) bits--;
    return __uint_as_float(bits | 1);
}

struct decoder {
    float factor, reciprocal; /* reciprocal: of a divisor; 0 where there is none */
    bool divides, usual;      /* usual: remainders are exact in fp32 */
};

static __device__ decoder make_decoder(moe4_recipe recipe, float global) {
    decoder d = {recipe == MOE4_RECIPE_ACTIVATION ? __fdiv_rn(1.f, global) : global, 0.f, recipe == MOE4_RECIPE_COMPRESSED_TENSORS, false};
    d.usual = d.factor >= 0x1p-80f && d.factor <= 0x1p80f;
    if (d.divides && d.usual) d.reciprocal = __frcp_rn(d.factor);
    return d;
}

/* exact * factor or / factor: rounded to fp32, or so that rounding it to fewer bits is right. */
static __device__ __forceinline__ float decode_value(float exact, const decoder &d, bool to_fp32) {
    if (to_fp32) return d.divides ? __fdiv_rn(exact, d.factor) : __fmul_rn(exact, d.factor);
    if (!d.usual) return narrow_to_odd(d.divides ? __ddiv_rn((double)exact, (double)d.factor) : __dmul_rn((double)exact, (double)d.factor));
    if (exact == 0.f) return exact; /* with its sign, which a remainder of +0 would take */
    float p = d.divides ? divide(exact, d.factor, d.reciprocal) : __fmul_rn(exact, d.factor);
    float rest = d.divides ? __fmaf_rn(-p, d.factor, exact) : __fmaf_rn(exact, d.factor, -p);
    return round_to_odd(p, rest);
}

static __device__ void store_values(void *to, moe4_dtype dtype, const float v[16]) {
    if (dtype == MOE4_F32) {
        float *f = (float *)to;
        bool aligned = ((uintptr_t)to & 15) == 0;
#pragma unroll
        for (int i = 0; i < 16; i += 4)
            if (aligned) {
                *(float4 *)(f + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
            } else {
                for (int k = i; k < i + 4; k++) f[k] = v[k];
            }
        return;
    }
    uint32_t pairs[8];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        uint32_t half = dtype == MOE4_BF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v[i])) : __half_as_ushort(__float2half_rn(v[i]));
        pairs[i / 2] = i % 2 ? pairs[i / 2] | half << 16 : half;
    }
    if (((uintptr_t)to & 15) == 0) {
        *(uint4 *)to = *(uint4 *)pairs;
        *((uint4 *)to + 1) = *(uint4 *)(pairs + 4);
        return;
    }
#pragma unroll
    for (int i = 0; i < 16; i++) ((uint16_t *)to)[i] = (uint16_t)(pairs[i / 2] >> 16 * (i % 2));
}

static __device__ void load_codes(uint32_t codes[2], const uint8_t *from) {
    if (((uintptr_t)from & 7) == 0) {
        *(uint2 *)codes = __ldcs((const uint2 *)from);
        return;
    }
    codes[0] = codes[1] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) codes[i / 4] |= (uint32_t)from[i] << 8 * (i % 4);
}

static __global__ void __launch_bounds__(THREADS) dequantize_kernel(const __grid_constant__ moe4_codec_call c, const float *globals) {
    uint32_t in_row = tasks_in_row(c.cols), n = n_tasks(c);
    for (uint32_t task = warp_index(); task < n; task += n_warps()) {
        size_t row = task / in_row, block = task % in_row * WARP_BLOCKS + threadIdx.x % 32;
        if (block >= c.cols / MOE4_BLOCK) continue;
        decoder d = make_decoder(c.o.recipe, globals[c.o.per_row ? row : 0]);
        float sf8 = e4m3_value(*scale_of(c, row, block)), v[16];
        uint32_t codes[2];
        load_codes(codes, c.codes + (row * c.cols + block * MOE4_BLOCK) / 2);
#pragma unroll
        for (int k = 0; k < 16; k++) v[k] = decode_value(__fmul_rn(code_value(codes[k / 8] >> 4 * (k % 8)), sf8), d, c.dtype == MOE4_F32);
        store_values((void *)at(c.y, c.dtype, place(c, row, block * MOE4_BLOCK)), c.dtype, v);
    }
}

cudaError_t moe4_cuda_codec_dequantize(const moe4_codec_call *c, const float *globals, cudaStream_t stream) {
    if (!c->rows || !c->cols) return cudaSuccess;
    dequantize_kernel<<<grid_for(n_tasks(*c)), THREADS, 0, stream>>>(*c, globals);
    return cudaGetLastError();
}
