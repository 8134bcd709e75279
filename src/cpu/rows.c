/* Activation rows on their way into a product. */
#include "rows.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "../layout.h"
#include "../nvfp4.h"
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

void moe4_fp32_pack_codes(const struct moe4_kernels *kernels, void *row, float *factor_ret, const uint8_t *codes, const uint8_t *scales,
                          size_t k) {
    kernels->dequant_row(row, codes, scales, k, 1.f);
    *factor_ret = 1;
}

/* ---- rows in chunks of 64 k ---- */

enum { CHUNK_K = 64, STEP_CHUNKS = 8 };

/* Whole chunks of n <= STEP_CHUNKS * 64 elements; codes and scales have room up to there. */
static char *pack_step(char *chunk, uint8_t *codes, uint8_t *scales, size_t n, moe4_pack_chunk pack_chunk, size_t chunk_bytes) {
    if (n % CHUNK_K) {
        size_t end = (n + CHUNK_K - 1) / CHUNK_K * CHUNK_K;
        memset(codes + n / 2, 0, (end - n) / 2);
        memset(scales + n / MOE4_BLOCK, 0, (end - n) / MOE4_BLOCK);
    }
    for (size_t i = 0; i < n; i += CHUNK_K, chunk += chunk_bytes) pack_chunk(chunk, codes + i / 2, scales + i / MOE4_BLOCK);
    return chunk;
}

uint64_t moe4_chunks_pack_row(const struct moe4_kernels *kernels, void *row, float *factor_ret, const float *x, size_t k,
                              const struct moe4_rounding *rounding, moe4_pack_chunk pack_chunk, size_t chunk_bytes) {
    const struct moe4_quantizer q = {.recipe = MOE4_RECIPE_ACTIVATION, .global = rounding->S};
    uint8_t codes[STEP_CHUNKS * CHUNK_K / 2], scales[STEP_CHUNKS * CHUNK_K / MOE4_BLOCK];
    char *chunk = row;
    uint64_t n_saturated = 0;
    for (size_t at = 0, n; at < k; at += n) {
        n = k - at < STEP_CHUNKS * CHUNK_K ? k - at : STEP_CHUNKS * CHUNK_K;
        n_saturated += kernels->quantize_row(codes, scales, x + at, n, &q);
        chunk = pack_step(chunk, codes, scales, n, pack_chunk, chunk_bytes);
    }
    *factor_ret = rounding->decode;
    return n_saturated;
}

void moe4_chunks_pack_codes(void *row, float *factor_ret, const uint8_t *codes, const uint8_t *scales, size_t k, moe4_pack_chunk pack_chunk,
                            size_t chunk_bytes) {
    uint8_t c[CHUNK_K / 2], s[CHUNK_K / MOE4_BLOCK];
    char *chunk = row;
    for (size_t at = 0, n; at < k; at += n) {
        n = k - at < CHUNK_K ? k - at : CHUNK_K;
        memcpy(c, codes + at / 2, n / 2);
        memcpy(s, scales + at / MOE4_BLOCK, n / MOE4_BLOCK);
        for (size_t b = 0; b < n / MOE4_BLOCK; b++) /* kernels may take the product of scales for not quite zero */
            if (s[b] == 0) memset(c + b * MOE4_BLOCK / 2, 0, MOE4_BLOCK / 2);
        chunk = pack_step(chunk, c, s, n, pack_chunk, chunk_bytes);
    }
    *factor_ret = 1;
}

/* ---- the stage ---- */

void moe4_run(const moe4_ctx *ctx, size_t n_tasks, double work, void (*fn)(void *arg, size_t task), void *arg) {
    moe4_pool_run(ctx->pool, n_tasks, work < (double)SIZE_MAX ? (size_t)(work / MOE4_THREAD_WORK) : SIZE_MAX, fn, arg);
}

struct lanes {
    void (*fn)(void *arg, size_t item, size_t lane);
    void *arg;
    size_t n_items;
    atomic_size_t taken;
};

static void run_lane(void *arg, size_t lane) {
    struct lanes *r = arg;
    for (size_t i; (i = atomic_fetch_add_explicit(&r->taken, 1, memory_order_relaxed)) < r->n_items;) r->fn(r->arg, i, lane);
}

void moe4_run_lanes(const moe4_ctx *ctx, size_t n_items, double work, void (*fn)(void *arg, size_t item, size_t lane), void *arg) {
    struct lanes r = {.fn = fn, .arg = arg, .n_items = n_items};
    const size_t n_threads = moe4_ctx_n_threads(ctx);
    moe4_run(ctx, n_items < n_threads ? n_items : n_threads, work, run_lane, &r);
}

enum { MOST_COLS = 8 * MOE4_TASK_COLS }; /* of a task */

size_t moe4_lane_bytes(const struct moe4_gemm *gemm, size_t n_outputs, size_t n_rows) {
    const size_t floats = n_rows < MOE4_TASK_FLOATS / MOST_COLS ? n_rows * MOST_COLS : MOE4_TASK_FLOATS;
    return n_outputs * floats * sizeof(float) + gemm->scratch_bytes;
}

