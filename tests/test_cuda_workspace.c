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
} shapes[] = {{48, 7168, 3072}, {32, 4096, 2048}, {32, 256, 128}, {1, 16, 16}, {512, 1024, 80}, {3, 4112, 1000}, {2048, 64, 64}};
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
    r.x_dtype = kind == LAYER_NVFP4_X ? MOE4_NVFP4 : MOE4_BF16;
    r.x_by_slot = kind == LAYER_WEIGHTED_X || kind == DIAGONAL;
    r.slots_are = by_rows ? MOE4_SLOTS_SORTED : kind == DIAGONAL ? MOE4_SLOTS_DIAGONAL : MOE4_SLOTS_BY_ID;
    return r;
}

static size_t need(struct moe4_layer_run *r, enum kind kind, int major) {
    const struct moe4_cuda_device device = {.major = major, .n_sms = 132};
    struct moe4_carver c = {0};
    moe4_cuda_choose_kernel(r, &device);
    moe4_cuda_carve_run(&c, r, kind < LINEAR);
    assert_false(c.overflow);
    return c.used;
}

static void check_lists(const struct moe4_layer_run *r) {
    long long slots = (long long)r->n_tokens * r->top_k, experts = slots < r->w.n ? slots : r->w.n;
    assert_true(r->max_tiles >= slots / r->tile_columns + experts);
    if (r->prefill_from) assert_true(r->max_prefill_tiles >= slots / r->prefill_columns + experts);
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

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_never_falls)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
