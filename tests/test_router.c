/* Routers against an fp64 statement of the rules, ties, groups, bad rows and errors. */
#include "reference.h"

#include "files.h"

static moe4_router_options options(moe4_router_kind kind, size_t E, size_t k) {
    moe4_router_options o = MOE4_ROUTER_OPTIONS_INIT;
    o.kind = kind;
    o.n_experts = E;
    o.top_k = k;
    return o;
}

/* Expert e's rank by (value, lower index first) among those allowed. */
static size_t rank_of(const double *v, const bool *allowed, size_t n, size_t e) {
    size_t rank = 0;
    for (size_t i = 0; i < n; i++) rank += allowed[i] && (v[i] > v[e] || (v[i] == v[e] && i < e));
    return rank;
}

static double softplus(double l) {
    return l > 20 ? l : log1p(exp(l));
}

static double score_of(const moe4_router_options *o, const float *logits, const float *bias, size_t e) {
    double sum = 0, l = logits[e];
    switch (o->kind) {
    case MOE4_ROUTER_SOFTMAX_TOPK:
        for (size_t i = 0; i < o->n_experts; i++) sum += exp((double)logits[i]);
        return exp(l) / sum;
    case MOE4_ROUTER_TOPK_SOFTMAX: return l + bias[e];
    case MOE4_ROUTER_SQRTSOFTPLUS_BIAS:
    case MOE4_ROUTER_HASH: return sqrt(softplus(l / (o->gate_temp == 0 ? 1 : o->gate_temp)));
    default: return 1 / (1 + exp(-l));
    }
}

/* The rules of docs/numerics.md again, with sorting by rank instead of repeated selection. */
static void reference(const moe4_router_options *o, const float *bias, const float *logits, int32_t token_id, int32_t *ids,
                      double *weights) {
    double score[512], choice[512];
    bool allowed[512], group_allowed[512];
    size_t E = o->n_experts, n_group = o->n_group ? o->n_group : 1, size = E / n_group;
    for (size_t e = 0; e < E; e++) {
        score[e] = score_of(o, logits, bias, e);
        choice[e] = score[e] + (o->kind == MOE4_ROUTER_TOPK_SOFTMAX ? 0 : bias[e]);
        allowed[e] = group_allowed[e] = true;
    }
    if (o->topk_group && o->topk_group < n_group) {
        double group[512];
        for (size_t g = 0; g < n_group; g++) {
            group[g] = 0;
            for (size_t i = 0; i < size; i++)
                if (rank_of(choice + g * size, allowed, size, i) < 2) group[g] += choice[g * size + i];
        }
        for (size_t e = 0; e < E; e++) allowed[e] = rank_of(group, group_allowed, n_group, e / size) < o->topk_group;
    }
    for (size_t e = 0; e < E; e++) {
        size_t rank = allowed[e] ? rank_of(choice, allowed, E, e) : E;
        if (rank < o->top_k) ids[rank] = (int32_t)e;
    }
    for (size_t j = 0; j < o->top_k && o->kind == MOE4_ROUTER_HASH; j++)
        ids[j] = ((const int32_t *)o->table)[(size_t)token_id * o->top_k + j];
    double sum = o->kind == MOE4_ROUTER_SIGMOID_BIAS ? 1e-20 : 0;
    bool soft = o->kind == MOE4_ROUTER_TOPK_SOFTMAX;
    for (size_t j = 0; j < o->top_k; j++) sum += weights[j] = soft ? exp(score[ids[j]]) : score[ids[j]];
    for (size_t j = 0; j < o->top_k; j++) weights[j] = weights[j] / (o->normalize || soft ? sum : 1) * (o->scale == 0 ? 1 : o->scale);
}

