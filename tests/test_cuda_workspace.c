/* The workspace of a run on a device serves every batch up to the one that it was asked for, whichever kernels and tiles a smaller batch
 * chooses: sizes never fall, and lists hold the tiles of each choice. Counted on the host; no device is needed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "cuda/device.h"
#include "cuda/nvfp4_layout.h"

static const struct shape {
    int n, hidden, intermediate;
} shapes[] = {{48, 7168, 3072}, {32, 4096, 2048}, {32, 256, 128},  {1, 16, 16},
              {512, 1024, 80},  {1, 1 << 20, 64}, {3, 4112, 1000}, {2048, 64, 64}};
static const int top_ks[] = {1, 2, 6, 8, 32};
static const moe4_act acts[] = {MOE4_ACT_W4A16, MOE4_ACT_STATIC, MOE4_ACT_TENSOR, MOE4_ACT_TOKEN, MOE4_ACT_BF16};
enum kind { LAYER, LAYER_NVFP4_X, LAYER_WEIGHTED_X, LAYER_SORTED, LINEAR, GROUPED, DIAGONAL, N_KINDS };
enum { ALL_UP_TO = 400, MOST_TOKENS = 60000 };
#define COUNT(a) (sizeof(a) / sizeof *(a))

static struct moe4_layer_run make_run(const struct shape *s, int top_k, moe4_act act, enum kind kind, int n_tokens) {
    bool by_rows = kind == LAYER_SORTED || kind == GROUPED;
    struct moe4_layer_run r = {.act = act, .n_tokens = n_tokens, .top_k = kind == LINEAR || by_rows ? 1 : top_k};
    r.w.n = kind == LINEAR ? 1 : s->n;
    r.w.hidden = s->hidden;
    r.w.intermediate = s->intermediate;
    r.w.hidden_units = moe4_units((size_t)s->hidden);
    r.w.intermediate_units = moe4_units((size_t)s->intermediate);
    r.may_slice = kind == LAYER;
    r.x_dtype = kind == LAYER_NVFP4_X ? MOE4_NVFP4 : MOE4_BF16;
    r.x_by_slot = kind == LAYER_WEIGHTED_X || kind == DIAGONAL;
    r.slots_are = by_rows ? MOE4_SLOTS_SORTED : kind == DIAGONAL ? MOE4_SLOTS_DIAGONAL : MOE4_SLOTS_BY_ID;
    return r;
}

static size_t count(struct moe4_layer_run *r, enum kind kind, int major) {
    const struct moe4_cuda_device device = {.major = major, .n_sms = 132};
    struct moe4_carver c = {0};
    moe4_cuda_choose_kernel(r, &device);
    moe4_cuda_carve_run(&c, r, kind < LINEAR);
    assert_false(c.overflow);
    return c.used;
}

/* What is promised for up to n_tokens: the last batch with two kernels may need more than larger ones. */
static size_t need(struct moe4_layer_run *r, enum kind kind, int major) {
    struct moe4_layer_run fewer = *r;
    size_t bytes = count(r, kind, major), last = moe4_cuda_last_mixed_batch(r);
    if (kind >= LINEAR || last >= (size_t)r->n_tokens) return bytes;
    fewer.n_tokens = (int)last;
    size_t mixed = count(&fewer, kind, major);
    return mixed > bytes ? mixed : bytes;
}

static void check_lists(const struct moe4_layer_run *r) {
    long long slots = (long long)r->n_tokens * r->top_k, experts = slots < r->w.n ? slots : r->w.n;
    assert_true(r->max_tiles >= slots / r->tile_columns + experts);
    if (r->prefill_from) assert_true(r->max_prefill_tiles >= slots / r->prefill_columns + experts);
    if (r->n_windows) {
        assert_in_range(r->n_windows, 1, MOE4_MAX_WINDOWS);
        assert_in_range(r->n_slices, 1, MOE4_MAX_WINDOWS);
        assert_true((long long)r->n_windows * r->window_slots >= slots);
    }
}

/* Every batch of up to ALL_UP_TO tokens, then steps of about 2 %. */
static void check_kind(const struct shape *s, int top_k, moe4_act act, enum kind kind, int major) {
    size_t most = 0;
    for (int t = 0; t <= MOST_TOKENS; t += t < ALL_UP_TO ? 1 : t / 50 + 1) {
        struct moe4_layer_run r = make_run(s, top_k, act, kind, t);
        size_t bytes = need(&r, kind, major);
        if (bytes < most)
            fail_msg("%d tokens need %zu bytes, fewer %zu: %d experts %d/%d, top %d, act %d, kind %d", t, bytes, most, s->n, s->hidden,
                     s->intermediate, top_k, (int)act, (int)kind);
        most = bytes;
        check_lists(&r);
    }
}

static void test_never_falls(void **state) {
    (void)state;
    for (size_t s = 0; s < COUNT(shapes); s++)
        for (size_t k = 0; k < COUNT(top_ks); k++)
            for (size_t a = 0; a < COUNT(acts); a++)
                for (int kind = 0; kind < N_KINDS; kind++)
                    for (int major = 8; major <= 9; major++) check_kind(&shapes[s], top_ks[k], acts[a], (enum kind)kind, major);
}

