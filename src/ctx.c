/* The context: options, allocator, threads, the choice of ISA. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "cache.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "internal.h"
#include "plugin.h"

const char *moe4_version(void) {
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
    return TEXT(MOE4_VERSION_MAJOR) "." TEXT(MOE4_VERSION_MINOR) "." TEXT(MOE4_VERSION_PATCH);
}

/* ---- memory ---- */

static void *default_alloc(void *user, size_t bytes, size_t align) {
    (void)user;
    void *p = NULL;
    return posix_memalign(&p, align, bytes) == 0 ? p : NULL;
}

static void default_free(void *user, void *data) {
    (void)user;
    free(data);
}

void *moe4_calloc(const moe4_ctx *ctx, size_t n, size_t size, const char *what) {
    size_t bytes;
    void *p = moe4_mul(&bytes, n, size) ? ctx->alloc(ctx->alloc_user, bytes ? bytes : 1, 64) : NULL;
    if (p) return memset(p, 0, bytes ? bytes : 1);
    moe4_fail(ctx, MOE4_ERROR_MEMORY, "%s: no memory for %zu x %zu bytes", what, n, size);
    return NULL;
}

void *moe4_regrow(const moe4_ctx *ctx, void *old, size_t old_n, size_t n, size_t size, const char *what) {
    void *p = moe4_calloc(ctx, n, size, what);
    if (!p) return NULL;
    if (old) memcpy(p, old, old_n * size);
    moe4_free(ctx, old);
    return p;
}

void moe4_free(const moe4_ctx *ctx, void *data) {
    if (data) ctx->free(ctx->alloc_user, data);
}

/* ---- option structs of older and newer callers ---- */

bool moe4_options_read(void *dst, size_t dst_bytes, const void *src) {
    if (!src) return true;
    size_t src_bytes;
    memcpy(&src_bytes, src, sizeof src_bytes);
    if (src_bytes < sizeof src_bytes) return false;
    memcpy(dst, src, src_bytes < dst_bytes ? src_bytes : dst_bytes);
    memcpy(dst, &dst_bytes, sizeof dst_bytes);
    for (size_t i = dst_bytes; i < src_bytes; i++) /* a newer caller's fields must be at their zero defaults */
        if (((const unsigned char *)src)[i]) return false;
    return true;
}

void moe4_struct_write(void *dst, const void *src, size_t src_bytes) {
    size_t dst_bytes;
    memcpy(&dst_bytes, dst, sizeof dst_bytes);
    if (dst_bytes > sizeof dst_bytes) {
        size_t n = (dst_bytes < src_bytes ? dst_bytes : src_bytes) - sizeof dst_bytes;
        memcpy((char *)dst + sizeof dst_bytes, (const char *)src + sizeof dst_bytes, n);
    }
}

/* ---- ISA ---- */

/* `least`: the bit where an architecture's own begin. */
static const struct {
    const char *name;
    uint32_t bit, least;
} isas[] = {
    {"scalar", MOE4_ISA_SCALAR, MOE4_ISA_SCALAR},
    {"avx2", MOE4_ISA_AVX2, MOE4_ISA_AVX2},
    {"avx512vnni", MOE4_ISA_AVX512VNNI, MOE4_ISA_AVX2},
    {"avx512bf16", MOE4_ISA_AVX512BF16, MOE4_ISA_AVX2},
    {"neon", MOE4_ISA_NEON, MOE4_ISA_NEON},
    {"neondot", MOE4_ISA_NEONDOT, MOE4_ISA_NEON},
    {"neoni8mm", MOE4_ISA_NEONI8MM, MOE4_ISA_NEON},
};
enum { N_ISAS = sizeof isas / sizeof *isas };

uint32_t moe4_isa_mask(const char *name) {
    for (int i = 0; name && i < N_ISAS; i++)
        if (strcmp(name, isas[i].name) == 0) return MOE4_ISA_SCALAR | (2 * isas[i].bit - isas[i].least);
    return 0;
}

