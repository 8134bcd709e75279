/* GLM-4.x MoE: rotary on a part of each head; bias on q, k and v and norm of q and k as configured. */
#include "config.h"

moe4_status lm_attention_glm4(struct lm *lm, struct lm_attention *a, const json_t *config) {
    LM_TRY(lm, lm_config_heads(lm, a, config));
    LM_TRY(lm, lm_config_rope(lm, a, config, 0.5));
    LM_TRY(lm, lm_config_bool(lm, &a->qkv_bias, config, "attention_bias", false));
    a->o_bias = false; /* attention_bias does not reach o_proj in this family */
    return lm_config_bool(lm, &a->qk_norm, config, "use_qk_norm", false);
}
