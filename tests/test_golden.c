/* The bundled model's layers against their goldens, in every mode, and proof that the comparison has teeth. */
#include "reference.h"

#define MODEL MOE4_SOURCE_DIR "/models/novels-18m-nvfp4"
#define GOLDEN MOE4_SOURCE_DIR "/models/novels-18m-golden.safetensors"
enum { T = 256, H = 256, K = 6, E = 32, T_SHARED = 64 };

static moe4_ctx *ctx;
static moe4_checkpoint *model, *golden;

static void open_all(uint32_t isa_mask) {
    ctx = ref_ctx(0, isa_mask);
    OK(ctx, moe4_checkpoint_open(&model, ctx, MODEL));
    OK(ctx, moe4_checkpoint_open(&golden, ctx, GOLDEN));
}

static void close_all(void) {
    moe4_checkpoint_close(golden);
    moe4_checkpoint_close(model);
    moe4_ctx_destroy(ctx);
}

static const void *find(size_t layer, const char *what, moe4_dtype dtype, size_t n) {
    char name[64];
    moe4_tensor t;
    snprintf(name, sizeof name, "tale.layer%zu.%s", layer, what);
    OK(ctx, moe4_checkpoint_find(golden, &t, name));
    assert_int_equal(t.dtype, dtype);
    assert_int_equal(t.bytes, n * moe4_dtype_bytes(dtype));
    return t.data;
}

static double golden_error(size_t layer, const char *prefix, moe4_act act, const float *y, size_t n_rows) {
    char what[32];
    snprintf(what, sizeof what, "%s_%s", prefix, moe4_act_name(act));
    const char *want = find(layer, what, MOE4_F32, n_rows * H);
    double *wide = malloc(n_rows * H * sizeof *wide);
    for (size_t i = 0; i < n_rows * H; i++) {
        float v;
        memcpy(&v, want + 4 * i, 4);
        wide[i] = v;
    }
    double error = ref_relative(y, wide, n_rows * H);
    free(wide);
    return error;
}

static double tolerance(moe4_act act) {
    return act == MOE4_ACT_W4A16 ? 1e-4 : 5e-4;
}

static moe4_workspace make_workspace(const moe4_moe *moe) {
    moe4_workspace ws;
    OK(ctx, moe4_moe_workspace_bytes(moe, &ws.bytes, T));
    ws.data = aligned_alloc(64, ws.bytes);
    return ws;
}

/* y of a layer on its golden's x, by the golden's routing (weights to the power `twice` + 1). */
static void forward(const moe4_moe *moe, float *y, size_t layer, bool twice, moe4_moe_report *report) {
    float w[T * K];
    memcpy(w, find(layer, "topk_weight", MOE4_F32, T * K), sizeof w);
    for (size_t i = 0; i < T * K && twice; i++) w[i] *= w[i];
    moe4_workspace ws = make_workspace(moe);
    OK(ctx, moe4_moe_forward(moe, y, find(layer, "x", MOE4_BF16, T * H), find(layer, "topk_idx", MOE4_I32, T * K), w, T, &ws, NULL));
    if (report) OK(ctx, moe4_moe_report_read(moe, report, NULL, &ws, NULL));
    free(ws.data);
}

static void test_layers(void **state) {
    (void)state;
    static float y[T * H];
    for (int isa = 0; isa < REF_N_ISAS; isa++) {
        open_all(ref_isas[isa]);
        for (size_t layer = 1; layer <= 3; layer++)
            for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
                moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
                o.act = (moe4_act)act;
                o.y_dtype = MOE4_F32;
                moe4_moe *moe;
                OK(ctx, moe4_moe_create_from_checkpoint(&moe, ctx, model, layer, &o));
                moe4_moe_report report = MOE4_MOE_REPORT_INIT;
                forward(moe, y, layer, false, &report);
                double error = golden_error(layer, "y", o.act, y, T);
                print_message("layer %zu, %-6s, %s: relative L2 %.2e\n", layer, moe4_act_name(o.act), moe4_ctx_isa(ctx), error);
                if (!(error <= tolerance(o.act))) fail_msg("above %g", tolerance(o.act));
                if (o.act == MOE4_ACT_STATIC)
                    assert_int_equal(report.n_saturated_blocks, *(const int32_t *)find(layer, "saturated_static", MOE4_I32, 1));
                moe4_moe_destroy(moe);
            }
        close_all();
    }
}

