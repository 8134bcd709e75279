/* Everything that a layer, a linear and a router can be asked for, on a device against the CPU with the same inputs: dtypes of weights and
 * activations, biases, activations, places of the routing weight, the shared expert, second biases, choices by token id. Skipped
 * (77) where there is no GPU. */
#include "experts.h"

static const moe4_dtype pairs[][2] = {{MOE4_NVFP4, MOE4_NVFP4}, {MOE4_BF16, MOE4_BF16},  {MOE4_F16, MOE4_F16},
                                      {MOE4_F32, MOE4_F32},     {MOE4_NVFP4, MOE4_BF16}, {MOE4_BF16, MOE4_NVFP4}};
enum { N_PAIRS = 6 };

/* ---- layers whose slots come by id ---- */

struct call {
    const struct layer *l;
    const float *x, *weights;
    const int32_t *ids;
    size_t T;
};

static void run(moe4_ctx *ctx, float *y, moe4_moe_report *report, const struct call *c, const moe4_moe_options *o,
                moe4_scale_layout layout) {
    struct given_x x;
    moe4_moe *moe;
    size_t bytes, n = c->T * c->l->hidden;
    OK(ctx, moe4_moe_create(&moe, ctx, c->l->expert, o));
    OK(ctx, moe4_moe_workspace_bytes(moe, &bytes, c->T));
    moe4_workspace ws = give_workspace(ctx, bytes);
    give_x(&x, ctx, c->x, c->T, c->l->hidden, o->x_dtype, layout, layout != MOE4_SCALES_LINEAR);
    const void *ids = give(ctx, c->ids, c->T * c->l->k * sizeof *c->ids);
    const float *weights = give(ctx, c->weights, c->T * c->l->k * sizeof *weights);
    void *out = give(ctx, NULL, n * moe4_dtype_bytes(o->y_dtype)), *host = malloc(n * sizeof *y + 1);
    OK(ctx, moe4_moe_forward(moe, out, x.x, ids, weights, c->T, &ws, NULL));
    take(ctx, host, out, n * moe4_dtype_bytes(o->y_dtype));
    widen(y, host, o->y_dtype, n);
    OK(ctx, moe4_moe_report_read(moe, report, NULL, &ws, NULL));
    free(host);
    free_given();
    moe4_moe_destroy(moe);
}

static void compare(const struct call *c, const moe4_moe_options *o, moe4_scale_layout layout, const char *what) {
    size_t n = c->T * c->l->hidden;
    float *want = malloc(n * sizeof *want + 1), *got = malloc(n * sizeof *got + 1);
    moe4_moe_report a = MOE4_MOE_REPORT_INIT, b = MOE4_MOE_REPORT_INIT;
    run(cpu, want, &a, c, o, layout);
    run(gpu, got, &b, c, o, layout);
    moe4_act h = act_h(c->l, o->act == MOE4_ACT_DEFAULT ? MOE4_ACT_TOKEN : o->act);
    if (o->y_dtype == MOE4_BF16 && h == MOE4_ACT_BF16) h = MOE4_ACT_W4A16; /* the last rounding may go the other way */
    expect_close(got, want, c->T, c->l->hidden, h, what);
    EXPECT(a.n_tokens == b.n_tokens && a.n_slots == b.n_slots && a.n_experts_hit == b.n_experts_hit && a.weight_bytes == b.weight_bytes &&
               a.n_nonfinite_rows == b.n_nonfinite_rows,
           "%s: report: %lu tokens %lu slots %lu experts %lu bytes %lu bad rows, want %lu %lu %lu %lu %lu\n", what, b.n_tokens, b.n_slots,
           b.n_experts_hit, b.weight_bytes, b.n_nonfinite_rows, a.n_tokens, a.n_slots, a.n_experts_hit, a.weight_bytes, a.n_nonfinite_rows);
    EXPECT(llabs((long long)(a.n_saturated_blocks - b.n_saturated_blocks)) <= 2 + (long long)a.n_saturated_blocks / 50,
           "%s: %lu saturated blocks, want %lu\n", what, b.n_saturated_blocks, a.n_saturated_blocks);
    free(want);
    free(got);
}

