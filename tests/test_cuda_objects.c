/* Objects of a device: weights that lie in its memory, an expert replaced or not, several contexts, two GPUs. Skipped (77) where there is
 * no GPU. */
#include "calls.h"

#include <cuda_runtime_api.h>

enum { E = 5 };

/* T tokens that visit all experts of a layer in turn, which are 1 .. E of E + 2. */
static struct layer_call even_call(const struct layer *l, size_t T) {
    struct layer_call c = random_call(l, T, 1);
    for (size_t i = 0; i < T * l->k; i++) ((int32_t *)c.ids)[i] = (int32_t)(1 + i % l->E);
    return c;
}

static moe4_moe_options even_options(const struct layer *l, moe4_act act) {
    return layer_options(l, act, 1, l->E + 2);
}

static void test_device_weights(void **state) {
    (void)state;
    struct layer l = random_layer(2, 64, 48, 1, MOE4_NVFP4, MOE4_NVFP4, false), d = l;
    struct layer_call c = random_call(&l, 5, 2);
    moe4_moe_options o = layer_options(&l, MOE4_ACT_TOKEN, 0, 2);
    float a[5 * 64], b[5 * 64];
    d.expert = calloc(2, sizeof *d.expert);
    memcpy(d.expert, l.expert, 2 * sizeof *d.expert);
    for (int e = 0; e < 2; e++) {
        moe4_weight *w[] = {&d.expert[e].gate, &d.expert[e].up, &d.expert[e].down};
        for (int i = 0; i < 3; i++) {
            w[i]->data = on_device(w[i]->data, w[i]->rows * w[i]->cols / 2, 0);
            w[i]->scale = on_device(w[i]->scale, w[i]->rows * w[i]->cols / 16, 0);
        }
    }
    run_layer(gpu, a, NULL, NULL, &c, &o);
    c.l = &d;
    run_layer(gpu, b, NULL, NULL, &c, &o);
    assert_memory_equal(a, b, sizeof a);

    uint8_t bad = 0x7F;
    OK(gpu, moe4_memory_copy(gpu, (uint8_t *)d.expert[1].up.scale + 9, &bad, 1, NULL));
    moe4_moe *moe;
    assert_int_equal(moe4_moe_create(&moe, gpu, d.expert, &o), MOE4_ERROR_FORMAT);
    assert_non_null(strstr(moe4_ctx_error(gpu), "expert 1 up: block scale [2, 1] is 0x7f"));
    for (int e = 0; e < 2; e++) {
        moe4_weight *w[] = {&d.expert[e].gate, &d.expert[e].up, &d.expert[e].down};
        for (int i = 0; i < 3; i++) {
            moe4_memory_free(gpu, (void *)w[i]->data);
            moe4_memory_free(gpu, (void *)w[i]->scale);
        }
    }
    free(d.expert);
    free_call(&c);
    free_layer(&l);
}

/* An expert replaced in place is the layer that was made with it. */
static void test_replace(void **state) {
    (void)state;
    enum { T = 9, H = 96 };
    struct layer l = random_layer(E, H, 64, 2, MOE4_NVFP4, MOE4_NVFP4, false), made = l;
    struct layer other = random_layer(1, H, 64, 1, MOE4_NVFP4, MOE4_NVFP4, false);
    struct layer_call c = even_call(&l, T);
    moe4_moe_options o = even_options(&l, MOE4_ACT_STATIC);
    float a[T * H], b[T * H], before[T * H];
    moe4_moe *moe;
    OK(gpu, moe4_moe_create(&moe, gpu, l.expert, &o));
    run_moe(gpu, moe, before, NULL, NULL, &c, &o);
    OK(gpu, moe4_moe_replace_expert(moe, 1, other.expert));
    run_moe(gpu, moe, a, NULL, NULL, &c, &o);
    moe4_expert swapped[E];
    memcpy(swapped, l.expert, sizeof swapped);
    swapped[1] = other.expert[0];
    made.expert = swapped;
    c.l = &made;
    run_layer(gpu, b, NULL, NULL, &c, &o);
    assert_memory_equal(a, b, sizeof a);
    assert_true(relative(a, before, T * H) > 1e-3);
    moe4_moe_destroy(moe);
    free_call(&c);
    free_layer(&l);
    free_layer(&other);
}

