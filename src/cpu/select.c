/* From logits to experts and weights: scores, the groups that may be chosen from, the k best, their weights. */
#include "select.h"

#include <math.h>

#include "../hash_table.h"
#include "rows.h"

struct run {
    const struct moe4_select_call *c;
    size_t n_tasks;
};

static void softmax(float *p, const float *logits, size_t n) {
    float most = logits[0], sum = 0;
    for (size_t e = 1; e < n; e++) most = logits[e] > most ? logits[e] : most;
    for (size_t e = 0; e < n; e++) sum += p[e] = expf(logits[e] - most);
    for (size_t e = 0; e < n; e++) p[e] /= sum;
}

/* Index of the largest; ties: the lower one. */
static size_t best(const float *v, size_t n) {
    size_t at = 0;
    for (size_t i = 1; i < n; i++)
        if (v[i] > v[at]) at = i;
    return at;
}

/* Leaves only the experts of the topk_group best groups; a group's score is the sum of its two best choices. */
static void limit_groups(float *choice, const moe4_router_options *o) {
    float score[MOE4_MAX_EXPERTS];
    size_t size = o->n_experts / o->n_group;
    for (size_t g = 0; g < o->n_group; g++) {
        const float *v = choice + g * size;
        float first = -INFINITY, second = size > 1 ? -INFINITY : 0;
        for (size_t i = 0; i < size; i++) {
            if (v[i] > first) {
                if (size > 1) second = first;
                first = v[i];
            } else if (v[i] > second) {
                second = v[i];
            }
        }
        score[g] = first + second;
    }
    for (size_t n = 0; n < o->topk_group; n++) score[best(score, o->n_group)] = -INFINITY;
    for (size_t g = 0; g < o->n_group; g++)
        for (size_t i = 0; score[g] != -INFINITY && i < size; i++) choice[g * size + i] = -INFINITY;
}

/* score[E] weighs, choice[E] chooses. */
static void scores(const moe4_router *r, float *score, float *choice, const float *logits, const float *bias) {
    const moe4_router_options *o = &r->o;
    if (o->kind == MOE4_ROUTER_SOFTMAX_TOPK) softmax(score, logits, o->n_experts);
    for (size_t e = 0; e < o->n_experts; e++) {
        float l = logits[e];
        switch (o->kind) {
        case MOE4_ROUTER_NONE:
        case MOE4_ROUTER_SOFTMAX_TOPK: choice[e] = score[e]; break;
        case MOE4_ROUTER_TOPK_SOFTMAX: choice[e] = score[e] = l + bias[e]; break;
        case MOE4_ROUTER_SIGMOID_BIAS:
            score[e] = 1 / (1 + expf(-l));
            choice[e] = score[e] + bias[e];
            break;
        case MOE4_ROUTER_SIGMOID_TOP1:
            score[e] = 1 / (1 + expf(-l));
            choice[e] = l; /* sigmoids of large logits tie */
            break;
        case MOE4_ROUTER_SQRTSOFTPLUS_BIAS:
        case MOE4_ROUTER_HASH:
            l /= o->gate_temp;
            score[e] = sqrtf(l > 20 ? l : log1pf(expf(l)));
            choice[e] = score[e] + bias[e];
            break;
        }
    }
}

static void weigh(float *weights, const moe4_router_options *o) {
    float sum = o->kind == MOE4_ROUTER_SIGMOID_BIAS ? 1e-20f : 0;
    if (o->kind == MOE4_ROUTER_TOPK_SOFTMAX) softmax(weights, weights, o->top_k);
    for (size_t j = 0; j < o->top_k; j++) sum += weights[j];
    bool divide = o->normalize && sum > 0 && o->kind != MOE4_ROUTER_TOPK_SOFTMAX;
    for (size_t j = 0; j < o->top_k; j++) weights[j] = (divide ? weights[j] / sum : weights[j]) * o->scale;
}

static void select_token(const struct moe4_select_call *c, size_t t) {
    const moe4_router *r = c->router;
    const moe4_router_options *o = &r->o;
    const float *logits = c->logits + t * o->n_experts;
    int32_t *ids = c->topk_ids + t * o->top_k;
    float *weights = c->topk_weights + t * o->top_k;
    float score[MOE4_MAX_EXPERTS], choice[MOE4_MAX_EXPERTS];
    bool finite = true;
    for (size_t e = 0; e < o->n_experts; e++) finite &= isfinite(logits[e]) != 0;
    if (!finite) { /* experts must run for the row to come out NaN */
        for (size_t j = 0; j < o->top_k; j++) {
            ids[j] = (int32_t)j;
            weights[j] = NAN;
        }
        return;
    }
    scores(r, score, choice, logits, c->alt_bias && c->alt_bias[t] ? r->alt_bias : r->bias);
    if (o->topk_group < o->n_group) limit_groups(choice, o);
    const struct moe4_hash_table table = {o->table, o->table_dtype, o->n_token_ids, o->top_k};
    for (size_t j = 0; j < o->top_k; j++) {
        size_t e =
            o->kind == MOE4_ROUTER_HASH ? (size_t)moe4_hash_table_at(&table, (size_t)c->token_ids[t], j) : best(choice, o->n_experts);
        choice[e] = -INFINITY;
        ids[j] = (int32_t)e;
        weights[j] = score[e];
    }
    weigh(weights, o);
}

static void select_task(void *arg, size_t task) {
    const struct run *s = arg;
    size_t n = s->c->n_tokens;
    for (size_t t = n * task / s->n_tasks; t < n * (task + 1) / s->n_tasks; t++) select_token(s->c, t);
}

moe4_status moe4_cpu_select(const struct moe4_select_call *c) {
    struct run s = {c, moe4_row_tasks(c->router->ctx)};
    moe4_run(c->router->ctx, s.n_tasks, 10. * (double)c->n_tokens * (double)c->router->o.n_experts, select_task, &s);
    return MOE4_OK;
}
