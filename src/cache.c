#include "cache.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "file.h"

enum { VERSION = 1, HEADER_BYTES = 4096, NAME_BYTES = MOE4_CACHE_LAYOUT + 48, PATH_BYTES = 4096 };

static const char magic[8] = {'m', 'o', 'e', '4', 'p', 'a', 'c', 'k'};

struct header {
    char magic[8];
    uint32_t version, header_bytes;
    uint64_t bytes; /* behind the header, to the end of the file */
    struct moe4_digest content, packed;
    char layout[MOE4_CACHE_LAYOUT];
};
_Static_assert(sizeof(struct header) == 88, "the header as docs/format.md has it");

static void say(const moe4_ctx *ctx, const char *path, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void say(const moe4_ctx *ctx, const char *path, const char *fmt, ...) {
    char text[1024];
    int n = snprintf(text, sizeof text, "%s: ", path);
    va_list args;
    va_start(args, fmt);
    if (n >= 0 && (size_t)n < sizeof text) vsnprintf(text + n, sizeof text - (size_t)n, fmt, args);
    va_end(args);
    if (ctx->log) ctx->log(ctx->log_user, text);
}

static const char *why(char text[static 128]) {
    int error = errno;
    return strerror_r(error, text, 128) == 0 ? text : "?";
}

/* "FOLDER/tile16-0123….moe4pack"; false when it does not fit. */
static bool path_of(char path[static PATH_BYTES], const moe4_ctx *ctx, const struct moe4_cache_key *key) {
    int n = snprintf(path, PATH_BYTES, "%s/%s-%016llx%016llx.moe4pack", ctx->cache, key->layout, (unsigned long long)key->content.bits[0],
                     (unsigned long long)key->content.bits[1]);
    return n > 0 && n < PATH_BYTES - NAME_BYTES;
}

/* Of the packed bytes; false, and said, where there is no memory for it: that fails no call, so its text is forgotten. */
static bool digest_packed(const moe4_ctx *ctx, const char *path, struct moe4_digest *digest_ret, const void *data, size_t bytes) {
    const struct moe4_piece all = {data, bytes};
    if (moe4_digest_pieces(ctx, digest_ret, &all, 1) == MOE4_OK) return true;
    moe4_begin(ctx);
    say(ctx, path, "no memory for the digest of %zu bytes", bytes);
    return false;
}

/* ---- reading ---- */

static bool check_header(const moe4_ctx *ctx, const char *path, const struct header *h, const struct moe4_cache_key *key) {
    const char *tail = (const char *)h + sizeof *h;
    if (memcmp(h->magic, magic, sizeof magic) != 0) {
        say(ctx, path, "no packed weights: begins with other bytes; packing again");
    } else if (h->version != VERSION || h->header_bytes != HEADER_BYTES) {
        say(ctx, path, "version %u with a header of %u bytes, moe4 reads %u with %u; packing again", h->version, h->header_bytes,
            (unsigned)VERSION, (unsigned)HEADER_BYTES);
    } else if (h->bytes != key->bytes) {
        say(ctx, path, "%llu packed bytes, need %zu; packing again", (unsigned long long)h->bytes, key->bytes);
    } else if (memcmp(h->layout, key->layout, sizeof h->layout) != 0) {
        say(ctx, path, "layout \"%.*s\", need \"%s\"; packing again", (int)strnlen(h->layout, sizeof h->layout), h->layout, key->layout);
    } else if (memcmp(&h->content, &key->content, sizeof h->content) != 0) {
        say(ctx, path, "made of other weights; packing again");
    } else {
        for (size_t i = 0; i < HEADER_BYTES - sizeof *h; i++)
            if (tail[i]) {
                say(ctx, path, "byte %zu is 0x%02x, must be 0; packing again", sizeof *h + i, (unsigned char)tail[i]);
                return false;
            }
        return true;
    }
    return false;
}

static bool check_packed(const moe4_ctx *ctx, const char *path, const struct header *h, const void *data, size_t bytes) {
    struct moe4_digest d;
    if (!digest_packed(ctx, path, &d, data, bytes)) return false;
    if (memcmp(&d, &h->packed, sizeof d) == 0) return true;
    say(ctx, path, "digest of the packed bytes %016llx, the header has %016llx; packing again", (unsigned long long)d.bits[0],
        (unsigned long long)h->packed.bits[0]);
    return false;
}

void moe4_cache_unmap(void *data, size_t bytes) {
    munmap((char *)data - HEADER_BYTES, bytes + HEADER_BYTES);
}

static void *map_descriptor(const moe4_ctx *ctx, const char *path, int fd, const struct moe4_cache_key *key) {
    struct stat st;
    char text[128];
    size_t total;
    if (!moe4_add(&total, key->bytes, HEADER_BYTES)) return NULL;
    if (fstat(fd, &st) != 0) {
        say(ctx, path, "cannot stat: %s", why(text));
    } else if (!S_ISREG(st.st_mode)) {
        say(ctx, path, "not a regular file");
    } else if (st.st_size < 0 || (uintmax_t)st.st_size != total) {
        say(ctx, path, "%lld bytes, need %zu; packing again", (long long)st.st_size, total);
    } else {
        char *file = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
        if (file == MAP_FAILED) {
            say(ctx, path, "cannot map %zu bytes: %s", total, why(text));
            return NULL;
        }
        const struct header *h = (const void *)file;
        if (check_header(ctx, path, h, key) && check_packed(ctx, path, h, file + HEADER_BYTES, key->bytes)) return file + HEADER_BYTES;
        munmap(file, total);
    }
    return NULL;
}

void *moe4_cache_map(const moe4_ctx *ctx, const struct moe4_cache_key *key) {
    char path[PATH_BYTES], text[128];
    if (!path_of(path, ctx, key)) return NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang */
    if (fd < 0) {
        if (errno != ENOENT) say(ctx, path, "cannot open: %s", why(text));
        return NULL;
    }
    void *data = map_descriptor(ctx, path, fd, key);
    close(fd);
    return data;
}

/* ---- writing ---- */

static bool write_all(int fd, const void *data, size_t bytes) {
    enum { AT_ONCE = 64 << 20 };
    for (size_t at = 0; at < bytes;) {
        const size_t left = bytes - at;
        ssize_t n = write(fd, (const char *)data + at, left < AT_ONCE ? left : AT_ONCE);
        if (n < 0 && errno != EINTR) return false;
        if (n > 0) at += (size_t)n;
    }
    return true;
}

/* A new file beside `path`, of a name no other process or thread has. */
static int open_temporary(char temporary[static PATH_BYTES], const moe4_ctx *ctx) {
    int fd = -1;
    for (int tries = 0; tries < 100 && fd < 0; tries++) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        snprintf(temporary, PATH_BYTES, "%s/.moe4-%ld-%lld-%09ld.tmp", ctx->cache, (long)getpid(), (long long)t.tv_sec, t.tv_nsec);
        fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
        if (fd < 0 && errno != EEXIST) return -1;
    }
    return fd;
}

