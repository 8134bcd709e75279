#include "quantize/recast.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BIAS = 127, NAN_BYTE = 255, BLOCK_BYTES = QUANTIZE_MX_BLOCK / 2, HIGHEST = 8, LOWEST = -9 };

/* Codes and scale bytes of a piece, in one allocation that the caller frees. */
static moe4_status read_both(const struct quantize_plan *plan, const struct quantize_piece *piece, uint8_t **codes_ret,
                             uint8_t **scales_ret, char *why) {
    const struct quantize_item *item = piece->item;
    size_t n_codes = piece->n * item->cols / 2, n_scales = piece->n * item->cols / QUANTIZE_MX_BLOCK;
    *codes_ret = malloc(n_codes + n_scales);
    if (!*codes_ret) return MOE4_ERROR_MEMORY;
    *scales_ret = *codes_ret + n_codes;
    moe4_status status = quantize_view_read(plan, &item->values, *codes_ret, piece->row, piece->n, item->cols / 2, why);
    if (status == MOE4_OK)
        status = quantize_view_read(plan, &item->scales, *scales_ret, piece->row, piece->n, item->cols / QUANTIZE_MX_BLOCK, why);
    return status;
}

static bool is_zero(const uint8_t *codes) {
    uint8_t any = 0;
    for (int i = 0; i < BLOCK_BYTES; i++) any |= codes[i] & 0x77; /* all but the signs */
    return !any;
}

moe4_status quantize_recast_amax(const struct quantize_plan *plan, const struct quantize_piece *piece, uint32_t *amax_ret, char *why) {
    uint8_t *codes, *scales;
    moe4_status status = read_both(plan, piece, &codes, &scales, why);
    *amax_ret = 0;
    for (size_t b = 0; status == MOE4_OK && b < piece->n * piece->item->cols / QUANTIZE_MX_BLOCK; b++) {
        uint32_t amax = scales[b] == NAN_BYTE ? QUANTIZE_MX_NAN : is_zero(codes + b * BLOCK_BYTES) ? 0 : scales[b] + 1u;
        *amax_ret = amax > *amax_ret ? amax : *amax_ret;
    }
    free(codes);
    return status;
}

int quantize_recast_global(uint32_t amax) {
    int c = amax ? (int)amax - 1 - BIAS - HIGHEST : 0;
    return c < -126 ? -126 : c; /* a normal number, and so is its inverse */
}

/* E4M3 of 2^e, LOWEST <= e <= HIGHEST. */
static uint8_t power(int e) {
    return (uint8_t)(e >= -6 ? (e + 7) << 3 : 1 << (e - LOWEST));
}

/* A block that is smaller than the scales reach: codes again, under the smallest scale. */
static void round_block(uint8_t *codes, int below, struct quantize_recast_loss *loss, float scale) {
    bool exact = true;
    for (int i = 0; i < QUANTIZE_MX_BLOCK; i++) {
        int shift = i % 2 * 4;
        uint8_t code = codes[i / 2] >> shift & 15;
        float was = moe4_e2m1_to_float(code);
        uint8_t now = moe4_e2m1_from_float(ldexpf(was, below));
        double error = ((double)was - ldexp(moe4_e2m1_to_float(now), -below)) * scale;
        codes[i / 2] = (uint8_t)((codes[i / 2] & 0xf0 >> shift) | now << shift);
        exact &= error == 0;
        loss->error_sq += error * error;
    }
    loss->n_inexact += !exact;
}

static double block_norm(const uint8_t *codes, float scale) {
    double sum = 0;
    for (int i = 0; i < QUANTIZE_MX_BLOCK; i++) {
        double v = moe4_e2m1_to_float(codes[i / 2] >> i % 2 * 4 & 15);
        sum += v * v;
    }
    return sum * scale * scale;
}

moe4_status quantize_recast(const struct quantize_plan *plan, const struct quantize_piece *piece, uint8_t *codes, uint8_t *scales, int c,
                            struct quantize_recast_loss *loss, char *why) {
    uint8_t *in, *exponents;
    size_t n_blocks = piece->n * piece->item->cols / QUANTIZE_MX_BLOCK;
    moe4_status status = read_both(plan, piece, &in, &exponents, why);
    if (status == MOE4_OK) memcpy(codes, in, n_blocks * BLOCK_BYTES);
    for (size_t b = 0; status == MOE4_OK && b < n_blocks; b++) {
        int e = exponents[b] - BIAS - c;
        uint8_t *block = codes + b * BLOCK_BYTES;
        bool zero = is_zero(block);
        if (e < LOWEST && !zero) round_block(block, e - LOWEST, loss, ldexpf(1, exponents[b] - BIAS));
        if (!zero) loss->norm_sq += block_norm(in + b * BLOCK_BYTES, ldexpf(1, exponents[b] - BIAS));
        scales[2 * b] = scales[2 * b + 1] = power(e < LOWEST ? LOWEST : e > HIGHEST ? HIGHEST : e); /* above: zeros only */
    }
    loss->n_blocks += n_blocks;
    free(in);
    return status;
}

moe4_status quantize_recast_floats(const struct quantize_plan *plan, const struct quantize_piece *piece, float *x, char *why) {
    uint8_t *codes, *scales;
    moe4_status status = read_both(plan, piece, &codes, &scales, why);
    for (size_t i = 0; status == MOE4_OK && i < piece->n * piece->item->cols; i++) {
        uint8_t byte = scales[i / QUANTIZE_MX_BLOCK];
        float v = moe4_e2m1_to_float(codes[i / 2] >> i % 2 * 4 & 15);
        x[i] = byte == NAN_BYTE ? NAN : ldexpf(v, byte - BIAS);
    }
    free(codes);
    return status;
}
