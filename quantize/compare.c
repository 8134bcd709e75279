#include "quantize/compare.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quantize/difference.h"

enum { TASKS_PER_STEP = 64, NAME_BYTES = 300 };

struct pair {
    moe4_weight a, b;
};

struct job {
    struct lm *lm;
    struct quantize_side a, b;
    struct quantize_difference *matrices;
    struct pair *pairs; /* of matrices */
    size_t first;
    pthread_mutex_t lock; /* of what follows */
    moe4_status status;
    char problem[800];
};

/* ---- one matrix ---- */

static void note(struct job *job, moe4_status status, const char *name, const char *why) {
    pthread_mutex_lock(&job->lock);
    if (job->status == MOE4_OK) {
        job->status = status;
        snprintf(job->problem, sizeof job->problem, "%s: %s", name, why);
    }
    pthread_mutex_unlock(&job->lock);
}

/* What stands in a single number is read here, through the mapping, before the long reading of files begins. */
static void find_task(void *arg, size_t task) {
    struct job *job = arg;
    moe4_ctx *ctx = job->lm->ctx;
    struct quantize_difference *d = &job->matrices[job->first + task];
    struct pair *p = &job->pairs[job->first + task];
    moe4_status status = moe4_checkpoint_weight(job->a.ckpt, &p->a, d->name);
    if (status == MOE4_OK) status = moe4_checkpoint_weight(job->b.ckpt, &p->b, d->name);
    d->rows = p->a.rows;
    d->cols = p->a.cols;
    if (status != MOE4_OK) {
        const char *why = moe4_ctx_error(ctx);
        note(job, status, d->name, *why ? why : moe4_status_text(status));
    } else if (p->a.rows != p->b.rows || p->a.cols != p->b.cols) {
        char why[160];
        snprintf(why, sizeof why, "%zux%zu in one model, %zux%zu in the other", p->a.rows, p->a.cols, p->b.rows, p->b.cols);
        note(job, MOE4_ERROR_FORMAT, d->name, why);
    }
}

static void compare_task(void *arg, size_t task) {
    struct job *job = arg;
    struct quantize_difference *d = &job->matrices[job->first + task];
    const struct pair *p = &job->pairs[job->first + task];
    char why[QUANTIZE_DIFFERENCE_BYTES];
    moe4_status status = quantize_difference_add(job->lm->ctx, d, &job->a, &p->a, &job->b, &p->b, why);
    if (status != MOE4_OK) note(job, status, d->name, why);
}

/* ---- which ---- */

/* The length of a matrix's module in its tensor's name; 0 for other tensors. */
static size_t module_length(const moe4_tensor *t) {
    static const char *const mains[] = {".weight", ".weight_packed"};
    size_t n = strlen(t->name);
    for (size_t i = 0; t->n_dims == 2 && i < 2; i++) {
        size_t k = strlen(mains[i]);
        if (n > k && strcmp(t->name + n - k, mains[i]) == 0) return n - k;
    }
    return 0;
}

/* Scales belong to their matrix. */
static bool is_companion(const char *name) {
    static const char *const ends[] = {"_scale", "_scale_2", "_scale_inv"};
    size_t n = strlen(name);
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        size_t k = strlen(ends[i]);
        if (n > k && strcmp(name + n - k, ends[i]) == 0) return true;
    }
    return false;
}

static bool in_layer(const char *name, size_t layer) {
    char infix[48];
    snprintf(infix, sizeof infix, ".layers.%zu.", layer);
    return layer == QUANTIZE_ALL_LAYERS || strncmp(name, infix + 1, strlen(infix + 1)) == 0 || strstr(name, infix);
}

static bool has_module(const moe4_checkpoint *ckpt, const char *module) {
    static const char *const mains[] = {".weight", ".weight_packed"};
    for (size_t i = 0; i < 2; i++) {
        char name[NAME_BYTES + 32];
        moe4_tensor t;
        snprintf(name, sizeof name, "%s%s", module, mains[i]);
        if (moe4_checkpoint_find(ckpt, &t, name) == MOE4_OK) return true;
    }
    return false;
}

/* A matrix of both is put on the list. */
static moe4_status take_matrix(struct job *job, struct quantize_comparison *r, const moe4_tensor *t) {
    const size_t n = module_length(t);
    if (!n) return MOE4_OK;
    char *name = strndup(t->name, n);
    LM_CHECK(job->lm, name, MOE4_ERROR_MEMORY, "no memory for a name");
    if (has_module(job->b.ckpt, name)) {
        r->matrices[r->n_matrices++].name = name;
        return MOE4_OK;
    }
    free(name);
    r->n_only_a++;
    return MOE4_OK;
}

static moe4_status compare_other(struct job *job, struct quantize_comparison *r, const moe4_tensor *t) {
    moe4_tensor other;
    if (module_length(t) || is_companion(t->name)) return MOE4_OK;
    if (moe4_checkpoint_find(job->b.ckpt, &other, t->name) != MOE4_OK) {
        r->n_only_a++;
        return MOE4_OK;
    }
    bool same = t->dtype == other.dtype && t->bytes == other.bytes;
    char why[QUANTIZE_DIFFERENCE_BYTES];
    const moe4_status status = same ? quantize_same_bytes(&same, &job->a, t, &job->b, &other, why) : MOE4_OK;
    LM_CHECK(job->lm, status == MOE4_OK, status, "%s: %s", t->name, why);
    *(same ? &r->n_same : &r->n_differ) += 1;
    return MOE4_OK;
}

