#include "ceiling.h"

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

/* Each body is eight steps on registers of their own, so that latency hides; a step's operands come from where a kernel's would: weights
 * from registers, activations broadcast from the first-level cache. */
#define ALL_ZMM                                                                                                                            \
    "memory", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", \
        "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28",      \
        "zmm29", "zmm30", "zmm31", "rax"
#define ALL_YMM                                                                                                                            \
    "memory", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", \
        "ymm15"
/* a: temporary, b: accumulator, c: second temporary */
#define EIGHT(STEP) \
    STEP(0, 12, 20) STEP(1, 13, 21) STEP(2, 14, 22) STEP(3, 15, 23) STEP(4, 16, 20) STEP(5, 17, 21) STEP(6, 18, 22) STEP(7, 19, 23)
#define DOTS(a)                                        \
    "vpbroadcastd (%0), %%zmm" #a "\n"                 \
    "vpdpbusd 4(%0)%{1to16%}, %%zmm28, %%zmm" #a "\n"  \
    "vpdpbusd 8(%0)%{1to16%}, %%zmm29, %%zmm" #a "\n"  \
    "vpdpbusd 12(%0)%{1to16%}, %%zmm30, %%zmm" #a "\n" \
    "vpdpbusd 16(%0)%{1to16%}, %%zmm31, %%zmm" #a "\n"
#define VNNI(a, b, c) "vpdpbusd %%zmm28, %%zmm29, %%zmm" #a "\n vpdpbusd %%zmm28, %%zmm29, %%zmm" #b "\n"
#define W4A4(a, b, c)                            \
    DOTS(a)                                      \
    "vcvtdq2ps %%zmm" #a ", %%zmm" #a "\n"       \
    "movl 20(%0), %%eax\n"                       \
    "vpermps (%0,%%rax), %%zmm26, %%zmm" #c "\n" \
    "vpaddd %%zmm27, %%zmm" #c ", %%zmm" #c "\n" \
    "vfmadd231ps %%zmm" #c ", %%zmm" #a ", %%zmm" #b "\n"
#define BF16_2(i, a, b) "vdpbf16ps " #i "(%0)%{1to16%}, %%zmm28, %%zmm" #a "\n vdpbf16ps " #i "(%0)%{1to16%}, %%zmm29, %%zmm" #b "\n"
#define BF16(a, b, c) BF16_2(0, a, b) BF16_2(4, a, b) BF16_2(8, a, b) BF16_2(12, a, b)
#define BF16_1(i, a, w) "vdpbf16ps " #i "(%0)%{1to16%}, %%zmm" #w ", %%zmm" #a "\n"
#define W4A16(a, b, c)                                                                                                    \
    "vpxord %%zmm" #a ", %%zmm" #a ", %%zmm" #a "\n" BF16_1(0, a, 24) BF16_1(4, a, 25) BF16_1(8, a, 26) BF16_1(12, a, 27) \
        BF16_1(16, a, 28) BF16_1(20, a, 29) BF16_1(24, a, 30) BF16_1(28, a, 31) "vfmadd231ps %%zmm23, %%zmm" #a ", %%zmm" #b "\n"
#define MADDUBS(i, t, w) "vpbroadcastd " #i "(%0), %%ymm" #t "\n vpmaddubsw %%ymm" #t ", %%ymm" #w ", %%ymm" #t "\n"
#define AVX2_W4A4(a)                                                                            \
    MADDUBS(0, 4, 12)                                                                           \
    MADDUBS(4, 5, 13)                                                                           \
    "vpaddw %%ymm5, %%ymm4, %%ymm4\n" MADDUBS(8, 6, 14)                                         \
        MADDUBS(12, 7, 15) "vpaddw %%ymm7, %%ymm6, %%ymm6\n"                                    \
                           "vpaddw %%ymm6, %%ymm4, %%ymm4\n vpmaddwd %%ymm11, %%ymm4, %%ymm4\n" \
                           "vcvtdq2ps %%ymm4, %%ymm4\n vbroadcastss 16(%0), %%ymm8\n"           \
                           "vmulps %%ymm10, %%ymm8, %%ymm8\n vfmadd231ps %%ymm8, %%ymm4, %%ymm" #a "\n"
#define FMA(a) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #a "\n"

static const float operands[64] __attribute__((aligned(64))); /* zeros: no subnormals anywhere */

