/* Files of a checkpoint, mapped read-only, and names fit to print. */
#ifndef MOE4_FILE_H
#define MOE4_FILE_H

#include "internal.h"

struct moe4_map {
    const uint8_t *data;
    size_t bytes;
    uint64_t device, inode; /* which file it was, and when it was last written */
    int64_t seconds, nanoseconds;
};

/* Maps a regular file read-only; an empty one has bytes 0. Errors: NOT_FOUND, IO (the path and the system's reason). */
moe4_status moe4_map_open(const moe4_ctx *ctx, struct moe4_map *map, const char *path);
/* OK unless the file behind the mapping, as far as `path` still leads to it, has another size or time of writing than when it was mapped.
 * One that was deleted or replaced by another keeps its bytes as long as it is mapped. Error: IO (path and both sizes). */
moe4_status moe4_map_check(const moe4_ctx *ctx, const struct moe4_map *map, const char *path);
void moe4_map_close(struct moe4_map *map);
/* Drops the resident pages of [offset, offset + bytes): they are read again from the file when touched. */
void moe4_map_drop(const struct moe4_map *map, size_t offset, size_t bytes);

/* True for a name that may be printed and looked up: 1 to MOE4_MAX_NAME bytes, no control characters. */
enum { MOE4_MAX_NAME = 255 };
bool moe4_name_ok(const char *name, size_t bytes);

/* "folder/name" from the context's allocator; NULL with the error recorded. */
char *moe4_path_join(const moe4_ctx *ctx, const char *folder, const char *name);
/* A copy of n bytes with a NUL behind; NULL with the error recorded. */
char *moe4_text_copy(const moe4_ctx *ctx, const char *text, size_t n);

#endif
