/* Packing 16-column tiles on AVX-512: a transpose of 16 columns x 64 bytes of codes at a time, stored past the caches. */
#include "pack.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* Rows r[16] of 16 dwords become columns. */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c); /* dword 4l of rows i .. i + 3 in lane l */
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* a 4 x 4 transpose of lanes */
        const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x44), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xee);
        const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x44), d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xee);
        r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[i + 8] = _mm512_shuffle_i32x4(b, d, 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

/* moe4_tile16_scale for 64 bytes. */
INLINE __m512i recode_scales(__m512i s) {
    const __m512i subnormal = _mm512_set1_epi64(0x1e1c1a1814100800); /* of bytes 0 .. 7 */
    const __mmask64 normal = _mm512_cmpge_epu8_mask(s, _mm512_set1_epi8(8));
    return _mm512_mask_add_epi8(_mm512_shuffle_epi8(subnormal, s), normal, s, _mm512_set1_epi8(3 << 3));
}

/* Eight lines of codes and one of scales. Codes under a zero scale become zero. */
INLINE void store_tile(struct moe4_tile16 *tile, const __m512i codes[8], __m512i scales) {
    _mm512_stream_si512((void *)tile->scale, recode_scales(scales));
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
        const __mmask16 columns = _mm512_test_epi32_mask(scales, _mm512_set1_epi32((int)(0xffu << 8 * b)));
        _mm512_stream_si512((void *)tile->code[b][0], _mm512_maskz_mov_epi32(columns, codes[2 * b]));
        _mm512_stream_si512((void *)tile->code[b][1], _mm512_maskz_mov_epi32(columns, codes[2 * b + 1]));
    }
}

/* Two tiles, 128 k, from 16 columns: 64 bytes of codes and 8 scales of each. */
INLINE void pack_pair(struct moe4_tile16 *tile, const uint8_t *codes, size_t codes_ld, const uint8_t *scales, size_t scales_ld) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; c++) r[c] = _mm512_loadu_si512(codes + (size_t)c * codes_ld);
    transpose(r);
    const __m256i step = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), index = _mm256_mullo_epi32(step, _mm256_set1_epi32((int)scales_ld));
    const __m512i lo = _mm512_i32gather_epi64(index, (const void *)scales, 1);
    const __m512i hi = _mm512_i32gather_epi64(index, (const void *)(scales + 8 * scales_ld), 1);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    store_tile(tile, r, _mm512_permutex2var_epi32(lo, even, hi));
    store_tile(tile + 1, r + 8, _mm512_permutex2var_epi32(lo, _mm512_add_epi32(even, _mm512_set1_epi32(1)), hi));
}

TARGET void moe4_tile16_pack_avx512(void *packed, const moe4_weight *w, size_t col0, size_t n_cols) {
    const size_t n_pairs = w->cols / 128, n_chunks = (w->cols + 63) / 64, codes_ld = w->cols / 2, scales_ld = w->cols / MOE4_BLOCK;
    if (w->cols % 128 || n_cols < 16 || scales_ld > 1 << 24) { /* gather's index is an int */
        moe4_tile16_pack(packed, w, col0, n_cols);
        return;
    }
    for (size_t col = col0; col + 16 <= col0 + n_cols; col += 16) {
        struct moe4_tile16 *tile = (struct moe4_tile16 *)packed + col / 16 * n_chunks;
        const uint8_t *codes = (const uint8_t *)w->data + col * codes_ld, *scales = w->scale + col * scales_ld;
        for (size_t i = 0; i < n_pairs; i++) {
            /* 16 columns are one run of memory, of which the next is read while this one is packed. */
#pragma GCC unroll 16
            for (size_t line = 0; line < 16; line++) _mm_prefetch((const char *)codes + 16 * codes_ld + i * 1024 + line * 64, _MM_HINT_T1);
#pragma GCC unroll 2
            for (size_t line = 0; line < 2; line++) _mm_prefetch((const char *)scales + 16 * scales_ld + i * 128 + line * 64, _MM_HINT_T1);
            pack_pair(tile + 2 * i, codes + 64 * i, codes_ld, scales + 8 * i, scales_ld);
        }
    }
    _mm_sfence();
    if (n_cols % 16) moe4_tile16_pack(packed, w, col0 + n_cols / 16 * 16, n_cols % 16);
}
#endif
