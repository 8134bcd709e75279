/* The model's products. Where they run on a device, activations are copied there and their results back: norms, attention and the
 * residual stream stay with the host. On the CPU there is nothing to copy. */
#include "lm.h"

#include <string.h>

enum { LOGIT_FLOATS = 16 << 20 }; /* room for so many logits at once, unless one token has more */

/* ---- between the host and where products run ---- */

static bool on_device(const struct lm_run *run) {
    return run->staging.x != NULL;
}

/* *there_ret = what a product reads as x[n]. */
static moe4_status put(struct lm_run *run, const float **there_ret, const float *x, size_t n) {
    *there_ret = on_device(run) ? run->staging.x : x;
    if (on_device(run)) LM_TRY(run->model->lm, moe4_memory_copy(run->model->lm->ctx, run->staging.x, x, n * sizeof *x, NULL));
    return MOE4_OK;
}

static moe4_status get(struct lm_run *run, void *to, const void *there, size_t bytes) {
    if (to != there) LM_TRY(run->model->lm, moe4_memory_copy(run->model->lm->ctx, to, there, bytes, NULL));
    return MOE4_OK;
}

/* ---- products ---- */

static moe4_status linear(struct lm_run *run, const moe4_linear *l, const struct lm_output *out, size_t n_out, const float *x, size_t cols,
                          size_t row0, size_t n_rows) {
    const float *there;
    void *y[LM_MAX_OUTPUTS];
    uint64_t n_saturated;
    float *place = run->staging.y;
    for (size_t i = 0; i < n_out; i++) {
        y[i] = on_device(run) ? place : out[i].to + row0 * out[i].cols;
        if (on_device(run)) place += n_rows * out[i].cols;
    }
    LM_TRY(run->model->lm, put(run, &there, x + row0 * cols, n_rows * cols));
    LM_TRY(run->model->lm, moe4_linear_forward(l, y, &n_saturated, there, n_rows, &run->workspace, NULL));
    for (size_t i = 0; i < n_out; i++)
        LM_TRY(run->model->lm, get(run, out[i].to + row0 * out[i].cols, y[i], n_rows * out[i].cols * sizeof(float)));
    run->n_saturated += n_saturated;
    return MOE4_OK;
}

moe4_status lm_linear(struct lm_run *run, const moe4_linear *l, const struct lm_output *out, size_t n_out, const float *x, size_t cols,
                      size_t n_tokens) {
    size_t width = 0, most = n_tokens;
    for (size_t i = 0; i < n_out; i++) width += out[i].cols;
    if (on_device(run) && run->staging.y_floats / width < most) most = run->staging.y_floats / width;
    for (size_t row = 0; row < n_tokens; row += most)
        LM_TRY(run->model->lm, linear(run, l, out, n_out, x, cols, row, n_tokens - row < most ? n_tokens - row : most));
    return MOE4_OK;
}

static moe4_status watch_mlp(struct lm_run *run, size_t layer, const float *h, const int32_t *ids, const float *weights, size_t n_tokens) {
    const struct lm_run_options *o = &run->options;
    size_t n = n_tokens * run->model->config.info.router.top_k;
    if (!o->watch) return MOE4_OK;
    if (ids) {
        LM_TRY(run->model->lm, get(run, run->topk_ids, ids, n * sizeof *ids));
        LM_TRY(run->model->lm, get(run, run->topk_weights, weights, n * sizeof *weights));
    }
    return o->watch(o->watch_user, run, layer, LM_AT_MLP, h, n_tokens);
}

