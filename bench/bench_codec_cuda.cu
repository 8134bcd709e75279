/* Times the codec on the GPU beside the bytes it must move at the read bandwidth of the same run: medians over CUDA events.
 *
 *   bench_codec_cuda */
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <vector>

#include "../src/cuda/kernels.h"
#include "../tests/cuda_call.cuh"

enum { ROWS = 1 << 15, COLS = 7168 };

template <class F> static double median_seconds(F f) {
    cudaEvent_t begin, end;
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    std::vector<float> ms(15);
    CUDA(f());
    for (float &t : ms) {
        CUDA(cudaEventRecord(begin, 0));
        CUDA(f());
        CUDA(cudaEventRecord(end, 0));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&t, begin, end));
    }
    std::sort(ms.begin(), ms.end());
    return 1e-3 * ms[ms.size() / 2];
}

static void row(const char *what, double bytes, double seconds, double bandwidth) {
    printf("| %s | %.1f | %.0f | %.2f |\n", what, seconds * 1e6, bytes / seconds * 1e-9, bytes / seconds / bandwidth);
}

int main(void) {
    const size_t n = (size_t)ROWS * COLS;
    void *x, *y, *numbers;
    uint8_t *codes, *scales, *laid;
    CUDA(cudaMalloc(&x, 4 * n));
    CUDA(cudaMalloc(&y, 4 * n));
    CUDA(cudaMalloc(&codes, n / 2));
    CUDA(cudaMalloc(&scales, n / 16));
    CUDA(cudaMalloc(&laid, n / 16));
    CUDA(cudaMalloc(&numbers, ROWS * 16));
    CUDA(moe4_cuda_fill((moe4_bf16 *)x, n, 0));
    double bandwidth = 0;
    for (int blocks = 132; blocks <= 132 * 16; blocks *= 2)
        bandwidth = std::max(bandwidth, 4. * n / median_seconds([&] { return moe4_cuda_read(y, 4 * n, blocks, (uint32_t *)y, 0); }));
    printf("%d x %d, bf16; read bandwidth %.0f GB/s\n| call | us | GB/s read and written | of that bandwidth |\n|---|---|---|---|\n", ROWS,
           COLS, bandwidth * 1e-9);

    moe4_codec_call c = {};
    c.x = x;
    c.y = y;
    c.dtype = MOE4_BF16;
    c.rows = c.part_rows = ROWS;
    c.cols = c.ld = COLS;
    c.codes = codes;
    c.scales = scales;
    c.part_bytes = n / 16;
    c.o = MOE4_QUANTIZE_OPTIONS_INIT;
    c.o.per_row = 1;
    std::vector<moe4_codec_scale> of_rows(ROWS, moe4_codec_scale{0.001f, 2.688f});
    std::vector<float> globals(ROWS, 0.001f);
    unsigned long long *count = (unsigned long long *)numbers + ROWS;
    row("amax of rows", 2. * n, median_seconds([&] { return moe4_cuda_codec_amax(&c, (uint32_t *)numbers, 0); }), bandwidth);
    CUDA(cudaMemcpy(numbers, of_rows.data(), ROWS * sizeof(moe4_codec_scale), cudaMemcpyHostToDevice));
    const char *const names[] = {"quantize modelopt", "quantize modelopt_static", "quantize activation", "quantize compressed_tensors"};
    for (int recipe = 0; recipe < 4; recipe++) {
        c.o.recipe = (moe4_recipe)recipe;
        row(names[recipe], (2 + .5 + 1. / 16) * n,
            median_seconds([&] { return moe4_cuda_codec_quantize(&c, (moe4_codec_scale *)numbers, count, 0); }), bandwidth);
    }
    c.o.recipe = MOE4_RECIPE_MODELOPT;
    c.o.four_over_six = 1;
    row("quantize four over six", (2 + .5 + 1. / 16) * n,
        median_seconds([&] { return moe4_cuda_codec_quantize(&c, (moe4_codec_scale *)numbers, count, 0); }), bandwidth);
    CUDA(cudaMemcpy(numbers, globals.data(), ROWS * sizeof(float), cudaMemcpyHostToDevice));
    row("dequantize", (2 + .5 + 1. / 16) * n, median_seconds([&] { return moe4_cuda_codec_dequantize(&c, (float *)numbers, 0); }),
        bandwidth);
    moe4_scales_conversion s = {laid, scales, MOE4_SCALES_128X4, MOE4_SCALES_LINEAR, n / 16, n / 16, 1, ROWS, COLS / 16};
    row("scales, linear to 128x4", n / 8., median_seconds([&] { return moe4_cuda_scales_convert(&s, 0); }), bandwidth);
    return 0;
}
