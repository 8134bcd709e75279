#define _DEFAULT_SOURCE /* madvise */
#include "quantize/compare.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PIECE_ELEMENTS = 1 << 16, TASKS_PER_STEP = 64, NAME_BYTES = 300 };

struct job {
    struct lm *lm;
    moe4_checkpoint *a, *b;
    struct quantize_difference *matrices;
    size_t first;
    pthread_mutex_t lock; /* of what follows */
    moe4_status status;
    char problem[400];
};

/* ---- one matrix ---- */

static void count_bytes(struct quantize_difference *d, const moe4_weight *a, const moe4_weight *b) {
    const uint8_t *x = a->data, *y = b->data;
    size_t n = a->rows * a->cols;
    d->both_nvfp4 = true;
    for (size_t i = 0; i < n / 2; i++) {
        uint8_t differs = x[i] ^ y[i];
        d->n_codes += (differs & 0x0f) != 0;
        d->n_codes += (differs & 0xf0) != 0;
    }
    for (size_t i = 0; i < n / MOE4_BLOCK; i++) d->n_scales += a->scale[i] != b->scale[i];
}

static moe4_status add_errors(moe4_ctx *ctx, struct quantize_difference *d, const moe4_weight *a, const moe4_weight *b) {
    size_t step = a->cols < PIECE_ELEMENTS ? PIECE_ELEMENTS / (a->cols ? a->cols : 1) : 1;
    float *x = malloc(2 * step * (a->cols ? a->cols : 1) * sizeof *x), *y = x + step * a->cols;
    moe4_status status = x ? MOE4_OK : MOE4_ERROR_MEMORY;
    for (size_t row = 0; status == MOE4_OK && row < a->rows; row += step) {
        size_t n = a->rows - row < step ? a->rows - row : step;
        status = moe4_weight_values(ctx, x, a, row, n);
        if (status == MOE4_OK) status = moe4_weight_values(ctx, y, b, row, n);
        for (size_t i = 0; status == MOE4_OK && i < n * a->cols; i++) {
            double error = (double)x[i] - y[i];
            d->error_sq += error * error;
            d->norm_sq += (double)y[i] * y[i];
        }
    }
    free(x);
    return status;
}

static void drop_pages(const void *data, size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = (uintptr_t)data / page * page;
    if (data && bytes) madvise((void *)begin, (uintptr_t)data + bytes - begin, MADV_DONTNEED);
}

static void drop_weight(const moe4_weight *w) {
    size_t n = w->rows * w->cols;
    drop_pages(w->data, w->dtype == MOE4_NVFP4 ? n / 2 : n * moe4_dtype_bytes(w->dtype));
    if (w->dtype == MOE4_NVFP4) drop_pages(w->scale, n / MOE4_BLOCK);
}

static void note(struct job *job, moe4_status status, const char *name, const char *why) {
    pthread_mutex_lock(&job->lock);
    if (job->status == MOE4_OK) {
        job->status = status;
        snprintf(job->problem, sizeof job->problem, "%s: %s", name, why);
    }
    pthread_mutex_unlock(&job->lock);
}

