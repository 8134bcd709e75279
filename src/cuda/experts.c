/* Weights on the device, an expert at a time: at most one matrix waits in the staging buffer. */
#include "device.h"
#include "nvfp4_layout.h"

static size_t align_16(size_t n) {
    return (n + 15) & ~(size_t)15;
}

size_t moe4_cuda_stage_bytes(const moe4_weight *w) {
    return align_16(w->rows * (w->cols / 2)) + w->rows * (w->cols / MOE4_BLOCK);
}

moe4_status moe4_cuda_pack_weight(const moe4_ctx *ctx, uint8_t *packed, const moe4_weight *w, int interleave,
                                  struct moe4_cuda_stage *stage) {
    size_t code_bytes = w->rows * (w->cols / 2), scale_bytes = w->rows * (w->cols / MOE4_BLOCK);
    uint8_t *scales = stage->data + align_16(code_bytes);
    CUDA_TRY(ctx, cudaMemcpy(stage->data, w->data, code_bytes, cudaMemcpyDefault), "copying codes to the device");
    CUDA_TRY(ctx, cudaMemcpy(scales, w->scale, scale_bytes, cudaMemcpyDefault), "copying block scales to the device");
    CUDA_TRY(ctx, moe4_cuda_pack(packed, stage->data, scales, (int)w->rows, (int)w->cols, interleave, NULL), "packing");
    return MOE4_OK;
}

moe4_status moe4_cuda_place_plain(const moe4_ctx *ctx, void *dst, const moe4_weight *w) {
    size_t size = w->dtype == MOE4_F32 ? 4 : 2, pitch = (size_t)moe4_units(w->cols) * MOE4_UNIT_K * size, row_bytes = w->cols * size;
    return moe4_cuda_check(ctx, cudaMemcpy2D(dst, pitch, w->data, row_bytes, row_bytes, w->rows, cudaMemcpyDefault),
                           "copying weights to the device");
}

/* ---- what a layer's experts own: the matrices in one allocation, the numbers of each expert in another, biases in a third ---- */

static size_t plain_bytes(const moe4_weight *w, size_t rows, size_t cols) {
    return (size_t)moe4_units(rows) * MOE4_UNIT_K * (size_t)moe4_units(cols) * MOE4_UNIT_K * (w->dtype == MOE4_F32 ? 4 : 2);
}

static moe4_status size_experts(const moe4_ctx *ctx, struct moe4_packed_experts *p, const struct moe4_experts *e) {
    const moe4_weight *up = &e->expert->up, *down = &e->expert->down;
    MOE4_CHECK(ctx, e->n <= MOE4_MAX_DEVICE_EXPERTS && e->hidden <= 1 << 24 && e->intermediate <= 1 << 24, MOE4_ERROR_UNSUPPORTED,
               "%zu experts of %zu x %zu: on a device at most %d of 2^24 x 2^24", e->n, e->hidden, e->intermediate,
               MOE4_MAX_DEVICE_EXPERTS);
    *p = (struct moe4_packed_experts){.n = (int)e->n, .hidden = (int)e->hidden, .intermediate = (int)e->intermediate};
    int matrices = e->expert->gate.data ? 2 : up->data ? 1 : 0;
    p->hidden_units = moe4_units(e->hidden);
    p->intermediate_units = moe4_units(e->intermediate);
    p->gate_up_tiles = matrices * p->intermediate_units;
    p->down_tiles = p->hidden_units;
    p->up_dtype = up->dtype;
    p->down_dtype = down->dtype;
    p->gate_up_bytes = up->dtype == MOE4_NVFP4 ? (size_t)p->gate_up_tiles * (size_t)p->hidden_units * MOE4_UNIT_BYTES
                                               : (size_t)matrices * plain_bytes(up, e->intermediate, e->hidden);
    p->down_bytes = down->dtype == MOE4_NVFP4 ? (size_t)p->down_tiles * (size_t)p->intermediate_units * MOE4_UNIT_BYTES
                                              : plain_bytes(down, e->hidden, e->intermediate);
    return MOE4_OK;
}

enum { N_NUMBERS = 5 };

static void place_numbers(struct moe4_packed_experts *p, const float *on_device) {
    p->alpha_gate = on_device;
    p->alpha_up = on_device + p->n;
    p->alpha_down = on_device + 2 * p->n;
    p->scale_x = on_device + 3 * p->n;
    p->scale_h = on_device + 4 * p->n;
}

