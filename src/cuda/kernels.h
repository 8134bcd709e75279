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
#include "nvfp4_layout.h"

/* Where a run's tiles have few columns, `prepare` fills h_wide with words that no result has: who waits for a row reads it until none is
 * left. That spares a fence and a flag between blocks, whose latency a call for one token sees. */
#ifdef __CUDACC__
#define MOE4_ON_DEVICE __host__ __device__
#else
#define MOE4_ON_DEVICE
#endif
#define MOE4_MARK 0xFFFFFFFFu
#define MOE4_MARKED_COLUMNS 8

/* Up to `n` slots of one expert that run as columns of the same product. The tiles of an expert are neighbours in the list. */
struct moe4_tile {
    int expert;  /* local */
    int first;   /* its first row in the order sorted by expert */
    int n;       /* columns, at most moe4_layer_run.tile_columns */
    int head;    /* index of the expert's first tile */
    int n_tiles; /* of the expert */
};

/* Where a slot's row of x stands in x_tiles. */
struct moe4_prefill_place {
    int base;              /* column at which its tile begins; -1: the slot is not the prefill kernel's */
    uint8_t column, steps; /* in the tile; its columns / 16, rounded up */
    uint16_t window;
};

/* Which slots an expert has. */
enum moe4_slots {
    MOE4_SLOTS_BY_ID = 0, /* slot token * top_k + k is the expert's that `ids` names */
    MOE4_SLOTS_SORTED,    /* slots are rows: row_start[e] .. row_start[e + 1] are expert e's */
    MOE4_SLOTS_BATCHED,   /* slots are rows: the first expert_slots[e] of e * max_rows .. are expert e's */
    MOE4_SLOTS_DIAGONAL   /* slot row * n + e is expert e's: each row has columns for every expert */
};

/* At the start of a run's workspace; dispatch sets all of it. */
struct moe4_run_state {
    const void *owner; /* whose workspace this is, for the report */
    int n_tokens;
    int n_tiles;
    int n_slots;
    int n_experts_hit;
    int ticket;   /* next work item of the persistent kernel */
    int by_rows;  /* a call with rows that stand with their experts, n_tokens of them, */
    int n_summed; /* into so many tokens */
    int n_prefill_tiles, prefill_ticket;
    int rounds_posted, rounds_taken; /* parts of h that the prefill kernel rounds */
};

/* Matrices of n experts, packed (nvfp4.cuh has the layout): alpha = global scale * MOE4_DECODE_FACTOR. Unquantized ones, when the run's
 * act (for gate and up) or act_h (for down) is BF16, are row-major, padded with zeros to whole units: gate, then up; alpha 1. */
struct moe4_packed_experts {
    const uint8_t *gate_up; /* gate_up_tiles row tiles an expert: rows 16i+g gate, 16i+8+g up of feature 8i+g; RELU2: rows of up */
    const uint8_t *down;
    moe4_dtype up_dtype, down_dtype;  /* of unquantized ones */
    size_t gate_up_bytes, down_bytes; /* of one expert */
    int n;
    int hidden, intermediate;
    int hidden_units, intermediate_units; /* K / 64, rounded up */
    int gate_up_tiles, down_tiles;
    const float *alpha_gate, *alpha_up, *alpha_down; /* [n] */
    const float *scale_x, *scale_h;                  /* [n], the input scales of mode static */
    const float *bias_gate, *bias_up, *bias_down;    /* [n, intermediate], the same, [n, hidden]; or NULL */
};

/* A run of a layer over n_tokens x top_k slots. Activations are bf16: rounded to bf16 in w4a16, exact values e2m1 * scale otherwise, and
 * then a row's global scale is its factor. Rows are padded with zeros to a multiple of 64. */
struct moe4_layer_run {
    struct moe4_packed_experts w;
    moe4_act act;   /* W4A16, STATIC, TENSOR or TOKEN; BF16: gate and up are unquantized, x_wide and h_wide fp32 */
    moe4_act act_h; /* of down, where it is another; DEFAULT: the same */
    moe4_activation activation;
    float alpha, beta, limit; /* its parameters; no limit: 0 */
    int n_tokens, top_k;
    int tile_columns;    /* 8, 16, 24 or 32 */
    int prefill_from;    /* slots from which an expert's products are the prefill kernel's; 0: never */
    int prefill_columns; /* 80, 192 or 256: of its tiles */

