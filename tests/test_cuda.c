/* The device through the public API: the bundled model against its goldens, random layers, linears and routers against the CPU, batches,
 * graphs, streams, reports, errors. Skipped (77) where there is no GPU. An argument names the source folder, for a build made elsewhere. */
#include "device.h"

#include <cuda_runtime_api.h>

static const char *source = MOE4_SOURCE_DIR;

static const moe4_act modes[] = {MOE4_ACT_W4A16, MOE4_ACT_STATIC, MOE4_ACT_TENSOR, MOE4_ACT_TOKEN};
enum { N_MODES = 4 };

/* ---- device memory ---- */

static void *device_copy(const void *host, size_t bytes) {
    void *p;
    OK(gpu, moe4_memory_alloc(gpu, &p, bytes));
    if (host) OK(gpu, moe4_memory_copy(gpu, p, host, bytes, NULL));
    return p;
}

/* A workspace full of NaNs. */
static moe4_workspace device_workspace(size_t bytes) {
    char *poison = malloc(bytes + 1);
    memset(poison, 0xFF, bytes);
    moe4_workspace ws = {device_copy(bytes ? poison : NULL, bytes), bytes};
    free(poison);
    return ws;
}

struct layer_input {
    const void *x, *ids;
    const float *weights;
    size_t T, hidden, k, x_bytes, id_bytes;
};

/* y [T,hidden] F32 on the host, from a layer of either context; report may be NULL. */
static void run_layer(moe4_ctx *ctx, const moe4_moe *moe, float *y, const struct layer_input *in, moe4_moe_report *report,
                      uint64_t *counts) {
    bool device = ctx == gpu;
    size_t y_bytes = in->T * in->hidden * sizeof *y, bytes;
    OK(ctx, moe4_moe_workspace_bytes(moe, &bytes, in->T));
    moe4_workspace ws = {device ? NULL : aligned_alloc(64, bytes), bytes};
    if (device) ws = device_workspace(bytes);
    const void *x = in->x, *ids = in->ids;
    const float *weights = in->weights;
    float *out = y;
    memset(y, 0xFF, y_bytes);
    if (device) {
        x = device_copy(x, in->x_bytes);
        ids = ids ? device_copy(ids, in->T * in->k * in->id_bytes) : NULL;
        weights = weights ? device_copy(weights, in->T * in->k * sizeof *weights) : NULL;
        out = device_copy(y, y_bytes);
    }
    OK(ctx, moe4_moe_forward(moe, out, x, ids, weights, in->T, &ws, NULL));
    if (device) OK(ctx, moe4_memory_copy(ctx, y, out, y_bytes, NULL));
    if (report) OK(ctx, moe4_moe_report_read(moe, report, counts, &ws, NULL));
    if (device) {
        moe4_memory_free(ctx, (void *)x);
        moe4_memory_free(ctx, (void *)ids);
        moe4_memory_free(ctx, (void *)weights);
        moe4_memory_free(ctx, out);
        moe4_memory_free(ctx, ws.data);
    } else {
        free(ws.data);
    }
}

static double relative(const float *a, const float *b, size_t n) {
    double num = 0, den = 0;
    for (size_t i = 0; i < n; i++) {
        num += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        den += (double)b[i] * b[i];
    }
    return num == 0 ? 0 : sqrt(num / den);
}

/* ---- the bundled model ---- */

enum { T = 256, H = 256, K = 6, T_SHARED = 64 };

static const void *golden_data(const moe4_checkpoint *golden, size_t layer, const char *what) {
    char name[64];
    moe4_tensor t;
    snprintf(name, sizeof name, "tale.layer%zu.%s", layer, what);
    OK(cpu, moe4_checkpoint_find(golden, &t, name));
    return t.data;
}

