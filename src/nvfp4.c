/* The NVFP4 format in public: quantize, dequantize and amax of matrices. convert.c has the numbers one by one. */
#include "nvfp4.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>

#include "backend.h"
#include "bits.h"
#include "cpu/kernels.h"
#include "fpenv.h"
#include "layout.h"

float moe4_nvfp4_global(moe4_recipe recipe, float amax, int four_over_six) {
    if (amax == 0) return 1;
    if (recipe == MOE4_RECIPE_MODELOPT || recipe == MOE4_RECIPE_MODELOPT_STATIC) {
        float s2 = amax / (four_over_six ? 1536.f : 2688.f);
        return s2 > 0 ? s2 : 0x1p-149f;
    }
    float s = 2688.f / amax;
    return s < FLT_MAX ? s : FLT_MAX;
}

/* ---- matrices, in pieces of rows ---- */

enum { PIECE = 2048, TASK_ELEMENTS = 1 << 16 }; /* PIECE: a multiple of MOE4_BLOCK; a widened one lives on the stack */

struct matrix_job {
    moe4_ctx *ctx;
    const void *x; /* amax, quantize */
    void *y;       /* dequantize */
    moe4_dtype dtype;
    size_t rows, cols, ld;
    moe4_quantize_options o;
    uint8_t *codes, *scales;
    _Atomic uint32_t *amax; /* one, or [rows] with o.per_row: the bits of non-negative floats order as the floats, NaN last */
    _Atomic uint64_t n_saturated;
    atomic_bool bad;
    void (*piece)(struct matrix_job *job, size_t row, size_t col, size_t n);
    size_t row_pieces, task_pieces;
    size_t part_rows, part_bytes; /* scales: rows of a matrix that is laid out by itself, and its bytes */
};

static void run_task(void *arg, size_t task) {
    struct matrix_job *job = arg;
    size_t n_pieces = job->rows * job->row_pieces, i = task * job->task_pieces;
    for (size_t end = n_pieces - i < job->task_pieces ? n_pieces : i + job->task_pieces; i < end; i++) {
        size_t col = i % job->row_pieces * PIECE, left = job->cols - col;
        job->piece(job, i / job->row_pieces, col, left < PIECE ? left : PIECE);
    }
}

static void run_pieces(struct matrix_job *job, void (*piece)(struct matrix_job *job, size_t row, size_t col, size_t n)) {
    if (job->rows == 0 || job->cols == 0) return;
    job->piece = piece;
    job->row_pieces = (job->cols - 1) / PIECE + 1;
    job->task_pieces = TASK_ELEMENTS / (job->cols < PIECE ? job->cols : PIECE);
    moe4_parallel_for(job->ctx, (job->rows * job->row_pieces - 1) / job->task_pieces + 1, run_task, job);
}

/* The matrix as a device takes it. */
static moe4_codec_call device_call(const struct matrix_job *job) {
    return (moe4_codec_call){.ctx = job->ctx,
                             .x = job->x,
                             .y = job->y,
                             .dtype = job->dtype,
                             .rows = job->rows,
                             .cols = job->cols,
                             .ld = job->ld,
                             .o = job->o,
                             .codes = job->codes,
                             .scales = job->scales,
                             .part_rows = job->part_rows,
                             .part_bytes = job->part_bytes};
}

/* The matrix beside its ctx: dtype, pointer, ld, and that its size is one. */
static moe4_status check_matrix(struct matrix_job *job, const void *data, const char *what) {
    moe4_ctx *ctx = job->ctx;
    size_t bytes;
    MOE4_CHECK(ctx, job->dtype == MOE4_F32 || job->dtype == MOE4_BF16 || job->dtype == MOE4_F16, MOE4_ERROR_ARGUMENT,
               "%s: dtype %d, need F32, BF16 or F16", what, (int)job->dtype);
    if (job->ld == 0) job->ld = job->cols;
    MOE4_CHECK(ctx, job->ld >= job->cols, MOE4_ERROR_ARGUMENT, "%s: leading dimension %zu, need at least %zu columns", what, job->ld,
               job->cols);
    MOE4_CHECK(ctx, moe4_mul(&bytes, job->rows, job->ld) && moe4_mul(&bytes, bytes, 4), MOE4_ERROR_ARGUMENT,
               "%s: %zu x %zu elements do not fit in memory", what, job->rows, job->ld);
    MOE4_CHECK(ctx, data || job->rows == 0 || job->cols == 0, MOE4_ERROR_ARGUMENT, "%s is NULL", what);
    return MOE4_OK;
}

