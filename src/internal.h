/* What every file of the library may use: errors, memory, the context. Nothing of a format, a backend or a layer. */
#ifndef MOE4_INTERNAL_H
#define MOE4_INTERNAL_H

#include "contract.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "moe4.h"

struct moe4_error; /* status.c */
struct moe4_pool;  /* cpu/pool.h */
struct moe4_kernels;
struct moe4_backend;

struct moe4_ctx {
    moe4_alloc_fn alloc;
    moe4_free_fn free;
    void *alloc_user;
    moe4_log_fn log;
    void *log_user;
    char *cache;               /* the folder of packed weights, or NULL: cache.h */
    struct moe4_error *errors; /* a list, one entry for each thread that ever failed */
    const struct moe4_backend *backend;
    struct moe4_pool *pool;
    const struct moe4_kernels *kernels;
    const struct moe4_plugin *plugin; /* plugin.h: of a device; NULL on the CPU, as are host and device */
    const struct moe4_plugin_host *host;
    void *device;         /* the plug-in's */
    char device_name[16]; /* "cpu", "cuda:0" */
    char isa_reason[128];
};

/* Records the sentence for the calling thread and returns `status`. The first call after moe4_begin wins. */
moe4_status moe4_fail(const moe4_ctx *ctx, moe4_status status, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* At the start of every public call that can fail: forgets the calling thread's last error. */
void moe4_begin(const moe4_ctx *ctx);
moe4_status moe4_errors_init(moe4_ctx *ctx);
void moe4_errors_free(moe4_ctx *ctx);

#define MOE4_CHECK(ctx, cond, status, ...)                       \
    do {                                                         \
        if (!(cond)) return moe4_fail(ctx, status, __VA_ARGS__); \
    } while (0)
#define MOE4_TRY(expr)                                \
    do {                                              \
        moe4_status try_status = (expr);              \
        if (try_status != MOE4_OK) return try_status; \
    } while (0)

/* n * size bytes from the context's allocator, 64-byte aligned and zeroed; NULL with the error recorded as MEMORY ("what: n x size
 * bytes"). n * size == 0 gives a valid pointer. */
void *moe4_calloc(const moe4_ctx *ctx, size_t n, size_t size, const char *what);
/* The same for old_n elements grown to n; the old block is freed on success and kept on failure. */
void *moe4_regrow(const moe4_ctx *ctx, void *old, size_t old_n, size_t n, size_t size, const char *what);
void moe4_free(const moe4_ctx *ctx, void *data);

/* *r = a * b or a + b; false when it does not fit. */
static inline bool moe4_mul(size_t *r, size_t a, size_t b) {
    return !__builtin_mul_overflow(a, b, r);
}
static inline bool moe4_add(size_t *r, size_t a, size_t b) {
    return !__builtin_add_overflow(a, b, r);
}

/* Copies the caller's option struct over `dst` (already at its defaults), as much as both sides know: older and newer callers work.
 * `src` NULL keeps the defaults. The first member of both is struct_size. False when a newer caller set a field this library lacks. */
bool moe4_options_read(void *dst, size_t dst_bytes, const void *src);
/* The same outwards: fills the caller's struct up to the struct_size it states. */
void moe4_struct_write(void *dst, const void *src, size_t src_bytes);

#endif
