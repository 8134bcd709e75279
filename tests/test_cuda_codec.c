/* The codec in a device's memory against the scalar CPU, bit by bit: every recipe, dtype and layout, hard numbers, odd places; its errors.
 * Skipped (77) where there is no GPU. All cases run: what differs is listed, then the test fails. */
#include "device.h"
#include "random.h"

#include <cuda_runtime_api.h>

static uint64_t rng = 0x5eed;
static int n_failed;

#define DIFFERS(...)                              \
    do {                                          \
        if (n_failed++ < 40) printf(__VA_ARGS__); \
    } while (0)

static void check_none_failed(void) {
    int n = n_failed;
    n_failed = 0;
    if (n) fail_msg("%d cases differ", n);
}

/* ---- cases ---- */

struct codec_case {
    moe4_recipe recipe;
    int four_over_six, per_row, given;
    moe4_scale_layout layout;
    size_t interleave, rows, cols, pad; /* pad: elements behind each row */
    moe4_dtype dtype;
    int kind;     /* of random_row */
    size_t shift; /* elements and bytes that buffers lie off the allocation */
};

static const char *describe(const struct codec_case *c) {
    static char text[256];
    snprintf(text, sizeof text,
             "recipe %d, 4/6 %d, per_row %d, given %d, layout %d, interleave %zu, %zu x %zu (+%zu) %s, kind %d, shift %zu", (int)c->recipe,
             c->four_over_six, c->per_row, c->given, (int)c->layout, c->interleave, c->rows, c->cols, c->pad, moe4_dtype_name(c->dtype),
             c->kind, c->shift);
    return text;
}

static moe4_quantize_options options_of(const struct codec_case *c) {
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.recipe = c->recipe;
    o.four_over_six = c->four_over_six;
    o.per_row = c->per_row;
    o.scale_layout = c->layout;
    o.interleave = c->interleave;
    return o;
}

/* n finite numbers of the dtype. */
static void *random_matrix(moe4_dtype dtype, size_t n, int kind) {
    float *x = malloc(n * sizeof *x + 1);
    uint16_t *halves = malloc(n * sizeof *halves + 1), inf = dtype == MOE4_BF16 ? 0x7F80 : 0x7C00;
    for (size_t i = 0; i < n; i += 256) random_row(&rng, x + i, n - i < 256 ? n - i : 256, kind);
    for (size_t i = 0; i < n; i++) {
        uint16_t h = dtype == MOE4_BF16 ? moe4_bf16_from_float(x[i]) : moe4_f16_from_float(x[i]);
        halves[i] = (uint16_t)((h & 0x7FFF) >= inf ? (h & 0x8000) | (inf - 1) : h);
    }
    free(dtype == MOE4_F32 ? (void *)halves : (void *)x);
    return dtype == MOE4_F32 ? (void *)x : (void *)halves;
}

static size_t scales_bytes(const struct codec_case *c) {
    size_t bytes;
    OK(cpu, moe4_scales_bytes(cpu, &bytes, c->layout, c->interleave ? 2 : 1, c->interleave ? c->rows / 2 : c->rows, c->cols));
    return bytes;
}

static bool same(const void *a, const void *b, size_t bytes, const char *what, const struct codec_case *c) {
    for (size_t i = 0; i < bytes; i++)
        if (((const uint8_t *)a)[i] != ((const uint8_t *)b)[i]) {
            DIFFERS("%s byte %zu of %zu: %02x on the CPU, %02x on the device: %s\n", what, i, bytes, ((const uint8_t *)a)[i],
                    ((const uint8_t *)b)[i], describe(c));
            return false;
        }
    return true;
}

