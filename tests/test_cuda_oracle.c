/* The device's products against another's: operands decoded to bf16, which holds them exactly, and multiplied by cuBLAS with fp32 sums, at
 * the sizes of real layers, where plain loops in fp64 take too long. Skipped (77) without a GPU or without cuBLAS. */
#include "reference.h"

#include <float.h>

#include "device.h"

#include <cuda_runtime_api.h>

#include "cuda/cublas.h"

static struct moe4_cublas *blas;
static int n_failed;

/* ---- operands as bf16 in the device's memory ---- */

/* The values e2m1 * scale, exact in bf16. */
static void *decoded(const void *codes, const void *scales, size_t rows, size_t cols) {
    const float one = 1;
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    void *values;
    o.global = &one;
    OK(gpu, moe4_memory_alloc(gpu, &values, rows * cols * 2));
    OK(gpu, moe4_nvfp4_dequantize(gpu, values, MOE4_BF16, 0, codes, scales, rows, cols, &o));
    return values;
}

static void *decoded_weight(const moe4_weight *w) {
    void *codes = on_device(w->data, w->rows * w->cols / 2, 0), *scales = on_device(w->scale, w->rows * w->cols / 16, 0);
    void *values = decoded(codes, scales, w->rows, w->cols);
    free_device(codes, 0);
    free_device(scales, 0);
    return values;
}

/* x[T,K] as `act` rounds it: values, and what a row decodes by. */
static void *rounded(float *factor, const float *x, size_t T, size_t K, moe4_act act, float input_scale) {
    if (act == MOE4_ACT_W4A16) {
        uint16_t *halves = malloc(T * K * sizeof *halves);
        for (size_t i = 0; i < T * K; i++) halves[i] = moe4_bf16_from_float(x[i]);
        for (size_t t = 0; t < T; t++) factor[t] = 1;
        void *values = on_device(halves, T * K * sizeof *halves, 0);
        free(halves);
        return values;
    }
    const float S = fminf(1.f / input_scale, FLT_MAX);
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.recipe = MOE4_RECIPE_ACTIVATION;
    o.per_row = act == MOE4_ACT_TOKEN;
    if (act == MOE4_ACT_STATIC) o.global = &S;
    void *there = on_device(x, T * K * sizeof *x, 0), *codes = on_device(NULL, T * K / 2, 0), *scales = on_device(NULL, T * K / 16, 0);
    OK(gpu, moe4_nvfp4_quantize(gpu, codes, scales, factor, NULL, there, MOE4_F32, T, K, 0, &o));
    for (size_t t = T; t-- > 0;) factor[t] = act == MOE4_ACT_STATIC ? input_scale : 1.f / factor[o.per_row ? t : 0];
    void *values = decoded(codes, scales, T, K);
    free_device(there, 0);
    free_device(codes, 0);
    free_device(scales, 0);
    return values;
}

/* |v|: the sign bits taken off. */
static void *magnitudes(const void *values, size_t n) {
    uint16_t *halves = malloc(n * sizeof *halves);
    from_device(halves, values, n * sizeof *halves);
    for (size_t i = 0; i < n; i++) halves[i] &= 0x7FFF;
    void *there = on_device(halves, n * sizeof *halves, 0);
    free(halves);
    return there;
}

static float *product(const void *x, const void *w, size_t T, size_t N, size_t K) {
    void *y = on_device(NULL, T * N * sizeof(float), 0);
    float *host = malloc(T * N * sizeof *host);
    const struct moe4_cublas_call call = {
        .y = y, .y_type = CUDA_R_32F, .y_ld = N, .x = x, .x_ld = K, .w = w, .alpha = 1, .T = (int)T, .N = (int)N, .K = (int)K};
    assert_int_equal(moe4_cublas_product(blas, &call), 0);
    from_device(host, y, T * N * sizeof *host);
    free_device(y, 0);
    return host;
}

static float *random_rows(size_t n) {
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = ref_normal();
    return x;
}

/* ---- one product, element by element ---- */

