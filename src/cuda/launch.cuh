/* Launches a kernel that may begin before the one in front of it in the stream has ended (programmatic dependent launch): its first
 * action that touches memory is dependency_wait(), but for what prepare.cu lets its followers do (begin). On other GPUs an ordinary launch.
 */
#ifndef MOE4_CUDA_LAUNCH_CUH
#define MOE4_CUDA_LAUNCH_CUH

#include <cuda_runtime.h>

template <class... Parameters, class... Arguments>
static cudaError_t moe4_cuda_launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                                          Arguments... arguments) {
    int device = 0, major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = (unsigned)threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = major == 9; /* kernels wait only in their sm_90a build */
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

#endif
