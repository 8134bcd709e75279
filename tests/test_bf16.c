/* The bundled model before it was quantized, in mode bf16. Four of its experts are in tests/vectors; with MOE4_BF16_MODEL set to the
 * whole model's folder (36 MB, not in the tree) three layers are tried. */
#include "reference.h"

#define GOLDEN MOE4_SOURCE_DIR "/models/novels-18m-golden.safetensors"
#define EXPERTS MOE4_SOURCE_DIR "/tests/vectors/bf16-experts.safetensors" /* make_bf16_experts.py */
enum { T = 256, H = 256, I = 128, K = 6, E = 32, LAYER = 2, FIRST = 8, N = 4, T_VECTOR = 64 };

static const uint32_t isa_masks[] = {MOE4_ISA_SCALAR, 0};

static moe4_ctx *ctx;
static moe4_checkpoint *golden;

static void open_all(uint32_t isa_mask) {
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.isa_mask = isa_mask;
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_OK);
    OK(ctx, moe4_checkpoint_open(&golden, ctx, GOLDEN));
}

static void close_all(void) {
    moe4_checkpoint_close(golden);
    moe4_ctx_destroy(ctx);
}

static moe4_tensor find(const moe4_checkpoint *in, const char *name, moe4_dtype dtype, size_t rows, size_t cols) {
    moe4_tensor t;
    OK(ctx, moe4_checkpoint_find(in, &t, name));
    assert_int_equal(t.dtype, dtype);
    assert_int_equal(t.n_dims, 2);
    assert_int_equal(t.shape[0], rows);
    assert_int_equal(t.shape[1], cols);
    return t;
}

/* The layer on the first n_tokens of its golden's x and routing; the error against `wanted`. */
static double layer_error(const moe4_moe *moe, size_t layer, const moe4_tensor *wanted, size_t n_tokens) {
    static float y[T * H];
    static double want[T * H];
    char x[64], ids[64], weights[64];
    snprintf(x, sizeof x, "tale.layer%zu.x", layer);
    snprintf(ids, sizeof ids, "tale.layer%zu.topk_idx", layer);
    snprintf(weights, sizeof weights, "tale.layer%zu.topk_weight", layer);
    moe4_workspace ws;
    OK(ctx, moe4_moe_workspace_bytes(moe, &ws.bytes, n_tokens));
    ws.data = aligned_alloc(64, (ws.bytes + 63) / 64 * 64);
    OK(ctx, moe4_moe_forward(moe, y, find(golden, x, MOE4_BF16, T, H).data, find(golden, ids, MOE4_I32, T, K).data,
                             find(golden, weights, MOE4_F32, T, K).data, n_tokens, &ws, NULL));
    free(ws.data);
    for (size_t i = 0; i < n_tokens * H; i++) {
        float v;
        memcpy(&v, (const char *)wanted->data + 4 * i, 4);
        want[i] = v;
    }
    return ref_relative(y, want, n_tokens * H);
}

static moe4_moe_options bf16_options(void) {
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = E;
    o.top_k = K;
    o.act = MOE4_ACT_BF16;
    o.y_dtype = MOE4_F32;
    return o;
}

static moe4_weight expert_weight(const moe4_checkpoint *in, size_t e, const char *proj, size_t rows, size_t cols) {
    char name[96];
    snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%zu.%s.weight", LAYER, e, proj);
    return (moe4_weight){.dtype = MOE4_BF16, .rows = rows, .cols = cols, .data = find(in, name, MOE4_BF16, rows, cols).data};
}

/* Experts 8 to 11 of 32, as one of eight expert-parallel ranks would hold them. */
static void test_four_experts(void **state) {
    (void)state;
    for (int isa = 0; isa < 2; isa++) {
        open_all(isa_masks[isa]);
        moe4_checkpoint *file;
        OK(ctx, moe4_checkpoint_open(&file, ctx, EXPERTS));
        moe4_expert experts[N];
        for (size_t e = 0; e < N; e++) {
            experts[e].gate = expert_weight(file, FIRST + e, "gate_proj", I, H);
            experts[e].up = expert_weight(file, FIRST + e, "up_proj", I, H);
            experts[e].down = expert_weight(file, FIRST + e, "down_proj", H, I);
        }
        moe4_moe_options o = bf16_options();
        o.first_expert = FIRST;
        o.n_local = N;
        moe4_moe *moe;
        OK(ctx, moe4_moe_create(&moe, ctx, experts, &o));
        moe4_tensor y = find(file, "y", MOE4_F32, T_VECTOR, H);
        assert_true(layer_error(moe, LAYER, &y, T_VECTOR) <= 1e-5);
        moe4_moe_destroy(moe);
        moe4_checkpoint_close(file);
        close_all();
    }
}

static void test_whole_layers(void **state) {
    (void)state;
    if (!getenv("MOE4_BF16_MODEL")) skip();
    for (int isa = 0; isa < 2; isa++) {
        open_all(isa_masks[isa]);
        moe4_checkpoint *model;
        OK(ctx, moe4_checkpoint_open(&model, ctx, getenv("MOE4_BF16_MODEL")));
        for (size_t layer = 1; layer <= 3; layer++) {
            moe4_moe_options o = bf16_options();
            moe4_moe *moe;
            OK(ctx, moe4_moe_create_from_checkpoint(&moe, ctx, model, layer, &o));
            char name[64];
            snprintf(name, sizeof name, "tale.layer%zu.y_bf16", layer);
            moe4_tensor y = find(golden, name, MOE4_F32, T, H);
            assert_true(layer_error(moe, layer, &y, T) <= 1e-5);
            moe4_moe_destroy(moe);
        }
        moe4_checkpoint_close(model);
        close_all();
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_four_experts),
        cmocka_unit_test(test_whole_layers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
