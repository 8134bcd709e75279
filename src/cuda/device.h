/* The plug-in's own state in a context, and the little that its C files share. */
#ifndef MOE4_CUDA_DEVICE_H
#define MOE4_CUDA_DEVICE_H

#include <pthread.h>

#include "../plugin.h"
#include "kernels.h"

struct moe4_cuda_device {
    int index, major, minor, n_sms;
    char name[256];
    pthread_mutex_t lock; /* of what follows */
    bool looked_for_blas;
    struct moe4_cublas *blas;
};

static inline const struct moe4_cuda_device *moe4_cuda_of(const moe4_ctx *ctx) {
    return ctx->device;
}

/* Records "what: CUDA's text" unless error is cudaSuccess. */
moe4_status moe4_cuda_check(const moe4_ctx *ctx, cudaError_t error, const char *what);
#define CUDA_TRY(ctx, expr, what) MOE4_TRY(moe4_cuda_check(ctx, expr, what))

/* Makes the context's device the thread's current one; leave gives the thread its own back. */
struct moe4_cuda_current {
    int before;
};
moe4_status moe4_cuda_enter(const moe4_ctx *ctx, struct moe4_cuda_current *saved);
void moe4_cuda_leave(struct moe4_cuda_current saved);

/* Device memory: MEMORY with the bytes asked for and the bytes free. */
moe4_status moe4_cuda_alloc(const moe4_ctx *ctx, void **data_ret, size_t bytes, const char *what);
/* cuBLAS, opened when it is first asked for; NULL where there is none. */
struct moe4_cublas *moe4_cuda_blas(const moe4_ctx *ctx);
/* Is `data` memory that this context's device reads? ARGUMENT otherwise. */
moe4_status moe4_cuda_check_pointer(const moe4_ctx *ctx, const void *data, const char *what);
/* The same for rows of activations, which may be a moe4_nvfp4_rows on the host. */
moe4_status moe4_cuda_check_x(const moe4_ctx *ctx, const void *x, moe4_dtype dtype, const char *what);

/* experts.c: packed weights. pack.. takes data and scales from host or device memory through one staging buffer. */
struct moe4_cuda_stage {
    uint8_t *data;
    size_t bytes;
};
size_t moe4_cuda_stage_bytes(const moe4_weight *w);
moe4_status moe4_cuda_pack_weight(const moe4_ctx *ctx, uint8_t *packed, const moe4_weight *w, int interleave,
                                  struct moe4_cuda_stage *stage);
/* An unquantized matrix, its rows padded to whole units; the caller zeroes dst where padding is. */
moe4_status moe4_cuda_place_plain(const moe4_ctx *ctx, void *dst, const moe4_weight *w);
moe4_status moe4_cuda_experts_prepare(moe4_ctx *ctx, struct moe4_experts *experts);
void moe4_cuda_experts_release(moe4_ctx *ctx, struct moe4_experts *experts);
moe4_status moe4_cuda_expert_replaced(moe4_ctx *ctx, struct moe4_experts *experts, size_t e);

/* scales.c */
moe4_status moe4_cuda_scales_check(const moe4_ctx *ctx, const moe4_weight *w, const char *what, bool *host_ret);

/* cache.c: packed bytes in the context's cache folder. The key is of n matrices, those without data left out, that become `bytes`; it is
 * not usable without a folder, or where the host cannot read a matrix. */
struct moe4_cuda_cached {
    struct moe4_cache_key key;
    bool usable;
};
moe4_status moe4_cuda_cache_key(const moe4_ctx *ctx, struct moe4_cuda_cached *c, const moe4_weight *const *weights, size_t n, size_t bytes);
/* *found_ret: `packed`, on the device, has the bytes now. */
moe4_status moe4_cuda_cache_read(const moe4_ctx *ctx, const struct moe4_cuda_cached *c, void *packed, bool *found_ret);
moe4_status moe4_cuda_cache_write(const moe4_ctx *ctx, const struct moe4_cuda_cached *c, const void *packed);