    const void *owner; /* goes into the state */
    int x_is_ready;    /* another run has rounded x */
    int x_is_kept;     /* and reads every row of x */

    const void *ids; /* [n_tokens, top_k]; NULL: every slot is expert 0 */
    int ids_are_64bit;
    int64_t first_expert;

    enum moe4_slots slots_are;
    const int32_t *given; /* SORTED: offsets [n + 1]; BATCHED: counts [n]; whatever they hold */
    int max_rows;         /* BATCHED */
    int n_summed;
    int x_by_slot; /* slots of a token round its row each in their own way; in STATIC they do anyway */
    int h_is_weighted;
    const float *weight_x, *weight_h; /* by slot, on x or on h before they are rounded; or NULL */

    const void *x_in; /* [n_tokens, hidden] as the caller has it */
    moe4_dtype x_dtype;
    size_t x_in_ld;
    moe4_nvfp4_rows x_rows; /* x_dtype NVFP4: instead of x_in */

    /* workspace */
    struct moe4_run_state *state;
    struct moe4_tile *tiles; /* [max_tiles] */
    int max_tiles;
    int *slots;        /* [n_slots] sorted by expert: token * top_k + k */
    int *expert_slots; /* [n] slots of each expert */
    int *share_counts; /* [MOE4_SHARES, n] for very many slots */
    int *row_start;    /* [n + 1], SORTED: the offsets, in order and in range; NULL by id */
    moe4_bf16 *x;      /* [n_tokens, hidden_units * 64]; [n_tokens * top_k, …] where slots of a token round it differently */
    float *x_wide;     /* BF16: instead of x */
    float *x_factor;   /* one per row of x; NULL in W4A16 and BF16, but for rows that came in NVFP4 */
    int *x_saturated;  /* one per row of x: blocks whose scale was past what E4M3 holds */
    int *x_bad;        /* [n_tokens]: the row has a NaN or Inf; round_rows: one per row of x */
    uint32_t *x_amax;  /* TENSOR: one; [n] for DIAGONAL */
    float *h_wide;     /* [n_tokens * top_k, intermediate_units * 64] fp32, sorted rows; NULL in W4A16 */
    uint32_t *h_amax;  /* one per sorted row, bits of the largest |h|, and one for TENSOR; NULL in W4A16 and BF16 */
    moe4_bf16 *h;      /* [n_tokens * top_k, intermediate_units * 64], sorted rows */
    float *h_factor;   /* one per sorted row; NULL in W4A16 */
    int *h_saturated;  /* one per sorted row */
    int *done;         /* [max_tiles] gate/up items that have finished */
    int *ready;        /* [max_tiles] 1: the rows of h may be read */
    float *o;          /* [n_tokens * top_k, hidden] by slot: the experts' outputs */

    /* Where the prefill kernel's rows are y at once, with bias and weight: slot s is row s / top_k, DIAGONAL: columns from s % top_k *
     * hidden on. y NULL: they go to o. */
    struct moe4_result {
        void *y;
        moe4_dtype dtype;
        size_t ld;
        const float *weights; /* by slot, where top_k is 1; or NULL */
    } result;

    /* where experts may take the prefill kernel */
    struct moe4_tile *prefill_tiles; /* [max_prefill_tiles]; the other list has the other experts' */
    int max_prefill_tiles;
    int *prefill_done;                   /* [max_prefill_tiles] gate/up items that have finished, and parts that are rounded */
    struct moe4_prefill_place *x_places; /* [n_slots], by slot */
    /* A large batch whose experts all take it goes by windows of its sorted slots, of which x_tiles has one at a time, and by slices of
     * down's rows, of which o has one at a time, in the same memory. 0 windows: neither. */
    int may_slice;
    int n_windows, window; /* how many; the one that the launchers are for */
    int window_slots;      /* a tile belongs to the window where its first slot is */
    int n_slices;
    struct moe4_run_state *window_state; /* [n_windows], in place of state for gate/up, */
    struct moe4_tile *window_tiles;      /* [n_windows, max_prefill_tiles], and of prefill_tiles */
    moe4_bf16 *x_tiles, *h_tiles;        /* x and h of those tiles, in the layout of prefill.cuh: moe4_prefill_rows(…) rows of padded K */
    int *prefill_rounds;                 /* [moe4_prefill_parts(…)] 0, or which tile's part has been posted; NULL where it rounds none */
};

