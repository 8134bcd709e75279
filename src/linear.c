/* Linear: one or several matrices that read the same rows. */
#include "backend.h"
#include "fpenv.h"

static moe4_status linear_init(moe4_linear *l, const moe4_weight *weights, size_t n_weights) {
    const moe4_ctx *ctx = l->ctx;
    moe4_linear_options *o = &l->o;
    MOE4_TRY(moe4_io_check(ctx, o->x_dtype, o->y_dtype));
    l->n_weights = n_weights;
    MOE4_TRY(moe4_weights_take(ctx, &l->weight, &l->wide, weights, n_weights, false, &o->act, o->x_dtype));
    l->cols = l->weight->cols;
    for (size_t i = 0; i < n_weights; i++)
        if (l->weight[i].input_scale > l->input_scale) l->input_scale = l->weight[i].input_scale;
    if (!o->x_ld) o->x_ld = l->cols;
    MOE4_CHECK(ctx, o->x_dtype != MOE4_NVFP4 || l->cols % MOE4_BLOCK == 0, MOE4_ERROR_ARGUMENT,
               "options.x_dtype: NVFP4, and %zu columns are not a multiple of %d", l->cols, MOE4_BLOCK);
    MOE4_CHECK(ctx, o->x_ld >= l->cols, MOE4_ERROR_ARGUMENT, "options.x_ld: %zu, the rows have %zu", o->x_ld, l->cols);
    return ctx->backend->linear_prepare(l);
}

moe4_status moe4_linear_create(moe4_linear **linear_ret, moe4_ctx *ctx, const moe4_weight *weights, size_t n_weights,
                               const moe4_linear_options *options) {
    moe4_begin(ctx);
    MOE4_CHECK(ctx, linear_ret, MOE4_ERROR_ARGUMENT, "moe4_linear_create: NULL linear_ret");
    *linear_ret = NULL;
    MOE4_CHECK(ctx, weights && n_weights, MOE4_ERROR_ARGUMENT, "moe4_linear_create: no weights");
    moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
    MOE4_CHECK(ctx, moe4_options_read(&o, sizeof o, options), MOE4_ERROR_ARGUMENT, "options: struct_size is wrong, or a field is unknown");
    moe4_linear *l = moe4_calloc(ctx, 1, sizeof *l, "linear");
    if (!l) return MOE4_ERROR_MEMORY;
    l->ctx = ctx;
    l->o = o;
    moe4_status status = linear_init(l, weights, n_weights);
    if (status != MOE4_OK) {
        moe4_linear_destroy(l);
        return status;
    }
    *linear_ret = l;
    return MOE4_OK;
}

void moe4_linear_destroy(moe4_linear *l) {
    if (!l) return;
    l->ctx->backend->linear_release(l);
    moe4_weights_release(l->ctx, l->weight, l->wide, l->n_weights);
    moe4_free(l->ctx, l);
}

moe4_status moe4_linear_workspace_bytes(const moe4_linear *l, size_t *bytes_ret, size_t n_tokens) {
    moe4_begin(l->ctx);
    MOE4_CHECK(l->ctx, n_tokens <= INT32_MAX && l->ctx->backend->linear_bytes(bytes_ret, l, n_tokens), MOE4_ERROR_ARGUMENT,
               "n_tokens: a workspace for %zu is too large", n_tokens);
    return MOE4_OK;
}

moe4_status moe4_linear_forward(const moe4_linear *l, void *const *y, uint64_t *n_saturated_ret, const void *x, size_t n_tokens,
                                const moe4_workspace *workspace, void *stream) {
    size_t need;
    MOE4_TRY(moe4_linear_workspace_bytes(l, &need, n_tokens));
    MOE4_TRY(moe4_workspace_check(l->ctx, "moe4_linear_forward", workspace, need));
    MOE4_CHECK(l->ctx, !n_tokens || (x && y), MOE4_ERROR_ARGUMENT, "moe4_linear_forward: NULL %s", x ? "y" : "x");
    for (size_t i = 0; n_tokens && i < l->n_weights; i++)
        MOE4_CHECK(l->ctx, y[i], MOE4_ERROR_ARGUMENT, "moe4_linear_forward: NULL y[%zu]", i);
    if (n_tokens) MOE4_TRY(moe4_rows_check(l->ctx, x, l->o.x_dtype));
    struct moe4_linear_call c = {l, y, n_saturated_ret, x, n_tokens, workspace->data, stream};
    struct moe4_fpenv env = moe4_fpenv_enter();
    moe4_status status = l->ctx->backend->linear_forward(&c);
    moe4_fpenv_leave(env);
    return status;
}
