/* Linear on the device. NVFP4 matrices run as the down product of a layer with one expert that every token visits, h being x, or with many
 * rows by linear_decoded.c; unquantized ones (router gates) as plain fp32 products. */
#include "linear.h"
#include "nvfp4_layout.h"

/* A matrix as the down projection of one expert; x is rounded as if by a layer whose hidden size is K. */
static struct moe4_packed_experts as_down(const moe4_weight *w) {
    struct moe4_packed_experts p = {.n = 1, .hidden = (int)w->rows, .intermediate = (int)w->cols};
    p.intermediate_units = moe4_units(w->cols);
    p.down_tiles = moe4_units(w->rows);
    p.down_bytes = (size_t)p.down_tiles * (size_t)p.intermediate_units * MOE4_UNIT_BYTES;
    return p;
}

static moe4_status cache_key(const moe4_linear *l, struct moe4_cuda_cached *cached, size_t bytes) {
    const moe4_weight **weights = moe4_calloc(l->ctx, l->n_weights, sizeof *weights, "weights");
    if (!weights) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < l->n_weights; i++) weights[i] = &l->weight[i];
    moe4_status status = moe4_cuda_cache_key(l->ctx, cached, weights, l->n_weights, bytes);
    moe4_free(l->ctx, weights);
    return status;
}

static moe4_status prepare_nvfp4(moe4_linear *l, struct moe4_cuda_linear *p) {
    const moe4_ctx *ctx = l->ctx;
    size_t bytes = 0, stage_bytes = 0;
    void *data = NULL, *numbers = NULL;
    for (size_t i = 0; i < l->n_weights; i++) {
        p->matrix[i].packed = as_down(&l->weight[i]);
        MOE4_CHECK(ctx, moe4_add(&bytes, bytes, p->matrix[i].packed.down_bytes), MOE4_ERROR_MEMORY, "weight %zu is too large", i);
        size_t need = moe4_cuda_stage_bytes(&l->weight[i]);
        if (need > stage_bytes) stage_bytes = need;
    }
    MOE4_TRY(moe4_cuda_alloc(ctx, &data, bytes, "packed weights"));
    p->packed = data;
    CUDA_TRY(ctx, cudaMemset(p->packed, 0, bytes), "packed weights"); /* the padding is zeros */
    MOE4_TRY(moe4_cuda_alloc(ctx, &numbers, (l->n_weights + 1) * sizeof(float), "weight scales"));
    p->numbers = numbers;
    struct moe4_cuda_cached cached;
    bool found;
    MOE4_TRY(cache_key(l, &cached, bytes));
    MOE4_TRY(moe4_cuda_cache_read(ctx, &cached, p->packed, &found));
    struct moe4_cuda_stage stage = {.bytes = stage_bytes};
    MOE4_TRY(moe4_cuda_alloc(ctx, &data, stage_bytes, "staging of one matrix"));
    stage.data = data;
    moe4_status status = MOE4_OK;
    uint8_t *at = p->packed;
    for (size_t i = 0; i <= l->n_weights && status == MOE4_OK; i++) {
        float v = i < l->n_weights ? l->weight[i].global * MOE4_DECODE_FACTOR : l->input_scale;
        status = moe4_cuda_check(ctx, cudaMemcpy(p->numbers + i, &v, sizeof v, cudaMemcpyHostToDevice), "weight scales");
        if (i == l->n_weights || status != MOE4_OK) break;
        p->matrix[i].packed.down = at;
        p->matrix[i].packed.alpha_down = p->numbers + i;
        p->matrix[i].packed.scale_x = p->numbers + l->n_weights;
        if (!found) status = moe4_cuda_pack_weight(ctx, at, &l->weight[i], 0, &stage);
        at += p->matrix[i].packed.down_bytes;
    }
    if (status == MOE4_OK) status = moe4_cuda_check(ctx, cudaStreamSynchronize(NULL), "packing");
    cudaFree(stage.data);
    return status == MOE4_OK && !found ? moe4_cuda_cache_write(ctx, &cached, p->packed) : status;
}

