/* Errors that need a device: memory that is not there, memory of the other kind, in every call that takes buffers. Skipped (77) without. */
#include "reference.h"

#include "device.h"

#include <cuda_runtime_api.h>

static void says(moe4_status got, moe4_status want, const char *text) {
    if (got != want || !strstr(moe4_ctx_error(gpu), text))
        fail_msg("status %d: \"%s\", not %d: \"%s\"", (int)got, moe4_ctx_error(gpu), (int)want, text);
}

/* "...: N bytes, and device 0 has A of B free", with those numbers in order. */
static void has_both_numbers(moe4_status got, const char *begins) {
    unsigned long long bytes, available, total;
    const char *text = moe4_ctx_error(gpu);
    says(got, MOE4_ERROR_MEMORY, begins);
    if (sscanf(text + strlen(begins), ": %llu bytes, and device 0 has %llu of %llu free", &bytes, &available, &total) != 3)
        fail_msg("numbers are missing in: %s", text);
    assert_true(bytes > available && available <= total);
}

static moe4_moe_options options_for_one(void) {
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = o.top_k = 1;
    return o;
}

/* All but a little of the memory is taken: what needs more says so, and all is well when it is given back. */
static void test_too_little_memory(void **state) {
    (void)state;
    enum { SIDE = 8192, LEFT = 64 << 20 };
    size_t available, total;
    void *most, *more;
    moe4_expert expert = {.gate = ref_random_weight(MOE4_NVFP4, SIDE, SIDE),
                          .up = ref_random_weight(MOE4_NVFP4, SIDE, SIDE),
                          .down = ref_random_weight(MOE4_NVFP4, SIDE, SIDE)};
    moe4_moe_options o = options_for_one();
    moe4_moe *moe;
    moe4_linear *linear;
    moe4_ceilings ceilings = MOE4_CEILINGS_INIT;
    assert_int_equal(cudaMemGetInfo(&available, &total), cudaSuccess);
    OK(gpu, moe4_memory_alloc(gpu, &most, available - LEFT));
    has_both_numbers(moe4_memory_alloc(gpu, &more, 4 * (size_t)LEFT), "moe4_memory_alloc");
    has_both_numbers(moe4_moe_create(&moe, gpu, &expert, &o), "experts");
    assert_null(moe);
    const moe4_weight three[] = {expert.gate, expert.up, expert.down};
    has_both_numbers(moe4_linear_create(&linear, gpu, three, 3, NULL), "packed weights");
    assert_null(linear);
    has_both_numbers(moe4_ctx_ceilings(gpu, &ceilings), "memory to read");
    moe4_memory_free(gpu, most);
    OK(gpu, moe4_moe_create(&moe, gpu, &expert, &o));
    moe4_moe_destroy(moe);
    says(moe4_memory_alloc(gpu, &more, (size_t)1 << 44), MOE4_ERROR_MEMORY, "moe4_memory_alloc: 17592186044416 bytes, and device 0 has ");
    ref_free_weight(&expert.gate);
    ref_free_weight(&expert.up);
    ref_free_weight(&expert.down);
}

static void test_mixed_in_linear(void **state) {
    (void)state;
    enum { N = 32, K = 64 };
    moe4_weight w = ref_random_weight(MOE4_NVFP4, N, K), plain = ref_random_weight(MOE4_BF16, N, K);
    float host[K] = {0};
    for (int i = 0; i < 2; i++) {
        moe4_linear *linear;
        size_t bytes;
        OK(gpu, moe4_linear_create(&linear, gpu, i ? &plain : &w, 1, NULL));
        OK(gpu, moe4_linear_workspace_bytes(linear, &bytes, 1));
        moe4_workspace ws = {on_device(NULL, bytes, 0), bytes};
        void *x = on_device(host, sizeof host, 0), *y = on_device(host, sizeof host, 0), *on_host = host;
        says(moe4_linear_forward(linear, &y, NULL, host, 1, &ws, NULL), MOE4_ERROR_ARGUMENT,
             "x is host memory, and the context's device is cuda:0");
        says(moe4_linear_forward(linear, &on_host, NULL, x, 1, &ws, NULL), MOE4_ERROR_ARGUMENT, "y is host memory");
        OK(gpu, moe4_linear_forward(linear, &y, NULL, x, 1, &ws, NULL));
        free_device(ws.data, 0);
        free_device(x, 0);
        free_device(y, 0);
        moe4_linear_destroy(linear);
    }
    ref_free_weight(&w);
    ref_free_weight(&plain);
}

static void test_mixed_in_router(void **state) {
    (void)state;
    enum { E = 8, TOP = 2 };
    moe4_router_options o = MOE4_ROUTER_OPTIONS_INIT;
    o.kind = MOE4_ROUTER_SOFTMAX_TOPK;
    o.n_experts = E;
    o.top_k = TOP;
    moe4_router *router;
    float logits[E] = {0}, weights[TOP];
    int32_t ids[TOP];
    OK(gpu, moe4_router_create(&router, gpu, NULL, NULL, &o));
    void *l = on_device(logits, sizeof logits, 0), *i = on_device(NULL, sizeof ids, 0), *w = on_device(NULL, sizeof weights, 0);
    says(moe4_router_select(router, ids, w, l, NULL, 1, NULL), MOE4_ERROR_ARGUMENT, "topk_ids is host memory");
    says(moe4_router_select(router, i, weights, l, NULL, 1, NULL), MOE4_ERROR_ARGUMENT, "topk_weights is host memory");
    says(moe4_router_select(router, i, w, logits, NULL, 1, NULL), MOE4_ERROR_ARGUMENT, "logits is host memory");
    OK(gpu, moe4_router_select(router, i, w, l, NULL, 1, NULL));
    free_device(l, 0);
    free_device(i, 0);
    free_device(w, 0);
    moe4_router_destroy(router);
}

/* What the machine can do, asked twice. */
static void test_ceilings(void **state) {
    (void)state;
    moe4_ceilings first = MOE4_CEILINGS_INIT, again = MOE4_CEILINGS_INIT;
    OK(gpu, moe4_ctx_ceilings(gpu, &first));
    OK(gpu, moe4_ctx_ceilings(gpu, &again));
    print_message("%s: %.0f GB/s, %.0f GMAC/s in bf16\n", first.device, first.read_bytes / 1e9, first.bf16_macs / 1e9);
    assert_true(first.read_bytes > 1e11 && first.read_bytes < 1e14);
    assert_true(fabs(first.read_bytes / again.read_bytes - 1) < 0.1);
    assert_true(first.bf16_macs == 0 || (first.bf16_macs > 1e13 && first.bf16_macs < 1e17));
    assert_int_equal(moe4_ctx_ceilings(cpu, &first), MOE4_ERROR_UNSUPPORTED);
    assert_int_equal(moe4_ctx_ceilings(gpu, NULL), MOE4_ERROR_ARGUMENT);
    assert_string_equal(moe4_ctx_device(gpu), "cuda:0");
    assert_string_equal(moe4_ctx_device(cpu), "cpu");
}

int main(void) {
    int status = open_both("test_cuda_errors", MOE4_ISA_SCALAR);
    if (status) return status;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_mixed_in_linear), cmocka_unit_test(test_mixed_in_router),
                                       cmocka_unit_test(test_ceilings), cmocka_unit_test(test_too_little_memory)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    close_both();
    return failed;
}
