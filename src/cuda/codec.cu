/* The codec on the device: amax, quantize and dequantize of matrices, and scales from one layout to another. The bits are those of
 * src/cpu/codec_scalar.c: each operation is rounded on its own (__fmul_rn and the like, which the compiler never fuses), divisions are
 * true ones.
 *
 * A warp takes 32 blocks of a row, a lane one block. */
#include "activation.cuh"
#include "kernels.h"

#include "../layout.h"

#define THREADS 256
#define WARP_BLOCKS (MOE4_CODEC_TASK / MOE4_BLOCK)

/* ---- tasks ---- */

/* A warp's task is 32 blocks of a row; MOE4_MAX_CODEC_TASKS at most, which codec.c sees to. */
static __device__ uint32_t warp_index(void) {
    return (blockIdx.x * THREADS + threadIdx.x) / 32;
}
static __device__ uint32_t n_warps(void) {
    return gridDim.x * (THREADS / 32);
}
static __host__ __device__ uint32_t tasks_in_row(size_t cols) {
    return (uint32_t)((cols + MOE4_CODEC_TASK - 1) / MOE4_CODEC_TASK);
}
static __host__ __device__ uint32_t n_tasks(const moe4_codec_call &c) {
    return (uint32_t)c.rows * tasks_in_row(c.cols);
}

static unsigned grid_for(size_t n_warp_tasks) {
    size_t blocks = (n_warp_tasks + THREADS / 32 - 1) / (THREADS / 32);
    return (unsigned)(blocks < 4096 ? blocks : 4096);
}

/* Element [row, col] of x or y, where row is one of codes'. */
static __device__ size_t place(const moe4_codec_call &c, size_t row, size_t col) {
    return (c.o.interleave ? moe4_interleaved_row(row, c.rows / 2, c.o.interleave) : row) * c.ld + col;
}

static __device__ const void *at(const void *x, moe4_dtype dtype, size_t i) {
    return (const char *)x + i * (dtype == MOE4_F32 ? 4 : 2);
}

static __device__ float load_one(const void *x, moe4_dtype dtype) {
    if (dtype == MOE4_F32) return *(const float *)x;
    uint16_t bits = *(const uint16_t *)x;
    return dtype == MOE4_BF16 ? __uint_as_float((uint32_t)bits << 16) : __half2float(__ushort_as_half(bits));
}

static __device__ uint8_t *scale_of(const moe4_codec_call &c, size_t row, size_t block) {
    uint8_t *scales = c.scales;
    if (row >= c.part_rows) { /* up's half of interleaved rows */
        scales += c.part_bytes;
        row -= c.part_rows;
    }
    return scales + moe4_scales_at(c.o.scale_layout, c.part_rows, c.cols / MOE4_BLOCK, row, block / 4) + block % 4;
}

/* ---- amax ---- */

static __global__ void __launch_bounds__(THREADS) amax_kernel(const __grid_constant__ moe4_codec_call c, uint32_t *amax) {
    uint32_t in_row = tasks_in_row(c.cols), n = n_tasks(c);
    uint32_t most = 0;
    for (uint32_t task = warp_index(); task < n; task += n_warps()) {
        size_t row = task / in_row, col = (task % in_row * WARP_BLOCKS + threadIdx.x % 32) * MOE4_BLOCK, from = place(c, row, col);
        if (col + MOE4_BLOCK <= c.cols) {
            float v[16];
            load_16(v, at(c.x, c.dtype, from), c.dtype);
            most = max(most, amax_bits_16(v));
        } else {
            for (size_t i = col; i < c.cols; i++) {
                float x = load_one(at(c.x, c.dtype, from + i - col), c.dtype);
                most = max(most, __float_as_uint(x) & 0x7FFFFFFFu);
            }
        }
        if (c.o.per_row) {
            most = __reduce_max_sync(0xFFFFFFFFu, most);
            if (threadIdx.x % 32 == 0) atomicMax(amax + row, most);
            most = 0;
        }
    }
    if (c.o.per_row) return;
    most = __reduce_max_sync(0xFFFFFFFFu, most);
    if (threadIdx.x % 32 == 0 && most) atomicMax(amax, most);
}

cudaError_t moe4_cuda_codec_amax(const moe4_codec_call *c, uint32_t *amax, cudaStream_t stream) {
    cudaError_t error = cudaMemsetAsync(amax, 0, (c->o.per_row ? c->rows : 1) * sizeof *amax, stream);
    if (error != cudaSuccess || !c->rows || !c->cols) return error;
    amax_kernel<<<grid_for(n_tasks(*c)), THREADS, 0, stream>>>(*c, amax);
    return cudaGetLastError();
}

/* ---- quantize ---- */

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

/* x / d, correctly rounded, from the correctly rounded 1 / d: one correction brings the quotient within an ulp, the next one makes it
 * right (Markstein), because the remainders are exact. d is far from the ends of fp32's range. Where they are not exact the quotient is
 * too small or too large for any code but 0 or 7. */
