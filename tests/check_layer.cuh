/* What check_cuda computes on the host: the contract (docs/numerics.md), and a random layer that is packed on the device. */
#ifndef MOE4_CHECK_LAYER_CUH
#define MOE4_CHECK_LAYER_CUH

#include <math.h>
#include <string.h>

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

#endif
