/* Linear against the fp64 reference, bitwise where integers allow it, its invariances and errors. */
#include "reference.h"
#include "fpu.h"

static void run(moe4_ctx *ctx, void *const *y, const moe4_weight *w, size_t n, const moe4_linear_options *o, const void *x, size_t T,
                uint64_t *n_saturated) {
    moe4_linear *l;
    moe4_workspace ws;
    OK(ctx, moe4_linear_create(&l, ctx, w, n, o));
    OK(ctx, moe4_linear_workspace_bytes(l, &ws.bytes, T));
    ws.data = aligned_alloc(64, ws.bytes);
    memset(ws.data, 0xFF, ws.bytes);
    OK(ctx, moe4_linear_forward(l, y, n_saturated, x, T, &ws, NULL));
    free(ws.data);
    moe4_linear_destroy(l);
}

/* Every element within the bound of a product: (K + 16) 2^-23 sum |a||b|, plus the rounding of the scaling. */
static void test_error_bound(void **state) {
    (void)state;
    static const size_t shapes[][3] = {{1, 1, 16}, {5, 3, 16}, {7, 33, 48}, {130, 40, 64}, {4, 17, 1040}, {3, 70, 528}, {2, 9, 4096}};
    for (int isa = 0; isa < REF_N_ISAS; isa++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_BF16; act++) {
                moe4_ctx *ctx = ref_ctx(2, ref_isas[isa]);
                size_t T = shapes[s][0], N = shapes[s][1], K = shapes[s][2];
                const moe4_dtype wide[] = {MOE4_BF16, MOE4_F16, MOE4_F32};
                moe4_weight w = ref_random_weight(act == MOE4_ACT_BF16 ? wide[s % 3] : MOE4_NVFP4, N, K);
                float bias[70];
                for (size_t n = 0; n < N; n++) bias[n] = ref_normal();
                w.bias = s % 2 ? bias : NULL;
                float *x = malloc(T * K * sizeof *x), *y = malloc(T * N * sizeof *y);
                double *xq = malloc(K * sizeof *xq);
                uint64_t n_saturated, want_saturated = 0;
                for (size_t i = 0; i < T * K; i++) x[i] = ref_normal() * expf(ref_normal());
                moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
                o.act = (moe4_act)act;
                run(ctx, (void *[]){y}, &w, 1, &o, x, T, &n_saturated);
                float batch = ref_amax(x, T * K);
                for (size_t t = 0; t < T; t++) {
                    want_saturated +=
                        ref_round(ctx, xq, x + t * K, K, o.act, w.input_scale, act == MOE4_ACT_TENSOR ? batch : ref_amax(x + t * K, K));
                    for (size_t n = 0; n < N; n++) {
                        double sum = w.bias ? bias[n] : 0, size = fabs(sum);
                        for (size_t k = 0; k < K; k++) {
                            double p = ref_value(&w, n, k) * xq[k];
                            sum += p;
                            size += fabs(p);
                        }
                        double error = fabs(y[t * N + n] - sum), bound = (double)(K + 16) * 0x1p-23 * size + 0x1p-22 * fabs(sum);
                        if (!(error <= bound))
                            fail_msg("%s %s [%zu,%zu] of shape %zu: error %g, bound %g", moe4_ctx_isa(ctx), moe4_act_name(o.act), t, n, s,
                                     error, bound);
                    }
                }
                assert_int_equal(n_saturated, want_saturated);
                free(xq);
                free(x);
                free(y);
                ref_free_weight(&w);
                moe4_ctx_destroy(ctx);
            }
}

