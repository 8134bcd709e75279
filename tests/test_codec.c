/* The NVFP4 codec: recipes against vectors made by an independent program, errors, the caller's settings. */
#include <fenv.h>
#include <float.h>
#include <stdlib.h>

#include "bits.h"
#include "fpu.h"
#include "internal.h"
#include "random.h"
#include "vector_file.h"

/* ---- contexts: one for each ISA of this CPU ---- */

static moe4_ctx *ctxs[32];
static size_t n_ctxs;

static int make_ctxs(void **state) {
    (void)state;
    for (uint32_t bit = 1; bit; bit <<= 1) {
        moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
        o.isa_mask = bit;
        o.n_threads = 2;
        if (moe4_ctx_create(&ctxs[n_ctxs], &o) == MOE4_OK) n_ctxs++;
    }
    return n_ctxs ? 0 : -1;
}

static int drop_ctxs(void **state) {
    (void)state;
    while (n_ctxs) moe4_ctx_destroy(ctxs[--n_ctxs]);
    return 0;
}

/* ---- the vectors ---- */

static moe4_checkpoint *vectors;
static const char *const recipe_names[] = {"modelopt", "modelopt_static", "activation", "compressed_tensors", "four_over_six"};
static const char *const kinds[] = {"normal", "ties", "outliers", "gaps", "edges", "close", "subnormal", "tiny", "huge", "bits", "zeros"};

static void run_vector(moe4_ctx *ctx, const char *kind, int recipe, const char *name) {
    moe4_tensor x = vector_find(vectors, "%s.x", kind), global = vector_find(vectors, "%s.%s.%s.global", kind, recipe_names[recipe], name);
    size_t rows = x.shape[0], cols = x.shape[1];
    uint8_t *codes = malloc(rows * cols / 2), *scales = malloc(rows * cols / 16);
    float *used = malloc(rows * sizeof *used), *y = malloc(rows * cols * sizeof *y);
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.recipe = recipe < 4 ? (moe4_recipe)recipe : MOE4_RECIPE_MODELOPT;
    o.four_over_six = recipe == 4;
    o.per_row = strcmp(name, "row") == 0;
    if (strcmp(name, "given") == 0) o.global = global.data;
    uint64_t n_saturated = 99;
    assert_int_equal(moe4_nvfp4_quantize(ctx, codes, scales, used, &n_saturated, x.data, MOE4_F32, rows, cols, 0, &o), MOE4_OK);
    moe4_tensor want = vector_find(vectors, "%s.%s.%s.codes", kind, recipe_names[recipe], name);
    vector_expect(&global, used, (o.per_row ? rows : 1) * sizeof *used);
    vector_expect(&want, codes, rows * cols / 2);
    want = vector_find(vectors, "%s.%s.%s.scales", kind, recipe_names[recipe], name);
    vector_expect(&want, scales, rows * cols / 16);
    want = vector_find(vectors, "%s.%s.%s.saturated", kind, recipe_names[recipe], name);
    vector_expect(&want, &n_saturated, sizeof n_saturated);

    o.global = used;
    static const struct {
        const char *name;
        moe4_dtype dtype;
        size_t bytes;
    } outs[] = {{"f32", MOE4_F32, 4}, {"bf16", MOE4_BF16, 2}, {"f16", MOE4_F16, 2}};
    for (size_t i = 0; i < 3 && strcmp(name, "given") != 0; i++) {
        assert_int_equal(moe4_nvfp4_dequantize(ctx, y, outs[i].dtype, 0, codes, scales, rows, cols, &o), MOE4_OK);
        want = vector_find(vectors, "%s.%s.%s.y_%s", kind, recipe_names[recipe], name, outs[i].name);
        vector_expect(&want, y, rows * cols * outs[i].bytes);
    }
    free(codes);
    free(scales);
    free(used);
    free(y);
}

