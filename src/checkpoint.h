/* An open checkpoint: shards, the names of all their tensors, config.json. Read-only once open. */
#ifndef MOE4_CHECKPOINT_H
#define MOE4_CHECKPOINT_H

#include <stdatomic.h>

#include "config.h"
#include "safetensors.h"

#define MOE4_INDEX_NAME "model.safetensors.index.json"

struct moe4_checkpoint {
    moe4_ctx *ctx;
    char *path; /* as the caller gave it */
    bool is_folder;
    struct moe4_safetensors *shards;
    size_t n_shards;
    size_t *first; /* [n_shards + 1]: the number of each shard's first tensor */
    size_t n_tensors;
    const moe4_tensor **by_name; /* [n_tensors], sorted */
    uint8_t *indexed;            /* [n_tensors], by place in by_name: the index has it; NULL without an index */
    char *config_text;           /* "" for a single file */
    size_t config_bytes;
    bool has_config;
    struct moe4_config config;
    char quantization[160];
    _Atomic int64_t looked_ms; /* when files were last looked at by moe4_checkpoint_watch */
    atomic_bool changed;       /* one has been seen to be another */
};

/* Place in by_name of the first name not below `name`; n_tensors when all are. */
size_t moe4_checkpoint_seek(const moe4_checkpoint *ckpt, const char *name);
/* The tensor of that name; NULL, without an error, for none. */
const moe4_tensor *moe4_checkpoint_lookup(const moe4_checkpoint *ckpt, const char *name);
const moe4_tensor *moe4_checkpoint_at(const moe4_checkpoint *ckpt, size_t i);
/* The tensor that holds all experts of a layer, where a checkpoint has such; NULL otherwise. Needs the config. */
const moe4_tensor *moe4_fused_experts(const moe4_checkpoint *ckpt, size_t layer);
/* A vector of a layer's router, one number for each expert, by its pattern; NULL when the pattern or the tensor is not there. Errors:
 * FORMAT, UNSUPPORTED. */
moe4_status moe4_router_vector(const moe4_checkpoint *ckpt, const moe4_tensor **tensor_ret, const char *pattern, size_t layer);
/* OK unless a file is seen to have changed since it was opened: IO. */
moe4_status moe4_checkpoint_check_files(const moe4_checkpoint *ckpt);
/* The same for calls in a hot loop: looks at the files at most every hundredth of a second, and always once one has changed. */
moe4_status moe4_checkpoint_watch(const moe4_checkpoint *ckpt);
/* OK when the family and its numbers are known; otherwise why not, as an error. */
moe4_status moe4_checkpoint_need_config(const moe4_checkpoint *ckpt);

#endif
