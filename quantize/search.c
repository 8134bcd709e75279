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

/* Half a block at once. */
enum { HALF = MOE4_BLOCK / 2 };
typedef float floats __attribute__((vector_size(4 * HALF)));
typedef int32_t ints __attribute__((vector_size(4 * HALF)));

/* Bytes that are tried: from BELOW under the one that maps the largest value to 6 to 12 above it. E4M3 has eight to an octave. */
enum { BELOW = 3, N_LANES = 16, MAX_BYTE = 0x7e, TABLE = MAX_BYTE + N_LANES };

/* By byte; past the largest all is as it is for the largest. */
struct table {
    float inverse[TABLE], scale[TABLE]; /* of the decoded value */
    float sf8_sq[TABLE];
};

/* The nearest of E2M1's magnitudes: a step of 0.5 below 2, of 1 below 4, of 2 above. Adding and taking away 1.5 * 2^23 steps rounds. */
INLINE float nearest(float v) {
    float magic = v < 2 ? 0x1.8p22f : v < 4 ? 0x1.8p23f : 0x1.8p24f;
    float q = (v + magic) - magic;
    return q < 6 ? q : 6;
}

/* error[lane] = sum of weighted squared errors of the magnitudes a[16] under each scale, in units of the global scale squared. Pairs k and
 * k + 8 first, then a fixed tree. */
INLINE void lane_errors(float error[N_LANES], const float inverse[N_LANES], const float a[MOE4_BLOCK], const float weight[MOE4_BLOCK]) {
    float sum[MOE4_BLOCK][N_LANES];
    for (int k = 0; k < MOE4_BLOCK; k++)
        for (int lane = 0; lane < N_LANES; lane++) {
            float v = a[k] * inverse[lane], d = v - nearest(v);
            sum[k][lane] = d * d * weight[k];
        }
    for (int n = MOE4_BLOCK / 2; n; n /= 2)
        for (int k = 0; k < n; k++)
            for (int lane = 0; lane < N_LANES; lane++) sum[k][lane] += sum[k + n][lane];
    memcpy(error, sum[0], sizeof sum[0]);
}

/* The lane of the least error * unit. Errors are not negative, so their bits order as they do, and the last four hold the lane: what is
 * within 2^-19 counts as equal, and the smallest scale is taken. */
INLINE int least_lane(const float error[N_LANES], const float unit[N_LANES]) {
    int32_t key[N_LANES], least[N_LANES];
    for (int lane = 0; lane < N_LANES; lane += HALF) {
        floats e, u;
        memcpy(&e, error + lane, sizeof e);
        memcpy(&u, unit + lane, sizeof u);
        e *= u;
        ints k = ((ints)e & ~15) | ((ints){0, 1, 2, 3, 4, 5, 6, 7} + lane);
        memcpy(key + lane, &k, sizeof k);
    }
    for (int lane = 0; lane < HALF; lane++) least[lane] = key[lane + HALF] < key[lane] ? key[lane + HALF] : key[lane];
    for (int n = HALF / 2; n; n /= 2)
        for (int lane = 0; lane < n; lane++) least[lane] = least[lane + n] < least[lane] ? least[lane + n] : least[lane];
    return least[0] & 15;
}

/* About the nearest E4M3 byte of q >= 0: where the search begins. */
INLINE int byte_near(float q) {
    uint32_t bits;
    memcpy(&bits, &q, sizeof bits);
    int byte = q < 0x1p-6f ? (int)(q * 512 + 0.5f) : (int)((bits + (1 << 19)) >> 20) - (120 << 3);
    return byte < MAX_BYTE ? byte : MAX_BYTE;
}

INLINE uint8_t best_byte(const struct table *t, const float a[MOE4_BLOCK], const float weight[MOE4_BLOCK], float amax) {
    int centre = byte_near(amax / 6.f * t->inverse[0x38]), low = centre > BELOW + 1 ? centre - BELOW : 1; /* byte 0x38 is 1 */
    float error[N_LANES];
    lane_errors(error, t->inverse + low, a, weight);
    int best = low + least_lane(error, t->sf8_sq + low);
    return (uint8_t)(best < MAX_BYTE ? best : MAX_BYTE);
}

/* The codes of sixteen elements: to nearest, ties to the even code. A comparison that holds is -1. */
INLINE void encode(uint8_t codes[MOE4_BLOCK / 2], const float x[MOE4_BLOCK], float scale) {
    for (int half = 0; half < 2; half++) {
        floats v;
        memcpy(&v, x + HALF * half, sizeof v);
        ints negative = v < 0;
        v = (floats)((ints)(v / scale) & INT32_MAX);
        ints code = -((v > 0.25f) + (v >= 0.75f) + (v > 1.25f) + (v >= 1.75f) + (v > 2.5f) + (v >= 3.5f) + (v > 5.f)) | (negative & 8);
        code <<= (ints){0, 4, 8, 12, 16, 20, 24, 28};
        int32_t all = code[0] | code[1] | code[2] | code[3] | code[4] | code[5] | code[6] | code[7];
        for (int i = 0; i < 4; i++) codes[4 * half + i] = (uint8_t)((uint32_t)all >> 8 * i);
    }
}

INLINE float largest(const float a[MOE4_BLOCK]) {
    uint32_t bits[MOE4_BLOCK], most = 0; /* of numbers that are not negative, which they order */
    float amax;
    memcpy(bits, a, sizeof bits);
    for (int k = 0; k < MOE4_BLOCK; k++) most = bits[k] > most ? bits[k] : most;
    memcpy(&amax, &most, sizeof amax);
    return amax;
}

INLINE void search(uint8_t *codes, uint8_t *scales, const float *x, size_t rows, size_t cols, const struct table *t, const float *weight) {
    static const float ones[MOE4_BLOCK] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    for (size_t i = 0; i < rows * cols; i += MOE4_BLOCK) {
        float a[MOE4_BLOCK];
        for (int k = 0; k < MOE4_BLOCK; k++) a[k] = fabsf(x[i + k]);
        float amax = largest(a);
        uint8_t *scale = &scales[i / MOE4_BLOCK];
        uint8_t best = amax > 0 ? best_byte(t, a, weight ? weight + i % cols : ones, amax) : *scale;
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
    for (int byte = 0; byte < TABLE; byte++) {
        float sf8 = moe4_e4m3_to_float((uint8_t)(byte < MAX_BYTE ? byte : MAX_BYTE));
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