/* Rows are those of codes; x's and y's may be gate's and up's in turn. */
static size_t place(const struct matrix_job *job, size_t row, size_t col) {
    return (job->o.interleave ? moe4_interleaved_row(row, job->rows / 2, job->o.interleave) : row) * job->ld + col;
}

/* x[row, col..col+n) as fp32: in place or widened into buf. */
static const float *piece_of_x(const struct matrix_job *job, float buf[PIECE], size_t row, size_t col, size_t n) {
    size_t at = place(job, row, col);
    if (job->dtype == MOE4_F32) return (const float *)job->x + at;
    job->ctx->kernels->widen_row(buf, (const uint16_t *)job->x + at, job->dtype, n);
    return buf;
}

/* ---- whose memory ---- */

/* A few numbers are the host's even where matrices are a device's. */
static moe4_status check_on_host(const moe4_ctx *ctx, const void *data, const char *name) {
    bool on_device;
    MOE4_TRY(moe4_buffers_owner(ctx, &on_device, &(struct moe4_buffer){data, name}, 1));
    MOE4_CHECK(ctx, !on_device, MOE4_ERROR_ARGUMENT, "%s is memory of %s, need host memory", name, moe4_ctx_device(ctx));
    return MOE4_OK;
}

/* Codes, scales and x or y are all a device's, or all the host's; an empty matrix is nobody's. */
static moe4_status find_owner(const struct matrix_job *job, bool *on_device_ret) {
    *on_device_ret = false;
    if (job->rows == 0 || job->cols == 0) return MOE4_OK;
    const struct moe4_buffer all[] = {{job->x, "x"}, {job->y, "y"}, {job->codes, "codes"}, {job->scales, "scales"}};
    return moe4_buffers_owner(job->ctx, on_device_ret, all, 4);
}

static void amax_piece(struct matrix_job *job, size_t row, size_t col, size_t n) {
    float buf[PIECE];
    uint32_t bits = moe4_bits(job->ctx->kernels->amax_row(piece_of_x(job, buf, row, col, n), n));
    _Atomic uint32_t *most = &job->amax[job->o.per_row ? row : 0];
    uint32_t seen = atomic_load_explicit(most, memory_order_relaxed);
    while (bits > seen && !atomic_compare_exchange_weak_explicit(most, &seen, bits, memory_order_relaxed, memory_order_relaxed)) {
    }
}

static moe4_status amax(struct matrix_job *job, float *amax_ret) {
    _Atomic uint32_t most = 0;
    MOE4_CHECK(job->ctx, amax_ret, MOE4_ERROR_ARGUMENT, "amax_ret is NULL");
    MOE4_TRY(check_matrix(job, job->x, "x"));
    bool on_device;
    MOE4_TRY(find_owner(job, &on_device));
    if (on_device) {
        const moe4_codec_call c = device_call(job);
        return moe4_amax_on_device(&c, amax_ret);
    }
    job->amax = &most;
    run_pieces(job, amax_piece);
    *amax_ret = moe4_float(most);
    return MOE4_OK;
}

/* ---- options and globals ---- */