/* Quantizes on both, then dequantizes the CPU's codes on both to every dtype. */
static void run_case(const struct codec_case *c) {
    size_t ld = c->cols + c->pad, width = moe4_dtype_bytes(c->dtype), n_globals = c->per_row ? c->rows : 1;
    size_t code_bytes = c->rows * c->cols / 2, scale_bytes = scales_bytes(c), x_bytes = c->rows * ld * width;
    void *x = random_matrix(c->dtype, c->rows * ld, c->kind);
    float *given = malloc(n_globals * sizeof *given), *globals[2];
    for (size_t i = 0; i < n_globals; i++) given[i] = ldexpf(1 + random_unit(&rng), (int)random_below(&rng, 30) - 15);
    moe4_quantize_options o = options_of(c);
    if (c->given) o.global = given;
    uint8_t *codes[2], *scales[2];
    uint64_t n_saturated[2] = {0, 0};
    for (int d = 0; d < 2; d++) {
        codes[d] = malloc(code_bytes + 1);
        scales[d] = malloc(scale_bytes + 1);
        globals[d] = malloc(n_globals * sizeof **globals);
    }
    void *dx = on_device(x, x_bytes, c->shift * width), *dc = on_device(NULL, code_bytes, c->shift),
         *ds = on_device(NULL, scale_bytes, c->shift);
    moe4_status want = moe4_nvfp4_quantize(cpu, codes[0], scales[0], globals[0], &n_saturated[0], x, c->dtype, c->rows, c->cols, ld, &o);
    moe4_status got = moe4_nvfp4_quantize(gpu, dc, ds, globals[1], &n_saturated[1], dx, c->dtype, c->rows, c->cols, ld, &o);
    if (want != got) {
        DIFFERS("status %d on the CPU (%s), %d on the device (%s): %s\n", (int)want, moe4_ctx_error(cpu), (int)got, moe4_ctx_error(gpu),
                describe(c));
    } else if (want == MOE4_OK) {
        from_device(codes[1], dc, code_bytes);
        from_device(scales[1], ds, scale_bytes);
        same(scales[0], scales[1], scale_bytes, "scales", c);
        same(codes[0], codes[1], code_bytes, "codes", c);
        same(globals[0], globals[1], n_globals * sizeof **globals, "globals", c);
        if (n_saturated[0] != n_saturated[1])
            DIFFERS("%llu saturated blocks on the CPU, %llu on the device: %s\n", (unsigned long long)n_saturated[0],
                    (unsigned long long)n_saturated[1], describe(c));
    }
    moe4_memory_free(gpu, (char *)dx - c->shift * width);
    for (int y = 0; want == MOE4_OK && y < 3; y++) {
        moe4_dtype dtype = (moe4_dtype[]){MOE4_F32, MOE4_F16, MOE4_BF16}[y];
        size_t y_width = moe4_dtype_bytes(dtype), bytes = c->rows * ld * y_width;
        uint8_t *values[2] = {malloc(bytes + 1), malloc(bytes + 1)};
        memset(values[0], 0xEE, bytes);
        o.global = globals[0];
        void *dy = on_device(NULL, bytes, c->shift * y_width);
        OK(gpu, moe4_memory_copy(gpu, dc, codes[0], code_bytes, NULL));
        OK(gpu, moe4_memory_copy(gpu, ds, scales[0], scale_bytes, NULL));
        moe4_status host = moe4_nvfp4_dequantize(cpu, values[0], dtype, ld, codes[0], scales[0], c->rows, c->cols, &o);
        moe4_status device = moe4_nvfp4_dequantize(gpu, dy, dtype, ld, dc, ds, c->rows, c->cols, &o);
        if (host != device) DIFFERS("dequantize: status %d and %d (%s): %s\n", (int)host, (int)device, moe4_ctx_error(gpu), describe(c));
        from_device(values[1], dy, bytes);
        same(values[0], values[1], bytes, moe4_dtype_name(dtype), c);
        free_device(dy, c->shift * y_width);
        free(values[0]);
        free(values[1]);
    }
    free_device(dc, c->shift);
    free_device(ds, c->shift);
    for (int d = 0; d < 2; d++) {
        free(codes[d]);
        free(scales[d]);
        free(globals[d]);
    }
    free(given);
    free(x);
}

