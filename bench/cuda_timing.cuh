/* What the measurements on a GPU share: data that is neither zeros nor all alike, medians of samples with pauses between them, loops that
 * run until the clock settles, and the ceilings of the same run. */
#ifndef MOE4_CUDA_TIMING_CUH
#define MOE4_CUDA_TIMING_CUH

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "../src/cuda/cublas.h"
#include "../src/cuda/nvfp4.cuh"
#include "../tests/cuda_run.cuh"

/* What this machine does at most, in bytes and operations a second; flops 0: cuBLAS is not found. */
struct machine {
    int n_sms;
    double bandwidth, flops;
};

static __device__ uint32_t mix(uint64_t i) {
    i = (i ^ i >> 31) * 0x9E3779B97F4A7C15u;
    i = (i ^ i >> 29) * 0xBF58476D1CE4E5B9u;
    return (uint32_t)(i >> 32);
}
/* Random packed units: any code word is valid; scales between 2^-2 and 2^1. */
static __global__ void fill_units(uint32_t *p, size_t n_words) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n_words; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t r = mix(i);
        p[i] = i % (MOE4_UNIT_BYTES / 4) < MOE4_UNIT_CODE_BYTES / 4 ? r : (r & 0x0F0F0F0Fu) + 0x70707070u;
    }
}
static __global__ void fill_normal(__nv_bfloat16 *p, size_t n, uint64_t salt) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        float s = 0;
        for (int j = 0; j < 4; j++) s += (float)(mix(i * 4 + j + salt) & 0xFFFF) / 65536.f;
        p[i] = __float2bfloat16((s - 2.f) * 1.7f);
    }
}
static __global__ void __launch_bounds__(512) read_kernel(const uint4 *p, size_t n, uint32_t *out) {
    uint32_t x = 0;
    size_t stride = (size_t)gridDim.x * 512 * 8;
    for (size_t i = (size_t)blockIdx.x * 512 * 8 + threadIdx.x; i + 7 * 512 < n; i += stride) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = __ldcs(p + i + j * 512);
#pragma unroll
        for (int j = 0; j < 8; j++) x ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (x == 0x12345) *out = x;
}

template <class F> static float median_us(int n, F f) {
    cudaEvent_t a, b;
    CUDA(cudaEventCreate(&a));
    CUDA(cudaEventCreate(&b));
    std::vector<float> t;
    for (int i = 0; i < n + 3; i++) {
        CUDA(cudaEventRecord(a, 0));
        f();
        CUDA(cudaEventRecord(b, 0));
        CUDA(cudaEventSynchronize(b));
        float ms;
        CUDA(cudaEventElapsedTime(&ms, a, b));
        if (i >= 3) t.push_back(ms * 1000);
        usleep(2000);
    }
    std::sort(t.begin(), t.end());
    CUDA(cudaEventDestroy(a));
    CUDA(cudaEventDestroy(b));
    return t[t.size() / 2];
}

static double read_bandwidth(void) {
    size_t bytes = (size_t)4 << 30;
    uint4 *p;
    CUDA(cudaMalloc(&p, bytes));
    CUDA(cudaMemset(p, 0x5A, bytes));
    double best = 0;
    for (int blocks = 132; blocks <= 132 * 16; blocks *= 2) {
        float us = median_us(9, [&] { read_kernel<<<blocks, 512>>>(p, bytes / 16, (uint32_t *)p); });
        best = std::max(best, bytes / (us * 1e-6));
    }
    CUDA(cudaFree(p));
    return best;
}

/* Bytes read and written at least once, or operations: what no kernel can go under. */
static double floor_us(const machine &m, double bytes, double flops) {
    return 1e6 * std::max(bytes / m.bandwidth, m.flops > 0 ? flops / m.flops : 0);
}

