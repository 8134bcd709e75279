/* Engines that keep their own pipeline: rows that stand with their experts, rows that are NVFP4 already, grouped products, an expert
 * replaced. Held to moe4_moe_forward and moe4_linear_forward, which have references of their own. */
#include "reference.h"

enum { H = 96, I = 48, E = 5, K = 2, T = 23, N_SLOTS = T * K };

static moe4_ctx *ctx;
static moe4_expert experts[E];
static float x[T * H], weights[N_SLOTS];
static int32_t ids[N_SLOTS];

static int set_up(void **state) {
    (void)state;
    for (int e = 0; e < E; e++) {
        experts[e].gate = ref_random_weight(MOE4_NVFP4, I, H);
        experts[e].up = ref_random_weight(MOE4_NVFP4, I, H);
        experts[e].down = ref_random_weight(MOE4_NVFP4, H, I);
    }
    for (int i = 0; i < T * H; i++) x[i] = ref_normal();
    for (int s = 0; s < N_SLOTS; s++) {
        ids[s] = s % K ? (ids[s - 1] + 1 + (int32_t)(ref_random() % (E - 1))) % E : (int32_t)(ref_random() % E);
        weights[s] = 0.1f + (float)(ref_random() % 100) / 100.f;
    }
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    for (int e = 0; e < E; e++) {
        ref_free_weight(&experts[e].gate);
        ref_free_weight(&experts[e].up);
        ref_free_weight(&experts[e].down);
    }
    return 0;
}

static moe4_moe *make_moe(moe4_act act, moe4_weighting weighting, moe4_dtype x_dtype) {
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = E;
    o.top_k = K;
    o.act = act;
    o.weighting = weighting;
    o.x_dtype = x_dtype;
    o.y_dtype = MOE4_F32;
    moe4_moe *moe;
    OK(ctx, moe4_moe_create(&moe, ctx, experts, &o));
    return moe;
}

static moe4_workspace poisoned(size_t bytes) {
    moe4_workspace ws = {aligned_alloc(64, bytes), bytes};
    memset(ws.data, 0xFF, bytes);
    return ws;
}

static void forward(const moe4_moe *moe, float *y, const void *rows) {
    size_t bytes;
    OK(ctx, moe4_moe_workspace_bytes(moe, &bytes, T));
    moe4_workspace ws = poisoned(bytes);
    OK(ctx, moe4_moe_forward(moe, y, rows, ids, weights, T, &ws, NULL));
    free(ws.data);
}

/* The slots sorted by expert, as a dispatcher would: x row by row, and where each came from. */
struct dispatched {
    float x[N_SLOTS * H], weight[N_SLOTS];
    int32_t offsets[E + 1], token[N_SLOTS], slot[N_SLOTS];
};

static void dispatch(struct dispatched *d) {
    int32_t r = 0;
    for (int32_t e = 0; e < E; e++) {
        d->offsets[e] = r;
        for (int32_t s = 0; s < N_SLOTS; s++)
            if (ids[s] == e) {
                memcpy(d->x + r * H, x + s / K * H, H * sizeof *x);
                d->weight[r] = weights[s];
                d->slot[r] = s;
                d->token[r++] = s / K;
            }
    }
    d->offsets[E] = r;
}

/* Reduced, each token's rows come in order of expert, not of slot: fp32 sums differ in the last bits. Unreduced rows, summed here in order
 * of slot, must be the layer's bits. */
