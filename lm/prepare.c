/* Between the q, k, v products and attention: bias, norm of q and k, rotary, and k and v into the cache. */
#include "lm.h"

#include <string.h>

enum { TOKENS_PER_TASK = 32 };

struct prepare_job {
    struct lm_run *run;
    size_t layer, n_tokens, n_new;
};

/* The first rotary_dim of a head turn: dimension i with i + rotary_dim / 2. */
static void rotate(float *head, const float *cosine, const float *sine, size_t half) {
    for (size_t i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cosine[i] - b * sine[i];
        head[i + half] = b * cosine[i] + a * sine[i];
    }
}

static void prepare_heads(const struct lm_run *run, float *heads, size_t n_heads, const float *bias, const float *norm, size_t position) {
    const struct lm_config *c = &run->model->config;
    size_t head_dim = c->attention.head_dim, half = c->attention.rotary_dim / 2;
    for (size_t i = 0; bias && i < n_heads * head_dim; i++) heads[i] += bias[i];
    for (size_t h = 0; h < n_heads; h++) {
        float *head = heads + h * head_dim;
        if (norm) lm_norm_row(head, head, norm, c->norm_eps, head_dim);
        rotate(head, run->cosine + position * half, run->sine + position * half, half);
    }
}

static void prepare_token(const struct prepare_job *job, size_t token) {
    struct lm_run *run = job->run;
    const struct lm_layer *l = &run->model->layers[job->layer];
    const struct lm_attention *a = &run->model->config.attention;
    const struct lm_kv *kv = &run->kv;
    size_t seq = token / job->n_new, position = kv->length + token % job->n_new, head_dim = a->head_dim;
    float *k = run->k + token * a->n_kv_heads * head_dim, *v = run->v + token * a->n_kv_heads * head_dim;

    prepare_heads(run, run->q + token * a->n_heads * head_dim, a->n_heads, l->q_bias, l->q_norm, position);
    prepare_heads(run, k, a->n_kv_heads, l->k_bias, l->k_norm, position);
    for (size_t i = 0; l->v_bias && i < a->n_kv_heads * head_dim; i++) v[i] += l->v_bias[i];
    for (size_t h = 0; h < a->n_kv_heads; h++) {
        float *keys = lm_kv_keys(kv, job->layer, seq, h) + position / LM_KEY_GROUP * LM_KEY_GROUP * head_dim + position % LM_KEY_GROUP;
        for (size_t d = 0; d < head_dim; d++) keys[d * LM_KEY_GROUP] = k[h * head_dim + d];
        memcpy(lm_kv_values(kv, job->layer, seq, h) + position * kv->value_dim, v + h * head_dim, head_dim * sizeof *v);
    }
}

static void prepare_task(void *arg, size_t task) {
    const struct prepare_job *job = arg;
    size_t end = (task + 1) * TOKENS_PER_TASK < job->n_tokens ? (task + 1) * TOKENS_PER_TASK : job->n_tokens;
    for (size_t token = task * TOKENS_PER_TASK; token < end; token++) prepare_token(job, token);
}

void lm_attention_prepare(struct lm_run *run, size_t layer, size_t n_seqs, size_t n_new) {
    struct prepare_job job = {run, layer, n_seqs * n_new, n_new};
    moe4_parallel_for(run->model->lm->ctx, (job.n_tokens + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK, prepare_task, &job);
}
