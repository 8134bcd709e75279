/* Timing a synthetic layer beside what the machine can do at most: read memory, run a product's inner step. */
#ifndef MOE4_CLI_BENCH_H
#define MOE4_CLI_BENCH_H

#include "cli.h"

enum { BENCH_MAX_SAMPLES = 400 };

struct bench_shape {
    const char *name;
    size_t hidden, intermediate, n_experts, top_k;
};

/* What is timed of a forward; all but the layer come from its report. */
enum bench_what { BENCH_LAYER, BENCH_PRODUCTS, BENCH_GATE_UP, BENCH_DOWN, BENCH_DISPATCH, BENCH_QUANTIZE, BENCH_COMBINE, N_BENCH_WHATS };
const char *bench_what_name(enum bench_what what);

/* Medians over the samples of one token count; a floor needs no less time, so share <= 1 but for noise. */
struct bench_figure {
    double seconds, best_seconds;
    double floor_seconds; /* max(bytes / read bandwidth, multiply-adds / ceiling); 0: this part has none */
    double share;         /* floor / time, the median over samples */
    bool by_memory;       /* which of the two the floor is */
};

struct bench_result {
    size_t n_threads, n_tokens, n_samples;
    const char *kernels;             /* that ran the products */
    double macs, bytes;              /* of the layer; bytes of the experts hit, the median */
    double read_bytes, ceiling_macs; /* a second, medians; ceiling_macs 0: this ISA's step is not known */
    double speedup;                  /* the layer's rate over that of the first thread count: the median over samples */
    struct bench_figure figure[N_BENCH_WHATS];
};

/* Packing, in bytes read and written a second, and the read bandwidth beside it. */
struct bench_pack {
    double fresh;       /* moe4_moe_create: into memory that the system has to find and clear */
    double pages;       /* memory that the system finds and clears for as many threads, the best of a few; 0: not known */
    double again, read; /* the CPU's packing into memory that is there: moe4_moe_replace_expert of all experts. Medians; 0: not known */
};

/* A layer of random weights, one context for each thread count. */
struct bench;
/* Errors are printed; returns an exit status. With cpu_time, times are the calling thread's CPU time, so that other processes disturb less;
 * for one thread alone, as more of them use the CPU while they wait too. `packs` [n_contexts]. */
int bench_open(struct bench **bench_ret, const struct bench_shape *shape, moe4_act act, const size_t *n_threads, size_t n_contexts,
               const char *isa, bool cpu_time, struct bench_pack *packs);
void bench_close(struct bench *bench);
/* The context's ISA ("avx2"), and the step that bounds its products or NULL. */
const char *bench_isa(const struct bench *bench);
const char *bench_step(const struct bench *bench);
moe4_act bench_act(const struct bench *bench);
/* Samples all contexts in turn for about `seconds`; results [n_contexts]. */
int bench_measure(struct bench *bench, struct bench_result *results, size_t n_tokens, double seconds);

/* The same on a device (bench_device.c). A sample is many calls queued one behind the other, with BENCH_ROUTINGS routings and inputs in
 * turn, by the clock until the last is done; only the layer's figure means something. */
enum { BENCH_ROUTINGS = 8 };
struct bench_device;
int bench_device_open(struct bench_device **bench_ret, const struct bench_shape *shape, moe4_act act, const struct cli_common *common,
                      double *pack_rate);
void bench_device_close(struct bench_device *bench);
/* "cuda:0"; "NVIDIA H200"; the product that bounds arithmetic, or NULL where it is not known; the mode. */
const char *bench_device_where(const struct bench_device *bench);
const char *bench_device_name(const struct bench_device *bench);
const char *bench_device_step(const struct bench_device *bench);
moe4_act bench_device_act(const struct bench_device *bench);
/* What a routing's experts ran, an expert a line where slots differ: to be called after a measurement, of its last routing. */
void bench_device_explain(const struct bench_device *bench);
/* Ceilings first, then samples for about `seconds`. */
int bench_device_measure(struct bench_device *bench, struct bench_result *result, size_t n_tokens, double seconds);

#endif
