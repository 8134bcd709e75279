/* The shell around the arithmetic: every allocation made to fail in turn, callers of older and newer headers, contexts made and destroyed
 * in a storm, eight threads on one layer. */
#include <pthread.h>
#include <stdatomic.h>

#include "reference.h"

#define MODEL MOE4_SOURCE_DIR "/models/novels-18m-nvfp4"

/* ---- an allocator that counts, and fails when told ---- */

struct counting {
    atomic_long live, made, fail_at; /* fail_at < 0: never */
};

static void *counting_alloc(void *user, size_t bytes, size_t align) {
    struct counting *c = user;
    if (atomic_fetch_add(&c->made, 1) == c->fail_at) return NULL;
    void *p = aligned_alloc(align, (bytes + align - 1) / align * align);
    if (p) atomic_fetch_add(&c->live, 1);
    return p;
}

static void counting_free(void *user, void *data) {
    atomic_fetch_sub(&((struct counting *)user)->live, 1);
    free(data);
}

static moe4_ctx_options counting_options(struct counting *c) {
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.n_threads = 2;
    o.alloc = counting_alloc;
    o.free = counting_free;
    o.alloc_user = c;
    return o;
}

struct everything {
    moe4_checkpoint *model;
    moe4_router *router;
    moe4_moe *layer;
    moe4_linear *linear, *wide;
    moe4_grouped *grouped;
    void *memory;
};

/* What an engine makes from a checkpoint, FP8 matrices among it. */
static moe4_status make_everything(moe4_ctx *ctx, struct everything *all) {
    moe4_weight w;
    moe4_expert expert, fp8;
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    static const uint8_t bytes[128 * 256], one = 127;
    const moe4_weight up = {.dtype = MOE4_F8_E4M3,
                            .rows = 128,
                            .cols = 256,
                            .data = bytes,
                            .scale = &one,
                            .scale_dtype = MOE4_F8_E8M0,
                            .scale_rows = 128,
                            .scale_cols = 256};
    moe4_weight down = up;
    down.rows = down.scale_rows = 256;
    down.cols = down.scale_cols = 128;
    fp8 = (moe4_expert){up, up, down};
    o.with_shared = 1;
    moe4_status status = moe4_checkpoint_open(&all->model, ctx, MODEL);
    if (!status) status = moe4_router_create_from_checkpoint(&all->router, ctx, all->model, 2, NULL);
    if (!status) status = moe4_moe_create_from_checkpoint(&all->layer, ctx, all->model, 2, &o);
    if (!status) status = moe4_checkpoint_expert(all->model, &expert.gate, 2, 5, MOE4_GATE);
    if (!status) status = moe4_checkpoint_expert(all->model, &expert.up, 2, 5, MOE4_UP);
    if (!status) status = moe4_checkpoint_expert(all->model, &expert.down, 2, 5, MOE4_DOWN);
    if (!status) status = moe4_moe_replace_expert(all->layer, 1, &expert);
    moe4_moe_destroy(all->layer);
    all->layer = NULL;
    o.n_experts = o.top_k = 1;
    if (!status) status = moe4_moe_create(&all->layer, ctx, &fp8, &o);
    if (!status) status = moe4_moe_replace_expert(all->layer, 0, &fp8);
    if (!status) status = moe4_linear_create(&all->wide, ctx, &up, 1, NULL);
    if (!status) status = moe4_checkpoint_weight(all->model, &w, "model.layers.2.self_attn.q_proj");
    if (!status) status = moe4_linear_create(&all->linear, ctx, &w, 1, NULL);
    if (!status) status = moe4_grouped_create(&all->grouped, ctx, &w, 1, NULL);
    if (!status) status = moe4_memory_alloc(ctx, &all->memory, 1 << 20);
    return status;
}

