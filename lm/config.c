/* config.json: the table of families, and what they have in common. */
#include "config.h"

#include <math.h>
#include <string.h>

/* A family is a row here and a file that reads its attention. Names as moe4_model_info gives them. */
static const struct lm_family families[] = {
    {"glm4_moe", lm_attention_glm4},
    {"qwen3_moe", lm_attention_qwen3},
};
enum { N_FAMILIES = sizeof families / sizeof *families };

static const json_t *get(const json_t *config, const char *key) {
    const json_t *v = json_object_get(config, key);
    return json_is_null(v) ? NULL : v;
}

moe4_status lm_config_size(struct lm *lm, size_t *value, const json_t *config, const char *key, size_t if_absent, size_t min, size_t max) {
    const json_t *v = get(config, key);
    LM_CHECK(lm, !v || json_is_integer(v), MOE4_ERROR_FORMAT, "config.json: \"%s\" is not a whole number", key);
    json_int_t n = v ? json_integer_value(v) : (json_int_t)if_absent;
    LM_CHECK(lm, n >= 0 && (size_t)n >= min && (size_t)n <= max, MOE4_ERROR_FORMAT, "config.json: \"%s\" is %lld, moe4 runs %zu to %zu",
             key, (long long)n, min, max);
    *value = (size_t)n;
    return MOE4_OK;
}

moe4_status lm_config_number(struct lm *lm, double *value, const json_t *config, const char *key, double if_absent, double min,
                             double max) {
    const json_t *v = get(config, key);
    LM_CHECK(lm, !v || json_is_number(v), MOE4_ERROR_FORMAT, "config.json: \"%s\" is not a number", key);
    *value = v ? json_number_value(v) : if_absent;
    LM_CHECK(lm, *value >= min && *value <= max, MOE4_ERROR_FORMAT, "config.json: \"%s\" is %g, moe4 runs %g to %g", key, *value, min, max);
    return MOE4_OK;
}

moe4_status lm_config_bool(struct lm *lm, bool *value, const json_t *config, const char *key, bool if_absent) {
    const json_t *v = get(config, key);
    LM_CHECK(lm, !v || json_is_boolean(v), MOE4_ERROR_FORMAT, "config.json: \"%s\" is neither true nor false", key);
    *value = v ? json_is_true(v) : if_absent;
    return MOE4_OK;
}

moe4_status lm_config_heads(struct lm *lm, struct lm_attention *a, const json_t *config) {
    size_t hidden = 0;
    LM_TRY(lm, lm_config_size(lm, &hidden, config, "hidden_size", 0, 1, 1 << 20));
    LM_TRY(lm, lm_config_size(lm, &a->n_heads, config, "num_attention_heads", 0, 1, 4096));
    LM_TRY(lm, lm_config_size(lm, &a->n_kv_heads, config, "num_key_value_heads", a->n_heads, 1, a->n_heads));
    LM_CHECK(lm, a->n_heads % a->n_kv_heads == 0, MOE4_ERROR_FORMAT,
             "config.json: %zu attention heads do not divide among %zu key-value heads", a->n_heads, a->n_kv_heads);
    LM_TRY(lm, lm_config_size(lm, &a->head_dim, config, "head_dim", hidden / a->n_heads, 2, 1024));
    return MOE4_OK;
}

moe4_status lm_config_rope(struct lm *lm, struct lm_attention *a, const json_t *config, double factor_if_absent) {
    static const char *const blocks[] = {"rope_scaling", "rope_parameters"}; /* the older and the newer place */
    const json_t *from = config;
    for (int i = 0; i < 2; i++) {
        const json_t *block = get(config, blocks[i]);
        if (!block) continue;
        const json_t *kind = get(block, "rope_type") ? get(block, "rope_type") : get(block, "type");
        const char *text = kind ? json_string_value(kind) : "default";
        LM_CHECK(lm, json_is_object(block) && text, MOE4_ERROR_FORMAT, "config.json: \"%s\" is malformed", blocks[i]);
        LM_CHECK(lm, strcmp(text, "default") == 0, MOE4_ERROR_UNSUPPORTED, "config.json: rotary of type \"%s\" (moe4 runs: default)", text);
        if (get(block, "rope_theta")) from = block;
    }
    LM_TRY(lm, lm_config_number(lm, &a->rope_theta, from, "rope_theta", 10000.0, 1.0, 1e12));
    double factor = 0;
    LM_TRY(lm, lm_config_number(lm, &factor, get(config, "partial_rotary_factor") ? config : from, "partial_rotary_factor",
                                factor_if_absent, 0.0, 1.0));
    a->rotary_dim = (size_t)((double)a->head_dim * factor);
    LM_CHECK(lm, a->rotary_dim % 2 == 0 && a->rotary_dim > 0, MOE4_ERROR_FORMAT,
             "config.json: rotary over %zu of %zu dimensions, which is not two halves", a->rotary_dim, a->head_dim);
    return MOE4_OK;
}

static moe4_status read_common(struct lm *lm, struct lm_config *config, const json_t *json) {
    const char *name = config->info.family;
    const struct lm_family *family = NULL;
    for (int i = 0; i < N_FAMILIES; i++)
        if (strcmp(name, families[i].name) == 0) family = &families[i];
    LM_CHECK(lm, family, MOE4_ERROR_UNSUPPORTED, "the model's family is %s; moe4 loads its layers but has no attention for it", name);

    const json_t *act = get(json, "hidden_act");
    LM_CHECK(lm, !act || (json_is_string(act) && strcmp(json_string_value(act), "silu") == 0), MOE4_ERROR_UNSUPPORTED,
             "config.json: \"hidden_act\" is not \"silu\"");
    double eps = 0;
    LM_TRY(lm, lm_config_number(lm, &eps, json, "rms_norm_eps", 1e-6, 0.0, 1.0));
    config->norm_eps = (float)eps;
    LM_TRY(lm, lm_config_size(lm, &config->max_context, json, "max_position_embeddings", 0, 1, (size_t)1 << 31));
    LM_TRY(lm, lm_config_bool(lm, &config->tied, json, "tie_word_embeddings", false));
    return family->read_attention(lm, &config->attention, json);
}

moe4_status lm_config_read(struct lm *lm, struct lm_config *config, const moe4_checkpoint *ckpt) {
    config->info = (moe4_model_info)MOE4_MODEL_INFO_INIT;
    LM_TRY(lm, moe4_checkpoint_info(ckpt, &config->info));
    size_t bytes;
    const char *text = moe4_checkpoint_config(ckpt, &bytes);
    json_error_t error;
    json_t *json = json_loadb(text, bytes, 0, &error);
    LM_CHECK(lm, json, MOE4_ERROR_FORMAT, "config.json: %s", bytes ? error.text : "there is none");
    moe4_status status = read_common(lm, config, json);
    json_decref(json);
    return status;
}