static void sync_folder(const moe4_ctx *ctx) {
    int fd = open(ctx->cache, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    fsync(fd); /* without it the file may be missing after a crash, never half there */
    close(fd);
}

void moe4_cache_write(const moe4_ctx *ctx, const struct moe4_cache_key *key, const void *data) {
    union {
        struct header h;
        char bytes[HEADER_BYTES];
    } header = {.h = {.version = VERSION, .header_bytes = HEADER_BYTES, .bytes = key->bytes, .content = key->content}};
    char path[PATH_BYTES], temporary[PATH_BYTES], text[128];
    memcpy(header.h.magic, magic, sizeof magic);
    memcpy(header.h.layout, key->layout, sizeof header.h.layout);
    if (!path_of(path, ctx, key) || !digest_packed(ctx, path, &header.h.packed, data, key->bytes)) return;
    int fd = open_temporary(temporary, ctx);
    if (fd < 0) {
        say(ctx, path, "cannot write: %s", why(text));
        return;
    }
    bool ok = write_all(fd, header.bytes, HEADER_BYTES) && write_all(fd, data, key->bytes) && fsync(fd) == 0;
    if (close(fd) != 0) ok = false;
    if (!ok || rename(temporary, path) != 0) {
        say(ctx, path, "cannot write: %s", why(text));
        unlink(temporary);
        return;
    }
    sync_folder(ctx);
}

moe4_status moe4_cache_open(moe4_ctx *ctx, const char *folder) {
    struct stat st;
    char text[128];
    if (stat(folder, &st) != 0)
        return moe4_fail(ctx, errno == ENOENT || errno == ENOTDIR ? MOE4_ERROR_NOT_FOUND : MOE4_ERROR_IO, "%s: cannot stat: %s", folder,
                         why(text));
    MOE4_CHECK(ctx, S_ISDIR(st.st_mode), MOE4_ERROR_IO, "%s: not a folder", folder);
    const size_t n = strlen(folder);
    MOE4_CHECK(ctx, n < PATH_BYTES / 2, MOE4_ERROR_IO, "options.cache: a path of %zu bytes, at most %d", n, PATH_BYTES / 2 - 1);
    ctx->cache = moe4_text_copy(ctx, folder, n);
    return ctx->cache ? MOE4_OK : MOE4_ERROR_MEMORY;
}
