/* One random NVFP4 layer with tokens routed to it, and its forward in a context. */
#ifndef MOE4_TESTS_ONE_LAYER_H
#define MOE4_TESTS_ONE_LAYER_H

#include "reference.h"

enum { ONE_LAYER_K = 2 };

struct one_layer {
    size_t hidden, intermediate, n_experts, n_tokens;
    moe4_expert *experts;
    float *x, *weights;
    int32_t *ids;
};

static inline struct one_layer one_layer_make(size_t hidden, size_t intermediate, size_t n_experts, size_t n_tokens) {
    struct one_layer l = {hidden, intermediate, n_experts, n_tokens, NULL, NULL, NULL, NULL};
    l.experts = calloc(n_experts, sizeof *l.experts);
    l.x = calloc(n_tokens * hidden, sizeof *l.x);
    l.weights = calloc(n_tokens * ONE_LAYER_K, sizeof *l.weights);
    l.ids = calloc(n_tokens * ONE_LAYER_K, sizeof *l.ids);
    assert_true(l.experts && l.x && l.weights && l.ids);
    for (size_t e = 0; e < n_experts; e++) {
        l.experts[e].gate = ref_random_weight(MOE4_NVFP4, intermediate, hidden);
        l.experts[e].up = ref_random_weight(MOE4_NVFP4, intermediate, hidden);
        l.experts[e].down = ref_random_weight(MOE4_NVFP4, hidden, intermediate);
    }
    for (size_t i = 0; i < n_tokens * hidden; i++) l.x[i] = ref_normal();
    for (size_t i = 0; i < n_tokens * ONE_LAYER_K; i++) {
        l.ids[i] = (int32_t)((i / ONE_LAYER_K + i % ONE_LAYER_K) % n_experts);
        l.weights[i] = 0.5f;
    }
    return l;
}

static inline void one_layer_free(struct one_layer *l) {
    for (size_t e = 0; e < l->n_experts; e++) {
        ref_free_weight(&l->experts[e].gate);
        ref_free_weight(&l->experts[e].up);
        ref_free_weight(&l->experts[e].down);
    }
    free(l->experts);
    free(l->x);
    free(l->weights);
    free(l->ids);
}

static inline moe4_moe_options one_layer_options(const struct one_layer *l, moe4_act act) {
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = l->n_experts;
    o.top_k = ONE_LAYER_K;
    o.act = act;
    o.x_dtype = o.y_dtype = MOE4_F32;
    return o;
}

/* y [n_tokens, hidden]; the object is the caller's. */
static inline moe4_moe *one_layer_forward(const struct one_layer *l, moe4_ctx *ctx, float *y, moe4_act act) {
    const moe4_moe_options o = one_layer_options(l, act);
    moe4_moe *moe;
    moe4_workspace ws;
    OK(ctx, moe4_moe_create(&moe, ctx, l->experts, &o));
    OK(ctx, moe4_moe_workspace_bytes(moe, &ws.bytes, l->n_tokens));
    ws.data = aligned_alloc(64, ws.bytes);
    OK(ctx, moe4_moe_forward(moe, y, l->x, l->ids, l->weights, l->n_tokens, &ws, NULL));
    free(ws.data);
    return moe;
}

#endif
