/* Reading the input. Files are read, never touched through a mapping: one that is cut short in the middle of a run is an error, not the
 * end of the process. */
#ifndef QUANTIZE_SOURCE_H
#define QUANTIZE_SOURCE_H

#include "lm/lm.h"

/* A shard of the input. */
struct quantize_file_in {
    const char *name; /* the checkpoint's */
    int fd;
    const char *mapped; /* where the checkpoint has the first tensor's first byte, */
    uint64_t begin;     /* and where that is in the file */
};

/* A matrix in a file: its element (row, col) is at offset + row * row_bytes + col * col_bytes. */
struct quantize_view {
    size_t file; /* of the plan */
    moe4_dtype dtype;
    uint64_t offset;
    size_t row_bytes, col_bytes;
};

struct quantize_plan;
/* Opens the files of the plan's checkpoint, which is `in`, and checks that they are the ones it has mapped. */
moe4_status quantize_files_open(struct quantize_plan *plan, const char *in);
void quantize_files_close(struct quantize_plan *plan);
/* A view of a tensor of the checkpoint as rows of `cols` elements. */
moe4_status quantize_view_make(const struct quantize_plan *plan, struct quantize_view *view, const moe4_tensor *t, size_t cols);

enum { QUANTIZE_WHY_BYTES = 300 };
/* dst[n, cols] = rows [row, row + n) of a view. For many threads at once; `why` says what went wrong: IO, MEMORY. */
moe4_status quantize_view_read(const struct quantize_plan *plan, const struct quantize_view *view, void *dst, size_t row, size_t n,
                               size_t cols, char why[static QUANTIZE_WHY_BYTES]);

#endif