static const moe4_dtype dtypes[] = {MOE4_F32, MOE4_BF16, MOE4_F16};

/* Every recipe and dtype on every kind of numbers. */
static void test_recipes(void **state) {
    (void)state;
    for (int recipe = 0; recipe <= MOE4_RECIPE_COMPRESSED_TENSORS; recipe++)
        for (int six = 0; six < (recipe == MOE4_RECIPE_MODELOPT ? 2 : 1); six++)
            for (int per_row = 0; per_row < 2; per_row++)
                for (int given = 0; given < 2; given++)
                    for (int d = 0; d < 3; d++)
                        for (int kind = 0; kind < RANDOM_KINDS; kind++)
                            run_case(&(struct codec_case){.recipe = (moe4_recipe)recipe,
                                                          .four_over_six = six,
                                                          .per_row = per_row,
                                                          .given = given,
                                                          .rows = 9,
                                                          .cols = 528,
                                                          .dtype = dtypes[d],
                                                          .kind = kind});
    check_none_failed();
}

/* Layouts, interleaved rows, leading dimensions, buffers that lie badly, and sizes from none to more than one pass of the grid. */
static void test_places(void **state) {
    (void)state;
    static const size_t shapes[][3] = {{1, 16, 0},   {2, 16, 16},  {128, 64, 0}, {130, 80, 8},  {64, 1040, 1},
                                       {256, 48, 3}, {0, 32, 0},   {6, 0, 5},    {1, 70000, 0}, {700, 4112, 16},
                                       {4, 512, 0},  {4, 496, 16}, {2, 528, 2},  {9000, 16, 0}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int layout = 0; layout <= MOE4_SCALES_128X4; layout++)
            for (int i = 0; i < 3; i++) {
                size_t rows = shapes[s][0], interleave = i == 0 || rows % 2 || rows == 0 ? 0 : i == 1 ? 1 : rows / 2;
                for (size_t shift = 0; shift < 4; shift += 3)
                    run_case(&(struct codec_case){.recipe = i == 1 ? MOE4_RECIPE_ACTIVATION : MOE4_RECIPE_MODELOPT,
                                                  .per_row = layout == MOE4_SCALES_WORDS,
                                                  .layout = (moe4_scale_layout)layout,
                                                  .interleave = interleave,
                                                  .rows = rows,
                                                  .cols = shapes[s][1],
                                                  .pad = shapes[s][2],
                                                  .dtype = dtypes[i],
                                                  .shift = shift});
            }
    check_none_failed();
}

static void test_amax(void **state) {
    (void)state;
    for (int d = 0; d < 3; d++)
        for (size_t cols = 1; cols < 2000; cols += 333)
            for (int kind = 0; kind <= RANDOM_KINDS + 1; kind++) {
                enum { ROWS = 5 };
                size_t ld = cols + 3, width = moe4_dtype_bytes(dtypes[d]);
                uint8_t *x = random_matrix(dtypes[d], ROWS * ld, kind % RANDOM_KINDS);
                uint32_t bad = kind == RANDOM_KINDS ? 0x7F800000 : 0x7FC00001; /* Inf, NaN; as halves their high bytes */
                if (kind >= RANDOM_KINDS) {
                    uint16_t half = (uint16_t)(dtypes[d] == MOE4_BF16 ? bad >> 16 : kind == RANDOM_KINDS ? 0xFC00 : 0x7E01);
                    memcpy(x + (2 * ld + cols - 1) * width, width == 4 ? (void *)&bad : (void *)&half, width);
                }
                float a = -1, b = -1;
                void *there = on_device(x, ROWS * ld * width, 0);
                OK(cpu, moe4_amax(cpu, &a, x, dtypes[d], ROWS, cols, ld));
                OK(gpu, moe4_amax(gpu, &b, there, dtypes[d], ROWS, cols, ld));
                if (memcmp(&a, &b, sizeof a) != 0 && !(isnan(a) && isnan(b)))
                    DIFFERS("amax %g on the CPU, %g on the device: %s, %zu columns, kind %d\n", (double)a, (double)b,
                            moe4_dtype_name(dtypes[d]), cols, kind);
                free_device(there, 0);
                free(x);
            }
    check_none_failed();
}

