#include "quantize/folder.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define TEMPORARY ".moe4-quantize.tmp" /* one file is written at a time */

enum { MAX_HEADER_BYTES = 100000000 }; /* of a safetensors file, by its rules */

/* Of a disk that is full the sentence says how much is free. */
static moe4_status fail(const struct quantize_folder *f, const char *name, const char *what, int error) {
    struct statvfs disk;
    if (error == ENOSPC && fstatvfs(f->fd, &disk) == 0)
        return lm_fail(f->lm, MOE4_ERROR_IO, "%s/%s: %s%s: %llu bytes are free", f->path, name, what, strerror(error),
                       (unsigned long long)disk.f_bavail * disk.f_frsize);
    return lm_fail(f->lm, error == ENOMEM ? MOE4_ERROR_MEMORY : MOE4_ERROR_IO, "%s%s%s: %s%s", f->path, *name ? "/" : "", name, what,
                   strerror(error));
}

/* ---- files ---- */

moe4_status quantize_file_create(struct quantize_file *file, const struct quantize_folder *folder, const char *name, uint64_t bytes) {
    *file = (struct quantize_file){folder, name, -1};
    file->fd = openat(folder->fd, TEMPORARY, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (file->fd < 0) return fail(folder, name, "", errno);
    if (bytes && fallocate(file->fd, 0, 0, (off_t)bytes) != 0 && errno != EOPNOTSUPP && errno != ENOSYS && errno != EINTR) {
        int error = errno;
        char what[64];
        snprintf(what, sizeof what, "%llu bytes: ", (unsigned long long)bytes);
        quantize_file_drop(file); /* what fallocate had taken before it gave up counts as free again */
        return fail(folder, name, what, error);
    }
    return MOE4_OK;
}

bool quantize_write_at(int fd, const void *data, size_t bytes, uint64_t offset) {
    for (const char *at = data; bytes;) {
        ssize_t n = pwrite(fd, at, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = ENOSPC;
        if (n <= 0) return false;
        at += n;
        offset += (uint64_t)n;
        bytes -= (size_t)n;
    }
    return true;
}

moe4_status quantize_file_write(struct quantize_file *file, const void *data, size_t bytes, uint64_t offset) {
    if (quantize_write_at(file->fd, data, bytes, offset)) return MOE4_OK;
    int error = errno;
    char what[80];
    snprintf(what, sizeof what, "%zu bytes at %llu: ", bytes, (unsigned long long)offset);
    return fail(file->folder, file->name, what, error);
}

moe4_status quantize_file_keep(struct quantize_file *file) {
    int folder = file->folder->fd, error = fsync(file->fd) == 0 ? 0 : errno;
    if (close(file->fd) != 0 && !error) error = errno;
    file->fd = -1;
    if (!error && (renameat(folder, TEMPORARY, folder, file->name) != 0 || fsync(folder) != 0)) error = errno;
    if (!error) return MOE4_OK;
    unlinkat(folder, TEMPORARY, 0);
    return fail(file->folder, file->name, "", error);
}

void quantize_file_drop(struct quantize_file *file) {
    if (file->fd < 0) return;
    close(file->fd);
    unlinkat(file->folder->fd, TEMPORARY, 0);
    file->fd = -1;
}

moe4_status quantize_folder_text(const struct quantize_folder *folder, const char *name, const char *text, size_t bytes) {
    struct quantize_file file;
    LM_TRY(folder->lm, quantize_file_create(&file, folder, name, bytes));
    moe4_status status = quantize_file_write(&file, text, bytes, 0);
    if (status == MOE4_OK) return quantize_file_keep(&file);
    quantize_file_drop(&file);
    return status;
}

bool quantize_folder_has(const struct quantize_folder *folder, const char *name, const void *begin, size_t n_begin, uint64_t bytes) {
    int fd = openat(folder->fd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;
    bool same = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (uint64_t)st.st_size == bytes;
    char *text = same ? malloc(n_begin) : NULL;
    same = text && pread(fd, text, n_begin, 0) == (ssize_t)n_begin && memcmp(text, begin, n_begin) == 0;
    free(text);
    if (fd >= 0) close(fd);
    return same;
}

moe4_status quantize_folder_read(const struct quantize_folder *folder, const char *name, void **data_ret, size_t bytes) {
    int fd = openat(folder->fd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;
    *data_ret = NULL;
    if (fd < 0 && errno == ENOENT) return MOE4_OK;
    if (fd < 0) return fail(folder, name, "", errno);
    bool fits = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (uint64_t)st.st_size == bytes;
    void *data = fits ? malloc(bytes) : NULL;
    moe4_status status = !fits || data ? MOE4_OK : fail(folder, name, "", ENOMEM);
    for (size_t at = 0; data && at < bytes;) {
        ssize_t n = pread(fd, (char *)data + at, bytes - at, (off_t)at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            status = fail(folder, name, "", n ? errno : EIO);
            free(data);
            data = NULL;
        } else {
            at += (size_t)n;
        }
    }
    close(fd);
    *data_ret = data;
    return status;
}

bool quantize_folder_header(const struct quantize_folder *folder, const char *name, void **text_ret, size_t *bytes_ret) {
    int fd = openat(folder->fd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;
    uint8_t length[8];
    uint64_t n = 0;
    bool there = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && pread(fd, length, 8, 0) == 8;
    for (int i = 0; there && i < 8; i++) n |= (uint64_t)length[i] << 8 * i;
    there = there && n && n <= MAX_HEADER_BYTES && n <= (uint64_t)st.st_size - 8;
    *bytes_ret = there ? (size_t)n : 0;
    *text_ret = there ? malloc(*bytes_ret) : NULL;
    if (*text_ret && pread(fd, *text_ret, *bytes_ret, 8) != (ssize_t)n) {
        free(*text_ret);
        *text_ret = NULL;
    }
    if (fd >= 0) close(fd);
    return *text_ret;
}

/* ---- the folder ---- */

/* Clears *empty_ret where anything but our own temporary file is in it, sets *journal_ret where a journal is. */
static moe4_status look(struct quantize_folder *f, bool *empty_ret, bool *journal_ret) {
    int fd = openat(f->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (!dir) {
        int error = errno;
        if (fd >= 0) close(fd);
        return fail(f, "", "cannot be listed: ", error);
    }
    for (const struct dirent *e; (e = readdir(dir));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 || strcmp(e->d_name, TEMPORARY) == 0) continue;
        *empty_ret = false;
        if (strcmp(e->d_name, QUANTIZE_JOURNAL) == 0) *journal_ret = true;
    }
    closedir(dir);
    return MOE4_OK;
}

/* The journal as it stands against the task: the first thing that is not the same. */
static moe4_status check_journal(struct quantize_folder *f, const json_t *task) {
    int fd = openat(f->fd, QUANTIZE_JOURNAL, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail(f, QUANTIZE_JOURNAL, "", errno);
    json_t *journal = json_loadfd(fd, JSON_REJECT_DUPLICATES, NULL), *value;
    close(fd);
    moe4_status status = MOE4_OK;
    const char *key;
    if (!json_is_object(journal))
        status = lm_fail(f->lm, MOE4_ERROR_FORMAT, "%s/%s: not a journal of moe4 quantize", f->path, QUANTIZE_JOURNAL);
    json_object_foreach((json_t *)task, key, value) {
        if (status == MOE4_OK && !json_equal(json_object_get(journal, key), value)) {
            char *was = json_dumps(json_object_get(journal, key), JSON_COMPACT | JSON_ENCODE_ANY),
                 *is = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY);
            status = lm_fail(f->lm, MOE4_ERROR_ARGUMENT, "%s: unfinished work with another %s: %.150s, now %.150s", f->path, key,
                             was ? was : "nothing", is ? is : "");
            free(was);
            free(is);
        }
    }
    json_decref(journal);
    return status;
}

static moe4_status write_journal(struct quantize_folder *f, const json_t *task) {
    char *text = json_dumps(task, JSON_INDENT(1));
    LM_CHECK(f->lm, text, MOE4_ERROR_MEMORY, "%s: no memory", QUANTIZE_JOURNAL);
    moe4_status status = quantize_folder_text(f, QUANTIZE_JOURNAL, text, strlen(text));
    free(text);
    return status;
}

static moe4_status take(struct quantize_folder *f, const json_t *task, bool resume) {
    struct lm *lm = f->lm;
    bool made = mkdir(f->path, 0777) == 0, empty = true, journal = false;
    if (!made && errno != EEXIST) return fail(f, "", "", errno);
    f->fd = open(f->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (f->fd < 0) return fail(f, "", "", errno);
    LM_CHECK(lm, flock(f->fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK, MOE4_ERROR_ARGUMENT, "%s: another moe4 quantize is at it",
             f->path);
    LM_TRY(lm, look(f, &empty, &journal));
    if (empty) return write_journal(f, task);
    LM_CHECK(lm, resume || journal, MOE4_ERROR_ARGUMENT, "%s: not empty; moe4 quantize writes only to a new folder", f->path);
    LM_CHECK(lm, resume, MOE4_ERROR_ARGUMENT, "%s: unfinished work; go on with --resume, or remove it", f->path);
    if (journal) return check_journal(f, task);
    f->finished = true;
    return MOE4_OK;
}

moe4_status quantize_folder_open(struct quantize_folder *folder, struct lm *lm, const char *path, const json_t *task, bool resume) {
    *folder = (struct quantize_folder){lm, path, -1, false};
    moe4_status status = take(folder, task, resume);
    if (status != MOE4_OK) quantize_folder_close(folder);
    return status;
}

moe4_status quantize_folder_finish(struct quantize_folder *folder) {
    bool fine = syncfs(folder->fd) == 0 && (unlinkat(folder->fd, QUANTIZE_CALIBRATION, 0) == 0 || errno == ENOENT) &&
                unlinkat(folder->fd, QUANTIZE_JOURNAL, 0) == 0 && fsync(folder->fd) == 0;
    return fine ? MOE4_OK : fail(folder, QUANTIZE_JOURNAL, "", errno);
}

void quantize_folder_close(struct quantize_folder *folder) {
    if (folder->fd >= 0) close(folder->fd);
    folder->fd = -1;
}