static moe4_status prepare_plain(moe4_linear *l, struct moe4_cuda_linear *p) {
    for (size_t i = 0; i < l->n_weights; i++) {
        const moe4_weight *w = &l->weight[i];
        size_t bytes = w->rows * w->cols * (w->dtype == MOE4_F32 ? 4 : 2);
        MOE4_TRY(moe4_cuda_alloc(l->ctx, &p->matrix[i].plain, bytes, "weights"));
        CUDA_TRY(l->ctx, cudaMemcpy(p->matrix[i].plain, w->data, bytes, cudaMemcpyDefault), "copying weights to the device");
    }
    return MOE4_OK;
}

static moe4_status prepare_biases(moe4_linear *l, struct moe4_cuda_linear *p) {
    for (size_t i = 0; i < l->n_weights; i++) {
        size_t bytes = l->weight[i].rows * sizeof(float);
        void *bias = NULL;
        if (!l->weight[i].bias) continue;
        MOE4_TRY(moe4_cuda_alloc(l->ctx, &bias, bytes, "bias"));
        p->matrix[i].bias = bias;
        CUDA_TRY(l->ctx, cudaMemcpy(bias, l->weight[i].bias, bytes, cudaMemcpyDefault), "copying a bias to the device");
    }
    return MOE4_OK;
}

moe4_status moe4_cuda_linear_prepare(moe4_linear *l) {
    for (size_t i = 0; i < l->n_weights; i++)
        MOE4_CHECK(l->ctx, l->weight[i].rows <= 1 << 24 && l->cols <= 1 << 24, MOE4_ERROR_UNSUPPORTED,
                   "weight %zu: %zu x %zu; on a device at most 2^24 x 2^24", i, l->weight[i].rows, l->cols);
    struct moe4_cuda_linear *p = moe4_calloc(l->ctx, 1, sizeof *p + l->n_weights * sizeof *p->matrix, "linear");
    if (!p) return MOE4_ERROR_MEMORY;
    l->prepared = p; /* release frees what a failure leaves */
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(l->ctx, &saved));
    moe4_status status = l->weight->dtype == MOE4_NVFP4 ? prepare_nvfp4(l, p) : prepare_plain(l, p);
    p->decoded_from = moe4_cuda_decoded_from(l);
    if (p->decoded_from < SIZE_MAX) p->blas = moe4_cuda_blas(l->ctx);
    if (!p->blas) p->decoded_from = SIZE_MAX;
    if (status == MOE4_OK) status = prepare_biases(l, p);
    moe4_cuda_leave(saved);
    return status;
}

void moe4_cuda_linear_release(moe4_linear *l) {
    struct moe4_cuda_linear *p = l->prepared;
    struct moe4_cuda_current saved;
    if (!p) return;
    if (moe4_cuda_enter(l->ctx, &saved) == MOE4_OK) {
        cudaFree(p->packed);
        cudaFree(p->numbers);
        for (size_t i = 0; i < l->n_weights; i++) {
            cudaFree(p->matrix[i].plain);
            cudaFree(p->matrix[i].bias);
        }
        moe4_cuda_leave(saved);
    }
    moe4_free(l->ctx, p);
    l->prepared = NULL;
}

/* ---- forward ---- */

/* Whether a product goes to y by way of an fp32 copy. */
static bool is_narrowed(const moe4_linear *l, size_t i) {
    return l->o.y_dtype != MOE4_F32 || l->weight[i].bias;
}

/* The run that rounds x and lists its tiles, and the place of the widest result. */
static bool carve(size_t *bytes, struct moe4_layer_run *r, float **o, const moe4_linear *l, size_t n_tokens, void *base) {
    const struct moe4_cuda_linear *p = l->prepared;
    struct moe4_carver c = {.base = base};
    size_t widest = 0;
    bool nvfp4 = l->weight->dtype == MOE4_NVFP4, narrowed = false;
    *bytes = 0;
    if (!nvfp4 && l->o.x_dtype != MOE4_NVFP4) return true;
    *r = (struct moe4_layer_run){.w = nvfp4 ? p->matrix->packed : as_down(l->weight),
                                 .act = l->o.act,
                                 .n_tokens = (int)n_tokens,
                                 .top_k = 1,
                                 .owner = l,
                                 .x_dtype = l->o.x_dtype,
                                 .x_in_ld = l->o.x_ld};
    moe4_cuda_choose_kernel(r, moe4_cuda_of(l->ctx));
    for (size_t i = 0; i < l->n_weights; i++) {
        if (l->weight[i].rows > widest) widest = l->weight[i].rows;
        narrowed |= nvfp4 && is_narrowed(l, i);
    }
    moe4_cuda_carve_run(&c, r, false);
    *o = narrowed && !r->prefill_from ? moe4_carve(&c, n_tokens, widest * sizeof **o) : NULL;
    *bytes = c.used;
    return !c.overflow && (double)r->max_tiles * (double)moe4_units(widest) < INT32_MAX;
}

