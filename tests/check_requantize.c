/* Quantizes the BF16, F16 or F32 matrices of a model again, each with the weight_scale_2 that its NVFP4 version stores, and compares all
 * codes and block scales with what the NVFP4 version has.
 * Usage: check_requantize MODEL NVFP4_MODEL. Exit status: 0 all the same, 1 some differ or nothing was compared, 2 cannot be read. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe4.h"

struct counts {
    size_t matrices, differing_matrices, alone;
    uint64_t bytes, differing;
};

static moe4_ctx *ctx;

static void give_up(const char *what) {
    fprintf(stderr, "check_requantize: %s: %s\n", what, ctx ? moe4_ctx_error(ctx) : "no context");
    exit(2);
}

static uint64_t differing(const uint8_t *a, const void *b, size_t n) {
    const uint8_t *other = b;
    uint64_t count = 0;
    for (size_t i = 0; i < n; i++) count += a[i] != other[i];
    return count;
}

static void compare(struct counts *c, const moe4_tensor *wide, const moe4_weight *nvfp4) {
    size_t rows = wide->shape[0], cols = wide->shape[1], n_codes = rows * cols / 2, n_scales = rows * cols / MOE4_BLOCK;
    if (nvfp4->rows != rows || nvfp4->cols != cols) {
        printf("%s: %zu x %zu, in NVFP4 %zu x %zu\n", wide->name, rows, cols, nvfp4->rows, nvfp4->cols);
        c->differing_matrices++;
        return;
    }
    uint8_t *codes = malloc(n_codes), *scales = malloc(n_scales);
    void *x = malloc(wide->bytes); /* aligned */
    if (!codes || !scales || !x) give_up("out of memory");
    memcpy(x, wide->data, wide->bytes);
    moe4_quantize_options options = MOE4_QUANTIZE_OPTIONS_INIT;
    options.global = &nvfp4->global;
    if (moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, wide->dtype, rows, cols, 0, &options) != MOE4_OK) give_up(wide->name);
    uint64_t n = differing(codes, nvfp4->data, n_codes) + differing(scales, nvfp4->scale, n_scales);
    if (n) printf("%s: %llu of %zu bytes differ\n", wide->name, (unsigned long long)n, n_codes + n_scales);
    c->matrices++;
    c->differing_matrices += n != 0;
    c->bytes += n_codes + n_scales;
    c->differing += n;
    free(codes);
    free(scales);
    free(x);
}

/* True when `module` is an NVFP4 matrix of the checkpoint. */
static int find_nvfp4(const moe4_checkpoint *ckpt, moe4_weight *weight, const char *module) {
    return moe4_checkpoint_weight(ckpt, weight, module) == MOE4_OK && weight->dtype == MOE4_NVFP4;
}

int main(int argc, char **argv) {
    struct counts c = {0};
    moe4_checkpoint *wide, *quantized;
    if (argc != 3) {
        fprintf(stderr, "usage: check_requantize MODEL NVFP4_MODEL\n");
        return 2;
    }
    if (moe4_ctx_create(&ctx, NULL) != MOE4_OK) give_up("context");
    if (moe4_checkpoint_open(&wide, ctx, argv[1]) != MOE4_OK) give_up(argv[1]);
    if (moe4_checkpoint_open(&quantized, ctx, argv[2]) != MOE4_OK) give_up(argv[2]);
    for (size_t i = 0; i < moe4_checkpoint_n_tensors(wide); i++) {
        moe4_tensor t;
        moe4_weight w;
        char module[512];
        if (moe4_checkpoint_tensor(wide, &t, i) != MOE4_OK) give_up(argv[1]);
        size_t length = strlen(t.name);
        if (t.n_dims != 2 || length < 8 || length >= sizeof module || strcmp(t.name + length - 7, ".weight") != 0) continue;
        memcpy(module, t.name, length - 7);
        module[length - 7] = '\0';
        if (find_nvfp4(quantized, &w, module))
            compare(&c, &t, &w);
        else
            c.alone++;
    }
    printf("%zu matrices, %llu bytes of codes and scales: %llu differ, in %zu matrices (%zu matrices are not NVFP4 there)\n", c.matrices,
           (unsigned long long)c.bytes, (unsigned long long)c.differing, c.differing_matrices, c.alone);
    moe4_checkpoint_close(wide);
    moe4_checkpoint_close(quantized);
    moe4_ctx_destroy(ctx);
    return c.matrices && !c.differing_matrices ? 0 : 1;
}