static void compare_task(void *arg, size_t task) {
    struct job *job = arg;
    moe4_ctx *ctx = job->lm->ctx;
    struct quantize_difference *d = &job->matrices[job->first + task];
    moe4_weight a, b;
    moe4_status status = moe4_checkpoint_weight(job->a, &a, d->name);
    if (status == MOE4_OK) status = moe4_checkpoint_weight(job->b, &b, d->name);
    if (status == MOE4_OK && (a.rows != b.rows || a.cols != b.cols)) {
        char why[160];
        snprintf(why, sizeof why, "%zux%zu in one model, %zux%zu in the other", a.rows, a.cols, b.rows, b.cols);
        note(job, MOE4_ERROR_FORMAT, d->name, why);
        return;
    }
    if (status == MOE4_OK) {
        d->rows = a.rows;
        d->cols = a.cols;
        status = add_errors(ctx, d, &a, &b);
    }
    if (status != MOE4_OK) {
        const char *why = moe4_ctx_error(ctx);
        note(job, status, d->name, *why ? why : moe4_status_text(status));
        return;
    }
    if (a.dtype == MOE4_NVFP4 && b.dtype == MOE4_NVFP4) count_bytes(d, &a, &b);
    drop_weight(&a);
    drop_weight(&b);
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

static moe4_status take_tensor(struct job *job, struct quantize_comparison *r, const moe4_tensor *t) {
    size_t n = module_length(t);
    moe4_tensor other;
    if (!n) {
        if (is_companion(t->name)) return MOE4_OK;
        if (moe4_checkpoint_find(job->b, &other, t->name) != MOE4_OK) {
            r->n_only_a++;
            return MOE4_OK;
        }
        bool same = t->dtype == other.dtype && t->bytes == other.bytes && memcmp(t->data, other.data, t->bytes) == 0;
        *(same ? &r->n_same : &r->n_differ) += 1;
        return MOE4_OK;
    }
    struct quantize_difference *d = &r->matrices[r->n_matrices];
    d->name = strndup(t->name, n);
    LM_CHECK(job->lm, d->name, MOE4_ERROR_MEMORY, "no memory for a name");
    r->n_matrices++;
    if (has_module(job->b, d->name)) return MOE4_OK;
    free(d->name);
    d->name = NULL;
    r->n_matrices--;
    r->n_only_a++;
    return MOE4_OK;
}

static void count_only_b(const struct job *job, struct quantize_comparison *r, size_t layer) {
    moe4_tensor t, other;
    for (size_t i = 0; i < moe4_checkpoint_n_tensors(job->b); i++) {
        char module[NAME_BYTES];
        if (moe4_checkpoint_tensor(job->b, &t, i) != MOE4_OK || !in_layer(t.name, layer)) continue;
        size_t n = module_length(&t);
        snprintf(module, sizeof module, "%.*s", (int)n, t.name);
        if (n ? !has_module(job->a, module) : !is_companion(t.name) && moe4_checkpoint_find(job->a, &other, t.name) != MOE4_OK)
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

static moe4_status run(struct job *job, struct quantize_comparison *r, size_t layer, lm_progress_fn progress, void *user) {
    struct lm *lm = job->lm;
    size_t n = moe4_checkpoint_n_tensors(job->a);
    r->matrices = lm_calloc(lm, n, sizeof *r->matrices, "comparison");
    if (!r->matrices) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) {
        moe4_tensor t;
        LM_TRY(lm, moe4_checkpoint_tensor(job->a, &t, i));
        if (in_layer(t.name, layer)) LM_TRY(lm, take_tensor(job, r, &t));
    }
    count_only_b(job, r, layer);
    LM_CHECK(lm, r->n_matrices, MOE4_ERROR_FORMAT, "the two models have no matrix in common%s",
             layer == QUANTIZE_ALL_LAYERS ? "" : " in this layer");
    job->matrices = r->matrices;
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

moe4_status quantize_compare(struct lm *lm, struct quantize_comparison *result, const char *a, const char *b, size_t layer,
                             lm_progress_fn progress, void *user) {
    struct job job = {.lm = lm, .lock = PTHREAD_MUTEX_INITIALIZER};
    *result = (struct quantize_comparison){.matrices = NULL};
    lm->error[0] = '\0';
    LM_TRY(lm, moe4_checkpoint_open(&job.a, lm->ctx, a));
    moe4_status status = moe4_checkpoint_open(&job.b, lm->ctx, b);
    if (status == MOE4_OK) status = run(&job, result, layer, progress, user);
    if (status != MOE4_OK) lm_note(lm);
    moe4_checkpoint_close(job.a);
    moe4_checkpoint_close(job.b);
    return status;
}

void quantize_comparison_free(struct quantize_comparison *result) {
    for (size_t i = 0; i < result->n_matrices; i++) free(result->matrices[i].name);
    free(result->matrices);
    result->matrices = NULL;
}
