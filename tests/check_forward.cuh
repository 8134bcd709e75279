/* A layer of check_cuda by the kernels, and all that they left in the workspace. */
#ifndef MOE4_CHECK_FORWARD_CUH
#define MOE4_CHECK_FORWARD_CUH

#include <algorithm>

#include "check_layer.cuh"

struct outputs {
    std::vector<float> o, y, h_wide;
    std::vector<__nv_bfloat16> x, h;
    std::vector<float> x_factor, h_factor;
    std::vector<int> slots, expert_slots;
    moe4_run_state state;
};

template <class T> static bool same(const std::vector<T> &a, const std::vector<T> &b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/* Rows of the prefill kernel's tiles, back from their layout (prefill.cuh) into `rows`, by sorted slot. */
static void untile(std::vector<__nv_bfloat16> *rows, const std::vector<__nv_bfloat16> &tiles, const std::vector<moe4_tile> &list,
                   int n_tiles, size_t width) {
    for (int t = 0; t < n_tiles; t++) {
        size_t nt = (size_t)(list[t].n + 15) / 16 * 16, base = (size_t)(list[t].first + 15 * list[t].expert + 15) / 16 * 16 * width;
        for (size_t c = 0; c < (size_t)list[t].n; c++)
            for (size_t k = 0; k < width; k++) {
                size_t pair = k % 64 / 2, chunk = pair % 8, byte = pair / 8 * 4 + k % 2 * 2;
                (*rows)[(list[t].first + c) * width + k] = tiles[base + k / 64 * nt * 64 + c * 64 + (chunk ^ c % 8) * 8 + byte / 2];
            }
    }
}

/* The whole layer by one of the implementations: portable, sm_90, or with experts from r.prefill_from slots on by the prefill kernel. */
static outputs forward(moe4_layer_run r, bool sm90, const float *weights) {
    carve_run(&r);
    size_t slots = (size_t)r.n_tokens * r.top_k, hk = (size_t)r.w.hidden_units * 64, ik = (size_t)r.w.intermediate_units * 64;
    size_t x_rows = r.act == MOE4_ACT_STATIC ? slots : (size_t)r.n_tokens;
    float *y = poisoned<float>((size_t)r.n_tokens * r.w.hidden);
    CUDA(moe4_cuda_prepare(&r, 0));
    int sms;
    CUDA(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    if (r.n_windows) {
        run_windows(r, sms, y, MOE4_F32, weights, 0);
    } else if (r.prefill_from && r.act != MOE4_ACT_TENSOR) {
        CUDA(moe4_cuda_decode_sm90(&r, MOE4_PHASE_GATE_UP | MOE4_PHASE_DOWN, sms, 0));
        CUDA(moe4_cuda_prefill_sm90(&r, MOE4_PHASE_GATE_UP | MOE4_PHASE_DOWN, sms, 0));
    } else if (r.prefill_from) {
        CUDA(moe4_cuda_decode_sm90(&r, MOE4_PHASE_GATE_UP, sms, 0));
        CUDA(moe4_cuda_prefill_sm90(&r, MOE4_PHASE_GATE_UP, sms, 0));
        CUDA(moe4_cuda_prefill_h_amax(&r, 0));
        CUDA(moe4_cuda_quantize_h(&r, 0));
        CUDA(moe4_cuda_prefill_quantize_h(&r, 0));
        CUDA(moe4_cuda_decode_sm90(&r, MOE4_PHASE_DOWN, sms, 0));
        CUDA(moe4_cuda_prefill_sm90(&r, MOE4_PHASE_DOWN, sms, 0));
    } else if (sm90 && r.act != MOE4_ACT_TENSOR) {
        CUDA(moe4_cuda_decode_sm90(&r, MOE4_PHASE_GATE_UP | MOE4_PHASE_DOWN, sms, 0));
    } else if (sm90) {
        CUDA(moe4_cuda_decode_sm90(&r, MOE4_PHASE_GATE_UP, sms, 0));
        CUDA(moe4_cuda_quantize_h(&r, 0));
        CUDA(moe4_cuda_decode_sm90(&r, MOE4_PHASE_DOWN, sms, 0));
    } else {
        CUDA(moe4_cuda_gate_up(&r, 0));
        CUDA(moe4_cuda_quantize_h(&r, 0));
        CUDA(moe4_cuda_down(&r, 0));
    }
    if (!r.n_windows) CUDA(moe4_cuda_combine(&r, y, MOE4_F32, (size_t)r.w.hidden, weights, NULL, 0, 0));
    CUDA(cudaDeviceSynchronize());
    outputs out;
    out.state = to_host(r.state, 1)[0];
    out.o = to_host(r.o, slots * r.w.hidden);
    out.y = to_host(y, (size_t)r.n_tokens * r.w.hidden);
    out.x = to_host(r.x, x_rows * hk);
    out.h = to_host(r.h, slots * ik);
    if (r.h_wide) out.h_wide = to_host(r.h_wide, slots * ik);
    if (r.x_factor) out.x_factor = to_host(r.x_factor, x_rows);
    if (r.h_factor) out.h_factor = to_host(r.h_factor, slots);
    out.slots = to_host(r.slots, slots);
    out.expert_slots = to_host(r.expert_slots, r.w.n);
    if (r.prefill_from) {
        auto list = to_host(r.prefill_tiles, r.max_prefill_tiles);
        size_t rows = moe4_prefill_rows(slots, r.w.n);
        std::vector<__nv_bfloat16> x(slots * hk), gathered(slots * hk);
        untile(&x, to_host(r.x_tiles, rows * hk), list, out.state.n_prefill_tiles, hk);
        untile(&out.h, to_host(r.h_tiles, rows * ik), list, out.state.n_prefill_tiles, ik);
        if (r.n_windows) x.clear();                          /* the last window's */
        std::vector<bool> is_tiled(slots), is_known(x_rows); /* by sorted slot; by row: another slot has it too */
        for (int t = 0; t < out.state.n_prefill_tiles; t++)
            for (int i = 0; i < list[t].n; i++) is_tiled[list[t].first + i] = true;
        auto row_of = [&](int i) { return (size_t)(r.act == MOE4_ACT_STATIC ? out.slots[i] : out.slots[i] / r.top_k); };
        for (int i = 0; i < out.state.n_slots; i++)
            if (!is_tiled[i] || r.x_is_kept) is_known[row_of(i)] = true;
        int wrong = 0;
        for (int i = 0; i < out.state.n_slots; i++) {
            size_t row = row_of(i);
            if (!is_tiled[i] || r.n_windows) continue;
            if (is_known[row]) wrong += memcmp(&out.x[row * hk], &x[i * hk], hk * sizeof x[0]) != 0;
            std::copy_n(&x[i * hk], hk, &out.x[row * hk]);
            is_known[row] = true;
        }
        check(wrong == 0, "tiles of x", "rows that differ from another slot's", wrong, 0);
        if (r.x_is_kept) { /* another run gathers them from the rows */
            CUDA(cudaMemset(r.x_tiles, 0xFF, rows * hk * sizeof x[0]));
            CUDA(moe4_cuda_prefill_gather(&r, r.w.hidden_units, 0));
            untile(&gathered, to_host(r.x_tiles, rows * hk), list, out.state.n_prefill_tiles, hk);
            check(same(x, gathered), "gather", "rows of x that differ", 0, 0);
        }
    }
    CUDA(cudaFree(y));
    free_run(&r);
    return out;
}

#endif
