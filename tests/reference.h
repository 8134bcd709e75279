/* An fp64 statement of the layer for tests, and random layers to try it on. Roundings go through the public codec, which test_codec
 * checks on its own; everything else is written here again, plainly. */
#ifndef MOE4_TEST_REFERENCE_H
#define MOE4_TEST_REFERENCE_H

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "moe4.h"

/* ---- contexts ---- */

/* For every ISA that this CPU has, one that uses it and not the better ones; ISAs that it lacks come out as those below. */
static const uint32_t ref_isas[] = {MOE4_ISA_SCALAR, MOE4_ISA_SCALAR | MOE4_ISA_AVX2 | MOE4_ISA_NEON,
                                    MOE4_ISA_SCALAR | MOE4_ISA_AVX2 | MOE4_ISA_AVX512VNNI | MOE4_ISA_NEON | MOE4_ISA_NEONDOT, 0};
enum { REF_N_ISAS = sizeof ref_isas / sizeof *ref_isas };

static inline moe4_ctx *ref_ctx(size_t n_threads, uint32_t isa_mask) {
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    moe4_ctx *ctx;
    o.n_threads = n_threads;
    o.isa_mask = isa_mask;
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_OK);
    return ctx;
}

/* ---- random numbers: the same on every machine ---- */
static uint64_t ref_seed = 1;
static inline uint64_t ref_random(void) {
    ref_seed ^= ref_seed << 13;
    ref_seed ^= ref_seed >> 7;
    ref_seed ^= ref_seed << 17;
    return ref_seed * 0x2545F4914F6CDD1Dull >> 11;
}
static inline float ref_normal(void) { /* nearly; sum of uniforms */
    float sum = 0;
    for (int i = 0; i < 6; i++) sum += (float)(ref_random() % 65536) / 65536.f;
    return (sum - 3) * 1.4f;
}

#define OK(ctx, call)                                                                                              \
    do {                                                                                                           \
        moe4_status ok_status = (call);                                                                            \
        if (ok_status != MOE4_OK) fail_msg("%s: %s: %s", #call, moe4_status_text(ok_status), moe4_ctx_error(ctx)); \
    } while (0)

static inline double ref_relative(const float *got, const double *want, size_t n) {
    double num = 0, den = 0;
    for (size_t i = 0; i < n; i++) {
        num += (got[i] - want[i]) * (got[i] - want[i]);
        den += want[i] * want[i];
    }
    return den == 0 ? sqrt(num) : sqrt(num / den);
}

/* ---- weights ---- */

static inline moe4_weight ref_random_weight(moe4_dtype dtype, size_t rows, size_t cols) {
    moe4_weight w = {.dtype = dtype, .rows = rows, .cols = cols};
    size_t n = rows * cols;
    if (dtype == MOE4_NVFP4) {
        uint8_t *codes = malloc(n / 2), *scale = malloc(n / 16);
        for (size_t i = 0; i < n / 2; i++) codes[i] = (uint8_t)ref_random();
        for (size_t i = 0; i < n / 16; i++) scale[i] = (uint8_t)(ref_random() % 64 == 0 ? ref_random() % 16 : 0x30 + ref_random() % 24);
        w.data = codes;
        w.scale = scale;
        w.global = ldexpf(0.5f + (float)(ref_random() % 1000) / 2000.f, -5);
        w.input_scale = ldexpf(0.5f + (float)(ref_random() % 1000) / 2000.f, -9);
        return w;
    }
    char *data = malloc(n * moe4_dtype_bytes(dtype));
    for (size_t i = 0; i < n; i++) {
        float v = ref_normal() * 0.1f;
        uint16_t half = dtype == MOE4_BF16 ? moe4_bf16_from_float(v) : moe4_f16_from_float(v);
        memcpy(data + i * moe4_dtype_bytes(dtype), dtype == MOE4_F32 ? (void *)&v : (void *)&half, moe4_dtype_bytes(dtype));
    }
    w.data = data;
    return w;
}

static inline void ref_free_weight(moe4_weight *w) {
    free((void *)w->data);
    free((void *)w->scale);
}

static inline double ref_value(const moe4_weight *w, size_t row, size_t col) {
    size_t i = row * w->cols + col;
    if (w->dtype == MOE4_NVFP4) {
        uint8_t code = (uint8_t)(((const uint8_t *)w->data)[i / 2] >> (i % 2 ? 4 : 0)) & 15;
        return (double)moe4_e2m1_to_float(code) * moe4_e4m3_to_float(w->scale[i / 16]) * w->global;
    }
    if (w->dtype == MOE4_F32) return ((const float *)w->data)[i];
    uint16_t half = ((const uint16_t *)w->data)[i];
    return w->dtype == MOE4_BF16 ? moe4_bf16_to_float(half) : moe4_f16_to_float(half);
}

/* y[N] = W x */
static inline void ref_product(double *y, const moe4_weight *w, const double *x) {
    for (size_t n = 0; n < w->rows; n++) {
        y[n] = w->bias ? w->bias[n] : 0;
        for (size_t k = 0; k < w->cols; k++) y[n] += ref_value(w, n, k) * x[k];
    }
}

/* ---- roundings: out[k] = the value that enters a product ---- */

/* amax: of what the mode takes its scale from (TOKEN: the row, TENSOR: the batch). */
static inline uint64_t ref_round(moe4_ctx *ctx, double *out, const float *x, size_t k, moe4_act act, float input_scale, float amax) {
    if (act == MOE4_ACT_BF16 || act == MOE4_ACT_W4A16) {
        for (size_t i = 0; i < k; i++) out[i] = act == MOE4_ACT_BF16 ? x[i] : moe4_bf16_to_float(moe4_bf16_from_float(x[i]));
        return 0;
    }
    float S = act == MOE4_ACT_STATIC ? fminf(1.f / input_scale, FLT_MAX) : amax == 0 ? 1 : 2688.f / amax;
    moe4_quantize_options q = MOE4_QUANTIZE_OPTIONS_INIT;
    q.recipe = MOE4_RECIPE_ACTIVATION;
    q.global = &S;
    uint8_t *codes = malloc(k / 2), *scales = malloc(k / 16);
    uint64_t n_saturated;
    OK(ctx, moe4_nvfp4_quantize(ctx, codes, scales, NULL, &n_saturated, x, MOE4_F32, 1, k, 0, &q));
    double decode = act == MOE4_ACT_STATIC ? input_scale : 1.f / S;
    for (size_t i = 0; i < k; i++)
        out[i] = (double)moe4_e2m1_to_float(codes[i / 2] >> (i % 2 ? 4 : 0) & 15) * moe4_e4m3_to_float(scales[i / 16]) * decode;
    free(codes);
    free(scales);
    return n_saturated;
}

static inline float ref_amax(const float *x, size_t n) {
    float a = 0;
    for (size_t i = 0; i < n; i++) a = fabsf(x[i]) > a ? fabsf(x[i]) : a;
    return a;
}

/* ---- the layer ---- */

struct ref_layer {
    const moe4_expert *experts; /* local ones */
    size_t first, n, k, hidden, intermediate;
    moe4_act act;
    float limit;
    moe4_activation activation;
    float alpha, beta; /* 0 means 1; */
    moe4_weighting weighting;
};

static inline double ref_activation(const struct ref_layer *l, double g, double u) {
    if (l->activation == MOE4_RELU2) return u > 0 ? u * u : 0;
    if (l->activation == MOE4_GELU_TANH) return 0.5 * g * (1 + tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))) * u;
    if (l->limit > 0) {
        g = g > l->limit ? l->limit : g;
        u = u > l->limit ? l->limit : u < -l->limit ? -l->limit : u;
    }
    return g / (1 + exp(-(l->alpha == 0 ? 1 : l->alpha) * g)) * (u + l->beta);
}