static moe4_status read_layout(struct matrix_job *job) {
    moe4_ctx *ctx = job->ctx;
    size_t n_parts = job->o.interleave ? 2 : 1, bytes;
    job->part_rows = job->rows / n_parts;
    MOE4_CHECK(ctx, (unsigned)job->o.scale_layout <= MOE4_SCALES_128X4, MOE4_ERROR_ARGUMENT, "options.scale_layout: %d, there are 0 to %d",
               (int)job->o.scale_layout, (int)MOE4_SCALES_128X4);
    MOE4_CHECK(ctx, job->rows % n_parts == 0, MOE4_ERROR_ARGUMENT, "rows: %zu, need an even number: gate and up have as many", job->rows);
    MOE4_CHECK(ctx, !job->o.interleave || job->part_rows % job->o.interleave == 0, MOE4_ERROR_ARGUMENT,
               "options.interleave: %zu does not divide the %zu rows of gate", job->o.interleave, job->part_rows);
    MOE4_CHECK(ctx,
               moe4_scales_size(&job->part_bytes, job->o.scale_layout, job->part_rows, job->cols / MOE4_BLOCK) &&
                   moe4_mul(&bytes, job->part_bytes, n_parts),
               MOE4_ERROR_ARGUMENT, "scales of %zu x %zu do not fit in memory", job->rows, job->cols);
    return MOE4_OK;
}

static moe4_status read_options(struct matrix_job *job, const moe4_quantize_options *options) {
    moe4_ctx *ctx = job->ctx;
    job->o = (moe4_quantize_options)MOE4_QUANTIZE_OPTIONS_INIT;
    MOE4_CHECK(ctx, moe4_options_read(&job->o, sizeof job->o, options), MOE4_ERROR_ARGUMENT,
               "options: struct_size is wrong, or a field is set that moe4 %s lacks", moe4_version());
    MOE4_CHECK(ctx, (unsigned)job->o.recipe <= MOE4_RECIPE_COMPRESSED_TENSORS, MOE4_ERROR_ARGUMENT, "options.recipe: %d, there are 0 to %d",
               (int)job->o.recipe, (int)MOE4_RECIPE_COMPRESSED_TENSORS);
    MOE4_CHECK(ctx, !job->o.four_over_six || job->o.recipe == MOE4_RECIPE_MODELOPT, MOE4_ERROR_ARGUMENT,
               "options.four_over_six: recipe %d lacks it, only %d has it", (int)job->o.recipe, (int)MOE4_RECIPE_MODELOPT);
    MOE4_CHECK(ctx, job->cols % MOE4_BLOCK == 0, MOE4_ERROR_ARGUMENT, "cols: %zu, need a multiple of %d", job->cols, MOE4_BLOCK);
    MOE4_TRY(read_layout(job));
    MOE4_TRY(check_on_host(ctx, job->o.global, "options.global"));
    for (size_t i = 0; job->o.global && i < (job->o.per_row ? job->rows : 1); i++) {
        float g = job->o.global[i];
        MOE4_CHECK(ctx, g > 0 && g <= FLT_MAX, MOE4_ERROR_ARGUMENT, "options.global[%zu]: %g, need a positive finite number", i, g);
        MOE4_CHECK(ctx, job->o.recipe != MOE4_RECIPE_ACTIVATION || 1.f / g <= FLT_MAX, MOE4_ERROR_ARGUMENT,
                   "options.global[%zu]: %g, and 1/%g is not finite", i, g, g);
        MOE4_CHECK(ctx, job->o.recipe != MOE4_RECIPE_MODELOPT_STATIC || 2688.f * g <= FLT_MAX, MOE4_ERROR_ARGUMENT,
                   "options.global[%zu]: %g, and 2688*%g is not finite", i, g, g);
    }
    return MOE4_OK;
}

moe4_codec_scale moe4_nvfp4_scale(const moe4_quantize_options *o, size_t row, float amax) {
    moe4_codec_scale s;
    if (o->global) {
        s.global = o->global[o->per_row ? row : 0];
        s.amax = 2688.f * s.global;
    } else {
        s.global = moe4_nvfp4_global(o->recipe, amax, o->four_over_six);
        s.amax = amax == 0 ? 2688 : amax; /* what the s2 of an all-zero tensor stands for */
    }
    return s;
}