/* The calls that take no object, and those that run one: most of these need no memory at all. */
static moe4_status call_everything(moe4_ctx *ctx, const struct everything *all) {
    static float x[4 * 256], y[4 * 256];
    static uint8_t codes[4 * 128], scales[2 * 128 * 16], other[1024]; /* of gate and of up, a tile of 128x4 scales for each 64 columns */
    moe4_quantize_options q = MOE4_QUANTIZE_OPTIONS_INIT;
    moe4_workspace ws = {all->memory, 0};
    moe4_moe_report report = MOE4_MOE_REPORT_INIT;
    moe4_model_info info = MOE4_MODEL_INFO_INIT;
    moe4_weight w;
    moe4_weight_stats stats = MOE4_WEIGHT_STATS_INIT;
    uint64_t n_problems;
    int32_t ids[4 * 6];
    float weights[4 * 6], globals[4];
    q.per_row = 1;
    q.scale_layout = MOE4_SCALES_128X4;
    q.interleave = 2;
    moe4_status status = moe4_nvfp4_quantize(ctx, codes, scales, globals, NULL, x, MOE4_F32, 4, 256, 0, &q);
    q.global = globals;
    if (!status) status = moe4_nvfp4_dequantize(ctx, y, MOE4_F32, 0, codes, scales, 4, 256, &q);
    if (!status) status = moe4_amax(ctx, globals, x, MOE4_F32, 4, 256, 0);
    if (!status) status = moe4_scales_convert(ctx, other, MOE4_SCALES_WORDS, scales, MOE4_SCALES_LINEAR, 1, 4, 256);
    if (!status) status = moe4_rows_interleave(ctx, other, codes, 1, 4, 128, 1);
    if (!status) status = moe4_transpose(ctx, other, codes, 1, 4, 128, 1);
    if (!status) status = moe4_checkpoint_info(all->model, &info);
    if (!status) status = moe4_checkpoint_expert(all->model, &w, 2, 5, MOE4_GATE);
    if (!status) status = moe4_weight_inspect(ctx, &stats, &w);
    if (!status) status = moe4_weight_values(ctx, y, &w, 3, 2);
    if (!status) status = moe4_router_workspace_bytes(all->router, &ws.bytes, 4);
    if (!status) status = moe4_router_forward(all->router, ids, weights, x, NULL, 4, &ws, NULL);
    if (!status) status = moe4_moe_workspace_bytes(all->layer, &ws.bytes, 4);
    if (!status) status = moe4_moe_forward(all->layer, y, x, NULL, NULL, 4, &ws, NULL);
    if (!status) status = moe4_moe_report_read(all->layer, &report, NULL, &ws, NULL);
    if (!status) status = moe4_moe_rows_workspace_bytes(all->layer, &ws.bytes, 4, 4);
    if (!status) status = moe4_moe_forward_sorted(all->layer, y, x, (int32_t[]){0, 4}, NULL, (int32_t[]){0, 1, 1, 3}, 4, 4, &ws, NULL);
    if (!status) status = moe4_moe_forward_batched(all->layer, y, x, (int32_t[]){3}, NULL, 4, &ws, NULL);
    if (!status) status = moe4_linear_workspace_bytes(all->linear, &ws.bytes, 4);
    if (!status) status = moe4_linear_forward(all->linear, (void *[]){y}, NULL, x, 4, &ws, NULL);
    if (!status) status = moe4_grouped_workspace_bytes(all->grouped, &ws.bytes, 4);
    if (!status) status = moe4_grouped_forward(all->grouped, y, NULL, x, (int32_t[]){0, 4}, 4, &ws, NULL);
    if (!status) status = moe4_memory_copy(ctx, x, y, sizeof x, NULL);
    return status ? status : moe4_checkpoint_verify(all->model, &n_problems, NULL, NULL, NULL);
}

/* Everything a user makes, used once. Stops at the first failure; nothing may be left behind. */
static moe4_status use_everything(moe4_ctx *ctx) {
    struct everything all = {0};
    moe4_status status = make_everything(ctx, &all);
    if (!status) status = call_everything(ctx, &all);
    moe4_memory_free(ctx, all.memory);
    moe4_grouped_destroy(all.grouped);
    moe4_linear_destroy(all.wide);
    moe4_linear_destroy(all.linear);
    moe4_moe_destroy(all.layer);
    moe4_router_destroy(all.router);
    moe4_checkpoint_close(all.model);
    return status;
}

