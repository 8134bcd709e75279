/* Trials with products alone, and with the codec. */
#include <stdlib.h>

#include "soak.h"

static double squares(const float *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

/* An upper bound of what a row's rounding errors are a small part of: |x| |W| + |bias|. */
static double weight_size(moe4_ctx *ctx, const struct soak *s, const moe4_weight *w) {
    double sum = 0;
    float *row = soak_alloc(s, w->cols, sizeof *row);
    for (size_t r = 0; r < w->rows; r++) {
        if (w->dtype == MOE4_NVFP4) {
            moe4_quantize_options q = MOE4_QUANTIZE_OPTIONS_INIT;
            q.global = &w->global;
            soak_ok(s, ctx,
                    moe4_nvfp4_dequantize(ctx, row, MOE4_F32, 0, (const uint8_t *)w->data + r * w->cols / 2,
                                          w->scale + r * w->cols / MOE4_BLOCK, 1, w->cols, &q),
                    "dequantize");
        } else {
            for (size_t k = 0; k < w->cols; k++) {
                const size_t i = r * w->cols + k;
                row[k] = w->dtype == MOE4_F32    ? ((const float *)w->data)[i]
                         : w->dtype == MOE4_BF16 ? moe4_bf16_to_float(((const uint16_t *)w->data)[i])
                                                 : moe4_f16_to_float(((const uint16_t *)w->data)[i]);
            }
        }
        sum += squares(row, w->cols);
    }
    free(row);
    return sqrt(sum);
}

/* y[n_rows, N] beside the scalar one; row r of x made it. */
static void check_rows(const struct soak *s, const char *isa, const float *y, const float *scalar, const float *x, size_t n_rows, size_t N,
                       size_t K, double w_size, double bias_size) {
    for (size_t r = 0; r < n_rows; r++) {
        double difference = 0;
        for (size_t c = r * N; c < (r + 1) * N; c++) {
            if (isnan(y[c]) != isnan(scalar[c])) soak_fail(s, "%s: row %zu: %g, scalar %g", isa, r, (double)y[c], (double)scalar[c]);
            if (!isnan(y[c])) difference += ((double)y[c] - scalar[c]) * ((double)y[c] - scalar[c]);
        }
        const double x_size = sqrt(squares(x + r * K, K));
        if (isfinite(x_size) && sqrt(difference) > 2e-6 * (x_size * w_size + bias_size))
            soak_fail(s, "%s: row %zu of [%zu, %zu] x %zu is %g from the scalar row", isa, r, n_rows, N, K, sqrt(difference));
    }
}

static moe4_act choose_act(struct soak *s, moe4_dtype dtype) {
    return dtype == MOE4_NVFP4 ? (moe4_act)(MOE4_ACT_W4A16 + random_below(&s->random, 4)) : MOE4_ACT_BF16;
}

static moe4_dtype choose_dtype(struct soak *s) {
    static const moe4_dtype wide[] = {MOE4_BF16, MOE4_F16, MOE4_F32};
    return random_below(&s->random, 4) ? MOE4_NVFP4 : wide[random_below(&s->random, 3)];
}

static size_t choose_cols(struct soak *s, moe4_dtype dtype) {
    return (1 + random_below(&s->random, 60)) * (dtype == MOE4_NVFP4 ? MOE4_BLOCK : 1 + random_below(&s->random, 16));
}

static size_t choose_rows(struct soak *s, size_t macs_a_row) {
    const size_t most = 4000000 / macs_a_row + 2; /* the scalar reference's time */
    return random_below(&s->random, most < 120 ? most : 120);
}

/* ---- linear ---- */

enum { MAX_WEIGHTS = 3 };

static uint64_t run_linear(const struct soak *s, moe4_ctx *ctx, float **y, const moe4_weight *w, size_t n_weights,
                           const moe4_linear_options *o, const float *x, size_t T) {
    moe4_linear *linear;
    moe4_workspace ws;
    uint64_t n_saturated;
    soak_ok(s, ctx, moe4_linear_create(&linear, ctx, w, n_weights, o), "linear");
    soak_ok(s, ctx, moe4_linear_workspace_bytes(linear, &ws.bytes, T), "linear workspace");
    ws.data = soak_alloc(s, ws.bytes, 1);
    soak_ok(s, ctx, moe4_linear_forward(linear, (void *const *)y, &n_saturated, x, T, &ws, NULL), "linear forward");
    free(ws.data);
    moe4_linear_destroy(linear);
    return n_saturated;
}

void soak_linear(struct soak *s) {
    const moe4_dtype dtype = choose_dtype(s);
    const size_t K = choose_cols(s, dtype), n_weights = 1 + random_below(&s->random, MAX_WEIGHTS);
    moe4_weight w[MAX_WEIGHTS];
    moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
    float *y[MAX_WEIGHTS], *other[MAX_WEIGHTS], *scalar[MAX_WEIGHTS];
    double w_size[MAX_WEIGHTS], bias_size[MAX_WEIGHTS];
    uint64_t saturated = 0;
    size_t n_cols = 0;
    o.act = choose_act(s, dtype);
    for (size_t i = 0; i < n_weights; i++) {
        w[i] = soak_weight(s, dtype, 1 + random_below(&s->random, 200), K);
        n_cols += w[i].rows;
    }
    const size_t T = choose_rows(s, n_cols * K);
    const bool exact = o.act >= MOE4_ACT_STATIC && o.act <= MOE4_ACT_TOKEN && random_below(&s->random, 2) == 0;
    float *x = exact ? soak_single_blocks(s, T, K, w->input_scale) : soak_rows(s, T, K);
    for (size_t i = 0; i < n_weights; i++) {
        y[i] = soak_alloc(s, T * w[i].rows, sizeof(float));
        other[i] = soak_alloc(s, T * w[i].rows, sizeof(float));
        scalar[i] = soak_alloc(s, T * w[i].rows, sizeof(float));
        w_size[i] = weight_size(s->isa[0].ctx[0], s, &w[i]);
        bias_size[i] = w[i].bias ? sqrt(squares(w[i].bias, w[i].rows)) : 0;
    }
    for (size_t isa = 0; isa < s->n_isas; isa++) {
        const size_t side = 1 + random_below(&s->random, SOAK_SIDES - 1);
        moe4_ctx *many = s->isa[isa].ctx[side];
        const uint64_t n = run_linear(s, s->isa[isa].ctx[0], isa ? y : scalar, w, n_weights, &o, x, T);
        for (size_t done = 0; soak_again(s, side, done); done++) {
            if (run_linear(s, many, other, w, n_weights, &o, x, T) != n || (isa && n != saturated))
                soak_fail(s, "%s: linear: other saturated blocks", s->isa[isa].name);
            for (size_t i = 0; i < n_weights; i++)
                if (memcmp(isa ? y[i] : scalar[i], other[i], T * w[i].rows * sizeof(float)) != 0)
                    soak_fail(s, "%s: linear: %zu threads give other bits than one", s->isa[isa].name, moe4_ctx_n_threads(many));
        }
        saturated = n;
        for (size_t i = 0; i < n_weights; i++) {
            if (exact && isa && memcmp(y[i], scalar[i], T * w[i].rows * sizeof(float)) != 0)
                soak_fail(s, "%s: linear: rows of one block have other bits than scalar", s->isa[isa].name);
            if (isa) check_rows(s, s->isa[isa].name, y[i], scalar[i], x, T, w[i].rows, K, w_size[i], bias_size[i]);
        }
    }
    for (size_t i = 0; i < n_weights; i++) {
        free(y[i]);
        free(other[i]);
        free(scalar[i]);
        soak_weight_free(&w[i]);
    }
    free(x);
}

/* ---- grouped linear ---- */

enum { MAX_GROUPS = 6 };

static void run_grouped(const struct soak *s, moe4_ctx *ctx, float *y, const moe4_weight *w, size_t n_groups, const moe4_grouped_options *o,
                        const float *x, const int32_t *offsets, size_t n_rows) {
    moe4_grouped *grouped;
    moe4_workspace ws;
    soak_ok(s, ctx, moe4_grouped_create(&grouped, ctx, w, n_groups, o), "grouped");
    soak_ok(s, ctx, moe4_grouped_workspace_bytes(grouped, &ws.bytes, n_rows), "grouped workspace");
    ws.data = soak_alloc(s, ws.bytes, 1);
    soak_ok(s, ctx, moe4_grouped_forward(grouped, y, NULL, x, offsets, n_rows, &ws, NULL), "grouped forward");
    free(ws.data);
    moe4_grouped_destroy(grouped);
}

void soak_grouped(struct soak *s) {
    const moe4_dtype dtype = choose_dtype(s);
    const size_t K = choose_cols(s, dtype), N = 1 + random_below(&s->random, 200), n_groups = 1 + random_below(&s->random, MAX_GROUPS);
    const size_t n_rows = choose_rows(s, N * K);
    moe4_weight w[MAX_GROUPS];
    int32_t offsets[MAX_GROUPS + 1] = {0};
    moe4_grouped_options o = MOE4_GROUPED_OPTIONS_INIT;
    double w_size = 0, bias_size = 0;
    o.act = choose_act(s, dtype);
    o.x_dtype = o.y_dtype = MOE4_F32;
    for (size_t g = 0; g < n_groups; g++) {
        w[g] = soak_weight(s, dtype, N, K);
        w_size = fmax(w_size, weight_size(s->isa[0].ctx[0], s, &w[g]));
        bias_size = fmax(bias_size, w[g].bias ? sqrt(squares(w[g].bias, N)) : 0);
        offsets[g + 1] = offsets[g] + (int32_t)random_below(&s->random, n_rows - (size_t)offsets[g] + 1);
    }
    const size_t n = (size_t)offsets[n_groups]; /* rows past it are not written */
    float *x = soak_rows(s, n_rows, K), *y[3];
    for (int i = 0; i < 3; i++) y[i] = soak_alloc(s, n_rows * N, sizeof(float));
    for (size_t isa = 0; isa < s->n_isas; isa++) {
        const size_t side = 1 + random_below(&s->random, SOAK_SIDES - 1);
        moe4_ctx *many = s->isa[isa].ctx[side];
        float *own = y[isa ? 1 : 0];
        run_grouped(s, s->isa[isa].ctx[0], own, w, n_groups, &o, x, offsets, n_rows);
        for (size_t done = 0; soak_again(s, side, done); done++) {
            run_grouped(s, many, y[2], w, n_groups, &o, x, offsets, n_rows);
            if (memcmp(own, y[2], n_rows * N * sizeof(float)) != 0)
                soak_fail(s, "%s: grouped: %zu threads give other bits than one", s->isa[isa].name, moe4_ctx_n_threads(many));
        }
        if (isa) check_rows(s, s->isa[isa].name, own, y[0], x, n, N, K, w_size, bias_size);
    }
    for (size_t g = 0; g < n_groups; g++) soak_weight_free(&w[g]);
    for (int i = 0; i < 3; i++) free(y[i]);
    free(x);
}

/* ---- codec ---- */

struct quantized {
    moe4_status status;
    uint8_t *codes, *scales;
    float *global, *y;
    uint64_t n_saturated;
};

void soak_codec(struct soak *s) {
    const size_t rows = 1 + random_below(&s->random, 40), cols = MOE4_BLOCK * (1 + random_below(&s->random, 80));
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    size_t scale_bytes;
    float *x = soak_alloc(s, rows * cols, sizeof *x);
    const int kind = (int)random_below(&s->random, RANDOM_KINDS);
    for (size_t r = 0; r < rows; r++) random_row(&s->random, x + r * cols, cols, kind);
    o.recipe = (moe4_recipe)random_below(&s->random, 4);
    o.per_row = random_below(&s->random, 2) == 0;
    o.four_over_six = o.recipe == MOE4_RECIPE_MODELOPT && random_below(&s->random, 2) == 0;
    o.scale_layout = (moe4_scale_layout)random_below(&s->random, 3);
    soak_ok(s, s->isa[0].ctx[0], moe4_scales_bytes(s->isa[0].ctx[0], &scale_bytes, o.scale_layout, 1, rows, cols), "scales");
    struct quantized first = {0};
    for (size_t i = 0; i < s->n_isas * SOAK_SIDES; i++) {
        moe4_ctx *ctx = s->isa[i / SOAK_SIDES].ctx[i % SOAK_SIDES];
        struct quantized q = {.codes = soak_alloc(s, rows * cols / 2, 1),
                              .scales = soak_alloc(s, scale_bytes, 1),
                              .global = soak_alloc(s, rows, sizeof *q.global),
                              .y = soak_alloc(s, rows * cols, sizeof *q.y)};
        q.status = moe4_nvfp4_quantize(ctx, q.codes, q.scales, q.global, &q.n_saturated, x, MOE4_F32, rows, cols, 0, &o);
        if (q.status == MOE4_OK) {
            moe4_quantize_options back = o;
            back.global = q.global;
            soak_ok(s, ctx, moe4_nvfp4_dequantize(ctx, q.y, MOE4_F32, 0, q.codes, q.scales, rows, cols, &back), "dequantize");
        }
        if (i == 0) {
            first = q;
            continue;
        }
        if (q.status != first.status || q.n_saturated != first.n_saturated || memcmp(q.codes, first.codes, rows * cols / 2) != 0 ||
            memcmp(q.scales, first.scales, scale_bytes) != 0 || memcmp(q.global, first.global, rows * sizeof *q.global) != 0 ||
            memcmp(q.y, first.y, rows * cols * sizeof *q.y) != 0)
            soak_fail(s, "%s, %zu threads: quantize by recipe %d has other bytes than scalar", moe4_ctx_isa(ctx), moe4_ctx_n_threads(ctx),
                      (int)o.recipe);
        free(q.codes);
        free(q.scales);
        free(q.global);
        free(q.y);
    }
    free(first.codes);
    free(first.scales);
    free(first.global);
    free(first.y);
    free(x);
}
