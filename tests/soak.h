/* What the parts of soak share. */
#ifndef MOE4_SOAK_H
#define MOE4_SOAK_H

#include <math.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "moe4.h"
#include "random.h"

struct soak_memory {
    atomic_size_t n_live, n_calls;
    size_t fail_at; /* the call that gets nothing; 0: none */
};

/* Sides of an ISA: contexts with 1, 2 and 5 threads of their own, and the trial's. */
enum { SOAK_ISAS = 4, SOAK_OWN = 3, SOAK_SIDES };

/* How the trial's pool runs tasks. */
enum soak_pool_kind { SOAK_OWN_POOL, SOAK_IN_ORDER, SOAK_REVERSED, SOAK_THREADS, SOAK_POOLS };

struct soak {
    uint64_t seed, random; /* of the trial under way */
    struct soak_memory memory;
    struct {
        const char *name;
        moe4_ctx *ctx[SOAK_SIDES];
    } isa[SOAK_ISAS + 1]; /* [0]: scalar; one more to try */
    size_t n_isas;
    struct {
        enum soak_pool_kind kind;
        size_t n_threads;
        bool cache, damaged; /* has the folder; files in it were changed */
    } pool;                  /* the trial's */
    char folder[96];
    size_t n_pools[SOAK_POOLS], n_files;
    size_t n_rows, n_far; /* rows of layers compared with the scalar ones; not near them */
    size_t n_refused;     /* allocations that were made to fail */
};

void soak_open_all(struct soak *s);
void soak_close_all(struct soak *s);
/* The trial's own contexts, the last side of each ISA. */
void soak_open_pool(struct soak *s);
void soak_close_pool(struct soak *s);
/* Whether to run once more after n_done times: twice where packed weights may come from the folder, whose files may be damaged between. */
bool soak_again(struct soak *s, size_t side, size_t n_done);
moe4_status soak_open(moe4_ctx **ctx_ret, struct soak_memory *memory, const char *isa, size_t n_threads);
void soak_fail(const struct soak *s, const char *fmt, ...) __attribute__((format(printf, 2, 3), noreturn));
void soak_ok(const struct soak *s, const moe4_ctx *ctx, moe4_status status, const char *what);
/* Exactly n * size bytes for a sanitizer's eyes, at a multiple of 64, all 0xFF; for free. */
void *soak_alloc(const struct soak *s, size_t n, size_t size);

moe4_weight soak_weight(struct soak *s, moe4_dtype dtype, size_t rows, size_t cols);
void soak_weight_free(moe4_weight *w);
/* [n_rows, k] of moderate size; a row in fifty has a NaN or Inf. */
float *soak_rows(struct soak *s, size_t n_rows, size_t k);
/* Rows of zeros but for one block of any scale, around `size`: a product of NVFP4 codes is one term then, exact on every ISA. */
float *soak_single_blocks(struct soak *s, size_t n_rows, size_t k, float size);

/* One trial each. */
void soak_layer(struct soak *s);
void soak_linear(struct soak *s);
void soak_grouped(struct soak *s);
void soak_codec(struct soak *s);

#endif
