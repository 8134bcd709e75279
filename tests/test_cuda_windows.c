/* How a layer's stages on a device launch their kernels for batches of every size: with launchers that only look at what they are given,
 * so that no device is needed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "cuda/device.h"

static struct {
    char *workspace;
    size_t bytes;
    int n_slots, windows_tiled, windows_done, rows_done, n_down, n_decode, n_y;
    struct moe4_layer_run prepared; /* the routed experts' */
    const float *o;
} seen;

static void inside(const void *from, size_t bytes) {
    const char *p = from;
    assert_true(p >= seen.workspace && bytes <= seen.bytes && (size_t)(p - seen.workspace) <= seen.bytes - bytes);
}

/* What the plug-in's other files do. */
moe4_status moe4_cuda_check(const moe4_ctx *ctx, cudaError_t error, const char *what) {
    (void)ctx, (void)what;
    return error == cudaSuccess ? MOE4_OK : MOE4_ERROR_DEVICE;
}
moe4_status moe4_cuda_enter(const moe4_ctx *ctx, struct moe4_cuda_current *saved) {
    (void)ctx;
    saved->before = 0;
    return MOE4_OK;
}
void moe4_cuda_leave(struct moe4_cuda_current saved) {
    (void)saved;
}
moe4_status moe4_cuda_check_pointer(const moe4_ctx *ctx, const void *data, const char *what) {
    (void)ctx, (void)data, (void)what;
    return MOE4_OK;
}
moe4_status moe4_cuda_check_x(const moe4_ctx *ctx, const void *x, moe4_dtype dtype, const char *what) {
    (void)ctx, (void)x, (void)dtype, (void)what;
    return MOE4_OK;
}

