/* Devices are plug-ins: libmoe4_cuda.so is opened when a context asks for "cuda", and never before, so the core runs without it. */
#define _GNU_SOURCE /* dladdr */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "plugin.h"

static moe4_status host_fail(const moe4_ctx *ctx, moe4_status status, const char *text) {
    return moe4_fail(ctx, status, "%s", text);
}

static const struct moe4_plugin_host host = {host_fail,          moe4_calloc,    moe4_free,        moe4_dtype_name,
                                             moe4_digest_pieces, moe4_cache_map, moe4_cache_unmap, moe4_cache_write};

/* "cuda" or "cuda:N" -> N; -1 for anything else. */
static int device_index(const char *name) {
    if (strncmp(name, "cuda", 4) != 0) return -1;
    if (!name[4]) return 0;
    size_t digits = name[4] == ':' ? strspn(name + 5, "0123456789") : 0;
    return digits >= 1 && digits <= 4 && !name[5 + digits] ? atoi(name + 5) : -1;
}

enum { PATH_BYTES = 4096 };

/* "/usr/bin/": where this library or program lies. A program that was found by the shell's PATH does not know it by its own name. */
static bool own_folder(char folder[static PATH_BYTES]) {
    Dl_info self;
    const bool known = dladdr(&host, &self) && self.dli_fname && strchr(self.dli_fname, '/');
    const ssize_t n = known ? (ssize_t)strlen(self.dli_fname) : readlink("/proc/self/exe", folder, PATH_BYTES - 1);
    if (n < 0 || n >= PATH_BYTES) return false;
    if (known) memcpy(folder, self.dli_fname, (size_t)n);
    folder[n] = '\0';
    char *slash = strrchr(folder, '/');
    if (slash) slash[1] = '\0';
    return slash;
}

/* First beside this library or program, or in the lib folder beside its own, then where the loader looks. */
static void *open_library(const char *file, char *why, size_t why_bytes) {
    static const char *const places[] = {"", "../lib/"};
    char folder[PATH_BYTES], path[PATH_BYTES];
    const char *open = file;
    for (int i = 0; i < 2 && open == file && own_folder(folder); i++) {
        int n = snprintf(path, sizeof path, "%s%s%s", folder, places[i], file);
        if (n > 0 && (size_t)n < sizeof path && access(path, F_OK) == 0) open = path;
    }
    void *library = dlopen(open, RTLD_NOW | RTLD_LOCAL);
    const char *error = library ? NULL : dlerror();
    snprintf(why, why_bytes, "%s", error ? error : "unknown error");
    return library;
}

/* The library stays open when the context goes: the CUDA runtime in it does not survive being unloaded. */
moe4_status moe4_device_open(moe4_ctx *ctx, const char *name) {
    static const char file[] = "libmoe4_cuda.so";
    int index = device_index(name);
    MOE4_CHECK(ctx, index >= 0, MOE4_ERROR_ARGUMENT, "options.device: \"%s\" (cpu, cuda or cuda:N)", name);
    char why[320];
    void *library = open_library(file, why, sizeof why);
    MOE4_CHECK(ctx, library, MOE4_ERROR_DEVICE, "options.device \"%s\": the plug-in does not open: %s", name, why);
    const struct moe4_plugin *p = dlsym(library, MOE4_PLUGIN_SYMBOL);
    MOE4_CHECK(ctx, p, MOE4_ERROR_DEVICE, "%s: has no symbol %s", file, MOE4_PLUGIN_SYMBOL);
    MOE4_CHECK(ctx, p->abi == MOE4_PLUGIN_ABI, MOE4_ERROR_DEVICE, "%s: interface version %u, need %d", file, (unsigned)p->abi,
               MOE4_PLUGIN_ABI);
    MOE4_CHECK(ctx,
               p->ctx_bytes == sizeof(moe4_ctx) && p->backend_bytes == sizeof(struct moe4_backend) && p->moe_bytes == sizeof(moe4_moe) &&
                   p->linear_bytes == sizeof(moe4_linear) && p->grouped_bytes == sizeof(moe4_grouped) &&
                   p->router_bytes == sizeof(moe4_router),
               MOE4_ERROR_DEVICE, "%s: is of another build (version %s beside %s)", file, p->version, moe4_version());
    ctx->host = &host;
    snprintf(ctx->device_name, sizeof ctx->device_name, "cuda:%d", index);
    MOE4_TRY(p->open(ctx, index));
    ctx->plugin = p;
    return MOE4_OK;
}