moe4_status lm_mlp(struct lm_run *run, size_t layer, float *y, const float *h, size_t n_tokens) {
    struct lm *lm = run->model->lm;
    const struct lm_layer *l = &run->model->layers[layer];
    const moe4_workspace *ws = &run->workspace;
    size_t n = n_tokens * run->model->config.info.hidden;
    int32_t *ids = !l->router ? NULL : on_device(run) ? run->staging.topk_ids : run->topk_ids;
    float *weights = !l->router ? NULL : on_device(run) ? run->staging.topk_weights : run->topk_weights;
    float *out = on_device(run) ? run->staging.y : y;
    const float *there;
    LM_TRY(lm, put(run, &there, h, n));
    if (l->router) LM_TRY(lm, moe4_router_forward(l->router, ids, weights, there, NULL, n_tokens, ws, NULL));
    LM_TRY(lm, watch_mlp(run, layer, h, ids, weights, n_tokens));
    LM_TRY(lm, moe4_moe_forward(l->mlp, out, there, ids, weights, n_tokens, ws, NULL));
    LM_TRY(lm, get(run, y, out, n * sizeof *y));
    moe4_moe_report report = MOE4_MOE_REPORT_INIT;
    LM_TRY(lm, moe4_moe_report_read(l->mlp, &report, NULL, ws, NULL));
    run->n_saturated += report.n_saturated_blocks;
    run->weight_bytes += report.weight_bytes;
    return MOE4_OK;
}

/* ---- their memory ---- */

/* One workspace that suits every object of the model. */
static moe4_status make_workspace(struct lm_run *run) {
    struct lm *lm = run->model->lm;
    const struct lm_model *model = run->model;
    size_t n = run->options.max_tokens, most = 0, bytes;
    LM_TRY(lm, moe4_linear_workspace_bytes(model->head, &most, n));
    for (size_t i = 0; i < model->config.info.n_layers; i++) {
        const struct lm_layer *l = &model->layers[i];
        LM_TRY(lm, moe4_linear_workspace_bytes(l->qkv, &bytes, n));
        most = bytes > most ? bytes : most;
        LM_TRY(lm, moe4_linear_workspace_bytes(l->o, &bytes, n));
        most = bytes > most ? bytes : most;
        LM_TRY(lm, moe4_moe_workspace_bytes(l->mlp, &bytes, n));
        most = bytes > most ? bytes : most;
        if (l->router) LM_TRY(lm, moe4_router_workspace_bytes(l->router, &bytes, n));
        most = bytes > most ? bytes : most;
    }
    run->workspace.bytes = most;
    LM_TRY(lm, moe4_memory_alloc(lm->ctx, &run->workspace.data, most));
    return MOE4_OK;
}

static moe4_status make_staging(struct lm_run *run) {
    struct lm *lm = run->model->lm;
    struct lm_staging *s = &run->staging;
    const moe4_model_info *info = &run->model->config.info;
    const struct lm_attention *a = &run->model->config.attention;
    size_t n = run->options.max_tokens, n_q = a->n_heads * a->head_dim, n_kv = a->n_kv_heads * a->head_dim;
    size_t in = n_q > info->hidden ? n_q : info->hidden, out = n_q + 2 * n_kv > info->hidden ? n_q + 2 * n_kv : info->hidden;
    size_t logits = info->vocab <= LOGIT_FLOATS / n ? n * info->vocab : info->vocab > LOGIT_FLOATS ? info->vocab : LOGIT_FLOATS;
    s->y_floats = n * out > logits ? n * out : logits;
    const struct {
        void **to;
        size_t n, size;
    } buffers[] = {{(void **)&s->y, s->y_floats, sizeof *s->y},
                   {(void **)&s->topk_ids, n * info->router.top_k, sizeof *s->topk_ids},
                   {(void **)&s->topk_weights, n * info->router.top_k, sizeof *s->topk_weights},
                   {(void **)&s->x, n * in, sizeof *s->x}};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        LM_TRY(lm, moe4_memory_alloc(lm->ctx, buffers[i].to, buffers[i].n * buffers[i].size));
    return MOE4_OK;
}

moe4_status lm_products_create(struct lm_run *run) {
    LM_TRY(run->model->lm, make_workspace(run));
    return strcmp(moe4_ctx_device(run->model->lm->ctx), "cpu") == 0 ? MOE4_OK : make_staging(run);
}

void lm_products_free(struct lm_run *run) {
    moe4_ctx *ctx = run->model->lm->ctx;
    void *const owned[] = {run->workspace.data, run->staging.x, run->staging.y, run->staging.topk_ids, run->staging.topk_weights};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe4_memory_free(ctx, owned[i]);
}
