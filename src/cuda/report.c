/* The report of a call: counted on the host from what the kernels left in the workspace. */
#include "device.h"

static moe4_status fetch(const moe4_ctx *ctx, void *dst, const void *src, size_t bytes, void *stream) {
    CUDA_TRY(ctx, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, stream), "moe4_moe_report_read");
    return moe4_cuda_check(ctx, cudaStreamSynchronize(stream), "moe4_moe_report_read");
}

static size_t matrix_bytes(const moe4_weight *w) {
    size_t n = w->rows * w->cols;
    return w->dtype == MOE4_NVFP4 ? n / 2 + n / MOE4_BLOCK : n * (w->dtype == MOE4_F32 ? 4 : 2);
}

static size_t weight_bytes(const moe4_expert *x) {
    return matrix_bytes(&x->gate) + matrix_bytes(&x->up) + matrix_bytes(&x->down);
}

/* A device array of ints on the host; the caller frees it. */
static moe4_status fetch_ints(const moe4_ctx *ctx, int **host_ret, const int *v, size_t n, void *stream) {
    *host_ret = moe4_calloc(ctx, n, sizeof **host_ret, "moe4_moe_report_read");
    if (!*host_ret) return MOE4_ERROR_MEMORY;
    moe4_status status = n ? fetch(ctx, *host_ret, v, n * sizeof **host_ret, stream) : MOE4_OK;
    if (status != MOE4_OK) {
        moe4_free(ctx, *host_ret);
        *host_ret = NULL;
    }
    return status;
}

/* The sum of v[0 .. n_v), or of those that index[0 .. n) names. */
static moe4_status sum(const moe4_ctx *ctx, uint64_t *sum_ret, const int *v, size_t n_v, const int *index, size_t n, void *stream) {
    int *host;
    if (!index) n = n_v;
    if (!v || !n) return MOE4_OK;
    MOE4_TRY(fetch_ints(ctx, &host, v, n_v, stream));
    for (size_t i = 0; i < n; i++) *sum_ret += (uint64_t)host[index ? index[i] : (int)i];
    moe4_free(ctx, host);
    return MOE4_OK;
}

/* Tokens with a bad row among the n slots that were listed. Prepare notes it by token, round_rows by slot. */
static moe4_status bad_tokens(const moe4_ctx *ctx, uint64_t *n_ret, const struct moe4_layer_run *r, const int *slots, size_t n,
                              void *stream) {
    int *bad;
    size_t tokens = (size_t)r->n_tokens, k = (size_t)r->top_k, per_token = moe4_cuda_rounds_apart(r) ? k : 1;
    uint8_t *seen = moe4_calloc(ctx, tokens, 1, "moe4_moe_report_read");
    moe4_status status = seen ? fetch_ints(ctx, &bad, r->x_bad, tokens * per_token, stream) : MOE4_ERROR_MEMORY;
    for (size_t i = 0; status == MOE4_OK && i < n; i++) {
        size_t t = (size_t)slots[i] / k;
        bool is_bad = bad[per_token == k ? (size_t)slots[i] : t] != 0;
        *n_ret += is_bad && !seen[t];
        seen[t] |= is_bad;
    }
    if (status == MOE4_OK) moe4_free(ctx, bad);
    moe4_free(ctx, seen);
    return status;
}

/* What was counted of x: by listed slots, or by tokens. */
static moe4_status report_x(const moe4_ctx *ctx, const struct moe4_layer_run *r, size_t n_slots, uint64_t *n_saturated, uint64_t *n_bad,
                            void *stream) {
    size_t tokens = (size_t)r->n_tokens, all_slots = tokens * (size_t)r->top_k;
    bool by_slot = r->act == MOE4_ACT_STATIC || r->x_by_slot || r->slots_are != MOE4_SLOTS_BY_ID;
    int *slots = NULL;
    if (by_slot) MOE4_TRY(fetch_ints(ctx, &slots, r->slots, n_slots, stream));
    moe4_status status = sum(ctx, n_saturated, r->x_saturated, by_slot ? all_slots : tokens, slots, n_slots, stream);
    if (status == MOE4_OK && by_slot)
        status = bad_tokens(ctx, n_bad, r, slots, n_slots, stream);
    else if (status == MOE4_OK)
        status = sum(ctx, n_bad, r->x_bad, tokens, NULL, tokens, stream);
    moe4_free(ctx, slots);
    return status;
}

