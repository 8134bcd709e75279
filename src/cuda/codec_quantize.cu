/* Matrices to NVFP4, by every recipe. */
#include "codec.cuh"

struct block_result {
    uint32_t codes[2];
    uint8_t scale;
};

/* The block scale before rounding, from the block's amax b. */
static __device__ float block_q(float b, moe4_recipe recipe, const moe4_codec_scale &s) {
    float q;
    switch (recipe) {
    case MOE4_RECIPE_MODELOPT: q = __fdiv_rn(b, __fmul_rn(6.f, s.global)); return q == 0.f ? 1.f : q;
    case MOE4_RECIPE_MODELOPT_STATIC: q = __fdiv_rn(b, 6.f); return __fdiv_rn(__fmul_rn(q == 0.f ? 1.f : q, 448.f), __fdiv_rn(s.amax, 6.f));
    case MOE4_RECIPE_ACTIVATION: return __fmul_rn(b, __fmul_rn(s.global, 1.f / 6.f));
    default: return __fmul_rn(s.global, __fdiv_rn(b, 6.f));
    }
}

static __device__ uint8_t block_scale(float q, moe4_recipe recipe) {
    if (recipe == MOE4_RECIPE_MODELOPT || recipe == MOE4_RECIPE_MODELOPT_STATIC) q = q < 0x1p-9f ? 0x1p-9f : q;
    uint8_t scale = e4m3_round(q);
    return recipe == MOE4_RECIPE_COMPRESSED_TENSORS && scale == 0 ? 0x20 : scale;
}

static __device__ block_result block_codes(const float x[16], uint8_t scale, moe4_recipe recipe, float global) {
    block_result r = {{0, 0}, scale};
    float sf8 = e4m3_value(scale);
    if (recipe == MOE4_RECIPE_ACTIVATION) {
        if (!scale) return r;
        float factor = fminf(__fdiv_rn(1.f, __fmul_rn(sf8, __fdiv_rn(1.f, global))), FLT_MAX);
#pragma unroll
        for (int k = 0; k < 16; k++) {
            float y = __fmul_rn(x[k], factor);
            r.codes[k / 8] |= (e2m1_magnitude(fabsf(y)) | __float_as_uint(y) >> 31 << 3) << 4 * (k % 8);
        }
        return r;
    }
    float divisor = recipe == MOE4_RECIPE_COMPRESSED_TENSORS ? __fdiv_rn(sf8, global) : __fmul_rn(sf8, global);
    bool usual = divisor >= 0x1p-80f && divisor <= 0x1p80f;
    float reciprocal = usual ? __frcp_rn(divisor) : 0.f;
#pragma unroll
    for (int k = 0; k < 16; k++) {
        float quotient = usual ? divide(x[k], divisor, reciprocal) : __fdiv_rn(x[k], divisor);
        r.codes[k / 8] |= (e2m1_magnitude(fabsf(quotient)) | (x[k] < 0.f ? 8u : 0u)) << 4 * (k % 8);
    }
    return r;
}

/* Sum of the squared errors of the decoded block, in fp64, in the order of the elements. */
static __device__ double block_error(const block_result &r, const float x[16], float global) {
    double sum = 0, step = __dmul_rn((double)e4m3_value(r.scale), (double)global); /* exact, as are its products */
#pragma unroll
    for (int k = 0; k < 16; k++) {
        double value = __dmul_rn((double)code_value(r.codes[k / 8] >> 4 * (k % 8)), step);
        double error = __dsub_rn((double)x[k], value);
        sum = __dadd_rn(sum, __dmul_rn(error, error));
    }
    return sum;
}

static __device__ void store_codes(uint8_t *to, const uint32_t codes[2]) {
    if (((uintptr_t)to & 7) == 0) {
        *(uint2 *)to = make_uint2(codes[0], codes[1]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = (uint8_t)(codes[i / 4] >> 8 * (i % 4));
}

/* One block; 1 when it saturates. */
static __device__ int quantize_block(const moe4_codec_call &c, const moe4_codec_scale *scales, size_t row, size_t block) {
    moe4_codec_scale s = scales[c.o.per_row ? row : 0];
    float v[16];
    load_16(v, at(c.x, c.dtype, place(c, row, block * MOE4_BLOCK)), c.dtype);
    float q = block_q(__uint_as_float(amax_bits_16(v)), c.o.recipe, s);
    block_result r = block_codes(v, block_scale(q, c.o.recipe), c.o.recipe, s.global);
    if (c.o.four_over_six) {
        float wider_q = __fmul_rn(1.5f, q);
        block_result wider = block_codes(v, block_scale(wider_q, c.o.recipe), c.o.recipe, s.global);
        if (block_error(wider, v, s.global) < block_error(r, v, s.global)) {
            r = wider;
            q = wider_q;
        }
    }
    store_codes(c.codes + (row * c.cols + block * MOE4_BLOCK) / 2, r.codes);
    *scale_of(c, row, block) = r.scale;
    return q > 464.f;
}

static __global__ void __launch_bounds__(THREADS)
    quantize_kernel(const __grid_constant__ moe4_codec_call c, const moe4_codec_scale *scales, unsigned long long *n_saturated) {
    uint32_t in_row = tasks_in_row(c.cols), n = n_tasks(c);
    int saturated = 0;
    for (uint32_t task = warp_index(); task < n; task += n_warps()) {
        size_t block = task % in_row * WARP_BLOCKS + threadIdx.x % 32;
        if (block < c.cols / MOE4_BLOCK) saturated += quantize_block(c, scales, task / in_row, block);
    }
    saturated = __reduce_add_sync(0xFFFFFFFFu, saturated);
    if (threadIdx.x % 32 == 0 && saturated) atomicAdd(n_saturated, (unsigned long long)saturated);
}

cudaError_t moe4_cuda_codec_quantize(const moe4_codec_call *c, const moe4_codec_scale *scales, unsigned long long *n_saturated,
                                     cudaStream_t stream) {
    cudaError_t error = cudaMemsetAsync(n_saturated, 0, sizeof *n_saturated, stream);
    if (error != cudaSuccess || !c->rows || !c->cols) return error;
    if (c->o.scale_layout != MOE4_SCALES_LINEAR) /* its padding is zeros */
        error = cudaMemsetAsync(c->scales, 0, c->part_bytes * (c->rows / c->part_rows), stream);
    if (error != cudaSuccess) return error;
    quantize_kernel<<<grid_for(n_tasks(*c)), THREADS, 0, stream>>>(*c, scales, n_saturated);
    return cudaGetLastError();
}
