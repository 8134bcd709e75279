/* Routers: fp32 logits by the same products as everything else, then the backend's selection. */
#include <math.h>
#include <string.h>

#include "backend.h"
#include "checkpoint.h"
#include "fpenv.h"
#include "hash_table.h"

static bool takes_bias(moe4_router_kind kind) {
    return kind == MOE4_ROUTER_SIGMOID_BIAS || kind == MOE4_ROUTER_TOPK_SOFTMAX || kind == MOE4_ROUTER_SQRTSOFTPLUS_BIAS;
}

static moe4_status check_groups(const moe4_ctx *ctx, moe4_router_options *o) {
    if (!o->n_group) o->n_group = 1;
    if (!o->topk_group) o->topk_group = o->n_group;
    MOE4_CHECK(ctx, o->n_group == 1 || o->kind == MOE4_ROUTER_SIGMOID_BIAS, MOE4_ERROR_ARGUMENT,
               "options.n_group: %zu, groups are for SIGMOID_BIAS", o->n_group);
    MOE4_CHECK(ctx, o->n_experts % o->n_group == 0, MOE4_ERROR_ARGUMENT, "options.n_group: %zu experts in %zu groups", o->n_experts,
               o->n_group);
    MOE4_CHECK(ctx, o->topk_group <= o->n_group, MOE4_ERROR_ARGUMENT, "options.topk_group: %zu of %zu groups", o->topk_group, o->n_group);
    MOE4_CHECK(ctx, o->n_experts / o->n_group * o->topk_group >= o->top_k, MOE4_ERROR_ARGUMENT,
               "options.topk_group: %zu groups of %zu experts, fewer than top_k %zu", o->topk_group, o->n_experts / o->n_group, o->top_k);
    return MOE4_OK;
}

static moe4_status check_options(const moe4_ctx *ctx, moe4_router_options *o) {
    MOE4_CHECK(ctx, o->kind > MOE4_ROUTER_NONE && o->kind <= MOE4_ROUTER_SIGMOID_TOP1, MOE4_ERROR_ARGUMENT, "options.kind: %d is no router",
               (int)o->kind);
    MOE4_CHECK(ctx, o->n_experts >= 1 && o->n_experts <= MOE4_MAX_EXPERTS, MOE4_ERROR_ARGUMENT, "options.n_experts: %zu (1 to %d)",
               o->n_experts, MOE4_MAX_EXPERTS);
    MOE4_CHECK(ctx, o->top_k >= 1 && o->top_k <= o->n_experts, MOE4_ERROR_ARGUMENT, "options.top_k: %zu of %zu experts", o->top_k,
               o->n_experts);
    MOE4_CHECK(ctx, o->top_k == 1 || o->kind != MOE4_ROUTER_SIGMOID_TOP1, MOE4_ERROR_ARGUMENT, "options.top_k: %zu, SIGMOID_TOP1 chooses 1",
               o->top_k);
    MOE4_TRY(check_groups(ctx, o));
    if (o->scale == 0) o->scale = 1;
    if (o->gate_temp == 0) o->gate_temp = 1;
    MOE4_CHECK(ctx, isfinite(o->scale) && isfinite(o->gate_temp) && o->gate_temp > 0, MOE4_ERROR_ARGUMENT,
               "options: scale %g, gate_temp %g", (double)o->scale, (double)o->gate_temp);
    bool tempered = o->kind == MOE4_ROUTER_SQRTSOFTPLUS_BIAS || o->kind == MOE4_ROUTER_HASH;
    MOE4_CHECK(ctx, tempered || o->gate_temp == 1, MOE4_ERROR_ARGUMENT, "options.gate_temp: %g, for SQRTSOFTPLUS_BIAS and HASH",
               (double)o->gate_temp);
    MOE4_CHECK(ctx, (o->kind == MOE4_ROUTER_HASH) == (o->table && o->n_token_ids), MOE4_ERROR_ARGUMENT,
               "options.table: HASH and only HASH has one (%zu token ids)", o->n_token_ids);
    return MOE4_OK;
}

static moe4_status check_table(const moe4_ctx *ctx, const moe4_router_options *o) {
    MOE4_CHECK(ctx, o->table_dtype == MOE4_I32 || o->table_dtype == MOE4_I64, MOE4_ERROR_ARGUMENT, "options.table_dtype: %s (I32 or I64)",
               moe4_dtype_name(o->table_dtype));
    const struct moe4_hash_table table = {o->table, o->table_dtype, o->n_token_ids, o->top_k};
    struct moe4_hash_entry bad;
    if (moe4_hash_table_ok(&table, o->n_experts, &bad)) return MOE4_OK;
    MOE4_CHECK(ctx, !bad.twice, MOE4_ERROR_FORMAT, "hash table: token id %zu has expert %lld twice", bad.token_id, (long long)bad.expert);
    return moe4_fail(ctx, MOE4_ERROR_FORMAT, "hash table: token id %zu has expert %lld of %zu", bad.token_id, (long long)bad.expert,
                     o->n_experts);
}

/* *copy_ret = bias, or zeros for NULL; all finite. */
static moe4_status copy_bias(const moe4_router *r, float **copy_ret, const float *bias, const char *what) {
    size_t n = r->o.n_experts;
    *copy_ret = moe4_calloc(r->ctx, n, sizeof *bias, what);
    if (!*copy_ret) return MOE4_ERROR_MEMORY;
    if (bias) memcpy(*copy_ret, bias, n * sizeof *bias);
    for (size_t e = 0; e < n; e++)
        MOE4_CHECK(r->ctx, isfinite((*copy_ret)[e]), MOE4_ERROR_FORMAT, "%s [%zu]: %g", what, e, (double)(*copy_ret)[e]);
    return MOE4_OK;
}