static moe4_status report_run(const moe4_moe *moe, const struct moe4_layer_run *r, moe4_moe_report *report, void *stream) {
    const moe4_ctx *ctx = moe->ctx;
    struct moe4_run_state state;
    uint64_t bad = 0;
    MOE4_TRY(fetch(ctx, &state, r->state, sizeof state, stream));
    size_t n = (size_t)state.n_slots;
    MOE4_TRY(sum(ctx, &report->n_saturated_blocks, r->h_saturated, n, NULL, n, stream));
    if (r->x_is_ready || !r->n_tokens) return MOE4_OK;
    MOE4_TRY(report_x(ctx, r, n, &report->n_saturated_blocks, &bad, stream));
    if (bad > report->n_nonfinite_rows) report->n_nonfinite_rows = bad;
    return MOE4_OK;
}

static moe4_status report_experts(const moe4_moe *moe, const struct moe4_layer_run *r, moe4_moe_report *report, uint64_t *tokens_per_expert,
                                  void *stream) {
    size_t n = (size_t)r->w.n;
    int *counts;
    MOE4_TRY(fetch_ints(moe->ctx, &counts, r->expert_slots, n, stream));
    for (size_t e = 0; e < n; e++) {
        report->n_slots += (uint64_t)counts[e];
        report->n_experts_hit += counts[e] > 0;
        if (counts[e]) report->weight_bytes += weight_bytes(&moe->group[0].expert[e]);
        if (tokens_per_expert) tokens_per_expert[e] = (uint64_t)counts[e];
    }
    moe4_free(moe->ctx, counts);
    return MOE4_OK;
}

static moe4_status read_report(const struct moe4_moe_call *c, moe4_moe_report *report, uint64_t *tokens_per_expert) {
    const moe4_moe *moe = c->moe;
    struct moe4_run_state state;
    MOE4_TRY(fetch(moe->ctx, &state, c->workspace, sizeof state, c->stream));
    MOE4_CHECK(moe->ctx, state.owner == moe && state.n_tokens >= 0, MOE4_ERROR_ARGUMENT,
               "moe4_moe_report_read: no forward of this layer used the workspace");
    struct moe4_extent x = {state.by_rows, (size_t)state.n_tokens, (size_t)(state.by_rows ? state.n_summed : state.n_tokens)};
    report->n_tokens = x.n_tokens;
    struct moe4_runs all = moe4_cuda_layer_runs(moe, x, c->workspace);
    report->kernels = moe4_cuda_kernels_name(&all.run[0], moe4_cuda_of(moe->ctx));
    report->n_kernels = moe4_cuda_kernel_ranges(report->kernel, &all.run[0], moe4_cuda_of(moe->ctx));
    MOE4_TRY(report_experts(moe, &all.run[0], report, tokens_per_expert, c->stream));
    if (all.n > 1 && state.n_tokens) report->weight_bytes += weight_bytes(moe->group[1].expert);
    for (size_t g = 0; g < all.n; g++) MOE4_TRY(report_run(moe, &all.run[g], report, c->stream));
    return MOE4_OK;
}

moe4_status moe4_cuda_report(const struct moe4_moe_call *c, moe4_moe_report *report, uint64_t *tokens_per_expert) {
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_check_pointer(c->moe->ctx, c->workspace, "moe4_moe_report_read: workspace"));
    MOE4_TRY(moe4_cuda_enter(c->moe->ctx, &saved));
    moe4_status status = read_report(c, report, tokens_per_expert);
    moe4_cuda_leave(saved);
    return status;
}