static struct moe4_quantizer row_quantizer(const struct matrix_job *job, size_t row) {
    const moe4_codec_scale s = moe4_nvfp4_scale(&job->o, row, moe4_float(job->amax[job->o.per_row ? row : 0]));
    return (struct moe4_quantizer){.recipe = job->o.recipe, .four_over_six = job->o.four_over_six, .global = s.global, .amax = s.amax};
}

/* ---- what is wrong with the data ---- */

moe4_status moe4_nvfp4_fail_nonfinite(const moe4_ctx *ctx, size_t row, size_t col, float x) {
    return moe4_fail(ctx, MOE4_ERROR_FORMAT, "x: row %zu column %zu is %s; only finite numbers can be quantized", row, col,
                     isnan(x) ? "NaN" : "infinite");
}

moe4_status moe4_nvfp4_fail_scale(const moe4_ctx *ctx, size_t row, size_t block, uint8_t scale) {
    return moe4_fail(ctx, MOE4_ERROR_FORMAT, "scales: row %zu block %zu is 0x%02x, %s; need 0x00 to 0x7e", row, block, scale,
                     (scale & 0x7f) == 0x7f ? "a NaN" : "signed");
}

/* ---- scales of a piece, linear: in place, or in buf ---- */

static uint8_t *piece_of_scales(const struct matrix_job *job, uint8_t buf[PIECE / MOE4_BLOCK], size_t row, size_t col) {
    return job->o.scale_layout == MOE4_SCALES_LINEAR ? job->scales + (row * job->cols + col) / MOE4_BLOCK : buf;
}

static const uint8_t *get_scales(const struct matrix_job *job, uint8_t buf[PIECE / MOE4_BLOCK], size_t row, size_t col, size_t n) {
    uint8_t *scales = piece_of_scales(job, buf, row, col);
    if (scales == buf)
        moe4_scales_get(buf, job->scales + row / job->part_rows * job->part_bytes, job->o.scale_layout, job->part_rows,
                        job->cols / MOE4_BLOCK, row % job->part_rows, col / MOE4_BLOCK, n / MOE4_BLOCK);
    return scales;
}

static void put_scales(const struct matrix_job *job, const uint8_t buf[PIECE / MOE4_BLOCK], size_t row, size_t col, size_t n) {
    moe4_scales_put(job->scales + row / job->part_rows * job->part_bytes, buf, job->o.scale_layout, job->part_rows, job->cols / MOE4_BLOCK,
                    row % job->part_rows, col / MOE4_BLOCK, n / MOE4_BLOCK);
}

/* ---- quantize ---- */

static void quantize_piece(struct matrix_job *job, size_t row, size_t col, size_t n) {
    float buf[PIECE];
    uint8_t scales_buf[PIECE / MOE4_BLOCK], *scales = piece_of_scales(job, scales_buf, row, col);
    const struct moe4_quantizer z = row_quantizer(job, row);
    const float *x = piece_of_x(job, buf, row, col, n);
    uint64_t n_saturated = job->ctx->kernels->quantize_row(job->codes + (row * job->cols + col) / 2, scales, x, n, &z);
    if (scales == scales_buf) put_scales(job, scales, row, col, n);
    if (n_saturated) atomic_fetch_add_explicit(&job->n_saturated, n_saturated, memory_order_relaxed);
}

/* The first NaN or Inf of x, by row and column of x. */
static moe4_status fail_nonfinite(struct matrix_job *job) {
    float buf[PIECE];
    job->o.interleave = 0;
    for (size_t row = 0; row < job->rows; row++)
        for (size_t col = 0, n; col < job->cols; col += n) {
            n = job->cols - col < PIECE ? job->cols - col : PIECE;
            const float *x = piece_of_x(job, buf, row, col, n);
            for (size_t i = 0; i < n; i++)
                if (!isfinite(x[i])) return moe4_nvfp4_fail_nonfinite(job->ctx, row, col + i, x[i]);
        }
    return moe4_fail(job->ctx, MOE4_ERROR_FORMAT, "x: changed while it was read");
}

