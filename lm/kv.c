/* The cache of keys and values. */
#include "lm.h"

#include <stdlib.h>

static size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

moe4_status lm_kv_create(struct lm *lm, struct lm_kv *kv, const struct lm_config *config, size_t n_seqs, size_t capacity, bool one_shot) {
    const struct lm_attention *a = &config->attention;
    *kv = (struct lm_kv){.n_layers = one_shot ? 1 : config->info.n_layers,
                         .n_seqs = n_seqs,
                         .n_heads = a->n_kv_heads,
                         .head_dim = a->head_dim,
                         .value_dim = round_up(a->head_dim, 16),
                         .capacity = round_up(capacity, LM_KEY_GROUP)};
    size_t heads, n;
    bool fits = !__builtin_mul_overflow(kv->n_layers, n_seqs, &heads) && !__builtin_mul_overflow(heads, kv->n_heads, &heads) &&
                !__builtin_mul_overflow(heads, kv->capacity, &n) && !__builtin_mul_overflow(n, kv->value_dim, &n);
    LM_CHECK(lm, fits, MOE4_ERROR_MEMORY, "key-value cache: %zu sequences of %zu positions do not fit", n_seqs, capacity);
    kv->keys = lm_calloc(lm, heads * kv->capacity * kv->head_dim, sizeof *kv->keys, "keys of the cache");
    kv->values = kv->keys ? lm_calloc(lm, n, sizeof *kv->values, "values of the cache") : NULL;
    if (kv->values) return MOE4_OK;
    lm_kv_free(kv);
    return MOE4_ERROR_MEMORY;
}

void lm_kv_free(struct lm_kv *kv) {
    free(kv->keys);
    free(kv->values);
    kv->keys = kv->values = NULL;
}

static size_t head_index(const struct lm_kv *kv, size_t layer, size_t seq, size_t head) {
    size_t slot = kv->n_layers == 1 ? 0 : layer;
    return (slot * kv->n_seqs + seq) * kv->n_heads + head;
}

float *lm_kv_keys(const struct lm_kv *kv, size_t layer, size_t seq, size_t head) {
    return kv->keys + head_index(kv, layer, seq, head) * kv->capacity * kv->head_dim;
}

float *lm_kv_values(const struct lm_kv *kv, size_t layer, size_t seq, size_t head) {
    return kv->values + head_index(kv, layer, seq, head) * kv->capacity * kv->value_dim;
}
