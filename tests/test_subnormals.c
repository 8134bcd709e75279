/* Subnormal numbers: block scales below 2^-6 count as what they are in every product, and a caller that flushes subnormals to zero changes
 * no bit of any call that computes. */
#include "fpu.h"
#include "reference.h"

static moe4_workspace poisoned(size_t bytes) {
    moe4_workspace ws = {aligned_alloc(64, (bytes + 63) / 64 * 64), bytes};
    memset(ws.data, 0xFF, bytes);
    return ws;
}

static void low_scales(const uint8_t *scales, size_t n) {
    for (size_t i = 0; i < n; i++) ((uint8_t *)scales)[i] = (uint8_t)(ref_random() % 8);
}

/* ---- values ---- */

/* All block scales below 8 * 2^-9, on both sides: the sums are integers below 2^24 times 2^-20, so every ISA must give them exactly. */
static void test_scales_count(void **state) {
    (void)state;
    enum { MOST = 47, N = 277, K = 528 };
    static const size_t n_rows[] = {1, 2, 3, 6, 7, 13, 22, MOST};
    static uint8_t codes[MOST * K / 2], scales[MOST * K / 16];
    static float y[MOST * N];
    const float one = 1;
    moe4_weight w = ref_random_weight(MOE4_NVFP4, N, K);
    low_scales(w.scale, N * K / 16);
    low_scales(scales, sizeof scales);
    w.global = 1;
    for (size_t i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)ref_random();
    const moe4_nvfp4_rows rows = {codes, scales, MOE4_SCALES_LINEAR, &one, 0};
    for (int isa = 0; isa < REF_N_ISAS; isa++)
        for (size_t i = 0; i < 2 * sizeof n_rows / sizeof *n_rows; i++) {
            const size_t T = n_rows[i / 2];
            moe4_ctx *ctx = ref_ctx(2, ref_isas[isa]);
            moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
            o.act = i % 2 ? MOE4_ACT_W4A16 : MOE4_ACT_TOKEN;
            o.x_dtype = MOE4_NVFP4;
            moe4_linear *l;
            size_t bytes;
            OK(ctx, moe4_linear_create(&l, ctx, &w, 1, &o));
            OK(ctx, moe4_linear_workspace_bytes(l, &bytes, T));
            moe4_workspace ws = poisoned(bytes);
            OK(ctx, moe4_linear_forward(l, (void *[]){y}, NULL, &rows, T, &ws, NULL));
            for (size_t t = 0; t < T; t++) {
                double x[K], want[N];
                for (size_t k = 0; k < K; k++)
                    x[k] = (double)moe4_e2m1_to_float(codes[(t * K + k) / 2] >> 4 * (k % 2) & 15) *
                           moe4_e4m3_to_float(scales[(t * K + k) / 16]);
                ref_product(want, &w, x);
                for (size_t n = 0; n < N; n++)
                    if (y[t * N + n] != want[n])
                        fail_msg("%s %s, %zu rows: [%zu,%zu] is %g, not %g", moe4_ctx_isa(ctx), moe4_act_name(o.act), T, t, n,
                                 (double)y[t * N + n], want[n]);
            }
            free(ws.data);
            moe4_linear_destroy(l);
            moe4_ctx_destroy(ctx);
        }
    ref_free_weight(&w);
}

/* ---- a caller that flushes ---- */

enum { H = 112, I = 80, E = 4, TOP = 2, T = 33, N_SLOTS = T * TOP, MAX_ROWS = N_SLOTS, N_RECIPES = 4 };

/* What the calls below leave. */
struct results {
    float layer[T * H], sorted[N_SLOTS * H], reduced[T * H], batched[E * MAX_ROWS * H], given[T * H];
    float linear[T * I], grouped[N_SLOTS * I], dequantized[T * H];
    uint16_t bf16[T * H], f16[T * H];
    uint8_t codes[N_RECIPES][T * H / 2], scales[N_RECIPES][T * H / 16];
};

static struct {
    moe4_expert expert[E];
    float x[T * H], sorted_x[N_SLOTS * H], batched_x[E * MAX_ROWS * H], weights[N_SLOTS];
    int32_t ids[N_SLOTS], offsets[E + 1], counts[E], token[N_SLOTS];
} in;

static moe4_weight subnormal_weight(size_t rows, size_t cols) {
    moe4_weight w = ref_random_weight(MOE4_NVFP4, rows, cols);
    for (size_t i = 0; i < rows * cols / 16; i += 2) low_scales(w.scale + i, 1);
    return w;
}

