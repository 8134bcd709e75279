/* From a module's tensors to its matrix: which format their suffixes make, and whether they fit together. */
#ifndef MOE4_WEIGHT_H
#define MOE4_WEIGHT_H

#include "checkpoint.h"

/* Hears of every problem of a module. name: the tensor or module. */
typedef void (*moe4_finding_fn)(void *user, moe4_status status, const char *name, const char *problem);

/* The matrix of module `name`, of rows x cols unless those are 0. With `finding` all problems are told and none is recorded as the
 * thread's error; without, the first one is recorded. Returns the first one's status. */
moe4_status moe4_weight_read(const moe4_checkpoint *ckpt, moe4_weight *weight_ret, const char *name, size_t rows, size_t cols,
                             moe4_finding_fn finding, void *user);
/* Bytes of `name` before its suffix when that is a suffix of some format's tensors ("X.weight_scale" -> length of X); 0 otherwise.
 * is_main_ret: it is the tensor that holds the values, the module's one entry. */
size_t moe4_module_length(const char *name, bool *is_main_ret);
/* Whether such a tensor stands in module `name`. */
bool moe4_module_has_main(const moe4_checkpoint *ckpt, const char *name);
/* "modelopt NVFP4", "none", …: the formats whose tensors the checkpoint has. */
void moe4_quantization_name(char *dst, size_t dst_bytes, const moe4_checkpoint *ckpt);

#endif
