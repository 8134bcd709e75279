/* What this machine can do at most, measured: the inner steps of the CPU kernels on registers and first-level cache alone, and reading
 * memory. Every figure a benchmark prints is also a share of one of these, measured in the same run. */
#ifndef MOE4_BENCH_CEILING_H
#define MOE4_BENCH_CEILING_H

#include <stdbool.h>
#include <stddef.h>

enum ceiling {
    CEILING_VNNI,      /* vpdpbusd */
    CEILING_W4A4,      /* 4 vpdpbusd, convert, permute, add, FMA for 16 x 16 weights and a row */
    CEILING_BF16,      /* vdpbf16ps */
    CEILING_W4A16,     /* 8 vdpbf16ps and the FMA of a block scale */
    CEILING_AVX2_W4A4, /* 4 vpmaddubsw, 3 adds, vpmaddwd, convert, multiply, FMA for 8 x 16 weights and a row */
    CEILING_AVX2_FMA,  /* fp32 FMA */
    N_CEILINGS
};

const char *ceiling_name(enum ceiling c);
/* Whether this CPU can run the step. */
bool ceiling_supported(enum ceiling c);
/* One short sample on the calling thread: multiply-adds done, about 0.2 ms of work. */
double ceiling_sample(enum ceiling c);

/* Reads all of data (64-byte aligned), a multiple of 4096 bytes. The result only keeps the loads alive. */
unsigned read_sample(const void *data, size_t bytes);

#endif