static int32_t *random_ids(size_t n, size_t n_experts) {
    int32_t *ids = malloc(n * sizeof *ids + 1);
    for (size_t i = 0; i < n; i++) ids[i] = ref_random() % 8 == 0 ? -1 : (int32_t)(ref_random() % n_experts);
    return ids;
}

/* Walks all combinations of what changes the path; sizes and the rest turn with the number of the case. */
static void test_layers(void **state) {
    (void)state;
    static const size_t sizes[][3] = {
        /* hidden, intermediate, tokens */ {64, 48, 33}, {208, 80, 7}, {1040, 144, 3}, {96, 272, 70}, {16, 16, 1}};
    static const moe4_dtype x_dtypes[] = {MOE4_F32, MOE4_BF16, MOE4_F16};
    int number = 0;
    for (int p = 0; p < N_PAIRS; p++)
        for (int m = 0; m < N_MODES; m++)
            for (int activation = 0; activation < N_ACTIVATIONS; activation++)
                for (int weighting = 0; weighting < 3; weighting++)
                    for (int bias = 0; bias < 2; bias++, number++) {
                        bool plain = pairs[p][0] != MOE4_NVFP4 && pairs[p][1] != MOE4_NVFP4;
                        if ((plain && m) || number % every) continue;
                        const size_t *z = sizes[number % 5];
                        size_t E = 5, k = 1 + number % 3, T = z[2];
                        /* unquantized matrices may have any size */
                        struct layer l = random_layer(E, z[0] + (plain ? number % 4 : 0), z[1] + (plain ? number % 3 : 0), k, pairs[p][0],
                                                      pairs[p][1], bias);
                        struct layer s = random_layer(1, l.hidden, 32, 1, pairs[p][0], pairs[p][1], number % 3 == 1);
                        moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
                        o.n_experts = E + 3;
                        o.first_expert = 2;
                        o.n_local = E;
                        o.top_k = k;
                        o.act = plain ? MOE4_ACT_DEFAULT : modes[m];
                        set_activation(&o, activation);
                        o.weighting = (moe4_weighting)weighting;
                        o.shared = number % 2 ? s.expert : NULL;
                        o.x_dtype = x_dtypes[number % 3];
                        o.y_dtype = number % 5 == 4 ? MOE4_BF16 : MOE4_F32;
                        struct call c = {&l, random_floats(T * l.hidden), random_routing_weights(T * k), random_ids(T * k, E + 3), T};
                        if (number % 7 == 3) ((float *)c.x)[(T / 2) * l.hidden + 3] = number % 2 ? NAN : INFINITY;
                        char what[128];
                        snprintf(what, sizeof what, "case %d: %s/%s %s, activation %d, weight place %d, bias %d, shared %d, %zux%zu, T %zu",
                                 number, moe4_dtype_name(l.up), moe4_dtype_name(l.down), moe4_act_name(o.act), activation, weighting, bias,
                                 number % 2, l.hidden, l.intermediate, T);
                        compare(&c, &o, MOE4_SCALES_LINEAR, what);
                        free((void *)c.x);
                        free((void *)c.weights);
                        free((void *)c.ids);
                        free_layer(&l);
                        free_layer(&s);
                    }
    print_message("%d layers\n", number);
    NO_FAILURES();
}

