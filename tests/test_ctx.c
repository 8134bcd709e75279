/* The context: options, error texts by thread. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include <pthread.h>

#include "internal.h"

static char logged[512];
static void keep_log(void *user, const char *line) {
    (void)user;
    strncpy(logged, line, sizeof logged - 1);
}

static void test_bad_options(void **state) {
    (void)state;
    moe4_ctx *ctx = (moe4_ctx *)1;
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.log = keep_log;
    o.isa_mask = 1u << 30;
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_ERROR_ARGUMENT);
    assert_null(ctx);
    assert_non_null(strstr(logged, "0x40000000"));
    o.isa_mask = 0;
    o.device = "tpu:0";
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(logged, "tpu:0"));
    o.device = NULL;
    o.n_threads = 100000;
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_ERROR_ARGUMENT);
    assert_non_null(strstr(logged, "100000"));
    o.n_threads = 0;
    o.struct_size = 3;
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_ERROR_ARGUMENT);
    assert_int_equal(moe4_ctx_create(NULL, NULL), MOE4_ERROR_ARGUMENT);
}

static void test_options_of_other_versions(void **state) {
    (void)state;
    struct {
        moe4_ctx_options o;
        long newer;
    } caller = {MOE4_CTX_OPTIONS_INIT, 0};
    caller.o.struct_size = sizeof caller;
    moe4_ctx *ctx;
    assert_int_equal(moe4_ctx_create(&ctx, &caller.o), MOE4_OK); /* newer, its field unset */
    moe4_ctx_destroy(ctx);
    caller.newer = 7;
    assert_int_equal(moe4_ctx_create(&ctx, &caller.o), MOE4_ERROR_ARGUMENT);
    caller.o.struct_size = offsetof(moe4_ctx_options, isa_mask); /* older: knows n_threads only */
    caller.o.isa_mask = 1u << 30;
    caller.o.n_threads = 3;
    assert_int_equal(moe4_ctx_create(&ctx, &caller.o), MOE4_OK);
    assert_int_equal(moe4_ctx_n_threads(ctx), 3);
    moe4_ctx_destroy(ctx);
}

static void *fail_b(void *arg) {
    moe4_ctx *ctx = arg;
    assert_string_equal(moe4_ctx_error(ctx), "");
    moe4_fail(ctx, MOE4_ERROR_IO, "b");
    assert_string_equal(moe4_ctx_error(ctx), "b");
    return NULL;
}

static void test_error_belongs_to_its_thread(void **state) {
    (void)state;
    moe4_ctx *ctx;
    assert_int_equal(moe4_ctx_create(&ctx, NULL), MOE4_OK);
    assert_int_equal(moe4_fail(ctx, MOE4_ERROR_FORMAT, "first %d", 1), MOE4_ERROR_FORMAT);
    moe4_fail(ctx, MOE4_ERROR_FORMAT, "second"); /* an outer layer; the innermost cause is kept */
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, fail_b, ctx), 0);
    pthread_join(t, NULL);
    assert_string_equal(moe4_ctx_error(ctx), "first 1");
    moe4_begin(ctx);
    assert_string_equal(moe4_ctx_error(ctx), "");
    moe4_ctx_destroy(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_options),
        cmocka_unit_test(test_options_of_other_versions),
        cmocka_unit_test(test_error_belongs_to_its_thread),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
