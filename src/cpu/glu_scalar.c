/* The activation between gate/up and down, in plain loops. */
#include <math.h>

#include "kernels.h"

/* Comparisons that are false for NaN, so that it stays. */
static float at_most(float x, float limit) {
    return x > limit ? limit : x;
}

static float at_least(float x, float limit) {
    return x < limit ? limit : x;
}

/* GELU(g) by tanh is g * sigmoid(2 z), z = sqrt(2/pi) (g + 0.044715 g^3). */
static float gelu_argument(float g) {
    return 1.5957691216f * (g + 0.044715f * (g * g * g));
}

static void glu_row(float *h, const float *g, const float *u, size_t n, const struct moe4_glu *glu) {
    for (size_t i = 0; i < n; i++) {
        if (glu->kind == MOE4_RELU2) {
            float r = at_least(u[i], 0.f);
            h[i] = r * r;
            continue;
        }
        float a = g[i], b = u[i];
        if (glu->limit > 0) {
            a = at_most(a, glu->limit);
            b = at_least(at_most(b, glu->limit), -glu->limit);
        }
        float s = glu->kind == MOE4_GELU_TANH ? gelu_argument(a) : glu->alpha * a;
        h[i] = a / (1.f + expf(-s)) * (b + glu->beta);
    }
}

void moe4_kernels_glu_scalar(struct moe4_kernels *k) {
    k->glu_row = glu_row;
}