static void test_goldens(void **state) {
    (void)state;
    static float y[T * H];
    char path[512], what[32];
    moe4_checkpoint *model, *golden;
    snprintf(path, sizeof path, "%s/models/novels-18m-nvfp4", source);
    OK(gpu, moe4_checkpoint_open(&model, gpu, path));
    snprintf(path, sizeof path, "%s/models/novels-18m-golden.safetensors", source);
    OK(gpu, moe4_checkpoint_open(&golden, gpu, path));
    for (size_t layer = 1; layer <= 3; layer++)
        for (int m = 0; m < N_MODES; m++) {
            moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
            o.act = modes[m];
            o.y_dtype = MOE4_F32;
            moe4_moe *moe;
            OK(gpu, moe4_moe_create_from_checkpoint(&moe, gpu, model, layer, &o));
            float *w = malloc(T * K * sizeof *w);
            memcpy(w, golden_data(golden, layer, "topk_weight"), T * K * sizeof *w);
            struct layer_input in = {golden_data(golden, layer, "x"), golden_data(golden, layer, "topk_idx"), w, T, H, K, T * H * 2, 4};
            moe4_moe_report report = MOE4_MOE_REPORT_INIT;
            run_layer(gpu, moe, y, &in, &report, NULL);
            snprintf(what, sizeof what, "y_%s", moe4_act_name(o.act));
            float *want = malloc(sizeof y);
            memcpy(want, golden_data(golden, layer, what), sizeof y);
            double error = relative(y, want, T * H);
            print_message("layer %zu, %-6s: relative L2 %.2e\n", layer, moe4_act_name(o.act), error);
            assert_true(error <= (o.act == MOE4_ACT_W4A16 ? 1e-4 : 5e-4));
            if (o.act == MOE4_ACT_STATIC)
                assert_int_equal(report.n_saturated_blocks, *(const int32_t *)golden_data(golden, layer, "saturated_static"));
            for (int i = 0; i < T * K; i++) w[i] *= w[i]; /* teeth: the weight applied twice must show */
            run_layer(gpu, moe, y, &in, NULL, NULL);
            assert_true(relative(y, want, T * H) > 5e-3);
            free(want);
            free(w);
            moe4_moe_destroy(moe);
        }
    moe4_checkpoint_close(golden);
    moe4_checkpoint_close(model);
}

/* The model's own routers, with the shared expert, device against CPU. */
static void test_model_with_router(void **state) {
    (void)state;
    static float y[2][T * H];
    static int32_t ids[2][T * K];
    static float weights[2][T * K];
    char path[512];
    snprintf(path, sizeof path, "%s/models/novels-18m-golden.safetensors", source);
    moe4_checkpoint *golden;
    OK(cpu, moe4_checkpoint_open(&golden, cpu, path));
    snprintf(path, sizeof path, "%s/models/novels-18m-nvfp4", source);
    for (size_t layer = 1; layer <= 3; layer++)
        for (int m = 0; m < N_MODES; m++) {
            const void *x = golden_data(golden, layer, "x");
            for (int d = 0; d < 2; d++) {
                moe4_ctx *ctx = d ? gpu : cpu;
                moe4_checkpoint *model;
                moe4_router *router;
                moe4_moe *moe;
                OK(ctx, moe4_checkpoint_open(&model, ctx, path));
                moe4_router_options ro = MOE4_ROUTER_OPTIONS_INIT;
                ro.x_dtype = MOE4_BF16;
                OK(ctx, moe4_router_create_from_checkpoint(&router, ctx, model, layer, &ro));
                moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
                o.act = modes[m];
                o.y_dtype = MOE4_F32;
                o.with_shared = 1;
                OK(ctx, moe4_moe_create_from_checkpoint(&moe, ctx, model, layer, &o));
                size_t bytes;
                OK(ctx, moe4_router_workspace_bytes(router, &bytes, T));
                if (d) {
                    moe4_workspace ws = device_workspace(bytes);
                    void *dx = device_copy(x, T * H * 2), *di = device_copy(NULL, sizeof *ids), *dw = device_copy(NULL, sizeof *weights);
                    OK(ctx, moe4_router_forward(router, di, dw, dx, NULL, T, &ws, NULL));
                    OK(ctx, moe4_memory_copy(ctx, ids[1], di, sizeof *ids, NULL));
                    OK(ctx, moe4_memory_copy(ctx, weights[1], dw, sizeof *weights, NULL));
                    moe4_memory_free(ctx, dx);
                    moe4_memory_free(ctx, di);
                    moe4_memory_free(ctx, dw);
                    moe4_memory_free(ctx, ws.data);
                } else {
                    moe4_workspace ws = {aligned_alloc(64, bytes), bytes};
                    OK(ctx, moe4_router_forward(router, ids[0], weights[0], x, NULL, T, &ws, NULL));
                    free(ws.data);
                }
                struct layer_input in = {x, ids[d], weights[d], T, H, K, T * H * 2, 4};
                run_layer(ctx, moe, y[d], &in, NULL, NULL);
                moe4_moe_destroy(moe);
                moe4_router_destroy(router);
                moe4_checkpoint_close(model);
            }
            assert_memory_equal(ids[0], ids[1], sizeof *ids);
            for (int i = 0; i < T * K; i++) assert_true(fabsf(weights[0][i] - weights[1][i]) <= 1e-6f);
            double error = relative(y[1], y[0], T * H);
            print_message("layer %zu, %-6s, own router, shared expert: %.2e from the CPU\n", layer, moe4_act_name(modes[m]), error);
            assert_true(error <= (modes[m] == MOE4_ACT_W4A16 ? 1e-4 : 5e-4));
        }
    moe4_checkpoint_close(golden);
}

