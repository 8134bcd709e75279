/* The E2M1 conversion of CUDA's own header, run on the host: an oracle for test_convert where CUDA is installed. */
#include <cuda_fp4.h>

unsigned char cuda_e2m1_from_float(float x);

unsigned char cuda_e2m1_from_float(float x) {
    return __nv_cvt_float_to_fp4(x, __NV_E2M1, cudaRoundNearest);
}
