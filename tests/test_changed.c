/* A checkpoint's file changes under a running process: an error in every call from there on; in the moment itself an error or SIGBUS, and
 * never anything else. */
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "reference.h"

#include "files.h"

#define MODEL MOE4_SOURCE_DIR "/models/novels-18m-nvfp4"

enum { T = 5, HIDDEN = 256, K = 6, LAYER = 3 };

struct running {
    moe4_ctx *ctx;
    moe4_checkpoint *model;
    moe4_router *router;
    moe4_moe *layer;
    moe4_workspace ws;
    float x[T * HIDDEN], y[T * HIDDEN];
};

static void start(struct running *r) {
    size_t for_router;
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.x_dtype = o.y_dtype = MOE4_F32;
    files_make();
    files_copy_folder(MODEL);
    for (int i = 0; i < T * HIDDEN; i++) r->x[i] = (float)(i % 7) - 3;
    assert_int_equal(moe4_ctx_create(&r->ctx, NULL), MOE4_OK);
    OK(r->ctx, moe4_checkpoint_open(&r->model, r->ctx, files_path("")));
    OK(r->ctx, moe4_router_create_from_checkpoint(&r->router, r->ctx, r->model, LAYER, NULL));
    OK(r->ctx, moe4_moe_create_from_checkpoint(&r->layer, r->ctx, r->model, LAYER, &o));
    OK(r->ctx, moe4_router_workspace_bytes(r->router, &for_router, T));
    OK(r->ctx, moe4_moe_workspace_bytes(r->layer, &r->ws.bytes, T));
    if (r->ws.bytes < for_router) r->ws.bytes = for_router;
    r->ws.data = aligned_alloc(64, (r->ws.bytes + 63) / 64 * 64);
}

static moe4_status step(struct running *r) {
    int32_t ids[T * K];
    float weights[T * K];
    moe4_status status = moe4_router_forward(r->router, ids, weights, r->x, NULL, T, &r->ws, NULL);
    return status == MOE4_OK ? moe4_moe_forward(r->layer, r->y, r->x, ids, weights, T, &r->ws, NULL) : status;
}

static void stop(struct running *r) {
    free(r->ws.data);
    moe4_moe_destroy(r->layer);
    moe4_router_destroy(r->router);
    moe4_checkpoint_close(r->model);
    moe4_ctx_destroy(r->ctx);
    files_remove();
}

static void wait_ms(long ms) {
    nanosleep(&(struct timespec){0, ms * 1000000}, NULL);
}

static void cut(void) {
    assert_int_equal(truncate(files_path("model.safetensors"), 4096), 0);
}

static void touch(void) {
    FILE *f = fopen(files_path("model.safetensors"), "r+b");
    assert_non_null(f);
    assert_int_equal(fputc(8, f), 8);
    assert_int_equal(fclose(f), 0);
}

static void test_noticed(void **state) {
    (void)state;
    static void (*const changes[])(void) = {cut, touch};
    for (int i = 0; i < 2; i++) {
        static struct running r;
        int32_t ids[T * K];
        float weights[T * K], logits[T * 32] = {0};
        start(&r);
        OK(r.ctx, step(&r));
        OK(r.ctx, moe4_checkpoint_check(r.model));
        wait_ms(30); /* a file system's clock may be coarse */
        changes[i]();
        wait_ms(30);
        assert_int_equal(moe4_checkpoint_check(r.model), MOE4_ERROR_IO);
        assert_non_null(strstr(moe4_ctx_error(r.ctx), "model.safetensors: changed while open"));
        for (int again = 0; again < 3; again++) {
            assert_int_equal(moe4_router_forward(r.router, ids, weights, r.x, NULL, T, &r.ws, NULL), MOE4_ERROR_IO);
            assert_int_equal(moe4_router_select(r.router, ids, weights, logits, NULL, T, NULL), MOE4_ERROR_IO);
            assert_int_equal(moe4_moe_forward(r.layer, r.y, r.x, ids, weights, T, &r.ws, NULL), MOE4_ERROR_IO);
            assert_non_null(strstr(moe4_ctx_error(r.ctx), "model.safetensors: changed while open"));
        }
        stop(&r);
    }
}

static void test_replaced(void **state) {
    (void)state;
    static struct running r;
    float before[T * HIDDEN];
    start(&r);
    OK(r.ctx, step(&r));
    memcpy(before, r.y, sizeof before);
    files_text("other", "not a checkpoint");
    char from[256];
    snprintf(from, sizeof from, "%s", files_path("other"));
    assert_int_equal(rename(from, files_path("model.safetensors")), 0);
    wait_ms(30);
    OK(r.ctx, step(&r));
    assert_memory_equal(r.y, before, sizeof before);
    stop(&r);
}

/* A child runs the layer over and over while its file is cut. */
static void test_cut_while_running(void **state) {
    (void)state;
    static struct running r;
    for (int round = 0; round < 5; round++) {
        start(&r);
        int ready[2];
        char byte = 0;
        assert_int_equal(pipe(ready), 0);
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            struct running own = r;
            moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
            o.n_threads = 1; /* threads do not survive a fork: objects of its own */
            moe4_moe_options mo = MOE4_MOE_OPTIONS_INIT;
            mo.x_dtype = mo.y_dtype = MOE4_F32;
            signal(SIGBUS, SIG_DFL);
            if (moe4_ctx_create(&own.ctx, &o) || moe4_checkpoint_open(&own.model, own.ctx, files_path("")) ||
                moe4_router_create_from_checkpoint(&own.router, own.ctx, own.model, LAYER, NULL) ||
                moe4_moe_create_from_checkpoint(&own.layer, own.ctx, own.model, LAYER, &mo))
                _exit(9);
            if (step(&own) != MOE4_OK || write(ready[1], &byte, 1) != 1) _exit(9);
            for (;;) {
                moe4_status status = step(&own);
                if (status != MOE4_OK) _exit(status == MOE4_ERROR_IO ? 0 : 8);
            }
        }
        assert_int_equal(read(ready[0], &byte, 1), 1);
        wait_ms(20 + 7 * round);
        cut();
        close(ready[0]);
        close(ready[1]);
        int how;
        assert_int_equal(waitpid(child, &how, 0), child);
        bool error = WIFEXITED(how) && WEXITSTATUS(how) == 0, bus = WIFSIGNALED(how) && WTERMSIG(how) == SIGBUS;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
        bus = bus || (WIFEXITED(how) && WEXITSTATUS(how) != 8); /* a sanitizer tells of SIGBUS in its own way */
#endif
        if (!error && !bus) fail_msg("status 0x%x", how);
        stop(&r);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_noticed),
        cmocka_unit_test(test_replaced),
        cmocka_unit_test(test_cut_while_running),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
