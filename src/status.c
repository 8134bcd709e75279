/* Codes to text, and the sentence of each thread's last failure. */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

const char *moe4_status_text(moe4_status status) {
    switch (status) {
    case MOE4_OK: return "ok";
    case MOE4_ERROR_ARGUMENT: return "bad argument";
    case MOE4_ERROR_FORMAT: return "malformed data";
    case MOE4_ERROR_UNSUPPORTED: return "unsupported";
    case MOE4_ERROR_NOT_FOUND: return "not found";
    case MOE4_ERROR_MEMORY: return "out of memory";
    case MOE4_ERROR_IO: return "input/output error";
    case MOE4_ERROR_DEVICE: return "device error";
    }
    return "unknown status";
}

/* One entry for each thread that ever failed in the context: few threads fail, so a list will do. */
struct error_text {
    struct error_text *next;
    pthread_t thread;
    char text[512];
};

struct moe4_error {
    pthread_mutex_t lock;
    struct error_text *head;
};

moe4_status moe4_errors_init(moe4_ctx *ctx) {
    struct moe4_error *e = moe4_calloc(ctx, 1, sizeof *e, "error texts");
    if (!e) return MOE4_ERROR_MEMORY;
    if (pthread_mutex_init(&e->lock, NULL) != 0) {
        moe4_free(ctx, e);
        return MOE4_ERROR_MEMORY;
    }
    ctx->errors = e;
    return MOE4_OK;
}

void moe4_errors_free(moe4_ctx *ctx) {
    struct moe4_error *e = ctx->errors;
    if (!e) return;
    for (struct error_text *t = e->head, *next; t; t = next) {
        next = t->next;
        moe4_free(ctx, t);
    }
    pthread_mutex_destroy(&e->lock);
    moe4_free(ctx, e);
    ctx->errors = NULL;
}

static struct error_text *find_own(struct moe4_error *e) {
    for (struct error_text *t = e->head; t; t = t->next)
        if (pthread_equal(t->thread, pthread_self())) return t;
    return NULL;
}

void moe4_begin(const moe4_ctx *ctx) {
    struct moe4_error *e = ctx->errors;
    pthread_mutex_lock(&e->lock);
    struct error_text *t = find_own(e);
    if (t) t->text[0] = '\0';
    pthread_mutex_unlock(&e->lock);
}

moe4_status moe4_fail(const moe4_ctx *ctx, moe4_status status, const char *fmt, ...) {
    char text[sizeof((struct error_text *)0)->text];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);

    struct moe4_error *e = ctx->errors;
    if (!e) { /* a context that is still being made: its creator only has the log */
        if (ctx->log) ctx->log(ctx->log_user, text);
        return status;
    }
    pthread_mutex_lock(&e->lock);
    struct error_text *t = find_own(e);
    if (!t && (t = ctx->alloc(ctx->alloc_user, sizeof *t, 64))) {
        t->text[0] = '\0';
        t->thread = pthread_self();
        t->next = e->head;
        e->head = t;
    }
    if (t && !t->text[0]) memcpy(t->text, text, sizeof text);
    pthread_mutex_unlock(&e->lock);
    return status;
}

const char *moe4_ctx_error(const moe4_ctx *ctx) {
    struct moe4_error *e = ctx->errors;
    pthread_mutex_lock(&e->lock);
    struct error_text *t = find_own(e);
    pthread_mutex_unlock(&e->lock);
    return t ? t->text : "";
}