static void test_sorted(void **state) {
    (void)state;
    static struct dispatched d;
    static float y[T * H], rows[N_SLOTS * H], sum[T * H], reduced[T * H];
    for (int isa = 0; isa < REF_N_ISAS; isa++) {
        ctx = ref_ctx(2, ref_isas[isa]);
        for (int weighting = 0; weighting <= MOE4_WEIGHT_ON_X; weighting++)
            for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
                moe4_moe *moe = make_moe((moe4_act)act, (moe4_weighting)weighting, MOE4_F32);
                forward(moe, y, x);
                dispatch(&d);
                size_t bytes;
                OK(ctx, moe4_moe_rows_workspace_bytes(moe, &bytes, N_SLOTS, T));
                moe4_workspace ws = poisoned(bytes);
                OK(ctx, moe4_moe_forward_sorted(moe, rows, d.x, d.offsets, d.weight, NULL, N_SLOTS, 0, &ws, NULL));
                memset(sum, 0, sizeof sum);
                for (int s = 0; s < N_SLOTS; s++)
                    for (int r = 0; r < N_SLOTS; r++)
                        for (int i = 0; i < H && d.slot[r] == s; i++) sum[s / K * H + i] += rows[r * H + i];
                assert_memory_equal(sum, y, sizeof y);
                OK(ctx, moe4_moe_forward_sorted(moe, reduced, d.x, d.offsets, d.weight, d.token, N_SLOTS, T, &ws, NULL));
                for (int i = 0; i < T * H; i++) assert_float_equal(reduced[i], y[i], 1e-5 * (1 + fabsf(y[i])));
                free(ws.data);
                moe4_moe_destroy(moe);
            }
        moe4_ctx_destroy(ctx);
    }
}

static void test_sorted_drops_and_leaves(void **state) {
    (void)state;
    static struct dispatched d;
    static float rows[N_SLOTS * H], y[T * H];
    ctx = ref_ctx(2, 0);
    moe4_moe *moe = make_moe(MOE4_ACT_TOKEN, MOE4_WEIGHT_AFTER_DOWN, MOE4_F32);
    dispatch(&d);
    size_t bytes;
    OK(ctx, moe4_moe_rows_workspace_bytes(moe, &bytes, N_SLOTS, T));
    moe4_workspace ws = poisoned(bytes);
    d.offsets[E] -= 3; /* three rows past the end */
    for (int i = 0; i < N_SLOTS * H; i++) rows[i] = 77;
    OK(ctx, moe4_moe_forward_sorted(moe, rows, d.x, d.offsets, NULL, NULL, N_SLOTS, 0, &ws, NULL));
    for (int i = 0; i < N_SLOTS * H; i++) assert_true((rows[i] == 77) == (i >= (N_SLOTS - 3) * H));
    for (int r = 0; r < N_SLOTS; r++)
        if (d.token[r] == 4) d.token[r] = -1;
    OK(ctx, moe4_moe_forward_sorted(moe, y, d.x, d.offsets, NULL, d.token, N_SLOTS, T, &ws, NULL));
    for (int i = 0; i < H; i++) assert_true(y[4 * H + i] == 0);
    moe4_moe_report report = MOE4_MOE_REPORT_INIT;
    OK(ctx, moe4_moe_report_read(moe, &report, NULL, &ws, NULL));
    assert_int_equal(report.n_slots, N_SLOTS - 3);

    static const struct {
        int at;
        int32_t value;
        const char *words;
    } bad[] = {{0, 1, "offsets[0]: 1"}, {2, -1, "offsets[2]: -1"}, {E, N_SLOTS + 1, "there are 46 rows"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        dispatch(&d);
        d.offsets[bad[i].at] = bad[i].value;
        assert_int_equal(moe4_moe_forward_sorted(moe, rows, d.x, d.offsets, NULL, NULL, N_SLOTS, 0, &ws, NULL), MOE4_ERROR_ARGUMENT);
        if (!strstr(moe4_ctx_error(ctx), bad[i].words)) fail_msg("%s", moe4_ctx_error(ctx));
    }
    dispatch(&d);
    d.token[7] = T;
    assert_int_equal(moe4_moe_forward_sorted(moe, rows, d.x, d.offsets, NULL, d.token, N_SLOTS, T, &ws, NULL), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "row_token[7]: 23 of 23"));
    ws.bytes--;
    assert_int_equal(moe4_moe_forward_sorted(moe, rows, d.x, d.offsets, NULL, NULL, N_SLOTS + 64, 0, &ws, NULL), MOE4_ERROR_ARGUMENT);
    free(ws.data);
    moe4_moe_destroy(moe);
    moe4_ctx_destroy(ctx);
}

