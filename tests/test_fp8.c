/* FP8 matrices: their values, and that every object which takes one computes what it computes from those values. */
#include "reference.h"

enum { N = 150, K = 208, T = 3 };

struct shape {
    moe4_dtype dtype;
    size_t rows, cols; /* of a block */
};
static const struct shape shapes[] = {{MOE4_F32, 128, 128}, {MOE4_F8_E8M0, 32, 32}, {MOE4_F32, N, K},
                                      {MOE4_BF16, 1, K},    {MOE4_F16, N, 1},       {MOE4_F8_E8M0, 128, 64}};
enum { N_SHAPES = sizeof shapes / sizeof *shapes, MAX_SCALES = N * K };

static uint8_t bytes[N * K], scales[MAX_SCALES * 4 + 1];

/* Random bytes at odd addresses, and the values by plain arithmetic. */
static moe4_weight make(const struct shape *s, float *values) {
    uint8_t *at = scales + 1;
    size_t per_row = (K + s->cols - 1) / s->cols, n = (N + s->rows - 1) / s->rows * per_row;
    static float factor[MAX_SCALES];
    for (size_t i = 0; i < n; i++) {
        float f = fabsf(ref_normal()) + 0.01f;
        uint16_t half = s->dtype == MOE4_BF16 ? moe4_bf16_from_float(f) : moe4_f16_from_float(f);
        uint8_t power = (uint8_t)(115 + ref_random() % 20);
        if (s->dtype == MOE4_F32) memcpy(at + 4 * i, &f, 4);
        if (s->dtype == MOE4_BF16 || s->dtype == MOE4_F16) memcpy(at + 2 * i, &half, 2);
        if (s->dtype == MOE4_F8_E8M0) at[i] = power;
        factor[i] = s->dtype == MOE4_F32       ? f
                    : s->dtype == MOE4_F8_E8M0 ? ldexpf(1, power - 127)
                    : s->dtype == MOE4_BF16    ? moe4_bf16_to_float(half)
                                               : moe4_f16_to_float(half);
    }
    for (size_t i = 0; i < N * K; i++) {
        bytes[i] = (uint8_t)(ref_random() % 0x7f | (ref_random() & 0x80));
        values[i] = moe4_e4m3_to_float(bytes[i]) * factor[i / K / s->rows * per_row + i % K / s->cols];
    }
    return (moe4_weight){.dtype = MOE4_F8_E4M3,
                         .rows = N,
                         .cols = K,
                         .data = bytes,
                         .scale = at,
                         .scale_dtype = s->dtype,
                         .scale_rows = s->rows,
                         .scale_cols = s->cols};
}

static moe4_weight plain(const float *values) {
    return (moe4_weight){.dtype = MOE4_F32, .rows = N, .cols = K, .data = values};
}

static moe4_ctx *ctx;
static float values[N * K], x[T * K];

static void forward_linear(float *y, const moe4_weight *w) {
    moe4_linear *l;
    moe4_workspace ws;
    OK(ctx, moe4_linear_create(&l, ctx, w, 1, NULL));
    OK(ctx, moe4_linear_workspace_bytes(l, &ws.bytes, T));
    ws.data = aligned_alloc(64, ws.bytes);
    OK(ctx, moe4_linear_forward(l, (void *[]){y}, NULL, x, T, &ws, NULL));
    free(ws.data);
    moe4_linear_destroy(l);
}

static void forward_grouped(float *y, const moe4_weight *w) {
    moe4_grouped *g;
    moe4_workspace ws;
    moe4_grouped_options o = MOE4_GROUPED_OPTIONS_INIT;
    o.x_dtype = o.y_dtype = MOE4_F32;
    OK(ctx, moe4_grouped_create(&g, ctx, (moe4_weight[]){*w, *w}, 2, &o));
    OK(ctx, moe4_grouped_workspace_bytes(g, &ws.bytes, T));
    ws.data = aligned_alloc(64, ws.bytes);
    OK(ctx, moe4_grouped_forward(g, y, NULL, x, (int32_t[]){0, 1, T}, T, &ws, NULL));
    free(ws.data);
    moe4_grouped_destroy(g);
}

