/* Linears of so many bf16 rows that a device decodes their matrices and leaves the product to cuBLAS, beside the CPU. Skipped (77) where
 * there is no GPU or no cuBLAS. */
#include <cuda_runtime_api.h>

#include "calls.h"
#include "cuda/cublas.h"

static moe4_linear_options decoded_options(moe4_dtype y_dtype) {
    moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
    o.act = MOE4_ACT_W4A16;
    o.x_dtype = MOE4_BF16;
    o.y_dtype = y_dtype;
    return o;
}

static void compare(size_t K, size_t n0, size_t n1, size_t T, moe4_dtype y_dtype) {
    moe4_weight w[2] = {ref_random_weight(MOE4_NVFP4, n0, K), ref_random_weight(MOE4_NVFP4, n1, K)};
    moe4_linear_options o = decoded_options(y_dtype);
    struct linear_call c = {w, n1 ? 2 : 1, T, random_floats(T * K), MOE4_SCALES_LINEAR};
    float *x = (float *)c.x;
    x[3 * K + 5] = NAN;
    x[7 * K] = INFINITY;
    x[(T - 1) * K + K - 1] = -INFINITY;
    x[9 * K + 1] = 1e30f;
    size_t bytes;
    moe4_linear *l;
    OK(gpu, moe4_linear_create(&l, gpu, w, c.n_weights, &o));
    OK(gpu, moe4_linear_workspace_bytes(l, &bytes, T));
    assert_true(bytes >= MOE4_CUBLAS_WORKSPACE);
    moe4_linear_destroy(l);
    char what[96];
    snprintf(what, sizeof what, "K %zu, N %zu %zu, T %zu, y %s", K, n0, n1, T, moe4_dtype_name(y_dtype));
    compare_linears(&c, &o, true, what);
    free((void *)c.x);
    free_matrices(w, n1 ? 2 : 1);
}

static void test_shapes(void **state) {
    (void)state;
    static const size_t tokens[] = {16, 97, 300}, K[] = {16, 176, 1040}, N[] = {24, 37, 200};
    for (int t = 0; t < 3; t++)
        for (int k = 0; k < 3; k++)
            for (int n = 0; n < 3; n++)
                for (int bf16 = 0; bf16 < 2; bf16++) compare(K[k], N[n], n == 1 ? 520 : 0, tokens[t], bf16 ? MOE4_BF16 : MOE4_F32);
    NO_FAILURES();
}

/* A matrix that is decoded in two parts, the second of one row tile. */
static void test_parts(void **state) {
    (void)state;
    compare(8192, 8256, 0, 640, MOE4_BF16);
    NO_FAILURES();
}

/* A row that is finite and too large for fp32 comes out infinite, not NaN; the one before it is not finite. */
static void test_overflow(void **state) {
    (void)state;
    enum { T = 96, K = 64, N = 40, ROW = 50 };
    uint8_t codes[N * K / 2], scales[N * K / 16];
    memset(codes, 0x77, sizeof codes);
    memset(scales, 0x7E, sizeof scales);
    moe4_weight w = {.dtype = MOE4_NVFP4, .rows = N, .cols = K, .data = codes, .scale = scales, .global = 1};
    moe4_linear_options o = decoded_options(MOE4_F32);
    float *y = malloc((size_t)T * N * sizeof *y);
    struct linear_call c = {&w, 1, T, random_floats(T * K), MOE4_SCALES_LINEAR};
    float *x = (float *)c.x;
    x[ROW * K + 9] = 3e38f;
    x[(ROW - 1) * K + 9] = INFINITY;
    run_linear(gpu, y, &c, &o);
    for (int i = 0; i < T * N; i++) {
        int row = i / N;
        bool right = row == ROW ? isinf(y[i]) != 0 : row == ROW - 1 ? isnan(y[i]) != 0 : isfinite(y[i]) != 0;
        EXPECT(right, "y[%d, %d] is %g\n", row, i % N, (double)y[i]);
    }
    free(y);
    free(x);
    NO_FAILURES();
}