/* Which of gate, up and down have a bias in any of the experts. */
struct biased {
    bool gate, up, down;
};

static struct biased find_biases(const struct moe4_experts *e) {
    struct biased b = {false, false, false};
    for (size_t i = 0; i < e->n; i++) {
        b.gate |= e->expert[i].gate.bias != NULL;
        b.up |= e->expert[i].up.bias != NULL;
        b.down |= e->expert[i].down.bias != NULL;
    }
    return b;
}

/* Biases are one allocation, which begins with the first that there is. */
static const float *first_bias(const struct moe4_packed_experts *p) {
    return p->bias_gate ? p->bias_gate : p->bias_up ? p->bias_up : p->bias_down;
}

static moe4_status allocate_biases(const moe4_ctx *ctx, struct moe4_packed_experts *p, struct biased b) {
    size_t n = (size_t)p->n, wide = n * (size_t)p->intermediate, up_at = b.gate ? wide : 0, down_at = up_at + (b.up ? wide : 0);
    size_t bytes = (down_at + (b.down ? n * (size_t)p->hidden : 0)) * sizeof(float);
    void *data = NULL;
    if (!bytes) return MOE4_OK;
    MOE4_TRY(moe4_cuda_alloc(ctx, &data, bytes, "biases"));
    float *bias = data;
    p->bias_gate = b.gate ? bias : NULL;
    p->bias_up = b.up ? bias + up_at : NULL;
    p->bias_down = b.down ? bias + down_at : NULL;
    return moe4_cuda_check(ctx, cudaMemset(data, 0, bytes), "biases"); /* of experts that have none */
}

/* Memory for p's n experts; release frees what a failure leaves. */
static moe4_status allocate(const moe4_ctx *ctx, struct moe4_packed_experts *p, struct biased b) {
    void *data = NULL, *numbers = NULL;
    size_t n = (size_t)p->n, bytes;
    MOE4_CHECK(ctx, moe4_mul(&bytes, n, p->gate_up_bytes + p->down_bytes), MOE4_ERROR_MEMORY, "%zu experts are too large", n);
    MOE4_TRY(moe4_cuda_alloc(ctx, &data, bytes, "experts"));
    p->gate_up = data;
    p->down = p->gate_up + n * p->gate_up_bytes;
    CUDA_TRY(ctx, cudaMemset(data, 0, bytes), "experts"); /* the padding is zeros */
    MOE4_TRY(moe4_cuda_alloc(ctx, &numbers, N_NUMBERS * n * sizeof(float), "expert scales"));
    place_numbers(p, numbers);
    return allocate_biases(ctx, p, b);
}

static void release(struct moe4_packed_experts *p) {
    cudaFree((void *)p->gate_up);
    cudaFree((void *)p->alpha_gate);
    cudaFree((void *)first_bias(p));
}

/* ---- an expert into its place ---- */

static moe4_status place_bias(const moe4_ctx *ctx, const float *biases, const moe4_weight *w, size_t i) {
    if (!biases || !w->bias) return MOE4_OK;
    return moe4_cuda_check(ctx, cudaMemcpy((float *)biases + i * w->rows, w->bias, w->rows * sizeof(float), cudaMemcpyDefault),
                           "copying biases to the device");
}

static moe4_status place_gate_up(const moe4_ctx *ctx, uint8_t *to, const moe4_expert *x, struct moe4_cuda_stage *stage) {
    if (!x->up.data) return MOE4_OK; /* a linear's group */
    bool gated = x->gate.data != NULL;
    if (x->up.dtype != MOE4_NVFP4) {
        if (gated) MOE4_TRY(moe4_cuda_place_plain(ctx, to, &x->gate));
        return moe4_cuda_place_plain(ctx, to + (gated ? plain_bytes(&x->up, x->up.rows, x->up.cols) : 0), &x->up);
    }
    if (gated) MOE4_TRY(moe4_cuda_pack_weight(ctx, to, &x->gate, 1, stage));
    return moe4_cuda_pack_weight(ctx, to, &x->up, gated ? 2 : 0, stage);
}

static float alpha(const moe4_weight *w) {
    return w->dtype == MOE4_NVFP4 ? w->global * MOE4_DECODE_FACTOR : 1;
}