/* From every layout to every other, in order and in a captured graph. */
static void test_scale_layouts(void **state) {
    (void)state;
    static const size_t shapes[][3] = {{1, 1, 16},    {1, 128, 64},  {3, 129, 80}, {2, 33, 16},
                                       {5, 128, 112}, {2, 257, 272}, {0, 4, 16},   {2, 0, 64}};
    cudaStream_t stream;
    assert_int_equal(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int from = 0; from <= MOE4_SCALES_128X4; from++)
            for (int to = 0; to <= MOE4_SCALES_128X4; to++)
                for (size_t shift = 0; shift < 2; shift++) {
                    const size_t *p = shapes[s];
                    size_t src_bytes, dst_bytes;
                    OK(cpu, moe4_scales_bytes(cpu, &src_bytes, (moe4_scale_layout)from, p[0], p[1], p[2]));
                    OK(cpu, moe4_scales_bytes(cpu, &dst_bytes, (moe4_scale_layout)to, p[0], p[1], p[2]));
                    uint8_t *src = malloc(src_bytes + 1), *want = malloc(dst_bytes + 1), *got = malloc(dst_bytes + 1);
                    for (size_t i = 0; i < src_bytes; i++) src[i] = (uint8_t)random_u64(&rng);
                    void *there = on_device(src, src_bytes, shift), *result = on_device(NULL, dst_bytes, shift);
                    OK(cpu, moe4_scales_convert(cpu, want, (moe4_scale_layout)to, src, (moe4_scale_layout)from, p[0], p[1], p[2]));
                    for (int captured = 0; captured < (dst_bytes ? 2 : 1); captured++) {
                        cudaGraph_t graph;
                        cudaGraphExec_t exec;
                        if (captured) {
                            OK(gpu, moe4_memory_copy(gpu, result, src, dst_bytes < src_bytes ? dst_bytes : src_bytes, NULL)); /* spoil it */
                            assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
                            OK(gpu, moe4_scales_convert_async(gpu, result, (moe4_scale_layout)to, there, (moe4_scale_layout)from, p[0],
                                                              p[1], p[2], stream));
                            assert_int_equal(cudaStreamEndCapture(stream, &graph), cudaSuccess);
                            assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
                            assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
                            assert_int_equal(cudaStreamSynchronize(stream), cudaSuccess);
                            cudaGraphExecDestroy(exec);
                            cudaGraphDestroy(graph);
                        } else {
                            OK(gpu,
                               moe4_scales_convert(gpu, result, (moe4_scale_layout)to, there, (moe4_scale_layout)from, p[0], p[1], p[2]));
                        }
                        from_device(got, result, dst_bytes);
                        if (memcmp(want, got, dst_bytes) != 0)
                            DIFFERS("layout %d to %d, %zu x %zu x %zu, shift %zu, captured %d\n", from, to, p[0], p[1], p[2], shift,
                                    captured);
                    }
                    free_device(there, shift);
                    free_device(result, shift);
                    free(src);
                    free(want);
                    free(got);
                }
    cudaStreamDestroy(stream);
    check_none_failed();
}