static void make_input(void) {
    for (int e = 0; e < E; e++)
        in.expert[e] = (moe4_expert){.gate = subnormal_weight(I, H), .up = subnormal_weight(I, H), .down = subnormal_weight(H, I)};
    in.expert[1].down.global = 0x1p-120f; /* results that are subnormal themselves */
    for (int i = 0; i < T * H; i++) in.x[i] = ref_normal() * (i % 5 ? 1 : 0x1p-130f);
    for (int i = 0; i < H; i++) in.x[3 * H + i] = ref_normal() * 0x1p-127f; /* a whole row of them */
    for (int s = 0; s < N_SLOTS; s++) {
        in.ids[s] = (s / TOP + s % TOP * (1 + s / TOP % (E - 1))) % E;
        in.weights[s] = s % 7 ? 0.5f : 0x1p-128f;
    }
    for (int e = 0, r = 0; e < E; e++) {
        in.offsets[e] = r;
        for (int s = 0; s < N_SLOTS; s++)
            if (in.ids[s] == e) {
                memcpy(in.sorted_x + r * H, in.x + s / TOP * H, H * sizeof *in.x);
                in.token[r++] = s / TOP;
            }
        in.offsets[e + 1] = r;
        in.counts[e] = r - in.offsets[e];
        memcpy(in.batched_x + e * MAX_ROWS * H, in.sorted_x + in.offsets[e] * H, (size_t)in.counts[e] * H * sizeof *in.x);
    }
}

static moe4_moe *make_moe(moe4_ctx *ctx, moe4_act act, moe4_dtype x_dtype) {
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = E;
    o.top_k = TOP;
    o.act = act;
    o.x_dtype = x_dtype;
    o.y_dtype = MOE4_F32;
    moe4_moe *moe;
    OK(ctx, moe4_moe_create(&moe, ctx, in.expert, &o));
    return moe;
}

static void run_layers(struct results *r, moe4_ctx *ctx, moe4_act act) {
    moe4_moe *moe = make_moe(ctx, act, MOE4_F32);
    size_t bytes, rows_bytes;
    OK(ctx, moe4_moe_workspace_bytes(moe, &bytes, T));
    OK(ctx, moe4_moe_rows_workspace_bytes(moe, &rows_bytes, E * MAX_ROWS, T));
    moe4_workspace ws = poisoned(bytes > rows_bytes ? bytes : rows_bytes);
    OK(ctx, moe4_moe_forward(moe, r->layer, in.x, in.ids, in.weights, T, &ws, NULL));
    OK(ctx, moe4_moe_forward_sorted(moe, r->sorted, in.sorted_x, in.offsets, in.weights, NULL, N_SLOTS, 0, &ws, NULL));
    OK(ctx, moe4_moe_forward_sorted(moe, r->reduced, in.sorted_x, in.offsets, in.weights, in.token, N_SLOTS, T, &ws, NULL));
    OK(ctx, moe4_moe_forward_batched(moe, r->batched, in.batched_x, in.counts, NULL, MAX_ROWS, &ws, NULL));
    free(ws.data);
    moe4_moe_destroy(moe);
}

static void run_matrices(struct results *r, moe4_ctx *ctx, moe4_act act) {
    moe4_linear_options lo = MOE4_LINEAR_OPTIONS_INIT;
    moe4_grouped_options go = MOE4_GROUPED_OPTIONS_INIT;
    moe4_weight ups[E];
    moe4_linear *l;
    moe4_grouped *g;
    size_t bytes, grouped_bytes;
    lo.act = go.act = act;
    for (int e = 0; e < E; e++) ups[e] = in.expert[e].up;
    OK(ctx, moe4_linear_create(&l, ctx, ups, 1, &lo));
    OK(ctx, moe4_grouped_create(&g, ctx, ups, E, &go));
    OK(ctx, moe4_linear_workspace_bytes(l, &bytes, T));
    OK(ctx, moe4_grouped_workspace_bytes(g, &grouped_bytes, N_SLOTS));
    moe4_workspace ws = poisoned(bytes > grouped_bytes ? bytes : grouped_bytes);
    OK(ctx, moe4_linear_forward(l, (void *[]){r->linear}, NULL, in.x, T, &ws, NULL));
    OK(ctx, moe4_grouped_forward(g, r->grouped, NULL, in.sorted_x, in.offsets, N_SLOTS, &ws, NULL));
    free(ws.data);
    moe4_linear_destroy(l);
    moe4_grouped_destroy(g);
}

