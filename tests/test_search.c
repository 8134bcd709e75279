/* The search of block scales: the best byte of those it tries, by sums in fp64; the same bytes on every instruction set. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <string.h>

#include "quantize/block.h"
#include "random.h"

enum { ROWS = 24, COLS = 96, N = ROWS * COLS, N_BLOCKS = N / MOE4_BLOCK };
static const uint32_t isas[] = {MOE4_ISA_SCALAR, MOE4_ISA_SCALAR | MOE4_ISA_AVX2, MOE4_ISA_SCALAR | MOE4_ISA_AVX2 | MOE4_ISA_AVX512VNNI};

struct quantized {
    uint8_t codes[N / 2], scales[N_BLOCKS];
    float global;
};

static void fill(float *x, float *weight, float size, uint64_t seed) {
    uint64_t r = seed;
    for (int i = 0; i < N; i++) x[i] = size * random_normal(&r) * expf(0.3f * random_normal(&r));
    memset(x + 5 * MOE4_BLOCK, 0, MOE4_BLOCK * sizeof *x);
    for (int k = 0; k < COLS; k++) weight[k] = expf(2 * random_normal(&r));
}

static void plain(moe4_ctx *ctx, struct quantized *q, const float *x, moe4_recipe recipe) {
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.recipe = recipe;
    assert_int_equal(moe4_nvfp4_quantize(ctx, q->codes, q->scales, &q->global, NULL, x, MOE4_F32, ROWS, COLS, 0, &o), MOE4_OK);
}

/* Weighted squared error of block b under a scale byte, each element at its nearest code. */
static double error_of(const float *x, const float *weight, size_t b, double scale) {
    double sum = 0;
    for (size_t i = b * MOE4_BLOCK; i < (b + 1) * MOE4_BLOCK; i++) {
        double least = INFINITY;
        for (int code = 0; code < 16; code++) least = fmin(least, fabs(x[i] - moe4_e2m1_to_float((uint8_t)code) * scale));
        sum += least * least * (weight ? weight[i % COLS] : 1);
    }
    return sum;
}

static double error_stored(const struct quantized *q, const float *x, const float *weight, size_t b, bool divides) {
    double sum = 0, sf8 = moe4_e4m3_to_float(q->scales[b]), scale = divides ? sf8 / q->global : sf8 * q->global;
    for (size_t i = b * MOE4_BLOCK; i < (b + 1) * MOE4_BLOCK; i++) {
        double d = x[i] - moe4_e2m1_to_float(q->codes[i / 2] >> i % 2 * 4 & 15) * scale;
        sum += d * d * (weight ? weight[i % COLS] : 1);
    }
    return sum;
}

static bool can_run(uint32_t isa) {
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    moe4_ctx *ctx;
    o.isa_mask = isa;
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_OK);
    bool can = moe4_isa_mask(moe4_ctx_isa(ctx)) & (isa & MOE4_ISA_AVX512VNNI ? MOE4_ISA_AVX512VNNI
                                                   : isa & MOE4_ISA_AVX2     ? MOE4_ISA_AVX2
                                                                             : ~0u);
    moe4_ctx_destroy(ctx);
    return can;
}

static void check(moe4_ctx *ctx, moe4_recipe recipe, bool weighted, float size, uint64_t seed) {
    static float x[N], channel[COLS];
    static struct quantized before, first;
    const float *weight = weighted ? channel : NULL;
    bool divides = recipe == MOE4_RECIPE_COMPRESSED_TENSORS;
    fill(x, channel, size, seed);
    plain(ctx, &before, x, recipe);
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        struct quantized q = before;
        if (!can_run(isas[i])) continue;
        quantize_search(q.codes, q.scales, x, ROWS, COLS, q.global, divides, weight, isas[i]);
        if (i == 0) first = q;
        assert_memory_equal(q.codes, first.codes, sizeof q.codes);
        assert_memory_equal(q.scales, first.scales, sizeof q.scales);
    }
    size_t n_better = 0;
    double global = before.global;
    for (size_t b = 0; b < N_BLOCKS; b++) {
        double was = error_stored(&before, x, weight, b, divides), is = error_stored(&first, x, weight, b, divides), least = was;
        for (int byte = 1; byte < 0x7f; byte++) {
            if (byte < before.scales[b] - 2 || byte > before.scales[b] + 8) continue; /* these are tried in any case */
            double sf8 = moe4_e4m3_to_float((uint8_t)byte);
            least = fmin(least, error_of(x, weight, b, divides ? sf8 / global : sf8 * global));
        }
        assert_true(is <= least * (1 + 1e-4));
        n_better += is < was;
    }
    assert_true(n_better > N_BLOCKS / 2);
    assert_int_equal(first.scales[5], before.scales[5]); /* zeros stay */
}

static void test_best(void **state) {
    static const moe4_recipe recipes[] = {MOE4_RECIPE_MODELOPT, MOE4_RECIPE_MODELOPT_STATIC, MOE4_RECIPE_COMPRESSED_TENSORS};
    static const float sizes[] = {1, 1e-20f, 1e-30f, 1e25f};
    moe4_ctx *ctx = *state;
    for (size_t r = 0; r < 3; r++)
        for (size_t s = 0; s < 4; s++)
            for (int weighted = 0; weighted < 2; weighted++) check(ctx, recipes[r], weighted, sizes[s], 1 + r * 8 + s * 2 + weighted);
}

/* Scales that are no normal numbers: plain stays as it is. */
static void test_tiny(void **state) {
    static float x[N], channel[COLS];
    static struct quantized before, q;
    fill(x, channel, 1e-37f, 99);
    plain(*state, &before, x, MOE4_RECIPE_MODELOPT);
    q = before;
    quantize_search(q.codes, q.scales, x, ROWS, COLS, q.global, false, channel, MOE4_ISA_SCALAR);
    assert_memory_equal(&q, &before, sizeof q);
}

static int set_up(void **state) {
    moe4_ctx *ctx;
    if (moe4_ctx_create(&ctx, NULL) != MOE4_OK) return -1;
    *state = ctx;
    return 0;
}

static int tear_down(void **state) {
    moe4_ctx_destroy(*state);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_best), cmocka_unit_test(test_tiny)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