static void test_select(void **state) {
    (void)state;
    static const struct {
        moe4_router_kind kind;
        size_t E, k, n_group, topk_group;
        int normalize;
        float scale, gate_temp;
    } cases[] = {
        {MOE4_ROUTER_SOFTMAX_TOPK, 8, 2, 0, 0, 1, 0, 0},          {MOE4_ROUTER_SOFTMAX_TOPK, 128, 8, 0, 0, 0, 0, 0},
        {MOE4_ROUTER_SIGMOID_BIAS, 256, 8, 8, 4, 1, 2.5f, 0},     {MOE4_ROUTER_SIGMOID_BIAS, 384, 8, 1, 1, 1, 2.827f, 0},
        {MOE4_ROUTER_SIGMOID_BIAS, 32, 6, 32, 7, 0, 1, 0},        {MOE4_ROUTER_SIGMOID_BIAS, 12, 4, 4, 2, 1, 1, 0},
        {MOE4_ROUTER_SIGMOID_BIAS, 5, 5, 1, 1, 1, 1, 0},          {MOE4_ROUTER_SOFTMAX_TOPK, 1, 1, 0, 0, 1, 0, 0},
        {MOE4_ROUTER_TOPK_SOFTMAX, 32, 4, 0, 0, 0, 0, 0},         {MOE4_ROUTER_SQRTSOFTPLUS_BIAS, 384, 6, 0, 0, 1, 2.5f, 0},
        {MOE4_ROUTER_SQRTSOFTPLUS_BIAS, 16, 3, 0, 0, 0, 1, 0.1f}, {MOE4_ROUTER_HASH, 64, 6, 0, 0, 1, 1.5f, 2},
        {MOE4_ROUTER_SIGMOID_TOP1, 16, 1, 0, 0, 0, 0, 0},
    };
    moe4_ctx *ctx = ref_ctx(2, 0);
    enum { N = 200, N_TOKEN_IDS = 50 };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        moe4_router_options o = options(cases[c].kind, cases[c].E, cases[c].k);
        o.n_group = cases[c].n_group;
        o.topk_group = cases[c].topk_group;
        o.normalize = cases[c].normalize;
        o.scale = cases[c].scale;
        o.gate_temp = cases[c].gate_temp;
        float *logits = malloc(N * o.n_experts * sizeof *logits), bias[512] = {0}, alt[512] = {0};
        int32_t table[N_TOKEN_IDS * 8], token_ids[N];
        uint8_t use_alt[N];
        bool biased = o.kind == MOE4_ROUTER_SIGMOID_BIAS || o.kind == MOE4_ROUTER_TOPK_SOFTMAX || o.kind == MOE4_ROUTER_SQRTSOFTPLUS_BIAS;
        for (size_t i = 0; i < N * o.n_experts; i++) logits[i] = 2 * ref_normal() + (i % 50 == 0 ? 25 : 0);
        for (size_t e = 0; e < 512 && biased; e++) bias[e] = 0.3f * ref_normal(), alt[e] = 0.3f * ref_normal();
        for (size_t i = 0; i < N_TOKEN_IDS * o.top_k; i++) table[i] = (int32_t)((i / o.top_k * 7 + i % o.top_k * 5) % o.n_experts);
        for (size_t t = 0; t < N; t++) token_ids[t] = (int32_t)(ref_random() % N_TOKEN_IDS), use_alt[t] = (uint8_t)(ref_random() % 2);
        if (o.kind == MOE4_ROUTER_HASH) o.table = table, o.n_token_ids = N_TOKEN_IDS;
        if (biased) o.alt_bias = alt;
        moe4_router_tokens tokens = MOE4_ROUTER_TOKENS_INIT;
        tokens.token_ids = token_ids;
        if (biased) tokens.alt_bias = use_alt;
        moe4_router *r;
        OK(ctx, moe4_router_create(&r, ctx, NULL, biased ? bias : NULL, &o));
        int32_t ids[N * 8], want_ids[8];
        float weights[N * 8];
        double want[8];
        OK(ctx, moe4_router_select(r, ids, weights, logits, &tokens, N, NULL));
        for (size_t t = 0; t < N; t++) {
            reference(&o, biased && use_alt[t] ? alt : bias, logits + t * o.n_experts, token_ids[t], want_ids, want);
            for (size_t j = 0; j < o.top_k; j++) {
                assert_int_equal(ids[t * o.top_k + j], want_ids[j]);
                assert_float_equal(weights[t * o.top_k + j], want[j], 1e-6 + 1e-5 * want[j]);
            }
        }
        moe4_router_destroy(r);
        free(logits);
    }
    moe4_ctx_destroy(ctx);
}

