#define _DEFAULT_SOURCE /* madvise: posix_madvise may ignore DONTNEED */
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static moe4_status fail_errno(const moe4_ctx *ctx, const char *path, const char *what) {
    int error = errno;
    char reason[128];
    if (strerror_r(error, reason, sizeof reason) != 0) reason[0] = '\0';
    return moe4_fail(ctx, error == ENOENT || error == ENOTDIR ? MOE4_ERROR_NOT_FOUND : MOE4_ERROR_IO, "%s: %s: %s", path, what, reason);
}

static moe4_status map_descriptor(const moe4_ctx *ctx, struct moe4_map *map, const char *path, int fd) {
    struct stat st;
    if (fstat(fd, &st) != 0) return fail_errno(ctx, path, "cannot stat");
    MOE4_CHECK(ctx, S_ISREG(st.st_mode), MOE4_ERROR_IO, "%s: not a regular file", path);
    MOE4_CHECK(ctx, st.st_size >= 0 && (uintmax_t)st.st_size <= SIZE_MAX, MOE4_ERROR_IO, "%s: too large to map", path);
    if (st.st_size == 0) return MOE4_OK;
    void *data = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED) return fail_errno(ctx, path, "cannot map");
    *map = (struct moe4_map){data, (size_t)st.st_size, (uint64_t)st.st_dev, (uint64_t)st.st_ino, st.st_mtim.tv_sec, st.st_mtim.tv_nsec};
    return MOE4_OK;
}

moe4_status moe4_map_check(const moe4_ctx *ctx, const struct moe4_map *map, const char *path) {
    struct stat st;
    if (!map->bytes || stat(path, &st) != 0 || (uint64_t)st.st_dev != map->device || (uint64_t)st.st_ino != map->inode) return MOE4_OK;
    MOE4_CHECK(ctx, (uintmax_t)st.st_size == map->bytes, MOE4_ERROR_IO, "%s: changed while open: %zu bytes, was %zu", path,
               (size_t)st.st_size, map->bytes);
    MOE4_CHECK(ctx, st.st_mtim.tv_sec == map->seconds && st.st_mtim.tv_nsec == map->nanoseconds, MOE4_ERROR_IO,
               "%s: changed while open: written to, %zu bytes as before", path, map->bytes);
    return MOE4_OK;
}

moe4_status moe4_map_open(const moe4_ctx *ctx, struct moe4_map *map, const char *path) {
    *map = (struct moe4_map){.data = (const uint8_t *)""};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang */
    if (fd < 0) return fail_errno(ctx, path, "cannot open");
    moe4_status status = map_descriptor(ctx, map, path, fd);
    close(fd);
    return status;
}

void moe4_map_close(struct moe4_map *map) {
    if (map->bytes) munmap((void *)map->data, map->bytes);
    *map = (struct moe4_map){.data = (const uint8_t *)""};
}

void moe4_map_drop(const struct moe4_map *map, size_t offset, size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), begin = offset & ~(page - 1);
    if (map->bytes && bytes) madvise((void *)(map->data + begin), offset - begin + bytes, MADV_DONTNEED);
}

bool moe4_name_ok(const char *name, size_t bytes) {
    if (bytes == 0 || bytes > MOE4_MAX_NAME) return false;
    for (size_t i = 0; i < bytes; i++) {
        unsigned char c = (unsigned char)name[i];
        if (c < 0x20 || c == 0x7f) return false;
        if (c == 0xc2 && i + 1 < bytes && (unsigned char)name[i + 1] < 0xa0) return false; /* U+0080 to U+009F */
    }
    return true;
}

char *moe4_path_join(const moe4_ctx *ctx, const char *folder, const char *name) {
    size_t a = strlen(folder), b = strlen(name);
    char *path = moe4_calloc(ctx, a + b + 2, 1, "path");
    if (!path) return NULL;
    memcpy(path, folder, a);
    if (a && path[a - 1] != '/') path[a++] = '/';
    memcpy(path + a, name, b);
    return path;
}

char *moe4_text_copy(const moe4_ctx *ctx, const char *text, size_t n) {
    char *copy = moe4_calloc(ctx, n + 1, 1, "text");
    return copy ? memcpy(copy, text, n) : NULL;
}
