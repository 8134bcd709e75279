/* Threads: the pool under several callers, its limits, and an engine's own pool in its place. */
#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>

#include "cpu/pool.h"
#include "fpu.h"
#include "one_layer.h"

static moe4_ctx *open_ctx(size_t n_threads, moe4_run_fn run, void *user) {
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.n_threads = n_threads;
    o.run = run;
    o.run_user = user;
    moe4_ctx *ctx;
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_OK);
    return ctx;
}

/* ---- the library's pool ---- */

struct count {
    moe4_ctx *ctx;
    atomic_int done[1000];
};
static void count_task(void *arg, size_t task) {
    atomic_fetch_add(&((struct count *)arg)->done[task], 1);
}
static void *run_jobs(void *arg) {
    moe4_ctx *ctx = arg;
    struct count *c = calloc(1, sizeof *c);
    for (int round = 0; round < 200; round++) moe4_parallel_for(ctx, 1 + (size_t)round * 5 % 1000, count_task, c);
    for (int i = 0, n = 0; i < 1000; i++, n = 0) {
        for (int round = 0; round < 200; round++) n += i < 1 + round * 5 % 1000;
        assert_int_equal(c->done[i], n);
    }
    free(c);
    return NULL;
}

static void run_from_four_threads(moe4_ctx *ctx) {
    pthread_t t[4];
    for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&t[i], NULL, run_jobs, ctx), 0);
    for (int i = 0; i < 4; i++) pthread_join(t[i], NULL);
}

static void test_shared_by_callers(void **state) {
    (void)state;
    for (size_t n = 1; n <= 4; n++) {
        moe4_ctx *ctx = open_ctx(n, NULL, NULL);
        run_from_four_threads(ctx);
        moe4_ctx_destroy(ctx);
    }
}

struct meeting {
    atomic_int inside, most;
};
static void meet(void *arg, size_t task) {
    struct meeting *m = arg;
    (void)task;
    int now = atomic_fetch_add(&m->inside, 1) + 1, most = atomic_load(&m->most);
    while (now > most && !atomic_compare_exchange_weak(&m->most, &most, now)) {
    }
    nanosleep(&(struct timespec){.tv_nsec = 300000}, NULL);
    atomic_fetch_sub(&m->inside, 1);
}

/* Small work goes to few threads; and all come when there is much, from sleep as well as from looking. */
static void test_most_threads(void **state) {
    (void)state;
    moe4_ctx *ctx = open_ctx(4, NULL, NULL);
    for (int most = 1; most <= 4; most++) {
        struct meeting m = {0, 0};
        for (int round = 0; m.most < most; round++) { /* on a busy machine it may take some */
            assert_true(round < 1000);
            moe4_pool_run(ctx->pool, 40, (size_t)most, meet, &m);
            assert_int_equal(m.inside, 0);
        }
        for (int round = 0; round < 3; round++) moe4_pool_run(ctx->pool, 40, (size_t)most, meet, &m);
        assert_int_equal(m.most, most);
    }
    moe4_ctx_destroy(ctx);
}

static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Workers without work sleep: by CPU time, so that a busy machine does not matter. */
static void test_idle_threads_sleep(void **state) {
    (void)state;
    moe4_ctx *ctx = open_ctx(moe4_cpu_threads(), NULL, NULL);
    struct count *c = calloc(1, sizeof *c);
    for (int round = 0; round < 5; round++) moe4_parallel_for(ctx, 1000, count_task, c);
    const double before = cpu_seconds();
    nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
    assert_true(cpu_seconds() - before < 0.1);
    free(c);
    moe4_ctx_destroy(ctx);
}

/* ---- an engine's pool ---- */

struct engine {
    size_t n_threads; /* that moe4 may ask for */
    bool threads;     /* run tasks on threads, all at once; otherwise here, the last one first */
    atomic_int n_calls;
};
struct engine_task {
    moe4_task_fn fn;
    void *arg;
    size_t task;
    pthread_t thread;
};

static void *run_one(void *arg) {
    const struct engine_task *t = arg;
    const uint64_t before = get_fpu();
    set_fpu(before | FPU_FLUSH);
    t->fn(t->arg, t->task);
    set_fpu(before);
    return NULL;
}

static void engine_run(void *user, size_t n_tasks, moe4_task_fn fn, void *arg) {
    struct engine *e = user;
    struct engine_task t[8];
    assert_true(n_tasks >= 2 && n_tasks <= e->n_threads);
    atomic_fetch_add(&e->n_calls, 1);
    for (size_t i = n_tasks; i-- > 0;) {
        t[i] = (struct engine_task){fn, arg, i, 0};
        if (e->threads) {
            assert_int_equal(pthread_create(&t[i].thread, NULL, run_one, &t[i]), 0);
        } else {
            run_one(&t[i]);
        }
    }
    for (size_t i = 0; e->threads && i < n_tasks; i++) pthread_join(t[i].thread, NULL);
}

enum { H = 512, I = 256, E = 6, T = 40 };

