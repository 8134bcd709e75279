/* Between gate/up and down: the activation, and what else may happen to h before it is rounded. */
#ifndef MOE4_CUDA_GATE_CUH
#define MOE4_CUDA_GATE_CUH

#include "activation.cuh"

/* SwiGLU and GELU in the CPU's order of operations. Comparisons rather than fminf: a NaN stays. */
static __device__ __forceinline__ float gated_unit(const moe4_layer_run &run, float g, float u) {
    if (run.limit > 0.f) {
        g = g > run.limit ? run.limit : g;
        u = u > run.limit ? run.limit : u < -run.limit ? -run.limit : u;
    }
    float s = run.alpha * g;
    if (run.activation == MOE4_GELU_TANH) s = 1.5957691216f * (g + 0.044715f * (g * g * g)); /* GELU(g) by tanh is g * sigmoid(2 z) */
    return g / (1.f + expf(-s)) * (u + run.beta);
}

static __device__ __forceinline__ float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

/* exp(x) within 2 ulp, for |x| <= 88: the product with log2(e) in two parts. */
static __device__ __forceinline__ float exponential(float x) {
    float hi = x * 1.44269502f, lo = fmaf(x, 1.44269502f, -hi) + x * 1.92596303e-8f, e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(hi));
    return fmaf(e, lo * 0.693147181f, e);
}

/* The smaller and the larger of two; a NaN stays. */
static __device__ __forceinline__ float min_or_nan(float a, float b) {
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
static __device__ __forceinline__ float max_or_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

/* gated_unit without branches and without a division, whose slow path is a call: no call may stand between wgmma. */
static __device__ __forceinline__ float fast_gated_unit(const moe4_layer_run &run, float g, float u) {
    float limit = run.limit > 0.f ? run.limit : __int_as_float(0x7F800000);
    g = min_or_nan(g, limit);
    u = max_or_nan(min_or_nan(u, limit), -limit);
    float s = run.alpha * g;
    if (run.activation == MOE4_GELU_TANH) s = 1.5957691216f * (g + 0.044715f * (g * g * g));
    return g * reciprocal(1.f + exponential(fminf(fmaxf(-s, -88.f), 88.f))) * (u + run.beta); /* a NaN is in g too */
}

/* h of one feature with every option; g is not read where there is no gate. Past the last feature sums are 0 and so is h. */
static __device__ __forceinline__ float any_unit(const moe4_layer_run &run, int expert, int slot, int feature, float g, float u) {
    if (feature >= run.w.intermediate) return 0.f;
    size_t at = (size_t)expert * (size_t)run.w.intermediate + (size_t)feature;
    if (run.w.bias_up) u += run.w.bias_up[at];
    float h;
    if (run.activation == MOE4_RELU2) {
        float r = u < 0.f ? 0.f : u;
        h = r * r;
    } else {
        if (run.w.bias_gate) g += run.w.bias_gate[at];
        h = gated_unit(run, g, u);
    }
    return run.weight_h ? h * run.weight_h[slot] : h;
}

static __device__ __forceinline__ moe4_act act_of_h(const moe4_layer_run &run) {
    return run.act_h == MOE4_ACT_DEFAULT ? run.act : run.act_h;
}

/* h where it goes. The result takes part in the row's h_amax, which is the caller's to keep. */
static __device__ __forceinline__ uint32_t store_any_h(const moe4_layer_run &run, int row, int feature, float h) {
    size_t at = (size_t)row * (size_t)(run.w.intermediate_units * MOE4_UNIT_K) + (size_t)feature;
    moe4_act act = act_of_h(run);
    if (act == MOE4_ACT_W4A16)
        run.h[at] = __float2bfloat16_rn(h);
    else /* what is not rounded must not bring an Inf into the product: its row comes out NaN */
        run.h_wide[at] = act == MOE4_ACT_BF16 && !isfinite(h) ? __uint_as_float(0x7FFFFFFFu) : h;
    return __float_as_uint(h) & 0x7FFFFFFFu;
}

#endif
