#include "digest.h"

#include <string.h>

#include "cpu/pool.h"

enum { LANES = 8, STEP = 8 * LANES, SHARE = 1 << 20 };

#define ODD 0x9e3779b97f4a7c15u

static uint64_t rotate(uint64_t x, int n) {
    return x << n | x >> (64 - n);
}

/* Every bit of x moves every bit; no two x give the same. */
static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdu;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53u;
    return x ^ x >> 33;
}

/* Word i goes to lane i % LANES. A lane's step can be undone, so two contents that differ in one word of a lane differ in that lane. */
static void add_step(uint64_t lane[LANES], const void *data) {
    uint64_t word[LANES];
    memcpy(word, data, STEP);
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i++) lane[i] = rotate(lane[i] ^ word[i], 27) * ODD;
}

static struct moe4_digest digest(const void *data, size_t n) {
    uint64_t lane[LANES];
    for (uint64_t i = 0; i < LANES; i++) lane[i] = mix(i + 1);
    size_t at = 0;
    for (; n - at >= STEP; at += STEP) add_step(lane, (const char *)data + at);
    if (at < n) {
        char last[STEP] = {0};
        memcpy(last, (const char *)data + at, n - at);
        add_step(lane, last);
    }
    struct moe4_digest d = {{n, ~(uint64_t)n}};
    for (int i = 0; i < LANES; i++) {
        d.bits[0] = mix(d.bits[0] ^ lane[i]);
        d.bits[1] = mix(d.bits[1] + rotate(lane[i], 32) + ODD);
    }
    return d;
}

struct job {
    const struct moe4_piece *pieces;
    const size_t *first; /* [n + 1] shares before piece i */
    size_t n;
    struct moe4_digest *share;
};

static void share_task(void *arg, size_t task) {
    const struct job *j = arg;
    size_t lo = 0, hi = j->n; /* first[lo] <= task < first[hi] */
    while (hi - lo > 1) {
        const size_t mid = lo + (hi - lo) / 2;
        *(j->first[mid] <= task ? &lo : &hi) = mid;
    }
    const size_t at = (task - j->first[lo]) * SHARE, left = j->pieces[lo].bytes - at;
    j->share[task] = digest((const char *)j->pieces[lo].data + at, left < SHARE ? left : SHARE);
}

moe4_status moe4_digest_pieces(const moe4_ctx *ctx, struct moe4_digest *digest_ret, const struct moe4_piece *pieces, size_t n) {
    size_t *first = moe4_calloc(ctx, n + 1, sizeof *first, "digests");
    if (!first) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) first[i + 1] = first[i] + pieces[i].bytes / SHARE + 1; /* one more than full ones: the length shows */
    struct moe4_digest *share = moe4_calloc(ctx, first[n], sizeof *share, "digests");
    if (share) {
        struct job j = {pieces, first, n, share};
        moe4_pool_run(ctx->pool, first[n], SIZE_MAX, share_task, &j);
        *digest_ret = digest(share, first[n] * sizeof *share);
    }
    moe4_free(ctx, share);
    moe4_free(ctx, first);
    return share ? MOE4_OK : MOE4_ERROR_MEMORY;
}