static void test_batched(void **state) {
    (void)state;
    enum { MAX = 16 };
    static struct dispatched d;
    static float rows[N_SLOTS * H], bx[E * MAX * H], by[E * MAX * H], bw[E * MAX];
    for (int isa = 0; isa < REF_N_ISAS; isa++) {
        ctx = ref_ctx(2, ref_isas[isa]);
        for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
            moe4_moe *moe = make_moe((moe4_act)act, MOE4_WEIGHT_AFTER_DOWN, MOE4_F32);
            dispatch(&d);
            int32_t counts[E];
            for (int i = 0; i < E * MAX * H; i++) bx[i] = NAN, by[i] = 77; /* rows past the counts are not read and not written */
            for (int e = 0; e < E; e++) {
                counts[e] = d.offsets[e + 1] - d.offsets[e];
                assert_true(counts[e] <= MAX);
                memcpy(bx + e * MAX * H, d.x + d.offsets[e] * H, (size_t)counts[e] * H * sizeof *bx);
                memcpy(bw + e * MAX, d.weight + d.offsets[e], (size_t)counts[e] * sizeof *bw);
            }
            size_t bytes;
            OK(ctx, moe4_moe_rows_workspace_bytes(moe, &bytes, E * MAX, 0));
            moe4_workspace ws = poisoned(bytes);
            OK(ctx, moe4_moe_forward_sorted(moe, rows, d.x, d.offsets, d.weight, NULL, N_SLOTS, 0, &ws, NULL));
            OK(ctx, moe4_moe_forward_batched(moe, by, bx, counts, bw, MAX, &ws, NULL));
            for (int e = 0; e < E; e++) {
                assert_memory_equal(by + e * MAX * H, rows + d.offsets[e] * H, (size_t)counts[e] * H * sizeof *by);
                for (int i = counts[e] * H; i < MAX * H; i++) assert_true(by[e * MAX * H + i] == 77);
            }
            counts[1] = MAX + 1;
            assert_int_equal(moe4_moe_forward_batched(moe, by, bx, counts, bw, MAX, &ws, NULL), MOE4_ERROR_ARGUMENT);
            assert_non_null(strstr(moe4_ctx_error(ctx), "counts[1]: 17 of max_rows 16"));
            free(ws.data);
            moe4_moe_destroy(moe);
        }
        moe4_ctx_destroy(ctx);
    }
}

/* ---- rows that are NVFP4 already ---- */

struct quantized {
    uint8_t codes[T * H / 2], linear[T * H / 16], tiles[128 * 8];
    uint32_t words[(H / 16 + 3) / 4 * T];
    float decode[T];
};

/* Per row, as mode token does; the three layouts by the formulas of docs/format.md. */
static void quantize(struct quantized *q) {
    float S[T];
    size_t n = H / 16;
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.recipe = MOE4_RECIPE_ACTIVATION;
    o.per_row = 1;
    OK(ctx, moe4_nvfp4_quantize(ctx, q->codes, q->linear, S, NULL, x, MOE4_F32, T, H, 0, &o));
    memset(q->tiles, 0xFF, sizeof q->tiles);
    memset(q->words, 0, sizeof q->words);
    for (size_t t = 0; t < T; t++) {
        q->decode[t] = 1.f / S[t];
        for (size_t k = 0; k < n; k++) {
            q->words[k / 4 * T + t] |= (uint32_t)q->linear[t * n + k] << 8 * (k % 4);
            q->tiles[k / 4 * 512 + t % 32 * 16 + t / 32 * 4 + k % 4] = q->linear[t * n + k];
        }
    }
}

