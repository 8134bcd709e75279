/* The heavy stages of a layer on the CPU: rows rounded and packed, gate/up with SwiGLU in its tail, down. */
#include <math.h>
#include <stdatomic.h>

#include "moe.h"
#include "pack.h"
#include "rows.h"

/* ---- rows into the products ---- */

static void count_nonfinite(struct moe4_cpu_state *s, const struct moe4_row_stage *stage, const struct moe4_cpu_group *g) {
    if (!g->x_by_pos) {
        s->report.n_nonfinite_rows = stage->n_nonfinite;
        return;
    }
    uint64_t n = g->routed ? 0 : stage->n_nonfinite;
    size_t k = g->routed ? s->moe->o.top_k : 0;
    for (size_t t = 0; k && t < s->n_tokens; t++) { /* each token once, however many positions read it */
        bool bad = false;
        for (size_t j = 0; j < k; j++) {
            int32_t p = g->pos_of_slot[t * k + j];
            bad |= p >= 0 && isnan(g->x_factor[p]);
        }
        n += bad;
    }
    if (n > s->report.n_nonfinite_rows) s->report.n_nonfinite_rows = n;
}

moe4_status moe4_cpu_quantize_x(const struct moe4_moe_call *c) {
    struct moe4_cpu_state *s = c->workspace;
    const moe4_moe *moe = c->moe;
    for (size_t i = 0; i < s->n_groups; i++) {
        struct moe4_cpu_group *g = &s->group[i];
        if (!moe4_cpu_shares_x(c, i)) {
            struct moe4_row_stage stage = {.ctx = moe->ctx,
                                           .gemm = g->cpu->x,
                                           .act = g->set->act_x,
                                           .n_rows = g->x_by_pos ? g->n_pos : c->n_tokens,
                                           .k = moe->hidden,
                                           .src = c->x,
                                           .src_dtype = moe->o.x_dtype,
                                           .src_ld = moe->o.x_ld,
                                           .n_src = c->by_rows ? c->n_rows : c->n_tokens,
                                           .index = g->x_by_pos ? g->token : NULL,
                                           .weight = c->moe->o.weighting == MOE4_WEIGHT_ON_X ? g->weight : NULL,
                                           .input_scale = g->x_scale,
                                           .packed = g->x_rows,
                                           .factor = g->x_factor,
                                           .scratch = s->scratch};
            moe4_pack_rows(&stage);
            s->report.n_saturated_blocks += stage.n_saturated;
            count_nonfinite(s, &stage, g);
        }
        size_t row_bytes = g->cpu->x->row_bytes(moe->hidden);
        for (size_t p = 0; p < g->n_pos; p++) g->x_row[p] = (const char *)g->x_rows + row_bytes * (g->x_by_pos ? p : (size_t)g->token[p]);
    }
    moe4_cpu_lap(s, MOE4_STAGE_QUANTIZE_X);
    return MOE4_OK;
}

moe4_status moe4_cpu_quantize_h(const struct moe4_moe_call *c) {
    struct moe4_cpu_state *s = c->workspace;
    for (size_t i = 0; i < s->n_groups; i++) {
        struct moe4_cpu_group *g = &s->group[i];
        struct moe4_row_stage stage = {.ctx = c->moe->ctx,
                                       .gemm = g->cpu->h,
                                       .act = g->set->act_h,
                                       .n_rows = g->n_pos,
                                       .k = g->set->intermediate,
                                       .src = g->h,
                                       .src_dtype = MOE4_F32,
                                       .src_ld = g->set->intermediate,
                                       .weight = c->moe->o.weighting == MOE4_WEIGHT_BEFORE_DOWN ? g->weight : NULL,
                                       .input_scale = g->h_scale,
                                       .packed = g->h_rows,
                                       .factor = g->h_factor,
                                       .scratch = s->scratch};
        moe4_pack_rows(&stage);
        s->report.n_saturated_blocks += stage.n_saturated;
        size_t row_bytes = g->cpu->h->row_bytes(g->set->intermediate);
        for (size_t p = 0; p < g->n_pos; p++) g->h_row[p] = (const char *)g->h_rows + row_bytes * p;
    }
    moe4_cpu_lap(s, MOE4_STAGE_QUANTIZE_H);
    return MOE4_OK;
}