static float *run_linear(const moe4_weight *w, moe4_act act, const float *x, size_t T) {
    moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
    moe4_linear *linear;
    size_t bytes;
    o.act = act;
    OK(gpu, moe4_linear_create(&linear, gpu, w, 1, &o));
    OK(gpu, moe4_linear_workspace_bytes(linear, &bytes, T));
    moe4_workspace ws = {on_device(NULL, bytes, 0), bytes};
    void *there = on_device(x, T * w->cols * sizeof *x, 0), *y = on_device(NULL, T * w->rows * sizeof(float), 0);
    OK(gpu, moe4_linear_forward(linear, &y, NULL, there, T, &ws, NULL));
    float *host = malloc(T * w->rows * sizeof *host);
    from_device(host, y, T * w->rows * sizeof *host);
    moe4_linear_destroy(linear);
    free_device(ws.data, 0);
    free_device(there, 0);
    free_device(y, 0);
    return host;
}

/* Both sides may be off by the bound of docs/numerics.md. */
static void linear_case(size_t T, size_t N, size_t K, moe4_act act) {
    moe4_weight w = ref_random_weight(MOE4_NVFP4, N, K);
    float *x = random_rows(T * K), *factor = malloc((T + 1) * sizeof *factor), *got = run_linear(&w, act, x, T);
    void *wv = decoded_weight(&w), *xv = rounded(factor, x, T, K, act, w.input_scale), *wa = magnitudes(wv, N * K),
         *xa = magnitudes(xv, T * K);
    float *want = product(xv, wv, T, N, K), *sums = product(xa, wa, T, N, K);
    double worst = 0, errors = 0, values = 0;
    for (size_t i = 0; i < T * N; i++) {
        const double scale = (double)w.global * factor[i / N], bound = 2 * ((double)K + 16) * 0x1p-23 * sums[i] * scale;
        const double value = (double)want[i] * scale, error = fabs((double)got[i] - value), part = error == 0 ? 0 : error / bound;
        worst = part <= worst ? worst : part; /* a NaN stays */
        errors += error * error;
        values += value * value;
    }
    const double relative = sqrt(errors / values);
    print_message("T %zu, N %zu, K %zu, %-6s: relative L2 %.1e; at most %.1e of what two products may differ by\n", T, N, K,
                  moe4_act_name(act), relative, worst);
    n_failed += !(worst <= 1 && relative <= 1e-5);
    void *there[] = {wv, xv, wa, xa};
    for (int i = 0; i < 4; i++) free_device(there[i], 0);
    float *host[] = {x, factor, got, want, sums};
    for (int i = 0; i < 5; i++) free(host[i]);
    ref_free_weight(&w);
}

static void test_linear(void **state) {
    (void)state;
    static const size_t shapes[][3] = {{1, 16, 16},      {7, 48, 80},       {33, 208, 1040}, {1, 3072, 7168},
                                       {64, 7168, 3072}, {300, 2048, 4096}, {2, 32000, 2048}};
    static const moe4_act acts[] = {MOE4_ACT_W4A16, MOE4_ACT_STATIC, MOE4_ACT_TENSOR, MOE4_ACT_TOKEN};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int a = 0; a < 4; a++) linear_case(shapes[s][0], shapes[s][1], shapes[s][2], acts[a]);
    assert_int_equal(n_failed, 0);
}

/* ---- a layer ---- */

/* o[T, w->rows] = x rounded, times w, with its factors. */
static float *oracle_product(const float *x, const moe4_weight *w, size_t T, moe4_act act, float input_scale) {
    float *factor = malloc((T + 1) * sizeof *factor);
    void *wv = decoded_weight(w), *xv = rounded(factor, x, T, w->cols, act, input_scale);
    float *y = product(xv, wv, T, w->rows, w->cols);
    for (size_t i = 0; i < T * w->rows; i++) y[i] = y[i] * w->global * factor[i / w->rows];
    free_device(wv, 0);
    free_device(xv, 0);
    free(factor);
    return y;
}

/* Every token through every expert, and of that what was routed; TENSOR, whose scale is over the routed slots of h, is test_cuda's. */
static void oracle_layer(double *y, const moe4_expert *experts, size_t E, const float *x, const int32_t *ids, const float *weights,
                         size_t T, size_t k, moe4_act act) {
    const size_t H = experts->gate.cols, I = experts->gate.rows;
    for (size_t e = 0; e < E; e++) {
        const moe4_expert *ex = &experts[e];
        const float scale = fmaxf(ex->gate.input_scale, ex->up.input_scale);
        float *g = oracle_product(x, &ex->gate, T, act, scale), *u = oracle_product(x, &ex->up, T, act, scale);
        for (size_t i = 0; i < T * I; i++) g[i] = (float)((double)g[i] / (1 + exp(-(double)g[i])) * (double)u[i]);
        float *o = oracle_product(g, &ex->down, T, act, ex->down.input_scale);
        for (size_t s = 0; s < T * k; s++)
            for (size_t j = 0; ids[s] == (int32_t)e && j < H; j++) y[s / k * H + j] += (double)weights[s] * (double)o[s / k * H + j];
        free(g);
        free(u);
        free(o);
    }
}

