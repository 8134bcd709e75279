/* The stages of a layer on the device. Kernels fuse stages: dispatch also rounds x, and on sm_90 gate_up goes on to down, except where
 * the largest |h| of the whole batch must be known in between (mode tensor). The others then do nothing. The shared expert is a second
 * run whose slots are the tokens. Nothing of a call is kept on the host: a stage finds its buffers by the walk that counted them. */
#include "device.h"

struct runs {
    struct moe4_layer_run run[MOE4_MAX_GROUPS];
    bool fits;
    size_t bytes;
};

/* Runs of a layer for n_tokens at `base` (NULL: counts). */
static struct runs layer_runs(const moe4_moe *moe, size_t n_tokens, void *base) {
    const struct moe4_cuda_device *device = moe4_cuda_of(moe->ctx);
    struct runs all = {.fits = true};
    struct moe4_carver c = {.base = base};
    for (size_t g = 0; g < moe->n_groups; g++) {
        struct moe4_layer_run *r = &all.run[g];
        const struct moe4_layer_run *first = &all.run[0];
        *r = (struct moe4_layer_run){.w = *(const struct moe4_packed_experts *)moe->group[g].prepared,
                                     .act = moe->group[g].act_x,
                                     .activation = moe->o.activation,
                                     .alpha = moe->o.swiglu_alpha,
                                     .beta = moe->o.swiglu_beta,
                                     .limit = moe->o.swiglu_limit,
                                     .n_tokens = (int)n_tokens,
                                     .top_k = g ? 1 : (int)moe->o.top_k,
                                     .owner = moe,
                                     .x_dtype = moe->o.x_dtype,
                                     .x_in_ld = moe->o.x_ld};
        if (g && r->act == first->act && r->act != MOE4_ACT_STATIC) {
            r->x_is_ready = 1;
            r->x = first->x;
            r->x_factor = first->x_factor;
        }
        moe4_cuda_choose_kernel(r, device);
        moe4_cuda_carve_run(&c, r, true);
        long long tiles = r->w.gate_up_tiles > r->w.down_tiles ? r->w.gate_up_tiles : r->w.down_tiles;
        all.fits &= r->max_tiles * tiles < INT32_MAX; /* work items are counted in an int */
    }
    all.bytes = c.used;
    all.fits &= !c.overflow;
    return all;
}

static struct runs call_runs(const struct moe4_moe_call *c) {
    struct runs all = layer_runs(c->moe, c->n_tokens, c->workspace);
    for (size_t g = 0; g < c->moe->n_groups; g++) {
        all.run[g].x_in = c->x;
        if (g) continue;
        all.run[g].ids = c->ids;
        all.run[g].ids_are_64bit = c->moe->o.ids_dtype == MOE4_I64;
        all.run[g].first_expert = (int64_t)c->moe->o.first_expert;
    }
    return all;
}

moe4_status moe4_cuda_moe_check(const moe4_ctx *ctx, const moe4_moe_options *o) {
    MOE4_CHECK(ctx, o->activation != MOE4_RELU2, MOE4_ERROR_UNSUPPORTED, "options.activation: RELU2 does not run on a device yet");
    MOE4_CHECK(ctx, o->weighting == MOE4_WEIGHT_AFTER_DOWN, MOE4_ERROR_UNSUPPORTED,
               "options.weighting: %d; on a device only AFTER_DOWN yet", (int)o->weighting);
    MOE4_CHECK(ctx, o->x_dtype != MOE4_NVFP4, MOE4_ERROR_UNSUPPORTED, "options.x_dtype: NVFP4; on a device F32, BF16 or F16 yet");
    return MOE4_OK;
}

bool moe4_cuda_moe_bytes(size_t *bytes, const struct moe4_moe_call *c) {
    struct runs all = layer_runs(c->moe, c->n_tokens, NULL);
    *bytes = all.bytes;
    return all.fits;
}

moe4_status moe4_cuda_begin(const struct moe4_moe_call *c) {
    const moe4_ctx *ctx = c->moe->ctx;
    MOE4_TRY(moe4_cuda_check_pointer(ctx, c->workspace, "moe4_moe_forward: workspace"));
    if (!c->n_tokens) return MOE4_OK;
    MOE4_TRY(moe4_cuda_check_pointer(ctx, c->x, "moe4_moe_forward: x"));
    MOE4_TRY(moe4_cuda_check_pointer(ctx, c->y, "moe4_moe_forward: y"));
    if (!c->ids) return MOE4_OK;
    MOE4_TRY(moe4_cuda_check_pointer(ctx, c->ids, "moe4_moe_forward: topk_ids"));
    return moe4_cuda_check_pointer(ctx, c->weights, "moe4_moe_forward: topk_weights");
}

