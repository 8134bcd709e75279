/* Files of vectors that other programs made: tensors by name, and bytes that must be theirs. */
#ifndef MOE4_TESTS_VECTOR_FILE_H
#define MOE4_TESTS_VECTOR_FILE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

#include "moe4.h"

static inline moe4_tensor vector_find(const moe4_checkpoint *file, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static inline moe4_tensor vector_find(const moe4_checkpoint *file, const char *fmt, ...) {
    char name[128];
    moe4_tensor t = {0};
    va_list args;
    va_start(args, fmt);
    vsnprintf(name, sizeof name, fmt, args);
    va_end(args);
    if (moe4_checkpoint_find(file, &t, name) != MOE4_OK) fail_msg("no tensor %s", name);
    return t;
}

static inline void vector_expect(const moe4_tensor *want, const void *got, size_t bytes) {
    assert_int_equal(want->bytes, bytes);
    const uint8_t *a = got, *b = want->data;
    for (size_t i = 0; i < bytes; i++)
        if (a[i] != b[i]) fail_msg("%s: byte %zu is 0x%02x, should be 0x%02x", want->name, i, a[i], b[i]);
}

#endif
