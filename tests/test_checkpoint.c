/* Checkpoints: folders, indexes, families, companions. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#include "files.h"
#include "moe4.h"

#define MODEL MOE4_SOURCE_DIR "/models/novels-18m-nvfp4"

static moe4_ctx *ctx;

static int make_ctx(void **state) {
    (void)state;
    files_make();
    return moe4_ctx_create(&ctx, NULL);
}

static int drop_ctx(void **state) {
    (void)state;
    moe4_ctx_destroy(ctx);
    files_remove();
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

/* The calling thread's error must have these words (separated by '|'). */
static void expect_words(const char *what, const char *words) {
    const char *error = moe4_ctx_error(ctx);
    char word[128];
    for (const char *w = words; *w;) {
        size_t n = strcspn(w, "|");
        snprintf(word, sizeof word, "%.*s", (int)n, w);
        if (!strstr(error, word)) fail_msg("%s: \"%s\" lacks \"%s\"", what, error, word);
        w += n + (w[n] == '|');
    }
}

static void expect_open(const char *what, moe4_status status, const char *words) {
    moe4_checkpoint *ckpt = (moe4_checkpoint *)1;
    moe4_status got = moe4_checkpoint_open(&ckpt, ctx, files_path(""));
    if (got != status) fail_msg("%s: status %d, want %d (\"%s\")", what, got, status, moe4_ctx_error(ctx));
    if (status == MOE4_OK)
        moe4_checkpoint_close(ckpt);
    else
        assert_null(ckpt);
    expect_words(what, words);
}

/* ---- folders and indexes ---- */

#define U8(name) "{\"" name "\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}"
#define INDEX(map) "{\"metadata\":{},\"weight_map\":{" map "}}"

static void test_folder_without_index(void **state) {
    (void)state;
    expect_open("empty folder", MOE4_ERROR_NOT_FOUND, "no .safetensors file");
    files_safetensors("b.safetensors", U8("b"), "\3\4", 2);
    files_safetensors("a.safetensors", U8("a"), "\1\2", 2);
    files_text(".hidden.safetensors", "no checkpoint");
    files_text("notes.txt", "no checkpoint");
    moe4_checkpoint *ckpt;
    moe4_tensor t;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_OK);
    assert_int_equal(moe4_checkpoint_n_files(ckpt), 2);
    for (size_t i = 0; i < 2; i++) { /* in order of name */
        assert_int_equal(moe4_checkpoint_tensor(ckpt, &t, i), MOE4_OK);
        assert_string_equal(t.name, i ? "b" : "a");
        assert_string_equal(t.file, i ? "b.safetensors" : "a.safetensors");
        assert_int_equal(*(const uint8_t *)t.data, i ? 3 : 1);
    }
    moe4_model_info info = MOE4_MODEL_INFO_INIT;
    assert_int_equal(moe4_checkpoint_info(ckpt, &info), MOE4_ERROR_NOT_FOUND);
    expect_words("no config", "no config.json");
    moe4_checkpoint_close(ckpt);

    files_safetensors("c.safetensors", U8("a"), NULL, 2);
    expect_open("one tensor in two files", MOE4_ERROR_FORMAT, "tensor a stands in two files|a.safetensors|c.safetensors");
    files_safetensors("model.safetensors", U8("m"), NULL, 2);
    expect_open("model.safetensors is taken alone", MOE4_OK, "");
    files_text("model.safetensors", "no checkpoint");
    expect_open("and must be good", MOE4_ERROR_FORMAT, "model.safetensors");
}