static void test_nvfp4_rows(void **state) {
    (void)state;
    static struct quantized q;
    static float y[T * H], got[T * H];
    for (int isa = 0; isa < REF_N_ISAS; isa++) {
        ctx = ref_ctx(2, ref_isas[isa]);
        quantize(&q);
        moe4_nvfp4_rows rows = {q.codes, q.linear, MOE4_SCALES_LINEAR, q.decode, 1};
        const void *const scales[] = {q.linear, q.words, q.tiles};
        moe4_moe *plain = make_moe(MOE4_ACT_TOKEN, MOE4_WEIGHT_AFTER_DOWN, MOE4_F32);
        moe4_moe *given = make_moe(MOE4_ACT_TOKEN, MOE4_WEIGHT_AFTER_DOWN, MOE4_NVFP4);
        forward(plain, y, x); /* rounds to the same rows */
        for (int layout = 0; layout < 3; layout++) {
            rows.layout = (moe4_scale_layout)layout;
            rows.scales = scales[layout];
            forward(given, got, &rows);
            assert_memory_equal(got, y, sizeof y);
        }
        rows.layout = MOE4_SCALES_LINEAR;
        rows.scales = q.linear;
        q.linear[3 * (H / 16) + 2] = 0x7F;
        forward(given, got, &rows);
        for (int i = 0; i < T * H; i++) assert_true(i / H == 3 ? isnan(got[i]) : got[i] == y[i]);
        rows.global = NULL;
        size_t bytes;
        OK(ctx, moe4_moe_workspace_bytes(given, &bytes, T));
        moe4_workspace ws = poisoned(bytes);
        assert_int_equal(moe4_moe_forward(given, got, &rows, ids, weights, T, &ws, NULL), MOE4_ERROR_ARGUMENT);
        assert_non_null(strstr(moe4_ctx_error(ctx), "x: NULL global"));
        free(ws.data);
        moe4_moe_destroy(plain);
        moe4_moe_destroy(given);

        /* w4a16 keeps the given values too, and h in bf16: the reference has the same operands */
        moe4_moe *wide = make_moe(MOE4_ACT_W4A16, MOE4_WEIGHT_AFTER_DOWN, MOE4_NVFP4);
        quantize(&q);
        rows.global = q.decode;
        forward(wide, got, &rows);
        double want[T * H] = {0}, values[H];
        float row[H];
        for (int s = 0; s < N_SLOTS; s++) {
            for (int i = 0; i < H; i++) {
                uint8_t code = (uint8_t)(q.codes[(s / K * H + i) / 2] >> (i % 2 ? 4 : 0)) & 15;
                values[i] = (double)moe4_e2m1_to_float(code) * moe4_e4m3_to_float(q.linear[(s / K * H + i) / 16]) * q.decode[s / K];
            }
            double g[I], u[I], h[I], o[H];
            ref_product(g, &experts[ids[s]].gate, values);
            ref_product(u, &experts[ids[s]].up, values);
            for (int i = 0; i < I; i++) row[i] = (float)(g[i] / (1 + exp(-g[i])) * u[i]);
            ref_round(ctx, h, row, I, MOE4_ACT_W4A16, 0, 0);
            ref_product(o, &experts[ids[s]].down, h);
            for (int i = 0; i < H; i++) want[s / K * H + i] += weights[s] * o[i];
        }
        assert_true(ref_relative(got, want, T * H) < 1e-4);
        moe4_moe_destroy(wide);
        moe4_ctx_destroy(ctx);
    }
}

