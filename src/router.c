/* Routers: fp32 logits by the same products as everything else, then the backend's selection. */
#include <math.h>
#include <string.h>

#include "backend.h"
#include "fpenv.h"

static moe4_status check_options(const moe4_ctx *ctx, moe4_router_options *o) {
    MOE4_CHECK(ctx, o->kind == MOE4_ROUTER_SOFTMAX_TOPK || o->kind == MOE4_ROUTER_SIGMOID_BIAS, MOE4_ERROR_ARGUMENT,
               "options.kind: %d is no router", (int)o->kind);
    MOE4_CHECK(ctx, o->n_experts >= 1 && o->n_experts <= MOE4_MAX_EXPERTS, MOE4_ERROR_ARGUMENT, "options.n_experts: %zu (1 to %d)",
               o->n_experts, MOE4_MAX_EXPERTS);
    MOE4_CHECK(ctx, o->top_k >= 1 && o->top_k <= o->n_experts, MOE4_ERROR_ARGUMENT, "options.top_k: %zu of %zu experts", o->top_k,
               o->n_experts);
    if (!o->n_group) o->n_group = 1;
    if (!o->topk_group) o->topk_group = o->n_group;
    MOE4_CHECK(ctx, o->n_experts % o->n_group == 0, MOE4_ERROR_ARGUMENT, "options.n_group: %zu experts in %zu groups", o->n_experts,
               o->n_group);
    MOE4_CHECK(ctx, o->topk_group <= o->n_group, MOE4_ERROR_ARGUMENT, "options.topk_group: %zu of %zu groups", o->topk_group, o->n_group);
    MOE4_CHECK(ctx, o->n_experts / o->n_group * o->topk_group >= o->top_k, MOE4_ERROR_ARGUMENT,
               "options.topk_group: %zu groups of %zu experts, fewer than top_k %zu", o->topk_group, o->n_experts / o->n_group, o->top_k);
    if (o->scale == 0) o->scale = 1;
    MOE4_CHECK(ctx, isfinite(o->scale), MOE4_ERROR_ARGUMENT, "options.scale: %g", (double)o->scale);
    return MOE4_OK;
}

static moe4_status router_init(moe4_router *r, const moe4_weight *gate, const float *bias) {
    moe4_ctx *ctx = r->ctx;
    moe4_router_options *o = &r->o;
    MOE4_TRY(check_options(ctx, o));
    r->bias = moe4_calloc(ctx, o->n_experts, sizeof *r->bias, "router bias");
    if (!r->bias) return MOE4_ERROR_MEMORY;
    if (bias) memcpy(r->bias, bias, o->n_experts * sizeof *bias);
    for (size_t e = 0; e < o->n_experts; e++)
        MOE4_CHECK(ctx, isfinite(r->bias[e]), MOE4_ERROR_FORMAT, "router bias [%zu]: %g", e, (double)r->bias[e]);
    if (!gate) return MOE4_OK;
    MOE4_CHECK(ctx, gate->dtype != MOE4_NVFP4, MOE4_ERROR_ARGUMENT, "router gate: dtype NVFP4 (BF16, F16 or F32)");
    MOE4_CHECK(ctx, gate->rows == o->n_experts && gate->cols == o->hidden, MOE4_ERROR_ARGUMENT,
               "router gate: shape %zu x %zu, need %zu x %zu", gate->rows, gate->cols, o->n_experts, o->hidden);
    moe4_linear_options lo = MOE4_LINEAR_OPTIONS_INIT;
    lo.x_dtype = o->x_dtype;
    lo.x_ld = o->x_ld;
    return moe4_linear_create(&r->logits, ctx, gate, 1, &lo);
}

