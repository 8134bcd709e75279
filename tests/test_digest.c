/* The digest that finds packed weights: contents that differ in anything differ in it, and threads change nothing. */
#include "digest.h"
#include "reference.h"

enum { SHARE = 1 << 20 }; /* digested at once; src/digest.c */

static struct moe4_digest of(size_t n_threads, const struct moe4_piece *pieces, size_t n) {
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.n_threads = n_threads;
    moe4_ctx *ctx;
    struct moe4_digest d;
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_OK);
    OK(ctx, moe4_digest_pieces(ctx, &d, pieces, n));
    moe4_ctx_destroy(ctx);
    return d;
}

static struct moe4_digest of_one(const void *data, size_t bytes) {
    return of(1, &(struct moe4_piece){data, bytes}, 1);
}

static void assert_differ(struct moe4_digest a, struct moe4_digest b) {
    assert_true(a.bits[0] != b.bits[0]);
    assert_true(a.bits[1] != b.bits[1]);
}

/* Zeros of every length about the steps and shares they are digested in. */
static void test_lengths(void **state) {
    (void)state;
    static const size_t lengths[] = {0, 1, 7, 8, 63, 64, 65, 127, 128, SHARE - 1, SHARE, SHARE + 1, 2 * SHARE};
    enum { N = sizeof lengths / sizeof *lengths };
    struct moe4_digest d[N];
    uint8_t *zeros = calloc(1, 2 * SHARE);
    for (size_t i = 0; i < N; i++) {
        d[i] = of_one(zeros, lengths[i]);
        for (size_t j = 0; j < i; j++) assert_differ(d[i], d[j]);
    }
    free(zeros);
}

/* One bit anywhere: every one of a step, some of the rest. */
static void test_bits(void **state) {
    (void)state;
    const size_t bytes = 2 * SHARE + 100;
    uint8_t *data = malloc(bytes);
    for (size_t i = 0; i < bytes; i++) data[i] = (uint8_t)ref_random();
    const struct moe4_digest whole = of_one(data, bytes);
    for (size_t bit = 0; bit < 8 * bytes; bit += bit < 8 * 64 ? 1 : bit > 8 * (bytes - 100) ? 7 : 77777) {
        data[bit / 8] ^= (uint8_t)(1u << bit % 8);
        assert_differ(of_one(data, bytes), whole);
        data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    const struct moe4_digest again = of_one(data, bytes);
    assert_memory_equal(&again, &whole, sizeof whole);
    free(data);
}

/* The same bytes cut elsewhere, in another order, or with an empty piece more; on any number of threads. */
static void test_pieces(void **state) {
    (void)state;
    const size_t bytes = 3 * SHARE;
    uint8_t *data = malloc(bytes);
    for (size_t i = 0; i < bytes; i++) data[i] = (uint8_t)ref_random();
    const struct moe4_piece cuts[][3] = {
        {{data, bytes}, {NULL, 0}, {NULL, 0}},
        {{NULL, 0}, {data, bytes}, {NULL, 0}},
        {{data, SHARE}, {data + SHARE, 2 * SHARE}, {NULL, 0}},
        {{data, 2 * SHARE}, {data + 2 * SHARE, SHARE}, {NULL, 0}},
        {{data + SHARE, 2 * SHARE}, {data, SHARE}, {NULL, 0}},
        {{data, 64}, {data + 64, bytes - 64}, {NULL, 0}},
        {{data, 64}, {data + 64, 64}, {data + 128, bytes - 128}},
    };
    enum { N = sizeof cuts / sizeof *cuts };
    struct moe4_digest d[N];
    for (size_t i = 0; i < N; i++) {
        d[i] = of(1, cuts[i], 3);
        for (size_t j = 0; j < i; j++) assert_differ(d[i], d[j]);
        for (size_t n_threads = 2; n_threads <= 5; n_threads += 3) {
            const struct moe4_digest many = of(n_threads, cuts[i], 3);
            assert_memory_equal(&many, &d[i], sizeof many);
        }
    }
    assert_differ(of(1, cuts[0], 2), d[0]);
    free(data);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_bits),
        cmocka_unit_test(test_pieces),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
