/* The mixture-of-experts layer. run_stages is the index of the whole library. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "backend.h"
#include "checkpoint.h"
#include "fpenv.h"

/* ---- making a layer ---- */

static moe4_status check_expert(const moe4_moe *moe, const moe4_expert *e, const moe4_expert *first, const char *name, size_t number) {
    const moe4_ctx *ctx = moe->ctx;
    const struct {
        const char *name;
        const moe4_weight *w, *like;
        size_t rows, cols;
    } proj[] = {{"up", &e->up, &first->up, first->up.rows, first->up.cols},
                {"down", &e->down, &first->down, first->up.cols, first->up.rows},
                {"gate", &e->gate, &first->up, first->up.rows, first->up.cols}};
    for (int p = 0; p < (moe->o.activation == MOE4_RELU2 ? 2 : 3); p++) {
        char what[64];
        snprintf(what, sizeof what, "%s %zu %s", name, number, proj[p].name);
        const moe4_weight *w = proj[p].w;
        MOE4_TRY(moe4_weight_check(ctx, w, what));
        MOE4_CHECK(ctx, w->rows == proj[p].rows && w->cols == proj[p].cols, MOE4_ERROR_ARGUMENT, "%s: shape %zu x %zu, need %zu x %zu",
                   what, w->rows, w->cols, proj[p].rows, proj[p].cols);
        MOE4_CHECK(ctx, w->dtype == proj[p].like->dtype, MOE4_ERROR_ARGUMENT, "%s: dtype %s beside %s", what, moe4_dtype_name(w->dtype),
                   moe4_dtype_name(proj[p].like->dtype));
        MOE4_TRY(moe4_scales_check(ctx, w, what));
    }
    return MOE4_OK;
}

static moe4_status check_input_scales(const moe4_moe *moe, const struct moe4_experts *g, const char *name) {
    const moe4_ctx *ctx = moe->ctx;
    bool gated = moe->o.activation != MOE4_RELU2;
    for (size_t e = 0; e < g->n; e++) {
        const moe4_expert *x = &g->expert[e];
        MOE4_CHECK(ctx, g->act_x != MOE4_ACT_STATIC || ((x->gate.input_scale > 0 || !gated) && x->up.input_scale > 0), MOE4_ERROR_ARGUMENT,
                   "%s %zu: mode static needs an input_scale for gate and up (%g, %g)", name, e, (double)x->gate.input_scale,
                   (double)x->up.input_scale);
        MOE4_CHECK(ctx, g->act_h != MOE4_ACT_STATIC || x->down.input_scale > 0, MOE4_ERROR_ARGUMENT,
                   "%s %zu: mode static needs an input_scale for down (%g)", name, e, (double)x->down.input_scale);
    }
    return MOE4_OK;
}

static moe4_status widen_expert(const moe4_moe *moe, moe4_expert *e, struct moe4_wide *wide, const char *name, size_t number) {
    char what[64];
    snprintf(what, sizeof what, "%s %zu up", name, number);
    MOE4_TRY(moe4_fp8_widen(moe->ctx, &e->up, &wide->up, what));
    snprintf(what, sizeof what, "%s %zu down", name, number);
    MOE4_TRY(moe4_fp8_widen(moe->ctx, &e->down, &wide->down, what));
    snprintf(what, sizeof what, "%s %zu gate", name, number);
    return moe->o.activation == MOE4_RELU2 ? MOE4_OK : moe4_fp8_widen(moe->ctx, &e->gate, &wide->gate, what);
}

static void free_wide(const moe4_ctx *ctx, const struct moe4_wide *wide) {
    moe4_free(ctx, wide->gate);
    moe4_free(ctx, wide->up);
    moe4_free(ctx, wide->down);
}

