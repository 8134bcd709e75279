/* Weights in the form a product family wants them, and the form that kernels of 16 columns share. */
#ifndef MOE4_CPU_PACK_H
#define MOE4_CPU_PACK_H

#include "../internal.h"
#include "kernels.h"

/* 16 columns (rows of W) x 64 k: 576 bytes, nine cache lines. The tiles of 16 columns follow each other in order of k, so a product reads
 * one sequential stream; K and N are padded with zeros.
 *   scale[c][b]         moe4_tile16_scale of column c's block b
 *   code[b][h][4c + i]  byte i of half h of column c's block b: the nibbles as the checkpoint has them, low nibble = even k
 * Scales come first because a kernel reads them first: addresses that only rise keep the hardware's prefetch going.
 * Codes of a block whose scale is zero are zero. */
#define MOE4_TILE16_LAYOUT "tile16_1"
struct moe4_tile16 {
    uint8_t scale[16][4];
    uint8_t code[4][2][64];
};

/* An E4M3 block scale as exponent << 3 | mantissa with five bits of exponent, so that none is subnormal: the value is
 * (8 + mantissa) * 2^(exponent - 13); 0 is 0. */
static inline uint8_t moe4_tile16_scale(uint8_t e4m3) {
    if (e4m3 >= 8) return (uint8_t)(e4m3 + (3 << 3));
    if (e4m3 >= 4) return (uint8_t)(3 << 3 | (e4m3 - 4) << 1);
    if (e4m3 >= 2) return (uint8_t)(2 << 3 | (e4m3 - 2) << 2);
    return (uint8_t)(e4m3 << 3);
}

/* moe4_gemm.packed_bytes and moe4_gemm.pack; col0 is a multiple of 16, and n_cols but for the last columns of the matrix. */
size_t moe4_tile16_bytes(const moe4_weight *w);
void moe4_tile16_pack(void *packed, const moe4_weight *w, size_t col0, size_t n_cols);
#if defined(__x86_64__)
void moe4_tile16_pack_avx2(void *packed, const moe4_weight *w, size_t col0, size_t n_cols);
void moe4_tile16_pack_avx512(void *packed, const moe4_weight *w, size_t col0, size_t n_cols); /* AVX-512 F, BW, VL, DQ, VBMI */
#endif

/* Where column col0 (a multiple of 16) starts in the packed form. */
const struct moe4_tile16 *moe4_tile16_at(const struct moe4_matrix *w, size_t col0);

/* y[m][c] = rows m against the columns of one tile in `cols`, over all n_chunks of 64 k. `next` is where reading goes on after them. */
#define MOE4_TILE16_PARAMETERS                                                                                   \
    float *y, size_t y_ld, const void *const *rows, const struct moe4_tile16 *w, size_t n_chunks, uint16_t cols, \
        const struct moe4_tile16 *next
typedef void (*moe4_tile16_pass)(MOE4_TILE16_PARAMETERS);
/* moe4_gemm.gemm from passes[n] for n = 1 .. max_rows rows; more rows are split into passes of at most best_rows. */
void moe4_tile16_gemm(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0,
                      size_t n_cols, const void *next, const moe4_tile16_pass *passes, size_t max_rows, size_t best_rows);

/* A matrix and the family that reads it. */
struct moe4_pack {
    const struct moe4_gemm *gemm;
    struct moe4_matrix *matrix;
    size_t first_task; /* moe4_repack's own */
};

/* Packed matrices, one after another; of no bytes when all are read in place. */
struct moe4_store {
    void *data;
    size_t bytes;
    bool mapped; /* from the context's cache */
};
void moe4_store_free(const moe4_ctx *ctx, struct moe4_store *store);

/* Packs n matrices into one store, and points each matrix at its part. All threads pack, and the pages are first touched by them. Huge
 * pages are asked for, not required. A context with a cache maps the store from there, or writes it there. *store_ret is for free even on
 * failure. Errors: MEMORY. */
moe4_status moe4_pack(struct moe4_store *store_ret, moe4_ctx *ctx, struct moe4_pack *packs, size_t n);
/* Packs matrices again, whose weights changed, where they are. */
void moe4_repack(moe4_ctx *ctx, struct moe4_pack *packs, size_t n);

#endif