/* h_wide is full of marks after `prepare`. */
static inline MOE4_ON_DEVICE int moe4_cuda_marks_h(const struct moe4_layer_run *run) {
    return run->h_wide && run->tile_columns <= MOE4_MARKED_COLUMNS && run->act != MOE4_ACT_TENSOR && run->act != MOE4_ACT_BF16 &&
           run->slots_are == MOE4_SLOTS_BY_ID;
}

/* `prepare` puts rows of x into the prefill kernel's tiles. */
static inline MOE4_ON_DEVICE int moe4_cuda_tiles_x(const struct moe4_layer_run *run) {
    return run->prefill_from && !run->x_is_ready && run->slots_are == MOE4_SLOTS_BY_ID && !run->x_by_slot && run->act != MOE4_ACT_BF16 &&
           run->x_dtype != MOE4_NVFP4;
}

/* Slots of a share that `prepare` counts first where there are very many; 0: it does not. At most MOE4_SHARES of them. */
#define MOE4_SHARES 64
static inline MOE4_ON_DEVICE int moe4_cuda_share_slots(const struct moe4_layer_run *run) {
    int64_t slots = (int64_t)run->n_tokens * run->top_k, share = (slots + MOE4_SHARES - 1) / MOE4_SHARES;
    return slots <= 8192 ? 0 : (int)(share < 512 ? 512 : share);
}

/* Gate and up with something that only the portable kernel does. */
static inline int moe4_cuda_has_options(const struct moe4_layer_run *run) {
    return run->w.bias_gate || run->w.bias_up || run->activation == MOE4_RELU2 || run->h_is_weighted ||
           (run->act_h != MOE4_ACT_DEFAULT && run->act_h != run->act);
}

/* Every row of x has one slot, so that round_rows puts those of experts that the prefill kernel takes into its tiles at once. */
static inline MOE4_ON_DEVICE int moe4_cuda_rows_are_slots(const struct moe4_layer_run *run) {
    return run->slots_are != MOE4_SLOTS_BY_ID || run->x_by_slot || run->act == MOE4_ACT_STATIC || !run->ids;
}

/* Columns that all tiles of a run may need, their padding included. */
static inline size_t moe4_prefill_rows(size_t n_slots, size_t n_experts) {
    return n_slots + 15 * n_experts + 16;
}

/* Parts of tiles whose h is rounded, and at most how many a tile has. */
#define MOE4_MOST_ROUND_PARTS 16
static inline MOE4_ON_DEVICE size_t moe4_prefill_parts(size_t n_slots, size_t n_tiles) {
    return n_slots / 16 + n_tiles;
}

/* The run for gate/up of a window, and for down of a slice, whose o has a slice's width. */
#define MOE4_MAX_WINDOWS 16
static inline struct moe4_layer_run moe4_cuda_window(const struct moe4_layer_run *run, int window) {
    struct moe4_layer_run r = *run;
    if (!run->n_windows) return r;
    size_t before = (size_t)window * (size_t)run->window_slots * (size_t)(run->w.hidden_units * MOE4_UNIT_K);
    r.window = window;
    r.state = run->window_state + window;
    r.prefill_tiles = run->window_tiles + (size_t)window * (size_t)run->max_prefill_tiles;
    r.x_tiles = (moe4_bf16 *)((uintptr_t)run->x_tiles - before * sizeof *r.x_tiles); /* its first column is not the run's first */
    return r;
}
static inline int moe4_cuda_slice_tiles(const struct moe4_layer_run *run) {
    return (run->w.down_tiles + run->n_slices - 1) / run->n_slices;
}
static inline struct moe4_layer_run moe4_cuda_slice(const struct moe4_layer_run *run, int slice) {
    struct moe4_layer_run r = *run;
    int first = slice * moe4_cuda_slice_tiles(run), rows = run->w.hidden - first * MOE4_UNIT_ROWS, most = moe4_cuda_slice_tiles(run);
    r.w.down += (size_t)first * (size_t)run->w.intermediate_units * MOE4_UNIT_BYTES;
    r.w.down_tiles = run->w.down_tiles - first < most ? run->w.down_tiles - first : most;
    r.w.hidden = rows < most * MOE4_UNIT_ROWS ? rows : most * MOE4_UNIT_ROWS;
    return r;
}

