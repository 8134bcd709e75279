/* The stages of a layer on the CPU. A position is a slot (token, k) that runs here; positions are sorted by expert, so an expert's rows
 * are neighbours in every buffer. The shared expert is a second group whose positions are the tokens. */
#include "moe.h"

#include <math.h>
#include <string.h>
#include <time.h>

#include "rows.h"

/* ---- the workspace ---- */

static size_t group_positions(const moe4_moe *moe, size_t g, size_t n_tokens) {
    return g == 0 ? n_tokens * moe->o.top_k : n_tokens;
}

/* Rows of x are packed for each position rather than for each token where positions of a token round x differently. */
static bool packs_by_pos(const moe4_moe *moe, size_t g) {
    return moe->group[g].act_x == MOE4_ACT_STATIC || (g == 0 && moe->o.weighting == MOE4_WEIGHT_ON_X);
}

bool moe4_cpu_shares_x(const moe4_moe *moe, size_t g) {
    const struct moe4_cpu_experts *first = moe->group[0].prepared, *own = moe->group[g].prepared;
    return g > 0 && !packs_by_pos(moe, 0) && moe->group[g].act_x == moe->group[0].act_x && own->x == first->x;
}

static void carve_group(struct moe4_carver *c, struct moe4_cpu_group *g, const moe4_moe *moe, size_t i, size_t n_tokens) {
    const struct moe4_experts *set = &moe->group[i];
    const struct moe4_cpu_experts *cpu = set->prepared;
    size_t n = group_positions(moe, i, n_tokens);
    *g = (struct moe4_cpu_group){.set = set, .cpu = cpu, .x_by_pos = packs_by_pos(moe, i)};
    size_t n_x = moe4_cpu_shares_x(moe, i) ? 0 : g->x_by_pos ? n : n_tokens;
    g->start = moe4_carve(c, set->n + 1, sizeof *g->start);
    g->hit = moe4_carve(c, set->n, sizeof *g->hit);
    g->token = moe4_carve(c, n, sizeof *g->token);
    g->pos_of_slot = moe4_carve(c, n, sizeof *g->pos_of_slot);
    g->x_scale = moe4_carve(c, n, sizeof *g->x_scale);
    g->h_scale = moe4_carve(c, n, sizeof *g->h_scale);
    if (i == 0 && moe->o.weighting != MOE4_WEIGHT_AFTER_DOWN) g->weight = moe4_carve(c, n, sizeof *g->weight);
    g->x_rows = moe4_carve(c, n_x, cpu->x->row_bytes(set->hidden));
    g->x_factor = moe4_carve(c, n_x, sizeof *g->x_factor);
    g->x_row = moe4_carve(c, n, sizeof *g->x_row);
    g->h_rows = moe4_carve(c, n, cpu->h->row_bytes(set->intermediate));
    g->h_factor = moe4_carve(c, n, sizeof *g->h_factor);
    g->h_row = moe4_carve(c, n, sizeof *g->h_row);
    g->h = moe4_carve(c, n, set->intermediate * sizeof *g->h);
    g->o = moe4_carve(c, n, set->hidden * sizeof *g->o);
}

/* The one walk for the size query and the carve-up. */
static bool carve(size_t *bytes, const moe4_moe *moe, size_t n_tokens, void *base, struct moe4_cpu_state *state) {
    struct moe4_carver c = {.base = base};
    size_t widest = moe->hidden;
    moe4_carve(&c, 1, sizeof *state);
    for (size_t i = 0; i < moe->n_groups; i++) {
        carve_group(&c, &state->group[i], moe, i, n_tokens);
        if (moe->group[i].intermediate > widest) widest = moe->group[i].intermediate;
    }
    state->scratch = moe4_carve(&c, moe4_row_tasks(moe->ctx), moe4_fp32_row_bytes(widest));
    *bytes = c.used;
    return !c.overflow;
}

