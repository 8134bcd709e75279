#include "bench_layer.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../bench/ceiling.h"

enum { MIN_SAMPLES = 3, PIECE = 1 << 20, READ_PIECES = 64, READ_BUFFER = 512 << 20, NEW_PAGE = 2 << 20 };

struct side { /* one thread count */
    moe4_ctx *ctx;
    moe4_moe *moe;
    moe4_workspace workspace;
    const char *kernels; /* of the last forward */
    double time[N_BENCH_WHATS][BENCH_MAX_SAMPLES], read[BENCH_MAX_SAMPLES], ceiling[BENCH_MAX_SAMPLES];
};

struct bench {
    struct bench_layer layer;
    int ceiling; /* enum ceiling, or -1 */
    char *read_buffer;
    size_t read_at;
    bool cpu_time;
    double bytes[BENCH_MAX_SAMPLES];
    size_t n_sides;
    struct side side[];
};

const char *bench_what_name(enum bench_what what) {
    static const char *const names[N_BENCH_WHATS] = {"layer", "products", "gate_up", "down", "dispatch", "quantize", "combine"};
    return names[what];
}

/* The clock, or the CPU time of the one thread. */
static double now(const struct bench *b) {
    struct timespec t;
    if (!b->cpu_time) return cli_seconds();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the layer ---- */

/* The step that bounds a mode's products on an ISA, by name. */
static int find_ceiling(const char *isa, moe4_act act) {
    const bool avx512 = strncmp(isa, "avx512", 6) == 0;
    if (strcmp(isa, "avx512bf16") == 0 && act == MOE4_ACT_W4A16) return CEILING_W4A16;
    if (avx512 && act != MOE4_ACT_W4A16) return CEILING_W4A4;
    if (strcmp(isa, "avx2") == 0 && act != MOE4_ACT_W4A16) return CEILING_AVX2_W4A4;
    if (avx512 || strcmp(isa, "avx2") == 0) return CEILING_AVX2_FMA;
    return -1;
}

void bench_close(struct bench *b) {
    if (!b) return;
    for (size_t i = 0; i < b->n_sides; i++) {
        moe4_moe_destroy(b->side[i].moe);
        moe4_ctx_destroy(b->side[i].ctx);
        free(b->side[i].workspace.data);
    }
    bench_layer_close(&b->layer);
    free(b->read_buffer);
    free(b);
}

const char *bench_isa(const struct bench *b) {
    return moe4_ctx_isa(b->side[0].ctx);
}

const char *bench_step(const struct bench *b) {
    return b->ceiling < 0 ? NULL : ceiling_name((enum ceiling)b->ceiling);
}

moe4_act bench_act(const struct bench *b) {
    return moe4_moe_act(b->side[0].moe);
}

/* ---- sampling ---- */

static void read_task(void *arg, size_t task) {
    const struct bench *b = arg;
    const size_t piece = (b->read_at + task) % (READ_BUFFER / PIECE);
    const volatile unsigned keep = read_sample(b->read_buffer + piece * PIECE, PIECE);
    (void)keep;
}

static void ceiling_task(void *arg, size_t task) {
    const struct bench *b = arg;
    (void)task;
    ceiling_sample((enum ceiling)b->ceiling);
}

static double sample_read(struct bench *b, moe4_ctx *ctx) {
    const double start = now(b);
    moe4_parallel_for(ctx, READ_PIECES, read_task, b);
    const double took = now(b) - start;
    b->read_at += READ_PIECES;
    return (double)READ_PIECES * PIECE / took;
}

static double sample_ceiling(struct bench *b, moe4_ctx *ctx) {
    if (b->ceiling < 0) return 0;
    const size_t n_tasks = 16 * moe4_ctx_n_threads(ctx); /* some milliseconds: waking the threads must not count */
    const double macs = ceiling_sample((enum ceiling)b->ceiling), start = now(b);
    moe4_parallel_for(ctx, n_tasks, ceiling_task, b);
    return macs * (double)n_tasks / (now(b) - start);
}

static void touch_task(void *arg, size_t task) {
    ((volatile char *)arg)[task * NEW_PAGE] = 1;
}

/* Bytes of memory a second that the system finds and clears, which is the least that packing into new memory takes beside packing. */
static double sample_new_pages(const struct bench *b, moe4_ctx *ctx) {
    enum { N_PAGES = 64 };
    char *memory = bench_alloc((size_t)N_PAGES * NEW_PAGE);
    if (!memory) return 0;
    const double start = now(b);
    moe4_parallel_for(ctx, N_PAGES, touch_task, memory);
    const double took = now(b) - start;
    free(memory);
    return (double)N_PAGES * NEW_PAGE / took;
}

static int make_layer(struct bench *b, struct side *s, moe4_act act, struct bench_pack *pack) {
    enum { N = 3 };
    const double bytes = bench_layer_pack_bytes(&b->layer), start = now(b);
    double again[N], read[N];
    int exit_status = bench_layer_create(&s->moe, s->ctx, &b->layer, act);
    pack->fresh = bytes / (now(b) - start);
    for (int i = 0; i < N && exit_status == CLI_FINE; i++) {
        read[i] = sample_read(b, s->ctx);
        const double pages = sample_new_pages(b, s->ctx);
        pack->pages = pages > pack->pages ? pages : pack->pages;
        const double before = now(b);
        for (size_t e = 0; e < b->layer.shape.n_experts && exit_status == CLI_FINE; e++) {
            const moe4_status status = moe4_moe_replace_expert(s->moe, e, &b->layer.experts[e]);
            if (status != MOE4_OK) exit_status = cli_fail(s->ctx, status, "bench");
        }
        again[i] = bytes / (now(b) - before);
    }
    if (exit_status != CLI_FINE) return exit_status;
    pack->again = bench_median(again, N);
    pack->read = bench_median(read, N);
    return CLI_FINE;
}

int bench_open(struct bench **bench_ret, const struct bench_shape *shape, moe4_act act, const size_t *n_threads, size_t n_contexts,
               const char *isa, bool cpu_time, struct bench_pack *packs) {
    struct bench *b = *bench_ret = calloc(1, sizeof *b + n_contexts * sizeof *b->side);
    if (!b) return cli_error(CLI_BAD_DATA, "bench", "out of memory");
    b->cpu_time = cpu_time;
    b->n_sides = n_contexts;
    b->read_buffer = bench_alloc(READ_BUFFER);
    if (!b->read_buffer) return cli_error(CLI_BAD_DATA, "bench", "out of memory (%d bytes)", READ_BUFFER);
    for (size_t i = 0; i < n_contexts; i++) {
        const struct cli_common common = {.n_threads = n_threads[i], .isa = isa};
        int exit_status = cli_open_ctx(&b->side[i].ctx, &common);
        if (exit_status != CLI_FINE) return exit_status;
        if (i == 0) {
            memset(b->read_buffer, 1, READ_BUFFER);
            exit_status = bench_layer_open(&b->layer, b->side[i].ctx, shape);
            if (exit_status != CLI_FINE) return exit_status;
        }
        exit_status = make_layer(b, &b->side[i], act, &packs[i]);
        if (exit_status != CLI_FINE) return exit_status;
    }
    b->ceiling = find_ceiling(bench_isa(b), bench_act(b));
    if (b->ceiling >= 0 && !ceiling_supported((enum ceiling)b->ceiling)) b->ceiling = -1;
    return CLI_FINE;
}

struct input {
    size_t n_tokens;
    uint16_t *x, *y;
    int32_t *ids;
    float *weights;
};

static moe4_status sample_forward(const struct bench *b, struct side *s, const struct input *in, size_t i, double *bytes_ret) {
    moe4_moe_report r = MOE4_MOE_REPORT_INIT;
    const double start = now(b);
    moe4_status status = moe4_moe_forward(s->moe, in->y, in->x, in->ids, in->weights, in->n_tokens, &s->workspace, NULL);
    const double took = now(b) - start;
    if (status == MOE4_OK) status = moe4_moe_report_read(s->moe, &r, NULL, &s->workspace, NULL);
    const double *stage = r.seconds;
    s->time[BENCH_LAYER][i] = took;
    s->time[BENCH_GATE_UP][i] = stage[MOE4_STAGE_GATE_UP];
    s->time[BENCH_DOWN][i] = stage[MOE4_STAGE_DOWN];
    s->time[BENCH_PRODUCTS][i] = stage[MOE4_STAGE_GATE_UP] + stage[MOE4_STAGE_DOWN];
    s->time[BENCH_DISPATCH][i] = stage[MOE4_STAGE_DISPATCH];
    s->time[BENCH_QUANTIZE][i] = stage[MOE4_STAGE_QUANTIZE_X] + stage[MOE4_STAGE_QUANTIZE_H];
    s->time[BENCH_COMBINE][i] = stage[MOE4_STAGE_COMBINE];
    *bytes_ret = (double)r.weight_bytes;
    s->kernels = r.kernels;
    return status;
}

/* Of the layer's weights and multiply-adds, how much belongs to a part. */
static double part_of(enum bench_what what) {
    static const double parts[N_BENCH_WHATS] = {1, 1, 2. / 3, 1. / 3};
    return parts[what];
}

static void summarize(const struct bench *b, const struct side *s, struct bench_result *r) {
    const size_t n = r->n_samples;
    r->n_threads = moe4_ctx_n_threads(s->ctx);
    r->kernels = s->kernels;
    r->bytes = bench_median(b->bytes, n);
    r->read_bytes = bench_median(s->read, n);
    r->ceiling_macs = bench_median(s->ceiling, n);
    for (int w = 0; w < N_BENCH_WHATS; w++) {
        struct bench_figure *f = &r->figure[w];
        double share[BENCH_MAX_SAMPLES], floor[BENCH_MAX_SAMPLES], best = s->time[w][0];
        for (size_t i = 0; i < n; i++) { /* each sample beside what was measured just before it: a machine's memory may change its mind */
            const double memory = b->bytes[i] / s->read[i], arithmetic = s->ceiling[i] > 0 ? r->macs / s->ceiling[i] : 0;
            floor[i] = part_of((enum bench_what)w) * (memory > arithmetic ? memory : arithmetic);
            share[i] = floor[i] / s->time[w][i];
            best = s->time[w][i] < best ? s->time[w][i] : best;
        }
        f->seconds = bench_median(s->time[w], n);
        f->best_seconds = best;
        f->by_memory = r->ceiling_macs <= 0 || r->bytes / r->read_bytes > r->macs / r->ceiling_macs;
        f->floor_seconds = bench_median(floor, n);
        f->share = bench_median(share, n);
    }
}

static int sample_all(struct bench *b, struct input *in, struct bench_result *results, double seconds) {
    size_t n = 0;
    for (double end = cli_seconds() + seconds; n < BENCH_MAX_SAMPLES && (n < MIN_SAMPLES || cli_seconds() < end); n++) {
        bench_layer_route(&b->layer, in->ids, in->n_tokens);
        for (size_t i = 0; i < b->n_sides; i++) {
            struct side *s = &b->side[i];
            s->read[n] = sample_read(b, s->ctx);
            s->ceiling[n] = sample_ceiling(b, s->ctx);
            moe4_status status = sample_forward(b, s, in, n, &b->bytes[n]);
            if (status != MOE4_OK) return cli_fail(s->ctx, status, "bench");
        }
    }
    for (size_t i = 0; i < b->n_sides; i++) {
        results[i] = (struct bench_result){.n_tokens = in->n_tokens, .n_samples = n};
        results[i].macs = bench_layer_macs(&b->layer, in->n_tokens);
        summarize(b, &b->side[i], &results[i]);
        double ratio[BENCH_MAX_SAMPLES];
        for (size_t j = 0; j < n; j++) ratio[j] = b->side[0].time[BENCH_LAYER][j] / b->side[i].time[BENCH_LAYER][j];
        results[i].speedup = bench_median(ratio, n);
    }
    return CLI_FINE;
}

static int make_input(struct bench *b, struct input *in) {
    const size_t T = in->n_tokens, H = b->layer.shape.hidden, k = b->layer.shape.top_k;
    in->x = malloc(T * H * sizeof *in->x);
    in->y = malloc(T * H * sizeof *in->y);
    in->ids = malloc(T * k * sizeof *in->ids);
    in->weights = malloc(T * k * sizeof *in->weights);
    if (!in->x || !in->y || !in->ids || !in->weights) return cli_error(CLI_BAD_DATA, "bench", "out of memory (%zu tokens)", T);
    bench_layer_input(&b->layer, in->x, T * H, in->weights, T * k);
    for (size_t i = 0; i < b->n_sides; i++) {
        struct side *s = &b->side[i];
        free(s->workspace.data);
        s->workspace = (moe4_workspace){NULL, 0};
        moe4_status status = moe4_moe_workspace_bytes(s->moe, &s->workspace.bytes, T);
        if (status != MOE4_OK) return cli_fail(s->ctx, status, "bench");
        s->workspace.data = bench_alloc(s->workspace.bytes);
        if (!s->workspace.data) return cli_error(CLI_BAD_DATA, "bench", "out of memory (%zu bytes)", s->workspace.bytes);
        memset(s->workspace.data, 0, s->workspace.bytes);
    }
    return CLI_FINE;
}

int bench_measure(struct bench *b, struct bench_result *results, size_t n_tokens, double seconds) {
    struct input in = {.n_tokens = n_tokens};
    int exit_status = make_input(b, &in);
    if (exit_status == CLI_FINE) exit_status = sample_all(b, &in, results, 0); /* caches, pages, the workers' first wake-up */
    if (exit_status == CLI_FINE) exit_status = sample_all(b, &in, results, seconds);
    free(in.x);
    free(in.y);
    free(in.ids);
    free(in.weights);
    return exit_status;
}