/* Two routed experts, one of them put in later, and a shared one. */
static void forward_moe(float *y, const moe4_weight *w, const moe4_weight *down) {
    moe4_moe *m;
    moe4_workspace ws;
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    const moe4_expert e = {*w, *w, *down};
    o.n_experts = 2;
    o.top_k = 1;
    o.shared = &e;
    o.x_dtype = o.y_dtype = MOE4_F32;
    OK(ctx, moe4_moe_create(&m, ctx, (moe4_expert[]){e, e}, &o));
    OK(ctx, moe4_moe_replace_expert(m, 1, &e));
    moe4_expert bad = e;
    bad.up.rows--;
    assert_int_equal(moe4_moe_replace_expert(m, 1, &bad), MOE4_ERROR_ARGUMENT);
    OK(ctx, moe4_moe_workspace_bytes(m, &ws.bytes, T));
    ws.data = aligned_alloc(64, ws.bytes);
    OK(ctx, moe4_moe_forward(m, y, x, (int32_t[]){0, 1, 1}, (float[]){1, 0.5f, 2}, T, &ws, NULL));
    free(ws.data);
    moe4_moe_destroy(m);
}

static void test_values_and_products(void **state) {
    (void)state;
    moe4_weight down = ref_random_weight(MOE4_BF16, K, N);
    for (size_t i = 0; i < T * K; i++) x[i] = ref_normal();
    for (size_t s = 0; s < N_SHAPES; s++) {
        static float got[N * K], want_y[T * K], y[T * K];
        moe4_weight w = make(&shapes[s], values), wide = plain(values);
        OK(ctx, moe4_weight_values(ctx, got, &w, 0, N));
        assert_memory_equal(got, values, sizeof got);
        OK(ctx, moe4_weight_values(ctx, got, &w, N - 2, 2));
        assert_memory_equal(got, values + (N - 2) * K, 2 * K * sizeof *got);
        forward_linear(want_y, &wide);
        forward_linear(y, &w);
        /* kept in bf16 the sums may be taken in another order */
        for (size_t i = 0; i < T * N; i++)
            if (!(fabsf(y[i] - want_y[i]) <= 1e-3f * (1 + fabsf(want_y[i])))) fail_msg("shape %zu: %g, want %g", s, y[i], want_y[i]);
        bool exact = shapes[s].dtype != MOE4_F8_E8M0;
        if (exact) assert_memory_equal(y, want_y, T * N * sizeof *y);
        forward_grouped(want_y, &wide);
        forward_grouped(y, &w);
        if (exact) assert_memory_equal(y, want_y, T * N * sizeof *y);
        forward_moe(want_y, &wide, &down);
        forward_moe(y, &w, &down);
        double error = 0, norm = 0;
        for (size_t i = 0; i < T * K; i++) {
            error += ((double)y[i] - want_y[i]) * ((double)y[i] - want_y[i]);
            norm += (double)want_y[i] * want_y[i];
        }
        assert_true(norm > 0 && error <= 1e-10 * norm);
    }
    ref_free_weight(&down);
}

/* Powers of two keep every value in bf16; the smallest and largest ones too. */
static void test_extremes(void **state) {
    (void)state;
    static const uint8_t all[] = {0x01, 0x08, 0x38, 0x7e, 0x80, 0x81, 0xfe, 0x00};
    float y[16];
    for (int power = 0; power < 255; power++) {
        uint8_t scale = (uint8_t)power;
        moe4_weight w = {.dtype = MOE4_F8_E4M3,
                         .rows = 1,
                         .cols = 8,
                         .data = all,
                         .scale = &scale,
                         .scale_dtype = MOE4_F8_E8M0,
                         .scale_rows = 1,
                         .scale_cols = 8};
        moe4_linear *l;
        OK(ctx, moe4_weight_values(ctx, y, &w, 0, 1));
        for (int i = 0; i < 8; i++) assert_true(y[i] == (float)ldexp(moe4_e4m3_to_float(all[i]), power - 127));
        moe4_status status = moe4_linear_create(&l, ctx, &w, 1, NULL);
        assert_int_equal(status, power <= 127 + 119 ? MOE4_OK : MOE4_ERROR_FORMAT); /* 448 * 2^120 is infinite */
        moe4_linear_destroy(l);
    }
}

