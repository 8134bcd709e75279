/* Grouped linear: each group of rows meets its own matrix. */
#include "backend.h"
#include "fpenv.h"

static moe4_status check_leading(const moe4_grouped *g) {
    const moe4_grouped_options *o = &g->o;
    size_t n = o->block_diagonal ? g->n_groups : 1, x_cols, y_cols;
    MOE4_CHECK(g->ctx, moe4_mul(&x_cols, n, g->cols) && moe4_mul(&y_cols, n, g->rows), MOE4_ERROR_ARGUMENT,
               "%zu groups of %zu x %zu are too large", n, g->rows, g->cols);
    MOE4_CHECK(g->ctx, o->x_ld >= x_cols && o->y_ld >= y_cols, MOE4_ERROR_ARGUMENT, "options: x_ld %zu, y_ld %zu, rows have %zu and %zu",
               o->x_ld, o->y_ld, x_cols, y_cols);
    return MOE4_OK;
}

static moe4_status grouped_init(moe4_grouped *g, const moe4_weight *weights, size_t n_groups) {
    const moe4_ctx *ctx = g->ctx;
    moe4_grouped_options *o = &g->o;
    MOE4_TRY(moe4_io_check(ctx, o->x_dtype, o->y_dtype));
    g->n_groups = n_groups;
    MOE4_TRY(moe4_weights_take(ctx, &g->weight, &g->wide, weights, n_groups, true, &o->act, o->x_dtype));
    g->rows = g->weight->rows;
    g->cols = g->weight->cols;
    size_t n = o->block_diagonal ? n_groups : 1;
    if (!o->x_ld) o->x_ld = n * g->cols;
    if (!o->y_ld) o->y_ld = n * g->rows;
    MOE4_TRY(check_leading(g));
    MOE4_CHECK(ctx, o->x_dtype != MOE4_NVFP4 || (g->cols % MOE4_BLOCK == 0 && o->x_ld == n * g->cols), MOE4_ERROR_ARGUMENT,
               "options.x_dtype: NVFP4 rows of %zu with x_ld %zu (contiguous, multiples of %d)", n * g->cols, o->x_ld, MOE4_BLOCK);
    return ctx->backend->grouped_prepare(g);
}

moe4_status moe4_grouped_create(moe4_grouped **grouped_ret, moe4_ctx *ctx, const moe4_weight *weights, size_t n_groups,
                                const moe4_grouped_options *options) {
    moe4_begin(ctx);
    MOE4_CHECK(ctx, grouped_ret, MOE4_ERROR_ARGUMENT, "moe4_grouped_create: NULL grouped_ret");
    *grouped_ret = NULL;
    MOE4_CHECK(ctx, weights && n_groups, MOE4_ERROR_ARGUMENT, "moe4_grouped_create: no weights");
    moe4_grouped_options o = MOE4_GROUPED_OPTIONS_INIT;
    MOE4_CHECK(ctx, moe4_options_read(&o, sizeof o, options), MOE4_ERROR_ARGUMENT, "options: struct_size is wrong, or a field is unknown");
    moe4_grouped *g = moe4_calloc(ctx, 1, sizeof *g, "grouped linear");
    if (!g) return MOE4_ERROR_MEMORY;
    g->ctx = ctx;
    g->o = o;
    moe4_status status = grouped_init(g, weights, n_groups);
    if (status != MOE4_OK) {
        moe4_grouped_destroy(g);
        return status;
    }
    *grouped_ret = g;
    return MOE4_OK;
}

void moe4_grouped_destroy(moe4_grouped *g) {
    if (!g) return;
    if (g->prepared) g->ctx->backend->grouped_release(g);
    moe4_weights_release(g->ctx, g->weight, g->wide, g->n_groups);
    moe4_free(g->ctx, g);
}

moe4_status moe4_grouped_workspace_bytes(const moe4_grouped *g, size_t *bytes_ret, size_t n_rows) {
    moe4_begin(g->ctx);
    MOE4_CHECK(g->ctx, n_rows <= INT32_MAX && g->ctx->backend->grouped_bytes(bytes_ret, g, n_rows), MOE4_ERROR_ARGUMENT,
               "n_rows: a workspace for %zu is too large", n_rows);
    return MOE4_OK;
}

moe4_status moe4_grouped_forward(const moe4_grouped *g, void *y, uint64_t *n_saturated_ret, const void *x, const int32_t *offsets,
                                 size_t n_rows, const moe4_workspace *workspace, void *stream) {
    size_t need;
    MOE4_TRY(moe4_grouped_workspace_bytes(g, &need, n_rows));
    MOE4_TRY(moe4_workspace_check(g->ctx, "moe4_grouped_forward", workspace, need));
    MOE4_CHECK(g->ctx, !n_rows || (x && y), MOE4_ERROR_ARGUMENT, "moe4_grouped_forward: NULL %s", x ? "y" : "x");
    if (n_rows) MOE4_TRY(moe4_rows_check(g->ctx, x, g->o.x_dtype));
    if (g->o.block_diagonal) {
        MOE4_CHECK(g->ctx, !offsets, MOE4_ERROR_ARGUMENT, "offsets: a block-diagonal linear takes none");
        MOE4_CHECK(g->ctx, g->o.x_dtype != MOE4_NVFP4 || !n_rows || ((const moe4_nvfp4_rows *)x)->layout == MOE4_SCALES_LINEAR,
                   MOE4_ERROR_UNSUPPORTED, "x: block-diagonal NVFP4 rows need linear scales");
    } else {
        MOE4_CHECK(g->ctx, offsets, MOE4_ERROR_ARGUMENT, "offsets: NULL");
        if (!g->ctx->backend->is_device) MOE4_TRY(moe4_offsets_check(g->ctx, offsets, g->n_groups, n_rows));
    }
    const struct moe4_grouped_call c = {g, y, n_saturated_ret, x, offsets, n_rows, workspace->data, stream};
    struct moe4_fpenv env = moe4_fpenv_enter();
    moe4_status status = g->ctx->backend->grouped_forward(&c);
    moe4_fpenv_leave(env);
    return status;
}
