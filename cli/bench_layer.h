/* The layer that bench times: random weights, inputs and routing. */
#ifndef MOE4_CLI_BENCH_LAYER_H
#define MOE4_CLI_BENCH_LAYER_H

#include "bench.h"

struct bench_layer {
    struct bench_shape shape;
    size_t matrix_bytes, scale_bytes; /* of codes and scales; gate, up and down are alike in both */
    uint8_t *weights;                 /* [n_experts][3] codes, then scales */
    moe4_expert *experts;
    uint64_t random;
};

/* Makes the weights with ctx's threads; errors are printed. Close it either way. */
int bench_layer_open(struct bench_layer *layer, moe4_ctx *ctx, const struct bench_shape *shape);
void bench_layer_close(struct bench_layer *layer);
/* The layer in a context; making it reads and writes pack_bytes. */
int bench_layer_create(moe4_moe **moe_ret, moe4_ctx *ctx, const struct bench_layer *layer, moe4_act act);
double bench_layer_pack_bytes(const struct bench_layer *layer);

/* ids [n_tokens, top_k]: each token picks distinct experts, uniformly. */
void bench_layer_route(struct bench_layer *layer, int32_t *ids, size_t n_tokens);
/* x [n] in bf16, weights [n_weights] that sum to 1 over a token. */
void bench_layer_input(struct bench_layer *layer, uint16_t *x, size_t n, float *weights, size_t n_weights);
/* Multiply-adds of n_tokens. */
double bench_layer_macs(const struct bench_layer *layer, size_t n_tokens);

/* On huge pages where there are any; NULL when there is no memory. */
void *bench_alloc(size_t bytes);
double bench_median(const double *x, size_t n);

#endif
