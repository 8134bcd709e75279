/* Which tensors go to which shard, at which offset, and the shards' headers. Hugging Face's rules: tensors in order, a new shard where the
 * next one would go past the limit, names model-0000i-of-0000n, one shard is model.safetensors. A matrix and its scales stay together.
 * Inside a shard larger elements come first, so that every tensor is aligned to its element. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quantize/plan.h"

static uint64_t item_bytes(const struct quantize_plan *plan, const struct quantize_item *item) {
    struct quantize_part parts[N_PARTS];
    uint64_t bytes = 0;
    for (size_t p = 0, n = quantize_parts(plan, item, parts); p < n; p++) bytes += parts[p].bytes;
    return bytes;
}

static moe4_status cut(struct quantize_plan *plan) {
    uint64_t in_shard = 0, most = plan->options->max_shard_bytes;
    plan->shards = lm_calloc(plan->lm, plan->n_items, sizeof *plan->shards, "shards");
    if (!plan->shards) return MOE4_ERROR_MEMORY;
    plan->n_shards = 1;
    for (size_t i = 0; i < plan->n_items; i++) {
        uint64_t bytes = item_bytes(plan, &plan->items[i]);
        if (in_shard && bytes > most - (in_shard < most ? in_shard : most)) {
            plan->shards[plan->n_shards++].first = i;
            in_shard = 0;
        }
        in_shard += bytes;
        plan->bytes_out += bytes;
        plan->shards[plan->n_shards - 1].end = i + 1;
    }
    LM_CHECK(plan->lm, plan->n_shards < 100000, MOE4_ERROR_ARGUMENT, "%zu shards, at most 99999: allow larger ones", plan->n_shards);
    for (size_t s = 0; s < plan->n_shards; s++) {
        char *file = plan->shards[s].file;
        size_t bytes = sizeof plan->shards[s].file;
        if (plan->n_shards == 1)
            snprintf(file, bytes, "model.safetensors");
        else
            snprintf(file, bytes, "model-%05zu-of-%05zu.safetensors", s + 1, plan->n_shards);
    }
    return MOE4_OK;
}

static json_t *describe(const struct quantize_part *part, uint64_t begin) {
    json_t *shape = json_array();
    for (size_t d = 0; d < part->n_dims; d++) json_array_append_new(shape, json_integer((json_int_t)part->shape[d]));
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", moe4_dtype_name(part->dtype), "shape", shape, "data_offsets", (json_int_t)begin,
                     (json_int_t)(begin + part->bytes));
}

/* Offsets behind the header, in passes over the element sizes. */
static uint64_t place(struct quantize_plan *plan, struct quantize_shard *shard, json_t *header, bool *fine) {
    uint64_t at = 0;
    for (size_t element = 8; element; element /= 2)
        for (size_t i = shard->first; i < shard->end; i++) {
            struct quantize_item *item = &plan->items[i];
            struct quantize_part parts[N_PARTS];
            char name[QUANTIZE_NAME_BYTES];
            for (size_t p = 0, n = quantize_parts(plan, item, parts); p < n; p++) {
                if (moe4_dtype_bytes(parts[p].dtype) != element) continue;
                *fine &= json_object_set_new(header, quantize_part_name(name, item, &parts[p]), describe(&parts[p], at)) == 0;
                item->offset[p] = at;
                at += parts[p].bytes;
            }
        }
    return at;
}

static moe4_status lay_out(struct quantize_plan *plan, struct quantize_shard *shard) {
    json_t *header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt"); /* what transformers asks for */
    bool fine = header && json_object_update(json_object_get(header, "__metadata__"), plan->made_with) == 0;
    uint64_t data_bytes = place(plan, shard, header, &fine);
    char *text = fine ? json_dumps(header, JSON_COMPACT) : NULL;
    json_decref(header);
    size_t bytes = text ? strlen(text) : 0, padded = (bytes + 7) / 8 * 8;
    shard->header = text ? malloc(8 + padded) : NULL;
    if (shard->header) {
        for (int i = 0; i < 8; i++) shard->header[i] = (char)(padded >> 8 * i);
        memcpy(shard->header + 8, text, bytes);
        memset(shard->header + 8 + bytes, ' ', padded - bytes);
    }
    free(text);
    LM_CHECK(plan->lm, shard->header, MOE4_ERROR_MEMORY, "%s: no memory for its header", shard->file);
    shard->header_bytes = 8 + padded;
    shard->bytes = shard->header_bytes + data_bytes;
    for (size_t i = shard->first; i < shard->end; i++)
        for (size_t p = 0; p < N_PARTS; p++) plan->items[i].offset[p] += shard->header_bytes;
    return MOE4_OK;
}

moe4_status quantize_plan_shards(struct quantize_plan *plan) {
    LM_TRY(plan->lm, cut(plan));
    for (size_t s = 0; s < plan->n_shards; s++) LM_TRY(plan->lm, lay_out(plan, &plan->shards[s]));
    return MOE4_OK;
}