/* ---- random layers against the CPU ---- */

struct random_layer {
    size_t E, hidden, intermediate, k;
    moe4_expert *expert;
};

static struct random_layer make_layer(size_t E, size_t hidden, size_t intermediate, size_t k) {
    struct random_layer l = {E, hidden, intermediate, k, calloc(E, sizeof *l.expert)};
    for (size_t e = 0; e < E; e++) {
        l.expert[e].gate = ref_random_weight(MOE4_NVFP4, intermediate, hidden);
        l.expert[e].up = ref_random_weight(MOE4_NVFP4, intermediate, hidden);
        l.expert[e].down = ref_random_weight(MOE4_NVFP4, hidden, intermediate);
    }
    return l;
}

static void free_layer(struct random_layer *l) {
    for (size_t e = 0; e < l->E; e++) {
        moe4_weight *w[] = {&l->expert[e].gate, &l->expert[e].up, &l->expert[e].down};
        for (int i = 0; i < 3; i++) {
            free((void *)w[i]->data);
            free((void *)w[i]->scale);
        }
    }
    free(l->expert);
}

static moe4_moe *create(moe4_ctx *ctx, const struct random_layer *l, moe4_act act, size_t first, size_t n_experts,
                        const moe4_expert *shared) {
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = n_experts;
    o.first_expert = first;
    o.n_local = l->E;
    o.top_k = l->k;
    o.act = act;
    o.swiglu_limit = act == MOE4_ACT_TOKEN ? 4.f : 0.f;
    if (act == MOE4_ACT_STATIC) { /* gpt-oss */
        o.swiglu_alpha = 1.702f;
        o.swiglu_beta = 1;
    }
    if (act == MOE4_ACT_TENSOR) o.activation = MOE4_GELU_TANH;
    o.x_dtype = MOE4_F32;
    o.y_dtype = MOE4_F32;
    o.shared = shared;
    moe4_moe *moe;
    OK(ctx, moe4_moe_create(&moe, ctx, l->expert, &o));
    return moe;
}

static void random_input(struct layer_input *in, const struct random_layer *l, size_t n_tokens, size_t n_experts, bool hot) {
    float *x = malloc(n_tokens * l->hidden * sizeof *x + 1), *w = malloc(n_tokens * l->k * sizeof *w + 1);
    int32_t *ids = malloc(n_tokens * l->k * sizeof *ids + 1);
    for (size_t i = 0; i < n_tokens * l->hidden; i++) x[i] = ref_normal();
    for (size_t i = 0; i < n_tokens * l->k; i++) {
        w[i] = 0.1f + (float)(ref_random() % 100) / 100.f;
        ids[i] = hot ? (int32_t)(n_experts / 2) : (int32_t)(ref_random() % n_experts) - (ref_random() % 16 == 0 ? (int32_t)n_experts : 0);
    }
    *in = (struct layer_input){x, ids, w, n_tokens, l->hidden, l->k, n_tokens * l->hidden * sizeof *x, 4};
}

static void free_input(struct layer_input *in) {
    free((void *)in->x);
    free((void *)in->ids);
    free((void *)in->weights);
}

