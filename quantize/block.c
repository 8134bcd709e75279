#include "quantize/block.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "quantize/recast.h"

/* FP8 bytes [n, cols] times the factor of their 128x128 block. */
static moe4_status scale_fp8(const struct quantize_plan *plan, const struct quantize_piece *piece, float *x, const uint8_t *bytes,
                             char *why) {
    const struct quantize_item *item = piece->item;
    size_t cols = item->cols, n_factors = (cols + QUANTIZE_FP8_BLOCK - 1) / QUANTIZE_FP8_BLOCK;
    char *factors = malloc(n_factors * sizeof(float));
    moe4_status status = factors ? MOE4_OK : MOE4_ERROR_MEMORY;
    for (size_t r = 0; status == MOE4_OK && r < piece->n; r++) {
        size_t row = piece->row + r;
        if (r == 0 || row % QUANTIZE_FP8_BLOCK == 0)
            status = quantize_view_read(plan, &item->scales, factors, row / QUANTIZE_FP8_BLOCK, 1, n_factors, why);
        for (size_t c = 0; status == MOE4_OK && c < cols; c++) {
            size_t f = c / QUANTIZE_FP8_BLOCK;
            float factor = item->scales.dtype == MOE4_F32     ? lm_element(factors, MOE4_F32, f)
                           : (uint8_t)factors[f] == UINT8_MAX ? NAN
                                                              : ldexpf(1, (uint8_t)factors[f] - 127);
            x[r * cols + c] = plan->e4m3[bytes[r * cols + c]] * factor;
        }
    }
    free(factors);
    return status;
}

/* As moe4_bf16_to_float, without a call for each. */
static void widen_bf16(float *x, const uint16_t *bits, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t wide = (uint32_t)bits[i] << 16;
        memcpy(&x[i], &wide, sizeof wide);
    }
}

/* x[n, cols] = the piece in fp32. */
static moe4_status to_floats(const struct quantize_plan *plan, const struct quantize_piece *piece, float *x, char *why) {
    const struct quantize_item *item = piece->item;
    moe4_dtype dtype = item->values.dtype;
    size_t n = piece->n * item->cols;
    if (item->form == QUANTIZE_MXFP4) return quantize_recast_floats(plan, piece, x, why);
    if (dtype == MOE4_F32) return quantize_view_read(plan, &item->values, x, piece->row, piece->n, item->cols, why);
    char *stored = malloc(n * moe4_dtype_bytes(dtype));
    moe4_status status = stored ? MOE4_OK : MOE4_ERROR_MEMORY;
    if (status == MOE4_OK) status = quantize_view_read(plan, &item->values, stored, piece->row, piece->n, item->cols, why);
    if (status == MOE4_OK && item->form == QUANTIZE_FP8)
        status = scale_fp8(plan, piece, x, (const uint8_t *)stored, why);
    else if (status == MOE4_OK && dtype == MOE4_BF16)
        widen_bf16(x, (const uint16_t *)(const void *)stored, n);
    else if (status == MOE4_OK)
        for (size_t i = 0; i < n; i++) x[i] = moe4_f16_to_float(((const uint16_t *)(const void *)stored)[i]);
    free(stored);
    return status;
}

/* The piece as the library reads it: as it is stored when that is wide, otherwise in fp32. Free *x_ret either way. */
static moe4_status load(const struct quantize_plan *plan, const struct quantize_piece *piece, void **x_ret, moe4_dtype *dtype_ret,
                        bool floats, char *why) {
    const struct quantize_item *item = piece->item;
    floats |= item->form != QUANTIZE_WIDE;
    *dtype_ret = floats ? MOE4_F32 : item->values.dtype;
    *x_ret = malloc(piece->n * item->cols * moe4_dtype_bytes(*dtype_ret));
    if (!*x_ret) return MOE4_ERROR_MEMORY;
    return floats ? to_floats(plan, piece, *x_ret, why)
                  : quantize_view_read(plan, &item->values, *x_ret, piece->row, piece->n, item->cols, why);
}

moe4_status quantize_piece_amax(const struct quantize_plan *plan, const struct quantize_piece *piece, uint32_t *amax_ret, char *why) {
    if (piece->item->form == QUANTIZE_MXFP4) return quantize_recast_amax(plan, piece, amax_ret, why);
    void *x;
    moe4_dtype dtype;
    float amax = 0;
    moe4_status status = load(plan, piece, &x, &dtype, false, why);
    if (status == MOE4_OK) status = moe4_amax(plan->lm->ctx, &amax, x, dtype, piece->n, piece->item->cols, 0);
    memcpy(amax_ret, &amax, sizeof amax);
    free(x);
    return status;
}

moe4_status quantize_piece_encode(const struct quantize_plan *plan, const struct quantize_piece *piece, uint8_t *codes, uint8_t *scales,
                                  float global, char *why) {
    const struct quantize_options *o = plan->options;
    moe4_ctx *ctx = plan->lm->ctx;
    size_t cols = piece->item->cols;
    void *x;
    moe4_dtype dtype;
    moe4_status status = load(plan, piece, &x, &dtype, o->search, why);
    moe4_quantize_options options = MOE4_QUANTIZE_OPTIONS_INIT;
    options.recipe = o->recipe;
    options.four_over_six = o->four_over_six && !o->search; /* the search tries both, and more, under the same global scale */
    options.global = &global;
    if (status == MOE4_OK) status = moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, dtype, piece->n, cols, 0, &options);
    if (status == MOE4_OK && o->search)
        quantize_search(codes, scales, x, piece->n, cols, global, o->recipe == MOE4_RECIPE_COMPRESSED_TENSORS, piece->item->channel_weight,
                        moe4_isa_mask(moe4_ctx_isa(ctx)));
    free(x);
    return status;
}

moe4_status quantize_piece_widen(const struct quantize_plan *plan, const struct quantize_piece *piece, uint16_t *values, char *why) {
    void *x;
    moe4_dtype dtype;
    moe4_status status = load(plan, piece, &x, &dtype, true, why);
    for (size_t i = 0; status == MOE4_OK && i < piece->n * piece->item->cols; i++) values[i] = moe4_bf16_from_float(((const float *)x)[i]);
    free(x);
    return status;
}

bool quantize_find_nonfinite(const struct quantize_plan *plan, struct quantize_item *item, size_t *row_ret, size_t *col_ret) {
    float *x = malloc(item->cols * sizeof *x);
    bool found = false;
    for (size_t row = 0; x && !found && row < item->rows; row++) {
        struct quantize_piece piece = {item, row, 1};
        char why[QUANTIZE_WHY_BYTES];
        if (to_floats(plan, &piece, x, why) != MOE4_OK) break;
        for (size_t col = 0; !found && col < item->cols; col++)
            if (!isfinite(x[col])) {
                *row_ret = row;
                *col_ret = col;
                found = true;
            }
    }
    free(x);
    return found;
}
