/* The control register of floating-point arithmetic, to set what a caller may have set. */
#ifndef MOE4_TESTS_FPU_H
#define MOE4_TESTS_FPU_H

#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
enum { FPU_FLUSH = 0x8040 }; /* flush-to-zero and denormals-are-zero */

static inline uint64_t get_fpu(void) {
    return _mm_getcsr();
}

static inline void set_fpu(uint64_t control) {
    _mm_setcsr((unsigned)control);
}
#elif defined(__aarch64__)
enum { FPU_FLUSH = 1 << 24 }; /* FZ: subnormals in and out are zeros */

static inline uint64_t get_fpu(void) {
    uint64_t control;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    return control;
}

static inline void set_fpu(uint64_t control) {
    __asm__ volatile("msr fpcr, %0" : : "r"(control));
}
#else
enum { FPU_FLUSH = 0 };

static inline uint64_t get_fpu(void) {
    return 0;
}

static inline void set_fpu(uint64_t control) {
    (void)control;
}
#endif

#endif
