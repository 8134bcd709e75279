/* Linears with many rows beside cuBLAS in bf16 on the same numbers: the calls that src/cuda/linear.c makes, to y in bf16. */
#include <math.h>
#include <stdio.h>

#include "cuda_timing.cuh"

enum { LINEAR_CALLS = 4 };

struct linear {
    int rows, cols; /* N, K */
    moe4_packed_experts w;
    __nv_bfloat16 *values; /* the same matrix, decoded, with alpha 1 */
};

static linear make_linear(int rows, int cols) {
    linear l = {rows, cols, packed_shape(1, rows, cols), NULL};
    uint8_t *packed = poisoned<uint8_t>(l.w.down_bytes);
    fill_units<<<2048, 256>>>((uint32_t *)packed, l.w.down_bytes / 4);
    l.w.down = packed;
    l.values = poisoned<__nv_bfloat16>((size_t)rows * cols);
    CUDA(moe4_cuda_unpack(l.values, packed, rows, cols, 0, 0));
    float *p = to_device(std::vector<float>{256.f}); /* the packed values decode to 1/256 of theirs */
    l.w.alpha_down = l.w.scale_x = p;
    return l;
}

/* The run that rounds x, whose hidden size is K; h is x. */
static moe4_layer_run rounds_of(const moe4_layer_run &r) {
    moe4_layer_run rounds = r;
    rounds.w.hidden = r.w.intermediate;
    rounds.w.hidden_units = r.w.intermediate_units;
    return rounds;
}

static double relative(const std::vector<float> &a, const std::vector<float> &b) {
    double num = 0, den = 0;
    for (size_t i = 0; i < a.size(); i++) num += ((double)a[i] - b[i]) * ((double)a[i] - b[i]), den += (double)b[i] * b[i];
    return sqrt(num / den);
}

static std::vector<float> widened(const __nv_bfloat16 *y, size_t n) {
    auto host = to_host(y, n);
    std::vector<float> v(n);
    for (size_t i = 0; i < n; i++) v[i] = __bfloat162float(host[i]);
    return v;
}