moe4_status moe4_router_create(moe4_router **router_ret, moe4_ctx *ctx, const moe4_weight *gate, const float *bias,
                               const moe4_router_options *options) {
    moe4_begin(ctx);
    MOE4_CHECK(ctx, router_ret, MOE4_ERROR_ARGUMENT, "moe4_router_create: NULL router_ret");
    *router_ret = NULL;
    MOE4_CHECK(ctx, options, MOE4_ERROR_ARGUMENT, "moe4_router_create: NULL options");
    moe4_router_options o = MOE4_ROUTER_OPTIONS_INIT;
    MOE4_CHECK(ctx, moe4_options_read(&o, sizeof o, options), MOE4_ERROR_ARGUMENT, "options: struct_size is wrong, or a field is unknown");
    moe4_router *r = moe4_calloc(ctx, 1, sizeof *r, "router");
    if (!r) return MOE4_ERROR_MEMORY;
    r->ctx = ctx;
    r->o = o;
    moe4_status status = router_init(r, gate, bias);
    if (status != MOE4_OK) {
        moe4_router_destroy(r);
        return status;
    }
    *router_ret = r;
    return MOE4_OK;
}

void moe4_router_destroy(moe4_router *r) {
    if (!r) return;
    moe4_linear_destroy(r->logits);
    moe4_free(r->ctx, r->bias);
    moe4_free(r->ctx, r);
}

/* The logits [T,E], then the linear's own workspace. */
static moe4_status workspace_parts(const moe4_router *r, size_t n_tokens, size_t *logits_bytes, size_t *linear_bytes) {
    MOE4_CHECK(r->ctx, r->logits, MOE4_ERROR_ARGUMENT, "this router has no gate weights: only moe4_router_select runs");
    MOE4_TRY(moe4_linear_workspace_bytes(r->logits, linear_bytes, n_tokens));
    struct moe4_carver c = {NULL, 0, false};
    moe4_carve(&c, n_tokens, r->o.n_experts * sizeof(float));
    MOE4_CHECK(r->ctx, !c.overflow && moe4_add(&(size_t){0}, c.used, *linear_bytes), MOE4_ERROR_ARGUMENT,
               "n_tokens: a workspace for %zu is too large", n_tokens);
    *logits_bytes = c.used;
    return MOE4_OK;
}

moe4_status moe4_router_workspace_bytes(const moe4_router *r, size_t *bytes_ret, size_t n_tokens) {
    moe4_begin(r->ctx);
    size_t logits, linear;
    MOE4_TRY(workspace_parts(r, n_tokens, &logits, &linear));
    *bytes_ret = logits + linear;
    return MOE4_OK;
}

static moe4_status choose(const moe4_router *r, int32_t *topk_ids, float *topk_weights, const float *logits, size_t n_tokens,
                          void *stream) {
    struct moe4_fpenv env = moe4_fpenv_enter();
    moe4_status status = r->ctx->backend->select(r, topk_ids, topk_weights, logits, n_tokens, stream);
    moe4_fpenv_leave(env);
    return status;
}

moe4_status moe4_router_forward(const moe4_router *r, int32_t *topk_ids, float *topk_weights, const void *x, size_t n_tokens,
                                const moe4_workspace *workspace, void *stream) {
    moe4_begin(r->ctx);
    size_t logits_bytes, linear_bytes;
    MOE4_TRY(workspace_parts(r, n_tokens, &logits_bytes, &linear_bytes));
    MOE4_TRY(moe4_workspace_check(r->ctx, "moe4_router_forward", workspace, logits_bytes + linear_bytes));
    MOE4_CHECK(r->ctx, !n_tokens || (topk_ids && topk_weights && x), MOE4_ERROR_ARGUMENT, "moe4_router_forward: a NULL buffer");
    float *logits = workspace->data;
    const moe4_workspace rest = {(char *)workspace->data + logits_bytes, linear_bytes};
    MOE4_TRY(moe4_linear_forward(r->logits, (void *const[]){logits}, NULL, x, n_tokens, &rest, stream));
    return choose(r, topk_ids, topk_weights, logits, n_tokens, stream);
}

moe4_status moe4_router_select(const moe4_router *r, int32_t *topk_ids, float *topk_weights, const float *logits, size_t n_tokens,
                               void *stream) {
    moe4_begin(r->ctx);
    MOE4_CHECK(r->ctx, !n_tokens || (topk_ids && topk_weights && logits), MOE4_ERROR_ARGUMENT, "moe4_router_select: a NULL buffer");
    return choose(r, topk_ids, topk_weights, logits, n_tokens, stream);
}
