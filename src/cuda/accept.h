/* Which devices this plug-in runs on, as a decision by itself, so that it is tested where there is none. */
#ifndef MOE4_CUDA_ACCEPT_H
#define MOE4_CUDA_ACCEPT_H

#include "../internal.h"

/* What the driver says of device `index`; name and what follows it only where there is such a device. Versions are CUDA's: 1000 * major +
 * 10 * minor. */
struct moe4_cuda_facts {
    int index;
    int driver;  /* 0: there is none */
    int runtime; /* the one this plug-in was built with */
    int n_devices;
    const char *name;
    int major, minor; /* compute capability */
};

/* DEVICE with the reason, or MOE4_OK. */
moe4_status moe4_cuda_accept_driver(const moe4_ctx *ctx, const struct moe4_cuda_facts *facts);
moe4_status moe4_cuda_accept_device(const moe4_ctx *ctx, const struct moe4_cuda_facts *facts);

#endif