static void test_against_cpu(void **state) {
    (void)state;
    static const size_t cases[][6] = {/* E, hidden, intermediate, k, T, hot */
                                      {1, 16, 16, 1, 1, 0},     {4, 64, 48, 2, 7, 0},    {8, 192, 80, 3, 8, 0},    {3, 256, 128, 2, 15, 0},
                                      {3, 128, 64, 1, 16, 1},   {5, 96, 112, 2, 17, 1},  {512, 32, 16, 8, 40, 0},  {2, 1040, 528, 2, 23, 0},
                                      {6, 512, 256, 4, 130, 0}, {4, 128, 192, 2, 25, 1}, {16, 320, 64, 6, 300, 0}, {2, 64, 64, 1, 0, 0}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        const size_t *p = cases[c];
        struct random_layer l = make_layer(p[0], p[1], p[2], p[3]), s = make_layer(1, p[1], p[2] + 32, 1);
        struct layer_input in;
        random_input(&in, &l, p[4], p[0] + 3, p[5]); /* some ids are another rank's */
        size_t n = p[4] * p[1];
        float *a = malloc(n * sizeof *a + 1), *b = malloc(n * sizeof *b + 1);
        for (int m = 0; m < N_MODES; m++)
            for (int shared = 0; shared < 2; shared++) {
                moe4_moe *on_cpu = create(cpu, &l, modes[m], 2, p[0] + 3, shared ? s.expert : NULL);
                moe4_moe *on_gpu = create(gpu, &l, modes[m], 2, p[0] + 3, shared ? s.expert : NULL);
                moe4_moe_report want = MOE4_MOE_REPORT_INIT, got = MOE4_MOE_REPORT_INIT;
                uint64_t want_counts[512], got_counts[512];
                run_layer(cpu, on_cpu, a, &in, &want, want_counts);
                run_layer(gpu, on_gpu, b, &in, &got, got_counts);
                double error = relative(b, a, n);
                if (!(error <= (modes[m] == MOE4_ACT_W4A16 ? 1e-4 : 5e-4)))
                    fail_msg("case %zu, %s, shared %d: %.2e from the CPU", c, moe4_act_name(modes[m]), shared, error);
                assert_int_equal(got.n_tokens, want.n_tokens);
                assert_int_equal(got.n_slots, want.n_slots);
                assert_int_equal(got.n_experts_hit, want.n_experts_hit);
                assert_int_equal(got.weight_bytes, want.weight_bytes);
                assert_int_equal(got.n_nonfinite_rows, want.n_nonfinite_rows);
                assert_memory_equal(got_counts, want_counts, p[0] * sizeof *got_counts);
                /* a block of h may sit on the edge of saturation and h differ by an ulp */
                assert_true(llabs((long long)(got.n_saturated_blocks - want.n_saturated_blocks)) <=
                            2 + (long long)(want.n_saturated_blocks / 100));
                moe4_moe_destroy(on_cpu);
                moe4_moe_destroy(on_gpu);
            }
        free(a);
        free(b);
        free_input(&in);
        free_layer(&l);
        free_layer(&s);
    }
}

/* The same token alone and in batches: the same bits where the same kernel takes it, decode in small ones and prefill in large ones, and
 * nearly the same across the two; the same call twice; NaN and Inf stay in their rows. */
static void test_batches(void **state) {
    (void)state;
    struct random_layer l = make_layer(4, 256, 192, 2);
    enum { N = 200 };
    struct layer_input in;
    random_input(&in, &l, N, 4, false);
    enum { FEW = 23 };
    float *all = malloc(N * 256 * sizeof *all), *again = malloc(N * 256 * sizeof *again), few[FEW * 256];
    for (int m = 0; m < N_MODES; m++) {
        if (modes[m] == MOE4_ACT_TENSOR) continue; /* depends on the batch */
        moe4_moe *moe = create(gpu, &l, modes[m], 0, 4, NULL);
        run_layer(gpu, moe, all, &in, NULL, NULL);
        run_layer(gpu, moe, again, &in, NULL, NULL);
        assert_memory_equal(all, again, N * 256 * sizeof *all);
        static const size_t parts[] = {FEW, 1, 8, 9, 16, 140, 170};
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
            struct layer_input part = in;
            part.T = parts[i];
            part.x_bytes = parts[i] * 256 * sizeof(float);
            run_layer(gpu, moe, again, &part, NULL, NULL);
            if (i == 0) {
                memcpy(few, again, sizeof few);
                assert_true(relative(few, all, FEW * 256) <= (modes[m] == MOE4_ACT_W4A16 ? 2e-4 : 5e-4));
            }
            assert_memory_equal(parts[i] <= FEW ? few : all, again, parts[i] * 256 * sizeof *all);
        }
        float *x = (float *)in.x, was[2] = {x[3 * 256 + 5], x[7 * 256]};
        x[3 * 256 + 5] = NAN;
        x[7 * 256] = INFINITY;
        moe4_moe_report report = MOE4_MOE_REPORT_INIT;
        run_layer(gpu, moe, again, &in, &report, NULL);
        assert_int_equal(report.n_nonfinite_rows, 2);
        for (size_t t = 0; t < N; t++) {
            bool reached = false;
            for (int k = 0; k < 2; k++) reached |= ((const int32_t *)in.ids)[2 * t + k] >= 0;
            if ((t == 3 || t == 7) && reached)
                for (size_t j = 0; j < 256; j++) assert_true(isnan(again[t * 256 + j]));
            else
                assert_memory_equal(all + t * 256, again + t * 256, 256 * sizeof *all);
        }
        x[3 * 256 + 5] = was[0];
        x[7 * 256] = was[1];
        moe4_moe_destroy(moe);
    }
    free(all);
    free(again);
    free_input(&in);
    free_layer(&l);
}