bool moe4_cpu_moe_bytes(size_t *bytes, const moe4_moe *moe, size_t n_tokens) {
    struct moe4_cpu_state state;
    return carve(bytes, moe, n_tokens, NULL, &state);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void moe4_cpu_lap(struct moe4_cpu_state *s, moe4_stage stage) {
    double t = now();
    s->report.seconds[stage] = t - s->lap;
    s->lap = t;
}

moe4_status moe4_cpu_begin(const struct moe4_moe_call *call) {
    struct moe4_cpu_state *s = call->workspace;
    size_t bytes;
    *s = (struct moe4_cpu_state){.moe = call->moe, .n_tokens = call->n_tokens, .report = MOE4_MOE_REPORT_INIT, .lap = now()};
    s->report.n_tokens = call->n_tokens;
    carve(&bytes, call->moe, call->n_tokens, call->workspace, s);
    for (size_t i = 0; i < call->moe->n_groups; i++) s->group[i].routed = i == 0 && (call->ids || call->moe->o.n_experts > 1);
    if (moe4_cpu_shares_x(call->moe, call->moe->n_groups - 1)) {
        s->group[1].x_rows = s->group[0].x_rows;
        s->group[1].x_factor = s->group[0].x_factor;
    }
    return MOE4_OK;
}

/* ---- dispatch: a stable counting sort ---- */

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

static size_t weight_bytes(const moe4_weight *w) {
    if (w->dtype == MOE4_NVFP4) return w->rows * w->cols / 2 + w->rows * w->cols / MOE4_BLOCK;
    return w->rows * w->cols * moe4_dtype_bytes(w->dtype);
}

moe4_status moe4_cpu_dispatch(const struct moe4_moe_call *c) {
    struct moe4_cpu_state *s = c->workspace;
    for (size_t i = 0; i < c->moe->n_groups; i++) {
        struct moe4_cpu_group *g = &s->group[i];
        if (g->routed) {
            sort_slots(c, g);
        } else {
            every_token(c, g);
        }
        g->n_pos = (size_t)g->start[g->set->n];
        for (size_t e = 0; e < g->set->n; e++) {
            const moe4_expert *x = &g->set->expert[e];
            if (g->start[e] == g->start[e + 1]) continue;
            g->hit[g->n_hit++] = (int32_t)e;
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

/* ---- combine ---- */

struct combine {
    const struct moe4_moe_call *c;
    size_t n_tasks;
};

static void combine_token(const struct moe4_moe_call *c, float *sum, size_t t) {
    const struct moe4_cpu_state *s = c->workspace;
    const struct moe4_kernels *kernels = c->moe->ctx->kernels;
    size_t hidden = c->moe->hidden, k = c->moe->o.top_k;
    memset(sum, 0, hidden * sizeof *sum);
    for (size_t i = 0; i < c->moe->n_groups; i++) {
        const struct moe4_cpu_group *g = &s->group[i];
        if (!g->routed) {
            kernels->add_scaled_row(sum, g->o + t * hidden, 1.f, hidden);
            continue;
        }
        for (size_t j = 0; j < k; j++) {
            int32_t p = g->pos_of_slot[t * k + j];
            if (p >= 0) kernels->add_scaled_row(sum, g->o + (size_t)p * hidden, g->weight ? 1.f : c->weights[t * k + j], hidden);
        }
    }
}

static void combine_task(void *arg, size_t task) {
    const struct combine *r = arg;
    const struct moe4_moe_call *c = r->c;
    const struct moe4_cpu_state *s = c->workspace;
    const moe4_moe_options *o = &c->moe->o;
    float *sum = s->scratch + task * (moe4_fp32_row_bytes(c->moe->hidden) / sizeof *sum);
    for (size_t t = c->n_tokens * task / r->n_tasks; t < c->n_tokens * (task + 1) / r->n_tasks; t++) {
        combine_token(c, sum, t);
        c->moe->ctx->kernels->narrow_row((char *)c->y + t * o->y_ld * moe4_dtype_bytes(o->y_dtype), o->y_dtype, sum, c->moe->hidden);
    }
}

moe4_status moe4_cpu_combine(const struct moe4_moe_call *c) {
    struct moe4_cpu_state *s = c->workspace;
    struct combine r = {c, moe4_row_tasks(c->moe->ctx)};
    if (r.n_tasks > c->n_tokens) r.n_tasks = c->n_tokens;
    moe4_run(c->moe->ctx, r.n_tasks, (double)c->n_tokens * (double)((c->moe->o.top_k + 1) * c->moe->hidden), combine_task, &r);
    moe4_cpu_lap(s, MOE4_STAGE_COMBINE);
    return MOE4_OK;
}

moe4_status moe4_cpu_report(const struct moe4_moe_call *c, moe4_moe_report *report, uint64_t *tokens_per_expert) {
    const struct moe4_cpu_state *s = c->workspace;
    MOE4_CHECK(c->moe->ctx, s->moe == c->moe, MOE4_ERROR_ARGUMENT, "moe4_moe_report_read: no forward of this layer used the workspace");
    *report = s->report;
    const struct moe4_cpu_group *g = &s->group[0];
    for (size_t e = 0; tokens_per_expert && e < g->set->n; e++) tokens_per_expert[e] = (uint64_t)(g->start[e + 1] - g->start[e]);
    return MOE4_OK;
}
