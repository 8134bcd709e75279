#include "bench_layer.h"

#include <stdlib.h>
#include <unistd.h>

static const double SAMPLE_SECONDS = 0.003; /* hundreds of times what waiting for the device takes */
enum { MIN_SAMPLES = 5, PAUSE_US = 2000 };  /* a pause between samples: what is timed is not what heat makes of it */

struct bench_device {
    struct bench_layer layer;
    moe4_ctx *ctx;
    moe4_moe *moe;
    moe4_ceilings ceilings;
    moe4_moe_report report; /* of the last routing of the last measurement */
    uint64_t *slots;        /* [n_experts], of each expert in it */
};

int bench_device_open(struct bench_device **bench_ret, const struct bench_shape *shape, moe4_act act, const struct cli_common *common,
                      double *pack_rate) {
    struct bench_device *b = *bench_ret = calloc(1, sizeof *b);
    if (!b) return cli_error(CLI_BAD_DATA, "bench", "out of memory");
    b->ceilings = (moe4_ceilings)MOE4_CEILINGS_INIT;
    int exit_status = cli_open_ctx(&b->ctx, common);
    if (exit_status != CLI_FINE) return exit_status;
    moe4_status status = moe4_ctx_ceilings(b->ctx, &b->ceilings); /* before the weights are made: a device without room says so at once */
    if (status != MOE4_OK) return cli_fail(b->ctx, status, "bench");
    b->slots = calloc(shape->n_experts, sizeof *b->slots);
    if (!b->slots) return cli_error(CLI_BAD_DATA, "bench", "out of memory");
    exit_status = bench_layer_open(&b->layer, b->ctx, shape);
    const double start = cli_seconds();
    if (exit_status == CLI_FINE) exit_status = bench_layer_create(&b->moe, b->ctx, &b->layer, act);
    *pack_rate = bench_layer_pack_bytes(&b->layer) / (cli_seconds() - start);
    return exit_status;
}

void bench_device_close(struct bench_device *b) {
    if (!b) return;
    bench_layer_close(&b->layer);
    moe4_moe_destroy(b->moe);
    moe4_ctx_destroy(b->ctx);
    free(b->slots);
    free(b);
}

const char *bench_device_name(const struct bench_device *b) {
    return b->ceilings.device;
}

const char *bench_device_where(const struct bench_device *b) {
    return moe4_ctx_device(b->ctx);
}

const char *bench_device_step(const struct bench_device *b) {
    return b->ceilings.bf16_macs > 0 ? "a large bf16 product by cuBLAS" : NULL;
}

moe4_act bench_device_act(const struct bench_device *b) {
    return moe4_moe_act(b->moe);
}

/* ---- inputs, all in the device's memory ---- */

struct input {
    size_t n_tokens, hidden, top_k;
    void *x;       /* bf16 [BENCH_ROUTINGS, n_tokens, hidden] */
    void *ids;     /* int32 [BENCH_ROUTINGS, n_tokens, top_k] */
    void *weights; /* fp32 [n_tokens, top_k], the same for all */
    void *y;
    moe4_workspace workspace;
};

static moe4_status to_device(moe4_ctx *ctx, void **there_ret, const void *host, size_t bytes) {
    moe4_status status = moe4_memory_alloc(ctx, there_ret, bytes);
    return status == MOE4_OK ? moe4_memory_copy(ctx, *there_ret, host, bytes, NULL) : status;
}

