/* Layers whose slots come by id, on a device: random ones beside the CPU, the same tokens in batches of every size, captured calls. Skipped
 * (77) where there is no GPU. */
#include "calls.h"

#include <cuda_runtime_api.h>

static void test_against_cpu(void **state) {
    (void)state;
    static const size_t cases[][6] = {/* E, hidden, intermediate, k, T, hot */
                                      {1, 16, 16, 1, 1, 0},     {4, 64, 48, 2, 7, 0},    {8, 192, 80, 3, 8, 0},    {3, 256, 128, 2, 15, 0},
                                      {3, 128, 64, 1, 16, 1},   {5, 96, 112, 2, 17, 1},  {512, 32, 16, 8, 40, 0},  {2, 1040, 528, 2, 23, 0},
                                      {6, 512, 256, 4, 130, 0}, {4, 128, 192, 2, 25, 1}, {16, 320, 64, 6, 300, 0}, {2, 64, 64, 1, 0, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const size_t *p = cases[i], n_experts = p[0] + 3; /* some ids are another rank's */
        struct layer l = random_layer(p[0], p[1], p[2], p[3], MOE4_NVFP4, MOE4_NVFP4, false);
        struct layer s = random_layer(1, p[1], p[2] + 32, 1, MOE4_NVFP4, MOE4_NVFP4, false);
        struct layer_call c = random_call(&l, p[4], n_experts);
        for (size_t j = 0; p[5] && j < p[4] * p[3]; j++) ((int32_t *)c.ids)[j] = (int32_t)(n_experts / 2);
        for (int m = 0; m < N_MODES; m++)
            for (int shared = 0; shared < 2; shared++) {
                moe4_moe_options o = layer_options(&l, modes[m], 2, n_experts);
                o.shared = shared ? s.expert : NULL;
                char what[64];
                snprintf(what, sizeof what, "case %zu, %s, shared %d", i, moe4_act_name(modes[m]), shared);
                compare_layers(&c, &o, false, what);
            }
        free_call(&c);
        free_layer(&l);
        free_layer(&s);
    }
    NO_FAILURES();
}

/* The same token alone and in batches: the same bits where the same kernel takes it, decode in small ones and prefill in large ones, and
 * nearly the same across the two; the same call twice; NaN and Inf stay in their rows. */
static void test_batches(void **state) {
    (void)state;
    enum { N = 200, H = 256, FEW = 23, BIG = N * H * sizeof(float) };
    static const size_t parts[] = {FEW, 1, 8, 9, 16, 140, 170};
    struct layer l = random_layer(4, H, 192, 2, MOE4_NVFP4, MOE4_NVFP4, false);
    struct layer_call c = random_call(&l, N, 4);
    float *all = malloc(BIG), *again = malloc(BIG), few[FEW * H], *x = (float *)c.x;
    for (int m = 0; m < N_MODES; m++) {
        if (modes[m] == MOE4_ACT_TENSOR) continue; /* depends on the batch */
        moe4_moe_options o = layer_options(&l, modes[m], 0, 4);
        moe4_moe *moe;
        OK(gpu, moe4_moe_create(&moe, gpu, l.expert, &o));
        run_moe(gpu, moe, all, NULL, NULL, &c, &o);
        run_moe(gpu, moe, again, NULL, NULL, &c, &o);
        assert_memory_equal(all, again, BIG);
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
            struct layer_call part = c;
            part.n_rows = parts[i];
            run_moe(gpu, moe, again, NULL, NULL, &part, &o);
            if (i == 0) {
                memcpy(few, again, sizeof few);
                assert_true(relative(few, all, FEW * H) <= (modes[m] == MOE4_ACT_W4A16 ? 2e-4 : 5e-4));
            }
            assert_memory_equal(parts[i] <= FEW ? few : all, again, parts[i] * H * sizeof *all);
        }
        float was[2] = {x[3 * H + 5], x[7 * H]};
        x[3 * H + 5] = NAN;
        x[7 * H] = INFINITY;
        moe4_moe_report report = MOE4_MOE_REPORT_INIT;
        run_moe(gpu, moe, again, &report, NULL, &c, &o);
        assert_int_equal(report.n_nonfinite_rows, 2);
        for (size_t t = 0; t < N; t++) {
            bool reached = c.ids[2 * t] >= 0 || c.ids[2 * t + 1] >= 0;
            if ((t == 3 || t == 7) && reached)
                for (size_t j = 0; j < H; j++) assert_true(isnan(again[t * H + j]));
            else
                assert_memory_equal(all + t * H, again + t * H, H * sizeof *all);
        }
        x[3 * H + 5] = was[0];
        x[7 * H] = was[1];
        moe4_moe_destroy(moe);
    }
    free(all);
    free(again);
    free_call(&c);
    free_layer(&l);
}