bool moe4_cuda_linear_bytes(size_t *bytes, const moe4_linear *l, size_t n_tokens) {
    const size_t most_narrow = MOE4_PREFILL_TOKENS - 1; /* they need fp32 results, more tokens do not */
    struct moe4_layer_run r;
    float *o;
    size_t fewer = 0, from = ((const struct moe4_cuda_linear *)l->prepared)->decoded_from;
    size_t decoded = n_tokens < from ? 0 : moe4_cuda_decoded_bytes(l);
    if (n_tokens > most_narrow && !carve(&fewer, &r, &o, l, most_narrow, NULL)) return false;
    bool fits = carve(bytes, &r, &o, l, n_tokens, NULL);
    if (fewer > *bytes) *bytes = fewer;
    if (decoded > *bytes) *bytes = decoded;
    return fits;
}

static cudaError_t run_product(const struct moe4_linear_call *c, struct moe4_layer_run r, size_t i, float *o) {
    const moe4_linear *l = c->linear;
    const struct moe4_cuda_linear *p = l->prepared;
    const struct moe4_cuda_device *device = moe4_cuda_of(l->ctx);
    r.w = p->matrix[i].packed;
    r.w.bias_down = p->matrix[i].bias;
    r.o = is_narrowed(l, i) ? o : c->y[i];
    if (r.prefill_from) r.result = (struct moe4_result){.y = c->y[i], .dtype = l->o.y_dtype, .ld = l->weight[i].rows};
    if (r.prefill_from) return moe4_cuda_prefill_sm90(&r, MOE4_PHASE_DOWN, device->n_sms, c->stream); /* the one expert has all rows */
    cudaError_t error =
        moe4_cuda_uses_sm90(device) ? moe4_cuda_decode_sm90(&r, MOE4_PHASE_DOWN, device->n_sms, c->stream) : moe4_cuda_down(&r, c->stream);
    if (error != cudaSuccess || !is_narrowed(l, i)) return error;
    if (!r.w.bias_down) return moe4_cuda_combine(&r, c->y[i], l->o.y_dtype, l->weight[i].rows, NULL, NULL, 0, c->stream);
    const struct moe4_combine rows = {.run = &r, .y = c->y[i], .y_dtype = l->o.y_dtype, .y_ld = l->weight[i].rows};
    return moe4_cuda_combine_rows(&rows, c->stream);
}

/* x as a layer's rows whose hidden size is K; where the prefill kernel reads them, in its tiles. */
static cudaError_t round_x(const struct moe4_linear_call *c, const struct moe4_layer_run *r, bool lists_slots) {
    struct moe4_layer_run rounds = *r;
    bool apart = r->prefill_from || moe4_cuda_rounds_apart(r);
    cudaError_t error = cudaSuccess;
    rounds.w.hidden = r->w.intermediate;
    rounds.w.hidden_units = r->w.intermediate_units;
    if (r->x_dtype == MOE4_NVFP4)
        rounds.x_rows = *(const moe4_nvfp4_rows *)c->x;
    else
        rounds.x_in = c->x;
    if (!apart) return moe4_cuda_prepare(&rounds, c->stream);
    if (lists_slots) error = moe4_cuda_place_rows(&rounds, c->stream);
    return error == cudaSuccess ? moe4_cuda_round_rows(&rounds, c->stream) : error;
}

