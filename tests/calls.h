/* Forward calls of every kind on the CPU or a device, from the same host arrays, and a device's results beside the CPU's. */
#ifndef MOE4_TESTS_CALLS_H
#define MOE4_TESTS_CALLS_H

#include "experts.h"

/* ---- layers ---- */

enum form { BY_ID, SORTED, SUMMED, BATCHED, N_FORMS };
static const char *const form_names[] = {"by id", "sorted", "summed", "batched"};

struct layer_call {
    const struct layer *l;
    enum form form;
    const float *x, *weights; /* [n_rows, hidden]; of slots or rows, or NULL */
    size_t n_rows, n_tokens;  /* BY_ID: n_rows is the batch; n_tokens is SUMMED's */
    size_t max_rows;          /* BATCHED, of n_rows = E * max_rows */
    const int32_t *ids, *offsets, *counts, *token;
    moe4_scale_layout layout; /* of rows in NVFP4 */
};

/* Random ids of experts, one of eight -1. */
static inline int32_t *random_ids(size_t n, size_t n_experts) {
    int32_t *ids = malloc(n * sizeof *ids + 1);
    for (size_t i = 0; i < n; i++) ids[i] = ref_random() % 8 == 0 ? -1 : (int32_t)(ref_random() % n_experts);
    return ids;
}

/* T tokens with random x, weights and ids below n_experts. */
static inline struct layer_call random_call(const struct layer *l, size_t T, size_t n_experts) {
    return (struct layer_call){.l = l,
                               .x = random_floats(T * l->hidden),
                               .weights = random_routing_weights(T * l->k),
                               .ids = random_ids(T * l->k, n_experts),
                               .n_rows = T};
}

static inline void free_call(struct layer_call *c) {
    const void *all[] = {c->x, c->weights, c->ids, c->offsets, c->counts, c->token};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free((void *)all[i]);
}

/* What stands in y where nothing is written. */
static const float UNTOUCHED = 77;

static inline size_t y_rows(const struct layer_call *c) {
    return c->form == SUMMED ? c->n_tokens : c->n_rows;
}

/* The call's workspace, in bytes. */
static inline size_t layer_workspace(moe4_ctx *ctx, const moe4_moe *moe, const struct layer_call *c) {
    size_t bytes;
    if (c->form == BY_ID)
        OK(ctx, moe4_moe_workspace_bytes(moe, &bytes, c->n_rows));
    else
        OK(ctx, moe4_moe_rows_workspace_bytes(moe, &bytes, c->n_rows, c->form == SUMMED ? c->n_tokens : 0));
    return bytes;
}

/* A copy of what the call reads, for ctx; free_given frees it. */
static inline const void *give_or_null(moe4_ctx *ctx, const void *host, size_t bytes) {
    return host ? give(ctx, host, bytes) : NULL;
}

/* y [y_rows, hidden] of a layer made with the options; report and counts may be NULL. */
static inline void run_moe(moe4_ctx *ctx, const moe4_moe *moe, float *y, moe4_moe_report *report, uint64_t *counts,
                           const struct layer_call *c, const moe4_moe_options *o) {
    struct given_x x;
    size_t hidden = c->l->hidden, n = y_rows(c) * hidden, width = moe4_dtype_bytes(o->y_dtype);
    moe4_workspace ws = give_workspace(ctx, layer_workspace(ctx, moe, c));
    give_x(&x, ctx, c->x, c->n_rows, hidden, o->x_dtype, c->layout, c->layout != MOE4_SCALES_LINEAR);
    size_t n_weights = c->n_rows * (c->form == BY_ID ? c->l->k : 1);
    const float *weights = give_or_null(ctx, c->weights, n_weights * sizeof *weights);
    for (size_t i = 0; i < n; i++) y[i] = UNTOUCHED;
    void *host = narrow(y, n, o->y_dtype), *out = give(ctx, host, n * width);
    if (c->form == BY_ID)
        OK(ctx, moe4_moe_forward(moe, out, x.x, give(ctx, c->ids, n_weights * sizeof *c->ids), weights, c->n_rows, &ws, NULL));
    else if (c->form == BATCHED)
        OK(ctx,
           moe4_moe_forward_batched(moe, out, x.x, give(ctx, c->counts, c->l->E * sizeof *c->counts), weights, c->max_rows, &ws, NULL));
    else
        OK(ctx, moe4_moe_forward_sorted(moe, out, x.x, give(ctx, c->offsets, (c->l->E + 1) * sizeof *c->offsets), weights,
                                        c->form == SUMMED ? give(ctx, c->token, c->n_rows * sizeof *c->token) : NULL, c->n_rows,
                                        c->form == SUMMED ? c->n_tokens : 0, &ws, NULL));
    take(ctx, host, out, n * width);
    widen(y, host, o->y_dtype, n);
    if (report) OK(ctx, moe4_moe_report_read(moe, report, counts, &ws, NULL));
    free(host);
    free_given();
}