static int make_input(struct bench_device *b, struct input *in) {
    const size_t n_x = BENCH_ROUTINGS * in->n_tokens * in->hidden, n_slots = in->n_tokens * in->top_k, n_ids = BENCH_ROUTINGS * n_slots;
    uint16_t *x = malloc(n_x * sizeof *x);
    int32_t *ids = malloc(n_ids * sizeof *ids);
    float *weights = malloc(n_slots * sizeof *weights);
    moe4_status status = x && ids && weights ? MOE4_OK : MOE4_ERROR_MEMORY;
    if (status == MOE4_OK) {
        bench_layer_input(&b->layer, x, n_x, weights, n_slots);
        bench_layer_route(&b->layer, ids, BENCH_ROUTINGS * in->n_tokens);
        status = to_device(b->ctx, &in->x, x, n_x * sizeof *x);
    }
    if (status == MOE4_OK) status = to_device(b->ctx, &in->ids, ids, n_ids * sizeof *ids);
    if (status == MOE4_OK) status = to_device(b->ctx, &in->weights, weights, n_slots * sizeof *weights);
    if (status == MOE4_OK) status = moe4_memory_alloc(b->ctx, &in->y, in->n_tokens * in->hidden * sizeof *x);
    if (status == MOE4_OK) status = moe4_moe_workspace_bytes(b->moe, &in->workspace.bytes, in->n_tokens);
    if (status == MOE4_OK) status = moe4_memory_alloc(b->ctx, &in->workspace.data, in->workspace.bytes);
    free(x);
    free(ids);
    free(weights);
    return status == MOE4_OK ? CLI_FINE : cli_fail(b->ctx, status, "bench");
}

static void free_input(struct bench_device *b, struct input *in) {
    void *const all[] = {in->x, in->ids, in->weights, in->y, in->workspace.data};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) moe4_memory_free(b->ctx, all[i]);
}

/* ---- sampling ---- */

static moe4_status queue(const struct bench_device *b, const struct input *in, size_t routing) {
    const uint16_t *x = (const uint16_t *)in->x + routing * in->n_tokens * in->hidden;
    const int32_t *ids = (const int32_t *)in->ids + routing * in->n_tokens * in->top_k;
    return moe4_moe_forward(b->moe, in->y, x, ids, in->weights, in->n_tokens, &in->workspace, NULL);
}

static moe4_status wait(const struct bench_device *b, const struct input *in) {
    char byte;
    return moe4_memory_copy(b->ctx, &byte, in->y, 1, NULL);
}

/* Seconds of one call, over n_rounds of all routings. */
static moe4_status sample(const struct bench_device *b, const struct input *in, size_t n_rounds, double *seconds_ret) {
    moe4_status status = MOE4_OK;
    const double start = cli_seconds();
    for (size_t i = 0; i < n_rounds * BENCH_ROUTINGS && status == MOE4_OK; i++) status = queue(b, in, i % BENCH_ROUTINGS);
    if (status == MOE4_OK) status = wait(b, in);
    *seconds_ret = (cli_seconds() - start) / (double)(n_rounds * BENCH_ROUTINGS);
    return status;
}

/* Weight bytes of the experts hit, the mean over the routings; and which kernels ran. */
static moe4_status count_bytes(struct bench_device *b, const struct input *in, struct bench_result *result) {
    result->bytes = 0;
    for (size_t r = 0; r < BENCH_ROUTINGS; r++) {
        b->report = (moe4_moe_report)MOE4_MOE_REPORT_INIT;
        moe4_status status = queue(b, in, r);
        if (status == MOE4_OK) status = moe4_moe_report_read(b->moe, &b->report, b->slots, &in->workspace, NULL);
        if (status != MOE4_OK) return status;
        result->bytes += (double)b->report.weight_bytes / BENCH_ROUTINGS;
        result->kernels = b->report.kernels;
    }
    return MOE4_OK;
}

static moe4_status sample_all(struct bench_device *b, const struct input *in, struct bench_result *r, double seconds) {
    double time[BENCH_MAX_SAMPLES], once;
    moe4_status status = count_bytes(b, in, r); /* the first calls, too */
    if (status == MOE4_OK) status = sample(b, in, 1, &once);
    const size_t n_rounds = status == MOE4_OK ? (size_t)(SAMPLE_SECONDS / (once * BENCH_ROUTINGS)) + 1 : 0;
    for (double end = cli_seconds() + seconds;
         status == MOE4_OK && r->n_samples < BENCH_MAX_SAMPLES && (r->n_samples < MIN_SAMPLES || cli_seconds() < end);) {
        usleep(PAUSE_US);
        status = sample(b, in, n_rounds, &time[r->n_samples++]);
    }
    if (status != MOE4_OK) return status;
    struct bench_figure *f = &r->figure[BENCH_LAYER];
    f->seconds = bench_median(time, r->n_samples);
    f->best_seconds = time[0];
    for (size_t i = 1; i < r->n_samples; i++) f->best_seconds = time[i] < f->best_seconds ? time[i] : f->best_seconds;
    return MOE4_OK;
}