static __device__ __forceinline__ float divide(float x, float d, float reciprocal) {
    float q = __fmul_rn(x, reciprocal);
    q = __fmaf_rn(__fmaf_rn(-q, d, x), reciprocal, q);
    return __fmaf_rn(__fmaf_rn(-q, d, x), reciprocal, q);
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

static __device__ float code_value(uint32_t code) {
    return copysignf(e2m1_value(code & 7), code & 8 ? -1.f : 1.f);
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

/* ---- dequantize ---- */

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

/* ---- what is wrong, when something is: the lowest index of it ---- */

static __global__ void __launch_bounds__(THREADS)
    nonfinite_kernel(const __grid_constant__ moe4_codec_call c, unsigned long long *first_bad) {
    size_t n = c.rows * c.cols;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS) {
        float x = load_one(at(c.x, c.dtype, i / c.cols * c.ld + i % c.cols), c.dtype);
        if (!isfinite(x)) atomicMin(first_bad, (unsigned long long)i);
    }
}

static __global__ void __launch_bounds__(THREADS)
    bad_scale_kernel(const __grid_constant__ moe4_codec_call c, unsigned long long *first_bad) {
    size_t n_blocks = c.cols / MOE4_BLOCK, n = c.rows * n_blocks;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS)
        if (*scale_of(c, i / n_blocks, i % n_blocks) > 0x7E) atomicMin(first_bad, (unsigned long long)i);
}

cudaError_t moe4_cuda_codec_find(const moe4_codec_call *c, int of_scales, unsigned long long *first_bad, cudaStream_t stream) {
    cudaError_t error = cudaMemsetAsync(first_bad, 0xFF, sizeof *first_bad, stream);
    if (error != cudaSuccess || !c->rows || !c->cols) return error;
    unsigned grid = grid_for(n_tasks(*c));
    if (of_scales)
        bad_scale_kernel<<<grid, THREADS, 0, stream>>>(*c, first_bad);
    else
        nonfinite_kernel<<<grid, THREADS, 0, stream>>>(*c, first_bad);
    return cudaGetLastError();
}

/* ---- layouts of scales ---- */

/* Row and quad of dst's word i; rows past the matrix are padding. Index is 32 bits wide where that is enough: divisions are what this
 * costs. */
template <class Index>
static __device__ void word_place(moe4_scale_layout layout, Index rows, Index n_quads, Index i, Index *row, Index *quad) {
    if (layout == MOE4_SCALES_128X4) {
        Index tile = i / 128, in_tile = i % 128;
        *row = tile / n_quads * 128 + in_tile % 4 * 32 + in_tile / 4;
        *quad = tile % n_quads;
    } else if (layout == MOE4_SCALES_WORDS) {
        *row = i % rows;
        *quad = i / rows;
    } else {
        *row = i / n_quads;
        *quad = i % n_quads;
    }
}

template <class Index>
static __global__ void __launch_bounds__(THREADS) convert_kernel(const __grid_constant__ moe4_scales_conversion s, Index n_words) {
    Index rows = (Index)s.rows, n_quads = (Index)((s.n_blocks + 3) / 4), row, quad;
    for (size_t matrix = blockIdx.y; matrix < s.n_matrices; matrix += gridDim.y)
        for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n_words; i += (size_t)gridDim.x * THREADS) {
            word_place(s.dst_layout, rows, n_quads, (Index)i, &row, &quad);
            size_t n = min((size_t)4, s.n_blocks - 4 * (size_t)quad);
            uint8_t *to = s.dst + matrix * s.dst_bytes + moe4_scales_at(s.dst_layout, s.rows, s.n_blocks, row, quad);
            bool inside = row < rows;
            const uint8_t *from = s.src + matrix * s.src_bytes + (inside ? moe4_scales_at(s.src_layout, s.rows, s.n_blocks, row, quad) : 0);
            if (n == 4 && (((uintptr_t)to | (uintptr_t)from) & 3) == 0) {
                *(uint32_t *)to = inside ? *(const uint32_t *)from : 0;
                continue;
            }
            for (size_t k = 0; k < (s.dst_layout == MOE4_SCALES_LINEAR ? n : 4); k++) to[k] = inside && k < n ? from[k] : 0;
        }
}

cudaError_t moe4_cuda_scales_convert(const moe4_scales_conversion *s, cudaStream_t stream) {
    size_t rows = s->dst_layout == MOE4_SCALES_128X4 ? (s->rows + 127) / 128 * 128 : s->rows, n_words = rows * ((s->n_blocks + 3) / 4);
    if (!n_words || !s->n_matrices) return cudaSuccess;
    dim3 grid(grid_for((n_words + 31) / 32), (unsigned)(s->n_matrices < 65535 ? s->n_matrices : 65535));
    if (n_words < (size_t)1 << 31)
        convert_kernel<uint32_t><<<grid, THREADS, 0, stream>>>(*s, (uint32_t)n_words);
    else
        convert_kernel<size_t><<<grid, THREADS, 0, stream>>>(*s, n_words);
    return cudaGetLastError();
}
