/* config.json: what it says of every family, and one for each rule that it may break. */
#include "checkpoint_case.h"

/* ---- config.json ---- */

#define QWEN                                                                                                       \
    "\"model_type\":\"qwen3_moe\",\"hidden_size\":64,\"vocab_size\":9,\"num_hidden_layers\":4,\"num_experts\":16," \
    "\"num_experts_per_tok\":4,\"moe_intermediate_size\":32,\"norm_topk_prob\":true,"

#define V4                                                                                                                \
    "\"model_type\":\"deepseek_v4\",\"hidden_size\":64,\"vocab_size\":9,\"num_hidden_layers\":3,\"n_routed_experts\":16," \
    "\"num_experts_per_tok\":4,\"moe_intermediate_size\":32,"
#define NEMOTRON                                                                                                           \
    "\"model_type\":\"nemotron_h\",\"hidden_size\":64,\"vocab_size\":9,\"n_routed_experts\":16,\"num_experts_per_tok\":4," \
    "\"moe_intermediate_size\":32,\"norm_topk_prob\":true,"

/* Opens a folder with this config; the info's status. */
static moe4_status info_of(const char *config, moe4_model_info *info, char kinds[8]) {
    files_text("config.json", config);
    moe4_checkpoint *ckpt;
    if (moe4_checkpoint_open(&ckpt, ctx, files_path("")) != MOE4_OK) fail_msg("%s: %s", config, moe4_ctx_error(ctx));
    moe4_status status = moe4_checkpoint_info(ckpt, info);
    for (size_t l = 0; status == MOE4_OK && l < info->n_layers && l < 7; l++) {
        moe4_layer_kind kind;
        assert_int_equal(moe4_checkpoint_layer_kind(ckpt, &kind, l), MOE4_OK);
        kinds[l] = kind == MOE4_LAYER_MOE ? 'm' : kind == MOE4_LAYER_DENSE ? 'd' : 'o';
        kinds[l + 1] = '\0';
    }
    info->family = info->architecture = info->quantization = NULL; /* they go with the checkpoint */
    if (status != MOE4_OK) {                                       /* a call that needs the family says the same */
        char why[512];
        snprintf(why, sizeof why, "%s", moe4_ctx_error(ctx));
        moe4_layer_kind kind;
        assert_int_equal(moe4_checkpoint_layer_kind(ckpt, &kind, 0), status);
        assert_string_equal(moe4_ctx_error(ctx), why);
    }
    moe4_checkpoint_close(ckpt);
    return status;
}