static void run_codec(struct results *r, moe4_ctx *ctx) {
    for (int recipe = 0; recipe < N_RECIPES; recipe++) {
        moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
        float global;
        o.recipe = (moe4_recipe)recipe;
        OK(ctx, moe4_nvfp4_quantize(ctx, r->codes[recipe], r->scales[recipe], &global, NULL, in.x, MOE4_F32, T, H, 0, &o));
        if (o.recipe != MOE4_RECIPE_MODELOPT) continue;
        global = 0x1p-134f; /* written out: this thread may flush products */
        o.global = &global;
        OK(ctx, moe4_nvfp4_dequantize(ctx, r->dequantized, MOE4_F32, 0, r->codes[recipe], r->scales[recipe], T, H, &o));
        OK(ctx, moe4_nvfp4_dequantize(ctx, r->bf16, MOE4_BF16, 0, r->codes[recipe], r->scales[recipe], T, H, &o));
        global = 0x1p-26f; /* subnormal in fp16 */
        OK(ctx, moe4_nvfp4_dequantize(ctx, r->f16, MOE4_F16, 0, r->codes[recipe], r->scales[recipe], T, H, &o));
    }
}

/* Rows that are NVFP4 already, quantized with a scale that leaves their own block scales subnormal. */
static void run_given(struct results *r, moe4_ctx *ctx, moe4_act act) {
    static uint8_t codes[T * H / 2], scales[T * H / 16];
    const float decode = 0x1p-3f;
    for (size_t i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)(i * 37);
    for (size_t i = 0; i < sizeof scales; i++) scales[i] = (uint8_t)(i % 11);
    const moe4_nvfp4_rows rows = {codes, scales, MOE4_SCALES_LINEAR, &decode, 0};
    moe4_moe *moe = make_moe(ctx, act, MOE4_NVFP4);
    size_t bytes;
    OK(ctx, moe4_moe_workspace_bytes(moe, &bytes, T));
    moe4_workspace ws = poisoned(bytes);
    OK(ctx, moe4_moe_forward(moe, r->given, &rows, in.ids, in.weights, T, &ws, NULL));
    free(ws.data);
    moe4_moe_destroy(moe);
}

static void run_all(struct results *r, uint32_t isa_mask, size_t n_threads, moe4_act act, bool flush) {
    const uint64_t before = get_fpu();
    memset(r, 0, sizeof *r);
    if (flush) set_fpu(before | FPU_FLUSH);
    moe4_ctx *ctx = ref_ctx(n_threads, isa_mask);
    run_layers(r, ctx, act);
    run_matrices(r, ctx, act);
    run_given(r, ctx, act);
    run_codec(r, ctx);
    moe4_ctx_destroy(ctx);
    if (flush) assert_int_equal(get_fpu() & FPU_FLUSH, FPU_FLUSH);
    set_fpu(before);
}

static void test_callers_flush(void **state) {
    (void)state;
    static struct results plain, flushed;
    make_input();
    for (int isa = 0; isa < REF_N_ISAS; isa++)
        for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++)
            for (size_t n_threads = 1; n_threads <= 2; n_threads++) {
                run_all(&plain, ref_isas[isa], n_threads, (moe4_act)act, false);
                run_all(&flushed, ref_isas[isa], n_threads, (moe4_act)act, true);
#define SAME(part) assert_memory_equal(plain.part, flushed.part, sizeof plain.part)
                SAME(layer);
                SAME(sorted);
                SAME(reduced);
                SAME(batched);
                SAME(given);
                SAME(linear);
                SAME(grouped);
                SAME(dequantized);
                SAME(bf16);
                SAME(f16);
                SAME(codes);
                SAME(scales);
#undef SAME
            }
    bool subnormal = false; /* or the test shows nothing */
    for (int i = 0; i < T * H; i++) subnormal |= fpclassify(plain.dequantized[i]) == FP_SUBNORMAL;
    assert_true(subnormal);
    for (int e = 0; e < E; e++) {
        ref_free_weight(&in.expert[e].gate);
        ref_free_weight(&in.expert[e].up);
        ref_free_weight(&in.expert[e].down);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_scales_count), cmocka_unit_test(test_callers_flush)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