static moe4_status quantize_checked(struct matrix_job *job, float *global_ret) {
    size_t n_globals = job->o.per_row ? job->rows : 1;
    run_pieces(job, amax_piece);
    for (size_t i = 0; i < n_globals; i++)
        if (job->amax[i] >= 0x7f800000) return fail_nonfinite(job);
    run_pieces(job, quantize_piece);
    for (size_t row = 0; job->cols && row < job->rows; row += job->part_rows)
        moe4_scales_pad(job->scales + row / job->part_rows * job->part_bytes, job->o.scale_layout, job->part_rows, job->cols / MOE4_BLOCK);
    for (size_t i = 0; global_ret && i < n_globals; i++) global_ret[i] = row_quantizer(job, i).global;
    return MOE4_OK;
}

static moe4_status quantize(struct matrix_job *job, float *global_ret, uint64_t *n_saturated_ret, const moe4_quantize_options *options) {
    moe4_ctx *ctx = job->ctx;
    MOE4_TRY(read_options(job, options));
    MOE4_TRY(check_matrix(job, job->x, "x"));
    MOE4_CHECK(ctx, (job->codes && job->scales) || job->rows == 0 || job->cols == 0, MOE4_ERROR_ARGUMENT, "%s is NULL",
               job->codes ? "scales" : "codes");
    bool on_device;
    MOE4_TRY(check_on_host(ctx, global_ret, "global_ret"));
    MOE4_TRY(find_owner(job, &on_device));
    if (on_device) {
        const moe4_codec_call c = device_call(job);
        return moe4_nvfp4_quantize_on_device(&c, global_ret, n_saturated_ret);
    }
    job->amax = moe4_calloc(ctx, job->o.per_row ? job->rows : 1, sizeof *job->amax, "row amaxes");
    if (!job->amax) return MOE4_ERROR_MEMORY;
    moe4_status status = quantize_checked(job, global_ret);
    moe4_free(ctx, (void *)job->amax);
    if (status == MOE4_OK && n_saturated_ret) *n_saturated_ret = job->n_saturated;
    return status;
}

/* ---- dequantize ---- */

static void check_scales_piece(struct matrix_job *job, size_t row, size_t col, size_t n) {
    uint8_t buf[PIECE / MOE4_BLOCK];
    const uint8_t *scales = get_scales(job, buf, row, col, n);
    bool bad = false;
    for (size_t i = 0; i < n / MOE4_BLOCK; i++) bad |= scales[i] > 0x7e;
    if (bad) atomic_store_explicit(&job->bad, true, memory_order_relaxed);
}

static moe4_status fail_bad_scale(const struct matrix_job *job) {
    uint8_t buf[PIECE / MOE4_BLOCK];
    for (size_t row = 0; row < job->rows; row++)
        for (size_t col = 0, n; col < job->cols; col += n) {
            n = job->cols - col < PIECE ? job->cols - col : PIECE;
            const uint8_t *scales = get_scales(job, buf, row, col, n);
            for (size_t i = 0; i < n / MOE4_BLOCK; i++)
                if (scales[i] > 0x7e) return moe4_nvfp4_fail_scale(job->ctx, row, col / MOE4_BLOCK + i, scales[i]);
        }
    return moe4_fail(job->ctx, MOE4_ERROR_FORMAT, "scales: changed while they were read");
}

