/* The forward pass. lm_forward is the index of the runner: each line of it is a step of a transformer layer. */
#include "lm.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- steps ---- */

static moe4_status check_tokens(struct lm_run *run, const int32_t *tokens, size_t n_seqs, size_t n_new) {
    struct lm *lm = run->model->lm;
    size_t vocab = run->model->config.info.vocab, n_tokens;
    LM_CHECK(lm, !__builtin_mul_overflow(n_seqs, n_new, &n_tokens) && n_tokens <= run->options.max_tokens && n_seqs <= run->options.n_seqs,
             MOE4_ERROR_ARGUMENT, "%zu sequences of %zu tokens: the run was made for %zu sequences and %zu tokens a call", n_seqs, n_new,
             run->options.n_seqs, run->options.max_tokens);
    LM_CHECK(lm, n_new <= run->options.context - run->kv.length, MOE4_ERROR_ARGUMENT, "position %zu: the context ends at %zu",
             run->kv.length + n_new, run->options.context);
    for (size_t i = 0; i < n_tokens; i++)
        LM_CHECK(lm, tokens[i] >= 0 && (size_t)tokens[i] < vocab, MOE4_ERROR_FORMAT, "token %zu is %d, the vocabulary has %zu", i,
                 tokens[i], vocab);
    return MOE4_OK;
}

/* x[T, hidden] = rows of the embedding. */
static void embed(struct lm_run *run, const int32_t *tokens, size_t n_tokens) {
    const moe4_tensor *e = &run->model->embedding;
    size_t hidden = run->model->config.info.hidden;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t i = 0; i < hidden; i++) run->x[t * hidden + i] = lm_element(e->data, e->dtype, (size_t)tokens[t] * hidden + i);
}

static void add_bias(float *y, const float *bias, size_t n_tokens, size_t n) {
    for (size_t t = 0; bias && t < n_tokens; t++)
        for (size_t i = 0; i < n; i++) y[t * n + i] += bias[i];
}

static moe4_status watch(struct lm_run *run, size_t layer, enum lm_point point, const float *x, size_t n_tokens) {
    const struct lm_run_options *o = &run->options;
    return o->watch ? o->watch(o->watch_user, run, layer, point, x, n_tokens) : MOE4_OK;
}

/* ---- the pass ---- */

moe4_status lm_forward(struct lm_run *run, const int32_t *tokens, size_t n_seqs, size_t n_new) {
    struct lm *lm = run->model->lm;
    const struct lm_model *model = run->model;
    size_t hidden = model->config.info.hidden, n_layers = model->config.info.n_layers, n_tokens = n_seqs * n_new;
    const struct lm_attention *a = &model->config.attention;
    size_t n_q = a->n_heads * a->head_dim, n_kv = a->n_kv_heads * a->head_dim;
    const struct lm_output qkv[] = {{run->q, n_q}, {run->k, n_kv}, {run->v, n_kv}}, o = {run->y, hidden};
    float eps = model->config.norm_eps, *block = NULL; /* what the last block adds to the residual stream */
    lm->error[0] = '\0';
    if (run->options.one_shot) run->kv.length = 0;
    LM_TRY(lm, check_tokens(run, tokens, n_seqs, n_new));

    embed(run, tokens, n_tokens);
    for (size_t i = 0; i < n_layers; i++) {
        const struct lm_layer *l = &model->layers[i];
        lm_add_norm_rows(lm, run->h, run->x, block, l->input_norm, eps, n_tokens, hidden);
        LM_TRY(lm, watch(run, i, LM_AT_QKV, run->h, n_tokens));
        LM_TRY(lm, lm_linear(run, l->qkv, qkv, 3, run->h, hidden, n_tokens));
        lm_attention_prepare(run, i, n_seqs, n_new);
        lm_attention_mix(run, i, n_seqs, n_new);
        LM_TRY(lm, watch(run, i, LM_AT_O, run->mix, n_tokens));
        LM_TRY(lm, lm_linear(run, l->o, &o, 1, run->mix, n_q, n_tokens));
        add_bias(run->y, l->o_bias, n_tokens, hidden);
        lm_add_norm_rows(lm, run->h, run->x, run->y, l->post_norm, eps, n_tokens, hidden);
        LM_TRY(lm, lm_mlp(run, i, run->y, run->h, n_tokens));
        block = run->y;
    }
    lm_add_norm_rows(lm, run->h, run->x, block, model->final_norm, eps, n_tokens, hidden);
    run->kv.length += n_new;
    run->weight_bytes += model->fixed_bytes;
    return MOE4_OK;
}

static bool all_finite(const float *x, size_t n) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        bad |= (bits & 0x7F800000u) == 0x7F800000u;
    }
    return !bad;
}

