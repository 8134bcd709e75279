/* Which rows meet which expert: slots sorted by expert (a stable counting sort), or rows that a dispatcher brought. */
#include <math.h>
#include <string.h>

#include "moe.h"

static int64_t slot_expert(const struct moe4_moe_call *c, size_t slot) {
    const moe4_moe_options *o = &c->moe->o;
    int64_t id = o->ids_dtype == MOE4_I64 ? ((const int64_t *)c->ids)[slot] : ((const int32_t *)c->ids)[slot];
    if (id < 0 || (uint64_t)id < o->first_expert || (uint64_t)id - o->first_expert >= o->n_local) return -1;
    return id - (int64_t)o->first_expert;
}

static void sort_slots(const struct moe4_moe_call *c, struct moe4_cpu_group *g) {
    size_t n_slots = c->n_tokens * c->moe->o.top_k;
    memset(g->start, 0, (g->set->n + 1) * sizeof *g->start);
    for (size_t s = 0; s < n_slots; s++) {
        int64_t e = slot_expert(c, s);
        if (e >= 0) g->start[e + 1]++;
    }
    for (size_t e = 0; e < g->set->n; e++) g->start[e + 1] += g->start[e];
    for (size_t s = 0; s < n_slots; s++) { /* start[e] walks through e's positions to the next expert's first */
        int64_t e = slot_expert(c, s);
        g->pos_of_slot[s] = e < 0 ? -1 : g->start[e]++;
        if (e < 0) continue;
        g->token[g->pos_of_slot[s]] = (int32_t)(s / c->moe->o.top_k);
        if (g->weight) g->weight[g->pos_of_slot[s]] = c->weights[s];
    }
    memmove(g->start + 1, g->start, g->set->n * sizeof *g->start);
    g->start[0] = 0;
}

static void every_token(const struct moe4_moe_call *c, struct moe4_cpu_group *g) {
    g->start[0] = 0;
    g->start[1] = (int32_t)c->n_tokens;
    for (size_t t = 0; t < c->n_tokens; t++) {
        g->token[t] = (int32_t)t;
        if (g->weight) g->weight[t] = 1;
    }
}

/* Rows that stand with their experts: position after position, the gaps of a batched call left out. */
static void given_rows(const struct moe4_moe_call *c, struct moe4_cpu_group *g) {
    int32_t p = 0;
    for (size_t e = 0; e < g->set->n; e++) {
        size_t row = c->counts ? e * c->max_rows : (size_t)c->offsets[e];
        int32_t n = c->counts ? c->counts[e] : c->offsets[e + 1] - c->offsets[e];
        g->start[e] = p;
        for (int32_t i = 0; i < n; i++, p++, row++) {
            g->token[p] = (int32_t)row;
            g->weight[p] = c->weights ? c->weights[row] : 1;
        }
    }
    g->start[g->set->n] = p;
}

static size_t weight_bytes(const moe4_weight *w) {
    if (w->dtype == MOE4_NVFP4) return w->rows * w->cols / 2 + w->rows * w->cols / MOE4_BLOCK;
    return w->rows * w->cols * moe4_dtype_bytes(w->dtype);
}

/* hit[n_hit]: experts with a position, those with most first; from MOST on all are alike. */
static void list_hits(struct moe4_cpu_group *g) {
    enum { MOST = 63 };
    size_t n_before[MOST + 1] = {0}, n = 0; /* of experts with more positions */
    for (size_t e = 0; e < g->set->n; e++) {
        const int32_t rows = g->start[e + 1] - g->start[e];
        n_before[rows < MOST ? rows : MOST]++;
    }
    for (size_t rows = MOST + 1; rows-- > 0;) {
        const size_t here = n_before[rows];
        n_before[rows] = n;
        n += rows ? here : 0;
    }
    g->n_hit = n;
    for (size_t e = 0; e < g->set->n; e++) {
        const int32_t rows = g->start[e + 1] - g->start[e];
        if (rows) g->hit[n_before[rows < MOST ? rows : MOST]++] = (int32_t)e;
    }
}

moe4_status moe4_cpu_dispatch(const struct moe4_moe_call *c) {
    struct moe4_cpu_state *s = c->workspace;
    for (size_t i = 0; i < s->n_groups; i++) {
        struct moe4_cpu_group *g = &s->group[i];
        if (g->routed) {
            sort_slots(c, g);
        } else if (c->by_rows) {
            given_rows(c, g);
        } else {
            every_token(c, g);
        }
        g->n_pos = (size_t)g->start[g->set->n];
        list_hits(g);
        for (size_t e = 0; e < g->set->n; e++) {
            const moe4_expert *x = &g->set->expert[e];
            if (g->start[e] == g->start[e + 1]) continue;
            s->report.weight_bytes += weight_bytes(&x->gate) + weight_bytes(&x->up) + weight_bytes(&x->down);
            for (int32_t p = g->start[e]; p < g->start[e + 1]; p++) {
                g->x_scale[p] = fmaxf(x->gate.input_scale, x->up.input_scale); /* they read the same x */
                g->h_scale[p] = x->down.input_scale;
            }
        }
    }
    s->report.n_slots = s->group[0].n_pos;
    s->report.n_experts_hit = s->group[0].n_hit;
    moe4_cpu_lap(s, MOE4_STAGE_DISPATCH);
    return MOE4_OK;
}
