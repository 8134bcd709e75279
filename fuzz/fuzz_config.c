/* config.json: the library's reading of it and the language-model runner's. The input is tried as text; and its bytes choose keys and
 * values of an object that is nearly right, as few changed bytes leave JSON well-formed. What is accepted must hold together. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint.h"
#include "lm/lm.h"
#include "source.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static moe4_ctx *ctx;

static void must(int truth) {
    if (!truth) abort();
}

static void check_config(const struct moe4_config *c) {
    const size_t *dim = c->dim;
    must((c->status == MOE4_OK) == (c->problem[0] == '\0') && strlen(c->problem) < sizeof c->problem);
    if (c->status != MOE4_OK) return;
    must(c->family && c->place && c->architecture);
    must(dim[MOE4_DIM_HIDDEN] && dim[MOE4_DIM_VOCAB] && dim[MOE4_DIM_EXPERT] && dim[MOE4_DIM_LAYERS]);
    must(dim[MOE4_DIM_TOP_K] && dim[MOE4_DIM_TOP_K] <= dim[MOE4_DIM_N_EXPERTS] && c->n_hash_layers <= dim[MOE4_DIM_LAYERS]);
    must(c->routed_scale > 0 && c->gate_temp > 0 && c->swiglu_limit >= 0);
    size_t groups = dim[MOE4_DIM_N_GROUP];
    must(groups <= 1 || (dim[MOE4_DIM_N_EXPERTS] % groups == 0 && dim[MOE4_DIM_TOPK_GROUP] <= groups));
    for (size_t i = 0; i < dim[MOE4_DIM_LAYERS]; i++)
        must(c->layer_kind[i] <= MOE4_LAYER_OTHER && (c->layer_kind[i] != MOE4_LAYER_DENSE || dim[MOE4_DIM_DENSE]));
}

static void read_text(const char *text, size_t bytes) {
    moe4_checkpoint ckpt = {.ctx = ctx, .path = (char[]){"model"}, .has_config = true, .config_bytes = bytes};
    ckpt.config_text = malloc(bytes + 1);
    must(ckpt.config_text != NULL);
    memcpy(ckpt.config_text, text, bytes);
    ckpt.config_text[bytes] = '\0';
    moe4_begin(ctx);
    moe4_status status = moe4_config_read(ctx, &ckpt.config, ckpt.config_text, bytes);
    must((status == MOE4_OK) == (moe4_ctx_error(ctx)[0] == '\0'));
    if (status == MOE4_OK) {
        check_config(&ckpt.config);
        struct lm lm = {.ctx = ctx};
        struct lm_config config;
        if (lm_config_read(&lm, &config, &ckpt) == MOE4_OK) must(config.attention.n_heads % config.attention.n_kv_heads == 0);
    }
    moe4_config_free(ctx, &ckpt.config);
    free(ckpt.config_text);
}

/* ---- an object from bytes ---- */

