/* Linears and groups of rows on a device beside the CPU: every type of weights and rows, biases, bytes that the host must widen. Skipped
 * (77) where there is no GPU. */
#include "calls.h"

enum { E = 5 };

static void linear_case(moe4_dtype dtype, moe4_act act, size_t K, size_t n0, size_t n1, size_t T, moe4_dtype y_dtype) {
    moe4_weight w[2] = {ref_random_weight(dtype, n0, K), ref_random_weight(dtype, n1, K)};
    moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
    o.act = act;
    o.y_dtype = y_dtype;
    struct linear_call c = {w, 2, T, random_floats(T * K), MOE4_SCALES_LINEAR};
    char what[96];
    snprintf(what, sizeof what, "%s, %s, K %zu, T %zu, y %s", moe4_dtype_name(dtype), moe4_act_name(act), K, T, moe4_dtype_name(y_dtype));
    compare_linears(&c, &o, false, what);
    free((void *)c.x);
    free_matrices(w, 2);
}

static void test_shapes(void **state) {
    (void)state;
    static const size_t tokens[] = {1, 7, 16, 33, 70};
    for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            moe4_dtype y = bf16 ? MOE4_BF16 : MOE4_F32;
            for (int m = 0; m < N_MODES; m++) linear_case(MOE4_NVFP4, modes[m], 176, 200, 37, tokens[t], y);
            linear_case(MOE4_NVFP4, MOE4_ACT_TOKEN, 1024, 128, 256, tokens[t], y);
            linear_case(MOE4_BF16, MOE4_ACT_BF16, 100, 13, 64, tokens[t], y);
            linear_case(MOE4_F32, MOE4_ACT_DEFAULT, 257, 8, 5, tokens[t], y);
        }
    NO_FAILURES();
}

static void test_options(void **state) {
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
                        struct linear_call c = {w, 2, T, random_floats(T * K), rows < 3 ? (moe4_scale_layout)rows : MOE4_SCALES_LINEAR};
                        char what[96];
                        snprintf(what, sizeof what, "linear %s %s, bias %d, rows %d, T %zu", moe4_dtype_name(dtypes[d]),
                                 moe4_act_name(o.act), bias, rows, T);
                        compare_linears(&c, &o, false, what);
                        free((void *)c.x);
                        free_matrices(w, 2);
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
    struct linear_call c = {w, 2, T, random_floats(T * K), MOE4_SCALES_LINEAR};
    compare_linears(&c, &o, false, "FP8");
    moe4_linear *none;
    w[1].data = give(gpu, codes, sizeof codes);
    moe4_status status = moe4_linear_create(&none, gpu, w, 2, &o);
    EXPECT(status == MOE4_ERROR_UNSUPPORTED && strstr(moe4_ctx_error(gpu), "weight 1"), "%s\n", moe4_ctx_error(gpu));
    free_given();
    free((void *)c.x);
    NO_FAILURES();
}

static void test_grouped(void **state) {
    (void)state;
    static const moe4_dtype dtypes[] = {MOE4_NVFP4, MOE4_BF16, MOE4_F32}, x_dtypes[] = {MOE4_F32, MOE4_F16, MOE4_NVFP4};
    static const int32_t offsets[E + 1] = {0, 5, 5, 22, 30, 33};
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
                            struct grouped_call c = {.w = w, .n_groups = E, .n_rows = rows, .offsets = offsets};
                            c.x = random_floats(rows * parts * K);
                            c.layout = diagonal ? MOE4_SCALES_LINEAR : (moe4_scale_layout)(number % 3);
                            if (x < 2 && number % 4 == 1) ((float *)c.x)[7 * parts * K + 3] = NAN;
                            char what[128];
                            snprintf(what, sizeof what, "grouped %d: %s %s, diagonal %d, x %s, bias %d, y %d, %zux%zu", number,
                                     moe4_dtype_name(dtypes[d]), moe4_act_name(o.act), diagonal, moe4_dtype_name(o.x_dtype), bias, form, N,
                                     K);
                            compare_grouped(&c, &o, false, what);
                            free((void *)c.x);
                            free_matrices(w, E);
                        }
    NO_FAILURES();
}

int main(int argc, char **argv) {
    read_arguments(argc, argv);
    int status = open_both("test_cuda_linear", 0);
    if (status) return status;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_options),
        cmocka_unit_test(test_fp8),
        cmocka_unit_test(test_grouped),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    close_both();
    return failed;
}