/* ---- stages, for every run ---- */

typedef cudaError_t (*stage_fn)(const struct moe4_layer_run *run, const struct moe4_cuda_device *device, cudaStream_t stream);

static moe4_status each_run(const struct moe4_moe_call *c, stage_fn stage, const char *what) {
    const moe4_ctx *ctx = c->moe->ctx;
    struct runs all = call_runs(c);
    struct moe4_cuda_current saved;
    cudaError_t error = cudaSuccess;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    for (size_t g = 0; g < c->moe->n_groups && error == cudaSuccess; g++) error = stage(&all.run[g], moe4_cuda_of(ctx), c->stream);
    moe4_cuda_leave(saved);
    return moe4_cuda_check(ctx, error, what);
}

static cudaError_t prepare(const struct moe4_layer_run *run, const struct moe4_cuda_device *device, cudaStream_t stream) {
    (void)device;
    return moe4_cuda_prepare(run, stream);
}

static cudaError_t gate_up(const struct moe4_layer_run *run, const struct moe4_cuda_device *device, cudaStream_t stream) {
    if (!moe4_cuda_uses_sm90(device)) return moe4_cuda_gate_up(run, stream);
    int phases = run->act == MOE4_ACT_TENSOR ? MOE4_PHASE_GATE_UP : MOE4_PHASE_GATE_UP | MOE4_PHASE_DOWN;
    return moe4_cuda_decode_sm90(run, phases, device->n_sms, stream);
}

static cudaError_t quantize_h(const struct moe4_layer_run *run, const struct moe4_cuda_device *device, cudaStream_t stream) {
    bool done = moe4_cuda_uses_sm90(device) && run->act != MOE4_ACT_TENSOR;
    return done ? cudaSuccess : moe4_cuda_quantize_h(run, stream);
}

static cudaError_t down(const struct moe4_layer_run *run, const struct moe4_cuda_device *device, cudaStream_t stream) {
    if (!moe4_cuda_uses_sm90(device)) return moe4_cuda_down(run, stream);
    return run->act == MOE4_ACT_TENSOR ? moe4_cuda_decode_sm90(run, MOE4_PHASE_DOWN, device->n_sms, stream) : cudaSuccess;
}

moe4_status moe4_cuda_dispatch(const struct moe4_moe_call *c) {
    return each_run(c, prepare, "dispatch"); /* without tokens too: it writes what the report reads */
}

moe4_status moe4_cuda_quantize_x(const struct moe4_moe_call *c) {
    (void)c; /* dispatch did */
    return MOE4_OK;
}

moe4_status moe4_cuda_gate_up_stage(const struct moe4_moe_call *c) {
    return c->n_tokens ? each_run(c, gate_up, "gate/up") : MOE4_OK;
}

moe4_status moe4_cuda_quantize_h_stage(const struct moe4_moe_call *c) {
    return c->n_tokens ? each_run(c, quantize_h, "quantize h") : MOE4_OK;
}

moe4_status moe4_cuda_down_stage(const struct moe4_moe_call *c) {
    return c->n_tokens ? each_run(c, down, "down") : MOE4_OK;
}

moe4_status moe4_cuda_combine_stage(const struct moe4_moe_call *c) {
    const moe4_moe *moe = c->moe;
    if (!c->n_tokens) return MOE4_OK;
    struct runs all = call_runs(c);
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(moe->ctx, &saved));
    cudaError_t error =
        moe4_cuda_combine(&all.run[0], c->y, moe->o.y_dtype, moe->o.y_ld, c->weights, moe->n_groups > 1 ? all.run[1].o : NULL, c->stream);
    moe4_cuda_leave(saved);
    return moe4_cuda_check(moe->ctx, error, "combine");
}

/* ---- the report: counted on the host from what the kernels left ---- */

static moe4_status fetch(const moe4_ctx *ctx, void *dst, const void *src, size_t bytes, void *stream) {
    CUDA_TRY(ctx, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, stream), "moe4_moe_report_read");
    return moe4_cuda_check(ctx, cudaStreamSynchronize(stream), "moe4_moe_report_read");
}

static size_t weight_bytes(const moe4_expert *x) {
    size_t n = x->gate.rows * x->gate.cols + x->up.rows * x->up.cols + x->down.rows * x->down.cols;
    return n / 2 + n / MOE4_BLOCK;
}

