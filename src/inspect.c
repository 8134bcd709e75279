/* Counts over a weight's block scales: the facts that decide correctness and speed. */
#include "internal.h"

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
