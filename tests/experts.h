/* Random layers for tests of a device: experts of any dtype, with biases or not. */
#ifndef MOE4_TEST_EXPERTS_H
#define MOE4_TEST_EXPERTS_H

#include "device.h"

struct layer {
    size_t E, hidden, intermediate, k;
    moe4_dtype up, down;
    moe4_expert *expert;
};

static inline void random_bias(moe4_weight *w) {
    float *bias = malloc(w->rows * sizeof *bias);
    for (size_t i = 0; i < w->rows; i++) bias[i] = 0.3f * ref_normal();
    w->bias = bias;
}

static inline struct layer random_layer(size_t E, size_t hidden, size_t intermediate, size_t k, moe4_dtype up, moe4_dtype down, bool bias) {
    struct layer l = {E, hidden, intermediate, k, up, down, calloc(E, sizeof *l.expert)};
    for (size_t e = 0; e < E; e++) {
        moe4_expert *x = &l.expert[e];
        x->gate = ref_random_weight(up, intermediate, hidden);
        x->up = ref_random_weight(up, intermediate, hidden);
        x->down = ref_random_weight(down, hidden, intermediate);
        if (bias && e != 1) { /* one expert has none where the others do */
            random_bias(&x->gate);
            random_bias(&x->up);
            random_bias(&x->down);
        }
    }
    return l;
}

static inline void free_matrices(moe4_weight *w, size_t n) {
    for (size_t i = 0; i < n; i++) {
        free((void *)w[i].bias);
        ref_free_weight(&w[i]);
    }
}

static inline void free_layer(struct layer *l) {
    for (size_t e = 0; e < l->E; e++) {
        free_matrices(&l->expert[e].gate, 1);
        free_matrices(&l->expert[e].up, 1);
        free_matrices(&l->expert[e].down, 1);
    }
    free(l->expert);
}

/* What h is rounded to under a mode. */
static inline moe4_act act_h(const struct layer *l, moe4_act act) {
    return l->down == MOE4_NVFP4 ? act : MOE4_ACT_BF16;
}

static inline float *random_floats(size_t n) {
    float *x = malloc(n * sizeof *x + 1);
    for (size_t i = 0; i < n; i++) x[i] = ref_normal();
    return x;
}

static inline float *random_routing_weights(size_t n) {
    float *w = malloc(n * sizeof *w + 1);
    for (size_t i = 0; i < n; i++) w[i] = 0.1f + (float)(ref_random() % 100) / 100.f;
    return w;
}

/* x in a dtype that is not NVFP4. */
static inline void *narrow(const float *x, size_t n, moe4_dtype dtype) {
    char *out = malloc(n * moe4_dtype_bytes(dtype) + 1);
    for (size_t i = 0; i < n; i++) {
        uint16_t half = dtype == MOE4_BF16 ? moe4_bf16_from_float(x[i]) : moe4_f16_from_float(x[i]);
        if (dtype == MOE4_F32)
            memcpy(out + 4 * i, &x[i], 4);
        else
            memcpy(out + 2 * i, &half, 2);
    }
    return out;
}

/* x [rows, cols] as a call of ctx takes it: in a dtype, or as NVFP4 rows in a layout, with a global scale for each row or one. */
struct given_x {
    const void *x;
    moe4_nvfp4_rows rows;
};

static inline void give_x(struct given_x *g, moe4_ctx *ctx, const float *x, size_t rows, size_t cols, moe4_dtype dtype,
                          moe4_scale_layout layout, bool per_row) {
    if (dtype != MOE4_NVFP4) {
        void *host = narrow(x, rows * cols, dtype);
        g->x = give(ctx, host, rows * cols * moe4_dtype_bytes(dtype));
        free(host);
        return;
    }
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    size_t bytes;
    o.per_row = per_row;
    o.scale_layout = layout;
    OK(cpu, moe4_scales_bytes(cpu, &bytes, layout, 1, rows, cols));
    uint8_t *codes = malloc(rows * cols / 2 + 1), *scales = malloc(bytes + 1);
    float *global = malloc(rows * sizeof *global + 4);
    OK(cpu, moe4_nvfp4_quantize(cpu, codes, scales, global, NULL, x, MOE4_F32, rows, cols, 0, &o));
    g->rows = (moe4_nvfp4_rows){give(ctx, codes, rows * cols / 2), give(ctx, scales, bytes), layout,
                                give(ctx, global, (per_row ? rows : 1) * sizeof *global), per_row};
    g->x = &g->rows;
    free(codes);
    free(scales);
    free(global);
}

/* Tests walk through many cases; an argument of the program leaves all but every n-th out, for tools under which they take long. */
static int every = 1;

static inline void read_arguments(int argc, char **argv) {
    if (argc > 1) every = atoi(argv[1]);
    if (every < 1) every = 1;
}

/* ---- options by number, so that tests can walk through them ---- */

static const moe4_act modes[] = {MOE4_ACT_W4A16, MOE4_ACT_STATIC, MOE4_ACT_TENSOR, MOE4_ACT_TOKEN};
enum { N_MODES = 4, N_ACTIVATIONS = 4 };

/* SwiGLU, gpt-oss' SwiGLU, GELU, ReLU squared. */
static inline void set_activation(moe4_moe_options *o, int i) {
    o->activation = i < 2 ? MOE4_SWIGLU : i == 2 ? MOE4_GELU_TANH : MOE4_RELU2;
    if (i != 1) return;
    o->swiglu_alpha = 1.702f;
    o->swiglu_beta = 1;
    o->swiglu_limit = 3;
}

#endif
