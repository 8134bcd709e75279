/* Calibration. Attention's inputs are seen as they pass; the experts' are gathered by the router's choice, and each expert's gate and up
 * are run once more on the side, because what enters down never leaves the library. */
#include "quantize/calibrate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WINDOW = 512, BATCH = 8 };
#define PRIOR_TOKENS 32. /* an expert's mean squares begin as its layer's, with the weight of so many tokens */

/* One input of one or more matrices. */
struct input {
    size_t cols;
    float amax;
    double n_tokens, *sum_sq;      /* [cols] */
    float *mean_sq;                /* [cols], at the end */
    struct quantize_item *item[3]; /* the matrices that read it: q, k, v; gate, up; or one */
};

/* An MLP: a routed or shared expert, or a dense layer's. */
struct mlp {
    moe4_weight gate, up;
    struct input x, h;
};

struct layer {
    struct input qkv, o;
    struct mlp *mlps; /* the routed experts, then the shared one; or the dense one */
    size_t n_routed, n_mlps;
};

struct quantize_calibration {
    struct quantize_plan *plan;
    struct quantize_report *report;
    struct lm_model *model;
    struct layer *layers;
    size_t n_layers;
    float limit; /* of SwiGLU; 0: none */
};

/* ---- which matrices ---- */

struct place {
    const void *data;
    struct quantize_item *item;
};

static int by_data(const void *a, const void *b) {
    uintptr_t x = (uintptr_t)((const struct place *)a)->data, y = (uintptr_t)((const struct place *)b)->data;
    return (x > y) - (x < y);
}

struct setup {
    struct quantize_calibration *c;
    struct place *places;
};

static struct quantize_item *item_of(const struct setup *s, const moe4_weight *w) {
    struct place key = {.data = w->data}, *found = bsearch(&key, s->places, s->c->plan->n_items, sizeof key, by_data);
    return found ? found->item : NULL;
}

/* The two mappings of one folder list the same tensors in the same order. */
static moe4_status find_places(struct setup *s) {
    const struct quantize_plan *plan = s->c->plan;
    s->places = lm_calloc(plan->lm, plan->n_items, sizeof *s->places, "calibration");
    if (!s->places) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < plan->n_items; i++) {
        moe4_tensor t;
        LM_TRY(plan->lm, moe4_checkpoint_tensor(s->c->model->ckpt, &t, plan->items[i].number));
        s->places[i] = (struct place){t.data, &plan->items[i]};
    }
    qsort(s->places, plan->n_items, sizeof *s->places, by_data);
    return MOE4_OK;
}

static moe4_status set_up_input(const struct setup *s, struct input *in, const moe4_weight *const *weights, size_t n) {
    in->cols = weights[0]->cols;
    in->sum_sq = lm_calloc(s->c->plan->lm, in->cols, sizeof *in->sum_sq, "calibration");
    in->mean_sq = lm_calloc(s->c->plan->lm, in->cols, sizeof *in->mean_sq, "calibration");
    for (size_t i = 0; i < n; i++) in->item[i] = item_of(s, weights[i]);
    return in->sum_sq && in->mean_sq ? MOE4_OK : MOE4_ERROR_MEMORY;
}

static moe4_status set_up_mlp(const struct setup *s, struct mlp *m, size_t layer, int64_t expert) {
    struct lm *lm = s->c->plan->lm;
    moe4_weight down;
    LM_TRY(lm, moe4_checkpoint_expert(s->c->model->ckpt, &m->gate, layer, expert, MOE4_GATE));
    LM_TRY(lm, moe4_checkpoint_expert(s->c->model->ckpt, &m->up, layer, expert, MOE4_UP));
    LM_TRY(lm, moe4_checkpoint_expert(s->c->model->ckpt, &down, layer, expert, MOE4_DOWN));
    LM_TRY(lm, set_up_input(s, &m->x, (const moe4_weight *[]){&m->gate, &m->up}, 2));
    return set_up_input(s, &m->h, (const moe4_weight *[]){&down}, 1);
}

