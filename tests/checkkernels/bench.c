/* Rates of the kernels: rows in the first-level cache, products with weights in the second or third. */
#include <stdio.h>
#include <stdlib.h>
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
    k->glu_row(y, x, u, N, &(struct moe4_glu){MOE4_SWIGLU, 1, 0, 0});
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
    {"glu_row", swiglu},
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

/* ---- products ---- */

enum { K = 2048, COLS = 512, MOST_ROWS = 64 };

static struct {
    const struct moe4_gemm *gemm;
    struct moe4_matrix w;
    const void *rows[MOST_ROWS];
    size_t n_rows;
    void *scratch;
    float y[MOST_ROWS * COLS];
} product;

static void multiply(const struct moe4_kernels *k) {
    (void)k;
    for (size_t col = 0; col < COLS; col += MOE4_TASK_COLS)
        product.gemm->gemm(product.y + col, COLS, product.rows, product.n_rows, &product.w, col, MOE4_TASK_COLS, NULL, product.scratch);
}

static void *allocate(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p) exit(2);
    return p;
}

/* GMAC/s of a family with n_rows rows; weights of K x COLS stay in the caches. */
static double product_rate(const struct moe4_kernels *k, const struct moe4_gemm *gemm, moe4_dtype dtype, moe4_act act, size_t n_rows) {
    uint64_t random = 3;
    uint8_t *data = allocate(K * COLS * 2), *scale = allocate(K * COLS / MOE4_BLOCK);
    void *rows = allocate(n_rows * gemm->row_bytes(K)), *packed;
    const struct moe4_rounding rounding = {.act = act, .S = 500, .decode = 1.f / 500};
    for (size_t i = 0; i < K * COLS * 2; i++) data[i] = (uint8_t)(dtype == MOE4_NVFP4 ? random_u64(&random) : i % 2 ? 0x3c : i);
    for (size_t i = 0; i < K * COLS / MOE4_BLOCK; i++) scale[i] = (uint8_t)(0x20 + random_below(&random, 0x40));
    product.gemm = gemm;
    product.w.w = (moe4_weight){.dtype = dtype, .rows = COLS, .cols = K, .data = data, .scale = scale, .global = 1};
    product.w.packed = packed = allocate(gemm->packed_bytes(&product.w.w) + 1);
    product.scratch = allocate(gemm->scratch_bytes + 1);
    if (gemm->packed_bytes(&product.w.w)) gemm->pack(packed, &product.w.w, 0, COLS);
    product.n_rows = n_rows;
    for (size_t m = 0; m < n_rows; m++) {
        float factor;
        product.rows[m] = (char *)rows + m * gemm->row_bytes(K);
        gemm->pack_row(k, (char *)rows + m * gemm->row_bytes(K), &factor, x, K, &rounding);
    }
    double seconds = best(multiply, k);
    free(data);
    free(scale);
    free(rows);
    free(packed);
    free(product.scratch);
    return 1e-9 * K * COLS * (double)n_rows / seconds;
}

static void bench_products(const struct moe4_kernels *kernels, size_t n) {
    static const size_t rows[] = {1, 4, 16, 64};
    printf("\n%-34s", "GMAC/s on one core, 2048 x 512");
    for (size_t i = 0; i < n; i++) printf(" %9s", kernels[i].isa);
    printf("\n");
    for (int family = 0; family < 3; family++)
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            static const char *const names[] = {"w4a4", "w4a16", "wide bf16"};
            printf("%-9s %2zu rows%17s", names[family], rows[r], "");
            for (size_t i = 0; i < n; i++) {
                const struct moe4_kernels *k = &kernels[i];
                printf(" %9.2f", family == 0   ? product_rate(k, k->w4a4, MOE4_NVFP4, MOE4_ACT_TOKEN, rows[r])
                                 : family == 1 ? product_rate(k, k->w4a16, MOE4_NVFP4, MOE4_ACT_W4A16, rows[r])
                                               : product_rate(k, k->wide, MOE4_BF16, MOE4_ACT_BF16, rows[r]));
            }
            printf("\n");
        }
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
    bench_products(kernels, n);
}
