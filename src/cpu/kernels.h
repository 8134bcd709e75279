/* The inner loops of the CPU backend, one table of function pointers. kernels.c fills it: scalar first, then each ISA that the CPU
 * has and the mask allows overwrites the slots it improves. The scalar functions are the readable reference of docs/numerics.md.
 * No kernel allocates, fails or needs alignment; n is a multiple of 16 wherever codes or blocks are involved. */
#ifndef MOE4_CPU_KERNELS_H
#define MOE4_CPU_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "moe4.h"

/* A recipe with its global scale, ready for rows: nvfp4.c fills it, quantize_row reads it. Order of operations: docs/numerics.md. */
struct moe4_quantizer {
    moe4_recipe recipe;
    int four_over_six;
    float global; /* the stored number: s2, S or gs */
};

/* Rows of activations as the products read them: [n][K] fp32. */
struct moe4_rows {
    const float *const *row; /* [n] pointers to K floats */
    size_t n;
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

    /* h[n] = g * sigmoid(g) * u with the clamp of `limit` (0: none); NaN stays. h may be g. */
    void (*swiglu_row)(float *h, const float *g, const float *u, size_t n, float limit);
    /* y[m][0..n_cols) (row stride y_ld) = sum over k of x.row[m][k] * W[col0 + j][k], without global scales. */
    void (*gemm)(float *y, size_t y_ld, const struct moe4_rows *x, const moe4_weight *w, size_t col0, size_t n_cols);
};

/* Fills the table for the ISAs in `mask` (MOE4_ISA_ bits, all of them present on this CPU). */
void moe4_kernels_init(struct moe4_kernels *k, uint32_t mask);
/* The MOE4_ISA_ bits this CPU and its operating system support. */
uint32_t moe4_cpu_isas(void);

void moe4_kernels_codec_scalar(struct moe4_kernels *k);
void moe4_kernels_gemm_scalar(struct moe4_kernels *k);
#if defined(__x86_64__)
void moe4_kernels_codec_avx2(struct moe4_kernels *k);
void moe4_kernels_gemm_avx2(struct moe4_kernels *k);
#endif

#endif