static void test_every_allocation_fails_once(void **state) {
    (void)state;
    struct counting c = {0, 0, -1};
    moe4_ctx_options o = counting_options(&c);
    moe4_ctx *ctx;
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_OK);
    OK(ctx, use_everything(ctx));
    moe4_ctx_destroy(ctx);
    assert_int_equal(c.live, 0);
    long all = c.made;
    long harmless = 0; /* the sentence about an index file that need not be there is lost, and nothing else */
    assert_true(all > 20);
    for (long n = 0; n < all; n++) {
        c.made = 0;
        c.fail_at = n;
        moe4_status status = moe4_ctx_create(&ctx, &o);
        if (status == MOE4_OK) {
            status = use_everything(ctx);
            if (status != MOE4_OK) assert_true(moe4_ctx_error(ctx)[0] != '\0');
            moe4_ctx_destroy(ctx);
        } else {
            assert_null(ctx);
        }
        harmless += status == MOE4_OK;
        if (status != MOE4_ERROR_MEMORY && status != MOE4_OK) fail_msg("allocation %ld of %ld failed: status %d", n, all, (int)status);
        if (c.live) fail_msg("allocation %ld of %ld failed: %ld left", n, all, (long)c.live);
    }
    assert_true(harmless <= 1);
}

/* ---- callers of other versions: every option struct, shorter and longer ---- */

static void test_struct_sizes(void **state) {
    (void)state;
    moe4_ctx *ctx;
    assert_int_equal(moe4_ctx_create(&ctx, NULL), MOE4_OK);
    moe4_weight w = ref_random_weight(MOE4_NVFP4, 16, 32), gate = ref_random_weight(MOE4_BF16, 8, 32);
    moe4_expert e = {ref_random_weight(MOE4_NVFP4, 16, 32), ref_random_weight(MOE4_NVFP4, 16, 32), ref_random_weight(MOE4_NVFP4, 32, 16)};
    struct {
        union {
            moe4_linear_options linear;
            moe4_grouped_options grouped;
            moe4_router_options router;
            moe4_moe_options moe;
            size_t struct_size;
        };
        char newer[512];
    } o;
    for (int kind = 0; kind < 4; kind++) {
        memset(&o, 0, sizeof o);
        if (kind == 0) o.linear = (moe4_linear_options)MOE4_LINEAR_OPTIONS_INIT;
        if (kind == 1) o.grouped = (moe4_grouped_options)MOE4_GROUPED_OPTIONS_INIT;
        if (kind == 2) o.router = (moe4_router_options)MOE4_ROUTER_OPTIONS_INIT;
        if (kind == 3) o.moe = (moe4_moe_options)MOE4_MOE_OPTIONS_INIT;
        if (kind == 2) o.router.kind = MOE4_ROUTER_SIGMOID_BIAS, o.router.hidden = 32, o.router.n_experts = 8, o.router.top_k = 2;
        if (kind == 3) o.moe.n_experts = o.moe.top_k = 1;
        size_t own = o.struct_size;
        /* as this header says; an older caller (its fields end where the needed ones do); a newer caller, its fields unset, then set */
        static const size_t needed[] = {sizeof(size_t), sizeof(size_t), offsetof(moe4_router_options, n_group),
                                        offsetof(moe4_moe_options, act)};
        for (int version = 0; version < 4; version++) {
            o.struct_size = version == 0 ? own : version == 1 ? needed[kind] : own + 64;
            if (version == 3) ((char *)&o)[own + 63] = 1;
            moe4_linear *linear = NULL;
            moe4_grouped *grouped = NULL;
            moe4_router *router = NULL;
            moe4_moe *moe = NULL;
            moe4_status status = kind == 0   ? moe4_linear_create(&linear, ctx, &w, 1, &o.linear)
                                 : kind == 1 ? moe4_grouped_create(&grouped, ctx, &w, 1, &o.grouped)
                                 : kind == 2 ? moe4_router_create(&router, ctx, &gate, NULL, &o.router)
                                             : moe4_moe_create(&moe, ctx, &e, &o.moe);
            if (status != (version == 3 ? MOE4_ERROR_ARGUMENT : MOE4_OK))
                fail_msg("struct %d, version %d: status %d: %s", kind, version, (int)status, moe4_ctx_error(ctx));
            moe4_linear_destroy(linear);
            moe4_grouped_destroy(grouped);
            moe4_router_destroy(router);
            moe4_moe_destroy(moe);
        }
    }
    ref_free_weight(&w);
    ref_free_weight(&gate);
    ref_free_weight(&e.gate);
    ref_free_weight(&e.up);
    ref_free_weight(&e.down);
    moe4_ctx_destroy(ctx);
}