/* A batch too large for x and o to stand in the workspace at once goes by windows and slices, and gives each token the same bits. */
static void test_large_batch(void **state) {
    (void)state;
    enum { N = 40000, FEWER = 10000, H = 1040 };
    struct layer l = random_layer(4, H, 48, 4, MOE4_NVFP4, MOE4_NVFP4, false);
    struct layer_call c = random_call(&l, N, 4), part = c;
    part.n_rows = FEWER;
    float *all = malloc((size_t)N * H * sizeof *all), *few = malloc((size_t)FEWER * H * sizeof *few);
    for (int m = 0; m < N_MODES; m++) {
        if (modes[m] == MOE4_ACT_TENSOR || modes[m] == MOE4_ACT_STATIC) continue;
        moe4_moe_options o = layer_options(&l, modes[m], 0, 4);
        if (modes[m] == MOE4_ACT_W4A16) o.shared = &l.expert[1];
        moe4_moe *moe;
        OK(gpu, moe4_moe_create(&moe, gpu, l.expert, &o));
        run_moe(gpu, moe, all, NULL, NULL, &c, &o);
        run_moe(gpu, moe, few, NULL, NULL, &part, &o);
        assert_memory_equal(all, few, (size_t)FEWER * H * sizeof *few);
        for (size_t i = 0; i < (size_t)N * H; i += 997) assert_true(isfinite(all[i]));
        moe4_moe_destroy(moe);
    }
    free(all);
    free(few);
    free_call(&c);
    free_layer(&l);
}

/* Captured calls, replayed after routing and activations changed under them, beside a busy second stream: small ones, and large ones in
 * which experts go from one kernel to the other. */
static void graph_case(const struct layer *l, moe4_act act, size_t N) {
    enum { REPLAYS = 6 };
    size_t n = N * l->hidden * sizeof(float), n_ids = N * l->k * 4, bytes;
    float *want = malloc(n), *got = malloc(n);
    moe4_moe_options o = layer_options(l, act, 0, l->E);
    moe4_moe *moe;
    OK(gpu, moe4_moe_create(&moe, gpu, l->expert, &o));
    OK(gpu, moe4_moe_workspace_bytes(moe, &bytes, N));
    moe4_workspace ws[2]; /* freed at the end: run_moe frees what is given */
    void *x = on_device(NULL, n, 0), *ids = on_device(NULL, n_ids, 0), *w = on_device(NULL, n_ids, 0), *y[2];
    for (int i = 0; i < 2; i++) {
        ws[i] = (moe4_workspace){on_device(NULL, bytes, 0), bytes};
        y[i] = on_device(NULL, n, 0);
    }
    cudaStream_t stream, busy;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    assert_int_equal(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaStreamCreateWithFlags(&busy, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    OK(gpu, moe4_moe_forward(moe, y[0], x, ids, w, N, &ws[0], stream));
    assert_int_equal(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    for (int i = 0; i < REPLAYS; i++) {
        struct layer_call c = random_call(l, N, l->E);
        for (size_t j = 0; i == 2 && j < N * l->k; j++) ((int32_t *)c.ids)[j] = (int32_t)(l->E / 2);
        for (size_t j = 0; i == 3 && j < N * l->k; j++) ((int32_t *)c.ids)[j] = (int32_t)(j % 7 == 0 ? j % l->E : 1);
        run_moe(gpu, moe, want, NULL, NULL, &c, &o);
        OK(gpu, moe4_memory_copy(gpu, x, c.x, n, NULL));
        OK(gpu, moe4_memory_copy(gpu, ids, c.ids, n_ids, NULL));
        OK(gpu, moe4_memory_copy(gpu, w, c.weights, n_ids, NULL));
        for (int b = 0; b < 4; b++) OK(gpu, moe4_moe_forward(moe, y[1], x, ids, w, N, &ws[1], busy));
        assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
        OK(gpu, moe4_memory_copy(gpu, got, y[0], n, stream));
        assert_memory_equal(got, want, n);
        OK(gpu, moe4_memory_copy(gpu, got, y[1], n, busy));
        assert_memory_equal(got, want, n);
        free_call(&c);
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    cudaStreamDestroy(busy);
    void *buffers[] = {ws[0].data, ws[1].data, x, ids, w, y[0], y[1]};
    for (int i = 0; i < 7; i++) free_device(buffers[i], 0);
    moe4_moe_destroy(moe);
    free(want);
    free(got);
}

static void test_graphs(void **state) {
    (void)state;
    struct layer l = random_layer(6, 192, 128, 3, MOE4_NVFP4, MOE4_NVFP4, false);
    for (int m = 0; m < N_MODES; m++) {
        graph_case(&l, modes[m], 24);
        graph_case(&l, modes[m], 150);
    }
    free_layer(&l);
}

int main(void) {
    int status = open_both("test_cuda_layers", 0);
    if (status) return status;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_cpu),
        cmocka_unit_test(test_batches),
        cmocka_unit_test(test_large_batch),
        cmocka_unit_test(test_graphs),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    close_both();
    return failed;
}
