/* Engines with a pipeline of their own, on a device: rows that stand with their experts, sorted or batched, summed or not, with offsets and
 * counts that only the device knows; groups of rows; an expert replaced; two GPUs. Against the CPU with the same inputs.
 * Skipped (77) where there is no GPU. */
#include "experts.h"

#include <cuda_runtime_api.h>

/* ---- rows that stand with their experts ---- */

enum { E = 5, MAX_ROWS = 24 };

struct dispatched {
    const struct layer *l;
    size_t n_rows, n_tokens;
    int32_t offsets[E + 1], counts[E];
    int32_t *token; /* [n_rows] */
    float *x, *weights;
};

enum form { SORTED, SUMMED, BATCHED };
static const char *const form_names[] = {"sorted", "summed", "batched"};

/* Some experts have no rows, one is full; behind the last offset, and behind counts, stand rows of NaNs that nobody reads. */
static struct dispatched dispatch(const struct layer *l, enum form form) {
    struct dispatched d = {.l = l, .n_tokens = 31};
    size_t hidden = l->hidden, used = 0;
    for (size_t e = 0; e < E; e++) {
        d.counts[e] = e == 1 ? 0 : e == 3 ? MAX_ROWS : (int32_t)(ref_random() % MAX_ROWS);
        d.offsets[e + 1] = d.offsets[e] + d.counts[e];
    }
    d.n_rows = form == BATCHED ? E * MAX_ROWS : (size_t)d.offsets[E] + 4;
    d.x = random_floats(d.n_rows * hidden);
    d.weights = random_routing_weights(d.n_rows);
    d.token = malloc(d.n_rows * sizeof *d.token);
    for (size_t r = 0; r < d.n_rows; r++) {
        bool live = form == BATCHED ? (int32_t)(r % MAX_ROWS) < d.counts[r / MAX_ROWS] : (int32_t)r < d.offsets[E];
        d.token[r] = ref_random() % 9 == 0 ? -1 : (int32_t)(ref_random() % d.n_tokens);
        if (d.token[r] == 4) d.token[r] = 5; /* token 4 gets no row */
        for (size_t j = 0; j < hidden && !live; j++) d.x[r * hidden + j] = NAN;
        used += live;
    }
    assert_true(used > 0);
    return d;
}

static void free_dispatched(struct dispatched *d) {
    free(d->x);
    free(d->weights);
    free(d->token);
}

struct rows_call {
    const struct dispatched *d;
    enum form form;
    bool weighted;
    moe4_scale_layout layout;
};

/* Rows of y, from 77s where nothing is written. */
static size_t y_rows(const struct rows_call *c) {
    return c->form == SUMMED ? c->d->n_tokens : c->d->n_rows;
}

static void run_rows(moe4_ctx *ctx, float *y, moe4_moe_report *report, const struct rows_call *c, const moe4_moe_options *o) {
    const struct dispatched *d = c->d;
    struct given_x x;
    moe4_moe *moe;
    size_t bytes, n = y_rows(c) * d->l->hidden;
    OK(ctx, moe4_moe_create(&moe, ctx, d->l->expert, o));
    OK(ctx, moe4_moe_rows_workspace_bytes(moe, &bytes, d->n_rows, c->form == SUMMED ? d->n_tokens : 0));
    moe4_workspace ws = give_workspace(ctx, bytes);
    give_x(&x, ctx, d->x, d->n_rows, d->l->hidden, o->x_dtype, c->layout, c->layout != MOE4_SCALES_LINEAR);
    for (size_t i = 0; i < n; i++) y[i] = 77;
    float *out = give(ctx, y, n * sizeof *y), *weights = c->weighted ? give(ctx, d->weights, d->n_rows * sizeof *weights) : NULL;
    int32_t *offsets = give(ctx, d->offsets, sizeof d->offsets), *counts = give(ctx, d->counts, sizeof d->counts);
    int32_t *token = c->form == SUMMED ? give(ctx, d->token, d->n_rows * sizeof *token) : NULL;
    if (c->form == BATCHED)
        OK(ctx, moe4_moe_forward_batched(moe, out, x.x, counts, weights, MAX_ROWS, &ws, NULL));
    else
        OK(ctx, moe4_moe_forward_sorted(moe, out, x.x, offsets, weights, token, d->n_rows, token ? d->n_tokens : 0, &ws, NULL));
    take(ctx, y, out, n * sizeof *y);
    OK(ctx, moe4_moe_report_read(moe, report, NULL, &ws, NULL));
    free_given();
    moe4_moe_destroy(moe);
}