static size_t threads_of_process(void) {
    size_t n = 0;
    DIR *d = opendir("/proc/self/task");
    assert_non_null(d);
    for (struct dirent *entry; (entry = readdir(d));) n += entry->d_name[0] != '.';
    closedir(d);
    return n;
}

/* Its threads flush subnormals to zero; the bits are those of one thread all the same. */
static void test_engine_pool(void **state) {
    (void)state;
    static float one[T * H], y[T * H];
    struct one_layer layer = one_layer_make(H, I, E, T);
    for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
        moe4_ctx *ctx = open_ctx(1, NULL, NULL);
        moe4_moe_destroy(one_layer_forward(&layer, ctx, one, (moe4_act)act));
        moe4_ctx_destroy(ctx);
        for (size_t n = 1; n <= 8; n += n == 1 ? 1 : 3)
            for (int threads = 0; threads < 2; threads++) {
                struct engine e = {.n_threads = n, .threads = threads};
                const size_t before = threads_of_process();
                ctx = open_ctx(n, engine_run, &e);
                assert_int_equal(threads_of_process(), before);
                assert_int_equal(moe4_ctx_n_threads(ctx), n);
                memset(y, 0xFF, sizeof y);
                moe4_moe_destroy(one_layer_forward(&layer, ctx, y, (moe4_act)act));
                assert_memory_equal(y, one, sizeof y);
                assert_true(n == 1 ? e.n_calls == 0 : e.n_calls > 0);
                moe4_ctx_destroy(ctx);
            }
    }
    one_layer_free(&layer);
}

static void call_inside(void *arg, size_t task) {
    struct count *c = arg;
    moe4_parallel_for(c->ctx, 10, count_task, c);
    count_task(c, 100 + task);
}

static void test_engine_pool_reentered(void **state) {
    (void)state;
    struct engine e = {.n_threads = 3, .threads = true};
    struct count *c = calloc(1, sizeof *c);
    c->ctx = open_ctx(3, engine_run, &e);
    run_from_four_threads(c->ctx);
    engine_run(&e, 3, call_inside, c); /* a task of the engine's that calls moe4 */
    for (int i = 0; i < 10; i++) assert_int_equal(c->done[i], 3);
    for (int i = 100; i < 103; i++) assert_int_equal(c->done[i], 1);
    moe4_ctx_destroy(c->ctx);
    free(c);
}

/* ---- first touch ---- */

/* Large blocks are pages of their own; the largest is the packed weights'. */
struct pages {
    void *store;
    size_t bytes;
    int untouched; /* what the first tasks after its allocation found: all of it; -1: none ran yet */
};

static void *page_alloc(void *user, size_t bytes, size_t align) {
    struct pages *p = user;
    void *data = aligned_alloc(align < 4096 ? 4096 : align, (bytes + 4095) / 4096 * 4096);
    if (data && bytes > p->bytes) *p = (struct pages){data, bytes, -1};
    if (data && bytes > 1 << 20) madvise(data, bytes / 4096 * 4096, MADV_DONTNEED);
    return data;
}

static void page_free(void *user, void *data) {
    (void)user;
    free(data);
}

static void look_then_run(void *user, size_t n_tasks, moe4_task_fn fn, void *arg) {
    struct pages *p = user;
    unsigned char resident[1024];
    if (p->bytes > 1 << 20 && p->untouched < 0) {
        assert_true(p->bytes / 4096 <= sizeof resident);
        assert_int_equal(mincore(p->store, p->bytes / 4096 * 4096, resident), 0);
        p->untouched = 1;
        for (size_t i = 0; i < p->bytes / 4096; i++) p->untouched &= !(resident[i] & 1);
    }
    for (size_t i = 0; i < n_tasks; i++) fn(arg, i);
}

/* Nothing of the packed weights is written before the packing tasks run: pages come from the nodes of their threads. */
static void test_packing_touches_first(void **state) {
    (void)state;
    static float y[T * H];
    struct pages p = {.untouched = -1};
    struct one_layer layer = one_layer_make(H, I, E, T);
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.n_threads = 4;
    o.alloc = page_alloc;
    o.free = page_free;
    o.alloc_user = o.run_user = &p;
    o.run = look_then_run;
    moe4_ctx *ctx;
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_OK);
    const bool in_place = strcmp(moe4_ctx_isa(ctx), "scalar") == 0 || strcmp(moe4_ctx_isa(ctx), "neon") == 0;
    if (in_place) {
        moe4_ctx_destroy(ctx);
        one_layer_free(&layer);
        skip();
    }
    moe4_moe_destroy(one_layer_forward(&layer, ctx, y, MOE4_ACT_TOKEN));
    assert_true(p.bytes > 1 << 20);
    assert_int_equal(p.untouched, 1);
    moe4_ctx_destroy(ctx);
    one_layer_free(&layer);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shared_by_callers),     cmocka_unit_test(test_most_threads),
        cmocka_unit_test(test_idle_threads_sleep),    cmocka_unit_test(test_engine_pool),
        cmocka_unit_test(test_engine_pool_reentered), cmocka_unit_test(test_packing_touches_first),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
