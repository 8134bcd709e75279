#ifndef MOE4_CPU_SELECT_H
#define MOE4_CPU_SELECT_H

#include "../backend.h"

/* topk_ids, topk_weights [T,k] from logits [T,E]. */
moe4_status moe4_cpu_select(const struct moe4_select_call *call);

#endif
