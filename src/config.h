/* config.json, read once and checked. */
#ifndef MOE4_CONFIG_H
#define MOE4_CONFIG_H

#include "families.h"
#include "file.h"

struct moe4_config {
    moe4_status status; /* of the rest: OK, or why it cannot be had */
    char problem[400];
    const struct moe4_family *family;
    const struct moe4_place *place; /* the family's first, until the checkpoint's names are known */
    char *architecture;             /* "" when there is none */
    size_t dim[MOE4_N_DIMS];
    unsigned has;        /* MOE4_IF_ bits */
    uint8_t *layer_kind; /* [dim[LAYERS]] of moe4_layer_kind */
    uint16_t *layer_has; /* [dim[LAYERS]] MOE4_IF_ bits of a layer */
    size_t n_hash_layers;
    int normalize;
    float routed_scale, gate_temp, swiglu_limit;
};

/* Reads `bytes` of text. FORMAT when it is not JSON at all, MEMORY; whatever else is wrong is kept in config->status. */
moe4_status moe4_config_read(const moe4_ctx *ctx, struct moe4_config *config, const char *text, size_t bytes);
void moe4_config_free(const moe4_ctx *ctx, struct moe4_config *config);

#endif
