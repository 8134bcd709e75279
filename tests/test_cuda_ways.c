/* Which linears a device decodes for cuBLAS, from how many rows on, and what it launches then: with launchers that only look at what they
 * are given, so that no device is needed. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "cuda/cublas.h"
#include "cuda/linear.h"
#include "cuda/nvfp4_layout.h"

#define WORKSPACE ((char *)(((uintptr_t)1 << 30) + 64)) /* as a caller may align it; cuBLAS' own must be a multiple of 256 */
#define BLAS_WORKSPACE (WORKSPACE + 192)
#define PACKED ((const uint8_t *)((uintptr_t)1 << 40))
#define X ((char *)((uintptr_t)1 << 41))
#define Y(i) ((char *)((uintptr_t)(2 + (i)) << 42))

static struct {
    size_t matrix, row; /* the one that is multiplied, and its next row */
    int decoded;        /* rows that stand in the workspace */
    size_t settled;
} seen;
static const moe4_linear *given;
static struct moe4_cuda_linear *prepared;

moe4_status moe4_cuda_check(const moe4_ctx *ctx, cudaError_t error, const char *what) {
    (void)ctx, (void)what;
    return error == cudaSuccess ? MOE4_OK : MOE4_ERROR_DEVICE;
}
moe4_status moe4_fail(const moe4_ctx *ctx, moe4_status status, const char *fmt, ...) {
    (void)ctx, (void)fmt;
    return status;
}

cudaError_t moe4_cuda_unpack(moe4_bf16 *values, const uint8_t *packed, int rows, int cols, int interleave, cudaStream_t stream) {
    (void)stream;
    size_t bytes = (size_t)rows * (size_t)cols * sizeof *values;
    assert_ptr_equal(values, BLAS_WORKSPACE + MOE4_CUBLAS_WORKSPACE);
    assert_true((size_t)((char *)values - WORKSPACE) + bytes <= moe4_cuda_decoded_bytes(given));
    assert_int_equal(cols, given->cols);
    assert_int_equal(interleave, 0);
    assert_int_equal(seen.row % MOE4_UNIT_ROWS, 0);
    assert_ptr_equal(packed, PACKED + ((size_t)seen.matrix << 36) +
                                 seen.row / MOE4_UNIT_ROWS * ((given->cols + MOE4_UNIT_K - 1) / MOE4_UNIT_K) * MOE4_UNIT_BYTES);
    seen.decoded = rows;
    return cudaSuccess;
}

int moe4_cublas_product(struct moe4_cublas *blas, const struct moe4_cublas_call *c) {
    const moe4_weight *w = &given->weight[seen.matrix];
    size_t y_bytes = given->o.y_dtype == MOE4_F32 ? 4 : 2;
    assert_ptr_equal(blas, prepared->blas);
    assert_ptr_equal(c->y, Y(seen.matrix) + seen.row * y_bytes);
    assert_int_equal(c->y_type, given->o.y_dtype == MOE4_F32 ? CUDA_R_32F : CUDA_R_16BF);
    assert_int_equal(c->y_ld, w->rows);
    assert_ptr_equal(c->x, X);
    assert_int_equal(c->x_ld, given->o.x_ld);
    assert_ptr_equal(c->w, BLAS_WORKSPACE + MOE4_CUBLAS_WORKSPACE);
    assert_ptr_equal(c->workspace, BLAS_WORKSPACE);
    assert_true(fabsf(c->alpha - w->global) == 0);
    assert_int_equal(c->N, seen.decoded);
    assert_int_equal(c->K, given->cols);
    seen.row += (size_t)c->N;
    return 0;
}

cudaError_t moe4_cuda_settle_rows(const struct moe4_rows_check *c, cudaStream_t stream) {
    (void)stream;
    assert_int_equal(seen.row, given->weight[seen.matrix].rows); /* all of the matrix has been multiplied */
    assert_ptr_equal(c->y, Y(seen.matrix));
    assert_int_equal(c->N, seen.row);
    assert_int_equal(c->y_ld, seen.row);
    assert_ptr_equal(c->x, X);
    seen.matrix++;
    seen.row = 0;
    seen.settled++;
    return cudaSuccess;
}

/* A linear of n matrices with so many rows, on a Hopper GPU or not, with cuBLAS. */
static struct moe4_cuda_device device;
static moe4_ctx ctx = {.device = &device};
static moe4_weight weight[3];

