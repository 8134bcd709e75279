/* Everything that a layer can be asked for, on a device beside the CPU with the same inputs: dtypes of weights and activations, biases,
 * activations, places of the routing weight, the shared expert, rows in NVFP4. Skipped (77) where there is no GPU. */
#include "calls.h"

static const moe4_dtype pairs[][2] = {{MOE4_NVFP4, MOE4_NVFP4}, {MOE4_BF16, MOE4_BF16},  {MOE4_F16, MOE4_F16},
                                      {MOE4_F32, MOE4_F32},     {MOE4_NVFP4, MOE4_BF16}, {MOE4_BF16, MOE4_NVFP4}};
enum { N_PAIRS = 6 };

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
                        struct layer_call c = random_call(&l, T, E + 3);
                        if (number % 7 == 3) ((float *)c.x)[(T / 2) * l.hidden + 3] = number % 2 ? NAN : INFINITY;
                        char what[128];
                        snprintf(what, sizeof what, "case %d: %s/%s %s, activation %d, weight place %d, bias %d, shared %d, %zux%zu, T %zu",
                                 number, moe4_dtype_name(l.up), moe4_dtype_name(l.down), moe4_act_name(o.act), activation, weighting, bias,
                                 number % 2, l.hidden, l.intermediate, T);
                        compare_layers(&c, &o, false, what);
                        free_call(&c);
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
                    struct layer_call c = random_call(&l, T, 4);
                    c.layout = (moe4_scale_layout)layout;
                    char what[128];
                    snprintf(what, sizeof what, "rows case %d: %s/%s %s, layout %d, weight place %d", number, moe4_dtype_name(l.up),
                             moe4_dtype_name(l.down), moe4_act_name(o.act), layout, weighting);
                    compare_layers(&c, &o, false, what);
                    free_call(&c);
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

int main(int argc, char **argv) {
    read_arguments(argc, argv);
    int status = open_both("test_cuda_options", 0);
    if (status) return status;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layers),
        cmocka_unit_test(test_nvfp4_rows),
        cmocka_unit_test(test_bad_nvfp4_rows),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    close_both();
    return failed;
}