/* ---- the products ---- */

/* A product over all experts of a group that were hit: item = (hit expert, block of columns). Each thread takes items one by one, the
 * next one before it reads the weights of its last matrix, so that prefetching runs on into those. */
struct product {
    const struct moe4_cpu_state *s;
    const struct moe4_cpu_group *g;
    void (*compute)(struct product *p, size_t item, size_t *next, void *lane);
    struct moe4_task_size task;
    size_t n_cols, blocks; /* of one expert */
    size_t n_items;
    bool in_turn; /* items from the experts with most rows and from those with fewest, in turn */
    atomic_size_t taken;
    struct moe4_glu glu;
};

struct part { /* one item's share */
    const struct moe4_cpu_expert *e;
    const moe4_expert *w;
    size_t pos0, n_pos, col0, n_cols;
};

static struct part item_part(const struct product *p, size_t item) {
    const struct moe4_cpu_group *g = p->g;
    const size_t at = !p->in_turn ? item : item % 2 ? p->n_items - 1 - item / 2 : item / 2;
    size_t e = (size_t)g->hit[at / p->blocks], col0 = at % p->blocks * p->task.cols;
    return (struct part){.e = &g->cpu->expert[e],
                         .w = &g->set->expert[e],
                         .pos0 = (size_t)g->start[e],
                         .n_pos = (size_t)(g->start[e + 1] - g->start[e]),
                         .col0 = col0,
                         .n_cols = p->n_cols - col0 < p->task.cols ? p->n_cols - col0 : p->task.cols};
}

static size_t take_item(struct product *p) {
    return atomic_fetch_add_explicit(&p->taken, 1, memory_order_relaxed);
}

static void run_lane(void *arg, size_t lane) {
    struct product *p = arg;
    for (size_t item = take_item(p), next; item < p->n_items; item = next)
        p->compute(p, item, &next, p->s->lanes + lane * p->s->lane_bytes);
}

/* Experts with few rows wait for memory, those with more leave it alone: so threads do better with both kinds at any time. */
static bool uneven(const struct moe4_cpu_group *g) {
    if (!g->n_hit) return false;
    const int32_t most = g->hit[0], least = g->hit[g->n_hit - 1];
    return g->start[most + 1] - g->start[most] >= 2 * (g->start[least + 1] - g->start[least]);
}

static void run_product(const struct moe4_cpu_state *s, const struct moe4_cpu_group *g, const struct moe4_gemm *gemm, size_t n_cols,
                        size_t k, int n_products, struct moe4_glu glu, void (*compute)(struct product *, size_t, size_t *, void *)) {
    const moe4_ctx *ctx = s->moe->ctx;
    struct product p = {.s = s, .g = g, .compute = compute, .n_cols = n_cols, .glu = glu};
    p.task = moe4_task_size(ctx, gemm, g->n_pos, g->n_hit, n_cols, k);
    p.blocks = (n_cols + p.task.cols - 1) / p.task.cols;
    p.n_items = g->n_hit * p.blocks;
    p.in_turn = moe4_ctx_n_threads(ctx) > 1 && uneven(g);
    moe4_run(ctx, moe4_ctx_n_threads(ctx), (double)g->n_pos * (double)n_cols * (double)k * n_products, run_lane, &p);
}

/* Where the weights of columns from col0 on start, for families that pack them. */
static const void *weights_at(const struct moe4_matrix *w, size_t col0) {
    return w->packed ? moe4_tile16_at(w, col0) : NULL;
}

