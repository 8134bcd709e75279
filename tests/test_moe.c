/* The layer on random shapes against the fp64 reference, its invariances, its edges and its errors. */
#include <pthread.h>

#include "reference.h"

/* A random layer and a batch for it. */
struct fixture {
    size_t H, I, E, k, T;
    moe4_expert *experts;
    float *x;
    int64_t *ids;
    int32_t *ids32;
    float *weights;
};

static struct fixture make_fixture(size_t H, size_t I, size_t E, size_t k, size_t T, moe4_dtype dtype) {
    struct fixture f = {H, I, E, k, T, calloc(E, sizeof *f.experts), NULL, NULL, NULL, NULL};
    for (size_t e = 0; e < E; e++) {
        f.experts[e].gate = ref_random_weight(dtype, I, H);
        f.experts[e].up = ref_random_weight(dtype, I, H);
        f.experts[e].down = ref_random_weight(dtype, H, I);
    }
    f.x = malloc((T * H + 1) * sizeof *f.x);
    f.ids = malloc((T * k + 1) * sizeof *f.ids);
    f.ids32 = malloc((T * k + 1) * sizeof *f.ids32);
    f.weights = malloc((T * k + 1) * sizeof *f.weights);
    for (size_t i = 0; i < T * H; i++) f.x[i] = moe4_bf16_to_float(moe4_bf16_from_float(ref_normal()));
    for (size_t s = 0; s < T * k; s++) {
        size_t e, j;
        do { /* distinct experts for a token */
            e = ref_random() % E;
            for (j = s / k * k; j < s && f.ids[j] != (int64_t)e; j++) {
            }
        } while (j < s);
        f.ids[s] = (int64_t)e;
        f.ids32[s] = (int32_t)e;
        f.weights[s] = 0.1f + (float)(ref_random() % 100) / 100.f;
    }
    return f;
}

static void free_fixture(struct fixture *f) {
    for (size_t e = 0; e < f->E; e++) {
        ref_free_weight(&f->experts[e].gate);
        ref_free_weight(&f->experts[e].up);
        ref_free_weight(&f->experts[e].down);
    }
    free(f->experts);
    free(f->x);
    free(f->ids);
    free(f->ids32);
    free(f->weights);
}

static moe4_moe_options options_for(const struct fixture *f, moe4_act act) {
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = f->E;
    o.top_k = f->k;
    o.act = act;
    o.x_dtype = o.y_dtype = MOE4_F32;
    return o;
}

static moe4_workspace make_workspace(const moe4_moe *moe, moe4_ctx *ctx, size_t n_tokens) {
    moe4_workspace ws;
    OK(ctx, moe4_moe_workspace_bytes(moe, &ws.bytes, n_tokens));
    ws.data = aligned_alloc(64, ws.bytes);
    memset(ws.data, 0xFF, ws.bytes); /* NaN everywhere: nothing may be read before it is written */
    return ws;
}

/* One forward with a fresh object and workspace. */
static void run(moe4_ctx *ctx, void *y, const struct fixture *f, const moe4_moe_options *o, const void *x, const void *ids, size_t T,
                moe4_moe_report *report) {
    moe4_moe *moe;
    OK(ctx, moe4_moe_create(&moe, ctx, f->experts + o->first_expert, o));
    moe4_workspace ws = make_workspace(moe, ctx, T);
    OK(ctx, moe4_moe_forward(moe, y, x, ids, ids ? f->weights : NULL, T, &ws, NULL));
    if (report) OK(ctx, moe4_moe_report_read(moe, report, NULL, &ws, NULL));
    free(ws.data);
    moe4_moe_destroy(moe);
}

static double tolerance(moe4_act act) {
    return act == MOE4_ACT_BF16 ? 1e-5 : act == MOE4_ACT_W4A16 ? 1e-4 : 5e-4;
}

