#include "tensorfile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- in ---- */

int cli_split_spec(char **file_ret, const char **tensor_ret, const char *spec, const char *default_tensor) {
    const char *colon = access(spec, F_OK) == 0 ? NULL : strrchr(spec, ':');
    *tensor_ret = colon ? colon + 1 : default_tensor;
    *file_ret = strndup(spec, colon ? (size_t)(colon - spec) : strlen(spec));
    if (!*file_ret) return cli_error(CLI_BAD_DATA, spec, "out of memory");
    if (!*tensor_ret || !**tensor_ret || !**file_ret) return cli_error(CLI_BAD_USAGE, spec, "needs to be FILE:TENSOR");
    return CLI_FINE;
}

static int no_such_tensor(const moe4_checkpoint *ckpt, const char *file, const char *name) {
    char has[1024] = "nothing";
    size_t n = moe4_checkpoint_n_tensors(ckpt), at = 0, listed = 0;
    for (moe4_tensor t; listed < n && moe4_checkpoint_tensor(ckpt, &t, listed) == MOE4_OK; listed++) {
        int more = snprintf(has + at, sizeof has - at, "%s%s", listed ? ", " : "", t.name);
        if (more < 0 || (size_t)more + 32 > sizeof has - at) break; /* 32: " and N more" */
        at += (size_t)more;
    }
    if (listed < n) snprintf(has + at, sizeof has - at, " and %zu more", n - listed);
    return cli_error(CLI_BAD_DATA, file, "no tensor \"%s\" (it has: %s)", name, has);
}

static int copy_tensor(struct cli_matrix *matrix, const char *file, const moe4_tensor *t, size_t n_dims, const moe4_dtype *dtypes,
                       size_t n_dtypes) {
    size_t i = 0;
    while (i < n_dtypes && dtypes[i] != t->dtype) i++;
    if (i == n_dtypes) {
        char wanted[64] = "";
        for (i = 0; i < n_dtypes; i++)
            snprintf(wanted + strlen(wanted), sizeof wanted - strlen(wanted), "%s%s", i ? " or " : "", moe4_dtype_name(dtypes[i]));
        return cli_error(CLI_BAD_DATA, file, "%s: is %s, need %s", t->name, moe4_dtype_name(t->dtype), wanted);
    }
    if (t->n_dims != n_dims) return cli_error(CLI_BAD_DATA, file, "%s: has %zu dimensions, need %zu", t->name, t->n_dims, n_dims);
    void *data = malloc(t->bytes ? t->bytes : 1);
    if (!data) return cli_error(CLI_BAD_DATA, file, "%s: out of memory (%zu bytes)", t->name, t->bytes);
    if (t->bytes) memcpy(data, t->data, t->bytes); /* also puts it at the alignment that the library wants */
    *matrix = (struct cli_matrix){t->dtype, t->shape[0], n_dims == 2 ? t->shape[1] : 1, data};
    return CLI_FINE;
}

static int read_tensor(struct cli_matrix *matrix, moe4_ctx *ctx, const char *file, const char *name, size_t n_dims,
                       const moe4_dtype *dtypes, size_t n_dtypes) {
    moe4_checkpoint *ckpt;
    moe4_status status = moe4_checkpoint_open(&ckpt, ctx, file);
    if (status != MOE4_OK) return cli_fail(ctx, status, file);
    moe4_tensor t;
    status = moe4_checkpoint_find(ckpt, &t, name);
    int exit_status = status == MOE4_OK                ? copy_tensor(matrix, file, &t, n_dims, dtypes, n_dtypes)
                      : status == MOE4_ERROR_NOT_FOUND ? no_such_tensor(ckpt, file, name)
                                                       : cli_fail(ctx, status, file);
    moe4_checkpoint_close(ckpt);
    return exit_status;
}

int cli_matrix_read(struct cli_matrix *matrix, moe4_ctx *ctx, const char *file, const char *name, const moe4_dtype *dtypes,
                    size_t n_dtypes) {
    return read_tensor(matrix, ctx, file, name, 2, dtypes, n_dtypes);
}

int cli_vector_read(struct cli_matrix *matrix, moe4_ctx *ctx, const char *file, const char *name, const moe4_dtype *dtypes,
                    size_t n_dtypes) {
    return read_tensor(matrix, ctx, file, name, 1, dtypes, n_dtypes);
}

