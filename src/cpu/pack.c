/* Packed weights: the store, and the 16-column tiles of pack.h. */
#define _GNU_SOURCE
#include "pack.h"

#include <string.h>
#include <sys/mman.h>

#include "../cache.h"
#include "pool.h"

/* ---- the store ---- */

enum { TASK_COLS = 64, HUGE_PAGE = 2 << 20 };

struct packing {
    const struct moe4_pack *packs;
    size_t n;
};

static void pack_task(void *arg, size_t task) {
    const struct packing *all = arg;
    size_t lo = 0, hi = all->n; /* packs[lo] starts at or before task, packs[hi] after it */
    while (hi - lo > 1) {
        const size_t mid = lo + (hi - lo) / 2;
        *(all->packs[mid].first_task <= task ? &lo : &hi) = mid;
    }
    const struct moe4_pack *p = &all->packs[lo];
    const size_t col0 = (task - p->first_task) * TASK_COLS, left = p->matrix->w.rows - col0;
    p->gemm->pack((void *)p->matrix->packed, &p->matrix->w, col0, left < TASK_COLS ? left : TASK_COLS);
}

/* Memory nobody has touched yet. */
static void *alloc_store(const moe4_ctx *ctx, size_t bytes) {
    const bool huge = bytes >= HUGE_PAGE;
    void *store = ctx->alloc(ctx->alloc_user, bytes, huge ? HUGE_PAGE : 64);
    if (!store) moe4_fail(ctx, MOE4_ERROR_MEMORY, "packed weights: no memory for %zu bytes", bytes);
#if defined(MADV_HUGEPAGE)
    if (store && huge) madvise(store, bytes & ~(size_t)(HUGE_PAGE - 1), MADV_HUGEPAGE); /* advice: no matter if it is refused */
#endif
    return store;
}

void moe4_repack(moe4_ctx *ctx, struct moe4_pack *packs, size_t n) {
    struct packing all = {.packs = packs, .n = n};
    size_t tasks = 0;
    for (size_t i = 0; i < n; i++) {
        packs[i].first_task = tasks;
        if (packs[i].matrix->packed) tasks += (packs[i].matrix->w.rows + TASK_COLS - 1) / TASK_COLS;
    }
    moe4_pool_run(ctx->pool, tasks, SIZE_MAX, pack_task, &all);
}

void moe4_store_free(const moe4_ctx *ctx, struct moe4_store *store) {
    if (store->mapped) {
        moe4_cache_unmap(store->data, store->bytes);
    } else {
        moe4_free(ctx, store->data);
    }
}

/* What the packed bytes depend on: each matrix's shape and layout, its codes and its scales. */
static moe4_status cache_key(struct moe4_cache_key *key, const moe4_ctx *ctx, const struct moe4_pack *packs, size_t n, size_t bytes) {
    struct about {
        char layout[MOE4_CACHE_LAYOUT];
        uint64_t rows, cols;
    } *about = moe4_calloc(ctx, n, sizeof *about, "keys of packed weights");
    struct moe4_piece *pieces = moe4_calloc(ctx, 2 * n + 1, sizeof *pieces, "keys of packed weights");
    moe4_status status = about && pieces ? MOE4_OK : MOE4_ERROR_MEMORY;
    *key = (struct moe4_cache_key){.bytes = bytes};
    for (size_t i = 0; status == MOE4_OK && i < n; i++) {
        const moe4_weight *w = &packs[i].matrix->w;
        if (!packs[i].gemm->packed_bytes(w)) continue; /* read in place */
        strncpy(about[i].layout, packs[i].gemm->layout, sizeof about[i].layout - 1);
        memcpy(key->layout, about[i].layout, sizeof key->layout);
        about[i].rows = w->rows;
        about[i].cols = w->cols;
        pieces[2 * i] = (struct moe4_piece){w->data, w->rows * w->cols / 2};
        pieces[2 * i + 1] = (struct moe4_piece){w->scale, w->rows * w->cols / MOE4_BLOCK};
    }
    if (status == MOE4_OK) {
        pieces[2 * n] = (struct moe4_piece){about, n * sizeof *about};
        status = moe4_digest_pieces(ctx, &key->content, pieces, 2 * n + 1);
    }
    moe4_free(ctx, about);
    moe4_free(ctx, pieces);
    return status;
}

static moe4_status pack_store(struct moe4_store *store, moe4_ctx *ctx, struct moe4_pack *packs, size_t n) {
    char *at = store->data = store->mapped ? store->data : alloc_store(ctx, store->bytes);
    if (!at) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) {
        struct moe4_matrix *m = packs[i].matrix;
        const size_t own = packs[i].gemm->packed_bytes(&m->w);
        m->packed = own ? at : NULL; /* NULL: read in place */
        at += own;
    }
    if (!store->mapped) moe4_repack(ctx, packs, n);
    return MOE4_OK;
}

