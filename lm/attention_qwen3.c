/* Qwen3-MoE: rotary on the whole head, norm of q and k always; attention_bias is for all four projections. */
#include "config.h"

moe4_status lm_attention_qwen3(struct lm *lm, struct lm_attention *a, const json_t *config) {
    LM_TRY(lm, lm_config_heads(lm, a, config));
    LM_TRY(lm, lm_config_rope(lm, a, config, 1.0));
    LM_CHECK(lm, a->rotary_dim == a->head_dim, MOE4_ERROR_UNSUPPORTED,
             "config.json: rotary over %zu of %zu dimensions in a qwen3_moe model", a->rotary_dim, a->head_dim);
    bool sliding;
    LM_TRY(lm, lm_config_bool(lm, &sliding, config, "use_sliding_window", false));
    LM_CHECK(lm, !sliding, MOE4_ERROR_UNSUPPORTED, "config.json: \"use_sliding_window\" is true (moe4 runs full attention)");
    LM_TRY(lm, lm_config_bool(lm, &a->qkv_bias, config, "attention_bias", false));
    a->o_bias = a->qkv_bias;
    a->qk_norm = true;
    return MOE4_OK;
}
