/* What a backend is: a table of stages. moe.c, linear.c and router.c name the stages in order; src/cpu fills the table, a device's
 * plug-in fills another. Buffers in a call are the backend's (host or device memory). */
#ifndef MOE4_BACKEND_H
#define MOE4_BACKEND_H

#include "internal.h"
#include "nvfp4.h"

/* Experts of one shape and one format: a layer's routed ones, or its shared one. */
struct moe4_experts {
    size_t n, hidden, intermediate;
    moe4_expert *expert; /* [n]; the global of an unquantized matrix is 1 */
    struct moe4_wide {
        void *gate, *up, *down; /* values of FP8 matrices; NULL for others */
    } * wide;                   /* [n] */
    moe4_act act_x, act_h;      /* what the input of gate/up and of down is rounded to */
    void *prepared;             /* the backend's: packed weights and the kernels that read them */
};

enum { MOE4_MAX_GROUPS = 2 };

struct moe4_moe {
    moe4_ctx *ctx;
    moe4_moe_options o; /* resolved: nothing left at "default" */
    size_t hidden;
    struct moe4_experts group[MOE4_MAX_GROUPS]; /* routed; then the shared one, if there is one */
    size_t n_groups;
    const moe4_checkpoint *ckpt; /* whose files forward calls look at, or NULL */
};

struct moe4_moe_call {
    const moe4_moe *moe;
    void *y;
    const void *x, *ids;
    const float *weights;
    size_t n_tokens;
    void *workspace;
    void *stream;

    /* Rows that stand with their experts already, instead of ids: offsets (sorted) or counts (batched). */
    bool by_rows;
    const int32_t *offsets, *counts;
    size_t max_rows;          /* batched */
    const int32_t *row_token; /* sorted: y is [n_tokens, hidden], summed; or NULL */
    size_t n_rows;            /* of x */
};

struct moe4_linear {
    moe4_ctx *ctx;
    moe4_linear_options o;
    size_t cols;
    float input_scale;   /* STATIC: the largest of the weights' */
    moe4_weight *weight; /* the global of an unquantized matrix is 1 */
    void **wide;         /* [n_weights]: values of FP8 matrices; NULL for others */
    size_t n_weights;
    void *prepared;
};

struct moe4_linear_call {
    const moe4_linear *linear;
    void *const *y;
    uint64_t *n_saturated;
    const void *x;
    size_t n_tokens;
    void *workspace;
    void *stream;
};

enum { MOE4_MAX_EXPERTS = 4096 };

struct moe4_grouped {
    moe4_ctx *ctx;
    moe4_grouped_options o;
    size_t rows, cols; /* of each matrix */
    moe4_weight *weight;
    void **wide; /* as moe4_linear's */
    size_t n_groups;
    void *prepared;
};

struct moe4_grouped_call {
    const moe4_grouped *grouped;
    void *y;
    uint64_t *n_saturated;
    const void *x;
    const int32_t *offsets; /* NULL: block-diagonal */
    size_t n_rows;
    void *workspace;
    void *stream;
};

struct moe4_router {
    moe4_ctx *ctx;
    moe4_router_options o;
    moe4_linear *logits;         /* NULL without gate weights */
    float *bias;                 /* [n_experts] */
    float *alt_bias;             /* [n_experts], or NULL */
    const moe4_checkpoint *ckpt; /* as moe4_moe's */
    void *prepared;              /* a device's */
};

struct moe4_select_call {
    const moe4_router *router;
    int32_t *topk_ids;
    float *topk_weights;
    const float *logits;
    const int32_t *token_ids;
    const uint8_t *alt_bias; /* non-zero: by the second bias; NULL: none */
    size_t n_tokens;
    void *stream;
};

enum moe4_owner { MOE4_OF_HOST, MOE4_OF_DEVICE, MOE4_OF_BOTH /* pinned or managed */ };

struct moe4_backend {
    const char *name;