static void test_hash_tables(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(1, 0);
    int32_t table[] = {0, 1, 2, 3, 3, 0}, token_id = 3;
    int64_t wide[] = {0, 1, 2, 3, 3, 0};
    const float logits[4] = {1, 2, 3, 4};
    int32_t ids[2];
    float weights[2];
    moe4_router_options o = options(MOE4_ROUTER_HASH, 4, 2);
    moe4_router_tokens tokens = MOE4_ROUTER_TOKENS_INIT;
    moe4_router *r;
    o.n_token_ids = 3;
    for (int i64 = 0; i64 < 2; i64++) {
        o.table = i64 ? (void *)wide : table;
        o.table_dtype = i64 ? MOE4_I64 : MOE4_I32;
        OK(ctx, moe4_router_create(&r, ctx, NULL, NULL, &o));
        token_id = 2;
        tokens.token_ids = &token_id;
        OK(ctx, moe4_router_select(r, ids, weights, logits, &tokens, 1, NULL));
        assert_true(ids[0] == 3 && ids[1] == 0);
        for (int bad = -1; bad <= 3; bad += 4) {
            token_id = bad;
            assert_int_equal(moe4_router_select(r, ids, weights, logits, &tokens, 1, NULL), MOE4_ERROR_ARGUMENT);
            assert_non_null(
                strstr(moe4_ctx_error(ctx), bad < 0 ? "token 0: id -1, the hash table has 3" : "token 0: id 3, the hash table has 3"));
        }
        assert_int_equal(moe4_router_select(r, ids, weights, logits, NULL, 1, NULL), MOE4_ERROR_ARGUMENT);
        assert_non_null(strstr(moe4_ctx_error(ctx), "token_ids"));
        moe4_router_destroy(r);
    }
    o.table = table;
    o.table_dtype = MOE4_I32;
    table[4] = 4;
    assert_int_equal(moe4_router_create(&r, ctx, NULL, NULL, &o), MOE4_ERROR_FORMAT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "token id 2 has expert 4 of 4"));
    table[4] = 0;
    assert_int_equal(moe4_router_create(&r, ctx, NULL, NULL, &o), MOE4_ERROR_FORMAT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "token id 2 has expert 0 twice"));
    moe4_ctx_destroy(ctx);
}

static void test_ties_and_extremes(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(1, 0);
    for (int kind = MOE4_ROUTER_SOFTMAX_TOPK; kind <= MOE4_ROUTER_SQRTSOFTPLUS_BIAS; kind++) {
        moe4_router_options o = options((moe4_router_kind)kind, 6, 3);
        o.normalize = 1;
        moe4_router *r;
        OK(ctx, moe4_router_create(&r, ctx, NULL, NULL, &o));
        const float logits[4][6] = {{1, 2, 2, 1, 2, 2}, /* ties: the lower index */
                                    {-300, -300, -300, -300, -300, -300},
                                    {300, -300, 299, 0, 0, 0},
                                    {0, NAN, 0, 0, 0, 0}};
        int32_t ids[12];
        float w[12];
        OK(ctx, moe4_router_select(r, ids, w, logits[0], NULL, 4, NULL));
        static const int32_t want[] = {1, 2, 4, 0, 1, 2};
        assert_memory_equal(ids, want, sizeof want);
        assert_int_equal(ids[6], 0);
        for (int i = 0; i < 9; i++) assert_true(isfinite(w[i]) && w[i] >= 0);
        for (int i = 9; i < 12; i++) assert_true(isnan(w[i]) && ids[i] == i - 9);
        moe4_router_destroy(r);
    }
    /* sigmoids of both are 1 */
    const float logits[] = {40, 50, -3, 50};
    moe4_router_options o = options(MOE4_ROUTER_SIGMOID_TOP1, 4, 1);
    moe4_router *r;
    int32_t id;
    float w;
    OK(ctx, moe4_router_create(&r, ctx, NULL, NULL, &o));
    OK(ctx, moe4_router_select(r, &id, &w, logits, NULL, 1, NULL));
    assert_int_equal(id, 1);
    assert_true(w == 1);
    moe4_router_destroy(r);
    moe4_ctx_destroy(ctx);
}

