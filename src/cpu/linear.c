/* Linear on the CPU: rows packed once, then a task for each (matrix, block of columns, block of rows). */
#include "linear.h"

#include <string.h>

#include "kernels.h"
#include "pack.h"
#include "rows.h"

moe4_status moe4_cpu_matrices_create(void **matrices_ret, moe4_ctx *ctx, const moe4_weight *weights, size_t n, moe4_act act) {
    struct moe4_cpu_matrices *p = moe4_calloc(ctx, 1, sizeof *p + n * sizeof *p->matrix, "matrices");
    if (!p) return MOE4_ERROR_MEMORY;
    *matrices_ret = p;
    p->gemm = moe4_cpu_gemm(ctx->kernels, weights->dtype, act);
    struct moe4_pack *packs = moe4_calloc(ctx, n, sizeof *packs, "matrices to pack");
    if (!packs) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) {
        p->matrix[i].w = weights[i];
        packs[i] = (struct moe4_pack){.gemm = p->gemm, .matrix = &p->matrix[i]};
    }
    moe4_status status = moe4_pack(&p->packed, ctx, packs, n);
    moe4_free(ctx, packs);
    return status;
}

void moe4_cpu_matrices_destroy(void *matrices, const moe4_ctx *ctx) {
    struct moe4_cpu_matrices *p = matrices;
    if (p) moe4_store_free(ctx, &p->packed);
    moe4_free(ctx, p);
}

moe4_status moe4_cpu_linear_prepare(moe4_linear *l) {
    return moe4_cpu_matrices_create(&l->prepared, l->ctx, l->weight, l->n_weights, l->o.act);
}

void moe4_cpu_linear_release(moe4_linear *l) {
    moe4_cpu_matrices_destroy(l->prepared, l->ctx);
}

struct buffers {
    void *rows;
    float *factor, *scratch;
    const void **row;
    char *lanes;
};

static bool carve(size_t *bytes, struct buffers *b, const moe4_linear *l, size_t n_tokens, void *base) {
    struct moe4_carver c = {.base = base};
    const struct moe4_cpu_matrices *p = l->prepared;
    b->rows = moe4_carve(&c, n_tokens, p->gemm->row_bytes(l->cols));
    b->factor = moe4_carve(&c, n_tokens, sizeof *b->factor);
    b->row = moe4_carve(&c, n_tokens, sizeof *b->row);
    b->scratch = moe4_carve(&c, moe4_row_tasks(l->ctx), moe4_row_scratch_bytes(l->cols));
    b->lanes = moe4_carve(&c, moe4_ctx_n_threads(l->ctx), moe4_lane_bytes(p->gemm, 1, n_tokens));
    *bytes = c.used;
    return !c.overflow;
}

bool moe4_cpu_linear_bytes(size_t *bytes, const moe4_linear *l, size_t n_tokens) {
    struct buffers b;
    return carve(bytes, &b, l, n_tokens, NULL);
}

struct run {
    const struct moe4_linear_call *c;
    struct buffers b;
    struct moe4_task_size task;
    size_t row_blocks;
};

static void product_item(void *arg, size_t item, size_t lane) {
    const struct run *r = arg;
    const moe4_linear *l = r->c->linear;
    const struct moe4_cpu_matrices *p = l->prepared;
    const size_t cols = r->task.cols, row0 = item % r->row_blocks * r->task.rows;
    size_t block = item / r->row_blocks, i = 0;
    for (size_t n; block >= (n = (l->weight[i].rows + cols - 1) / cols); i++) block -= n;
    size_t N = l->weight[i].rows, col0 = block * cols;
    size_t n_cols = N - col0 < cols ? N - col0 : cols;
    size_t n_rows = r->c->n_tokens - row0 < r->task.rows ? r->c->n_tokens - row0 : r->task.rows;

    void *scratch = r->b.lanes + lane * moe4_lane_bytes(p->gemm, 1, r->c->n_tokens);
    float *out = (float *)(void *)((char *)scratch + p->gemm->scratch_bytes);
    p->gemm->gemm(out, cols, r->b.row + row0, n_rows, &p->matrix[i], col0, n_cols, NULL, scratch);
    for (size_t m = 0; m < n_rows; m++) {
        char *y = (char *)r->c->y[i] + ((row0 + m) * N + col0) * moe4_dtype_bytes(l->o.y_dtype);
        moe4_cpu_finish_row(l->ctx->kernels, out + m * cols, &l->weight[i], col0, n_cols, r->b.factor[row0 + m]);
        l->ctx->kernels->narrow_row(y, l->o.y_dtype, out + m * cols, n_cols);
    }
}

moe4_status moe4_cpu_linear_forward(const struct moe4_linear_call *c) {
    const moe4_linear *l = c->linear;
    const struct moe4_cpu_matrices *p = l->prepared;
    struct run r = {.c = c};
    size_t bytes, n_blocks = 0, n_cols = 0, row_bytes = p->gemm->row_bytes(l->cols);
    carve(&bytes, &r.b, l, c->n_tokens, c->workspace);
    struct moe4_row_stage stage = {.ctx = l->ctx,
                                   .gemm = p->gemm,
                                   .act = l->o.act,
                                   .n_rows = c->n_tokens,
                                   .k = l->cols,
                                   .src = c->x,
                                   .src_dtype = l->o.x_dtype,
                                   .src_ld = l->o.x_ld,
                                   .n_src = c->n_tokens,
                                   .input_scale = &l->input_scale,
                                   .one_input_scale = true,
                                   .packed = r.b.rows,
                                   .factor = r.b.factor,
                                   .scratch = r.b.scratch};
    moe4_pack_rows(&stage);
    if (c->n_saturated) *c->n_saturated = stage.n_saturated;
    for (size_t t = 0; t < c->n_tokens; t++) r.b.row[t] = (const char *)r.b.rows + t * row_bytes;
    for (size_t i = 0; i < l->n_weights; i++) n_cols += l->weight[i].rows;
    r.task = moe4_task_size(l->ctx, p->gemm, c->n_tokens, 1, n_cols, l->cols);
    r.row_blocks = (c->n_tokens + r.task.rows - 1) / r.task.rows;
    for (size_t i = 0; i < l->n_weights; i++) n_blocks += (l->weight[i].rows + r.task.cols - 1) / r.task.cols;
    moe4_run_lanes(l->ctx, n_blocks * r.row_blocks, (double)c->n_tokens * (double)n_cols * (double)l->cols, product_item, &r);
    return MOE4_OK;
}