static void count_only_b(const struct job *job, struct quantize_comparison *r, size_t layer) {
    moe4_tensor t, other;
    for (size_t i = 0; i < moe4_checkpoint_n_tensors(job->b.ckpt); i++) {
        char module[NAME_BYTES];
        if (moe4_checkpoint_tensor(job->b.ckpt, &t, i) != MOE4_OK || !in_layer(t.name, layer)) continue;
        size_t n = module_length(&t);
        snprintf(module, sizeof module, "%.*s", (int)n, t.name);
        if (n ? !has_module(job->a.ckpt, module) : !is_companion(t.name) && moe4_checkpoint_find(job->a.ckpt, &other, t.name) != MOE4_OK)
            r->n_only_b++;
    }
}

/* ---- all ---- */

double quantize_relative_error(double error_sq, double norm_sq) {
    return error_sq == 0 ? 0 : sqrt(error_sq / norm_sq);
}

double quantize_snr(double error_sq, double norm_sq) {
    return error_sq == 0 ? INFINITY : 10 * log10(norm_sq / error_sq);
}

static int by_damage(const void *a, const void *b) {
    const struct quantize_difference *x = a, *y = b;
    double dx = quantize_relative_error(x->error_sq, x->norm_sq), dy = quantize_relative_error(y->error_sq, y->norm_sq);
    return dx != dy ? (dx < dy) - (dx > dy) : strcmp(x->name, y->name);
}

static moe4_status each_tensor(struct job *job, struct quantize_comparison *r, size_t layer,
                               moe4_status (*take)(struct job *, struct quantize_comparison *, const moe4_tensor *)) {
    for (size_t i = 0; i < moe4_checkpoint_n_tensors(job->a.ckpt); i++) {
        moe4_tensor t;
        LM_TRY(job->lm, moe4_checkpoint_tensor(job->a.ckpt, &t, i));
        if (in_layer(t.name, layer)) LM_TRY(job->lm, take(job, r, &t));
    }
    return MOE4_OK;
}

static moe4_status run(struct job *job, struct quantize_comparison *r, size_t layer, lm_progress_fn progress, void *user) {
    struct lm *lm = job->lm;
    size_t n = moe4_checkpoint_n_tensors(job->a.ckpt);
    r->matrices = lm_calloc(lm, n, sizeof *r->matrices, "comparison");
    if (!r->matrices) return MOE4_ERROR_MEMORY;
    LM_TRY(lm, each_tensor(job, r, layer, take_matrix));
    LM_CHECK(lm, r->n_matrices, MOE4_ERROR_FORMAT, "the two models have no matrix in common%s",
             layer == QUANTIZE_ALL_LAYERS ? "" : " in this layer");
    job->matrices = r->matrices;
    job->pairs = lm_calloc(lm, r->n_matrices, sizeof *job->pairs, "comparison");
    if (!job->pairs) return MOE4_ERROR_MEMORY;
    moe4_parallel_for(lm->ctx, r->n_matrices, find_task, job);
    LM_CHECK(lm, job->status == MOE4_OK, job->status, "%s", job->problem);
    LM_TRY(lm, each_tensor(job, r, layer, compare_other));
    count_only_b(job, r, layer);
    for (job->first = 0; job->first < r->n_matrices; job->first += TASKS_PER_STEP) {
        size_t left = r->n_matrices - job->first;
        moe4_parallel_for(lm->ctx, left < TASKS_PER_STEP ? left : TASKS_PER_STEP, compare_task, job);
        LM_CHECK(lm, job->status == MOE4_OK, job->status, "%s", job->problem);
        if (progress) progress(user, job->first, r->n_matrices, 0);
    }
    for (size_t i = 0; i < r->n_matrices; i++) {
        r->error_sq += r->matrices[i].error_sq;
        r->norm_sq += r->matrices[i].norm_sq;
    }
    qsort(r->matrices, r->n_matrices, sizeof *r->matrices, by_damage);
    return MOE4_OK;
}

static moe4_status open_side(struct lm *lm, struct quantize_side *side, const char *model) {
    moe4_status status = moe4_checkpoint_open(&side->ckpt, lm->ctx, model);
    const char *why = moe4_ctx_error(lm->ctx);
    /* Both models may have a file of the name that the library says. */
    if (status != MOE4_OK && strncmp(why, model, strlen(model)) != 0) return lm_fail(lm, status, "%s: %s", model, why);
    LM_TRY(lm, status);
    return quantize_files_open(&side->files, lm, side->ckpt, model);
}

static void close_side(struct quantize_side *side) {
    quantize_files_close(&side->files);
    moe4_checkpoint_close(side->ckpt);
}

moe4_status quantize_compare(struct lm *lm, struct quantize_comparison *result, const char *a, const char *b, size_t layer,
                             lm_progress_fn progress, void *user) {
    struct job job = {.lm = lm, .lock = PTHREAD_MUTEX_INITIALIZER};
    *result = (struct quantize_comparison){.matrices = NULL};
    lm->error[0] = '\0';
    moe4_status status = open_side(lm, &job.a, a);
    if (status == MOE4_OK) status = open_side(lm, &job.b, b);
    if (status == MOE4_OK) status = run(&job, result, layer, progress, user);
    close_side(&job.a);
    close_side(&job.b);
    free(job.pairs);
    return status;
}

void quantize_comparison_free(struct quantize_comparison *result) {
    for (size_t i = 0; i < result->n_matrices; i++) free(result->matrices[i].name);
    free(result->matrices);
    result->matrices = NULL;
}