static void test_index(void **state) {
    (void)state;
    files_safetensors("a.safetensors", U8("a"), NULL, 2);
    files_safetensors("b.safetensors", U8("b"), NULL, 2);
    files_text("c.safetensors", "no checkpoint, and not in the index");
    static const struct {
        const char *what, *index;
        moe4_status status;
        const char *words;
    } cases[] = {
        {"good", INDEX("\"a\":\"a.safetensors\",\"b\":\"b.safetensors\""), MOE4_OK, ""},
        {"b not named", INDEX("\"a\":\"a.safetensors\""), MOE4_OK, ""},
        {"not JSON", "{", MOE4_ERROR_FORMAT, "model.safetensors.index.json|not valid JSON"},
        {"a list", "[]", MOE4_ERROR_FORMAT, "index.json: not a JSON object"},
        {"no map", "{}", MOE4_ERROR_FORMAT, "no object weight_map"},
        {"map is a list", "{\"weight_map\":[]}", MOE4_ERROR_FORMAT, "no object weight_map"},
        {"empty map", INDEX(""), MOE4_ERROR_FORMAT, "weight_map is empty"},
        {"twice", INDEX("\"a\":\"a.safetensors\",\"a\":\"b.safetensors\""), MOE4_ERROR_FORMAT, "duplicate"},
        {"file is a number", INDEX("\"a\":1"), MOE4_ERROR_FORMAT, "tensor a|printable"},
        {"file is empty", INDEX("\"a\":\"\""), MOE4_ERROR_FORMAT, "tensor a|printable"},
        {"name with escape", INDEX("\"\\u001b[2J\":\"a.safetensors\""), MOE4_ERROR_FORMAT, "a tensor name of 4 bytes"},
        {"above", INDEX("\"a\":\"../a.safetensors\""), MOE4_ERROR_FORMAT, "\"../a.safetensors\" is not a file in the model's folder"},
        {"absolute", INDEX("\"a\":\"/tmp/a.safetensors\""), MOE4_ERROR_FORMAT, "\"/tmp/a.safetensors\" is not a file in"},
        {"folder below", INDEX("\"a\":\"x/a.safetensors\""), MOE4_ERROR_FORMAT, "is not a file in"},
        {"dots", INDEX("\"a\":\"..\""), MOE4_ERROR_FORMAT, "\"..\" is not a file in"},
        {"no .safetensors", INDEX("\"a\":\"a.bin\""), MOE4_ERROR_FORMAT, "\"a.bin\" is not a .safetensors file"},
        {"missing shard", INDEX("\"a\":\"a.safetensors\",\"d\":\"d.safetensors\""), MOE4_ERROR_NOT_FOUND, "d.safetensors|cannot open"},
        {"malformed shard", INDEX("\"a\":\"a.safetensors\",\"c\":\"c.safetensors\""), MOE4_ERROR_FORMAT, "c.safetensors"},
        {"shard lacks it", INDEX("\"a\":\"a.safetensors\",\"x\":\"a.safetensors\""), MOE4_ERROR_FORMAT, "tensor x is not in a.safetensors"},
        {"in the other shard", INDEX("\"a\":\"b.safetensors\",\"b\":\"a.safetensors\""), MOE4_ERROR_FORMAT,
         "tensor a is not in b.safetensors but in a.safetensors"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        files_text("model.safetensors.index.json", cases[i].index);
        expect_open(cases[i].what, cases[i].status, cases[i].words);
    }
    files_safetensors("b.safetensors", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", NULL, 2);
    files_text("model.safetensors.index.json", INDEX("\"a\":\"a.safetensors\",\"b\":\"b.safetensors\""));
    expect_open("in two shards", MOE4_ERROR_FORMAT, "tensor a stands in two files");
}

/* ---- config.json ---- */

#define GLM                                                                                                            \
    "\"model_type\":\"glm4_moe\",\"hidden_size\":64,\"vocab_size\":9,\"num_hidden_layers\":4,\"n_routed_experts\":16," \
    "\"num_experts_per_tok\":4,\"moe_intermediate_size\":32,\"norm_topk_prob\":true,\"first_k_dense_replace\":1,"      \
    "\"intermediate_size\":48,"
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

/* ---- modules and their companions ---- */

struct entry {
    const char *name, *dtype, *shape;
    size_t bytes;
    const char *data; /* NULL: zeros */
};
#define ONE "\0\0\x80\x3f"
#define CODES(n) "a.weight", "U8", "[2," #n "]", 2 * n, NULL
#define SCALES(n) "a.weight_scale", "F8_E4M3", "[2," #n "]", 2 * n, NULL
#define GLOBAL "a.weight_scale_2", "F32", "[]", 4, ONE
#define TWO "\0\0\0\x40"
#define PACKED(n) "a.weight_packed", "U8", "[2," #n "]", 2 * n, NULL
#define GLOBAL_OF(bytes) "a.weight_global_scale", "F32", "[1]", 4, bytes

static void write_entries(const struct entry *e) {
    char header[2048], data[2048] = {0};
    size_t at = (size_t)sprintf(header, "{"), offset = 0;
    for (int i = 0; e[i].name; i++) {
        at += (size_t)sprintf(header + at, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", i ? "," : "", e[i].name,
                              e[i].dtype, e[i].shape, offset, offset + e[i].bytes);
        if (e[i].data) memcpy(data + offset, e[i].data, e[i].bytes);
        offset += e[i].bytes;
    }
    sprintf(header + at, "}");
    files_safetensors("model.safetensors", header, data, offset);
}

static void test_companions(void **state) {
    (void)state;
    static const struct {
        const char *what;
        moe4_status status;
        const char *words;
        struct entry e[6];
    } cases[] = {
        {"NVFP4", MOE4_OK, "", {{CODES(16)}, {SCALES(2)}, {GLOBAL}, {"a.input_scale", "F32", "[1]", 4, ONE}}},
        {"NVFP4 without input_scale", MOE4_OK, "", {{CODES(8)}, {SCALES(1)}, {GLOBAL}}},
        {"nothing", MOE4_ERROR_NOT_FOUND, "a: no weight of this name", {{"b.weight", "F32", "[1,1]", 4, NULL}}},
        {"no global",
         MOE4_ERROR_FORMAT,
         "a: weight, weight_scale (U8), but neither weight_scale and weight_scale_2|nor",
         {{CODES(8)}, {SCALES(1)}}},
        {"codes alone", MOE4_ERROR_FORMAT, "a: weight (U8), but neither", {{CODES(8)}}},
        {"no scales", MOE4_ERROR_FORMAT, "without weight_scale, which modelopt NVFP4 needs", {{CODES(8)}, {GLOBAL}}},
        {"no weight", MOE4_ERROR_FORMAT, "without weight, which modelopt NVFP4 needs", {{SCALES(1)}, {GLOBAL}}},
        {"bf16 with a global", MOE4_ERROR_FORMAT, "without weight_scale", {{"a.weight", "BF16", "[2,16]", 64, NULL}, {GLOBAL}}},
        {"two formats",
         MOE4_ERROR_FORMAT,
         "companions of two formats: weight_scale_2 (modelopt NVFP4) and weight_global_scale (compressed-tensors",
         {{CODES(8)}, {SCALES(1)}, {GLOBAL}, {"a.weight_global_scale", "F32", "[1]", 4, ONE}}},
        {"two formats' weights",
         MOE4_ERROR_FORMAT,
         "companions of two formats|weight_packed",
         {{CODES(8)}, {SCALES(1)}, {GLOBAL}, {"a.weight_packed", "U8", "[2,8]", 16, NULL}}},
        {"NVFP4 and FP8",
         MOE4_ERROR_FORMAT,
         "companions of two formats|weight_scale_inv",
         {{CODES(8)}, {SCALES(1)}, {GLOBAL}, {"a.weight_scale_inv", "F32", "[1]", 4, ONE}}},
        {"scale too narrow", MOE4_ERROR_FORMAT, "a.weight_scale: 2x1, need 2x2", {{CODES(16)}, {SCALES(1)}, {GLOBAL}}},
        {"scale too wide", MOE4_ERROR_FORMAT, "a.weight_scale: 2x2, need 2x1", {{CODES(8)}, {SCALES(2)}, {GLOBAL}}},
        {"scale flat",
         MOE4_ERROR_FORMAT,
         "a.weight_scale: 2, need 2x1",
         {{CODES(8)}, {"a.weight_scale", "F8_E4M3", "[2]", 2, NULL}, {GLOBAL}}},
        {"scale U8",
         MOE4_ERROR_FORMAT,
         "a.weight_scale: dtype U8, need F8_E4M3",
         {{CODES(8)}, {"a.weight_scale", "U8", "[2,1]", 2, NULL}, {GLOBAL}}},
        {"codes I8", MOE4_ERROR_FORMAT, "a.weight: dtype I8, need U8", {{"a.weight", "I8", "[2,8]", 16, NULL}, {SCALES(1)}, {GLOBAL}}},
        {"K of 8", MOE4_ERROR_FORMAT, "a.weight: 2x4 bytes: K = 8 is not a multiple of 16", {{CODES(4)}, {SCALES(1)}, {GLOBAL}}},
        {"no elements", MOE4_ERROR_FORMAT, "a.weight: 0x8, need a matrix", {{"a.weight", "U8", "[0,8]", 0, NULL}, {SCALES(1)}, {GLOBAL}}},
        {"global F16",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: dtype F16, need F32",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F16", "[]", 2, NULL}}},
        {"global of two",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: 2, need [] or 1",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F32", "[2]", 8, NULL}}},
        {"global 1x1",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: 1x1, need [] or 1",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F32", "[1,1]", 4, ONE}}},
        {"global 0",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: 0, need a positive",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F32", "[]", 4, NULL}}},
        {"global negative",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: -1",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F32", "[]", 4, "\0\0\x80\xbf"}}},
        {"global infinite",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: inf",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F32", "[]", 4, "\0\0\x80\x7f"}}},
        {"global NaN",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: nan",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F32", "[]", 4, "\0\0\xc0\x7f"}}},
        {"input 0",
         MOE4_ERROR_FORMAT,
         "a.input_scale: 0, need a positive",
         {{CODES(8)}, {SCALES(1)}, {GLOBAL}, {"a.input_scale", "F32", "[]", 4, NULL}}},
        {"bf16", MOE4_OK, "", {{"a.weight", "BF16", "[2,3]", 12, NULL}, {"a.bias", "BF16", "[2]", 4, NULL}}},
        {"a vector", MOE4_ERROR_FORMAT, "a.weight: 6, need a matrix", {{"a.weight", "BF16", "[6]", 12, NULL}}},
        {"3-D", MOE4_ERROR_UNSUPPORTED, "unsupported: a.weight: fused 3-D experts (2x3x1)", {{"a.weight", "BF16", "[2,3,1]", 12, NULL}}},
        {"I32", MOE4_ERROR_UNSUPPORTED, "a.weight: dtype I32 without scales", {{"a.weight", "I32", "[2,3]", 24, NULL}}},
        {"FP8 block", MOE4_OK, "", {{"a.weight", "F8_E4M3", "[2,200]", 400, NULL}, {"a.weight_scale_inv", "F32", "[1,2]", 8, NULL}}},
        {"FP8 block of 32", MOE4_OK, "", {{"a.weight", "F8_E4M3", "[2,200]", 400, NULL}, {"a.scale", "F8_E8M0", "[1,7]", 7, NULL}}},
        {"FP8 row", MOE4_OK, "", {{"a.weight", "F8_E4M3", "[2,200]", 400, NULL}, {"a.weight_scale", "BF16", "[2,1]", 4, NULL}}},
        {"FP8",
         MOE4_OK,
         "",
         {{"a.weight", "F8_E4M3", "[2,8]", 16, NULL}, {"a.weight_scale", "F32", "[]", 4, ONE}, {"a.input_scale", "F32", "[]", 4, ONE}}},
        {"FP8 with blocks of 50",
         MOE4_ERROR_FORMAT,
         "a.weight_scale_inv: 1x4, no scales of 2x200",
         {{"a.weight", "F8_E4M3", "[2,200]", 400, NULL}, {"a.weight_scale_inv", "F32", "[1,4]", 16, NULL}}},
        {"FP8 with integers for scales",
         MOE4_ERROR_FORMAT,
         "a.weight_scale_inv: dtype I32, need F32, BF16, F16 or F8_E8M0",
         {{"a.weight", "F8_E4M3", "[2,8]", 16, NULL}, {"a.weight_scale_inv", "I32", "[1,1]", 4, NULL}}},
        {"E5M2",
         MOE4_ERROR_FORMAT,
         "a.weight: dtype F8_E5M2, need F8_E4M3",
         {{"a.weight", "F8_E5M2", "[2,8]", 16, NULL}, {"a.weight_scale_inv", "F32", "[1,1]", 4, ONE}}},
        {"compressed-tensors", MOE4_OK, "", {{PACKED(16)}, {SCALES(2)}, {GLOBAL_OF(TWO)}, {"a.input_global_scale", "F32", "[1]", 4, TWO}}},
        {"compressed-tensors without an input scale", MOE4_OK, "", {{PACKED(8)}, {SCALES(1)}, {GLOBAL_OF(ONE)}}},
        {"compressed-tensors, narrow scales",
         MOE4_ERROR_FORMAT,
         "a.weight_scale: 2x1, need 2x2",
         {{PACKED(16)}, {SCALES(1)}, {GLOBAL_OF(ONE)}}},
        {"compressed-tensors, global 0",
         MOE4_ERROR_FORMAT,
         "a.weight_global_scale: 0, need a positive",
         {{PACKED(8)}, {SCALES(1)}, {GLOBAL_OF(NULL)}}},
        {"compressed-tensors, no inverse",
         MOE4_ERROR_FORMAT,
         "a.weight_global_scale: 1.4013e-45: its inverse is not finite",
         {{PACKED(8)}, {SCALES(1)}, {GLOBAL_OF("\1\0\0\0")}}},
        {"compressed-tensors, no inverse of the input",
         MOE4_ERROR_FORMAT,
         "a.input_global_scale: 1.4013e-45: its inverse is not finite",
         {{PACKED(8)}, {SCALES(1)}, {GLOBAL_OF(ONE)}, {"a.input_global_scale", "F32", "[1]", 4, "\1\0\0\0"}}},
        {"compressed-tensors, a factor's input scale",
         MOE4_ERROR_FORMAT,
         "a: input_scale beside compressed-tensors",
         {{PACKED(8)}, {SCALES(1)}, {GLOBAL_OF(ONE)}, {"a.input_scale", "F32", "[1]", 4, ONE}}},
        {"compressed-tensors, no global",
         MOE4_ERROR_FORMAT,
         "a: weight_scale, weight_packed without weight_global_scale",
         {{PACKED(8)}, {SCALES(1)}}},
        {"compressed-tensors MXFP4",
         MOE4_ERROR_UNSUPPORTED,
         "unsupported: a: compressed-tensors MXFP4",
         {{PACKED(16)}, {"a.weight_scale", "U8", "[2,1]", 2, NULL}}},
        {"compressed-tensors integers",
         MOE4_ERROR_UNSUPPORTED,
         "unsupported: a: compressed-tensors integers",
         {{"a.weight_packed", "I32", "[2,2]", 16, NULL}, {"a.weight_scale", "BF16", "[2,1]", 4, NULL}}},
        {"MXFP4",
         MOE4_ERROR_UNSUPPORTED,
         "unsupported: a: MXFP4 (scale)",
         {{"a.weight", "I8", "[2,16]", 32, NULL}, {"a.scale", "F8_E8M0", "[2,1]", 2, NULL}}},
        {"MXFP4 blocks",
         MOE4_ERROR_UNSUPPORTED,
         "unsupported: a: MXFP4 (blocks, scales)",
         {{"a_blocks", "U8", "[2,1,1,16]", 32, NULL}, {"a_scales", "U8", "[2,1,1]", 2, NULL}}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_entries(cases[i].e);
        moe4_checkpoint *ckpt;
        moe4_weight w = {.rows = 99};
        if (moe4_checkpoint_open(&ckpt, ctx, files_path("")) != MOE4_OK) fail_msg("%s: %s", cases[i].what, moe4_ctx_error(ctx));
        moe4_status status = moe4_checkpoint_weight(ckpt, &w, "a");
        if (status != cases[i].status) fail_msg("%s: status %d (%s)", cases[i].what, status, moe4_ctx_error(ctx));
        expect_words(cases[i].what, cases[i].words);
        assert_int_equal(w.rows, status == MOE4_OK ? 2 : 99); /* results only with OK */
        if (i == 0) {
            assert_int_equal(w.dtype, MOE4_NVFP4);
            assert_int_equal(w.cols, 32);
            assert_true(w.global == 1 && w.input_scale == 1);
        }
        if (i == 1) assert_true(w.input_scale == 0);
        if (strcmp(cases[i].what, "FP8 block") == 0) assert_true(w.scale_rows == 2 && w.scale_cols == 128 && w.scale_dtype == MOE4_F32);
        if (strcmp(cases[i].what, "FP8 block of 32") == 0) assert_true(w.scale_cols == 32 && w.scale_dtype == MOE4_F8_E8M0);
        if (strcmp(cases[i].what, "FP8 row") == 0) assert_true(w.scale_rows == 1 && w.scale_cols == 200);
        if (strcmp(cases[i].what, "FP8") == 0) assert_true(w.scale_rows == 2 && w.scale_cols == 8);
        if (strcmp(cases[i].what, "compressed-tensors") == 0) { /* divisors, of 2 */
            assert_int_equal(w.dtype, MOE4_NVFP4);
            assert_int_equal(w.cols, 32);
            assert_true(w.global == 0.5f && w.input_scale == 0.5f);
        }
        moe4_checkpoint_close(ckpt);
    }
}

