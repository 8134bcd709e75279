/* Checks the kernels of the CUDA part alone, stage by stage, against plain fp32/fp64 loops on the host:
 * packed weights and rounded activations bit by bit, products within the bound of docs/numerics.md, the sm_90 kernels bit by bit
 * against the portable ones, every run twice. Exits 77 (skipped) where there is no GPU.
 *
 *   check_cuda [--quick]     one line per case; the last line counts
 *   check_cuda --least       each kernel a few times on the smallest shapes, for tools under which it is slow */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#define MOE4_NO_CALLS /* divide as the prefill kernel has it */
#include "../src/cuda/nvfp4.cuh"
#include "cuda_run.cuh"

static int n_failed, n_checks;
static bool least;

static void check(bool good, const char *name, const char *what, double a, double b) {
    n_checks++;
    if (good) return;
    n_failed++;
    printf("FAILED %s: %s: %g, %g\n", name, what, a, b);
}

static float rnd_normal(void) {
    float s = 0;
    for (int i = 0; i < 6; i++) s += (float)(rnd() & 0xFFFF) / 65536.f;
    return (s - 3.f) * 1.4142f;
}

/* ---- the contract, on the host ---- */

static double e2m1(uint32_t c) {
    static const double v[8] = {0, .5, 1, 1.5, 2, 3, 4, 6};
    return c & 8 ? -v[c & 7] : v[c & 7];
}
static double e4m3(uint32_t b) {
    int e = b >> 3 & 15, m = b & 7;
    if (e == 15 && m == 7) return NAN;
    double v = e ? ldexp(1 + m / 8.0, e - 7) : ldexp(m, -9);
    return b & 0x80 ? -v : v;
}
static uint32_t e2m1_round(float a) { /* of |x|: nearest, ties to the even code */
    uint32_t best = 0;
    for (uint32_t c = 1; c < 8; c++) {
        double d = fabs(a - e2m1(c)), b = fabs(a - e2m1(best));
        if (d < b || (d == b && !(c & 1))) best = c;
    }
    return best;
}
static uint32_t e4m3_round_host(float x) {
    if (x >= 448) return 0x7E;
    uint32_t best = 0;
    for (uint32_t b = 1; b < 0x7F; b++) {
        double d = fabs(x - e4m3(b)), o = fabs(x - e4m3(best));
        if (d < o || (d == o && !(b & 1))) best = b;
    }
    return best;
}
static float bf16_round(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    u = (u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000u;
    memcpy(&x, &u, 4);
    return x;
}
/* out[16] = the values e2m1 * scale of a block under S, in the contract's order of operations. */
static void activation_block_host(float *out, const float *x, float S) {
    volatile float b = 0, sixth = 1.f / 6.f, t;
    for (int i = 0; i < 16; i++) b = fmaxf(b, fabsf(x[i]));
    t = S * sixth;
    t = b * t;
    uint32_t byte = e4m3_round_host(t);
    volatile float s = (float)e4m3(byte), inverse = 1.f / S, f = s * inverse;
    f = 1.f / f;
    if (f > 3.402823466e38f) f = 3.402823466e38f;
    for (int i = 0; i < 16; i++) {
        volatile float y = byte ? x[i] * f : 0.f;
        out[i] = byte ? copysignf((float)(e2m1(e2m1_round(fabsf(y))) * s), y) : 0.f;
    }
}
static float encode_host(float amax) {
    volatile float S = amax == 0 ? 1.f : 2688.f / amax;
    return S > 3.402823466e38f ? 3.402823466e38f : S;
}

/* ---- a layer ---- */

struct matrix {
    int rows, cols;
    std::vector<uint8_t> codes, scales;
    double at(int r, int k) const {
        uint32_t c = codes[(size_t)r * (cols / 2) + k / 2] >> (k & 1 ? 4 : 0) & 15;
        return e2m1(c) * e4m3(scales[(size_t)r * (cols / 16) + k / 16]);
    }
};
static matrix random_matrix(int rows, int cols, bool every_scale) {
    matrix m = {rows, cols, {}, {}};
    m.codes.resize((size_t)rows * cols / 2);
    m.scales.resize((size_t)rows * cols / 16);
    for (auto &c : m.codes) c = (uint8_t)rnd();
    for (auto &s : m.scales) s = every_scale ? (uint8_t)(rnd() % 0x7F) : (uint8_t)(0x30 + rnd() % 32);
    return m;
}

struct shape_case {
    const char *name;
    int hidden, intermediate, n, T, k;
    int routing; /* 0 random; 1 everything to expert 0; 2 with -1 and foreign ids; 3 i64; 4 expert e gets edge_slots[e] */
    bool every_scale;
};

static void pack_check(const shape_case &c, uint8_t *packed, const matrix &m, int interleave) {
    uint8_t *codes = to_device(m.codes), *scales = to_device(m.scales);
    CUDA(moe4_cuda_pack(packed, codes, scales, m.rows, m.cols, interleave, 0));
    __nv_bfloat16 *values = poisoned<__nv_bfloat16>((size_t)m.rows * m.cols);
    CUDA(moe4_cuda_unpack(values, packed, m.rows, m.cols, interleave, 0));
    CUDA(cudaDeviceSynchronize());
    auto v = to_host(values, (size_t)m.rows * m.cols);
    int wrong = 0;
    for (int r = 0; r < m.rows; r++)
        for (int k = 0; k < m.cols; k++) wrong += !((double)__bfloat162float(v[(size_t)r * m.cols + k]) == m.at(r, k));
    check(wrong == 0, c.name, "packed weights that differ", wrong, 0);
    CUDA(cudaFree(codes));
    CUDA(cudaFree(scales));
    CUDA(cudaFree(values));
}

struct host_layer {
    std::vector<matrix> gate, up, down;
    std::vector<float> alpha_gate, alpha_up, alpha_down, scale_x, scale_h;
};

static moe4_packed_experts make_layer(const shape_case &c, host_layer *l) {
    moe4_packed_experts w = packed_shape(c.n, c.hidden, c.intermediate);
    uint8_t *gate_up, *down;
    CUDA(cudaMalloc(&gate_up, w.gate_up_bytes * c.n));
    CUDA(cudaMalloc(&down, w.down_bytes * c.n));
    CUDA(cudaMemset(gate_up, 0, w.gate_up_bytes * c.n));
    CUDA(cudaMemset(down, 0, w.down_bytes * c.n));
    for (int e = 0; e < c.n; e++) {
        l->gate.push_back(random_matrix(c.intermediate, c.hidden, c.every_scale));
        l->up.push_back(random_matrix(c.intermediate, c.hidden, c.every_scale));
        l->down.push_back(random_matrix(c.hidden, c.intermediate, c.every_scale));
        pack_check(c, gate_up + w.gate_up_bytes * e, l->gate[e], 1);
        pack_check(c, gate_up + w.gate_up_bytes * e, l->up[e], 2);
        pack_check(c, down + w.down_bytes * e, l->down[e], 0);
        float s = 256.f / sqrtf((float)c.hidden) / (c.every_scale ? 64.f : 8.f);
        l->alpha_gate.push_back(s * (1.f + .1f * e));
        l->alpha_up.push_back(s * (1.3f - .01f * e));
        l->alpha_down.push_back(s * .7f);
        l->scale_x.push_back(.0013f * (1.f + .01f * e));
        l->scale_h.push_back(.0021f * (1.f + .02f * e));
    }
    w.gate_up = gate_up;
    w.down = down;
    w.alpha_gate = to_device(l->alpha_gate);
    w.alpha_up = to_device(l->alpha_up);
    w.alpha_down = to_device(l->alpha_down);
    w.scale_x = to_device(l->scale_x);
    w.scale_h = to_device(l->scale_h);
    return w;
}

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

/* Rows of rounded activations against the contract. */
static int wrong_row(const __nv_bfloat16 *got, float got_factor, const float *x, int n, int padded, moe4_act act, float input_scale,
                     float batch_amax) {
    std::vector<float> want(padded, 0.f);
    float decode = 1.f;
    if (act == MOE4_ACT_W4A16) {
        for (int i = 0; i < n; i++) want[i] = bf16_round(x[i]);
    } else {
        float amax = batch_amax;
        if (act == MOE4_ACT_TOKEN)
            for (int i = 0; i < n; i++) amax = fmaxf(amax, fabsf(x[i]));
        volatile float S = act == MOE4_ACT_STATIC ? 1.f / input_scale : encode_host(amax);
        decode = act == MOE4_ACT_STATIC ? input_scale : 1.f / S;
        for (int i = 0; i < n; i += 16) activation_block_host(&want[i], x + i, S);
    }
    int wrong = got_factor != decode;
    for (int i = 0; i < padded; i++) wrong += __bfloat162float(got[i]) != want[i];
    return wrong;
}

static void compare(const shape_case &c, const moe4_layer_run &r, const host_layer &l, const outputs &got, const std::vector<float> &x,
                    const std::vector<int> &local, const std::vector<float> &weights) {
    int slots = c.T * c.k, hk = r.w.hidden_units * 64, ik = r.w.intermediate_units * 64;
    std::vector<int> order;
    for (int e = 0; e < c.n; e++)
        for (int s = 0; s < slots; s++)
            if (local[s] == e) order.push_back(s);
    check(got.state.n_slots == (int)order.size(), c.name, "slots", got.state.n_slots, (double)order.size());
    check(std::vector<int>(got.slots.begin(), got.slots.begin() + order.size()) == order, c.name, "order of slots", 0, 0);

    bool wide = r.act != MOE4_ACT_W4A16;
    float x_amax = 0, h_amax = 0;
    if (r.act == MOE4_ACT_TENSOR) {
        for (float v : x) x_amax = fmaxf(x_amax, fabsf(v));
        for (size_t i = 0; i < order.size() * ik; i++) h_amax = fmaxf(h_amax, fabsf(got.h_wide[i]));
    }
    int wrong_x = 0, wrong_h = 0;
    double worst_h = 0, worst_o = 0, worst_y = 0;
    for (size_t p = 0; p < order.size(); p++) {
        int s = order[p], e = local[s], t = s / c.k, row = r.act == MOE4_ACT_STATIC ? s : t;
        wrong_x += wrong_row(&got.x[(size_t)row * hk], wide ? got.x_factor[row] : 1.f, &x[(size_t)t * c.hidden], c.hidden, hk, r.act,
                             l.scale_x[e], x_amax);
        if (wide)
            wrong_h += wrong_row(&got.h[p * ik], got.h_factor[p], &got.h_wide[p * ik], c.intermediate, ik, r.act, l.scale_h[e], h_amax);
        /* spot columns against fp64 on the same operands */
        double xf = wide ? got.x_factor[row] : 1, hf = wide ? got.h_factor[p] : 1;
        for (int j = (int)(p % 7); j < c.intermediate; j += 1 + c.intermediate / 23) {
            double g = 0, u = 0, ga = 0, ua = 0;
            for (int k = 0; k < c.hidden; k++) {
                double xv = __bfloat162float(got.x[(size_t)row * hk + k]), gv = xv * l.gate[e].at(j, k), uv = xv * l.up[e].at(j, k);
                g += gv, ga += fabs(gv), u += uv, ua += fabs(uv);
            }
            double ag = l.alpha_gate[e] / 256 * xf, au = l.alpha_up[e] / 256 * xf, bound = (c.hidden + 16) * ldexp(1, -23);
            double gd = g * ag, ud = u * au;
            if (r.limit > 0) gd = fmin(gd, r.limit), ud = fmin(fmax(ud, -r.limit), r.limit);
            double h = gd / (1 + exp(-gd)) * ud;
            /* h moves by |dh/dg| <= 1.1 |u| and |dh/du| <= |g| with the products' bounds, then some ulps, then the rounding to bf16 */
            double tol =
                1.1 * fabs(ud) * ga * fabs(ag) * bound + fabs(gd) * ua * fabs(au) * bound + fabs(h) * (wide ? 1e-6 : 0.00391) + 1e-30;
            double v = wide ? got.h_wide[p * ik + j] : __bfloat162float(got.h[p * ik + j]);
            worst_h = fmax(worst_h, fabs(v - h) / tol);
            if (!(fabs(v - h) <= tol)) worst_h = fmax(worst_h, 1e9);
        }
        for (int j = (int)(p % 5); j < c.hidden; j += 1 + c.hidden / 23) {
            double o = 0, oa = 0;
            for (int k = 0; k < c.intermediate; k++) {
                double v = __bfloat162float(got.h[p * ik + k]) * l.down[e].at(j, k);
                o += v, oa += fabs(v);
            }
            double a = l.alpha_down[e] / 256 * hf, tol = fabs(a) * oa * (c.intermediate + 16) * ldexp(1, -23) + 1e-30;
            double v = got.o[(size_t)s * c.hidden + j];
            worst_o = fmax(worst_o, fabs(v - o * a) <= tol ? fabs(v - o * a) / tol : 1e9);
        }
    }
    for (int t = 0; t < c.T; t++)
        for (int j = 0; j < c.hidden; j += 3) {
            float y = 0;
            double a = 0;
            for (int k = 0; k < c.k; k++)
                if (local[t * c.k + k] >= 0) {
                    float v = weights[t * c.k + k] * got.o[(size_t)(t * c.k + k) * c.hidden + j];
                    y += v, a += fabs(v);
                }
            double d = fabs(got.y[(size_t)t * c.hidden + j] - y), tol = a * 1e-6;
            worst_y = fmax(worst_y, d <= tol ? 0 : 1e9);
        }
    check(wrong_x == 0, c.name, "rounded x that differs", wrong_x, 0);
    check(wrong_h == 0, c.name, "rounded h that differs", wrong_h, 0);
    check(worst_h <= 1, c.name, "h, error over bound", worst_h, 1);
    check(worst_o <= 1, c.name, "o, error over bound", worst_o, 1);
    check(worst_y <= 1, c.name, "y", worst_y, 1);
    if (r.tile_columns == 8 || r.prefill_from)
        printf("%-22s %-6s columns %2d: h %.2f o %.2f of the bound; %d slots, %d tiles, %d of prefill\n", c.name,
               r.act == MOE4_ACT_W4A16    ? "w4a16"
               : r.act == MOE4_ACT_STATIC ? "static"
               : r.act == MOE4_ACT_TENSOR ? "tensor"
                                          : "token",
               r.tile_columns, worst_h, worst_o, got.state.n_slots, got.state.n_tiles, r.prefill_from ? got.state.n_prefill_tiles : 0);
}

/* Slots per expert around the widths of tiles. */
static const int edge_slots[] = {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 1000};
enum { N_EDGES = sizeof edge_slots / sizeof *edge_slots, EDGE_TOKENS = 2777 };

static int edge_expert(int token) {
    int e = 0;
    while (token >= edge_slots[e]) token -= edge_slots[e++];
    return e;
}

/* Experts with many slots by the prefill kernel, the others by decode: against fp64, twice the same bits, and the first half of the
 * tokens alone (in mode tensor it has other scales; elsewhere every expert's sums keep their order where all take one kernel). */
static void prefill_checks(const shape_case &c, moe4_layer_run r, const host_layer &l, const std::vector<float> &x,
                           const std::vector<int> &local, const std::vector<float> &weights, const float *d_weights) {
    for (int i = 0; i < 6; i++) {
        static const int widths[] = {80, 192, 256};
        int columns = widths[i / 2], from = i % 2 ? 20 : 1;
        if (least && (i % 2 == 0) != (columns == 256)) continue; /* all by prefill, or mixed */
        r.prefill_from = from;
        r.prefill_columns = columns;
        r.x_is_kept = columns == 192;
        outputs a = forward(r, true, d_weights), b = forward(r, true, d_weights);
        compare(c, r, l, a, x, local, weights);
        check(same(a.y, b.y), c.name, "y of prefill, repeated", from, 0);
        if (from == 1 && !r.x_is_kept) { /* the same by parts */
            moe4_layer_run parts = r;
            size_t slots = (size_t)c.T * c.k;
            parts.n_windows = slots < 64 ? 1 : columns == 80 ? 3 : 2;
            parts.window_slots = (int)((slots / parts.n_windows + 16) & ~(size_t)15);
            parts.n_slices = columns == 80 ? 1 : 3;
            outputs p = forward(parts, true, d_weights);
            check(same(a.y, p.y), c.name, "y by windows and slices", columns, 0);
        }
        int tiles = 0;
        for (int e = 0; e < c.n; e++)
            if (a.expert_slots[e] >= from) tiles += (a.expert_slots[e] + r.prefill_columns - 1) / r.prefill_columns;
        check(a.state.n_prefill_tiles == tiles, c.name, "prefill tiles", a.state.n_prefill_tiles, tiles);
        if (from > 1 || r.act == MOE4_ACT_TENSOR || c.T < 2) continue;
        moe4_layer_run half = r;
        half.n_tokens = c.T / 2;
        outputs h = forward(half, true, d_weights);
        check(memcmp(h.y.data(), a.y.data(), h.y.size() * sizeof(float)) == 0, c.name, "y of half the batch", from, 0);
    }
}

static void run_case(const shape_case &c, bool sm90) {
    host_layer l;
    moe4_layer_run r = {};
    r.w = make_layer(c, &l);
    r.n_tokens = c.T;
    r.top_k = c.k;
    r.first_expert = 3;
    r.ids_are_64bit = c.routing == 3;
    std::vector<int> local(c.T * c.k);
    std::vector<int32_t> ids32;
    std::vector<int64_t> ids64;
    for (int t = 0; t < c.T; t++)
        for (int k = 0; k < c.k; k++) {
            int e = c.routing == 1 ? 0 : c.routing == 4 ? edge_expert(t) : (int)((rnd() + k) % c.n);
            int64_t id = 3 + e;
            if (c.routing >= 2 && rnd() % 4 == 0) id = rnd() % 2 ? -1 : rnd() % 2 ? 3 + c.n : 2;
            if (c.routing == 3 && rnd() % 8 == 0) id = rnd() % 2 ? INT64_MIN : (1ll << 32) + 3;
            local[t * c.k + k] = id >= 3 && id < 3 + c.n ? (int)(id - 3) : -1;
            ids32.push_back((int32_t)id);
            ids64.push_back(id);
        }
    r.ids = c.routing == 3 ? (void *)to_device(ids64) : (void *)to_device(ids32);
    std::vector<float> x((size_t)c.T * c.hidden), weights(c.T * c.k);
    for (auto &v : x) v = bf16_round(rnd_normal());
    for (auto &v : weights) v = .1f + (float)(rnd() % 100) / 100.f;
    std::vector<__nv_bfloat16> xb(x.size());
    for (size_t i = 0; i < x.size(); i++) xb[i] = __float2bfloat16(x[i]);
    float *d_weights = to_device(weights), *x32 = to_device(x);
    __nv_bfloat16 *x16 = to_device(xb);
    const moe4_act acts[] = {MOE4_ACT_W4A16, MOE4_ACT_TOKEN, MOE4_ACT_STATIC, MOE4_ACT_TENSOR};
    for (moe4_act act : acts)
        for (int columns = 8; columns <= 32; columns += 8) {
            if (least && (columns != 16 || act == MOE4_ACT_STATIC)) continue;
            r.act = act;
            r.alpha = 1.f;
            r.limit = act == MOE4_ACT_TOKEN ? 2.f : 0.f;
            r.tile_columns = columns;
            r.x_in = columns == 8 ? (void *)x32 : (void *)x16;
            r.x_dtype = columns == 8 ? MOE4_F32 : MOE4_BF16;
            r.x_in_ld = (size_t)c.hidden;
            outputs a = forward(r, false, d_weights);
            compare(c, r, l, a, x, local, weights);
            for (int again = 0; sm90 && columns <= 24 && again < 2; again++) {
                outputs b = forward(r, true, d_weights);
                check(same(a.y, b.y), c.name, "y of sm_90 against portable", again, columns);
                size_t n = (size_t)a.state.n_slots * r.w.intermediate_units * 64;
                check(memcmp(a.h.data(), b.h.data(), n * 2) == 0, c.name, "h of sm_90 against portable", again, columns);
            }
            if (sm90 && columns == 16) prefill_checks(c, r, l, x, local, weights, d_weights);
        }
}

/* divide by each positive fp32 number, or by every step-th. */
static __global__ void divide_kernel(unsigned long long *n_wrong, uint32_t step) {
    unsigned long long wrong = 0;
    for (uint64_t i = 1 + (blockIdx.x * (uint64_t)blockDim.x + threadIdx.x) * step; i < 0x7F800000u;
         i += (uint64_t)gridDim.x * blockDim.x * step) {
        float b = __uint_as_float((uint32_t)i);
        wrong += divide(1.f, b) != __fdiv_rn(1.f, b);
        wrong += divide(2688.f, b) != __fdiv_rn(2688.f, b);
    }
    if (wrong) atomicAdd(n_wrong, wrong);
}

static void divide_checks(uint32_t step) {
    unsigned long long *n_wrong = poisoned<unsigned long long>(1);
    CUDA(cudaMemset(n_wrong, 0, sizeof *n_wrong));
    int blocks = step == 1 ? 2048 : 8;
    divide_kernel<<<blocks, 256>>>(n_wrong, step);
    CUDA(cudaGetLastError());
    unsigned long long wrong = to_host(n_wrong, 1)[0];
    check(wrong == 0, "divide", "quotients that are not the nearest", (double)wrong, 0);
    CUDA(cudaFree(n_wrong));
}

int main(int argc, char **argv) {
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    least = argc > 1 && strcmp(argv[1], "--least") == 0;
    cudaDeviceProp device;
    if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
        printf("check_cuda: skipped, no CUDA device\n");
        return 77;
    }
    bool sm90 = device.major == 9;
    printf("check_cuda: %s, compute capability %d.%d\n", device.name, device.major, device.minor);
    const shape_case cases[] = {
        {"tiny", 16, 16, 1, 1, 1, 0, false},
        {"one token", 512, 256, 4, 1, 2, 0, false},
        {"padded k and n", 208, 112, 3, 5, 2, 0, true},
        {"long k", 2048, 128, 2, 3, 1, 0, false},
        {"skipped slots", 256, 192, 6, 33, 3, 2, false},
        {"i64 ids", 128, 64, 5, 40, 4, 3, false},
        {"one hot expert", 320, 96, 4, 70, 2, 1, true},
        {"many experts", 64, 32, 300, 64, 6, 0, false},
        {"all scales", 1024, 512, 2, 9, 2, 0, true},
        {"24 slots an expert", 192, 336, 2, 24, 1, 1, false},
        {"25 slots an expert", 1168, 80, 2, 25, 1, 1, false},
        {"17 slots an expert", 1104, 1088, 2, 17, 1, 1, false},
        {"512 experts", 64, 48, 512, 130, 8, 0, false},
        {"h of more than 2048", 48, 2192, 2, 90, 1, 1, false},
        {"x of more than 8192", 8272, 48, 2, 65, 2, 0, false},
        {"2048 experts", 64, 16, 2048, 130, 8, 0, false},
        {"edges of tiles", 272, 144, N_EDGES, EDGE_TOKENS, 1, 4, false},
    };
    static const int slots[] = {1, 7, 8, 9, 15, 16, 23}; /* of the one expert that is hit; the cases above have 17, 24 and 25 */
    divide_checks(quick || least ? 1000003 : 1);
    if (least) run_case({"least", 80, 48, 2, 40, 1, 0, false}, sm90);
    for (int i = 0; i < 7 && !least; i++) run_case({"slots per expert", 80, 48, 3, slots[i], 1, 1, false}, sm90);
    int n = least ? 0 : quick ? 4 : (int)(sizeof cases / sizeof *cases);
    for (int i = 0; i < n; i++) run_case(cases[i], sm90);
    printf("check_cuda: %d checks, %d failed\n", n_checks, n_failed);
    return n_failed != 0;
}
