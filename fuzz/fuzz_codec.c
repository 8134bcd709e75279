/* The codec with hostile numbers and options: every ISA must do what the scalar one does, bit for bit and error for error, and each
 * scale layout and interleaving must hold what the plain one does.
 *
 * Input: 16 bytes of options, then the elements of x, repeated as often as needed; also taken as codes and scales to dequantize. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "moe4.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Small matrices, or tall ones that need more than one tile of 128 rows. */
enum { MAX_ROWS = 8, MAX_COLS = 400, MAX_LD = MAX_COLS + 3, TALL = 121, TALL_COLS = 16, MAX_TALL = TALL + 31 };
enum { MAX_X = MAX_ROWS * MAX_LD, MAX_CODES = MAX_ROWS * MAX_COLS / 2, MAX_SCALES = 2 * 128 * 4 * ((MAX_COLS / 16 + 3) / 4) };

static moe4_ctx *ctxs[32];
static size_t n_ctxs;

static void make_ctxs(void) {
    for (uint32_t bit = 1; bit; bit <<= 1) {
        moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
        o.isa_mask = bit;
        o.n_threads = 1;
        if (moe4_ctx_create(&ctxs[n_ctxs], &o) == MOE4_OK) n_ctxs++;
    }
    if (!n_ctxs) abort();
}

static void must(int truth) {
    if (!truth) abort();
}

/* What one ISA made of the input. */
struct result {
    moe4_status status;
    char error[256];
    float amax, globals[MAX_TALL];
    uint64_t n_saturated;
    uint8_t codes[MAX_CODES], scales[MAX_SCALES], y[MAX_X * 4], raw_y[MAX_X * 4];
};

struct input {
    moe4_quantize_options options;
    moe4_dtype x_dtype, y_dtype;
    size_t rows, cols, ld;
    float globals[MAX_TALL];
    uint32_t x[MAX_X];
};

static void read_input(struct input *in, const uint8_t *data, size_t size) {
    uint8_t head[16] = {0};
    memcpy(head, data, size < sizeof head ? size : sizeof head);
    data += size < sizeof head ? size : sizeof head;
    size -= size < sizeof head ? size : sizeof head;
    in->options = (moe4_quantize_options)MOE4_QUANTIZE_OPTIONS_INIT;
    in->options.recipe = (moe4_recipe)(head[0] == 255 ? 4 : head[0] % 4);
    in->options.four_over_six = (head[0] % 4 == 0 || head[1] == 255) && head[1] & 1;
    in->options.per_row = head[1] >> 1 & 1;
    in->x_dtype = (moe4_dtype)(head[2] == 255 ? MOE4_F64 : head[2] % 3);
    in->y_dtype = (moe4_dtype)(head[3] == 255 ? MOE4_F64 : head[3] % 3);
    in->rows = head[4] % (MAX_ROWS + 1);
    in->cols = head[5] % 8 ? (size_t)(head[5] % 26) * 16 : head[6];
    in->ld = head[7] % 4 ? in->cols + head[7] % 4 - 1 : head[8] % MAX_LD;
    if (head[15] & 0x80) {
        in->rows = TALL + head[4] % (MAX_TALL - TALL + 1);
        in->cols = TALL_COLS;
        in->ld = TALL_COLS + head[7] % 4;
    }
    in->options.scale_layout = (moe4_scale_layout)(head[15] == 0x7f ? 3 : (head[15] & 3) % 3);
    in->options.interleave = head[15] >> 2 & 0x1f;
    memcpy(&in->globals[0], head + 9, 4);
    if (head[14] % 8) in->globals[0] = fabsf(in->globals[0]);
    for (size_t i = 1; i < MAX_TALL; i++) in->globals[i] = in->globals[i % MAX_ROWS ? i - 1 : 0] * 3;
    if (head[1] & 4) in->options.global = in->globals;
    for (size_t i = 0; size && i < sizeof in->x; i += size)
        memcpy((char *)in->x + i, data, sizeof in->x - i < size ? sizeof in->x - i : size);
    uint32_t limit = head[13]; /* most inputs: a range of exponents, so that whole rows are finite */
    for (size_t i = 0; limit && in->x_dtype == MOE4_F32 && i < sizeof in->x / sizeof *in->x; i++)
        in->x[i] = (in->x[i] & 0x807fffff) | (in->x[i] >> 23 & 0xff) * limit / 256 << 23;
}