static void bench_linear(const linear &l, int T, const machine &m, moe4_cublas *blas, bool sustains) {
    size_t n = (size_t)T * l.rows;
    double flops = 2. * (double)n * l.cols;
    float blas_us = 0, tail_us = 0;
    std::vector<__nv_bfloat16 *> x;
    __nv_bfloat16 *y = poisoned<__nv_bfloat16>(n), *want = poisoned<__nv_bfloat16>(n);
    cudaStream_t stream;
    CUDA(cudaStreamCreate(&stream));
    for (int c = 0; c < LINEAR_CALLS; c++) {
        x.push_back(poisoned<__nv_bfloat16>((size_t)T * l.cols));
        fill_normal<<<256, 256>>>(x[c], (size_t)T * l.cols, (uint64_t)c << 40);
    }
    CUDA(cudaDeviceSynchronize());
    auto time = [&](auto call) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        for (int c = 0; c < LINEAR_CALLS; c++) call(c);
        CUDA(cudaStreamEndCapture(stream, &graph));
        CUDA(cudaGraphInstantiate(&exec, graph, 0));
        usleep(500000); /* the row before this one may have ended at the power limit */
        float us = median_us(15, [&] { CUDA(cudaGraphLaunch(exec, 0)); }) / LINEAR_CALLS;
        tail_us = sustains ? (float)sustained_us(1, [&] { CUDA(cudaGraphLaunch(exec, 0)); }).us / LINEAR_CALLS : 0;
        CUDA(cudaGraphExecDestroy(exec));
        CUDA(cudaGraphDestroy(graph));
        return us;
    };
    auto row = [&](const char *what, float us, double error) {
        double bytes = (double)l.w.down_bytes + 2. * T * l.cols + 2. * (double)n;
        printf("| %d x %d | %d | %s | %.1f | %.1f | %.3f | %.0f | %.3f | %.1f | %.1e |\n", l.rows, l.cols, T, what,
               floor_us(m, bytes, flops), us, floor_us(m, bytes, flops) / us, flops / us * 1e-6, blas_us / us, tail_us, error);
        fflush(stdout);
    };
    char *workspace = poisoned<char>(MOE4_CUBLAS_WORKSPACE);
    auto by_cublas = [&](int c) {
        if (!multiply_bf16(blas, want, x[c], l.values, T, l.rows, l.cols, workspace, stream)) exit(1);
    };
    auto decode = [&](int) { CUDA(moe4_cuda_unpack(l.values, (const uint8_t *)l.w.down, l.rows, l.cols, 0, stream)); };
    auto decoded = [&](int c) {
        moe4_rows_check check = {y, MOE4_BF16, (size_t)l.rows, x[c], (size_t)l.cols, T, l.rows, l.cols};
        decode(c);
        if (!multiply_bf16(blas, y, x[c], l.values, T, l.rows, l.cols, workspace, stream)) exit(1);
        CUDA(moe4_cuda_settle_rows(&check, stream));
    };
    if (blas) {
        blas_us = time(by_cublas);
        row("cuBLAS bf16", blas_us, 0);
        by_cublas(0);
        row("w4a16, decoded for cuBLAS", time(decoded), 0);
        row("w4a16, decoding", time(decode), 0);
    }
    for (moe4_act act : {MOE4_ACT_W4A16, MOE4_ACT_TOKEN}) {
        moe4_layer_run r = {};
        r.w = l.w;
        r.act = act;
        r.n_tokens = T;
        r.top_k = 1;
        r.tile_columns = 24;
        r.prefill_from = 1;
        r.prefill_columns = 80; /* memory for the most tiles */
        r.x_dtype = MOE4_BF16;
        r.x_in_ld = (size_t)l.cols;
        moe4_layer_run in = rounds_of(r); /* x is as wide as h */
        carve_run(&in);
        moe4_packed_experts w = r.w;
        r = in;
        r.w = w;
        r.prefill_columns = in.prefill_columns = T <= 256 ? 192 : 256; /* as src/cuda/run.c chooses */
        r.h_tiles = in.x_tiles;
        r.h_factor = in.x_factor;
        r.result.y = y;
        r.result.dtype = MOE4_BF16;
        r.result.ld = (size_t)l.rows;
        auto round = [&](int c) {
            in.x_in = x[c];
            CUDA(moe4_cuda_place_rows(&in, stream));
            CUDA(moe4_cuda_round_rows(&in, stream));
        };
        auto product = [&](int) { CUDA(moe4_cuda_prefill_sm90(&r, MOE4_PHASE_DOWN, m.n_sms, stream)); };
        auto both = [&](int c) {
            round(c);
            product(c);
        };
        both(0);
        CUDA(cudaStreamSynchronize(stream));
        double error = blas ? relative(widened(y, n), widened(want, n)) : 0;
        if (!(error <= (act == MOE4_ACT_W4A16 ? 5e-3 : 0.2))) { /* bf16 rounds both; 4-bit activations differ by what they cost */
            printf("bench_cuda: linear T %d: wrong results, %.2e\n", T, error);
            exit(1);
        }
        const char *name = act == MOE4_ACT_W4A16 ? "w4a16, prefill" : "token, prefill";
        row(name, time(both), error);
        if (act == MOE4_ACT_W4A16) {
            row("w4a16, x rounded into tiles", time(round), 0);
            for (int columns : {80, 192, 256}) {
                if (!sustains) break;
                char what[64];
                snprintf(what, sizeof what, "w4a16, product, %d columns", columns);
                r.prefill_columns = in.prefill_columns = columns;
                both(0);
                row(what, time(product), 0);
            }
        }
        free_run(&in);
    }
    for (auto p : x) CUDA(cudaFree(p));
    CUDA(cudaFree(workspace));
    CUDA(cudaFree(y));
    CUDA(cudaFree(want));
    CUDA(cudaStreamDestroy(stream));
}

void bench_linears(const machine &m, moe4_cublas *blas) {
    printf("\n| linear | rows | kernel | floor us | us | floor/us | TFLOP/s | of cuBLAS | sustained us | error |\n"
           "|---|---|---|---|---|---|---|---|---|---|\n");
    const int shapes[][2] = {{7168, 7168}, {4096, 4096}, {2048, 7168}, {7168, 2048}, {576, 7168}};
    for (auto &shape : shapes) {
        linear l = make_linear(shape[0], shape[1]);
        for (int T : {256, 1024, 4096}) bench_linear(l, T, m, blas, shape == shapes[0]);
        CUDA(cudaFree((void *)l.w.down));
        CUDA(cudaFree((void *)l.w.alpha_down));
        CUDA(cudaFree(l.values));
    }
}