/* Rows that are NVFP4 already, in every layout, with bad scales and globals in some. */
static void test_nvfp4_rows(void **state) {
    (void)state;
    int number = 0;
    for (int p = 0; p < N_PAIRS; p++)
        for (int m = 0; m < N_MODES; m++)
            for (int layout = 0; layout < 3; layout++)
                for (int weighting = 0; weighting < 3; weighting++, number++) {
                    bool plain = pairs[p][0] != MOE4_NVFP4 && pairs[p][1] != MOE4_NVFP4;
                    if ((plain && m) || number % every) continue;
                    size_t T = number % 2 ? 150 : 9, hidden = number % 3 ? 176 : 320;
                    struct layer l = random_layer(4, hidden, 64, 2, pairs[p][0], pairs[p][1], number % 4 == 0);
                    struct layer s = random_layer(1, hidden, 48, 1, pairs[p][0], pairs[p][1], false);
                    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
                    o.n_experts = 4;
                    o.top_k = 2;
                    o.act = plain ? MOE4_ACT_DEFAULT : modes[m];
                    o.weighting = (moe4_weighting)weighting;
                    o.shared = number % 2 ? s.expert : NULL;
                    o.x_dtype = MOE4_NVFP4;
                    o.y_dtype = MOE4_F32;
                    struct call c = {&l, random_floats(T * hidden), random_routing_weights(T * 2), random_ids(T * 2, 4), T};
                    char what[128];
                    snprintf(what, sizeof what, "rows case %d: %s/%s %s, layout %d, weight place %d", number, moe4_dtype_name(l.up),
                             moe4_dtype_name(l.down), moe4_act_name(o.act), layout, weighting);
                    compare(&c, &o, (moe4_scale_layout)layout, what);
                    free((void *)c.x);
                    free((void *)c.weights);
                    free((void *)c.ids);
                    free_layer(&l);
                    free_layer(&s);
                }
    NO_FAILURES();
}

/* A scale byte or a global scale that is no number: the row comes out NaN, its neighbours do not. */
static void test_bad_nvfp4_rows(void **state) {
    (void)state;
    enum { T = 5, H = 64 };
    struct layer l = random_layer(2, H, 48, 1, MOE4_NVFP4, MOE4_NVFP4, false);
    float *x = random_floats(T * H), y[T * H], nan = NAN;
    for (int m = 0; m < N_MODES; m++) {
        moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
        moe4_moe *moe;
        size_t bytes;
        o.n_experts = 2;
        o.top_k = 1;
        o.act = modes[m];
        o.x_dtype = MOE4_NVFP4;
        o.y_dtype = MOE4_F32;
        OK(gpu, moe4_moe_create(&moe, gpu, l.expert, &o));
        OK(gpu, moe4_moe_workspace_bytes(moe, &bytes, T));
        moe4_workspace ws = give_workspace(gpu, bytes);
        struct given_x g;
        give_x(&g, gpu, x, T, H, MOE4_NVFP4, MOE4_SCALES_LINEAR, true);
        uint8_t bad = 0x7F, sign = 0x85;
        OK(gpu, moe4_memory_copy(gpu, (uint8_t *)g.rows.scales + 1 * (H / 16) + 2, &bad, 1, NULL));
        OK(gpu, moe4_memory_copy(gpu, (uint8_t *)g.rows.scales + 3 * (H / 16), &sign, 1, NULL));
        OK(gpu, moe4_memory_copy(gpu, (float *)g.rows.global + 4, &nan, sizeof nan, NULL));
        int32_t ids[T] = {0, 1, 1, 0, 1};
        float weights[T] = {1, 1, 1, 1, 1}, *out = give(gpu, NULL, sizeof y);
        OK(gpu, moe4_moe_forward(moe, out, g.x, give(gpu, ids, sizeof ids), give(gpu, weights, sizeof weights), T, &ws, NULL));
        take(gpu, y, out, sizeof y);
        for (int i = 0; i < T * H; i++) {
            bool want_nan = i / H == 1 || i / H >= 3;
            EXPECT((isnan(y[i]) != 0) == want_nan, "%s: y[%d, %d] is %g\n", moe4_act_name(modes[m]), i / H, i % H, (double)y[i]);
        }
        moe4_moe_report report = MOE4_MOE_REPORT_INIT;
        OK(gpu, moe4_moe_report_read(moe, &report, NULL, &ws, NULL));
        EXPECT(report.n_nonfinite_rows == 3, "%lu bad rows\n", report.n_nonfinite_rows);
        free_given();
        moe4_moe_destroy(moe);
    }
    free(x);
    free_layer(&l);
    NO_FAILURES();
}