static void expect(moe4_weight w, moe4_status status, const char *words) {
    moe4_linear *l;
    assert_int_equal(moe4_linear_create(&l, ctx, &w, 1, NULL), status);
    assert_null(l);
    if (!strstr(moe4_ctx_error(ctx), words)) fail_msg("\"%s\" does not say \"%s\"", moe4_ctx_error(ctx), words);
}

static void test_errors(void **state) {
    (void)state;
    moe4_weight good = make(&shapes[1], values), w = good;
    float y[K];
    bytes[77 * K + 100] = 0xff;
    bytes[149 * K + 3] = 0x7f;
    expect(w, MOE4_ERROR_FORMAT, "weight 0: row 77 column 100 is not finite: byte 0xff");
    bytes[77 * K + 100] = bytes[149 * K + 3] = 0x38;
    scales[1 + 3] = 255;
    expect(w, MOE4_ERROR_FORMAT, "weight 0: row 0 column 96 is not finite");
    scales[1 + 3] = 127;
    w.scale = NULL;
    expect(w, MOE4_ERROR_ARGUMENT, "weight 0: NULL scale");
    w = good;
    w.data = NULL;
    expect(w, MOE4_ERROR_ARGUMENT, "weight 0: NULL data");
    w = good;
    w.scale_dtype = MOE4_F8_E4M3;
    expect(w, MOE4_ERROR_ARGUMENT, "scale_dtype F8_E4M3");
    w = good;
    w.scale_cols = 0;
    expect(w, MOE4_ERROR_ARGUMENT, "blocks of 32 x 0");
    w = good;
    w.rows = 0;
    expect(w, MOE4_ERROR_ARGUMENT, "shape 0 x 208");
    w.rows = SIZE_MAX / 2;
    expect(w, MOE4_ERROR_ARGUMENT, "is too large");
    assert_int_equal(moe4_weight_values(ctx, y, &good, N, 1), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "rows 150 + 1, the weight has 150"));
    assert_int_equal(moe4_weight_values(ctx, y, &good, SIZE_MAX, 2), MOE4_ERROR_ARGUMENT);
    assert_int_equal(moe4_weight_values(ctx, NULL, &good, 0, 1), MOE4_ERROR_ARGUMENT);
    assert_int_equal(moe4_weight_values(ctx, y, NULL, 0, 1), MOE4_ERROR_ARGUMENT);
    OK(ctx, moe4_weight_values(ctx, NULL, &good, N, 0));
}

/* The other dtypes, by the reference's own decoding. */
static void test_values_of_every_dtype(void **state) {
    (void)state;
    static const moe4_dtype dtypes[] = {MOE4_NVFP4, MOE4_BF16, MOE4_F16, MOE4_F32};
    for (int d = 0; d < 4; d++) {
        moe4_weight w = ref_random_weight(dtypes[d], 5, 48);
        float y[2 * 48];
        OK(ctx, moe4_weight_values(ctx, y, &w, 3, 2));
        for (size_t i = 0; i < 2 * 48; i++) assert_true(y[i] == (float)ref_value(&w, 3 + i / 48, i % 48));
        ref_free_weight(&w);
    }
    moe4_weight w = {.dtype = MOE4_I8, .rows = 1, .cols = 16, .data = bytes};
    float y[16];
    assert_int_equal(moe4_weight_values(ctx, y, &w, 0, 1), MOE4_ERROR_ARGUMENT);
}

int main(void) {
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.n_threads = 3;
    if (moe4_ctx_create(&ctx, &o) != MOE4_OK) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values_and_products),
        cmocka_unit_test(test_extremes),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_values_of_every_dtype),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    moe4_ctx_destroy(ctx);
    return failed;
}
