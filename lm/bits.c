/* What a model pays for a text: the sum of -log2 p over the tokens it predicts. */
#include "lm.h"

#include <math.h>
#include <stdlib.h>

enum { LOGIT_BYTES = 64 << 20, ROWS_PER_TASK = 16 };

struct bits_job {
    const float *logits; /* [n_rows, vocab] */
    const int32_t *next; /* [n_rows] */
    double *bits;        /* [n_rows] */
    size_t n_rows, vocab;
};

static double row_bits(const float *logits, size_t vocab, int32_t next) {
    float top = logits[0];
    for (size_t i = 1; i < vocab; i++) top = logits[i] > top ? logits[i] : top;
    double sum = 0.0;
    for (size_t i = 0; i < vocab; i++) sum += (double)expf(logits[i] - top);
    return log2(sum) - ((double)logits[next] - (double)top) * 1.4426950408889634;
}

static void bits_task(void *arg, size_t task) {
    const struct bits_job *job = arg;
    size_t end = (task + 1) * ROWS_PER_TASK < job->n_rows ? (task + 1) * ROWS_PER_TASK : job->n_rows;
    for (size_t row = task * ROWS_PER_TASK; row < end; row++)
        job->bits[row] = row_bits(job->logits + row * job->vocab, job->vocab, job->next[row]);
}

struct measure {
    struct lm_run *run;
    float *logits;
    double *row_bits;
    size_t max_rows;
};

/* Adds the bits of the n_rows predictions after an lm_forward, in row order whatever the threads. */
static moe4_status add_bits(struct measure *m, struct lm_bits *bits, const int32_t *next, size_t n_rows) {
    struct lm *lm = m->run->model->lm;
    size_t vocab = m->run->model->config.info.vocab;
    for (size_t row = 0; row < n_rows; row += m->max_rows) {
        size_t n = n_rows - row < m->max_rows ? n_rows - row : m->max_rows;
        for (size_t i = 0; i < n; i++)
            LM_CHECK(lm, next[row + i] >= 0 && (size_t)next[row + i] < vocab, MOE4_ERROR_FORMAT, "token %zu is %d, the vocabulary has %zu",
                     bits->n_predicted + i + 1, next[row + i], vocab);
        LM_TRY(lm, lm_logits(m->run, m->logits, row, n));
        struct bits_job job = {m->logits, next + row, m->row_bits, n, vocab};
        moe4_parallel_for(lm->ctx, (n + ROWS_PER_TASK - 1) / ROWS_PER_TASK, bits_task, &job);
        for (size_t i = 0; i < n; i++) bits->bits += m->row_bits[i];
        bits->n_predicted += n;
    }
    return MOE4_OK;
}

/* Whole windows in batches; what is left at the end is a batch of one, shorter window. */
static moe4_status measure(struct measure *m, struct lm_bits *bits, const struct lm_tokens *tokens, const struct lm_bits_options *o) {
    struct lm *lm = m->run->model->lm;
    size_t total = tokens->n - 1;
    for (size_t at = 0; at < total;) {
        size_t whole = (total - at) / o->window;
        size_t n_seqs = whole == 0 ? 1 : whole < o->batch ? whole : o->batch, n_new = whole == 0 ? total - at : o->window;
        LM_TRY(lm, lm_forward(m->run, tokens->data + at, n_seqs, n_new));
        LM_TRY(lm, add_bits(m, bits, tokens->data + at + 1, n_seqs * n_new));
        at += n_seqs * n_new;
        if (o->progress) o->progress(o->progress_user, at, total, bits->bits);
    }
    bits->n_saturated = m->run->n_saturated;
    return MOE4_OK;
}

static moe4_status prepare_and_measure(struct measure *m, struct lm_model *model, struct lm_bits *bits, const struct lm_tokens *tokens,
                                       const struct lm_bits_options *o) {
    struct lm *lm = model->lm;
    LM_CHECK(lm, tokens->n >= 2, MOE4_ERROR_ARGUMENT, "%zu tokens: nothing to predict, need 2", tokens->n);
    LM_CHECK(lm, o->window && o->window <= model->config.max_context, MOE4_ERROR_ARGUMENT,
             "a window of %zu tokens: the model's context is %zu", o->window, model->config.max_context);
    LM_CHECK(lm, o->batch, MOE4_ERROR_ARGUMENT, "a batch of 0 windows");
    size_t total = tokens->n - 1, window = o->window < total ? o->window : total;
    size_t batch = o->batch < total / window ? o->batch : total / window;
    struct lm_run_options run_options = {.n_seqs = batch, .context = window, .max_tokens = batch * window, .one_shot = true};
    LM_TRY(lm, lm_run_create(&m->run, model, &run_options));
    m->max_rows = LOGIT_BYTES / sizeof(float) / model->config.info.vocab;
    m->max_rows = m->max_rows == 0 ? 1 : m->max_rows > batch * window ? batch * window : m->max_rows;
    m->logits = lm_calloc(lm, m->max_rows, model->config.info.vocab * sizeof *m->logits, "logits");
    m->row_bits = m->logits ? lm_calloc(lm, m->max_rows, sizeof *m->row_bits, "bits") : NULL;
    return m->row_bits ? measure(m, bits, tokens, o) : MOE4_ERROR_MEMORY;
}

moe4_status lm_bits_measure(struct lm_model *model, struct lm_bits *bits, const struct lm_tokens *tokens,
                            const struct lm_bits_options *options) {
    struct measure m = {NULL, NULL, NULL, 0};
    double start = lm_seconds();
    model->lm->error[0] = '\0';
    *bits = (struct lm_bits){0, 0.0, 0.0, 0};
    moe4_status status = prepare_and_measure(&m, model, bits, tokens, options);
    bits->seconds = lm_seconds() - start;
    lm_run_destroy(m.run);
    free(m.logits);
    free(m.row_bits);
    return status;
}
