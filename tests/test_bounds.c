/* Every size, index and count of the public interface one past what it may be: refused by name, with nothing written. And the same call one
 * inside: taken. */
#include "reference.h"

#define MODEL MOE4_SOURCE_DIR "/models/novels-18m-nvfp4"

static moe4_ctx *ctx;

static void expect(moe4_status status, moe4_status want, const char *call) {
    if (status != want) fail_msg("%s: status %d, want %d (%s)", call, (int)status, (int)want, moe4_ctx_error(ctx));
    if ((want == MOE4_OK) != (moe4_ctx_error(ctx)[0] == '\0')) fail_msg("%s: \"%s\"", call, moe4_ctx_error(ctx));
}
#define TAKEN(call) expect(call, MOE4_OK, #call)
#define REFUSED(call) expect(call, MOE4_ERROR_ARGUMENT, #call)

static uint8_t codes[1 << 14], scales[1 << 14], other[1 << 14];
static float x[1 << 14], y[1 << 14], again[1 << 14];

static moe4_workspace workspace(size_t bytes) {
    return (moe4_workspace){aligned_alloc(64, (bytes + 127) / 64 * 64), bytes};
}

static void test_codec(void **state) {
    (void)state;
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    float global = 1;
    TAKEN(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, MOE4_F32, 4, 48, 48, &o));
    REFUSED(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, MOE4_F32, 4, 47, 48, &o));
    REFUSED(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, MOE4_F32, 4, 49, 49, &o));
    REFUSED(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, MOE4_F32, 4, 48, 47, &o));
    REFUSED(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, MOE4_F32, SIZE_MAX / 48, 48, 48, &o));
    REFUSED(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, MOE4_N_DTYPES, 4, 48, 48, &o));
    o.interleave = 2;
    TAKEN(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, MOE4_F32, 4, 48, 48, &o));
    REFUSED(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, MOE4_F32, 5, 48, 48, &o));
    o.interleave = 3;
    REFUSED(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, MOE4_F32, 4, 48, 48, &o));
    o.interleave = 0;
    o.scale_layout = (moe4_scale_layout)(MOE4_SCALES_128X4 + 1);
    REFUSED(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, MOE4_F32, 4, 48, 48, &o));
    o.scale_layout = MOE4_SCALES_LINEAR;
    o.recipe = (moe4_recipe)(MOE4_RECIPE_COMPRESSED_TENSORS + 1);
    REFUSED(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, MOE4_F32, 4, 48, 48, &o));
    o.recipe = MOE4_RECIPE_MODELOPT;
    o.global = &global;
    TAKEN(moe4_nvfp4_dequantize(ctx, y, MOE4_F32, 48, codes, scales, 4, 48, &o));
    REFUSED(moe4_nvfp4_dequantize(ctx, y, MOE4_F32, 47, codes, scales, 4, 48, &o));
    REFUSED(moe4_nvfp4_dequantize(ctx, y, MOE4_F32, 49, codes, scales, 4, 49, &o));
    TAKEN(moe4_amax(ctx, &global, x, MOE4_F32, 4, 48, 48));
    REFUSED(moe4_amax(ctx, &global, x, MOE4_F32, 4, 48, 47));
    REFUSED(moe4_amax(ctx, &global, x, MOE4_F32, SIZE_MAX / 47, 48, 48));
}

