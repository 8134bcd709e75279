/* The NVFP4 format: what other files need of it beside moe4.h, and its calls as a device takes them. */
#ifndef MOE4_NVFP4_H
#define MOE4_NVFP4_H

#include "moe4.h"

/* The number a recipe stores for a tensor (or row) of this amax; always positive and finite. */
float moe4_nvfp4_global(moe4_recipe recipe, float amax, int four_over_six);

/* Sentences about data, the same wherever it lies. */
moe4_status moe4_nvfp4_fail_nonfinite(const moe4_ctx *ctx, size_t row, size_t col, float x);
moe4_status moe4_nvfp4_fail_scale(const moe4_ctx *ctx, size_t row, size_t block, uint8_t scale);

/* A matrix in a device's memory; nvfp4.c has checked all that the host can see. Rows are those of codes; x's and y's may be gate's and
 * up's in turn. */
typedef struct moe4_codec_call {
    moe4_ctx *ctx;
    const void *x; /* amax, quantize */
    void *y;       /* dequantize */
    moe4_dtype dtype;
    size_t rows, cols, ld;
    moe4_quantize_options o; /* global is host memory */
    uint8_t *codes, *scales;
    size_t part_rows, part_bytes; /* scales: rows of a matrix that is laid out by itself, and its bytes */
} moe4_codec_call;

/* What blocks are quantized by, one for the matrix or one for each row. */
typedef struct moe4_codec_scale {
    float global; /* the stored number: s2, S or gs */
    float amax;   /* MODELOPT_STATIC: A */
} moe4_codec_scale;

/* Those of row `row` (with per_row), or of all: from options->global, or from the amax. */
moe4_codec_scale moe4_nvfp4_scale(const moe4_quantize_options *o, size_t row, float amax);

/* nvfp4_device.c: the public calls' ends for a device's memory. */
moe4_status moe4_amax_on_device(const moe4_codec_call *c, float *amax_ret);
moe4_status moe4_nvfp4_quantize_on_device(const moe4_codec_call *c, float *global_ret, uint64_t *n_saturated_ret);
moe4_status moe4_nvfp4_dequantize_on_device(const moe4_codec_call *c);

/* Scales of n_matrices matrices [rows, 16 * n_blocks] from one layout to another. */
typedef struct moe4_scales_conversion {
    uint8_t *dst;
    const uint8_t *src;
    moe4_scale_layout dst_layout, src_layout;
    size_t dst_bytes, src_bytes; /* of one matrix */
    size_t n_matrices, rows, n_blocks;
} moe4_scales_conversion;

#endif