/* Small integers and power-of-two scales: every order of summation gives the same bits, so every ISA must give these. */
static void test_integers_are_exact(void **state) {
    (void)state;
    enum { T = 19, N = 41, K = 784 };
    static float x[T * K], y[T * N];
    moe4_weight w = ref_random_weight(MOE4_NVFP4, N, K);
    for (size_t i = 0; i < N * K / 16; i++) ((uint8_t *)w.scale)[i] = (uint8_t)(0x38 + 8 * (ref_random() % 4));
    w.global = 0.5f;
    for (size_t i = 0; i < T * K; i++) x[i] = (float)((int)(ref_random() % 9) - 4);
    for (size_t t = 0; t < T; t++) memset(x + t * K + 16 * t, 0, 16 * sizeof *x); /* a block of zeros */
    static const float input_scales[] = {0x1p-5f, 0x1p-140f};                     /* 1 over the second is more than fp32 holds */
    for (int isa = 0; isa < REF_N_ISAS; isa++)
        for (int mode = 0; mode < 3; mode++) {
            moe4_ctx *ctx = ref_ctx(2, ref_isas[isa]);
            moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
            o.act = mode ? MOE4_ACT_STATIC : MOE4_ACT_W4A16;
            w.input_scale = input_scales[mode == 2];
            run(ctx, (void *[]){y}, &w, 1, &o, x, T, NULL);
            for (size_t t = 0; t < T; t++) {
                double xq[K], want[N];
                ref_round(ctx, xq, x + t * K, K, o.act, w.input_scale, 0);
                ref_product(want, &w, xq);
                for (size_t n = 0; n < N; n++) assert_true(y[t * N + n] == want[n]);
            }
            moe4_ctx_destroy(ctx);
        }
    ref_free_weight(&w);
}

/* q, k and v in one call: the same bits as one by one; `static` takes the largest input scale. bf16 out is the fp32 result rounded. */
static void test_several_matrices(void **state) {
    (void)state;
    enum { T = 21, K = 96, N0 = 64, N1 = 16, N2 = 33 };
    float x[T * K], y0[T * N0], y1[T * N1], y2[T * N2], alone[T * N0];
    uint16_t half[T * N0];
    for (size_t i = 0; i < T * K; i++) x[i] = ref_normal();
    moe4_weight w[3] = {ref_random_weight(MOE4_NVFP4, N0, K), ref_random_weight(MOE4_NVFP4, N1, K), ref_random_weight(MOE4_NVFP4, N2, K)};
    float *const y[] = {y0, y1, y2};
    w[1].input_scale = 4 * w[0].input_scale;
    w[2].input_scale = 2 * w[0].input_scale;
    moe4_ctx *ctx = ref_ctx(3, 0);
    for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
        moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
        o.act = (moe4_act)act;
        run(ctx, (void *const *)y, w, 3, &o, x, T, NULL);
        for (int i = 0; i < 3; i++) {
            moe4_weight one = w[i];
            one.input_scale = w[1].input_scale;
            run(ctx, (void *[]){alone}, &one, 1, &o, x, T, NULL);
            assert_memory_equal(alone, y[i], T * one.rows * sizeof *alone);
        }
        o.y_dtype = MOE4_BF16;
        moe4_weight first = w[0];
        first.input_scale = w[1].input_scale;
        run(ctx, (void *[]){half}, &first, 1, &o, x, T, NULL);
        for (size_t i = 0; i < T * N0; i++) assert_int_equal(half[i], moe4_bf16_from_float(y0[i]));
    }
    for (int i = 0; i < 3; i++) ref_free_weight(&w[i]);
    moe4_ctx_destroy(ctx);
}

static void test_batch_threads_and_caller_fpu(void **state) {
    (void)state;
    enum { T = 150, K = 1040, N = 72 };
    static float x[T * K], y[T * N], again[T * N];
    for (size_t i = 0; i < T * K; i++) x[i] = ref_normal() * (i % 7 ? 1 : 0x1p-130f); /* subnormals among them */
    moe4_weight w = ref_random_weight(MOE4_NVFP4, N, K);
    for (size_t i = 0; i < N * K / 16; i += 3) ((uint8_t *)w.scale)[i] = (uint8_t)(ref_random() % 8); /* subnormal block scales */
    for (int isa = 0; isa < REF_N_ISAS; isa++)
        for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
            moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
            o.act = (moe4_act)act;
            for (size_t n = 1; n <= 3; n++) {
                moe4_ctx *ctx = ref_ctx(n, ref_isas[isa]);
                uint64_t before = get_fpu();
                if (n == 2) set_fpu(before | FPU_FLUSH); /* must not matter, and must be there afterwards */
                run(ctx, (void *[]){n == 1 ? y : again}, &w, 1, &o, x, T, NULL);
                if (n == 2) assert_int_equal(get_fpu() & FPU_FLUSH, FPU_FLUSH);
                set_fpu(before);
                if (n > 1) assert_memory_equal(y, again, sizeof y);
                for (size_t t = 0; t < T && n == 3 && act != MOE4_ACT_TENSOR; t += 31) {
                    run(ctx, (void *[]){again}, &w, 1, &o, x + t * K, 1, NULL);
                    assert_memory_equal(again, y + t * N, N * sizeof *y);
                }
                moe4_ctx_destroy(ctx);
            }
        }
    ref_free_weight(&w);
}