struct moe4_task_size moe4_task_size(const moe4_ctx *ctx, const struct moe4_gemm *gemm, size_t n_rows, size_t n_matrices, size_t n_cols,
                                     size_t k) {
    enum { WEIGHT_BYTES = 300 << 10, FEW_ROWS = 4, TASKS_PER_THREAD = 8 };
    if (!gemm->pack) return (struct moe4_task_size){MOE4_TASK_COLS, MOE4_TASK_FLOATS / MOE4_TASK_COLS}; /* decodes once for all rows */
    /* Each task starts a new stream of weights, so its columns are many, while there are tasks enough for all threads. Few rows read
     * their weights once; for many they should stay in the second-level cache, unless a call reads them only once anyway. */
    const bool few = n_rows <= FEW_ROWS * n_matrices;
    size_t cols = few || !gemm->many_cols ? MOST_COLS : gemm->many_cols;
    while (cols > MOE4_TASK_COLS && ((!few && !gemm->many_cols && cols * k / 16 * 9 > WEIGHT_BYTES) ||
                                     n_matrices * n_cols < TASKS_PER_THREAD * moe4_ctx_n_threads(ctx) * cols))
        cols /= 2;
    return (struct moe4_task_size){cols, MOE4_TASK_FLOATS / cols};
}

size_t moe4_row_tasks(const moe4_ctx *ctx) {
    return 4 * moe4_ctx_n_threads(ctx);
}

size_t moe4_row_scratch_bytes(size_t k) {
    return moe4_fp32_row_bytes(k) + (k / MOE4_BLOCK + 63) / 64 * 64;
}

struct run {
    struct moe4_row_stage *s;
    size_t n_tasks;
    _Atomic uint64_t n_saturated, n_nonfinite;
    _Atomic uint32_t amax_bits; /* TENSOR: bits of non-negative floats order as the floats do */
    float S;
};

static float *task_scratch(const struct run *r, size_t task) {
    return (float *)(void *)((char *)r->s->scratch + task * moe4_row_scratch_bytes(r->s->k));
}

static size_t source_index(const struct moe4_row_stage *s, size_t i) {
    return s->index ? (size_t)s->index[i] : i;
}

static const float *source_row(const struct run *r, size_t task, size_t i) {
    const struct moe4_row_stage *s = r->s;
    const char *src = (const char *)s->src + source_index(s, i) * s->src_ld * moe4_dtype_bytes(s->src_dtype);
    if (s->src_dtype == MOE4_F32 && !s->weight) return (const float *)(const void *)src;
    float *wide = task_scratch(r, task);
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
        rounding.S = s->act == MOE4_ACT_TENSOR ? r->S : moe4_nvfp4_global(MOE4_RECIPE_ACTIVATION, amax, 0);
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
            x = memset(task_scratch(r, task), 0, s->k * sizeof *x);
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

/* ---- rows that are NVFP4 already ---- */

static void codes_task(void *arg, size_t task) {
    struct run *r = arg;
    const struct moe4_row_stage *s = r->s;
    const moe4_nvfp4_rows *rows = s->src;
    const struct moe4_kernels *kernels = s->ctx->kernels;
    size_t row_bytes = s->gemm->row_bytes(s->k), n_blocks = s->k / MOE4_BLOCK;
    float *wide = task_scratch(r, task);
    uint8_t *scales = (uint8_t *)wide + moe4_fp32_row_bytes(s->k);
    uint64_t n_nonfinite = 0;
    for (size_t i = s->n_rows * task / r->n_tasks; i < s->n_rows * (task + 1) / r->n_tasks; i++) {
        size_t row = source_index(s, i);
        const uint8_t *codes = rows->codes + row * (s->k / 2);
        float global = rows->global[rows->global_per_row ? row : 0] * (s->weight ? s->weight[i] : 1);
        void *packed = (char *)s->packed + i * row_bytes;
        uint8_t most = 0;
        moe4_scales_get(scales, rows->scales, rows->layout, s->n_src, n_blocks, row, 0, n_blocks);
        for (size_t b = 0; b < n_blocks; b++) most = scales[b] > most ? scales[b] : most;
        bool finite = most <= 0x7E && isfinite(global);
        if (!finite) memset(scales, 0, n_blocks);
        if (s->gemm->pack_codes) {
            s->gemm->pack_codes(kernels, packed, &s->factor[i], codes, scales, s->k);
        } else { /* the values are exact in fp32 and in bf16 */
            const struct moe4_rounding as_is = {.act = s->act == MOE4_ACT_BF16 ? MOE4_ACT_BF16 : MOE4_ACT_W4A16};
            kernels->dequant_row(wide, codes, scales, s->k, 1.f);
            s->gemm->pack_row(kernels, packed, &s->factor[i], wide, s->k, &as_is);
        }
        s->factor[i] = finite ? s->factor[i] * global : NAN;
        n_nonfinite += !finite;
    }
    atomic_fetch_add(&r->n_nonfinite, n_nonfinite);
}

void moe4_pack_rows(struct moe4_row_stage *s) {
    struct run r = {.s = s, .n_tasks = moe4_row_tasks(s->ctx)};
    if (r.n_tasks > s->n_rows) r.n_tasks = s->n_rows;
    double work = 10. * (double)s->n_rows * (double)s->k;
    if (s->src_dtype == MOE4_NVFP4) {
        moe4_run(s->ctx, r.n_tasks, work, codes_task, &r);
        s->n_nonfinite = r.n_nonfinite;
        return;
    }
    if (s->act == MOE4_ACT_TENSOR) {
        moe4_run(s->ctx, r.n_tasks, work, amax_task, &r);
        float amax;
        uint32_t bits = r.amax_bits;
        memcpy(&amax, &bits, sizeof amax);
        r.S = moe4_nvfp4_global(MOE4_RECIPE_ACTIVATION, amax, 0);
    }
    moe4_run(s->ctx, r.n_tasks, work, pack_task, &r);
    s->n_saturated = r.n_saturated;
    s->n_nonfinite = r.n_nonfinite;
}
