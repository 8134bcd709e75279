/* The stages of a layer on the device. Kernels fuse stages: dispatch also rounds x, and on sm_90 gate_up goes on to down, except where
 * the largest |h| of the whole batch must be known in between (mode tensor). The others then do nothing. The shared expert is a second
 * run whose slots are the tokens. Nothing of a call is kept on the host: a stage finds its buffers by the walk that counted them. */
#include "device.h"

static struct moe4_extent call_extent(const struct moe4_moe_call *c) {
    return (struct moe4_extent){c->by_rows, c->n_rows, c->n_tokens};
}

/* Whether the shared expert reads the rows that the routed ones read. */
static bool shares_x(const struct moe4_layer_run *r, const struct moe4_layer_run *first) {
    return r->act == first->act && r->act != MOE4_ACT_STATIC && !first->x_by_slot;
}

/* Whether down and combine may go by slices of rows. */
static bool may_slice(const moe4_moe *moe) {
    for (size_t g = 0; g < moe->n_groups; g++)
        if (((const struct moe4_packed_experts *)moe->group[g].prepared)->bias_down) return false; /* another kernel combines */
    return true;
}

struct moe4_runs moe4_cuda_layer_runs(const moe4_moe *moe, struct moe4_extent x, void *base) {
    const struct moe4_cuda_device *device = moe4_cuda_of(moe->ctx);
    struct moe4_runs all = {.fits = true, .n = x.by_rows ? 1 : moe->n_groups};
    struct moe4_carver c = {.base = base};
    for (size_t g = 0; g < all.n; g++) {
        struct moe4_layer_run *r = &all.run[g];
        const struct moe4_layer_run *first = &all.run[0];
        *r = (struct moe4_layer_run){.w = *(const struct moe4_packed_experts *)moe->group[g].prepared,
                                     .act = moe->group[g].act_x,
                                     .act_h = moe->group[g].act_h,
                                     .activation = moe->o.activation,
                                     .alpha = moe->o.swiglu_alpha,
                                     .beta = moe->o.swiglu_beta,
                                     .limit = moe->o.swiglu_limit,
                                     .n_tokens = (int)(x.by_rows ? x.n_rows : x.n_tokens),
                                     .top_k = g || x.by_rows ? 1 : (int)moe->o.top_k,
                                     .slots_are = x.by_rows ? MOE4_SLOTS_SORTED : MOE4_SLOTS_BY_ID,
                                     .n_summed = (int)x.n_tokens,
                                     .x_by_slot = !g && moe->o.weighting == MOE4_WEIGHT_ON_X,
                                     .h_is_weighted = !g && moe->o.weighting == MOE4_WEIGHT_BEFORE_DOWN,
                                     .x_is_kept = !g && all.n > 1 && moe->group[0].act_x != MOE4_ACT_STATIC, /* for the shared expert */
                                     .may_slice = !g && !x.by_rows && may_slice(moe),
                                     .owner = moe,
                                     .x_dtype = moe->o.x_dtype,
                                     .x_in_ld = moe->o.x_ld};
        if (g && shares_x(r, first)) {
            r->x_is_ready = 1;
            r->x = first->x;
            r->x_wide = first->x_wide;
            r->x_factor = first->x_factor;
        }
        moe4_cuda_choose_kernel(r, device);
        moe4_cuda_carve_run(&c, r, true);
        long long tiles = r->w.gate_up_tiles > r->w.down_tiles ? r->w.gate_up_tiles : r->w.down_tiles;
        all.fits &= r->max_tiles * tiles < INT32_MAX; /* work items are counted in an int */
    }
    if (x.by_rows) {
        all.token_start = moe4_carve(&c, x.n_tokens + 1, sizeof *all.token_start);
        all.token_rows = moe4_carve(&c, x.n_rows, sizeof *all.token_rows);
    }
    all.bytes = c.used;
    all.fits &= !c.overflow;
    return all;
}

