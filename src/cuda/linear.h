/* A linear on the device. */
#ifndef MOE4_CUDA_LINEAR_H
#define MOE4_CUDA_LINEAR_H

#include "device.h"

struct moe4_cuda_matrix {
    struct moe4_packed_experts packed; /* NVFP4 */
    void *plain;                       /* otherwise: the matrix as stored */
    float *bias;                       /* or NULL */
};

struct moe4_cuda_linear {
    uint8_t *packed;          /* of all matrices */
    float *numbers;           /* alpha of each matrix, then the input scale */
    struct moe4_cublas *blas; /* of the device, where a call may go by linear_decoded.c; or NULL */
    size_t decoded_from;      /* the fewest rows of such a call; SIZE_MAX: there is none */
    struct moe4_cuda_matrix matrix[];
};

/* linear_decoded.c: many bf16 rows times NVFP4 matrices in w4a16, each decoded to bf16 and multiplied by cuBLAS. */
size_t moe4_cuda_decoded_from(const moe4_linear *l); /* the fewest rows; SIZE_MAX: never */
bool moe4_cuda_decodes(const moe4_linear *l, size_t n_tokens);
size_t moe4_cuda_decoded_bytes(const moe4_linear *l); /* of workspace */
moe4_status moe4_cuda_decoded_forward(const struct moe4_linear_call *c);

#endif
