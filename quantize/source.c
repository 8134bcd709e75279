#include "quantize/source.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "quantize/plan.h"

/* ---- files ---- */

/* Tensors lie in a file without gaps, from behind its header to its end: so the mapping's addresses give offsets. */
static moe4_status open_file(struct quantize_files *files, const char *path, const moe4_tensor *first, const moe4_tensor *last) {
    struct lm *lm = files->lm;
    struct quantize_file_in *f = &files->data[files->n];
    struct stat st;
    unsigned char length[8];
    *f = (struct quantize_file_in){first->file, open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), first->data, 8, 0};
    LM_CHECK(lm, f->fd >= 0, MOE4_ERROR_IO, "%s: %s", path, strerror(errno));
    files->n++;
    LM_CHECK(lm, pread(f->fd, length, 8, 0) == 8 && fstat(f->fd, &st) == 0, MOE4_ERROR_IO, "%s: cannot be read", path);
    for (int i = 0; i < 8; i++) f->begin += (uint64_t)length[i] << 8 * i;
    f->bytes = (uint64_t)((const char *)last->data + last->bytes - f->mapped);
    uint64_t end = f->begin + f->bytes;
    LM_CHECK(lm, end == (uint64_t)st.st_size, MOE4_ERROR_IO, "%s: %llu bytes, %llu when it was opened", path,
             (unsigned long long)st.st_size, (unsigned long long)end);
    return MOE4_OK;
}

/* `in` is a folder, or the only file. */
static moe4_status open_in(struct quantize_files *files, const char *in, const moe4_tensor *first, const moe4_tensor *last) {
    char path[4096];
    struct stat st;
    const bool alone = stat(in, &st) == 0 && S_ISREG(st.st_mode);
    snprintf(path, sizeof path, "%s%s%s", in, alone ? "" : "/", alone ? "" : first->file);
    return open_file(files, path, first, last);
}

moe4_status quantize_files_open(struct quantize_files *files, struct lm *lm, const moe4_checkpoint *ckpt, const char *in) {
    size_t n = moe4_checkpoint_n_tensors(ckpt);
    *files = (struct quantize_files){lm, lm_calloc(lm, moe4_checkpoint_n_files(ckpt) + 1, sizeof *files->data, "files"), 0};
    if (!files->data) return MOE4_ERROR_MEMORY;
    moe4_tensor first, last = {.file = NULL}, t;
    for (size_t i = 0; i < n; i++, last = t) {
        LM_TRY(lm, moe4_checkpoint_tensor(ckpt, &t, i));
        if (last.file && strcmp(last.file, t.file) != 0) LM_TRY(lm, open_in(files, in, &first, &last));
        if (!last.file || strcmp(last.file, t.file) != 0) first = t;
    }
    return n ? open_in(files, in, &first, &last) : MOE4_OK;
}

void quantize_files_close(struct quantize_files *files) {
    for (size_t i = 0; i < files->n; i++) close(files->data[i].fd);
    free(files->data);
    *files = (struct quantize_files){NULL, NULL, 0};
}

/* ---- views ---- */

moe4_status quantize_view_make(const struct quantize_plan *plan, struct quantize_view *view, const moe4_tensor *t, size_t cols) {
    size_t element = moe4_dtype_bytes(t->dtype), file = plan->files.n;
    while (file > 0 && strcmp(plan->files.data[file - 1].name, t->file) != 0) file--;
    LM_CHECK(plan->lm, file > 0, MOE4_ERROR_NOT_FOUND, "%s: not among the model's files", t->file);
    const struct quantize_file_in *f = &plan->files.data[file - 1];
    *view = (struct quantize_view){file - 1, t->dtype, f->begin + (uint64_t)((const char *)t->data - f->mapped), cols * element, element};
    return MOE4_OK;
}

static moe4_status read_at(const struct quantize_file_in *f, void *dst, size_t bytes, uint64_t offset, char *why) {
    for (char *at = dst; bytes;) {
        ssize_t n = pread(f->fd, at, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) snprintf(why, QUANTIZE_WHY_BYTES, "%s: %s", f->name, strerror(errno));
        if (n == 0)
            snprintf(why, QUANTIZE_WHY_BYTES, "%s: was cut short: it ends at byte %llu or before, %zu more are needed", f->name,
                     (unsigned long long)offset, bytes);
        if (n <= 0) return MOE4_ERROR_IO;
        at += n;
        offset += (uint64_t)n;
        bytes -= (size_t)n;
    }
    return MOE4_OK;
}

moe4_status quantize_mapped_read(const struct quantize_files *files, void *dst, const void *mapped, size_t bytes,
                                 char why[static QUANTIZE_WHY_BYTES]) {
    const uintptr_t at = (uintptr_t)mapped;
    for (size_t i = 0; i < files->n; i++) {
        const struct quantize_file_in *f = &files->data[i];
        const uintptr_t begin = (uintptr_t)f->mapped;
        if (at >= begin && at - begin <= f->bytes && bytes <= f->bytes - (at - begin))
            return read_at(f, dst, bytes, f->begin + (at - begin), why);
    }
    snprintf(why, QUANTIZE_WHY_BYTES, "%zu bytes are in none of the model's files", bytes);
    return MOE4_ERROR_IO;
}

/* Columns stand next to one another in no row: column after column, then every row's element. */
static moe4_status read_columns(const struct quantize_file_in *f, const struct quantize_view *v, char *dst, size_t row, size_t n,
                                size_t cols, char *why) {
    size_t element = moe4_dtype_bytes(v->dtype), bytes = (n - 1) * v->row_bytes + element;
    char *column = malloc(bytes);
    moe4_status status = column ? MOE4_OK : MOE4_ERROR_MEMORY;
    for (size_t c = 0; status == MOE4_OK && c < cols; c++) {
        status = read_at(f, column, bytes, v->offset + row * v->row_bytes + c * v->col_bytes, why);
        for (size_t r = 0; status == MOE4_OK && r < n; r++) memcpy(dst + (r * cols + c) * element, column + r * v->row_bytes, element);
    }
    free(column);
    return status;
}

moe4_status quantize_view_read(const struct quantize_plan *plan, const struct quantize_view *view, void *dst, size_t row, size_t n,
                               size_t cols, char why[static QUANTIZE_WHY_BYTES]) {
    const struct quantize_file_in *f = &plan->files.data[view->file];
    size_t element = moe4_dtype_bytes(view->dtype), bytes = cols * element;
    if (!n || !cols) return MOE4_OK;
    if (view->col_bytes != element) return read_columns(f, view, dst, row, n, cols, why);
    if (view->row_bytes == bytes) return read_at(f, dst, n * bytes, view->offset + row * bytes, why);
    moe4_status status = MOE4_OK;
    for (size_t r = 0; status == MOE4_OK && r < n; r++)
        status = read_at(f, (char *)dst + r * bytes, bytes, view->offset + (row + r) * view->row_bytes, why);
    return status;
}