    bool is_device; /* buffers of a call are device memory: the host looks into none, what it would check is checked there */
    moe4_status (*experts_prepare)(moe4_ctx *ctx, struct moe4_experts *experts);
    void (*experts_release)(moe4_ctx *ctx, struct moe4_experts *experts);
    /* experts->expert[e] has other weights; on failure the backend still has the old ones. */
    moe4_status (*expert_replaced)(moe4_ctx *ctx, struct moe4_experts *experts, size_t e);
    bool (*moe_bytes)(size_t *bytes, const struct moe4_moe_call *call); /* of its sizes; false: does not fit a size_t */

    moe4_status (*begin)(const struct moe4_moe_call *call); /* carves the workspace; the same walk as moe_bytes */
    moe4_status (*dispatch)(const struct moe4_moe_call *call);
    moe4_status (*quantize_x)(const struct moe4_moe_call *call);
    moe4_status (*gate_up)(const struct moe4_moe_call *call);
    moe4_status (*quantize_h)(const struct moe4_moe_call *call);
    moe4_status (*down)(const struct moe4_moe_call *call);
    moe4_status (*combine)(const struct moe4_moe_call *call);
    moe4_status (*report)(const struct moe4_moe_call *call, moe4_moe_report *report, uint64_t *tokens_per_expert);

    moe4_status (*linear_prepare)(moe4_linear *linear);
    void (*linear_release)(moe4_linear *linear);
    bool (*linear_bytes)(size_t *bytes, const moe4_linear *linear, size_t n_tokens);
    moe4_status (*linear_forward)(const struct moe4_linear_call *call);

    moe4_status (*grouped_prepare)(moe4_grouped *grouped);
    void (*grouped_release)(moe4_grouped *grouped);
    bool (*grouped_bytes)(size_t *bytes, const moe4_grouped *grouped, size_t n_rows);
    moe4_status (*grouped_forward)(const struct moe4_grouped_call *call);
    /* A device's: NULL on the CPU, where memory is the host's. scales_check returns MOE4_OK with *host_ret when the host can read them. */
    moe4_status (*scales_check)(const moe4_ctx *ctx, const moe4_weight *w, const char *what, bool *host_ret);
    moe4_status (*memory_alloc)(moe4_ctx *ctx, void **data_ret, size_t bytes);
    void (*memory_free)(moe4_ctx *ctx, void *data);
    moe4_status (*memory_copy)(moe4_ctx *ctx, void *dst, const void *src, size_t bytes, void *stream); /* waits for it */

    moe4_status (*router_prepare)(moe4_router *router); /* a device's, as is release: NULL on the CPU */
    void (*router_release)(moe4_router *router);
    /* topk_ids, topk_weights [T,k] from logits [T,E]. */
    moe4_status (*select)(const struct moe4_select_call *call);

    /* The codec, for matrices in a device's memory; NULL on the CPU, as are the rest. They wait for the stream; scales_convert only
     * where it is told to. */
    moe4_status (*amax)(const moe4_codec_call *c, uint32_t *amax_ret);                            /* bits, one or [rows] with per_row */
    moe4_status (*codec_look)(const moe4_codec_call *c, bool of_scales, uint64_t *first_bad_ret); /* a NaN or Inf of x by row * cols + col,
                                                                                                   * or a bad scale by row * n_blocks +
                                                                                                   * block; UINT64_MAX: none */
    moe4_status (*quantize)(const moe4_codec_call *c, const moe4_codec_scale *scales, uint64_t *n_saturated_ret);
    moe4_status (*dequantize)(const moe4_codec_call *c, const float *globals);
    moe4_status (*scales_convert)(const moe4_ctx *ctx, const moe4_scales_conversion *s, void *stream, bool waits);
    /* Whose memory `data` is. ARGUMENT when it is another device's. */
    moe4_status (*memory_owner)(const moe4_ctx *ctx, const void *data, const char *what, enum moe4_owner *owner_ret);

    moe4_status (*ceilings)(moe4_ctx *ctx, moe4_ceilings *ceilings); /* a device's; NULL on the CPU */
};

