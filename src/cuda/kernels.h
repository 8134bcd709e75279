/* What the kernels of the CUDA part share: the arguments of a layer's run, and the launchers. Every pointer is device memory. The
 * launchers allocate nothing, wait for nothing and read nothing back, so a stream that captures a graph may be given to them. */
#ifndef MOE4_CUDA_KERNELS_H
#define MOE4_CUDA_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>
typedef __nv_bfloat16 moe4_bf16;
#else
#include <cuda_runtime_api.h>
typedef uint16_t moe4_bf16; /* the same bits; the host never reads them */
#endif

#include "../nvfp4.h"

/* Up to `n` slots of one expert that run as columns of the same product. The tiles of an expert are neighbours in the list. */
struct moe4_tile {
    int expert;  /* local */
    int first;   /* its first row in the order sorted by expert */
    int n;       /* columns, at most moe4_layer_run.tile_columns */
    int head;    /* index of the expert's first tile */
    int n_tiles; /* of the expert */
};

/* At the start of a run's workspace; dispatch sets all of it. */
struct moe4_run_state {
    const void *owner; /* whose workspace this is, for the report */
    int n_tokens;
    int n_tiles;
    int n_slots;
    int n_experts_hit;
    int ticket; /* next work item of the persistent kernel */
};

/* Packed matrices of n experts (nvfp4.cuh has the layout). alpha = global scale * MOE4_DECODE_FACTOR. */
struct moe4_packed_experts {
    const uint8_t *gate_up; /* gate_up_tiles row tiles an expert: rows 16i+g gate, 16i+8+g up of feature 8i+g */
    const uint8_t *down;
    size_t gate_up_bytes, down_bytes; /* of one expert */
    int n;
    int hidden, intermediate;
    int hidden_units, intermediate_units; /* K / 64, rounded up */
    int gate_up_tiles, down_tiles;
    const float *alpha_gate, *alpha_up, *alpha_down; /* [n] */
    const float *scale_x, *scale_h;                  /* [n], the input scales of mode static */
};

/* A run of a layer over n_tokens x top_k slots. Activations are bf16: rounded to bf16 in w4a16, exact values e2m1 * scale otherwise, and
 * then a row's global scale is its factor. Rows are padded with zeros to a multiple of 64. */
struct moe4_layer_run {
    struct moe4_packed_experts w;
    moe4_act act; /* W4A16, STATIC, TENSOR or TOKEN */
    moe4_activation activation;
    float alpha, beta, limit; /* its parameters; no limit: 0 */
    int n_tokens, top_k;
    int tile_columns; /* 8, 16 or 32 */

    const void *owner; /* goes into the state */
    int x_is_ready;    /* another run has rounded x */

    const void *ids; /* [n_tokens, top_k]; NULL: every slot is expert 0 */
    int ids_are_64bit;
    int64_t first_expert;

    const void *x_in; /* [n_tokens, hidden] as the caller has it */
    moe4_dtype x_dtype;
    size_t x_in_ld;

    /* workspace */
    struct moe4_run_state *state;
    struct moe4_tile *tiles; /* [max_tiles] */
    int max_tiles;
    int *slots;        /* [n_slots] sorted by expert: token * top_k + k */
    int *expert_slots; /* [n] slots of each expert */
    moe4_bf16 *x;      /* [n_tokens, hidden_units * 64]; in STATIC [n_tokens * top_k, …] */
    float *x_factor;   /* one per row of x; NULL in W4A16 */
    int *x_saturated;  /* one per row of x: blocks whose scale was past what E4M3 holds */
    int *x_bad;        /* [n_tokens]: the row has a NaN or Inf */
    uint32_t *x_amax;  /* TENSOR: one */
    float *h_wide;     /* [n_tokens * top_k, intermediate_units * 64] fp32, sorted rows; NULL in W4A16 */
    uint32_t *h_amax;  /* one per sorted row, bits of the largest |h|, and one for TENSOR; NULL in W4A16 */
    moe4_bf16 *h;      /* [n_tokens * top_k, intermediate_units * 64], sorted rows */
    float *h_factor;   /* one per sorted row; NULL in W4A16 */
    int *h_saturated;  /* one per sorted row */
    int *done;         /* [max_tiles] gate/up items that have finished */
    int *ready;        /* [max_tiles] 1: the rows of h may be read */
    float *o;          /* [n_tokens * top_k, hidden] by slot: the experts' outputs */
};

