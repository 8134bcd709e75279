/* Times the layer on the GPU as docs/hopper.md says: CUDA graphs of several calls with different routing and activations, medians, the
 * ceilings of memory and of cuBLAS measured in the same run. A floor is the larger of two times: the packed bytes of the experts that the
 * routing hits over read bandwidth, and the operations over cuBLAS' rate.
 *
 *   bench_cuda [SHAPE [T [KERNEL]]]      one table row per (shape, T, mode, kernel)
 *   bench_cuda linear                    linears beside cuBLAS */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_timing.cuh"

enum { N_CALLS = 8 };

struct layer_shape {
    const char *name;
    int hidden, intermediate, n, k;
};

static moe4_packed_experts make_layer(const layer_shape &s) {
    moe4_packed_experts w = packed_shape(s.n, s.hidden, s.intermediate);
    uint8_t *a = poisoned<uint8_t>(w.gate_up_bytes * s.n), *b = poisoned<uint8_t>(w.down_bytes * s.n);
    fill_units<<<2048, 256>>>((uint32_t *)a, w.gate_up_bytes * s.n / 4);
    fill_units<<<2048, 256>>>((uint32_t *)b, w.down_bytes * s.n / 4);
    w.gate_up = a;
    w.down = b;
    std::vector<float> alpha(s.n, 256.f / sqrtf((float)s.hidden)), scale(s.n, 0.002f);
    float *p = poisoned<float>(s.n), *q = poisoned<float>(s.n);
    CUDA(cudaMemcpy(p, alpha.data(), s.n * 4, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(q, scale.data(), s.n * 4, cudaMemcpyHostToDevice));
    w.alpha_gate = w.alpha_up = w.alpha_down = p;
    w.scale_x = w.scale_h = q;
    return w;
}

/* HOT: every token picks expert 0; HALF: with half of its slots; ZIPF: expert e by 1 / (e + 1). */
enum routing { UNIFORM, HOT, HALF, ZIPF };

struct variant {
    const char *name;
    bool portable, fused;
    int columns;
    int stages;       /* bits: 1 prepare, 2 products, 4 combine; instead of 2: 8 gate/up, 16 down */
    int prefill_from; /* slots from which experts take the prefill kernel */
    int prefill_columns;
    routing slots_by;
    bool sustained; /* without pauses, for seconds */
    int windows, slices;
};

/* The products of a run that may have both kinds of experts, or one of prefill's two. */
static void mixed(const moe4_layer_run &r, int sms, int stages, cudaStream_t stream) {
    const int both = MOE4_PHASE_GATE_UP | MOE4_PHASE_DOWN;
    if (stages & 2 && r.prefill_from > 1) CUDA(moe4_cuda_decode_sm90(&r, both, sms, stream));
    if (stages & 2) CUDA(moe4_cuda_prefill_sm90(&r, both, sms, stream));
    if (stages & 8) CUDA(moe4_cuda_prefill_sm90(&r, MOE4_PHASE_GATE_UP, sms, stream));
    if (stages & 16) CUDA(moe4_cuda_prefill_sm90(&r, MOE4_PHASE_DOWN, sms, stream));
}

static int pick(int n, routing by) {
    if (by != ZIPF) return (int)(rnd() % (uint32_t)n);
    double sum = 0, at = rnd() / 2147483648.;
    for (int e = 0; e < n; e++) sum += 1. / (e + 1);
    int e = 0;
    while (e < n - 1 && (at -= 1. / (e + 1) / sum) > 0) e++;
    return e;
}

static void bench(const layer_shape &s, const moe4_packed_experts &w, int T, moe4_act act, const variant &v, const machine &m) {
    int sms = m.n_sms;
    moe4_layer_run r = {};
    r.w = w;
    r.act = act;
    r.alpha = 1.f;
    r.n_tokens = T;
    r.top_k = s.k;
    r.tile_columns = v.columns;
    r.prefill_from = v.prefill_from;
    r.prefill_columns = v.prefill_columns;
    r.x_dtype = MOE4_BF16;
    r.x_in_ld = (size_t)s.hidden;
    r.n_windows = v.windows;
    r.n_slices = v.slices;
    if (v.windows) r.window_slots = T * s.k / v.windows + 16 & ~15;
    carve_run(&r);
    __nv_bfloat16 *y = poisoned<__nv_bfloat16>((size_t)T * s.hidden);
    std::vector<int32_t *> ids;
    std::vector<__nv_bfloat16 *> x;
    std::vector<float> ones(T * s.k, 0.3f);
    float *weights = poisoned<float>(T * s.k);
    CUDA(cudaMemcpy(weights, ones.data(), ones.size() * 4, cudaMemcpyHostToDevice));
    double hit = 0;
    for (int c = 0; c < N_CALLS; c++) {
        std::vector<int32_t> id;
        std::vector<bool> used(s.n);
        for (int t = 0; t < T; t++) {
            std::vector<bool> mine(s.n);
            for (int k = 0; k < s.k; k++) {
                bool hot = (v.slots_by == HOT && k == 0) || (v.slots_by == HALF && k < s.k / 2);
                int e = hot ? 0 : pick(s.n, v.slots_by);
                while (mine[e] && !hot) e = pick(s.n, v.slots_by);
                id.push_back(e);
                used[e] = mine[e] = true;
            }
        }
        hit += std::count(used.begin(), used.end(), true) / (double)N_CALLS;
        ids.push_back(poisoned<int32_t>(id.size()));
        CUDA(cudaMemcpy(ids[c], id.data(), id.size() * 4, cudaMemcpyHostToDevice));
        x.push_back(poisoned<__nv_bfloat16>((size_t)T * s.hidden));
        fill_normal<<<256, 256>>>(x[c], (size_t)T * s.hidden, (uint64_t)c << 40);
    }
    cudaStream_t stream;
    CUDA(cudaStreamCreate(&stream));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    auto one = [&](int c, int stages) {
        r.ids = ids[c];
        r.x_in = x[c];
        if (stages & 1) CUDA(moe4_cuda_prepare(&r, stream));
        if (r.n_windows) {
            run_windows(r, sms, y, MOE4_BF16, weights, stream);
        } else if (v.prefill_from) {
            mixed(r, sms, stages, stream);
        } else if (stages & 2) {
            if (v.portable) {
                CUDA(moe4_cuda_gate_up(&r, stream));
                CUDA(moe4_cuda_quantize_h(&r, stream));
                CUDA(moe4_cuda_down(&r, stream));
            } else if (v.fused) {
                CUDA(moe4_cuda_decode_sm90(&r, 3, sms, stream));
            } else {
                CUDA(moe4_cuda_decode_sm90(&r, 1, sms, stream));
                CUDA(moe4_cuda_quantize_h(&r, stream));
                CUDA(moe4_cuda_decode_sm90(&r, 2, sms, stream));
            }
        }
        if (stages & 4 && !r.n_windows) CUDA(moe4_cuda_combine(&r, y, MOE4_BF16, (size_t)s.hidden, weights, NULL, 0, stream));
    };
    size_t n_y = (size_t)T * s.hidden;
    float *y32 = poisoned<float>(n_y);
    auto result = [&](void) {
        std::vector<float> host(n_y);
        if (r.n_windows)
            run_windows(r, sms, y32, MOE4_F32, weights, stream);
        else
            CUDA(moe4_cuda_combine(&r, y32, MOE4_F32, (size_t)s.hidden, weights, NULL, 0, stream));
        CUDA(cudaStreamSynchronize(stream));
        CUDA(cudaMemcpy(host.data(), y32, n_y * 4, cudaMemcpyDeviceToHost));
        CUDA(cudaMemset(y32, 0xFF, n_y * 4));
        return host;
    };
    CUDA(cudaMemset(y32, 0xFF, n_y * 4));
    one(0, v.windows ? 1 : 7);
    std::vector<float> got = result();
    r.prefill_from = r.n_windows = 0;
    CUDA(moe4_cuda_prepare(&r, stream));
    CUDA(moe4_cuda_gate_up(&r, stream));
    CUDA(moe4_cuda_quantize_h(&r, stream));
    CUDA(moe4_cuda_down(&r, stream));
    std::vector<float> want = result();
    r.prefill_from = v.prefill_from;
    r.n_windows = v.windows;
    double num = 0, den = 0;
    for (size_t i = 0; i < n_y; i++) num += ((double)got[i] - want[i]) * ((double)got[i] - want[i]), den += (double)want[i] * want[i];
    double error = sqrt(num / den); /* of prefill, whose sums have another order; the other kernels give the portable ones' bits */
    if (!(den > 0) || !(error <= (v.prefill_from ? 1e-3 : 0))) {
        printf("bench_cuda: %s T %d %s: wrong results, %.2e\n", s.name, T, v.name, error);
        if (!getenv("MOE4_BENCH_GO_ON")) exit(1);
    }
    CUDA(cudaFree(y32));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int c = 0; c < N_CALLS; c++) one(c, v.stages);
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    char name[64];
    float us;
    snprintf(name, sizeof name, "%s", v.name);
    if (v.sustained) {
        sustained loop = sustained_us(2.5, [&] { CUDA(cudaGraphLaunch(exec, 0)); });
        us = loop.us / N_CALLS;
        snprintf(name, sizeof name, "%s, sustained, %.0f MHz %.0f W", v.name, loop.mhz, loop.watts);
    } else {
        us = median_us(15, [&] { CUDA(cudaGraphLaunch(exec, 0)); }) / N_CALLS;
    }
    double flops = 6.0 * s.hidden * s.intermediate * T * s.k;
    double floor = floor_us(m, hit * (double)(w.gate_up_bytes + w.down_bytes), flops);
    printf("| %s | %d | %s | %s | %.1f | %.1f | %.1f | %.3f | %.0f | %.1e |\n", s.name, T, act == MOE4_ACT_W4A16 ? "w4a16" : "token", name,
           hit, floor, us, floor / us, flops / us * 1e-6, error);
    fflush(stdout);
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    for (int c = 0; c < N_CALLS; c++) {
        CUDA(cudaFree(ids[c]));
        CUDA(cudaFree(x[c]));
    }
    CUDA(cudaFree(y));
    CUDA(cudaFree(weights));
    free_run(&r);
}

