/* A device through the public API: the bundled model beside its goldens and beside the CPU, and errors. Skipped (77) where there is no GPU.
 * An argument names the source folder, for a build made elsewhere. */
#include "calls.h"

static const char *source = MOE4_SOURCE_DIR;

enum { T = 256, H = 256, K = 6 };

/* What the calls need to know of the model's layers. */
static const struct layer model_layer = {.E = 32, .hidden = H, .intermediate = 128, .k = K, .up = MOE4_NVFP4, .down = MOE4_NVFP4};

static const void *golden_data(const moe4_checkpoint *golden, size_t layer, const char *what) {
    char name[64];
    moe4_tensor t;
    snprintf(name, sizeof name, "tale.layer%zu.%s", layer, what);
    OK(cpu, moe4_checkpoint_find(golden, &t, name));
    return t.data;
}

static void test_goldens(void **state) {
    (void)state;
    static float y[T * H];
    char path[512], what[32];
    moe4_checkpoint *model, *golden;
    snprintf(path, sizeof path, "%s/models/novels-18m-nvfp4", source);
    OK(gpu, moe4_checkpoint_open(&model, gpu, path));
    snprintf(path, sizeof path, "%s/models/novels-18m-golden.safetensors", source);
    OK(gpu, moe4_checkpoint_open(&golden, gpu, path));
    for (size_t layer = 1; layer <= 3; layer++)
        for (int m = 0; m < N_MODES; m++) {
            moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
            o.act = modes[m];
            o.x_dtype = MOE4_BF16;
            o.y_dtype = MOE4_F32;
            moe4_moe *moe;
            OK(gpu, moe4_moe_create_from_checkpoint(&moe, gpu, model, layer, &o));
            static float x[T * H], w[T * K];
            widen(x, golden_data(golden, layer, "x"), MOE4_BF16, T * H);
            memcpy(w, golden_data(golden, layer, "topk_weight"), sizeof w);
            struct layer_call c = {.l = &model_layer, .x = x, .weights = w, .n_rows = T, .ids = golden_data(golden, layer, "topk_idx")};
            moe4_moe_report report = MOE4_MOE_REPORT_INIT;
            run_moe(gpu, moe, y, &report, NULL, &c, &o);
            snprintf(what, sizeof what, "y_%s", moe4_act_name(o.act));
            float *want = malloc(sizeof y);
            memcpy(want, golden_data(golden, layer, what), sizeof y);
            double error = relative(y, want, T * H);
            print_message("layer %zu, %-6s: relative L2 %.2e\n", layer, moe4_act_name(o.act), error);
            assert_true(error <= (o.act == MOE4_ACT_W4A16 ? 1e-4 : 5e-4));
            if (o.act == MOE4_ACT_STATIC)
                assert_int_equal(report.n_saturated_blocks, *(const int32_t *)golden_data(golden, layer, "saturated_static"));
            for (int i = 0; i < T * K; i++) w[i] *= w[i]; /* teeth: the weight applied twice must show */
            run_moe(gpu, moe, y, NULL, NULL, &c, &o);
            assert_true(relative(y, want, T * H) > 5e-3);
            free(want);
            moe4_moe_destroy(moe);
        }
    moe4_checkpoint_close(golden);
    moe4_checkpoint_close(model);
}

/* The model's own router and shared expert, in a context. */
static void run_model(moe4_ctx *ctx, const char *path, size_t layer, moe4_act act, const float *x, int32_t *ids, float *weights, float *y) {
    moe4_checkpoint *model;
    moe4_router *router;
    moe4_moe *moe;
    size_t bytes;
    moe4_router_options ro = MOE4_ROUTER_OPTIONS_INIT;
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    ro.x_dtype = o.x_dtype = MOE4_BF16;
    o.y_dtype = MOE4_F32;
    o.act = act;
    o.with_shared = 1;
    OK(ctx, moe4_checkpoint_open(&model, ctx, path));
    OK(ctx, moe4_router_create_from_checkpoint(&router, ctx, model, layer, &ro));
    OK(ctx, moe4_moe_create_from_checkpoint(&moe, ctx, model, layer, &o));
    OK(ctx, moe4_router_workspace_bytes(router, &bytes, T));
    moe4_workspace ws = give_workspace(ctx, bytes);
    struct given_x given;
    give_x(&given, ctx, x, T, H, MOE4_BF16, MOE4_SCALES_LINEAR, false);
    void *i = give(ctx, NULL, T * K * sizeof *ids), *w = give(ctx, NULL, T * K * sizeof *weights);
    OK(ctx, moe4_router_forward(router, i, w, given.x, NULL, T, &ws, NULL));
    take(ctx, ids, i, T * K * sizeof *ids);
    take(ctx, weights, w, T * K * sizeof *weights);
    free_given();
    struct layer_call c = {.l = &model_layer, .x = x, .weights = weights, .n_rows = T, .ids = ids};
    run_moe(ctx, moe, y, NULL, NULL, &c, &o);
    moe4_moe_destroy(moe);
    moe4_router_destroy(router);
    moe4_checkpoint_close(model);
}

