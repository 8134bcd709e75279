/* Grouped linear on the CPU. A position is a row with its group: the rows as they come, or, block-diagonal, every row once for each
 * group, group after group. */
#include "grouped.h"

#include "linear.h"
#include "rows.h"

moe4_status moe4_cpu_grouped_prepare(moe4_grouped *g) {
    return moe4_cpu_matrices_create(&g->prepared, g->ctx, g->weight, g->n_groups, g->o.act);
}

void moe4_cpu_grouped_release(moe4_grouped *g) {
    moe4_cpu_matrices_destroy(g->prepared, g->ctx);
}

struct buffers {
    void *rows;
    float *factor, *input_scale, *scratch;
    int32_t *index; /* row of x, in rows of K, for each position */
    const void **row;
    char *lanes;
};

static bool carve(size_t *bytes, struct buffers *b, const moe4_grouped *g, size_t n_rows, void *base) {
    struct moe4_carver c = {.base = base};
    const struct moe4_cpu_matrices *p = g->prepared;
    size_t n_pos = n_rows;
    if (g->o.block_diagonal && !moe4_mul(&n_pos, n_rows, g->n_groups)) return false;
    b->rows = moe4_carve(&c, n_pos, p->gemm->row_bytes(g->cols));
    b->factor = moe4_carve(&c, n_pos, sizeof *b->factor);
    b->input_scale = moe4_carve(&c, n_pos, sizeof *b->input_scale);
    b->index = moe4_carve(&c, n_pos, sizeof *b->index);
    b->row = moe4_carve(&c, n_pos, sizeof *b->row);
    b->scratch = moe4_carve(&c, moe4_row_tasks(g->ctx), moe4_row_scratch_bytes(g->cols));
    b->lanes = moe4_carve(&c, moe4_ctx_n_threads(g->ctx), moe4_lane_bytes(p->gemm, 1, n_rows));
    *bytes = c.used;
    return !c.overflow && n_pos <= INT32_MAX;
}

bool moe4_cpu_grouped_bytes(size_t *bytes, const moe4_grouped *g, size_t n_rows) {
    struct buffers b;
    return carve(bytes, &b, g, n_rows, NULL);
}

struct run {
    const struct moe4_grouped_call *c;
    struct buffers b;
    struct moe4_task_size task;
    size_t n_pos, n_blocks;
};

/* Positions of a group, [*pos, *pos + *n), and the row of y where the first goes. */
static void group_part(const struct run *r, size_t group, size_t *pos, size_t *n, size_t *row) {
    const int32_t *offsets = r->c->offsets;
    *row = offsets ? (size_t)offsets[group] : 0;
    *pos = offsets ? *row : group * r->c->n_rows;
    *n = offsets ? (size_t)offsets[group + 1] - *row : r->c->n_rows;
}

static void place_rows(struct run *r, size_t row_bytes) {
    const moe4_grouped *g = r->c->grouped;
    for (size_t i = 0; i < g->n_groups; i++) {
        size_t pos, n, row;
        group_part(r, i, &pos, &n, &row);
        for (size_t p = pos; p < pos + n; p++, row++) {
            r->b.input_scale[p] = g->weight[i].input_scale;
            r->b.row[p] = (const char *)r->b.rows + p * row_bytes;
            r->b.index[p] = (int32_t)(r->c->offsets ? row : row * g->n_groups + i);
        }
    }
}

/* Rounds and packs n positions from pos on. */
static void pack_rows(const struct run *r, size_t pos, size_t n, const void *x, const int32_t *index, uint64_t *n_saturated) {
    const moe4_grouped *g = r->c->grouped;
    const struct moe4_cpu_matrices *p = g->prepared;
    struct moe4_row_stage stage = {.ctx = g->ctx,
                                   .gemm = p->gemm,
                                   .act = g->o.act,
                                   .n_rows = n,
                                   .k = g->cols,
                                   .src = x,
                                   .src_dtype = g->o.x_dtype,
                                   .src_ld = g->o.x_ld,
                                   .n_src = r->c->n_rows,
                                   .index = index,
                                   .input_scale = r->b.input_scale + pos,
                                   .packed = (char *)r->b.rows + pos * p->gemm->row_bytes(g->cols),
                                   .factor = r->b.factor + pos,
                                   .scratch = r->b.scratch};
    moe4_pack_rows(&stage);
    *n_saturated += stage.n_saturated;
}

static void product_item(void *arg, size_t item, size_t lane) {
    const struct run *r = arg;
    const moe4_grouped *g = r->c->grouped;
    const struct moe4_cpu_matrices *p = g->prepared;
    const struct moe4_kernels *kernels = g->ctx->kernels;
    const size_t cols = r->task.cols;
    size_t group = item / r->n_blocks, col0 = item % r->n_blocks * cols, pos, n_group, row;
    size_t n_cols = g->rows - col0 < cols ? g->rows - col0 : cols;
    group_part(r, group, &pos, &n_group, &row);
    void *scratch = r->b.lanes + lane * moe4_lane_bytes(p->gemm, 1, r->c->n_rows);
    float *out = (float *)(void *)((char *)scratch + p->gemm->scratch_bytes);
    for (size_t m0 = 0; m0 < n_group; m0 += r->task.rows) {
        size_t n = n_group - m0 < r->task.rows ? n_group - m0 : r->task.rows;
        p->gemm->gemm(out, cols, r->b.row + pos + m0, n, &p->matrix[group], col0, n_cols, NULL, scratch);
        for (size_t m = 0; m < n; m++) {
            size_t at = (row + m0 + m) * g->o.y_ld + col0 + (r->c->offsets ? 0 : group * g->rows);
            moe4_cpu_finish_row(kernels, out + m * cols, &g->weight[group], col0, n_cols, r->b.factor[pos + m0 + m]);
            kernels->narrow_row((char *)r->c->y + at * moe4_dtype_bytes(g->o.y_dtype), g->o.y_dtype, out + m * cols, n_cols);
        }
    }
}

moe4_status moe4_cpu_grouped_forward(const struct moe4_grouped_call *c) {
    const moe4_grouped *g = c->grouped;
    const struct moe4_cpu_matrices *p = g->prepared;
    struct run r = {.c = c};
    size_t bytes;
    uint64_t n_saturated = 0;
    r.n_pos = c->offsets ? (size_t)c->offsets[g->n_groups] : c->n_rows * g->n_groups;
    r.task = moe4_task_size(g->ctx, p->gemm, r.n_pos, g->n_groups, g->rows, g->cols);
    r.n_blocks = (g->rows + r.task.cols - 1) / r.task.cols;
    carve(&bytes, &r.b, g, c->n_rows, c->workspace);
    place_rows(&r, p->gemm->row_bytes(g->cols));
    if (c->offsets || g->o.x_dtype == MOE4_NVFP4) {
        pack_rows(&r, 0, r.n_pos, c->x, r.b.index, &n_saturated);
    } else { /* each group's columns of x are rows of their own */
        for (size_t i = 0; i < g->n_groups; i++)
            pack_rows(&r, i * c->n_rows, c->n_rows, (const char *)c->x + i * g->cols * moe4_dtype_bytes(g->o.x_dtype), NULL, &n_saturated);
    }
    if (c->n_saturated) *c->n_saturated = n_saturated;
    moe4_run_lanes(g->ctx, g->n_groups * r.n_blocks, (double)r.n_pos * (double)g->rows * (double)g->cols, product_item, &r);
    return MOE4_OK;
}
