/* The activation between gate/up and down on NEON. Elementwise: a value does not depend on its place in the row. */
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float32x4_t all(float x) {
    return vdupq_n_f32(x);
}

/* e^x to 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, the Taylor series of e^r to r^7 (5e-9 short), and 2^n in two factors, so that results
 * go over into infinity and through the subnormals to 0. NaN is for the caller to keep. */
INLINE float32x4_t exp4(float32x4_t x) {
    x = vminq_f32(vmaxq_f32(x, all(-105.f)), all(90.f));
    const float32x4_t n = vrndnq_f32(vmulq_f32(x, all(0x1.715476p0f)));
    float32x4_t r = vfmsq_f32(x, n, all(0x1.63p-1f)); /* ln 2 in two parts, the first of so few bits that n times it is exact */
    r = vfmsq_f32(r, n, all(-0x1.bd0106p-13f));
    float32x4_t p = all(1.f / 5040);
    p = vfmaq_f32(all(1.f / 720), p, r);
    p = vfmaq_f32(all(1.f / 120), p, r);
    p = vfmaq_f32(all(1.f / 24), p, r);
    p = vfmaq_f32(all(1.f / 6), p, r);
    p = vfmaq_f32(all(.5f), p, r);
    p = vfmaq_f32(all(1.f), p, r);
    p = vfmaq_f32(all(1.f), p, r);
    const int32x4_t e = vcvtq_s32_f32(n), half = vshrq_n_s32(e, 1), bias = vdupq_n_s32(127);
    p = vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23)));
    return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(e, half), bias), 23)));
}

/* min and max give NaN where an argument is one: so NaN stays. */
INLINE float32x4_t glu4(float32x4_t g, float32x4_t u, moe4_activation kind, const struct moe4_glu *p) {
    if (kind == MOE4_RELU2) {
        u = vmaxq_f32(u, all(0.f));
        return vmulq_f32(u, u);
    }
    if (p->limit > 0) {
        g = vminq_f32(g, all(p->limit));
        u = vmaxq_f32(vminq_f32(u, all(p->limit)), all(-p->limit));
    }
    float32x4_t s = vmulq_f32(g, all(p->alpha));
    if (kind == MOE4_GELU_TANH) {
        const float32x4_t cube = vmulq_f32(vmulq_f32(g, g), g);
        s = vmulq_f32(vfmaq_f32(g, all(0.044715f), cube), all(1.5957691216f));
    }
    const float32x4_t e = exp4(vnegq_f32(s));
    return vmulq_f32(vdivq_f32(g, vaddq_f32(all(1.f), e)), vaddq_f32(u, all(p->beta)));
}

INLINE void glu_as(float *h, const float *g, const float *u, size_t n, moe4_activation kind, const struct moe4_glu *p) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const float32x4_t v = vld1q_f32(u + i);
        vst1q_f32(h + i, glu4(kind == MOE4_RELU2 ? v : vld1q_f32(g + i), v, kind, p));
    }
    if (i < n) {
        float a[4] = {0}, b[4] = {0};
        if (kind != MOE4_RELU2) memcpy(a, g + i, (n - i) * sizeof *a);
        memcpy(b, u + i, (n - i) * sizeof *b);
        vst1q_f32(a, glu4(vld1q_f32(a), vld1q_f32(b), kind, p));
        memcpy(h + i, a, (n - i) * sizeof *a);
    }
}

static void glu_row(float *h, const float *g, const float *u, size_t n, const struct moe4_glu *p) {
    switch (p->kind) {
    case MOE4_SWIGLU: glu_as(h, g, u, n, MOE4_SWIGLU, p); break;
    case MOE4_GELU_TANH: glu_as(h, g, u, n, MOE4_GELU_TANH, p); break;
    case MOE4_RELU2: glu_as(h, g, u, n, MOE4_RELU2, p); break;
    }
}

void moe4_kernels_glu_neon(struct moe4_kernels *k) {
    k->glu_row = glu_row;
}
#else
typedef int moe4_no_neon; /* a translation unit may not be empty */
#endif