static void dequantize_piece(struct matrix_job *job, size_t row, size_t col, size_t n) {
    const struct moe4_kernels *k = job->ctx->kernels;
    float buf[PIECE];
    uint8_t scales_buf[PIECE / MOE4_BLOCK];
    size_t y_at = place(job, row, col);
    const uint8_t *codes = job->codes + (row * job->cols + col) / 2, *scales = get_scales(job, scales_buf, row, col, n);
    float global = job->o.global[job->o.per_row ? row : 0];
    bool divides = job->o.recipe == MOE4_RECIPE_COMPRESSED_TENSORS;
    if (job->o.recipe == MOE4_RECIPE_ACTIVATION) global = 1.f / global;
    if (job->dtype == MOE4_F32) {
        float *y = (float *)job->y + y_at;
        k->dequant_row(y, codes, scales, n, divides ? 1.f : global);
        for (size_t i = 0; divides && i < n; i++) y[i] /= global;
        return;
    }
    k->dequant_row(buf, codes, scales, n, 1.f);   /* exact */
    k->scale_row_to_odd(buf, global, divides, n); /* so narrowing rounds as if once */
    k->narrow_row((uint16_t *)job->y + y_at, job->dtype, buf, n);
}

static moe4_status dequantize(struct matrix_job *job, const moe4_quantize_options *options) {
    moe4_ctx *ctx = job->ctx;
    MOE4_TRY(read_options(job, options));
    MOE4_CHECK(ctx, job->o.global, MOE4_ERROR_ARGUMENT, "options.global is NULL: codes and scales have no value without it");
    MOE4_TRY(check_matrix(job, job->y, "y"));
    MOE4_CHECK(ctx, (job->codes && job->scales) || job->rows == 0 || job->cols == 0, MOE4_ERROR_ARGUMENT, "%s is NULL",
               job->codes ? "scales" : "codes");
    bool on_device;
    MOE4_TRY(find_owner(job, &on_device));
    if (on_device) {
        const moe4_codec_call c = device_call(job);
        return moe4_nvfp4_dequantize_on_device(&c);
    }
    run_pieces(job, check_scales_piece);
    if (job->bad) return fail_bad_scale(job);
    run_pieces(job, dequantize_piece);
    return MOE4_OK;
}

/* ---- public ---- */

moe4_status moe4_nvfp4_quantize(moe4_ctx *ctx, uint8_t *codes, uint8_t *scales, float *global_ret, uint64_t *n_saturated_ret, const void *x,
                                moe4_dtype x_dtype, size_t rows, size_t cols, size_t x_ld, const moe4_quantize_options *options) {
    struct matrix_job job = {
        .ctx = ctx, .x = x, .dtype = x_dtype, .rows = rows, .cols = cols, .ld = x_ld, .codes = codes, .scales = scales};
    struct moe4_fpenv env = moe4_fpenv_enter();
    moe4_begin(ctx);
    moe4_status status = quantize(&job, global_ret, n_saturated_ret, options);
    moe4_fpenv_leave(env);
    return status;
}

moe4_status moe4_nvfp4_dequantize(moe4_ctx *ctx, void *y, moe4_dtype y_dtype, size_t y_ld, const uint8_t *codes, const uint8_t *scales,
                                  size_t rows, size_t cols, const moe4_quantize_options *options) {
    struct matrix_job job = {.ctx = ctx,
                             .y = y,
                             .dtype = y_dtype,
                             .rows = rows,
                             .cols = cols,
                             .ld = y_ld,
                             .codes = (uint8_t *)codes, /* only read */
                             .scales = (uint8_t *)scales};
    struct moe4_fpenv env = moe4_fpenv_enter();
    moe4_begin(ctx);
    moe4_status status = dequantize(&job, options);
    moe4_fpenv_leave(env);
    return status;
}

moe4_status moe4_amax(moe4_ctx *ctx, float *amax_ret, const void *x, moe4_dtype x_dtype, size_t rows, size_t cols, size_t x_ld) {
    struct matrix_job job = {.ctx = ctx, .x = x, .dtype = x_dtype, .rows = rows, .cols = cols, .ld = x_ld};
    struct moe4_fpenv env = moe4_fpenv_enter();
    moe4_begin(ctx);
    moe4_status status = amax(&job, amax_ret);
    moe4_fpenv_leave(env);
    return status;
}