static void test_vectors(void **state) {
    (void)state;
    for (size_t c = 0; c < n_ctxs; c++) {
        assert_int_equal(moe4_checkpoint_open(&vectors, ctxs[c], MOE4_SOURCE_DIR "/tests/vectors/codec.safetensors"), MOE4_OK);
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++)
            for (int recipe = 0; recipe < 5; recipe++) {
                run_vector(ctxs[c], kinds[k], recipe, "tensor");
                run_vector(ctxs[c], kinds[k], recipe, "row");
                run_vector(ctxs[c], kinds[k], recipe, "given");
            }
        moe4_checkpoint_close(vectors);
    }
}

static void test_number_vectors(void **state) {
    (void)state;
    assert_int_equal(moe4_checkpoint_open(&vectors, ctxs[0], MOE4_SOURCE_DIR "/tests/vectors/codec.safetensors"), MOE4_OK);
    const float *x = vector_find(vectors, "numbers.x").data;
    const uint16_t *bf16 = vector_find(vectors, "numbers.bf16").data, *f16 = vector_find(vectors, "numbers.f16").data;
    const uint8_t *e4m3 = vector_find(vectors, "numbers.e4m3").data;
    for (size_t i = 0; i < vector_find(vectors, "numbers.x").shape[0]; i++) {
        assert_int_equal(moe4_bf16_from_float(x[i]), bf16[i]);
        assert_int_equal(moe4_f16_from_float(x[i]), f16[i]);
        assert_int_equal(moe4_e4m3_from_float(x[i]), e4m3[i]);
    }
    moe4_checkpoint_close(vectors);
}

/* ---- matrices ---- */

enum { ROWS = 37, COLS = 5008, LD = 5030 }; /* several pieces and tasks; the last of a row are short */

/* Every ISA and input type gives what the scalar one gives from the same values, with gaps between rows. */
static void test_isas_and_types_agree(void **state) {
    (void)state;
    uint64_t random = 5;
    static const moe4_dtype types[] = {MOE4_F32, MOE4_BF16, MOE4_F16};
    uint16_t *half = malloc(ROWS * LD * 2);
    float *wide = malloc(ROWS * LD * sizeof *wide);
    uint8_t *codes[2], *scales[2];
    for (int i = 0; i < 2; i++) {
        codes[i] = malloc(ROWS * COLS / 2);
        scales[i] = malloc(ROWS * COLS / 16);
    }
    for (int t = 0; t < 3; t++)
        for (int kind = 0; kind < RANDOM_KINDS; kind++) {
            random_row(&random, wide, ROWS * LD, kind);
            for (size_t i = 0; i < ROWS * LD; i++) {
                float x = wide[i];
                if (t == 1) half[i] = moe4_bf16_from_float(x), x = moe4_bf16_to_float(half[i]);
                if (t == 2) half[i] = moe4_f16_from_float(x), x = moe4_f16_to_float(half[i]);
                if (isinf(x)) half[i] = 0x3c00, x = t == 1 ? moe4_bf16_to_float(0x3c00) : 1.f;
                wide[i] = x;
            }
            for (size_t i = 0; i < ROWS * LD; i++)
                if (i % LD >= COLS) wide[i] = NAN, half[i] = 0x7fff; /* never read */
            moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
            o.recipe = (moe4_recipe)(kind % 4);
            o.per_row = kind % 2;
            float used[2][ROWS], amax[2];
            uint64_t n_saturated[2];
            moe4_ctx *scalar = ctxs[0];
            assert_int_equal(moe4_nvfp4_quantize(scalar, codes[0], scales[0], used[0], &n_saturated[0], wide, MOE4_F32, ROWS, COLS, LD, &o),
                             MOE4_OK);
            assert_int_equal(moe4_amax(scalar, &amax[0], wide, MOE4_F32, ROWS, COLS, LD), MOE4_OK);
            for (size_t c = 0; c < n_ctxs; c++) {
                const void *x = t ? (const void *)half : wide;
                assert_int_equal(
                    moe4_nvfp4_quantize(ctxs[c], codes[1], scales[1], used[1], &n_saturated[1], x, types[t], ROWS, COLS, LD, &o), MOE4_OK);
                assert_memory_equal(codes[0], codes[1], ROWS * COLS / 2);
                assert_memory_equal(scales[0], scales[1], ROWS * COLS / 16);
                assert_memory_equal(used[0], used[1], (o.per_row ? ROWS : 1) * sizeof(float));
                assert_int_equal(n_saturated[0], n_saturated[1]);
                assert_int_equal(moe4_amax(ctxs[c], &amax[1], x, types[t], ROWS, COLS, LD), MOE4_OK);
                assert_memory_equal(&amax[0], &amax[1], sizeof *amax);
            }
        }
    for (int i = 0; i < 2; i++) {
        free(codes[i]);
        free(scales[i]);
    }
    free(half);
    free(wide);
}