/* Launchers that these batches never take. */
#define NEVER(name, type)                                 \
    cudaError_t name(const type *given, cudaStream_t s) { \
        (void)given, (void)s;                             \
        fail_msg("%s was launched", #name);               \
        return cudaErrorUnknown;                          \
    }
NEVER(moe4_cuda_place_rows, struct moe4_layer_run)
NEVER(moe4_cuda_round_rows, struct moe4_layer_run)
NEVER(moe4_cuda_gate_up, struct moe4_layer_run)
NEVER(moe4_cuda_down, struct moe4_layer_run)
NEVER(moe4_cuda_gate_up_wide, struct moe4_layer_run)
NEVER(moe4_cuda_down_wide, struct moe4_layer_run)
NEVER(moe4_cuda_combine_rows, struct moe4_combine)
NEVER(moe4_cuda_combine_tokens, struct moe4_combine)
NEVER(moe4_cuda_list_rows, struct moe4_combine)

cudaError_t moe4_cuda_prepare(const struct moe4_layer_run *r, cudaStream_t s) {
    (void)s;
    if (!r->x_is_ready) {
        seen.prepared = *r;
        seen.windows_tiled = 1;
    }
    return cudaSuccess;
}
cudaError_t moe4_cuda_tile_rows(const struct moe4_layer_run *r, cudaStream_t s) {
    (void)s;
    assert_int_equal(r->window, seen.windows_tiled++);
    return cudaSuccess;
}
cudaError_t moe4_cuda_prefill_gather(const struct moe4_layer_run *r, int units, cudaStream_t s) {
    (void)units, (void)s;
    assert_true(r->x_is_ready);
    return cudaSuccess;
}
cudaError_t moe4_cuda_decode_sm90(const struct moe4_layer_run *r, int phases, int n_sms, cudaStream_t s) {
    (void)phases, (void)n_sms, (void)s;
    assert_true(r->prefill_from != 1);
    inside(r->x, 1);
    inside(r->h, 1);
    seen.n_decode++;
    return cudaSuccess;
}
cudaError_t moe4_cuda_quantize_h(const struct moe4_layer_run *r, cudaStream_t s) {
    (void)s;
    inside(r->h_wide, 1);
    return cudaSuccess;
}
cudaError_t moe4_cuda_prefill_h_amax(const struct moe4_layer_run *r, cudaStream_t s) {
    (void)r, (void)s;
    return cudaSuccess;
}
cudaError_t moe4_cuda_prefill_quantize_h(const struct moe4_layer_run *r, cudaStream_t s) {
    (void)s;
    assert_true(r->n_windows || r->act == MOE4_ACT_TENSOR); /* elsewhere the prefill kernel rounds h itself */
    if (r->n_windows) assert_int_equal(seen.windows_done, r->n_windows);
    return cudaSuccess;
}

/* A window's columns, and a slice of o, stand inside the workspace and beside h; windows cover the slots, and have been filled before. */
cudaError_t moe4_cuda_prefill_sm90(const struct moe4_layer_run *r, int phases, int n_sms, cudaStream_t s) {
    (void)n_sms, (void)s;
    size_t x_row = (size_t)r->w.hidden_units * MOE4_UNIT_K * 2, slots = (size_t)r->n_tokens * (size_t)r->top_k;
    size_t h_bytes = moe4_prefill_rows(slots, (size_t)r->w.n) * (size_t)r->w.intermediate_units * MOE4_UNIT_K * 2;
    inside(r->h_tiles, h_bytes);
    if (phases == (MOE4_PHASE_GATE_UP | MOE4_PHASE_DOWN) && r->act != MOE4_ACT_W4A16) { /* it rounds h, and posts parts of it */
        size_t parts = moe4_prefill_parts(slots, (size_t)r->max_prefill_tiles);
        inside(r->prefill_rounds, parts * sizeof *r->prefill_rounds);
        assert_true((const char *)(r->prefill_rounds + parts) <= (const char *)r->x_places); /* what is carved next */
    }
    if (phases & MOE4_PHASE_GATE_UP) {
        size_t first = (size_t)r->window * (size_t)r->window_slots, n = r->n_windows ? (size_t)r->window_slots + 256 : slots;
        const char *x = (const char *)((uintptr_t)r->x_tiles + first * x_row);
        size_t bytes = (n + 15 * (size_t)r->w.n + 15) * x_row;
        inside(x, bytes);
        assert_true(x + bytes <= (const char *)r->h_tiles || x >= (const char *)r->h_tiles + h_bytes);
        if (r->n_windows) {
            assert_int_equal(r->window, seen.windows_done++);
            assert_int_equal(seen.windows_done, seen.windows_tiled);
            assert_false(phases & MOE4_PHASE_DOWN);
            inside(r->state, sizeof *r->state);
            inside(r->prefill_tiles, (size_t)r->max_prefill_tiles * sizeof *r->prefill_tiles);
        }
    }
    if (phases & MOE4_PHASE_DOWN) {
        inside(r->o, slots * (size_t)r->w.hidden * sizeof *r->o);
        if (r->n_windows) {
            assert_int_equal(seen.windows_done, r->n_windows);
            assert_true((long long)r->n_windows * r->window_slots >= (long long)slots);
            size_t unit_row = (size_t)r->w.intermediate_units * MOE4_UNIT_BYTES;
            assert_int_equal(r->w.down - seen.prepared.w.down, (size_t)(seen.rows_done / MOE4_UNIT_ROWS) * unit_row);
            assert_int_equal(r->w.down_tiles, (r->w.hidden + MOE4_UNIT_ROWS - 1) / MOE4_UNIT_ROWS);
            seen.rows_done += r->w.hidden;
        }
        seen.n_down++;
    }
    return cudaSuccess;
}
cudaError_t moe4_cuda_combine(const struct moe4_layer_run *r, void *y, moe4_dtype y_dtype, size_t y_ld, const float *weights,
                              const float *shared, size_t shared_ld, cudaStream_t s) {
    (void)y_ld, (void)weights, (void)s;
    size_t before = (size_t)seen.n_y, y_size = y_dtype == MOE4_F32 ? 4 : 2;
    assert_ptr_equal(y, (char *)4096 + before * y_size);
    if (shared) {
        assert_int_equal(shared_ld, seen.prepared.w.hidden);
        if (!before) seen.o = shared;
        assert_ptr_equal(shared, seen.o + before);
    }
    seen.n_y += r->w.hidden;
    if (r->n_windows) assert_int_equal(seen.n_y, seen.rows_done);
    return cudaSuccess;
}

static struct moe4_packed_experts make_experts(int n, int hidden, int intermediate) {
    struct moe4_packed_experts w = {.n = n, .hidden = hidden, .intermediate = intermediate};
    w.hidden_units = moe4_units((size_t)hidden);
    w.intermediate_units = moe4_units((size_t)intermediate);
    w.gate_up_tiles = 2 * w.intermediate_units;
    w.down_tiles = w.hidden_units;
    w.down = (const uint8_t *)8192;
    return w;
}

static void forward(const moe4_moe *moe, size_t n_tokens) {
    struct moe4_moe_call c = {.moe = moe, .n_tokens = n_tokens, .y = (void *)4096};
    memset(&seen, 0, sizeof seen);
    assert_true(moe4_cuda_moe_bytes(&seen.bytes, &c));
    c.workspace = seen.workspace = (char *)((uintptr_t)1 << 40);
    assert_int_equal(moe4_cuda_dispatch(&c), MOE4_OK);
    assert_int_equal(moe4_cuda_gate_up_stage(&c), MOE4_OK);
    assert_int_equal(moe4_cuda_quantize_h_stage(&c), MOE4_OK);
    assert_int_equal(moe4_cuda_down_stage(&c), MOE4_OK);
    assert_int_equal(moe4_cuda_combine_stage(&c), MOE4_OK);
    assert_int_equal(seen.n_y, seen.prepared.w.hidden);
    if (seen.prepared.n_windows) assert_int_equal(seen.rows_done, seen.prepared.w.hidden);
}

static void test_stages(void **state) {
    (void)state;
    static const int sizes[][4] = {{48, 7168, 3072, 6}, {32, 4096, 2048, 6}, {4, 1040, 48, 4}, {1, 208, 112, 1}};
    static const moe4_act acts[] = {MOE4_ACT_W4A16, MOE4_ACT_STATIC, MOE4_ACT_TENSOR, MOE4_ACT_TOKEN};
    static const size_t tokens[] = {1, 95, 96, 256, 1200, 1300, 2048, 4096, 40000, 300000};
    struct moe4_cuda_device device = {.major = 9, .n_sms = 132};
    moe4_ctx *ctx = calloc(1, sizeof *ctx);
    ctx->device = &device;
    int windows = 0, slices = 0;
    for (size_t i = 0; i < 4; i++)
        for (size_t a = 0; a < 4; a++)
            for (size_t groups = 1; groups <= 2; groups++)
                for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++) {
                    struct moe4_packed_experts routed = make_experts(sizes[i][0], sizes[i][1], sizes[i][2]);
                    struct moe4_packed_experts shared = make_experts(1, sizes[i][1], sizes[i][2] + 64);
                    moe4_moe moe = {.ctx = ctx, .hidden = (size_t)sizes[i][1], .n_groups = groups};
                    moe.o.top_k = (size_t)sizes[i][3];
                    moe.o.x_dtype = MOE4_BF16;
                    moe.o.y_dtype = a % 2 ? MOE4_F32 : MOE4_BF16;
                    moe.group[0].prepared = &routed;
                    moe.group[1].prepared = &shared;
                    moe.group[0].act_x = moe.group[1].act_x = acts[a];
                    moe.group[0].act_h = moe.group[1].act_h = acts[a];
                    forward(&moe, tokens[t]);
                    windows += seen.prepared.n_windows > 1;
                    slices += seen.n_down > 1;
                }
    assert_true(windows > 0 && slices > 0);
    free(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_stages)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
