/* The bits of packed words and scales (nvfp4.cuh has the layout around them), for device and host.
 *
 * A code's bits (s, e1, e0, m) are stored where a mask, after a rotate, drops them into the fields of a bf16: sign at 15, e1 e0 at
 * 8 7, m at 6. Read as bf16 that is the value times 2^-126 (subnormal for 0.5), so ONE multiply by scale * 2^118 gives value * scale *
 * 2^-8, exactly: at most 6 significant bits, 2^-18 .. 2^3.4. The 2^8 goes into the fp32 alpha of the product. Scales are re-encoded
 * as normalised bytes, 5 exponent bits over 3 mantissa bits, so that the multiplier's bits are (byte << 4) + a constant. */
#ifndef MOE4_CUDA_NVFP4_WORD_H
#define MOE4_CUDA_NVFP4_WORD_H

#include <stdint.h>

#ifdef __CUDACC__
#define MOE4_WORD static __host__ __device__ __forceinline__
#else
#define MOE4_WORD static inline
#endif

#define MOE4_WORD_FIELDS 0x81C081C0u /* of two bf16 */
#define MOE4_WORD_SPREAD (1u << 3 | 1u << 8 | 1u << 14)
#define MOE4_SCALE_SHIFT 4
#define MOE4_SCALE_BASE 0x7280u /* exponent 229 = 118 + 127 - 16 */

MOE4_WORD uint32_t rotate_right(uint32_t w, int n) {
#ifdef __CUDA_ARCH__
    return __funnelshift_r(w, w, n);
#else
    return w >> n | w << (32 - n);
#endif
}

/* Pair i of values times 2^-126, as bf16: halves 0 and 1 are even and odd k. Field positions within each 16-bit half of the word:
 *   pair 0: s e1 e0 m at 15 8 7 6                        in place
 *   pair 1:              2 of the other half, 11 10 9    after a rotate right by 3
 *   pair 2:              5 of the other half, 14 13 12   after a rotate right by 6
 *   pair 3:              1 0 4 3                         after three shifts to the left in one multiplication, by 14, 8 and 3
 * spread is MOE4_WORD_SPREAD, which the device's compiler should not see through. */
MOE4_WORD uint32_t word_pair(uint32_t w, int i, uint32_t spread) {
    switch (i) {
    case 0: return w & MOE4_WORD_FIELDS;
    case 1: return rotate_right(w, 3) & MOE4_WORD_FIELDS;
    case 2: return rotate_right(w, 6) & MOE4_WORD_FIELDS;
    default: return ((w & 0x001B001Bu) * spread) & MOE4_WORD_FIELDS;
    }
}

/* code[pair][half] -> the word that word_pair takes. */
MOE4_WORD uint32_t pack_word(const uint8_t code[4][2]) {
    uint32_t w = 0;
    for (int half = 0; half < 2; half++) {
        int here = 16 * half, other = 16 - here;
        uint32_t c = code[0][half];
        w |= (c >> 3) << (here + 15) | (c & 7) << (here + 6);
        c = code[1][half];
        w |= (c >> 3) << (other + 2) | (c & 7) << (here + 9);
        c = code[2][half];
        w |= (c >> 3) << (other + 5) | (c & 7) << (here + 12);
        c = code[3][half];
        w |= (c >> 2) << here | (c & 3) << (here + 3);
    }
    return w;
}

/* The normalised byte of |scale| for an E4M3 byte that is not zero; NaN becomes a byte whose multiplier is NaN. */
MOE4_WORD uint8_t pack_scale(uint8_t e4m3) {
    uint32_t e = e4m3 >> 3 & 15, m = e4m3 & 7;
    if (e == 15 && m == 7) return 26 << 3 | 1;
    if (e) return (uint8_t)((e + 9) << 3 | m); /* 2^(e-7) (1 + m/8), exponent field e - 7 + 16 */
    int shift = m >= 4 ? 1 : m >= 2 ? 2 : 3;   /* subnormal m * 2^-9 = 2^-6-shift (1 + ...) */
    return (uint8_t)((10 - shift) << 3 | ((m << shift) & 7));
}

#endif
