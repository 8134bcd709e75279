/* The same numbers in another order: block scales, gate and up rows, K-major matrices. Bytes are moved, never looked at. */
#include "layout.h"

#include "backend.h"

#include <string.h>

enum { TASK_BYTES = 1 << 16, ROW_TILE = 128, GROUP = 32 };

/* Units of `bytes` each that one task takes. */
static size_t task_units(size_t bytes) {
    return bytes < TASK_BYTES ? TASK_BYTES / (bytes ? bytes : 1) : 1;
}

static size_t min(size_t a, size_t b) {
    return a < b ? a : b;
}

/* ---- one matrix's scales, by row ---- */

bool moe4_scales_size(size_t *bytes_ret, moe4_scale_layout layout, size_t rows, size_t n_blocks) {
    if (layout == MOE4_SCALES_LINEAR) return moe4_mul(bytes_ret, rows, n_blocks);
    size_t row_bytes = n_blocks / 4 + (n_blocks % 4 != 0);
    if (!moe4_mul(&row_bytes, row_bytes, 4)) return false;
    if (layout == MOE4_SCALES_128X4) {
        if (!moe4_add(&rows, rows, ROW_TILE - 1)) return false;
        rows -= rows % ROW_TILE;
    }
    return moe4_mul(bytes_ret, rows, row_bytes);
}

void moe4_scales_get(uint8_t *dst, const uint8_t *src, moe4_scale_layout layout, size_t rows, size_t n_blocks, size_t row, size_t first,
                     size_t n) {
    if (layout == MOE4_SCALES_LINEAR) {
        memcpy(dst, src + row * n_blocks + first, n);
        return;
    }
    for (size_t i = 0; i < n; i += 4) memcpy(dst + i, src + moe4_scales_at(layout, rows, n_blocks, row, (first + i) / 4), min(4, n - i));
}

void moe4_scales_put(uint8_t *dst, const uint8_t *src, moe4_scale_layout layout, size_t rows, size_t n_blocks, size_t row, size_t first,
                     size_t n) {
    for (size_t i = 0; i < n; i += 4) {
        uint8_t quad[4] = {0};
        memcpy(quad, src + i, min(4, n - i));
        memcpy(dst + moe4_scales_at(layout, rows, n_blocks, row, (first + i) / 4), quad, layout == MOE4_SCALES_LINEAR ? min(4, n - i) : 4);
    }
}

void moe4_scales_pad(uint8_t *dst, moe4_scale_layout layout, size_t rows, size_t n_blocks) {
    if (layout != MOE4_SCALES_128X4 || rows % ROW_TILE == 0) return;
    for (size_t row = rows; row % ROW_TILE; row++)
        for (size_t quad = 0; 4 * quad < n_blocks; quad++) memset(dst + moe4_scales_at(layout, rows, n_blocks, row, quad), 0, 4);
}

/* ---- convert: 128 rows of a matrix at a time ---- */

struct scales_job {
    moe4_scales_conversion s;
    size_t n_tiles, tiles_in_matrix, task_tiles;
};

/* Bytes from one row's quad to the next row's, within a group of 32 rows. */
static size_t row_step(moe4_scale_layout layout, size_t n_blocks) {
    return layout == MOE4_SCALES_LINEAR ? n_blocks : layout == MOE4_SCALES_WORDS ? 4 : 16;
}

/* Row `row` and the following ones of its group, one quad of n scales each. */
static void convert_group(const struct scales_job *job, uint8_t *dst, const uint8_t *src, size_t row, size_t quad, size_t n) {
    size_t n_rows = row < job->s.rows ? min(GROUP, job->s.rows - row) : 0;
    size_t dst_step = row_step(job->s.dst_layout, job->s.n_blocks), src_step = row_step(job->s.src_layout, job->s.n_blocks);
    uint8_t *to = dst + moe4_scales_at(job->s.dst_layout, job->s.rows, job->s.n_blocks, row, quad);
    if (n_rows) src += moe4_scales_at(job->s.src_layout, job->s.rows, job->s.n_blocks, row, quad);
    for (size_t i = 0; i < n_rows; i++) {
        uint8_t scales[4] = {0};
        if (n == 4) {
            memcpy(to + i * dst_step, src + i * src_step, 4);
        } else {
            memcpy(scales, src + i * src_step, n);
            memcpy(to + i * dst_step, scales, job->s.dst_layout == MOE4_SCALES_LINEAR ? n : 4);
        }
    }
    for (size_t i = n_rows; i < GROUP && job->s.dst_layout == MOE4_SCALES_128X4; i++) memset(to + i * dst_step, 0, 4);
}

