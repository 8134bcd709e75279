/* Trials with whole layers. */
#include <stdlib.h>

#include "soak.h"

struct layer {
    size_t H, I, E, k, T;
    moe4_moe_options o;
    moe4_expert *experts, shared;
    bool has_shared;
    float *x, *weights;
    int32_t *ids;
};

static moe4_expert make_expert(struct soak *s, moe4_dtype dtype, size_t H, size_t I, bool gated) {
    moe4_expert e = {.up = soak_weight(s, dtype, I, H), .down = soak_weight(s, dtype, H, I)};
    if (gated) e.gate = soak_weight(s, dtype, I, H);
    return e;
}

static void free_expert(moe4_expert *e) {
    soak_weight_free(&e->gate);
    soak_weight_free(&e->up);
    soak_weight_free(&e->down);
}

static void choose_options(struct soak *s, struct layer *l, bool nvfp4) {
    moe4_moe_options *o = &l->o;
    *o = (moe4_moe_options)MOE4_MOE_OPTIONS_INIT;
    o->n_experts = l->E;
    o->top_k = l->k;
    o->act = nvfp4 ? (moe4_act)(MOE4_ACT_W4A16 + random_below(&s->random, 4)) : MOE4_ACT_BF16;
    o->activation = (moe4_activation)random_below(&s->random, 3);
    o->weighting = (moe4_weighting)random_below(&s->random, 3);
    if (o->activation == MOE4_SWIGLU && random_below(&s->random, 3) == 0) {
        o->swiglu_alpha = 1.702f;
        o->swiglu_beta = 1;
        o->swiglu_limit = 7;
    }
    if (random_below(&s->random, 3) == 0) {
        o->first_expert = random_below(&s->random, l->E);
        o->n_local = random_below(&s->random, l->E - o->first_expert + 1);
    }
    o->x_dtype = o->y_dtype = MOE4_F32;
    o->x_ld = l->H;
}

static struct layer make_layer(struct soak *s) {
    const bool nvfp4 = random_below(&s->random, 4) > 0;
    const moe4_dtype wide[] = {MOE4_BF16, MOE4_F16, MOE4_F32};
    const moe4_dtype dtype = nvfp4 ? MOE4_NVFP4 : wide[random_below(&s->random, 3)];
    struct layer l = {.H = 1 + random_below(&s->random, 40), .I = 1 + random_below(&s->random, 20), .E = 1 + random_below(&s->random, 12)};
    l.H *= nvfp4 ? MOE4_BLOCK : 1 + random_below(&s->random, 16);
    l.I *= nvfp4 ? MOE4_BLOCK : 1 + random_below(&s->random, 16);
    l.k = 1 + random_below(&s->random, l.E < 4 ? l.E : 4);
    const size_t most = 4000000 / (3 * l.k * l.H * l.I) + 2; /* the scalar reference's time */
    l.T = random_below(&s->random, most < 120 ? most : 120);
    choose_options(s, &l, nvfp4);
    l.experts = soak_alloc(s, l.E, sizeof *l.experts);
    for (size_t e = 0; e < l.E; e++) l.experts[e] = make_expert(s, dtype, l.H, l.I, l.o.activation != MOE4_RELU2);
    if (random_below(&s->random, 3) == 0) {
        l.shared = make_expert(s, dtype, l.H, MOE4_BLOCK * (1 + random_below(&s->random, 20)), l.o.activation != MOE4_RELU2);
        l.has_shared = true;
    }
    l.x = soak_rows(s, l.T, l.H);
    l.weights = soak_alloc(s, l.T * l.k, sizeof *l.weights);
    l.ids = soak_alloc(s, l.T * l.k, sizeof *l.ids);
    for (size_t i = 0; i < l.T * l.k; i++) {
        l.weights[i] = 0.1f + random_unit(&s->random);
        l.ids[i] = (int32_t)random_below(&s->random, l.E + 1) - 1;
    }
    return l;
}

