/* From a row for each position to y: weighted sums in a fixed order, rounded once. */
#include <string.h>

#include "moe.h"
#include "rows.h"

struct combine {
    const struct moe4_moe_call *c;
    size_t n_tasks;
};

/* Piece by piece of the row, so that the rows of all slots are read side by side. */
static void combine_token(const struct moe4_moe_call *c, float *sum, size_t t) {
    enum { PIECE = 64 };
    const struct moe4_cpu_state *s = c->workspace;
    const struct moe4_kernels *kernels = c->moe->ctx->kernels;
    const size_t hidden = c->moe->hidden, k = c->moe->o.top_k;
    memset(sum, 0, hidden * sizeof *sum);
    for (size_t at = 0; at < hidden; at += PIECE) {
        const size_t n = hidden - at < PIECE ? hidden - at : PIECE;
        for (size_t i = 0; i < s->n_groups; i++) {
            const struct moe4_cpu_group *g = &s->group[i];
            if (!g->routed) {
                kernels->add_scaled_row(sum + at, g->o + t * hidden + at, 1.f, n);
                continue;
            }
            for (size_t j = 0; j < k; j++) {
                const int32_t p = g->pos_of_slot[t * k + j];
                if (p >= 0) kernels->add_scaled_row(sum + at, g->o + (size_t)p * hidden + at, g->weight ? 1.f : c->weights[t * k + j], n);
            }
        }
    }
}

/* Rows that a dispatcher brought, summed by token in order of row. */
static void sum_rows_of_token(const struct moe4_moe_call *c, float *sum, size_t t) {
    const struct moe4_cpu_state *s = c->workspace;
    const struct moe4_cpu_group *g = &s->group[0];
    memset(sum, 0, c->moe->hidden * sizeof *sum);
    for (int32_t i = s->token_start[t]; i < s->token_start[t + 1]; i++) {
        size_t p = (size_t)s->token_pos[i];
        float weight = c->moe->o.weighting == MOE4_WEIGHT_AFTER_DOWN ? g->weight[p] : 1;
        c->moe->ctx->kernels->add_scaled_row(sum, g->o + p * c->moe->hidden, weight, c->moe->hidden);
    }
}

static void write_row(const struct moe4_moe_call *c, size_t row, const float *sum) {
    const moe4_moe_options *o = &c->moe->o;
    char *y = (char *)c->y + row * o->y_ld * moe4_dtype_bytes(o->y_dtype);
    c->moe->ctx->kernels->narrow_row(y, o->y_dtype, sum, c->moe->hidden);
}

static float *task_scratch(const struct moe4_moe_call *c, size_t task) {
    const struct moe4_cpu_state *s = c->workspace;
    return (float *)(void *)((char *)s->scratch + task * moe4_row_scratch_bytes(c->moe->hidden));
}

static void token_task(void *arg, size_t task) {
    const struct combine *r = arg;
    const struct moe4_moe_call *c = r->c;
    float *sum = task_scratch(c, task);
    for (size_t t = c->n_tokens * task / r->n_tasks; t < c->n_tokens * (task + 1) / r->n_tasks; t++) {
        if (c->by_rows) {
            sum_rows_of_token(c, sum, t);
        } else {
            combine_token(c, sum, t);
        }
        write_row(c, t, sum);
    }
}

/* Row for row, weighted, not summed. */
static void row_task(void *arg, size_t task) {
    const struct combine *r = arg;
    const struct moe4_moe_call *c = r->c;
    const struct moe4_cpu_state *s = c->workspace;
    const struct moe4_cpu_group *g = &s->group[0];
    for (size_t p = g->n_pos * task / r->n_tasks; p < g->n_pos * (task + 1) / r->n_tasks; p++) {
        float *o = g->o + p * c->moe->hidden;
        if (c->moe->o.weighting == MOE4_WEIGHT_AFTER_DOWN) c->moe->ctx->kernels->scale_row(o, g->weight[p], 1.f, c->moe->hidden);
        write_row(c, (size_t)g->token[p], o);
    }
}

/* Positions by token, stable: positions rise with the row they came from. */
static void sort_by_token(const struct moe4_moe_call *c, struct moe4_cpu_state *s) {
    const struct moe4_cpu_group *g = &s->group[0];
    memset(s->token_start, 0, (c->n_tokens + 1) * sizeof *s->token_start);
    for (size_t p = 0; p < g->n_pos; p++) {
        int32_t t = c->row_token[g->token[p]];
        if (t >= 0) s->token_start[t + 1]++;
    }
    for (size_t t = 0; t < c->n_tokens; t++) s->token_start[t + 1] += s->token_start[t];
    for (size_t p = 0; p < g->n_pos; p++) { /* token_start[t] walks to the next token's first */
        int32_t t = c->row_token[g->token[p]];
        if (t >= 0) s->token_pos[s->token_start[t]++] = (int32_t)p;
    }
    memmove(s->token_start + 1, s->token_start, c->n_tokens * sizeof *s->token_start);
    s->token_start[0] = 0;
}

moe4_status moe4_cpu_combine(const struct moe4_moe_call *c) {
    struct moe4_cpu_state *s = c->workspace;
    bool by_token = !c->by_rows || c->row_token;
    size_t n = by_token ? c->n_tokens : s->group[0].n_pos;
    struct combine r = {c, moe4_row_tasks(c->moe->ctx)};
    if (r.n_tasks > n) r.n_tasks = n;
    if (c->row_token) sort_by_token(c, s);
    moe4_run(c->moe->ctx, r.n_tasks, (double)n * (double)((c->moe->o.top_k + 1) * c->moe->hidden), by_token ? token_task : row_task, &r);
    moe4_cpu_lap(s, MOE4_STAGE_COMBINE);
    return MOE4_OK;
}