static void compare_call(const struct rows_call *c, const moe4_moe_options *o, const char *what) {
    size_t rows = y_rows(c), hidden = c->d->l->hidden;
    float *want = malloc(rows * hidden * sizeof *want), *got = malloc(rows * hidden * sizeof *got);
    moe4_moe_report a = MOE4_MOE_REPORT_INIT, b = MOE4_MOE_REPORT_INIT;
    run_rows(cpu, want, &a, c, o);
    run_rows(gpu, got, &b, c, o);
    expect_close(got, want, rows, hidden, act_h(c->d->l, o->act == MOE4_ACT_DEFAULT ? MOE4_ACT_TOKEN : o->act), what);
    for (size_t i = 0; i < rows * hidden; i++)
        if ((want[i] == 77) != (got[i] == 77)) {
            EXPECT(false, "%s: y[%zu, %zu] is %g, want %g\n", what, i / hidden, i % hidden, (double)got[i], (double)want[i]);
            break;
        }
    EXPECT(a.n_tokens == b.n_tokens && a.n_slots == b.n_slots && a.n_experts_hit == b.n_experts_hit && a.weight_bytes == b.weight_bytes &&
               a.n_nonfinite_rows == b.n_nonfinite_rows,
           "%s: report: %lu tokens %lu slots %lu experts %lu bytes %lu bad rows, want %lu %lu %lu %lu %lu\n", what, b.n_tokens, b.n_slots,
           b.n_experts_hit, b.weight_bytes, b.n_nonfinite_rows, a.n_tokens, a.n_slots, a.n_experts_hit, a.weight_bytes, a.n_nonfinite_rows);
    EXPECT(llabs((long long)(a.n_saturated_blocks - b.n_saturated_blocks)) <= 2 + (long long)a.n_saturated_blocks / 50,
           "%s: %lu saturated blocks, want %lu\n", what, b.n_saturated_blocks, a.n_saturated_blocks);
    free(want);
    free(got);
}

static moe4_moe_options options(moe4_act act, moe4_weighting weighting, moe4_dtype x_dtype) {
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = E + 2;
    o.first_expert = 1;
    o.n_local = E;
    o.top_k = 2;
    o.act = act;
    o.weighting = weighting;
    o.x_dtype = x_dtype;
    o.y_dtype = MOE4_F32;
    return o;
}

