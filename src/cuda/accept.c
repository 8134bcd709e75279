#include "accept.h"

enum { LEAST_MAJOR = 8 }; /* the portable kernels are built for sm_80 and, from PTX, everything newer */

moe4_status moe4_cuda_accept_driver(const moe4_ctx *ctx, const struct moe4_cuda_facts *f) {
    MOE4_CHECK(ctx, f->driver, MOE4_ERROR_DEVICE, "cuda:%d: no NVIDIA driver on this machine", f->index);
    MOE4_CHECK(ctx, f->driver / 1000 >= f->runtime / 1000, MOE4_ERROR_DEVICE, "cuda:%d: the driver is for CUDA %d.%d, need %d.0 or later",
               f->index, f->driver / 1000, f->driver % 1000 / 10, f->runtime / 1000);
    return MOE4_OK;
}

moe4_status moe4_cuda_accept_device(const moe4_ctx *ctx, const struct moe4_cuda_facts *f) {
    MOE4_CHECK(ctx, f->index < f->n_devices, MOE4_ERROR_DEVICE, "cuda:%d: the driver shows %d device%s", f->index, f->n_devices,
               f->n_devices == 1 ? "" : "s");
    MOE4_CHECK(ctx, f->major >= LEAST_MAJOR, MOE4_ERROR_DEVICE, "cuda:%d: %s has compute capability %d.%d, need %d.0", f->index, f->name,
               f->major, f->minor, LEAST_MAJOR);
    return MOE4_OK;
}
