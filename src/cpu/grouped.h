/* Grouped linear on the CPU: the same rows and products as a layer's. */
#ifndef MOE4_CPU_GROUPED_H
#define MOE4_CPU_GROUPED_H

#include "../backend.h"

moe4_status moe4_cpu_grouped_prepare(moe4_grouped *grouped);
void moe4_cpu_grouped_release(moe4_grouped *grouped);
bool moe4_cpu_grouped_bytes(size_t *bytes, const moe4_grouped *grouped, size_t n_rows);
moe4_status moe4_cpu_grouped_forward(const struct moe4_grouped_call *call);

#endif