/* Down's codes end before the matrix does, so that the copy fails when gate and up are there already: the old expert stays whole. */
static void test_replace_fails(void **state) {
    (void)state;
    enum { T = 10, H = 4096, I = 1024, CODES = H * I / 2 };
    for (int bias = 0; bias < 2; bias++) {
        struct layer l = random_layer(E, H, I, 2, MOE4_NVFP4, MOE4_NVFP4, bias),
                     other = random_layer(1, H, I, 1, MOE4_NVFP4, MOE4_NVFP4, bias);
        float *before = malloc(T * H * 4), *after = malloc(T * H * 4), *cpu_after = malloc(T * H * 4);
        struct layer_call c = even_call(&l, T);
        moe4_moe_options o = even_options(&l, MOE4_ACT_TOKEN);
        moe4_moe *moe, *on_cpu;
        void *small;
        OK(gpu, moe4_moe_create(&moe, gpu, l.expert, &o));
        OK(cpu, moe4_moe_create(&on_cpu, cpu, l.expert, &o));
        run_moe(gpu, moe, before, NULL, NULL, &c, &o);
        OK(gpu, moe4_memory_alloc(gpu, &small, CODES));
        moe4_expert broken = other.expert[0];
        broken.down.data = (char *)small + CODES - 4096;
        moe4_status status = moe4_moe_replace_expert(moe, 2, &broken);
        EXPECT(status == MOE4_ERROR_DEVICE, "replacing with a matrix that ends too early: %s: %s\n", moe4_status_text(status),
               moe4_ctx_error(gpu));
        print_message("refused: %s\n", moe4_ctx_error(gpu));
        run_moe(gpu, moe, after, NULL, NULL, &c, &o);
        EXPECT(memcmp(before, after, T * H * 4) == 0, "an expert that could not be replaced has other bits\n");
        OK(gpu, moe4_moe_replace_expert(moe, 2, &other.expert[0]));
        OK(cpu, moe4_moe_replace_expert(on_cpu, 2, &other.expert[0]));
        run_moe(gpu, moe, after, NULL, NULL, &c, &o);
        run_moe(cpu, on_cpu, cpu_after, NULL, NULL, &c, &o);
        expect_close(after, cpu_after, T, H, MOE4_ACT_TOKEN, "replaced");
        EXPECT(compare_rows(after, before, T, H, 1e-3).n_off > 0, "the replaced expert changed nothing\n");
        if (!bias) {
            random_bias(&other.expert[0].up);
            status = moe4_moe_replace_expert(moe, 2, &other.expert[0]);
            EXPECT(status == MOE4_ERROR_UNSUPPORTED && strstr(moe4_ctx_error(gpu), "bias"), "a first bias: %s\n", moe4_ctx_error(gpu));
        }
        moe4_memory_free(gpu, small);
        moe4_moe_destroy(moe);
        moe4_moe_destroy(on_cpu);
        free_call(&c);
        free(before);
        free(after);
        free(cpu_after);
        free_layer(&l);
        free_layer(&other);
    }
    NO_FAILURES();
}

/* Two contexts on one device, each with its own layer. */
static void test_two_contexts(void **state) {
    (void)state;
    enum { T = 9, H = 96 };
    moe4_ctx *second = open_device("cuda", 0);
    assert_non_null(second);
    struct layer l = random_layer(E, H, 64, 2, MOE4_NVFP4, MOE4_NVFP4, false);
    struct layer_call c = even_call(&l, T);
    moe4_moe_options o = even_options(&l, MOE4_ACT_W4A16);
    float a[T * H], b[T * H];
    moe4_moe *one, *two;
    OK(gpu, moe4_moe_create(&one, gpu, l.expert, &o));
    OK(second, moe4_moe_create(&two, second, l.expert, &o));
    run_moe(gpu, one, a, NULL, NULL, &c, &o);
    run_moe(second, two, b, NULL, NULL, &c, &o);
    assert_memory_equal(a, b, sizeof a);
    moe4_moe_destroy(two);
    moe4_ctx_destroy(second);
    run_moe(gpu, one, b, NULL, NULL, &c, &o);
    assert_memory_equal(a, b, sizeof a);
    moe4_moe_destroy(one);
    free_call(&c);
    free_layer(&l);
}

/* Two contexts, two devices, one process: the same layers give the same bits, call after call in turn, and the memory of one is refused by
 * the other. */
static void test_two_gpus(void **state) {
    (void)state;
    enum { T = 16, H = 256 };
    moe4_ctx *ctx[2] = {gpu, open_device("cuda:1", 0)};
    if (!ctx[1]) {
        print_message("two GPUs: skipped, %s\n", logged);
        skip();
    }
    struct layer l = random_layer(E, H, 128, 2, MOE4_NVFP4, MOE4_NVFP4, false);
    struct layer_call c = even_call(&l, T);
    moe4_moe_options o = even_options(&l, MOE4_ACT_TOKEN);
    float y[2][T * H];
    moe4_moe *moe[2];
    for (int d = 0; d < 2; d++) OK(ctx[d], moe4_moe_create(&moe[d], ctx[d], l.expert, &o));
    for (int i = 0; i < 4; i++) {
        for (int d = 0; d < 2; d++) run_moe(ctx[d], moe[d], y[d], NULL, NULL, &c, &o);
        EXPECT(memcmp(y[0], y[1], sizeof y[0]) == 0, "call %d: the devices give different bits\n", i);
        ((float *)c.x)[i] += 1;
    }
    int32_t id[2] = {1, 2};
    float weight[2] = {1, 1};
    size_t bytes;
    OK(ctx[0], moe4_moe_workspace_bytes(moe[0], &bytes, 1));
    moe4_workspace ws = give_workspace(ctx[0], bytes);
    void *on_0 = give(ctx[0], c.x, H * 4), *on_1 = give(ctx[1], c.x, H * 4);
    moe4_status status =
        moe4_moe_forward(moe[0], on_0, on_1, give(ctx[0], id, sizeof id), give(ctx[0], weight, sizeof weight), 1, &ws, NULL);
    EXPECT(status == MOE4_ERROR_ARGUMENT && strstr(moe4_ctx_error(ctx[0]), "x is memory of cuda:1"), "%s\n", moe4_ctx_error(ctx[0]));
    int current = -1;
    EXPECT(cudaGetDevice(&current) == cudaSuccess && current == 0, "the thread's device is %d after the calls\n", current);
    free_given();
    for (int d = 0; d < 2; d++) moe4_moe_destroy(moe[d]);
    moe4_ctx_destroy(ctx[1]);
    free_call(&c);
    free_layer(&l);
    NO_FAILURES();
}

int main(void) {
    int status = open_both("test_cuda_objects", 0);
    if (status) return status;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_device_weights), cmocka_unit_test(test_replace),  cmocka_unit_test(test_replace_fails),
        cmocka_unit_test(test_two_contexts),   cmocka_unit_test(test_two_gpus),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    close_both();
    return failed;
}
