/* Files of the model that are no weights. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "quantize/folder.h"

enum { COPY_BYTES = 1 << 20, PATH_BYTES = 4096 };

static bool ends_with(const char *name, const char *end) {
    size_t n = strlen(name), k = strlen(end);
    return n >= k && strcmp(name + n - k, end) == 0;
}

/* What quantize writes itself, at the top of the folder. */
static bool is_ours(const char *name) {
    static const char *const ours[] = {"config.json", "hf_quant_config.json", "model.safetensors.index.json", QUANTIZE_JOURNAL};
    for (size_t i = 0; i < sizeof ours / sizeof *ours; i++)
        if (strcmp(name, ours[i]) == 0) return true;
    return ends_with(name, ".safetensors") || strncmp(name, ".moe4-", 6) == 0;
}

static moe4_status copy_bytes(struct quantize_file *file, int fd, const char *path) {
    struct lm *lm = file->folder->lm;
    char *buffer = lm_calloc(lm, 1, COPY_BYTES, "copy");
    moe4_status status = buffer ? MOE4_OK : MOE4_ERROR_MEMORY;
    uint64_t at = 0;
    while (status == MOE4_OK) {
        ssize_t n = read(fd, buffer, COPY_BYTES);
        if (n == 0) break;
        if (n > 0)
            status = quantize_file_write(file, buffer, (size_t)n, at);
        else if (errno != EINTR)
            status = lm_fail(lm, MOE4_ERROR_IO, "%s: %s", path, strerror(errno));
        if (n > 0) at += (uint64_t)n;
    }
    free(buffer);
    return status;
}

static moe4_status copy_file(const struct quantize_folder *f, const char *path, const char *name) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    LM_CHECK(f->lm, fd >= 0, MOE4_ERROR_IO, "%s: %s", path, strerror(errno));
    struct quantize_file file;
    moe4_status status = quantize_file_create(&file, f, name, 0);
    if (status == MOE4_OK) {
        status = copy_bytes(&file, fd, path);
        if (status == MOE4_OK) status = quantize_file_keep(&file);
        quantize_file_drop(&file);
    }
    close(fd);
    return status;
}

static moe4_status copy_entries(const struct quantize_folder *f, DIR *dir, const char *in, const char *below);

/* Subfolders too, but for hidden ones (.git, .cache) and OUT itself, should it lie inside IN. Links to files are followed, links to
 * folders are not. */
static moe4_status copy_folder(const struct quantize_folder *f, const char *in, const char *below) {
    char path[PATH_BYTES];
    LM_CHECK(f->lm, snprintf(path, sizeof path, "%s/%s", in, below) < PATH_BYTES, MOE4_ERROR_IO, "%s/%s: name too long", in, below);
    struct stat here, out;
    if (stat(path, &here) == 0 && fstat(f->fd, &out) == 0 && here.st_dev == out.st_dev && here.st_ino == out.st_ino) return MOE4_OK;
    LM_CHECK(f->lm, !*below || mkdirat(f->fd, below, 0777) == 0 || errno == EEXIST, MOE4_ERROR_IO, "%s/%s: %s", f->path, below,
             strerror(errno));
    DIR *dir = opendir(path);
    LM_CHECK(f->lm, dir, MOE4_ERROR_IO, "%s: %s", path, strerror(errno));
    moe4_status status = copy_entries(f, dir, in, below);
    closedir(dir);
    return status;
}

static moe4_status copy_entries(const struct quantize_folder *f, DIR *dir, const char *in, const char *below) {
    for (const struct dirent *e; (e = readdir(dir));) {
        char name[PATH_BYTES], path[PATH_BYTES];
        struct stat st, link;
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 || (!*below && is_ours(e->d_name))) continue;
        LM_CHECK(f->lm, snprintf(name, sizeof name, "%s%s%s", below, *below ? "/" : "", e->d_name) < PATH_BYTES, MOE4_ERROR_IO,
                 "%s: name too long", e->d_name);
        LM_CHECK(f->lm, snprintf(path, sizeof path, "%s/%s", in, name) < PATH_BYTES, MOE4_ERROR_IO, "%s: name too long", name);
        LM_CHECK(f->lm, lstat(path, &link) == 0 && stat(path, &st) == 0, MOE4_ERROR_IO, "%s: %s", path, strerror(errno));
        if (S_ISREG(st.st_mode))
            LM_TRY(f->lm, copy_file(f, path, name));
        else if (S_ISDIR(link.st_mode) && e->d_name[0] != '.')
            LM_TRY(f->lm, copy_folder(f, in, name));
    }
    return MOE4_OK;
}

moe4_status quantize_folder_copy(const struct quantize_folder *folder, const char *in) {
    return copy_folder(folder, in, "");
}
