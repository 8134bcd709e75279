/* A pool of our own, because what it must do is small and not what packaged pools do: several callers at once share the workers (each
 * forward of a serving engine is one caller), memory comes from the context's hooks, idle workers sleep, and ThreadSanitizer sees every
 * edge. Tasks are handed out one by one from a counter, so a hot expert and sixty cold ones both balance.
 *
 * A layer of a small model is a dozen jobs of a few microseconds each, and waking a thread that sleeps takes longer than such a job. So
 * whoever waits first looks at a word of memory for MOE4_SPIN_MICROSECONDS, and only those that sleep by then are woken. */
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "../fpenv.h"

/* Lives on its caller's stack while it runs. */
struct job {
    struct job *next;
    moe4_task_fn fn;
    void *arg;
    size_t n_tasks, max_workers;
    atomic_size_t taken;     /* tasks handed out so far; past n_tasks when all are */
    atomic_size_t n_workers; /* workers inside, changed under the pool's lock: the caller leaves only at 0 */
};

struct moe4_pool {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    struct job *jobs;                        /* with tasks left to hand out, as far as known */
    size_t n_looking, n_sleeping, n_waiting; /* workers without work; callers that sleep until theirs is done */
    bool stop, spins;
    moe4_run_fn run; /* the caller's pool, or NULL */
    void *run_user;
    size_t n_threads, n_started;
    _Alignas(64) atomic_size_t n_posted; /* changes with every job; on a line of its own because workers look at it */
    _Alignas(64) pthread_t thread[];
};

static void run_tasks(struct job *job) {
    for (size_t i; (i = atomic_fetch_add_explicit(&job->taken, 1, memory_order_relaxed)) < job->n_tasks;) job->fn(job->arg, i);
}

/* ---- waiting ---- */

static inline void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Looks until *word is not `old` (changes) or until it is 0 (!changes), for a bounded time. */
static void look(const atomic_size_t *word, bool changes, size_t old) {
    enum { LOOKS_PER_CLOCK = 32 };
    const int64_t end = nanoseconds() + MOE4_SPIN_MICROSECONDS * 1000;
    do {
        for (int i = 0; i < LOOKS_PER_CLOCK; i++) {
            const size_t now = atomic_load_explicit(word, memory_order_acquire);
            if (changes ? now != old : now == 0) return;
            pause_cpu();
        }
    } while (nanoseconds() < end);
}

/* ---- workers ---- */

static void unlink_job(struct moe4_pool *pool, const struct job *job) {
    for (struct job **at = &pool->jobs; *at; at = &(*at)->next)
        if (*at == job) {
            *at = job->next;
            return;
        }
}

static struct job *find_job(const struct moe4_pool *pool) {
    struct job *job = pool->jobs;
    while (job && (atomic_load_explicit(&job->n_workers, memory_order_relaxed) >= job->max_workers ||
                   atomic_load_explicit(&job->taken, memory_order_relaxed) >= job->n_tasks))
        job = job->next;
    return job;
}

/* Takes part in a job; the lock is held before and after. */
static void join_job(struct moe4_pool *pool, struct job *job) {
    atomic_fetch_add_explicit(&job->n_workers, 1, memory_order_relaxed);
    pthread_mutex_unlock(&pool->lock);
    run_tasks(job);
    pthread_mutex_lock(&pool->lock);
    unlink_job(pool, job);                                                                      /* no tasks left to hand out */
    const bool last = atomic_fetch_sub_explicit(&job->n_workers, 1, memory_order_release) == 1; /* the caller may be gone with the job */
    if (last && pool->n_waiting) pthread_cond_broadcast(&pool->done);
}

/* Returns when there may be a job; the lock is held before and after. */
static void wait_for_work(struct moe4_pool *pool) {
    const size_t seen = atomic_load_explicit(&pool->n_posted, memory_order_relaxed);
    if (pool->spins) {
        pool->n_looking++;
        pthread_mutex_unlock(&pool->lock);
        look(&pool->n_posted, true, seen);
        pthread_mutex_lock(&pool->lock);
        if (atomic_load_explicit(&pool->n_posted, memory_order_relaxed) == seen) pool->n_looking--; /* else post took it into account */
    }
    pool->n_sleeping++;
    while (!pool->stop && atomic_load_explicit(&pool->n_posted, memory_order_relaxed) == seen) pthread_cond_wait(&pool->work, &pool->lock);
    pool->n_sleeping--;
}