/* forward = products in fp32, then select; the same bits alone, in a batch, and on any number of threads. */
static void test_forward(void **state) {
    (void)state;
    enum { H = 80, E = 24, K = 4, T = 33 };
    moe4_ctx *ctx = ref_ctx(3, 0), *single = ref_ctx(1, 0);
    const moe4_dtype dtypes[] = {MOE4_BF16, MOE4_F32, MOE4_F16};
    for (int d = 0; d < 3; d++) {
        moe4_weight gate = ref_random_weight(dtypes[d], E, H);
        float x[T * H], logits[T * E];
        double row[H], product[E];
        for (size_t i = 0; i < T * H; i++) x[i] = ref_normal();
        for (size_t t = 0; t < T; t++) {
            for (size_t i = 0; i < H; i++) row[i] = x[t * H + i];
            ref_product(product, &gate, row);
            for (size_t e = 0; e < E; e++) logits[t * E + e] = (float)product[e];
        }
        moe4_router_options o = options(MOE4_ROUTER_SIGMOID_BIAS, E, K);
        o.hidden = H;
        o.normalize = 1;
        moe4_router *r, *r1;
        OK(ctx, moe4_router_create(&r, ctx, &gate, NULL, &o));
        OK(single, moe4_router_create(&r1, single, &gate, NULL, &o));
        moe4_workspace ws;
        OK(ctx, moe4_router_workspace_bytes(r, &ws.bytes, T));
        ws.data = aligned_alloc(64, ws.bytes);
        int32_t ids[T * K], want_ids[T * K], one_ids[K];
        float w[T * K], want[T * K], one[K];
        OK(ctx, moe4_router_forward(r, ids, w, x, NULL, T, &ws, NULL));
        OK(ctx, moe4_router_select(r, want_ids, want, logits, NULL, T, NULL));
        assert_memory_equal(ids, want_ids, sizeof ids);
        for (size_t i = 0; i < T * K; i++) assert_float_equal(w[i], want[i], 1e-5);
        for (size_t t = 0; t < T; t += 5) {
            OK(single, moe4_router_forward(r1, one_ids, one, x + t * H, NULL, 1, &ws, NULL));
            assert_memory_equal(one_ids, ids + t * K, sizeof one_ids);
            assert_memory_equal(one, w + t * K, sizeof one);
        }
        x[7] = INFINITY;
        OK(ctx, moe4_router_forward(r, ids, w, x, NULL, T, &ws, NULL));
        assert_true(isnan(w[0]) && ids[0] == 0 && ids[K - 1] == K - 1);
        assert_memory_equal(ids + K, want_ids + K, sizeof ids - K * sizeof *ids);
        free(ws.data);
        moe4_router_destroy(r);
        moe4_router_destroy(r1);
        ref_free_weight(&gate);
    }
    moe4_ctx_destroy(ctx);
    moe4_ctx_destroy(single);
}

