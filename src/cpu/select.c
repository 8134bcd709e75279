/* From logits to experts and weights: scores, the groups that may be chosen from, the k best, their weights. */
#include "select.h"

#include <math.h>

#include "rows.h"

struct run {
    const moe4_router *r;
    int32_t *ids;
    float *weights;
    const float *logits;
    size_t n_tokens, n_tasks;
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

static void select_token(const moe4_router *r, int32_t *ids, float *weights, const float *logits) {
    const moe4_router_options *o = &r->o;
    float score[MOE4_MAX_EXPERTS], choice[MOE4_MAX_EXPERTS], sum = 0;
    bool finite = true;
    for (size_t e = 0; e < o->n_experts; e++) finite &= isfinite(logits[e]) != 0;
    if (!finite) { /* experts must run for the row to come out NaN */
        for (size_t j = 0; j < o->top_k; j++) {
            ids[j] = (int32_t)j;
            weights[j] = NAN;
        }
        return;
    }
    if (o->kind == MOE4_ROUTER_SOFTMAX_TOPK) {
        softmax(score, logits, o->n_experts);
    } else {
        for (size_t e = 0; e < o->n_experts; e++) score[e] = 1 / (1 + expf(-logits[e]));
    }
    for (size_t e = 0; e < o->n_experts; e++) choice[e] = score[e] + r->bias[e]; /* the bias chooses, it never weighs */
    if (o->topk_group < o->n_group) limit_groups(choice, o);
    for (size_t j = 0; j < o->top_k; j++) {
        size_t e = best(choice, o->n_experts);
        choice[e] = -INFINITY;
        ids[j] = (int32_t)e;
        sum += weights[j] = score[e];
    }
    if (o->kind == MOE4_ROUTER_SIGMOID_BIAS) sum += 1e-20f;
    for (size_t j = 0; j < o->top_k; j++) weights[j] = (o->normalize ? weights[j] / sum : weights[j]) * o->scale;
}

static void select_task(void *arg, size_t task) {
    const struct run *s = arg;
    size_t k = s->r->o.top_k, E = s->r->o.n_experts;
    for (size_t t = s->n_tokens * task / s->n_tasks; t < s->n_tokens * (task + 1) / s->n_tasks; t++)
        select_token(s->r, s->ids + t * k, s->weights + t * k, s->logits + t * E);
}

moe4_status moe4_cpu_select(const moe4_router *r, int32_t *topk_ids, float *topk_weights, const float *logits, size_t n_tokens,
                            void *stream) {
    (void)stream;
    struct run s = {r, topk_ids, topk_weights, logits, n_tokens, moe4_row_tasks(r->ctx)};
    moe4_run(r->ctx, s.n_tasks, 10. * (double)n_tokens * (double)r->o.n_experts, select_task, &s);
    return MOE4_OK;
}
