/* The floating-point environment of a call. Bits are promised whatever the caller has set: rounding mode, flush-to-zero,
 * denormals-are-zero, unmasked exceptions. So each public entry that computes saves the caller's control register, sets the default and
 * restores it on the way out, which also leaves the caller's exception flags as they were. A new thread inherits its creator's register,
 * so the pool's workers set the default once, at their start.
 *
 * The compiler knows nothing of the register: put calls between enter and leave, not arithmetic. */
#ifndef MOE4_FPENV_H
#define MOE4_FPENV_H

#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

struct moe4_fpenv {
    uint64_t control;
};

static inline struct moe4_fpenv moe4_fpenv_enter(void) {
    struct moe4_fpenv saved = {0};
#if defined(__x86_64__)
    saved.control = _mm_getcsr();
    _mm_setcsr(0x1f80); /* to nearest, every exception masked, no flush-to-zero, no denormals-are-zero */
#elif defined(__aarch64__)
    uint64_t standard = 0;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved.control));
    __asm__ volatile("msr fpcr, %0" : : "r"(standard));
#endif
    return saved;
}

static inline void moe4_fpenv_leave(struct moe4_fpenv saved) {
#if defined(__x86_64__)
    _mm_setcsr((unsigned)saved.control);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(saved.control));
#else
    (void)saved;
#endif
}

#endif