/* ---- linears ---- */

struct linear_case {
    const moe4_weight *w;
    const float *x;
    size_t T, n0, n1;
    moe4_scale_layout layout;
};

static uint64_t run_linear(moe4_ctx *ctx, float *y, const struct linear_case *c, const moe4_linear_options *o) {
    moe4_linear *l;
    struct given_x x;
    size_t bytes, n[2] = {c->T * c->n0, c->T * c->n1}, width = moe4_dtype_bytes(o->y_dtype);
    uint64_t n_saturated;
    OK(ctx, moe4_linear_create(&l, ctx, c->w, 2, o));
    OK(ctx, moe4_linear_workspace_bytes(l, &bytes, c->T));
    moe4_workspace ws = give_workspace(ctx, bytes);
    give_x(&x, ctx, c->x, c->T, c->w->cols, o->x_dtype, c->layout, c->layout != MOE4_SCALES_LINEAR);
    void *out[2] = {give(ctx, NULL, n[0] * width), give(ctx, NULL, n[1] * width)}, *host = malloc((n[0] + n[1]) * width);
    OK(ctx, moe4_linear_forward(l, out, &n_saturated, x.x, c->T, &ws, NULL));
    take(ctx, host, out[0], n[0] * width);
    take(ctx, (char *)host + n[0] * width, out[1], n[1] * width);
    widen(y, host, o->y_dtype, n[0] + n[1]);
    free(host);
    free_given();
    moe4_linear_destroy(l);
    return n_saturated;
}

static void test_linears(void **state) {
    (void)state;
    static const moe4_dtype dtypes[] = {MOE4_NVFP4, MOE4_BF16, MOE4_F16, MOE4_F32};
    int number = 0;
    for (int d = 0; d < 4; d++)
        for (int m = 0; m < (d ? 1 : N_MODES); m++)
            for (int bias = 0; bias < 3; bias++) /* none, one of the two, both */
                for (int rows = 0; rows < 4; rows++)
                    for (int t = 0; t < 3; t++, number++) {
                        if (number % every) continue;
                        size_t T = t == 0 ? 1 : t == 1 ? 40 : 133, K = 240;
                        moe4_weight w[2] = {ref_random_weight(dtypes[d], 100, K), ref_random_weight(dtypes[d], 37, K)};
                        for (int i = 0; i < bias; i++) random_bias(&w[i]);
                        moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
                        o.act = d ? MOE4_ACT_DEFAULT : modes[m];
                        o.x_dtype = rows < 3 ? MOE4_NVFP4 : MOE4_BF16;
                        o.y_dtype = number % 2 ? MOE4_BF16 : MOE4_F32;
                        struct linear_case c = {
                            w, random_floats(T * K), T, 100, 37, rows < 3 ? (moe4_scale_layout)rows : MOE4_SCALES_LINEAR};
                        float *want = malloc(T * 137 * sizeof *want), *got = malloc(T * 137 * sizeof *got);
                        uint64_t a = run_linear(cpu, want, &c, &o), b = run_linear(gpu, got, &c, &o);
                        char what[96];
                        snprintf(what, sizeof what, "linear %s %s, bias %d, rows %d, T %zu", moe4_dtype_name(dtypes[d]),
                                 moe4_act_name(o.act), bias, rows, T);
                        EXPECT(a == b, "%s: %lu saturated blocks, want %lu\n", what, b, a);
                        expect_close(got, want, T, 100, o.y_dtype == MOE4_F32 ? MOE4_ACT_BF16 : MOE4_ACT_TOKEN, what);
                        expect_close(got + T * 100, want + T * 100, T, 37, o.y_dtype == MOE4_F32 ? MOE4_ACT_BF16 : MOE4_ACT_TOKEN, what);
                        free(want);
                        free(got);
                        free((void *)c.x);
                        for (int i = 0; i < 2; i++) {
                            free((void *)w[i].bias);
                            ref_free_weight(&w[i]);
                        }
                    }
    NO_FAILURES();
}

