/* What tests of a device share: a context on the CPU and one on the device, buffers of either, and how close two results are. */
#ifndef MOE4_TESTS_DEVICE_H
#define MOE4_TESTS_DEVICE_H

#include "reference.h"

static moe4_ctx *cpu, *gpu;
static char logged[512];

static inline void keep_log(void *user, const char *line) {
    (void)user;
    snprintf(logged, sizeof logged, "%s", line);
}

static inline moe4_ctx *open_device(const char *device, uint32_t isa_mask) {
    moe4_ctx *ctx;
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.device = device;
    o.isa_mask = isa_mask;
    o.log = keep_log;
    return moe4_ctx_create(&ctx, &o) == MOE4_OK ? ctx : NULL;
}

/* 0, or the exit status of a test that cannot run here: 77 where there is no device. */
static inline int open_both(const char *test, uint32_t cpu_isa_mask) {
    gpu = open_device("cuda:0", 0);
    cpu = open_device(NULL, cpu_isa_mask);
    if (gpu && cpu) return 0;
    printf("%s: skipped: %s\n", test, logged);
    return strstr(logged, "no NVIDIA driver") || strstr(logged, "shows 0 devices") ? 77 : 1;
}

static inline void close_both(void) {
    moe4_ctx_destroy(cpu);
    moe4_ctx_destroy(gpu);
}

/* bytes of the device's memory, `shift` past where they were allocated, with host's contents (NULL: 0xEE). */
static inline void *on_device(const void *host, size_t bytes, size_t shift) {
    void *p, *filled = host ? NULL : malloc(bytes + 1);
    if (filled) memset(filled, 0xEE, bytes);
    OK(gpu, moe4_memory_alloc(gpu, &p, bytes + shift));
    OK(gpu, moe4_memory_copy(gpu, (char *)p + shift, host ? host : filled, bytes, NULL));
    free(filled);
    return (char *)p + shift;
}

static inline void from_device(void *host, const void *there, size_t bytes) {
    OK(gpu, moe4_memory_copy(gpu, host, there, bytes, NULL));
}

static inline void free_device(void *there, size_t shift) {
    moe4_memory_free(gpu, (char *)there - shift);
}

/* ---- buffers of a context, freed together ---- */

enum { MOST_GIVEN = 64 };
static struct {
    moe4_ctx *ctx;
    void *data;
} given_data[MOST_GIVEN];
static int n_given;

/* A copy of host memory, or `bytes` of 0xFF (NaN, -1) for NULL, where ctx reads it. */
static inline void *give(moe4_ctx *ctx, const void *host, size_t bytes) {
    char *poison = malloc(bytes + 1);
    memset(poison, 0xFF, bytes + 1);
    assert_true(n_given < MOST_GIVEN);
    void *data;
    OK(ctx, moe4_memory_alloc(ctx, &data, bytes + 1));
    OK(ctx, moe4_memory_copy(ctx, data, host ? host : poison, bytes, NULL));
    free(poison);
    given_data[n_given].ctx = ctx;
    given_data[n_given++].data = data;
    return data;
}

static inline moe4_workspace give_workspace(moe4_ctx *ctx, size_t bytes) {
    return (moe4_workspace){give(ctx, NULL, bytes), bytes};
}

static inline void take(moe4_ctx *ctx, void *host, const void *data, size_t bytes) {
    OK(ctx, moe4_memory_copy(ctx, host, data, bytes, NULL));
}

static inline void free_given(void) {
    while (n_given) {
        n_given--;
        moe4_memory_free(given_data[n_given].ctx, given_data[n_given].data);
    }
}

/* ---- failures are counted, so that one run shows all of them ---- */

static int n_failures;
#define EXPECT(condition, ...)                              \
    do {                                                    \
        if (!(condition)) {                                 \
            n_failures++;                                   \
            print_error(__VA_ARGS__);                       \
            print_error("  [%s:%d]\n", __FILE__, __LINE__); \
        }                                                   \
    } while (0)
#define NO_FAILURES()                                                 \
    do {                                                              \
        int n_ = n_failures;                                          \
        n_failures = 0;                                               \
        if (n_) fail_msg("%d expectations failed, listed above", n_); \
    } while (0)

/* ---- how close ---- */

/* Relative L2 of a against b. */
static inline double relative(const float *a, const float *b, size_t n) {
    double num = 0, den = 0;
    for (size_t i = 0; i < n; i++) {
        num += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        den += (double)b[i] * b[i];
    }
    return num == 0 ? 0 : sqrt(num / den);
}

struct closeness {
    double worst;     /* relative L2 of a row */
    size_t n_off, at; /* rows that are past the tolerance; the worst row */
};

/* Rows of got against want. NaN agrees with NaN, a row of zeros only with zeros. */
static inline struct closeness compare_rows(const float *got, const float *want, size_t rows, size_t cols, double tolerance) {
    struct closeness c = {0, 0, 0};
    for (size_t r = 0; r < rows; r++) {
        double num = 0, den = 0;
        for (size_t j = 0; j < cols; j++) {
            double a = got[r * cols + j], b = want[r * cols + j];
            if (isnan(a) && isnan(b)) continue;
            num += (a - b) * (a - b);
            den += b * b;
        }
        double error = num == 0 ? 0 : sqrt(num / den);
        if (!(error <= tolerance)) c.n_off++;
        if (!(error <= c.worst)) {
            c.worst = error;
            c.at = r;
        }
    }
    return c;
}

/* What docs/numerics.md lets two implementations differ by. An ulp of h may move a code of its rounding to the neighbour: then that row,
 * and few rows, differ by more. */
static inline void expect_close(const float *got, const float *want, size_t rows, size_t cols, moe4_act act_h, const char *what) {
    bool plain = act_h == MOE4_ACT_BF16, bf16 = act_h == MOE4_ACT_W4A16;
    double tolerance = plain ? 1e-5 : bf16 ? 1e-4 : 5e-4, moved = plain ? 1e-5 : bf16 ? 5e-3 : 0.1;
    struct closeness c = compare_rows(got, want, rows, cols, tolerance);
    EXPECT(c.worst <= moved && c.n_off <= 1 + rows / 25, "%s: %zu of %zu rows are off, the worst %zu by %.2e: got %g %g, want %g %g\n",
           what, c.n_off, rows, c.at, c.worst, (double)got[c.at * cols], (double)got[c.at * cols + cols - 1], (double)want[c.at * cols],
           (double)want[c.at * cols + cols - 1]);
}

static inline void widen(float *to, const void *from, moe4_dtype dtype, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = dtype == MOE4_F32 ? ((const float *)from)[i] : moe4_bf16_to_float(((const uint16_t *)from)[i]);
}

#endif
