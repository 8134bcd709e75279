/* Forward calls on a thread with a small stack, as engines have them: all work on the caller, 64 KB in all, less than half of it used. */
#include <pthread.h>
#include <sys/mman.h>

#include "reference.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifdef SANITIZED
enum { STACK = 1 << 20, MOST = STACK }; /* their frames are larger */
#else
enum { STACK = 64 << 10, MOST = 32 << 10 };
#endif
enum { GUARD = 1 << 16, HIDDEN = 512, INTERMEDIATE = 272, EXPERTS = 3, TOP = 2, TOKENS = 45, PAINT = 0xa5 };

struct calls {
    moe4_ctx *ctx;
    moe4_moe *moe;
    moe4_linear *linear;
    moe4_grouped *grouped;
    moe4_workspace workspace;
    size_t n_tokens;
    const float *x, *weights;
    const int32_t *ids, *offsets;
    float *y;
    moe4_status status[3];
};

static void *forward(void *arg) {
    struct calls *c = arg;
    if (!c->moe) return NULL; /* what a thread takes that does nothing */
    c->status[0] = moe4_moe_forward(c->moe, c->y, c->x, c->ids, c->weights, c->n_tokens, &c->workspace, NULL);
    c->status[1] = moe4_linear_forward(c->linear, (void *[]){c->y}, NULL, c->x, c->n_tokens, &c->workspace, NULL);
    c->status[2] = moe4_grouped_forward(c->grouped, c->y, NULL, c->x, c->offsets, c->n_tokens, &c->workspace, NULL);
    return NULL;
}

/* Bytes of its stack that a thread used. */
static size_t used_by(struct calls *c) {
    uint8_t *memory = mmap(NULL, GUARD + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *stack = memory + GUARD;
    assert_ptr_not_equal(memory, MAP_FAILED);
    assert_int_equal(mprotect(memory, GUARD, PROT_NONE), 0);
    memset(stack, PAINT, STACK);
    pthread_attr_t attr;
    pthread_t thread;
    pthread_attr_init(&attr);
    assert_int_equal(pthread_attr_setstack(&attr, stack, STACK), 0);
    assert_int_equal(pthread_create(&thread, &attr, forward, c), 0);
    pthread_join(thread, NULL);
    pthread_attr_destroy(&attr);
    size_t untouched = 0;
    while (untouched < STACK && stack[untouched] == PAINT) untouched++;
    munmap(memory, GUARD + STACK);
    return STACK - untouched;
}

/* All ISAs, modes and batches: one row an expert, a few, and as many as the widest kernels take. */
static void test_small_stack(void **state) {
    (void)state;
    moe4_expert experts[EXPERTS];
    moe4_weight weights[EXPERTS];
    float *x = malloc(TOKENS * HIDDEN * sizeof *x), *y = malloc(TOKENS * HIDDEN * sizeof *y), routing[TOKENS * TOP];
    int32_t ids[TOKENS * TOP];
    for (size_t i = 0; i < TOKENS * HIDDEN; i++) x[i] = ref_normal();
    for (size_t i = 0; i < TOKENS * TOP; i++) {
        routing[i] = 0.5f;
        ids[i] = (int32_t)(i % 2 * (1 + ref_random() % 2));
    }
    for (int e = 0; e < EXPERTS; e++) {
        experts[e] = (moe4_expert){.gate = ref_random_weight(MOE4_NVFP4, INTERMEDIATE, HIDDEN),
                                   .up = ref_random_weight(MOE4_NVFP4, INTERMEDIATE, HIDDEN),
                                   .down = ref_random_weight(MOE4_NVFP4, HIDDEN, INTERMEDIATE)};
        weights[e] = experts[e].gate;
    }
    struct calls nothing = {.moe = NULL};
    const size_t base = used_by(&nothing);
    for (int isa = 0; isa < REF_N_ISAS; isa++)
        for (moe4_act act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
            struct calls c = {.ctx = ref_ctx(1, ref_isas[isa]), .x = x, .y = y, .weights = routing, .ids = ids};
            moe4_moe_options mo = MOE4_MOE_OPTIONS_INIT;
            moe4_linear_options lo = MOE4_LINEAR_OPTIONS_INIT;
            moe4_grouped_options go = MOE4_GROUPED_OPTIONS_INIT;
            mo.n_experts = EXPERTS;
            mo.top_k = TOP;
            mo.act = lo.act = go.act = act;
            mo.x_dtype = mo.y_dtype = lo.x_dtype = lo.y_dtype = go.x_dtype = go.y_dtype = MOE4_F32;
            OK(c.ctx, moe4_moe_create(&c.moe, c.ctx, experts, &mo));
            OK(c.ctx, moe4_linear_create(&c.linear, c.ctx, weights, 1, &lo));
            OK(c.ctx, moe4_grouped_create(&c.grouped, c.ctx, weights, EXPERTS, &go));
            size_t bytes[3];
            OK(c.ctx, moe4_moe_workspace_bytes(c.moe, &bytes[0], TOKENS));
            OK(c.ctx, moe4_linear_workspace_bytes(c.linear, &bytes[1], TOKENS));
            OK(c.ctx, moe4_grouped_workspace_bytes(c.grouped, &bytes[2], TOKENS));
            for (int i = 0; i < 3; i++) c.workspace.bytes = bytes[i] > c.workspace.bytes ? bytes[i] : c.workspace.bytes;
            c.workspace.data = aligned_alloc(64, (c.workspace.bytes + 63) / 64 * 64);
            for (c.n_tokens = 1; c.n_tokens <= TOKENS; c.n_tokens += 22) {
                const int32_t offsets[EXPERTS + 1] = {0, (int32_t)c.n_tokens - 1, (int32_t)c.n_tokens - 1, (int32_t)c.n_tokens};
                c.offsets = offsets;
                const size_t used = used_by(&c);
                for (int i = 0; i < 3; i++) assert_int_equal(c.status[i], MOE4_OK);
                if (used > base + MOST)
                    fail_msg("%s, %s, %zu tokens: %zu bytes of stack", moe4_ctx_isa(c.ctx), moe4_act_name(act), c.n_tokens, used - base);
            }
            free(c.workspace.data);
            moe4_grouped_destroy(c.grouped);
            moe4_linear_destroy(c.linear);
            moe4_moe_destroy(c.moe);
            moe4_ctx_destroy(c.ctx);
        }
    for (int e = 0; e < EXPERTS; e++) {
        ref_free_weight(&experts[e].gate);
        ref_free_weight(&experts[e].up);
        ref_free_weight(&experts[e].down);
    }
    free(x);
    free(y);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_small_stack)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
