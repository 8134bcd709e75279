/* The inner loops of the CPU backend, one table of function pointers. kernels.c fills it: scalar first, then each ISA that the CPU
 * has and the mask allows overwrites the slots it improves. The scalar functions are the readable reference of docs/numerics.md.
 * No kernel allocates, fails or needs alignment; n is a multiple of 16 wherever codes or blocks are involved. */
#ifndef MOE4_CPU_KERNELS_H
#define MOE4_CPU_KERNELS_H

#include "../contract.h"

#include <stddef.h>
#include <stdint.h>

#include "moe4.h"

struct moe4_kernels;

/* Columns of a product that one task of a layer computes. */
enum { MOE4_TASK_COLS = 32 };

/* A recipe with its global scale, ready for rows: nvfp4.c fills it, quantize_row reads it. Order of operations: docs/numerics.md. */
struct moe4_quantizer {
    moe4_recipe recipe;
    int four_over_six;
    float global; /* the stored number: s2, S or gs */
    float amax;   /* MODELOPT_STATIC: A */
};

/* The activation: docs/numerics.md. SWIGLU: clamp, then g * sigmoid(alpha * g) * (u + beta). */
struct moe4_glu {
    moe4_activation kind;
    float alpha, beta, limit; /* 1, 0 and 0 for plain SwiGLU; limit 0: none */
};

/* A weight matrix as a product reads it. */
struct moe4_matrix {
    moe4_weight w;      /* rows N, cols K */
    const void *packed; /* what moe4_gemm.pack made; NULL where packed_bytes is 0 */
};

/* What an activation row is rounded to before its product. */
struct moe4_rounding {
    moe4_act act; /* W4A16, BF16 (as it is), or one of the NVFP4 modes */
    float S;      /* NVFP4 modes: encode scale of recipe `activation` */
    float decode; /* what S decodes by: 1/S, in STATIC the input_scale itself */
};

/* A family of products y = x @ W^T: how it wants weights and activation rows, and the product itself. The order of summation of one
 * element depends on K alone, never on n_rows, col0 or n_cols: that is what makes results independent of batch and threads. */
struct moe4_gemm {
    const char *name;
    size_t tile_cols; /* divides MOE4_TASK_COLS; col0 and n_cols are multiples of it, but for the last columns of a matrix */
    size_t many_cols; /* columns of a call with many rows; 0: as many as keep their weights in the second-level cache */

    /* Bytes of the packed form of w (64-byte aligned); 0: read in place. pack writes columns (rows of W) [col0, col0 + n_cols), the same
     * bytes in every family that states this layout; a change of them wants another name, as files keep them (cache.h). NULL: all is read
     * in place. */
    const char *layout;
    size_t (*packed_bytes)(const moe4_weight *w);
    void (*pack)(void *packed, const moe4_weight *w, size_t col0, size_t n_cols);

    /* Bytes of a packed activation row of k elements, a multiple of 64. pack_row rounds x[k] (finite) into it; the value is what the row
     * holds times *factor_ret (powers of two apart, 1 or rounding->decode). Returns the number of saturated blocks. */
    size_t (*row_bytes)(size_t k);
    uint64_t (*pack_row)(const struct moe4_kernels *kernels, void *row, float *factor_ret, const float *x, size_t k,
                         const struct moe4_rounding *rounding);

    /* The same for a row that is NVFP4 already: its values e2m1 * block scale as they are. NULL: they go through pack_row, which keeps
     * them (w4a16, wide); w4a4 families must have it. */
    void (*pack_codes)(const struct moe4_kernels *kernels, void *row, float *factor_ret, const uint8_t *codes, const uint8_t *scales,
                       size_t k);

    /* y[m * y_ld + j] = row m . W[col0 + j], j < n_cols, without any global scale or factor. `next`, or NULL, is where packed weights are
     * read next, by the caller's next call: prefetching goes on there. `scratch` [scratch_bytes], 64-byte aligned, is the call's own:
     * stacks may be small. */
    void (*gemm)(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0, size_t n_cols,
                 const void *next, void *scratch);
    size_t scratch_bytes; /* a multiple of 64 */
};

struct moe4_kernels {
    const char *isa;