/* The copy that the layer keeps: no gate where none is read, global 1 where there is none. */
static void settle_expert(const moe4_moe *moe, moe4_expert *e) {
    if (moe->o.activation == MOE4_RELU2) e->gate = (moe4_weight){0};
    if (e->up.dtype != MOE4_NVFP4) e->gate.global = e->up.global = 1;
    if (e->down.dtype != MOE4_NVFP4) e->down.global = 1;
}

static moe4_status add_group(moe4_moe *moe, const moe4_expert *experts, size_t n, const char *name) {
    const moe4_ctx *ctx = moe->ctx;
    struct moe4_experts *g = &moe->group[moe->n_groups];
    g->expert = moe4_calloc(ctx, n, sizeof *experts, name);
    if (!g->expert) return MOE4_ERROR_MEMORY;
    memcpy(g->expert, experts, n * sizeof *experts);
    g->n = n;
    g->hidden = experts->up.cols;
    g->intermediate = experts->up.rows;
    g->act_x = moe4_act_resolve(moe->o.act, experts->up.dtype);
    g->act_h = moe4_act_resolve(moe->o.act, experts->down.dtype);
    moe->n_groups++; /* from here on destroy releases it */
    g->wide = moe4_calloc(ctx, n, sizeof *g->wide, name);
    if (!g->wide) return MOE4_ERROR_MEMORY;
    for (size_t e = 0; e < n; e++) {
        MOE4_TRY(widen_expert(moe, &g->expert[e], &g->wide[e], name, e));
        MOE4_TRY(check_expert(moe, &g->expert[e], g->expert, name, e));
        settle_expert(moe, &g->expert[e]);
    }
    MOE4_TRY(check_input_scales(moe, g, name));
    MOE4_CHECK(ctx, g->hidden == moe->group[0].hidden, MOE4_ERROR_ARGUMENT, "%s: hidden size %zu, the routed experts have %zu", name,
               g->hidden, moe->group[0].hidden);
    return ctx->backend->experts_prepare(moe->ctx, g);
}

static moe4_status check_options(const moe4_ctx *ctx, moe4_moe_options *o) {
    MOE4_CHECK(ctx, o->n_experts >= 1, MOE4_ERROR_ARGUMENT, "options.n_experts: 0");
    MOE4_CHECK(ctx, o->first_expert < o->n_experts, MOE4_ERROR_ARGUMENT, "options.first_expert: %zu of %zu experts", o->first_expert,
               o->n_experts);
    if (!o->n_local) o->n_local = o->n_experts - o->first_expert;
    MOE4_CHECK(ctx, o->n_local <= o->n_experts - o->first_expert, MOE4_ERROR_ARGUMENT,
               "options.n_local: experts %zu + %zu, but there are %zu", o->first_expert, o->n_local, o->n_experts);
    MOE4_CHECK(ctx, o->n_experts <= INT32_MAX, MOE4_ERROR_ARGUMENT, "options.n_experts: %zu, at most %d", o->n_experts, INT32_MAX);
    MOE4_CHECK(ctx, o->top_k >= 1 && o->top_k <= o->n_experts, MOE4_ERROR_ARGUMENT, "options.top_k: %zu of %zu experts", o->top_k,
               o->n_experts);
    MOE4_CHECK(ctx, (unsigned)o->act <= MOE4_ACT_BF16, MOE4_ERROR_ARGUMENT, "options.act: %d is no mode", (int)o->act);
    MOE4_CHECK(ctx, (unsigned)o->activation <= MOE4_RELU2, MOE4_ERROR_ARGUMENT, "options.activation: %d is no activation",
               (int)o->activation);
    MOE4_CHECK(ctx, (unsigned)o->weighting <= MOE4_WEIGHT_ON_X, MOE4_ERROR_ARGUMENT, "options.weighting: %d is no weighting",
               (int)o->weighting);
    if (o->swiglu_alpha == 0) o->swiglu_alpha = 1;
    MOE4_CHECK(ctx, isfinite(o->swiglu_alpha) && isfinite(o->swiglu_beta), MOE4_ERROR_ARGUMENT, "options: swiglu_alpha %g, swiglu_beta %g",
               (double)o->swiglu_alpha, (double)o->swiglu_beta);
    bool plain = o->swiglu_alpha == 1 && o->swiglu_beta == 0 && o->swiglu_limit == 0;
    MOE4_CHECK(ctx, o->activation == MOE4_SWIGLU || plain, MOE4_ERROR_ARGUMENT,
               "options: swiglu_limit %g, swiglu_alpha %g, swiglu_beta %g belong to SwiGLU", (double)o->swiglu_limit,
               (double)o->swiglu_alpha, (double)o->swiglu_beta);
    MOE4_CHECK(ctx, isfinite(o->swiglu_limit) && o->swiglu_limit >= 0, MOE4_ERROR_ARGUMENT, "options.swiglu_limit: %g",
               (double)o->swiglu_limit);
    MOE4_TRY(moe4_io_check(ctx, o->x_dtype, o->y_dtype));
    MOE4_CHECK(ctx, o->ids_dtype == MOE4_I32 || o->ids_dtype == MOE4_I64, MOE4_ERROR_ARGUMENT, "options.ids_dtype: %s (I32 or I64)",
               moe4_dtype_name(o->ids_dtype));
    return MOE4_OK;
}

