/* Models that must be refused before the first token, with a sentence that names what is wrong. */
#include "lm_util.h"

#define TINY MOE4_SOURCE_DIR "/tests/vectors/hf-glm4-moe"
#define TINY_QWEN MOE4_SOURCE_DIR "/tests/vectors/hf-qwen3-moe"

/* A copy of a model folder with one text of config.json replaced and, in the weights' header, a name by another of the same length. */
struct alteration {
    const char *from, *to; /* NULL: config.json as it is */
    const char *name, *new_name;
};

static void copy_model(const char *to, const char *from, const struct alteration *a) {
    char path[256];
    size_t bytes;
    snprintf(path, sizeof path, "%s/config.json", from);
    char *config = read_whole(path, &bytes);
    snprintf(path, sizeof path, "%s/config.json", to);
    char *altered = a->from ? replaced(config, a->from, a->to) : replaced(config, "{", "{");
    write_whole(path, altered, strlen(altered));
    free(altered);
    free(config);

    snprintf(path, sizeof path, "%s/model.safetensors", from);
    char *weights = read_whole(path, &bytes);
    if (a->name) {
        assert_int_equal(strlen(a->name), strlen(a->new_name));
        char *at = memmem(weights, bytes, a->name, strlen(a->name));
        if (!at) fail_msg("no tensor %s", a->name);
        memcpy(at, a->new_name, strlen(a->new_name));
    }
    snprintf(path, sizeof path, "%s/model.safetensors", to);
    write_whole(path, weights, bytes);
    free(weights);
}

/* Opens the altered copy in the default mode; the sentence must contain `says`. */
static void check_refused(const char *model, const struct alteration *a, moe4_status status, const char *says) {
    char folder[64];
    struct opened o;
    make_folder(folder);
    copy_model(folder, model, a);
    moe4_status got = try_open(&o, folder, MOE4_ACT_DEFAULT, 1);
    if (got != status || !strstr(o.lm.error, says))
        fail_msg("%s -> %s: %s (%s), not \"%s\"", a->from ? a->from : a->name, a->to ? a->to : "", moe4_status_text(got), o.lm.error, says);
    assert_null(o.model);
    close_model(&o);
    remove_folder(folder);
}

static void test_unaltered_copy_opens(void **state) {
    (void)state;
    char folder[64], path[128];
    struct opened o;
    make_folder(folder);
    copy_model(folder, TINY, &(struct alteration){NULL, NULL, NULL, NULL});
    open_model(&o, folder, MOE4_ACT_DEFAULT, 1);
    assert_false(o.model->byte_level); /* 97 tokens */
    close_model(&o);

    copy_model(folder, BUNDLED, &(struct alteration){NULL, NULL, NULL, NULL});
    open_model(&o, folder, MOE4_ACT_DEFAULT, 1);
    assert_true(o.model->byte_level);
    close_model(&o);
    snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    write_whole(path, "{}", 2);
    open_model(&o, folder, MOE4_ACT_DEFAULT, 1);
    assert_false(o.model->byte_level); /* somebody else knows what its tokens mean */
    close_model(&o);
    remove_folder(folder);
}

static void test_missing_tensors(void **state) {
    (void)state;
    static const char *const names[] = {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.v_proj.bias",
        "model.layers.2.self_attn.k_norm.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.5.up_proj.weight",
        "model.layers.2.mlp.experts.7.down_proj.weight",
        "model.layers.2.mlp.shared_experts.gate_proj.weight",
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char other[128], module[128];
        strcpy(other, names[i]);
        other[strlen(other) - 1] = '_';
        strcpy(module, names[i]);
        *strrchr(module, '.') = '\0';
        check_refused(TINY, &(struct alteration){NULL, NULL, names[i], other}, MOE4_ERROR_NOT_FOUND, module);
    }
    /* and the parts of an NVFP4 matrix */
    check_refused(BUNDLED,
                  &(struct alteration){NULL, NULL, "model.layers.3.mlp.experts.17.down_proj.weight_scale_2",
                                       "model.layers.3.mlp.experts.17.down_proj.weight_scale_3"},
                  MOE4_ERROR_FORMAT, "model.layers.3.mlp.experts.17.down_proj");
    check_refused(BUNDLED,
                  &(struct alteration){NULL, NULL, "model.layers.5.self_attn.k_proj.weight\"", "model.layers.5.self_attn.k_proj.weighs\""},
                  MOE4_ERROR_FORMAT, "model.layers.5.self_attn.k_proj");
}