/* y[T,H] += the weighted sum; returns saturated blocks per slot. x must be finite. */
static inline uint64_t ref_forward(moe4_ctx *ctx, double *y, const struct ref_layer *l, const float *x, const int64_t *ids,
                                   const float *weights, size_t T) {
    size_t H = l->hidden, I = l->intermediate, n_slots = T * l->k;
    double *xq = malloc((H + 2 * I) * sizeof *xq), *g = xq + H, *u = g + I, *o = malloc((H + I) * sizeof *o), *hq = o + H;
    float *h = malloc(n_slots * I * sizeof *h + 1), *row = malloc(H * sizeof *row), h_amax = 0, x_amax = 0;
    uint64_t n_saturated = 0;
    for (int pass = 0; pass < 3; pass++) /* 0: x's amax for TENSOR; 1: every slot's h, so that TENSOR knows their amax; 2: down */
        for (size_t s = 0; s < n_slots; s++) {
            int64_t e = ids ? ids[s] - (int64_t)l->first : 0;
            bool local = e >= 0 && (size_t)e < l->n;
            float weight = weights ? weights[s] : 1, on_x = l->weighting == MOE4_WEIGHT_ON_X ? weight : 1;
            float on_h = l->weighting == MOE4_WEIGHT_BEFORE_DOWN ? weight : 1;
            for (size_t i = 0; i < H; i++) row[i] = x[s / l->k * H + i] * on_x;
            if (pass == 0 && (local || l->weighting != MOE4_WEIGHT_ON_X)) x_amax = fmaxf(x_amax, ref_amax(row, H));
            if (pass == 0 || !local) continue;
            const moe4_expert *w = &l->experts[e];
            if (pass == 1) {
                float scale = fmaxf(w->gate.input_scale, w->up.input_scale);
                n_saturated += ref_round(ctx, xq, row, H, l->act, scale, l->act == MOE4_ACT_TENSOR ? x_amax : ref_amax(row, H));
                if (l->activation != MOE4_RELU2) ref_product(g, &w->gate, xq);
                ref_product(u, &w->up, xq);
                for (size_t i = 0; i < I; i++) h[s * I + i] = (float)ref_activation(l, g[i], u[i]) * on_h;
                h_amax = fmaxf(h_amax, ref_amax(h + s * I, I));
            } else {
                float amax = l->act == MOE4_ACT_TENSOR ? h_amax : ref_amax(h + s * I, I);
                n_saturated += ref_round(ctx, hq, h + s * I, I, l->act, w->down.input_scale, amax);
                ref_product(o, &w->down, hq);
                for (size_t i = 0; i < H; i++) y[s / l->k * H + i] += (l->weighting == MOE4_WEIGHT_AFTER_DOWN ? weight : 1) * o[i];
            }
        }
    free(xq);
    free(o);
    free(h);
    free(row);
    return n_saturated;
}

#endif