static moe4_status check_resolved(moe4_moe *moe) {
    const moe4_ctx *ctx = moe->ctx;
    moe4_moe_options *o = &moe->o;
    moe->hidden = moe->group[0].hidden;
    if (!o->x_ld) o->x_ld = moe->hidden;
    if (!o->y_ld) o->y_ld = moe->hidden;
    MOE4_CHECK(ctx, o->x_ld >= moe->hidden && o->y_ld >= moe->hidden, MOE4_ERROR_ARGUMENT, "options: x_ld %zu, y_ld %zu, hidden size %zu",
               o->x_ld, o->y_ld, moe->hidden);
    MOE4_CHECK(ctx, o->x_dtype != MOE4_NVFP4 || moe->hidden % MOE4_BLOCK == 0, MOE4_ERROR_ARGUMENT,
               "options.x_dtype: NVFP4, and the hidden size %zu is not a multiple of %d", moe->hidden, MOE4_BLOCK);
    bool runs = o->act == MOE4_ACT_DEFAULT;
    for (size_t g = 0; g < moe->n_groups; g++) runs |= moe->group[g].act_x == o->act || moe->group[g].act_h == o->act;
    MOE4_CHECK(ctx, runs, MOE4_ERROR_ARGUMENT, "options.act: mode %s, but the experts are %s", moe4_act_name(o->act),
               moe4_dtype_name(moe->group[0].expert->up.dtype));
    if (o->act == MOE4_ACT_DEFAULT) o->act = moe->group[0].act_x;
    return MOE4_OK;
}

static moe4_status moe_init(moe4_moe *moe, const moe4_expert *experts) {
    MOE4_TRY(check_options(moe->ctx, &moe->o));
    MOE4_TRY(add_group(moe, experts, moe->o.n_local, "expert"));
    if (moe->o.shared) MOE4_TRY(add_group(moe, moe->o.shared, 1, "shared expert"));
    moe->o.shared = NULL; /* was the caller's */
    return check_resolved(moe);
}

moe4_status moe4_moe_create(moe4_moe **moe_ret, moe4_ctx *ctx, const moe4_expert *experts, const moe4_moe_options *options) {
    moe4_begin(ctx);
    MOE4_CHECK(ctx, moe_ret, MOE4_ERROR_ARGUMENT, "moe4_moe_create: NULL moe_ret");
    *moe_ret = NULL;
    MOE4_CHECK(ctx, experts && options, MOE4_ERROR_ARGUMENT, "moe4_moe_create: NULL %s", experts ? "options" : "experts");
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    MOE4_CHECK(ctx, moe4_options_read(&o, sizeof o, options), MOE4_ERROR_ARGUMENT, "options: struct_size is wrong, or a field is unknown");
    moe4_moe *moe = moe4_calloc(ctx, 1, sizeof *moe, "layer");
    if (!moe) return MOE4_ERROR_MEMORY;
    moe->ctx = ctx;
    moe->o = o;
    moe4_status status = moe_init(moe, experts);
    if (status != MOE4_OK) {
        moe4_moe_destroy(moe);
        return status;
    }
    *moe_ret = moe;
    return MOE4_OK;
}