static void test_errors(void **state) {
    (void)state;
    moe4_ctx *ctx = ref_ctx(1, 0);
    moe4_weight gate = ref_random_weight(MOE4_BF16, 8, 32);
    moe4_router_options good = options(MOE4_ROUTER_SIGMOID_BIAS, 8, 2), o;
    good.hidden = 32;
    float bias[8] = {0, 0, 0, NAN};
    moe4_router *r;
#define BAD(field, value, words)                                                                              \
    do {                                                                                                      \
        o = good;                                                                                             \
        o.field = (value);                                                                                    \
        assert_int_equal(moe4_router_create(&r, ctx, &gate, NULL, &o), MOE4_ERROR_ARGUMENT);                  \
        assert_null(r);                                                                                       \
        if (!strstr(moe4_ctx_error(ctx), words)) fail_msg("\"%s\" lacks \"%s\"", moe4_ctx_error(ctx), words); \
    } while (0)
    BAD(kind, MOE4_ROUTER_NONE, "0 is no router");
    BAD(n_experts, 9, "8 x 32, need 9 x 32");
    BAD(n_experts, 0, "n_experts: 0");
    BAD(n_experts, 1 << 20, "n_experts: 1048576");
    BAD(hidden, 31, "need 8 x 31");
    BAD(top_k, 9, "9 of 8");
    BAD(top_k, 0, "0 of 8");
    BAD(n_group, 3, "8 experts in 3 groups");
    BAD(topk_group, 2, "2 of 1 groups");
    o = good;
    o.n_group = 8;
    o.topk_group = 1;
    assert_int_equal(moe4_router_create(&r, ctx, &gate, NULL, &o), MOE4_ERROR_ARGUMENT); /* one group of one expert for top 2 */
    BAD(scale, INFINITY, "scale");
    BAD(gate_temp, 2, "gate_temp: 2");
    BAD(kind, MOE4_ROUTER_HASH, "only HASH has one");
    BAD(kind, MOE4_ROUTER_SIGMOID_TOP1, "2, SIGMOID_TOP1 chooses 1");
    good.kind = MOE4_ROUTER_SOFTMAX_TOPK;
    BAD(alt_bias, bias, "take none");
    good.kind = MOE4_ROUTER_SIGMOID_BIAS;
    BAD(x_dtype, MOE4_I8, "x_dtype");
    assert_int_equal(moe4_router_create(&r, ctx, &gate, bias, &good), MOE4_ERROR_FORMAT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "bias [3]"));
    OK(ctx, moe4_router_create(&r, ctx, NULL, NULL, &good));
    size_t bytes;
    assert_int_equal(moe4_router_workspace_bytes(r, &bytes, 1), MOE4_ERROR_ARGUMENT); /* no gate weights */
    assert_int_equal(moe4_router_select(r, NULL, NULL, NULL, NULL, 1, NULL), MOE4_ERROR_ARGUMENT);
    OK(ctx, moe4_router_select(r, NULL, NULL, NULL, NULL, 0, NULL));
    moe4_router_destroy(r);
    ref_free_weight(&gate);
    moe4_ctx_destroy(ctx);
}

