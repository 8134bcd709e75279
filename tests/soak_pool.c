/* The contexts that trials run in: the standing ones, and for each trial one with a pool, and maybe a cache folder, of its own. */
#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "soak.h"

enum { MAX_THREADS = 12 };

/* ---- memory that is counted ---- */

static void *count_alloc(void *user, size_t bytes, size_t align) {
    struct soak_memory *m = user;
    if (m->fail_at && atomic_fetch_add(&m->n_calls, 1) + 1 == m->fail_at) return NULL;
    void *p = NULL;
    if (posix_memalign(&p, align < sizeof p ? sizeof p : align, bytes) != 0) return NULL;
    atomic_fetch_add(&m->n_live, 1);
    return p;
}

static void count_free(void *user, void *data) {
    struct soak_memory *m = user;
    atomic_fetch_sub(&m->n_live, 1);
    free(data);
}

moe4_status soak_open(moe4_ctx **ctx_ret, struct soak_memory *memory, const char *isa, size_t n_threads) {
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.n_threads = n_threads;
    o.isa_mask = moe4_isa_mask(isa);
    o.alloc = count_alloc;
    o.free = count_free;
    o.alloc_user = memory;
    return moe4_ctx_create(ctx_ret, &o);
}

void soak_open_all(struct soak *s) {
    static const char *const names[] = {"scalar", "avx2", "avx512vnni", "avx512bf16", "neon", "neondot", "neoni8mm"};
    static const size_t threads[SOAK_OWN] = {1, 2, 5};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        for (size_t t = 0; t < SOAK_OWN; t++) {
            if (soak_open(&s->isa[s->n_isas].ctx[t], &s->memory, names[i], threads[t]) != MOE4_OK)
                soak_fail(s, "no context for %s", names[i]);
            s->isa[s->n_isas].name = names[i];
            if (t + 1 < SOAK_OWN) continue;
            const bool runs = strcmp(moe4_ctx_isa(s->isa[s->n_isas].ctx[0]), names[i]) == 0;
            for (size_t u = 0; !runs && u < SOAK_OWN; u++) moe4_ctx_destroy(s->isa[s->n_isas].ctx[u]);
            s->n_isas += runs;
        }
    const char *tmp = getenv("TMPDIR");
    snprintf(s->folder, sizeof s->folder, "%s/moe4-soak-XXXXXX", tmp && strlen(tmp) < 64 ? tmp : "/tmp");
    if (!mkdtemp(s->folder)) soak_fail(s, "%s: cannot make the folder", s->folder);
}

void soak_close_all(struct soak *s) {
    for (size_t i = 0; i < s->n_isas; i++)
        for (size_t t = 0; t < SOAK_OWN; t++) moe4_ctx_destroy(s->isa[i].ctx[t]);
    if (s->memory.n_live) soak_fail(s, "%zu blocks of memory are left", (size_t)s->memory.n_live);
    if (rmdir(s->folder) != 0) soak_fail(s, "%s: a file is left", s->folder);
}

/* ---- the caller's pool ---- */

struct call {
    moe4_task_fn fn;
    void *arg;
    size_t task;
};

static void *run_call(void *arg) {
    const struct call *c = arg;
    c->fn(c->arg, c->task);
    return NULL;
}

/* Tasks in order, the last one first, or each on a thread of its own; those that threads are short for run here. */
static void run_tasks(void *user, size_t n_tasks, moe4_task_fn fn, void *arg) {
    struct soak *s = user;
    struct call call[MAX_THREADS];
    pthread_t thread[MAX_THREADS];
    bool started[MAX_THREADS] = {false};
    if (n_tasks < 2 || n_tasks > s->pool.n_threads) soak_fail(s, "%zu tasks for a pool of %zu threads", n_tasks, s->pool.n_threads);
    for (size_t i = 0; i < n_tasks; i++) call[i] = (struct call){fn, arg, s->pool.kind == SOAK_REVERSED ? n_tasks - 1 - i : i};
    for (size_t i = 1; s->pool.kind == SOAK_THREADS && i < n_tasks; i++)
        started[i] = pthread_create(&thread[i], NULL, run_call, &call[i]) == 0;
    for (size_t i = 0; i < n_tasks; i++)
        if (!started[i]) run_call(&call[i]);
    for (size_t i = 0; i < n_tasks; i++)
        if (started[i]) pthread_join(thread[i], NULL);
}