static void test_bad_configs(void **state) {
    (void)state;
    files_safetensors("model.safetensors", U8("a"), NULL, 2);
    files_text("config.json", "{");
    expect_open("config not JSON", MOE4_ERROR_FORMAT, "config.json: not valid JSON");
    files_text("config.json", "{\"a\":1,\"a\":2}");
    expect_open("a key twice", MOE4_ERROR_FORMAT, "config.json|duplicate");

    static const struct {
        const char *config;
        moe4_status status;
        const char *words;
    } cases[] = {
        {"{}", MOE4_ERROR_UNSUPPORTED, "unsupported: model_type \"\" (found"},
        {"{\"model_type\":\"dbrx\",\"architectures\":[\"DbrxForCausalLM\"]}", MOE4_ERROR_UNSUPPORTED,
         "model_type \"dbrx\" (found architecture \"DbrxForCausalLM\"; moe4 runs deepseek_v3, kimi_k2, deepseek_v32, "
         "glm_moe_dsa, glm4_moe, qwen3_moe, mixtral, deepseek_v4, deepseek_v41, nemotron_h)"},
        {"{\"model_type\":\"gpt_oss\"}", MOE4_ERROR_UNSUPPORTED, "unsupported: model_type \"gpt_oss\": gpt-oss: mlp.experts.gate_up_proj"},
        {"{\"model_type\":\"llama4\"}", MOE4_ERROR_UNSUPPORTED, "Llama-4: feed_forward.experts.gate_up_proj"},
        {"{\"text_config\":[]}", MOE4_ERROR_FORMAT, "text_config is not an object"},
        {"{\"model_type\":\"x\",\"text_config\":{\"model_type\":\"glm4_moe\"}}", MOE4_ERROR_FORMAT, "no hidden_size"},
        {"{" V4 "\"num_hash_layers\":4}", MOE4_ERROR_FORMAT, "num_hash_layers is 4, need 0 to 3"},
        {"{" V4 "\"scoring_func\":\"sigmoid\"}", MOE4_ERROR_UNSUPPORTED, "scoring_func \"sigmoid\" (moe4 runs \"sqrtsoftplus\")"},
        {"{" V4 "\"swiglu_limit\":-1}", MOE4_ERROR_FORMAT, "swiglu_limit is -1"},
        {"{" V4 "\"gate_temp\":0}", MOE4_ERROR_FORMAT, "gate_temp is 0"},
        {"{" NEMOTRON "\"num_hidden_layers\":3}", MOE4_ERROR_FORMAT, "hybrid_override_pattern has 0 layers, num_hidden_layers is 3"},
        {"{" NEMOTRON "\"num_hidden_layers\":3,\"hybrid_override_pattern\":\"ME\"}", MOE4_ERROR_FORMAT, "hybrid_override_pattern has 2"},
        {"{" NEMOTRON "\"num_hidden_layers\":3,\"hybrid_override_pattern\":\"MEx\"}", MOE4_ERROR_FORMAT, "layer 2 is none of E - M *"},
        {"{" NEMOTRON "\"num_hidden_layers\":3,\"hybrid_override_pattern\":\"ME-\"}", MOE4_ERROR_FORMAT, "no intermediate_size"},
        {"{" NEMOTRON "\"num_hidden_layers\":2,\"layers_block_type\":[\"moe\",7]}", MOE4_ERROR_FORMAT,
         "layers_block_type: layer 1 is none"},
        {"{" NEMOTRON "\"num_hidden_layers\":1,\"layers_block_type\":[\"moe\"],\"moe_latent_size\":16}", MOE4_ERROR_UNSUPPORTED,
         "moe_latent_size 16"},
        {"{" NEMOTRON "\"num_hidden_layers\":1,\"layers_block_type\":[\"moe\"],\"mlp_hidden_act\":\"silu\"}", MOE4_ERROR_UNSUPPORTED,
         "mlp_hidden_act \"silu\" (moe4 runs \"relu2\")"},
        {"{" NEMOTRON "\"num_hidden_layers\":1,\"layers_block_type\":[\"moe\"],\"n_shared_experts\":1}", MOE4_ERROR_FORMAT,
         "no moe_shared_expert_intermediate_size"},
        {"{\"model_type\":7}", MOE4_ERROR_FORMAT, "model_type is not a string"},
        {"{\"model_type\":\"x\\u001b\"}", MOE4_ERROR_FORMAT, "model_type"},
        {"{" GLM "\"architectures\":[7]}", MOE4_ERROR_FORMAT, "architectures"},
        {"{\"model_type\":\"glm4_moe\"}", MOE4_ERROR_FORMAT, "no hidden_size"},
        {"{\"model_type\":\"qwen3_moe\",\"hidden_size\":64,\"vocab_size\":9}", MOE4_ERROR_FORMAT, "no num_experts"},
        {"{\"model_type\":\"glm4_moe\",\"hidden_size\":0}", MOE4_ERROR_FORMAT, "hidden_size is 0, need 1 to"},
        {"{\"model_type\":\"glm4_moe\",\"hidden_size\":-1}", MOE4_ERROR_FORMAT, "hidden_size is -1"},
        {"{\"model_type\":\"glm4_moe\",\"hidden_size\":9223372036854775807}", MOE4_ERROR_FORMAT, "hidden_size is 9223372036854775807"},
        {"{\"model_type\":\"glm4_moe\",\"hidden_size\":64.0}", MOE4_ERROR_FORMAT, "hidden_size is not a whole number"},
        {"{\"model_type\":\"glm4_moe\",\"hidden_size\":\"64\"}", MOE4_ERROR_FORMAT, "hidden_size is not a whole number"},
        {"{\"model_type\":\"qwen3_moe\",\"hidden_size\":64,\"vocab_size\":9,\"num_hidden_layers\":1001,\"num_experts\":1048,"
         "\"num_experts_per_tok\":4,\"moe_intermediate_size\":32,\"norm_topk_prob\":true}",
         MOE4_ERROR_FORMAT, "1001 layers of 1048 experts, at most 1048576"},
        {"{" GLM "\"num_local_experts\":17}", MOE4_ERROR_FORMAT, "n_routed_experts is 16, but num_local_experts is 17"},
        {"{" GLM "\"n_group\":0}", MOE4_ERROR_FORMAT, "n_group is 0"},
        {"{" GLM "\"n_group\":3}", MOE4_ERROR_FORMAT, "16 experts cannot be split into n_group 3"},
        {"{" GLM "\"n_group\":16,\"topk_group\":4}", MOE4_ERROR_FORMAT, "groups of 1 expert"},
        {"{" GLM "\"n_group\":8,\"topk_group\":9}", MOE4_ERROR_FORMAT, "topk_group is 9, need 1 to 8"},
        {"{" GLM "\"n_group\":8,\"topk_group\":1}", MOE4_ERROR_FORMAT, "num_experts_per_tok is 4, but topk_group 1 leaves 2"},
        {"{" GLM "\"routed_scaling_factor\":-1}", MOE4_ERROR_FORMAT, "routed_scaling_factor is -1"},
        {"{" GLM "\"routed_scaling_factor\":0}", MOE4_ERROR_FORMAT, "routed_scaling_factor is 0"},
        {"{" GLM "\"routed_scaling_factor\":1e39}", MOE4_ERROR_FORMAT, "routed_scaling_factor is 1e+39"},
        {"{" GLM "\"routed_scaling_factor\":\"2\"}", MOE4_ERROR_FORMAT, "routed_scaling_factor is not a number"},
        {"{" GLM "\"tie_word_embeddings\":1}", MOE4_ERROR_FORMAT, "tie_word_embeddings is neither true nor false"},
        {"{" GLM "\"scoring_func\":\"softmax\"}", MOE4_ERROR_UNSUPPORTED, "scoring_func \"softmax\" (moe4 runs \"sigmoid\")"},
        {"{" GLM "\"topk_method\":\"greedy\"}", MOE4_ERROR_UNSUPPORTED, "topk_method \"greedy\""},
        {"{" GLM "\"hidden_act\":\"gelu\"}", MOE4_ERROR_UNSUPPORTED, "hidden_act \"gelu\" (moe4 runs \"silu\")"},
        {"{" GLM "\"n_shared_experts\":65}", MOE4_ERROR_FORMAT, "n_shared_experts is 65"},
        {"{" GLM "\"moe_layer_freq\":0}", MOE4_ERROR_FORMAT, "moe_layer_freq is 0"},
        {"{" GLM "\"moe_layer_freq\":[1]}", MOE4_ERROR_FORMAT, "moe_layer_freq is not a whole number"},
        {"{" QWEN "\"mlp_only_layers\":[4],\"intermediate_size\":48}", MOE4_ERROR_FORMAT, "mlp_only_layers[0] is no layer from 0 to 3"},
        {"{" QWEN "\"mlp_only_layers\":{}}", MOE4_ERROR_FORMAT, "mlp_only_layers is not a list"},
        {"{" QWEN "\"mlp_only_layers\":[0]}", MOE4_ERROR_FORMAT, "no intermediate_size"},
        {"{" QWEN "\"decoder_sparse_step\":0}", MOE4_ERROR_FORMAT, "decoder_sparse_step is 0"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        moe4_model_info info = MOE4_MODEL_INFO_INIT;
        char kinds[8];
        moe4_status status = info_of(cases[i].config, &info, kinds);
        if (status != cases[i].status) fail_msg("%s: %d (%s)", cases[i].config, status, moe4_ctx_error(ctx));
        expect_words(cases[i].config, cases[i].words);
    }
}

static void test_families(void **state) {
    (void)state;
    files_safetensors("model.safetensors", U8("a"), NULL, 2);
    moe4_model_info info = MOE4_MODEL_INFO_INIT;
    char kinds[8];
    assert_int_equal(info_of("{" GLM "\"n_shared_experts\":2,\"n_group\":4,\"topk_group\":2,\"routed_scaling_factor\":2}", &info, kinds),
                     MOE4_OK);
    assert_string_equal(kinds, "dmmm");
    assert_int_equal(info.n_shared_experts, 2);
    assert_int_equal(info.intermediate, 48);
    assert_int_equal(info.router.kind, MOE4_ROUTER_SIGMOID_BIAS);
    assert_int_equal(info.router.n_group, 4);
    assert_int_equal(info.router.topk_group, 2);
    assert_int_equal(info.router.normalize, 1);
    assert_true(info.router.scale == 2.0f);
    assert_int_equal(info_of("{" GLM "\"moe_layer_freq\":2,\"n_shared_experts\":null}", &info, kinds), MOE4_OK);
    assert_string_equal(kinds, "ddmd");
    assert_int_equal(info.n_shared_experts, 0);
    assert_int_equal(info_of("{" QWEN "\"n_shared_experts\":3}", &info, kinds), MOE4_OK);
    assert_string_equal(kinds, "mmmm");
    assert_int_equal(info.n_shared_experts, 0); /* not of this family */
    assert_int_equal(info.intermediate, 0);
    assert_int_equal(info.router.kind, MOE4_ROUTER_SOFTMAX_TOPK);
    assert_true(info.router.scale == 1.0f);
    assert_int_equal(info_of("{" QWEN "\"decoder_sparse_step\":2,\"intermediate_size\":8}", &info, kinds), MOE4_OK);
    assert_string_equal(kinds, "dmdm");
    assert_int_equal(info_of("{" QWEN "\"mlp_only_layers\":[3,1],\"intermediate_size\":8}", &info, kinds), MOE4_OK);
    assert_string_equal(kinds, "mdmd");
    assert_int_equal(info_of("{" V4 "\"num_hash_layers\":2,\"swiglu_limit\":10,\"gate_temp\":0.5}", &info, kinds), MOE4_OK);
    assert_string_equal(kinds, "mmm");
    assert_int_equal(info.router.kind, MOE4_ROUTER_SQRTSOFTPLUS_BIAS);
    assert_int_equal(info.router.normalize, 1);
    assert_int_equal(info.n_hash_layers, 2);
    assert_true(info.swiglu_limit == 10 && info.router.gate_temp == 0.5f);
    assert_int_equal(info_of("{" NEMOTRON "\"num_hidden_layers\":4,\"hybrid_override_pattern\":\"ME*-\",\"intermediate_size\":8,"
                             "\"swiglu_limit\":7}",
                             &info, kinds),
                     MOE4_OK);
    assert_string_equal(kinds, "omod");
    assert_int_equal(info.activation, MOE4_RELU2);
    assert_true(info.swiglu_limit == 0); /* of no meaning to it */
    assert_int_equal(info_of("{\"model_type\":\"vl\",\"num_hidden_layers\":99,\"text_config\":{" GLM "\"n_group\":1}}", &info, kinds),
                     MOE4_OK);
    assert_string_equal(kinds, "dmmm");
    for (int i = 0; i < 2; i++) {
        char config[1024], *type;
        snprintf(config, sizeof config, "{" GLM "\"q_lora_rank\":null}");
        type = strstr(config, "\"glm4_moe\"");
        char edited[1024];
        snprintf(edited, sizeof edited, "%.*s\"%s\"%s", (int)(type - config), config, i ? "kimi_k2" : "deepseek_v3", type + 10);
        assert_int_equal(info_of(edited, &info, kinds), MOE4_OK);
        assert_string_equal(kinds, "dmmm");
        assert_int_equal(info.router.kind, MOE4_ROUTER_SIGMOID_BIAS);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_bad_configs),
        TEST(test_families),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
