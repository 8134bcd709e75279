/* What the core and a device's plug-in (libmoe4_cuda.so) say to each other. The plug-in is opened by name at run time, so both sides
 * state the version and the sizes of the structs they share, and a plug-in of another build is refused with a sentence. */
#ifndef MOE4_PLUGIN_H
#define MOE4_PLUGIN_H

#include "backend.h"
#include "cache.h"

enum { MOE4_PLUGIN_ABI = 3 };

/* The core's services; the plug-in links nothing of the core. */
struct moe4_plugin_host {
    moe4_status (*fail)(const moe4_ctx *ctx, moe4_status status, const char *text);
    void *(*calloc)(const moe4_ctx *ctx, size_t n, size_t size, const char *what);
    void (*free)(const moe4_ctx *ctx, void *data);
    const char *(*dtype_name)(moe4_dtype dtype);
    moe4_status (*digest_pieces)(const moe4_ctx *ctx, struct moe4_digest *digest_ret, const struct moe4_piece *pieces, size_t n);
    void *(*cache_map)(const moe4_ctx *ctx, const struct moe4_cache_key *key);
    void (*cache_unmap)(void *data, size_t bytes);
    void (*cache_write)(const moe4_ctx *ctx, const struct moe4_cache_key *key, const void *data);
};

struct moe4_plugin {
    uint32_t abi;
    const char *version; /* moe4_version() of its sources */
    size_t ctx_bytes, backend_bytes, moe_bytes, linear_bytes, grouped_bytes, router_bytes;
    /* Device `index` for this context: sets ctx->backend and ctx->device. Errors: DEVICE (no driver, no such device, its
     * architecture). */
    moe4_status (*open)(moe4_ctx *ctx, int index);
    void (*close)(moe4_ctx *ctx);
};

/* The plug-in's one exported symbol: the table, static. */
#define MOE4_PLUGIN_SYMBOL "moe4_plugin"

/* device.c: the device that options.device names ("cuda", "cuda:1"); sets ctx->plugin. Close undoes it and may always be called. */
moe4_status moe4_device_open(moe4_ctx *ctx, const char *name);
void moe4_device_close(moe4_ctx *ctx);

#endif
