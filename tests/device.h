/* For the tests that need a device: two contexts, the scalar CPU and the GPU, and copies in the latter's memory. */
#ifndef MOE4_TESTS_DEVICE_H
#define MOE4_TESTS_DEVICE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "moe4.h"

static moe4_ctx *cpu, *gpu;
static char logged[512];

#ifndef OK
#define OK(ctx, expr)                                                          \
    do {                                                                       \
        if ((expr) != MOE4_OK) fail_msg("%s: %s", #expr, moe4_ctx_error(ctx)); \
    } while (0)
#endif

static inline void keep_log(void *user, const char *line) {
    (void)user;
    snprintf(logged, sizeof logged, "%s", line);
}

static inline moe4_ctx *open_device(const char *device, uint32_t isa_mask) {
    moe4_ctx *ctx;
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.device = device;
    o.isa_mask = isa_mask;
    o.log = keep_log;
    return moe4_ctx_create(&ctx, &o) == MOE4_OK ? ctx : NULL;
}

/* 0, or the exit status of a test that cannot run here: 77 where there is no device. */
static inline int open_both(const char *test) {
    gpu = open_device("cuda:0", 0);
    cpu = open_device(NULL, MOE4_ISA_SCALAR);
    if (gpu && cpu) return 0;
    printf("%s: skipped: %s\n", test, logged);
    return strstr(logged, "no NVIDIA driver") || strstr(logged, "shows 0 devices") ? 77 : 1;
}

static inline void close_both(void) {
    moe4_ctx_destroy(cpu);
    moe4_ctx_destroy(gpu);
}

/* bytes of the device's memory, `shift` past where they were allocated, with host's contents (NULL: 0xEE). */
static inline void *on_device(const void *host, size_t bytes, size_t shift) {
    void *p, *filled = host ? NULL : malloc(bytes + 1);
    if (filled) memset(filled, 0xEE, bytes);
    OK(gpu, moe4_memory_alloc(gpu, &p, bytes + shift));
    OK(gpu, moe4_memory_copy(gpu, (char *)p + shift, host ? host : filled, bytes, NULL));
    free(filled);
    return (char *)p + shift;
}

static inline void from_device(void *host, const void *there, size_t bytes) {
    OK(gpu, moe4_memory_copy(gpu, host, there, bytes, NULL));
}

static inline void free_device(void *there, size_t shift) {
    moe4_memory_free(gpu, (char *)there - shift);
}

#endif