static void test_random_shapes(void **state) {
    (void)state;
    static const size_t shapes[][5] = {{16, 16, 1, 1, 1},    {32, 16, 4, 2, 3},    {64, 48, 8, 3, 17},   {48, 80, 5, 5, 9},
                                       {528, 112, 3, 2, 40}, {1040, 32, 2, 1, 11}, {96, 160, 16, 6, 33}, {256, 64, 2, 2, 150}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_BF16; act++) {
            const moe4_dtype wide[] = {MOE4_BF16, MOE4_F16, MOE4_F32};
            struct fixture f = make_fixture(shapes[i][0], shapes[i][1], shapes[i][2], shapes[i][3], shapes[i][4],
                                            act == MOE4_ACT_BF16 ? wide[i % 3] : MOE4_NVFP4);
            float limit = i % 2 ? 1.5f : 0;
            const struct ref_layer layer = {f.experts, 0, f.E, f.k, f.H, f.I, (moe4_act)act, .limit = limit};
            double *want = calloc(f.T * f.H, sizeof *want);
            float *y = malloc(f.T * f.H * sizeof *y);
            for (int isa = 0; isa < REF_N_ISAS; isa++) {
                moe4_ctx *ctx = ref_ctx(2, ref_isas[isa]);
                memset(want, 0, f.T * f.H * sizeof *want);
                uint64_t n_saturated = ref_forward(ctx, want, &layer, f.x, f.ids, f.weights, f.T);
                moe4_moe_options o = options_for(&f, (moe4_act)act);
                o.swiglu_limit = limit;
                moe4_moe_report report = MOE4_MOE_REPORT_INIT;
                run(ctx, y, &f, &o, f.x, f.ids32, f.T, &report);
                double error = ref_relative(y, want, f.T * f.H);
                if (!(error <= tolerance((moe4_act)act)))
                    fail_msg("%s, %s, shape %zu: relative L2 %g", moe4_ctx_isa(ctx), moe4_act_name((moe4_act)act), i, error);
                assert_int_equal(report.n_saturated_blocks, n_saturated);
                assert_int_equal(report.n_slots, f.T * f.k);
                moe4_ctx_destroy(ctx);
            }
            free(y);
            free(want);
            free_fixture(&f);
        }
}

/* bf16 and f16 in, bf16 out, int64 ids, leading dimensions: the same numbers, rounded once. */
static void test_dtypes_and_strides(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(2, 0);
    struct fixture f = make_fixture(64, 32, 6, 3, 21, MOE4_NVFP4);
    enum { LD = 72 };
    float *y = malloc(f.T * f.H * sizeof *y);
    moe4_moe_options o = options_for(&f, MOE4_ACT_TOKEN);
    run(ctx, y, &f, &o, f.x, f.ids32, f.T, NULL);
    for (int half = 0; half < 2; half++) {
        uint16_t *x = malloc(f.T * LD * 2), *out = malloc(f.T * LD * 2);
        memset(x, 0xFF, f.T * LD * 2);
        memset(out, 0xAB, f.T * LD * 2);
        for (size_t t = 0; t < f.T; t++)
            for (size_t i = 0; i < f.H; i++) {
                float v = f.x[t * f.H + i];
                x[t * LD + i] = half ? moe4_f16_from_float(v) : moe4_bf16_from_float(v);
                if (half) f.x[t * f.H + i] = moe4_f16_to_float(x[t * LD + i]);
            }
        if (half) run(ctx, y, &f, &o, f.x, f.ids32, f.T, NULL);
        moe4_moe_options strided = o;
        strided.x_dtype = half ? MOE4_F16 : MOE4_BF16;
        strided.y_dtype = MOE4_BF16;
        strided.x_ld = strided.y_ld = LD;
        strided.ids_dtype = MOE4_I64;
        run(ctx, out, &f, &strided, x, f.ids, f.T, NULL);
        for (size_t t = 0; t < f.T; t++)
            for (size_t i = 0; i < LD; i++) assert_int_equal(out[t * LD + i], i < f.H ? moe4_bf16_from_float(y[t * f.H + i]) : 0xABAB);
        free(x);
        free(out);
    }
    free(y);
    free_fixture(&f);
    moe4_ctx_destroy(ctx);
}

static void test_threads_and_batch_do_not_change_bits(void **state) {
    (void)state;
    struct fixture f = make_fixture(544, 96, 12, 4, 57, MOE4_NVFP4);
    size_t bytes = f.T * f.H * sizeof(float);
    float *y = malloc(bytes), *again = malloc(bytes), *one = malloc(f.H * sizeof *one);
    for (int isa = 0; isa < REF_N_ISAS; isa++)
        for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
            moe4_moe_options o = options_for(&f, (moe4_act)act);
            for (size_t n = 1; n <= 3; n++) {
                moe4_ctx *ctx = ref_ctx(n, ref_isas[isa]);
                run(ctx, n == 1 ? y : again, &f, &o, f.x, f.ids32, f.T, NULL);
                if (n > 1) assert_memory_equal(y, again, bytes);
                if (n == 1 && act != MOE4_ACT_TENSOR)
                    for (size_t t = 0; t < f.T; t += 7) {
                        struct fixture alone = f;
                        alone.weights += t * f.k;
                        run(ctx, one, &alone, &o, f.x + t * f.H, f.ids32 + t * f.k, 1, NULL);
                        assert_memory_equal(one, y + t * f.H, f.H * sizeof *one);
                    }
                moe4_ctx_destroy(ctx);
            }
        }
    free(y);
    free(again);
    free(one);
    free_fixture(&f);
}

