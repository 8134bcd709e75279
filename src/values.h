/* Which stored values can be no number of a model: found at the speed of memory. */
#ifndef MOE4_VALUES_H
#define MOE4_VALUES_H

#include "internal.h"

/* An element of elem_bytes is bad when it has all bits of `ones` (NaN, infinity) or any bit of `none` (a sign). 0: no such rule. */
struct moe4_value_rule {
    size_t elem_bytes;
    uint64_t ones, none;
    const char *bad; /* what a bad one is, for sentences; NULL: every value is fine */
};

/* The rule for a dtype; is_scale: NVFP4's block scales, which have no sign. */
struct moe4_value_rule moe4_value_rule_for(moe4_dtype dtype, bool is_scale);
/* Reads all n elements; returns the number of bad ones and the place of the first. */
uint64_t moe4_count_bad(const struct moe4_value_rule *rule, const void *data, size_t n, size_t *first_ret);
/* One element as a number, for sentences. */
uint64_t moe4_value_bits(const void *data, size_t elem_bytes, size_t i);

#endif
