#include "hash_table.h"

static bool stands_before(const struct moe4_hash_table *t, size_t token_id, size_t j, int64_t expert) {
    for (size_t i = 0; i < j; i++)
        if (moe4_hash_table_at(t, token_id, i) == expert) return true;
    return false;
}

bool moe4_hash_table_ok(const struct moe4_hash_table *t, size_t n_experts, struct moe4_hash_entry *bad) {
    for (size_t id = 0; id < t->n_token_ids; id++)
        for (size_t j = 0; j < t->top_k; j++) {
            int64_t e = moe4_hash_table_at(t, id, j);
            *bad = (struct moe4_hash_entry){id, e, stands_before(t, id, j, e)};
            if (bad->twice || e < 0 || (uint64_t)e >= n_experts) return false;
        }
    return true;
}
