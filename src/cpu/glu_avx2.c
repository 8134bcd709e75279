/* The activation between gate/up and down on AVX2 and FMA. Elementwise: a value does not depend on its place in the row. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) AVX2

/* e^x to 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, the Taylor series of e^r to r^7 (5e-9 short), and 2^n in two factors, so that results
 * go over into infinity and through the subnormals to 0. NaN is for the caller to keep. */
INLINE __m256 exp8(__m256 x) {
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-105.f)), _mm256_set1_ps(90.f));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p0f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r =
        _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.63p-1f), x); /* ln 2 in two parts, the first of so few bits that n times it is exact */
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-0x1.bd0106p-13f), r);
    __m256 p = _mm256_set1_ps(1.f / 5040);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.f / 720));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.f));
    __m256i e = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(e, 1), bias = _mm256_set1_epi32(127);
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, half), bias), 23)));
}

/* min and max give their second argument where one is a NaN: so NaN stays. */
INLINE __m256 glu8(__m256 g, __m256 u, moe4_activation kind, const struct moe4_glu *p) {
    const __m256 zero = _mm256_setzero_ps();
    if (kind == MOE4_RELU2) {
        u = _mm256_max_ps(zero, u);
        return _mm256_mul_ps(u, u);
    }
    if (p->limit > 0) {
        __m256 limit = _mm256_set1_ps(p->limit);
        g = _mm256_min_ps(limit, g);
        u = _mm256_max_ps(_mm256_sub_ps(zero, limit), _mm256_min_ps(limit, u));
    }
    __m256 s = _mm256_mul_ps(_mm256_set1_ps(p->alpha), g);
    if (kind == MOE4_GELU_TANH) {
        __m256 cube = _mm256_mul_ps(_mm256_mul_ps(g, g), g);
        s = _mm256_mul_ps(_mm256_set1_ps(1.5957691216f), _mm256_fmadd_ps(_mm256_set1_ps(0.044715f), cube, g));
    }
    __m256 e = exp8(_mm256_sub_ps(zero, s));
    return _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.f), e)), _mm256_add_ps(u, _mm256_set1_ps(p->beta)));
}

INLINE void glu_as(float *h, const float *g, const float *u, size_t n, moe4_activation kind, const struct moe4_glu *p) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(u + i);
        _mm256_storeu_ps(h + i, glu8(kind == MOE4_RELU2 ? v : _mm256_loadu_ps(g + i), v, kind, p));
    }
    if (i < n) {
        float a[8] = {0}, b[8] = {0};
        if (kind != MOE4_RELU2) memcpy(a, g + i, (n - i) * sizeof *a);
        memcpy(b, u + i, (n - i) * sizeof *b);
        _mm256_storeu_ps(a, glu8(_mm256_loadu_ps(a), _mm256_loadu_ps(b), kind, p));
        memcpy(h + i, a, (n - i) * sizeof *a);
    }
}

AVX2 static void glu_row(float *h, const float *g, const float *u, size_t n, const struct moe4_glu *p) {
    switch (p->kind) {
    case MOE4_SWIGLU: glu_as(h, g, u, n, MOE4_SWIGLU, p); break;
    case MOE4_GELU_TANH: glu_as(h, g, u, n, MOE4_GELU_TANH, p); break;
    case MOE4_RELU2: glu_as(h, g, u, n, MOE4_RELU2, p); break;
    }
}

void moe4_kernels_glu_avx2(struct moe4_kernels *k) {
    k->glu_row = glu_row;
}
#else
typedef int moe4_no_avx2; /* a translation unit may not be empty */
#endif
