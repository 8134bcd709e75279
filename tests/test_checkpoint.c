/* Checkpoints: folders, indexes, families, companions. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "moe4.h"

#define MODEL MOE4_SOURCE_DIR "/models/novels-18m-nvfp4"

static moe4_ctx *ctx;

static int make_ctx(void **state) {
    (void)state;
    return moe4_ctx_create(&ctx, NULL);
}

static int drop_ctx(void **state) {
    (void)state;
    moe4_ctx_destroy(ctx);
    return 0;
}

static void test_bundled_model(void **state) {
    (void)state;
    moe4_checkpoint *ckpt;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, MODEL), MOE4_OK);
    assert_int_equal(moe4_checkpoint_n_files(ckpt), 1);
    assert_int_equal(moe4_checkpoint_n_tensors(ckpt), 2113);
    moe4_model_info info = MOE4_MODEL_INFO_INIT;
    assert_int_equal(moe4_checkpoint_info(ckpt, &info), MOE4_OK);
    assert_string_equal(info.family, "glm4_moe");
    assert_string_equal(info.architecture, "Glm4MoeForCausalLM");
    assert_string_equal(info.quantization, "modelopt NVFP4");
    assert_int_equal(info.n_layers, 6);
    assert_int_equal(info.intermediate, 768);
    assert_int_equal(info.n_experts, 32);
    assert_int_equal(info.router.kind, MOE4_ROUTER_SIGMOID_BIAS);
    assert_int_equal(info.router.top_k, 6);
    assert_true(info.router.scale == 2.5f);
    for (size_t layer = 0; layer < 6; layer++) {
        moe4_layer_kind kind;
        assert_int_equal(moe4_checkpoint_layer_kind(ckpt, &kind, layer), MOE4_OK);
        assert_int_equal(kind, layer ? MOE4_LAYER_MOE : MOE4_LAYER_DENSE);
        for (int64_t e = layer ? MOE4_EXPERT_SHARED : MOE4_EXPERT_DENSE; e < (layer ? 32 : -1); e++)
            for (int p = MOE4_GATE; p <= MOE4_DOWN; p++) {
                size_t inter = layer ? 128 : 768;
                moe4_weight w;
                assert_int_equal(moe4_checkpoint_expert(ckpt, &w, layer, e, (moe4_proj)p), MOE4_OK);
                assert_int_equal(w.dtype, MOE4_NVFP4);
                assert_int_equal(w.rows, p == MOE4_DOWN ? 256 : inter);
                assert_int_equal(w.cols, p == MOE4_DOWN ? inter : 256);
                assert_true(w.global > 0 && w.input_scale > 0);
            }
        moe4_weight gate;
        moe4_tensor bias;
        assert_int_equal(moe4_checkpoint_router(ckpt, &gate, &bias, layer), layer ? MOE4_OK : MOE4_ERROR_ARGUMENT);
        if (!layer) continue;
        assert_int_equal(gate.dtype, MOE4_BF16);
        assert_int_equal(bias.shape[0], 32);
    }
    moe4_checkpoint_close(ckpt);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bundled_model),
    };
    return cmocka_run_group_tests(tests, make_ctx, drop_ctx);
}
