/* Linear on the CPU: rows packed once, then a task for each (matrix, block of columns, block of rows). */
#include "linear.h"

#include <string.h>

#include "kernels.h"
#include "pack.h"
#include "rows.h"

enum { TASK_COLS = MOE4_TASK_COLS, TASK_ROWS = 128 };

struct prepared {
    const struct moe4_gemm *gemm;
    moe4_act act;
    void *packed; /* all matrices' packed forms, or NULL */
    struct moe4_matrix matrix[];
};

moe4_status moe4_cpu_linear_prepare(moe4_linear *l) {
    struct prepared *p = moe4_calloc(l->ctx, 1, sizeof *p + l->n_weights * sizeof *p->matrix, "linear");
    if (!p) return MOE4_ERROR_MEMORY;
    l->prepared = p;
    p->act = l->o.act;
    p->gemm = moe4_cpu_gemm(l->ctx->kernels, l->weight->dtype, p->act);
    struct moe4_pack *packs = moe4_calloc(l->ctx, l->n_weights, sizeof *packs, "matrices to pack");
    if (!packs) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < l->n_weights; i++) {
        p->matrix[i].w = l->weight[i];
        packs[i] = (struct moe4_pack){.gemm = p->gemm, .matrix = &p->matrix[i]};
    }
    moe4_status status = moe4_pack(&p->packed, l->ctx, packs, l->n_weights);
    moe4_free(l->ctx, packs);
    return status;
}

void moe4_cpu_linear_release(moe4_linear *l) {
    struct prepared *p = l->prepared;
    if (p) moe4_free(l->ctx, p->packed);
    moe4_free(l->ctx, p);
}

struct buffers {
    void *rows;
    float *factor, *scratch;
    const void **row;
};

static bool carve(size_t *bytes, struct buffers *b, const moe4_linear *l, size_t n_tokens, void *base) {
    struct moe4_carver c = {.base = base};
    const struct prepared *p = l->prepared;
    b->rows = moe4_carve(&c, n_tokens, p->gemm->row_bytes(l->cols));
    b->factor = moe4_carve(&c, n_tokens, sizeof *b->factor);
    b->row = moe4_carve(&c, n_tokens, sizeof *b->row);
    b->scratch = moe4_carve(&c, moe4_row_tasks(l->ctx), moe4_fp32_row_bytes(l->cols));
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
    size_t row_blocks;
};

static void product_task(void *arg, size_t task) {
    const struct run *r = arg;
    const moe4_linear *l = r->c->linear;
    const struct prepared *p = l->prepared;
    size_t row0 = task % r->row_blocks * TASK_ROWS, block = task / r->row_blocks, i = 0;
    for (size_t n; block >= (n = (l->weight[i].rows + TASK_COLS - 1) / TASK_COLS); i++) block -= n;
    size_t N = l->weight[i].rows, col0 = block * TASK_COLS;
    size_t n_cols = N - col0 < TASK_COLS ? N - col0 : TASK_COLS;
    size_t n_rows = r->c->n_tokens - row0 < TASK_ROWS ? r->c->n_tokens - row0 : TASK_ROWS;

    _Alignas(64) float out[TASK_ROWS * TASK_COLS];
    p->gemm->gemm(out, TASK_COLS, r->b.row + row0, n_rows, &p->matrix[i], col0, n_cols);
    for (size_t m = 0; m < n_rows; m++) {
        char *y = (char *)r->c->y[i] + ((row0 + m) * N + col0) * moe4_dtype_bytes(l->o.y_dtype);
        l->ctx->kernels->scale_row(out + m * TASK_COLS, l->weight[i].global, r->b.factor[row0 + m], n_cols);
        if (l->weight[i].bias) l->ctx->kernels->add_scaled_row(out + m * TASK_COLS, l->weight[i].bias + col0, 1.f, n_cols);
        l->ctx->kernels->narrow_row(y, l->o.y_dtype, out + m * TASK_COLS, n_cols);
    }
}

moe4_status moe4_cpu_linear_forward(const struct moe4_linear_call *c) {
    const moe4_linear *l = c->linear;
    const struct prepared *p = l->prepared;
    struct run r = {.c = c, .row_blocks = (c->n_tokens + TASK_ROWS - 1) / TASK_ROWS};
    size_t bytes, n_blocks = 0, n_cols = 0, row_bytes = p->gemm->row_bytes(l->cols);
    carve(&bytes, &r.b, l, c->n_tokens, c->workspace);
    struct moe4_row_stage stage = {.ctx = l->ctx,
                                   .gemm = p->gemm,
                                   .act = p->act,
                                   .n_rows = c->n_tokens,
                                   .k = l->cols,
                                   .src = c->x,
                                   .src_dtype = l->o.x_dtype,
                                   .src_ld = l->o.x_ld,
                                   .input_scale = &l->input_scale,
                                   .one_input_scale = true,
                                   .packed = r.b.rows,
                                   .factor = r.b.factor,
                                   .scratch = r.b.scratch};
    moe4_pack_rows(&stage);
    if (c->n_saturated) *c->n_saturated = stage.n_saturated;
    for (size_t t = 0; t < c->n_tokens; t++) r.b.row[t] = (const char *)r.b.rows + t * row_bytes;
    for (size_t i = 0; i < l->n_weights; i++) {
        n_blocks += (l->weight[i].rows + TASK_COLS - 1) / TASK_COLS;
        n_cols += l->weight[i].rows;
    }
    moe4_run(l->ctx, n_blocks * r.row_blocks, (double)c->n_tokens * (double)n_cols * (double)l->cols, product_task, &r);
    return MOE4_OK;
}