/* ---- what ran for which expert ---- */

static const moe4_kernel_range *range_of(const moe4_moe_report *report, uint64_t slots) {
    const moe4_kernel_range *range = NULL;
    for (size_t i = 0; i < report->n_kernels; i++)
        if (slots >= report->kernel[i].from) range = &report->kernel[i];
    return range;
}

/* Experts with so many slots, as "3, 7, 12"; of many, the first. */
static void print_experts(const uint64_t *slots, size_t n_experts, uint64_t wanted) {
    enum { MOST_NAMED = 12 };
    size_t n = 0;
    for (size_t e = 0; e < n_experts; e++)
        if (slots[e] == wanted && n++ < MOST_NAMED) printf("%s%zu", n > 1 ? ", " : "", e);
    if (n > MOST_NAMED) printf(" and %zu more", n - MOST_NAMED);
    putchar('\n');
}

void bench_device_explain(const struct bench_device *b) {
    const size_t n_experts = b->layer.shape.n_experts;
    uint64_t last = UINT64_MAX;
    printf("%6s %7s  %5s  %-22s %-11s  experts (of one routing)\n", "", "", "slots", "kernel", "tiles");
    for (;;) {
        uint64_t slots = 0; /* the most below the last line's */
        for (size_t e = 0; e < n_experts; e++)
            if (b->slots[e] < last && b->slots[e] > slots) slots = b->slots[e];
        const moe4_kernel_range *range = range_of(&b->report, slots);
        if (!slots || !range) break;
        const uint64_t tiles = (slots + range->tile_slots - 1) / range->tile_slots;
        char text[48];
        snprintf(text, sizeof text, "%llu x %llu", (unsigned long long)tiles, (unsigned long long)((slots + tiles - 1) / tiles));
        printf("%6s %7s  %5llu  %-22s %-11s  ", "", "", (unsigned long long)slots, range->name, text);
        print_experts(b->slots, n_experts, slots);
        last = slots;
    }
}

static void find_floor(struct bench_result *r) {
    struct bench_figure *f = &r->figure[BENCH_LAYER];
    const double memory = r->bytes / r->read_bytes, arithmetic = r->ceiling_macs > 0 ? r->macs / r->ceiling_macs : 0;
    f->by_memory = memory > arithmetic;
    f->floor_seconds = f->by_memory ? memory : arithmetic;
    f->share = f->floor_seconds / f->seconds;
}

int bench_device_measure(struct bench_device *b, struct bench_result *r, size_t n_tokens, double seconds) {
    struct input in = {.n_tokens = n_tokens, .hidden = b->layer.shape.hidden, .top_k = b->layer.shape.top_k};
    *r = (struct bench_result){.n_threads = 1, .n_tokens = n_tokens, .macs = bench_layer_macs(&b->layer, n_tokens)};
    moe4_status status = moe4_ctx_ceilings(b->ctx, &b->ceilings);
    r->read_bytes = b->ceilings.read_bytes;
    r->ceiling_macs = b->ceilings.bf16_macs;
    int exit_status = status == MOE4_OK ? make_input(b, &in) : cli_fail(b->ctx, status, "bench");
    if (exit_status == CLI_FINE) {
        status = sample_all(b, &in, r, seconds);
        if (status != MOE4_OK) exit_status = cli_fail(b->ctx, status, "bench");
    }
    if (exit_status == CLI_FINE) find_floor(r);
    free_input(b, &in);
    return exit_status;
}
