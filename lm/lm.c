/* Errors, memory, the clock. */
#include "lm.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

moe4_status lm_fail(struct lm *lm, moe4_status status, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vsnprintf(lm->error, sizeof lm->error, fmt, args);
    va_end(args);
    return status;
}

void lm_note(struct lm *lm) {
    if (!lm->error[0]) snprintf(lm->error, sizeof lm->error, "%s", moe4_ctx_error(lm->ctx));
}

void *lm_calloc(struct lm *lm, size_t n, size_t size, const char *what) {
    size_t bytes;
    void *p = NULL;
    if (!__builtin_mul_overflow(n, size, &bytes) && posix_memalign(&p, 64, bytes ? bytes : 1) == 0) return memset(p, 0, bytes);
    lm_fail(lm, MOE4_ERROR_MEMORY, "%s: no memory for %zu x %zu bytes", what, n, size);
    return NULL;
}

double lm_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