/* ---- experts by number ---- */

static void test_experts(void **state) {
    (void)state;
    moe4_checkpoint *ckpt;
    moe4_weight w;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, MODEL), MOE4_OK);
    static const struct {
        size_t layer;
        int64_t expert;
        int proj;
        const char *words;
    } wrong[] = {
        {6, 0, 0, "layer 6|0 to 5"},
        {1, 32, 0, "layer 1 expert 32, need 0 to 31"},
        {1, -3, 0, "expert -3"},
        {1, INT64_MIN, 0, "layer 1 expert"},
        {1, 0, 3, "proj is 3"},
        {0, 0, 0, "layer 0 is dense"},
        {0, MOE4_EXPERT_SHARED, 0, "dense"},
        {1, MOE4_EXPERT_DENSE, 0, "layer 1 is not dense"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_equal(moe4_checkpoint_expert(ckpt, &w, wrong[i].layer, wrong[i].expert, (moe4_proj)wrong[i].proj), MOE4_ERROR_ARGUMENT);
        expect_words("expert", wrong[i].words);
    }
    assert_int_equal(moe4_checkpoint_weight(ckpt, &w, "model.layers.0.self_attn.q_proj"), MOE4_OK);
    assert_int_equal(w.rows, 256);
    assert_int_equal(moe4_checkpoint_weight(ckpt, &w, "model.layers.0.self_attn"), MOE4_ERROR_NOT_FOUND);
    char longest[600];
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = '\0';
    assert_int_equal(moe4_checkpoint_weight(ckpt, &w, longest), MOE4_ERROR_NOT_FOUND);
    assert_int_equal(moe4_checkpoint_weight(ckpt, &w, NULL), MOE4_ERROR_ARGUMENT);
    moe4_checkpoint_close(ckpt);

    files_copy_folder(MODEL); /* the same file under a config that says otherwise */
    size_t bytes;
    char *config = (char *)files_read(MODEL "/config.json", &bytes);
    memcpy(strstr(config, "\"moe_intermediate_size\": 128"), "\"moe_intermediate_size\": 112", 28);
    files_text("config.json", config);
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_OK);
    assert_int_equal(moe4_checkpoint_expert(ckpt, &w, 1, 0, MOE4_DOWN), MOE4_ERROR_FORMAT);
    expect_words("shape", "model.layers.1.mlp.experts.0.down_proj.weight: 256x64, need 256x56");
    moe4_checkpoint_close(ckpt);
    memcpy(strstr(config, "\"moe_intermediate_size\": 112"), "\"moe_intermediate_size\": 120", 28);
    files_text("config.json", config);
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_OK);
    assert_int_equal(moe4_checkpoint_expert(ckpt, &w, 1, 0, MOE4_DOWN), MOE4_ERROR_UNSUPPORTED);
    expect_words("K", "256x120 in NVFP4: K = 120 is not a multiple of 16");
    moe4_checkpoint_close(ckpt);
    free(config);
}

