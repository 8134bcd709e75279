/* The scale byte of each block by search. The plain recipes map a block's largest value to 6; another scale often leaves less error over
 * the sixteen, and costs nothing to store. Given a scale the nearest code is the best, so trying the bytes around the plain one is all.
 *
 * Candidates are the lanes of a vector: sixteen scales at once, one element of the block after the other. The one body below is compiled
 * for each instruction set; it has no fused operations and sums in a fixed order, so all give the same bytes. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "quantize/block.h"

#define INLINE static inline __attribute__((always_inline))

/* Bytes tried below and above the one that maps the largest value to 6; E4M3 has eight to an octave. The last lane is the plain byte. */
enum { BELOW = 3, ABOVE = 9, N_LANES = 16, PLAIN = N_LANES - 1, MAX_BYTE = 0x7e };

struct table {
    float scale[MAX_BYTE + 1], inverse[MAX_BYTE + 1]; /* of the decoded value */
    float sf8_sq[MAX_BYTE + 1];
};

struct lanes {
    uint8_t byte[N_LANES];
    float inverse[N_LANES], sf8_sq[N_LANES], error[N_LANES];
};

/* The nearest of E2M1's magnitudes: a step of 0.5 below 2, of 1 below 4, of 2 above. Adding and taking away 1.5 * 2^23 steps rounds. */
INLINE float nearest(float v) {
    float magic = v < 2 ? 0x1.8p22f : v < 4 ? 0x1.8p23f : 0x1.8p24f;
    float q = (v + magic) - magic;
    return q < 6 ? q : 6;
}

/* error[lane] = sum of weighted squared errors of the magnitudes a[16] under each scale, in units of the global scale squared. Pairs k and
 * k + 8 first, then a fixed tree. */
INLINE void lane_errors(struct lanes *l, const float a[MOE4_BLOCK], const float weight[MOE4_BLOCK]) {
    float sum[MOE4_BLOCK][N_LANES];
    for (int k = 0; k < MOE4_BLOCK; k++)
        for (int lane = 0; lane < N_LANES; lane++) {
            float v = a[k] * l->inverse[lane], d = v - nearest(v);
            sum[k][lane] = d * d * weight[k];
        }
    for (int n = MOE4_BLOCK / 2; n; n /= 2)
        for (int k = 0; k < n; k++)
            for (int lane = 0; lane < N_LANES; lane++) sum[k][lane] += sum[k + n][lane];
    for (int lane = 0; lane < N_LANES; lane++) l->error[lane] = sum[0][lane] * l->sf8_sq[lane];
}

INLINE uint8_t best_byte(const struct table *t, const float a[MOE4_BLOCK], const float weight[MOE4_BLOCK], uint8_t plain, float amax) {
    uint8_t centre = moe4_e4m3_from_float(amax / 6.f * t->inverse[0x38]); /* byte 0x38 is 1 */
    int low = centre > BELOW + 1 ? centre - BELOW : 1, high = centre + ABOVE < MAX_BYTE ? centre + ABOVE : MAX_BYTE;
    struct lanes l;
    for (int lane = 0; lane < N_LANES; lane++) {
        l.byte[lane] = lane == PLAIN ? plain : (uint8_t)(low + lane < high ? low + lane : high);
        l.inverse[lane] = t->inverse[l.byte[lane]];
        l.sf8_sq[lane] = t->sf8_sq[l.byte[lane]];
    }
    lane_errors(&l, a, weight);
    uint8_t best = plain;
    float least = l.error[PLAIN];
    for (int lane = 0; lane < PLAIN; lane++)
        if (l.error[lane] < least) {
            least = l.error[lane];
            best = l.byte[lane];
        }
    return best;
}

/* The codes of sixteen elements: to nearest, ties to the even code. */
INLINE void encode(uint8_t codes[MOE4_BLOCK / 2], const float x[MOE4_BLOCK], float scale) {
    uint8_t code[MOE4_BLOCK];
    for (int k = 0; k < MOE4_BLOCK; k++) {
        float v = fabsf(x[k] / scale);
        int c = (v > 0.25f) + (v >= 0.75f) + (v > 1.25f) + (v >= 1.75f) + (v > 2.5f) + (v >= 3.5f) + (v > 5.f);
        code[k] = (uint8_t)(c | (x[k] < 0 ? 8 : 0));
    }
    for (int k = 0; k < MOE4_BLOCK; k += 2) codes[k / 2] = (uint8_t)(code[k] | code[k + 1] << 4);
}

INLINE void search(uint8_t *codes, uint8_t *scales, const float *x, size_t rows, size_t cols, const struct table *t, const float *weight) {
    static const float ones[MOE4_BLOCK] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    for (size_t i = 0; i < rows * cols; i += MOE4_BLOCK) {
        float a[MOE4_BLOCK], amax = 0;
        for (int k = 0; k < MOE4_BLOCK; k++) {
            a[k] = fabsf(x[i + k]);
            amax = a[k] > amax ? a[k] : amax;
        }
        uint8_t *scale = &scales[i / MOE4_BLOCK];
        uint8_t best = amax > 0 ? best_byte(t, a, weight ? weight + i % cols : ones, *scale, amax) : *scale;
        if (best == *scale) continue;
        *scale = best;
        encode(codes + i / 2, x + i, t->scale[best]);
    }
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static void
search_avx512(uint8_t *codes, uint8_t *scales, const float *x, size_t rows, size_t cols, const struct table *t, const float *weight) {
    search(codes, scales, x, rows, cols, t, weight);
}

__attribute__((target("avx2"))) static void search_avx2(uint8_t *codes, uint8_t *scales, const float *x, size_t rows, size_t cols,
                                                        const struct table *t, const float *weight) {
    search(codes, scales, x, rows, cols, t, weight);
}
#endif

void quantize_search(uint8_t *codes, uint8_t *scales, const float *x, size_t rows, size_t cols, float global, bool divides,
                     const float *weight, uint32_t isa) {
    struct table t;
    for (int byte = 0; byte <= MAX_BYTE; byte++) {
        float sf8 = moe4_e4m3_to_float((uint8_t)byte);
        t.scale[byte] = divides ? sf8 / global : sf8 * global;
        t.inverse[byte] = t.scale[byte] > 0 ? 1.f / t.scale[byte] : 0.f;
        t.sf8_sq[byte] = sf8 * sf8;
    }
    if (t.scale[1] < FLT_MIN) return; /* scales that lose bits, and inverses past the largest number: plain is fine */
#if defined(__x86_64__)
    if (isa & MOE4_ISA_AVX512VNNI) {
        search_avx512(codes, scales, x, rows, cols, &t, weight);
        return;
    }
    if (isa & MOE4_ISA_AVX2) {
        search_avx2(codes, scales, x, rows, cols, &t, weight);
        return;
    }
#endif
    (void)isa;
    search(codes, scales, x, rows, cols, &t, weight);
}