moe4_status lm_logits(struct lm_run *run, float *logits, size_t row0, size_t n_rows) {
    struct lm *lm = run->model->lm;
    size_t vocab = run->model->config.info.vocab, hidden = run->model->config.info.hidden;
    const struct lm_output out = {logits, vocab};
    lm->error[0] = '\0';
    LM_TRY(lm, lm_linear(run, run->model->head, &out, 1, run->h + row0 * hidden, hidden, n_rows));
    for (size_t row = 0; row < n_rows; row++)
        LM_CHECK(lm, all_finite(logits + row * vocab, vocab), MOE4_ERROR_FORMAT,
                 "the model's logits after token %zu of the call are not finite", row0 + row);
    return MOE4_OK;
}

void lm_run_reset(struct lm_run *run) {
    run->kv.length = 0;
}

/* ---- life ---- */

/* Angles as the reference implementations round them: inverse frequencies and their multiples in fp32. */
static moe4_status make_rotary(struct lm_run *run) {
    struct lm *lm = run->model->lm;
    const struct lm_attention *a = &run->model->config.attention;
    size_t half = a->rotary_dim / 2;
    run->cosine = lm_calloc(lm, run->options.context, half * sizeof(float), "rotary table");
    run->sine = run->cosine ? lm_calloc(lm, run->options.context, half * sizeof(float), "rotary table") : NULL;
    if (!run->sine) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < half; i++) {
        float frequency = 1.0f / (float)pow(a->rope_theta, (double)(2 * i) / (double)a->rotary_dim);
        for (size_t p = 0; p < run->options.context; p++) {
            float angle = (float)p * frequency;
            run->cosine[p * half + i] = (float)cos((double)angle);
            run->sine[p * half + i] = (float)sin((double)angle);
        }
    }
    return MOE4_OK;
}

static moe4_status make_buffers(struct lm_run *run) {
    struct lm *lm = run->model->lm;
    const moe4_model_info *info = &run->model->config.info;
    const struct lm_attention *a = &run->model->config.attention;
    size_t n_q = a->n_heads * a->head_dim, n_kv = a->n_kv_heads * a->head_dim;
    const struct {
        float **to;
        size_t n;
    } buffers[] = {{&run->x, info->hidden}, {&run->h, info->hidden}, {&run->y, info->hidden}, {&run->q, n_q},
                   {&run->k, n_kv},         {&run->v, n_kv},         {&run->mix, n_q},        {&run->topk_weights, info->router.top_k}};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        *buffers[i].to = lm_calloc(lm, run->options.max_tokens, buffers[i].n * sizeof(float), "activations");
        if (!*buffers[i].to) return MOE4_ERROR_MEMORY;
    }
    run->topk_ids = lm_calloc(lm, run->options.max_tokens, info->router.top_k * sizeof *run->topk_ids, "expert numbers");
    return run->topk_ids ? MOE4_OK : MOE4_ERROR_MEMORY;
}

static moe4_status make_run(struct lm_run *run) {
    struct lm *lm = run->model->lm;
    struct lm_run_options *o = &run->options;
    const struct lm_config *config = &run->model->config;
    if (!o->context) o->context = config->max_context;
    LM_CHECK(lm, o->context <= config->max_context, MOE4_ERROR_ARGUMENT, "a context of %zu tokens: the model's is %zu", o->context,
             config->max_context);
    LM_CHECK(lm, o->n_seqs && o->max_tokens, MOE4_ERROR_ARGUMENT, "a run for %zu sequences and %zu tokens", o->n_seqs, o->max_tokens);
    LM_TRY(lm, lm_kv_create(lm, &run->kv, config, o->n_seqs, o->context, o->one_shot));
    LM_TRY(lm, make_rotary(run));
    LM_TRY(lm, make_buffers(run));
    return lm_products_create(run);
}

moe4_status lm_run_create(struct lm_run **run_ret, struct lm_model *model, const struct lm_run_options *options) {
    *run_ret = NULL;
    model->lm->error[0] = '\0';
    struct lm_run *run = lm_calloc(model->lm, 1, sizeof *run, "run");
    if (!run) return MOE4_ERROR_MEMORY;
    run->model = model;
    run->options = *options;
    moe4_status status = make_run(run);
    if (status != MOE4_OK) {
        lm_run_destroy(run);
        return status;
    }
    *run_ret = run;
    return MOE4_OK;
}

void lm_run_destroy(struct lm_run *run) {
    if (!run) return;
    void *const owned[] = {run->cosine, run->sine, run->x,   run->h,        run->y,           run->q,
                           run->k,      run->v,    run->mix, run->topk_ids, run->topk_weights};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    lm_products_free(run);
    lm_kv_free(&run->kv);
    free(run);
}
