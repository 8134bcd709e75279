/* What check_cuda and bench_cuda share: checked CUDA calls, device arrays, a run's workspace. */
#ifndef MOE4_CUDA_RUN_CUH
#define MOE4_CUDA_RUN_CUH

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "../src/cuda/kernels.h"
#include "../src/cuda/nvfp4_layout.h"
#include "cuda_call.cuh"

static uint64_t seed = 1;
static uint32_t rnd(void) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33);
}

/* Device memory full of NaNs. */
template <class T> static T *poisoned(size_t n) {
    T *p;
    CUDA(cudaMalloc(&p, n * sizeof(T) + 256));
    CUDA(cudaMemset(p, 0xFF, n * sizeof(T) + 256));
    return p;
}

template <class T> static T *to_device(const std::vector<T> &v) {
    T *p = poisoned<T>(v.size());
    CUDA(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

template <class T> static std::vector<T> to_host(const T *p, size_t n) {
    std::vector<T> v(n);
    CUDA(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
}

/* The sizes of packed experts. */
static moe4_packed_experts packed_shape(int n, int hidden, int intermediate) {
    moe4_packed_experts w = {};
    w.n = n;
    w.hidden = hidden;
    w.intermediate = intermediate;
    w.hidden_units = (hidden + 63) / 64;
    w.intermediate_units = (intermediate + 63) / 64;
    w.gate_up_tiles = 2 * w.intermediate_units;
    w.down_tiles = w.hidden_units;
    w.gate_up_bytes = (size_t)w.gate_up_tiles * w.hidden_units * MOE4_UNIT_BYTES;
    w.down_bytes = (size_t)w.down_tiles * w.intermediate_units * MOE4_UNIT_BYTES;
    return w;
}

static void carve_run(moe4_layer_run *r) {
    size_t slots = (size_t)r->n_tokens * r->top_k, hk = (size_t)r->w.hidden_units * 64, ik = (size_t)r->w.intermediate_units * 64;
    size_t x_rows = r->act == MOE4_ACT_STATIC ? slots : (size_t)r->n_tokens;
    bool wide = r->act != MOE4_ACT_W4A16;
    r->max_tiles = (int)(slots / r->tile_columns + (slots < (size_t)r->w.n ? slots : r->w.n)) + 1;
    r->state = poisoned<moe4_run_state>(1);
    r->tiles = poisoned<moe4_tile>(r->max_tiles);
    r->slots = poisoned<int>(slots);
    r->expert_slots = poisoned<int>(r->w.n);
    r->share_counts = poisoned<int>((size_t)r->w.n * MOE4_SHARES);
    r->x = poisoned<__nv_bfloat16>(x_rows * hk);
    r->x_factor = wide ? poisoned<float>(x_rows) : NULL;
    r->x_saturated = poisoned<int>(x_rows);
    r->x_bad = poisoned<int>(r->n_tokens);
    r->x_amax = poisoned<uint32_t>(1);
    r->h_wide = wide ? poisoned<float>(slots * ik) : NULL;
    r->h_amax = wide ? poisoned<uint32_t>(slots + 1) : NULL;
    r->h = poisoned<__nv_bfloat16>(slots * ik);
    r->h_factor = wide ? poisoned<float>(slots) : NULL;
    r->h_saturated = poisoned<int>(slots);
    r->done = poisoned<int>(r->max_tiles);
    r->ready = poisoned<int>(r->max_tiles);
    if (r->prefill_from) {
        r->max_prefill_tiles = (int)(slots / r->prefill_columns + (slots < (size_t)r->w.n ? slots : r->w.n));
        r->prefill_tiles = poisoned<moe4_tile>(r->max_prefill_tiles);
        r->prefill_done = poisoned<int>(r->max_prefill_tiles);
        r->prefill_rounds = wide ? poisoned<int>(moe4_prefill_parts(slots, r->max_prefill_tiles)) : NULL;
        r->window_state = poisoned<moe4_run_state>(MOE4_MAX_WINDOWS);
        r->window_tiles = poisoned<moe4_tile>((size_t)MOE4_MAX_WINDOWS * r->max_prefill_tiles);
        r->x_places = poisoned<moe4_prefill_place>(slots);
        r->x_tiles = poisoned<__nv_bfloat16>(moe4_prefill_rows(slots, r->w.n) * hk);
        r->h_tiles = poisoned<__nv_bfloat16>(moe4_prefill_rows(slots, r->w.n) * ik);
    }
    r->o = poisoned<float>(slots * r->w.hidden);
}
/* A large batch after prepare by windows and slices, as the library runs it. */
static void run_windows(const moe4_layer_run &r, int sms, void *y, moe4_dtype y_dtype, const float *weights, cudaStream_t stream) {
    size_t ld = (size_t)r.w.hidden, y_size = y_dtype == MOE4_F32 ? 4 : 2;
    for (int w = 0; w < r.n_windows; w++) {
        moe4_layer_run window = moe4_cuda_window(&r, w);
        if (w) CUDA(moe4_cuda_tile_rows(&window, stream));
        CUDA(moe4_cuda_prefill_sm90(&window, MOE4_PHASE_GATE_UP, sms, stream));
    }
    CUDA(moe4_cuda_prefill_h_amax(&r, stream));
    if (r.act == MOE4_ACT_TENSOR) CUDA(moe4_cuda_quantize_h(&r, stream));
    CUDA(moe4_cuda_prefill_quantize_h(&r, stream));
    for (int s = 0, tiles = moe4_cuda_slice_tiles(&r); s * tiles < r.w.down_tiles; s++) {
        moe4_layer_run slice = moe4_cuda_slice(&r, s);
        CUDA(moe4_cuda_prefill_sm90(&slice, MOE4_PHASE_DOWN, sms, stream));
        CUDA(moe4_cuda_combine(&slice, (char *)y + (size_t)s * tiles * MOE4_UNIT_ROWS * y_size, y_dtype, ld, weights, NULL, 0, stream));
    }
}

static void free_run(moe4_layer_run *r) {
    void *all[] = {r->state,        r->tiles,         r->slots,        r->expert_slots, r->x,        r->x_factor,
                   r->x_saturated,  r->x_bad,         r->x_amax,       r->h_wide,       r->h_amax,   r->h,
                   r->h_factor,     r->h_saturated,   r->done,         r->ready,        r->o,        r->prefill_tiles,
                   r->share_counts, r->window_state,  r->window_tiles, r->prefill_done, r->x_places, r->x_tiles,
                   r->h_tiles,      r->prefill_rounds};
    for (void *p : all) CUDA(cudaFree(p));
}

#endif
