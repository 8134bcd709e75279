/* Buffers of a command and their copies in the memory that its context's layers use. On the CPU they are the same memory. */
#ifndef MOE4_CLI_MIRROR_H
#define MOE4_CLI_MIRROR_H

#include "cli.h"
#include "tensorfile.h"

struct cli_mirror {
    void *data; /* what calls take; NULL for an empty matrix */
    struct cli_matrix *host;
};

/* Makes m the mirror of `host` in ctx's memory and copies host's data there. On failure, as after close, m->data is NULL. */
int cli_mirror_open(struct cli_mirror *m, moe4_ctx *ctx, const struct cli_common *common, struct cli_matrix *host);
/* Copies what calls wrote back to the host; waits for it. */
int cli_mirror_read(struct cli_mirror *m, moe4_ctx *ctx);
/* Waits until what calls wrote is there, without copying all of it. */
int cli_mirror_wait(struct cli_mirror *m, moe4_ctx *ctx);
void cli_mirror_close(struct cli_mirror *m, moe4_ctx *ctx);

/* A workspace in ctx's memory. */
int cli_workspace_open(moe4_workspace *w, moe4_ctx *ctx, size_t bytes);
void cli_workspace_close(moe4_workspace *w, moe4_ctx *ctx);

#endif