static inline void run_layer(moe4_ctx *ctx, float *y, moe4_moe_report *report, uint64_t *counts, const struct layer_call *c,
                             const moe4_moe_options *o) {
    moe4_moe *moe;
    OK(ctx, moe4_moe_create(&moe, ctx, c->l->expert, o));
    run_moe(ctx, moe, y, report, counts, c, o);
    moe4_moe_destroy(moe);
}

static inline void expect_same_report(const moe4_moe_report *got, const moe4_moe_report *want, const char *what) {
    EXPECT(got->n_tokens == want->n_tokens && got->n_slots == want->n_slots && got->n_experts_hit == want->n_experts_hit &&
               got->weight_bytes == want->weight_bytes && got->n_nonfinite_rows == want->n_nonfinite_rows,
           "%s: report: %lu tokens %lu slots %lu experts %lu bytes %lu bad rows, want %lu %lu %lu %lu %lu\n", what, got->n_tokens,
           got->n_slots, got->n_experts_hit, got->weight_bytes, got->n_nonfinite_rows, want->n_tokens, want->n_slots, want->n_experts_hit,
           want->weight_bytes, want->n_nonfinite_rows);
    /* a block of h may sit on the edge of saturation and h differ by an ulp */
    EXPECT(llabs((long long)(want->n_saturated_blocks - got->n_saturated_blocks)) <= 2 + (long long)want->n_saturated_blocks / 50,
           "%s: %lu saturated blocks, want %lu\n", what, got->n_saturated_blocks, want->n_saturated_blocks);
}

/* The device beside the CPU; `twice`: and beside itself. */
static inline void compare_layers(const struct layer_call *c, const moe4_moe_options *o, bool twice, const char *what) {
    size_t rows = y_rows(c), hidden = c->l->hidden, n = rows * hidden;
    float *want = malloc(n * sizeof *want + 1), *got = malloc(n * sizeof *got + 1);
    uint64_t *counts = calloc(2 * c->l->E, sizeof *counts), *got_counts = counts + c->l->E;
    moe4_moe_report a = MOE4_MOE_REPORT_INIT, b = MOE4_MOE_REPORT_INIT;
    run_layer(cpu, want, &a, counts, c, o);
    run_layer(gpu, got, &b, got_counts, c, o);
    moe4_act h = act_h(c->l, o->act == MOE4_ACT_DEFAULT ? MOE4_ACT_TOKEN : o->act);
    if (o->y_dtype == MOE4_BF16 && h == MOE4_ACT_BF16) h = MOE4_ACT_W4A16; /* the last rounding may go the other way */
    expect_close(got, want, rows, hidden, h, what);
    for (size_t i = 0; i < n; i++)
        if ((want[i] == UNTOUCHED) != (got[i] == UNTOUCHED)) {
            EXPECT(false, "%s: y[%zu, %zu] is %g, want %g\n", what, i / hidden, i % hidden, (double)got[i], (double)want[i]);
            break;
        }
    expect_same_report(&b, &a, what);
    EXPECT(memcmp(counts, got_counts, c->l->E * sizeof *counts) == 0, "%s: other slots per expert\n", what);
    if (twice) {
        run_layer(gpu, want, NULL, NULL, c, o);
        EXPECT(memcmp(got, want, n * sizeof *got) == 0, "%s: other bits the second time\n", what);
    }
    free(counts);
    free(want);
    free(got);
}

/* Options of a layer that has experts `first` .. of n_experts; the activation turns with the mode. */
static inline moe4_moe_options layer_options(const struct layer *l, moe4_act act, size_t first, size_t n_experts) {
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = n_experts;
    o.first_expert = first;
    o.n_local = l->E;
    o.top_k = l->k;
    o.act = act;
    o.x_dtype = o.y_dtype = MOE4_F32;
    if (act == MOE4_ACT_TOKEN) o.swiglu_limit = 4;
    if (act == MOE4_ACT_STATIC) set_activation(&o, 1);
    if (act == MOE4_ACT_TENSOR) o.activation = MOE4_GELU_TANH;
    return o;
}

/* ---- linears and groups of rows ---- */

struct linear_call {
    const moe4_weight *w; /* n_weights of them */
    size_t n_weights, n_rows;
    const float *x;
    moe4_scale_layout layout;
};