void cli_matrix_free(struct cli_matrix *matrix) {
    free(matrix->data);
    matrix->data = NULL;
}

double cli_matrix_get(const struct cli_matrix *matrix, size_t i) {
    switch (matrix->dtype) {
    case MOE4_F64: return ((const double *)matrix->data)[i];
    case MOE4_F32: return (double)((const float *)matrix->data)[i];
    case MOE4_F16: return (double)moe4_f16_to_float(((const uint16_t *)matrix->data)[i]);
    default: return (double)moe4_bf16_to_float(((const uint16_t *)matrix->data)[i]);
    }
}

/* ---- out ---- */

/* The header as safetensors has it, padded with spaces so that the data begins at a multiple of 8. malloc'd; NULL: out of memory. */
static char *make_header(const char *const *names, const struct cli_matrix *const *matrices, size_t n) {
    json_t *header = json_pack("{s:{s:s+}}", "__metadata__", "producer", "moe4 ", moe4_version());
    uint64_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const struct cli_matrix *m = matrices[i];
        uint64_t end = at + (uint64_t)m->rows * m->cols * moe4_dtype_bytes(m->dtype);
        json_object_set_new(header, names[i],
                            json_pack("{s:s, s:[I,I], s:[I,I]}", "dtype", moe4_dtype_name(m->dtype), "shape", (json_int_t)m->rows,
                                      (json_int_t)m->cols, "data_offsets", (json_int_t)at, (json_int_t)end));
        at = end;
    }
    char *text = header && json_object_size(header) == n + 1 ? json_dumps(header, JSON_COMPACT | JSON_PRESERVE_ORDER) : NULL;
    json_decref(header);
    size_t bytes = text ? strlen(text) : 0, padded = (bytes + 7) / 8 * 8;
    char *grown = text ? realloc(text, padded + 1) : NULL;
    if (!grown) {
        free(text);
        return NULL;
    }
    memset(grown + bytes, ' ', padded - bytes);
    grown[padded] = '\0';
    return grown;
}

static bool write_all(int fd, const void *data, size_t bytes) {
    for (const char *at = data; bytes;) {
        ssize_t n = write(fd, at, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        at += n;
        bytes -= (size_t)n;
    }
    return true;
}

static bool write_tensors(int fd, const char *header, const struct cli_matrix *const *matrices, size_t n) {
    uint64_t bytes = strlen(header);
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)(bytes >> 8 * i);
    bool fine = write_all(fd, length, sizeof length) && write_all(fd, header, bytes);
    for (size_t i = 0; fine && i < n; i++) {
        const struct cli_matrix *m = matrices[i];
        fine = write_all(fd, m->data, m->rows * m->cols * moe4_dtype_bytes(m->dtype));
    }
    return fine;
}

int cli_tensorfile_write(const char *path, const char *const *names, const struct cli_matrix *const *matrices, size_t n) {
    struct stat st;
    bool direct = stat(path, &st) == 0 && !S_ISREG(st.st_mode);
    char *header = make_header(names, matrices, n), *temporary = malloc(strlen(path) + 32);
    int exit_status = CLI_FINE;
    if (header && temporary) {
        sprintf(temporary, "%s.tmp-%ld", path, (long)getpid());
        const char *target = direct ? path : temporary;
        int fd = direct ? open(path, O_WRONLY) : open(temporary, O_WRONLY | O_CREAT | O_EXCL, 0666);
        bool fine = fd >= 0 && write_tensors(fd, header, matrices, n) && (direct || fsync(fd) == 0);
        int why = errno;
        if (fd >= 0 && close(fd) != 0 && fine) {
            fine = false;
            why = errno;
        }
        if (fine && !direct && rename(temporary, path) != 0) {
            fine = false;
            why = errno;
        }
        if (!fine && fd >= 0 && !direct) unlink(target);
        if (!fine) exit_status = cli_error(CLI_BAD_DATA, path, "%s", strerror(why));
    } else {
        exit_status = cli_error(CLI_BAD_DATA, path, "out of memory");
    }
    free(header);
    free(temporary);
    return exit_status;
}