static void test_routers(void **state) {
    (void)state;
    static const struct {
        const char *what, *entries;
        moe4_status status;
        const char *words;
    } cases[] = {
#define GATE "\"model.layers.1.mlp.gate.weight\":{\"dtype\":\"BF16\",\"shape\":[16,64],\"data_offsets\":[0,2048]}"
#define BIAS(dtype, n, end) \
    ",\"model.layers.1.mlp.gate.e_score_correction_bias\":{\"dtype\":\"" dtype "\",\"shape\":[" #n "],\"data_offsets\":[2048," #end "]}"
        {"F32", GATE BIAS("F32", 16, 2112), MOE4_OK, ""},
        {"BF16", GATE BIAS("BF16", 16, 2080), MOE4_OK, ""},
        {"U8", GATE BIAS("U8", 16, 2064), MOE4_ERROR_UNSUPPORTED, "e_score_correction_bias: dtype U8"},
        {"too short", GATE BIAS("F32", 15, 2108), MOE4_ERROR_FORMAT, "15 elements in 1 dimensions, need 16"},
        {"no bias", GATE, MOE4_ERROR_NOT_FOUND, "model.layers.1.mlp.gate.e_score_correction_bias: no tensor"},
        {"gate of another size", "\"model.layers.1.mlp.gate.weight\":{\"dtype\":\"BF16\",\"shape\":[64,16],\"data_offsets\":[0,2048]}",
         MOE4_ERROR_FORMAT, "model.layers.1.mlp.gate.weight: 64x16, need 16x64"},
        {"no gate", "", MOE4_ERROR_NOT_FOUND, "model.layers.1.mlp.gate: no weight"},
    };
    files_text("config.json", "{" GLM "\"n_group\":1}");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char header[512];
        const char *end = strrchr(cases[i].entries, ',');
        snprintf(header, sizeof header, "{%s}", cases[i].entries);
        files_safetensors("model.safetensors", header, NULL, end ? strtoul(end + 1, NULL, 10) : 0);
        moe4_checkpoint *ckpt;
        moe4_weight gate;
        moe4_tensor bias = {0};
        assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_OK);
        assert_int_equal(moe4_checkpoint_router(ckpt, &gate, &bias, 1), cases[i].status);
        expect_words(cases[i].what, cases[i].words);
        if (cases[i].status == MOE4_OK) assert_int_equal(bias.bytes, 16 * moe4_dtype_bytes(bias.dtype));
        assert_int_equal(moe4_checkpoint_router(ckpt, NULL, NULL, 1), cases[i].status);
        moe4_checkpoint_close(ckpt);
    }
}

