/* The next token: temperature, top-p, a generator of our own so that a seed means the same everywhere. */
#include "lm.h"

#include <math.h>
#include <stdlib.h>

/* SplitMix64; the top 53 bits as a fraction in [0, 1). */
static double uniform(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

static int by_probability(const void *a, const void *b) {
    const struct lm_candidate *x = a, *y = b;
    if (x->p != y->p) return x->p < y->p ? 1 : -1;
    return x->id < y->id ? -1 : x->id > y->id;
}

static size_t largest(const float *logits, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

/* Leaves those of at least `least`. When that is the mean share of what top_p leaves out, the others together have less than it leaves
 * out, so top_p takes none of them: sorting need not see them. */
static size_t drop_unlikely(struct lm_candidate *candidates, size_t n, double least) {
    size_t n_left = 0;
    for (size_t i = 0; i < n; i++)
        if (candidates[i].p >= least) candidates[n_left++] = candidates[i];
    return n_left;
}

int32_t lm_sample(struct lm_sampler *sampler, const float *logits, size_t n, struct lm_candidate *scratch) {
    size_t best = largest(logits, n);
    if (sampler->temperature <= 0.0) return (int32_t)best;
    double total = 0.0;
    for (size_t i = 0; i < n; i++) {
        scratch[i] = (struct lm_candidate){exp(((double)logits[i] - (double)logits[best]) / sampler->temperature), (int32_t)i};
        total += scratch[i].p;
    }
    size_t n_kept = n;
    if (sampler->top_p < 1.0) {
        n = drop_unlikely(scratch, n, (1.0 - sampler->top_p) * total / (double)n);
        qsort(scratch, n, sizeof *scratch, by_probability);
        double kept = 0.0;
        for (n_kept = 0; n_kept < n && kept < sampler->top_p * total; n_kept++) kept += scratch[n_kept].p;
        if (n_kept == 0) n_kept = 1;
        total = 0.0;
        for (size_t i = 0; i < n_kept; i++) total += scratch[i].p;
    }
    double left = uniform(&sampler->seed) * total;
    for (size_t i = 0; i + 1 < n_kept; i++) {
        if (left < scratch[i].p) return scratch[i].id;
        left -= scratch[i].p;
    }
    return scratch[n_kept - 1].id;
}
