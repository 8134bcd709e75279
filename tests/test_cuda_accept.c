/* Which devices the plug-in takes: decided from what a driver would say, so no driver is needed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "cuda/accept.h"

static moe4_ctx *ctx;

static void refused(moe4_status status, const char *says) {
    assert_int_equal(status, MOE4_ERROR_DEVICE);
    assert_string_equal(moe4_ctx_error(ctx), says);
}

static moe4_status accept(const struct moe4_cuda_facts *facts) {
    moe4_begin(ctx);
    moe4_status status = moe4_cuda_accept_driver(ctx, facts);
    return status == MOE4_OK ? moe4_cuda_accept_device(ctx, facts) : status;
}

static void test_driver(void **state) {
    (void)state;
    struct moe4_cuda_facts f = {.index = 2, .runtime = 13000, .n_devices = 4, .name = "NVIDIA H200", .major = 9};
    refused(accept(&f), "cuda:2: no NVIDIA driver on this machine");
    f.driver = 12080;
    refused(accept(&f), "cuda:2: the driver is for CUDA 12.8, need 13.0 or later");
    f.driver = 13000;
    assert_int_equal(accept(&f), MOE4_OK);
    f.driver = 14020;
    assert_int_equal(accept(&f), MOE4_OK);
    f.driver = 13000;
    f.runtime = 13020; /* within a major version an older driver serves a newer runtime */
    assert_int_equal(accept(&f), MOE4_OK);
}

static void test_device(void **state) {
    (void)state;
    struct moe4_cuda_facts f = {.driver = 13000, .runtime = 13000};
    refused(accept(&f), "cuda:0: the driver shows 0 devices");
    f.index = f.n_devices = 1;
    refused(accept(&f), "cuda:1: the driver shows 1 device");
    f.n_devices = 2;
    f.name = "Tesla V100-SXM2-32GB";
    f.major = 7;
    refused(accept(&f), "cuda:1: Tesla V100-SXM2-32GB has compute capability 7.0, need 8.0");
    f.minor = 5;
    refused(accept(&f), "cuda:1: Tesla V100-SXM2-32GB has compute capability 7.5, need 8.0");
    static const int fine[][2] = {{8, 0}, {8, 9}, {9, 0}, {10, 0}, {12, 0}};
    for (size_t i = 0; i < sizeof fine / sizeof *fine; i++) {
        f.major = fine[i][0];
        f.minor = fine[i][1];
        assert_int_equal(accept(&f), MOE4_OK);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_driver), cmocka_unit_test(test_device)};
    if (moe4_ctx_create(&ctx, NULL) != MOE4_OK) return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    moe4_ctx_destroy(ctx);
    return failed;
}