/* y: of the matrices, one behind the other. Returns the saturated blocks. */
static inline uint64_t run_linear(moe4_ctx *ctx, float *y, const struct linear_call *c, const moe4_linear_options *o) {
    enum { MOST = 4 };
    moe4_linear *l;
    struct given_x x;
    size_t bytes, width = moe4_dtype_bytes(o->y_dtype);
    uint64_t n_saturated;
    void *out[MOST];
    assert_true(c->n_weights <= MOST);
    OK(ctx, moe4_linear_create(&l, ctx, c->w, c->n_weights, o));
    OK(ctx, moe4_linear_workspace_bytes(l, &bytes, c->n_rows));
    moe4_workspace ws = give_workspace(ctx, bytes);
    give_x(&x, ctx, c->x, c->n_rows, c->w->cols, o->x_dtype, c->layout, c->layout != MOE4_SCALES_LINEAR);
    for (size_t i = 0; i < c->n_weights; i++) out[i] = give(ctx, NULL, c->n_rows * c->w[i].rows * width);
    OK(ctx, moe4_linear_forward(l, out, &n_saturated, x.x, c->n_rows, &ws, NULL));
    for (size_t i = 0; i < c->n_weights; i++) {
        size_t n = c->n_rows * c->w[i].rows;
        void *host = malloc(n * width + 1);
        take(ctx, host, out[i], n * width);
        widen(y, host, o->y_dtype, n);
        free(host);
        y += n;
    }
    free_given();
    moe4_linear_destroy(l);
    return n_saturated;
}

static inline void compare_linears(const struct linear_call *c, const moe4_linear_options *o, bool twice, const char *what) {
    size_t n = 0;
    for (size_t i = 0; i < c->n_weights; i++) n += c->n_rows * c->w[i].rows;
    float *want = malloc(n * sizeof *want + 1), *got = malloc(n * sizeof *got + 1);
    uint64_t a = run_linear(cpu, want, c, o), b = run_linear(gpu, got, c, o);
    EXPECT(a == b, "%s: %lu saturated blocks, want %lu\n", what, b, a);
    for (size_t i = 0, at = 0; i < c->n_weights; at += c->n_rows * c->w[i++].rows) /* no rounding in between: products in another order */
        expect_close(got + at, want + at, c->n_rows, c->w[i].rows, o->y_dtype == MOE4_F32 ? MOE4_ACT_BF16 : MOE4_ACT_TOKEN, what);
    if (twice) {
        run_linear(gpu, want, c, o);
        EXPECT(memcmp(got, want, n * sizeof *got) == 0, "%s: other bits the second time\n", what);
    }
    free(want);
    free(got);
}

struct grouped_call {
    const moe4_weight *w;
    size_t n_groups, n_rows;
    const float *x;
    const int32_t *offsets;
    moe4_scale_layout layout;
};

/* Numbers in a row of y. */
static inline size_t grouped_width(const struct grouped_call *c, const moe4_grouped_options *o) {
    return o->y_ld ? o->y_ld : (o->block_diagonal ? c->n_groups : 1) * c->w->rows;
}

static inline uint64_t run_grouped(moe4_ctx *ctx, float *y, const struct grouped_call *c, const moe4_grouped_options *o) {
    moe4_grouped *g;
    struct given_x x;
    size_t parts = o->block_diagonal ? c->n_groups : 1, bytes, width = moe4_dtype_bytes(o->y_dtype), n = c->n_rows * grouped_width(c, o);
    uint64_t n_saturated;
    OK(ctx, moe4_grouped_create(&g, ctx, c->w, c->n_groups, o));
    OK(ctx, moe4_grouped_workspace_bytes(g, &bytes, c->n_rows));
    moe4_workspace ws = give_workspace(ctx, bytes);
    give_x(&x, ctx, c->x, c->n_rows * parts, c->w->cols, o->x_dtype, c->layout, c->layout != MOE4_SCALES_LINEAR || o->block_diagonal);
    for (size_t i = 0; i < n; i++) y[i] = UNTOUCHED;
    void *host = narrow(y, n, o->y_dtype), *out = give(ctx, host, n * width);
    const int32_t *offsets = o->block_diagonal ? NULL : give(ctx, c->offsets, (c->n_groups + 1) * sizeof *offsets);
    OK(ctx, moe4_grouped_forward(g, out, &n_saturated, x.x, offsets, c->n_rows, &ws, NULL));
    take(ctx, host, out, n * width);
    widen(y, host, o->y_dtype, n);
    free(host);
    free_given();
    moe4_grouped_destroy(g);
    return n_saturated;
}

static inline void compare_grouped(const struct grouped_call *c, const moe4_grouped_options *o, bool twice, const char *what) {
    size_t n = c->n_rows * grouped_width(c, o);
    float *want = malloc(n * sizeof *want + 1), *got = malloc(n * sizeof *got + 1);
    uint64_t a = run_grouped(cpu, want, c, o), b = run_grouped(gpu, got, c, o);
    EXPECT(a == b, "%s: %lu saturated blocks, want %lu\n", what, b, a);
    expect_close(got, want, c->n_rows, n / c->n_rows, o->y_dtype == MOE4_F32 ? MOE4_ACT_BF16 : MOE4_ACT_TOKEN, what);
    if (twice) {
        run_grouped(gpu, want, c, o);
        EXPECT(memcmp(got, want, n * sizeof *got) == 0, "%s: other bits the second time\n", what);
    }
    free(want);
    free(got);
}

#endif
