/* Block scales that the host cannot read are looked at where they are. */
#include "device.h"

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