/* ---- the folder of packed weights ---- */

/* The cache speaks only of files that are not as it left them. */
static void hear(void *user, const char *line) {
    const struct soak *s = user;
    if (!s->pool.damaged) soak_fail(s, "the cache's files are whole, but: %s", line);
}

static void damage(struct soak *s, const char *path) {
    const size_t what = random_below(&s->random, 3);
    FILE *f = what ? fopen(path, "r+b") : NULL;
    if (!f) { /* gone: no reason to say anything */
        remove(path);
        return;
    }
    s->pool.damaged = true;
    fseek(f, 0, SEEK_END);
    const size_t bytes = (size_t)ftell(f), at = random_below(&s->random, bytes);
    if (what == 1) {
        fseek(f, (long)at, SEEK_SET);
        const int c = fgetc(f);
        fseek(f, (long)at, SEEK_SET);
        fputc(c ^ (1 << random_below(&s->random, 8)), f);
    } else if (ftruncate(fileno(f), (off_t)at) != 0) {
        soak_fail(s, "%s: cannot cut it", path);
    }
    fclose(f);
}

static void each_file(struct soak *s, bool away) {
    char path[sizeof s->folder + 256];
    DIR *d = opendir(s->folder);
    if (!d) soak_fail(s, "%s: cannot list it", s->folder);
    for (struct dirent *e; (e = readdir(d));) {
        if (e->d_name[0] == '.' && (e->d_name[1] == '\0' || strcmp(e->d_name, "..") == 0)) continue;
        if (e->d_name[0] == '.') soak_fail(s, "%s/%s is left", s->folder, e->d_name);
        snprintf(path, sizeof path, "%s/%s", s->folder, e->d_name);
        s->n_files += away;
        if (away) {
            remove(path);
        } else {
            damage(s, path);
        }
    }
    closedir(d);
}

/* ---- a trial's own context ---- */

void soak_open_pool(struct soak *s) {
    s->pool.kind = (enum soak_pool_kind)random_below(&s->random, SOAK_POOLS);
    s->pool.n_threads = 1 + random_below(&s->random, MAX_THREADS);
    s->pool.cache = random_below(&s->random, 2) == 0;
    s->pool.damaged = false;
    s->n_pools[s->pool.kind]++;
    for (size_t i = 0; i < s->n_isas; i++) {
        moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
        o.n_threads = s->pool.n_threads;
        o.isa_mask = moe4_isa_mask(s->isa[i].name);
        o.alloc = count_alloc;
        o.free = count_free;
        o.alloc_user = &s->memory;
        o.run = s->pool.kind == SOAK_OWN_POOL ? NULL : run_tasks;
        o.run_user = o.log_user = s;
        o.log = hear;
        o.cache = s->pool.cache ? s->folder : NULL;
        if (moe4_ctx_create(&s->isa[i].ctx[SOAK_OWN], &o) != MOE4_OK) soak_fail(s, "no context of %zu threads", o.n_threads);
    }
}

void soak_close_pool(struct soak *s) {
    for (size_t i = 0; i < s->n_isas; i++) moe4_ctx_destroy(s->isa[i].ctx[SOAK_OWN]);
    each_file(s, true);
}

bool soak_again(struct soak *s, size_t side, size_t n_done) {
    if (n_done == 0) return true;
    if (n_done == 2 || side < SOAK_OWN || !s->pool.cache) return false;
    if (random_below(&s->random, 2) == 0) each_file(s, false);
    return true;
}
