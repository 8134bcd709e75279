#include "mirror.h"

#include <string.h>

static size_t matrix_bytes(const struct cli_matrix *m) {
    return m->rows * m->cols * moe4_dtype_bytes(m->dtype);
}

static int copy(moe4_ctx *ctx, void *dst, const void *src, size_t bytes) {
    moe4_status status = moe4_memory_copy(ctx, dst, src, bytes, NULL);
    return status == MOE4_OK ? CLI_FINE : cli_fail(ctx, status, "copying to or from the device");
}

int cli_mirror_open(struct cli_mirror *m, moe4_ctx *ctx, const struct cli_common *common, struct cli_matrix *host) {
    *m = (struct cli_mirror){host->data, host};
    if (!host->data || !cli_on_device(common)) return CLI_FINE;
    m->data = NULL;
    moe4_status status = moe4_memory_alloc(ctx, &m->data, matrix_bytes(host));
    if (status != MOE4_OK) return cli_fail(ctx, status, "device");
    int exit_status = copy(ctx, m->data, host->data, matrix_bytes(host));
    if (exit_status != CLI_FINE) cli_mirror_close(m, ctx);
    return exit_status;
}

int cli_mirror_read(struct cli_mirror *m, moe4_ctx *ctx) {
    return m->data == m->host->data ? CLI_FINE : copy(ctx, m->host->data, m->data, matrix_bytes(m->host));
}

int cli_mirror_wait(struct cli_mirror *m, moe4_ctx *ctx) {
    char byte;
    return m->data == m->host->data || !matrix_bytes(m->host) ? CLI_FINE : copy(ctx, &byte, m->data, 1);
}

void cli_mirror_close(struct cli_mirror *m, moe4_ctx *ctx) {
    if (m->host && m->data != m->host->data) moe4_memory_free(ctx, m->data);
    m->data = NULL;
}

int cli_workspace_open(moe4_workspace *w, moe4_ctx *ctx, size_t bytes) {
    *w = (moe4_workspace){NULL, bytes ? bytes : 1};
    moe4_status status = moe4_memory_alloc(ctx, &w->data, w->bytes); /* zeroed on the CPU: a first touch should not count as time */
    return status == MOE4_OK ? CLI_FINE : cli_fail(ctx, status, "workspace");
}

void cli_workspace_close(moe4_workspace *w, moe4_ctx *ctx) {
    moe4_memory_free(ctx, w->data);
    w->data = NULL;
}
