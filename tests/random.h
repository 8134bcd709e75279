/* Reproducible test data: a small generator, and fp32 rows of the kinds that break codecs. */
#ifndef MOE4_TESTS_RANDOM_H
#define MOE4_TESTS_RANDOM_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* xorshift64*; any state but 0. */
static inline uint64_t random_u64(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1d;
}

static inline size_t random_below(uint64_t *state, size_t n) {
    return (size_t)((random_u64(state) >> 32) * n >> 32);
}

/* [0, 1) */
static inline float random_unit(uint64_t *state) {
    return (float)(random_u64(state) >> 40) * 0x1p-24f;
}

/* About normal, unit variance. */
static inline float random_normal(uint64_t *state) {
    float sum = -6;
    for (int i = 0; i < 12; i++) sum += random_unit(state);
    return sum;
}

/* Any finite bit pattern. */
static inline float random_finite(uint64_t *state) {
    for (;;) {
        uint32_t bits = (uint32_t)(random_u64(state) >> 32);
        float x;
        memcpy(&x, &bits, sizeof x);
        if (isfinite(x)) return x;
    }
}

enum { RANDOM_KINDS = 8 };

/* One of RANDOM_KINDS kinds of finite rows. */
static inline void random_row(uint64_t *state, float *x, size_t n, int kind) {
    for (size_t i = 0; i < n; i++) {
        float sign = random_u64(state) >> 63 ? -1.f : 1.f;
        switch (kind) {
        case 0: x[i] = random_normal(state); break;
        case 1: x[i] = random_finite(state); break;                                                                /* every exponent */
        case 2: x[i] = sign * (float)random_below(state, 25) * .25f; break;                                        /* ties, both zeros */
        case 3: x[i] = sign * (float)random_below(state, 1 << 20) * 0x1p-149f; break;                              /* subnormals */
        case 4: x[i] = sign * 0x1.fffffep127f * (.5f + .5f * random_unit(state)); break;                           /* huge */
        case 5: x[i] = random_below(state, 100) ? 0.01f * random_normal(state) : 50 * random_normal(state); break; /* outliers */
        case 6: x[i] = i / 16 % 2 ? sign * 0.f : random_normal(state); break;                                      /* blocks of zeros */
        default: x[i] = ldexpf(random_normal(state), (int)random_below(state, 40) - 20); break;
        }
    }
}

#endif