void moe4_device_close(moe4_ctx *ctx) {
    if (ctx->plugin) ctx->plugin->close(ctx);
    ctx->plugin = NULL;
}

moe4_status moe4_buffers_owner(const moe4_ctx *ctx, bool *on_device_ret, const struct moe4_buffer *buffers, size_t n) {
    const struct moe4_buffer *of_host = NULL, *of_device = NULL;
    *on_device_ret = false;
    for (size_t i = 0; ctx->backend->memory_owner && i < n; i++) {
        enum moe4_owner owner = MOE4_OF_BOTH;
        if (buffers[i].data) MOE4_TRY(ctx->backend->memory_owner(ctx, buffers[i].data, buffers[i].name, &owner));
        if (owner == MOE4_OF_HOST && !of_host) of_host = &buffers[i];
        if (owner == MOE4_OF_DEVICE && !of_device) of_device = &buffers[i];
    }
    MOE4_CHECK(ctx, !of_host || !of_device, MOE4_ERROR_ARGUMENT, "%s is host memory, and %s is memory of %s: a call takes one or the other",
               of_host->name, of_device->name, ctx->device_name);
    *on_device_ret = of_device != NULL;
    return MOE4_OK;
}

moe4_status moe4_ctx_ceilings(moe4_ctx *ctx, moe4_ceilings *ceilings_ret) {
    moe4_ceilings ceilings = MOE4_CEILINGS_INIT;
    moe4_begin(ctx);
    MOE4_CHECK(ctx, ceilings_ret, MOE4_ERROR_ARGUMENT, "moe4_ctx_ceilings: NULL ceilings_ret");
    MOE4_CHECK(ctx, ctx->backend->ceilings, MOE4_ERROR_UNSUPPORTED, "moe4_ctx_ceilings: %s; only a device's are known", ctx->backend->name);
    MOE4_TRY(ctx->backend->ceilings(ctx, &ceilings));
    moe4_struct_write(ceilings_ret, &ceilings, sizeof ceilings);
    return MOE4_OK;
}

/* ---- memory that a context's calls read and write ---- */

moe4_status moe4_memory_alloc(moe4_ctx *ctx, void **data_ret, size_t bytes) {
    moe4_begin(ctx);
    MOE4_CHECK(ctx, data_ret, MOE4_ERROR_ARGUMENT, "moe4_memory_alloc: NULL data_ret");
    *data_ret = NULL;
    if (ctx->backend->memory_alloc) return ctx->backend->memory_alloc(ctx, data_ret, bytes);
    *data_ret = moe4_calloc(ctx, bytes, 1, "moe4_memory_alloc");
    return *data_ret ? MOE4_OK : MOE4_ERROR_MEMORY;
}

void moe4_memory_free(moe4_ctx *ctx, void *data) {
    if (!data) return;
    if (ctx->backend->memory_free)
        ctx->backend->memory_free(ctx, data);
    else
        moe4_free(ctx, data);
}

moe4_status moe4_memory_copy(moe4_ctx *ctx, void *dst, const void *src, size_t bytes, void *stream) {
    moe4_begin(ctx);
    MOE4_CHECK(ctx, !bytes || (dst && src), MOE4_ERROR_ARGUMENT, "moe4_memory_copy: NULL %s", dst ? "src" : "dst");
    if (!bytes) return MOE4_OK;
    if (ctx->backend->memory_copy) return ctx->backend->memory_copy(ctx, dst, src, bytes, stream);
    memcpy(dst, src, bytes);
    return MOE4_OK;
}