#define LOOP(body, clobbers) \
    for (int i = 0; i < N_BODIES; i++) __asm__ volatile(body ::"r"(operands) : clobbers)
#define CLEAR(r) "vpxord %%zmm" #r ", %%zmm" #r ", %%zmm" #r "\n"
#define CLEAR_4(a, b, c, d) CLEAR(a) CLEAR(b) CLEAR(c) CLEAR(d)

enum { N_BODIES = 16384 };

__attribute__((target("avx512f"))) static double sample_zmm(enum ceiling c) {
    __asm__ volatile("vzeroall\n" CLEAR_4(16, 17, 18, 19) CLEAR_4(20, 21, 22, 23) CLEAR_4(24, 25, 26, 27)
                         CLEAR_4(28, 29, 30, 31)::"r"(operands)
                     : ALL_ZMM); /* what earlier code left might be slow floats */
    switch (c) {
    case CEILING_VNNI: LOOP(EIGHT(VNNI), ALL_ZMM); return N_BODIES * 16. * 64;
    case CEILING_W4A4: LOOP(EIGHT(W4A4), ALL_ZMM); return N_BODIES * 8. * 256;
    case CEILING_BF16: LOOP(EIGHT(BF16), ALL_ZMM); return N_BODIES * 64. * 32;
    default: LOOP(EIGHT(W4A16), ALL_ZMM); return N_BODIES * 8. * 256;
    }
}

__attribute__((target("avx2,fma"))) static double sample_ymm(enum ceiling c) {
    __asm__ volatile("vzeroall\n" ::"r"(operands) : ALL_YMM);
    if (c == CEILING_AVX2_W4A4) {
        LOOP(AVX2_W4A4(0) AVX2_W4A4(1) AVX2_W4A4(2) AVX2_W4A4(3), ALL_YMM);
        return N_BODIES * 4. * 128;
    }
    LOOP(FMA(0) FMA(1) FMA(2) FMA(3) FMA(4) FMA(5) FMA(6) FMA(7) FMA(8) FMA(9) FMA(10) FMA(11), ALL_YMM);
    return N_BODIES * 12. * 8;
}

double ceiling_sample(enum ceiling c) {
    return c <= CEILING_W4A16 ? sample_zmm(c) : sample_ymm(c);
}

bool ceiling_supported(enum ceiling c) {
    __builtin_cpu_init();
    switch (c) {
    case CEILING_VNNI:
    case CEILING_W4A4: return __builtin_cpu_supports("avx512vnni");
    case CEILING_BF16:
    case CEILING_W4A16: return __builtin_cpu_supports("avx512bf16");
    default: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
}

__attribute__((target("avx2"))) static unsigned read_avx2(const char *data, size_t bytes) {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (size_t i = 0; i < bytes; i += 256) {
        const __m256i *p = (const __m256i *)(const void *)(data + i);
        a = _mm256_or_si256(a, _mm256_or_si256(_mm256_load_si256(p), _mm256_load_si256(p + 1)));
        b = _mm256_or_si256(b, _mm256_or_si256(_mm256_load_si256(p + 2), _mm256_load_si256(p + 3)));
        c = _mm256_or_si256(c, _mm256_or_si256(_mm256_load_si256(p + 4), _mm256_load_si256(p + 5)));
        d = _mm256_or_si256(d, _mm256_or_si256(_mm256_load_si256(p + 6), _mm256_load_si256(p + 7)));
    }
    a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
    return (unsigned)_mm256_extract_epi32(a, 0) | (unsigned)_mm256_extract_epi32(a, 7);
}
#else
double ceiling_sample(enum ceiling c) {
    (void)c;
    return 0;
}

bool ceiling_supported(enum ceiling c) {
    (void)c;
    return false;
}
#endif

const char *ceiling_name(enum ceiling c) {
    static const char *const names[N_CEILINGS] = {"vpdpbusd", "w4a4 step", "vdpbf16ps", "w4a16 step", "w4a4 step, AVX2", "fp32 FMA, AVX2"};
    return names[c];
}

unsigned read_sample(const void *data, size_t bytes) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return read_avx2(data, bytes);
#endif
    const uint64_t *p = data;
    uint64_t a = 0, b = 0;
    for (size_t i = 0; i < bytes / 8; i += 2) {
        a |= p[i];
        b |= p[i + 1];
    }
    return (unsigned)(a | b);
}
