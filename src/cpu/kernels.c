/* The kernel table: scalar everywhere, then what each ISA improves. */
#include "kernels.h"

void moe4_kernels_init(struct moe4_kernels *k, uint32_t mask) {
    k->isa = "scalar";
    moe4_kernels_codec_scalar(k);
    moe4_kernels_glu_scalar(k);
    moe4_kernels_gemm_scalar(k);
#if defined(__x86_64__)
    if (mask & MOE4_ISA_AVX2) {
        k->isa = "avx2";
        moe4_kernels_codec_avx2(k);
        moe4_kernels_glu_avx2(k);
        moe4_kernels_gemm_avx2(k);
        moe4_kernels_gemm_avx2_w4a4(k);
        moe4_kernels_gemm_avx2_w4a16(k);
    }
    if (mask & MOE4_ISA_AVX512VNNI) {
        k->isa = "avx512vnni";
        moe4_kernels_codec_avx512(k);
        moe4_kernels_glu_avx512(k);
        moe4_kernels_gemm_avx512vnni(k);
        moe4_kernels_gemm_avx512fp32(k);
    }
    if (mask & MOE4_ISA_AVX512BF16) {
        k->isa = "avx512bf16";
        moe4_kernels_gemm_avx512bf16(k);
    }
#elif defined(__aarch64__)
    if (mask & MOE4_ISA_NEON) {
        k->isa = "neon";
        moe4_kernels_codec_neon(k);
        moe4_kernels_glu_neon(k);
        moe4_kernels_gemm_neon(k);
    }
#if defined(MOE4_NEON_DOT)
    if (mask & MOE4_ISA_NEONDOT) {
        k->isa = "neondot";
        moe4_kernels_gemm_neondot(k);
    }
    if (mask & MOE4_ISA_NEONI8MM) {
        k->isa = "neoni8mm";
        moe4_kernels_gemm_neoni8mm(k);
    }
#endif
#else
    (void)mask;
#endif
}