static void test_skipped_and_local_ids(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(2, 0);
    struct fixture f = make_fixture(32, 32, 8, 2, 12, MOE4_NVFP4);
    static const int64_t odd[] = {-1, 8, -5, 9, INT64_MAX, INT64_MIN, (int64_t)1 << 32};
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) f.ids[i * 3] = odd[i];
    f.ids[10] = f.ids[11] = -1; /* token 5 has none */
    moe4_moe_options o = options_for(&f, MOE4_ACT_W4A16);
    o.ids_dtype = MOE4_I64;
    float *y = malloc(f.T * f.H * sizeof *y), *part = malloc(f.T * f.H * sizeof *part);
    double *want = calloc(f.T * f.H, sizeof *want);
    const struct ref_layer layer = {f.experts, 0, f.E, f.k, f.H, f.I, MOE4_ACT_W4A16, .limit = 0};
    ref_forward(ctx, want, &layer, f.x, f.ids, f.weights, f.T);
    moe4_moe_report report = MOE4_MOE_REPORT_INIT;
    run(ctx, y, &f, &o, f.x, f.ids, f.T, &report);
    assert_true(ref_relative(y, want, f.T * f.H) < 1e-4);
    assert_int_equal(report.n_slots, f.T * f.k - 9);
    for (size_t i = 0; i < f.H; i++) assert_true(y[5 * f.H + i] == 0 && !signbit(y[5 * f.H + i]));

    /* three ranks' parts sum to the whole */
    double *sum = calloc(f.T * f.H, sizeof *sum);
    static const size_t first[] = {0, 3, 7, 8};
    for (int rank = 0; rank < 3; rank++) {
        o.first_expert = first[rank];
        o.n_local = first[rank + 1] - first[rank];
        run(ctx, part, &f, &o, f.x, f.ids, f.T, NULL);
        for (size_t i = 0; i < f.T * f.H; i++) sum[i] += part[i];
    }
    assert_true(ref_relative(y, sum, f.T * f.H) < 1e-6);
    free(sum);
    free(want);
    free(part);
    free(y);
    free_fixture(&f);
    moe4_ctx_destroy(ctx);
}

static void test_hot_expert_and_no_tokens(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(3, 0);
    struct fixture f = make_fixture(48, 32, 9, 1, 300, MOE4_NVFP4);
    for (size_t s = 0; s < f.T; s++) f.ids[s] = f.ids32[s] = s == 17 ? 3 : 5;
    moe4_moe_options o = options_for(&f, MOE4_ACT_TOKEN);
    float *y = malloc(f.T * f.H * sizeof *y);
    double *want = calloc(f.T * f.H, sizeof *want);
    const struct ref_layer layer = {f.experts, 0, f.E, f.k, f.H, f.I, MOE4_ACT_TOKEN, .limit = 0};
    ref_forward(ctx, want, &layer, f.x, f.ids, f.weights, f.T);
    moe4_moe *moe;
    OK(ctx, moe4_moe_create(&moe, ctx, f.experts, &o));
    moe4_workspace ws = make_workspace(moe, ctx, f.T);
    uint64_t per_expert[9];
    moe4_moe_report report = MOE4_MOE_REPORT_INIT;
    OK(ctx, moe4_moe_forward(moe, y, f.x, f.ids32, f.weights, f.T, &ws, NULL));
    OK(ctx, moe4_moe_report_read(moe, &report, per_expert, &ws, NULL));
    assert_true(ref_relative(y, want, f.T * f.H) < 5e-4);
    assert_int_equal(report.n_experts_hit, 2);
    for (int e = 0; e < 9; e++) assert_int_equal(per_expert[e], e == 3 ? 1 : e == 5 ? 299 : 0);
    assert_int_equal(report.weight_bytes, 2 * 3 * 48 * 32 * 9 / 16);

    OK(ctx, moe4_moe_forward(moe, NULL, NULL, NULL, NULL, 0, &ws, NULL)); /* no tokens: nothing to read or write */
    OK(ctx, moe4_moe_report_read(moe, &report, per_expert, &ws, NULL));
    assert_int_equal(report.n_slots + report.n_tokens + report.n_experts_hit, 0);
    free(ws.data);
    moe4_moe_destroy(moe);
    free(y);
    free(want);
    free_fixture(&f);
    moe4_ctx_destroy(ctx);
}

