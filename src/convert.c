/* One number between fp32 and E2M1, E4M3, BF16 and F16. Integer arithmetic only, so that no floating-point setting of the caller
 * matters. */
#include "bits.h"
#include "moe4.h"

/* m / 2^shift to nearest, ties to even. */
static uint32_t shift_rne(uint32_t m, unsigned shift) {
    if (shift == 0) return m;
    if (shift > 25) return 0; /* m < 2^24: less than half */
    uint32_t odd = m >> shift & 1;
    return (m + (1u << (shift - 1)) - 1 + odd) >> shift;
}

/* A finite fp32 magnitude (its bits) as a float of `mantissa` bits with this exponent bias, to nearest even, subnormals included. What
 * exceeds the format runs on past its largest code. */
static uint32_t round_magnitude(uint32_t bits, unsigned mantissa, unsigned bias) {
    unsigned exponent = bits >> 23, least_normal = 128 - bias; /* exponents as fp32 writes them */
    if (exponent >= least_normal) return shift_rne(bits, 23 - mantissa) - ((127 - bias) << mantissa);
    if (exponent == 0) return 0; /* zero or an fp32 subnormal, far below half of any format's least */
    return shift_rne((bits & 0x7fffff) | 0x800000, 23 - mantissa + least_normal - exponent);
}

/* The value of a magnitude code of such a format. */
static float value_of(uint32_t code, unsigned mantissa, unsigned bias) {
    uint32_t exponent = code >> mantissa, fraction = code & ((1u << mantissa) - 1);
    if (exponent) return moe4_float((code << (23 - mantissa)) + ((127 - bias) << 23));
    unsigned shift = 0; /* a subnormal is a normal number in fp32: move its leading bit to the implicit place */
    if (!fraction) return 0;
    while (!(fraction >> mantissa)) fraction <<= 1, shift++;
    return moe4_float(((128 - bias - shift) << 23) + ((fraction & ((1u << mantissa) - 1)) << (23 - mantissa)));
}

static float with_sign(float magnitude, uint32_t sign) {
    return moe4_float(moe4_bits(magnitude) | (sign ? 0x80000000 : 0));
}

uint8_t moe4_e2m1_from_float(float x) {
    uint32_t bits = moe4_bits(x), magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 7; /* NaN */
    uint32_t code = magnitude > 0x40c00000 ? 7 : round_magnitude(magnitude, 1, 1);
    return (uint8_t)(code | (bits >> 31 << 3));
}

float moe4_e2m1_to_float(uint8_t code) {
    return with_sign(value_of(code & 7, 1, 1), code & 8);
}

uint8_t moe4_e4m3_from_float(float x) {
    uint32_t bits = moe4_bits(x), magnitude = bits & 0x7fffffff, code;
    if (magnitude > 0x7f800000) {
        code = 0x7f; /* NaN */
    } else {
        code = magnitude > 0x43e00000 ? 0x7e : round_magnitude(magnitude, 3, 7);
    }
    return (uint8_t)(code | (bits >> 31 << 7));
}

float moe4_e4m3_to_float(uint8_t byte) {
    if ((byte & 0x7f) == 0x7f) return with_sign(moe4_float(0x7fc00000), byte & 0x80);
    return with_sign(value_of(byte & 0x7f, 3, 7), byte & 0x80);
}

uint16_t moe4_bf16_from_float(float x) {
    uint32_t bits = moe4_bits(x), magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* a quiet NaN, what is left of its payload kept */
    return (uint16_t)(shift_rne(magnitude, 16) | (bits >> 16 & 0x8000));
}

float moe4_bf16_to_float(uint16_t bits) {
    return moe4_float((uint32_t)bits << 16);
}

uint16_t moe4_f16_from_float(float x) {
    uint32_t bits = moe4_bits(x), magnitude = bits & 0x7fffffff, code;
    if (magnitude > 0x7f800000) {
        code = 0x7e00 | (magnitude >> 13 & 0x3ff);
    } else {
        code = magnitude >= 0x47800000 ? 0x7c00 : round_magnitude(magnitude, 10, 15); /* from 2^16 on: infinity */
    }
    return (uint16_t)(code | (bits >> 16 & 0x8000));
}

float moe4_f16_to_float(uint16_t bits) {
    uint32_t code = bits & 0x7fff;
    if (code < 0x7c00) return with_sign(value_of(code, 10, 15), bits & 0x8000);
    uint32_t fraction = code & 0x3ff;
    return with_sign(moe4_float(0x7f800000 | (fraction ? 0x400000 : 0) | fraction << 13), bits & 0x8000);
}