/* The options of calls: an older caller's struct ends earlier, a newer one's has a field that this library lacks. */
static void test_struct_sizes_of_calls(void **state) {
    (void)state;
    static float x[2 * 16], logits[4] = {0, 1, 2, 3}, weights[2];
    uint8_t codes[16], scales[2];
    int32_t ids[2];
    moe4_ctx *ctx;
    moe4_router *router;
    moe4_router_options ro = MOE4_ROUTER_OPTIONS_INIT;
    struct {
        union {
            moe4_quantize_options q;
            moe4_router_tokens t;
            size_t struct_size;
        };
        char newer[128];
    } o;
    assert_int_equal(moe4_ctx_create(&ctx, NULL), MOE4_OK);
    ro.kind = MOE4_ROUTER_SOFTMAX_TOPK;
    ro.n_experts = 4;
    ro.top_k = 2;
    OK(ctx, moe4_router_create(&router, ctx, NULL, NULL, &ro));
    for (int version = 0; version < 5; version++) {
        memset(&o, 0, sizeof o);
        o.q = (moe4_quantize_options)MOE4_QUANTIZE_OPTIONS_INIT;
        size_t own = o.struct_size;
        const size_t sizes[] = {own, offsetof(moe4_quantize_options, scale_layout), own + 64, own + 64, sizeof(size_t) - 1};
        o.struct_size = sizes[version];
        if (version == 1) o.q.interleave = 7; /* would be refused, were it read */
        if (version == 3) ((char *)&o)[own + 63] = 1;
        moe4_status want = version < 3 ? MOE4_OK : MOE4_ERROR_ARGUMENT;
        assert_int_equal(moe4_nvfp4_quantize(ctx, codes, scales, NULL, NULL, x, MOE4_F32, 2, 16, 0, &o.q), want);
        memset(&o, 0, sizeof o);
        o.t = (moe4_router_tokens)MOE4_ROUTER_TOKENS_INIT;
        own = o.struct_size;
        o.struct_size = version == 1 ? sizeof(size_t) : version == 4 ? sizeof(size_t) - 1 : version ? own + 64 : own;
        if (version == 1) o.t.alt_bias = codes; /* likewise */
        if (version == 3) ((char *)&o)[own + 63] = 1;
        assert_int_equal(moe4_router_select(router, ids, weights, logits, &o.t, 1, NULL), want);
    }
    moe4_router_destroy(router);
    moe4_ctx_destroy(ctx);
}

/* Structs that come back are filled up to the caller's struct_size and not a byte further. */
static void test_short_results(void **state) {
    (void)state;
    moe4_ctx *ctx;
    moe4_checkpoint *model;
    moe4_weight w;
    union {
        moe4_model_info info;
        moe4_weight_stats stats;
        uint8_t bytes[sizeof(moe4_model_info)];
    } r;
    assert_int_equal(moe4_ctx_create(&ctx, NULL), MOE4_OK);
    OK(ctx, moe4_checkpoint_open(&model, ctx, MODEL));
    OK(ctx, moe4_checkpoint_expert(model, &w, 1, 0, MOE4_UP));
    for (int kind = 0; kind < 2; kind++) {
        size_t size = kind ? offsetof(moe4_weight_stats, n_scale_pow2) : offsetof(moe4_model_info, router);
        memset(&r, 0xAB, sizeof r);
        memcpy(&r, &size, sizeof size);
        OK(ctx, kind ? moe4_weight_inspect(ctx, &r.stats, &w) : moe4_checkpoint_info(model, &r.info));
        assert_true(kind ? r.stats.n_blocks == 128 * 16 : r.info.n_layers == 6);
        for (size_t i = size; i < sizeof r; i++) assert_int_equal(r.bytes[i], 0xAB);
    }
    moe4_checkpoint_close(model);
    moe4_ctx_destroy(ctx);
}