int main(int argc, char **argv) {
    const char *only_shape = argc > 1 ? argv[1] : "", *only_kernel = argc > 3 ? argv[3] : "";
    int only_tokens = argc > 2 ? atoi(argv[2]) : 0;
    cudaDeviceProp device;
    char why[96];
    CUDA(cudaGetDeviceProperties(&device, 0));
    moe4_cublas *blas = moe4_cublas_open(why, sizeof why);
    machine m = {device.multiProcessorCount, read_bandwidth(), blas ? product_rate(blas) : 0};
    printf("%s, %d SMs, read bandwidth %.3f TB/s, %s %.0f TFLOP/s\n", device.name, m.n_sms, m.bandwidth * 1e-12,
           blas ? "cuBLAS bf16 8192 x 8192 x 8192" : why, m.flops * 1e-12);
    const layer_shape shapes[] = {{"W1", 7168, 3072, 48, 6}, {"W2", 4096, 2048, 32, 6}, {"small", 256, 128, 32, 6}};
    printf(
        "| shape | T | act | kernel | experts | floor us | us | floor/us | TFLOP/s | error |\n|---|---|---|---|---|---|---|---|---|---|\n");
    for (const layer_shape &s : shapes) {
        bool w1 = s.n == 48;
        if (*only_shape && strcmp(only_shape, s.name)) continue;
        moe4_packed_experts w = make_layer(s);
        CUDA(cudaDeviceSynchronize());
        auto go = [&](int T, moe4_act act, variant v) {
            if ((only_tokens && T != only_tokens) || (*only_kernel && strcmp(only_kernel, v.name))) return;
            bench(s, w, T, act, v, m);
        };
        for (int T : {1, 4, 8, 32, 64}) {
            if (!w1 && (T == 4 || T == 32)) continue;
            for (moe4_act act : {MOE4_ACT_W4A16, MOE4_ACT_TOKEN}) {
                if (T <= 32) go(T, act, {"8", false, true, 8, 7});
                if (T >= 32) go(T, act, {"16", false, true, 16, 7});
                if (T >= 64) go(T, act, {"24", false, true, 24, 7});
                if (T == 1) {
                    go(T, act, {"prepare", false, true, 8, 1});
                    go(T, act, {"prepare+decode", false, true, 8, 3});
                    go(T, act, {"combine", false, true, 8, 4});
                    go(T, act, {"prepare+combine", false, true, 8, 5});
                }
            }
        }
        for (int T : {64, 128, 256, 512, 1024, 4096}) { /* as the library chooses (src/cuda/run.c), then the alternatives */
            int slots = T * s.k / s.n, columns = slots <= 68 ? 80 : slots <= 165 ? 192 : slots <= 235 ? 256 : 192;
            if (slots < 13) continue;
            int from = 1, windows = T < 4096 ? 0 : w1 ? 2 : 1, slices = T < 4096 ? 0 : w1 ? 3 : 2;
            go(T, MOE4_ACT_W4A16, {"layer", false, true, 24, 7, from, columns, UNIFORM, false, windows, slices});
            if (slots >= 16) go(T, MOE4_ACT_TOKEN, {"layer", false, true, 24, 7, from, columns, UNIFORM, false, windows, slices});
            if (T == 256 || T == 1024) {
                go(T, MOE4_ACT_W4A16, {"layer, hot", false, true, 24, 7, from, columns, HOT});
                go(T, MOE4_ACT_W4A16, {"layer, half", false, true, 24, 7, from, columns, HALF});
                go(T, MOE4_ACT_W4A16, {"layer, zipf", false, true, 24, 7, from, columns, ZIPF});
            }
            if (T >= 256) go(T, MOE4_ACT_W4A16, {"layer", false, true, 24, 7, from, columns, UNIFORM, true, windows, slices});
            if (T <= 1024) go(T, MOE4_ACT_W4A16, {"24", false, true, 24, 7});
            static const struct {
                int columns;
                const char *name;
            } widths[] = {{80, "prefill 80"}, {192, "prefill 192"}, {256, "prefill 256"}};
            for (auto &width : widths)
                if (slots < 4 * width.columns) go(T, MOE4_ACT_W4A16, {width.name, false, true, 24, 7, 1, width.columns});
            go(T, MOE4_ACT_W4A16, {"prepare", false, true, 24, 1, 1, 256});
            if (T >= 512) {
                go(T, MOE4_ACT_W4A16, {"prepare+gate/up", false, true, 24, 9, 1, columns});
                go(T, MOE4_ACT_W4A16, {"down", false, true, 24, 16, 1, columns});
            }
            go(T, MOE4_ACT_W4A16, {"combine", false, true, 24, 4, 1, 256});
        }
        CUDA(cudaFree((void *)w.gate_up));
        CUDA(cudaFree((void *)w.down));
    }
    if (!*only_shape || strcmp(only_shape, "linear") == 0) bench_linears(m, blas);
    moe4_cublas_close(blas);
    return 0;
}
