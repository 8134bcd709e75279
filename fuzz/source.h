/* The input of a fuzz target taken byte by byte; zeros behind its end. */
#ifndef MOE4_FUZZ_SOURCE_H
#define MOE4_FUZZ_SOURCE_H

#include <stddef.h>
#include <stdint.h>

struct source {
    const uint8_t *data;
    size_t left;
};

static inline unsigned take(struct source *s) {
    if (!s->left) return 0;
    s->left--;
    return *s->data++;
}

#endif