/* On a stream of its own, behind work that is still going on there. */
static void test_stream(void **state) {
    (void)state;
    enum { ROWS = 64, COLS = 4096, BYTES = 256 << 20 };
    uint16_t *x = random_matrix(MOE4_BF16, ROWS * COLS, 0);
    uint8_t *codes[2] = {malloc(ROWS * COLS / 2), malloc(ROWS * COLS / 2)}, *scales = malloc(ROWS * COLS / 16);
    void *there = on_device(NULL, ROWS * COLS * 2, 0), *dc = on_device(NULL, ROWS * COLS / 2, 0),
         *ds = on_device(NULL, ROWS * COLS / 16, 0);
    void *source = on_device(x, ROWS * COLS * 2, 0), *busy;
    cudaStream_t stream;
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.recipe = MOE4_RECIPE_ACTIVATION;
    o.per_row = 1;
    OK(cpu, moe4_nvfp4_quantize(cpu, codes[0], scales, NULL, NULL, x, MOE4_BF16, ROWS, COLS, 0, &o));
    OK(gpu, moe4_memory_alloc(gpu, &busy, BYTES));
    assert_int_equal(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    for (int i = 0; i < 20; i++) cudaMemsetAsync(busy, i, BYTES, stream);
    cudaMemcpyAsync(there, source, ROWS * COLS * 2, cudaMemcpyDeviceToDevice, stream);
    o.stream = stream;
    OK(gpu, moe4_nvfp4_quantize(gpu, dc, ds, NULL, NULL, there, MOE4_BF16, ROWS, COLS, 0, &o));
    from_device(codes[1], dc, ROWS * COLS / 2);
    assert_memory_equal(codes[0], codes[1], ROWS * COLS / 2);
    cudaStreamDestroy(stream);
    void *all[] = {there, dc, ds, source, busy};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) moe4_memory_free(gpu, all[i]);
    free(x);
    free(codes[0]);
    free(codes[1]);
    free(scales);
}

/* ---- errors ---- */