void moe4_moe_destroy(moe4_moe *moe) {
    if (!moe) return;
    for (size_t g = 0; g < moe->n_groups; g++) {
        moe->ctx->backend->experts_release(moe->ctx, &moe->group[g]);
        for (size_t e = 0; moe->group[g].wide && e < moe->group[g].n; e++) free_wide(moe->ctx, &moe->group[g].wide[e]);
        moe4_free(moe->ctx, moe->group[g].wide);
        moe4_free(moe->ctx, moe->group[g].expert);
    }
    moe4_free(moe->ctx, moe);
}

moe4_act moe4_moe_act(const moe4_moe *moe) {
    return moe->o.act;
}

static moe4_status put_expert(moe4_moe *moe, struct moe4_experts *g, size_t e, moe4_expert *expert) {
    struct moe4_experts one = *g;
    one.expert = expert;
    one.n = 1;
    MOE4_TRY(check_expert(moe, expert, g->expert, "expert", e));
    MOE4_TRY(check_input_scales(moe, &one, "new expert"));
    settle_expert(moe, expert);
    const moe4_expert old = g->expert[e];
    g->expert[e] = *expert;
    moe4_status status = moe->ctx->backend->expert_replaced(moe->ctx, g, e);
    if (status != MOE4_OK) g->expert[e] = old;
    return status;
}

moe4_status moe4_moe_replace_expert(moe4_moe *moe, size_t e, const moe4_expert *expert) {
    moe4_ctx *ctx = moe->ctx;
    moe4_begin(ctx);
    struct moe4_experts *g = &moe->group[0];
    MOE4_CHECK(ctx, e < g->n, MOE4_ERROR_ARGUMENT, "moe4_moe_replace_expert: expert %zu of %zu", e, g->n);
    MOE4_CHECK(ctx, expert, MOE4_ERROR_ARGUMENT, "moe4_moe_replace_expert: NULL expert");
    moe4_expert copy = *expert;
    struct moe4_wide wide = {NULL, NULL, NULL};
    moe4_status status = widen_expert(moe, &copy, &wide, "expert", e);
    if (status == MOE4_OK) status = put_expert(moe, g, e, &copy);
    if (status != MOE4_OK) {
        free_wide(ctx, &wide);
        return status;
    }
    free_wide(ctx, &g->wide[e]);
    g->wide[e] = wide;
    return MOE4_OK;
}

/* ---- running it ---- */

static moe4_status workspace_bytes(const struct moe4_moe_call *c, size_t *bytes_ret) {
    const moe4_moe *moe = c->moe;
    size_t n_slots = c->n_rows;
    MOE4_CHECK(moe->ctx, c->by_rows || moe4_mul(&n_slots, c->n_tokens, moe->o.top_k), MOE4_ERROR_ARGUMENT, "n_tokens: %zu", c->n_tokens);
    MOE4_CHECK(moe->ctx, n_slots <= INT32_MAX && c->n_tokens <= INT32_MAX, MOE4_ERROR_ARGUMENT, "%zu tokens, %zu %s: at most %d",
               c->n_tokens, n_slots, c->by_rows ? "rows" : "slots", INT32_MAX);
    MOE4_CHECK(moe->ctx, moe->ctx->backend->moe_bytes(bytes_ret, c), MOE4_ERROR_ARGUMENT, "a workspace for %zu tokens, %zu %s is too large",
               c->n_tokens, n_slots, c->by_rows ? "rows" : "slots");
    return MOE4_OK;
}