/* FP8 is widened on the host, so it must be the host's. */
static void test_fp8(void **state) {
    (void)state;
    enum { T = 9, N = 100, K = 208 };
    uint8_t codes[N * K];
    float scales[1 * 2] = {0.02f, 0.03f};
    for (int i = 0; i < N * K; i++) codes[i] = (uint8_t)(ref_random() % 0x7F | (ref_random() & 0x80));
    moe4_weight w[2] = {{.dtype = MOE4_F8_E4M3, .rows = N, .cols = K, .data = codes, .scale = (uint8_t *)scales}};
    w[0].scale_dtype = MOE4_F32;
    w[0].scale_rows = w[0].scale_cols = 128;
    w[1] = w[0];
    moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
    struct linear_case c = {w, random_floats(T * K), T, N, N, MOE4_SCALES_LINEAR};
    float want[2 * T * N], got[2 * T * N];
    run_linear(cpu, want, &c, &o);
    run_linear(gpu, got, &c, &o);
    expect_close(got, want, 2 * T, N, MOE4_ACT_BF16, "FP8");
    moe4_linear *none;
    w[1].data = give(gpu, codes, sizeof codes);
    moe4_status status = moe4_linear_create(&none, gpu, w, 2, &o);
    EXPECT(status == MOE4_ERROR_UNSUPPORTED && strstr(moe4_ctx_error(gpu), "weight 1"), "%s\n", moe4_ctx_error(gpu));
    free_given();
    free((void *)c.x);
    NO_FAILURES();
}

/* ---- routers ---- */

static void run_select(moe4_ctx *ctx, int32_t *ids, float *weights, const moe4_router *r, const float *logits, const int32_t *token_ids,
                       const uint8_t *alt, size_t T, size_t E, size_t k) {
    moe4_router_tokens tokens = MOE4_ROUTER_TOKENS_INIT;
    tokens.token_ids = token_ids ? give(ctx, token_ids, T * sizeof *token_ids) : NULL;
    tokens.alt_bias = alt ? give(ctx, alt, T) : NULL;
    void *i = give(ctx, NULL, T * k * sizeof *ids), *w = give(ctx, NULL, T * k * sizeof *weights);
    OK(ctx, moe4_router_select(r, i, w, give(ctx, logits, T * E * sizeof *logits), &tokens, T, NULL));
    take(ctx, ids, i, T * k * sizeof *ids);
    take(ctx, weights, w, T * k * sizeof *weights);
    free_given();
}

