/* Causal attention over the cache, in fp32: softmax(q k^T / sqrt(head_dim)) v, a block of keys at a time with a running maximum.
 *
 * The rows of a task are the (position, head) pairs that share a key-value head, TILE at once. Blocks of keys begin at fixed positions and
 * what a row may not see enters as an exact zero, so a row's bits depend on its own position alone: a prompt in one call, or token by
 * token, gives the same. Compiled twice from one text: with AVX2 and FMA, and for any CPU; moe4_ctx_isa decides. */
#include "lm.h"

#include <math.h>
#include <string.h>

enum { TILE = 4, KEYS = 64, LANES = 8, VALUE_CHUNK = 16, ROWS_PER_TASK = 64, MAX_HEAD_DIM = 1024 };

typedef float vec __attribute__((vector_size(32)));
typedef int32_t ivec __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))

struct mix_job {
    const struct lm_run *run;
    size_t layer, n_new, n_tasks_per_head;
};

/* A tile: q scaled, [head_dim][TILE]; the unnormalised result, [TILE][value_dim]; what each row has seen so far. */
struct tile {
    _Alignas(64) float q[MAX_HEAD_DIM * TILE];
    _Alignas(64) float out[TILE][MAX_HEAD_DIM];
    _Alignas(64) float score[TILE][KEYS];
    vec sum[TILE];
    float max[TILE];
    size_t n_visible[TILE]; /* keys [0, n_visible) */
};

/* *x = e^*x for x <= 0, within 2 ulp; exactly 0 below -87, so also for -INFINITY. */
INLINE void exp_vec(vec *x) {
    const float shift = 12582912.f; /* 1.5 * 2^23: adding it rounds to a whole number, held in the low bits */
    vec v = *x;
    ivec live = v > -87.f;
    v = (vec)((ivec)v & live);
    vec n = v * 1.44269504f + shift;
    ivec scale = ((ivec)n + 127) << 23;
    n -= shift;
    vec r = v - n * 0.693145752f - n * 1.42860677e-6f; /* ln 2 in two parts */
    vec p = r * (1.f / 5040) + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    *x = (vec)((ivec)(p * (vec)scale) & live);
}

