/* The stages of a layer on the CPU. A position is a slot (token, k) that runs here; positions are sorted by expert, so an expert's rows
 * are neighbours in every buffer. The shared expert is a second group whose positions are the tokens. */
#include "moe.h"

#include <time.h>

#include "rows.h"

/* ---- the workspace ---- */

static size_t group_positions(const struct moe4_moe_call *c, size_t g) {
    if (c->by_rows) return c->n_rows;
    return g == 0 ? c->n_tokens * c->moe->o.top_k : c->n_tokens;
}

/* Rows of x are packed for each position rather than for each token where positions of a token round x differently, and where the call's
 * rows stand with their experts anyway. */
static bool packs_by_pos(const struct moe4_moe_call *c, size_t g) {
    return c->by_rows || c->moe->group[g].act_x == MOE4_ACT_STATIC || (g == 0 && c->moe->o.weighting == MOE4_WEIGHT_ON_X);
}

bool moe4_cpu_shares_x(const struct moe4_moe_call *c, size_t g) {
    const moe4_moe *moe = c->moe;
    const struct moe4_cpu_experts *first = moe->group[0].prepared, *own = moe->group[g].prepared;
    return g > 0 && !packs_by_pos(c, 0) && moe->group[g].act_x == moe->group[0].act_x && own->x == first->x;
}

static void carve_group(struct moe4_carver *v, struct moe4_cpu_group *g, const struct moe4_moe_call *c, size_t i) {
    const struct moe4_experts *set = &c->moe->group[i];
    const struct moe4_cpu_experts *cpu = set->prepared;
    size_t n = group_positions(c, i);
    *g = (struct moe4_cpu_group){.set = set, .cpu = cpu, .x_by_pos = packs_by_pos(c, i)};
    size_t n_x = moe4_cpu_shares_x(c, i) ? 0 : g->x_by_pos ? n : c->n_tokens;
    bool keeps_weight = c->by_rows || (i == 0 && c->moe->o.weighting != MOE4_WEIGHT_AFTER_DOWN);
    g->start = moe4_carve(v, set->n + 1, sizeof *g->start);
    g->hit = moe4_carve(v, set->n, sizeof *g->hit);
    g->token = moe4_carve(v, n, sizeof *g->token);
    g->pos_of_slot = moe4_carve(v, n, sizeof *g->pos_of_slot);
    g->x_scale = moe4_carve(v, n, sizeof *g->x_scale);
    g->h_scale = moe4_carve(v, n, sizeof *g->h_scale);
    if (keeps_weight) g->weight = moe4_carve(v, n, sizeof *g->weight);
    g->x_rows = moe4_carve(v, n_x, cpu->x->row_bytes(set->hidden));
    g->x_factor = moe4_carve(v, n_x, sizeof *g->x_factor);
    g->x_row = moe4_carve(v, n, sizeof *g->x_row);
    g->h_rows = moe4_carve(v, n, cpu->h->row_bytes(set->intermediate));
    g->h_factor = moe4_carve(v, n, sizeof *g->h_factor);
    g->h_row = moe4_carve(v, n, sizeof *g->h_row);
    g->h = moe4_carve(v, n, set->intermediate * sizeof *g->h);
    g->o = moe4_carve(v, n, set->hidden * sizeof *g->o);
}

/* The one walk for the size query and the carve-up. */
static bool carve(size_t *bytes, const struct moe4_moe_call *c, void *base, struct moe4_cpu_state *state) {
    struct moe4_carver v = {.base = base};
    size_t widest = c->moe->hidden;
    state->lane_bytes = 0;
    moe4_carve(&v, 1, sizeof *state);
    state->n_groups = c->by_rows ? 1 : c->moe->n_groups;
    for (size_t i = 0; i < state->n_groups; i++) {
        carve_group(&v, &state->group[i], c, i);
        if (c->moe->group[i].intermediate > widest) widest = c->moe->group[i].intermediate;
        const struct moe4_cpu_experts *cpu = state->group[i].cpu;
        const size_t x = moe4_lane_bytes(cpu->x, 2, group_positions(c, i)), h = moe4_lane_bytes(cpu->h, 0, 0), lane = x > h ? x : h;
        if (lane > state->lane_bytes) state->lane_bytes = lane;
    }
    if (c->by_rows) {
        state->token_start = moe4_carve(&v, c->n_tokens + 1, sizeof *state->token_start);
        state->token_pos = moe4_carve(&v, c->n_rows, sizeof *state->token_pos);
    }
    state->scratch = moe4_carve(&v, moe4_row_tasks(c->moe->ctx), moe4_row_scratch_bytes(widest));
    state->lanes = moe4_carve(&v, moe4_ctx_n_threads(c->moe->ctx), state->lane_bytes);
    *bytes = v.used;
    return !v.overflow;
}

bool moe4_cpu_moe_bytes(size_t *bytes, const struct moe4_moe_call *c) {
    struct moe4_cpu_state state;
    return carve(bytes, c, NULL, &state);
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
    s->report.kernels = ((const struct moe4_cpu_experts *)call->moe->group[0].prepared)->x->name;
    carve(&bytes, call, call->workspace, s);
    s->group[0].routed = !call->by_rows && (call->ids || call->moe->o.n_experts > 1);
    if (moe4_cpu_shares_x(call, s->n_groups - 1)) {
        s->group[1].x_rows = s->group[0].x_rows;
        s->group[1].x_factor = s->group[0].x_factor;
    }
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