static void test_routers(void **state) {
    (void)state;
    enum { T = 70, VOCAB = 50 };
    static const struct {
        moe4_router_kind kind;
        size_t E, k;
        bool alt, wide;
    } cases[] = {{MOE4_ROUTER_HASH, 32, 4, false, false},
                 {MOE4_ROUTER_HASH, 384, 6, false, true},
                 {MOE4_ROUTER_HASH, 4096, 8, false, true},
                 {MOE4_ROUTER_SIGMOID_BIAS, 256, 8, true, false},
                 {MOE4_ROUTER_SQRTSOFTPLUS_BIAS, 384, 6, true, false},
                 {MOE4_ROUTER_TOPK_SOFTMAX, 4096, 4, true, false}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        size_t E = cases[c].E, k = cases[c].k;
        bool hash = cases[c].kind == MOE4_ROUTER_HASH;
        float *logits = random_floats(T * E), *bias = random_floats(E), *alt_bias = random_floats(E), *weights[2];
        int32_t *ids[2], token_ids[T], *narrow_table = malloc(VOCAB * k * sizeof *narrow_table);
        int64_t *wide_table = malloc(VOCAB * k * sizeof *wide_table);
        uint8_t alt[T];
        for (size_t i = 0; i < VOCAB * k; i++) wide_table[i] = narrow_table[i] = (int32_t)((i / k * 7 + i % k * 3) % E);
        for (int t = 0; t < T; t++) {
            token_ids[t] = (int32_t)(ref_random() % VOCAB);
            alt[t] = ref_random() % 2 ? (uint8_t)(1 + ref_random() % 255) : 0;
        }
        logits[9 * E + 1] = INFINITY;
        moe4_router_options o = MOE4_ROUTER_OPTIONS_INIT;
        o.kind = cases[c].kind;
        o.n_experts = E;
        o.top_k = k;
        o.normalize = cases[c].kind != MOE4_ROUTER_TOPK_SOFTMAX;
        o.scale = 1.5f;
        if (hash) {
            o.gate_temp = 0.7f;
            o.table = cases[c].wide ? (void *)wide_table : (void *)narrow_table;
            o.table_dtype = cases[c].wide ? MOE4_I64 : MOE4_I32;
            o.n_token_ids = VOCAB;
        }
        if (cases[c].alt) o.alt_bias = alt_bias;
        moe4_router *r[2];
        for (int d = 0; d < 2; d++) {
            moe4_ctx *ctx = d ? gpu : cpu;
            ids[d] = malloc(T * k * sizeof **ids);
            weights[d] = malloc(T * k * sizeof **weights);
            OK(ctx, moe4_router_create(&r[d], ctx, NULL, hash ? NULL : bias, &o));
            run_select(ctx, ids[d], weights[d], r[d], logits, hash ? token_ids : NULL, cases[c].alt ? alt : NULL, T, E, k);
        }
        for (size_t i = 0; i < T * k; i++) {
            EXPECT(ids[0][i] == ids[1][i], "router %zu, token %zu: expert %d, want %d\n", c, i / k, ids[1][i], ids[0][i]);
            EXPECT(i / k == 9 ? isnan(weights[1][i]) : fabsf(weights[0][i] - weights[1][i]) <= 2e-6f * fabsf(weights[0][i]),
                   "router %zu, token %zu: weight %g, want %g\n", c, i / k, (double)weights[1][i], (double)weights[0][i]);
        }
        if (hash) { /* ids outside the table: on a device they show as NaN weights */
            token_ids[3] = VOCAB;
            token_ids[5] = -7;
            run_select(gpu, ids[1], weights[1], r[1], logits, token_ids, NULL, T, E, k);
            for (size_t i = 0; i < T * k; i++) {
                bool out = i / k == 3 || i / k == 5 || i / k == 9;
                EXPECT((isnan(weights[1][i]) != 0) == out, "router %zu, token %zu: weight %g\n", c, i / k, (double)weights[1][i]);
                EXPECT(ids[1][i] == (out ? (int32_t)(i % k) : ids[0][i]), "router %zu, token %zu: expert %d\n", c, i / k, ids[1][i]);
            }
        }
        for (int d = 0; d < 2; d++) {
            moe4_router_destroy(r[d]);
            free(ids[d]);
            free(weights[d]);
        }
        free(logits);
        free(bias);
        free(alt_bias);
        free(narrow_table);
        free(wide_table);
    }
    NO_FAILURES();
}

int main(int argc, char **argv) {
    read_arguments(argc, argv);
    int status = open_both("test_cuda_options", 0);
    if (status) return status;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layers),  cmocka_unit_test(test_nvfp4_rows), cmocka_unit_test(test_bad_nvfp4_rows),
        cmocka_unit_test(test_linears), cmocka_unit_test(test_fp8),        cmocka_unit_test(test_routers),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    moe4_ctx_destroy(cpu);
    moe4_ctx_destroy(gpu);
    return failed;
}