    /* dst[n] = src[n] as fp32; src F32, BF16 or F16, any alignment. */
    void (*widen_row)(float *dst, const void *src, moe4_dtype dtype, size_t n);
    /* dst[n] = src[n] rounded once to nearest even; dst F32, BF16 or F16. */
    void (*narrow_row)(void *dst, moe4_dtype dtype, const float *src, size_t n);
    /* Largest |x| by its bits, so that a NaN or Inf anywhere shows. 0 for n = 0. */
    float (*amax_row)(const float *x, size_t n);
    /* codes[n/2], scales[n/16] = quantize(x[n]), x finite; returns the number of saturated blocks. */
    uint64_t (*quantize_row)(uint8_t *codes, uint8_t *scales, const float *x, size_t n, const struct moe4_quantizer *q);
    /* dst[n] = e2m1 * scale (exact), then * factor. */
    void (*dequant_row)(float *dst, const uint8_t *codes, const uint8_t *scales, size_t n, float factor);

    /* y[n] = y[n] * a, or y[n] / a, exactly, then rounded to odd: an inexact result is the one of its two neighbours whose last bit is
     * odd, so that rounding it again to half the bits or fewer is as good as rounding once. */
    void (*scale_row_to_odd)(float *y, float a, int divides, size_t n);

    /* h[n] from gate g and up u (g is not read by RELU2); NaN stays. h may be g or u. */
    void (*glu_row)(float *h, const float *g, const float *u, size_t n, const struct moe4_glu *glu);

    /* y[n] += weight * x[n];  y[n] = y[n] * a * b, in that order. */
    void (*add_scaled_row)(float *y, const float *x, float weight, size_t n);
    void (*scale_row)(float *y, float a, float b, size_t n);

    const struct moe4_gemm *w4a4;  /* NVFP4 weights, NVFP4 activations */
    const struct moe4_gemm *w4a16; /* NVFP4 weights, bf16 activations */
    const struct moe4_gemm *wide;  /* bf16, f16 or fp32 weights, fp32 activations */
};

/* The family for a matrix of this dtype whose input is rounded as `act` says. */
const struct moe4_gemm *moe4_cpu_gemm(const struct moe4_kernels *k, moe4_dtype dtype, moe4_act act);

/* Fills the table for the ISAs in `mask` (MOE4_ISA_ bits, all of them present on this CPU). */
void moe4_kernels_init(struct moe4_kernels *k, uint32_t mask);
/* The MOE4_ISA_ bits this CPU and its operating system support. */
uint32_t moe4_cpu_isas(void);

void moe4_kernels_codec_scalar(struct moe4_kernels *k);
void moe4_kernels_glu_scalar(struct moe4_kernels *k);
void moe4_kernels_gemm_scalar(struct moe4_kernels *k);
#if defined(__x86_64__)
void moe4_kernels_codec_avx2(struct moe4_kernels *k);
void moe4_kernels_glu_avx2(struct moe4_kernels *k);
void moe4_kernels_gemm_avx2(struct moe4_kernels *k);
void moe4_kernels_gemm_avx2_w4a4(struct moe4_kernels *k);
void moe4_kernels_gemm_avx2_w4a16(struct moe4_kernels *k);
void moe4_kernels_codec_avx512(struct moe4_kernels *k);
uint64_t moe4_quantize_row_avx2(uint8_t *codes, uint8_t *scales, const float *x, size_t n, const struct moe4_quantizer *q);
void moe4_kernels_glu_avx512(struct moe4_kernels *k);
void moe4_kernels_gemm_avx512vnni(struct moe4_kernels *k);
void moe4_kernels_gemm_avx512fp32(struct moe4_kernels *k);
void moe4_kernels_gemm_avx512bf16(struct moe4_kernels *k);
#elif defined(__aarch64__)
void moe4_kernels_codec_neon(struct moe4_kernels *k);
void moe4_kernels_glu_neon(struct moe4_kernels *k);
void moe4_kernels_gemm_neon(struct moe4_kernels *k);
#if !defined(__clang__) || __clang_major__ >= 16 /* older ones have the intrinsics only where the whole file may use them */
#define MOE4_NEON_DOT
void moe4_kernels_gemm_neondot(struct moe4_kernels *k);
void moe4_kernels_gemm_neoni8mm(struct moe4_kernels *k);
#endif
#endif

#endif
