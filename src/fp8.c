/* FP8 matrices: E4M3 bytes with a scale for each block of rows and columns. No kernel reads them; an object that gets one keeps its values
 * in a type that kernels read. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "backend.h"
#include "bits.h"
#include "cpu/pool.h"
#include "fpenv.h"

moe4_dtype moe4_fp8_wide_dtype(const moe4_weight *w) {
    return w->scale_dtype == MOE4_F8_E8M0 ? MOE4_BF16 : MOE4_F32;
}

/* The host reads them, also for a device. */
static moe4_status check_owner(const moe4_ctx *ctx, const moe4_weight *w, const char *what) {
    const void *parts[] = {w->data, w->scale};
    for (int i = 0; i < 2; i++) {
        enum moe4_owner owner;
        MOE4_TRY(ctx->backend->memory_owner(ctx, parts[i], what, &owner));
        MOE4_CHECK(ctx, owner != MOE4_OF_DEVICE, MOE4_ERROR_UNSUPPORTED,
                   "%s: an FP8 matrix in device memory; the host must be able to read it", what);
    }
    return MOE4_OK;
}

static moe4_status check(const moe4_ctx *ctx, const moe4_weight *w, const char *what) {
    MOE4_CHECK(ctx, w->data && w->scale, MOE4_ERROR_ARGUMENT, "%s: NULL %s", what, w->data ? "scale" : "data");
    MOE4_CHECK(ctx, w->rows && w->cols, MOE4_ERROR_ARGUMENT, "%s: shape %zu x %zu", what, w->rows, w->cols);
    moe4_dtype d = w->scale_dtype;
    MOE4_CHECK(ctx, d == MOE4_F32 || d == MOE4_BF16 || d == MOE4_F16 || d == MOE4_F8_E8M0, MOE4_ERROR_ARGUMENT,
               "%s: scale_dtype %s (F32, BF16, F16 or F8_E8M0)", what, moe4_dtype_name(d));
    MOE4_CHECK(ctx, w->scale_rows && w->scale_cols, MOE4_ERROR_ARGUMENT, "%s: blocks of %zu x %zu", what, w->scale_rows, w->scale_cols);
    size_t bytes;
    MOE4_CHECK(ctx, moe4_mul(&bytes, w->rows, w->cols) && moe4_mul(&bytes, bytes, 4), MOE4_ERROR_ARGUMENT,
               "%s: shape %zu x %zu is too large", what, w->rows, w->cols);
    return ctx->backend->memory_owner ? check_owner(ctx, w, what) : MOE4_OK;
}

static size_t n_blocks(size_t n, size_t block) {
    return (n - 1) / block + 1;
}

static float scale_at(const moe4_weight *w, size_t row, size_t col) {
    size_t i = row / w->scale_rows * n_blocks(w->cols, w->scale_cols) + col / w->scale_cols, bytes = moe4_dtype_bytes(w->scale_dtype);
    uint32_t bits = 0;
    memcpy(&bits, w->scale + i * bytes, bytes); /* little-endian, and aligned by chance only */
    switch (w->scale_dtype) {
    case MOE4_BF16: return moe4_bf16_to_float((uint16_t)bits);
    case MOE4_F16: return moe4_f16_to_float((uint16_t)bits);
    case MOE4_F8_E8M0: return moe4_float(bits == 255 ? 0x7fc00000 : bits ? bits << 23 : 0x00400000); /* 2^(bits - 127) */
    default: return moe4_float(bits);
    }
}

/* y[cols] = row `row` in fp32. Returns the first column whose value is not finite; cols when all are. */
static size_t read_row(float *y, const moe4_weight *w, size_t row, const float e4m3[static 256]) {
    const uint8_t *bytes = (const uint8_t *)w->data + row * w->cols;
    size_t bad = w->cols;
    for (size_t col = 0, end; col < w->cols; col = end) {
        float scale = scale_at(w, row, col), sum = 0;
        end = w->cols - col < w->scale_cols ? w->cols : col + w->scale_cols;
        for (size_t k = col; k < end; k++) {
            y[k] = e4m3[bytes[k]] * scale;
            sum += y[k] * 0; /* NaN after a NaN or an infinity */
        }
        for (size_t k = col; !(sum == 0) && bad == w->cols && k < end; k++)
            if (!isfinite(y[k])) bad = k;
    }
    return bad;
}

