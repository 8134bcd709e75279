/* Linear on the CPU: the same rows and products as a layer's. */
#ifndef MOE4_CPU_LINEAR_H
#define MOE4_CPU_LINEAR_H

#include "../backend.h"

moe4_status moe4_cpu_linear_prepare(moe4_linear *linear);
void moe4_cpu_linear_release(moe4_linear *linear);
bool moe4_cpu_linear_bytes(size_t *bytes, const moe4_linear *linear, size_t n_tokens);
moe4_status moe4_cpu_linear_forward(const struct moe4_linear_call *call);

#endif
