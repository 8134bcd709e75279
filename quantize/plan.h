/* What becomes of each tensor, and where it lies in which shard: all of it known before the first byte is written. */
#ifndef QUANTIZE_PLAN_H
#define QUANTIZE_PLAN_H

#include <stdatomic.h>

#include "quantize/quantize.h"

enum quantize_how {
    QUANTIZE_COPY,  /* bytes as they are */
    QUANTIZE_NVFP4, /* codes, block scales, global scale, maybe input scale */
    QUANTIZE_BF16,  /* a block-scaled FP8 matrix that is not quantized becomes bf16 */
    QUANTIZE_DROP   /* scales of an FP8 matrix: part of that matrix */
};

/* The tensors that one input tensor becomes. */
enum { PART_WEIGHT, PART_SCALE, PART_GLOBAL, PART_INPUT, N_PARTS };
struct quantize_part {
    const char *suffix; /* behind the module's name; NULL: the tensor keeps its name */
    moe4_dtype dtype;
    size_t n_dims, shape[MOE4_MAX_DIMS];
    uint64_t bytes;
};

struct quantize_item {
    moe4_tensor in;
    moe4_tensor fp8_scale; /* data NULL: `in` is wide */
    enum quantize_how how;
    bool is_linear;                /* by its name */
    size_t rows, cols;             /* of a matrix */
    struct quantize_item *partner; /* gate's up and up's gate: they share a global scale; or NULL */
    _Atomic uint32_t amax;         /* bits of a non-negative float: they order as the floats, NaN last */
    bool has_amax;
    float input_amax;            /* 0: not calibrated */
    const float *channel_weight; /* [cols] mean square of the input, for the search; or NULL */
    uint64_t offset[N_PARTS];    /* in the shard's file */
};

struct quantize_shard {
    char file[48];
    size_t first, end; /* items */
    char *header;      /* with the 8 bytes of its length */
    size_t header_bytes;
    uint64_t bytes; /* of the whole file */
};

struct quantize_plan {
    struct lm *lm;
    const struct quantize_options *options;
    moe4_checkpoint *ckpt;
    struct quantize_item *items; /* in the order of the checkpoint's tensors */
    size_t n_items;
    struct quantize_shard *shards;
    size_t n_shards;
    uint64_t bytes_in, bytes_out; /* tensors' */
    float e4m3[256];              /* values of FP8 bytes */
};

/* Opens `in` and decides everything. Errors: the library's, UNSUPPORTED (what cannot be quantized from, by name). */
moe4_status quantize_plan_make(struct quantize_plan *plan, struct lm *lm, const char *in, const struct quantize_options *options);
void quantize_plan_free(struct quantize_plan *plan);

/* Parts of an item in their order; how many. A part's name goes to name_ret. */
size_t quantize_parts(const struct quantize_plan *plan, const struct quantize_item *item, struct quantize_part parts[static N_PARTS]);
enum { QUANTIZE_NAME_BYTES = 320 };
const char *quantize_part_name(char name[static QUANTIZE_NAME_BYTES], const struct quantize_item *item, const struct quantize_part *part);

/* Shards, the items' offsets in them and the shards' headers (shards.c). */
moe4_status quantize_plan_shards(struct quantize_plan *plan);

/* What the tensors' names say (names.c). A module is a tensor's name without ".weight". */
bool quantize_is_linear(const char *tensor, size_t n_layers);
bool quantize_is_fused_experts(const char *tensor);
/* gate's up or up's gate; false for other matrices. */
bool quantize_partner_name(char partner[static QUANTIZE_NAME_BYTES], const char *tensor);
bool quantize_matches(const char *tensor, const char *const *patterns, size_t n_patterns);
size_t quantize_module_length(const char *tensor); /* 0: its name does not end in ".weight" */

#endif