/* A bias keeps a linear away from here; one row less, too. Workspaces say which way it goes, and none is smaller than for fewer rows. */
static void test_workspaces(void **state) {
    (void)state;
    moe4_weight w = ref_random_weight(MOE4_NVFP4, 64, 64);
    moe4_linear_options o = decoded_options(MOE4_BF16);
    for (int bias = 0; bias < 2; bias++) {
        moe4_linear *l;
        if (bias) random_bias(&w);
        OK(gpu, moe4_linear_create(&l, gpu, &w, 1, &o));
        size_t bytes, before = 0;
        for (size_t T = 1; T <= 2000; T++, before = bytes) {
            OK(gpu, moe4_linear_workspace_bytes(l, &bytes, T));
            EXPECT(bytes >= before, "%zu bytes for %zu rows, and %zu for %zu\n", bytes, T, before, T - 1);
            EXPECT((bytes >= MOE4_CUBLAS_WORKSPACE) == (!bias && T >= 16), "bias %d: %zu bytes for %zu rows\n", bias, bytes, T);
        }
        moe4_linear_destroy(l);
    }
    free_matrices(&w, 1);
    NO_FAILURES();
}

/* A linear's first call is captured; it is replayed with other rows beside a busy stream that has a workspace of its own. */
static void test_graph(void **state) {
    (void)state;
    enum { T = 500, K = 1024, N = 512, REPLAYS = 4 };
    moe4_weight w = ref_random_weight(MOE4_NVFP4, N, K);
    moe4_linear_options o = decoded_options(MOE4_F32);
    moe4_linear *l;
    size_t bytes, x_bytes = (size_t)T * K * 2, y_bytes = (size_t)T * N * sizeof(float);
    OK(gpu, moe4_linear_create(&l, gpu, &w, 1, &o));
    OK(gpu, moe4_linear_workspace_bytes(l, &bytes, T));
    moe4_workspace ws[2];
    void *x = on_device(NULL, x_bytes, 0), *y[2];
    float *want = malloc(y_bytes), *got = malloc(y_bytes);
    cudaStream_t stream[2];
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    for (int i = 0; i < 2; i++) {
        ws[i] = (moe4_workspace){on_device(NULL, bytes, 64), bytes}; /* no better aligned than it must be */
        y[i] = on_device(NULL, y_bytes, 0);
        assert_int_equal(cudaStreamCreateWithFlags(&stream[i], cudaStreamNonBlocking), cudaSuccess);
    }
    assert_int_equal(cudaStreamBeginCapture(stream[0], cudaStreamCaptureModeGlobal), cudaSuccess);
    OK(gpu, moe4_linear_forward(l, &y[0], NULL, x, T, &ws[0], stream[0]));
    assert_int_equal(cudaStreamEndCapture(stream[0], &graph), cudaSuccess);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    for (int i = 0; i < REPLAYS; i++) {
        float *values = random_floats(T * K);
        void *halves = narrow(values, (size_t)T * K, MOE4_BF16);
        OK(gpu, moe4_memory_copy(gpu, x, halves, x_bytes, NULL));
        OK(gpu, moe4_linear_forward(l, &y[1], NULL, x, T, &ws[1], stream[1]));
        OK(gpu, moe4_memory_copy(gpu, want, y[1], y_bytes, stream[1]));
        for (int b = 0; b < 4; b++) OK(gpu, moe4_linear_forward(l, &y[1], NULL, x, T, &ws[1], stream[1]));
        assert_int_equal(cudaGraphLaunch(exec, stream[0]), cudaSuccess);
        OK(gpu, moe4_memory_copy(gpu, got, y[0], y_bytes, stream[0]));
        assert_memory_equal(got, want, y_bytes);
        OK(gpu, moe4_memory_copy(gpu, got, y[1], y_bytes, stream[1]));
        assert_memory_equal(got, want, y_bytes);
        free(values);
        free(halves);
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    for (int i = 0; i < 2; i++) {
        cudaStreamDestroy(stream[i]);
        free_device(ws[i].data, 64);
        free_device(y[i], 0);
    }
    free_device(x, 0);
    moe4_linear_destroy(l);
    free_matrices(&w, 1);
    free(want);
    free(got);
}

int main(void) {
    char why[96];
    int status = open_both("test_cuda_decoded", 0);
    if (status) return status;
    struct moe4_cublas *blas = moe4_cublas_open(why, sizeof why);
    if (!blas) {
        printf("test_cuda_decoded: skipped: %s\n", why);
        close_both();
        return 77;
    }
    moe4_cublas_close(blas);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_graph), /* first: nothing has loaded cuBLAS' kernels */
        cmocka_unit_test(test_shapes), cmocka_unit_test(test_parts), cmocka_unit_test(test_overflow), cmocka_unit_test(test_workspaces),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    close_both();
    return failed;
}
