/* The plug-in's table, the device of a context, its errors and its memory. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "accept.h"
#include "cublas.h"
#include "device.h"

/* ---- the core's services, under the names that its macros use ---- */

moe4_status moe4_fail(const moe4_ctx *ctx, moe4_status status, const char *fmt, ...) {
    char text[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    return ctx->host->fail(ctx, status, text);
}

void *moe4_calloc(const moe4_ctx *ctx, size_t n, size_t size, const char *what) {
    return ctx->host->calloc(ctx, n, size, what);
}

void moe4_free(const moe4_ctx *ctx, void *data) {
    ctx->host->free(ctx, data);
}

/* ---- CUDA ---- */

moe4_status moe4_cuda_check(const moe4_ctx *ctx, cudaError_t error, const char *what) {
    if (error == cudaSuccess) return MOE4_OK;
    cudaGetLastError(); /* an error that has been told is not told again by the next call */
    moe4_status status = error == cudaErrorMemoryAllocation ? MOE4_ERROR_MEMORY : MOE4_ERROR_DEVICE;
    return moe4_fail(ctx, status, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

moe4_status moe4_cuda_enter(const moe4_ctx *ctx, struct moe4_cuda_current *saved) {
    int index = moe4_cuda_of(ctx)->index;
    CUDA_TRY(ctx, cudaGetDevice(&saved->before), "cudaGetDevice");
    if (saved->before != index) CUDA_TRY(ctx, cudaSetDevice(index), "cudaSetDevice");
    return MOE4_OK;
}

void moe4_cuda_leave(struct moe4_cuda_current saved) {
    int now;
    if (cudaGetDevice(&now) == cudaSuccess && now != saved.before) cudaSetDevice(saved.before);
}

moe4_status moe4_cuda_alloc(const moe4_ctx *ctx, void **data_ret, size_t bytes, const char *what) {
    cudaError_t error = cudaMalloc(data_ret, bytes ? bytes : 1);
    if (error != cudaErrorMemoryAllocation) return moe4_cuda_check(ctx, error, what);
    cudaGetLastError();
    size_t available = 0, total = 0;
    cudaMemGetInfo(&available, &total);
    return moe4_fail(ctx, MOE4_ERROR_MEMORY, "%s: %zu bytes, and device %d has %zu of %zu free", what, bytes, moe4_cuda_of(ctx)->index,
                     available, total);
}

struct moe4_cublas *moe4_cuda_blas(const moe4_ctx *ctx) {
    struct moe4_cuda_device *d = ctx->device;
    char why[96];
    pthread_mutex_lock(&d->lock);
    if (!d->looked_for_blas) d->blas = moe4_cublas_open(why, sizeof why);
    d->looked_for_blas = true;
    pthread_mutex_unlock(&d->lock);
    return d->blas;
}

static moe4_status memory_owner(const moe4_ctx *ctx, const void *data, const char *what, enum moe4_owner *owner_ret) {
    struct cudaPointerAttributes at;
    CUDA_TRY(ctx, cudaPointerGetAttributes(&at, data), what);
    int index = moe4_cuda_of(ctx)->index;
    MOE4_CHECK(ctx, at.type != cudaMemoryTypeDevice || at.device == index, MOE4_ERROR_ARGUMENT,
               "%s is memory of cuda:%d, and the context's device is cuda:%d", what, at.device, index);
    *owner_ret = at.type == cudaMemoryTypeDevice                        ? MOE4_OF_DEVICE
                 : at.type == cudaMemoryTypeManaged || at.devicePointer ? MOE4_OF_BOTH
                                                                        : MOE4_OF_HOST;
    return MOE4_OK;
}

moe4_status moe4_cuda_check_pointer(const moe4_ctx *ctx, const void *data, const char *what) {
    enum moe4_owner owner;
    MOE4_TRY(memory_owner(ctx, data, what, &owner));
    MOE4_CHECK(ctx, owner != MOE4_OF_HOST, MOE4_ERROR_ARGUMENT, "%s is host memory, and the context's device is cuda:%d", what,
               moe4_cuda_of(ctx)->index);
    return MOE4_OK;
}

moe4_status moe4_cuda_check_x(const moe4_ctx *ctx, const void *x, moe4_dtype dtype, const char *what) {
    if (dtype != MOE4_NVFP4) return moe4_cuda_check_pointer(ctx, x, what);
    const moe4_nvfp4_rows *rows = x;
    MOE4_TRY(moe4_cuda_check_pointer(ctx, rows->codes, "x: codes"));
    MOE4_TRY(moe4_cuda_check_pointer(ctx, rows->scales, "x: scales"));
    return moe4_cuda_check_pointer(ctx, rows->global, "x: global");
}

/* ---- memory for callers ---- */

static moe4_status memory_alloc(moe4_ctx *ctx, void **data_ret, size_t bytes) {
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    moe4_status status = moe4_cuda_alloc(ctx, data_ret, bytes, "moe4_memory_alloc");
    moe4_cuda_leave(saved);
    return status;
}

static void memory_free(moe4_ctx *ctx, void *data) {
    struct moe4_cuda_current saved;
    if (moe4_cuda_enter(ctx, &saved) != MOE4_OK) return;
    cudaFree(data);
    moe4_cuda_leave(saved);
}

static moe4_status memory_copy(moe4_ctx *ctx, void *dst, const void *src, size_t bytes, void *stream) {
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    cudaError_t error = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    moe4_cuda_leave(saved);
    return moe4_cuda_check(ctx, error, "moe4_memory_copy");
}

/* ---- the table ---- */

static const struct moe4_backend backend = {
    .name = "cuda",
    .is_device = true,
    .experts_prepare = moe4_cuda_experts_prepare,
    .experts_release = moe4_cuda_experts_release,
    .expert_replaced = moe4_cuda_expert_replaced,
    .moe_bytes = moe4_cuda_moe_bytes,
    .begin = moe4_cuda_begin,
    .dispatch = moe4_cuda_dispatch,
    .quantize_x = moe4_cuda_quantize_x,
    .gate_up = moe4_cuda_gate_up_stage,
    .quantize_h = moe4_cuda_quantize_h_stage,
    .down = moe4_cuda_down_stage,
    .combine = moe4_cuda_combine_stage,
    .report = moe4_cuda_report,
    .linear_prepare = moe4_cuda_linear_prepare,
    .linear_release = moe4_cuda_linear_release,
    .linear_bytes = moe4_cuda_linear_bytes,
    .linear_forward = moe4_cuda_linear_forward,
    .grouped_prepare = moe4_cuda_grouped_prepare,
    .grouped_release = moe4_cuda_grouped_release,
    .grouped_bytes = moe4_cuda_grouped_bytes,
    .grouped_forward = moe4_cuda_grouped_forward,
    .scales_check = moe4_cuda_scales_check,
    .memory_alloc = memory_alloc,
    .memory_free = memory_free,
    .memory_copy = memory_copy,
    .router_prepare = moe4_cuda_router_prepare,
    .router_release = moe4_cuda_router_release,
    .select = moe4_cuda_select,
    .amax = moe4_cuda_amax,
    .codec_look = moe4_cuda_codec_look,
    .quantize = moe4_cuda_quantize,
    .dequantize = moe4_cuda_dequantize,
    .scales_convert = moe4_cuda_convert_scales,
    .memory_owner = memory_owner,
    .ceilings = moe4_cuda_ceilings,
};

static moe4_status find_device(moe4_ctx *ctx, struct moe4_cuda_device *d, int index) {
    struct moe4_cuda_facts facts = {.index = index, .runtime = CUDART_VERSION};
    struct cudaDeviceProp p;
    if (cudaDriverGetVersion(&facts.driver) != cudaSuccess) facts.driver = 0;
    MOE4_TRY(moe4_cuda_accept_driver(ctx, &facts));
    cudaError_t error = cudaGetDeviceCount(&facts.n_devices);
    if (error == cudaErrorNoDevice) facts.n_devices = 0;
    if (error != cudaErrorNoDevice) CUDA_TRY(ctx, error, "looking for devices");
    if (index < facts.n_devices) {
        CUDA_TRY(ctx, cudaGetDeviceProperties(&p, index), "cudaGetDeviceProperties");
        facts.name = p.name;
        facts.major = p.major;
        facts.minor = p.minor;
    }
    MOE4_TRY(moe4_cuda_accept_device(ctx, &facts));
    *d = (struct moe4_cuda_device){.index = index, .major = p.major, .minor = p.minor, .n_sms = p.multiProcessorCount};
    snprintf(d->name, sizeof d->name, "%s", p.name);
    return MOE4_OK;
}

static moe4_status plugin_open(moe4_ctx *ctx, int index) {
    struct moe4_cuda_device d;
    MOE4_TRY(find_device(ctx, &d, index));
    struct moe4_cuda_device *own = moe4_calloc(ctx, 1, sizeof *own, "device");
    if (!own) return MOE4_ERROR_MEMORY;
    *own = d;
    pthread_mutex_init(&own->lock, NULL); /* with these attributes it cannot fail */
    ctx->device = own;
    ctx->backend = &backend;
    return MOE4_OK;
}

static void plugin_close(moe4_ctx *ctx) {
    struct moe4_cuda_device *own = ctx->device;
    struct moe4_cuda_current saved;
    if (own->blas && moe4_cuda_enter(ctx, &saved) == MOE4_OK) {
        moe4_cublas_close(own->blas);
        moe4_cuda_leave(saved);
    }
    pthread_mutex_destroy(&own->lock);
    moe4_free(ctx, own);
    ctx->device = NULL;
}

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
extern const struct moe4_plugin moe4_plugin;
__attribute__((visibility("default"))) const struct moe4_plugin moe4_plugin = {
    MOE4_PLUGIN_ABI,      TEXT(MOE4_VERSION_MAJOR) "." TEXT(MOE4_VERSION_MINOR) "." TEXT(MOE4_VERSION_PATCH),
    sizeof(moe4_ctx),     sizeof(struct moe4_backend),
    sizeof(moe4_moe),     sizeof(moe4_linear),
    sizeof(moe4_grouped), sizeof(moe4_router),
    plugin_open,          plugin_close,
};
