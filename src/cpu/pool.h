/* Threads: how many, and a pool that runs numbered tasks. */
#ifndef MOE4_CPU_POOL_H
#define MOE4_CPU_POOL_H

#include "../internal.h"

enum { MOE4_MAX_THREADS = 1024 };

/* How long a worker without work looks for some before it sleeps, and a caller for its workers' end. */
enum { MOE4_SPIN_MICROSECONDS = 50 };

struct moe4_pool;

/* n_threads counts the caller of moe4_pool_run: n_threads - 1 threads are started, or none when `run` is the caller's own pool. */
moe4_status moe4_pool_create(struct moe4_pool **pool_ret, const moe4_ctx *ctx, size_t n_threads, moe4_run_fn run, void *run_user);
void moe4_pool_destroy(struct moe4_pool *pool, const moe4_ctx *ctx);
size_t moe4_pool_n_threads(const struct moe4_pool *pool);

/* fn(arg, task) once for each task < n_tasks, on the caller and whichever workers are free, at most max_threads in all; returns when all
 * are done. Any number of threads may run at once. Which thread takes which task is not fixed: tasks write to places of their own. */
void moe4_pool_run(struct moe4_pool *pool, size_t n_tasks, size_t max_threads, moe4_task_fn fn, void *arg);

/* CPUs this process may use: its affinity mask, bounded by its cgroup's CPU quota (rounded up); at least 1. */
size_t moe4_cpu_threads(void);

#endif
