/* Choosing experts on a device: every kind of router beside the CPU on the same logits, with ties, rows that are no numbers, groups, second
 * biases and choices by token id. Skipped (77) where there is no GPU. */
#include "calls.h"

enum { T = 70, VOCAB = 50, BAD = 5 /* the token whose logits are no numbers */ };

struct chosen {
    int32_t *ids;
    float *weights;
};

static struct chosen alloc_chosen(size_t n) {
    return (struct chosen){malloc(n * sizeof(int32_t)), malloc(n * sizeof(float))};
}

static void free_chosen(struct chosen *c) {
    free(c->ids);
    free(c->weights);
}

struct select_call {
    const float *logits;
    const int32_t *token_ids; /* or NULL, as is the next */
    const uint8_t *alt;
    size_t E, k;
};

static void run_select(moe4_ctx *ctx, struct chosen *to, const moe4_router *r, const struct select_call *c) {
    moe4_router_tokens tokens = MOE4_ROUTER_TOKENS_INIT;
    size_t n = T * c->k;
    tokens.token_ids = give_or_null(ctx, c->token_ids, T * sizeof *c->token_ids);
    tokens.alt_bias = give_or_null(ctx, c->alt, T);
    void *ids = give(ctx, NULL, n * sizeof *to->ids), *weights = give(ctx, NULL, n * sizeof *to->weights);
    OK(ctx, moe4_router_select(r, ids, weights, give(ctx, c->logits, T * c->E * sizeof *c->logits), &tokens, T, NULL));
    take(ctx, to->ids, ids, n * sizeof *to->ids);
    take(ctx, to->weights, weights, n * sizeof *to->weights);
    free_given();
}

/* Makes the router on both sides and compares; *device_ret (or NULL) keeps the device's, *want_ret what the CPU chose. */
static void compare_routers(const moe4_router_options *o, const float *bias, const struct select_call *c, moe4_router **device_ret,
                            struct chosen *want_ret, const char *what) {
    struct chosen got = alloc_chosen(T * c->k), want = alloc_chosen(T * c->k);
    moe4_router *on_cpu, *on_gpu;
    OK(cpu, moe4_router_create(&on_cpu, cpu, NULL, bias, o));
    OK(gpu, moe4_router_create(&on_gpu, gpu, NULL, bias, o));
    run_select(cpu, &want, on_cpu, c);
    run_select(gpu, &got, on_gpu, c);
    for (size_t i = 0; i < T * c->k; i++) {
        EXPECT(got.ids[i] == want.ids[i], "%s, token %zu: expert %d, want %d\n", what, i / c->k, got.ids[i], want.ids[i]);
        EXPECT(i / c->k == BAD ? isnan(got.weights[i]) : fabsf(want.weights[i] - got.weights[i]) <= 2e-6f * fabsf(want.weights[i]),
               "%s, token %zu: weight %g, want %g\n", what, i / c->k, (double)got.weights[i], (double)want.weights[i]);
    }
    moe4_router_destroy(on_cpu);
    free_chosen(&got);
    if (device_ret) {
        *device_ret = on_gpu;
        *want_ret = want;
        return;
    }
    moe4_router_destroy(on_gpu);
    free_chosen(&want);
}

