/* Routers: from logits to experts and weights. A block has one token: scores, the groups that may be chosen from, the k best one after
 * the other (ties to the lower index), their weights. Same order of operations as the CPU's. */
#include "kernels.h"

#include <math_constants.h>

#define THREADS 128
#define WARPS (THREADS / 32)

struct candidate {
    float value;
    int index;
};

static __device__ candidate better(candidate a, candidate b) {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

/* The best of the block's candidates, to all. */
static __device__ candidate block_best(candidate c) {
    __shared__ candidate warp_best[WARPS];
    for (int d = 16; d; d /= 2) {
        candidate other = {__shfl_xor_sync(0xFFFFFFFFu, c.value, d), __shfl_xor_sync(0xFFFFFFFFu, c.index, d)};
        c = better(c, other);
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) warp_best[threadIdx.x >> 5] = c;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) c = better(c, warp_best[w]);
    return c;
}

static __device__ candidate best_of(const float *v, int n) {
    candidate c = {-CUDART_INF_F, INT32_MAX};
    for (int i = threadIdx.x; i < n; i += THREADS) c = better(c, {v[i], i});
    return block_best(c);
}

/* score[e] = softmax(logits): the largest and the sum in the order of e, as the CPU sums. */
static __device__ void softmax(float *score, const float *logits, int n) {
    candidate most = best_of(logits, n);
    for (int e = threadIdx.x; e < n; e += THREADS) score[e] = expf(logits[e] - most.value);
    __syncthreads();
    float sum = 0;
    for (int e = 0; e < n; e++) sum += score[e];
    __syncthreads();
    for (int e = threadIdx.x; e < n; e += THREADS) score[e] /= sum;
}

/* What weighs (x) and what chooses (y); probability: the softmax where the kind has one. */
static __device__ float2 scores(const moe4_router_options &o, float l, float probability, float bias) {
    float s;
    switch (o.kind) {
    case MOE4_ROUTER_TOPK_SOFTMAX: return make_float2(l + bias, l + bias);
    case MOE4_ROUTER_SIGMOID_BIAS: s = 1.f / (1.f + expf(-l)); return make_float2(s, s + bias); /* the bias chooses, it never weighs */
    case MOE4_ROUTER_SIGMOID_TOP1: return make_float2(1.f / (1.f + expf(-l)), l);               /* sigmoids of large logits tie */
    case MOE4_ROUTER_SQRTSOFTPLUS_BIAS:
    case MOE4_ROUTER_HASH:
        l /= o.gate_temp;
        s = sqrtf(l > 20.f ? l : log1pf(expf(l)));
        return make_float2(s, s + bias);
    default: return make_float2(probability, probability);
    }
}

/* Only the experts of the topk_group best groups keep their choice; a group's score is the sum of its two best. */
static __device__ void limit_groups(float *choice, float *group_score, const moe4_router_options &o) {
    int n_group = (int)o.n_group, size = (int)(o.n_experts / o.n_group);
    for (int g = threadIdx.x; g < n_group; g += THREADS) {
        float first = -CUDART_INF_F, second = size > 1 ? -CUDART_INF_F : 0.f;
        for (int i = 0; i < size; i++) {
            float v = choice[g * size + i];
            if (v > first) {
                if (size > 1) second = first;
                first = v;
            } else if (v > second) {
                second = v;
            }
        }
        group_score[g] = first + second;
    }
    __syncthreads();
    for (size_t n = 0; n < o.topk_group; n++) {
        candidate c = best_of(group_score, n_group);
        if (threadIdx.x == 0) group_score[c.index] = -CUDART_INF_F;
        __syncthreads();
    }
    for (int e = threadIdx.x; e < n_group * size; e += THREADS)
        if (group_score[e / size] != -CUDART_INF_F) choice[e] = -CUDART_INF_F;
    __syncthreads();
}

/* The k best of the choices, one after the other. */
static __device__ void choose(int32_t *ids, float *choice_weight, float *choice, const float *score, int n, int k) {
    for (int j = 0; j < k; j++) {
        candidate c = best_of(choice, n);
        if (threadIdx.x == 0) {
            choice[c.index] = -CUDART_INF_F;
            ids[j] = c.index;
            choice_weight[j] = score[c.index];
        }
        __syncthreads();
    }
}

static __global__ void __launch_bounds__(THREADS)
    select_kernel(const __grid_constant__ moe4_selection s, const __grid_constant__ moe4_router_options o) {
    extern __shared__ float memory[];
    int n = (int)o.n_experts, k = (int)o.top_k;
    float *score = memory, *choice = memory + n, *group_score = memory + 2 * n, *choice_weight = group_score + o.n_group;
    size_t t = blockIdx.x;
    const float *logits = s.logits + t * o.n_experts, *bias = s.takes_alt_bias && s.takes_alt_bias[t] ? s.alt_bias : s.bias;
    int32_t *ids = s.ids + t * o.top_k;
    float *weights = s.weights + t * o.top_k;

    bool bad = s.table && (s.token_ids[t] < 0 || (size_t)s.token_ids[t] >= o.n_token_ids);
    for (int e = threadIdx.x; e < n; e += THREADS) bad |= !isfinite(logits[e]);
    if (__syncthreads_or(bad)) { /* experts must run for the row to come out NaN */
        for (int j = threadIdx.x; j < k; j += THREADS) {
            ids[j] = j;
            weights[j] = CUDART_NAN_F;
        }
        return;
    }
    if (o.kind == MOE4_ROUTER_SOFTMAX_TOPK) {
        softmax(score, logits, n);
        __syncthreads();
    }
    for (int e = threadIdx.x; e < n; e += THREADS) {
        float2 both = scores(o, logits[e], score[e], bias[e]);
        score[e] = both.x;
        choice[e] = both.y;
    }
    __syncthreads();
    if (o.topk_group < o.n_group) limit_groups(choice, group_score, o);

    if (s.table) {
        for (int j = threadIdx.x; j < k; j += THREADS) {
            ids[j] = s.table[(size_t)s.token_ids[t] * o.top_k + (size_t)j];
            choice_weight[j] = score[ids[j]];
        }
        __syncthreads();
    } else {
        choose(ids, choice_weight, choice, score, n, k);
    }
    if (o.kind == MOE4_ROUTER_TOPK_SOFTMAX) {
        softmax(choice_weight, choice_weight, k);
        __syncthreads();
    }
    float sum = o.kind == MOE4_ROUTER_SIGMOID_BIAS ? 1e-20f : 0.f;
    for (int j = 0; j < k; j++) sum += choice_weight[j];
    bool divide = o.normalize && sum > 0.f && o.kind != MOE4_ROUTER_TOPK_SOFTMAX;
    for (int j = threadIdx.x; j < k; j += THREADS) weights[j] = (divide ? choice_weight[j] / sum : choice_weight[j]) * o.scale;
}

cudaError_t moe4_cuda_select_topk(const moe4_selection *s, cudaStream_t stream) {
    const moe4_router_options *o = s->o;
    if (!s->n_tokens) return cudaSuccess;
    size_t shared_bytes = (2 * o->n_experts + o->n_group + o->top_k) * sizeof(float);
    if (shared_bytes > 40000) {
        cudaError_t error = cudaFuncSetAttribute(select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        if (error != cudaSuccess) return error;
    }
    select_kernel<<<(unsigned)s->n_tokens, THREADS, shared_bytes, stream>>>(*s, *o);
    return cudaGetLastError();
}
