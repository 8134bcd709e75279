/* What becomes of each tensor, and where it lies in which shard: all of it known before the first byte is written. */
#ifndef QUANTIZE_PLAN_H
#define QUANTIZE_PLAN_H

#include <stdatomic.h>

#include <jansson.h>

#include "quantize/quantize.h"
#include "quantize/source.h"

enum quantize_how {
    QUANTIZE_COPY,  /* values as they are */
    QUANTIZE_NVFP4, /* codes, block scales, global scale, maybe input scale; from MXFP4 without rounding where that can be */
    QUANTIZE_BF16,  /* a matrix of FP8 or MXFP4 that is not quantized becomes bf16 */
    QUANTIZE_DROP   /* scales of such a matrix: part of that matrix */
};

/* How a matrix is stored. */
enum quantize_form {
    QUANTIZE_WIDE, /* BF16, F16 or F32 */
    QUANTIZE_FP8,  /* E4M3, with a factor for each 128x128 */
    QUANTIZE_MXFP4 /* E2M1 codes, two to a byte, the even one low; an E8M0 byte for each 32 of a row */
};
enum { QUANTIZE_FP8_BLOCK = 128, QUANTIZE_MX_BLOCK = 32 };

/* The tensors that one item becomes. */
enum { PART_WEIGHT, PART_SCALE, PART_GLOBAL, PART_INPUT, N_PARTS };
struct quantize_part {
    const char *suffix; /* behind the module's name; NULL: the item's own name */
    moe4_dtype dtype;
    size_t n_dims, shape[MOE4_MAX_DIMS];
    uint64_t bytes;
};

/* What a matrix of MXFP4 lost on its way to NVFP4; blocks are of 32. */
struct quantize_recast_loss {
    uint64_t n_blocks, n_inexact;
    double error_sq, norm_sq; /* sums of (a - b)^2 and a^2 */
};

/* A tensor, or one expert's share of a tensor that holds all experts of a layer. */
struct quantize_item {
    moe4_tensor in;
    const char *name; /* of the tensor, or what the share would be called if it stood alone */
    char *own_name;   /* the same, where it is a share; NULL otherwise */
    size_t number;    /* of `in` in the checkpoint */
    uint64_t bytes_in;
    enum quantize_how how;
    enum quantize_form form;
    struct quantize_view values, scales; /* scales: of FP8 and MXFP4 */
    bool is_linear;                      /* by its name */
    bool is_vector;                      /* a share of biases, [rows] */
    size_t rows, cols;                   /* of a matrix; cols in values */
    struct quantize_item *partner;       /* gate's up and up's gate: they share a global scale; or NULL */
    _Atomic uint32_t amax;               /* bits of a non-negative float: they order as the floats, NaN last; MXFP4: see recast.h */
    bool has_amax;
    float input_amax;            /* 0: not calibrated */
    const float *channel_weight; /* [cols] mean square of the input, for the search; or NULL */
    struct quantize_recast_loss loss;
    uint64_t offset[N_PARTS]; /* in the shard's file */
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
    struct quantize_files files;
    struct quantize_item *items; /* in the order of the checkpoint's tensors */
    size_t n_items, items_room;
    struct quantize_shard *shards;
    size_t n_shards;
    uint64_t bytes_in, bytes_out; /* tensors' */
    float e4m3[256];              /* values of FP8 bytes */
    json_t *made_with;            /* options as strings, for the shards' metadata (task.h) */
};

/* Opens `in` and decides everything. Errors: the library's, UNSUPPORTED (what cannot be quantized from, by name). */
moe4_status quantize_plan_make(struct quantize_plan *plan, struct lm *lm, const char *in, const struct quantize_options *options);
void quantize_plan_free(struct quantize_plan *plan);

/* A new item at the end; the pointer is good until the next. NULL: no memory, with the error set. */
struct quantize_item *quantize_plan_add(struct quantize_plan *plan, const moe4_tensor *in, size_t number);

/* Parts of an item in their order; how many. A part's name goes to name_ret. */
size_t quantize_parts(const struct quantize_plan *plan, const struct quantize_item *item, struct quantize_part parts[static N_PARTS]);
enum { QUANTIZE_NAME_BYTES = 320 };
const char *quantize_part_name(char name[static QUANTIZE_NAME_BYTES], const struct quantize_item *item, const struct quantize_part *part);

/* Shards, the items' offsets in them and the shards' headers (shards.c). */
moe4_status quantize_plan_shards(struct quantize_plan *plan);

/* How a matrix is stored, and its scales where it has any (formats.c). Errors: UNSUPPORTED, FORMAT (scales that are missing or of another
 * shape). */
moe4_status quantize_form_of(struct quantize_plan *plan, const moe4_tensor *t, enum quantize_form *form_ret, moe4_tensor *scales_ret);
/* True for scales of a matrix that quantize_form_of found them for. */
bool quantize_is_scales(struct quantize_plan *plan, const moe4_tensor *t);
/* Formats that are quantized already, or that moe4 does not read: UNSUPPORTED. */
moe4_status quantize_refuse(struct quantize_plan *plan, const moe4_tensor *t);

/* Tensors that hold all experts of a layer become a gate, an up and a down of each expert (fused.c). *is_fused_ret: it was one, and its
 * items are added. Errors: UNSUPPORTED (a model type whose order is not known), FORMAT (shapes). */
moe4_status quantize_add_fused(struct quantize_plan *plan, const moe4_tensor *t, size_t number, bool *is_fused_ret);

/* What the tensors' names say (names.c). A module is a tensor's name without ".weight". */
bool quantize_is_linear(const char *tensor, size_t n_layers);
/* gate's up or up's gate; false for other matrices. */
bool quantize_partner_name(char partner[static QUANTIZE_NAME_BYTES], const char *tensor);
bool quantize_matches(const char *tensor, const char *const *patterns, size_t n_patterns);
bool quantize_ends_with(const char *tensor, const char *suffix);
size_t quantize_module_length(const char *tensor); /* 0: its name does not end in ".weight" */

#endif