/* A report's fields beyond the caller's struct_size are not written. */
static void test_short_report(void **state) {
    (void)state;
    moe4_ctx *ctx;
    moe4_checkpoint *model;
    moe4_moe *layer;
    moe4_workspace ws;
    static uint16_t x[256], y[256];
    assert_int_equal(moe4_ctx_create(&ctx, NULL), MOE4_OK);
    OK(ctx, moe4_checkpoint_open(&model, ctx, MODEL));
    OK(ctx, moe4_moe_create_from_checkpoint(&layer, ctx, model, 0, NULL));
    OK(ctx, moe4_moe_workspace_bytes(layer, &ws.bytes, 1));
    ws.data = aligned_alloc(64, ws.bytes);
    OK(ctx, moe4_moe_forward(layer, y, x, NULL, NULL, 1, &ws, NULL));
    moe4_moe_report report;
    memset(&report, 0xAB, sizeof report);
    report.struct_size = offsetof(moe4_moe_report, n_slots);
    OK(ctx, moe4_moe_report_read(layer, &report, NULL, &ws, NULL));
    assert_int_equal(report.n_tokens, 1);
    assert_int_equal(report.n_slots, 0xABABABABABABABABull);
    free(ws.data);
    moe4_moe_destroy(layer);
    moe4_checkpoint_close(model);
    moe4_ctx_destroy(ctx);
}

/* ---- threads ---- */

enum { STORM_T = 3, STORM_N = 16, STORM_K = 64 };
struct storm_weights {
    moe4_weight good, bad;
    float x[STORM_T * STORM_K], want[STORM_T * STORM_N];
};

/* MOE4_SOAK=SECONDS: how long each of these goes on, for a longer run by hand. */
static bool soak(const struct timespec *begin) {
    const char *seconds = getenv("MOE4_SOAK");
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return seconds && now.tv_sec - begin->tv_sec < atoi(seconds);
}

static void *storm(void *arg) {
    const struct storm_weights *w = arg;
    struct timespec begin;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int i = 0; i < 25 || soak(&begin); i++) {
        moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
        o.n_threads = 1 + (size_t)i % 4;
        moe4_ctx *ctx;
        moe4_linear *l;
        assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_OK);
        assert_int_equal(moe4_linear_create(&l, ctx, &w->bad, 1, NULL), MOE4_ERROR_ARGUMENT);
        assert_non_null(strstr(moe4_ctx_error(ctx), "24 columns"));
        OK(ctx, moe4_linear_create(&l, ctx, &w->good, 1, NULL));
        moe4_workspace ws;
        float y[STORM_T * STORM_N];
        void *const to[] = {y};
        OK(ctx, moe4_linear_workspace_bytes(l, &ws.bytes, STORM_T));
        ws.data = aligned_alloc(64, ws.bytes);
        OK(ctx, moe4_linear_forward(l, to, NULL, w->x, STORM_T, &ws, NULL));
        assert_memory_equal(y, w->want, sizeof y);
        free(ws.data);
        moe4_linear_destroy(l);
        moe4_ctx_destroy(ctx);
    }
    return NULL;
}

static void test_contexts_in_a_storm(void **state) {
    (void)state;
    static struct storm_weights w;
    moe4_ctx *ctx;
    moe4_linear *l;
    pthread_t t[8];
    w.good = w.bad = ref_random_weight(MOE4_NVFP4, STORM_N, STORM_K);
    w.bad.cols = 24;
    for (int i = 0; i < STORM_T * STORM_K; i++) w.x[i] = ref_normal();
    assert_int_equal(moe4_ctx_create(&ctx, NULL), MOE4_OK);
    OK(ctx, moe4_linear_create(&l, ctx, &w.good, 1, NULL));
    moe4_workspace ws;
    void *const to[] = {w.want};
    OK(ctx, moe4_linear_workspace_bytes(l, &ws.bytes, STORM_T));
    ws.data = aligned_alloc(64, (ws.bytes + 63) / 64 * 64);
    OK(ctx, moe4_linear_forward(l, to, NULL, w.x, STORM_T, &ws, NULL));
    free(ws.data);
    moe4_linear_destroy(l);
    moe4_ctx_destroy(ctx);
    for (int i = 0; i < 8; i++) assert_int_equal(pthread_create(&t[i], NULL, storm, &w), 0);
    for (int i = 0; i < 8; i++) pthread_join(t[i], NULL);
    ref_free_weight(&w.good);
}