#ifdef __cplusplus
extern "C" {
#endif

/* packed[expert] from linear codes [rows, cols/2] and scales [rows, cols/16], 8-byte aligned. Row i of the matrix becomes packed row
 * i + shift(i): interleave 0: i; 1: 16 (i/8) + i%8 (gate); 2: the same + 8 (up). The caller zeroes `packed` where padding is. */
cudaError_t moe4_cuda_pack(uint8_t *packed, const uint8_t *codes, const uint8_t *scales, int rows, int cols, int interleave,
                           cudaStream_t stream);
/* values[rows, cols] = the bf16 e2m1 * scale that the products see, row-major and unpermuted; at a multiple of 16 bytes. */
cudaError_t moe4_cuda_unpack(moe4_bf16 *values, const uint8_t *packed, int rows, int cols, int interleave, cudaStream_t stream);

/* Sorts the slots by expert, stable, and lists the tiles; rounds x. Up to four kernels: TENSOR has one before, very many slots another,
 * rows of the prefill kernel's tiles mostly one of their own. */
cudaError_t moe4_cuda_prepare(const struct moe4_layer_run *run, cudaStream_t stream);
/* The same in two steps for every other kind of slots and of rounding. Place lists the slots and tiles of rows that stand with their
 * experts, or of one expert that has them all; round takes weights, rows that are NVFP4 already, and unquantized experts. After prepare of
 * a run whose x is ready, round serves slots by id. */
cudaError_t moe4_cuda_place_rows(const struct moe4_layer_run *run, cudaStream_t stream);
cudaError_t moe4_cuda_round_rows(const struct moe4_layer_run *run, cudaStream_t stream);
/* Rows of x into the tiles of the run's window, where it is not the first: prepare did that. */
cudaError_t moe4_cuda_tile_rows(const struct moe4_layer_run *run, cudaStream_t stream);
/* h from h_wide where that is a step of its own (TENSOR). */
cudaError_t moe4_cuda_quantize_h(const struct moe4_layer_run *run, cudaStream_t stream);

/* The products, any GPU from sm_80 on: h (or h_wide) from x; o from h. Biases of gate and up, every activation, weights on h. */
cudaError_t moe4_cuda_gate_up(const struct moe4_layer_run *run, cudaStream_t stream);
cudaError_t moe4_cuda_down(const struct moe4_layer_run *run, cudaStream_t stream);
/* The same for unquantized experts, in fp32. */
cudaError_t moe4_cuda_gate_up_wide(const struct moe4_layer_run *run, cudaStream_t stream);
cudaError_t moe4_cuda_down_wide(const struct moe4_layer_run *run, cudaStream_t stream);
/* The same on sm_90: gate/up, SwiGLU, the rounding of h and down in one persistent kernel (phases 3), or one of both (1, 2). */
enum { MOE4_PHASE_GATE_UP = 1, MOE4_PHASE_DOWN = 2 };
cudaError_t moe4_cuda_decode_sm90(const struct moe4_layer_run *run, int phases, int n_sms, cudaStream_t stream);

/* x_tiles from x, whose rows have `units` units of 64 k. */
cudaError_t moe4_cuda_prefill_gather(const struct moe4_layer_run *run, int units, cudaStream_t stream);
/* The same products for the tiles of prefill_tiles. A launch of both phases rounds h in between, in STATIC and TOKEN; where gate/up goes by
 * itself, it leaves h in h_wide for a rounding that is a step of its own. */
cudaError_t moe4_cuda_prefill_sm90(const struct moe4_layer_run *run, int phases, int n_sms, cudaStream_t stream);
cudaError_t moe4_cuda_prefill_h_amax(const struct moe4_layer_run *run, cudaStream_t stream); /* TENSOR: before moe4_cuda_quantize_h */
cudaError_t moe4_cuda_prefill_quantize_h(const struct moe4_layer_run *run, cudaStream_t stream);

/* y[T, hidden] = the sum over a token's slots of weight * o, in slot order, then `shared` [T, shared_ld] (or NULL); one rounding. */
cudaError_t moe4_cuda_combine(const struct moe4_layer_run *run, void *y, moe4_dtype y_dtype, size_t y_ld, const float *weights,
                              const float *shared, size_t shared_ld, cudaStream_t stream);

/* The other ends of a run, where `o` gets the bias of down. Each slot's weight * o goes to its own row of y (DIAGONAL: its own columns); or
 * token t's are summed: in the order of its slots, then the shared expert's, or in the order of its rows in a list that
 * moe4_cuda_list_rows makes of row_token. */
struct moe4_combine {
    const struct moe4_layer_run *run;
    void *y;
    moe4_dtype y_dtype;
    size_t y_ld;
    const float *weights;              /* by slot; NULL: 1 */
    const float *shared, *shared_bias; /* [n_tokens, hidden], [hidden]; or NULL */
    const int32_t *row_token;          /* by slot; NULL: slots by id */
    int n_tokens;                      /* of y */
    int *token_start, *token_rows;     /* workspace: [n_tokens + 1], [rows of the run] */
};
cudaError_t moe4_cuda_combine_rows(const struct moe4_combine *c, cudaStream_t stream);
cudaError_t moe4_cuda_list_rows(const struct moe4_combine *c, cudaStream_t stream);
cudaError_t moe4_cuda_combine_tokens(const struct moe4_combine *c, cudaStream_t stream);

/* ids [T,k], weights [T,k] from logits [T,E]. */
struct moe4_selection {
    int32_t *ids;
    float *weights;
    const float *logits;
    const moe4_router_options *o;     /* host memory; its table is not read */
    const float *bias, *alt_bias;     /* [E] */
    const uint8_t *takes_alt_bias;    /* [T], or NULL */
    const int32_t *token_ids, *table; /* HASH: [T]; [n_token_ids, k] */
    size_t n_tokens;
};
cudaError_t moe4_cuda_select_topk(const struct moe4_selection *s, cudaStream_t stream);

/* y[T,N] = x[T,K] @ w[N,K]^T * factor[T] + bias[N] for unquantized weights: fp32 products and sums, whose order depends on K alone. */
struct moe4_wide_product {
    void *y;
    const void *x, *w;
    const float *factor, *bias; /* or NULL */
    moe4_dtype y_dtype, x_dtype, w_dtype;
    size_t x_ld;
    int T, N, K;
};
cudaError_t moe4_cuda_wide(const struct moe4_wide_product *p, cudaStream_t stream);

/* y[n_rows, N] after y = x[n_rows, K] @ w^T, x bf16: the rows whose x has a NaN or infinity are filled with NaNs. */
struct moe4_rows_check {
    void *y;
    moe4_dtype y_dtype; /* F32 or BF16 */
    size_t y_ld;
    const void *x;
    size_t x_ld;
    int n_rows, N, K;
};
cudaError_t moe4_cuda_settle_rows(const struct moe4_rows_check *c, cudaStream_t stream);

/* *first_bad = the lowest index of a byte above 0x7E in scale[n], or UINT64_MAX. */
cudaError_t moe4_cuda_find_bad_scale(unsigned long long *first_bad, const uint8_t *scale, size_t n, cudaStream_t stream);

#define MOE4_CODEC_TASK 512 /* elements of a row that a warp takes at once */
#define MOE4_MAX_CODEC_TASKS (1u << 31)
/* codec_*.cu: amax [1 or rows] as bits; codes and scales; values; the lowest index of a NaN or Inf of x, or of a bad scale. */
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