/* In r: x quantized as the options say, and back. */
static void quantize(moe4_ctx *ctx, struct result *r, const struct input *in) {
    moe4_quantize_options o = in->options;
    size_t scales_bytes;
    r->status =
        moe4_nvfp4_quantize(ctx, r->codes, r->scales, r->globals, &r->n_saturated, in->x, in->x_dtype, in->rows, in->cols, in->ld, &o);
    strncpy(r->error, moe4_ctx_error(ctx), sizeof r->error - 1);
    if (r->status != MOE4_OK) {
        must(r->n_saturated == 0xeeeeeeeeeeeeeeee && r->codes[0] == 0xee && r->error[0]);
        return;
    }
    size_t n = o.interleave ? 2 : 1;
    must(moe4_scales_bytes(ctx, &scales_bytes, o.scale_layout, n, in->rows / n, in->cols) == MOE4_OK && scales_bytes <= MAX_SCALES);
    for (size_t i = 0; i < scales_bytes; i++) must(r->scales[i] <= 0x7e);
    o.global = r->globals;
    moe4_status status = moe4_nvfp4_dequantize(ctx, r->y, in->y_dtype, in->ld, r->codes, r->scales, in->rows, in->cols, &o);
    must(status == MOE4_OK || in->y_dtype == MOE4_F64);
}

/* The input itself as codes and scales: bad scale bytes must be refused by all. */
static void dequantize_raw(moe4_ctx *ctx, struct result *r, const struct input *in) {
    uint8_t scales[MAX_SCALES];
    moe4_quantize_options o = in->options;
    memcpy(scales, in->x, sizeof scales);
    for (size_t i = 0; in->rows % 2 && i < sizeof scales; i++) scales[i] %= 0x7f;
    o.global = in->globals;
    moe4_nvfp4_dequantize(ctx, r->raw_y, in->y_dtype, in->ld, (const uint8_t *)in->x, scales, in->rows, in->cols, &o);
}

static void run(moe4_ctx *ctx, struct result *r, const struct input *in) {
    memset(r, 0xee, sizeof *r);
    memset(r->error, 0, sizeof r->error);
    if (moe4_amax(ctx, &r->amax, in->x, in->x_dtype, in->rows, in->cols, in->ld) == MOE4_OK && isnan(r->amax)) r->amax = 0;
    quantize(ctx, r, in);
    dequantize_raw(ctx, r, in);
}

/* The plain form of what r has, by the functions that change layouts, is what quantizing to the plain form gives. */
static void check_layout(moe4_ctx *ctx, const struct result *r, const struct input *in) {
    static struct input plain_in;
    static struct result plain;
    uint8_t scales[MAX_CODES / 8], codes[MAX_CODES];
    size_t step = in->options.interleave, n = step ? 2 : 1;
    if (r->status != MOE4_OK || (step && in->options.global && in->options.per_row)) return; /* then rows have other globals */
    plain_in = *in;
    plain_in.options.scale_layout = MOE4_SCALES_LINEAR;
    plain_in.options.interleave = 0;
    memset(&plain, 0, sizeof plain);
    quantize(ctx, &plain, &plain_in);
    must(plain.status == MOE4_OK && plain.n_saturated == r->n_saturated);
    must(moe4_scales_convert(ctx, scales, MOE4_SCALES_LINEAR, r->scales, in->options.scale_layout, n, in->rows / n, in->cols) == MOE4_OK);
    memcpy(codes, r->codes, sizeof codes);
    if (step) {
        uint8_t halves[MAX_CODES / 8];
        memcpy(halves, scales, sizeof halves);
        must(moe4_rows_interleave(ctx, codes, r->codes, 1, in->rows, in->cols / 2, step) == MOE4_OK);
        must(moe4_rows_interleave(ctx, scales, halves, 1, in->rows, in->cols / 16, step) == MOE4_OK);
    }
    must(memcmp(codes, plain.codes, in->rows * in->cols / 2) == 0);
    must(memcmp(scales, plain.scales, in->rows * in->cols / 16) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct input in;
    static struct result scalar, other;
    if (!n_ctxs) make_ctxs();
    memset(&in, 0, sizeof in);
    read_input(&in, data, size);
    run(ctxs[0], &scalar, &in);
    check_layout(ctxs[n_ctxs - 1], &scalar, &in);
    for (size_t i = 1; i < n_ctxs; i++) {
        run(ctxs[i], &other, &in);
        must(memcmp(&scalar, &other, sizeof scalar) == 0);
    }
    return 0;
}