/* The shared expert alone is a layer of one expert; beside the routed ones it adds the same. */
static void test_shared_expert(void **state) {
    (void)state;
    static float routed[T * H], both[T * H], shared[T * H];
    open_all(0);
    for (size_t layer = 1; layer <= 3; layer++)
        for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
            moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
            o.act = (moe4_act)act;
            o.y_dtype = MOE4_F32;
            moe4_moe *moe;
            OK(ctx, moe4_moe_create_from_checkpoint(&moe, ctx, model, layer, &o));
            forward(moe, routed, layer, false, NULL);
            moe4_moe_destroy(moe);
            o.with_shared = 1;
            OK(ctx, moe4_moe_create_from_checkpoint(&moe, ctx, model, layer, &o));
            forward(moe, both, layer, false, NULL);
            moe4_moe_destroy(moe);

            moe4_expert e;
            OK(ctx, moe4_checkpoint_expert(model, &e.gate, layer, MOE4_EXPERT_SHARED, MOE4_GATE));
            OK(ctx, moe4_checkpoint_expert(model, &e.up, layer, MOE4_EXPERT_SHARED, MOE4_UP));
            OK(ctx, moe4_checkpoint_expert(model, &e.down, layer, MOE4_EXPERT_SHARED, MOE4_DOWN));
            o.with_shared = 0;
            o.n_experts = o.top_k = 1;
            OK(ctx, moe4_moe_create(&moe, ctx, &e, &o));
            moe4_workspace ws = make_workspace(moe);
            OK(ctx, moe4_moe_forward(moe, shared, find(layer, "x", MOE4_BF16, T * H), NULL, NULL, T, &ws, NULL));
            free(ws.data);
            moe4_moe_destroy(moe);
            assert_true(golden_error(layer, "shared", o.act, shared, T_SHARED) <= tolerance(o.act));
            for (size_t i = 0; i < T * H; i++) assert_float_equal(both[i], routed[i] + shared[i], 1e-6 + 1e-5 * fabsf(both[i]));
        }
    close_all();
}

static void test_router(void **state) {
    (void)state;
    open_all(0);
    for (size_t layer = 1; layer <= 3; layer++) {
        moe4_router_options o = MOE4_ROUTER_OPTIONS_INIT;
        o.x_dtype = MOE4_BF16;
        moe4_router *router;
        OK(ctx, moe4_router_create_from_checkpoint(&router, ctx, model, layer, &o));
        moe4_workspace ws;
        OK(ctx, moe4_router_workspace_bytes(router, &ws.bytes, T));
        ws.data = aligned_alloc(64, ws.bytes);
        int32_t ids[T * K];
        float weights[T * K];
        OK(ctx, moe4_router_forward(router, ids, weights, find(layer, "x", MOE4_BF16, T * H), NULL, T, &ws, NULL));
        const int32_t *want_ids = find(layer, "topk_idx", MOE4_I32, T * K);
        const float *want = find(layer, "topk_weight", MOE4_F32, T * K);
        assert_memory_equal(ids, want_ids, sizeof ids);
        for (size_t i = 0; i < T * K; i++) assert_float_equal(weights[i], want[i], 2e-6);
        free(ws.data);
        moe4_router_destroy(router);
    }
    close_all();
}

/* Four mistakes that were made elsewhere; each must be far outside the tolerance that test_layers holds. */
static void test_teeth(void **state) {
    (void)state;
    static float y[T * H];
    enum { LAYER = 2 }; /* here gate and up have their own global scales */
    static const char *const mistakes[] = {"none", "globals rotated by one expert", "gate's global for up", "weight applied twice",
                                           "a batch-wide scale in token"};
    open_all(0);
    for (int mistake = 0; mistake < 5; mistake++) {
        moe4_expert experts[E];
        for (size_t e = 0; e < E; e++) {
            OK(ctx, moe4_checkpoint_expert(model, &experts[e].gate, LAYER, (int64_t)e, MOE4_GATE));
            OK(ctx, moe4_checkpoint_expert(model, &experts[e].up, LAYER, (int64_t)e, MOE4_UP));
            OK(ctx, moe4_checkpoint_expert(model, &experts[e].down, LAYER, (int64_t)e, MOE4_DOWN));
        }
        float first = experts[0].gate.global;
        for (size_t e = 0; e < E; e++) {
            if (mistake == 1) experts[e].gate.global = e + 1 < E ? experts[e + 1].gate.global : first;
            if (mistake == 2) experts[e].up.global = experts[e].gate.global;
        }
        moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
        o.n_experts = E;
        o.top_k = K;
        o.act = mistake == 4 ? MOE4_ACT_TENSOR : MOE4_ACT_TOKEN;
        o.y_dtype = MOE4_F32;
        moe4_moe *moe;
        OK(ctx, moe4_moe_create(&moe, ctx, experts, &o));
        forward(moe, y, LAYER, mistake == 3, NULL);
        double error = golden_error(LAYER, "y", MOE4_ACT_TOKEN, y, T);
        print_message("%s: relative L2 %.2e\n", mistakes[mistake], error);
        if (mistake == 0) {
            assert_true(error <= tolerance(MOE4_ACT_TOKEN));
        } else {
            assert_true(error > 10 * tolerance(MOE4_ACT_TOKEN));
        }
        moe4_moe_destroy(moe);
    }
    close_all();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layers),
        cmocka_unit_test(test_shared_expert),
        cmocka_unit_test(test_router),
        cmocka_unit_test(test_teeth),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