/* score[TILE][KEYS] = q . k for the keys of one block, which has whole groups. */
INLINE void score_block(struct tile *t, const float *keys, size_t head_dim, size_t n_groups) {
    for (size_t group = 0; group < n_groups; group++) {
        const float *k = keys + group * head_dim * LM_KEY_GROUP;
        vec acc[TILE][2] = {{{0.f}}};
        for (size_t d = 0; d < head_dim; d++) {
            vec k0 = *(const vec *)(k + d * LM_KEY_GROUP), k1 = *(const vec *)(k + d * LM_KEY_GROUP + LANES);
#pragma GCC unroll 4
            for (int r = 0; r < TILE; r++) {
                acc[r][0] += t->q[d * TILE + (size_t)r] * k0;
                acc[r][1] += t->q[d * TILE + (size_t)r] * k1;
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < TILE; r++) {
            *(vec *)&t->score[r][group * LM_KEY_GROUP] = acc[r][0];
            *(vec *)&t->score[r][group * LM_KEY_GROUP + LANES] = acc[r][1];
        }
    }
}

/* score = e^(score - max) with the maximum brought up to date; returns the factor for what was summed under the old one. */
INLINE float softmax_block(struct tile *t, int r, size_t key0) {
    float *s = t->score[r];
    for (size_t i = t->n_visible[r] > key0 ? t->n_visible[r] - key0 : 0; i < KEYS; i++) s[i] = -INFINITY;
    vec top = *(const vec *)s;
    for (int i = LANES; i < KEYS; i += LANES) {
        vec v = *(const vec *)(s + i);
        ivec larger = v > top;
        top = (vec)((larger & (ivec)v) | (~larger & (ivec)top));
    }
    float max = t->max[r];
    for (int i = 0; i < LANES; i++) max = top[i] > max ? top[i] : max;
    vec factor = {t->max[r] - max};
    exp_vec(&factor);
    vec sum = {0.f};
    for (int i = 0; i < KEYS; i += LANES) {
        vec v = *(const vec *)(s + i) - max;
        exp_vec(&v);
        *(vec *)(s + i) = v;
        sum += v;
    }
    t->sum[r] = t->sum[r] * factor[0] + sum;
    t->max[r] = max;
    return factor[0];
}

/* out = out * factor + score . v over n_keys of the block. */
INLINE void value_block(struct tile *t, const float *factor, const float *values, size_t value_dim, size_t n_keys) {
    for (size_t c = 0; c < value_dim; c += VALUE_CHUNK) {
        vec acc[TILE][2] = {{{0.f}}};
        for (size_t key = 0; key < n_keys; key++) {
            const float *v = values + key * value_dim + c;
            vec v0 = *(const vec *)v, v1 = *(const vec *)(v + LANES);
#pragma GCC unroll 4
            for (int r = 0; r < TILE; r++) {
                acc[r][0] += t->score[r][key] * v0;
                acc[r][1] += t->score[r][key] * v1;
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < TILE; r++) {
            vec *out = (vec *)&t->out[r][c];
            out[0] = out[0] * factor[r] + acc[r][0];
            out[1] = out[1] * factor[r] + acc[r][1];
        }
    }
}

/* Rows [row, row + n) of one sequence and key-value head, n <= TILE; row = position * group + head in the group. */
INLINE void mix_tile(const struct mix_job *job, size_t seq, size_t kv_head, size_t row, size_t n) {
    const struct lm_run *run = job->run;
    const struct lm_kv *kv = &run->kv;
    size_t n_heads = run->model->config.attention.n_heads, head_dim = kv->head_dim, group = n_heads / kv->n_heads;
    const float *keys = lm_kv_keys(kv, job->layer, seq, kv_head), *values = lm_kv_values(kv, job->layer, seq, kv_head);
    float scale = 1.0f / sqrtf((float)head_dim);
    size_t at[TILE], n_visible = 0;
    struct tile t;
    for (size_t r = 0; r < TILE; r++) {
        size_t real = row + (r < n ? r : n - 1); /* a short tile repeats its last row */
        at[r] = ((seq * job->n_new + real / group) * n_heads + kv_head * group + real % group) * head_dim;
        for (size_t d = 0; d < head_dim; d++) t.q[d * TILE + r] = run->q[at[r] + d] * scale;
        memset(t.out[r], 0, kv->value_dim * sizeof(float));
        t.sum[r] = (vec){0.f};
        t.max[r] = -INFINITY;
        t.n_visible[r] = n_visible = kv->length + real / group + 1;
    }
    for (size_t key0 = 0; key0 < n_visible; key0 += KEYS) {
        size_t n_keys = n_visible - key0 < KEYS ? n_visible - key0 : KEYS;
        float factor[TILE];
        score_block(&t, keys + key0 * head_dim, head_dim, (n_keys + LM_KEY_GROUP - 1) / LM_KEY_GROUP);
#pragma GCC unroll 4
        for (int r = 0; r < TILE; r++) factor[r] = softmax_block(&t, r, key0);
        value_block(&t, factor, values + key0 * kv->value_dim, kv->value_dim, n_keys);
    }
    for (size_t r = 0; r < n; r++) {
        float sum = 0.f;
        for (int i = 0; i < LANES; i++) sum += t.sum[r][i];
        for (size_t d = 0; d < head_dim; d++) run->mix[at[r] + d] = t.out[r][d] / sum;
    }
}

INLINE void mix_rows(void *arg, size_t task) {
    const struct mix_job *job = arg;
    const struct lm_kv *kv = &job->run->kv;
    size_t part = task % job->n_tasks_per_head, head = task / job->n_tasks_per_head;
    size_t n_rows = job->n_new * (job->run->model->config.attention.n_heads / kv->n_heads);
    size_t end = (part + 1) * ROWS_PER_TASK < n_rows ? (part + 1) * ROWS_PER_TASK : n_rows;
    for (size_t row = part * ROWS_PER_TASK; row < end; row += TILE)
        mix_tile(job, head / kv->n_heads, head % kv->n_heads, row, end - row < TILE ? end - row : TILE);
}

static void mix_rows_any(void *arg, size_t task) {
    mix_rows(arg, task);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void mix_rows_avx2(void *arg, size_t task) {
    mix_rows(arg, task);
}
#else
#define mix_rows_avx2 mix_rows_any
#endif

void lm_attention_mix(struct lm_run *run, size_t layer, size_t n_seqs, size_t n_new) {
    const struct lm_kv *kv = &run->kv;
    size_t n_rows = n_new * (run->model->config.attention.n_heads / kv->n_heads);
    struct mix_job job = {run, layer, n_new, (n_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK};
    bool plain = strcmp(moe4_ctx_isa(run->model->lm->ctx), "scalar") == 0;
    moe4_parallel_for(run->model->lm->ctx, n_seqs * kv->n_heads * job.n_tasks_per_head, plain ? mix_rows_any : mix_rows_avx2, &job);
}