moe4_status moe4_pack(struct moe4_store *store_ret, moe4_ctx *ctx, struct moe4_pack *packs, size_t n) {
    struct moe4_cache_key key;
    size_t bytes = 0;
    bool fits = true;
    *store_ret = (struct moe4_store){0};
    for (size_t i = 0; i < n; i++) fits &= moe4_add(&bytes, bytes, packs[i].gemm->packed_bytes(&packs[i].matrix->w));
    MOE4_CHECK(ctx, fits, MOE4_ERROR_MEMORY, "packed weights: %zu matrices do not fit into memory", n);
    store_ret->bytes = bytes;
    if (!bytes) return MOE4_OK;
    if (!ctx->cache) return pack_store(store_ret, ctx, packs, n);
    MOE4_TRY(cache_key(&key, ctx, packs, n, bytes));
    store_ret->data = moe4_cache_map(ctx, &key);
    store_ret->mapped = store_ret->data;
    MOE4_TRY(pack_store(store_ret, ctx, packs, n));
    if (!store_ret->mapped) moe4_cache_write(ctx, &key, store_ret->data);
    return MOE4_OK;
}

/* ---- 16-column tiles ---- */

enum { TILE_COLS = 16, TILE_K = 64 };

_Static_assert(sizeof(struct moe4_tile16) == 576, "packed weight tile");

static size_t n_chunks(const moe4_weight *w) {
    return w->cols / TILE_K + (w->cols % TILE_K != 0);
}

size_t moe4_tile16_bytes(const moe4_weight *w) {
    return (w->rows / TILE_COLS + (w->rows % TILE_COLS != 0)) * n_chunks(w) * sizeof(struct moe4_tile16);
}

/* Column c of a tile from its codes[n_blocks * 8] and scales[n_blocks]; the other blocks stay zero. */
static void pack_column(struct moe4_tile16 *tile, size_t c, const uint8_t *codes, const uint8_t *scales, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; b++) {
        tile->scale[c][b] = moe4_tile16_scale(scales[b]);
        if (scales[b] == 0) continue;
        memcpy(&tile->code[b][0][4 * c], codes + 8 * b, 4);
        memcpy(&tile->code[b][1][4 * c], codes + 8 * b + 4, 4);
    }
}

void moe4_tile16_pack(void *packed, const moe4_weight *w, size_t col0, size_t n_cols) {
    const size_t chunks = n_chunks(w), n_blocks = w->cols / MOE4_BLOCK;
    struct moe4_tile16 *tile = (struct moe4_tile16 *)packed + col0 / TILE_COLS * chunks;
    for (size_t col = col0; col < col0 + n_cols; col += TILE_COLS) {
        const size_t cols = col0 + n_cols - col < TILE_COLS ? col0 + n_cols - col : TILE_COLS;
        for (size_t i = 0; i < chunks; i++, tile++) {
            const size_t block = i * (TILE_K / MOE4_BLOCK), blocks = n_blocks - block < 4 ? n_blocks - block : 4;
            if (cols < TILE_COLS || blocks < 4) memset(tile, 0, sizeof *tile);
            memset(tile->code, 0, sizeof tile->code); /* blocks of scale zero */
            for (size_t c = 0; c < cols; c++) {
                const size_t at = (col + c) * n_blocks + block;
                pack_column(tile, c, (const uint8_t *)w->data + 8 * at, w->scale + at, blocks);
            }
        }
    }
}

const struct moe4_tile16 *moe4_tile16_at(const struct moe4_matrix *w, size_t col0) {
    return (const struct moe4_tile16 *)w->packed + col0 / TILE_COLS * n_chunks(&w->w);
}

void moe4_tile16_gemm(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0,
                      size_t n_cols, const void *next, const moe4_tile16_pass *passes, size_t max_rows, size_t best_rows) {
    const size_t chunks = n_chunks(&w->w), n_passes = n_rows <= max_rows ? 1 : (n_rows + best_rows - 1) / best_rows;
    /* Rows outside, tiles inside: a pass's rows stay in the second-level cache over all tiles, as do the call's weights over passes. */
    for (size_t pass = 0; pass < n_passes; pass++) {
        const size_t row0 = n_rows * pass / n_passes, n = n_rows * (pass + 1) / n_passes - row0;
        const struct moe4_tile16 *tile = moe4_tile16_at(w, col0);
        for (size_t col = 0; col < n_cols; col += TILE_COLS, tile += chunks) {
            const size_t cols = n_cols - col < TILE_COLS ? n_cols - col : TILE_COLS;
            const bool last = next && pass + 1 == n_passes && col + TILE_COLS >= n_cols;
            passes[n](y + row0 * y_ld + col, y_ld, rows + row0, tile, chunks, (uint16_t)((1u << cols) - 1), last ? next : tile + chunks);
        }
    }
}