static void test_nan_rows_stay_alone(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(2, 0);
    struct fixture f = make_fixture(64, 32, 6, 2, 10, MOE4_NVFP4);
    float *y = malloc(f.T * f.H * sizeof *y), *bad = malloc(f.T * f.H * sizeof *bad), *x = malloc(f.T * f.H * sizeof *x);
    memcpy(x, f.x, f.T * f.H * sizeof *x);
    x[3 * f.H + 5] = NAN;
    x[7 * f.H + 60] = -INFINITY;
    for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
        moe4_moe_options o = options_for(&f, (moe4_act)act);
        o.swiglu_limit = 2;
        for (size_t i = 0; i < f.H && act == MOE4_ACT_TENSOR; i++)
            f.x[3 * f.H + i] = f.x[7 * f.H + i] = 0; /* neither counts in the batch's amax */
        moe4_moe_report report = MOE4_MOE_REPORT_INIT;
        run(ctx, y, &f, &o, f.x, f.ids32, f.T, NULL);
        run(ctx, bad, &f, &o, x, f.ids32, f.T, &report);
        assert_int_equal(report.n_nonfinite_rows, 2);
        for (size_t t = 0; t < f.T; t++)
            for (size_t i = 0; i < f.H; i++) {
                if (t == 3 || t == 7) {
                    assert_true(isnan(bad[t * f.H + i]));
                } else {
                    assert_memory_equal(&bad[t * f.H + i], &y[t * f.H + i], sizeof *y);
                }
            }
    }
    free(x);
    free(y);
    free(bad);
    free_fixture(&f);
    moe4_ctx_destroy(ctx);
}

static void test_shared_expert(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(2, 0);
    for (int mixed = 0; mixed < 2; mixed++)
        for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
            struct fixture f = make_fixture(64, 32, 6, 2, 13, MOE4_NVFP4);
            struct fixture s = make_fixture(64, 80, 1, 1, 1, mixed ? MOE4_BF16 : MOE4_NVFP4);
            const struct ref_layer routed = {f.experts, 0, f.E, f.k, f.H, f.I, (moe4_act)act, .limit = 0};
            const struct ref_layer shared = {s.experts, 0, 1, 1, f.H, s.I, mixed ? MOE4_ACT_BF16 : (moe4_act)act, .limit = 0};
            double *want = calloc(f.T * f.H, sizeof *want);
            uint64_t n_saturated = ref_forward(ctx, want, &routed, f.x, f.ids, f.weights, f.T);
            n_saturated += ref_forward(ctx, want, &shared, f.x, NULL, NULL, f.T);
            moe4_moe_options o = options_for(&f, (moe4_act)act);
            o.shared = s.experts;
            float *y = malloc(f.T * f.H * sizeof *y);
            moe4_moe_report report = MOE4_MOE_REPORT_INIT;
            run(ctx, y, &f, &o, f.x, f.ids32, f.T, &report);
            assert_true(ref_relative(y, want, f.T * f.H) < 5e-4);
            assert_int_equal(report.n_saturated_blocks, n_saturated);
            const size_t expert_bytes = 3 * 64 * 32 * 9 / 16, shared_bytes = mixed ? 3 * 64 * 80 * 2 : 3 * 64 * 80 * 9 / 16;
            assert_int_equal(report.weight_bytes, report.n_experts_hit * expert_bytes + shared_bytes);
            free(y);
            free(want);
            free_fixture(&f);
            free_fixture(&s);
        }
    moe4_ctx_destroy(ctx);
}

