/* What calibration keeps, for the files that make it: which inputs there are, who watches them, and what becomes of them. */
#ifndef QUANTIZE_CALIBRATION_H
#define QUANTIZE_CALIBRATION_H

#include "quantize/calibrate.h"

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

/* The inputs of every layer and the matrices that read them; whatever fails, quantize_calibration_free takes what there is. */
moe4_status quantize_calibration_set_up(struct quantize_calibration *c);

/* For lm_run_options.watch; user is the calibration. */
moe4_status quantize_calibration_watch(void *user, const struct lm_run *run, size_t layer, enum lm_point point, const float *x,
                                       size_t n_tokens);

#endif
