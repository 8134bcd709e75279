/* Numbers of the packed layout that host code needs too; nvfp4.cuh describes it. */
#ifndef MOE4_CUDA_NVFP4_LAYOUT_H
#define MOE4_CUDA_NVFP4_LAYOUT_H

#include <stddef.h>

/* The layout's name in cache files: another one for any change of packed bytes, or old files are taken for new ones. */
#define MOE4_UNIT_LAYOUT "cuda-64x64-2"
#define MOE4_UNIT_ROWS 64
#define MOE4_UNIT_K 64
#define MOE4_UNIT_CODE_BYTES 2048
#define MOE4_UNIT_BYTES 2304
#define MOE4_DECODE_FACTOR 256.f /* what a decoded weight lacks */

#define MOE4_MAX_DEVICE_EXPERTS 2048 /* the sort counts them in shared memory */

static inline int moe4_units(size_t k) {
    return (int)((k + MOE4_UNIT_K - 1) / MOE4_UNIT_K);
}

#endif
