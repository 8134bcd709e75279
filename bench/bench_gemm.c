/* The products alone, for work on the kernels: rows through pointers as a layer hands them over, packed weights larger than the caches,
 * ceilings and read bandwidth sampled in turn with the product. Times are the threads' own CPU time, so that a busy machine disturbs
 * little; wall time is the best of the samples. */
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "ceiling.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "internal.h"

enum { MAX_SAMPLES = 2000 };

struct samples {
    size_t n;
    double rate[MAX_SAMPLES];
};

struct bench {
    const moe4_ctx *ctx;
    const struct moe4_kernels *k;
    const struct moe4_gemm *gemm;
    size_t K, N, E, top, T, threads, task_cols;
    struct moe4_matrix *matrix; /* [E] */
    char *rows;                 /* [T] packed */
    float *y;                   /* [T * top, N] */
    size_t *start;              /* [E + 1] positions of an expert's rows */
    const void **row;           /* [T * top] */
    char *scratch;              /* [threads][gemm->scratch_bytes] */
    double cpu;                 /* of the run's tasks, all threads */
    atomic_size_t taken;
    pthread_mutex_t lock;
    enum ceiling ceiling;
    double macs;
};

static double seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t random_bits(void) {
    static uint64_t s = 88172645463325252u;
    s ^= s << 13;
    s ^= s >> 7;
    return s ^= s << 17;
}

static void *huge(size_t bytes) {
    void *p = NULL;
    bytes = (bytes + (2u << 20) - 1) & ~(size_t)((2u << 20) - 1);
    if (posix_memalign(&p, 2u << 20, bytes)) abort();
    madvise(p, bytes, MADV_HUGEPAGE);
    return p;
}

static void add(struct bench *b, double cpu, double macs) {
    pthread_mutex_lock(&b->lock);
    b->cpu += cpu;
    b->macs += macs;
    pthread_mutex_unlock(&b->lock);
}

/* Each thread takes pieces until none is left: one pair of clock readings for all of them. */
static void gemm_task(void *arg, size_t task) {
    struct bench *b = arg;
    const double t0 = seconds(CLOCK_THREAD_CPUTIME_ID);
    const size_t blocks = (b->N + b->task_cols - 1) / b->task_cols;
    double macs = 0;
    for (size_t i; (i = atomic_fetch_add(&b->taken, 1)) < b->E * blocks;) {
        const size_t e = i / blocks, col0 = i % blocks * b->task_cols, pos = b->start[e], n = b->start[e + 1] - pos;
        const size_t n_cols = b->N - col0 < b->task_cols ? b->N - col0 : b->task_cols;
        if (n)
            b->gemm->gemm(b->y + pos * b->N + col0, b->N, b->row + pos, n, &b->matrix[e], col0, n_cols, NULL,
                          b->scratch + task * b->gemm->scratch_bytes);
        macs += (double)n * (double)b->K * (double)n_cols;
    }
    add(b, seconds(CLOCK_THREAD_CPUTIME_ID) - t0, macs);
}

static void read_task(void *arg, size_t task) {
    struct bench *b = arg;
    (void)task;
    const double t0 = seconds(CLOCK_THREAD_CPUTIME_ID);
    double bytes_read = 0;
    for (size_t i; (i = atomic_fetch_add(&b->taken, 1)) < b->E * 64;) {
        const size_t e = i / 64, bytes = b->gemm->packed_bytes(&b->matrix[e].w) / 64 & ~(size_t)4095;
        if (b->start[e + 1] == b->start[e]) continue;
        const volatile unsigned keep = read_sample((const char *)b->matrix[e].packed + i % 64 * bytes, bytes);
        (void)keep;
        bytes_read += (double)bytes;
    }
    add(b, seconds(CLOCK_THREAD_CPUTIME_ID) - t0, bytes_read);
}

