/* Activation rows on their way into a product. */
#include "rows.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "pool.h"

size_t moe4_in_place(const moe4_weight *w) {
    (void)w;
    return 0;
}

size_t moe4_fp32_row_bytes(size_t k) {
    return (k + 15) / 16 * 16 * sizeof(float);
}

uint64_t moe4_fp32_pack_row(const struct moe4_kernels *kernels, void *row, float *factor_ret, const float *x, size_t k,
                            const struct moe4_rounding *rounding) {
    enum { CHUNK = 256 };
    float *out = row;
    uint64_t n_saturated = 0;
    memset(out + k, 0, moe4_fp32_row_bytes(k) - k * sizeof *out);
    *factor_ret = 1;
    if (rounding->act == MOE4_ACT_BF16) {
        memcpy(out, x, k * sizeof *out);
        return 0;
    }
    for (size_t k0 = 0; k0 < k; k0 += CHUNK) {
        size_t n = k - k0 < CHUNK ? k - k0 : CHUNK;
        if (rounding->act == MOE4_ACT_W4A16) {
            uint16_t half[CHUNK];
            kernels->narrow_row(half, MOE4_BF16, x + k0, n);
            kernels->widen_row(out + k0, half, MOE4_BF16, n);
        } else {
            const struct moe4_quantizer q = {.recipe = MOE4_RECIPE_ACTIVATION, .global = rounding->S};
            uint8_t codes[CHUNK / 2], scales[CHUNK / MOE4_BLOCK];
            n_saturated += kernels->quantize_row(codes, scales, x + k0, n, &q);
            kernels->dequant_row(out + k0, codes, scales, n, 1.f);
        }
    }
    if (rounding->act != MOE4_ACT_W4A16) *factor_ret = rounding->decode;
    return n_saturated;
}

/* ---- the stage ---- */

void moe4_run(const moe4_ctx *ctx, size_t n_tasks, double work, void (*fn)(void *arg, size_t task), void *arg) {
    if (work < 1 << 18) {
        for (size_t i = 0; i < n_tasks; i++) fn(arg, i);
    } else {
        moe4_pool_run(ctx->pool, n_tasks, fn, arg);
    }
}

size_t moe4_row_tasks(const moe4_ctx *ctx) {
    return 4 * moe4_ctx_n_threads(ctx);
}

/* Encode scale of recipe `activation`: S = 2688/A, at most FLT_MAX; 1 for A = 0. */
static float encode_scale(float amax) {
    if (amax == 0) return 1;
    float S = 2688.f / amax;
    return S < FLT_MAX ? S : FLT_MAX;
}

struct run {
    struct moe4_row_stage *s;
    size_t n_tasks;
    _Atomic uint64_t n_saturated, n_nonfinite;
    _Atomic uint32_t amax_bits; /* TENSOR: bits of non-negative floats order as the floats do */
    float S;
};

static const float *source_row(const struct run *r, size_t task, size_t i) {
    const struct moe4_row_stage *s = r->s;
    size_t row = s->index ? (size_t)s->index[i] : i;
    const char *src = (const char *)s->src + row * s->src_ld * moe4_dtype_bytes(s->src_dtype);
    if (s->src_dtype == MOE4_F32 && !s->weight) return (const float *)src;
    float *wide = s->scratch + task * (moe4_fp32_row_bytes(s->k) / sizeof *wide);
    s->ctx->kernels->widen_row(wide, src, s->src_dtype, s->k);
    if (s->weight) s->ctx->kernels->scale_row(wide, s->weight[i], 1.f, s->k);
    return wide;
}

static void amax_task(void *arg, size_t task) {
    struct run *r = arg;
    const struct moe4_row_stage *s = r->s;
    for (size_t i = s->n_rows * task / r->n_tasks; i < s->n_rows * (task + 1) / r->n_tasks; i++) {
        float amax = s->ctx->kernels->amax_row(source_row(r, task, i), s->k);
        uint32_t bits;
        memcpy(&bits, &amax, sizeof bits);
        uint32_t seen = atomic_load(&r->amax_bits);
        while (isfinite(amax) && bits > seen && !atomic_compare_exchange_weak(&r->amax_bits, &seen, bits)) {
        }
    }
}

static struct moe4_rounding row_rounding(const struct run *r, size_t i, float amax) {
    const struct moe4_row_stage *s = r->s;
    struct moe4_rounding rounding = {.act = s->act};
    if (s->act == MOE4_ACT_STATIC) {
        rounding.decode = s->input_scale[s->one_input_scale ? 0 : i];
        rounding.S = fminf(1.f / rounding.decode, FLT_MAX);
    } else if (s->act == MOE4_ACT_TENSOR || s->act == MOE4_ACT_TOKEN) {
        rounding.S = s->act == MOE4_ACT_TENSOR ? r->S : encode_scale(amax);
        rounding.decode = 1.f / rounding.S;
    }
    return rounding;
}

static void pack_task(void *arg, size_t task) {
    struct run *r = arg;
    const struct moe4_row_stage *s = r->s;
    size_t row_bytes = s->gemm->row_bytes(s->k);
    uint64_t n_saturated = 0, n_nonfinite = 0;
    for (size_t i = s->n_rows * task / r->n_tasks; i < s->n_rows * (task + 1) / r->n_tasks; i++) {
        const float *x = source_row(r, task, i);
        float amax = s->ctx->kernels->amax_row(x, s->k);
        bool finite = isfinite(amax);
        if (!finite) {
            float *zeros = s->scratch + task * (moe4_fp32_row_bytes(s->k) / sizeof *zeros);
            x = memset(zeros, 0, s->k * sizeof *zeros);
            amax = 0;
            n_nonfinite++;
        }
        struct moe4_rounding rounding = row_rounding(r, i, amax);
        n_saturated += s->gemm->pack_row(s->ctx->kernels, (char *)s->packed + i * row_bytes, &s->factor[i], x, s->k, &rounding);
        if (!finite) s->factor[i] = NAN;
    }
    atomic_fetch_add(&r->n_saturated, n_saturated);
    atomic_fetch_add(&r->n_nonfinite, n_nonfinite);
}

void moe4_pack_rows(struct moe4_row_stage *s) {
    struct run r = {.s = s, .n_tasks = moe4_row_tasks(s->ctx)};
    if (r.n_tasks > s->n_rows) r.n_tasks = s->n_rows;
    double work = 10. * (double)s->n_rows * (double)s->k;
    if (s->act == MOE4_ACT_TENSOR) {
        moe4_run(s->ctx, r.n_tasks, work, amax_task, &r);
        float amax;
        uint32_t bits = r.amax_bits;
        memcpy(&amax, &bits, sizeof amax);
        r.S = encode_scale(amax);
    }
    moe4_run(s->ctx, r.n_tasks, work, pack_task, &r);
    s->n_saturated = r.n_saturated;
    s->n_nonfinite = r.n_nonfinite;
}
