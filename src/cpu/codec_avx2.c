#include "kernels.h"

#if defined(__x86_64__)
void moe4_kernels_codec_avx2(struct moe4_kernels *k) {
    (void)k;
}
#endif
