#include "families.h"

#include <stdio.h>
#include <string.h>

/* ---- what a model and each of its layers must have, besides the experts ---- */

static const struct moe4_part llama_model[] = {
    {"@Rembed_tokens", MOE4_DIM_VOCAB, MOE4_DIM_HIDDEN, 0},
    {"@Rnorm.weight", MOE4_DIM_HIDDEN, MOE4_DIM_NONE, 0},
    {"@Hlm_head", MOE4_DIM_VOCAB, MOE4_DIM_HIDDEN, MOE4_IF_UNTIED},
    {NULL, MOE4_DIM_NONE, MOE4_DIM_NONE, 0},
};

#define LLAMA_NORMS                                                          \
    {"input_layernorm.weight", MOE4_DIM_HIDDEN, MOE4_DIM_NONE, 0}, {         \
        "post_attention_layernorm.weight", MOE4_DIM_HIDDEN, MOE4_DIM_NONE, 0 \
    }
#define GROUPED_QUERY_ATTENTION                                                                                      \
    {"self_attn.q_proj", MOE4_DIM_Q, MOE4_DIM_HIDDEN, 0}, {"self_attn.k_proj", MOE4_DIM_KV, MOE4_DIM_HIDDEN, 0},     \
        {"self_attn.v_proj", MOE4_DIM_KV, MOE4_DIM_HIDDEN, 0}, {"self_attn.o_proj", MOE4_DIM_HIDDEN, MOE4_DIM_Q, 0}, \
        {"self_attn.q_proj.bias", MOE4_DIM_Q, MOE4_DIM_NONE, MOE4_IF_ATTN_BIAS},                                     \
        {"self_attn.k_proj.bias", MOE4_DIM_KV, MOE4_DIM_NONE, MOE4_IF_ATTN_BIAS},                                    \
        {"self_attn.v_proj.bias", MOE4_DIM_KV, MOE4_DIM_NONE, MOE4_IF_ATTN_BIAS},                                    \
        {"self_attn.q_norm.weight", MOE4_DIM_HEAD, MOE4_DIM_NONE, MOE4_IF_QK_NORM}, {                                \
        "self_attn.k_norm.weight", MOE4_DIM_HEAD, MOE4_DIM_NONE, MOE4_IF_QK_NORM                                     \
    }

static const struct moe4_part glm_layer[] = {
    LLAMA_NORMS,
    GROUPED_QUERY_ATTENTION,
    {NULL, MOE4_DIM_NONE, MOE4_DIM_NONE, 0},
};

static const struct moe4_part qwen_layer[] = {
    LLAMA_NORMS,
    GROUPED_QUERY_ATTENTION,
    {"self_attn.o_proj.bias", MOE4_DIM_HIDDEN, MOE4_DIM_NONE, MOE4_IF_ATTN_BIAS},
    {NULL, MOE4_DIM_NONE, MOE4_DIM_NONE, 0},
};

static const struct moe4_part deepseek_layer[] = {
    LLAMA_NORMS,
    {"self_attn.q_proj", MOE4_DIM_MLA_Q, MOE4_DIM_HIDDEN, MOE4_IF_NO_Q_LORA},
    {"self_attn.q_a_proj", MOE4_DIM_Q_LORA, MOE4_DIM_HIDDEN, MOE4_IF_Q_LORA},
    {"self_attn.q_a_layernorm.weight", MOE4_DIM_Q_LORA, MOE4_DIM_NONE, MOE4_IF_Q_LORA},
    {"self_attn.q_b_proj", MOE4_DIM_MLA_Q, MOE4_DIM_Q_LORA, MOE4_IF_Q_LORA},
    {"self_attn.kv_a_proj_with_mqa", MOE4_DIM_MLA_KV_A, MOE4_DIM_HIDDEN, 0},
    {"self_attn.kv_a_layernorm.weight", MOE4_DIM_KV_LORA, MOE4_DIM_NONE, 0},
    {"self_attn.kv_b_proj", MOE4_DIM_MLA_KV_B, MOE4_DIM_KV_LORA, 0},
    {"self_attn.o_proj", MOE4_DIM_HIDDEN, MOE4_DIM_MLA_O, 0},
    {"self_attn.q_a_proj.bias", MOE4_DIM_Q_LORA, MOE4_DIM_NONE, MOE4_IF_ATTN_BIAS | MOE4_IF_Q_LORA},
    {"self_attn.kv_a_proj_with_mqa.bias", MOE4_DIM_MLA_KV_A, MOE4_DIM_NONE, MOE4_IF_ATTN_BIAS},
    {"self_attn.o_proj.bias", MOE4_DIM_HIDDEN, MOE4_DIM_NONE, MOE4_IF_ATTN_BIAS},
    {NULL, MOE4_DIM_NONE, MOE4_DIM_NONE, 0},
};