static void gate_up_item(struct product *p, size_t item, size_t *next_item, void *lane) {
    const struct moe4_cpu_group *g = p->g;
    const struct moe4_gemm *gemm = g->cpu->x;
    const struct moe4_kernels *kernels = g->cpu->kernels;
    struct part t = item_part(p, item);
    bool gated = p->glu.kind != MOE4_RELU2;
    const size_t ld = p->task.cols;
    float *gate = (float *)(void *)((char *)lane + gemm->scratch_bytes),
          *up = gate + ld * (t.n_pos < p->task.rows ? t.n_pos : p->task.rows);
    for (size_t m0 = 0; m0 < t.n_pos; m0 += p->task.rows) {
        size_t n = t.n_pos - m0 < p->task.rows ? t.n_pos - m0 : p->task.rows, pos = t.pos0 + m0;
        const void *next = NULL;
        if (gated) gemm->gemm(gate, ld, g->x_row + pos, n, &t.e->gate, t.col0, t.n_cols, weights_at(&t.e->up, t.col0), lane);
        if (m0 + n == t.n_pos && (*next_item = take_item(p)) < p->n_items) {
            struct part after = item_part(p, *next_item);
            next = weights_at(gated ? &after.e->gate : &after.e->up, after.col0);
        }
        gemm->gemm(up, ld, g->x_row + pos, n, &t.e->up, t.col0, t.n_cols, next, lane);
        for (size_t m = 0; m < n; m++) {
            float *gm = gate + m * ld, *um = up + m * ld;
            float factor = g->x_factor[g->x_by_pos ? pos + m : (size_t)g->token[pos + m]];
            if (gated) moe4_cpu_finish_row(kernels, gm, &t.w->gate, t.col0, t.n_cols, factor);
            moe4_cpu_finish_row(kernels, um, &t.w->up, t.col0, t.n_cols, factor);
            kernels->glu_row(g->h + (pos + m) * g->set->intermediate + t.col0, gm, um, t.n_cols, &p->glu);
        }
    }
}

moe4_status moe4_cpu_gate_up(const struct moe4_moe_call *c) {
    struct moe4_cpu_state *s = c->workspace;
    const moe4_moe_options *o = &c->moe->o;
    const struct moe4_glu glu = {o->activation, o->swiglu_alpha, o->swiglu_beta, o->swiglu_limit};
    for (size_t i = 0; i < s->n_groups; i++) {
        const struct moe4_cpu_group *g = &s->group[i];
        run_product(s, g, g->cpu->x, g->set->intermediate, g->set->hidden, 2, glu, gate_up_item);
    }
    moe4_cpu_lap(s, MOE4_STAGE_GATE_UP);
    return MOE4_OK;
}

static void down_item(struct product *p, size_t item, size_t *next_item, void *lane) {
    const struct moe4_cpu_group *g = p->g;
    struct part t = item_part(p, item);
    size_t hidden = g->set->hidden;
    for (size_t m0 = 0; m0 < t.n_pos; m0 += p->task.rows) {
        size_t n = t.n_pos - m0 < p->task.rows ? t.n_pos - m0 : p->task.rows, pos = t.pos0 + m0;
        float *o = g->o + pos * hidden + t.col0;
        const void *next = NULL;
        if (m0 + n == t.n_pos && (*next_item = take_item(p)) < p->n_items) {
            struct part after = item_part(p, *next_item);
            next = weights_at(&after.e->down, after.col0);
        }
        g->cpu->h->gemm(o, hidden, g->h_row + pos, n, &t.e->down, t.col0, t.n_cols, next, lane);
        for (size_t m = 0; m < n; m++)
            moe4_cpu_finish_row(g->cpu->kernels, o + m * hidden, &t.w->down, t.col0, t.n_cols, g->h_factor[pos + m]);
    }
}

moe4_status moe4_cpu_down(const struct moe4_moe_call *c) {
    struct moe4_cpu_state *s = c->workspace;
    for (size_t i = 0; i < s->n_groups; i++) {
        const struct moe4_cpu_group *g = &s->group[i];
        run_product(s, g, g->cpu->h, g->set->hidden, g->set->intermediate, 1, (struct moe4_glu){0}, down_item);
    }
    moe4_cpu_lap(s, MOE4_STAGE_DOWN);
    return MOE4_OK;
}