static void test_fused_experts(void **state) {
    (void)state;
    files_safetensors("model.safetensors",
                      "{\"model.layers.1.mlp.experts.gate_up_proj\":{\"dtype\":\"BF16\",\"shape\":[16,64,64],\"data_offsets\":[0,131072]}}",
                      NULL, 131072);
    files_text("config.json", "{" GLM "\"n_group\":1}");
    moe4_checkpoint *ckpt;
    moe4_weight w;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_OK);
    assert_int_equal(moe4_checkpoint_expert(ckpt, &w, 1, 0, MOE4_GATE), MOE4_ERROR_UNSUPPORTED);
    expect_words("fused", "unsupported: fused 3-D experts (found model.layers.1.mlp.experts.gate_up_proj)");
    assert_int_equal(moe4_checkpoint_expert(ckpt, &w, 2, 0, MOE4_GATE), MOE4_ERROR_NOT_FOUND);
    moe4_checkpoint_close(ckpt);
}

/* ---- files that change while open ---- */

static void count_problem(void *user, const char *name, const char *problem) {
    assert_string_equal(name, "model.safetensors");
    assert_non_null(strstr(problem, "changed while open"));
    ++*(int *)user;
}

/* Making a layer or a router, and verify, must all say so; nothing may read the file. */
static void expect_changed(const moe4_checkpoint *ckpt, const char *words) {
    moe4_moe *moe;
    moe4_router *router;
    uint64_t n = 99;
    int told = 0;
    assert_int_equal(moe4_moe_create_from_checkpoint(&moe, ctx, ckpt, 1, NULL), MOE4_ERROR_IO);
    expect_words("layer", words);
    assert_int_equal(moe4_router_create_from_checkpoint(&router, ctx, ckpt, 1, NULL), MOE4_ERROR_IO);
    expect_words("router", words);
    assert_int_equal(moe4_checkpoint_verify((moe4_checkpoint *)ckpt, &n, count_problem, NULL, &told), MOE4_OK);
    assert_int_equal(n, 1);
    assert_int_equal(told, 1);
}