static void convert_task(void *arg, size_t task) {
    const struct scales_job *job = arg;
    for (size_t i = task * job->task_tiles, end = min(i + job->task_tiles, job->n_tiles); i < end; i++) {
        size_t matrix = i / job->tiles_in_matrix, row = i % job->tiles_in_matrix * ROW_TILE;
        uint8_t *dst = job->s.dst + matrix * job->s.dst_bytes;
        const uint8_t *src = job->s.src + matrix * job->s.src_bytes;
        size_t last = job->s.dst_layout == MOE4_SCALES_128X4 ? row + ROW_TILE : min(row + ROW_TILE, job->s.rows);
        for (size_t quad = 0; 4 * quad < job->s.n_blocks; quad++)
            for (size_t r = row; r < last; r += GROUP) convert_group(job, dst, src, r, quad, min(4, job->s.n_blocks - 4 * quad));
    }
}

static moe4_status check_scales(moe4_ctx *ctx, size_t *bytes_ret, size_t *all_bytes_ret, moe4_scale_layout layout, size_t n_matrices,
                                size_t rows, size_t cols) {
    MOE4_CHECK(ctx, (unsigned)layout <= MOE4_SCALES_128X4, MOE4_ERROR_ARGUMENT, "layout: %d, there are 0 to %d", (int)layout,
               (int)MOE4_SCALES_128X4);
    MOE4_CHECK(ctx, cols % MOE4_BLOCK == 0, MOE4_ERROR_ARGUMENT, "cols: %zu, need a multiple of %d", cols, MOE4_BLOCK);
    MOE4_CHECK(ctx, moe4_scales_size(bytes_ret, layout, rows, cols / MOE4_BLOCK) && moe4_mul(all_bytes_ret, *bytes_ret, n_matrices),
               MOE4_ERROR_ARGUMENT, "scales of %zu x %zu x %zu do not fit in memory", n_matrices, rows, cols);
    return MOE4_OK;
}

moe4_status moe4_scales_bytes(moe4_ctx *ctx, size_t *bytes_ret, moe4_scale_layout layout, size_t n_matrices, size_t rows, size_t cols) {
    size_t matrix_bytes = 0, bytes = 0;
    moe4_begin(ctx);
    MOE4_CHECK(ctx, bytes_ret, MOE4_ERROR_ARGUMENT, "bytes_ret is NULL");
    MOE4_TRY(check_scales(ctx, &matrix_bytes, &bytes, layout, n_matrices, rows, cols));
    *bytes_ret = bytes;
    return MOE4_OK;
}

static moe4_status read_conversion(moe4_ctx *ctx, moe4_scales_conversion *s, bool *on_device_ret, size_t cols) {
    size_t dst_bytes = 0, src_bytes = 0;
    *on_device_ret = false;
    s->n_blocks = cols / MOE4_BLOCK;
    MOE4_TRY(check_scales(ctx, &s->dst_bytes, &dst_bytes, s->dst_layout, s->n_matrices, s->rows, cols));
    MOE4_TRY(check_scales(ctx, &s->src_bytes, &src_bytes, s->src_layout, s->n_matrices, s->rows, cols));
    if (dst_bytes == 0) return MOE4_OK;
    MOE4_CHECK(ctx, s->dst && s->src, MOE4_ERROR_ARGUMENT, "%s is NULL", s->dst ? "src" : "dst");
    return moe4_buffers_owner(ctx, on_device_ret, (struct moe4_buffer[]){{s->dst, "dst"}, {s->src, "src"}}, 2);
}

static void convert_on_host(moe4_ctx *ctx, const moe4_scales_conversion *s) {
    struct scales_job job = {.s = *s};
    if (s->n_matrices == 0 || s->rows == 0 || s->n_blocks == 0) return;
    job.tiles_in_matrix = (s->rows - 1) / ROW_TILE + 1;
    job.n_tiles = s->n_matrices * job.tiles_in_matrix;
    job.task_tiles = task_units(min(s->rows, ROW_TILE) * s->n_blocks);
    moe4_parallel_for(ctx, (job.n_tiles - 1) / job.task_tiles + 1, convert_task, &job);
}

static moe4_status convert(moe4_ctx *ctx, moe4_scales_conversion s, size_t cols, void *stream, bool waits) {
    bool on_device;
    moe4_begin(ctx);
    MOE4_TRY(read_conversion(ctx, &s, &on_device, cols));
    if (on_device) return ctx->backend->scales_convert(ctx, &s, stream, waits);
    convert_on_host(ctx, &s);
    return MOE4_OK;
}

moe4_status moe4_scales_convert(moe4_ctx *ctx, void *dst, moe4_scale_layout dst_layout, const void *src, moe4_scale_layout src_layout,
                                size_t n_matrices, size_t rows, size_t cols) {
    const moe4_scales_conversion s = {
        .dst = dst, .src = src, .dst_layout = dst_layout, .src_layout = src_layout, .n_matrices = n_matrices, .rows = rows};
    return convert(ctx, s, cols, NULL, true);
}