/* Every activation with every place of the routing weight, with biases, in every mode. */
static void test_activations_and_weightings(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(2, 0);
    static const struct ref_layer variants[] = {{.activation = MOE4_SWIGLU},
                                                {.activation = MOE4_SWIGLU, .alpha = 1.702f, .beta = 1, .limit = 1.5f},
                                                {.activation = MOE4_GELU_TANH},
                                                {.activation = MOE4_RELU2}};
    for (size_t v = 0; v < sizeof variants / sizeof *variants; v++)
        for (int weighting = 0; weighting <= MOE4_WEIGHT_ON_X; weighting++)
            for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_BF16; act++) {
                struct fixture f = make_fixture(64, 48, 5, 2, 14, act == MOE4_ACT_BF16 ? MOE4_F32 : MOE4_NVFP4);
                float bias[64];
                for (int i = 0; i < 64; i++) bias[i] = 0.3f * ref_normal();
                for (size_t e = 0; e < f.E; e++) {
                    f.experts[e].gate.bias = f.experts[e].down.bias = e % 2 ? bias : NULL;
                    f.experts[e].up.bias = e % 3 ? bias + 16 : NULL;
                }
                f.ids[3] = f.ids32[3] = -1;
                struct ref_layer layer = variants[v];
                layer.experts = f.experts, layer.n = f.E, layer.k = f.k, layer.hidden = f.H, layer.intermediate = f.I;
                layer.act = (moe4_act)act, layer.weighting = (moe4_weighting)weighting;
                double *want = calloc(f.T * f.H, sizeof *want);
                float *y = malloc(f.T * f.H * sizeof *y);
                moe4_moe_options o = options_for(&f, (moe4_act)act);
                o.activation = layer.activation;
                o.swiglu_limit = layer.limit;
                o.swiglu_alpha = layer.alpha;
                o.swiglu_beta = layer.beta;
                o.weighting = layer.weighting;
                if (layer.activation == MOE4_RELU2)
                    for (size_t e = 0; e < f.E; e++) { /* a gate must not be looked at */
                        ref_free_weight(&f.experts[e].gate);
                        f.experts[e].gate = (moe4_weight){0};
                    }
                uint64_t n_saturated = ref_forward(ctx, want, &layer, f.x, f.ids, f.weights, f.T);
                moe4_moe_report report = MOE4_MOE_REPORT_INIT;
                run(ctx, y, &f, &o, f.x, f.ids32, f.T, &report);
                double error = ref_relative(y, want, f.T * f.H);
                if (!(error <= tolerance((moe4_act)act)))
                    fail_msg("activation %zu, weighting %d, %s: relative L2 %g", v, weighting, moe4_act_name((moe4_act)act), error);
                assert_int_equal(report.n_saturated_blocks, n_saturated);
                free(y);
                free(want);
                free_fixture(&f);
            }
    moe4_ctx_destroy(ctx);
}

/* One expert, no ids: a dense layer. */
static void test_dense(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(2, 0);
    struct fixture f = make_fixture(64, 48, 1, 1, 19, MOE4_NVFP4);
    moe4_moe_options o = options_for(&f, MOE4_ACT_DEFAULT);
    float *y = malloc(f.T * f.H * sizeof *y), *with_ids = malloc(f.T * f.H * sizeof *y);
    run(ctx, y, &f, &o, f.x, NULL, f.T, NULL);
    for (size_t t = 0; t < f.T; t++) f.weights[t] = 1;
    run(ctx, with_ids, &f, &o, f.x, f.ids32, f.T, NULL);
    assert_memory_equal(y, with_ids, f.T * f.H * sizeof *y);
    free(y);
    free(with_ids);
    free_fixture(&f);
    moe4_ctx_destroy(ctx);
}

/* ---- several threads, one layer ---- */

struct caller {
    const moe4_moe *moe;
    moe4_ctx *ctx;
    const struct fixture *f;
    const float *want;
};

static void *call_often(void *arg) {
    const struct caller *c = arg;
    const struct fixture *f = c->f;
    float *y = malloc(f->T * f->H * sizeof *y);
    moe4_workspace ws = make_workspace(c->moe, c->ctx, f->T);
    for (int round = 0; round < 8; round++) {
        OK(c->ctx, moe4_moe_forward(c->moe, y, f->x, f->ids32, f->weights, f->T, &ws, NULL));
        assert_memory_equal(y, c->want, f->T * f->H * sizeof *y);
        moe4_workspace small = {ws.data, 64};
        assert_int_equal(moe4_moe_forward(c->moe, y, f->x, f->ids32, f->weights, f->T, &small, NULL), MOE4_ERROR_ARGUMENT);
        assert_non_null(strstr(moe4_ctx_error(c->ctx), "workspace of 64 bytes"));
    }
    free(ws.data);
    free(y);
    return NULL;
}