static void free_layer(struct layer *l) {
    for (size_t e = 0; e < l->E; e++) free_expert(&l->experts[e]);
    free(l->experts);
    if (l->has_shared) free_expert(&l->shared);
    free(l->x);
    free(l->weights);
    free(l->ids);
}

static void forward(const struct soak *s, moe4_ctx *ctx, const moe4_moe *moe, const struct layer *l, float *y, size_t t0, size_t n) {
    moe4_workspace ws;
    soak_ok(s, ctx, moe4_moe_workspace_bytes(moe, &ws.bytes, n), "workspace");
    ws.data = soak_alloc(s, ws.bytes, 1);
    soak_ok(s, ctx, moe4_moe_forward(moe, y, l->x + t0 * l->H, l->ids + t0 * l->k, l->weights + t0 * l->k, n, &ws, NULL), "forward");
    free(ws.data);
}

/* Rows brought by expert and summed here in the order of slots are the layer's bits. */
static void check_sorted(const struct soak *s, moe4_ctx *ctx, const moe4_moe *moe, const struct layer *l, const float *y) {
    const size_t n_slots = l->T * l->k, n_local = l->o.n_local ? l->o.n_local : l->E - l->o.first_expert;
    float *x = soak_alloc(s, n_slots * l->H, sizeof *x), *out = soak_alloc(s, n_slots * l->H, sizeof *out);
    float *weight = soak_alloc(s, n_slots, sizeof *weight), *sum = soak_alloc(s, l->H, sizeof *sum);
    int32_t *offsets = soak_alloc(s, n_local + 1, sizeof *offsets), *row = soak_alloc(s, n_slots, sizeof *row), n = 0;
    for (size_t e = 0; e < n_local; e++) {
        offsets[e] = n;
        for (size_t i = 0; i < n_slots; i++)
            if (l->ids[i] == (int32_t)(l->o.first_expert + e)) {
                memcpy(x + (size_t)n * l->H, l->x + i / l->k * l->H, l->H * sizeof *x);
                weight[n] = l->weights[i];
                row[i] = n++;
            }
    }
    offsets[n_local] = n;
    moe4_workspace ws;
    soak_ok(s, ctx, moe4_moe_rows_workspace_bytes(moe, &ws.bytes, n_slots, 0), "rows workspace");
    ws.data = soak_alloc(s, ws.bytes, 1);
    soak_ok(s, ctx, moe4_moe_forward_sorted(moe, out, x, offsets, weight, NULL, n_slots, 0, &ws, NULL), "sorted");
    for (size_t t = 0; t < l->T; t++) {
        memset(sum, 0, l->H * sizeof *sum);
        for (size_t i = t * l->k; i < (t + 1) * l->k; i++)
            for (size_t c = 0; row[i] >= 0 && c < l->H; c++) sum[c] += out[(size_t)row[i] * l->H + c];
        for (size_t c = 0; c < l->H; c++)
            if (sum[c] != y[t * l->H + c] && !(isnan(sum[c]) && isnan(y[t * l->H + c])))
                soak_fail(s, "%s: sorted rows, token %zu, column %zu: %g, the layer has %g", moe4_ctx_isa(ctx), t, c, (double)sum[c],
                          (double)y[t * l->H + c]);
    }
    free(x);
    free(out);
    free(weight);
    free(sum);
    free(offsets);
    free(row);
    free(ws.data);
}

/* One layer on one side, with what must not change its bits. */
static void run(struct soak *s, moe4_ctx *ctx, const struct layer *l, float *y) {
    moe4_moe *moe;
    soak_ok(s, ctx, moe4_moe_create(&moe, ctx, l->experts + l->o.first_expert, &l->o), "create");
    forward(s, ctx, moe, l, y, 0, l->T);
    if (l->T && l->o.act != MOE4_ACT_TENSOR) {
        const size_t t = random_below(&s->random, l->T);
        float *alone = soak_alloc(s, l->H, sizeof *alone);
        forward(s, ctx, moe, l, alone, t, 1);
        if (memcmp(alone, y + t * l->H, l->H * sizeof *alone) != 0)
            soak_fail(s, "%s: token %zu alone has other bits", moe4_ctx_isa(ctx), t);
        free(alone);
        if (!l->o.shared) check_sorted(s, ctx, moe, l, y);
    }
    moe4_moe_destroy(moe);
}

