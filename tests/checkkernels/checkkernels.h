/* checkkernels: every kernel of every ISA this CPU has, against the scalar one or fp64, between guard pages. */
#ifndef CHECKKERNELS_H
#define CHECKKERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/kernels.h"
#include "internal.h"
#include "random.h"

/* Where a buffer lies: its end, or its beginning, at a page that faults. */
enum side { AT_END, AT_START };
enum { N_SIDES = 2 };

/* `bytes` bytes at a guard page; the rest of its pages holds a pattern. */
void *guarded(size_t bytes, enum side side);
/* Frees all of them; false when one's surroundings were written to. */
bool guarded_release(void);

/* One ISA under test. */
struct check {
    const struct moe4_kernels *k, *scalar;
    uint64_t random;
    size_t n_failed;
};

/* Prints "isa kernel what: ok" or the failure, and counts it. */
void check_line(struct check *c, const char *kernel, const char *what, bool ok);
bool same_bytes(const void *a, const void *b, size_t bytes);

void check_codec(struct check *c);
void check_gemm(struct check *c);
void check_pack(struct check *c);

/* A table of rates, one column for each of the n ISAs. */
void bench(const struct moe4_kernels *kernels, size_t n);

#endif
