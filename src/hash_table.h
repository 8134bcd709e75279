/* The experts of each token id, as routers that choose by hash have them: [n_token_ids, top_k], I32 or I64, at any alignment. */
#ifndef MOE4_HASH_TABLE_H
#define MOE4_HASH_TABLE_H

#include <string.h>

#include "internal.h"

struct moe4_hash_table {
    const void *data;
    moe4_dtype dtype;
    size_t n_token_ids, top_k;
};

struct moe4_hash_entry {
    size_t token_id;
    int64_t expert;
    bool twice; /* it stands in the row already; otherwise there is no such expert */
};

static inline int64_t moe4_hash_table_at(const struct moe4_hash_table *t, size_t token_id, size_t j) {
    size_t i = token_id * t->top_k + j;
    int64_t wide;
    int32_t narrow;
    if (t->dtype == MOE4_I64) {
        memcpy(&wide, (const char *)t->data + i * sizeof wide, sizeof wide);
        return wide;
    }
    memcpy(&narrow, (const char *)t->data + i * sizeof narrow, sizeof narrow);
    return narrow;
}

/* False with the first entry that is no expert of n_experts, or stands twice in its row. */
bool moe4_hash_table_ok(const struct moe4_hash_table *t, size_t n_experts, struct moe4_hash_entry *bad);

#endif
