/* What quantizing cost, matrix by matrix: the values of one model against those of another. The engine behind `moe4 compare`. */
#ifndef QUANTIZE_COMPARE_H
#define QUANTIZE_COMPARE_H

#include "lm/lm.h"

struct quantize_difference {
    char *name; /* of the module */
    size_t rows, cols;
    double error_sq, norm_sq;   /* sums of (a - b)^2 and b^2 */
    bool both_nvfp4;            /* then the next two mean something */
    uint64_t n_scales, n_codes; /* block scale bytes and element codes that differ */
};

struct quantize_comparison {
    struct quantize_difference *matrices; /* most damage first: by relative error */
    size_t n_matrices;
    size_t n_same, n_differ;   /* other tensors of both, by their bytes */
    size_t n_only_a, n_only_b; /* modules and tensors that only one has */
    double error_sq, norm_sq;  /* of all matrices */
};

/* |a - b| / |b|; infinite when only b is zero. And -20 log10 of it; infinite for no error. */
double quantize_relative_error(double error_sq, double norm_sq);
double quantize_snr(double error_sq, double norm_sq);

#define QUANTIZE_ALL_LAYERS SIZE_MAX

/* Compares all of `layer` that both have. Errors: the library's, FORMAT (a matrix of two shapes, nothing in common). Free the result
 * either way. */
moe4_status quantize_compare(struct lm *lm, struct quantize_comparison *result, const char *a, const char *b, size_t layer,
                             lm_progress_fn progress, void *user);
void quantize_comparison_free(struct quantize_comparison *result);

#endif