static void *worker(void *arg) {
    struct moe4_pool *pool = arg;
    moe4_fpenv_enter(); /* for life: a thread inherits its creator's settings */
    pthread_mutex_lock(&pool->lock);
    while (!pool->stop) {
        struct job *job = find_job(pool);
        if (job) {
            join_job(pool, job);
        } else {
            wait_for_work(pool);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* ---- callers ---- */

static void post(struct moe4_pool *pool, struct job *job) {
    pthread_mutex_lock(&pool->lock);
    job->next = pool->jobs;
    pool->jobs = job;
    atomic_fetch_add_explicit(&pool->n_posted, 1, memory_order_release);
    size_t wake = job->max_workers > pool->n_looking ? job->max_workers - pool->n_looking : 0;
    if (wake > pool->n_sleeping) wake = pool->n_sleeping;
    pool->n_looking = 0; /* all of them see this job */
    pthread_mutex_unlock(&pool->lock);
    while (wake--) pthread_cond_signal(&pool->work);
}

static void finish(struct moe4_pool *pool, struct job *job) {
    pthread_mutex_lock(&pool->lock);
    unlink_job(pool, job); /* nobody joins any more */
    pthread_mutex_unlock(&pool->lock);
    if (pool->spins) look(&job->n_workers, false, 0);
    if (atomic_load_explicit(&job->n_workers, memory_order_acquire) == 0) return;
    pthread_mutex_lock(&pool->lock);
    pool->n_waiting++;
    while (atomic_load_explicit(&job->n_workers, memory_order_acquire)) pthread_cond_wait(&pool->done, &pool->lock);
    pool->n_waiting--;
    pthread_mutex_unlock(&pool->lock);
}

/* The caller's pool runs lanes, each of which takes tasks from the counter: so they balance however it deals them out. */
static void lane(void *arg, size_t i) {
    (void)i;
    struct moe4_fpenv env = moe4_fpenv_enter();
    run_tasks(arg);
    moe4_fpenv_leave(env);
}

void moe4_pool_run(struct moe4_pool *pool, size_t n_tasks, size_t max_threads, moe4_task_fn fn, void *arg) {
    size_t n_threads = pool->n_threads;
    if (n_threads > max_threads) n_threads = max_threads;
    if (n_threads > n_tasks) n_threads = n_tasks;
    struct job job = {.fn = fn, .arg = arg, .n_tasks = n_tasks};
    if (n_threads <= 1) {
        run_tasks(&job);
    } else if (pool->run) {
        pool->run(pool->run_user, n_threads, lane, &job);
    } else {
        job.max_workers = n_threads - 1;
        post(pool, &job);
        run_tasks(&job);
        finish(pool, &job);
    }
}

/* ---- life ---- */

moe4_status moe4_pool_create(struct moe4_pool **pool_ret, const moe4_ctx *ctx, size_t n_threads, moe4_run_fn run, void *run_user) {
    const size_t n_own = run ? 0 : n_threads - 1;
    struct moe4_pool *pool = moe4_calloc(ctx, 1, sizeof *pool + n_own * sizeof *pool->thread, "thread pool");
    if (!pool) return MOE4_ERROR_MEMORY;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->n_threads = n_threads;
    pool->spins = n_threads <= moe4_cpu_threads(); /* where threads share a CPU, the one that looks keeps another from working */
    pool->run = run;
    pool->run_user = run_user;
    while (pool->n_started < n_own) {
        int error = pthread_create(&pool->thread[pool->n_started], NULL, worker, pool);
        if (error) {
            size_t started = pool->n_started;
            moe4_pool_destroy(pool, ctx);
            return moe4_fail(ctx, MOE4_ERROR_MEMORY, "thread pool: %zu of %zu threads started (error %d)", started, n_own, error);
        }
        pool->n_started++;
    }
    *pool_ret = pool;
    return MOE4_OK;
}

void moe4_pool_destroy(struct moe4_pool *pool, const moe4_ctx *ctx) {
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    atomic_fetch_add(&pool->n_posted, 1); /* for those that look */
    pthread_mutex_unlock(&pool->lock);
    pthread_cond_broadcast(&pool->work);
    for (size_t i = 0; i < pool->n_started; i++) pthread_join(pool->thread[i], NULL);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->done);
    pthread_mutex_destroy(&pool->lock);
    moe4_free(ctx, pool);
}

size_t moe4_pool_n_threads(const struct moe4_pool *pool) {
    return pool->n_threads;
}
