#include "quantize/difference.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE_ELEMENTS = 1 << 16, PIECE_BYTES = 1 << 20 };

/* Some rows of one side's matrix, in memory. */
struct piece {
    const struct quantize_side *side;
    const moe4_weight *whole;
    moe4_weight w;
    void *data, *scale;
    float *values;
};

static size_t row_bytes(const moe4_weight *w) {
    return w->dtype == MOE4_NVFP4 ? w->cols / 2 : w->cols * moe4_dtype_bytes(w->dtype);
}

/* Bytes of the scales of one row, or of the rows of one block. */
static size_t scale_row_bytes(const moe4_weight *w) {
    if (w->dtype == MOE4_NVFP4) return w->cols / MOE4_BLOCK;
    return w->dtype == MOE4_F8_E4M3 ? ((w->cols - 1) / w->scale_cols + 1) * moe4_dtype_bytes(w->scale_dtype) : 0;
}

/* A piece with scales of blocks has rows of one block. */
static size_t rows_from(const moe4_weight *w, size_t row, size_t most) {
    const size_t block = w->dtype == MOE4_F8_E4M3 && w->scale_rows > 1 ? w->scale_rows : w->rows, left = block - row % block;
    return left < most ? left : most;
}

static bool open_piece(struct piece *p, size_t most_rows) {
    const size_t n = most_rows * p->whole->cols;
    p->data = malloc(most_rows * row_bytes(p->whole));
    p->scale = malloc(most_rows * scale_row_bytes(p->whole) + 1);
    p->values = malloc(n * sizeof *p->values);
    return p->data && p->scale && p->values;
}

static void close_piece(struct piece *p) {
    free(p->data);
    free(p->scale);
    free(p->values);
}

static moe4_status read_piece(moe4_ctx *ctx, struct piece *p, size_t row, size_t n, char why[static QUANTIZE_DIFFERENCE_BYTES]) {
    const moe4_weight *w = p->whole;
    const size_t one = row_bytes(w), one_scale = scale_row_bytes(w);
    const bool blocks = w->dtype == MOE4_F8_E4M3 && w->scale_rows > 1;
    p->w = *w;
    p->w.rows = n;
    p->w.data = p->data;
    if (w->scale) p->w.scale = p->scale;
    moe4_status status = quantize_mapped_read(&p->side->files, p->data, (const char *)w->data + row * one, n * one, why);
    if (status == MOE4_OK && one_scale)
        status = quantize_mapped_read(&p->side->files, p->scale, w->scale + (blocks ? row / w->scale_rows : row) * one_scale,
                                      (blocks ? 1 : n) * one_scale, why);
    if (status != MOE4_OK) return status;
    status = moe4_weight_values(ctx, p->values, &p->w, 0, n);
    if (status != MOE4_OK) snprintf(why, QUANTIZE_DIFFERENCE_BYTES, "from row %zu on: %.300s", row, moe4_ctx_error(ctx));
    return status;
}

static void add_errors(struct quantize_difference *d, const float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const double error = (double)x[i] - y[i];
        d->error_sq += error * error;
        d->norm_sq += (double)y[i] * y[i];
    }
}

static void add_bytes(struct quantize_difference *d, const moe4_weight *a, const moe4_weight *b) {
    const uint8_t *x = a->data, *y = b->data;
    const size_t n = a->rows * a->cols;
    for (size_t i = 0; i < n / 2; i++) {
        const uint8_t differs = x[i] ^ y[i];
        d->n_codes += (differs & 0x0f) != 0;
        d->n_codes += (differs & 0xf0) != 0;
    }
    for (size_t i = 0; i < n / MOE4_BLOCK; i++) d->n_scales += a->scale[i] != b->scale[i];
}

moe4_status quantize_difference_add(moe4_ctx *ctx, struct quantize_difference *d, const struct quantize_side *side_a, const moe4_weight *a,
                                    const struct quantize_side *side_b, const moe4_weight *b, char why[static QUANTIZE_DIFFERENCE_BYTES]) {
    const size_t step = a->cols < PIECE_ELEMENTS ? PIECE_ELEMENTS / a->cols : 1, most = step < a->rows ? step : a->rows;
    struct piece x = {.side = side_a, .whole = a}, y = {.side = side_b, .whole = b};
    const bool fits = open_piece(&x, most), both_fit = open_piece(&y, most) && fits;
    moe4_status status = both_fit ? MOE4_OK : MOE4_ERROR_MEMORY;
    snprintf(why, QUANTIZE_DIFFERENCE_BYTES, "%s", moe4_status_text(status));
    d->both_nvfp4 = a->dtype == MOE4_NVFP4 && b->dtype == MOE4_NVFP4;
    for (size_t row = 0, n; status == MOE4_OK && row < a->rows; row += n) {
        n = rows_from(a, row, rows_from(b, row, a->rows - row < most ? a->rows - row : most));
        status = read_piece(ctx, &x, row, n, why);
        if (status == MOE4_OK) status = read_piece(ctx, &y, row, n, why);
        if (status != MOE4_OK) break;
        add_errors(d, x.values, y.values, n * a->cols);
        if (d->both_nvfp4) add_bytes(d, &x.w, &y.w);
    }
    close_piece(&x);
    close_piece(&y);
    return status;
}

moe4_status quantize_same_bytes(bool *same_ret, const struct quantize_side *side_a, const moe4_tensor *a,
                                const struct quantize_side *side_b, const moe4_tensor *b, char why[static QUANTIZE_DIFFERENCE_BYTES]) {
    char *x = malloc(PIECE_BYTES), *y = malloc(PIECE_BYTES);
    moe4_status status = x && y ? MOE4_OK : MOE4_ERROR_MEMORY;
    snprintf(why, QUANTIZE_DIFFERENCE_BYTES, "%s", moe4_status_text(status));
    *same_ret = true;
    for (size_t at = 0; status == MOE4_OK && *same_ret && at < a->bytes; at += PIECE_BYTES) {
        const size_t n = a->bytes - at < PIECE_BYTES ? a->bytes - at : PIECE_BYTES;
        status = quantize_mapped_read(&side_a->files, x, (const char *)a->data + at, n, why);
        if (status == MOE4_OK) status = quantize_mapped_read(&side_b->files, y, (const char *)b->data + at, n, why);
        if (status == MOE4_OK) *same_ret = memcmp(x, y, n) == 0;
    }
    free(x);
    free(y);
    return status;
}
