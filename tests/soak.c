/* soak [SECONDS [SEED]]: random layers, linears, grouped linears and codec calls on every ISA and several thread counts against the scalar
 * reference, until the time is over. Bits must be the same for any thread count, any batch and for the codec on any ISA; products of other
 * ISAs sum in another order and must be near. Each trial also has a pool of its own, moe4's or the caller's, and half of them a folder of
 * packed weights whose files are damaged now and then. Every object comes from a counting allocator, which must end where it began, and
 * which fails now and then. The last line says what ran; exit status 1 at the first difference, with the seed that repeats it. */
#include "soak.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* ---- checks ---- */

void soak_fail(const struct soak *s, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "soak: seed %llu: ", (unsigned long long)s->seed);
    vfprintf(stderr, fmt, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

void soak_ok(const struct soak *s, const moe4_ctx *ctx, moe4_status status, const char *what) {
    if (status != MOE4_OK) soak_fail(s, "%s: %s: %s", what, moe4_status_text(status), moe4_ctx_error(ctx));
}

void *soak_alloc(const struct soak *s, size_t n, size_t size) {
    void *p = NULL;
    const size_t bytes = n * size;
    if (posix_memalign(&p, 64, bytes ? bytes : 1) != 0) soak_fail(s, "no memory for %zu x %zu bytes", n, size);
    return memset(p, 0xFF, n * size); /* NaN: nothing may be read before it is written */
}

/* ---- weights ---- */

moe4_weight soak_weight(struct soak *s, moe4_dtype dtype, size_t rows, size_t cols) {
    moe4_weight w = {.dtype = dtype, .rows = rows, .cols = cols, .global = 1};
    const size_t n = rows * cols;
    if (dtype == MOE4_NVFP4) {
        uint8_t *codes = soak_alloc(s, n / 2, 1), *scale = soak_alloc(s, n / MOE4_BLOCK, 1);
        for (size_t i = 0; i < n / 2; i++) codes[i] = (uint8_t)(random_u64(&s->random) >> 32);
        for (size_t i = 0; i < n / MOE4_BLOCK; i++) /* some zero or subnormal */
            scale[i] = (uint8_t)(random_below(&s->random, 32) ? 0x28 + random_below(&s->random, 24) : random_below(&s->random, 8));
        w.data = codes;
        w.scale = scale;
        w.global = ldexpf(0.5f + random_unit(&s->random) / 2, -3);
        w.input_scale = ldexpf(0.5f + random_unit(&s->random) / 2, -8);
    } else {
        char *data = soak_alloc(s, n, moe4_dtype_bytes(dtype));
        for (size_t i = 0; i < n; i++) {
            const float v = 0.1f * random_normal(&s->random);
            const uint16_t half = dtype == MOE4_BF16 ? moe4_bf16_from_float(v) : moe4_f16_from_float(v);
            memcpy(data + i * moe4_dtype_bytes(dtype), dtype == MOE4_F32 ? (const void *)&v : &half, moe4_dtype_bytes(dtype));
        }
        w.data = data;
    }
    if (random_below(&s->random, 4) == 0) {
        float *bias = soak_alloc(s, rows, sizeof *bias);
        for (size_t i = 0; i < rows; i++) bias[i] = random_normal(&s->random);
        w.bias = bias;
    }
    return w;
}

void soak_weight_free(moe4_weight *w) {
    free((void *)w->data);
    free((void *)w->scale);
    free((void *)w->bias);
}

float *soak_rows(struct soak *s, size_t n_rows, size_t k) {
    static const int kinds[] = {0, 5, 6}; /* of random_row: sums of the others leave fp32 */
    float *x = soak_alloc(s, n_rows * k, sizeof *x);
    for (size_t r = 0; r < n_rows; r++) {
        random_row(&s->random, x + r * k, k, kinds[random_below(&s->random, 3)]);
        if (random_below(&s->random, 50) == 0) x[r * k + random_below(&s->random, k)] = random_below(&s->random, 2) ? NAN : -INFINITY;
    }
    return x;
}

float *soak_single_blocks(struct soak *s, size_t n_rows, size_t k, float size) {
    float *x = soak_alloc(s, n_rows * k, sizeof *x);
    memset(x, 0, n_rows * k * sizeof *x);
    for (size_t r = 0; r < n_rows; r++) {
        float *block = x + r * k + MOE4_BLOCK * random_below(&s->random, k / MOE4_BLOCK);
        const float scale = size * ldexpf(1 + random_unit(&s->random), (int)random_below(&s->random, 22) - 12);
        for (size_t i = 0; i < MOE4_BLOCK; i++) block[i] = scale * random_normal(&s->random);
    }
    return x;
}

/* ---- the loop ---- */

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int argc, char **argv) {
    static struct soak s;
    static const struct {
        const char *name;
        void (*run)(struct soak *s);
    } kinds[] = {{"layers", soak_layer}, {"linears", soak_linear}, {"grouped linears", soak_grouped}, {"codec calls", soak_codec}};
    enum { N_KINDS = sizeof kinds / sizeof *kinds };
    unsigned long long n_run[N_KINDS] = {0};
    const double start = seconds(), length = argc > 1 ? atof(argv[1]) : 5;
    double told = start;
    s.seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
    soak_open_all(&s);
    for (; seconds() < start + length; s.seed++) {
        s.random = s.seed * 0x9e3779b97f4a7c15u + 1;
        for (int i = 0; i < 4; i++) random_u64(&s.random); /* neighbouring seeds part */
        const size_t kind = random_below(&s.random, N_KINDS);
        soak_open_pool(&s);
        kinds[kind].run(&s);
        soak_close_pool(&s);
        n_run[kind]++;
        if (s.n_far > 5 + s.n_rows / 1000) soak_fail(&s, "%zu of %zu rows are far from the scalar ones", s.n_far, s.n_rows);
        if (seconds() > told + 60) {
            told = seconds();
            fprintf(stderr, "soak: %.0f s, seed %llu\n", told - start, (unsigned long long)s.seed);
        }
    }
    soak_close_all(&s);
    printf("soak: no difference in %.0f s on", seconds() - start);
    for (size_t i = 0; i < s.n_isas; i++) printf(" %s", s.isa[i].name);
    for (size_t i = 0; i < N_KINDS; i++) printf("%s %llu %s", i ? "," : ":", n_run[i], kinds[i].name);
    printf("; %zu of %zu layer rows had a code on the other side of a tie, %zu allocations were made to fail", s.n_far, s.n_rows,
           s.n_refused);
    printf("; own pools %zu, callers' in order %zu, reversed %zu, on threads %zu; %zu files of packed weights\n", s.n_pools[SOAK_OWN_POOL],
           s.n_pools[SOAK_IN_ORDER], s.n_pools[SOAK_REVERSED], s.n_pools[SOAK_THREADS], s.n_files);
    return 0;
}