/* A captured call, replayed after routing and activations changed under it, beside a busy second stream. */
static void test_graph(void **state) {
    (void)state;
    enum { N = 24, HIDDEN = 192, REPLAYS = 6 };
    struct random_layer l = make_layer(6, HIDDEN, 128, 3);
    float want[N * HIDDEN], got[N * HIDDEN];
    for (int m = 0; m < N_MODES; m++) {
        moe4_moe *moe = create(gpu, &l, modes[m], 0, 6, NULL);
        size_t bytes;
        OK(gpu, moe4_moe_workspace_bytes(moe, &bytes, N));
        moe4_workspace ws = device_workspace(bytes), busy_ws = device_workspace(bytes);
        void *x = device_copy(NULL, sizeof want), *ids = device_copy(NULL, N * 3 * 4), *w = device_copy(NULL, N * 3 * 4);
        void *y = device_copy(NULL, sizeof want), *busy_y = device_copy(NULL, sizeof want);
        cudaStream_t stream, busy;
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        assert_int_equal(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
        assert_int_equal(cudaStreamCreateWithFlags(&busy, cudaStreamNonBlocking), cudaSuccess);
        assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
        OK(gpu, moe4_moe_forward(moe, y, x, ids, w, N, &ws, stream));
        assert_int_equal(cudaStreamEndCapture(stream, &graph), cudaSuccess);
        assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
        for (int i = 0; i < REPLAYS; i++) {
            struct layer_input in;
            random_input(&in, &l, N, 6, i == 2);
            run_layer(gpu, moe, want, &in, NULL, NULL);
            OK(gpu, moe4_memory_copy(gpu, x, in.x, sizeof want, NULL));
            OK(gpu, moe4_memory_copy(gpu, ids, in.ids, N * 3 * 4, NULL));
            OK(gpu, moe4_memory_copy(gpu, w, in.weights, N * 3 * 4, NULL));
            for (int b = 0; b < 4; b++) OK(gpu, moe4_moe_forward(moe, busy_y, x, ids, w, N, &busy_ws, busy));
            assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
            OK(gpu, moe4_memory_copy(gpu, got, y, sizeof got, stream));
            assert_memory_equal(got, want, sizeof got);
            OK(gpu, moe4_memory_copy(gpu, got, busy_y, sizeof got, busy));
            assert_memory_equal(got, want, sizeof got);
            free_input(&in);
        }
        cudaGraphExecDestroy(exec);
        cudaGraphDestroy(graph);
        cudaStreamDestroy(stream);
        cudaStreamDestroy(busy);
        void *buffers[] = {ws.data, busy_ws.data, x, ids, w, y, busy_y};
        for (int i = 0; i < 7; i++) moe4_memory_free(gpu, buffers[i]);
        moe4_moe_destroy(moe);
    }
    free_layer(&l);
}

/* ---- linears and routers ---- */

static void linear_case(moe4_dtype dtype, moe4_act act, size_t k, size_t n0, size_t n1, size_t n_tokens, moe4_dtype y_dtype) {
    moe4_weight w[2] = {ref_random_weight(dtype, n0, k), ref_random_weight(dtype, n1, k)};
    moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
    o.act = act;
    o.y_dtype = y_dtype;
    size_t width = y_dtype == MOE4_F32 ? 4 : 2;
    float *x = malloc(n_tokens * k * sizeof *x);
    for (size_t i = 0; i < n_tokens * k; i++) x[i] = ref_normal();
    void *y[2][2];
    uint64_t saturated[2];
    for (int d = 0; d < 2; d++) {
        moe4_ctx *ctx = d ? gpu : cpu;
        moe4_linear *l;
        size_t bytes;
        OK(ctx, moe4_linear_create(&l, ctx, w, 2, &o));
        OK(ctx, moe4_linear_workspace_bytes(l, &bytes, n_tokens));
        y[d][0] = calloc(n_tokens * n0 + 1, width);
        y[d][1] = calloc(n_tokens * n1 + 1, width);
        if (d) {
            moe4_workspace ws = device_workspace(bytes);
            void *dx = device_copy(x, n_tokens * k * 4),
                 *dy[2] = {device_copy(NULL, n_tokens * n0 * width), device_copy(NULL, n_tokens * n1 * width)};
            OK(ctx, moe4_linear_forward(l, dy, &saturated[d], dx, n_tokens, &ws, NULL));
            OK(ctx, moe4_memory_copy(ctx, y[d][0], dy[0], n_tokens * n0 * width, NULL));
            OK(ctx, moe4_memory_copy(ctx, y[d][1], dy[1], n_tokens * n1 * width, NULL));
            void *buffers[] = {ws.data, dx, dy[0], dy[1]};
            for (int i = 0; i < 4; i++) moe4_memory_free(ctx, buffers[i]);
        } else {
            moe4_workspace ws = {aligned_alloc(64, bytes), bytes};
            OK(ctx, moe4_linear_forward(l, y[d], &saturated[d], x, n_tokens, &ws, NULL));
            free(ws.data);
        }
        moe4_linear_destroy(l);
    }
    assert_int_equal(saturated[0], saturated[1]);
    for (int i = 0; i < 2; i++) {
        size_t n = n_tokens * (i ? n1 : n0);
        double num = 0, den = 0;
        for (size_t j = 0; j < n; j++) {
            double a = width == 4 ? ((float *)y[0][i])[j] : moe4_bf16_to_float(((uint16_t *)y[0][i])[j]);
            double b = width == 4 ? ((float *)y[1][i])[j] : moe4_bf16_to_float(((uint16_t *)y[1][i])[j]);
            num += (a - b) * (a - b);
            den += a * a;
        }
        if (!(num <= den * (width == 4 ? 1e-10 : 1e-6))) /* no rounding in between: products in another order, then bf16 */
            fail_msg("%s, %s, K %zu, T %zu: %.2e from the CPU", moe4_dtype_name(dtype), moe4_act_name(act), k, n_tokens, sqrt(num / den));
        free(y[0][i]);
        free(y[1][i]);
        free((void *)w[i].data);
        free((void *)w[i].scale);
    }
    free(x);
}

static void test_linear(void **state) {
    (void)state;
    static const size_t tokens[] = {1, 7, 16, 33, 70};
    for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            for (int m = 0; m < N_MODES; m++) linear_case(MOE4_NVFP4, modes[m], 176, 200, 37, tokens[t], bf16 ? MOE4_BF16 : MOE4_F32);
            linear_case(MOE4_NVFP4, MOE4_ACT_TOKEN, 1024, 128, 256, tokens[t], bf16 ? MOE4_BF16 : MOE4_F32);
            linear_case(MOE4_BF16, MOE4_ACT_BF16, 100, 13, 64, tokens[t], bf16 ? MOE4_BF16 : MOE4_F32);
            linear_case(MOE4_F32, MOE4_ACT_DEFAULT, 257, 8, 5, tokens[t], bf16 ? MOE4_BF16 : MOE4_F32);
        }
}

