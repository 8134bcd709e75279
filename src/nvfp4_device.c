/* The codec for matrices in a device's memory: the device looks at numbers, the host makes global scales of them and says what is wrong,
 * so both are the CPU's. */
#include "backend.h"
#include "bits.h"
#include "layout.h"

moe4_status moe4_amax_on_device(const moe4_codec_call *c, float *amax_ret) {
    uint32_t bits;
    MOE4_TRY(c->ctx->backend->amax(c, &bits));
    *amax_ret = moe4_float(bits);
    return MOE4_OK;
}

/* ---- quantize ---- */

/* The first NaN or Inf of x, by row and column of x. */
static moe4_status fail_nonfinite(const moe4_codec_call *given) {
    moe4_codec_call c = *given;
    uint64_t first;
    c.o.interleave = 0;
    MOE4_TRY(c.ctx->backend->codec_look(&c, false, &first));
    MOE4_CHECK(c.ctx, first != UINT64_MAX, MOE4_ERROR_FORMAT, "x: changed while it was read");
    const size_t row = (size_t)first / c.cols, col = (size_t)first % c.cols, width = moe4_dtype_bytes(c.dtype);
    uint32_t bits = 0; /* little-endian: a half lies in its low bytes */
    MOE4_TRY(c.ctx->backend->memory_copy(c.ctx, &bits, (const char *)c.x + (row * c.ld + col) * width, width, c.o.stream));
    float x = c.dtype == MOE4_F32    ? moe4_float(bits)
              : c.dtype == MOE4_BF16 ? moe4_bf16_to_float((uint16_t)bits)
                                     : moe4_f16_to_float((uint16_t)bits);
    return moe4_nvfp4_fail_nonfinite(c.ctx, row, col, x);
}

static moe4_status quantize(const moe4_codec_call *c, uint32_t *amax, moe4_codec_scale *scales, size_t n_globals, float *global_ret,
                            uint64_t *n_saturated_ret) {
    uint64_t n_saturated;
    MOE4_TRY(c->ctx->backend->amax(c, amax));
    for (size_t i = 0; i < n_globals; i++) {
        if (amax[i] >= 0x7f800000) return fail_nonfinite(c);
        scales[i] = moe4_nvfp4_scale(&c->o, i, moe4_float(amax[i]));
    }
    MOE4_TRY(c->ctx->backend->quantize(c, scales, &n_saturated));
    for (size_t i = 0; global_ret && i < n_globals; i++) global_ret[i] = scales[i].global;
    if (n_saturated_ret) *n_saturated_ret = n_saturated;
    return MOE4_OK;
}

moe4_status moe4_nvfp4_quantize_on_device(const moe4_codec_call *c, float *global_ret, uint64_t *n_saturated_ret) {
    const size_t n_globals = c->o.per_row ? c->rows : 1;
    uint32_t *amax = moe4_calloc(c->ctx, n_globals, sizeof *amax, "row amaxes");
    moe4_codec_scale *scales = amax ? moe4_calloc(c->ctx, n_globals, sizeof *scales, "row scales") : NULL;
    moe4_status status = scales ? quantize(c, amax, scales, n_globals, global_ret, n_saturated_ret) : MOE4_ERROR_MEMORY;
    moe4_free(c->ctx, amax);
    moe4_free(c->ctx, scales);
    return status;
}

/* ---- dequantize ---- */

static moe4_status fail_scale(const moe4_codec_call *c, uint64_t first) {
    const size_t n_blocks = c->cols / MOE4_BLOCK, row = (size_t)first / n_blocks, block = (size_t)first % n_blocks;
    const uint8_t *part = c->scales + row / c->part_rows * c->part_bytes;
    const size_t at = moe4_scales_at(c->o.scale_layout, c->part_rows, n_blocks, row % c->part_rows, block / 4) + block % 4;
    uint8_t scale;
    MOE4_TRY(c->ctx->backend->memory_copy(c->ctx, &scale, part + at, 1, c->o.stream));
    return moe4_nvfp4_fail_scale(c->ctx, row, block, scale);
}

moe4_status moe4_nvfp4_dequantize_on_device(const moe4_codec_call *c) {
    uint64_t first_bad;
    MOE4_TRY(c->ctx->backend->codec_look(c, true, &first_bad));
    return first_bad == UINT64_MAX ? c->ctx->backend->dequantize(c, c->o.global) : fail_scale(c, first_bad);
}