static void test_several_callers(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(3, 0);
    struct fixture f = make_fixture(256, 64, 8, 2, 40, MOE4_NVFP4);
    moe4_moe_options o = options_for(&f, MOE4_ACT_TOKEN);
    float *y = malloc(f.T * f.H * sizeof *y);
    run(ctx, y, &f, &o, f.x, f.ids32, f.T, NULL);
    moe4_moe *moe;
    OK(ctx, moe4_moe_create(&moe, ctx, f.experts, &o));
    struct caller c = {moe, ctx, &f, y};
    pthread_t t[4];
    for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&t[i], NULL, call_often, &c), 0);
    for (int i = 0; i < 4; i++) pthread_join(t[i], NULL);
    moe4_moe_destroy(moe);
    free(y);
    free_fixture(&f);
    moe4_ctx_destroy(ctx);
}

/* ---- errors: the status and the words ---- */

static void expect_error(moe4_ctx *ctx, const moe4_expert *experts, const moe4_moe_options *o, moe4_status status, const char *words) {
    moe4_moe *moe = (moe4_moe *)1;
    assert_int_equal(moe4_moe_create(&moe, ctx, experts, o), status);
    assert_null(moe);
    if (!strstr(moe4_ctx_error(ctx), words)) fail_msg("\"%s\" lacks \"%s\"", moe4_ctx_error(ctx), words);
}

