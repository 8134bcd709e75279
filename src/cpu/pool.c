/* A pool of our own, because what it must do is small and not what packaged pools do: several callers at once share the workers (each
 * forward of a serving engine is one caller), memory comes from the context's hooks, idle workers sleep instead of spinning, and
 * ThreadSanitizer sees every edge. Tasks are handed out one by one from a counter, so a hot expert and sixty cold ones both balance. */
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>

#include "../fpenv.h"

/* Lives on its caller's stack while it runs. */
struct job {
    struct job *next;
    moe4_task_fn fn;
    void *arg;
    size_t n_tasks;
    atomic_size_t taken; /* tasks handed out so far; past n_tasks when all are */
    size_t n_workers;    /* workers inside, guarded by the pool's lock: the caller leaves only at 0 */
};

struct moe4_pool {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    struct job *jobs; /* with tasks left to hand out, as far as known */
    bool stop;
    size_t n_threads, n_started;
    pthread_t thread[];
};

static void run_tasks(struct job *job) {
    for (size_t i; (i = atomic_fetch_add_explicit(&job->taken, 1, memory_order_relaxed)) < job->n_tasks;) job->fn(job->arg, i);
}

static void unlink_job(struct moe4_pool *pool, const struct job *job) {
    for (struct job **at = &pool->jobs; *at; at = &(*at)->next)
        if (*at == job) {
            *at = job->next;
            return;
        }
}

static void *worker(void *arg) {
    struct moe4_pool *pool = arg;
    moe4_fpenv_enter(); /* for life: a thread inherits its creator's settings */
    pthread_mutex_lock(&pool->lock);
    while (!pool->stop) {
        struct job *job = pool->jobs;
        if (!job) {
            pthread_cond_wait(&pool->work, &pool->lock);
            continue;
        }
        job->n_workers++;
        pthread_mutex_unlock(&pool->lock);
        run_tasks(job);
        pthread_mutex_lock(&pool->lock);
        unlink_job(pool, job); /* no tasks left to hand out */
        if (--job->n_workers == 0) pthread_cond_broadcast(&pool->done);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

void moe4_pool_run(struct moe4_pool *pool, size_t n_tasks, moe4_task_fn fn, void *arg) {
    struct job job = {.fn = fn, .arg = arg, .n_tasks = n_tasks};
    if (n_tasks <= 1 || pool->n_started == 0) {
        run_tasks(&job);
        return;
    }
    pthread_mutex_lock(&pool->lock);
    job.next = pool->jobs;
    pool->jobs = &job;
    pthread_mutex_unlock(&pool->lock);
    pthread_cond_broadcast(&pool->work);
    run_tasks(&job);
    pthread_mutex_lock(&pool->lock);
    unlink_job(pool, &job);
    while (job.n_workers) pthread_cond_wait(&pool->done, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}

moe4_status moe4_pool_create(struct moe4_pool **pool_ret, const moe4_ctx *ctx, size_t n_threads) {
    struct moe4_pool *pool = moe4_calloc(ctx, 1, sizeof *pool + (n_threads - 1) * sizeof *pool->thread, "thread pool");
    if (!pool) return MOE4_ERROR_MEMORY;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->n_threads = n_threads;
    while (pool->n_started < n_threads - 1) {
        int error = pthread_create(&pool->thread[pool->n_started], NULL, worker, pool);
        if (error) {
            size_t started = pool->n_started;
            moe4_pool_destroy(pool, ctx);
            return moe4_fail(ctx, MOE4_ERROR_MEMORY, "thread pool: %zu of %zu threads started (error %d)", started, n_threads - 1, error);
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