static void test_hostile_configs(void **state) {
    (void)state;
    static const struct {
        const char *model, *from, *to;
        moe4_status status;
        const char *says;
    } cases[] = {
        {TINY, "\"num_attention_heads\": 4", "\"num_attention_heads\": 0", MOE4_ERROR_FORMAT, "num_attention_heads"},
        {TINY, "\"num_attention_heads\": 4", "\"num_attention_heads\": -4", MOE4_ERROR_FORMAT, "num_attention_heads"},
        {TINY, "\"num_attention_heads\": 4", "\"num_attention_heads\": 4.5", MOE4_ERROR_FORMAT, "num_attention_heads"},
        {TINY, "\"num_attention_heads\": 4", "\"num_attention_heads\": 1000000000", MOE4_ERROR_FORMAT, "num_attention_heads"},
        {TINY, "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", MOE4_ERROR_FORMAT, "3"},
        {TINY, "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 0", MOE4_ERROR_FORMAT, "num_key_value_heads"},
        {TINY, "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 8", MOE4_ERROR_FORMAT, "num_key_value_heads"},
        {TINY, "\"head_dim\": 16", "\"head_dim\": 15", MOE4_ERROR_FORMAT, "15"},
        {TINY, "\"head_dim\": 16", "\"head_dim\": 0", MOE4_ERROR_FORMAT, "head_dim"},
        {TINY, "\"head_dim\": 16", "\"head_dim\": 4000000000", MOE4_ERROR_FORMAT, "head_dim"},
        {TINY, "\"head_dim\": 16", "\"head_dim\": 32", MOE4_ERROR_FORMAT, "self_attn.q_proj"},
        {TINY, "\"partial_rotary_factor\": 0.5", "\"partial_rotary_factor\": 0.3125", MOE4_ERROR_FORMAT, "5 of 16"},
        {TINY, "\"partial_rotary_factor\": 0.5", "\"partial_rotary_factor\": 0", MOE4_ERROR_FORMAT, "0 of 16"},
        {TINY, "\"partial_rotary_factor\": 0.5", "\"partial_rotary_factor\": 2", MOE4_ERROR_FORMAT, "partial_rotary_factor"},
        {TINY, "\"rope_theta\": 1000000.0", "\"rope_theta\": -1", MOE4_ERROR_FORMAT, "rope_theta"},
        {TINY, "\"rope_type\": \"default\"", "\"rope_type\": \"yarn\"", MOE4_ERROR_UNSUPPORTED, "yarn"},
        {TINY, "\"rope_type\": \"default\"", "\"rope_type\": 7", MOE4_ERROR_FORMAT, "rope_parameters"},
        {TINY, "\"rope_parameters\": {", "\"rope_scaling\": 7, \"rope_parameters\": {", MOE4_ERROR_FORMAT, "rope_scaling"},
        {TINY, "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": \"small\"", MOE4_ERROR_FORMAT, "rms_norm_eps"},
        {TINY, "\"max_position_embeddings\": 512", "\"max_position_embeddings\": 0", MOE4_ERROR_FORMAT, "max_position_embeddings"},
        {TINY, "\"vocab_size\": 97", "\"vocab_size\": 98", MOE4_ERROR_FORMAT, "98"},
        {TINY, "\"hidden_size\": 32", "\"hidden_size\": 64", MOE4_ERROR_FORMAT, "64"},
        {TINY, "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4", MOE4_ERROR_NOT_FOUND, "model.layers.3."},
        {TINY, "\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", MOE4_ERROR_UNSUPPORTED, "hidden_act"},
        {TINY, "\"attention_bias\": true", "\"attention_bias\": 1", MOE4_ERROR_FORMAT, "attention_bias"},
        {TINY, "\"model_type\": \"glm4_moe\"", "\"model_type\": \"deepseek_v3\"", MOE4_ERROR_UNSUPPORTED, "deepseek_v3"},
        {TINY, "\"model_type\": \"glm4_moe\"", "\"model_type\": \"other\"", MOE4_ERROR_UNSUPPORTED, "other"},
        {TINY_QWEN, "\"use_sliding_window\": false", "\"use_sliding_window\": true", MOE4_ERROR_UNSUPPORTED, "use_sliding_window"},
        {TINY_QWEN, "\"attention_bias\": false", "\"attention_bias\": true", MOE4_ERROR_NOT_FOUND, "model.layers.0.self_attn.q_proj.bias"},
        {TINY_QWEN, "\"rope_theta\"", "\"partial_rotary_factor\": 0.5, \"rope_theta\"", MOE4_ERROR_UNSUPPORTED, "8 of 16"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_refused(cases[i].model, &(struct alteration){cases[i].from, cases[i].to, NULL, NULL}, cases[i].status, cases[i].says);
}

static void test_not_a_model(void **state) {
    (void)state;
    struct opened o;
    assert_int_equal(try_open(&o, "/no/such/folder", MOE4_ACT_DEFAULT, 1), MOE4_ERROR_NOT_FOUND);
    close_model(&o);
    assert_int_not_equal(try_open(&o, BUNDLED "/model.safetensors", MOE4_ACT_DEFAULT, 1), MOE4_OK); /* weights without a config */
    assert_non_null(strstr(o.lm.error, "config.json"));
    close_model(&o);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unaltered_copy_opens),
        cmocka_unit_test(test_missing_tensors),
        cmocka_unit_test(test_hostile_configs),
        cmocka_unit_test(test_not_a_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
