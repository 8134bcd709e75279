/* A digest that tells contents apart: 128 bits, made to be fast, not to withstand who looks for two contents of one digest. */
#ifndef MOE4_DIGEST_H
#define MOE4_DIGEST_H

#include "internal.h"

struct moe4_digest {
    uint64_t bits[2];
};

struct moe4_piece {
    const void *data;
    size_t bytes;
};

/* Of n pieces, their lengths included, on the context's threads. Errors: MEMORY. */
moe4_status moe4_digest_pieces(const moe4_ctx *ctx, struct moe4_digest *digest_ret, const struct moe4_piece *pieces, size_t n);

#endif