/* y[T, N] = x[T, K] @ w[N, K]^T by cuBLAS, all bf16; whether it took the call. */
static bool multiply_bf16(moe4_cublas *blas, __nv_bfloat16 *y, const __nv_bfloat16 *x, const __nv_bfloat16 *w, int T, int N, int K,
                          void *workspace, cudaStream_t stream) {
    moe4_cublas_call c = {y, CUDA_R_16BF, (size_t)N, x, (size_t)K, w, 1.f, T, N, K, workspace, stream};
    return moe4_cublas_product(blas, &c) == 0;
}

/* A square product in bf16. */
static double product_rate(moe4_cublas *blas) {
    const int side = 8192;
    size_t n = (size_t)side * side;
    __nv_bfloat16 *p;
    bool good = true;
    CUDA(cudaMalloc(&p, 3 * n * sizeof *p));
    fill_normal<<<1024, 256>>>(p, 2 * n, 0);
    float us = median_us(9, [&] { good &= multiply_bf16(blas, p + 2 * n, p, p + n, side, side, side, NULL, 0); });
    CUDA(cudaFree(p));
    return good ? 2. * side * side * side / (us * 1e-6) : 0;
}

/* ---- the clock under load ---- */

/* NVML, where it is installed. */
struct sensors {
    void *device = NULL;
    int (*clock)(void *, int, unsigned *) = NULL;
    int (*power)(void *, unsigned *) = NULL;

    sensors() {
        char bus[32];
        int (*init)(void), (*find)(const char *, void **);
        void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
        if (!library || cudaDeviceGetPCIBusId(bus, sizeof bus, 0) != cudaSuccess) return;
        *(void **)&init = dlsym(library, "nvmlInit_v2");
        *(void **)&find = dlsym(library, "nvmlDeviceGetHandleByPciBusId_v2");
        *(void **)&clock = dlsym(library, "nvmlDeviceGetClockInfo");
        *(void **)&power = dlsym(library, "nvmlDeviceGetPowerUsage");
        if (!init || !find || !clock || !power || init() || find(bus, &device)) device = NULL;
    }
};

struct sustained {
    float us;          /* of a call of f */
    double mhz, watts; /* means; 0: not known */
};

/* f, which queues work of a millisecond or more, again and again for `seconds` without a pause; the second half counts. */
template <class F> static sustained sustained_us(double seconds, F f) {
    static sensors s;
    using clock = std::chrono::steady_clock;
    const int at_once = std::max(1, (int)(20000 / median_us(3, f))); /* 20 ms */
    cudaEvent_t begin, end, done[2];
    sustained r = {0, 0, 0};
    long counted = 0, samples = 0;
    for (cudaEvent_t *e : {&begin, &end, &done[0], &done[1]}) CUDA(cudaEventCreate(e));
    auto start = clock::now();
    for (int i = 0;; i++) {
        double t = std::chrono::duration<double>(clock::now() - start).count();
        if (!counted && t >= seconds / 2) CUDA(cudaEventRecord(begin, 0));
        if (t >= seconds) break;
        for (int j = 0; j < at_once; j++) f();
        if (t >= seconds / 2) counted += at_once;
        CUDA(cudaEventRecord(done[i & 1], 0));
        if (i) CUDA(cudaEventSynchronize(done[(i - 1) & 1])); /* one batch is always under way */
        unsigned mhz, mw;
        if (!counted || !s.device || s.clock(s.device, 1, &mhz) || s.power(s.device, &mw)) continue;
        r.mhz += mhz;
        r.watts += mw * 1e-3;
        samples++;
    }
    CUDA(cudaEventRecord(end, 0));
    CUDA(cudaEventSynchronize(end));
    CUDA(cudaEventElapsedTime(&r.us, begin, end));
    r.us *= 1000.f / (float)counted;
    if (samples) r.mhz /= (double)samples, r.watts /= (double)samples;
    for (cudaEvent_t e : {begin, end, done[0], done[1]}) CUDA(cudaEventDestroy(e));
    return r;
}

/* cuda_linear.cu */
void bench_linears(const machine &m, moe4_cublas *blas);

#endif