/* The routing weight on x is a factor of the row's global scale: its codes are what they are. */
static void test_nvfp4_rows_weighted(void **state) {
    (void)state;
    static struct quantized q;
    static struct dispatched d;
    static uint8_t codes[N_SLOTS * H / 2], scales[N_SLOTS * H / 16];
    static float global[N_SLOTS], weighted[N_SLOTS], want[N_SLOTS * H], got[N_SLOTS * H];
    for (int isa = 0; isa < REF_N_ISAS; isa++) {
        ctx = ref_ctx(2, ref_isas[isa]);
        quantize(&q);
        dispatch(&d);
        for (int r = 0; r < N_SLOTS; r++) {
            const size_t t = (size_t)d.token[r];
            memcpy(codes + r * H / 2, q.codes + t * H / 2, H / 2);
            memcpy(scales + r * H / 16, q.linear + t * H / 16, H / 16);
            global[r] = q.decode[t];
            weighted[r] = q.decode[t] * d.weight[r];
        }
        moe4_nvfp4_rows rows = {codes, scales, MOE4_SCALES_LINEAR, weighted, 1};
        moe4_moe *moe = make_moe(MOE4_ACT_TOKEN, MOE4_WEIGHT_ON_X, MOE4_NVFP4);
        size_t bytes;
        OK(ctx, moe4_moe_rows_workspace_bytes(moe, &bytes, N_SLOTS, 0));
        moe4_workspace ws = poisoned(bytes);
        OK(ctx, moe4_moe_forward_sorted(moe, want, &rows, d.offsets, NULL, NULL, N_SLOTS, 0, &ws, NULL));
        rows.global = global;
        OK(ctx, moe4_moe_forward_sorted(moe, got, &rows, d.offsets, d.weight, NULL, N_SLOTS, 0, &ws, NULL));
        assert_memory_equal(got, want, sizeof want);
        free(ws.data);
        moe4_moe_destroy(moe);
        moe4_ctx_destroy(ctx);
    }
}

/* ---- grouped ---- */

static void run_linear(float *y, const moe4_weight *w, moe4_act act, const float *rows, size_t n) {
    moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
    o.act = act;
    moe4_linear *l;
    size_t bytes;
    OK(ctx, moe4_linear_create(&l, ctx, w, 1, &o));
    OK(ctx, moe4_linear_workspace_bytes(l, &bytes, n));
    moe4_workspace ws = poisoned(bytes);
    OK(ctx, moe4_linear_forward(l, (void *[]){y}, NULL, rows, n, &ws, NULL));
    free(ws.data);
    moe4_linear_destroy(l);
}

static void run_grouped(void *y, const moe4_weight *w, size_t n_groups, const moe4_grouped_options *o, const void *rows,
                        const int32_t *offsets, size_t n) {
    moe4_grouped *g;
    size_t bytes;
    OK(ctx, moe4_grouped_create(&g, ctx, w, n_groups, o));
    OK(ctx, moe4_grouped_workspace_bytes(g, &bytes, n));
    moe4_workspace ws = poisoned(bytes);
    OK(ctx, moe4_grouped_forward(g, y, NULL, rows, offsets, n, &ws, NULL));
    free(ws.data);
    moe4_grouped_destroy(g);
}