moe4_status moe4_scales_convert_async(moe4_ctx *ctx, void *dst, moe4_scale_layout dst_layout, const void *src, moe4_scale_layout src_layout,
                                      size_t n_matrices, size_t rows, size_t cols, void *stream) {
    const moe4_scales_conversion s = {
        .dst = dst, .src = src, .dst_layout = dst_layout, .src_layout = src_layout, .n_matrices = n_matrices, .rows = rows};
    return convert(ctx, s, cols, stream, false);
}

/* ---- gate and up rows ---- */

/* What moves with the host's threads only: ARGUMENT for a device's memory. */
static moe4_status check_host(const moe4_ctx *ctx, const void *dst, const void *src) {
    bool on_device;
    MOE4_TRY(moe4_buffers_owner(ctx, &on_device, (struct moe4_buffer[]){{dst, "dst"}, {src, "src"}}, 2));
    MOE4_CHECK(ctx, !on_device, MOE4_ERROR_UNSUPPORTED, "dst and src are memory of %s; this call moves host memory", ctx->device_name);
    return MOE4_OK;
}

struct rows_job {
    uint8_t *dst;
    const uint8_t *src;
    bool deinterleave;
    size_t n_rows, half, row_bytes, granularity, task_rows;
};

static void rows_task(void *arg, size_t task) {
    const struct rows_job *job = arg;
    for (size_t i = task * job->task_rows, end = min(i + job->task_rows, job->n_rows); i < end; i++) {
        size_t row = i % (2 * job->half), start = i - row;
        size_t halves = i * job->row_bytes, mixed = (start + moe4_interleaved_row(row, job->half, job->granularity)) * job->row_bytes;
        if (job->deinterleave)
            memcpy(job->dst + halves, job->src + mixed, job->row_bytes);
        else
            memcpy(job->dst + mixed, job->src + halves, job->row_bytes);
    }
}

static moe4_status move_rows(moe4_ctx *ctx, struct rows_job *job, size_t n_matrices, size_t rows) {
    size_t bytes;
    moe4_begin(ctx);
    MOE4_CHECK(ctx, rows % 2 == 0, MOE4_ERROR_ARGUMENT, "rows: %zu, need an even number: gate and up have as many", rows);
    job->half = rows / 2;
    MOE4_CHECK(ctx, job->granularity && job->half % job->granularity == 0, MOE4_ERROR_ARGUMENT,
               "granularity: %zu does not divide the %zu rows of gate", job->granularity, job->half);
    MOE4_CHECK(ctx, moe4_mul(&job->n_rows, n_matrices, rows) && moe4_mul(&bytes, job->n_rows, job->row_bytes), MOE4_ERROR_ARGUMENT,
               "%zu x %zu rows of %zu bytes do not fit in memory", n_matrices, rows, job->row_bytes);
    if (bytes == 0) return MOE4_OK;
    MOE4_CHECK(ctx, job->dst && job->src, MOE4_ERROR_ARGUMENT, "%s is NULL", job->dst ? "src" : "dst");
    MOE4_TRY(check_host(ctx, job->dst, job->src));
    job->task_rows = task_units(job->row_bytes);
    moe4_parallel_for(ctx, (job->n_rows - 1) / job->task_rows + 1, rows_task, job);
    return MOE4_OK;
}

moe4_status moe4_rows_interleave(moe4_ctx *ctx, void *dst, const void *src, size_t n_matrices, size_t rows, size_t row_bytes,
                                 size_t granularity) {
    struct rows_job job = {.dst = dst, .src = src, .row_bytes = row_bytes, .granularity = granularity};
    return move_rows(ctx, &job, n_matrices, rows);
}

moe4_status moe4_rows_deinterleave(moe4_ctx *ctx, void *dst, const void *src, size_t n_matrices, size_t rows, size_t row_bytes,
                                   size_t granularity) {
    struct rows_job job = {.dst = dst, .src = src, .row_bytes = row_bytes, .granularity = granularity, .deinterleave = true};
    return move_rows(ctx, &job, n_matrices, rows);
}

/* ---- transpose ---- */

/* Squares with sides of 256 bytes, turned in a buffer: what is read and written lies in runs of four cache lines, and rows of dst, often a
 * power of two apart, do not evict one another. A band is a square's width of src's columns. */
enum { SIDE_BYTES = 256 };

struct transpose_job {
    uint8_t *dst;
    const uint8_t *src;
    size_t rows, cols, element_bytes, side, n_bands, bands_in_matrix, task_bands;
};

/* Exchanges the quarters off the diagonal: the high bytes of a under the mask with the low ones of b. */
static inline void exchange(uint64_t *a, uint64_t *b, int shift, uint64_t mask) {
    uint64_t swap = (*a >> shift ^ *b) & mask;
    *a ^= swap << shift;
    *b ^= swap;
}