static void test_forms(void **state) {
    (void)state;
    static const moe4_dtype x_dtypes[] = {MOE4_F32, MOE4_BF16, MOE4_NVFP4};
    int number = 0;
    for (int form = 0; form < 3; form++)
        for (int m = 0; m <= N_MODES; m++) /* the last: unquantized experts */
            for (int weighting = 0; weighting < 3; weighting++)
                for (int x = 0; x < 3; x++)
                    for (int bias = 0; bias < 2; bias++, number++) {
                        if (number % every) continue;
                        moe4_dtype dtype = m == N_MODES ? MOE4_BF16 : MOE4_NVFP4;
                        struct layer l = random_layer(E, number % 2 ? 208 : 96, number % 3 ? 80 : 160, 2, dtype, dtype, bias);
                        struct dispatched d = dispatch(&l, (enum form)form);
                        moe4_moe_options o = options(m == N_MODES ? MOE4_ACT_DEFAULT : modes[m], (moe4_weighting)weighting, x_dtypes[x]);
                        struct rows_call c = {&d, (enum form)form, number % 4 != 3, (moe4_scale_layout)(number % 3)};
                        if (o.x_dtype == MOE4_NVFP4) /* the quantizer takes no NaN */
                            for (size_t i = 0; i < d.n_rows * l.hidden; i++) d.x[i] = isnan(d.x[i]) ? 1e6f : d.x[i];
                        set_activation(&o, number % N_ACTIVATIONS);
                        char what[128];
                        snprintf(what, sizeof what, "case %d: %s, %s %s, weight place %d, x %s, bias %d, activation %d", number,
                                 form_names[form], moe4_dtype_name(dtype), moe4_act_name(o.act), weighting, moe4_dtype_name(o.x_dtype),
                                 bias, number % N_ACTIVATIONS);
                        compare_call(&c, &o, what);
                        free_dispatched(&d);
                        free_layer(&l);
                    }
    NO_FAILURES();
}

/* A row's result does not depend on the form: sorted and batched rows have the bits that moe4_moe_forward gives with top_k 1. */
static void test_same_bits(void **state) {
    (void)state;
    enum { T = 40, H = 128 };
    struct layer l = random_layer(E, H, 96, 1, MOE4_NVFP4, MOE4_NVFP4, false);
    float *x = random_floats(T * H), *weights = random_routing_weights(T), want[T * H], got[T * H], sorted[T * H], batch[E * T * H];
    float rows[T * H], row_weights[T];
    for (int m = 0; m < N_MODES; m++) {
        int32_t ids[T], offsets[E + 1] = {0}, counts[E] = {0}, at[T], n = 0;
        for (int t = 0; t < T; t++) ids[t] = (int32_t)(ref_random() % E);
        for (int e = 0; e < E; e++) {
            for (int t = 0; t < T; t++)
                if (ids[t] == e) at[n++] = t;
            offsets[e + 1] = n;
            counts[e] = n - offsets[e];
        }
        memset(batch, 0xFF, sizeof batch);
        for (int r = 0; r < T; r++) {
            memcpy(rows + r * H, x + at[r] * H, H * sizeof *x);
            memcpy(batch + (ids[at[r]] * T + r - offsets[ids[at[r]]]) * H, x + at[r] * H, H * sizeof *x);
            row_weights[r] = weights[at[r]];
        }
        moe4_moe_options o = options(modes[m], MOE4_WEIGHT_AFTER_DOWN, MOE4_F32);
        moe4_moe *moe;
        size_t bytes, more;
        o.n_experts = E;
        o.first_expert = 0;
        o.top_k = 1;
        OK(gpu, moe4_moe_create(&moe, gpu, l.expert, &o));
        OK(gpu, moe4_moe_workspace_bytes(moe, &bytes, T));
        OK(gpu, moe4_moe_rows_workspace_bytes(moe, &more, E * T, 0));
        moe4_workspace ws = give_workspace(gpu, bytes > more ? bytes : more);
        float *y = give(gpu, NULL, sizeof batch);
        OK(gpu, moe4_moe_forward(moe, y, give(gpu, x, sizeof rows), give(gpu, ids, sizeof ids), give(gpu, weights, sizeof row_weights), T,
                                 &ws, NULL));
        take(gpu, want, y, sizeof want);
        const float *w = give(gpu, row_weights, sizeof row_weights);
        OK(gpu,
           moe4_moe_forward_sorted(moe, y, give(gpu, rows, sizeof rows), give(gpu, offsets, sizeof offsets), w, NULL, T, 0, &ws, NULL));
        take(gpu, sorted, y, sizeof sorted);
        for (int r = 0; r < T; r++) memcpy(got + at[r] * H, sorted + r * H, H * sizeof *got);
        EXPECT(memcmp(got, want, sizeof want) == 0, "%s: sorted rows have other bits\n", moe4_act_name(modes[m]));
        OK(gpu, moe4_moe_forward_batched(moe, y, give(gpu, batch, sizeof batch), give(gpu, counts, sizeof counts), NULL, T, &ws, NULL));
        take(gpu, batch, y, sizeof batch);
        for (int r = 0; r < T; r++)
            for (int j = 0; j < H; j++) got[at[r] * H + j] = row_weights[r] * batch[(ids[at[r]] * T + r - offsets[ids[at[r]]]) * H + j];
        EXPECT(memcmp(got, want, sizeof want) == 0, "%s: batched rows have other bits\n", moe4_act_name(modes[m]));
        free_given();
        moe4_moe_destroy(moe);
    }
    free(x);
    free(weights);
    free_layer(&l);
    NO_FAILURES();
}