/* A product that fp32 rounds to a tie of bf16, from above: rounding twice would go down. */
static void test_dequantize_rounds_once(void **state) {
    (void)state;
    uint32_t tie = 0; /* 3 * m = tie + 1, where bf16 keeps 8 of these 26 bits: k * 2^18 + 2^17, k even */
    for (uint32_t k = 128; k < 160 && !tie; k += 2)
        if (((k << 18) + (1 << 17) + 1) % 3 == 0) tie = (k << 18) + (1 << 17);
    assert_true(tie != 0);
    float global = ldexpf((float)((tie + 1) / 3), -24);
    assert_true(moe4_bits(3 * global) % 65536 == 32768); /* fp32 lands on the tie */
    uint8_t codes[8] = {0x05 | 0x0d << 4}, scales[1] = {0x38};
    uint16_t y[16];
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.global = &global;
    for (size_t c = 0; c < n_ctxs; c++) {
        assert_int_equal(moe4_nvfp4_dequantize(ctxs[c], y, MOE4_BF16, 0, codes, scales, 1, 16, &o), MOE4_OK);
        assert_int_equal(y[0], (moe4_bits(3 * global) >> 16) + 1);
        assert_int_equal(y[1], 0x8000 | y[0]);
        assert_int_equal(y[2], 0);
    }
}

/* A stored scale too small for the data: every block past 464 is counted, none at 464. */
static void test_saturated(void **state) {
    (void)state;
    float x[64] = {0}, global = 1;
    uint8_t codes[32], scales[4];
    uint64_t n_saturated;
    x[0] = 464 * 6;
    x[16] = nextafterf(464 * 6, 1e9f) + 1;
    x[33] = -1e30f;
    x[48] = 448 * 6;
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.global = &global;
    for (size_t c = 0; c < n_ctxs; c++) {
        assert_int_equal(moe4_nvfp4_quantize(ctxs[c], codes, scales, NULL, &n_saturated, x, MOE4_F32, 1, 64, 0, &o), MOE4_OK);
        assert_int_equal(n_saturated, 2);
        assert_memory_equal(scales, "\x7e\x7e\x7e\x7e", 4);
    }
}

static void test_empty(void **state) {
    (void)state;
    float amax = 1, global = 0;
    uint64_t n_saturated = 1;
    moe4_ctx *ctx = ctxs[0];
    assert_int_equal(moe4_nvfp4_quantize(ctx, NULL, NULL, &global, &n_saturated, NULL, MOE4_F32, 0, 16, 0, NULL), MOE4_OK);
    assert_true(global == 1 && n_saturated == 0);
    assert_int_equal(moe4_nvfp4_quantize(ctx, NULL, NULL, NULL, NULL, NULL, MOE4_BF16, 3, 0, 0, NULL), MOE4_OK);
    assert_int_equal(moe4_amax(ctx, &amax, NULL, MOE4_F32, 0, 7, 0), MOE4_OK);
    assert_true(amax == 0);
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.global = &global;
    assert_int_equal(moe4_nvfp4_dequantize(ctx, NULL, MOE4_F32, 0, NULL, NULL, 0, 16, &o), MOE4_OK);
}