static void expect_unchanged(const moe4_checkpoint *ckpt) {
    moe4_moe *moe;
    uint64_t n = 99;
    if (moe4_moe_create_from_checkpoint(&moe, ctx, ckpt, 1, NULL) != MOE4_OK) fail_msg("%s", moe4_ctx_error(ctx));
    moe4_moe_destroy(moe);
    assert_int_equal(moe4_checkpoint_verify((moe4_checkpoint *)ckpt, &n, NULL, NULL, NULL), MOE4_OK);
    assert_int_equal(n, 0);
}

static void test_changed_files(void **state) {
    (void)state;
    size_t bytes, config_bytes;
    uint8_t *model = files_read(MODEL "/model.safetensors", &bytes);
    char *config = (char *)files_read(MODEL "/config.json", &config_bytes), file[512], other[512];
    files_text("config.json", config);
    snprintf(file, sizeof file, "%s", files_path("model.safetensors"));
    snprintf(other, sizeof other, "%s", files_path("other"));
    for (int i = 0; i < 4; i++) {
        moe4_checkpoint *ckpt;
        char words[128] = "changed while open: written to";
        files_write("model.safetensors", model, bytes);
        assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_OK);
        expect_unchanged(ckpt);
        if (i == 0) { /* cut short */
            assert_int_equal(truncate(file, (off_t)bytes / 2), 0);
            snprintf(words, sizeof words, "model.safetensors: changed while open: %zu bytes, was %zu", bytes / 2, bytes);
            expect_changed(ckpt, words);
        } else if (i == 1) { /* written over; times may be as coarse as a second, so one long ago */
            assert_int_equal(utimensat(AT_FDCWD, file, (struct timespec[]){{1, 0}, {1, 0}}, 0), 0);
            expect_changed(ckpt, words);
        } else if (i == 2) { /* replaced */
            files_text("other", "no checkpoint");
            assert_int_equal(rename(other, file), 0);
            expect_unchanged(ckpt);
        } else { /* deleted */
            assert_int_equal(unlink(file), 0);
            expect_unchanged(ckpt);
        }
        moe4_checkpoint_close(ckpt);
    }
    free(model);
    free(config);
}