static cudaError_t run_nvfp4(const struct moe4_linear_call *c) {
    const moe4_linear *l = c->linear;
    struct moe4_layer_run r;
    float *o;
    size_t bytes;
    carve(&bytes, &r, &o, l, c->n_tokens, c->workspace);
    cudaError_t error = round_x(c, &r, true);
    r.h = r.x;
    r.h_factor = r.x_factor;
    for (size_t i = 0; i < l->n_weights && error == cudaSuccess; i++) error = run_product(c, r, i, o);
    return error;
}

static cudaError_t run_plain(const struct moe4_linear_call *c) {
    const moe4_linear *l = c->linear;
    const struct moe4_cuda_linear *p = l->prepared;
    bool codes = l->o.x_dtype == MOE4_NVFP4; /* their values are written out first */
    struct moe4_layer_run r = {0};
    float *o;
    size_t bytes;
    carve(&bytes, &r, &o, l, c->n_tokens, c->workspace);
    cudaError_t error = codes ? round_x(c, &r, false) : cudaSuccess;
    for (size_t i = 0; i < l->n_weights && error == cudaSuccess; i++) {
        struct moe4_wide_product product = {.y = c->y[i],
                                            .x = codes ? r.x_wide : c->x,
                                            .w = p->matrix[i].plain,
                                            .factor = r.x_factor,
                                            .bias = p->matrix[i].bias,
                                            .y_dtype = l->o.y_dtype,
                                            .x_dtype = codes ? MOE4_F32 : l->o.x_dtype,
                                            .w_dtype = l->weight[i].dtype,
                                            .x_ld = codes ? (size_t)r.w.intermediate_units * MOE4_UNIT_K : l->o.x_ld,
                                            .T = (int)c->n_tokens,
                                            .N = (int)l->weight[i].rows,
                                            .K = (int)l->cols};
        error = moe4_cuda_wide(&product, c->stream);
    }
    return error;
}

/* The one thing here that waits for the stream, and only when it is asked for. */
static moe4_status count_saturated(const struct moe4_linear_call *c) {
    const moe4_linear *l = c->linear;
    *c->n_saturated = 0;
    if (l->weight->dtype != MOE4_NVFP4 || l->o.act == MOE4_ACT_W4A16 || !c->n_tokens) return MOE4_OK;
    struct moe4_layer_run r;
    float *o;
    size_t bytes;
    carve(&bytes, &r, &o, l, c->n_tokens, c->workspace);
    int *host = moe4_calloc(l->ctx, c->n_tokens, sizeof *host, "moe4_linear_forward");
    if (!host) return MOE4_ERROR_MEMORY;
    cudaError_t error = cudaMemcpyAsync(host, r.x_saturated, c->n_tokens * sizeof *host, cudaMemcpyDeviceToHost, c->stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(c->stream);
    for (size_t t = 0; t < c->n_tokens && error == cudaSuccess; t++) *c->n_saturated += (uint64_t)host[t];
    moe4_free(l->ctx, host);
    return moe4_cuda_check(l->ctx, error, "moe4_linear_forward: counting saturated blocks");
}

moe4_status moe4_cuda_linear_forward(const struct moe4_linear_call *c) {
    const moe4_linear *l = c->linear;
    const moe4_ctx *ctx = l->ctx;
    if (c->n_tokens) {
        if (c->workspace) MOE4_TRY(moe4_cuda_check_pointer(ctx, c->workspace, "moe4_linear_forward: workspace"));
        MOE4_TRY(moe4_cuda_check_x(ctx, c->x, l->o.x_dtype, "moe4_linear_forward: x"));
        for (size_t i = 0; i < l->n_weights; i++) MOE4_TRY(moe4_cuda_check_pointer(ctx, c->y[i], "moe4_linear_forward: y"));
    }
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    moe4_status status = MOE4_OK;
    if (moe4_cuda_decodes(l, c->n_tokens))
        status = moe4_cuda_decoded_forward(c);
    else if (c->n_tokens)
        status = moe4_cuda_check(ctx, l->weight->dtype == MOE4_NVFP4 ? run_nvfp4(c) : run_plain(c), "moe4_linear_forward");
    if (status == MOE4_OK && c->n_saturated) status = count_saturated(c);
    moe4_cuda_leave(saved);
    return status;
}
