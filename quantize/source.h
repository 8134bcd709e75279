/* Reading the input. Files are read, never touched through a mapping: one that is cut short in the middle of a run is an error, not the
 * end of the process. */
#ifndef QUANTIZE_SOURCE_H
#define QUANTIZE_SOURCE_H

#include "lm/lm.h"

/* A shard of the input. */
struct quantize_file_in {
    const char *name; /* the checkpoint's */
    int fd;
    const char *mapped;    /* where the checkpoint has the first tensor's first byte, */
    uint64_t begin, bytes; /* where that is in the file, and how much there is from it on */
};

struct quantize_files {
    struct lm *lm;
    struct quantize_file_in *data;
    size_t n;
};

/* A matrix in a file: its element (row, col) is at offset + row * row_bytes + col * col_bytes. */
struct quantize_view {
    size_t file; /* of the plan's */
    moe4_dtype dtype;
    uint64_t offset;
    size_t row_bytes, col_bytes;
};

/* Opens the files of a checkpoint, which is `in`, and checks that they are the ones it has mapped. Close either way. */
moe4_status quantize_files_open(struct quantize_files *files, struct lm *lm, const moe4_checkpoint *ckpt, const char *in);
void quantize_files_close(struct quantize_files *files);

enum { QUANTIZE_WHY_BYTES = 300 };
/* dst[bytes] = what the checkpoint has mapped at `mapped`, of one tensor. For many threads at once; `why` says what went wrong: IO. */
moe4_status quantize_mapped_read(const struct quantize_files *files, void *dst, const void *mapped, size_t bytes,
                                 char why[static QUANTIZE_WHY_BYTES]);

struct quantize_plan;
/* A view of a tensor of the plan's checkpoint as rows of `cols` elements. */
moe4_status quantize_view_make(const struct quantize_plan *plan, struct quantize_view *view, const moe4_tensor *t, size_t cols);
/* dst[n, cols] = rows [row, row + n) of a view. For many threads at once; `why` says what went wrong: IO, MEMORY. */
moe4_status quantize_view_read(const struct quantize_plan *plan, const struct quantize_view *view, void *dst, size_t row, size_t n,
                               size_t cols, char why[static QUANTIZE_WHY_BYTES]);

#endif