/* ---- threads ---- */

static void *look_up_all(void *arg) {
    const moe4_checkpoint *ckpt = arg;
    for (int64_t e = 0; e < 32; e++)
        for (size_t layer = 1; layer < 6; layer++) {
            moe4_weight w;
            moe4_tensor t;
            if (moe4_checkpoint_expert(ckpt, &w, layer, e, MOE4_UP) != MOE4_OK || w.rows != 128) return "expert";
            if (moe4_checkpoint_find(ckpt, &t, "nothing") != MOE4_ERROR_NOT_FOUND) return "find";
            if (!strstr(moe4_ctx_error(ctx), "no tensor nothing")) return "error text";
        }
    return NULL;
}

static void test_threads(void **state) {
    (void)state;
    moe4_checkpoint *ckpt;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, MODEL), MOE4_OK);
    pthread_t thread[4];
    for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&thread[i], NULL, look_up_all, ckpt), 0);
    for (int i = 0; i < 4; i++) {
        void *wrong;
        assert_int_equal(pthread_join(thread[i], &wrong), 0);
        if (wrong) fail_msg("%s", (const char *)wrong);
    }
    moe4_checkpoint_close(ckpt);
}

/* ---- memory ---- */

static size_t allocations_left;
static void *limited_alloc(void *user, size_t bytes, size_t align) {
    (void)user;
    if (allocations_left == 0) return NULL;
    allocations_left--;
    void *p = NULL;
    return posix_memalign(&p, align, bytes) == 0 ? p : NULL;
}
static void limited_free(void *user, void *data) {
    (void)user;
    free(data);
}

