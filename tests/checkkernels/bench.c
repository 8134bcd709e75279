/* Rates of the row kernels on data in the first-level cache. */
#include <stdio.h>
#include <time.h>

#include "checkkernels.h"

enum { N = 2048 };

static _Alignas(64) float x[N], u[N], y[N];
static _Alignas(64) uint16_t half[N];
static uint8_t codes[N / 2], scales[N / 16];

static void widen(const struct moe4_kernels *k) {
    k->widen_row(y, half, MOE4_BF16, N);
}
static void narrow(const struct moe4_kernels *k) {
    k->narrow_row(half, MOE4_BF16, x, N);
}
static void amax(const struct moe4_kernels *k) {
    y[0] = k->amax_row(x, N);
}
static void quantize(const struct moe4_kernels *k, moe4_recipe recipe, int four_over_six, float global) {
    const struct moe4_quantizer z = {.recipe = recipe, .four_over_six = four_over_six, .global = global, .amax = 6};
    k->quantize_row(codes, scales, x, N, &z);
}
static void modelopt(const struct moe4_kernels *k) {
    quantize(k, MOE4_RECIPE_MODELOPT, 0, 0.002f);
}
static void four_over_six(const struct moe4_kernels *k) {
    quantize(k, MOE4_RECIPE_MODELOPT, 1, 0.003f);
}
static void modelopt_static(const struct moe4_kernels *k) {
    quantize(k, MOE4_RECIPE_MODELOPT_STATIC, 0, 0.002f);
}
static void activation(const struct moe4_kernels *k) {
    quantize(k, MOE4_RECIPE_ACTIVATION, 0, 500.f);
}
static void compressed_tensors(const struct moe4_kernels *k) {
    quantize(k, MOE4_RECIPE_COMPRESSED_TENSORS, 0, 500.f);
}
static void dequant(const struct moe4_kernels *k) {
    k->dequant_row(y, codes, scales, N, 0.5f);
}
static void swiglu(const struct moe4_kernels *k) {
    k->swiglu_row(y, x, u, N, 0.f);
}

static const struct {
    const char *name;
    void (*run)(const struct moe4_kernels *k);
} benches[] = {
    {"widen_row bf16", widen},
    {"narrow_row bf16", narrow},
    {"amax_row", amax},
    {"quantize_row activation", activation},
    {"quantize_row modelopt", modelopt},
    {"quantize_row four over six", four_over_six},
    {"quantize_row modelopt_static", modelopt_static},
    {"quantize_row compressed_tensors", compressed_tensors},
    {"dequant_row", dequant},
    {"swiglu_row", swiglu},
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Seconds a call, the best of several spans of about 10 ms. */
static double best(void (*run)(const struct moe4_kernels *k), const struct moe4_kernels *k) {
    size_t n = 1;
    double least = 0;
    for (int span = 0; span < 8;) {
        double start = now();
        for (size_t i = 0; i < n; i++) run(k);
        double took = now() - start;
        if (took < 0.01) {
            n *= 2;
            continue;
        }
        if (span++ == 0 || took / (double)n < least) least = took / (double)n;
    }
    return least;
}

void bench(const struct moe4_kernels *kernels, size_t n) {
    uint64_t random = 1;
    random_row(&random, x, N, 0);
    random_row(&random, u, N, 0);
    printf("%-34s", "GB/s of fp32 on one core");
    for (size_t i = 0; i < n; i++) printf(" %9s", kernels[i].isa);
    printf("\n");
    for (size_t b = 0; b < sizeof benches / sizeof *benches; b++) {
        printf("%-34s", benches[b].name);
        for (size_t i = 0; i < n; i++) printf(" %9.2f", N * sizeof *x / best(benches[b].run, &kernels[i]) * 1e-9);
        printf("\n");
    }
}