/* The sum of v[0 .. n) of a device array, or of v[index[i]]. */
static moe4_status sum(const moe4_ctx *ctx, uint64_t *sum_ret, const int *v, size_t n_v, const int *index, size_t n, void *stream) {
    if (!v || !n) return MOE4_OK;
    int *host = moe4_calloc(ctx, n_v, sizeof *host, "moe4_moe_report_read");
    if (!host) return MOE4_ERROR_MEMORY;
    moe4_status status = fetch(ctx, host, v, n_v * sizeof *host, stream);
    for (size_t i = 0; status == MOE4_OK && i < n; i++) *sum_ret += (uint64_t)host[index ? index[i] : (int)i];
    moe4_free(ctx, host);
    return status;
}

static moe4_status report_run(const moe4_moe *moe, const struct moe4_layer_run *r, moe4_moe_report *report, void *stream) {
    const moe4_ctx *ctx = moe->ctx;
    struct moe4_run_state state;
    MOE4_TRY(fetch(ctx, &state, r->state, sizeof state, stream));
    size_t tokens = (size_t)r->n_tokens, all_slots = tokens * (size_t)r->top_k, n = (size_t)state.n_slots;
    if (r->act != MOE4_ACT_W4A16) MOE4_TRY(sum(ctx, &report->n_saturated_blocks, r->h_saturated, n, NULL, n, stream));
    if (r->x_is_ready || !tokens) return MOE4_OK;
    if (r->act == MOE4_ACT_STATIC) {
        int *slots = moe4_calloc(ctx, n, sizeof *slots, "moe4_moe_report_read");
        if (!slots) return MOE4_ERROR_MEMORY;
        moe4_status status = fetch(ctx, slots, r->slots, n * sizeof *slots, stream);
        if (status == MOE4_OK) status = sum(ctx, &report->n_saturated_blocks, r->x_saturated, all_slots, slots, n, stream);
        moe4_free(ctx, slots);
        MOE4_TRY(status);
    } else {
        MOE4_TRY(sum(ctx, &report->n_saturated_blocks, r->x_saturated, tokens, NULL, tokens, stream));
    }
    uint64_t bad = 0;
    MOE4_TRY(sum(ctx, &bad, r->x_bad, tokens, NULL, tokens, stream));
    report->n_nonfinite_rows = bad;
    return MOE4_OK;
}

static moe4_status report_experts(const moe4_moe *moe, const struct moe4_layer_run *r, moe4_moe_report *report, uint64_t *tokens_per_expert,
                                  void *stream) {
    size_t n = (size_t)r->w.n;
    int *counts = moe4_calloc(moe->ctx, n, sizeof *counts, "moe4_moe_report_read");
    if (!counts) return MOE4_ERROR_MEMORY;
    moe4_status status = fetch(moe->ctx, counts, r->expert_slots, n * sizeof *counts, stream);
    for (size_t e = 0; status == MOE4_OK && e < n; e++) {
        report->n_slots += (uint64_t)counts[e];
        report->n_experts_hit += counts[e] > 0;
        if (counts[e]) report->weight_bytes += weight_bytes(&moe->group[0].expert[e]);
        if (tokens_per_expert) tokens_per_expert[e] = (uint64_t)counts[e];
    }
    moe4_free(moe->ctx, counts);
    return status;
}

static moe4_status read_report(const struct moe4_moe_call *c, moe4_moe_report *report, uint64_t *tokens_per_expert) {
    const moe4_moe *moe = c->moe;
    struct moe4_run_state state;
    MOE4_TRY(fetch(moe->ctx, &state, c->workspace, sizeof state, c->stream));
    MOE4_CHECK(moe->ctx, state.owner == moe && state.n_tokens >= 0, MOE4_ERROR_ARGUMENT,
               "moe4_moe_report_read: no forward of this layer used the workspace");
    report->n_tokens = (uint64_t)state.n_tokens;
    struct runs all = layer_runs(moe, report->n_tokens, c->workspace);
    report->kernels = moe4_cuda_kernels_name(&all.run[0], moe4_cuda_of(moe->ctx));
    MOE4_TRY(report_experts(moe, &all.run[0], report, tokens_per_expert, c->stream));
    if (moe->n_groups > 1 && state.n_tokens) report->weight_bytes += weight_bytes(moe->group[1].expert);
    for (size_t g = 0; g < moe->n_groups; g++) MOE4_TRY(report_run(moe, &all.run[g], report, c->stream));
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