static void test_model_with_router(void **state) {
    (void)state;
    static float x[T * H], y[2][T * H], weights[2][T * K];
    static int32_t ids[2][T * K];
    char path[512];
    snprintf(path, sizeof path, "%s/models/novels-18m-golden.safetensors", source);
    moe4_checkpoint *golden;
    OK(cpu, moe4_checkpoint_open(&golden, cpu, path));
    snprintf(path, sizeof path, "%s/models/novels-18m-nvfp4", source);
    for (size_t layer = 1; layer <= 3; layer++)
        for (int m = 0; m < N_MODES; m++) {
            widen(x, golden_data(golden, layer, "x"), MOE4_BF16, T * H);
            for (int d = 0; d < 2; d++) run_model(d ? gpu : cpu, path, layer, modes[m], x, ids[d], weights[d], y[d]);
            assert_memory_equal(ids[0], ids[1], sizeof *ids);
            for (int i = 0; i < T * K; i++) assert_true(fabsf(weights[0][i] - weights[1][i]) <= 1e-6f);
            double error = relative(y[1], y[0], T * H);
            print_message("layer %zu, %-6s, own router, shared expert: %.2e from the CPU\n", layer, moe4_act_name(modes[m]), error);
            assert_true(error <= (modes[m] == MOE4_ACT_W4A16 ? 1e-4 : 5e-4));
        }
    moe4_checkpoint_close(golden);
}

static void test_errors(void **state) {
    (void)state;
    assert_null(open_device("cuda:99", 0));
    assert_non_null(strstr(logged, "cuda:99"));
    assert_null(open_device("cuda:", 0));
    assert_null(open_device("cuda:1x", 0));

    struct layer l = random_layer(2, 64, 48, 1, MOE4_NVFP4, MOE4_NVFP4, false);
    moe4_moe_options o = layer_options(&l, MOE4_ACT_TOKEN, 0, 2);
    moe4_moe *moe;
    OK(gpu, moe4_moe_create(&moe, gpu, l.expert, &o));
    size_t bytes;
    OK(gpu, moe4_moe_workspace_bytes(moe, &bytes, 1));
    moe4_workspace ws = give_workspace(gpu, bytes);
    float host[64] = {0}, weight = 1;
    int32_t id = 0;
    void *x = give(gpu, host, sizeof host), *y = give(gpu, host, sizeof host), *ids = give(gpu, &id, 4), *w = give(gpu, &weight, 4);
    const struct {
        void *y, *x, *ids, *w;
        const char *says;
    } mixed[] = {{host, x, ids, w, "y is host memory"},
                 {y, host, ids, w, "x is host memory"},
                 {y, x, &id, w, "topk_ids is host memory"},
                 {y, x, ids, &weight, "topk_weights is host memory"}};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(moe4_moe_forward(moe, mixed[i].y, mixed[i].x, mixed[i].ids, mixed[i].w, 1, &ws, NULL), MOE4_ERROR_ARGUMENT);
        if (!strstr(moe4_ctx_error(gpu), mixed[i].says)) fail_msg("%s, not: %s", moe4_ctx_error(gpu), mixed[i].says);
    }
    moe4_workspace on_host = {aligned_alloc(64, (bytes + 63) / 64 * 64), bytes};
    assert_int_equal(moe4_moe_forward(moe, y, x, ids, w, 1, &on_host, NULL), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(gpu), "workspace is host memory"));
    moe4_moe_report report = MOE4_MOE_REPORT_INIT;
    assert_int_equal(moe4_moe_report_read(moe, &report, NULL, &ws, NULL), MOE4_ERROR_ARGUMENT); /* nothing ran in it yet */
    void *huge;
    assert_int_equal(moe4_memory_alloc(gpu, &huge, (size_t)1 << 44), MOE4_ERROR_MEMORY);
    assert_non_null(strstr(moe4_ctx_error(gpu), "17592186044416 bytes"));
    OK(gpu, moe4_moe_forward(moe, y, x, ids, w, 1, &ws, NULL)); /* and all is well after them */
    OK(gpu, moe4_moe_report_read(moe, &report, NULL, &ws, NULL));
    assert_int_equal(report.n_slots, 1);

    free(on_host.data);
    free_given();
    moe4_moe_destroy(moe);
    free_layer(&l);
}

int main(int argc, char **argv) {
    if (argc > 1) source = argv[1];
    int status = open_both("test_cuda", 0);
    if (status) return status;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens),
        cmocka_unit_test(test_model_with_router),
        cmocka_unit_test(test_errors),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    close_both();
    return failed;
}
