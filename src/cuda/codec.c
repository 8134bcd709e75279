/* The codec's calls on the device. They answer with errors about the data and with numbers, so each waits for its stream; converting
 * scales looks at no number and need not. */
#include "device.h"

static cudaStream_t stream_of(const moe4_codec_call *c) {
    return c->o.stream;
}

/* Waits for the stream even after a failure: the scratch memory is about to go. */
static cudaError_t wait(const moe4_codec_call *c, cudaError_t error) {
    cudaError_t waited = cudaStreamSynchronize(stream_of(c));
    return error == cudaSuccess ? waited : error;
}

static size_t n_globals(const moe4_codec_call *c) {
    return c->o.per_row ? c->rows : 1;
}

/* fn with `bytes` of device memory, on the context's device. */
struct scratch_call {
    const moe4_codec_call *c;
    const void *in; /* host memory to begin with, in_bytes of it */
    size_t in_bytes, bytes;
    void *out; /* host memory that gets what the device memory holds from out_at on */
    size_t out_at, out_bytes;
    cudaError_t (*work)(const moe4_codec_call *c, void *scratch);
    const char *what;
};

static moe4_status with_scratch(const struct scratch_call *s) {
    const moe4_ctx *ctx = s->c->ctx;
    const size_t in_row = s->c->cols / MOE4_CODEC_TASK + 1;
    MOE4_CHECK(ctx, s->c->rows < MOE4_MAX_CODEC_TASKS / in_row, MOE4_ERROR_UNSUPPORTED,
               "%s: %zu x %zu; on a device fewer than %u rows of %d", s->what, s->c->rows, s->c->cols, MOE4_MAX_CODEC_TASKS,
               MOE4_CODEC_TASK);
    cudaStream_t stream = stream_of(s->c);
    void *scratch = NULL;
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    moe4_status status = moe4_cuda_alloc(ctx, &scratch, s->bytes, s->what);
    if (status == MOE4_OK) {
        cudaError_t error = s->in_bytes ? cudaMemcpyAsync(scratch, s->in, s->in_bytes, cudaMemcpyHostToDevice, stream) : cudaSuccess;
        if (error == cudaSuccess) error = s->work(s->c, scratch);
        if (error == cudaSuccess && s->out_bytes)
            error = cudaMemcpyAsync(s->out, (char *)scratch + s->out_at, s->out_bytes, cudaMemcpyDeviceToHost, stream);
        status = moe4_cuda_check(ctx, wait(s->c, error), s->what);
        cudaFree(scratch);
    }
    moe4_cuda_leave(saved);
    return status;
}

static cudaError_t amax(const moe4_codec_call *c, void *scratch) {
    return moe4_cuda_codec_amax(c, scratch, stream_of(c));
}

moe4_status moe4_cuda_amax(const moe4_codec_call *c, uint32_t *amax_ret) {
    const size_t bytes = n_globals(c) * sizeof *amax_ret;
    const struct scratch_call s = {.c = c, .bytes = bytes, .out = amax_ret, .out_bytes = bytes, .work = amax, .what = "amax"};
    return with_scratch(&s);
}

/* The count, then the scales. */
static cudaError_t quantize(const moe4_codec_call *c, void *scratch) {
    moe4_codec_scale *scales = scratch;
    return moe4_cuda_codec_quantize(c, scales, (unsigned long long *)(scales + n_globals(c)), stream_of(c));
}

moe4_status moe4_cuda_quantize(const moe4_codec_call *c, const moe4_codec_scale *scales, uint64_t *n_saturated_ret) {
    const size_t bytes = n_globals(c) * sizeof *scales;
    const struct scratch_call s = {.c = c,
                                   .in = scales,
                                   .in_bytes = bytes,
                                   .bytes = bytes + sizeof *n_saturated_ret,
                                   .out = n_saturated_ret,
                                   .out_at = bytes,
                                   .out_bytes = sizeof *n_saturated_ret,
                                   .work = quantize,
                                   .what = "quantize"};
    return with_scratch(&s);
}

static cudaError_t dequantize(const moe4_codec_call *c, void *scratch) {
    return moe4_cuda_codec_dequantize(c, scratch, stream_of(c));
}

moe4_status moe4_cuda_dequantize(const moe4_codec_call *c, const float *globals) {
    const size_t bytes = n_globals(c) * sizeof *globals;
    const struct scratch_call s = {.c = c, .in = globals, .in_bytes = bytes, .bytes = bytes, .work = dequantize, .what = "dequantize"};
    return with_scratch(&s);
}

static cudaError_t find_nonfinite(const moe4_codec_call *c, void *scratch) {
    return moe4_cuda_codec_find(c, 0, scratch, stream_of(c));
}

static cudaError_t find_bad_scale(const moe4_codec_call *c, void *scratch) {
    return moe4_cuda_codec_find(c, 1, scratch, stream_of(c));
}

moe4_status moe4_cuda_codec_look(const moe4_codec_call *c, bool of_scales, uint64_t *first_bad_ret) {
    const struct scratch_call s = {.c = c,
                                   .bytes = sizeof *first_bad_ret,
                                   .out = first_bad_ret,
                                   .out_bytes = sizeof *first_bad_ret,
                                   .work = of_scales ? find_bad_scale : find_nonfinite,
                                   .what = "looking for what cannot be used"};
    return with_scratch(&s);
}

moe4_status moe4_cuda_convert_scales(const moe4_ctx *ctx, const moe4_scales_conversion *s, void *stream, bool waits) {
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    cudaError_t error = moe4_cuda_scales_convert(s, stream);
    if (error == cudaSuccess && waits) error = cudaStreamSynchronize(stream);
    moe4_cuda_leave(saved);
    return moe4_cuda_check(ctx, error, "moe4_scales_convert");
}
