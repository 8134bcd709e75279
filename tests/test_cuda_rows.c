/* Engines with a pipeline of their own, on a device: rows that stand with their experts, sorted or batched, summed or not, with offsets and
 * counts that only the device knows. Beside the CPU with the same inputs. Skipped (77) where there is no GPU. */
#include "calls.h"

#include <cuda_runtime_api.h>

enum { E = 5, MAX_ROWS = 24 };

/* Some experts have no rows, one is full; behind the last offset, and behind counts, stand rows of NaNs that nobody reads. */
static struct layer_call dispatch(const struct layer *l, enum form form) {
    int32_t *offsets = calloc(E + 1, sizeof *offsets), *counts = malloc(E * sizeof *counts);
    struct layer_call c = {.l = l, .form = form, .n_tokens = 31, .max_rows = MAX_ROWS, .offsets = offsets, .counts = counts};
    size_t hidden = l->hidden, used = 0;
    for (size_t e = 0; e < E; e++) {
        counts[e] = e == 1 ? 0 : e == 3 ? MAX_ROWS : (int32_t)(ref_random() % MAX_ROWS);
        offsets[e + 1] = offsets[e] + counts[e];
    }
    c.n_rows = form == BATCHED ? E * MAX_ROWS : (size_t)offsets[E] + 4;
    float *x = random_floats(c.n_rows * hidden);
    int32_t *token = malloc(c.n_rows * sizeof *token);
    c.x = x;
    c.weights = random_routing_weights(c.n_rows);
    c.token = token;
    for (size_t r = 0; r < c.n_rows; r++) {
        bool live = form == BATCHED ? (int32_t)(r % MAX_ROWS) < counts[r / MAX_ROWS] : (int32_t)r < offsets[E];
        token[r] = ref_random() % 9 == 0 ? -1 : (int32_t)(ref_random() % c.n_tokens);
        if (token[r] == 4) token[r] = 5; /* token 4 gets no row */
        for (size_t j = 0; j < hidden && !live; j++) x[r * hidden + j] = NAN;
        used += live;
    }
    assert_true(used > 0);
    return c;
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
    for (int form = SORTED; form < N_FORMS; form++)
        for (int m = 0; m <= N_MODES; m++) /* the last: unquantized experts */
            for (int weighting = 0; weighting < 3; weighting++)
                for (int x = 0; x < 3; x++)
                    for (int bias = 0; bias < 2; bias++, number++) {
                        if (number % every) continue;
                        moe4_dtype dtype = m == N_MODES ? MOE4_BF16 : MOE4_NVFP4;
                        struct layer l = random_layer(E, number % 2 ? 208 : 96, number % 3 ? 80 : 160, 2, dtype, dtype, bias);
                        struct layer_call c = dispatch(&l, (enum form)form);
                        moe4_moe_options o = options(m == N_MODES ? MOE4_ACT_DEFAULT : modes[m], (moe4_weighting)weighting, x_dtypes[x]);
                        struct layer_call with_weights = c;
                        c.layout = (moe4_scale_layout)(number % 3);
                        if (number % 4 == 3) c.weights = NULL;
                        if (o.x_dtype == MOE4_NVFP4) /* the quantizer takes no NaN */
                            for (size_t i = 0; i < c.n_rows * l.hidden; i++) ((float *)c.x)[i] = isnan(c.x[i]) ? 1e6f : c.x[i];
                        set_activation(&o, number % N_ACTIVATIONS);
                        char what[128];
                        snprintf(what, sizeof what, "case %d: %s, %s %s, weight place %d, x %s, bias %d, activation %d", number,
                                 form_names[form], moe4_dtype_name(dtype), moe4_act_name(o.act), weighting, moe4_dtype_name(o.x_dtype),
                                 bias, number % N_ACTIVATIONS);
                        compare_layers(&c, &o, false, what);
                        free_call(&with_weights);
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
    for (int form = SORTED; form < N_FORMS; form++) {
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

int main(int argc, char **argv) {
    read_arguments(argc, argv);
    int status = open_both("test_cuda_rows", 0);
    if (status) return status;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forms),
        cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_replays),
        cmocka_unit_test(test_none_and_errors),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    close_both();
    return failed;
}
