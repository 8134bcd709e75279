/* Activation rows: the fp32 form that several product families share, and the stage that rounds and packs rows for any family. */
#ifndef MOE4_CPU_ROWS_H
#define MOE4_CPU_ROWS_H

#include "../internal.h"
#include "kernels.h"

/* moe4_gemm.packed_bytes of families that read weights where they lie. */
size_t moe4_in_place(const moe4_weight *w);
/* fp32 rows: k values, zeros up to a multiple of 16. In the NVFP4 modes the values are e2m1 * block scale, exact. */
size_t moe4_fp32_row_bytes(size_t k);
uint64_t moe4_fp32_pack_row(const struct moe4_kernels *kernels, void *row, float *factor_ret, const float *x, size_t k,
                            const struct moe4_rounding *rounding);

/* moe4_gemm.pack_codes of families of fp32 rows. */
void moe4_fp32_pack_codes(const struct moe4_kernels *kernels, void *row, float *factor_ret, const uint8_t *codes, const uint8_t *scales,
                          size_t k);

/* pack_row and pack_codes of families whose rows are chunks of 64 k: one chunk from its 32 bytes of codes and 4 scales. Past the end of a
 * row both are zero. */
typedef void (*moe4_pack_chunk)(void *chunk, const uint8_t codes[32], const uint8_t scales[4]);
uint64_t moe4_chunks_pack_row(const struct moe4_kernels *kernels, void *row, float *factor_ret, const float *x, size_t k,
                              const struct moe4_rounding *rounding, moe4_pack_chunk pack_chunk, size_t chunk_bytes);
void moe4_chunks_pack_codes(void *row, float *factor_ret, const uint8_t *codes, const uint8_t *scales, size_t k, moe4_pack_chunk pack_chunk,
                            size_t chunk_bytes);

/* Rounds and packs n_rows rows of k elements. Row i comes from source row index[i], or i. */
struct moe4_row_stage {
    moe4_ctx *ctx;
    const struct moe4_gemm *gemm;
    moe4_act act;
    size_t n_rows, k;
    const void *src; /* NVFP4: a moe4_nvfp4_rows of n_src rows */
    moe4_dtype src_dtype;
    size_t src_ld, n_src;
    const int32_t *index;
    const float *weight;      /* [n_rows] factors applied to the rows first, or NULL */
    const float *input_scale; /* STATIC: [n_rows], or one for all with one_input_scale */
    bool one_input_scale;
    void *packed;                      /* [n_rows][gemm->row_bytes(k)] */
    float *factor;                     /* [n_rows]; NaN for a row with a NaN or Inf, which is packed as zeros */
    float *scratch;                    /* [moe4_row_tasks(ctx)][k rounded up to 16] */
    uint64_t n_saturated, n_nonfinite; /* out */
};
void moe4_pack_rows(struct moe4_row_stage *stage);
size_t moe4_row_tasks(const moe4_ctx *ctx);
/* Scratch of one task for rows of k elements: fp32 values and linear block scales; a multiple of 64. */
size_t moe4_row_scratch_bytes(size_t k);

/* A row of a product's results, columns [col0, col0 + n_cols): y = y * global * factor + bias. */
static inline void moe4_cpu_finish_row(const struct moe4_kernels *kernels, float *y, const moe4_weight *w, size_t col0, size_t n_cols,
                                       float factor) {
    kernels->scale_row(y, w->global, factor, n_cols);
    if (w->bias) kernels->add_scaled_row(y, w->bias + col0, 1.f, n_cols);
}

/* The size of a task of a product: columns of one matrix, and how many rows at a time, so that MOE4_TASK_FLOATS hold the outputs. n_rows
 * rows meet n_matrices matrices of n_cols columns and k. */
enum { MOE4_TASK_FLOATS = 10752 };
struct moe4_task_size {
    size_t cols, rows;
};
struct moe4_task_size moe4_task_size(const moe4_ctx *ctx, const struct moe4_gemm *gemm, size_t n_rows, size_t n_matrices, size_t n_cols,
                                     size_t k);

/* moe4_pool_run on as many threads as `work` (multiply-adds, or elements times ten) has use for: below this much for each, telling another
 * thread takes longer than it helps (docs/cpu.md). */
enum { MOE4_THREAD_WORK = 1 << 17 };
void moe4_run(const moe4_ctx *ctx, size_t n_tasks, double work, void (*fn)(void *arg, size_t task), void *arg);

/* The same for items of a product: no two at a time have the same lane < moe4_ctx_n_threads, so memory of a lane is an item's own while
 * it runs. A lane is for the scratch of `gemm`, then the outputs of n_outputs products of at most n_rows rows. */
void moe4_run_lanes(const moe4_ctx *ctx, size_t n_items, double work, void (*fn)(void *arg, size_t item, size_t lane), void *arg);
size_t moe4_lane_bytes(const struct moe4_gemm *gemm, size_t n_outputs, size_t n_rows);

#endif