static const struct moe4_part mixtral_layer[] = {
    LLAMA_NORMS,
    GROUPED_QUERY_ATTENTION,
    {NULL, MOE4_DIM_NONE, MOE4_DIM_NONE, 0},
};

static const struct moe4_part deepseek_v4_model[] = {
    {"@Rembed", MOE4_DIM_VOCAB, MOE4_DIM_HIDDEN, 0},
    {"@Rnorm.weight", MOE4_DIM_HIDDEN, MOE4_DIM_NONE, 0},
    {"@Hhead", MOE4_DIM_VOCAB, MOE4_DIM_HIDDEN, MOE4_IF_UNTIED},
    {NULL, MOE4_DIM_NONE, MOE4_DIM_NONE, 0},
};

/* What all its layers have; compressors and indexers differ from layer to layer and are not looked for. */
static const struct moe4_part deepseek_v4_layer[] = {
    {"attn_norm.weight", MOE4_DIM_HIDDEN, MOE4_DIM_NONE, 0},
    {"ffn_norm.weight", MOE4_DIM_HIDDEN, MOE4_DIM_NONE, 0},
    {"attn.wq_a", MOE4_DIM_Q_LORA, MOE4_DIM_HIDDEN, 0},
    {"attn.q_norm.weight", MOE4_DIM_Q_LORA, MOE4_DIM_NONE, 0},
    {"attn.wq_b", MOE4_DIM_Q, MOE4_DIM_Q_LORA, 0},
    {"attn.wkv", MOE4_DIM_HEAD, MOE4_DIM_HIDDEN, 0},
    {"attn.kv_norm.weight", MOE4_DIM_HEAD, MOE4_DIM_NONE, 0},
    {"attn.wo_a", MOE4_DIM_UNSTATED, MOE4_DIM_UNSTATED, 0},
    {"attn.wo_b", MOE4_DIM_HIDDEN, MOE4_DIM_UNSTATED, 0},
    {NULL, MOE4_DIM_NONE, MOE4_DIM_NONE, 0},
};

static const struct moe4_part nemotron_model[] = {
    {"@Rembeddings", MOE4_DIM_VOCAB, MOE4_DIM_HIDDEN, 0},
    {"@Rnorm_f.weight", MOE4_DIM_HIDDEN, MOE4_DIM_NONE, 0},
    {"@Hlm_head", MOE4_DIM_VOCAB, MOE4_DIM_HIDDEN, MOE4_IF_UNTIED},
    {NULL, MOE4_DIM_NONE, MOE4_DIM_NONE, 0},
};

/* What all its layers have, whatever their mixer is. */
static const struct moe4_part nemotron_layer[] = {
    {"norm.weight", MOE4_DIM_HIDDEN, MOE4_DIM_NONE, 0},
    {NULL, MOE4_DIM_NONE, MOE4_DIM_NONE, 0},
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

const struct moe4_family moe4_families[] = {
    {.name = "deepseek_v3", MLP_EXPERTS, DEEPSEEK_MOE, .layer_parts = deepseek_layer}, /* and R1 */
    {.name = "kimi_k2", MLP_EXPERTS, DEEPSEEK_MOE, .layer_parts = deepseek_layer},
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
     .places = deepseek_v4_places,
     .layer = "@Rlayers.@L.",
     .expert = "@Rlayers.@L.ffn.experts.@E.@P",
     .shared = "@Rlayers.@L.ffn.shared_experts.@P",
     .proj = {"w1", "w3", "w2"},
     .router = "@Rlayers.@L.ffn.gate",
     .router_bias = "@Rlayers.@L.ffn.gate.bias",
     .hash_table = "@Rlayers.@L.ffn.gate.tid2eid",
     .left_alone = "@Rmtp.",
     .router_kind = MOE4_ROUTER_SQRTSOFTPLUS_BIAS,
     .normalizes = true,
     .key_activation = "hidden_act",
     .key_n_experts = "n_routed_experts",
     .key_expert = "moe_intermediate_size",
     .layer_rule = MOE4_LAYERS_ALL,
     .model_parts = deepseek_v4_model,
     .layer_parts = deepseek_v4_layer},
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

const struct moe4_family *moe4_family_find(const char *model_type) {
    for (size_t i = 0; i < moe4_n_families; i++)
        if (strcmp(moe4_families[i].name, model_type) == 0) return &moe4_families[i];
    return NULL;
}

const char *moe4_family_refused(const char *model_type) {
    static const struct {
        const char *model_type, *why;
    } refused[] = {
        {"llama4", "Llama-4: feed_forward.experts.gate_up_proj and down_proj are 3-D tensors of all experts, K before N"},
        {"llama4_text", "Llama-4: feed_forward.experts.gate_up_proj and down_proj are 3-D tensors of all experts, K before N"},
        {"gpt_oss", "gpt-oss: mlp.experts.gate_up_proj and down_proj are 3-D tensors of all experts, gate and up rows interleaved"},
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        if (strcmp(refused[i].model_type, model_type) == 0) return refused[i].why;
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
