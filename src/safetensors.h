/* One .safetensors file: 8 bytes of header length, a JSON header, the tensors' bytes. Everything is checked here, once: after
 * moe4_safetensors_parse every tensor's data and bytes lie inside the file and match its shape and dtype. */
#ifndef MOE4_SAFETENSORS_H
#define MOE4_SAFETENSORS_H

#include "file.h"

#define MOE4_MAX_HEADER_BYTES ((size_t)100 * 1000 * 1000) /* the format's own bound */

struct moe4_safetensors {
    struct moe4_map map;
    char *path;
    char *file;           /* name without folder, for sentences */
    moe4_tensor *tensors; /* in order of offset */
    size_t n_tensors;
    char *names; /* the tensors' names, one after the other */
};

/* Maps and parses `path`; `file` is how sentences call it. On failure `st` holds nothing. Errors: NOT_FOUND, IO, FORMAT, UNSUPPORTED (a
 * dtype moe4 has not), MEMORY. */
moe4_status moe4_safetensors_open(const moe4_ctx *ctx, struct moe4_safetensors *st, const char *path, const char *file);
/* The same for st->map and st->file already set; on failure too moe4_safetensors_close frees what there is. */
moe4_status moe4_safetensors_parse(const moe4_ctx *ctx, struct moe4_safetensors *st);
void moe4_safetensors_close(const moe4_ctx *ctx, struct moe4_safetensors *st);

#endif