static void layer_case(size_t E, size_t H, size_t I, size_t k, size_t T, moe4_act act) {
    moe4_expert *experts = calloc(E, sizeof *experts);
    for (size_t e = 0; e < E; e++)
        experts[e] = (moe4_expert){.gate = ref_random_weight(MOE4_NVFP4, I, H),
                                   .up = ref_random_weight(MOE4_NVFP4, I, H),
                                   .down = ref_random_weight(MOE4_NVFP4, H, I)};
    float *x = random_rows(T * H), *weights = malloc(T * k * sizeof *weights), *got = malloc(T * H * sizeof *got);
    int32_t *ids = malloc(T * k * sizeof *ids);
    for (size_t s = 0; s < T * k; s++) {
        ids[s] = (int32_t)((ref_random() + s % k * (E / k)) % E);
        weights[s] = 0.1f + (float)(ref_random() % 100) / 100.f;
    }
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = E;
    o.top_k = k;
    o.act = act;
    o.x_dtype = o.y_dtype = MOE4_F32;
    moe4_moe *moe;
    size_t bytes;
    OK(gpu, moe4_moe_create(&moe, gpu, experts, &o));
    OK(gpu, moe4_moe_workspace_bytes(moe, &bytes, T));
    moe4_workspace ws = {on_device(NULL, bytes, 0), bytes};
    void *dx = on_device(x, T * H * 4, 0), *di = on_device(ids, T * k * 4, 0), *dw = on_device(weights, T * k * 4, 0),
         *dy = on_device(NULL, T * H * 4, 0);
    moe4_moe_report report = MOE4_MOE_REPORT_INIT;
    OK(gpu, moe4_moe_forward(moe, dy, dx, di, dw, T, &ws, NULL));
    OK(gpu, moe4_moe_report_read(moe, &report, NULL, &ws, NULL));
    from_device(got, dy, T * H * 4);
    double *want = calloc(T * H, sizeof *want);
    oracle_layer(want, experts, E, x, ids, weights, T, k, act);
    double error = ref_relative(got, want, T * H);
    print_message("%zu experts %zu/%zu, top %zu, T %zu, %-6s by %s: relative L2 %.2e\n", E, H, I, k, T, moe4_act_name(act), report.kernels,
                  error);
    n_failed += !(error <= 5e-4); /* two sums in fp32: now and then one rounds h to another neighbour */
    void *there[] = {ws.data, dx, di, dw, dy};
    for (int i = 0; i < 5; i++) free_device(there[i], 0);
    moe4_moe_destroy(moe);
    for (size_t e = 0; e < E; e++) {
        ref_free_weight(&experts[e].gate);
        ref_free_weight(&experts[e].up);
        ref_free_weight(&experts[e].down);
    }
    free(experts);
    free(x);
    free(weights);
    free(got);
    free(ids);
    free(want);
}

static void test_layer(void **state) {
    (void)state;
    static const size_t shapes[][5] = {{4, 4096, 2048, 2, 5}, {4, 4096, 2048, 2, 96}, {3, 7168, 3072, 2, 33}, {6, 208, 176, 3, 40}};
    static const moe4_act acts[] = {MOE4_ACT_W4A16, MOE4_ACT_STATIC, MOE4_ACT_TOKEN};
    n_failed = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int a = 0; a < 3; a++) layer_case(shapes[s][0], shapes[s][1], shapes[s][2], shapes[s][3], shapes[s][4], acts[a]);
    assert_int_equal(n_failed, 0);
}

int main(void) {
    char why[96];
    int status = open_both("test_cuda_oracle", MOE4_ISA_SCALAR);
    if (status) return status;
    blas = moe4_cublas_open(why, sizeof why);
    if (!blas) {
        printf("test_cuda_oracle: skipped: %s\n", why);
        close_both();
        return 77;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_linear), cmocka_unit_test(test_layer)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    moe4_cublas_close(blas);
    close_both();
    return failed;
}
