/* The codec in plain loops: the executable form of docs/numerics.md. Other ISAs give the same bits. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "../bits.h"
#include "kernels.h"

static void widen_row(float *dst, const void *src, moe4_dtype dtype, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t half;
        if (dtype == MOE4_F32) {
            memcpy(&dst[i], (const char *)src + 4 * i, 4);
        } else {
            memcpy(&half, (const char *)src + 2 * i, 2);
            dst[i] = dtype == MOE4_BF16 ? moe4_bf16_to_float(half) : moe4_f16_to_float(half);
        }
    }
}

static void narrow_row(void *dst, moe4_dtype dtype, const float *src, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (dtype == MOE4_F32) {
            memcpy((char *)dst + 4 * i, &src[i], 4);
        } else {
            uint16_t half = dtype == MOE4_BF16 ? moe4_bf16_from_float(src[i]) : moe4_f16_from_float(src[i]);
            memcpy((char *)dst + 2 * i, &half, 2);
        }
    }
}

static float amax_row(const float *x, size_t n) {
    uint32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t magnitude = moe4_bits(x[i]) & 0x7fffffff;
        if (magnitude > most) most = magnitude;
    }
    return moe4_float(most);
}

/* ---- quantize ---- */

/* The block scale before rounding, from the block's amax b. */
static float block_q(float b, const struct moe4_quantizer *z) {
    float q = 0;
    switch (z->recipe) {
    case MOE4_RECIPE_MODELOPT:
        q = b / (6.f * z->global);
        if (q == 0) q = 1;
        break;
    case MOE4_RECIPE_MODELOPT_STATIC:
        q = b / 6.f;
        if (q == 0) q = 1;
        q = q * 448.f / (z->amax / 6.f);
        break;
    case MOE4_RECIPE_ACTIVATION: q = b * (z->global * (1.f / 6.f)); break;
    case MOE4_RECIPE_COMPRESSED_TENSORS: q = z->global * (b / 6.f); break;
    }
    return q;
}

static uint8_t block_scale(float q, moe4_recipe recipe) {
    if (recipe == MOE4_RECIPE_MODELOPT || recipe == MOE4_RECIPE_MODELOPT_STATIC) q = q < 0x1p-9f ? 0x1p-9f : q;
    uint8_t scale = moe4_e4m3_from_float(q);
    return recipe == MOE4_RECIPE_COMPRESSED_TENSORS && scale == 0 ? 0x20 : scale;
}

static uint8_t magnitude_code(float x) {
    return moe4_e2m1_from_float(fabsf(x));
}

static uint8_t element_code(float x, float sf8, const struct moe4_quantizer *z) {
    switch (z->recipe) {
    case MOE4_RECIPE_MODELOPT:
    case MOE4_RECIPE_MODELOPT_STATIC: return (uint8_t)(magnitude_code(x / (sf8 * z->global)) | (x < 0 ? 8 : 0));
    case MOE4_RECIPE_COMPRESSED_TENSORS: return (uint8_t)(magnitude_code(x / (sf8 / z->global)) | (x < 0 ? 8 : 0));
    case MOE4_RECIPE_ACTIVATION: break;
    }
    if (sf8 == 0) return 0;
    float factor = 1.f / (sf8 * (1.f / z->global));
    if (factor > FLT_MAX) factor = FLT_MAX;
    return moe4_e2m1_from_float(x * factor);
}

static void block_codes(uint8_t codes[MOE4_BLOCK / 2], const float x[MOE4_BLOCK], uint8_t scale, const struct moe4_quantizer *z) {
    float sf8 = moe4_e4m3_to_float(scale);
    for (size_t k = 0; k < MOE4_BLOCK; k += 2) codes[k / 2] = (uint8_t)(element_code(x[k], sf8, z) | element_code(x[k + 1], sf8, z) << 4);
}

/* Sum of the squared errors of the decoded block, in fp64, where a decoded value is exact. */
static double block_error(const uint8_t codes[MOE4_BLOCK / 2], const float x[MOE4_BLOCK], uint8_t scale, float global) {
    double sum = 0;
    for (size_t k = 0; k < MOE4_BLOCK; k++) {
        uint8_t code = codes[k / 2] >> 4 * (k % 2) & 15;
        double error = x[k] - (double)moe4_e2m1_to_float(code) * moe4_e4m3_to_float(scale) * global;
        sum += error * error;
    }
    return sum;
}

static uint64_t quantize_row(uint8_t *codes, uint8_t *scales, const float *x, size_t n, const struct moe4_quantizer *z) {
    uint64_t n_saturated = 0;
    for (size_t k = 0; k < n; k += MOE4_BLOCK, codes += MOE4_BLOCK / 2, scales++) {
        float q = block_q(amax_row(x + k, MOE4_BLOCK), z);
        *scales = block_scale(q, z->recipe);
        block_codes(codes, x + k, *scales, z);
        if (z->four_over_six) {
            uint8_t wider[MOE4_BLOCK / 2], scale = block_scale(1.5f * q, z->recipe);
            block_codes(wider, x + k, scale, z);
            if (block_error(wider, x + k, scale, z->global) < block_error(codes, x + k, *scales, z->global)) {
                memcpy(codes, wider, sizeof wider);
                *scales = scale;
                q = 1.5f * q;
            }
        }
        n_saturated += q > 464.f;
    }
    return n_saturated;
}

static void dequant_row(float *dst, const uint8_t *codes, const uint8_t *scales, size_t n, float factor) {
    for (size_t k = 0; k < n; k++) {
        uint8_t code = codes[k / 2] >> 4 * (k % 2) & 15;
        dst[k] = moe4_e2m1_to_float(code) * moe4_e4m3_to_float(scales[k / MOE4_BLOCK]) * factor;
    }
}

/* The product is exact in fp64; the quotient has bits enough that fp32 rounded to odd comes out the same. */
static void scale_row_to_odd(float *y, float a, int divides, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const double d = divides ? (double)y[i] / a : (double)y[i] * a;
        const float f = (float)d;
        uint32_t bits = moe4_bits(f);
        if ((double)f != d) {
            if (fabs((double)f) > fabs(d)) bits--; /* towards zero */
            bits |= 1;
        }
        y[i] = moe4_float(bits);
    }
}

void moe4_kernels_codec_scalar(struct moe4_kernels *k) {
    k->widen_row = widen_row;
    k->narrow_row = narrow_row;
    k->amax_row = amax_row;
    k->quantize_row = quantize_row;
    k->dequant_row = dequant_row;
    k->scale_row_to_odd = scale_row_to_odd;
}
