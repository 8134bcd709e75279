#include "families.h"

#include <stdio.h>
#include <string.h>

/* ---- what a model and each of its layers must have, besides the experts ---- */

#define MATRIX(name, rows, cols, when) \
    { name, MOE4_DIM_##rows, MOE4_DIM_##cols, when, MOE4_PART_MATRIX }
#define VECTOR(name, n, when) \
    { name, MOE4_DIM_##n, MOE4_DIM_NONE, when, MOE4_PART_TENSOR }
#define TENSOR(name, rows, cols, when) \
    { name, MOE4_DIM_##rows, MOE4_DIM_##cols, when, MOE4_PART_TENSOR }
#define END \
    { NULL, MOE4_DIM_NONE, MOE4_DIM_NONE, 0, MOE4_PART_TENSOR }

static const struct moe4_part llama_model[] = {
    MATRIX("@Rembed_tokens", VOCAB, HIDDEN, 0),
    VECTOR("@Rnorm.weight", HIDDEN, 0),
    MATRIX("@Hlm_head", VOCAB, HIDDEN, MOE4_IF_UNTIED),
    END,
};

#define LLAMA_NORMS VECTOR("input_layernorm.weight", HIDDEN, 0), VECTOR("post_attention_layernorm.weight", HIDDEN, 0)
#define GROUPED_QUERY_ATTENTION                                                                                                     \
    MATRIX("self_attn.q_proj", Q, HIDDEN, 0), MATRIX("self_attn.k_proj", KV, HIDDEN, 0), MATRIX("self_attn.v_proj", KV, HIDDEN, 0), \
        MATRIX("self_attn.o_proj", HIDDEN, Q, 0), VECTOR("self_attn.q_proj.bias", Q, MOE4_IF_ATTN_BIAS),                            \
        VECTOR("self_attn.k_proj.bias", KV, MOE4_IF_ATTN_BIAS), VECTOR("self_attn.v_proj.bias", KV, MOE4_IF_ATTN_BIAS),             \
        VECTOR("self_attn.q_norm.weight", HEAD, MOE4_IF_QK_NORM), VECTOR("self_attn.k_norm.weight", HEAD, MOE4_IF_QK_NORM)

static const struct moe4_part glm_layer[] = {
    LLAMA_NORMS,
    GROUPED_QUERY_ATTENTION,
    END,
};

static const struct moe4_part qwen_layer[] = {
    LLAMA_NORMS,
    GROUPED_QUERY_ATTENTION,
    VECTOR("self_attn.o_proj.bias", HIDDEN, MOE4_IF_ATTN_BIAS),
    END,
};

/* Multi-head latent attention. */
#define LATENT_ATTENTION                                                                                                               \
    MATRIX("self_attn.q_proj", MLA_Q, HIDDEN, MOE4_IF_NO_Q_LORA), MATRIX("self_attn.q_a_proj", Q_LORA, HIDDEN, MOE4_IF_Q_LORA),        \
        VECTOR("self_attn.q_a_layernorm.weight", Q_LORA, MOE4_IF_Q_LORA), MATRIX("self_attn.q_b_proj", MLA_Q, Q_LORA, MOE4_IF_Q_LORA), \
        MATRIX("self_attn.kv_a_proj_with_mqa", MLA_KV_A, HIDDEN, 0), VECTOR("self_attn.kv_a_layernorm.weight", KV_LORA, 0),            \
        MATRIX("self_attn.kv_b_proj", MLA_KV_B, KV_LORA, 0), MATRIX("self_attn.o_proj", HIDDEN, MLA_O, 0),                             \
        VECTOR("self_attn.q_a_proj.bias", Q_LORA, MOE4_IF_ATTN_BIAS | MOE4_IF_Q_LORA),                                                 \
        VECTOR("self_attn.kv_a_proj_with_mqa.bias", MLA_KV_A, MOE4_IF_ATTN_BIAS),                                                      \
        VECTOR("self_attn.o_proj.bias", HIDDEN, MOE4_IF_ATTN_BIAS)

static const struct moe4_part deepseek_layer[] = {
    LLAMA_NORMS,
    LATENT_ATTENTION,
    END,
};

/* With an indexer that chooses what to attend to: DeepSeek-V3.2, GLM-5. */
static const struct moe4_part sparse_layer[] = {
    LLAMA_NORMS,
    LATENT_ATTENTION,
    MATRIX("self_attn.indexer.wq_b", INDEX_Q, Q_LORA, MOE4_IF_INDEXER),
    MATRIX("self_attn.indexer.wk", INDEX_HEAD, HIDDEN, MOE4_IF_INDEXER),
    VECTOR("self_attn.indexer.k_norm.weight", INDEX_HEAD, MOE4_IF_INDEXER),
    VECTOR("self_attn.indexer.k_norm.bias", INDEX_HEAD, MOE4_IF_INDEXER),
    MATRIX("self_attn.indexer.weights_proj", INDEX_HEADS, HIDDEN, MOE4_IF_INDEXER),
    END,
};

static const struct moe4_part mixtral_layer[] = {
    LLAMA_NORMS,
    GROUPED_QUERY_ATTENTION,
    END,
};

static const struct moe4_part deepseek_v4_model[] = {
    MATRIX("@Rembed", VOCAB, HIDDEN, 0),
    VECTOR("@Rnorm.weight", HIDDEN, 0),
    MATRIX("@Hhead", VOCAB, HIDDEN, MOE4_IF_UNTIED),
    TENSOR("@Rhc_head_fn", HC, HC_HIDDEN, MOE4_IF_HC),
    VECTOR("@Rhc_head_base", HC, MOE4_IF_HC),
    VECTOR("@Rhc_head_scale", ONE, MOE4_IF_HC),
    END,
};

static const struct moe4_part deepseek_v41_model[] = {
    MATRIX("@Rembed", VOCAB, HIDDEN, 0),
    VECTOR("@Rnorm.weight", HIDDEN, 0),
    MATRIX("@Hhead", VOCAB, HIDDEN, MOE4_IF_UNTIED),
    END,
};

/* What V4 and V4.1 share. */
#define DEEPSEEK_V4_LAYER                                                                                                     \
    VECTOR("attn_norm.weight", HIDDEN, 0), VECTOR("ffn_norm.weight", HIDDEN, 0), VECTOR("attn.attn_sink", HEADS, 0),          \
        MATRIX("attn.wq_a", Q_LORA, HIDDEN, 0), VECTOR("attn.q_norm.weight", Q_LORA, 0), MATRIX("attn.wq_b", Q, Q_LORA, 0),   \
        MATRIX("attn.wkv", HEAD, HIDDEN, 0), VECTOR("attn.kv_norm.weight", HEAD, 0), MATRIX("attn.wo_a", O_LORA, O_GROUP, 0), \
        MATRIX("attn.wo_b", HIDDEN, O_LORA, 0), TENSOR("hc_attn_fn", HC_MIX, HC_HIDDEN, MOE4_IF_HC),                          \
        VECTOR("hc_attn_base", HC_MIX, MOE4_IF_HC), VECTOR("hc_attn_scale", THREE, MOE4_IF_HC),                               \
        TENSOR("hc_ffn_fn", HC_MIX, HC_HIDDEN, MOE4_IF_HC), VECTOR("hc_ffn_base", HC_MIX, MOE4_IF_HC),                        \
        VECTOR("hc_ffn_scale", THREE, MOE4_IF_HC)

/* Compressors of blocks of tokens, twice as wide where blocks overlap; those layers have an indexer with a compressor of its own. */
static const struct moe4_part deepseek_v4_layer[] = {
    DEEPSEEK_V4_LAYER,
    MATRIX("attn.compressor.wkv", HEAD, HIDDEN, MOE4_IF_COMPRESSOR),
    MATRIX("attn.compressor.wgate", HEAD, HIDDEN, MOE4_IF_COMPRESSOR),
    TENSOR("attn.compressor.ape", UNSTATED, HEAD, MOE4_IF_COMPRESSOR),
    VECTOR("attn.compressor.norm.weight", HEAD, MOE4_IF_COMPRESSOR),
    MATRIX("attn.compressor.wkv", HEAD_TWICE, HIDDEN, MOE4_IF_INDEXER),
    MATRIX("attn.compressor.wgate", HEAD_TWICE, HIDDEN, MOE4_IF_INDEXER),
    TENSOR("attn.compressor.ape", UNSTATED, HEAD_TWICE, MOE4_IF_INDEXER),
    VECTOR("attn.compressor.norm.weight", HEAD, MOE4_IF_INDEXER),
    MATRIX("attn.indexer.wq_b", INDEX_Q, Q_LORA, MOE4_IF_INDEXER),
    MATRIX("attn.indexer.weights_proj", INDEX_HEADS, HIDDEN, MOE4_IF_INDEXER),
    MATRIX("attn.indexer.compressor.wkv", INDEX_HEAD_TWICE, HIDDEN, MOE4_IF_INDEXER),
    MATRIX("attn.indexer.compressor.wgate", INDEX_HEAD_TWICE, HIDDEN, MOE4_IF_INDEXER),
    TENSOR("attn.indexer.compressor.ape", UNSTATED, INDEX_HEAD_TWICE, MOE4_IF_INDEXER),
    VECTOR("attn.indexer.compressor.norm.weight", INDEX_HEAD, MOE4_IF_INDEXER),
    END,
};

/* Compressors and index keys in the layers whose cache others read, queries for them in the layers that choose. */
static const struct moe4_part deepseek_v41_layer[] = {
    DEEPSEEK_V4_LAYER,
    MATRIX("attn.compressor.wkv", HEAD, HIDDEN, MOE4_IF_COMPRESSOR),
    MATRIX("attn.compressor.wgate", HEAD, HIDDEN, MOE4_IF_POOLED),
    VECTOR("attn.compressor.norm.weight", HEAD, MOE4_IF_COMPRESSOR),
    MATRIX("attn.indexer.wk", INDEX_HEAD, HEAD, MOE4_IF_COMPRESSOR),
    VECTOR("attn.indexer.k_norm.weight", INDEX_HEAD, MOE4_IF_COMPRESSOR),
    MATRIX("attn.indexer.wq_b", INDEX_Q, Q_LORA, MOE4_IF_INDEXER),
    MATRIX("attn.indexer.weights_proj", INDEX_HEADS, HIDDEN, MOE4_IF_INDEXER),
    MATRIX("engram.embed", UNSTATED, UNSTATED, MOE4_IF_ENGRAM),
    MATRIX("engram.wkv", UNSTATED, UNSTATED, MOE4_IF_ENGRAM),
    TENSOR("engram.k_weight", UNSTATED, UNSTATED, MOE4_IF_ENGRAM),
    TENSOR("engram.q_weight", UNSTATED, UNSTATED, MOE4_IF_ENGRAM),
    END,
};

static const struct moe4_part nemotron_model[] = {
    MATRIX("@Rembeddings", VOCAB, HIDDEN, 0),
    VECTOR("@Rnorm_f.weight", HIDDEN, 0),
    MATRIX("@Hlm_head", VOCAB, HIDDEN, MOE4_IF_UNTIED),
    END,
};

static const struct moe4_part nemotron_layer[] = {
    VECTOR("norm.weight", HIDDEN, 0),
    MATRIX("mixer.q_proj", Q, HIDDEN, MOE4_IF_ATTENTION),
    MATRIX("mixer.k_proj", KV, HIDDEN, MOE4_IF_ATTENTION),
    MATRIX("mixer.v_proj", KV, HIDDEN, MOE4_IF_ATTENTION),
    MATRIX("mixer.o_proj", HIDDEN, Q, MOE4_IF_ATTENTION),
    MATRIX("mixer.in_proj", MAMBA_IN, HIDDEN, MOE4_IF_MAMBA),
    TENSOR("mixer.conv1d.weight", MAMBA_CONV, MAMBA_KERNEL, MOE4_IF_MAMBA),
    VECTOR("mixer.conv1d.bias", MAMBA_CONV, MOE4_IF_MAMBA | MOE4_IF_CONV_BIAS),
    VECTOR("mixer.A_log", MAMBA_HEADS, MOE4_IF_MAMBA),
    VECTOR("mixer.D", MAMBA_HEADS, MOE4_IF_MAMBA),
    VECTOR("mixer.dt_bias", MAMBA_HEADS, MOE4_IF_MAMBA),
    VECTOR("mixer.norm.weight", MAMBA_INNER, MOE4_IF_MAMBA),
    MATRIX("mixer.out_proj", HIDDEN, MAMBA_INNER, MOE4_IF_MAMBA),
    END,
};

/* ---- the rows ---- */

static const struct moe4_place llama_places[] = {
    {"model.", ""}, {"language_model.model.", "language_model."}, {"model.language_model.", ""}, {NULL, NULL}};
static const struct moe4_place deepseek_v4_places[] = {{"", ""}, {"language_model.", "language_model."}, {NULL, NULL}};
static const struct moe4_place nemotron_places[] = {{"backbone.", ""}, {"language_model.backbone.", "language_model."}, {NULL, NULL}};

/* Names that all `model.layers.L.mlp.experts.E.*` families share. */
#define MLP_EXPERTS                                                                                                            \
    .layer = "@Rlayers.@L.", .expert = "@Rlayers.@L.mlp.experts.@E.@P", .dense = "@Rlayers.@L.mlp.@P", .places = llama_places, \
    .proj = {"gate_proj", "up_proj", "down_proj"}, .router = "@Rlayers.@L.mlp.gate", .key_activation = "hidden_act",           \
    .key_expert = "moe_intermediate_size", .fused_experts = "@Rlayers.@L.mlp.experts.gate_up_proj", .model_parts = llama_model
/* What DeepSeek-V3 added to them, and GLM and Kimi took over. */
#define DEEPSEEK_MOE                                                                                              \
    .shared = "@Rlayers.@L.mlp.shared_experts.@P", .router_bias = "@Rlayers.@L.mlp.gate.e_score_correction_bias", \
    .router_kind = MOE4_ROUTER_SIGMOID_BIAS, .key_n_experts = "n_routed_experts", .layer_rule = MOE4_LAYERS_FIRST_K

#define DEEPSEEK_V4_MOE                                                                                                                    \
    .places = deepseek_v4_places, .layer = "@Rlayers.@L.", .expert = "@Rlayers.@L.ffn.experts.@E.@P",                                      \
    .shared = "@Rlayers.@L.ffn.shared_experts.@P", .proj = {"w1", "w3", "w2"}, .router = "@Rlayers.@L.ffn.gate",                           \
    .router_bias = "@Rlayers.@L.ffn.gate.bias", .router_alt_bias = "@Rlayers.@L.ffn.gate.bias_vl", .left_alone = "@Rmtp.",                 \
    .router_kind = MOE4_ROUTER_SQRTSOFTPLUS_BIAS, .normalizes = true, .key_activation = "hidden_act", .key_n_experts = "n_routed_experts", \
    .key_expert = "moe_intermediate_size", .layer_rule = MOE4_LAYERS_ALL

const struct moe4_family moe4_families[] = {
    {.name = "deepseek_v3", MLP_EXPERTS, DEEPSEEK_MOE, .layer_parts = deepseek_layer}, /* and R1 */
    {.name = "kimi_k2", MLP_EXPERTS, DEEPSEEK_MOE, .layer_parts = deepseek_layer},
    {.name = "deepseek_v32", MLP_EXPERTS, DEEPSEEK_MOE, .sparse = MOE4_SPARSE_TYPES, .layer_parts = sparse_layer},
    {.name = "glm_moe_dsa", MLP_EXPERTS, DEEPSEEK_MOE, .sparse = MOE4_SPARSE_TYPES, .layer_parts = sparse_layer}, /* GLM-5 */
    {.name = "glm4_moe", MLP_EXPERTS, DEEPSEEK_MOE, .layer_parts = glm_layer},
    {.name = "qwen3_moe",
     MLP_EXPERTS,
     .router_kind = MOE4_ROUTER_SOFTMAX_TOPK,
     .key_n_experts = "num_experts",
     .layer_rule = MOE4_LAYERS_SPARSE_STEP,
     .always = MOE4_IF_QK_NORM,
     .layer_parts = qwen_layer},
    {.name = "mixtral",
     .places = llama_places,
     .layer = "@Rlayers.@L.",
     .expert = "@Rlayers.@L.block_sparse_moe.experts.@E.@P",
     .proj = {"w1", "w3", "w2"},
     .router = "@Rlayers.@L.block_sparse_moe.gate",
     .router_kind = MOE4_ROUTER_SOFTMAX_TOPK,
     .normalizes = true,
     .key_activation = "hidden_act",
     .key_n_experts = "num_local_experts",
     .key_expert = "intermediate_size",
     .layer_rule = MOE4_LAYERS_ALL,
     .model_parts = llama_model,
     .layer_parts = mixtral_layer},
    {.name = "deepseek_v4",
     DEEPSEEK_V4_MOE,
     .hash_table = "@Rlayers.@L.ffn.gate.tid2eid",
     .sparse = MOE4_SPARSE_RATIOS,
     .model_parts = deepseek_v4_model,
     .layer_parts = deepseek_v4_layer},
    {.name = "deepseek_v41",
     DEEPSEEK_V4_MOE,
     .sparse = MOE4_SPARSE_SOURCES,
     .model_parts = deepseek_v41_model,
     .layer_parts = deepseek_v41_layer},
    {.name = "nemotron_h", /* Nemotron-3 */
     .places = nemotron_places,
     .layer = "@Rlayers.@L.",
     .expert = "@Rlayers.@L.mixer.experts.@E.@P",
     .shared = "@Rlayers.@L.mixer.shared_experts.@P",
     .dense = "@Rlayers.@L.mixer.@P",
     .proj = {NULL, "up_proj", "down_proj"},
     .router = "@Rlayers.@L.mixer.gate",
     .router_bias = "@Rlayers.@L.mixer.gate.e_score_correction_bias",
     .router_kind = MOE4_ROUTER_SIGMOID_BIAS,
     .activation = MOE4_RELU2,
     .key_activation = "mlp_hidden_act",
     .key_n_experts = "n_routed_experts",
     .key_expert = "moe_intermediate_size",
     .key_shared = "moe_shared_expert_intermediate_size",
     .layer_rule = MOE4_LAYERS_PATTERN,
     .model_parts = nemotron_model,
     .layer_parts = nemotron_layer},
};
const size_t moe4_n_families = sizeof moe4_families / sizeof *moe4_families;

/* A text_config may call itself "NAME_text". */
static bool is_name(const char *model_type, const char *name) {
    size_t n = strlen(name);
    return strncmp(model_type, name, n) == 0 && (model_type[n] == '\0' || strcmp(model_type + n, "_text") == 0);
}

const struct moe4_family *moe4_family_find(const char *model_type) {
    for (size_t i = 0; i < moe4_n_families; i++)
        if (is_name(model_type, moe4_families[i].name)) return &moe4_families[i];
    return NULL;
}

const char *moe4_family_refused(const char *model_type) {
    static const struct {
        const char *model_type, *why;
    } refused[] = {
        {"llama4", "Llama-4: feed_forward.experts.gate_up_proj and down_proj are 3-D tensors of all experts, K before N"},
        {"gpt_oss", "gpt-oss: mlp.experts.gate_up_proj and down_proj are 3-D tensors of all experts, gate and up rows interleaved"},
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        if (is_name(model_type, refused[i].model_type)) return refused[i].why;
    return NULL;
}

void moe4_family_name(char *dst, size_t dst_bytes, const struct moe4_place *place, const char *pattern, size_t layer, size_t expert,
                      const char *proj) {
    size_t at = 0;
    dst[0] = '\0';
    for (const char *p = pattern; *p && at < dst_bytes; p++) {
        int n;
        if (p[0] != '@')
            n = snprintf(dst + at, dst_bytes - at, "%c", *p);
        else if (*++p == 'L' || *p == 'E')
            n = snprintf(dst + at, dst_bytes - at, "%zu", *p == 'L' ? layer : expert);
        else
            n = snprintf(dst + at, dst_bytes - at, "%s", *p == 'R' ? place->root : *p == 'H' ? place->head : proj);
        at += (size_t)n;
    }
}
