#include "quantize/block.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { FP8_BLOCK = 128 };

static float half_to_float(moe4_dtype dtype, uint16_t bits) {
    return dtype == MOE4_BF16 ? moe4_bf16_to_float(bits) : moe4_f16_to_float(bits);
}

/* x[n, cols] = the piece in fp32. */
static void to_floats(const struct quantize_plan *plan, const struct quantize_piece *piece, float *x) {
    const struct quantize_item *item = piece->item;
    size_t cols = item->cols, begin = piece->row * cols, n = piece->n * cols;
    if (item->fp8_scale.data) {
        const uint8_t *bytes = (const uint8_t *)item->in.data + begin;
        size_t n_factors = (cols + FP8_BLOCK - 1) / FP8_BLOCK;
        for (size_t r = 0; r < piece->n; r++)
            for (size_t c = 0; c < cols; c += FP8_BLOCK) {
                float factor = lm_element(item->fp8_scale.data, MOE4_F32, (piece->row + r) / FP8_BLOCK * n_factors + c / FP8_BLOCK);
                size_t end = cols - c < FP8_BLOCK ? cols : c + FP8_BLOCK;
                for (size_t k = c; k < end; k++) x[r * cols + k] = plan->e4m3[bytes[r * cols + k]] * factor;
            }
        return;
    }
    const char *in = (const char *)item->in.data + begin * moe4_dtype_bytes(item->in.dtype);
    if (item->in.dtype == MOE4_F32) {
        memcpy(x, in, n * sizeof *x);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, in + 2 * i, sizeof bits);
        x[i] = half_to_float(item->in.dtype, bits);
    }
}

/* The piece as the library reads it: where it lies when it is wide and aligned, otherwise in fp32 in *owned_ret, the caller's to free.
 * NULL: no memory. */
static const void *view(const struct quantize_plan *plan, const struct quantize_piece *piece, moe4_dtype *dtype_ret, float **owned_ret,
                        bool floats) {
    const struct quantize_item *item = piece->item;
    size_t element = moe4_dtype_bytes(item->in.dtype);
    const char *in = (const char *)item->in.data + piece->row * item->cols * element;
    *owned_ret = NULL;
    *dtype_ret = item->in.dtype;
    if (!floats && !item->fp8_scale.data && (uintptr_t)in % element == 0) return in;
    *owned_ret = malloc(piece->n * item->cols * sizeof **owned_ret);
    *dtype_ret = MOE4_F32;
    if (*owned_ret) to_floats(plan, piece, *owned_ret);
    return *owned_ret;
}

moe4_status quantize_piece_amax(const struct quantize_plan *plan, const struct quantize_piece *piece, float *amax_ret) {
    float *owned;
    moe4_dtype dtype;
    const void *x = view(plan, piece, &dtype, &owned, false);
    moe4_status status = x ? moe4_amax(plan->lm->ctx, amax_ret, x, dtype, piece->n, piece->item->cols, 0) : MOE4_ERROR_MEMORY;
    free(owned);
    return status;
}

moe4_status quantize_piece_encode(const struct quantize_plan *plan, const struct quantize_piece *piece, uint8_t *codes, uint8_t *scales,
                                  float global) {
    const struct quantize_options *o = plan->options;
    size_t cols = piece->item->cols;
    float *owned;
    moe4_dtype dtype;
    const void *x = view(plan, piece, &dtype, &owned, o->search);
    if (!x) return MOE4_ERROR_MEMORY;
    moe4_quantize_options options = MOE4_QUANTIZE_OPTIONS_INIT;
    options.recipe = o->recipe;
    options.four_over_six = o->four_over_six;
    options.global = &global;
    moe4_status status = moe4_nvfp4_quantize(plan->lm->ctx, codes, scales, NULL, NULL, x, dtype, piece->n, cols, 0, &options);
    if (status == MOE4_OK && o->search)
        quantize_search(codes, scales, owned, piece->n, cols, global, o->recipe == MOE4_RECIPE_COMPRESSED_TENSORS,
                        piece->item->channel_weight);
    free(owned);
    return status;
}

moe4_status quantize_piece_widen(const struct quantize_plan *plan, const struct quantize_piece *piece, uint16_t *values) {
    float *owned;
    moe4_dtype dtype;
    if (!view(plan, piece, &dtype, &owned, true)) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < piece->n * piece->item->cols; i++) values[i] = moe4_bf16_from_float(owned[i]);
    free(owned);
    return MOE4_OK;
}

bool quantize_find_nonfinite(const struct quantize_plan *plan, struct quantize_item *item, size_t *row_ret, size_t *col_ret) {
    float *x = malloc(item->cols * sizeof *x);
    bool found = false;
    for (size_t row = 0; x && !found && row < item->rows; row++) {
        struct quantize_piece piece = {item, row, 1};
        to_floats(plan, &piece, x);
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