static moe4_status set_up_layer(const struct setup *s, struct layer *l, size_t layer) {
    static const char *const names[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
    struct lm *lm = s->c->plan->lm;
    const moe4_model_info *info = &s->c->model->config.info;
    moe4_weight w[4];
    for (int i = 0; i < 4; i++) {
        char name[160];
        snprintf(name, sizeof name, "model.layers.%zu.self_attn.%s", layer, names[i]);
        LM_TRY(lm, moe4_checkpoint_weight(s->c->model->ckpt, &w[i], name));
    }
    LM_TRY(lm, set_up_input(s, &l->qkv, (const moe4_weight *[]){&w[0], &w[1], &w[2]}, 3));
    LM_TRY(lm, set_up_input(s, &l->o, (const moe4_weight *[]){&w[3]}, 1));

    moe4_layer_kind kind;
    LM_TRY(lm, moe4_checkpoint_layer_kind(s->c->model->ckpt, &kind, layer));
    l->n_routed = kind == MOE4_LAYER_MOE ? info->n_experts : 0;
    l->n_mlps = kind == MOE4_LAYER_MOE ? info->n_experts + (info->n_shared_experts > 0) : 1;
    l->mlps = lm_calloc(lm, l->n_mlps, sizeof *l->mlps, "calibration");
    if (!l->mlps) return MOE4_ERROR_MEMORY;
    for (size_t e = 0; e < l->n_routed; e++) LM_TRY(lm, set_up_mlp(s, &l->mlps[e], layer, (int64_t)e));
    if (l->n_mlps == l->n_routed) return MOE4_OK;
    return set_up_mlp(s, &l->mlps[l->n_routed], layer, kind == MOE4_LAYER_MOE ? MOE4_EXPERT_SHARED : MOE4_EXPERT_DENSE);
}

static moe4_status set_up(struct quantize_calibration *c) {
    struct lm *lm = c->plan->lm;
    struct setup s = {c, NULL};
    c->n_layers = c->model->config.info.n_layers;
    c->limit = c->model->config.info.swiglu_limit;
    c->layers = lm_calloc(lm, c->n_layers, sizeof *c->layers, "calibration");
    moe4_status status = c->layers ? find_places(&s) : MOE4_ERROR_MEMORY;
    for (size_t i = 0; status == MOE4_OK && i < c->n_layers; i++) status = set_up_layer(&s, &c->layers[i], i);
    free(s.places);
    return status;
}

/* ---- watching ---- */

static void see(struct input *in, const float *x, size_t n_tokens) {
    for (size_t t = 0; t < n_tokens; t++, x += in->cols)
        for (size_t k = 0; k < in->cols; k++) {
            float a = fabsf(x[k]);
            if (!(a <= in->amax)) in->amax = a; /* a NaN stays */
            in->sum_sq[k] += (double)x[k] * x[k];
        }
    in->n_tokens += (double)n_tokens;
}

struct mlp_job {
    struct quantize_calibration *c;
    struct layer *layer;
    const struct lm_run *run;
    const float *x;
    size_t n_tokens;
    moe4_status *status; /* [n_mlps] */
};

/* rows[n, cols] = the tokens that chose expert e; all of them for the others. */
static size_t gather(const struct mlp_job *job, float *rows, size_t e, size_t cols) {
    size_t top_k = job->run->model->config.info.router.top_k, n = 0;
    for (size_t t = 0; t < job->n_tokens; t++) {
        bool chosen = e >= job->layer->n_routed;
        for (size_t k = 0; !chosen && k < top_k; k++) chosen = job->run->topk_ids[t * top_k + k] == (int32_t)e;
        if (chosen) memcpy(rows + n++ * cols, job->x + t * cols, cols * sizeof *rows);
    }
    return n;
}

static void swiglu(float *g, const float *u, size_t n, float limit) {
    for (size_t i = 0; i < n; i++) {
        float a = limit > 0 && g[i] > limit ? limit : g[i], b = limit > 0 && fabsf(u[i]) > limit ? copysignf(limit, u[i]) : u[i];
        g[i] = a / (1.f + expf(-a)) * b;
    }
}

struct scratch {
    float *rows, *g, *u;
    moe4_linear *linear;
    moe4_workspace workspace;
};

static moe4_status run_mlp(const struct mlp_job *job, struct mlp *m, size_t e, struct scratch *s) {
    struct lm *lm = job->c->plan->lm;
    moe4_ctx *ctx = lm->ctx;
    size_t hidden = m->gate.cols, inter = m->gate.rows;
    s->rows = malloc(job->n_tokens * hidden * sizeof *s->rows);
    if (!s->rows) return MOE4_ERROR_MEMORY;
    size_t n = gather(job, s->rows, e, hidden);
    if (!n) return MOE4_OK;
    moe4_status status = moe4_linear_create(&s->linear, ctx, (moe4_weight[]){m->gate, m->up}, 2, NULL);
    if (status == MOE4_OK) status = moe4_linear_workspace_bytes(s->linear, &s->workspace.bytes, n);
    if (status != MOE4_OK) return status;
    s->g = malloc(n * inter * sizeof *s->g);
    s->u = malloc(n * inter * sizeof *s->u);
    if (!s->g || !s->u || posix_memalign(&s->workspace.data, 64, s->workspace.bytes + 1) != 0) return MOE4_ERROR_MEMORY;
    status = moe4_linear_forward(s->linear, (void *[]){s->g, s->u}, NULL, s->rows, n, &s->workspace, NULL);
    if (status != MOE4_OK) return status;
    swiglu(s->g, s->u, n * inter, job->c->limit);
    see(&m->x, s->rows, n);
    see(&m->h, s->g, n);
    return MOE4_OK;
}

static void mlp_task(void *arg, size_t e) {
    const struct mlp_job *job = arg;
    struct scratch s = {0};
    job->status[e] = run_mlp(job, &job->layer->mlps[e], e, &s);
    moe4_linear_destroy(s.linear);
    free(s.workspace.data);
    free(s.rows);
    free(s.g);
    free(s.u);
}

static moe4_status see_mlps(struct quantize_calibration *c, const struct lm_run *run, size_t layer, const float *x, size_t n_tokens) {
    struct lm *lm = c->plan->lm;
    struct layer *l = &c->layers[layer];
    struct mlp_job job = {c, l, run, x, n_tokens, lm_calloc(lm, l->n_mlps, sizeof *job.status, "calibration")};
    if (!job.status) return MOE4_ERROR_MEMORY;
    moe4_parallel_for(lm->ctx, l->n_mlps, mlp_task, &job);
    moe4_status status = MOE4_OK;
    for (size_t e = 0; e < l->n_mlps; e++)
        if (job.status[e] != MOE4_OK && status == MOE4_OK)
            status = lm_fail(lm, job.status[e], "calibration: layer %zu, MLP %zu: %s", layer, e, moe4_status_text(job.status[e]));
    free(job.status);
    return status;
}

static moe4_status watch(void *user, const struct lm_run *run, size_t layer, enum lm_point point, const float *x, size_t n_tokens) {
    struct quantize_calibration *c = user;
    if (point == LM_AT_MLP) return see_mlps(c, run, layer, x, n_tokens);
    see(point == LM_AT_QKV ? &c->layers[layer].qkv : &c->layers[layer].o, x, n_tokens);
    return MOE4_OK;
}

/* ---- the text ---- */

static moe4_status run_tokens(struct quantize_calibration *c, const struct lm_tokens *tokens) {
    struct lm *lm = c->plan->lm;
    const struct quantize_options *o = c->plan->options;
    size_t window = c->model->config.max_context < WINDOW ? c->model->config.max_context : WINDOW;
    struct lm_run *run;
    LM_CHECK(lm, tokens->n, MOE4_ERROR_FORMAT, "%s: no tokens to calibrate on", o->calibrate);
    struct lm_run_options options = {
        .n_seqs = BATCH, .context = window, .max_tokens = BATCH * window, .one_shot = true, .watch = watch, .watch_user = c};
    LM_TRY(lm, lm_run_create(&run, c->model, &options));
    moe4_status status = MOE4_OK;
    for (size_t at = 0; status == MOE4_OK && at < tokens->n;) {
        size_t left = tokens->n - at, n_seqs = left / window < BATCH ? left / window : BATCH, n_new = n_seqs ? window : left;
        n_seqs = n_seqs ? n_seqs : 1;
        status = lm_forward(run, tokens->data + at, n_seqs, n_new);
        at += n_seqs * n_new;
        if (o->progress) o->progress(o->progress_user, "calibrate", at, tokens->n);
    }
    lm_run_destroy(run);
    c->report->n_tokens = tokens->n;
    return status;
}

static moe4_status run_text(struct quantize_calibration *c) {
    struct lm *lm = c->plan->lm;
    struct lm_tokens tokens = {NULL, 0};
    const char *path = c->plan->options->calibrate;
    moe4_status status = c->model->byte_level ? lm_tokens_from_text(lm, &tokens, path, 0) : lm_tokens_from_ids(lm, &tokens, path, 0);
    if (status == MOE4_OK) status = run_tokens(c, &tokens);
    free(tokens.data);
    return status;
}

/* ---- results ---- */

static moe4_status check(const struct quantize_calibration *c, const struct input *in) {
    LM_CHECK(c->plan->lm, isfinite(in->amax), MOE4_ERROR_FORMAT, "calibration: the input of %s is not finite",
             in->item[0] ? in->item[0]->name : "a matrix");
    return MOE4_OK;
}

static void finish(const struct quantize_calibration *c, struct input *in) {
    for (size_t k = 0; k < in->cols; k++) in->mean_sq[k] = in->n_tokens > 0 ? (float)(in->sum_sq[k] / in->n_tokens) : 1.f;
    for (size_t i = 0; i < 3; i++)
        if (in->item[i]) {
            in->item[i]->input_amax = in->amax;
            in->item[i]->channel_weight = c->plan->options->search ? in->mean_sq : NULL;
        }
}

static struct input *input_of(struct mlp *m, bool of_down) {
    return of_down ? &m->h : &m->x;
}

/* The routed experts' inputs of one kind: those that no token reached take the layer's largest. */
static moe4_status finish_experts(struct quantize_calibration *c, struct layer *l, bool of_down) {
    struct input all = {0};
    if (!l->n_routed) return MOE4_OK;
    all.cols = input_of(&l->mlps[0], of_down)->cols;
    all.sum_sq = lm_calloc(c->plan->lm, all.cols, sizeof *all.sum_sq, "calibration");
    if (!all.sum_sq) return MOE4_ERROR_MEMORY;
    for (size_t e = 0; e < l->n_routed; e++) {
        const struct input *in = input_of(&l->mlps[e], of_down);
        all.amax = in->amax > all.amax ? in->amax : all.amax;
        all.n_tokens += in->n_tokens;
        for (size_t k = 0; k < all.cols; k++) all.sum_sq[k] += in->sum_sq[k];
    }
    for (size_t e = 0; e < l->n_routed; e++) {
        struct input *in = input_of(&l->mlps[e], of_down);
        c->report->n_inputs++;
        c->report->n_unreached += in->n_tokens == 0;
        if (in->n_tokens == 0) in->amax = all.amax;
        for (size_t k = 0; all.n_tokens > 0 && k < all.cols; k++) in->sum_sq[k] += PRIOR_TOKENS * all.sum_sq[k] / all.n_tokens;
        in->n_tokens += all.n_tokens > 0 ? PRIOR_TOKENS : 0;
        finish(c, in);
    }
    free(all.sum_sq);
    return MOE4_OK;
}

static moe4_status finish_all(struct quantize_calibration *c) {
    struct lm *lm = c->plan->lm;
    for (size_t i = 0; i < c->n_layers; i++) {
        struct layer *l = &c->layers[i];
        LM_TRY(lm, check(c, &l->qkv));
        LM_TRY(lm, check(c, &l->o));
        for (size_t e = 0; e < l->n_mlps; e++) {
            LM_TRY(lm, check(c, &l->mlps[e].x));
            LM_TRY(lm, check(c, &l->mlps[e].h));
        }
        finish(c, &l->qkv);
        finish(c, &l->o);
        LM_TRY(lm, finish_experts(c, l, false));
        LM_TRY(lm, finish_experts(c, l, true));
        for (size_t e = l->n_routed; e < l->n_mlps; e++) {
            finish(c, &l->mlps[e].x);
            finish(c, &l->mlps[e].h);
        }
    }
    for (size_t i = 0; i < c->plan->n_items; i++) {
        const struct quantize_item *item = &c->plan->items[i];
        LM_CHECK(lm, item->how != QUANTIZE_NVFP4 || item->input_amax > 0, MOE4_ERROR_UNSUPPORTED, "calibration: %s had no input above 0",
                 item->name);
    }
    return MOE4_OK;
}

moe4_status quantize_calibrate(struct quantize_calibration **calibration_ret, struct quantize_plan *plan, struct quantize_report *report,
                               const char *in) {
    struct quantize_calibration *c = lm_calloc(plan->lm, 1, sizeof *c, "calibration");
    *calibration_ret = c;
    if (!c) return MOE4_ERROR_MEMORY;
    c->plan = plan;
    c->report = report;
    LM_TRY(plan->lm, lm_model_open(&c->model, plan->lm, in, MOE4_ACT_DEFAULT));
    LM_TRY(plan->lm, set_up(c));
    LM_TRY(plan->lm, run_text(c));
    LM_TRY(plan->lm, finish_all(c));
    lm_model_close(c->model); /* its mapped weights are not needed any more */
    c->model = NULL;
    return MOE4_OK;
}

static void free_input(struct input *in) {
    free(in->sum_sq);
    free(in->mean_sq);
}

void quantize_calibration_free(struct quantize_calibration *c) {
    if (!c) return;
    for (size_t i = 0; c->layers && i < c->n_layers; i++) {
        struct layer *l = &c->layers[i];
        free_input(&l->qkv);
        free_input(&l->o);
        for (size_t e = 0; l->mlps && e < l->n_mlps; e++) {
            free_input(&l->mlps[e].x);
            free_input(&l->mlps[e].h);
        }
        free(l->mlps);
    }
    free(c->layers);
    lm_model_close(c->model);
    free(c);
}