#ifdef __cplusplus
extern "C" {
#endif

/* packed[expert] from linear codes [rows, cols/2] and scales [rows, cols/16], 8-byte aligned. Row i of the matrix becomes packed row
 * i + shift(i): interleave 0: i; 1: 16 (i/8) + i%8 (gate); 2: the same + 8 (up). The caller zeroes `packed` where padding is. */
cudaError_t moe4_cuda_pack(uint8_t *packed, const uint8_t *codes, const uint8_t *scales, int rows, int cols, int interleave,
                           cudaStream_t stream);
/* values[rows, cols] = the bf16 e2m1 * scale that the products see, row-major and unpermuted: for tests. */
cudaError_t moe4_cuda_unpack(moe4_bf16 *values, const uint8_t *packed, int rows, int cols, int interleave, cudaStream_t stream);

/* Sorts the slots by expert, stable, and lists the tiles; rounds x. One kernel, but in TENSOR two. */
cudaError_t moe4_cuda_prepare(const struct moe4_layer_run *run, cudaStream_t stream);
/* h from h_wide where that is a step of its own (TENSOR). */
cudaError_t moe4_cuda_quantize_h(const struct moe4_layer_run *run, cudaStream_t stream);

/* The products, any GPU from sm_80 on: h (or h_wide) from x; o from h. */
cudaError_t moe4_cuda_gate_up(const struct moe4_layer_run *run, cudaStream_t stream);
cudaError_t moe4_cuda_down(const struct moe4_layer_run *run, cudaStream_t stream);
/* The same on sm_90: gate/up, SwiGLU, the rounding of h and down in one persistent kernel (phases 3), or one of both (1, 2). */
enum { MOE4_PHASE_GATE_UP = 1, MOE4_PHASE_DOWN = 2 };
cudaError_t moe4_cuda_decode_sm90(const struct moe4_layer_run *run, int phases, int n_sms, cudaStream_t stream);

/* y[T, hidden] = the sum over a token's slots of weight * o, in slot order, then `shared` [T, hidden] (or NULL); one rounding. */
cudaError_t moe4_cuda_combine(const struct moe4_layer_run *run, void *y, moe4_dtype y_dtype, size_t y_ld, const float *weights,
                              const float *shared, cudaStream_t stream);

/* ids [T,k], weights [T,k] from logits [T,E]; bias [E] is host memory; E at most MOE4_MAX_DEVICE_ROUTES. */
#define MOE4_MAX_DEVICE_ROUTES 3840
cudaError_t moe4_cuda_select_topk(int32_t *ids, float *weights, const float *logits, size_t n_tokens, const moe4_router_options *o,
                                  const float *bias, cudaStream_t stream);

/* y[T,N] = x[T,K] @ w[N,K]^T for unquantized weights: fp32 products and sums, whose order depends on K alone. */
struct moe4_wide_product {
    void *y;
    const void *x, *w;
    moe4_dtype y_dtype, x_dtype, w_dtype;
    size_t x_ld;
    int T, N, K;
};
cudaError_t moe4_cuda_wide(const struct moe4_wide_product *p, cudaStream_t stream);

/* *first_bad = the lowest index of a byte above 0x7E in scale[n], or UINT64_MAX. */
cudaError_t moe4_cuda_find_bad_scale(unsigned long long *first_bad, const uint8_t *scale, size_t n, cudaStream_t stream);

/* codec.cu: amax [1 or rows] as bits; codes and scales; values; the lowest index of a NaN or Inf of x, or of a bad scale. */
cudaError_t moe4_cuda_codec_amax(const moe4_codec_call *c, uint32_t *amax, cudaStream_t stream);
cudaError_t moe4_cuda_codec_quantize(const moe4_codec_call *c, const moe4_codec_scale *scales, unsigned long long *n_saturated,
                                     cudaStream_t stream);
cudaError_t moe4_cuda_codec_dequantize(const moe4_codec_call *c, const float *globals, cudaStream_t stream);
cudaError_t moe4_cuda_codec_find(const moe4_codec_call *c, int of_scales, unsigned long long *first_bad, cudaStream_t stream);
cudaError_t moe4_cuda_scales_convert(const moe4_scales_conversion *s, cudaStream_t stream);

/* Reads `bytes` of memory (a multiple of 64 KiB; out is never written), and fills memory with numbers: ceilings are measured so. */
cudaError_t moe4_cuda_read(const void *data, size_t bytes, int n_blocks, uint32_t *out, cudaStream_t stream);
cudaError_t moe4_cuda_fill(moe4_bf16 *data, size_t n, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
