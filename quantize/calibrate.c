/* Calibration: the model runs over a text while its inputs are watched, and what was seen goes to the matrices that read them. */
#include <math.h>
#include <stdlib.h>

#include "quantize/calibration.h"

enum { WINDOW = 512, BATCH = 8 };
#define PRIOR_TOKENS 32. /* an expert's mean squares begin as its layer's, with the weight of so many tokens */

/* ---- the text ---- */

static moe4_status run_tokens(struct quantize_calibration *c, const struct lm_tokens *tokens) {
    struct lm *lm = c->plan->lm;
    const struct quantize_options *o = c->plan->options;
    size_t window = c->model->config.max_context < WINDOW ? c->model->config.max_context : WINDOW;
    struct lm_run *run;
    LM_CHECK(lm, tokens->n, MOE4_ERROR_FORMAT, "%s: no tokens to calibrate on", o->calibrate);
    struct lm_run_options options = {.n_seqs = BATCH,
                                     .context = window,
                                     .max_tokens = BATCH * window,
                                     .one_shot = true,
                                     .watch = quantize_calibration_watch,
                                     .watch_user = c};
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
    LM_TRY(plan->lm, quantize_calibration_set_up(c));
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