static void test_errors(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(1, 0);
    moe4_weight w[2] = {ref_random_weight(MOE4_NVFP4, 8, 32), ref_random_weight(MOE4_BF16, 8, 32)};
    moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
    moe4_linear *l;
    assert_int_equal(moe4_linear_create(&l, ctx, w, 2, NULL), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "weight 1: dtype BF16, weight 0 has NVFP4"));
    assert_int_equal(moe4_linear_create(&l, ctx, w, 0, NULL), MOE4_ERROR_ARGUMENT);
    o.act = MOE4_ACT_BF16;
    assert_int_equal(moe4_linear_create(&l, ctx, w, 1, &o), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "mode bf16, but the weights are NVFP4"));
    o.act = MOE4_ACT_TOKEN;
    assert_int_equal(moe4_linear_create(&l, ctx, w + 1, 1, &o), MOE4_ERROR_ARGUMENT);
    o.act = MOE4_ACT_STATIC;
    w[0].input_scale = 0;
    assert_int_equal(moe4_linear_create(&l, ctx, w, 1, &o), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "input_scale"));
    w[0].cols = 24;
    assert_int_equal(moe4_linear_create(&l, ctx, w, 1, NULL), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "24 columns"));
    w[0].cols = 32;
    o = (moe4_linear_options)MOE4_LINEAR_OPTIONS_INIT;
    o.x_ld = 31;
    assert_int_equal(moe4_linear_create(&l, ctx, w, 1, &o), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "x_ld: 31"));

    OK(ctx, moe4_linear_create(&l, ctx, w, 1, NULL));
    float x[32] = {0}, y[8];
    moe4_workspace ws;
    OK(ctx, moe4_linear_workspace_bytes(l, &ws.bytes, 1));
    ws.data = aligned_alloc(64, ws.bytes);
    ws.bytes--;
    assert_int_equal(moe4_linear_forward(l, (void *[]){y}, NULL, x, 1, &ws, NULL), MOE4_ERROR_ARGUMENT);
    ws.bytes++;
    assert_int_equal(moe4_linear_forward(l, (void *[]){NULL}, NULL, x, 1, &ws, NULL), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "NULL y[0]"));
    assert_int_equal(moe4_linear_workspace_bytes(l, &ws.bytes, SIZE_MAX), MOE4_ERROR_ARGUMENT);
    free(ws.data);
    moe4_linear_destroy(l);
    for (int i = 0; i < 2; i++) ref_free_weight(&w[i]);
    moe4_ctx_destroy(ctx);
}

/* Every block scale is looked at: one that is none is named, wherever it stands, whichever it is. */
static void test_bad_scales(void **state) {
    (void)state;
    enum { N_BLOCKS = 37 };
    moe4_ctx *ctx = ref_ctx(1, 0);
    moe4_weight w = ref_random_weight(MOE4_NVFP4, 1, 16 * N_BLOCKS);
    uint8_t *scale = (uint8_t *)w.scale;
    moe4_linear *l;
    memset(scale, 0x7e, N_BLOCKS);
    OK(ctx, moe4_linear_create(&l, ctx, &w, 1, NULL));
    moe4_linear_destroy(l);
    for (int at = 0; at < N_BLOCKS; at++)
        for (int bad = 0x7f; bad <= 0xff; bad += bad == 0x7f || bad == 0xfe ? 1 : 0x7e) {
            char text[64];
            scale[at] = (uint8_t)bad;
            assert_int_equal(moe4_linear_create(&l, ctx, &w, 1, NULL), MOE4_ERROR_FORMAT);
            snprintf(text, sizeof text, "block scale [0, %d] is 0x%02x", at, (unsigned)bad);
            assert_non_null(strstr(moe4_ctx_error(ctx), text));
            scale[at] = 0x7e;
        }
    ref_free_weight(&w);
    moe4_ctx_destroy(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_error_bound),      cmocka_unit_test(test_integers_are_exact),
        cmocka_unit_test(test_several_matrices), cmocka_unit_test(test_batch_threads_and_caller_fpu),
        cmocka_unit_test(test_errors),           cmocka_unit_test(test_bad_scales),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
