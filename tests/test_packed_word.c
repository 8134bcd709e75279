/* The device's packed words and scales, bit by bit, without a device: what pack_word puts in, word_pair takes out, and one multiplication
 * by a scale's multiplier is exact. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "cuda/nvfp4_word.h"

static uint32_t half_of(uint32_t pair, int half) {
    return pair >> 16 * half & 0xFFFF;
}

static float from_bf16(uint32_t bits) {
    float v;
    bits <<= 16;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* A value's fields in a bf16. */
static uint32_t fields_of(uint32_t code) {
    return (code >> 3) << 15 | (code & 7) << 6;
}

/* Every code in every place, beside random others. */
static void test_words(void **state) {
    (void)state;
    uint32_t random = 1, ones = 0;
    for (int i = 0; i < 16 * 8 * 64; i++) {
        uint8_t code[4][2];
        for (int p = 0; p < 4; p++)
            for (int h = 0; h < 2; h++) {
                random = random * 1664525u + 1013904223u;
                code[p][h] = (uint8_t)(random >> 28);
            }
        code[i / 16 % 4][i / 64 % 2] = (uint8_t)(i % 16);
        uint32_t w = pack_word((const uint8_t(*)[2])code);
        for (int p = 0; p < 4; p++)
            for (int h = 0; h < 2; h++) assert_int_equal(half_of(word_pair(w, p, MOE4_WORD_SPREAD), h), fields_of(code[p][h]));
        ones |= w;
    }
    assert_int_equal(ones, 0xFFFFFFFFu); /* no bit is spare */
}

static float e2m1(uint32_t code) {
    static const float magnitude[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    return code & 8 ? -magnitude[code & 7] : magnitude[code & 7];
}

static float e4m3(uint32_t byte) {
    float m = (float)(byte & 7) / 8;
    return byte >> 3 ? ldexpf(1 + m, (int)(byte >> 3) - 7) : ldexpf(m, -6);
}

static uint32_t multiplier_of(uint8_t scale) {
    return ((uint32_t)pack_scale(scale) << MOE4_SCALE_SHIFT) + MOE4_SCALE_BASE;
}

static void test_values(void **state) {
    (void)state;
    for (uint32_t scale = 1; scale < 0x7F; scale++)
        for (uint32_t code = 0; code < 16; code++) {
            float v = from_bf16(fields_of(code)) * from_bf16(multiplier_of((uint8_t)scale)), want = e2m1(code) * e4m3(scale) / 256;
            uint32_t bits;
            memcpy(&bits, &v, sizeof bits);
            assert_memory_equal(&v, &want, sizeof v); /* the sign of a zero too */
            assert_int_equal(bits & 0xFFFF, 0);       /* it is a bf16 */
        }
}

static void test_nan(void **state) {
    (void)state;
    for (uint32_t code = 0; code < 16; code++) assert_true(isnan(from_bf16(fields_of(code)) * from_bf16(multiplier_of(0x7F))));
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_words), cmocka_unit_test(test_values), cmocka_unit_test(test_nan)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
