/* Layouts: scales against offsets written down elsewhere, round trips, gate and up rows, K-major weights, quantizing straight into them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <cmocka.h>

#include "moe4.h"
#include "random.h"

enum { GUARD = 64 }; /* bytes before and behind a buffer that nothing may write */

static moe4_ctx *ctx;

static int make_ctx(void **state) {
    (void)state;
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.n_threads = 3;
    return moe4_ctx_create(&ctx, &o) == MOE4_OK ? 0 : -1;
}

static int drop_ctx(void **state) {
    (void)state;
    moe4_ctx_destroy(ctx);
    return 0;
}

#define OK(expr)                                                               \
    do {                                                                       \
        if ((expr) != MOE4_OK) fail_msg("%s: %s", #expr, moe4_ctx_error(ctx)); \
    } while (0)

static void *guarded(size_t bytes, uint8_t fill) {
    uint8_t *at = malloc(bytes + 2 * GUARD);
    memset(at, 0xa5, bytes + 2 * GUARD);
    memset(at + GUARD, fill, bytes);
    return at + GUARD;
}

static void free_guarded(void *data, size_t bytes) {
    const uint8_t *at = (uint8_t *)data - GUARD;
    for (size_t i = 0; i < GUARD; i++)
        if (at[i] != 0xa5 || at[GUARD + bytes + i] != 0xa5) fail_msg("a byte beside a buffer of %zu was written", bytes);
    free((uint8_t *)data - GUARD);
}

static void *random_bytes(uint64_t *random, size_t bytes) {
    uint8_t *at = guarded(bytes, 0);
    for (size_t i = 0; i < bytes; i++) at[i] = (uint8_t)(random_u64(random) >> 56);
    return at;
}

static size_t scales_bytes(moe4_scale_layout layout, size_t n_matrices, size_t rows, size_t cols) {
    size_t bytes = SIZE_MAX;
    OK(moe4_scales_bytes(ctx, &bytes, layout, n_matrices, rows, cols));
    return bytes;
}

/* ---- scales ---- */

/* The layouts as docs/format.md has them, a byte at a time. */
static size_t offset_of(moe4_scale_layout layout, size_t rows, size_t n, size_t m, size_t k) {
    if (layout == MOE4_SCALES_LINEAR) return m * n + k;
    if (layout == MOE4_SCALES_WORDS) return (k / 4 * rows + m) * 4 + k % 4;
    return (m / 128 * ((n + 3) / 4) + k / 4) * 512 + m % 32 * 16 + m % 128 / 32 * 4 + k % 4;
}

/* What NVIDIA's documentation of the layout gives for a 128 x 128 matrix: row 5, blocks 2 and 5. */
static void test_documented_offsets(void **state) {
    (void)state;
    uint8_t linear[128 * 8] = {0}, tiled[1024];
    assert_int_equal(scales_bytes(MOE4_SCALES_128X4, 1, 128, 128), 1024);
    linear[5 * 8 + 2] = 1;
    linear[5 * 8 + 5] = 2;
    OK(moe4_scales_convert(ctx, tiled, MOE4_SCALES_128X4, linear, MOE4_SCALES_LINEAR, 1, 128, 128));
    for (size_t i = 0; i < sizeof tiled; i++) assert_int_equal(tiled[i], i == 82 ? 1 : i == 593 ? 2 : 0);
}

static void test_sizes(void **state) {
    (void)state;
    static const struct {
        size_t n, rows, cols, linear, words, tiled;
    } want[] = {{1, 128, 64, 512, 512, 512}, {1, 1, 16, 1, 4, 512}, {1, 129, 80, 645, 1032, 2048}, {3, 130, 16, 390, 1560, 3072},
                {2, 0, 64, 0, 0, 0},         {0, 128, 64, 0, 0, 0}, {1, 128, 0, 0, 0, 0}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        assert_int_equal(scales_bytes(MOE4_SCALES_LINEAR, want[i].n, want[i].rows, want[i].cols), want[i].linear);
        assert_int_equal(scales_bytes(MOE4_SCALES_WORDS, want[i].n, want[i].rows, want[i].cols), want[i].words);
        assert_int_equal(scales_bytes(MOE4_SCALES_128X4, want[i].n, want[i].rows, want[i].cols), want[i].tiled);
    }
}

/* From every layout to every other: each scale where the formula puts it, every other byte zero though the source's padding is not. */
static void test_conversions(void **state) {
    (void)state;
    uint64_t random = 11;
    static const size_t shapes[][3] = {{1, 1, 16},   {1, 128, 64},  {3, 129, 80},  {2, 33, 16},   {4, 31, 208},
                                       {1, 300, 48}, {5, 128, 112}, {2, 257, 272}, {1, 700, 4112}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int from = 0; from < 3; from++)
            for (int to = 0; to < 3; to++) {
                size_t E = shapes[s][0], rows = shapes[s][1], n = shapes[s][2] / 16;
                size_t src_bytes = scales_bytes((moe4_scale_layout)from, E, rows, 16 * n);
                size_t dst_bytes = scales_bytes((moe4_scale_layout)to, E, rows, 16 * n);
                uint8_t *src = random_bytes(&random, src_bytes), *dst = guarded(dst_bytes, 0xee), *want = guarded(dst_bytes, 0);
                for (size_t e = 0; e < E; e++)
                    for (size_t m = 0; m < rows; m++)
                        for (size_t k = 0; k < n; k++)
                            want[e * (dst_bytes / E) + offset_of((moe4_scale_layout)to, rows, n, m, k)] =
                                src[e * (src_bytes / E) + offset_of((moe4_scale_layout)from, rows, n, m, k)];
                OK(moe4_scales_convert(ctx, dst, (moe4_scale_layout)to, src, (moe4_scale_layout)from, E, rows, 16 * n));
                assert_memory_equal(dst, want, dst_bytes);
                free_guarded(src, src_bytes);
                free_guarded(dst, dst_bytes);
                free_guarded(want, dst_bytes);
            }
}

/* ---- products of rows whose scales are 128x4 tiles ---- */

enum { M = 160, N = 24, K = 1632 }; /* 102 blocks */

static void multiply(moe4_ctx *on, float *y, const uint8_t *w_codes, const uint8_t *w_scales, const uint8_t *codes, const uint8_t *scales,
                     moe4_act act) {
    const float one = 1;
    const moe4_weight w = {.dtype = MOE4_NVFP4, .rows = N, .cols = K, .data = w_codes, .scale = w_scales, .global = 1, .input_scale = 1};
    const moe4_nvfp4_rows x = {.codes = codes, .scales = scales, .layout = MOE4_SCALES_128X4, .global = &one};
    moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
    moe4_linear *linear;
    moe4_workspace ws;
    o.act = act;
    o.x_dtype = MOE4_NVFP4;
    o.y_dtype = MOE4_F32;
    if (moe4_linear_create(&linear, on, &w, 1, &o) != MOE4_OK) fail_msg("%s", moe4_ctx_error(on));
    assert_int_equal(moe4_linear_workspace_bytes(linear, &ws.bytes, M), MOE4_OK);
    ws.data = aligned_alloc(64, (ws.bytes + 63) / 64 * 64);
    if (moe4_linear_forward(linear, (void *[]){y}, NULL, &x, M, &ws, NULL) != MOE4_OK) fail_msg("%s", moe4_ctx_error(on));
    free(ws.data);
    moe4_linear_destroy(linear);
}

static float code_of(const uint8_t *codes, size_t row, size_t k) {
    return moe4_e2m1_to_float((uint8_t)(codes[(row * K + k) / 2] >> 4 * (k % 2)));
}

/* The part of row m's product with column n that block b of K gives; quarters far below 2^22, so exact. */
static float block_product(const uint8_t *w_codes, const uint8_t *codes, size_t m, size_t n, size_t b) {
    float sum = 0;
    for (size_t k = 16 * b; k < 16 * b + 16; k++) sum += code_of(codes, m, k) * code_of(w_codes, n, k);
    return sum;
}

/* All scales 1.0 give the unscaled product; one scale of 2.0 doubles that block of that row, and changes nothing else. */
static void probe(moe4_ctx *on, moe4_act act) {
    static const size_t probes[][2] = {{1, 0}, {32, 0}, {128, 0}, {0, 1}, {0, 4}, {0, 100}, {159, 101}, {33, 7}};
    uint64_t random = 16;
    size_t bytes = scales_bytes(MOE4_SCALES_128X4, 1, M, K);
    uint8_t *w_codes = random_bytes(&random, N * K / 2), *codes = random_bytes(&random, M * K / 2);
    uint8_t *w_scales = guarded(N * K / 16, 0x38), *linear = guarded(M * K / 16, 0x38), *tiles = guarded(bytes, 0);
    float *y = malloc(M * N * sizeof *y), *plain = malloc(M * N * sizeof *plain);
    OK(moe4_scales_convert(ctx, tiles, MOE4_SCALES_128X4, linear, MOE4_SCALES_LINEAR, 1, M, K));
    multiply(on, plain, w_codes, w_scales, codes, tiles, act);
    for (size_t i = 0; i < M * N; i++) {
        float want = 0;
        for (size_t b = 0; b < K / 16; b++) want += block_product(w_codes, codes, i / N, i % N, b);
        assert_true(plain[i] == want);
    }
    for (size_t p = 0; p < sizeof probes / sizeof *probes; p++) {
        size_t m = probes[p][0], b = probes[p][1];
        linear[m * (K / 16) + b] = 0x40;
        OK(moe4_scales_convert(ctx, tiles, MOE4_SCALES_128X4, linear, MOE4_SCALES_LINEAR, 1, M, K));
        multiply(on, y, w_codes, w_scales, codes, tiles, act);
        for (size_t i = 0; i < M * N; i++) {
            float want = plain[i] + (i / N == m ? block_product(w_codes, codes, m, i % N, b) : 0);
            if (y[i] != want) fail_msg("scale [%zu,%zu]: y[%zu,%zu] is %g, should be %g", m, b, i / N, i % N, y[i], want);
        }
        linear[m * (K / 16) + b] = 0x38;
    }
    free(y), free(plain);
    free_guarded(w_codes, N * K / 2), free_guarded(codes, M * K / 2), free_guarded(w_scales, N * K / 16);
    free_guarded(linear, M * K / 16), free_guarded(tiles, bytes);
}

static void test_probes(void **state) {
    (void)state;
    for (uint32_t bit = 1; bit; bit <<= 1) {
        moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
        o.isa_mask = bit;
        o.n_threads = 2;
        moe4_ctx *on;
        if (moe4_ctx_create(&on, &o) != MOE4_OK) continue;
        probe(on, MOE4_ACT_TOKEN);
        probe(on, MOE4_ACT_W4A16);
        moe4_ctx_destroy(on);
    }
}

/* ---- gate and up rows ---- */

static void test_gate_up(void **state) {
    (void)state;
    uint64_t random = 12;
    static const size_t shapes[][4] = {{1, 2, 1, 1},  {1, 16, 5, 8},     {3, 48, 7, 8},       {2, 12, 3, 3},
                                       {2, 12, 3, 6}, {2, 576, 144, 32}, {1, 1536, 3584, 64}, {4, 22, 1, 11}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        size_t E = shapes[s][0], rows = shapes[s][1], row_bytes = shapes[s][2], g = shapes[s][3], bytes = E * rows * row_bytes, at = 0;
        uint8_t *halves = random_bytes(&random, bytes), *mixed = guarded(bytes, 0), *back = guarded(bytes, 0);
        OK(moe4_rows_interleave(ctx, mixed, halves, E, rows, row_bytes, g));
        for (size_t e = 0; e < E; e++) /* the definition: g rows of gate, g of up, and so on */
            for (size_t group = 0; group < rows / 2; group += g)
                for (size_t up = 0; up < 2; up++)
                    for (size_t i = 0; i < g; i++, at += row_bytes)
                        assert_memory_equal(mixed + at, halves + (e * rows + up * (rows / 2) + group + i) * row_bytes, row_bytes);
        assert_int_equal(at, bytes);
        OK(moe4_rows_deinterleave(ctx, back, mixed, E, rows, row_bytes, g));
        assert_memory_equal(back, halves, bytes);
        free_guarded(halves, bytes);
        free_guarded(mixed, bytes);
        free_guarded(back, bytes);
    }
}

/* ---- K-major weights ---- */

static void test_transpose(void **state) {
    (void)state;
    uint64_t random = 13;
    static const size_t shapes[][3] = {{1, 1, 1},   {1, 8, 8},    {2, 64, 64},  {3, 7, 9},
                                       {2, 65, 71}, {1, 200, 13}, {5, 24, 130}, {1, 513, 777}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (size_t size = 1; size <= 4; size *= 2) {
            size_t E = shapes[s][0], rows = shapes[s][1], cols = shapes[s][2], bytes = E * rows * cols * size;
            uint8_t *src = random_bytes(&random, bytes), *dst = guarded(bytes, 0);
            OK(moe4_transpose(ctx, dst, src, E, rows, cols, size));
            for (size_t e = 0; e < E; e++)
                for (size_t i = 0; i < rows; i++)
                    for (size_t j = 0; j < cols; j++)
                        assert_memory_equal(dst + ((e * cols + j) * rows + i) * size, src + ((e * rows + i) * cols + j) * size, size);
            free_guarded(src, bytes);
            free_guarded(dst, bytes);
        }
}

/* A matrix as a Llama-4 checkpoint has it, [K/2, N] codes whose bytes hold k and k + 1 of one column and [K/16, N] scales, has after two
 * transpositions the values of the same matrix stored row by row. */
static void test_k_major_values(void **state) {
    (void)state;
    enum { COLS = 37, DEPTH = 80 };
    uint64_t random = 14;
    uint8_t k_codes[DEPTH / 2 * COLS] = {0}, k_scales[DEPTH / 16 * COLS], codes[COLS * DEPTH / 2], scales[COLS * DEPTH / 16];
    float want[COLS * DEPTH], got[COLS * DEPTH], global = 0.25f;
    for (size_t n = 0; n < COLS; n++)
        for (size_t b = 0; b < DEPTH / 16; b++) {
            k_scales[b * COLS + n] = (uint8_t)random_below(&random, 0x7f);
            for (size_t k = 16 * b; k < 16 * b + 16; k++) {
                uint8_t code = (uint8_t)random_below(&random, 16);
                k_codes[k / 2 * COLS + n] |= (uint8_t)(code << 4 * (k % 2));
                want[n * DEPTH + k] = moe4_e2m1_to_float(code) * moe4_e4m3_to_float(k_scales[b * COLS + n]) * global;
            }
        }
    OK(moe4_transpose(ctx, codes, k_codes, 1, DEPTH / 2, COLS, 1));
    OK(moe4_transpose(ctx, scales, k_scales, 1, DEPTH / 16, COLS, 1));
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.global = &global;
    OK(moe4_nvfp4_dequantize(ctx, got, MOE4_F32, 0, codes, scales, COLS, DEPTH, &o));
    assert_memory_equal(got, want, sizeof want);
}

/* ---- quantizing straight into a layout ---- */

/* The same bytes as quantizing, deinterleaving and converting one after another; and back to the same values. */
static void check_quantize(moe4_scale_layout layout, size_t rows, size_t cols, size_t g, int per_row, moe4_dtype dtype) {
    uint64_t random = 15 + rows + cols + g;
    size_t ld = cols + 5, n = cols / 16, parts = g ? 2 : 1, code_bytes = rows * cols / 2, elements = rows * ld;
    size_t bytes = scales_bytes(layout, parts, rows / parts, cols);
    float *x = calloc(elements, sizeof *x), *y = malloc(elements * sizeof *y), *global = malloc(rows * sizeof *global);
    uint16_t *half = malloc(elements * 2);
    uint8_t *codes = guarded(code_bytes, 0xee), *scales = guarded(bytes, 0xee), *plain_codes = guarded(code_bytes, 0);
    uint8_t *plain_scales = guarded(rows * n, 0), *want_codes = guarded(code_bytes, 0), *mid = guarded(rows * n, 0);
    uint8_t *want_scales = guarded(bytes, 0);
    for (size_t i = 0; i < elements; i++) {
        half[i] = moe4_bf16_from_float(random_normal(&random) * (float)(1 + i / ld));
        x[i] = moe4_bf16_to_float(half[i]);
    }
    moe4_quantize_options plain = MOE4_QUANTIZE_OPTIONS_INIT, o = MOE4_QUANTIZE_OPTIONS_INIT;
    plain.per_row = o.per_row = per_row;
    o.scale_layout = layout;
    o.interleave = g;
    OK(moe4_nvfp4_quantize(ctx, plain_codes, plain_scales, NULL, NULL, x, MOE4_F32, rows, cols, ld, &plain));
    OK(moe4_rows_deinterleave(ctx, want_codes, plain_codes, 1, rows, cols / 2, g ? g : rows / 2));
    OK(moe4_rows_deinterleave(ctx, mid, plain_scales, 1, rows, n, g ? g : rows / 2));
    OK(moe4_scales_convert(ctx, want_scales, layout, mid, MOE4_SCALES_LINEAR, parts, rows / parts, cols));
    OK(moe4_nvfp4_quantize(ctx, codes, scales, global, NULL, dtype == MOE4_F32 ? (void *)x : (void *)half, dtype, rows, cols, ld, &o));
    assert_memory_equal(codes, want_codes, code_bytes);
    assert_memory_equal(scales, want_scales, bytes);

    float *want_y = malloc(elements * sizeof *want_y);
    memset(y, 0, elements * sizeof *y);
    memset(want_y, 0, elements * sizeof *want_y);
    o.global = global;
    OK(moe4_nvfp4_dequantize(ctx, y, MOE4_F32, ld, codes, scales, rows, cols, &o));
    float *plain_global = malloc(rows * sizeof *plain_global); /* per row: in the order of x */
    OK(moe4_nvfp4_quantize(ctx, plain_codes, plain_scales, plain_global, NULL, x, MOE4_F32, rows, cols, ld, &plain));
    plain.global = plain_global;
    OK(moe4_nvfp4_dequantize(ctx, want_y, MOE4_F32, ld, plain_codes, plain_scales, rows, cols, &plain));
    assert_memory_equal(y, want_y, elements * sizeof *y);

    free(x), free(y), free(want_y), free(half), free(global), free(plain_global);
    free_guarded(codes, code_bytes), free_guarded(plain_codes, code_bytes), free_guarded(want_codes, code_bytes);
    free_guarded(scales, bytes), free_guarded(want_scales, bytes);
    free_guarded(plain_scales, rows * n), free_guarded(mid, rows * n);
}

static void test_quantize_into_layouts(void **state) {
    (void)state;
    static const size_t shapes[][3] = {{2, 16, 0}, {130, 80, 0}, {64, 64, 8}, {264, 48, 4}, {36, 4112, 6}, {258, 208, 129}, {6, 2064, 1}};
    for (int layout = 0; layout < 3; layout++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (int per_row = 0; per_row < 2; per_row++)
                check_quantize((moe4_scale_layout)layout, shapes[s][0], shapes[s][1], shapes[s][2], per_row, s % 2 ? MOE4_F32 : MOE4_BF16);
}

/* ---- errors: both numbers, and nothing written ---- */

static void expect_error(moe4_status got, moe4_status want, const char *part) {
    assert_int_equal(got, want);
    if (!strstr(moe4_ctx_error(ctx), part)) fail_msg("\"%s\" lacks \"%s\"", moe4_ctx_error(ctx), part);
}
#define BAD(expr, part) expect_error(expr, MOE4_ERROR_ARGUMENT, part)

static void test_errors(void **state) {
    (void)state;
    const moe4_scale_layout linear = MOE4_SCALES_LINEAR, tiled = MOE4_SCALES_128X4, none = (moe4_scale_layout)3;
    uint8_t a[512], b[512];
    size_t bytes = 77;
    memset(a, 0xee, sizeof a);
    memset(b, 0, sizeof b);
    BAD(moe4_scales_bytes(ctx, &bytes, none, 1, 1, 16), "layout: 3, there are 0 to 2");
    BAD(moe4_scales_bytes(ctx, &bytes, linear, 1, 1, 24), "cols: 24, need a multiple of 16");
    BAD(moe4_scales_bytes(ctx, &bytes, linear, 2, SIZE_MAX / 2, 32), "scales of 2 x 9223372036854775807 x 32 do not fit");
    BAD(moe4_scales_bytes(ctx, &bytes, tiled, 1, SIZE_MAX, 16), "do not fit");
    BAD(moe4_scales_bytes(ctx, &bytes, MOE4_SCALES_WORDS, 1, SIZE_MAX / 4 + 1, 16), "do not fit");
    BAD(moe4_scales_bytes(ctx, NULL, linear, 1, 1, 16), "bytes_ret is NULL");
    assert_int_equal(bytes, 77);
    BAD(moe4_scales_convert(ctx, a, tiled, b, none, 1, 1, 16), "layout: 3");
    BAD(moe4_scales_convert(ctx, a, none, b, linear, 1, 1, 16), "layout: 3");
    BAD(moe4_scales_convert(ctx, a, tiled, b, linear, 1, 1, 17), "cols: 17");
    BAD(moe4_scales_convert(ctx, NULL, tiled, b, linear, 1, 1, 16), "dst is NULL");
    BAD(moe4_scales_convert(ctx, a, tiled, NULL, linear, 1, 1, 16), "src is NULL");
    OK(moe4_scales_convert(ctx, NULL, tiled, NULL, linear, 1, 0, 16));
    OK(moe4_scales_convert(ctx, NULL, tiled, NULL, linear, 1, 5, 0));

    BAD(moe4_rows_interleave(ctx, a, b, 1, 7, 1, 1), "rows: 7, need an even number");
    BAD(moe4_rows_interleave(ctx, a, b, 1, 12, 1, 4), "granularity: 4 does not divide the 6 rows of gate");
    BAD(moe4_rows_deinterleave(ctx, a, b, 1, 12, 1, 0), "granularity: 0 does not divide");
    BAD(moe4_rows_deinterleave(ctx, a, b, 1, 12, 1, 12), "granularity: 12 does not divide the 6");
    BAD(moe4_rows_deinterleave(ctx, a, b, SIZE_MAX / 8, 12, 3, 6), "rows of 3 bytes do not fit");
    BAD(moe4_rows_interleave(ctx, a, NULL, 1, 12, 1, 6), "src is NULL");
    OK(moe4_rows_interleave(ctx, NULL, NULL, 0, 12, 1, 6));

    BAD(moe4_transpose(ctx, a, b, 1, 4, 4, 3), "element_bytes: 3, need 1, 2 or 4");
    BAD(moe4_transpose(ctx, a, b, SIZE_MAX / 4, 4, 4, 2), "do not fit");
    BAD(moe4_transpose(ctx, NULL, b, 1, 4, 4, 2), "dst is NULL");
    OK(moe4_transpose(ctx, NULL, NULL, 1, 0, 4, 1));

    float x[16 * 6] = {1};
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.scale_layout = none;
    BAD(moe4_nvfp4_quantize(ctx, a, a + 256, NULL, NULL, x, MOE4_F32, 6, 16, 0, &o), "options.scale_layout: 3, there are 0 to 2");
    o.scale_layout = linear;
    o.interleave = 2;
    BAD(moe4_nvfp4_quantize(ctx, a, a + 256, NULL, NULL, x, MOE4_F32, 6, 16, 0, &o), "options.interleave: 2 does not divide the 3 rows");
    BAD(moe4_nvfp4_quantize(ctx, a, a + 256, NULL, NULL, x, MOE4_F32, 5, 16, 0, &o), "rows: 5, need an even number");
    x[16 * 4 + 3] = NAN; /* the third row of gate; named as a row of x */
    o.interleave = 1;
    expect_error(moe4_nvfp4_quantize(ctx, a, a + 256, NULL, NULL, x, MOE4_F32, 6, 16, 0, &o), MOE4_ERROR_FORMAT, "row 4 column 3 is NaN");
    for (size_t i = 0; i < sizeof a; i++) assert_int_equal(a[i], 0xee);

    float y[16 * 6] = {0}, global = 1;
    uint8_t scales[2 * 512] = {0};
    o.scale_layout = tiled;
    o.global = &global;
    scales[512 + 2 * 16] = 0x80; /* the last row of up */
    expect_error(moe4_nvfp4_dequantize(ctx, y, MOE4_F32, 0, b, scales, 6, 16, &o), MOE4_ERROR_FORMAT, "row 5 block 0 is 0x80, signed");
    scales[512 + 2 * 16] = 0;
    scales[512 + 3 * 16] = scales[1] = 0xff; /* padding: not looked at */
    OK(moe4_nvfp4_dequantize(ctx, y, MOE4_F32, 0, b, scales, 6, 16, &o));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_documented_offsets),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_conversions),
        cmocka_unit_test(test_probes),
        cmocka_unit_test(test_gate_up),
        cmocka_unit_test(test_transpose),
        cmocka_unit_test(test_k_major_values),
        cmocka_unit_test(test_quantize_into_layouts),
        cmocka_unit_test(test_errors),
    };
    return cmocka_run_group_tests(tests, make_ctx, drop_ctx);
}
