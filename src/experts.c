/* The rules that weights and experts must keep before any backend sees them. */
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "backend.h"
#include "cpu/pool.h"

static const char *const act_names[] = {"default", "w4a16", "static", "tensor", "token", "bf16"};
enum { N_ACTS = sizeof act_names / sizeof *act_names };

const char *moe4_act_name(moe4_act act) {
    return (size_t)act < N_ACTS ? act_names[act] : "?";
}

moe4_status moe4_act_from_name(moe4_act *act_ret, const char *name) {
    for (int i = 0; name && i < N_ACTS; i++)
        if (strcmp(name, act_names[i]) == 0) {
            *act_ret = (moe4_act)i;
            return MOE4_OK;
        }
    return MOE4_ERROR_ARGUMENT;
}

moe4_act moe4_act_resolve(moe4_act act, moe4_dtype dtype) {
    if (dtype != MOE4_NVFP4) return MOE4_ACT_BF16;
    return act == MOE4_ACT_DEFAULT || act == MOE4_ACT_BF16 ? MOE4_ACT_TOKEN : act;
}

static bool positive(float x) {
    return isfinite(x) && x > 0;
}

moe4_status moe4_weight_check(const moe4_ctx *ctx, const moe4_weight *w, const char *what) {
    bool nvfp4 = w->dtype == MOE4_NVFP4;
    MOE4_CHECK(ctx, nvfp4 || w->dtype == MOE4_BF16 || w->dtype == MOE4_F16 || w->dtype == MOE4_F32, MOE4_ERROR_ARGUMENT,
               "%s: dtype %s (weights are NVFP4, BF16, F16, F32 or F8_E4M3)", what, moe4_dtype_name(w->dtype));
    MOE4_CHECK(ctx, w->data && (!nvfp4 || w->scale), MOE4_ERROR_ARGUMENT, "%s: NULL %s", what, w->data ? "scale" : "data");
    MOE4_CHECK(ctx, w->rows && w->cols, MOE4_ERROR_ARGUMENT, "%s: shape %zu x %zu", what, w->rows, w->cols);
    size_t bytes;
    MOE4_CHECK(ctx, moe4_mul(&bytes, w->rows, w->cols) && moe4_mul(&bytes, bytes, 4), MOE4_ERROR_ARGUMENT,
               "%s: shape %zu x %zu is too large", what, w->rows, w->cols);
    if (!nvfp4) return MOE4_OK;
    MOE4_CHECK(ctx, w->cols % MOE4_BLOCK == 0, MOE4_ERROR_ARGUMENT, "%s: %zu columns, NVFP4 needs a multiple of %d", what, w->cols,
               MOE4_BLOCK);
    MOE4_CHECK(ctx, positive(w->global), MOE4_ERROR_ARGUMENT, "%s: global scale %g (must be positive and finite)", what, (double)w->global);
    MOE4_CHECK(ctx, w->input_scale == 0 || positive(w->input_scale), MOE4_ERROR_ARGUMENT,
               "%s: input scale %g (must be positive and finite, or 0)", what, (double)w->input_scale);
    return MOE4_OK;
}

moe4_status moe4_workspace_check(const moe4_ctx *ctx, const char *call, const moe4_workspace *ws, size_t need) {
    MOE4_CHECK(ctx, ws && (ws->data || !need), MOE4_ERROR_ARGUMENT, "%s: no workspace, need %zu bytes", call, need);
    MOE4_CHECK(ctx, ws->bytes >= need, MOE4_ERROR_ARGUMENT, "%s: workspace of %zu bytes, need %zu", call, ws->bytes, need);
    MOE4_CHECK(ctx, (uintptr_t)ws->data % 64 == 0, MOE4_ERROR_ARGUMENT, "%s: workspace at %p, not a multiple of 64", call, ws->data);
    return MOE4_OK;
}

/* ---- what a call brings ---- */