static void test_layouts(void **state) {
    (void)state;
    size_t bytes;
    TAKEN(moe4_scales_bytes(ctx, &bytes, MOE4_SCALES_128X4, 2, 5, 48));
    assert_int_equal(bytes, 2 * 512);
    REFUSED(moe4_scales_bytes(ctx, &bytes, MOE4_SCALES_128X4, 2, 5, 49));
    REFUSED(moe4_scales_bytes(ctx, &bytes, (moe4_scale_layout)3, 2, 5, 48));
    REFUSED(moe4_scales_bytes(ctx, &bytes, MOE4_SCALES_LINEAR, SIZE_MAX / 15 + 1, 5, 48));
    TAKEN(moe4_scales_convert(ctx, other, MOE4_SCALES_128X4, scales, MOE4_SCALES_LINEAR, 2, 5, 48));
    REFUSED(moe4_scales_convert(ctx, other, MOE4_SCALES_128X4, scales, MOE4_SCALES_LINEAR, 2, 5, 47));
    REFUSED(moe4_scales_convert(ctx, other, (moe4_scale_layout)3, scales, MOE4_SCALES_LINEAR, 2, 5, 48));
    REFUSED(moe4_scales_convert(ctx, other, MOE4_SCALES_LINEAR, scales, (moe4_scale_layout)3, 2, 5, 48));
    TAKEN(moe4_rows_interleave(ctx, other, codes, 2, 12, 7, 3));
    REFUSED(moe4_rows_interleave(ctx, other, codes, 2, 13, 7, 3));
    REFUSED(moe4_rows_interleave(ctx, other, codes, 2, 12, 7, 4));
    REFUSED(moe4_rows_interleave(ctx, other, codes, 2, 12, 7, 0));
    TAKEN(moe4_rows_deinterleave(ctx, other, codes, 2, 12, 7, 3));
    REFUSED(moe4_rows_deinterleave(ctx, other, codes, 2, 11, 7, 3));
    REFUSED(moe4_rows_deinterleave(ctx, other, codes, 2, 12, SIZE_MAX / 23, 3));
    TAKEN(moe4_transpose(ctx, other, codes, 2, 3, 5, 4));
    REFUSED(moe4_transpose(ctx, other, codes, 2, 3, 5, 3));
    REFUSED(moe4_transpose(ctx, other, codes, 2, 3, 5, 0));
    REFUSED(moe4_transpose(ctx, other, codes, SIZE_MAX / 59, 3, 5, 4));
}

static void test_checkpoint(void **state) {
    (void)state;
    enum { LAYERS = 6, EXPERTS = 32 };
    moe4_checkpoint *m;
    moe4_tensor t;
    moe4_weight w;
    moe4_layer_kind kind;
    moe4_router *router;
    moe4_moe *moe;
    TAKEN(moe4_checkpoint_open(&m, ctx, MODEL));
    size_t n = moe4_checkpoint_n_tensors(m);
    TAKEN(moe4_checkpoint_tensor(m, &t, n - 1));
    REFUSED(moe4_checkpoint_tensor(m, &t, n));
    TAKEN(moe4_checkpoint_layer_kind(m, &kind, LAYERS - 1));
    REFUSED(moe4_checkpoint_layer_kind(m, &kind, LAYERS));
    TAKEN(moe4_checkpoint_expert(m, &w, LAYERS - 1, EXPERTS - 1, MOE4_DOWN));
    REFUSED(moe4_checkpoint_expert(m, &w, LAYERS, EXPERTS - 1, MOE4_DOWN));
    REFUSED(moe4_checkpoint_expert(m, &w, LAYERS - 1, EXPERTS, MOE4_DOWN));
    REFUSED(moe4_checkpoint_expert(m, &w, LAYERS - 1, EXPERTS - 1, (moe4_proj)(MOE4_DOWN + 1)));
    REFUSED(moe4_checkpoint_expert(m, &w, LAYERS - 1, MOE4_EXPERT_DENSE - 1, MOE4_DOWN));
    REFUSED(moe4_checkpoint_expert(m, &w, 0, 0, MOE4_DOWN));
    REFUSED(moe4_checkpoint_expert(m, &w, 1, MOE4_EXPERT_DENSE, MOE4_DOWN));
    TAKEN(moe4_checkpoint_router(m, &w, &t, LAYERS - 1));
    REFUSED(moe4_checkpoint_router(m, &w, &t, LAYERS));
    TAKEN(moe4_checkpoint_hash_table(m, &t, LAYERS - 1));
    REFUSED(moe4_checkpoint_hash_table(m, &t, LAYERS));
    TAKEN(moe4_weight_values(ctx, y, &w, EXPERTS - 1, 1));
    REFUSED(moe4_weight_values(ctx, y, &w, EXPERTS - 1, 2));
    REFUSED(moe4_weight_values(ctx, y, &w, EXPERTS + 1, 0));
    TAKEN(moe4_router_create_from_checkpoint(&router, ctx, m, LAYERS - 1, NULL));
    moe4_router_destroy(router);
    REFUSED(moe4_router_create_from_checkpoint(&router, ctx, m, LAYERS, NULL));
    REFUSED(moe4_router_create_from_checkpoint(&router, ctx, m, 0, NULL));
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.first_expert = EXPERTS - 1;
    TAKEN(moe4_moe_create_from_checkpoint(&moe, ctx, m, LAYERS - 1, &o));
    moe4_moe_destroy(moe);
    REFUSED(moe4_moe_create_from_checkpoint(&moe, ctx, m, LAYERS, &o));
    o.n_local = 2;
    REFUSED(moe4_moe_create_from_checkpoint(&moe, ctx, m, LAYERS - 1, &o));
    o.n_local = 0;
    o.first_expert = EXPERTS;
    REFUSED(moe4_moe_create_from_checkpoint(&moe, ctx, m, LAYERS - 1, &o));
    assert_null(moe);
    moe4_checkpoint_close(m);
}