static moe4_linear make_linear(const size_t *rows, size_t n, size_t cols, int major) {
    moe4_linear l = {.ctx = &ctx, .weight = weight, .n_weights = n, .cols = cols, .prepared = prepared};
    device = (struct moe4_cuda_device){.major = major, .n_sms = 132};
    l.o = (moe4_linear_options)MOE4_LINEAR_OPTIONS_INIT;
    l.o.act = MOE4_ACT_W4A16;
    l.o.x_dtype = MOE4_BF16;
    l.o.x_ld = cols;
    for (size_t i = 0; i < n; i++) {
        weight[i] = (moe4_weight){.dtype = MOE4_NVFP4, .rows = rows[i], .cols = cols, .global = 0.5f + (float)i};
        prepared->matrix[i].packed = (struct moe4_packed_experts){.down = PACKED + (i << 36)};
        prepared->matrix[i].packed.intermediate_units = (int)((cols + MOE4_UNIT_K - 1) / MOE4_UNIT_K);
    }
    prepared->blas = (struct moe4_cublas *)&seen;
    prepared->decoded_from = moe4_cuda_decoded_from(&l);
    return l;
}

/* At the sizes that docs/hopper.md measured, the faster way. */
static void test_choice(void **state) {
    (void)state;
    static const struct {
        size_t rows, cols, tokens;
        bool decodes;
    } measured[] = {{7168, 7168, 64, false},  {7168, 7168, 256, false},  {7168, 7168, 512, false},  {7168, 7168, 768, true},
                    {7168, 7168, 2048, true}, {7168, 7168, 4096, true},  {18432, 7168, 256, false}, {18432, 7168, 1024, false},
                    {4096, 4096, 8, false},   {4096, 4096, 31, false},   {4096, 4096, 32, true},    {4096, 4096, 4096, true},
                    {576, 7168, 15, false},   {576, 7168, 16, true},     {576, 7168, 4096, true},   {2048, 7168, 32, true},
                    {7168, 2048, 1024, true}, {18432, 7168, 2048, false}};
    for (size_t i = 0; i < sizeof measured / sizeof *measured; i++) {
        moe4_linear l = make_linear(&measured[i].rows, 1, measured[i].cols, 9);
        assert_int_equal(moe4_cuda_decodes(&l, measured[i].tokens), measured[i].decodes);
        for (size_t n = 0; n < prepared->decoded_from; n++) assert_false(moe4_cuda_decodes(&l, n));
        assert_true(moe4_cuda_decodes(&l, prepared->decoded_from));
    }
}

static void test_never(void **state) {
    (void)state;
    const size_t rows[] = {512, 512};
    float bias[512] = {0};
    moe4_linear l = make_linear(rows, 2, 512, 9);
    assert_int_equal(prepared->decoded_from, 16);
    l.o.act = MOE4_ACT_TOKEN;
    assert_true(moe4_cuda_decoded_from(&l) == SIZE_MAX);
    l.o.act = MOE4_ACT_W4A16;
    l.o.x_dtype = MOE4_F32;
    assert_true(moe4_cuda_decoded_from(&l) == SIZE_MAX);
    l.o.x_dtype = MOE4_BF16;
    l.o.x_ld = (size_t)INT32_MAX + 1;
    assert_true(moe4_cuda_decoded_from(&l) == SIZE_MAX);
    l.o.x_ld = 512;
    weight[1].bias = bias;
    assert_true(moe4_cuda_decoded_from(&l) == SIZE_MAX);
    weight[1].bias = NULL;
    weight[0].dtype = MOE4_BF16;
    assert_true(moe4_cuda_decoded_from(&l) == SIZE_MAX);
    const size_t large = 16384;
    make_linear(&large, 1, 8192, 8);
    assert_int_equal(prepared->decoded_from, MOE4_PREFILL_TOKENS); /* no prefill kernel there */
}

/* Matrices in one part and in several, the last of them short. */
static void test_parts(void **state) {
    (void)state;
    const size_t rows[] = {40, 8256, 20000};
    for (int y = 0; y < 2; y++) {
        moe4_linear l = make_linear(rows, 3, 8192, 9);
        void *out[] = {Y(0), Y(1), Y(2)};
        l.o.y_dtype = y ? MOE4_BF16 : MOE4_F32;
        const struct moe4_linear_call c = {.linear = &l, .y = out, .x = X, .n_tokens = 4000, .workspace = WORKSPACE};
        given = &l;
        memset(&seen, 0, sizeof seen);
        assert_int_equal(moe4_cuda_decoded_bytes(&l), 192 + MOE4_CUBLAS_WORKSPACE + ((size_t)128 << 20));
        assert_int_equal(moe4_cuda_decoded_forward(&c), MOE4_OK);
        assert_int_equal(seen.settled, 3);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_choice), cmocka_unit_test(test_never), cmocka_unit_test(test_parts)};
    prepared = calloc(1, sizeof *prepared + 3 * sizeof *prepared->matrix);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    free(prepared);
    return failed;
}
