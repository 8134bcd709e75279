/* Packed weights on the device, an expert at a time: at most one matrix waits in the staging buffer. */
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

/* What a layer's experts own on the device: the packed matrices in one allocation, the numbers of each expert in another. */
static moe4_status size_experts(const moe4_ctx *ctx, struct moe4_packed_experts *p, const struct moe4_experts *e, size_t *bytes_ret) {
    for (size_t i = 0; i < e->n; i++) {
        const moe4_expert *x = &e->expert[i];
        MOE4_CHECK(ctx, !x->gate.bias && !x->up.bias && !x->down.bias, MOE4_ERROR_UNSUPPORTED,
                   "expert %zu: a bias does not run on a device yet", i);
        MOE4_CHECK(ctx, e->expert[i].gate.dtype == MOE4_NVFP4 && e->expert[i].down.dtype == MOE4_NVFP4, MOE4_ERROR_UNSUPPORTED,
                   "expert %zu: gate %s, down %s; on a device experts are NVFP4", i, ctx->host->dtype_name(e->expert[i].gate.dtype),
                   ctx->host->dtype_name(e->expert[i].down.dtype));
    }
    MOE4_CHECK(ctx, e->n <= MOE4_MAX_DEVICE_EXPERTS && e->hidden <= 1 << 24 && e->intermediate <= 1 << 24, MOE4_ERROR_UNSUPPORTED,
               "%zu experts of %zu x %zu: on a device at most %d of 2^24 x 2^24", e->n, e->hidden, e->intermediate,
               MOE4_MAX_DEVICE_EXPERTS);
    *p = (struct moe4_packed_experts){.n = (int)e->n, .hidden = (int)e->hidden, .intermediate = (int)e->intermediate};
    p->hidden_units = moe4_units(e->hidden);
    p->intermediate_units = moe4_units(e->intermediate);
    p->gate_up_tiles = 2 * p->intermediate_units;
    p->down_tiles = p->hidden_units;
    p->gate_up_bytes = (size_t)p->gate_up_tiles * (size_t)p->hidden_units * MOE4_UNIT_BYTES;
    p->down_bytes = (size_t)p->down_tiles * (size_t)p->intermediate_units * MOE4_UNIT_BYTES;
    MOE4_CHECK(ctx, moe4_mul(bytes_ret, e->n, p->gate_up_bytes + p->down_bytes), MOE4_ERROR_MEMORY, "%zu experts are too large", e->n);
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

/* Expert i's weights and numbers into their places, through the staging buffer. */
static moe4_status place_expert(const moe4_ctx *ctx, const struct moe4_packed_experts *p, const moe4_expert *x, size_t i,
                                struct moe4_cuda_stage *stage) {
    uint8_t *gate_up = (uint8_t *)p->gate_up + i * p->gate_up_bytes, *down = (uint8_t *)p->down + i * p->down_bytes;
    const float x_scale = x->gate.input_scale > x->up.input_scale ? x->gate.input_scale : x->up.input_scale; /* they read the same x */
    const float numbers[N_NUMBERS] = {x->gate.global * MOE4_DECODE_FACTOR, x->up.global * MOE4_DECODE_FACTOR,
                                      x->down.global * MOE4_DECODE_FACTOR, x_scale, x->down.input_scale};
    MOE4_TRY(moe4_cuda_pack_weight(ctx, gate_up, &x->gate, 1, stage));
    MOE4_TRY(moe4_cuda_pack_weight(ctx, gate_up, &x->up, 2, stage));
    MOE4_TRY(moe4_cuda_pack_weight(ctx, down, &x->down, 0, stage));
    cudaError_t error = cudaMemcpy2D((float *)p->alpha_gate + i, (size_t)p->n * sizeof(float), numbers, sizeof(float), sizeof(float),
                                     N_NUMBERS, cudaMemcpyHostToDevice);
    return moe4_cuda_check(ctx, error, "copying expert scales to the device");
}

/* Experts [first, first + n), and waits for them. */
static moe4_status place_experts(const moe4_ctx *ctx, const struct moe4_packed_experts *p, const struct moe4_experts *e, size_t first,
                                 size_t n) {
    struct moe4_cuda_stage stage = {.bytes = moe4_cuda_stage_bytes(&e->expert->gate)};
    size_t down_bytes = moe4_cuda_stage_bytes(&e->expert->down);
    if (down_bytes > stage.bytes) stage.bytes = down_bytes;
    void *data = NULL;
    MOE4_TRY(moe4_cuda_alloc(ctx, &data, stage.bytes, "staging of one matrix"));
    stage.data = data;
    moe4_status status = MOE4_OK;
    for (size_t i = first; i < first + n && status == MOE4_OK; i++) status = place_expert(ctx, p, &e->expert[i], i, &stage);
    if (status == MOE4_OK) status = moe4_cuda_check(ctx, cudaStreamSynchronize(NULL), "packing");
    cudaFree(data);
    return status;
}

static moe4_status prepare(moe4_ctx *ctx, struct moe4_packed_experts *p, const struct moe4_experts *e) {
    size_t bytes = 0;
    MOE4_TRY(size_experts(ctx, p, e, &bytes));
    void *packed = NULL, *numbers = NULL;
    MOE4_TRY(moe4_cuda_alloc(ctx, &packed, bytes, "packed experts"));
    p->gate_up = packed;
    p->down = p->gate_up + e->n * p->gate_up_bytes;
    CUDA_TRY(ctx, cudaMemset(packed, 0, bytes), "packed experts"); /* the padding is zeros */
    MOE4_TRY(moe4_cuda_alloc(ctx, &numbers, N_NUMBERS * e->n * sizeof(float), "expert scales"));
    place_numbers(p, numbers);
    return place_experts(ctx, p, e, 0, e->n);
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
        cudaFree((void *)p->gate_up);
        cudaFree((void *)p->alpha_gate);
        moe4_cuda_leave(saved);
    }
    moe4_free(ctx, p);
    experts->prepared = NULL;
}

