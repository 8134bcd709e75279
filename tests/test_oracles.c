/* The codec against the packages whose recipes it follows: their own results on the rows of codec.safetensors, byte by byte. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "vector_file.h"

static moe4_checkpoint *rows_file, *oracles;

/* x / (scale) that underflows to -0 has no sign for the packages, which look at it after dividing; ours is x's. */
static void drop_signs_of_zeros(uint8_t *codes, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        for (int nibble = 0; nibble < 8; nibble += 4)
            if ((codes[i] >> nibble & 15) == 8) codes[i] &= (uint8_t) ~(8 << nibble);
}

static void compare(moe4_ctx *ctx, const char *kind, const char *recipe_name, moe4_recipe recipe, int per_row) {
    const char *name = per_row ? "row" : "tensor";
    moe4_tensor x = vector_find(rows_file, "%s.x", kind), global = vector_find(oracles, "%s.%s.%s.global", kind, recipe_name, name);
    moe4_tensor want_codes = vector_find(oracles, "%s.%s.%s.codes", kind, recipe_name, name);
    moe4_tensor want_scales = vector_find(oracles, "%s.%s.%s.scales", kind, recipe_name, name);
    size_t rows = x.shape[0], cols = x.shape[1], n_globals = per_row ? rows : 1;
    uint8_t *codes = malloc(rows * cols / 2), *scales = malloc(rows * cols / 16), *want = malloc(rows * cols / 2);
    float *used = malloc(rows * sizeof *used);
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.recipe = recipe;
    o.per_row = per_row;
    assert_int_equal(moe4_nvfp4_quantize(ctx, codes, scales, used, NULL, x.data, MOE4_F32, rows, cols, 0, &o), MOE4_OK);
    if (recipe == MOE4_RECIPE_COMPRESSED_TENSORS) {
        /* 2688 * (1 / amax), rounded twice, for our 2688 / amax: a unit in the last place apart, more where 1 / amax is subnormal */
        for (size_t i = 0; i < n_globals; i++)
            if (!(fabsf(used[i] / ((const float *)global.data)[i] - 1) <= 0x1p-20f)) fail_msg("%s: %g", global.name, used[i]);
        o.global = global.data;
        assert_int_equal(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x.data, MOE4_F32, rows, cols, 0, &o), MOE4_OK);
    } else {
        vector_expect(&global, used, n_globals * sizeof *used);
    }
    vector_expect(&want_scales, scales, rows * cols / 16);
    if (strcmp(kind, "bits") == 0) {
        memcpy(want, want_codes.data, rows * cols / 2);
        drop_signs_of_zeros(want, rows * cols / 2);
        drop_signs_of_zeros(codes, rows * cols / 2);
        want_codes.data = want;
    }
    vector_expect(&want_codes, codes, rows * cols / 2);
    free(codes), free(scales), free(want), free(used);
}

/* tests/vectors/make_oracle_vectors.py says why some kinds are left out. */
static const char *const modelopt_kinds[] = {"normal", "ties", "outliers", "gaps", "edges", "close", "subnormal", "huge", "bits"};
static const char *const compressed_kinds[] = {"normal", "ties", "outliers", "gaps", "edges", "close", "huge", "bits", "zeros"};

static void test_packages(void **state) {
    (void)state;
    size_t n_isas = 0;
    for (uint32_t bit = 1; bit; bit <<= 1) {
        moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
        o.isa_mask = bit;
        o.n_threads = 1;
        moe4_ctx *ctx;
        if (moe4_ctx_create(&ctx, &o) != MOE4_OK) continue;
        assert_int_equal(moe4_checkpoint_open(&rows_file, ctx, MOE4_SOURCE_DIR "/tests/vectors/codec.safetensors"), MOE4_OK);
        assert_int_equal(moe4_checkpoint_open(&oracles, ctx, MOE4_SOURCE_DIR "/tests/vectors/oracles.safetensors"), MOE4_OK);
        for (int per_row = 0; per_row < 2; per_row++)
            for (size_t k = 0; k < 9; k++) {
                compare(ctx, modelopt_kinds[k], "modelopt", MOE4_RECIPE_MODELOPT, per_row);
                compare(ctx, modelopt_kinds[k], "modelopt_static", MOE4_RECIPE_MODELOPT_STATIC, per_row);
                compare(ctx, compressed_kinds[k], "compressed_tensors", MOE4_RECIPE_COMPRESSED_TENSORS, per_row);
            }
        moe4_checkpoint_close(rows_file);
        moe4_checkpoint_close(oracles);
        moe4_ctx_destroy(ctx);
        n_isas++;
    }
    assert_true(n_isas > 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_packages)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
