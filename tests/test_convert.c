/* Conversions of one number: exhaustively where the inputs can be counted, about every tie otherwise, and against CUDA's own. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <float.h>
#include <math.h>

#include "bits.h"
#include "moe4.h"

static const double magnitudes[8] = {0, .5, 1, 1.5, 2, 3, 4, 6};

/* By definition: the nearest magnitude, of two equally near the one with the even code. */
static uint8_t nearest_e2m1(float x) {
    int best = 0;
    double a = fmin(fabs((double)x), 7);
    if (isnan(x)) return 7;
    for (int i = 1; i < 8; i++) {
        double d = fabs(a - magnitudes[i]), least = fabs(a - magnitudes[best]);
        if (d < least || (d == least && i % 2 == 0)) best = i;
    }
    return (uint8_t)(best | (signbit(x) ? 8 : 0));
}

static double e4m3_value(int byte) {
    int exponent = byte >> 3, fraction = byte & 7;
    return exponent ? ldexp(8 + fraction, exponent - 10) : ldexp(fraction, -9);
}

static void test_e2m1(void **state) {
    (void)state;
    for (int code = 0; code < 16; code++) {
        float x = moe4_e2m1_to_float((uint8_t)code);
        assert_true(fabsf(x) == magnitudes[code & 7] && !signbit(x) == !(code & 8));
        assert_int_equal(moe4_e2m1_from_float(x), code);
        assert_true(moe4_bits(moe4_e2m1_to_float((uint8_t)(code + 16))) == moe4_bits(x));
    }
    assert_int_equal(moe4_e2m1_from_float(2.6f), 5); /* 3: rounding by way of 2.5 would give 2 */
    assert_int_equal(moe4_e2m1_from_float(-NAN), 7);
    for (int i = 0; i < 7; i++) { /* each tie and the floats about it, both signs */
        uint32_t tie = moe4_bits((float)(magnitudes[i] + magnitudes[i + 1]) / 2);
        for (uint32_t bits = tie - 1000; bits <= tie + 1000; bits++) {
            assert_int_equal(moe4_e2m1_from_float(moe4_float(bits)), nearest_e2m1(moe4_float(bits)));
            assert_int_equal(moe4_e2m1_from_float(-moe4_float(bits)), nearest_e2m1(-moe4_float(bits)));
        }
    }
    for (uint64_t bits = 0; bits < (uint64_t)1 << 32; bits += 4999)
        assert_int_equal(moe4_e2m1_from_float(moe4_float((uint32_t)bits)), nearest_e2m1(moe4_float((uint32_t)bits)));
}

#ifdef HAVE_CUDA_FP4
unsigned char cuda_e2m1_from_float(float x);
#endif

/* All signs, exponents and upper mantissa bits, with every pattern of the lower ones that a rounding can tell apart, and a stride. */
static void test_e2m1_is_cudas(void **state) {
    (void)state;
#ifdef HAVE_CUDA_FP4
    for (uint64_t i = 0; i < (uint64_t)1 << 32; i += i % 4096 < 2 || i % 4096 > 4094 ? 1 : 7) {
        float x = moe4_float((uint32_t)i);
        if (moe4_e2m1_from_float(x) != cuda_e2m1_from_float(x))
            fail_msg("%a: %d, CUDA %d", x, moe4_e2m1_from_float(x), cuda_e2m1_from_float(x));
    }
#else
    print_message("skipped: CUDA's cuda_fp4.h was not found\n");
    skip();
#endif
}

static void test_e4m3(void **state) {
    (void)state;
    for (int byte = 0; byte < 256; byte++) {
        float x = moe4_e4m3_to_float((uint8_t)byte);
        if ((byte & 0x7f) == 0x7f)
            assert_true(isnan(x));
        else
            assert_true(fabs(x) == e4m3_value(byte & 0x7f));
        assert_int_equal(!signbit(x), !(byte & 0x80));
        assert_int_equal(moe4_e4m3_from_float(x), byte);
    }
    for (int byte = 0; byte < 0x7e; byte++) { /* between each two values: up to the tie, the tie, from the tie on */
        float tie = (float)((e4m3_value(byte) + e4m3_value(byte + 1)) / 2);
        assert_int_equal(moe4_e4m3_from_float(nextafterf(tie, 0)), byte);
        assert_int_equal(moe4_e4m3_from_float(tie), byte + (byte & 1));
        assert_int_equal(moe4_e4m3_from_float(nextafterf(tie, 500)), byte + 1);
        assert_int_equal(moe4_e4m3_from_float(-tie), 0x80 | (byte + (byte & 1)));
    }
    assert_int_equal(moe4_e4m3_from_float(464.5f), 0x7e);
    assert_int_equal(moe4_e4m3_from_float(INFINITY), 0x7e);
    assert_int_equal(moe4_e4m3_from_float(-INFINITY), 0xfe);
    assert_int_equal(moe4_e4m3_from_float(0x1p-149f), 0);
}

static void test_halves(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float b = moe4_bf16_to_float((uint16_t)h), x = moe4_f16_to_float((uint16_t)h);
        int exponent = h >> 10 & 31, fraction = h & 0x3ff;
        assert_int_equal(moe4_bits(b), h << 16);
        if (!isnan(b))
            assert_int_equal(moe4_bf16_from_float(b), h);
        else
            assert_true(isnan(moe4_bf16_to_float(moe4_bf16_from_float(b))));
        assert_int_equal(!signbit(x), !(h & 0x8000));
        if (exponent == 31)
            assert_true(fraction ? isnan(x) : isinf(x));
        else
            assert_true(fabs(x) == (exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24)));
        if (!isnan(x))
            assert_int_equal(moe4_f16_from_float(x), h);
        else
            assert_true(isnan(moe4_f16_to_float(moe4_f16_from_float(x))));
    }
    assert_int_equal(moe4_bf16_from_float(FLT_MAX), 0x7f80);
    assert_int_equal(moe4_f16_from_float(65519.996f), 0x7bff);
    assert_int_equal(moe4_f16_from_float(65520.f), 0x7c00);
    assert_int_equal(moe4_bf16_from_float(moe4_float(0x7f800001)), 0x7fc0); /* a NaN whose payload lies below bf16's */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_e2m1),
        cmocka_unit_test(test_e2m1_is_cudas),
        cmocka_unit_test(test_e4m3),
        cmocka_unit_test(test_halves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