extern const struct moe4_backend moe4_backend_cpu;

/* A walk over a block of memory: with a NULL base it counts, otherwise it hands out the same places. All are 64-byte aligned. */
struct moe4_carver {
    char *base;
    size_t used;
    bool overflow;
};

static inline void *moe4_carve(struct moe4_carver *c, size_t n, size_t size) {
    size_t bytes, end, at = c->used;
    if (!moe4_mul(&bytes, n, size) || !moe4_add(&end, at, bytes) || !moe4_add(&end, end, 63)) {
        c->overflow = true;
        return NULL;
    }
    c->used = end & ~(size_t)63;
    return c->base ? c->base + at : NULL;
}

/* Buffers of a call that takes either kind of memory: all the device's, or all the host's (*on_device_ret false, as always on the CPU).
 * ARGUMENT names two that differ. NULL ones do not count. */
struct moe4_buffer {
    const void *data;
    const char *name;
};
moe4_status moe4_buffers_owner(const moe4_ctx *ctx, bool *on_device_ret, const struct moe4_buffer *buffers, size_t n);

/* Checks a workspace against what a call needs: ARGUMENT with both numbers. */
moe4_status moe4_workspace_check(const moe4_ctx *ctx, const char *call, const moe4_workspace *ws, size_t need);

/* One matrix's own rules: dtype, shape, pointers, globals. `what` names it in the error. */
moe4_status moe4_weight_check(const moe4_ctx *ctx, const moe4_weight *w, const char *what);
/* An FP8 matrix becomes one of BF16 or F32 in *store_ret, which is the caller's to free; others stay as they are, and *store_ret is NULL.
 * Errors: ARGUMENT, MEMORY, UNSUPPORTED (in device memory), FORMAT (a value that is not finite: row and column). */
moe4_status moe4_fp8_widen(const moe4_ctx *ctx, moe4_weight *w, void **store_ret, const char *what);
/* What it becomes. */
moe4_dtype moe4_fp8_wide_dtype(const moe4_weight *w);
/* y[n_rows, cols] = rows [row, row + n_rows), which are there. */
moe4_status moe4_fp8_rows(const moe4_ctx *ctx, float *y, const moe4_weight *w, size_t row, size_t n_rows);
/* The matrices of an object: copied to *weight_ret [n], FP8 widened into *wide_ret [n], each one checked; all of one format and K, and with
 * same_rows of one N; their mode in *act, which comes as the option says. On failure the caller releases what there is. */
moe4_status moe4_weights_take(const moe4_ctx *ctx, moe4_weight **weight_ret, void ***wide_ret, const moe4_weight *weights, size_t n,
                              bool same_rows, moe4_act *act, moe4_dtype x_dtype);
void moe4_weights_release(const moe4_ctx *ctx, moe4_weight *weight, void **wide, size_t n);
/* No block scale of an NVFP4 matrix is NaN or signed: FORMAT with the place. Reads every scale byte. */
moe4_status moe4_scales_check(const moe4_ctx *ctx, const moe4_weight *w, const char *what);
/* x_dtype is F32, BF16, F16 or NVFP4; y_dtype F32 or BF16. */
moe4_status moe4_io_check(const moe4_ctx *ctx, moe4_dtype x_dtype, moe4_dtype y_dtype);
/* Rows given as NVFP4 have their pointers and a known layout. */
moe4_status moe4_rows_check(const moe4_ctx *ctx, const void *x, moe4_dtype x_dtype);
/* offsets[0] = 0, never falling, offsets[n] <= n_rows. */
moe4_status moe4_offsets_check(const moe4_ctx *ctx, const int32_t *offsets, size_t n, size_t n_rows);
/* The mode that `act` means for a matrix of this dtype; NVFP4 matrices only take NVFP4's modes, unquantized ones BF16. */
moe4_act moe4_act_resolve(moe4_act act, moe4_dtype dtype);

#endif