/* Each group's rows are what a linear of its matrix gives, bit for bit. */
static void test_grouped(void **state) {
    (void)state;
    enum { G = 4, N = 41, LD = 50 };
    static const int32_t offsets[G + 1] = {0, 3, 3, 20, 22};
    static float bias[N], y[T * LD], alone[T * N], wide_x[T * G * H], wide_y[T * G * N], column[T * H];
    moe4_weight w[G];
    for (int i = 0; i < N; i++) bias[i] = ref_normal();
    for (int g = 0; g < G; g++) w[g] = ref_random_weight(MOE4_NVFP4, N, H);
    w[2].bias = bias;
    for (int i = 0; i < T * G * H; i++) wide_x[i] = ref_normal();
    for (int isa = 0; isa < REF_N_ISAS; isa++) {
        ctx = ref_ctx(2, ref_isas[isa]);
        for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
            if (act == MOE4_ACT_TENSOR) continue; /* its scale is over all rows of the call */
            moe4_grouped_options o = MOE4_GROUPED_OPTIONS_INIT;
            o.act = (moe4_act)act;
            o.x_dtype = o.y_dtype = MOE4_F32;
            o.y_ld = LD;
            for (int i = 0; i < T * LD; i++) y[i] = 77;
            run_grouped(y, w, G, &o, x, offsets, T);
            for (int g = 0; g < G; g++) {
                size_t n = (size_t)(offsets[g + 1] - offsets[g]);
                run_linear(alone, &w[g], o.act, x + offsets[g] * H, n);
                for (size_t r = 0; r < n; r++) assert_memory_equal(y + ((size_t)offsets[g] + r) * LD, alone + r * N, N * sizeof *y);
            }
            for (int i = 0; i < T * LD; i++) assert_true(i / LD < offsets[G] && i % LD < N ? y[i] != 77 : y[i] == 77);

            o.y_ld = 0;
            o.block_diagonal = 1;
            run_grouped(wide_y, w, G, &o, wide_x, NULL, T);
            for (int g = 0; g < G; g++) {
                for (int t = 0; t < T; t++) memcpy(column + t * H, wide_x + (t * G + g) * H, H * sizeof *column);
                run_linear(alone, &w[g], o.act, column, T);
                for (int t = 0; t < T; t++) assert_memory_equal(wide_y + (t * G + g) * N, alone + t * N, N * sizeof *alone);
            }
        }
        /* rows quantized before: the bits of mode token */
        static struct quantized q;
        quantize(&q);
        moe4_grouped_options o = MOE4_GROUPED_OPTIONS_INIT;
        o.y_dtype = MOE4_F32;
        o.x_dtype = MOE4_F32;
        run_grouped(wide_y, w, G, &o, x, offsets, T);
        o.x_dtype = MOE4_NVFP4;
        run_grouped(y, w, G, &o, &(moe4_nvfp4_rows){q.codes, q.tiles, MOE4_SCALES_128X4, q.decode, 1}, offsets, T);
        assert_memory_equal(y, wide_y, (size_t)offsets[G] * N * sizeof *y);
        moe4_ctx_destroy(ctx);
    }
    for (int g = 0; g < G; g++) ref_free_weight(&w[g]);
}

static void test_grouped_errors(void **state) {
    (void)state;
    ctx = ref_ctx(2, 0);
    moe4_weight w[2] = {ref_random_weight(MOE4_NVFP4, 16, 32), ref_random_weight(MOE4_NVFP4, 16, 48)};
    moe4_grouped *g;
    assert_int_equal(moe4_grouped_create(&g, ctx, w, 2, NULL), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "weight 1: shape 16 x 48, weight 0 has 16 x 32"));
    assert_int_equal(moe4_grouped_create(&g, ctx, w, 0, NULL), MOE4_ERROR_ARGUMENT);
    moe4_grouped_options o = MOE4_GROUPED_OPTIONS_INIT;
    o.x_ld = 31;
    assert_int_equal(moe4_grouped_create(&g, ctx, w, 1, &o), MOE4_ERROR_ARGUMENT);
    o.x_ld = 0;
    o.block_diagonal = 1;
    OK(ctx, moe4_grouped_create(&g, ctx, w, 1, &o));
    float buffer[64] = {0};
    moe4_workspace ws = {aligned_alloc(64, 1 << 20), 1 << 20};
    static const int32_t offsets[] = {0, 1};
    assert_int_equal(moe4_grouped_forward(g, buffer, NULL, buffer, offsets, 1, &ws, NULL), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "block-diagonal"));
    moe4_grouped_destroy(g);
    o.x_dtype = MOE4_NVFP4;
    OK(ctx, moe4_grouped_create(&g, ctx, w, 1, &o));
    static const uint8_t bytes[512];
    moe4_nvfp4_rows rows = {bytes, bytes, MOE4_SCALES_128X4, (const float[]){1}, 0};
    assert_int_equal(moe4_grouped_forward(g, buffer, NULL, &rows, NULL, 1, &ws, NULL), MOE4_ERROR_UNSUPPORTED);
    assert_non_null(strstr(moe4_ctx_error(ctx), "need linear scales"));
    rows.layout = MOE4_SCALES_LINEAR;
    OK(ctx, moe4_grouped_forward(g, buffer, NULL, &rows, NULL, 1, &ws, NULL));
    moe4_grouped_destroy(g);
    OK(ctx, moe4_grouped_create(&g, ctx, w, 1, NULL));
    assert_int_equal(moe4_grouped_forward(g, buffer, NULL, buffer, NULL, 1, &ws, NULL), MOE4_ERROR_ARGUMENT);
    assert_int_equal(moe4_grouped_forward(g, buffer, NULL, buffer, offsets, 0, &ws, NULL), MOE4_ERROR_ARGUMENT); /* 1 of 0 rows */
    ws.bytes = 64;
    assert_int_equal(moe4_grouped_forward(g, buffer, NULL, buffer, offsets, 1, &ws, NULL), MOE4_ERROR_ARGUMENT);
    moe4_grouped_destroy(g);
    free(ws.data);
    for (int i = 0; i < 2; i++) ref_free_weight(&w[i]);
    moe4_ctx_destroy(ctx);
}