/* Expert x's matrices as p's i-th, through the staging buffer. */
static moe4_status place_matrices(const moe4_ctx *ctx, const struct moe4_packed_experts *p, const moe4_expert *x, size_t i,
                                  struct moe4_cuda_stage *stage) {
    uint8_t *down = (uint8_t *)p->down + i * p->down_bytes;
    MOE4_TRY(place_gate_up(ctx, (uint8_t *)p->gate_up + i * p->gate_up_bytes, x, stage));
    return x->down.dtype == MOE4_NVFP4 ? moe4_cuda_pack_weight(ctx, down, &x->down, 0, stage) : moe4_cuda_place_plain(ctx, down, &x->down);
}

/* What of it is no matrix. */
static moe4_status place_rest(const moe4_ctx *ctx, const struct moe4_packed_experts *p, const moe4_expert *x, size_t i) {
    const float x_scale = x->gate.input_scale > x->up.input_scale ? x->gate.input_scale : x->up.input_scale; /* they read the same x */
    const float numbers[N_NUMBERS] = {alpha(&x->gate), alpha(&x->up), alpha(&x->down), x_scale, x->down.input_scale};
    MOE4_TRY(place_bias(ctx, p->bias_gate, &x->gate, i));
    MOE4_TRY(place_bias(ctx, p->bias_up, &x->up, i));
    MOE4_TRY(place_bias(ctx, p->bias_down, &x->down, i));
    cudaError_t error = cudaMemcpy2D((float *)p->alpha_gate + i, (size_t)p->n * sizeof(float), numbers, sizeof(float), sizeof(float),
                                     N_NUMBERS, cudaMemcpyHostToDevice);
    return moe4_cuda_check(ctx, error, "copying expert scales to the device");
}

/* Matrices of n experts as p's, and waits for them. */
static moe4_status place_all_matrices(const moe4_ctx *ctx, const struct moe4_packed_experts *p, const moe4_expert *experts, size_t n) {
    struct moe4_cuda_stage stage = {0};
    const moe4_weight *w[] = {&experts->up, &experts->down};
    for (int i = 0; i < 2; i++)
        if (w[i]->data && w[i]->dtype == MOE4_NVFP4 && moe4_cuda_stage_bytes(w[i]) > stage.bytes) stage.bytes = moe4_cuda_stage_bytes(w[i]);
    void *data = NULL;
    MOE4_TRY(moe4_cuda_alloc(ctx, &data, stage.bytes, "staging of one matrix"));
    stage.data = data;
    moe4_status status = MOE4_OK;
    for (size_t i = 0; i < n && status == MOE4_OK; i++) status = place_matrices(ctx, p, &experts[i], i, &stage);
    if (status == MOE4_OK) status = moe4_cuda_check(ctx, cudaStreamSynchronize(NULL), "packing");
    cudaFree(data);
    return status;
}

static moe4_status place_experts(const moe4_ctx *ctx, const struct moe4_packed_experts *p, const moe4_expert *experts, size_t n) {
    MOE4_TRY(place_all_matrices(ctx, p, experts, n));
    for (size_t i = 0; i < n; i++) MOE4_TRY(place_rest(ctx, p, &experts[i], i));
    return MOE4_OK;
}

/* The same from the cache folder, or into it. */
static moe4_status place_cached(const moe4_ctx *ctx, const struct moe4_packed_experts *p, const struct moe4_experts *e) {
    struct moe4_cuda_cached cached;
    bool found = false;
    void *packed = (void *)p->gate_up; /* down follows */
    const moe4_weight **weights = moe4_calloc(ctx, 3 * e->n, sizeof *weights, "experts");
    if (!weights) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < e->n; i++) {
        weights[3 * i] = &e->expert[i].gate;
        weights[3 * i + 1] = &e->expert[i].up;
        weights[3 * i + 2] = &e->expert[i].down;
    }
    moe4_status status = moe4_cuda_cache_key(ctx, &cached, weights, 3 * e->n, e->n * (p->gate_up_bytes + p->down_bytes));
    moe4_free(ctx, weights);
    MOE4_TRY(status);
    MOE4_TRY(moe4_cuda_cache_read(ctx, &cached, packed, &found));
    if (!found) {
        MOE4_TRY(place_all_matrices(ctx, p, e->expert, e->n));
        MOE4_TRY(moe4_cuda_cache_write(ctx, &cached, packed));
    }
    for (size_t i = 0; i < e->n; i++) MOE4_TRY(place_rest(ctx, p, &e->expert[i], i));
    return MOE4_OK;
}