/* ---- errors: the sentence names the thing and the numbers, and nothing is written ---- */

static void expect_error(moe4_ctx *ctx, moe4_status got, moe4_status want, const char *part) {
    assert_int_equal(got, want);
    if (!strstr(moe4_ctx_error(ctx), part)) fail_msg("\"%s\" lacks \"%s\"", moe4_ctx_error(ctx), part);
}

static void test_quantize_errors(void **state) {
    (void)state;
    moe4_ctx *ctx = ctxs[n_ctxs - 1];
    float x[96], global = 1, used = 77;
    uint8_t codes[48], scales[6];
    uint64_t n_saturated = 77;
    memset(codes, 0xee, sizeof codes);
    for (int i = 0; i < 96; i++) x[i] = 1;
#define QUANTIZE(dtype, rows, cols, ld, options) \
    moe4_nvfp4_quantize(ctx, codes, scales, &used, &n_saturated, x, dtype, rows, cols, ld, options)
    expect_error(ctx, QUANTIZE(MOE4_F32, 2, 24, 0, NULL), MOE4_ERROR_ARGUMENT, "cols: 24, need a multiple of 16");
    expect_error(ctx, QUANTIZE(MOE4_F64, 2, 16, 0, NULL), MOE4_ERROR_ARGUMENT, "x: dtype");
    expect_error(ctx, QUANTIZE(MOE4_F32, 2, 32, 31, NULL), MOE4_ERROR_ARGUMENT, "leading dimension 31, need at least 32");
    expect_error(ctx, QUANTIZE(MOE4_F32, SIZE_MAX / 16, 32, 0, NULL), MOE4_ERROR_ARGUMENT, "do not fit");
    expect_error(ctx, moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, NULL, MOE4_F32, 1, 16, 0, NULL), MOE4_ERROR_ARGUMENT,
                 "x is NULL");
    expect_error(ctx, moe4_nvfp4_quantize(ctx, NULL, scales, NULL, NULL, x, MOE4_F32, 1, 16, 0, NULL), MOE4_ERROR_ARGUMENT,
                 "codes is NULL");
    expect_error(ctx, moe4_nvfp4_quantize(ctx, codes, NULL, NULL, NULL, x, MOE4_F32, 1, 16, 0, NULL), MOE4_ERROR_ARGUMENT,
                 "scales is NULL");
    x[48 + 37] = -NAN;
    expect_error(ctx, QUANTIZE(MOE4_F32, 2, 48, 0, NULL), MOE4_ERROR_FORMAT, "row 1 column 37 is NaN");
    x[5] = INFINITY;
    expect_error(ctx, QUANTIZE(MOE4_F32, 2, 48, 0, NULL), MOE4_ERROR_FORMAT, "row 0 column 5 is infinite");
    x[5] = x[48 + 37] = 1;

    static const float bad[] = {0, -1, NAN, INFINITY};
    for (int i = 0; i < 4; i++) {
        moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
        o.global = &bad[i];
        expect_error(ctx, QUANTIZE(MOE4_F32, 1, 16, 0, &o), MOE4_ERROR_ARGUMENT, "options.global[0]");
    }
    const float two[] = {1, -2};
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.global = two;
    o.per_row = 1;
    expect_error(ctx, QUANTIZE(MOE4_F32, 2, 16, 0, &o), MOE4_ERROR_ARGUMENT, "options.global[1]: -2");
    o = (moe4_quantize_options)MOE4_QUANTIZE_OPTIONS_INIT;
    o.global = &global;
    global = 0x1p-130f;
    o.recipe = MOE4_RECIPE_ACTIVATION;
    expect_error(ctx, QUANTIZE(MOE4_F32, 1, 16, 0, &o), MOE4_ERROR_ARGUMENT, "not finite");
    global = FLT_MAX;
    o.recipe = MOE4_RECIPE_MODELOPT_STATIC;
    expect_error(ctx, QUANTIZE(MOE4_F32, 1, 16, 0, &o), MOE4_ERROR_ARGUMENT, "not finite");
    o.four_over_six = 1;
    expect_error(ctx, QUANTIZE(MOE4_F32, 1, 16, 0, &o), MOE4_ERROR_ARGUMENT, "four_over_six");
    o.four_over_six = 0;
    o.recipe = (moe4_recipe)9;
    expect_error(ctx, QUANTIZE(MOE4_F32, 1, 16, 0, &o), MOE4_ERROR_ARGUMENT, "recipe: 9");
    o.struct_size = 3;
    expect_error(ctx, QUANTIZE(MOE4_F32, 1, 16, 0, &o), MOE4_ERROR_ARGUMENT, "struct_size");