static void test_select(void **state) {
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
    enum { N = 65 };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        moe4_router_options o = MOE4_ROUTER_OPTIONS_INIT;
        o.kind = cases[c].kind;
        o.n_experts = cases[c].E;
        o.top_k = cases[c].k;
        o.n_group = cases[c].n_group;
        o.topk_group = cases[c].topk_group;
        o.normalize = cases[c].normalize;
        o.scale = cases[c].scale;
        size_t E = o.n_experts, k = o.top_k;
        float *logits = malloc(N * E * sizeof *logits), *bias = malloc(E * sizeof *bias), *weights[2];
        int32_t *ids[2];
        for (size_t i = 0; i < N * E; i++) logits[i] = (float)(int)(ref_normal() * 64) / 32.f; /* coarse: with ties */
        bool biased = o.kind != MOE4_ROUTER_SOFTMAX_TOPK && o.kind != MOE4_ROUTER_SIGMOID_TOP1;
        for (size_t e = 0; e < E; e++) bias[e] = (float)(ref_random() % 8) / 16.f;
        logits[5 * E] = NAN;
        moe4_router *r[2];
        OK(cpu, moe4_router_create(&r[0], cpu, NULL, biased ? bias : NULL, &o));
        OK(gpu, moe4_router_create(&r[1], gpu, NULL, biased ? bias : NULL, &o));
        for (int d = 0; d < 2; d++) {
            ids[d] = malloc(N * k * 4);
            weights[d] = malloc(N * k * 4);
        }
        OK(cpu, moe4_router_select(r[0], ids[0], weights[0], logits, NULL, N, NULL));
        void *dl = device_copy(logits, N * E * 4), *di = device_copy(NULL, N * k * 4), *dw = device_copy(NULL, N * k * 4);
        OK(gpu, moe4_router_select(r[1], di, dw, dl, NULL, N, NULL));
        OK(gpu, moe4_memory_copy(gpu, ids[1], di, N * k * 4, NULL));
        OK(gpu, moe4_memory_copy(gpu, weights[1], dw, N * k * 4, NULL));
        for (size_t i = 0; i < N * k; i++) {
            assert_int_equal(ids[0][i], ids[1][i]);
            if (i / k == 5)
                assert_true(isnan(weights[1][i]));
            else
                assert_true(fabsf(weights[0][i] - weights[1][i]) <= 2e-6f * fabsf(weights[0][i]));
        }
        void *buffers[] = {dl, di, dw};
        for (int d = 0; d < 2; d++) {
            free(ids[d]);
            free(weights[d]);
            moe4_router_destroy(r[d]);
        }
        for (int i = 0; i < 3; i++) moe4_memory_free(gpu, buffers[i]);
        free(logits);
        free(bias);
    }
}