static void test_errors(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(1, 0);
    struct fixture f = make_fixture(64, 32, 4, 2, 5, MOE4_NVFP4);
    const moe4_moe_options good = options_for(&f, MOE4_ACT_TOKEN);
    moe4_expert saved = f.experts[2];
    moe4_moe_options o;
#define BAD_OPTION(field, value, words) (o = good, o.field = (value), expect_error(ctx, f.experts, &o, MOE4_ERROR_ARGUMENT, words))
    BAD_OPTION(n_experts, 0, "n_experts: 0");
    BAD_OPTION(first_expert, 4, "4 of 4");
    BAD_OPTION(n_local, 5, "0 + 5, but there are 4");
    BAD_OPTION(top_k, 5, "5 of 4");
    BAD_OPTION(top_k, 0, "0 of 4");
    BAD_OPTION(act, (moe4_act)9, "9 is no mode");
    BAD_OPTION(act, MOE4_ACT_BF16, "mode bf16, but the experts are NVFP4");
    BAD_OPTION(swiglu_limit, NAN, "swiglu_limit");
    BAD_OPTION(swiglu_alpha, INFINITY, "swiglu_alpha inf");
    BAD_OPTION(activation, (moe4_activation)3, "3 is no activation");
    BAD_OPTION(weighting, (moe4_weighting)7, "7 is no weighting");
    o = good;
    o.activation = MOE4_GELU_TANH;
    o.swiglu_beta = 1;
    expect_error(ctx, f.experts, &o, MOE4_ERROR_ARGUMENT, "belong to SwiGLU");
    BAD_OPTION(x_dtype, MOE4_I8, "x_dtype: I8");
    BAD_OPTION(y_dtype, MOE4_F16, "y_dtype: F16");
    BAD_OPTION(ids_dtype, MOE4_U8, "ids_dtype: U8");
    BAD_OPTION(x_ld, 63, "x_ld 63");
    BAD_OPTION(y_ld, 1, "y_ld 1");
    BAD_OPTION(struct_size, 1, "struct_size");
#define BAD_EXPERT(field, value, status, words) \
    (f.experts[2].field = (value), expect_error(ctx, f.experts, &good, status, words), f.experts[2] = saved)
    BAD_EXPERT(up.rows, 31, MOE4_ERROR_ARGUMENT, "expert 2 up: shape 31 x 64, need 32 x 64");
    BAD_EXPERT(down.cols, 64, MOE4_ERROR_ARGUMENT, "expert 2 down: shape 64 x 64, need 64 x 32");
    BAD_EXPERT(gate.dtype, MOE4_BF16, MOE4_ERROR_ARGUMENT, "expert 2 gate: dtype BF16 beside NVFP4");
    BAD_EXPERT(gate.dtype, MOE4_U8, MOE4_ERROR_ARGUMENT, "expert 2 gate: dtype U8");
    BAD_EXPERT(gate.data, NULL, MOE4_ERROR_ARGUMENT, "expert 2 gate: NULL data");
    BAD_EXPERT(up.scale, NULL, MOE4_ERROR_ARGUMENT, "expert 2 up: NULL scale");
    BAD_EXPERT(up.global, 0, MOE4_ERROR_ARGUMENT, "expert 2 up: global scale 0");
    BAD_EXPERT(up.global, INFINITY, MOE4_ERROR_ARGUMENT, "expert 2 up: global scale inf");
    BAD_EXPERT(down.input_scale, -1, MOE4_ERROR_ARGUMENT, "expert 2 down: input scale -1");
    uint8_t *scale = (uint8_t *)f.experts[2].down.scale, kept = scale[64 * 2 - 1];
    scale[64 * 2 - 1] = 0x7F;
    expect_error(ctx, f.experts, &good, MOE4_ERROR_FORMAT, "expert 2 down: block scale [63, 1] is 0x7f, a NaN");
    scale[64 * 2 - 1] = 0x81;
    expect_error(ctx, f.experts, &good, MOE4_ERROR_FORMAT, "0x81, a signed byte");
    scale[64 * 2 - 1] = kept;
    f.experts[1].up.input_scale = 0;
    o = options_for(&f, MOE4_ACT_STATIC);
    expect_error(ctx, f.experts, &o, MOE4_ERROR_ARGUMENT, "expert 1: mode static needs an input_scale for gate and up");

    for (size_t hidden = 48; hidden <= 80; hidden += 32) { /* one block less, one more */
        char words[80];
        struct fixture s = make_fixture(hidden, 32, 1, 1, 1, MOE4_NVFP4);
        o = good;
        o.shared = s.experts;
        snprintf(words, sizeof words, "shared expert: hidden size %zu, the routed experts have 64", hidden);
        expect_error(ctx, f.experts, &o, MOE4_ERROR_ARGUMENT, words);
        free_fixture(&s);
    }

    moe4_moe *moe;
    OK(ctx, moe4_moe_create(&moe, ctx, f.experts, &good));
    moe4_workspace ws = make_workspace(moe, ctx, f.T);
    float y[5 * 64];
    moe4_moe_report report = MOE4_MOE_REPORT_INIT;
    assert_int_equal(moe4_moe_report_read(moe, &report, NULL, &ws, NULL), MOE4_ERROR_ARGUMENT);
    moe4_workspace odd = {(char *)ws.data + 8, ws.bytes};
    assert_int_equal(moe4_moe_forward(moe, y, f.x, f.ids32, f.weights, 5, &odd, NULL), MOE4_ERROR_ARGUMENT);
    odd = (moe4_workspace){ws.data, ws.bytes - 1};
    assert_int_equal(moe4_moe_forward(moe, y, f.x, f.ids32, f.weights, 5, &odd, NULL), MOE4_ERROR_ARGUMENT);
    assert_int_equal(moe4_moe_forward(moe, y, f.x, f.ids32, f.weights, 5, NULL, NULL), MOE4_ERROR_ARGUMENT);
    assert_int_equal(moe4_moe_forward(moe, y, f.x, NULL, NULL, 5, &ws, NULL), MOE4_ERROR_ARGUMENT);
    assert_int_equal(moe4_moe_forward(moe, NULL, f.x, f.ids32, f.weights, 5, &ws, NULL), MOE4_ERROR_ARGUMENT);
    size_t bytes;
    assert_int_equal(moe4_moe_workspace_bytes(moe, &bytes, SIZE_MAX / 2), MOE4_ERROR_ARGUMENT);
    assert_int_equal(moe4_moe_workspace_bytes(moe, &bytes, INT32_MAX), MOE4_ERROR_ARGUMENT);
    free(ws.data);
    moe4_moe_destroy(moe);
    free_fixture(&f);
    moe4_ctx_destroy(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_shapes),
        cmocka_unit_test(test_dtypes_and_strides),
        cmocka_unit_test(test_threads_and_batch_do_not_change_bits),
        cmocka_unit_test(test_skipped_and_local_ids),
        cmocka_unit_test(test_hot_expert_and_no_tokens),
        cmocka_unit_test(test_nan_rows_stay_alone),
        cmocka_unit_test(test_shared_expert),
        cmocka_unit_test(test_activations_and_weightings),
        cmocka_unit_test(test_dense),
        cmocka_unit_test(test_several_callers),
        cmocka_unit_test(test_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
