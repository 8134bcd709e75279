/* Attention's inputs are seen as they pass; the experts' are gathered by the router's choice, and each expert's gate and up are run once
 * more on the side, because what enters down never leaves the library. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "quantize/calibration.h"

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

moe4_status quantize_calibration_watch(void *user, const struct lm_run *run, size_t layer, enum lm_point point, const float *x,
                                       size_t n_tokens) {
    struct quantize_calibration *c = user;
    if (point == LM_AT_MLP) return see_mlps(c, run, layer, x, n_tokens);
    see(point == LM_AT_QKV ? &c->layers[layer].qkv : &c->layers[layer].o, x, n_tokens);
    return MOE4_OK;
}