/* ---- weights in device memory, errors ---- */

static void test_device_weights(void **state) {
    (void)state;
    struct random_layer l = make_layer(2, 64, 48, 1), d = l;
    struct layer_input in;
    random_input(&in, &l, 5, 2, false);
    float a[5 * 64], b[5 * 64];
    d.expert = calloc(2, sizeof *d.expert);
    memcpy(d.expert, l.expert, 2 * sizeof *d.expert);
    for (int e = 0; e < 2; e++) {
        moe4_weight *w[] = {&d.expert[e].gate, &d.expert[e].up, &d.expert[e].down};
        for (int i = 0; i < 3; i++) {
            w[i]->data = device_copy(w[i]->data, w[i]->rows * w[i]->cols / 2);
            w[i]->scale = device_copy(w[i]->scale, w[i]->rows * w[i]->cols / 16);
        }
    }
    moe4_moe *from_host = create(gpu, &l, MOE4_ACT_TOKEN, 0, 2, NULL), *from_device = create(gpu, &d, MOE4_ACT_TOKEN, 0, 2, NULL);
    run_layer(gpu, from_host, a, &in, NULL, NULL);
    run_layer(gpu, from_device, b, &in, NULL, NULL);
    assert_memory_equal(a, b, sizeof a);
    moe4_moe_destroy(from_host);
    moe4_moe_destroy(from_device);

    uint8_t bad = 0x7F;
    OK(gpu, moe4_memory_copy(gpu, (uint8_t *)d.expert[1].up.scale + 9, &bad, 1, NULL));
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = 2;
    o.top_k = 1;
    moe4_moe *moe;
    assert_int_equal(moe4_moe_create(&moe, gpu, d.expert, &o), MOE4_ERROR_FORMAT);
    assert_non_null(strstr(moe4_ctx_error(gpu), "expert 1 up: block scale [2, 1] is 0x7f"));
    for (int e = 0; e < 2; e++) {
        moe4_weight *w[] = {&d.expert[e].gate, &d.expert[e].up, &d.expert[e].down};
        for (int i = 0; i < 3; i++) {
            moe4_memory_free(gpu, (void *)w[i]->data);
            moe4_memory_free(gpu, (void *)w[i]->scale);
        }
    }
    free(d.expert);
    free_input(&in);
    free_layer(&l);
}

static void test_errors(void **state) {
    (void)state;
    assert_null(open_device("cuda:99", 0));
    assert_non_null(strstr(logged, "cuda:99"));
    assert_null(open_device("cuda:", 0));
    assert_null(open_device("cuda:1x", 0));

    struct random_layer l = make_layer(2, 64, 48, 1);
    moe4_moe *moe = create(gpu, &l, MOE4_ACT_TOKEN, 0, 2, NULL);
    size_t bytes;
    OK(gpu, moe4_moe_workspace_bytes(moe, &bytes, 1));
    moe4_workspace ws = device_workspace(bytes);
    float host[64] = {0}, weight = 1;
    int32_t id = 0;
    void *x = device_copy(host, sizeof host), *y = device_copy(host, sizeof host), *ids = device_copy(&id, 4), *w = device_copy(&weight, 4);
    const struct {
        void *y, *x, *ids, *w;
        const char *says;
    } mixed[] = {{host, x, ids, w, "y is host memory"},
                 {y, host, ids, w, "x is host memory"},
                 {y, x, &id, w, "topk_ids is host memory"},
                 {y, x, ids, &weight, "topk_weights is host memory"}};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(moe4_moe_forward(moe, mixed[i].y, mixed[i].x, mixed[i].ids, mixed[i].w, 1, &ws, NULL), MOE4_ERROR_ARGUMENT);
        if (!strstr(moe4_ctx_error(gpu), mixed[i].says)) fail_msg("%s, not: %s", moe4_ctx_error(gpu), mixed[i].says);
    }
    moe4_workspace on_host = {aligned_alloc(64, (bytes + 63) / 64 * 64), bytes};
    assert_int_equal(moe4_moe_forward(moe, y, x, ids, w, 1, &on_host, NULL), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(moe4_ctx_error(gpu), "workspace is host memory"));
    moe4_moe_report report = MOE4_MOE_REPORT_INIT;
    assert_int_equal(moe4_moe_report_read(moe, &report, NULL, &ws, NULL), MOE4_ERROR_ARGUMENT); /* nothing ran in it yet */
    void *huge;
    assert_int_equal(moe4_memory_alloc(gpu, &huge, (size_t)1 << 44), MOE4_ERROR_MEMORY);
    assert_non_null(strstr(moe4_ctx_error(gpu), "17592186044416 bytes"));
    OK(gpu, moe4_moe_forward(moe, y, x, ids, w, 1, &ws, NULL)); /* and all is well after them */
    OK(gpu, moe4_moe_report_read(moe, &report, NULL, &ws, NULL));
    assert_int_equal(report.n_slots, 1);

    free(on_host.data);
    void *buffers[] = {ws.data, x, y, ids, w};
    for (int i = 0; i < 5; i++) moe4_memory_free(gpu, buffers[i]);
    moe4_moe_destroy(moe);
    free_layer(&l);
}

