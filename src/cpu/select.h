#ifndef MOE4_CPU_SELECT_H
#define MOE4_CPU_SELECT_H

#include "../backend.h"

/* topk_ids, topk_weights [T,k] from logits [T,E]. */
moe4_status moe4_cpu_select(const moe4_router *router, int32_t *topk_ids, float *topk_weights, const float *logits, size_t n_tokens,
                            void *stream);

#endif