/* A checkpoint's second bias (DeepSeek-V4's gate.bias_vl) is the router's, and gives way to the caller's. */
static void test_alt_bias_of_a_checkpoint(void **state) {
    (void)state;
    static const struct {
        const char *shape;
        moe4_status status;
    } cases[] = {{"[4]", MOE4_OK}, {"[2,2]", MOE4_ERROR_FORMAT}};
    /* gate zero; the first bias prefers expert 2, the second expert 1, the caller's expert 3 */
    float data[32 + 8] = {0};
    data[32 + 2] = data[36 + 1] = 1;
    static const float own[4] = {0, 0, 0, 1};
    moe4_ctx *ctx;
    assert_int_equal(moe4_ctx_create(&ctx, NULL), MOE4_OK);
    files_make();
    files_text("config.json", "{\"model_type\":\"deepseek_v41\",\"hidden_size\":8,\"vocab_size\":2,\"num_hidden_layers\":1,"
                              "\"n_routed_experts\":4,\"num_experts_per_tok\":1,\"moe_intermediate_size\":16}");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char header[512];
        snprintf(header, sizeof header,
                 "{\"layers.0.ffn.gate.weight\":{\"dtype\":\"F32\",\"shape\":[4,8],\"data_offsets\":[0,128]},"
                 "\"layers.0.ffn.gate.bias\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[128,144]},"
                 "\"layers.0.ffn.gate.bias_vl\":{\"dtype\":\"F32\",\"shape\":%s,\"data_offsets\":[144,160]}}",
                 cases[i].shape);
        files_safetensors("model.safetensors", header, data, sizeof data);
        moe4_checkpoint *ckpt;
        OK(ctx, moe4_checkpoint_open(&ckpt, ctx, files_path("")));
        for (int given = 0; given < 2; given++) {
            moe4_router *r;
            moe4_router_options o = MOE4_ROUTER_OPTIONS_INIT;
            if (given) o.alt_bias = own;
            moe4_status status = moe4_router_create_from_checkpoint(&r, ctx, ckpt, 0, &o);
            assert_int_equal(status, given ? MOE4_OK : cases[i].status);
            if (status != MOE4_OK) continue;
            moe4_router_tokens tokens = MOE4_ROUTER_TOKENS_INIT;
            tokens.alt_bias = (const uint8_t[]){0, 1};
            int32_t ids[2];
            float weights[2];
            static const float logits[8];
            OK(ctx, moe4_router_select(r, ids, weights, logits, &tokens, 2, NULL));
            assert_int_equal(ids[0], 2);
            assert_int_equal(ids[1], given ? 3 : 1);
            moe4_router_destroy(r);
        }
        moe4_checkpoint_close(ckpt);
    }
    files_remove();
    moe4_ctx_destroy(ctx);
}

/* A layer that routes by token id has no use for it. */
static void test_alt_bias_beside_a_hash_table(void **state) {
    (void)state;
    float data[32 + 4 + 4] = {0};
    static const int64_t table[2] = {3, 1};
    memcpy(data + 36, table, sizeof table);
    moe4_ctx *ctx;
    moe4_checkpoint *ckpt;
    moe4_router *r;
    assert_int_equal(moe4_ctx_create(&ctx, NULL), MOE4_OK);
    files_make();
    files_text("config.json",
               "{\"model_type\":\"deepseek_v4\",\"hidden_size\":8,\"vocab_size\":2,\"num_hidden_layers\":1,\"num_hash_layers\":1,"
               "\"n_routed_experts\":4,\"num_experts_per_tok\":1,\"moe_intermediate_size\":16}");
    files_safetensors("model.safetensors",
                      "{\"layers.0.ffn.gate.weight\":{\"dtype\":\"F32\",\"shape\":[4,8],\"data_offsets\":[0,128]},"
                      "\"layers.0.ffn.gate.bias_vl\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[128,144]},"
                      "\"layers.0.ffn.gate.tid2eid\":{\"dtype\":\"I64\",\"shape\":[2,1],\"data_offsets\":[144,160]}}",
                      data, sizeof data);
    OK(ctx, moe4_checkpoint_open(&ckpt, ctx, files_path("")));
    OK(ctx, moe4_router_create_from_checkpoint(&r, ctx, ckpt, 0, NULL));
    moe4_router_tokens tokens = MOE4_ROUTER_TOKENS_INIT;
    tokens.token_ids = (const int32_t[]){1, 0};
    static const float logits[8];
    int32_t ids[2];
    float weights[2];
    OK(ctx, moe4_router_select(r, ids, weights, logits, &tokens, 2, NULL));
    assert_int_equal(ids[0], 1);
    assert_int_equal(ids[1], 3);
    tokens.alt_bias = (const uint8_t[]){0, 1};
    assert_int_equal(moe4_router_select(r, ids, weights, logits, &tokens, 2, NULL), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "no second bias"));
    moe4_router_destroy(r);
    moe4_checkpoint_close(ckpt);
    files_remove();
    moe4_ctx_destroy(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_select),
        cmocka_unit_test(test_hash_tables),
        cmocka_unit_test(test_ties_and_extremes),
        cmocka_unit_test(test_forward),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_alt_bias_of_a_checkpoint),
        cmocka_unit_test(test_alt_bias_beside_a_hash_table),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
