#include "families.h"

#include <stdio.h>
#include <string.h>

/* ---- what a model and each of its layers must have, besides the experts ---- */

static const struct moe4_part llama_model[] = {
    {"model.embed_tokens", MOE4_DIM_VOCAB, MOE4_DIM_HIDDEN, 0},
    {"model.norm.weight", MOE4_DIM_HIDDEN, MOE4_DIM_NONE, 0},
    {"lm_head", MOE4_DIM_VOCAB, MOE4_DIM_HIDDEN, MOE4_IF_UNTIED},
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

/* ---- the rows ---- */

/* Names that all `model.layers.L.mlp.experts.E.*` families share. */
#define MLP_EXPERTS                                                                                                \
    .layer = "model.layers.@L.", .expert = "model.layers.@L.mlp.experts.@E.@P", .dense = "model.layers.@L.mlp.@P", \
    .proj = {"gate_proj", "up_proj", "down_proj"}, .router = "model.layers.@L.mlp.gate",                           \
    .fused_experts = "model.layers.@L.mlp.experts.gate_up_proj", .model_parts = llama_model
/* What DeepSeek-V3 added to them, and GLM and Kimi took over. */
#define DEEPSEEK_MOE                                                                                                      \
    .shared = "model.layers.@L.mlp.shared_experts.@P", .router_bias = "model.layers.@L.mlp.gate.e_score_correction_bias", \
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
};
const size_t moe4_n_families = sizeof moe4_families / sizeof *moe4_families;

const struct moe4_family *moe4_family_find(const char *model_type) {
    for (size_t i = 0; i < moe4_n_families; i++)
        if (strcmp(moe4_families[i].name, model_type) == 0) return &moe4_families[i];
    return NULL;
}

void moe4_family_name(char *dst, size_t dst_bytes, const char *pattern, size_t layer, size_t expert, const char *proj) {
    size_t at = 0;
    dst[0] = '\0';
    for (const char *p = pattern; *p && at < dst_bytes; p++) {
        int n;
        if (p[0] != '@')
            n = snprintf(dst + at, dst_bytes - at, "%c", *p);
        else if (*++p == 'P')
            n = snprintf(dst + at, dst_bytes - at, "%s", proj);
        else
            n = snprintf(dst + at, dst_bytes - at, "%zu", *p == 'L' ? layer : expert);
        at += (size_t)n;
    }
}