/* Every allocation fails once: MEMORY each time, nothing leaks (the sanitizer build sees that), and at last it opens. */
static void test_out_of_memory(void **state) {
    (void)state;
    files_copy_folder(MODEL);
    files_text("a.safetensors", ""); /* listed, then left aside */
    moe4_ctx_options options = MOE4_CTX_OPTIONS_INIT;
    options.n_threads = 1;
    options.alloc = limited_alloc;
    options.free = limited_free;
    allocations_left = SIZE_MAX;
    moe4_ctx *limited;
    assert_int_equal(moe4_ctx_create(&limited, &options), MOE4_OK);
    size_t n = 0;
    for (moe4_status status = MOE4_ERROR_MEMORY; status != MOE4_OK; n++) {
        moe4_checkpoint *ckpt;
        allocations_left = n;
        status = moe4_checkpoint_open(&ckpt, limited, files_path(""));
        if (status == MOE4_OK)
            moe4_checkpoint_close(ckpt);
        else
            assert_int_equal(status, MOE4_ERROR_MEMORY);
        assert_in_range(n, 0, 200);
    }
    assert_in_range(n, 10, 200);
    allocations_left = SIZE_MAX;
    moe4_ctx_destroy(limited);
}

#define TEST(t) cmocka_unit_test_setup_teardown(t, make_ctx, drop_ctx)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_bundled_model), TEST(test_folder_without_index),
        TEST(test_index),         TEST(test_bad_configs),
        TEST(test_families),      TEST(test_companions),
        TEST(test_experts),       TEST(test_routers),
        TEST(test_fused_experts), TEST(test_threads),
        TEST(test_changed_files), TEST(test_out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