static struct moe4_runs call_runs(const struct moe4_moe_call *c) {
    const moe4_moe_options *o = &c->moe->o;
    struct moe4_runs all = moe4_cuda_layer_runs(c->moe, call_extent(c), c->workspace);
    struct moe4_layer_run *routed = &all.run[0];
    for (size_t g = 0; g < all.n; g++) {
        if (o->x_dtype == MOE4_NVFP4 && c->x)
            all.run[g].x_rows = *(const moe4_nvfp4_rows *)c->x;
        else
            all.run[g].x_in = c->x;
    }
    if (c->by_rows) {
        routed->slots_are = c->counts ? MOE4_SLOTS_BATCHED : MOE4_SLOTS_SORTED;
        routed->given = c->counts ? c->counts : c->offsets;
        routed->max_rows = (int)c->max_rows;
        if (!c->row_token && routed->prefill_from)
            routed->result = (struct moe4_result){c->y, o->y_dtype, o->y_ld, o->weighting == MOE4_WEIGHT_AFTER_DOWN ? c->weights : NULL};
    }
    if (o->weighting == MOE4_WEIGHT_ON_X) routed->weight_x = c->weights;
    if (o->weighting == MOE4_WEIGHT_BEFORE_DOWN) routed->weight_h = c->weights;
    routed->ids = c->ids;
    routed->ids_are_64bit = o->ids_dtype == MOE4_I64;
    routed->first_expert = (int64_t)o->first_expert;
    return all;
}

bool moe4_cuda_moe_bytes(size_t *bytes, const struct moe4_moe_call *c) {
    struct moe4_runs all = moe4_cuda_layer_runs(c->moe, call_extent(c), NULL);
    *bytes = all.bytes;
    for (size_t g = 0; all.fits && !c->by_rows && g < all.n; g++) {
        size_t fewer = moe4_cuda_last_mixed_batch(&all.run[g]);
        if (fewer >= c->n_tokens) continue;
        struct moe4_runs mixed = moe4_cuda_layer_runs(c->moe, (struct moe4_extent){.n_tokens = fewer}, NULL);
        if (mixed.bytes > *bytes) *bytes = mixed.bytes;
    }
    return all.fits;
}

moe4_status moe4_cuda_begin(const struct moe4_moe_call *c) {
    const moe4_ctx *ctx = c->moe->ctx;
    size_t n = c->by_rows ? c->n_rows : c->n_tokens;
    const struct {
        const void *data;
        const char *what;
    } buffers[] = {{c->workspace, "moe4_moe_forward: workspace"},
                   {n || c->n_tokens ? c->y : NULL, "moe4_moe_forward: y"},
                   {n ? c->ids : NULL, "moe4_moe_forward: topk_ids"},
                   {n ? c->weights : NULL, c->by_rows ? "moe4_moe_forward: weights" : "moe4_moe_forward: topk_weights"},
                   {c->offsets, "moe4_moe_forward_sorted: offsets"},
                   {c->counts, "moe4_moe_forward_batched: counts"},
                   {n ? c->row_token : NULL, "moe4_moe_forward_sorted: row_token"}};
    if (n) MOE4_TRY(moe4_cuda_check_x(ctx, c->x, c->moe->o.x_dtype, "moe4_moe_forward: x"));
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (buffers[i].data) MOE4_TRY(moe4_cuda_check_pointer(ctx, buffers[i].data, buffers[i].what));
    return MOE4_OK;
}

/* ---- stages, for every run ---- */

typedef cudaError_t (*stage_fn)(const struct moe4_layer_run *run, const struct moe4_cuda_device *device, cudaStream_t stream);

static bool has_slots(const struct moe4_moe_call *c) {
    return c->by_rows ? c->n_rows > 0 : c->n_tokens > 0;
}

static moe4_status each_run(const struct moe4_moe_call *c, stage_fn stage, const char *what) {
    const moe4_ctx *ctx = c->moe->ctx;
    struct moe4_runs all = call_runs(c);
    struct moe4_cuda_current saved;
    cudaError_t error = cudaSuccess;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    for (size_t g = 0; g < all.n && error == cudaSuccess; g++) error = stage(&all.run[g], moe4_cuda_of(ctx), c->stream);
    moe4_cuda_leave(saved);
    return moe4_cuda_check(ctx, error, what);
}