/* ---- all rows ---- */

struct widening {
    const moe4_weight *w;
    void *to;
    float *scratch; /* a row for each task, where `to` is not fp32 */
    size_t n_tasks;
    _Atomic size_t first_bad; /* the element */
    float e4m3[256];
};

static void widen_task(void *arg, size_t task) {
    struct widening *z = arg;
    const moe4_weight *w = z->w;
    for (size_t row = w->rows * task / z->n_tasks; row < w->rows * (task + 1) / z->n_tasks; row++) {
        float *y = z->scratch ? z->scratch + task * w->cols : (float *)z->to + row * w->cols;
        size_t bad = read_row(y, w, row, z->e4m3), at = row * w->cols + bad, seen = z->first_bad;
        while (bad < w->cols && at < seen && !atomic_compare_exchange_weak(&z->first_bad, &seen, at)) {
        }
        for (size_t k = 0; z->scratch && k < w->cols; k++) ((uint16_t *)z->to)[row * w->cols + k] = moe4_bf16_from_float(y[k]);
    }
}

static moe4_status widen(const moe4_ctx *ctx, const moe4_weight *w, void *to, const char *what) {
    struct widening z = {.w = w, .to = to, .n_tasks = w->rows < 64 ? w->rows : 64, .first_bad = SIZE_MAX};
    for (int i = 0; i < 256; i++) z.e4m3[i] = moe4_e4m3_to_float((uint8_t)i);
    if (moe4_fp8_wide_dtype(w) != MOE4_F32) {
        z.scratch = moe4_calloc(ctx, z.n_tasks * w->cols, sizeof *z.scratch, "rows of an FP8 matrix");
        if (!z.scratch) return MOE4_ERROR_MEMORY;
    }
    struct moe4_fpenv env = moe4_fpenv_enter();
    moe4_pool_run(ctx->pool, z.n_tasks, SIZE_MAX, widen_task, &z);
    moe4_fpenv_leave(env);
    moe4_free(ctx, z.scratch);
    size_t bad = z.first_bad;
    MOE4_CHECK(ctx, bad == SIZE_MAX, MOE4_ERROR_FORMAT, "%s: row %zu column %zu is not finite: byte 0x%02x, scale %g", what, bad / w->cols,
               bad % w->cols, ((const uint8_t *)w->data)[bad], (double)scale_at(w, bad / w->cols, bad % w->cols));
    return MOE4_OK;
}

moe4_status moe4_fp8_widen(const moe4_ctx *ctx, moe4_weight *w, void **store_ret, const char *what) {
    *store_ret = NULL;
    if (w->dtype != MOE4_F8_E4M3) return MOE4_OK;
    MOE4_TRY(check(ctx, w, what));
    moe4_dtype wide = moe4_fp8_wide_dtype(w);
    void *store = moe4_calloc(ctx, w->rows * w->cols, moe4_dtype_bytes(wide), what);
    if (!store) return MOE4_ERROR_MEMORY;
    moe4_status status = widen(ctx, w, store, what);
    if (status != MOE4_OK) {
        moe4_free(ctx, store);
        return status;
    }
    *w = (moe4_weight){.dtype = wide, .rows = w->rows, .cols = w->cols, .data = store, .bias = w->bias};
    *store_ret = store;
    return MOE4_OK;
}

moe4_status moe4_fp8_rows(const moe4_ctx *ctx, float *y, const moe4_weight *w, size_t row, size_t n_rows) {
    float e4m3[256];
    MOE4_TRY(check(ctx, w, "weight"));
    for (int i = 0; i < 256; i++) e4m3[i] = moe4_e4m3_to_float((uint8_t)i);
    struct moe4_fpenv env = moe4_fpenv_enter();
    for (size_t r = 0; r < n_rows; r++) read_row(y + r * w->cols, w, row + r, e4m3);
    moe4_fpenv_leave(env);
    return MOE4_OK;
}