moe4_status moe4_io_check(const moe4_ctx *ctx, moe4_dtype x_dtype, moe4_dtype y_dtype) {
    MOE4_CHECK(ctx, x_dtype == MOE4_F32 || x_dtype == MOE4_BF16 || x_dtype == MOE4_F16 || x_dtype == MOE4_NVFP4, MOE4_ERROR_ARGUMENT,
               "options.x_dtype: %s (F32, BF16, F16 or NVFP4)", moe4_dtype_name(x_dtype));
    MOE4_CHECK(ctx, y_dtype == MOE4_F32 || y_dtype == MOE4_BF16, MOE4_ERROR_ARGUMENT, "options.y_dtype: %s (F32 or BF16)",
               moe4_dtype_name(y_dtype));
    return MOE4_OK;
}

moe4_status moe4_rows_check(const moe4_ctx *ctx, const void *x, moe4_dtype x_dtype) {
    if (x_dtype != MOE4_NVFP4) return MOE4_OK;
    const moe4_nvfp4_rows *rows = x;
    MOE4_CHECK(ctx, rows->codes && rows->scales && rows->global, MOE4_ERROR_ARGUMENT, "x: NULL %s",
               !rows->codes    ? "codes"
               : !rows->scales ? "scales"
                               : "global");
    MOE4_CHECK(ctx, (unsigned)rows->layout <= MOE4_SCALES_128X4, MOE4_ERROR_ARGUMENT, "x: %d is no layout of scales", (int)rows->layout);
    return MOE4_OK;
}

moe4_status moe4_offsets_check(const moe4_ctx *ctx, const int32_t *offsets, size_t n, size_t n_rows) {
    MOE4_CHECK(ctx, offsets[0] == 0, MOE4_ERROR_ARGUMENT, "offsets[0]: %d, need 0", offsets[0]);
    for (size_t i = 0; i < n; i++)
        MOE4_CHECK(ctx, offsets[i + 1] >= offsets[i], MOE4_ERROR_ARGUMENT, "offsets[%zu]: %d after %d", i + 1, offsets[i + 1], offsets[i]);
    MOE4_CHECK(ctx, (size_t)offsets[n] <= n_rows, MOE4_ERROR_ARGUMENT, "offsets[%zu]: %d, there are %zu rows", n, offsets[n], n_rows);
    return MOE4_OK;
}

/* ---- block scales: every byte is looked at before it is used ---- */

enum { SCAN_BYTES = 1 << 16 };

struct scan {
    const uint8_t *scale;
    size_t bytes;
    _Atomic size_t first_bad;
};

/* Whether a byte of s[n] is above 0x7e. Eight at a time: such a byte has its top bit set before or after 1 is added; what a byte carries
 * into the next one comes from 0xff, which is found anyway. */
static bool has_bad(const uint8_t *s, size_t n) {
    const uint64_t ones = 0x0101010101010101;
    uint64_t found[2] = {0, 0};
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        uint64_t v[2];
        memcpy(v, s + i, sizeof v);
        found[0] |= v[0] | (v[0] + ones);
        found[1] |= v[1] | (v[1] + ones);
    }
    bool bad = (found[0] | found[1]) & ones << 7;
    for (; i < n; i++) bad |= s[i] > 0x7e;
    return bad;
}

static void scan_task(void *arg, size_t task) {
    struct scan *s = arg;
    size_t from = task * SCAN_BYTES, n = s->bytes - from < SCAN_BYTES ? s->bytes - from : SCAN_BYTES;
    if (!has_bad(s->scale + from, n)) return;
    size_t at = from;
    while (s->scale[at] <= 0x7E) at++;
    size_t seen = s->first_bad;
    while (at < seen && !atomic_compare_exchange_weak(&s->first_bad, &seen, at)) {
    }
}

