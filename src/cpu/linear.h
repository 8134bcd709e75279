/* Linear on the CPU: the same rows and products as a layer's. */
#ifndef MOE4_CPU_LINEAR_H
#define MOE4_CPU_LINEAR_H

#include "../backend.h"
#include "kernels.h"
#include "pack.h"

/* Matrices of one format, packed as their family wants them. */
struct moe4_cpu_matrices {
    const struct moe4_gemm *gemm;
    struct moe4_store packed;
    struct moe4_matrix matrix[];
};
/* *matrices_ret is for destroy even on failure. */
moe4_status moe4_cpu_matrices_create(void **matrices_ret, moe4_ctx *ctx, const moe4_weight *weights, size_t n, moe4_act act);
void moe4_cpu_matrices_destroy(void *matrices, const moe4_ctx *ctx);

moe4_status moe4_cpu_linear_prepare(moe4_linear *linear);
void moe4_cpu_linear_release(moe4_linear *linear);
bool moe4_cpu_linear_bytes(size_t *bytes, const moe4_linear *linear, size_t n_tokens);
moe4_status moe4_cpu_linear_forward(const struct moe4_linear_call *call);

#endif