/* 8 x 8 bytes, by quarters of 4 x 4 bytes, of 2 x 2, of 1. The first byte in memory is a word's lowest. */
static void transpose_8x8(uint8_t *dst, size_t dst_step, const uint8_t *src, size_t src_step) {
    uint64_t w[8];
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; i++) memcpy(&w[i], src + i * src_step, 8);
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) exchange(&w[i], &w[i + 4], 32, 0xffffffff);
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) exchange(&w[i + i / 2 * 2], &w[i + i / 2 * 2 + 2], 16, 0x0000ffff0000ffff);
#pragma GCC unroll 4
    for (size_t i = 0; i < 8; i += 2) exchange(&w[i], &w[i + 1], 8, 0x00ff00ff00ff00ff);
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; i++) memcpy(dst + i * dst_step, &w[i], 8);
}

/* turned[j][i] = src[i, j] for i < n_rows, j < n_cols; bytes in eights where there are eight. */
static void turn(uint8_t *turned, const uint8_t *src, size_t src_step, size_t n_rows, size_t n_cols, size_t element_bytes) {
    size_t whole_rows = element_bytes == 1 ? n_rows / 8 * 8 : 0, whole_cols = n_cols / 8 * 8;
    for (size_t i = 0; i < whole_rows; i += 8)
        for (size_t j = 0; j < whole_cols; j += 8) transpose_8x8(turned + j * SIDE_BYTES + i, SIDE_BYTES, src + i * src_step + j, src_step);
    for (size_t i = 0; i < n_rows; i++)
        for (size_t j = i < whole_rows ? whole_cols : 0; j < n_cols; j++) {
            uint8_t *to = turned + j * SIDE_BYTES + i * element_bytes;
            const uint8_t *from = src + i * src_step + j * element_bytes;
            if (element_bytes == 4)
                memcpy(to, from, 4);
            else if (element_bytes == 2)
                memcpy(to, from, 2);
            else
                *to = *from;
        }
}

static void transpose_task(void *arg, size_t task) {
    const struct transpose_job *job = arg;
    uint8_t turned[SIDE_BYTES * SIDE_BYTES];
    size_t bytes = job->element_bytes, side = job->side, dst_step = job->rows * bytes, src_step = job->cols * bytes;
    for (size_t band = task * job->task_bands, end = min(band + job->task_bands, job->n_bands); band < end; band++) {
        size_t start = band / job->bands_in_matrix * job->rows * job->cols * bytes, col = band % job->bands_in_matrix * side;
        size_t n_cols = min(side, job->cols - col);
        for (size_t row = 0; row < job->rows; row += side) {
            size_t n_rows = min(side, job->rows - row);
            turn(turned, job->src + start + row * src_step + col * bytes, src_step, n_rows, n_cols, bytes);
            for (size_t j = 0; j < n_cols; j++)
                memcpy(job->dst + start + (col + j) * dst_step + row * bytes, turned + j * SIDE_BYTES, n_rows * bytes);
        }
    }
}

moe4_status moe4_transpose(moe4_ctx *ctx, void *dst, const void *src, size_t n_matrices, size_t rows, size_t cols, size_t element_bytes) {
    struct transpose_job job = {.dst = dst, .src = src, .rows = rows, .cols = cols, .element_bytes = element_bytes};
    size_t bytes;
    moe4_begin(ctx);
    MOE4_CHECK(ctx, element_bytes == 1 || element_bytes == 2 || element_bytes == 4, MOE4_ERROR_ARGUMENT,
               "element_bytes: %zu, need 1, 2 or 4", element_bytes);
    MOE4_CHECK(ctx, moe4_mul(&bytes, rows, cols) && moe4_mul(&bytes, bytes, n_matrices) && moe4_mul(&bytes, bytes, element_bytes),
               MOE4_ERROR_ARGUMENT, "%zu x %zu x %zu elements of %zu bytes do not fit in memory", n_matrices, rows, cols, element_bytes);
    if (bytes == 0) return MOE4_OK;
    MOE4_CHECK(ctx, dst && src, MOE4_ERROR_ARGUMENT, "%s is NULL", dst ? "src" : "dst");
    MOE4_TRY(check_host(ctx, dst, src));
    job.side = SIDE_BYTES / element_bytes;
    job.bands_in_matrix = (cols - 1) / job.side + 1;
    job.n_bands = n_matrices * job.bands_in_matrix;
    job.task_bands = task_units(rows * min(cols, job.side) * element_bytes);
    moe4_parallel_for(ctx, (job.n_bands - 1) / job.task_bands + 1, transpose_task, &job);
    return MOE4_OK;
}
