/* Tiny models of each family with random weights, against what Hugging Face transformers makes of them (make_hf_vectors.py). */
#include "lm_util.h"

#define VECTORS MOE4_SOURCE_DIR "/tests/vectors/"

enum { VOCAB = 97 };

/* transformers in fp32 and in fp64 differ by less than 1e-6 here; so may this. */
static void compare_isa(const char *folder, const char *expected, const char *isa) {
    struct opened o;
    moe4_checkpoint *file;
    if (try_open_isa(&o, folder, MOE4_ACT_DEFAULT, 0, isa) != MOE4_OK) fail_msg("%s: %s", folder, o.lm.error);
    assert_int_equal(o.model->act, MOE4_ACT_BF16);
    assert_int_equal(moe4_checkpoint_open(&file, o.lm.ctx, expected), MOE4_OK);
    moe4_tensor ids = find_tensor(file, "tokens"), golden = find_tensor(file, "logits");
    size_t n = ids.shape[0];
    assert_int_equal(golden.bytes, n * VOCAB * sizeof(float));
    int32_t *tokens = malloc(ids.bytes);
    float *want = malloc(golden.bytes);
    memcpy(tokens, ids.data, ids.bytes);
    memcpy(want, golden.data, golden.bytes);
    float *whole = run_logits(&o, tokens, 1, n, n), *stepped = run_logits(&o, tokens, 1, n, 1);
    double error = relative_l2(whole, want, n * VOCAB);
    print_message("%s, %s: relative L2 %.1e\n", o.model->config.info.family, moe4_ctx_isa(o.lm.ctx), error);
    assert_true(error <= 1e-5);
    assert_memory_equal(stepped, whole, golden.bytes);
    free(whole);
    free(stepped);
    free(tokens);
    free(want);
    moe4_checkpoint_close(file);
    close_model(&o);
}

static void compare(const char *folder, const char *expected) {
    compare_isa(folder, expected, "scalar");
    compare_isa(folder, expected, NULL); /* the best there is */
}

static void test_glm4(void **state) {
    (void)state;
    compare(VECTORS "hf-glm4-moe", VECTORS "hf-glm4-moe-logits.safetensors");
}

static void test_qwen3(void **state) {
    (void)state;
    compare(VECTORS "hf-qwen3-moe", VECTORS "hf-qwen3-moe-logits.safetensors");
}

static void test_qwen3_mixed(void **state) {
    (void)state;
    compare(VECTORS "hf-qwen3-moe-mixed", VECTORS "hf-qwen3-moe-mixed-logits.safetensors");
}

/* Modes are for NVFP4 matrices: a model without any has bf16 alone. */
static void test_modes(void **state) {
    (void)state;
    struct opened o;
    assert_int_equal(try_open(&o, VECTORS "hf-qwen3-moe", MOE4_ACT_TOKEN, 1), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(o.lm.error, "token"));
    assert_null(o.model);
    close_model(&o);
    open_model(&o, VECTORS "hf-qwen3-moe", MOE4_ACT_BF16, 1);
    close_model(&o);
    assert_int_equal(try_open(&o, BUNDLED, MOE4_ACT_BF16, 1), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(o.lm.error, "bf16"));
    close_model(&o);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_glm4),
        cmocka_unit_test(test_qwen3),
        cmocka_unit_test(test_qwen3_mixed),
        cmocka_unit_test(test_modes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