static void test_kinds(void **state) {
    (void)state;
    static const struct {
        moe4_router_kind kind;
        size_t E, k, n_group, topk_group;
        int normalize;
        float scale;
    } cases[] = {{MOE4_ROUTER_SOFTMAX_TOPK, 8, 2, 0, 0, 1, 0},      {MOE4_ROUTER_SOFTMAX_TOPK, 129, 8, 0, 0, 0, 1.5f},
                 {MOE4_ROUTER_SIGMOID_BIAS, 256, 8, 8, 4, 1, 2.5f}, {MOE4_ROUTER_SIGMOID_BIAS, 384, 8, 0, 0, 1, 2.8f},
                 {MOE4_ROUTER_SIGMOID_BIAS, 600, 6, 4, 2, 1, 1},    {MOE4_ROUTER_SOFTMAX_TOPK, 1, 1, 0, 0, 1, 0},
                 {MOE4_ROUTER_TOPK_SOFTMAX, 128, 4, 0, 0, 0, 0},    {MOE4_ROUTER_SQRTSOFTPLUS_BIAS, 384, 6, 0, 0, 1, 1.5f},
                 {MOE4_ROUTER_SIGMOID_TOP1, 16, 1, 0, 0, 0, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        moe4_router_options o = MOE4_ROUTER_OPTIONS_INIT;
        o.kind = cases[i].kind;
        o.n_experts = cases[i].E;
        o.top_k = cases[i].k;
        o.n_group = cases[i].n_group;
        o.topk_group = cases[i].topk_group;
        o.normalize = cases[i].normalize;
        o.scale = cases[i].scale;
        float *logits = malloc(T * o.n_experts * sizeof *logits), *bias = malloc(o.n_experts * sizeof *bias);
        for (size_t j = 0; j < T * o.n_experts; j++) logits[j] = (float)(int)(ref_normal() * 64) / 32.f; /* coarse: with ties */
        for (size_t e = 0; e < o.n_experts; e++) bias[e] = (float)(ref_random() % 8) / 16.f;
        logits[BAD * o.n_experts] = NAN;
        bool biased = o.kind != MOE4_ROUTER_SOFTMAX_TOPK && o.kind != MOE4_ROUTER_SIGMOID_TOP1;
        struct select_call c = {logits, NULL, NULL, o.n_experts, o.top_k};
        char what[32];
        snprintf(what, sizeof what, "router %zu", i);
        compare_routers(&o, biased ? bias : NULL, &c, NULL, NULL, what);
        free(logits);
        free(bias);
    }
    NO_FAILURES();
}

/* Ids outside the table: on a device they show as NaN weights. */
static void check_bad_ids(const moe4_router *r, struct select_call c, const struct chosen *want, const char *what) {
    struct chosen got = alloc_chosen(T * c.k);
    int32_t token_ids[T];
    memcpy(token_ids, c.token_ids, sizeof token_ids);
    token_ids[3] = VOCAB;
    token_ids[9] = -7;
    c.token_ids = token_ids;
    run_select(gpu, &got, r, &c);
    for (size_t i = 0; i < T * c.k; i++) {
        size_t t = i / c.k;
        bool out = t == 3 || t == 9 || t == BAD;
        EXPECT((isnan(got.weights[i]) != 0) == out, "%s, token %zu: weight %g\n", what, t, (double)got.weights[i]);
        EXPECT(got.ids[i] == (out ? (int32_t)(i % c.k) : want->ids[i]), "%s, token %zu: expert %d\n", what, t, got.ids[i]);
    }
    free_chosen(&got);
}

static void test_tokens(void **state) {
    (void)state;
    static const struct {
        moe4_router_kind kind;
        size_t E, k;
        bool alt, wide;
    } cases[] = {{MOE4_ROUTER_HASH, 32, 4, false, false},
                 {MOE4_ROUTER_HASH, 384, 6, false, true},
                 {MOE4_ROUTER_HASH, 4096, 8, false, true},
                 {MOE4_ROUTER_SIGMOID_BIAS, 256, 8, true, false},
                 {MOE4_ROUTER_SQRTSOFTPLUS_BIAS, 384, 6, true, false},
                 {MOE4_ROUTER_TOPK_SOFTMAX, 4096, 4, true, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t E = cases[i].E, k = cases[i].k;
        bool hash = cases[i].kind == MOE4_ROUTER_HASH;
        float *logits = random_floats(T * E), *bias = random_floats(E), *alt_bias = random_floats(E);
        int32_t token_ids[T], *narrow_table = malloc(VOCAB * k * sizeof *narrow_table);
        int64_t *wide_table = malloc(VOCAB * k * sizeof *wide_table);
        uint8_t alt[T];
        for (size_t j = 0; j < VOCAB * k; j++) wide_table[j] = narrow_table[j] = (int32_t)((j / k * 7 + j % k * 3) % E);
        for (int t = 0; t < T; t++) {
            token_ids[t] = (int32_t)(ref_random() % VOCAB);
            alt[t] = ref_random() % 2 ? (uint8_t)(1 + ref_random() % 255) : 0;
        }
        logits[BAD * E + 1] = INFINITY;
        moe4_router_options o = MOE4_ROUTER_OPTIONS_INIT;
        o.kind = cases[i].kind;
        o.n_experts = E;
        o.top_k = k;
        o.normalize = cases[i].kind != MOE4_ROUTER_TOPK_SOFTMAX;
        o.scale = 1.5f;
        if (hash) {
            o.gate_temp = 0.7f;
            o.table = cases[i].wide ? (void *)wide_table : (void *)narrow_table;
            o.table_dtype = cases[i].wide ? MOE4_I64 : MOE4_I32;
            o.n_token_ids = VOCAB;
        }
        if (cases[i].alt) o.alt_bias = alt_bias;
        struct select_call c = {logits, hash ? token_ids : NULL, cases[i].alt ? alt : NULL, E, k};
        struct chosen want;
        moe4_router *r;
        char what[32];
        snprintf(what, sizeof what, "router of tokens %zu", i);
        compare_routers(&o, hash ? NULL : bias, &c, &r, &want, what);
        if (hash) check_bad_ids(r, c, &want, what);
        moe4_router_destroy(r);
        free_chosen(&want);
        free(logits);
        free(bias);
        free(alt_bias);
        free(narrow_table);
        free(wide_table);
    }
    NO_FAILURES();
}

int main(void) {
    int status = open_both("test_cuda_router", 0);
    if (status) return status;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_kinds), cmocka_unit_test(test_tokens)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    close_both();
    return failed;
}
