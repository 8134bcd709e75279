/* What a weight holds: counts over its block scales, the facts that decide correctness and speed; and its values. */
#include <string.h>

#include "backend.h"
#include "nvfp4.h"

moe4_status moe4_weight_inspect(moe4_ctx *ctx, moe4_weight_stats *stats_ret, const moe4_weight *weight) {
    moe4_begin(ctx);
    MOE4_CHECK(ctx, stats_ret && weight, MOE4_ERROR_ARGUMENT, "%s is NULL", stats_ret ? "weight" : "stats_ret");
    MOE4_CHECK(ctx, weight->dtype == MOE4_NVFP4, MOE4_ERROR_ARGUMENT, "weight: dtype %s has no block scales, need NVFP4",
               moe4_dtype_name(weight->dtype));
    size_t n;
    MOE4_CHECK(ctx, weight->cols % MOE4_BLOCK == 0 && moe4_mul(&n, weight->rows, weight->cols / MOE4_BLOCK), MOE4_ERROR_ARGUMENT,
               "weight: %zux%zu, need K a multiple of %d and a size that fits", weight->rows, weight->cols, MOE4_BLOCK);
    uint64_t count[256] = {0};
    for (size_t i = 0; i < n; i++) count[weight->scale[i]]++;

    moe4_weight_stats stats = MOE4_WEIGHT_STATS_INIT;
    stats.n_blocks = n;
    stats.n_scale_zero = count[0];
    bool any = false;
    for (int byte = 0; byte < 256; byte++) {
        if (byte >= 0x7F) {
            stats.n_scale_bad += count[byte]; /* NaN, or the sign bit */
        } else if (count[byte]) {
            if (!any) stats.scale_min = moe4_e4m3_to_float((uint8_t)byte);
            any = true;
            stats.scale_max = moe4_e4m3_to_float((uint8_t)byte);
            bool subnormal = byte < 8, pow2 = subnormal ? byte && !(byte & (byte - 1)) : (byte & 7) == 0;
            if (pow2) stats.n_scale_pow2 += count[byte];
        }
    }
    stats.n_scale_448 = count[0x7E];
    moe4_struct_write(stats_ret, &stats, sizeof stats);
    return MOE4_OK;
}

static float element(const moe4_weight *w, size_t i) {
    uint16_t half;
    float x;
    if (w->dtype == MOE4_F32) {
        memcpy(&x, (const char *)w->data + 4 * i, sizeof x);
        return x;
    }
    memcpy(&half, (const char *)w->data + 2 * i, sizeof half);
    return w->dtype == MOE4_BF16 ? moe4_bf16_to_float(half) : moe4_f16_to_float(half);
}

/* Rows count from the weight's first, whichever are asked for. */
static moe4_status check_scales(const moe4_ctx *ctx, const moe4_weight *w, size_t row, size_t n_rows) {
    const size_t n = w->cols / MOE4_BLOCK;
    for (size_t i = row * n; i < (row + n_rows) * n; i++)
        if (w->scale[i] > 0x7e) return moe4_nvfp4_fail_scale(ctx, i / n, i % n, w->scale[i]);
    return MOE4_OK;
}

moe4_status moe4_weight_values(moe4_ctx *ctx, float *y, const moe4_weight *weight, size_t row, size_t n_rows) {
    moe4_begin(ctx);
    MOE4_CHECK(ctx, weight && (y || !n_rows), MOE4_ERROR_ARGUMENT, "%s is NULL", weight ? "y" : "weight");
    const moe4_weight *w = weight;
    MOE4_CHECK(ctx, row <= w->rows && n_rows <= w->rows - row, MOE4_ERROR_ARGUMENT, "rows %zu + %zu, the weight has %zu", row, n_rows,
               w->rows);
    if (w->dtype == MOE4_F8_E4M3) return moe4_fp8_rows(ctx, y, w, row, n_rows);
    MOE4_TRY(moe4_weight_check(ctx, w, "weight"));
    if (w->dtype == MOE4_NVFP4) {
        moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
        o.global = &w->global;
        MOE4_TRY(check_scales(ctx, w, row, n_rows));
        return moe4_nvfp4_dequantize(ctx, y, MOE4_F32, 0, (const uint8_t *)w->data + row * (w->cols / 2),
                                     w->scale + row * (w->cols / MOE4_BLOCK), n_rows, w->cols, &o);
    }
    for (size_t i = 0; i < n_rows * w->cols; i++) y[i] = element(w, row * w->cols + i);
    return MOE4_OK;
}