/* moe.c: what a workspace is for, tokens or rows that are summed into tokens; and the runs of a layer in it (base NULL: counts). */
struct moe4_extent {
    bool by_rows;
    size_t n_rows, n_tokens;
};
struct moe4_runs {
    struct moe4_layer_run run[MOE4_MAX_GROUPS];
    size_t n;
    int *token_start, *token_rows; /* of rows that are summed */
    bool fits;
    size_t bytes;
};
struct moe4_runs moe4_cuda_layer_runs(const moe4_moe *moe, struct moe4_extent x, void *base);
bool moe4_cuda_moe_bytes(size_t *bytes, const struct moe4_moe_call *c);
moe4_status moe4_cuda_begin(const struct moe4_moe_call *c);
moe4_status moe4_cuda_dispatch(const struct moe4_moe_call *c);
moe4_status moe4_cuda_quantize_x(const struct moe4_moe_call *c);
moe4_status moe4_cuda_gate_up_stage(const struct moe4_moe_call *c);
moe4_status moe4_cuda_quantize_h_stage(const struct moe4_moe_call *c);
moe4_status moe4_cuda_down_stage(const struct moe4_moe_call *c);
moe4_status moe4_cuda_combine_stage(const struct moe4_moe_call *c);

/* report.c */
moe4_status moe4_cuda_report(const struct moe4_moe_call *c, moe4_moe_report *report, uint64_t *tokens_per_expert);

/* run.c: a run's kernels and its workspace. */
#define MOE4_PREFILL_TOKENS 96 /* of a batch from which the prefill kernel may run */
void moe4_cuda_choose_kernel(struct moe4_layer_run *r, const struct moe4_cuda_device *device);
bool moe4_cuda_uses_sm90(const struct moe4_cuda_device *device);
/* What a report says of the run's products; static. */
const char *moe4_cuda_kernels_name(const struct moe4_layer_run *r, const struct moe4_cuda_device *device);
/* The same expert by expert, by the rule by which the device lists tiles. Returns their number. */
size_t moe4_cuda_kernel_ranges(moe4_kernel_range range[MOE4_MAX_KERNEL_RANGES], const struct moe4_layer_run *r,
                               const struct moe4_cuda_device *device);
/* Cycles that the prefill kernel takes for 64 k of one expert's rows. */
double moe4_cuda_unit_cycles(long long rows, int row_tiles, int n_sms);
bool moe4_cuda_rounds_apart(const struct moe4_layer_run *r);
size_t moe4_cuda_last_mixed_batch(const struct moe4_layer_run *r);
void moe4_cuda_carve_run(struct moe4_carver *c, struct moe4_layer_run *r, bool with_gate_up);

/* linear.c */
moe4_status moe4_cuda_linear_prepare(moe4_linear *l);
void moe4_cuda_linear_release(moe4_linear *l);
bool moe4_cuda_linear_bytes(size_t *bytes, const moe4_linear *l, size_t n_tokens);
moe4_status moe4_cuda_linear_forward(const struct moe4_linear_call *c);

/* grouped.c */
moe4_status moe4_cuda_grouped_prepare(moe4_grouped *g);
void moe4_cuda_grouped_release(moe4_grouped *g);
bool moe4_cuda_grouped_bytes(size_t *bytes, const moe4_grouped *g, size_t n_rows);
moe4_status moe4_cuda_grouped_forward(const struct moe4_grouped_call *c);

/* router.c */
moe4_status moe4_cuda_router_prepare(moe4_router *r);
void moe4_cuda_router_release(moe4_router *r);
moe4_status moe4_cuda_select(const struct moe4_select_call *c);

/* codec.c */
moe4_status moe4_cuda_amax(const moe4_codec_call *c, uint32_t *amax_ret);
moe4_status moe4_cuda_codec_look(const moe4_codec_call *c, bool of_scales, uint64_t *first_bad_ret);
moe4_status moe4_cuda_quantize(const moe4_codec_call *c, const moe4_codec_scale *scales, uint64_t *n_saturated_ret);
moe4_status moe4_cuda_dequantize(const moe4_codec_call *c, const float *globals);
moe4_status moe4_cuda_convert_scales(const moe4_ctx *ctx, const moe4_scales_conversion *s, void *stream, bool waits);

/* ceiling.c */
moe4_status moe4_cuda_ceilings(moe4_ctx *ctx, moe4_ceilings *c);

#endif
