/* The products in plain loops: the reference. Rows are fp32; weights are read where they lie, each decoded once for all rows. */
#include <string.h>

#include "kernels.h"
#include "rows.h"

enum { CHUNK = 256 };

/* out[0..n) = W[col][k0..k0+n), exact in fp32, without the global scale. */
static void decode(float *out, const moe4_weight *w, size_t col, size_t k0, size_t n) {
    const uint8_t *codes = w->data;
    size_t at = col * w->cols + k0;
    for (size_t i = 0; i < n; i++) {
        uint8_t code = (uint8_t)(codes[(at + i) / 2] >> 4 * (i % 2));
        out[i] = moe4_e2m1_to_float(code & 15) * moe4_e4m3_to_float(w->scale[(at + i) / MOE4_BLOCK]);
    }
}

static void widen(float *out, const moe4_weight *w, size_t col, size_t k0, size_t n) {
    const char *data = w->data;
    size_t at = col * w->cols + k0;
    for (size_t i = 0; i < n; i++) {
        uint16_t half;
        if (w->dtype == MOE4_F32) {
            memcpy(&out[i], data + 4 * (at + i), 4);
        } else {
            memcpy(&half, data + 2 * (at + i), 2);
            out[i] = w->dtype == MOE4_BF16 ? moe4_bf16_to_float(half) : moe4_f16_to_float(half);
        }
    }
}

static void gemm(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0, size_t n_cols,
                 const void *next, void *scratch) {
    (void)scratch;
    (void)next;
    float chunk[CHUNK];
    size_t K = w->w.cols;
    for (size_t j = 0; j < n_cols; j++) {
        for (size_t m = 0; m < n_rows; m++) y[m * y_ld + j] = 0;
        for (size_t k0 = 0; k0 < K; k0 += CHUNK) {
            size_t n = K - k0 < CHUNK ? K - k0 : CHUNK;
            (w->w.dtype == MOE4_NVFP4 ? decode : widen)(chunk, &w->w, col0 + j, k0, n);
            for (size_t m = 0; m < n_rows; m++) {
                const float *x = (const float *)rows[m] + k0;
                float sum = y[m * y_ld + j];
                for (size_t k = 0; k < n; k++) sum += x[k] * chunk[k];
                y[m * y_ld + j] = sum;
            }
        }
    }
}

static void add_scaled_row(float *y, const float *x, float weight, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] += weight * x[i];
}

static void scale_row(float *y, float a, float b, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = y[i] * a * b;
}

static const struct moe4_gemm scalar = {
    .name = "fp32, scalar",
    .tile_cols = 1,
    .packed_bytes = moe4_in_place,
    .row_bytes = moe4_fp32_row_bytes,
    .pack_row = moe4_fp32_pack_row,
    .pack_codes = moe4_fp32_pack_codes,
    .gemm = gemm,
};

void moe4_kernels_gemm_scalar(struct moe4_kernels *k) {
    k->add_scaled_row = add_scaled_row;
    k->scale_row = scale_row;
    k->w4a4 = k->w4a16 = k->wide = &scalar;
}
