/* A float's bits as a number, and back. */
#ifndef MOE4_BITS_H
#define MOE4_BITS_H

#include <stdint.h>
#include <string.h>

static inline uint32_t moe4_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float moe4_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

#endif
