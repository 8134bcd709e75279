/* What the codec's kernels on the device share: amax, quantize and dequantize of matrices. The bits are those of src/cpu/codec_scalar.c:
 * each operation is rounded on its own (__fmul_rn and the like, which the compiler never fuses), divisions are true ones.
 *
 * A warp takes 32 blocks of a row, a lane one block. */
#ifndef MOE4_CUDA_CODEC_CUH
#define MOE4_CUDA_CODEC_CUH

#include "../layout.h"
#include "activation.cuh"
#include "kernels.h"

#define THREADS 256
#define WARP_BLOCKS (MOE4_CODEC_TASK / MOE4_BLOCK)

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

static __device__ float code_value(uint32_t code) {
    return copysignf(e2m1_value(code & 7), code & 8 ? -1.f : 1.f);
}

/* x / d, correctly rounded, from the correctly rounded 1 / d: one correction brings the quotient within an ulp, the next one makes it
 * right (Markstein), because the remainders are exact. d is far from the ends of fp32's range. Where they are not exact the quotient is
 * too small or too large for any code but 0 or 7. */
static __device__ __forceinline__ float divide(float x, float d, float reciprocal) {
    float q = __fmul_rn(x, reciprocal);
    q = __fmaf_rn(__fmaf_rn(-q, d, x), reciprocal, q);
    return __fmaf_rn(__fmaf_rn(-q, d, x), reciprocal, q);
}

#endif