enum { E = 3, H = 32, I = 48, T = 4 };

static void make_experts(moe4_expert experts[E]) {
    for (int e = 0; e < E; e++)
        experts[e] =
            (moe4_expert){ref_random_weight(MOE4_NVFP4, I, H), ref_random_weight(MOE4_NVFP4, I, H), ref_random_weight(MOE4_NVFP4, H, I)};
}

static moe4_moe_options moe_options(void) {
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = E;
    o.top_k = 2;
    o.x_dtype = o.y_dtype = MOE4_F32;
    return o;
}

#define CREATE(what, set)                                          \
    do {                                                           \
        moe4_moe_options o = moe_options();                        \
        moe4_moe *m;                                               \
        set;                                                       \
        expect(moe4_moe_create(&m, ctx, experts, &o), what, #set); \
        moe4_moe_destroy(m);                                       \
    } while (0)

static void test_moe_options(void **state) {
    (void)state;
    moe4_expert experts[E];
    make_experts(experts);
    CREATE(MOE4_OK, o.top_k = E);
    CREATE(MOE4_ERROR_ARGUMENT, o.top_k = E + 1);
    CREATE(MOE4_ERROR_ARGUMENT, o.top_k = 0);
    CREATE(MOE4_ERROR_ARGUMENT, o.n_experts = 0);
    CREATE(MOE4_OK, (o.first_expert = E - 1, o.n_local = 1));
    CREATE(MOE4_ERROR_ARGUMENT, (o.first_expert = E - 1, o.n_local = 2));
    CREATE(MOE4_ERROR_ARGUMENT, o.first_expert = E);
    CREATE(MOE4_OK, o.x_ld = H);
    CREATE(MOE4_ERROR_ARGUMENT, o.x_ld = H - 1);
    CREATE(MOE4_ERROR_ARGUMENT, o.y_ld = H - 1);
    CREATE(MOE4_ERROR_ARGUMENT, o.act = (moe4_act)(MOE4_ACT_BF16 + 1));
    CREATE(MOE4_ERROR_ARGUMENT, o.activation = (moe4_activation)(MOE4_RELU2 + 1));
    CREATE(MOE4_ERROR_ARGUMENT, o.weighting = (moe4_weighting)(MOE4_WEIGHT_ON_X + 1));
    CREATE(MOE4_ERROR_ARGUMENT, o.x_dtype = MOE4_N_DTYPES);
    CREATE(MOE4_ERROR_ARGUMENT, o.struct_size = sizeof(size_t) - 1);
    CREATE(MOE4_ERROR_ARGUMENT, experts[2].down.rows++);
    experts[2].down.rows--;
    CREATE(MOE4_ERROR_ARGUMENT, experts[2].down.cols--);
    experts[2].down.cols++;
    CREATE(MOE4_ERROR_ARGUMENT, experts[1].gate.rows--);
    experts[1].gate.rows++;
    CREATE(MOE4_OK, (void)o);
    for (int e = 0; e < E; e++) {
        ref_free_weight(&experts[e].gate);
        ref_free_weight(&experts[e].up);
        ref_free_weight(&experts[e].down);
    }
}

static void test_moe_calls(void **state) {
    (void)state;
    moe4_expert experts[E];
    moe4_moe *m;
    size_t bytes;
    const moe4_moe_options o = moe_options();
    make_experts(experts);
    TAKEN(moe4_moe_create(&m, ctx, experts, &o));
    TAKEN(moe4_moe_replace_expert(m, E - 1, &experts[0]));
    REFUSED(moe4_moe_replace_expert(m, E, &experts[0]));
    REFUSED(moe4_moe_workspace_bytes(m, &bytes, (size_t)INT32_MAX / 2 + 1));
    REFUSED(moe4_moe_workspace_bytes(m, &bytes, SIZE_MAX));
    REFUSED(moe4_moe_rows_workspace_bytes(m, &bytes, (size_t)INT32_MAX + 1, 0));
    const int32_t ids[2 * T] = {0, 1, 2, 0, E, -1, 1, 2}; /* ids beyond the last are other ranks', no error */
    const float weights[2 * T] = {1, 1, 1, 1, 1, 1, 1, 1};
    TAKEN(moe4_moe_workspace_bytes(m, &bytes, T));
    moe4_workspace ws = workspace(bytes);
    TAKEN(moe4_moe_forward(m, y, x, ids, weights, T, &ws, NULL));
    REFUSED(moe4_moe_forward(m, y, x, ids, weights, T + 60, &ws, NULL));
    ws.bytes--;
    memset(again, 0xAB, sizeof again);
    memcpy(y, again, sizeof y);
    REFUSED(moe4_moe_forward(m, y, x, ids, weights, T, &ws, NULL));
    assert_memory_equal(y, again, sizeof y);
    ws.bytes++;
    ws.data = (char *)ws.data + 1;
    REFUSED(moe4_moe_forward(m, y, x, ids, weights, T, &ws, NULL));
    ws.data = (char *)ws.data - 1;
    free(ws.data);

    TAKEN(moe4_moe_rows_workspace_bytes(m, &bytes, E * T, T));
    ws = workspace(bytes);
    int32_t offsets[E + 1] = {0, 1, 1, T}, token[T] = {0, 1, -1, T - 1};
    TAKEN(moe4_moe_forward_sorted(m, y, x, offsets, NULL, token, T, T, &ws, NULL));
    token[3] = T;
    REFUSED(moe4_moe_forward_sorted(m, y, x, offsets, NULL, token, T, T, &ws, NULL));
    token[3] = 0;
    offsets[E] = T + 1;
    REFUSED(moe4_moe_forward_sorted(m, y, x, offsets, NULL, token, T, T, &ws, NULL));
    offsets[E] = 0;
    REFUSED(moe4_moe_forward_sorted(m, y, x, offsets, NULL, token, T, T, &ws, NULL));
    offsets[E] = T;
    offsets[0] = 1;
    REFUSED(moe4_moe_forward_sorted(m, y, x, offsets, NULL, token, T, T, &ws, NULL));
    offsets[0] = 0;
    int32_t counts[E] = {0, T, 1};
    TAKEN(moe4_moe_forward_batched(m, y, x, counts, NULL, T, &ws, NULL));
    counts[1] = T + 1;
    REFUSED(moe4_moe_forward_batched(m, y, x, counts, NULL, T, &ws, NULL));
    counts[1] = -1;
    REFUSED(moe4_moe_forward_batched(m, y, x, counts, NULL, T, &ws, NULL));
    counts[1] = T;
    REFUSED(moe4_moe_forward_batched(m, y, x, counts, NULL, SIZE_MAX / 2, &ws, NULL));
    TAKEN(moe4_moe_rows_workspace_bytes(m, &ws.bytes, E * T, 0));
    ws.bytes--;
    REFUSED(moe4_moe_forward_batched(m, y, x, counts, NULL, T, &ws, NULL));
    free(ws.data);
    moe4_moe_destroy(m);
    for (int e = 0; e < E; e++) {
        ref_free_weight(&experts[e].gate);
        ref_free_weight(&experts[e].up);
        ref_free_weight(&experts[e].down);
    }
}

static void test_linear_and_grouped(void **state) {
    (void)state;
    moe4_weight w[2] = {ref_random_weight(MOE4_NVFP4, I, H), ref_random_weight(MOE4_NVFP4, I, H)};
    moe4_linear_options lo = MOE4_LINEAR_OPTIONS_INIT;
    moe4_grouped_options go = MOE4_GROUPED_OPTIONS_INIT;
    moe4_linear *l;
    moe4_grouped *g;
    size_t bytes;
    lo.x_ld = H - 1;
    REFUSED(moe4_linear_create(&l, ctx, w, 2, &lo));
    lo.x_ld = H + 1;
    TAKEN(moe4_linear_create(&l, ctx, w, 2, &lo));
    REFUSED(moe4_linear_workspace_bytes(l, &bytes, (size_t)INT32_MAX + 1));
    TAKEN(moe4_linear_workspace_bytes(l, &bytes, T));
    moe4_workspace ws = workspace(bytes);
    TAKEN(moe4_linear_forward(l, (void *[]){y, again}, NULL, x, T, &ws, NULL));
    ws.bytes--;
    REFUSED(moe4_linear_forward(l, (void *[]){y, again}, NULL, x, T, &ws, NULL));
    free(ws.data);
    moe4_linear_destroy(l);
    w[1].cols -= 16;
    REFUSED(moe4_linear_create(&l, ctx, w, 2, NULL));
    w[1].cols += 15;
    REFUSED(moe4_linear_create(&l, ctx, w + 1, 1, NULL));
    w[1].cols += 1;
    w[1].rows -= 1;
    REFUSED(moe4_grouped_create(&g, ctx, w, 2, NULL));
    w[1].rows += 1;
    go.x_dtype = go.y_dtype = MOE4_F32;
    go.y_ld = I - 1;
    REFUSED(moe4_grouped_create(&g, ctx, w, 2, &go));
    go.y_ld = 0;
    go.x_ld = H - 1;
    REFUSED(moe4_grouped_create(&g, ctx, w, 2, &go));
    go.block_diagonal = 1;
    go.x_ld = 2 * H - 1;
    REFUSED(moe4_grouped_create(&g, ctx, w, 2, &go));
    go.block_diagonal = 0;
    go.x_ld = 0;
    TAKEN(moe4_grouped_create(&g, ctx, w, 2, &go));
    TAKEN(moe4_grouped_workspace_bytes(g, &bytes, T));
    ws = workspace(bytes);
    TAKEN(moe4_grouped_forward(g, y, NULL, x, (int32_t[]){0, 1, T}, T, &ws, NULL));
    REFUSED(moe4_grouped_forward(g, y, NULL, x, (int32_t[]){0, 1, T + 1}, T, &ws, NULL));
    REFUSED(moe4_grouped_forward(g, y, NULL, x, (int32_t[]){0, 2, 1}, T, &ws, NULL));
    REFUSED(moe4_grouped_forward(g, y, NULL, x, (int32_t[]){0, -1, 1}, T, &ws, NULL));
    ws.bytes--;
    REFUSED(moe4_grouped_forward(g, y, NULL, x, (int32_t[]){0, 1, T}, T, &ws, NULL));
    free(ws.data);
    moe4_grouped_destroy(g);
    go.block_diagonal = 1; /* every row once for each group */
    TAKEN(moe4_grouped_create(&g, ctx, w, 2, &go));
    TAKEN(moe4_grouped_workspace_bytes(g, &bytes, INT32_MAX / 2));
    REFUSED(moe4_grouped_workspace_bytes(g, &bytes, INT32_MAX / 2 + 1));
    moe4_grouped_destroy(g);
    for (int i = 0; i < 2; i++) ref_free_weight(&w[i]);
}

static void test_router(void **state) {
    (void)state;
    enum { VOCAB = 5 };
    moe4_weight gate = ref_random_weight(MOE4_BF16, 4, H);
    static const int32_t table[VOCAB * 2] = {0, 1, 1, 2, 2, 3, 3, 0, 0, 3};
    moe4_router *r;
    moe4_router_options o = MOE4_ROUTER_OPTIONS_INIT;
    int32_t ids[8], tokens[] = {0, VOCAB - 1};
    float weights[8];
    o.kind = MOE4_ROUTER_HASH;
    o.hidden = H;
    o.n_experts = 4;
    o.top_k = 2;
    o.table = table;
    o.n_token_ids = VOCAB;
    TAKEN(moe4_router_create(&r, ctx, &gate, NULL, &o));
    size_t bytes;
    TAKEN(moe4_router_workspace_bytes(r, &bytes, 2));
    moe4_workspace ws = workspace(bytes);
    moe4_router_tokens t = MOE4_ROUTER_TOKENS_INIT;
    t.token_ids = tokens;
    TAKEN(moe4_router_forward(r, ids, weights, x, &t, 2, &ws, NULL));
    tokens[1] = VOCAB;
    REFUSED(moe4_router_forward(r, ids, weights, x, &t, 2, &ws, NULL));
    REFUSED(moe4_router_select(r, ids, weights, x, &t, 2, NULL));
    tokens[1] = -1;
    REFUSED(moe4_router_select(r, ids, weights, x, &t, 2, NULL));
    tokens[1] = 0;
    ws.bytes--;
    REFUSED(moe4_router_forward(r, ids, weights, x, &t, 2, &ws, NULL));
    REFUSED(moe4_router_workspace_bytes(r, &bytes, SIZE_MAX / 8));
    free(ws.data);
    moe4_router_destroy(r);
    o.kind = MOE4_ROUTER_SIGMOID_BIAS;
    o.table = NULL;
    o.n_token_ids = 0;
    o.n_group = 2;
    o.topk_group = 1;
    TAKEN(moe4_router_create(&r, ctx, &gate, NULL, &o));
    moe4_router_destroy(r);
    o.topk_group = 3;
    REFUSED(moe4_router_create(&r, ctx, &gate, NULL, &o));
    o.topk_group = 1;
    o.top_k = 3; /* one group has two experts */
    REFUSED(moe4_router_create(&r, ctx, &gate, NULL, &o));
    o.top_k = 2;
    o.n_group = 3;
    REFUSED(moe4_router_create(&r, ctx, &gate, NULL, &o));
    o.n_group = 0;
    o.topk_group = 0;
    o.top_k = 5;
    REFUSED(moe4_router_create(&r, ctx, &gate, NULL, &o));
    o.top_k = 2;
    o.x_ld = H - 1;
    REFUSED(moe4_router_create(&r, ctx, &gate, NULL, &o));
    o.x_ld = 0;
    o.hidden = H + 1;
    REFUSED(moe4_router_create(&r, ctx, &gate, NULL, &o));
    ref_free_weight(&gate);
}

int main(void) {
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.n_threads = 2;
    if (moe4_ctx_create(&ctx, &o) != MOE4_OK) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_codec),       cmocka_unit_test(test_layouts),   cmocka_unit_test(test_checkpoint),
        cmocka_unit_test(test_moe_options), cmocka_unit_test(test_moe_calls), cmocka_unit_test(test_linear_and_grouped),
        cmocka_unit_test(test_router),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    moe4_ctx_destroy(ctx);
    return failed;
}