enum { CALLERS = 8, TOKENS = 12, HIDDEN = 256, TOP_K = 6 };

struct caller {
    moe4_ctx *ctx;
    const moe4_router *router;
    const moe4_moe *layer;
    const uint16_t *x;
    const uint16_t *want;
    size_t n_tokens; /* of each call; a token's result does not depend on the others */
};

static void call(const struct caller *c, uint16_t *y, const moe4_workspace *ws) {
    int32_t ids[TOKENS * TOP_K];
    float weights[TOKENS * TOP_K];
    OK(c->ctx, moe4_router_forward(c->router, ids, weights, c->x, NULL, c->n_tokens, ws, NULL));
    OK(c->ctx, moe4_moe_forward(c->layer, y, c->x, ids, weights, c->n_tokens, ws, NULL));
}

static moe4_workspace caller_workspace(const struct caller *c) {
    moe4_workspace ws;
    size_t for_router;
    OK(c->ctx, moe4_router_workspace_bytes(c->router, &for_router, c->n_tokens));
    OK(c->ctx, moe4_moe_workspace_bytes(c->layer, &ws.bytes, c->n_tokens));
    if (for_router > ws.bytes) ws.bytes = for_router;
    ws.data = aligned_alloc(64, (ws.bytes + 63) / 64 * 64);
    return ws;
}

static void *call_often(void *arg) {
    const struct caller *c = arg;
    uint16_t y[TOKENS * HIDDEN];
    moe4_workspace ws = caller_workspace(c);
    struct timespec begin;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int i = 0; i < 20 || soak(&begin); i++) {
        call(c, y, &ws);
        assert_memory_equal(y, c->want, c->n_tokens * HIDDEN * sizeof *y);
    }
    free(ws.data);
    return NULL;
}

static void test_eight_threads_on_one_layer(void **state) {
    (void)state;
    struct caller c = {.n_tokens = TOKENS}, callers[CALLERS];
    moe4_ctx_options co = MOE4_CTX_OPTIONS_INIT;
    moe4_router_options ro = MOE4_ROUTER_OPTIONS_INIT;
    moe4_checkpoint *model;
    moe4_router *router;
    moe4_moe *layer;
    static uint16_t x[TOKENS * HIDDEN], want[TOKENS * HIDDEN];
    co.n_threads = 3;
    ro.x_dtype = MOE4_BF16;
    for (int i = 0; i < TOKENS * HIDDEN; i++) x[i] = moe4_bf16_from_float(ref_normal());
    assert_int_equal(moe4_ctx_create(&c.ctx, &co), MOE4_OK);
    OK(c.ctx, moe4_checkpoint_open(&model, c.ctx, MODEL));
    OK(c.ctx, moe4_router_create_from_checkpoint(&router, c.ctx, model, 4, &ro));
    OK(c.ctx, moe4_moe_create_from_checkpoint(&layer, c.ctx, model, 4, NULL));
    c.router = router, c.layer = layer, c.x = x, c.want = want;
    moe4_workspace ws = caller_workspace(&c);
    call(&c, want, &ws);
    free(ws.data);
    pthread_t t[CALLERS];
    for (int i = 0; i < CALLERS; i++) {
        callers[i] = c;
        callers[i].n_tokens = i % 2 ? TOKENS : 1 + (size_t)i;
        assert_int_equal(pthread_create(&t[i], NULL, call_often, &callers[i]), 0);
    }
    for (int i = 0; i < CALLERS; i++) pthread_join(t[i], NULL);
    moe4_moe_destroy(layer);
    moe4_router_destroy(router);
    moe4_checkpoint_close(model);
    moe4_ctx_destroy(c.ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_allocation_fails_once),
        cmocka_unit_test(test_struct_sizes),
        cmocka_unit_test(test_struct_sizes_of_calls),
        cmocka_unit_test(test_short_results),
        cmocka_unit_test(test_short_report),
        cmocka_unit_test(test_contexts_in_a_storm),
        cmocka_unit_test(test_eight_threads_on_one_layer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