moe4_status moe4_scales_check(const moe4_ctx *ctx, const moe4_weight *w, const char *what) {
    if (w->dtype != MOE4_NVFP4) return MOE4_OK;
    bool host = true;
    if (ctx->backend->scales_check) MOE4_TRY(ctx->backend->scales_check(ctx, w, what, &host));
    if (!host) return MOE4_OK;
    struct scan s = {.scale = w->scale, .bytes = w->rows * (w->cols / MOE4_BLOCK), .first_bad = SIZE_MAX};
    moe4_pool_run(ctx->pool, (s.bytes + SCAN_BYTES - 1) / SCAN_BYTES, SIZE_MAX, scan_task, &s);
    size_t bad = s.first_bad, n = w->cols / MOE4_BLOCK;
    MOE4_CHECK(ctx, bad == SIZE_MAX, MOE4_ERROR_FORMAT, "%s: block scale [%zu, %zu] is 0x%02x, a %s (0x00 to 0x7e are scales)", what,
               bad / n, bad % n, w->scale[bad], w->scale[bad] == 0x7F ? "NaN" : "signed byte");
    return MOE4_OK;
}

/* ---- the matrices of a linear ---- */

static moe4_status check_mode(const moe4_ctx *ctx, moe4_act *act, moe4_dtype dtype) {
    MOE4_CHECK(ctx, (unsigned)*act <= MOE4_ACT_BF16, MOE4_ERROR_ARGUMENT, "options.act: %d is no mode", (int)*act);
    moe4_act runs = moe4_act_resolve(*act, dtype);
    MOE4_CHECK(ctx, *act == MOE4_ACT_DEFAULT || runs == *act, MOE4_ERROR_ARGUMENT, "options.act: mode %s, but the weights are %s",
               moe4_act_name(*act), moe4_dtype_name(dtype));
    *act = runs;
    return MOE4_OK;
}

static moe4_status check_beside(const moe4_ctx *ctx, const moe4_weight *w, const moe4_weight *first, bool same_rows, const char *what) {
    MOE4_CHECK(ctx, !same_rows || (w->rows == first->rows && w->cols == first->cols), MOE4_ERROR_ARGUMENT,
               "%s: shape %zu x %zu, weight 0 has %zu x %zu", what, w->rows, w->cols, first->rows, first->cols);
    MOE4_CHECK(ctx, w->cols == first->cols, MOE4_ERROR_ARGUMENT, "%s: %zu columns, weight 0 has %zu", what, w->cols, first->cols);
    MOE4_CHECK(ctx, w->dtype == first->dtype, MOE4_ERROR_ARGUMENT, "%s: dtype %s, weight 0 has %s", what, moe4_dtype_name(w->dtype),
               moe4_dtype_name(first->dtype));
    return MOE4_OK;
}

moe4_status moe4_weights_take(const moe4_ctx *ctx, moe4_weight **weight_ret, void ***wide_ret, const moe4_weight *weights, size_t n,
                              bool same_rows, moe4_act *act, moe4_dtype x_dtype) {
    MOE4_TRY(check_mode(ctx, act, weights->dtype));
    moe4_weight *all = *weight_ret = moe4_calloc(ctx, n, sizeof *weights, "weights");
    if (!all) return MOE4_ERROR_MEMORY;
    void **wide = *wide_ret = moe4_calloc(ctx, n, sizeof *wide, "weights");
    if (!wide) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) {
        moe4_weight *w = &all[i];
        char what[32];
        *w = weights[i];
        snprintf(what, sizeof what, "weight %zu", i);
        MOE4_TRY(moe4_fp8_widen(ctx, w, &wide[i], what));
        MOE4_TRY(moe4_weight_check(ctx, w, what));
        MOE4_TRY(check_beside(ctx, w, all, same_rows, what));
        MOE4_CHECK(ctx, *act != MOE4_ACT_STATIC || w->input_scale > 0 || x_dtype == MOE4_NVFP4, MOE4_ERROR_ARGUMENT,
                   "%s: mode static needs an input_scale (%g)", what, (double)w->input_scale);
        MOE4_TRY(moe4_scales_check(ctx, w, what));
        if (w->dtype != MOE4_NVFP4) w->global = 1;
    }
    return MOE4_OK;
}

void moe4_weights_release(const moe4_ctx *ctx, moe4_weight *weight, void **wide, size_t n) {
    for (size_t i = 0; wide && i < n; i++) moe4_free(ctx, wide[i]);
    moe4_free(ctx, wide);
    moe4_free(ctx, weight);
}