static moe4_status choose_isa(moe4_ctx *ctx, uint32_t asked) {
    uint32_t have = moe4_cpu_isas(), use = (asked ? asked & have : have) | MOE4_ISA_SCALAR;
    for (int i = 0; i < N_ISAS; i++) asked &= ~isas[i].bit;
    MOE4_CHECK(ctx, !asked, MOE4_ERROR_ARGUMENT, "options.isa_mask: unknown bits 0x%x", asked);
    struct moe4_kernels *k = moe4_calloc(ctx, 1, sizeof *k, "kernel table");
    if (!k) return MOE4_ERROR_MEMORY;
    moe4_kernels_init(k, use);
    ctx->kernels = k;

    size_t at = (size_t)snprintf(ctx->isa_reason, sizeof ctx->isa_reason, "best of ");
    const char *sep = "";
    for (int i = 0; i < N_ISAS; i++)
        if (use & isas[i].bit) {
            at += (size_t)snprintf(ctx->isa_reason + at, sizeof ctx->isa_reason - at, "%s%s", sep, isas[i].name);
            sep = ", ";
        }
    snprintf(ctx->isa_reason + at, sizeof ctx->isa_reason - at, use == have ? " on this CPU" : " as asked");
    return MOE4_OK;
}

/* ---- life ---- */

static moe4_status ctx_init(moe4_ctx *ctx, const moe4_ctx_options *o) {
    ctx->backend = &moe4_backend_cpu;
    snprintf(ctx->device_name, sizeof ctx->device_name, "cpu");
    MOE4_TRY(choose_isa(ctx, o->isa_mask));
    MOE4_TRY(moe4_pool_create(&ctx->pool, ctx, o->n_threads ? o->n_threads : moe4_cpu_threads(), o->run, o->run_user));
    if (o->cache) MOE4_TRY(moe4_cache_open(ctx, o->cache));
    if (o->device && strcmp(o->device, "cpu") != 0) MOE4_TRY(moe4_device_open(ctx, o->device));
    return moe4_errors_init(ctx); /* last: until then a failure goes to the log */
}

moe4_status moe4_ctx_create(moe4_ctx **ctx_ret, const moe4_ctx_options *options) {
    if (!ctx_ret) return MOE4_ERROR_ARGUMENT;
    *ctx_ret = NULL;
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    bool known = moe4_options_read(&o, sizeof o, options);
    moe4_ctx start = {.alloc = default_alloc, .free = default_free, .log = o.log, .log_user = o.log_user};
    MOE4_CHECK(&start, known, MOE4_ERROR_ARGUMENT, "options: struct_size is wrong, or a field is set that moe4 %s lacks", moe4_version());
    MOE4_CHECK(&start, !o.alloc == !o.free, MOE4_ERROR_ARGUMENT, "options: alloc and free go together");
    MOE4_CHECK(&start, o.n_threads <= MOE4_MAX_THREADS, MOE4_ERROR_ARGUMENT, "options.n_threads: %zu, at most %d", o.n_threads,
               MOE4_MAX_THREADS);
    if (o.alloc) {
        start.alloc = o.alloc;
        start.free = o.free;
        start.alloc_user = o.alloc_user;
    }
    moe4_ctx *ctx = moe4_calloc(&start, 1, sizeof *ctx, "context");
    if (!ctx) return MOE4_ERROR_MEMORY;
    *ctx = start;
    moe4_status status = ctx_init(ctx, &o);
    if (status != MOE4_OK) {
        moe4_ctx_destroy(ctx);
        return status;
    }
    *ctx_ret = ctx;
    return MOE4_OK;
}

void moe4_ctx_destroy(moe4_ctx *ctx) {
    if (!ctx) return;
    moe4_device_close(ctx);
    moe4_pool_destroy(ctx->pool, ctx);
    moe4_free(ctx, (void *)ctx->kernels);
    moe4_free(ctx, ctx->cache);
    moe4_errors_free(ctx);
    moe4_ctx copy = *ctx;
    moe4_free(&copy, ctx);
}

size_t moe4_ctx_n_threads(const moe4_ctx *ctx) {
    return moe4_pool_n_threads(ctx->pool);
}

const char *moe4_ctx_isa(const moe4_ctx *ctx) {
    return ctx->kernels->isa;
}

const char *moe4_ctx_isa_reason(const moe4_ctx *ctx) {
    return ctx->isa_reason;
}

const char *moe4_ctx_device(const moe4_ctx *ctx) {
    return ctx->device_name;
}

void moe4_parallel_for(moe4_ctx *ctx, size_t n_tasks, moe4_task_fn fn, void *arg) {
    moe4_pool_run(ctx->pool, n_tasks, SIZE_MAX, fn, arg);
}
