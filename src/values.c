#include "values.h"

#include <string.h>

struct moe4_value_rule moe4_value_rule_for(moe4_dtype dtype, bool is_scale) {
    static const char not_finite[] = "NaN or infinite", is_nan[] = "NaN";
    switch (dtype) {
    case MOE4_F32: return (struct moe4_value_rule){4, 0x7f800000, 0, not_finite};
    case MOE4_F16: return (struct moe4_value_rule){2, 0x7c00, 0, not_finite};
    case MOE4_BF16: return (struct moe4_value_rule){2, 0x7f80, 0, not_finite};
    case MOE4_F64: return (struct moe4_value_rule){8, 0x7ff0000000000000, 0, not_finite};
    case MOE4_F8_E4M3: return (struct moe4_value_rule){1, 0x7f, is_scale ? 0x80 : 0, is_scale ? "NaN or signed" : is_nan};
    case MOE4_F8_E5M2: return (struct moe4_value_rule){1, 0x7c, 0, not_finite};
    case MOE4_F8_E8M0: return (struct moe4_value_rule){1, 0xff, 0, is_nan};
    case MOE4_BOOL: return (struct moe4_value_rule){1, 0, 0xfe, "neither 0 nor 1"};
    default: return (struct moe4_value_rule){moe4_dtype_bytes(dtype), 0, 0, NULL};
    }
}

uint64_t moe4_value_bits(const void *data, size_t elem_bytes, size_t i) {
    uint64_t bits = 0;
    memcpy(&bits, (const uint8_t *)data + i * elem_bytes, elem_bytes); /* little-endian, as the format is */
    return bits;
}

/* The low elem_bytes of x in every lane of 64 bits. */
static uint64_t spread(uint64_t x, size_t elem_bytes) {
    uint64_t all = 0;
    for (size_t at = 0; at < 8; at += elem_bytes) all |= x << 8 * at;
    return all;
}

uint64_t moe4_count_bad(const struct moe4_value_rule *rule, const void *data, size_t n, size_t *first_ret) {
    const uint8_t *bytes = data;
    size_t e = rule->elem_bytes, group = 8 / e, i = 0;
    uint64_t n_bad = 0;
    *first_ret = 0;
    if (!rule->bad) { /* read all the same: one byte of each page shows that the file can be read */
        volatile uint8_t sink = 0;
        for (size_t at = 0; at < n * e; at += 4096) sink ^= bytes[at];
        (void)sink;
        return 0;
    }
    uint64_t ones = spread(rule->ones, e), none = spread(rule->none, e);
    uint64_t one = ones ? spread(1, e) : 0, top = ones ? spread((uint64_t)1 << (8 * e - 1), e) : 0;
    while (i < n) {
        for (uint64_t x, z; i + group <= n; i += group) { /* eight bytes at a time as long as all are good */
            memcpy(&x, bytes + i * e, 8);
            z = (x & ones) ^ ones; /* a lane of zeros where all of `ones` are set */
            if (((z - one) & ~z & top) | (x & none)) break;
        }
        for (size_t end = i + group < n ? i + group : n; i < end; i++) {
            uint64_t v = moe4_value_bits(bytes, e, i);
            if ((v & rule->none) || (rule->ones && (v & rule->ones) == rule->ones)) {
                if (!n_bad++) *first_ret = i;
            }
        }
    }
    return n_bad;
}
