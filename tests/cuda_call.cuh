/* CUDA calls of the programs that test and measure kernels: an error ends them with its place. */
#ifndef MOE4_CUDA_CALL_CUH
#define MOE4_CUDA_CALL_CUH

#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>

#define CUDA(expr)                                                                            \
    do {                                                                                      \
        cudaError_t error_ = (expr);                                                          \
        if (error_ != cudaSuccess) {                                                          \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #expr, cudaGetErrorString(error_)); \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)

#endif
