/* Grouped linear on the device: the down product of a layer whose experts are the groups, h being x. */
#include "device.h"

#include "nvfp4_layout.h"

/* The groups as experts without gate and up. */
moe4_status moe4_cuda_grouped_prepare(moe4_grouped *g) {
    struct moe4_experts groups = {.n = g->n_groups, .hidden = g->rows, .intermediate = g->cols};
    groups.expert = moe4_calloc(g->ctx, g->n_groups, sizeof *groups.expert, "groups");
    if (!groups.expert) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < g->n_groups; i++) groups.expert[i].down = g->weight[i];
    moe4_status status = moe4_cuda_experts_prepare(g->ctx, &groups);
    moe4_free(g->ctx, groups.expert);
    g->prepared = groups.prepared;
    return status;
}

void moe4_cuda_grouped_release(moe4_grouped *g) {
    struct moe4_experts groups = {.prepared = g->prepared};
    moe4_cuda_experts_release(g->ctx, &groups);
    g->prepared = NULL;
}

/* ---- forward ---- */

/* Whether the products are y already. */
static bool is_direct(const moe4_grouped *g) {
    const struct moe4_packed_experts *p = g->prepared;
    size_t width = g->o.block_diagonal ? g->n_groups * g->rows : g->rows;
    return g->o.y_dtype == MOE4_F32 && g->o.y_ld == width && !p->bias_down;
}

static bool carve(size_t *bytes, struct moe4_layer_run *r, const moe4_grouped *g, size_t n_rows, void *base) {
    struct moe4_carver c = {.base = base};
    size_t n_slots = n_rows, parts = g->o.block_diagonal ? g->n_groups : 1;
    if (!moe4_mul(&n_slots, n_rows, parts) || n_slots > INT32_MAX) return false;
    *r = (struct moe4_layer_run){.w = *(const struct moe4_packed_experts *)g->prepared,
                                 .act = g->o.act,
                                 .act_h = g->o.act,
                                 .n_tokens = (int)n_rows,
                                 .top_k = (int)parts,
                                 .slots_are = g->o.block_diagonal ? MOE4_SLOTS_DIAGONAL : MOE4_SLOTS_SORTED,
                                 .x_by_slot = g->o.block_diagonal,
                                 .owner = g,
                                 .x_dtype = g->o.x_dtype,
                                 .x_in_ld = g->o.x_ld};
    r->w.scale_x = r->w.scale_h;
    moe4_cuda_choose_kernel(r, moe4_cuda_of(g->ctx));
    moe4_cuda_carve_run(&c, r, false);
    if (!is_direct(g)) r->o = moe4_carve(&c, n_slots, g->rows * sizeof *r->o);
    *bytes = c.used;
    return !c.overflow && (double)r->max_tiles * (double)r->w.down_tiles < INT32_MAX;
}

bool moe4_cuda_grouped_bytes(size_t *bytes, const moe4_grouped *g, size_t n_rows) {
    struct moe4_layer_run r;
    return carve(bytes, &r, g, n_rows, NULL);
}

static cudaError_t run(const struct moe4_grouped_call *c, struct moe4_layer_run r) {
    const moe4_grouped *g = c->grouped;
    const struct moe4_cuda_device *device = moe4_cuda_of(g->ctx);
    struct moe4_layer_run rounds = r;
    rounds.w.hidden = r.w.intermediate;
    rounds.w.hidden_units = r.w.intermediate_units;
    if (g->o.x_dtype == MOE4_NVFP4)
        rounds.x_rows = *(const moe4_nvfp4_rows *)c->x;
    else
        rounds.x_in = c->x;
    cudaError_t error = moe4_cuda_place_rows(&rounds, c->stream);
    if (error == cudaSuccess) error = moe4_cuda_round_rows(&rounds, c->stream);
    if (error != cudaSuccess) return error;
    r.h = r.x;
    r.h_wide = r.x_wide;
    r.h_factor = r.x_factor;
    if (is_direct(g)) r.o = c->y;
    if (r.prefill_from) r.result = (struct moe4_result){.y = c->y, .dtype = g->o.y_dtype, .ld = g->o.y_ld};
    if (g->o.act == MOE4_ACT_BF16)
        error = moe4_cuda_down_wide(&r, c->stream);
    else
        error = moe4_cuda_uses_sm90(device) ? moe4_cuda_decode_sm90(&r, MOE4_PHASE_DOWN, device->n_sms, c->stream)
                                            : moe4_cuda_down(&r, c->stream);
    if (error == cudaSuccess && r.prefill_from) error = moe4_cuda_prefill_sm90(&r, MOE4_PHASE_DOWN, device->n_sms, c->stream);
    if (error != cudaSuccess || is_direct(g)) return error;
    const struct moe4_combine rows = {.run = &r, .y = c->y, .y_dtype = g->o.y_dtype, .y_ld = g->o.y_ld};
    return moe4_cuda_combine_rows(&rows, c->stream);
}

/* The one thing here that waits for the stream, and only when it is asked for. */
static moe4_status count_saturated(const struct moe4_grouped_call *c, const struct moe4_layer_run *r) {
    const moe4_ctx *ctx = c->grouped->ctx;
    struct moe4_run_state state;
    cudaError_t error = cudaMemcpyAsync(&state, r->state, sizeof state, cudaMemcpyDeviceToHost, c->stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(c->stream);
    CUDA_TRY(ctx, error, "moe4_grouped_forward: counting saturated blocks");
    size_t n = (size_t)state.n_slots;
    int *host = moe4_calloc(ctx, n, sizeof *host, "moe4_grouped_forward");
    if (!host) return MOE4_ERROR_MEMORY;
    if (n) error = cudaMemcpy(host, r->x_saturated, n * sizeof *host, cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < n && error == cudaSuccess; i++) *c->n_saturated += (uint64_t)host[i];
    moe4_free(ctx, host);
    return moe4_cuda_check(ctx, error, "moe4_grouped_forward: counting saturated blocks");
}

moe4_status moe4_cuda_grouped_forward(const struct moe4_grouped_call *c) {
    const moe4_grouped *g = c->grouped;
    const moe4_ctx *ctx = g->ctx;
    struct moe4_layer_run r;
    struct moe4_cuda_current saved;
    size_t bytes;
    if (c->n_saturated) *c->n_saturated = 0;
    if (!c->n_rows) return MOE4_OK;
    MOE4_TRY(moe4_cuda_check_pointer(ctx, c->workspace, "moe4_grouped_forward: workspace"));
    MOE4_TRY(moe4_cuda_check_x(ctx, c->x, g->o.x_dtype, "moe4_grouped_forward: x"));
    MOE4_TRY(moe4_cuda_check_pointer(ctx, c->y, "moe4_grouped_forward: y"));
    if (c->offsets) MOE4_TRY(moe4_cuda_check_pointer(ctx, c->offsets, "moe4_grouped_forward: offsets"));
    carve(&bytes, &r, g, c->n_rows, c->workspace);
    r.given = c->offsets;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    moe4_status status = moe4_cuda_check(ctx, run(c, r), "moe4_grouped_forward");
    if (status == MOE4_OK && c->n_saturated) status = count_saturated(c, &r);
    moe4_cuda_leave(saved);
    return status;
}