/* A rank of a large model with 4096 tokens stays under half a gigabyte. */
static void test_large_batch(void **state) {
    (void)state;
    struct moe4_layer_run r = make_run(&shapes[0], 6, MOE4_ACT_W4A16, LAYER, 4096);
    assert_true(need(&r, LAYER, 9) <= 500000000);
    /* a window and a slice fit where both stand */
    struct moe4_carver c = {.base = (char *)64};
    moe4_cuda_choose_kernel(&r, &(struct moe4_cuda_device){.major = 9});
    moe4_cuda_carve_run(&c, &r, true);
    size_t room = (size_t)((char *)r.h_tiles - (char *)r.x_tiles), slice_rows = (size_t)moe4_cuda_slice_tiles(&r) * MOE4_UNIT_ROWS;
    assert_true(((size_t)r.window_slots + 15 * 48 + 15 + 256) * 7168 * 2 <= room);
    assert_true((size_t)r.n_tokens * 6 * slice_rows * sizeof(float) <= room);
}

/* The rules of docs/hopper.md on both sides of where they change: a rank with 48 experts, and 7168 rows of one expert. Rows that stand with
 * their experts know only a bound of their average, so few slots stay with decode, whose bits they have by id. */
static void test_choices(void **state) {
    (void)state;
    static const struct {
        enum kind kind;
        moe4_act act;
        int n_tokens, from, columns;
    } choices[] = {
        {LAYER, MOE4_ACT_W4A16, 63, 0, 0},           {LAYER, MOE4_ACT_W4A16, 95, 0, 0},
        {LAYER, MOE4_ACT_W4A16, 103, 65, 80},        {LAYER, MOE4_ACT_W4A16, 104, 1, 80},
        {LAYER, MOE4_ACT_TOKEN, 88, 0, 0},           {LAYER, MOE4_ACT_TOKEN, 127, 65, 80},
        {LAYER, MOE4_ACT_TOKEN, 128, 1, 80},         {LAYER, MOE4_ACT_W4A16, 544, 1, 80},
        {LAYER, MOE4_ACT_W4A16, 545, 1, 192},        {LAYER, MOE4_ACT_W4A16, 1320, 1, 192},
        {LAYER, MOE4_ACT_W4A16, 1321, 1, 256},       {LAYER, MOE4_ACT_W4A16, 1880, 1, 256},
        {LAYER, MOE4_ACT_W4A16, 4096, 1, 192},       {LAYER_NVFP4_X, MOE4_ACT_TOKEN, 256, 17, 80},
        {LAYER_SORTED, MOE4_ACT_W4A16, 623, 65, 80}, {LAYER_SORTED, MOE4_ACT_W4A16, 624, 17, 80},
        {LINEAR, MOE4_ACT_W4A16, 95, 0, 0},          {LINEAR, MOE4_ACT_W4A16, 96, 1, 256},
        {LINEAR, MOE4_ACT_W4A16, 256, 1, 192},       {LINEAR, MOE4_ACT_W4A16, 4096, 1, 256},
    };
    for (size_t i = 0; i < COUNT(choices); i++) {
        struct moe4_layer_run r = make_run(&shapes[0], 6, choices[i].act, choices[i].kind, choices[i].n_tokens);
        r.w.down_tiles = r.w.hidden_units;
        moe4_cuda_choose_kernel(&r, &(struct moe4_cuda_device){.major = 9, .n_sms = 132});
        if (r.prefill_from != choices[i].from || r.prefill_columns != choices[i].columns)
            fail_msg("kind %d, %d tokens: prefill from %d slots, %d columns; want %d, %d", (int)choices[i].kind, choices[i].n_tokens,
                     r.prefill_from, r.prefill_columns, choices[i].from, choices[i].columns);
        moe4_cuda_choose_kernel(&r, &(struct moe4_cuda_device){.major = 8, .n_sms = 108});
        assert_int_equal(r.prefill_from, 0);
    }
}

/* Columns of decode's tiles, by tokens and by slots an expert gets on average: 6 of 48 experts for each token. */
static void test_columns(void **state) {
    (void)state;
    static const int choices[][2] = {{8, 8}, {23, 8}, {24, 16}, {48, 16}, {49, 24}, {87, 24}};
    for (size_t i = 0; i < COUNT(choices); i++) {
        struct moe4_layer_run r = make_run(&shapes[0], 6, MOE4_ACT_W4A16, LAYER, choices[i][0]);
        moe4_cuda_choose_kernel(&r, &(struct moe4_cuda_device){.major = 9, .n_sms = 132});
        if (r.tile_columns != choices[i][1])
            fail_msg("%d tokens: tiles of %d columns, want %d", choices[i][0], r.tile_columns, choices[i][1]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_never_falls), cmocka_unit_test(test_large_batch),
                                       cmocka_unit_test(test_choices), cmocka_unit_test(test_columns)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