moe4_status moe4_moe_workspace_bytes(const moe4_moe *moe, size_t *bytes_ret, size_t n_tokens) {
    moe4_begin(moe->ctx);
    return workspace_bytes(&(struct moe4_moe_call){.moe = moe, .n_tokens = n_tokens}, bytes_ret);
}

moe4_status moe4_moe_rows_workspace_bytes(const moe4_moe *moe, size_t *bytes_ret, size_t n_rows, size_t n_tokens) {
    moe4_begin(moe->ctx);
    return workspace_bytes(&(struct moe4_moe_call){.moe = moe, .by_rows = true, .n_rows = n_rows, .n_tokens = n_tokens}, bytes_ret);
}

static moe4_status check_call(const struct moe4_moe_call *c, const moe4_workspace *workspace, const char *name) {
    const moe4_ctx *ctx = c->moe->ctx;
    size_t need;
    if (c->moe->ckpt) MOE4_TRY(moe4_checkpoint_watch(c->moe->ckpt));
    MOE4_TRY(workspace_bytes(c, &need));
    MOE4_TRY(moe4_workspace_check(ctx, name, workspace, need));
    bool reads = c->by_rows ? c->n_rows > 0 : c->n_tokens > 0, writes = reads || c->n_tokens > 0;
    MOE4_CHECK(ctx, (c->x || !reads) && (c->y || !writes), MOE4_ERROR_ARGUMENT, "%s: NULL %s", name, c->x ? "y" : "x");
    return reads ? moe4_rows_check(ctx, c->x, c->moe->o.x_dtype) : MOE4_OK;
}

/* The index of the library: what a layer does, in order. */
static moe4_status run_stages(const struct moe4_backend *b, const struct moe4_moe_call *c) {
    MOE4_TRY(b->begin(c));      /* carve the workspace */
    MOE4_TRY(b->dispatch(c));   /* slots [T,k] sorted by expert */
    MOE4_TRY(b->quantize_x(c)); /* rows of x as the products read them */
    MOE4_TRY(b->gate_up(c));    /* g, u = x @ Wgate^T, x @ Wup^T; h = SwiGLU(g, u) */
    MOE4_TRY(b->quantize_h(c)); /* rows of h likewise */
    MOE4_TRY(b->down(c));       /* o = h @ Wdown^T, one row for each slot */
    return b->combine(c);       /* y[t] = sum of weight[t,k] * o in slot order, rounded once */
}

static moe4_status run(const struct moe4_moe_call *c) {
    struct moe4_fpenv env = moe4_fpenv_enter();
    moe4_status status = run_stages(c->moe->ctx->backend, c);
    moe4_fpenv_leave(env);
    return status;
}

moe4_status moe4_moe_forward(const moe4_moe *moe, void *y, const void *x, const void *topk_ids, const float *topk_weights, size_t n_tokens,
                             const moe4_workspace *workspace, void *stream) {
    const struct moe4_moe_call c = {.moe = moe,
                                    .y = y,
                                    .x = x,
                                    .ids = topk_ids,
                                    .weights = topk_weights,
                                    .n_tokens = n_tokens,
                                    .workspace = workspace ? workspace->data : NULL,
                                    .stream = stream};
    moe4_begin(moe->ctx);
    MOE4_TRY(check_call(&c, workspace, "moe4_moe_forward"));
    MOE4_CHECK(moe->ctx, !n_tokens || (topk_ids && topk_weights) || (moe->o.n_experts == 1 && !topk_ids && !topk_weights),
               MOE4_ERROR_ARGUMENT, "moe4_moe_forward: NULL %s, and the layer has %zu experts", topk_ids ? "topk_weights" : "topk_ids",
               moe->o.n_experts);
    return run(&c);
}