/* ---- an expert replaced ---- */

static void test_replace_expert(void **state) {
    (void)state;
    static float y[T * H], want[T * H], before[T * H];
    for (int isa = 0; isa < REF_N_ISAS; isa++) {
        ctx = ref_ctx(2, ref_isas[isa]);
        moe4_moe *moe = make_moe(MOE4_ACT_TOKEN, MOE4_WEIGHT_AFTER_DOWN, MOE4_F32);
        moe4_expert fresh = {ref_random_weight(MOE4_NVFP4, I, H), ref_random_weight(MOE4_NVFP4, I, H), ref_random_weight(MOE4_NVFP4, H, I)};
        moe4_expert saved = experts[3], wrong = fresh;
        forward(moe, before, x);
        wrong.down.cols = 64;
        assert_int_equal(moe4_moe_replace_expert(moe, 3, &wrong), MOE4_ERROR_ARGUMENT);
        assert_non_null(strstr(moe4_ctx_error(ctx), "expert 3 down: shape 96 x 64, need 96 x 48"));
        assert_int_equal(moe4_moe_replace_expert(moe, E, &fresh), MOE4_ERROR_ARGUMENT);
        forward(moe, y, x);
        assert_memory_equal(y, before, sizeof y);

        OK(ctx, moe4_moe_replace_expert(moe, 3, &fresh));
        forward(moe, y, x);
        experts[3] = fresh;
        moe4_moe *other = make_moe(MOE4_ACT_TOKEN, MOE4_WEIGHT_AFTER_DOWN, MOE4_F32);
        forward(other, want, x);
        experts[3] = saved;
        assert_memory_equal(y, want, sizeof y);
        assert_memory_not_equal(y, before, sizeof y);
        moe4_moe_destroy(other);
        moe4_moe_destroy(moe);

        moe = make_moe(MOE4_ACT_STATIC, MOE4_WEIGHT_AFTER_DOWN, MOE4_F32);
        forward(moe, before, x);
        moe4_weight *parts[] = {&fresh.gate, &fresh.up, &fresh.down};
        for (int p = 0; p < 3; p++) { /* what static needs of every expert it needs of a new one */
            const float scale = parts[p]->input_scale;
            parts[p]->input_scale = 0;
            assert_int_equal(moe4_moe_replace_expert(moe, 3, &fresh), MOE4_ERROR_ARGUMENT);
            assert_non_null(strstr(moe4_ctx_error(ctx), "mode static needs an input_scale"));
            parts[p]->input_scale = scale;
        }
        forward(moe, y, x);
        assert_memory_equal(y, before, sizeof y);
        OK(ctx, moe4_moe_replace_expert(moe, 3, &fresh));
        moe4_moe_destroy(moe);
        ref_free_weight(&fresh.gate);
        ref_free_weight(&fresh.up);
        ref_free_weight(&fresh.down);
        moe4_ctx_destroy(ctx);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sorted),
        cmocka_unit_test(test_sorted_drops_and_leaves),
        cmocka_unit_test(test_batched),
        cmocka_unit_test(test_nvfp4_rows),
        cmocka_unit_test(test_grouped),
        cmocka_unit_test(test_grouped_errors),
        cmocka_unit_test(test_nvfp4_rows_weighted),
        cmocka_unit_test(test_replace_expert),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