static cudaError_t prepare(const struct moe4_layer_run *run, const struct moe4_cuda_device *device, cudaStream_t stream) {
    (void)device;
    if (!moe4_cuda_rounds_apart(run)) return moe4_cuda_prepare(run, stream);
    struct moe4_layer_run slots = *run;
    slots.x_is_ready = 1;
    cudaError_t error = run->slots_are == MOE4_SLOTS_BY_ID ? moe4_cuda_prepare(&slots, stream) : moe4_cuda_place_rows(run, stream);
    return error == cudaSuccess && !run->x_is_ready ? moe4_cuda_round_rows(run, stream) : error;
}

static bool is_fused(const struct moe4_layer_run *run, const struct moe4_cuda_device *device) {
    return moe4_cuda_uses_sm90(device) && run->act != MOE4_ACT_TENSOR && run->act != MOE4_ACT_BF16 && !moe4_cuda_has_options(run);
}

/* The run for who reads h, where `act` is h's. */
static struct moe4_layer_run from_h(const struct moe4_layer_run *run) {
    struct moe4_layer_run r = *run;
    r.act = run->act_h;
    return r;
}

/* Whether prefill goes on from gate/up to down: where h waits for its own tile alone, and x and o have their own memory. */
static bool prefill_is_fused(const struct moe4_layer_run *run) {
    return run->act != MOE4_ACT_TENSOR && !run->n_windows;
}

static cudaError_t prefill_gate_up(const struct moe4_layer_run *run, const struct moe4_cuda_device *device, cudaStream_t stream) {
    bool tiled = moe4_cuda_tiles_x(run) || (!run->x_is_ready && moe4_cuda_rounds_apart(run) && moe4_cuda_rows_are_slots(run));
    cudaError_t error = cudaSuccess;
    for (int w = 0; error == cudaSuccess && w < (run->n_windows ? run->n_windows : 1); w++) {
        struct moe4_layer_run r = moe4_cuda_window(run, w);
        if (!tiled)
            error = moe4_cuda_prefill_gather(&r, run->w.hidden_units, stream); /* not before decode, which begins while prepare runs */
        else if (w)
            error = moe4_cuda_tile_rows(&r, stream);
        int phases = prefill_is_fused(run) ? MOE4_PHASE_GATE_UP | MOE4_PHASE_DOWN : MOE4_PHASE_GATE_UP;
        if (error == cudaSuccess) error = moe4_cuda_prefill_sm90(&r, phases, device->n_sms, stream);
    }
    return error;
}

/* On sm_90 decode goes on to down where it can. */
static cudaError_t gate_up(const struct moe4_layer_run *run, const struct moe4_cuda_device *device, cudaStream_t stream) {
    if (run->act == MOE4_ACT_BF16) return moe4_cuda_gate_up_wide(run, stream);
    if (!moe4_cuda_uses_sm90(device) || moe4_cuda_has_options(run)) return moe4_cuda_gate_up(run, stream);
    int both = MOE4_PHASE_GATE_UP | MOE4_PHASE_DOWN;
    cudaError_t error = cudaSuccess;
    if (run->prefill_from != 1)
        error = moe4_cuda_decode_sm90(run, run->act == MOE4_ACT_TENSOR ? MOE4_PHASE_GATE_UP : both, device->n_sms, stream);
    return error == cudaSuccess && run->prefill_from ? prefill_gate_up(run, device, stream) : error;
}

static cudaError_t quantize_h(const struct moe4_layer_run *run, const struct moe4_cuda_device *device, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    if (run->prefill_from) error = moe4_cuda_prefill_h_amax(run, stream);
    if (error == cudaSuccess && !is_fused(run, device) && run->act_h != MOE4_ACT_BF16) {
        struct moe4_layer_run r = from_h(run);
        error = moe4_cuda_quantize_h(&r, stream);
    }
    return error == cudaSuccess && run->prefill_from && !prefill_is_fused(run) ? moe4_cuda_prefill_quantize_h(run, stream) : error;
}

static cudaError_t down(const struct moe4_layer_run *run, const struct moe4_cuda_device *device, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    if (run->act_h == MOE4_ACT_BF16) return moe4_cuda_down_wide(run, stream);
    struct moe4_layer_run r = from_h(run);
    if (!moe4_cuda_uses_sm90(device)) return moe4_cuda_down(&r, stream);
    if (!is_fused(run, device) && run->prefill_from != 1) error = moe4_cuda_decode_sm90(&r, MOE4_PHASE_DOWN, device->n_sms, stream);
    if (error != cudaSuccess || !run->prefill_from || prefill_is_fused(run) || run->n_windows) return error; /* slices: with combine */
    return moe4_cuda_prefill_sm90(run, MOE4_PHASE_DOWN, device->n_sms, stream);
}