/* An expert replaced in place is the layer that was made with it. */
static void test_replace(void **state) {
    (void)state;
    struct random_layer l = make_layer(3, 96, 64, 2), other = make_layer(1, 96, 64, 1);
    struct layer_input in;
    random_input(&in, &l, 9, 3, false);
    float a[9 * 96], b[9 * 96], before[9 * 96];
    moe4_moe *replaced = create(gpu, &l, MOE4_ACT_STATIC, 0, 3, NULL);
    run_layer(gpu, replaced, before, &in, NULL, NULL);
    OK(gpu, moe4_moe_replace_expert(replaced, 1, other.expert));
    run_layer(gpu, replaced, a, &in, NULL, NULL);
    moe4_expert swapped[3] = {l.expert[0], other.expert[0], l.expert[2]};
    struct random_layer made = l;
    made.expert = swapped;
    moe4_moe *fresh = create(gpu, &made, MOE4_ACT_STATIC, 0, 3, NULL);
    run_layer(gpu, fresh, b, &in, NULL, NULL);
    assert_memory_equal(a, b, sizeof a);
    assert_true(relative(a, before, 9 * 96) > 1e-3);
    moe4_moe_destroy(replaced);
    moe4_moe_destroy(fresh);
    free_input(&in);
    free_layer(&l);
    free_layer(&other);
}

/* Two contexts on one device, each with its own layer. */
static void test_two_contexts(void **state) {
    (void)state;
    moe4_ctx *first = gpu, *second = open_device("cuda", 0);
    assert_non_null(second);
    struct random_layer l = make_layer(3, 96, 64, 2);
    struct layer_input in;
    random_input(&in, &l, 9, 3, false);
    float a[9 * 96], b[9 * 96];
    moe4_moe *one = create(first, &l, MOE4_ACT_W4A16, 0, 3, NULL), *two = create(second, &l, MOE4_ACT_W4A16, 0, 3, NULL);
    run_layer(gpu, one, a, &in, NULL, NULL);
    gpu = second;
    run_layer(gpu, two, b, &in, NULL, NULL);
    gpu = first;
    assert_memory_equal(a, b, sizeof a);
    moe4_moe_destroy(two);
    moe4_ctx_destroy(second);
    run_layer(gpu, one, b, &in, NULL, NULL);
    assert_memory_equal(a, b, sizeof a);
    moe4_moe_destroy(one);
    free_input(&in);
    free_layer(&l);
}

int main(int argc, char **argv) {
    if (argc > 1) source = argv[1];
    int status = open_both("test_cuda", 0);
    if (status) return status;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens),     cmocka_unit_test(test_model_with_router),
        cmocka_unit_test(test_against_cpu), cmocka_unit_test(test_batches),
        cmocka_unit_test(test_graph),       cmocka_unit_test(test_linear),
        cmocka_unit_test(test_select),      cmocka_unit_test(test_device_weights),
        cmocka_unit_test(test_errors),      cmocka_unit_test(test_two_contexts),
        cmocka_unit_test(test_replace),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    moe4_ctx_destroy(cpu);
    moe4_ctx_destroy(gpu);
    return failed;
}