#undef QUANTIZE
    for (size_t i = 0; i < sizeof codes; i++) assert_int_equal(codes[i], 0xee);
    assert_true(used == 77 && n_saturated == 77);
}

static void test_dequantize_errors(void **state) {
    (void)state;
    moe4_ctx *ctx = ctxs[n_ctxs - 1];
    float y[64], global = 1;
    uint8_t codes[32] = {0}, scales[4] = {0x38, 0x38, 0x38, 0x38};
    for (int i = 0; i < 64; i++) y[i] = 77;
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
#define DEQUANTIZE(cols, ld) moe4_nvfp4_dequantize(ctx, y, MOE4_F32, ld, codes, scales, 2, cols, &o)
    expect_error(ctx, DEQUANTIZE(32, 0), MOE4_ERROR_ARGUMENT, "options.global is NULL");
    o.global = &global;
    expect_error(ctx, DEQUANTIZE(40, 0), MOE4_ERROR_ARGUMENT, "cols: 40");
    expect_error(ctx, DEQUANTIZE(32, 16), MOE4_ERROR_ARGUMENT, "y: leading dimension 16, need at least 32");
    expect_error(ctx, moe4_nvfp4_dequantize(ctx, NULL, MOE4_F32, 0, codes, scales, 2, 32, &o), MOE4_ERROR_ARGUMENT, "y is NULL");
    expect_error(ctx, moe4_nvfp4_dequantize(ctx, y, MOE4_F32, 0, codes, NULL, 2, 32, &o), MOE4_ERROR_ARGUMENT, "scales is NULL");
    scales[3] = 0x7f;
    expect_error(ctx, DEQUANTIZE(32, 0), MOE4_ERROR_FORMAT, "row 1 block 1 is 0x7f, a NaN");
    scales[1] = 0x80;
    expect_error(ctx, DEQUANTIZE(32, 0), MOE4_ERROR_FORMAT, "row 0 block 1 is 0x80, signed");
#undef DEQUANTIZE
    const moe4_weight w = {.dtype = MOE4_NVFP4, .rows = 2, .cols = 32, .data = codes, .scale = scales, .global = 1};
    expect_error(ctx, moe4_weight_values(ctx, y, &w, 1, 1), MOE4_ERROR_FORMAT, "row 1 block 1 is 0x7f, a NaN"); /* not row 0 of 1 */
    for (int i = 0; i < 64; i++) assert_true(y[i] == 77);
    expect_error(ctx, moe4_amax(ctx, NULL, y, MOE4_F32, 1, 16, 0), MOE4_ERROR_ARGUMENT, "amax_ret");
    expect_error(ctx, moe4_amax(ctx, y, y, MOE4_I8, 1, 16, 0), MOE4_ERROR_ARGUMENT, "dtype");
}