static void ceiling_task(void *arg, size_t task) {
    struct bench *b = arg;
    (void)task;
    const double t0 = seconds(CLOCK_THREAD_CPUTIME_ID), macs = ceiling_sample(b->ceiling);
    add(b, seconds(CLOCK_THREAD_CPUTIME_ID) - t0, macs);
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(struct samples *s) {
    qsort(s->rate, s->n, sizeof *s->rate, by_value);
    return s->n ? s->rate[s->n / 2] : 0;
}

static void sample(struct samples *cpu, struct samples *wall, struct bench *b, size_t n_tasks, moe4_task_fn fn) {
    b->cpu = b->macs = 0;
    b->taken = 0;
    const double t0 = seconds(CLOCK_MONOTONIC);
    moe4_pool_run(b->ctx->pool, n_tasks, SIZE_MAX, fn, b);
    const double t = seconds(CLOCK_MONOTONIC) - t0;
    if (cpu->n == MAX_SAMPLES) return;
    wall->rate[wall->n++] = b->macs / t;
    cpu->rate[cpu->n++] = b->macs / (b->cpu / (double)b->threads);
}

static void choose_experts(struct bench *b, int32_t *ids) {
    size_t *count = calloc(b->E + 1, sizeof *count), *order = malloc(b->E * sizeof *order);
    for (size_t t = 0; t < b->T; t++) {
        for (size_t e = 0; e < b->E; e++) order[e] = e;
        for (size_t i = 0; i < b->top; i++) {
            const size_t r = i + random_bits() % (b->E - i), x = order[i];
            order[i] = order[r];
            order[r] = x;
            ids[t * b->top + i] = (int32_t)order[i];
            count[order[i]]++;
        }
    }
    b->start[0] = 0;
    for (size_t e = 0; e < b->E; e++) {
        b->start[e + 1] = b->start[e] + count[e];
        count[e] = b->start[e];
    }
    for (size_t s = 0; s < b->T * b->top; s++) b->row[count[ids[s]]++] = b->rows + s / b->top * b->gemm->row_bytes(b->K);
    free(count);
    free(order);
}

static void measure(struct bench *b, double budget, enum ceiling step) {
    static struct samples cpu, wall, step_cpu, read_cpu, step_wall, read_wall;
    cpu.n = wall.n = step_cpu.n = step_wall.n = read_cpu.n = read_wall.n = 0;
    int32_t *ids = malloc(b->T * b->top * sizeof *ids);
    double bytes = 0;
    for (double end = seconds(CLOCK_MONOTONIC) + budget; seconds(CLOCK_MONOTONIC) < end;) {
        choose_experts(b, ids);
        bytes = 0;
        for (size_t e = 0; e < b->E; e++) bytes += b->start[e + 1] > b->start[e] ? (double)b->gemm->packed_bytes(&b->matrix[e].w) : 0;
        sample(&cpu, &wall, b, b->threads, gemm_task);
        b->ceiling = step;
        sample(&step_cpu, &step_wall, b, b->threads, ceiling_task);
        sample(&read_cpu, &read_wall, b, b->threads, read_task);
    }
    free(ids);
    const double macs = (double)b->T * (double)b->top * (double)b->K * (double)b->N;
    const double rate = median(&cpu), c = median(&step_cpu), r = median(&read_cpu), w = median(&wall);
    printf(
        "T %4zu  %zu threads  %7.2f GMAC/s (wall median %7.2f best %7.2f)  %5.3f of step %6.2f   %6.2f GB/s  %5.3f of read %6.2f  n %zu\n",
        b->T, b->threads, rate / 1e9, w / 1e9, wall.rate[wall.n - 1] / 1e9, rate / c, c / 1e9, rate / macs * bytes / 1e9,
        rate / macs * bytes / r, r / 1e9, cpu.n);
    fflush(stdout);
}

static uint64_t random_codes(uint8_t *codes, uint8_t *scales, const float *x, size_t n, const struct moe4_quantizer *q) {
    (void)x;
    (void)q;
    for (size_t i = 0; i < n / 2; i++) codes[i] = (uint8_t)random_bits();
    for (size_t i = 0; i < n / 16; i++) scales[i] = (uint8_t)(0x28 + random_bits() % 24);
    return 0;
}

int main(int argc, char **argv) {
    struct bench b = {.K = 7168, .N = 6144, .E = 8, .top = 6, .task_cols = 64, .lock = PTHREAD_MUTEX_INITIALIZER};
    double budget = 3;
    const char *tokens = "1,4,16,256";
    moe4_act act = MOE4_ACT_TOKEN;
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.n_threads = 1;
    for (int c; (c = getopt(argc, argv, "s:t:j:c:a:b:i:")) != -1;) {
        if (c == 's' && sscanf(optarg, "%zu,%zu,%zu,%zu", &b.K, &b.N, &b.E, &b.top) != 4) return 1;
        if (c == 't') tokens = optarg;
        if (c == 'j') o.n_threads = strtoul(optarg, NULL, 10);
        if (c == 'c') b.task_cols = strtoul(optarg, NULL, 10);
        if (c == 'b') budget = strtod(optarg, NULL);
        if (c == 'i') o.isa_mask = moe4_isa_mask(optarg);
        if (c == 'a' && strcmp(optarg, "w4a16") == 0) act = MOE4_ACT_W4A16;
    }
    moe4_ctx *ctx;
    if (moe4_ctx_create(&ctx, &o) != MOE4_OK) return 1;
    struct moe4_kernels kernels = *ctx->kernels;
    kernels.quantize_row = random_codes;
    b.ctx = ctx;
    b.k = &kernels;
    b.threads = moe4_ctx_n_threads(ctx);
    b.gemm = act == MOE4_ACT_W4A16 ? kernels.w4a16 : kernels.w4a4;
    if (!b.gemm || !b.gemm->packed_bytes) return 1;

    b.scratch = huge(b.threads * b.gemm->scratch_bytes + 1);
    uint8_t *codes = malloc(b.N * b.K / 2), *scales = malloc(b.N * b.K / 16);
    b.matrix = calloc(b.E, sizeof *b.matrix);
    for (size_t i = 0; i < b.N * b.K / 2; i++) codes[i] = (uint8_t)random_bits();
    for (size_t i = 0; i < b.N * b.K / 16; i++) scales[i] = (uint8_t)(0x28 + random_bits() % 24);
    for (size_t e = 0; e < b.E; e++) {
        struct moe4_matrix *m = &b.matrix[e];
        m->w = (moe4_weight){.dtype = MOE4_NVFP4, .rows = b.N, .cols = b.K, .data = codes, .scale = scales, .global = 1};
        void *packed = huge(b.gemm->packed_bytes(&m->w));
        for (int warm = 0; warm < (e ? 1 : 2); warm++) {
            const double t0 = seconds(CLOCK_THREAD_CPUTIME_ID);
            b.gemm->pack(packed, &m->w, 0, b.N);
            const double t = seconds(CLOCK_THREAD_CPUTIME_ID) - t0, bytes = 2. * (double)b.gemm->packed_bytes(&m->w);
            if (e == 0) printf("%s, pack %.2f GB/s read + written, %s\n", b.gemm->name, bytes / t / 1e9, warm ? "again" : "into new pages");
        }
        m->packed = packed;
    }
    const bool avx512 = strncmp(kernels.isa, "avx512", 6) == 0;
    const enum ceiling step = act == MOE4_ACT_W4A16 ? (avx512 ? CEILING_W4A16 : CEILING_AVX2_FMA)
                              : avx512              ? CEILING_W4A4
                                                    : CEILING_AVX2_W4A4;
    for (const char *at = tokens; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        b.T = strtoul(at, NULL, 10);
        b.rows = huge(b.T * b.gemm->row_bytes(b.K));
        b.y = huge(b.T * b.top * b.N * sizeof *b.y);
        b.start = malloc((b.E + 1) * sizeof *b.start);
        b.row = malloc(b.T * b.top * sizeof *b.row);
        float *x = malloc(b.K * sizeof *x);
        for (size_t t = 0; t < b.T; t++) {
            float factor;
            const struct moe4_rounding rounding = {.act = act, .S = 1, .decode = 1};
            for (size_t i = 0; i < b.K; i++) x[i] = (float)(int64_t)random_bits() * 0x1p-62f;
            b.gemm->pack_row(&kernels, b.rows + t * b.gemm->row_bytes(b.K), &factor, x, b.K, &rounding);
        }
        measure(&b, budget, step);
        free(x);
        free(b.row);
        free(b.start);
        free(b.y);
        free(b.rows);
    }
    moe4_ctx_destroy(ctx);
    return 0;
}