/* A key and what it likely has. */
static const struct entry {
    const char *key;
    const char *likely[4];
} entries[] = {
    {"architectures", {"[\"X\"]", "[]", "[1]", "[\"\\u0001\"]"}},
    {"hidden_size", {"16", "64", "7", "2097152"}},
    {"vocab_size", {"2", "256", "2147483648", "1"}},
    {"tie_word_embeddings", {"true", "false", "1", "\"true\""}},
    {"num_hidden_layers", {"1", "4", "10000", "3"}},
    {"first_k_dense_replace", {"1", "0", "4", "5"}},
    {"moe_layer_freq", {"1", "2", "[0,1]", "10000"}},
    {"decoder_sparse_step", {"1", "2", "3", "0"}},
    {"mlp_only_layers", {"[]", "[0]", "[1,2,3]", "[0,-1,\"2\"]"}},
    {"layers_block_type", {"[\"moe\"]", "[\"mamba\",\"moe\",\"attention\",\"mlp\"]", "[1]", "{}"}},
    {"hybrid_override_pattern", {"\"E\"", "\"ME*-\"", "\"\"", "\"MEX-\""}},
    {"n_routed_experts", {"8", "1", "256", "65536"}},
    {"num_experts", {"8", "1", "128", "65537"}},
    {"num_local_experts", {"8", "1", "16", "9"}},
    {"num_experts_per_tok", {"2", "1", "8", "9"}},
    {"moe_intermediate_size", {"16", "32", "16777216", "16777217"}},
    {"moe_shared_expert_intermediate_size", {"32", "1", "0", "[]"}},
    {"n_shared_experts", {"1", "0", "64", "65"}},
    {"intermediate_size", {"16", "64", "0", "33"}},
    {"moe_latent_size", {"null", "16", "0", "1"}},
    {"n_group", {"1", "2", "4", "3"}},
    {"topk_group", {"1", "2", "4", "0"}},
    {"norm_topk_prob", {"true", "false", "null", "0"}},
    {"routed_scaling_factor", {"1.0", "2.5", "0", "1e39"}},
    {"scoring_func", {"null", "\"sigmoid\"", "\"sqrtsoftplus\"", "\"softmax\""}},
    {"topk_method", {"\"noaux_tc\"", "\"greedy\"", "\"\"", "null"}},
    {"gate_temp", {"1.0", "0.5", "0", "-1"}},
    {"num_hash_layers", {"0", "1", "4", "10001"}},
    {"swiglu_limit", {"7.0", "0", "10", "-1"}},
    {"hidden_act", {"\"silu\"", "\"gelu\"", "\"relu2\"", "3"}},
    {"mlp_hidden_act", {"\"relu2\"", "\"silu\"", "1", "null"}},
    {"num_attention_heads", {"4", "1", "64", "65536"}},
    {"num_key_value_heads", {"2", "1", "4", "3"}},
    {"head_dim", {"64", "2", "65536", "5"}},
    {"q_lora_rank", {"8", "null", "16777216", "1536"}},
    {"kv_lora_rank", {"8", "512", "null", "0"}},
    {"qk_nope_head_dim", {"8", "128", "65536", "0"}},
    {"qk_rope_head_dim", {"8", "64", "65536", "0"}},
    {"v_head_dim", {"8", "128", "65536", "0"}},
    {"attention_bias", {"true", "false", "0", "null"}},
    {"use_qk_norm", {"true", "false", "0", "null"}},
    {"rms_norm_eps", {"1e-5", "0", "2", "\"\""}},
    {"max_position_embeddings", {"512", "1", "2147483648", "0"}},
    {"rope_theta", {"10000", "1e12", "0", "[]"}},
    {"partial_rotary_factor", {"0.5", "1.0", "0.01", "-1"}},
    {"rope_scaling", {"null", "{\"type\":\"default\"}", "{\"rope_type\":\"yarn\"}", "[]"}},
    {"o_groups", {"2", "1", "65536", "0"}},
    {"o_lora_rank", {"16", "1", "16777216", "0"}},
    {"hc_mult", {"4", "1", "256", "257"}},
    {"index_n_heads", {"2", "null", "65536", "0"}},
    {"index_head_dim", {"8", "null", "65536", "0"}},
    {"index_topk_freq", {"null", "4", "0", "[]"}},
    {"indexer_types", {"null", "[\"full\",\"shared\"]", "[1]", "{}"}},
    {"compress_ratios", {"[0,128,4,1]", "[2]", "[\"4\",-1,4.0]", "4"}},
    {"kv_source_layer_ids", {"[0]", "[0,1,2,3]", "[-1]", "[\"0\"]"}},
    {"index_source_layer_ids", {"[0]", "[]", "[10000]", "{}"}},
    {"engram_layer_ids", {"[0]", "[1]", "[9223372036854775807]", "0"}},
    {"mamba_num_heads", {"4", "1", "65536", "0"}},
    {"mamba_head_dim", {"8", "1", "65536", "0"}},
    {"n_groups", {"2", "1", "65536", "0"}},
    {"ssm_state_size", {"8", "1", "65536", "0"}},
    {"conv_kernel", {"4", "1", "65536", "0"}},
    {"use_conv_bias", {"true", "false", "null", "1"}},
    {"rope_parameters", {"{\"rope_theta\":1e6}", "{\"rope_type\":1}", "{}", "1"}},
};
enum { N_ENTRIES = sizeof entries / sizeof *entries, MAX_TEXT = 8192 };

/* Every key at most once but for the last choice, as JSON forbids a second. */
static size_t write_object(char *text, struct source *s) {
    static const char *const odd[] = {"-1", "1.5", "null", "\"\"", "{}", "[]", "18446744073709551616", "1e308"};
    unsigned how = take(s), row = take(s);
    const char *family = row < 224 ? moe4_families[row % moe4_n_families].name : row < 240 ? "gpt_oss" : "none";
    size_t at = (size_t)sprintf(text, "%s{\"model_type\":\"%s\"", how & 1 ? "{\"text_config\":" : "", family);
    for (size_t i = 0; i < N_ENTRIES; i++) {
        unsigned choice = take(s);
        if (choice >= 248) continue; /* not there */
        const char *value = choice < 200 ? entries[i].likely[0] : choice < 240 ? entries[i].likely[choice % 4] : odd[choice % 8];
        at += (size_t)sprintf(text + at, ",\"%s\":%s", entries[i].key, value);
    }
    if (how > 250) at += (size_t)sprintf(text + at, ",\"head_dim\":1");
    return at + (size_t)sprintf(text + at, "%s}", how & 1 ? "}" : "");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    moe4_ctx_options options = MOE4_CTX_OPTIONS_INIT;
    options.n_threads = 1;
    if (!ctx && moe4_ctx_create(&ctx, &options) != MOE4_OK) abort();
    read_text((const char *)data, size);
    struct source source = {data, size};
    char text[MAX_TEXT];
    size_t n = write_object(text, &source);
    must(n < sizeof text);
    read_text(text, n);
    return 0;
}