static moe4_status prepare(moe4_ctx *ctx, struct moe4_packed_experts *p, const struct moe4_experts *e) {
    MOE4_TRY(size_experts(ctx, p, e));
    MOE4_TRY(allocate(ctx, p, find_biases(e)));
    return ctx->cache ? place_cached(ctx, p, e) : place_experts(ctx, p, e->expert, e->n);
}

moe4_status moe4_cuda_experts_prepare(moe4_ctx *ctx, struct moe4_experts *experts) {
    struct moe4_packed_experts *p = moe4_calloc(ctx, 1, sizeof *p, "experts");
    if (!p) return MOE4_ERROR_MEMORY;
    experts->prepared = p; /* release frees what a failure leaves */
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    moe4_status status = prepare(ctx, p, experts);
    moe4_cuda_leave(saved);
    return status;
}

void moe4_cuda_experts_release(moe4_ctx *ctx, struct moe4_experts *experts) {
    struct moe4_packed_experts *p = experts->prepared;
    struct moe4_cuda_current saved;
    if (!p) return;
    if (moe4_cuda_enter(ctx, &saved) == MOE4_OK) {
        release(p);
        moe4_cuda_leave(saved);
    }
    moe4_free(ctx, p);
    experts->prepared = NULL;
}

/* ---- another expert in its place ---- */

struct part {
    const void *to, *from;
    size_t bytes;
};

/* The only expert of `one` over p's expert e: copies within the device, which only a broken device refuses. */
static moe4_status copy_expert(const moe4_ctx *ctx, const struct moe4_packed_experts *p, const struct moe4_packed_experts *one, size_t e) {
    size_t wide = (size_t)p->intermediate, hidden = (size_t)p->hidden;
    const struct part parts[] = {{p->gate_up + e * p->gate_up_bytes, one->gate_up, p->gate_up_bytes},
                                 {p->down + e * p->down_bytes, one->down, p->down_bytes},
                                 {p->bias_gate + (p->bias_gate ? e * wide : 0), one->bias_gate, wide * sizeof(float)},
                                 {p->bias_up + (p->bias_up ? e * wide : 0), one->bias_up, wide * sizeof(float)},
                                 {p->bias_down + (p->bias_down ? e * hidden : 0), one->bias_down, hidden * sizeof(float)}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (parts[i].from)
            CUDA_TRY(ctx, cudaMemcpyAsync((void *)parts[i].to, parts[i].from, parts[i].bytes, cudaMemcpyDeviceToDevice, NULL),
                     "replacing an expert");
    CUDA_TRY(ctx,
             cudaMemcpy2DAsync((float *)p->alpha_gate + e, (size_t)p->n * sizeof(float), one->alpha_gate, sizeof(float), sizeof(float),
                               N_NUMBERS, cudaMemcpyDeviceToDevice, NULL),
             "replacing an expert");
    return moe4_cuda_check(ctx, cudaStreamSynchronize(NULL), "replacing an expert");
}

/* The new expert is packed beside the old one first: whatever fails on the way leaves the layer as it was. */
static moe4_status replace(const moe4_ctx *ctx, const struct moe4_packed_experts *p, const struct moe4_experts *experts, size_t e) {
    const moe4_expert *x = &experts->expert[e];
    const struct biased has = {p->bias_gate != NULL, p->bias_up != NULL, p->bias_down != NULL};
    MOE4_CHECK(ctx, (has.gate || !x->gate.bias) && (has.up || !x->up.bias) && (has.down || !x->down.bias), MOE4_ERROR_UNSUPPORTED,
               "expert %zu: has a bias where no expert of the layer had one; on a device that needs another layer", e);
    struct moe4_packed_experts one = *p;
    one.n = 1;
    one.gate_up = one.down = NULL;
    one.alpha_gate = one.bias_gate = one.bias_up = one.bias_down = NULL;
    moe4_status status = allocate(ctx, &one, has);
    if (status == MOE4_OK) status = place_experts(ctx, &one, x, 1);
    if (status == MOE4_OK) status = copy_expert(ctx, p, &one, e);
    release(&one);
    return status;
}

moe4_status moe4_cuda_expert_replaced(moe4_ctx *ctx, struct moe4_experts *experts, size_t e) {
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    moe4_status status = replace(ctx, experts->prepared, experts, e);
    moe4_cuda_leave(saved);
    return status;
}