#define FAILS(status, says, expr)                                                                           \
    do {                                                                                                    \
        moe4_status status_ = (expr);                                                                       \
        if (status_ != (status) || !strstr(moe4_ctx_error(gpu), says))                                      \
            DIFFERS("%s: status %d: \"%s\", not \"%s\"\n", #expr, (int)status_, moe4_ctx_error(gpu), says); \
    } while (0)

static void test_errors(void **state) {
    (void)state;
    enum { ROWS = 6, COLS = 64 };
    float x[ROWS * COLS] = {0}, one = 1, big;
    uint8_t codes[ROWS * COLS / 2] = {0}, scales[ROWS * COLS / 16], untouched[sizeof codes];
    memset(scales, 0x38, sizeof scales);
    x[4 * COLS + 7] = -INFINITY; /* row 4 of x is row 2 of codes when rows are interleaved one by one */
    void *dx = on_device(x, sizeof x, 0), *dc = on_device(NULL, sizeof codes, 0), *ds = on_device(scales, sizeof scales, 0);
    void *dg = on_device(&one, sizeof one, 0);
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    for (size_t interleave = 0; interleave < 2; interleave++) {
        o.interleave = interleave;
        FAILS(MOE4_ERROR_FORMAT, "x: row 4 column 7 is infinite",
              moe4_nvfp4_quantize(gpu, dc, ds, NULL, NULL, dx, MOE4_F32, ROWS, COLS, 0, &o));
    }
    o.interleave = 0;
    FAILS(MOE4_ERROR_FORMAT, "x: row 8 column 46 is NaN", /* the high half of -Inf, 0xFF80, is a NaN of f16; its low half is 0 */
          moe4_nvfp4_quantize(gpu, dc, ds, NULL, NULL, (char *)dx + 2, MOE4_F16, 2 * ROWS - 2, COLS - 16, COLS - 4, &o));
    from_device(untouched, dc, sizeof untouched);
    for (size_t i = 0; i < sizeof untouched; i++)
        if (untouched[i] != 0xEE) DIFFERS("codes byte %zu was written by a call that failed\n", i);

    FAILS(MOE4_ERROR_ARGUMENT, "x is host memory, and codes is memory of cuda:0",
          moe4_nvfp4_quantize(gpu, dc, ds, NULL, NULL, x, MOE4_F32, ROWS, COLS, 0, &o));
    FAILS(MOE4_ERROR_ARGUMENT, "codes is host memory, and x is memory of cuda:0",
          moe4_nvfp4_quantize(gpu, codes, ds, NULL, NULL, dx, MOE4_F32, ROWS, COLS, 0, &o));
    FAILS(MOE4_ERROR_ARGUMENT, "scales is host memory, and x is memory of cuda:0",
          moe4_nvfp4_quantize(gpu, dc, scales, NULL, NULL, dx, MOE4_F32, ROWS, COLS, 0, &o));
    FAILS(MOE4_ERROR_ARGUMENT, "global_ret is memory of cuda:0, need host memory",
          moe4_nvfp4_quantize(gpu, dc, ds, dg, NULL, dx, MOE4_F32, ROWS, COLS, 0, &o));
    o.global = dg;
    FAILS(MOE4_ERROR_ARGUMENT, "options.global is memory of cuda:0, need host memory",
          moe4_nvfp4_quantize(gpu, dc, ds, NULL, NULL, dx, MOE4_F32, ROWS, COLS, 0, &o));
    o.global = &one;
    FAILS(MOE4_ERROR_ARGUMENT, "codes is host memory, and y is memory of cuda:0",
          moe4_nvfp4_dequantize(gpu, dx, MOE4_F32, 0, codes, ds, ROWS, COLS, &o));
    FAILS(MOE4_ERROR_ARGUMENT, "dst is host memory, and src is memory of cuda:0",
          moe4_scales_convert(gpu, scales, MOE4_SCALES_WORDS, ds, MOE4_SCALES_LINEAR, 1, ROWS, COLS));
    FAILS(MOE4_ERROR_UNSUPPORTED, "memory of cuda:0; this call moves host memory", moe4_rows_interleave(gpu, dc, ds, 1, 2, 8, 1));
    FAILS(MOE4_ERROR_UNSUPPORTED, "memory of cuda:0; this call moves host memory", moe4_transpose(gpu, dc, ds, 1, 2, 8, 1));

    for (int layout = 0; layout <= MOE4_SCALES_128X4; layout++) { /* row 5 block 2, in two matrices of 3 rows */
        struct codec_case c = {.layout = (moe4_scale_layout)layout, .interleave = 1, .rows = ROWS, .cols = COLS};
        size_t bytes = scales_bytes(&c);
        uint8_t linear[ROWS * COLS / 16], *laid = malloc(bytes);
        memset(linear, 0x38, sizeof linear);
        linear[5 * COLS / 16 + 2] = 0x7F;
        linear[5 * COLS / 16 + 3] = 0x80; /* a later one */
        OK(cpu, moe4_scales_convert(cpu, laid, (moe4_scale_layout)layout, linear, MOE4_SCALES_LINEAR, 2, ROWS / 2, COLS));
        void *bad = on_device(laid, bytes, 0);
        o = options_of(&c);
        o.global = &one;
        FAILS(MOE4_ERROR_FORMAT, "scales: row 5 block 2 is 0x7f, a NaN",
              moe4_nvfp4_dequantize(gpu, dx, MOE4_F32, 0, dc, bad, ROWS, COLS, &o));
        free_device(bad, 0);
        free(laid);
    }
    FAILS(MOE4_ERROR_UNSUPPORTED, "amax: 4294967296 x 1; on a device fewer than 2147483648 rows of 512", /* refused before x is read */
          moe4_amax(gpu, &big, dx, MOE4_F32, (size_t)1 << 32, 1, 0));
    /* Host memory is still the CPU's, in a context on a device too. */
    OK(gpu, moe4_amax(gpu, &big, x, MOE4_F32, ROWS, COLS, 0));
    if (!isinf(big)) DIFFERS("amax of host memory: %g\n", (double)big);
    void *all[] = {dx, dc, ds, dg};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) moe4_memory_free(gpu, all[i]);
    check_none_failed();
}

int main(void) {
    int status = open_both("test_cuda_codec", MOE4_ISA_SCALAR);
    if (status) return status;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recipes),       cmocka_unit_test(test_places), cmocka_unit_test(test_amax),
        cmocka_unit_test(test_scale_layouts), cmocka_unit_test(test_stream), cmocka_unit_test(test_errors),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    close_both();
    return failed;
}