/* A row is near the scalar one unless a value between the two products fell on the other side of a tie. */
static void check_near(struct soak *s, const struct layer *l, const char *isa, const float *y, const float *scalar) {
    for (size_t t = 0; t < l->T; t++) {
        double difference = 0, size = 0;
        for (size_t c = t * l->H; c < (t + 1) * l->H; c++) {
            if (isnan(y[c]) != isnan(scalar[c])) soak_fail(s, "%s: token %zu: %g, scalar %g", isa, t, (double)y[c], (double)scalar[c]);
            if (isnan(y[c])) continue;
            difference += ((double)y[c] - scalar[c]) * ((double)y[c] - scalar[c]);
            size += (double)scalar[c] * scalar[c];
        }
        s->n_rows++;
        if (difference <= 1e-6 * size) continue;
        s->n_far++;
        if (difference > 0.25 * size) soak_fail(s, "%s: token %zu is %g from the scalar row", isa, t, sqrt(difference / size));
    }
}

/* Creating it where one allocation fails: MEMORY, and nothing is left behind. */
static void create_without_memory(struct soak *s, const struct layer *l) {
    struct soak_memory memory = {.fail_at = 1 + random_below(&s->random, 24)};
    moe4_ctx *ctx;
    moe4_moe *moe = NULL;
    moe4_status status = soak_open(&ctx, &memory, s->isa[s->n_isas - 1].name, 2);
    if (status == MOE4_OK) status = moe4_moe_create(&moe, ctx, l->experts + l->o.first_expert, &l->o);
    if (status != MOE4_OK && status != MOE4_ERROR_MEMORY)
        soak_fail(s, "allocation %zu failed: %s", memory.fail_at, moe4_status_text(status));
    if ((status != MOE4_OK) != (memory.n_calls >= memory.fail_at)) soak_fail(s, "allocation %zu failed unnoticed", memory.fail_at);
    s->n_refused += status != MOE4_OK;
    moe4_moe_destroy(moe);
    moe4_ctx_destroy(ctx);
    if (memory.n_live) soak_fail(s, "allocation %zu failed: %zu blocks are left", memory.fail_at, (size_t)memory.n_live);
}

void soak_layer(struct soak *s) {
    struct layer l = make_layer(s);
    if (l.has_shared) l.o.shared = &l.shared;
    const size_t n = l.T * l.H;
    float *scalar = soak_alloc(s, n, sizeof *scalar), *y = soak_alloc(s, n, sizeof *y), *other = soak_alloc(s, n, sizeof *other);
    for (size_t i = 0; i < s->n_isas; i++) {
        const size_t side = 1 + random_below(&s->random, SOAK_SIDES - 1);
        run(s, s->isa[i].ctx[0], &l, y);
        for (size_t done = 0; soak_again(s, side, done); done++) {
            run(s, s->isa[i].ctx[side], &l, other);
            if (memcmp(y, other, n * sizeof *y) != 0)
                soak_fail(s, "%s: %zu threads give other bits than one", s->isa[i].name, moe4_ctx_n_threads(s->isa[i].ctx[side]));
        }
        if (i == 0) {
            memcpy(scalar, y, n * sizeof *y);
        } else {
            check_near(s, &l, s->isa[i].name, y, scalar);
        }
    }
    if (random_below(&s->random, 4) == 0) create_without_memory(s, &l);
    free(scalar);
    free(y);
    free(other);
    free_layer(&l);
}
