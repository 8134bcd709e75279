#include "bench_layer.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { FILL_TASKS = 64 };

static uint64_t next_random(uint64_t *s) {
    *s ^= *s << 13;
    *s ^= *s >> 7;
    return *s ^= *s << 17;
}

void *bench_alloc(size_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 2 << 20, bytes) != 0) return NULL;
    madvise(p, bytes, MADV_HUGEPAGE);
    return p;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(const double *x, size_t n) {
    double sorted[BENCH_MAX_SAMPLES];
    memcpy(sorted, x, n * sizeof *x);
    qsort(sorted, n, sizeof *sorted, by_value);
    return n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
}

/* ---- weights ---- */

/* Random codes and block scales from 0.25 to 2. */
static void fill_task(void *arg, size_t task) {
    struct bench_layer *l = arg;
    const size_t total = 3 * l->shape.n_experts, each = l->matrix_bytes + l->scale_bytes;
    uint64_t random = 0x9e3779b97f4a7c15u * (task + 1);
    for (size_t i = total * task / FILL_TASKS; i < total * (task + 1) / FILL_TASKS; i++) {
        uint8_t *codes = l->weights + i * each;
        for (size_t at = 0; at + 8 <= l->matrix_bytes; at += 8) memcpy(codes + at, &(uint64_t){next_random(&random)}, 8);
        for (size_t at = 0; at < l->scale_bytes; at++) codes[l->matrix_bytes + at] = (uint8_t)(0x28 + (next_random(&random) >> 33) % 24);
    }
}

static moe4_weight matrix(const struct bench_layer *l, size_t i, size_t rows, size_t cols) {
    const uint8_t *codes = l->weights + i * (l->matrix_bytes + l->scale_bytes);
    return (moe4_weight){.dtype = MOE4_NVFP4,
                         .rows = rows,
                         .cols = cols,
                         .data = codes,
                         .scale = codes + l->matrix_bytes,
                         .global = 0.02f,
                         .input_scale = 0.002f};
}

int bench_layer_open(struct bench_layer *l, moe4_ctx *ctx, const struct bench_shape *shape) {
    *l = (struct bench_layer){.shape = *shape, .random = 88172645463325252u};
    l->matrix_bytes = shape->hidden * shape->intermediate / 2;
    l->scale_bytes = shape->hidden * shape->intermediate / MOE4_BLOCK;
    const size_t bytes = 3 * shape->n_experts * (l->matrix_bytes + l->scale_bytes);
    l->weights = bench_alloc(bytes);
    l->experts = calloc(shape->n_experts, sizeof *l->experts);
    if (!l->weights || !l->experts) return cli_error(CLI_BAD_DATA, "bench", "out of memory (%zu bytes)", bytes);
    for (size_t e = 0; e < shape->n_experts; e++)
        l->experts[e] = (moe4_expert){.gate = matrix(l, 3 * e, shape->intermediate, shape->hidden),
                                      .up = matrix(l, 3 * e + 1, shape->intermediate, shape->hidden),
                                      .down = matrix(l, 3 * e + 2, shape->hidden, shape->intermediate)};
    moe4_parallel_for(ctx, FILL_TASKS, fill_task, l);
    return CLI_FINE;
}

void bench_layer_close(struct bench_layer *l) {
    free(l->experts);
    free(l->weights);
}

int bench_layer_create(moe4_moe **moe_ret, moe4_ctx *ctx, const struct bench_layer *l, moe4_act act) {
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = l->shape.n_experts;
    o.top_k = l->shape.top_k;
    o.act = act;
    moe4_status status = moe4_moe_create(moe_ret, ctx, l->experts, &o);
    return status == MOE4_OK ? CLI_FINE : cli_fail(ctx, status, "bench");
}

double bench_layer_pack_bytes(const struct bench_layer *l) {
    return 6. * (double)l->shape.n_experts * (double)(l->matrix_bytes + l->scale_bytes);
}

/* ---- inputs ---- */

void bench_layer_route(struct bench_layer *l, int32_t *ids, size_t n_tokens) {
    const size_t n = l->shape.n_experts, k = l->shape.top_k;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t i = 0; i < k;) {
            const int32_t id = (int32_t)((next_random(&l->random) >> 32) * n >> 32);
            size_t j = 0;
            while (j < i && ids[t * k + j] != id) j++;
            if (j == i) ids[t * k + i++] = id;
        }
}

void bench_layer_input(struct bench_layer *l, uint16_t *x, size_t n, float *weights, size_t n_weights) {
    for (size_t i = 0; i < n; i++) x[i] = moe4_bf16_from_float((float)(int64_t)next_random(&l->random) * 0x1p-62f);
    for (size_t i = 0; i < n_weights; i++) weights[i] = 1.f / (float)l->shape.top_k;
}

double bench_layer_macs(const struct bench_layer *l, size_t n_tokens) {
    return 3. * (double)n_tokens * (double)l->shape.top_k * (double)l->shape.hidden * (double)l->shape.intermediate;
}