static void test_amax(void **state) {
    (void)state;
    for (size_t c = 0; c < n_ctxs; c++) {
        float x[5][7] = {{0}}, amax;
        x[3][6] = -3;
        assert_int_equal(moe4_amax(ctxs[c], &amax, x, MOE4_F32, 5, 7, 0), MOE4_OK);
        assert_true(amax == 3);
        assert_int_equal(moe4_amax(ctxs[c], &amax, x, MOE4_F32, 5, 6, 7), MOE4_OK);
        assert_true(amax == 0);
        x[0][0] = -INFINITY;
        assert_int_equal(moe4_amax(ctxs[c], &amax, x, MOE4_F32, 5, 7, 0), MOE4_OK);
        assert_true(isinf(amax));
        x[4][1] = NAN;
        assert_int_equal(moe4_amax(ctxs[c], &amax, x, MOE4_F32, 5, 7, 0), MOE4_OK);
        assert_true(isnan(amax));
    }
}

/* Flush-to-zero, denormals-are-zero and a rounding mode of the caller, set before the workers are made and at the call. */
static void test_callers_settings(void **state) {
    (void)state;
    uint64_t random = 7;
    enum { N = 1 << 18 };
    float *x = malloc(N * sizeof *x), *y[2];
    uint8_t *codes[2], *scales[2];
    for (int i = 0; i < 2; i++) {
        y[i] = malloc(N * sizeof **y);
        codes[i] = malloc(N / 2);
        scales[i] = malloc(N / 16);
    }
    random_row(&random, x, N, 3);
    for (size_t c = 0; c < n_ctxs; c++)
        for (int set = 0; set < 2; set++) {
            moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
            moe4_ctx_options co = MOE4_CTX_OPTIONS_INIT;
            moe4_ctx *ctx;
            float global;
            co.isa_mask = moe4_isa_mask(moe4_ctx_isa(ctxs[c]));
            co.n_threads = 3;
            const uint64_t saved = get_fpu();
            if (set) set_fpu(saved | FPU_FLUSH);
            if (set) fesetround(FE_UPWARD);
            assert_int_equal(moe4_ctx_create(&ctx, &co), MOE4_OK);
            assert_int_equal(moe4_nvfp4_quantize(ctx, codes[set], scales[set], &global, NULL, x, MOE4_F32, 64, N / 64, 0, &o), MOE4_OK);
            o.global = &global;
            assert_int_equal(moe4_nvfp4_dequantize(ctx, y[set], MOE4_F32, 0, codes[set], scales[set], 64, N / 64, &o), MOE4_OK);
            assert_int_equal(fegetround(), set ? FE_UPWARD : FE_TONEAREST);
            fesetround(FE_TONEAREST);
            assert_int_equal(get_fpu() & FPU_FLUSH, (set ? FPU_FLUSH : saved) & FPU_FLUSH);
            set_fpu(saved);
            moe4_ctx_destroy(ctx);
            if (!set) continue;
            assert_memory_equal(codes[0], codes[1], N / 2);
            assert_memory_equal(scales[0], scales[1], N / 16);
            assert_memory_equal(y[0], y[1], N * sizeof **y);
        }
    bool any = false;
    for (size_t i = 0; i < N; i++) any |= y[0][i] != 0;
    assert_true(any); /* subnormals survived */
    for (int i = 0; i < 2; i++) {
        free(y[i]);
        free(codes[i]);
        free(scales[i]);
    }
    free(x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_vectors),
        cmocka_unit_test(test_number_vectors),
        cmocka_unit_test(test_isas_and_types_agree),
        cmocka_unit_test(test_dequantize_rounds_once),
        cmocka_unit_test(test_saturated),
        cmocka_unit_test(test_empty),
        cmocka_unit_test(test_quantize_errors),
        cmocka_unit_test(test_dequantize_errors),
        cmocka_unit_test(test_amax),
        cmocka_unit_test(test_callers_settings),
    };
    return cmocka_run_group_tests(tests, make_ctxs, drop_ctxs);
}
