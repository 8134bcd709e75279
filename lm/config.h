/* Reading numbers from config.json: absent and null mean the default, anything else must be of the right kind and in range. */
#ifndef LM_CONFIG_H
#define LM_CONFIG_H

#include <jansson.h>

#include "lm.h"

moe4_status lm_config_size(struct lm *lm, size_t *value, const json_t *config, const char *key, size_t if_absent, size_t min, size_t max);
moe4_status lm_config_number(struct lm *lm, double *value, const json_t *config, const char *key, double if_absent, double min, double max);
moe4_status lm_config_bool(struct lm *lm, bool *value, const json_t *config, const char *key, bool if_absent);

/* heads, KV heads and head_dim, the same keys in every family. */
moe4_status lm_config_heads(struct lm *lm, struct lm_attention *a, const json_t *config);
/* Rotary of the plain kind over head_dim * factor dimensions; theta and, where the family has it, the factor stand at the top or in
 * rope_parameters. Errors: UNSUPPORTED for a scaled rope. */
moe4_status lm_config_rope(struct lm *lm, struct lm_attention *a, const json_t *config, double factor_if_absent);

#endif
