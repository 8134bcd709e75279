/* Packed weights through the context's cache folder (../cache.h): found by a digest of the matrices and of the layout's name, read
 * straight into the device's memory. What lies in that memory itself the host cannot look at, and so is not kept. */
#include <string.h>

#include "device.h"
#include "nvfp4_layout.h"

/* What the packed bytes depend on besides codes, scales and values. */
struct about {
    char layout[MOE4_CACHE_LAYOUT];
    uint64_t dtype, rows, cols;
};

static bool host_reads(const void *data) {
    struct cudaPointerAttributes at;
    if (cudaPointerGetAttributes(&at, data) == cudaSuccess) return at.type != cudaMemoryTypeDevice;
    cudaGetLastError();
    return false;
}

/* Whether the matrices are for the cache: some are packed, and the host can read all. */
static bool is_for_cache(const moe4_weight *const *weights, size_t n) {
    bool packed = false;
    for (size_t i = 0; i < n; i++) {
        const moe4_weight *w = weights[i];
        if (!w->data) continue;
        if (!host_reads(w->data) || (w->dtype == MOE4_NVFP4 && !host_reads(w->scale))) return false;
        packed |= w->dtype == MOE4_NVFP4;
    }
    return packed;
}

static moe4_status digest(const moe4_ctx *ctx, struct moe4_cache_key *key, const moe4_weight *const *weights, size_t n, struct about *about,
                          struct moe4_piece *pieces) {
    for (size_t i = 0; i < n; i++) {
        const moe4_weight *w = weights[i];
        const size_t values = w->rows * w->cols;
        if (!w->data) continue; /* no gate, or no gate and up */
        about[i] = (struct about){.layout = MOE4_UNIT_LAYOUT, .dtype = w->dtype, .rows = w->rows, .cols = w->cols};
        pieces[2 * i] = (struct moe4_piece){w->data, w->dtype == MOE4_NVFP4 ? values / 2 : values * (w->dtype == MOE4_F32 ? 4 : 2)};
        if (w->dtype == MOE4_NVFP4) pieces[2 * i + 1] = (struct moe4_piece){w->scale, values / MOE4_BLOCK};
    }
    pieces[2 * n] = (struct moe4_piece){about, n * sizeof *about};
    return ctx->host->digest_pieces(ctx, &key->content, pieces, 2 * n + 1);
}

moe4_status moe4_cuda_cache_key(const moe4_ctx *ctx, struct moe4_cuda_cached *c, const moe4_weight *const *weights, size_t n,
                                size_t bytes) {
    *c = (struct moe4_cuda_cached){.key = {.layout = MOE4_UNIT_LAYOUT, .bytes = bytes}};
    if (!ctx->cache || !is_for_cache(weights, n)) return MOE4_OK;
    struct about *about = moe4_calloc(ctx, n, sizeof *about, "keys of packed weights");
    struct moe4_piece *pieces = about ? moe4_calloc(ctx, 2 * n + 1, sizeof *pieces, "keys of packed weights") : NULL;
    moe4_status status = pieces ? digest(ctx, &c->key, weights, n, about, pieces) : MOE4_ERROR_MEMORY;
    moe4_free(ctx, about);
    moe4_free(ctx, pieces);
    c->usable = status == MOE4_OK;
    return status;
}

moe4_status moe4_cuda_cache_read(const moe4_ctx *ctx, const struct moe4_cuda_cached *c, void *packed, bool *found_ret) {
    void *mapped = c->usable ? ctx->host->cache_map(ctx, &c->key) : NULL;
    *found_ret = mapped != NULL;
    if (!mapped) return MOE4_OK;
    cudaError_t error = cudaMemcpy(packed, mapped, c->key.bytes, cudaMemcpyHostToDevice);
    ctx->host->cache_unmap(mapped, c->key.bytes);
    return moe4_cuda_check(ctx, error, "copying packed weights to the device");
}

moe4_status moe4_cuda_cache_write(const moe4_ctx *ctx, const struct moe4_cuda_cached *c, const void *packed) {
    if (!c->usable) return MOE4_OK;
    void *copy = moe4_calloc(ctx, c->key.bytes, 1, "packed weights for the cache");
    if (!copy) return MOE4_ERROR_MEMORY;
    cudaError_t error = cudaMemcpy(copy, packed, c->key.bytes, cudaMemcpyDeviceToHost);
    if (error == cudaSuccess) ctx->host->cache_write(ctx, &c->key, copy);
    moe4_free(ctx, copy);
    return moe4_cuda_check(ctx, error, "copying packed weights from the device");
}
