/* RMSNorm and the residual sum. */
#include "lm.h"

#include <math.h>

enum { LANES = 8, ROWS_PER_TASK = 64 };

/* Eight partial sums in a fixed order: one vector register where there are vectors, the same bits where there are none. */
static float sum_of_squares(const float *x, size_t n) {
    float lane[LANES] = {0.f};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += x[i + (size_t)j] * x[i + (size_t)j];
    for (int j = 0; i < n; i++, j++) lane[j] += x[i] * x[i];
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

void lm_norm_row(float *h, const float *x, const float *weight, float eps, size_t n) {
    float r = 1.0f / sqrtf(sum_of_squares(x, n) / (float)n + eps);
    for (size_t i = 0; i < n; i++) h[i] = x[i] * r * weight[i];
}

struct norm_job {
    float *h, *x;
    const float *y, *weight;
    float eps;
    size_t n_rows, n;
};

static void norm_task(void *arg, size_t task) {
    const struct norm_job *job = arg;
    size_t end = (task + 1) * ROWS_PER_TASK < job->n_rows ? (task + 1) * ROWS_PER_TASK : job->n_rows;
    for (size_t row = task * ROWS_PER_TASK; row < end; row++) {
        float *x = job->x + row * job->n;
        if (job->y)
            for (size_t i = 0; i < job->n; i++) x[i] += job->y[row * job->n + i];
        lm_norm_row(job->h + row * job->n, x, job->weight, job->eps, job->n);
    }
}

void lm_add_norm_rows(const struct lm *lm, float *h, float *x, const float *y, const float *weight, float eps, size_t n_rows, size_t n) {
    struct norm_job job = {h, x, y, weight, eps, n_rows, n};
    moe4_parallel_for(lm->ctx, (n_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, norm_task, &job);
}