static moe4_status router_init(moe4_router *r, const moe4_weight *gate, const float *bias) {
    moe4_ctx *ctx = r->ctx;
    moe4_router_options *o = &r->o;
    MOE4_TRY(check_options(ctx, o));
    MOE4_CHECK(ctx, takes_bias(o->kind) || (!bias && !o->alt_bias), MOE4_ERROR_ARGUMENT, "a bias, and routers of kind %d take none",
               (int)o->kind);
    MOE4_TRY(copy_bias(r, &r->bias, bias, "router bias"));
    if (o->alt_bias) MOE4_TRY(copy_bias(r, &r->alt_bias, o->alt_bias, "router alt_bias"));
    o->alt_bias = NULL; /* was the caller's */
    if (o->kind == MOE4_ROUTER_HASH) MOE4_TRY(check_table(ctx, o));
    if (ctx->backend->router_prepare) MOE4_TRY(ctx->backend->router_prepare(r));
    if (!gate) return MOE4_OK;
    MOE4_CHECK(ctx, o->x_dtype != MOE4_NVFP4, MOE4_ERROR_ARGUMENT, "options.x_dtype: NVFP4 (F32, BF16 or F16)");
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
    if (r->ctx->backend->router_release) r->ctx->backend->router_release(r);
    moe4_linear_destroy(r->logits);
    moe4_free(r->ctx, r->bias);
    moe4_free(r->ctx, r->alt_bias);
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
    size_t logits = 0, linear = 0;
    MOE4_TRY(workspace_parts(r, n_tokens, &logits, &linear));
    *bytes_ret = logits + linear;
    return MOE4_OK;
}

/* What the router needs of the tokens is there and in range. */
static moe4_status check_tokens(const moe4_router *r, moe4_router_tokens *tokens, const moe4_router_tokens *given, size_t n_tokens) {
    *tokens = (moe4_router_tokens)MOE4_ROUTER_TOKENS_INIT;
    MOE4_CHECK(r->ctx, moe4_options_read(tokens, sizeof *tokens, given), MOE4_ERROR_ARGUMENT,
               "tokens: struct_size is wrong, or a field is unknown");
    MOE4_CHECK(r->ctx, !tokens->alt_bias || r->alt_bias, MOE4_ERROR_ARGUMENT, "tokens.alt_bias: this router has no second bias");
    if (r->o.kind != MOE4_ROUTER_HASH) return MOE4_OK;
    MOE4_CHECK(r->ctx, tokens->token_ids || !n_tokens, MOE4_ERROR_ARGUMENT, "tokens.token_ids: NULL, and this router chooses by token id");
    for (size_t t = 0; t < n_tokens && !r->ctx->backend->is_device; t++)
        MOE4_CHECK(r->ctx, tokens->token_ids[t] >= 0 && (size_t)tokens->token_ids[t] < r->o.n_token_ids, MOE4_ERROR_ARGUMENT,
                   "token %zu: id %d, the hash table has %zu", t, tokens->token_ids[t], r->o.n_token_ids);
    return MOE4_OK;
}

static moe4_status choose(const moe4_router *r, int32_t *topk_ids, float *topk_weights, const float *logits,
                          const moe4_router_tokens *tokens, size_t n_tokens, void *stream) {
    const struct moe4_select_call c = {r, topk_ids, topk_weights, logits, tokens->token_ids, tokens->alt_bias, n_tokens, stream};
    struct moe4_fpenv env = moe4_fpenv_enter();
    moe4_status status = r->ctx->backend->select(&c);
    moe4_fpenv_leave(env);
    return status;
}

moe4_status moe4_router_forward(const moe4_router *r, int32_t *topk_ids, float *topk_weights, const void *x,
                                const moe4_router_tokens *tokens, size_t n_tokens, const moe4_workspace *workspace, void *stream) {
    moe4_begin(r->ctx);
    size_t logits_bytes = 0, linear_bytes = 0;
    moe4_router_tokens known;
    if (r->ckpt) MOE4_TRY(moe4_checkpoint_watch(r->ckpt));
    MOE4_TRY(workspace_parts(r, n_tokens, &logits_bytes, &linear_bytes));
    MOE4_TRY(moe4_workspace_check(r->ctx, "moe4_router_forward", workspace, logits_bytes + linear_bytes));
    MOE4_CHECK(r->ctx, !n_tokens || (topk_ids && topk_weights && x), MOE4_ERROR_ARGUMENT, "moe4_router_forward: a NULL buffer");
    MOE4_TRY(check_tokens(r, &known, tokens, n_tokens));
    float *logits = workspace->data;
    const moe4_workspace rest = {(char *)workspace->data + logits_bytes, linear_bytes};
    MOE4_TRY(moe4_linear_forward(r->logits, (void *const[]){logits}, NULL, x, n_tokens, &rest, stream));
    return choose(r, topk_ids, topk_weights, logits, &known, n_tokens, stream);
}

moe4_status moe4_router_select(const moe4_router *r, int32_t *topk_ids, float *topk_weights, const float *logits,
                               const moe4_router_tokens *tokens, size_t n_tokens, void *stream) {
    moe4_begin(r->ctx);
    moe4_router_tokens known;
    if (r->ckpt) MOE4_TRY(moe4_checkpoint_watch(r->ckpt));
    MOE4_CHECK(r->ctx, !n_tokens || (topk_ids && topk_weights && logits), MOE4_ERROR_ARGUMENT, "moe4_router_select: a NULL buffer");
    MOE4_TRY(check_tokens(r, &known, tokens, n_tokens));
    return choose(r, topk_ids, topk_weights, logits, &known, n_tokens, stream);
}