/* A failure before the first copy leaves the old expert; after it only a broken device fails. */
moe4_status moe4_cuda_expert_replaced(moe4_ctx *ctx, struct moe4_experts *experts, size_t e) {
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    moe4_status status = place_experts(ctx, experts->prepared, experts, e, 1);
    moe4_cuda_leave(saved);
    return status;
}

/* ---- block scales that the host cannot read ---- */

static moe4_status find_bad_scale(const moe4_ctx *ctx, const moe4_weight *w, const char *what) {
    size_t n = w->cols / MOE4_BLOCK;
    void *on_device = NULL;
    MOE4_TRY(moe4_cuda_alloc(ctx, &on_device, sizeof(unsigned long long), what));
    unsigned long long bad = 0;
    uint8_t byte = 0;
    cudaError_t error = moe4_cuda_find_bad_scale(on_device, w->scale, w->rows * n, NULL);
    if (error == cudaSuccess) error = cudaMemcpy(&bad, on_device, sizeof bad, cudaMemcpyDeviceToHost);
    if (error == cudaSuccess && bad != UINT64_MAX) error = cudaMemcpy(&byte, w->scale + bad, 1, cudaMemcpyDeviceToHost);
    cudaFree(on_device);
    CUDA_TRY(ctx, error, what);
    MOE4_CHECK(ctx, bad == UINT64_MAX, MOE4_ERROR_FORMAT, "%s: block scale [%zu, %zu] is 0x%02x, a %s (0x00 to 0x7e are scales)", what,
               (size_t)bad / n, (size_t)bad % n, byte, byte == 0x7F ? "NaN" : "signed byte");
    return MOE4_OK;
}

moe4_status moe4_cuda_scales_check(const moe4_ctx *ctx, const moe4_weight *w, const char *what, bool *host_ret) {
    struct cudaPointerAttributes at;
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    moe4_status status = moe4_cuda_check(ctx, cudaPointerGetAttributes(&at, w->scale), what);
    *host_ret = at.type != cudaMemoryTypeDevice;
    if (status == MOE4_OK && !*host_ret) status = find_bad_scale(ctx, w, what);
    moe4_cuda_leave(saved);
    return status;
}