/* A captured call that meets other counts and offsets when it is replayed, and numbers that are out of range. */
static void test_replays(void **state) {
    (void)state;
    enum { H = 96, N = E * MAX_ROWS };
    struct layer l = random_layer(E, H, 64, 1, MOE4_NVFP4, MOE4_NVFP4, false);
    moe4_moe_options o = options(MOE4_ACT_TOKEN, MOE4_WEIGHT_AFTER_DOWN, MOE4_F32);
    float *x = random_floats(N * H), want[N * H], got[N * H];
    moe4_moe *moe;
    size_t bytes;
    OK(gpu, moe4_moe_create(&moe, gpu, l.expert, &o));
    OK(gpu, moe4_moe_rows_workspace_bytes(moe, &bytes, N, N));
    for (int form = 0; form < 3; form++) {
        moe4_workspace ws = give_workspace(gpu, bytes), other = give_workspace(gpu, bytes);
        void *dx = give(gpu, x, N * H * sizeof *x), *y = give(gpu, NULL, sizeof want), *numbers = give(gpu, NULL, (E + 1) * 4);
        int32_t token[N];
        for (int r = 0; r < N; r++) token[r] = r % 7 == 3 ? N + r : N - 1 - r / 2; /* some past the last token */
        void *dt = give(gpu, token, sizeof token);
        cudaStream_t stream;
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        assert_int_equal(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
        for (int i = -1; i < 5; i++) {
            static const int32_t cases[5][E + 1] = {{0, 3, 3, 20, 21, N},
                                                    {0, 0, 0, 0, 0, 0},
                                                    {0, 24, 1, 7, 24, 30},
                                                    {9, -5, 1000000, 4, 2, 8},
                                                    {0, 1, 2, INT32_MIN, INT32_MAX, 60}};
            if (i >= 0) OK(gpu, moe4_memory_copy(gpu, numbers, cases[i], sizeof cases[i], NULL));
            for (int graphed = 0; graphed < 2; graphed++) {
                moe4_workspace *w = graphed ? &ws : &other;
                if (i < 0 && !graphed) continue;
                OK(gpu, moe4_memory_copy(gpu, y, x, sizeof want, NULL)); /* what is not written */
                if (graphed && i >= 0) {
                    assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
                } else {
                    if (graphed) assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
                    void *s = graphed ? stream : NULL;
                    if (form == BATCHED)
                        OK(gpu, moe4_moe_forward_batched(moe, y, dx, numbers, NULL, MAX_ROWS, w, s));
                    else
                        OK(gpu, moe4_moe_forward_sorted(moe, y, dx, numbers, NULL, form == SUMMED ? dt : NULL, N, N, w, s));
                    if (graphed) {
                        assert_int_equal(cudaStreamEndCapture(stream, &graph), cudaSuccess);
                        assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
                        continue;
                    }
                }
                OK(gpu, moe4_memory_copy(gpu, graphed ? got : want, y, sizeof got, graphed ? stream : NULL));
            }
            if (i < 0) continue;
            EXPECT(memcmp(got, want, sizeof got) == 0, "%s, case %d: the replay has other bits\n", form_names[form], i);
            moe4_moe_report report = MOE4_MOE_REPORT_INIT;
            OK(gpu, moe4_moe_report_read(moe, &report, NULL, &ws, stream));
            EXPECT(report.n_slots <= N && (i != 1 || report.n_slots == 0) && (i != 0 || form == BATCHED || report.n_slots == N),
                   "%s, case %d: %lu slots\n", form_names[form], i, report.n_slots);
            for (int r = 0; r < N && form == SORTED; r++) /* rows past the last offset, which is the highest so far */
                if ((uint64_t)r >= report.n_slots)
                    EXPECT(memcmp(got + r * H, x + r * H, H * 4) == 0, "case %d: row %d was written\n", i, r);
        }
        cudaGraphExecDestroy(exec);
        cudaGraphDestroy(graph);
        cudaStreamDestroy(stream);
        free_given();
    }
    moe4_moe_destroy(moe);
    free(x);
    free_layer(&l);
    NO_FAILURES();
}

/* No rows at all: tokens get zeros; and what is host memory is said to be. */
static void test_none_and_errors(void **state) {
    (void)state;
    struct layer l = random_layer(E, 64, 32, 1, MOE4_NVFP4, MOE4_NVFP4, false);
    moe4_moe_options o = options(MOE4_ACT_TOKEN, MOE4_WEIGHT_AFTER_DOWN, MOE4_F32);
    moe4_moe *moe;
    size_t bytes;
    OK(gpu, moe4_moe_create(&moe, gpu, l.expert, &o));
    OK(gpu, moe4_moe_rows_workspace_bytes(moe, &bytes, 8, 3));
    moe4_workspace ws = give_workspace(gpu, bytes);
    int32_t numbers[E + 1] = {0}, token[8] = {0};
    float zeros[8 * 64] = {0}, y[3 * 64];
    void *x = give(gpu, zeros, sizeof zeros), *out = give(gpu, NULL, sizeof zeros), *n = give(gpu, numbers, sizeof numbers),
         *t = give(gpu, token, sizeof token);
    OK(gpu, moe4_moe_forward_sorted(moe, out, NULL, n, NULL, t, 0, 3, &ws, NULL));
    take(gpu, y, out, sizeof y);
    assert_memory_equal(y, zeros, sizeof y);
    OK(gpu, moe4_moe_forward_sorted(moe, NULL, NULL, n, NULL, NULL, 0, 0, &ws, NULL));
    OK(gpu, moe4_moe_forward_batched(moe, NULL, NULL, n, NULL, 0, &ws, NULL));
    static const char *const says[] = {"offsets is host memory", "weights is host memory", "row_token is host memory", "x is host memory"};
    for (int i = 0; i < 4; i++) {
        moe4_status status = moe4_moe_forward_sorted(moe, out, i == 3 ? (void *)zeros : x, i == 0 ? numbers : (int32_t *)n,
                                                     i == 1 ? zeros : NULL, i == 2 ? token : (int32_t *)t, 8, 3, &ws, NULL);
        EXPECT(status == MOE4_ERROR_ARGUMENT && strstr(moe4_ctx_error(gpu), says[i]), "%s, not: %s\n", moe4_ctx_error(gpu), says[i]);
    }
    assert_int_equal(moe4_moe_forward_batched(moe, out, x, numbers, NULL, 1, &ws, NULL), MOE4_ERROR_ARGUMENT);
    EXPECT(strstr(moe4_ctx_error(gpu), "counts is host memory"), "%s\n", moe4_ctx_error(gpu));
    assert_int_equal(moe4_moe_forward_batched(moe, out, x, NULL, NULL, 1, &ws, NULL), MOE4_ERROR_ARGUMENT);
    free_given();
    moe4_moe_destroy(moe);
    free_layer(&l);
    NO_FAILURES();
}

/* ---- groups of rows ---- */

struct grouped_case {
    const moe4_weight *w;
    size_t n_groups, n_rows, K, N;
    const float *x;
    int32_t offsets[E + 1];
    moe4_scale_layout layout;
};

static uint64_t run_grouped(moe4_ctx *ctx, float *y, const struct grouped_case *c, const moe4_grouped_options *o) {
    moe4_grouped *g;
    struct given_x x;
    size_t parts = o->block_diagonal ? c->n_groups : 1, bytes, width = moe4_dtype_bytes(o->y_dtype);
    size_t y_ld = o->y_ld ? o->y_ld : parts * c->N, n = c->n_rows * y_ld;
    uint64_t n_saturated;
    OK(ctx, moe4_grouped_create(&g, ctx, c->w, c->n_groups, o));
    OK(ctx, moe4_grouped_workspace_bytes(g, &bytes, c->n_rows));
    moe4_workspace ws = give_workspace(ctx, bytes);
    give_x(&x, ctx, c->x, c->n_rows * parts, c->K, o->x_dtype, c->layout, c->layout != MOE4_SCALES_LINEAR || o->block_diagonal);
    for (size_t i = 0; i < n; i++) y[i] = 77;
    void *host = narrow(y, n, o->y_dtype), *out = give(ctx, host, n * width);
    OK(ctx, moe4_grouped_forward(g, out, &n_saturated, x.x, o->block_diagonal ? NULL : give(ctx, c->offsets, sizeof c->offsets), c->n_rows,
                                 &ws, NULL));
    take(ctx, host, out, n * width);
    widen(y, host, o->y_dtype, n);
    free(host);
    free_given();
    moe4_grouped_destroy(g);
    return n_saturated;
}

static void test_grouped(void **state) {
    (void)state;
    static const moe4_dtype dtypes[] = {MOE4_NVFP4, MOE4_BF16, MOE4_F32}, x_dtypes[] = {MOE4_F32, MOE4_F16, MOE4_NVFP4};
    int number = 0;
    for (int diagonal = 0; diagonal < 2; diagonal++)
        for (int d = 0; d < 3; d++)
            for (int m = 0; m < (d ? 1 : N_MODES); m++)
                for (int x = 0; x < 3; x++)
                    for (int bias = 0; bias < 2; bias++)
                        for (int form = 0; form < 3; form++, number++) { /* of y: fp32, fp32 with a gap, bf16 */
                            if (number % every) continue;
                            size_t K = number % 2 ? 80 : 192, N = number % 3 ? 100 : 64, rows = 37, parts = diagonal ? E : 1;
                            moe4_weight w[E];
                            for (int e = 0; e < E; e++) {
                                w[e] = ref_random_weight(dtypes[d], N, K);
                                if (bias && e != 2) random_bias(&w[e]);
                            }
                            moe4_grouped_options o = MOE4_GROUPED_OPTIONS_INIT;
                            o.act = d ? MOE4_ACT_DEFAULT : modes[m];
                            o.x_dtype = x_dtypes[x];
                            o.y_dtype = form == 2 ? MOE4_BF16 : MOE4_F32;
                            o.y_ld = form == 1 ? parts * N + 8 : 0;
                            o.block_diagonal = diagonal;
                            struct grouped_case c = {
                                .w = w, .n_groups = E, .n_rows = rows, .K = K, .N = N, .offsets = {0, 5, 5, 22, 30, 33}};
                            c.x = random_floats(rows * parts * K);
                            c.layout = diagonal ? MOE4_SCALES_LINEAR : (moe4_scale_layout)(number % 3);
                            if (x < 2 && number % 4 == 1) ((float *)c.x)[7 * parts * K + 3] = NAN;
                            size_t n = rows * (o.y_ld ? o.y_ld : parts * N);
                            float *want = malloc(n * sizeof *want), *got = malloc(n * sizeof *got);
                            uint64_t a = run_grouped(cpu, want, &c, &o), b = run_grouped(gpu, got, &c, &o);
                            char what[128];
                            snprintf(what, sizeof what, "grouped %d: %s %s, diagonal %d, x %s, bias %d, y %d, %zux%zu", number,
                                     moe4_dtype_name(dtypes[d]), moe4_act_name(o.act), diagonal, moe4_dtype_name(o.x_dtype), bias, form, N,
                                     K);
                            EXPECT(a == b, "%s: %lu saturated blocks, want %lu\n", what, b, a);
                            expect_close(got, want, rows, n / rows, form == 2 ? MOE4_ACT_TOKEN : MOE4_ACT_BF16, what);
                            free(want);
                            free(got);
                            free((void *)c.x);
                            for (int e = 0; e < E; e++) {
                                free((void *)w[e].bias);
                                ref_free_weight(&w[e]);
                            }
                        }
    NO_FAILURES();
}

/* ---- an expert replaced, or not ---- */

static void run_by_id(moe4_ctx *ctx, float *y, const moe4_moe *moe, const float *x, size_t T, size_t hidden) {
    size_t bytes;
    int32_t ids[2 * 16];
    float weights[2 * 16];
    assert_true(T <= 16);
    for (size_t i = 0; i < 2 * T; i++) {
        ids[i] = (int32_t)(1 + i % E);
        weights[i] = 1;
    }
    OK(ctx, moe4_moe_workspace_bytes(moe, &bytes, T));
    moe4_workspace ws = give_workspace(ctx, bytes);
    void *out = give(ctx, NULL, T * hidden * sizeof *y);
    OK(ctx, moe4_moe_forward(moe, out, give(ctx, x, T * hidden * sizeof *x), give(ctx, ids, sizeof ids), give(ctx, weights, sizeof weights),
                             T, &ws, NULL));
    take(ctx, y, out, T * hidden * sizeof *y);
    free_given();
}

/* Down's codes end before the matrix does, so that the copy fails when gate and up are there already: the old expert stays whole. */
static void test_replace_fails(void **state) {
    (void)state;
    enum { T = 10, H = 4096, I = 1024, CODES = H * I / 2 };
    for (int bias = 0; bias < 2; bias++) {
        struct layer l = random_layer(E, H, I, 2, MOE4_NVFP4, MOE4_NVFP4, bias),
                     other = random_layer(1, H, I, 1, MOE4_NVFP4, MOE4_NVFP4, bias);
        float *x = random_floats(T * H), *before = malloc(T * H * 4), *after = malloc(T * H * 4), *cpu_after = malloc(T * H * 4);
        moe4_moe_options o = options(MOE4_ACT_TOKEN, MOE4_WEIGHT_AFTER_DOWN, MOE4_F32);
        moe4_moe *moe, *on_cpu;
        void *small;
        OK(gpu, moe4_moe_create(&moe, gpu, l.expert, &o));
        OK(cpu, moe4_moe_create(&on_cpu, cpu, l.expert, &o));
        run_by_id(gpu, before, moe, x, T, H);
        OK(gpu, moe4_memory_alloc(gpu, &small, CODES));
        moe4_expert broken = other.expert[0];
        broken.down.data = (char *)small + CODES - 4096;
        moe4_status status = moe4_moe_replace_expert(moe, 2, &broken);
        EXPECT(status == MOE4_ERROR_DEVICE, "replacing with a matrix that ends too early: %s: %s\n", moe4_status_text(status),
               moe4_ctx_error(gpu));
        print_message("refused: %s\n", moe4_ctx_error(gpu));
        run_by_id(gpu, after, moe, x, T, H);
        EXPECT(memcmp(before, after, T * H * 4) == 0, "an expert that could not be replaced has other bits\n");
        OK(gpu, moe4_moe_replace_expert(moe, 2, &other.expert[0]));
        OK(cpu, moe4_moe_replace_expert(on_cpu, 2, &other.expert[0]));
        run_by_id(gpu, after, moe, x, T, H);
        run_by_id(cpu, cpu_after, on_cpu, x, T, H);
        expect_close(after, cpu_after, T, H, MOE4_ACT_TOKEN, "replaced");
        EXPECT(compare_rows(after, before, T, H, 1e-3).n_off > 0, "the replaced expert changed nothing\n");
        if (!bias) {
            random_bias(&other.expert[0].up);
            status = moe4_moe_replace_expert(moe, 2, &other.expert[0]);
            EXPECT(status == MOE4_ERROR_UNSUPPORTED && strstr(moe4_ctx_error(gpu), "bias"), "a first bias: %s\n", moe4_ctx_error(gpu));
        }
        moe4_memory_free(gpu, small);
        moe4_moe_destroy(moe);
        moe4_moe_destroy(on_cpu);
        free(x);
        free(before);
        free(after);
        free(cpu_after);
        free_layer(&l);
        free_layer(&other);
    }
    NO_FAILURES();
}

/* ---- two GPUs ---- */

/* Two contexts, two devices, one process: the same layers give the same bits, call after call in turn, and the memory of one is refused by
 * the other. */
static void test_two_gpus(void **state) {
    (void)state;
    enum { T = 16, H = 256 };
    moe4_ctx *ctx[2] = {gpu, open_device("cuda:1", 0)};
    if (!ctx[1]) {
        print_message("two GPUs: skipped, %s\n", logged);
        skip();
    }
    struct layer l = random_layer(E, H, 128, 2, MOE4_NVFP4, MOE4_NVFP4, false);
    float *x = random_floats(T * H), y[2][T * H];
    moe4_moe_options o = options(MOE4_ACT_TOKEN, MOE4_WEIGHT_AFTER_DOWN, MOE4_F32);
    moe4_moe *moe[2];
    for (int d = 0; d < 2; d++) OK(ctx[d], moe4_moe_create(&moe[d], ctx[d], l.expert, &o));
    for (int i = 0; i < 4; i++) {
        for (int d = 0; d < 2; d++) run_by_id(ctx[d], y[d], moe[d], x, T, H);
        EXPECT(memcmp(y[0], y[1], sizeof y[0]) == 0, "call %d: the devices give different bits\n", i);
        x[i] += 1;
    }
    int32_t id[2] = {1, 2};
    float weight[2] = {1, 1};
    size_t bytes;
    OK(ctx[0], moe4_moe_workspace_bytes(moe[0], &bytes, 1));
    moe4_workspace ws = give_workspace(ctx[0], bytes);
    void *on_0 = give(ctx[0], x, H * 4), *on_1 = give(ctx[1], x, H * 4);
    moe4_status status =
        moe4_moe_forward(moe[0], on_0, on_1, give(ctx[0], id, sizeof id), give(ctx[0], weight, sizeof weight), 1, &ws, NULL);
    EXPECT(status == MOE4_ERROR_ARGUMENT && strstr(moe4_ctx_error(ctx[0]), "x is memory of cuda:1"), "%s\n", moe4_ctx_error(ctx[0]));
    int current = -1;
    EXPECT(cudaGetDevice(&current) == cudaSuccess && current == 0, "the thread's device is %d after the calls\n", current);
    free_given();
    for (int d = 0; d < 2; d++) moe4_moe_destroy(moe[d]);
    moe4_ctx_destroy(ctx[1]);
    free(x);
    free_layer(&l);
    NO_FAILURES();
}

int main(int argc, char **argv) {
    read_arguments(argc, argv);
    int status = open_both("test_cuda_rows", 0);
    if (status) return status;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forms),           cmocka_unit_test(test_same_bits), cmocka_unit_test(test_replays),
        cmocka_unit_test(test_none_and_errors), cmocka_unit_test(test_grouped),   cmocka_unit_test(test_replace_fails),
        cmocka_unit_test(test_two_gpus),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    moe4_ctx_destroy(cpu);
    moe4_ctx_destroy(gpu);
    return failed;
}
