/* The scale byte of each block by search. The plain recipes map a block's largest value to 6; another scale often leaves less error over
 * the sixteen, and costs nothing to store. Given a scale the nearest code is the best, so trying the bytes around the plain one is all. */
#include "quantize/block.h"

#include <math.h>
#include <string.h>

/* Bytes tried below and above the one that maps the largest value to 6. E4M3 has eight to an octave. */
enum { BELOW = 3, ABOVE = 9, MAX_BYTE = 0x7e };

/* Sum of weighted squared errors of the magnitudes a[16], already divided by the scale, in units of the scale squared. Lanes first, then
 * a fixed tree: the same bits however it is compiled. */
static float block_error(const float a[MOE4_BLOCK], const float weight[MOE4_BLOCK], float inverse) {
    float e[MOE4_BLOCK];
    for (int k = 0; k < MOE4_BLOCK; k++) {
        float v = a[k] * inverse;
        float q = (v > 0.25f ? 0.5f : 0.f) + (v > 0.75f ? 0.5f : 0.f) + (v > 1.25f ? 0.5f : 0.f) + (v > 1.75f ? 0.5f : 0.f) +
                  (v > 2.5f ? 1.f : 0.f) + (v > 3.5f ? 1.f : 0.f) + (v > 5.f ? 2.f : 0.f);
        float d = v - q;
        e[k] = d * d * weight[k];
    }
    for (int n = MOE4_BLOCK / 2; n; n /= 2)
        for (int k = 0; k < n; k++) e[k] += e[k + n];
    return e[0];
}

static float decode_scale(uint8_t byte, float global, bool divides) {
    float sf8 = moe4_e4m3_to_float(byte);
    return divides ? sf8 / global : sf8 * global;
}

static uint8_t element_code(float x, float scale) {
    return (uint8_t)(moe4_e2m1_from_float(fabsf(x / scale)) | (x < 0 ? 8 : 0));
}

struct table {
    float scale[MAX_BYTE + 1], inverse[MAX_BYTE + 1];
};

static uint8_t best_byte(const struct table *t, const float a[MOE4_BLOCK], const float weight[MOE4_BLOCK], uint8_t plain, float amax) {
    uint8_t centre = moe4_e4m3_from_float(amax / 6.f * t->inverse[0x38]); /* byte 0x38 is 1 */
    int low = centre > BELOW + 1 ? centre - BELOW : 1, high = centre + ABOVE < MAX_BYTE ? centre + ABOVE : MAX_BYTE;
    float least = block_error(a, weight, t->inverse[plain]) * t->scale[plain] * t->scale[plain];
    uint8_t best = plain;
    for (int byte = low; byte <= high; byte++) {
        float error = block_error(a, weight, t->inverse[byte]) * t->scale[byte] * t->scale[byte];
        if (error < least) {
            least = error;
            best = (uint8_t)byte;
        }
    }
    return best;
}

void quantize_search(uint8_t *codes, uint8_t *scales, const float *x, size_t rows, size_t cols, float global, bool divides,
                     const float *weight) {
    static const float ones[MOE4_BLOCK] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    struct table t;
    for (int byte = 0; byte <= MAX_BYTE; byte++) {
        t.scale[byte] = decode_scale((uint8_t)byte, global, divides);
        t.inverse[byte] = t.scale[byte] > 0 ? 1.f / t.scale[byte] : 0.f;
    }
    for (size_t i = 0; i < rows * cols; i += MOE4_BLOCK) {
        float a[MOE4_BLOCK], amax = 0;
        for (int k = 0; k < MOE4_BLOCK; k++) {
            a[k] = fabsf(x[i + k]);
            amax = a[k] > amax ? a[k] : amax;
        }
        uint8_t *scale = &scales[i / MOE4_BLOCK];
        uint8_t best = amax > 0 ? best_byte(&t, a, weight ? weight + i % cols : ones, *scale, amax) : *scale;
        if (best == *scale) continue;
        *scale = best;
        for (int k = 0; k < MOE4_BLOCK; k += 2)
            codes[(i + k) / 2] = (uint8_t)(element_code(x[i + k], t.scale[best]) | element_code(x[i + k + 1], t.scale[best]) << 4);
    }
}