moe4_status moe4_moe_forward_sorted(const moe4_moe *moe, void *y, const void *x, const int32_t *offsets, const float *weights,
                                    const int32_t *row_token, size_t n_rows, size_t n_tokens, const moe4_workspace *workspace,
                                    void *stream) {
    const struct moe4_moe_call c = {.moe = moe,
                                    .y = y,
                                    .x = x,
                                    .weights = weights,
                                    .n_tokens = row_token ? n_tokens : 0,
                                    .workspace = workspace ? workspace->data : NULL,
                                    .stream = stream,
                                    .by_rows = true,
                                    .offsets = offsets,
                                    .row_token = row_token,
                                    .n_rows = n_rows};
    moe4_begin(moe->ctx);
    MOE4_TRY(check_call(&c, workspace, "moe4_moe_forward_sorted"));
    MOE4_CHECK(moe->ctx, offsets, MOE4_ERROR_ARGUMENT, "offsets: NULL");
    if (moe->ctx->backend->is_device) return run(&c);
    MOE4_TRY(moe4_offsets_check(moe->ctx, offsets, moe->o.n_local, n_rows));
    for (size_t r = 0; row_token && r < n_rows; r++)
        MOE4_CHECK(moe->ctx, row_token[r] < 0 || (size_t)row_token[r] < n_tokens, MOE4_ERROR_ARGUMENT, "row_token[%zu]: %d of %zu tokens",
                   r, row_token[r], n_tokens);
    return run(&c);
}

moe4_status moe4_moe_forward_batched(const moe4_moe *moe, void *y, const void *x, const int32_t *counts, const float *weights,
                                     size_t max_rows, const moe4_workspace *workspace, void *stream) {
    struct moe4_moe_call c = {.moe = moe,
                              .y = y,
                              .x = x,
                              .weights = weights,
                              .workspace = workspace ? workspace->data : NULL,
                              .stream = stream,
                              .by_rows = true,
                              .counts = counts,
                              .max_rows = max_rows};
    moe4_begin(moe->ctx);
    MOE4_CHECK(moe->ctx, moe4_mul(&c.n_rows, moe->o.n_local, max_rows), MOE4_ERROR_ARGUMENT, "max_rows: %zu for each of %zu experts",
               max_rows, moe->o.n_local);
    MOE4_TRY(check_call(&c, workspace, "moe4_moe_forward_batched"));
    MOE4_CHECK(moe->ctx, counts, MOE4_ERROR_ARGUMENT, "counts: NULL");
    for (size_t e = 0; e < moe->o.n_local && !moe->ctx->backend->is_device; e++)
        MOE4_CHECK(moe->ctx, counts[e] >= 0 && (size_t)counts[e] <= max_rows, MOE4_ERROR_ARGUMENT, "counts[%zu]: %d of max_rows %zu", e,
                   counts[e], max_rows);
    return run(&c);
}

moe4_status moe4_moe_report_read(const moe4_moe *moe, moe4_moe_report *report_ret, uint64_t *tokens_per_expert,
                                 const moe4_workspace *workspace, void *stream) {
    moe4_begin(moe->ctx);
    MOE4_CHECK(moe->ctx, report_ret, MOE4_ERROR_ARGUMENT, "moe4_moe_report_read: NULL report_ret");
    size_t need;
    MOE4_TRY(moe4_moe_workspace_bytes(moe, &need, 0));
    MOE4_TRY(moe4_workspace_check(moe->ctx, "moe4_moe_report_read", workspace, need));
    struct moe4_moe_call c = {.moe = moe, .workspace = workspace->data, .stream = stream};
    moe4_moe_report report = MOE4_MOE_REPORT_INIT;
    MOE4_TRY(moe->ctx->backend->report(&c, &report, tokens_per_expert));
    moe4_struct_write(report_ret, &report, sizeof report);
    return MOE4_OK;
}

const char *moe4_stage_name(moe4_stage stage) {
    static const char *const names[] = {"dispatch", "quantize x", "gate/up", "quantize h", "down", "combine"};
    return (unsigned)stage < MOE4_N_STAGES ? names[stage] : "?";
}
