/* The cache folder of a context (moe4_ctx_options.cache): files of bytes that a backend made of weights, found by what they were made of.
 * docs/format.md has the file. Nothing here fails a call: a file that is not there or not whole is made again, one that cannot be
 * written is not, and the log hears why. */
#ifndef MOE4_CACHE_H
#define MOE4_CACHE_H

#include "digest.h"

enum { MOE4_CACHE_LAYOUT = 32 };

/* What a file must be to be taken. */
struct moe4_cache_key {
    char layout[MOE4_CACHE_LAYOUT]; /* the name of the bytes' layout, NUL-padded: another one for any change of it; a-z, 0-9, - and _ */
    struct moe4_digest content;     /* of all that the bytes are made of */
    size_t bytes;
};

/* The file's bytes, checked and mapped, at a multiple of a page; writing to them does not write to the file. NULL: there is none. */
void *moe4_cache_map(const moe4_ctx *ctx, const struct moe4_cache_key *key);
void moe4_cache_unmap(void *data, size_t bytes);
/* Writes the file: under a temporary name, synced, renamed. */
void moe4_cache_write(const moe4_ctx *ctx, const struct moe4_cache_key *key, const void *data);

/* At the context's creation: `folder` is a folder, and is copied. Errors: NOT_FOUND, IO, MEMORY. */
moe4_status moe4_cache_open(moe4_ctx *ctx, const char *folder);

#endif
