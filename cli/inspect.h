/* What moe4 inspect counts: kinds of tensors over the whole checkpoint, and the scales of one layer. */
#ifndef MOE4_INSPECT_H
#define MOE4_INSPECT_H

#include "cli.h"

/* Modules or tensors that differ only in their numbers (layer, expert): one line of the table. */
struct inspect_kind {
    char *pattern;      /* "model.layers.*.mlp.experts.*.down_proj" */
    const char *format; /* "NVFP4" for a module with its companions, otherwise a tensor's dtype */
    size_t n_dims, dims[MOE4_MAX_DIMS];
    char shape[64];
    size_t count;
    uint64_t bytes;
};

struct inspect_kinds {
    struct inspect_kind *list; /* in the order of their first member */
    size_t n;
    uint64_t bytes; /* of all tensors */
};

/* False when memory runs out. */
bool inspect_kinds_read(struct inspect_kinds *kinds, const moe4_checkpoint *ckpt);
void inspect_kinds_free(struct inspect_kinds *kinds);

struct inspect_layer {
    size_t layer, n_experts; /* a dense layer is one expert */
    moe4_layer_kind kind;
    const char *format; /* of its experts: "NVFP4", "BF16", …, "mixed", or "-" where there are none */
    /* Over the block scales of all its experts, the shared one included: */
    uint64_t n_blocks, n_scale_448, n_scale_pow2, n_scale_zero, n_scale_bad;
    float scale_min, scale_max;
    /* Over its routed experts (or the one of a dense layer), where they are NVFP4: */
    size_t n_global_differ, n_input_differ;
    size_t n_input_missing, n_implausible; /* of all their projections */
    char **notes;                          /* one sentence for each implausible input_scale */
    size_t n_notes;
};

/* What implausible means. */
extern const char inspect_implausible[];

moe4_status inspect_layer_read(struct inspect_layer *layer, moe4_ctx *ctx, const moe4_checkpoint *ckpt, const moe4_model_info *info,
                               size_t number);
void inspect_layer_free(struct inspect_layer *layer);

#endif
