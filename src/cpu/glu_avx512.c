/* The activation between gate/up and down on AVX-512, as in glu_avx2.c. Elementwise: a value does not depend on its place in the row. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* e^x to 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, the Taylor series of e^r to r^7 (5e-9 short), times 2^n. NaN is for the caller to keep. */
INLINE __m512 exp16(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-105.f)), _mm512_set1_ps(90.f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p0f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r =
        _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.63p-1f), x); /* ln 2 in two parts, the first of so few bits that n times it is exact */
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-0x1.bd0106p-13f), r);
    __m512 p = _mm512_set1_ps(1.f / 5040);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(p, n);
}

/* min and max give their second argument where one is a NaN: so NaN stays. */
INLINE __m512 glu16(__m512 g, __m512 u, moe4_activation kind, const struct moe4_glu *p) {
    const __m512 zero = _mm512_setzero_ps();
    if (kind == MOE4_RELU2) {
        u = _mm512_max_ps(zero, u);
        return _mm512_mul_ps(u, u);
    }
    if (p->limit > 0) {
        const __m512 limit = _mm512_set1_ps(p->limit);
        g = _mm512_min_ps(limit, g);
        u = _mm512_max_ps(_mm512_sub_ps(zero, limit), _mm512_min_ps(limit, u));
    }
    __m512 s = _mm512_mul_ps(_mm512_set1_ps(p->alpha), g);
    if (kind == MOE4_GELU_TANH) {
        const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(g, g), g);
        s = _mm512_mul_ps(_mm512_set1_ps(1.5957691216f), _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, g));
    }
    const __m512 e = exp16(_mm512_sub_ps(zero, s));
    return _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.f), e)), _mm512_add_ps(u, _mm512_set1_ps(p->beta)));
}

INLINE void glu_as(float *h, const float *g, const float *u, size_t n, moe4_activation kind, const struct moe4_glu *p) {
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 some = n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        const __m512 v = _mm512_maskz_loadu_ps(some, u + i);
        _mm512_mask_storeu_ps(h + i, some, glu16(kind == MOE4_RELU2 ? v : _mm512_maskz_loadu_ps(some, g + i), v, kind, p));
    }
}

TARGET static void glu_row(float *h, const float *g, const float *u, size_t n, const struct moe4_glu *p) {
    switch (p->kind) {
    case MOE4_SWIGLU: glu_as(h, g, u, n, MOE4_SWIGLU, p); break;
    case MOE4_GELU_TANH: glu_as(h, g, u, n, MOE4_GELU_TANH, p); break;
    case MOE4_RELU2: glu_as(h, g, u, n, MOE4_RELU2, p); break;
    }
}

void moe4_kernels_glu_avx512(struct moe4_kernels *k) {
    k->glu_row = glu_row;
}
#endif
