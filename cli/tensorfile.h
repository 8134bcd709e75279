/* Matrices in and out of .safetensors files, as commands take and give them. Every function prints its errors and returns an exit
 * status. */
#ifndef MOE4_TENSORFILE_H
#define MOE4_TENSORFILE_H

#include "cli.h"

struct cli_matrix {
    moe4_dtype dtype;
    size_t rows, cols;
    void *data; /* malloc'd, [rows, cols]; NULL when there is no matrix */
};

/* Splits "FILE:TENSOR" at its last colon; a name without one, or one that as a whole is a file, is FILE with `default_tensor`.
 * *file_ret is malloc'd, *tensor_ret points into `spec` or is default_tensor. */
int cli_split_spec(char **file_ret, const char **tensor_ret, const char *spec, const char *default_tensor);

/* Copies tensor `name` of `file`: two dimensions, its dtype one of dtypes[n_dtypes]. */
int cli_matrix_read(struct cli_matrix *matrix, moe4_ctx *ctx, const char *file, const char *name, const moe4_dtype *dtypes,
                    size_t n_dtypes);
/* The same for a tensor of one dimension: rows of one column. */
int cli_vector_read(struct cli_matrix *matrix, moe4_ctx *ctx, const char *file, const char *name, const moe4_dtype *dtypes,
                    size_t n_dtypes);
void cli_matrix_free(struct cli_matrix *matrix);
/* Element i of data in row-major order; F64, F32, F16 or BF16. */
double cli_matrix_get(const struct cli_matrix *matrix, size_t i);

/* Writes tensors in the order given (larger elements first keeps all aligned) under a temporary name and renames it when every byte is
 * on the disk; what stood under `path` stays until then. A `path` that is no regular file (a pipe, a device) is written directly. */
int cli_tensorfile_write(const char *path, const char *const *names, const struct cli_matrix *const *matrices, size_t n);

#endif