moe4_status moe4_cuda_dispatch(const struct moe4_moe_call *c) {
    return each_run(c, prepare, "dispatch"); /* without tokens too: it writes what the report reads */
}

moe4_status moe4_cuda_quantize_x(const struct moe4_moe_call *c) {
    (void)c; /* dispatch did */
    return MOE4_OK;
}

moe4_status moe4_cuda_gate_up_stage(const struct moe4_moe_call *c) {
    return has_slots(c) ? each_run(c, gate_up, "gate/up") : MOE4_OK;
}

moe4_status moe4_cuda_quantize_h_stage(const struct moe4_moe_call *c) {
    return has_slots(c) ? each_run(c, quantize_h, "quantize h") : MOE4_OK;
}

moe4_status moe4_cuda_down_stage(const struct moe4_moe_call *c) {
    return has_slots(c) ? each_run(c, down, "down") : MOE4_OK;
}

/* Down and combine in turn: o has room for a slice of rows. */
static cudaError_t combine_slices(const struct moe4_combine *c, const struct moe4_cuda_device *device, cudaStream_t stream) {
    const struct moe4_layer_run *run = c->run;
    cudaError_t error = cudaSuccess;
    int tiles = moe4_cuda_slice_tiles(run);
    for (int s = 0; error == cudaSuccess && s * tiles < run->w.down_tiles; s++) {
        struct moe4_layer_run r = moe4_cuda_slice(run, s);
        size_t first = (size_t)(s * tiles) * MOE4_UNIT_ROWS, y_size = c->y_dtype == MOE4_F32 ? sizeof(float) : sizeof(moe4_bf16);
        error = moe4_cuda_prefill_sm90(&r, MOE4_PHASE_DOWN, device->n_sms, stream);
        if (error != cudaSuccess) return error;
        error = moe4_cuda_combine(&r, (char *)c->y + first * y_size, c->y_dtype, c->y_ld, c->weights, c->shared ? c->shared + first : NULL,
                                  (size_t)run->w.hidden, stream);
    }
    return error;
}

static cudaError_t combine(const struct moe4_moe_call *c, const struct moe4_runs *all) {
    const moe4_moe_options *o = &c->moe->o;
    const struct moe4_layer_run *routed = &all->run[0], *shared = all->n > 1 ? &all->run[1] : NULL;
    const struct moe4_combine any = {.run = routed,
                                     .y = c->y,
                                     .y_dtype = o->y_dtype,
                                     .y_ld = o->y_ld,
                                     .weights = o->weighting == MOE4_WEIGHT_AFTER_DOWN ? c->weights : NULL,
                                     .shared = shared ? shared->o : NULL,
                                     .shared_bias = shared ? shared->w.bias_down : NULL,
                                     .row_token = c->row_token,
                                     .n_tokens = (int)c->n_tokens,
                                     .token_start = all->token_start,
                                     .token_rows = all->token_rows};
    if (c->by_rows && !c->row_token) return moe4_cuda_combine_rows(&any, c->stream);
    if (c->by_rows) {
        cudaError_t error = moe4_cuda_list_rows(&any, c->stream);
        return error == cudaSuccess ? moe4_cuda_combine_tokens(&any, c->stream) : error;
    }
    if (routed->n_windows) return combine_slices(&any, moe4_cuda_of(c->moe->ctx), c->stream);
    if (routed->w.bias_down || any.shared_bias) return moe4_cuda_combine_tokens(&any, c->stream);
    return moe4_cuda_combine(routed, c->y, o->y_dtype, o->y_ld, any.weights, any.shared, (size_t)routed->w.hidden, c->stream);
}

moe4_status moe4_cuda_combine_stage(const struct moe4_moe_call *c) {
    const moe4_moe *moe = c->moe;
    if (!c->n_tokens && !has_slots(c)) return MOE4_OK;
    struct moe4_runs all = call_runs(c);
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(moe->ctx, &saved));
    cudaError_t error = combine(c, &all);
    moe4_cuda_leave(saved);
    return moe4_cuda_check(moe->ctx, error, "combine");
}
