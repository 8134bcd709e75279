/* Packing 16-column tiles on AVX2: transposes of 8 columns x 32 bytes of codes, stored past the caches. */
#include "pack.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* Rows r[8] of 8 dwords become columns. */
INLINE void transpose(__m256i r[8]) {
    __m256i t[8];
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        const __m256i a = _mm256_unpacklo_epi32(r[i], r[i + 1]), b = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        const __m256i c = _mm256_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm256_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm256_unpacklo_epi64(a, c); /* dword 4l of rows i .. i + 3 in lane l */
        t[i + 1] = _mm256_unpackhi_epi64(a, c);
        t[i + 2] = _mm256_unpacklo_epi64(b, d);
        t[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x20);
        r[i + 4] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x31);
    }
}

/* moe4_tile16_scale for 32 bytes, none above 0x7e. */
INLINE __m256i recode_scales(__m256i s) {
    const __m256i subnormal = _mm256_set1_epi64x(0x1e1c1a1814100800); /* of bytes 0 .. 7 */
    const __m256i normal = _mm256_cmpgt_epi8(s, _mm256_set1_epi8(7));
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(subnormal, s), _mm256_add_epi8(s, _mm256_set1_epi8(3 << 3)), normal);
}

/* Eight columns: r[2b + h] = half h of their blocks b, from 32 bytes of codes of each; zero where the block's scale, a byte of s, is. */
INLINE void load_columns(__m256i r[8], const uint8_t *codes, size_t codes_ld, __m256i s) {
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) r[c] = _mm256_loadu_si256((const __m256i *)(const void *)(codes + (size_t)c * codes_ld));
    transpose(r);
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
        const __m256i byte = _mm256_and_si256(s, _mm256_set1_epi32((int)(0xffu << 8 * b)));
        const __m256i none = _mm256_cmpeq_epi32(byte, _mm256_setzero_si256());
        r[2 * b] = _mm256_andnot_si256(none, r[2 * b]);
        r[2 * b + 1] = _mm256_andnot_si256(none, r[2 * b + 1]);
    }
}

/* Both halves of a line one after the other: a line half written past the caches costs as much as a whole one. */
INLINE void store_line(void *line, __m256i lo, __m256i hi) {
    _mm256_stream_si256((__m256i *)line, lo);
    _mm256_stream_si256((__m256i *)line + 1, hi);
}

INLINE void pack_tile(struct moe4_tile16 *tile, const uint8_t *codes, size_t codes_ld, const uint8_t *scales, size_t scales_ld,
                      __m256i scale_index) {
    __m256i lo[8], hi[8];
    const __m256i s_lo = _mm256_i32gather_epi32((const int *)(const void *)scales, scale_index, 1);
    const __m256i s_hi = _mm256_i32gather_epi32((const int *)(const void *)(scales + 8 * scales_ld), scale_index, 1);
    load_columns(lo, codes, codes_ld, s_lo);
    load_columns(hi, codes + 8 * codes_ld, codes_ld, s_hi);
    store_line(tile->scale, recode_scales(s_lo), recode_scales(s_hi));
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) store_line(tile->code[i / 2][i % 2], lo[i], hi[i]);
}

TARGET void moe4_tile16_pack_avx2(void *packed, const moe4_weight *w, size_t col0, size_t n_cols) {
    const size_t n_chunks = w->cols / 64, codes_ld = w->cols / 2, scales_ld = w->cols / MOE4_BLOCK;
    if (w->cols % 64 || n_cols < 16 || scales_ld > 1 << 24) { /* gather's index is an int */
        moe4_tile16_pack(packed, w, col0, n_cols);
        return;
    }
    const __m256i index = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32((int)scales_ld));
    for (size_t col = col0; col + 16 <= col0 + n_cols; col += 16) {
        struct moe4_tile16 *tile = (struct moe4_tile16 *)packed + col / 16 * n_chunks;
        const uint8_t *codes = (const uint8_t *)w->data + col * codes_ld, *scales = w->scale + col * scales_ld;
        for (size_t i = 0; i < n_chunks; i++) {
            /* 16 columns are one run of memory, of which the next is read while this one is packed. */
#pragma GCC unroll 8
            for (size_t line = 0; line < 8; line++) _mm_prefetch((const char *)codes + 16 * codes_ld + i * 512 + line * 64, _MM_HINT_T1);
            _mm_prefetch((const char *)scales + 16 * scales_ld + i * 64, _MM_HINT_T1);
            pack_tile(tile + i, codes + 32 * i, codes_ld, scales + 4 * i, scales_ld, index);
        }
    }
    _mm_sfence();
    if (n_cols % 16) moe4_tile16_pack(packed, w, col0 + n_cols / 16 * 16, n_cols % 16);
}
#endif
