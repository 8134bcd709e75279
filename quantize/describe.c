#include "quantize/describe.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool is_compressed_tensors(const struct quantize_plan *plan) {
    return plan->options->recipe == MOE4_RECIPE_COMPRESSED_TENSORS;
}

static moe4_status no_memory(const struct quantize_plan *plan, const char *what) {
    return lm_fail(plan->lm, MOE4_ERROR_MEMORY, "%s: no memory", what);
}

/* ---- config.json ---- */

/* Modules with a matrix that engines would take for a linear layer and that is not quantized. An embedding is none. */
static json_t *ignored(const struct quantize_plan *plan) {
    json_t *list = json_array();
    for (size_t i = 0; i < plan->n_items; i++) {
        const struct quantize_item *item = &plan->items[i];
        size_t n = quantize_module_length(item->name);
        bool is_matrix = item->in.n_dims == 2 || item->own_name;
        if (item->how == QUANTIZE_NVFP4 || item->how == QUANTIZE_DROP || !is_matrix || !n || strstr(item->name, "embed")) continue;
        json_array_append_new(list, json_stringn(item->name, n));
    }
    return list;
}

/* The groups of both layouts; without calibration only weights are quantized, as far as the file says. */
static json_t *groups(const struct quantize_plan *plan) {
    json_t *weights, *inputs;
    if (is_compressed_tensors(plan)) {
        weights = json_pack("{s:i, s:s, s:b, s:i, s:s, s:b}", "num_bits", 4, "type", "float", "symmetric", 1, "group_size", MOE4_BLOCK,
                            "strategy", "tensor_group", "dynamic", 0);
        inputs = json_pack("{s:i, s:s, s:b, s:i, s:s, s:s}", "num_bits", 4, "type", "float", "symmetric", 1, "group_size", MOE4_BLOCK,
                           "strategy", "tensor_group", "dynamic", "local");
    } else {
        weights = json_pack("{s:b, s:i, s:s, s:i}", "dynamic", 0, "num_bits", 4, "type", "float", "group_size", MOE4_BLOCK);
        inputs = json_deep_copy(weights);
    }
    if (!plan->options->calibrate) {
        json_decref(inputs);
        inputs = json_null();
    }
    return json_pack("{s:{s:[s], s:o, s:o}}", "group_0", "targets", "Linear", "weights", weights, "input_activations", inputs);
}

static json_t *quantization_config(const struct quantize_plan *plan) {
    if (is_compressed_tensors(plan))
        return json_pack("{s:s, s:s, s:s, s:o, s:o, s:n}", "quant_method", "compressed-tensors", "format", "nvfp4-pack-quantized",
                         "quantization_status", "compressed", "config_groups", groups(plan), "ignore", ignored(plan), "kv_cache_scheme");
    return json_pack("{s:s, s:s, s:o, s:o, s:{s:s, s:s}}", "quant_method", "modelopt", "quant_algo", "NVFP4", "config_groups", groups(plan),
                     "ignore", ignored(plan), "producer", "name", "moe4", "version", moe4_version());
}

/* The member put before the last brace of the text, so that all else stays as its authors wrote it. */
static char *inserted(const char *text, const json_t *member) {
    char *value = json_dumps(member, JSON_INDENT(2));
    const char *brace = strrchr(text, '}'), *end = brace;
    while (end && end > text && strchr(" \t\r\n", end[-1])) end--;
    size_t room = strlen(text) + (value ? strlen(value) : 0) + 64;
    char *result = value && brace ? malloc(room) : NULL;
    if (result)
        snprintf(result, room, "%.*s%s\n  \"quantization_config\": %s\n}\n", (int)(end - text), text, end[-1] == '{' ? "" : ",", value);
    free(value);
    return result;
}

moe4_status quantize_describe_config(const struct quantize_plan *plan, char **text_ret) {
    size_t bytes;
    const char *text = moe4_checkpoint_config(plan->ckpt, &bytes);
    json_t *config = json_loadb(text, bytes, 0, NULL), *ours = quantization_config(plan);
    *text_ret = NULL;
    if (config && ours && !json_object_get(config, "quantization_config")) {
        *text_ret = inserted(text, ours);
    } else if (config && ours) { /* of FP8: ours takes its place */
        json_object_set(config, "quantization_config", ours);
        *text_ret = json_dumps(config, JSON_INDENT(2));
    }
    json_decref(config);
    json_decref(ours);
    return *text_ret ? MOE4_OK : no_memory(plan, "config.json");
}

moe4_status quantize_describe_hf_quant(const struct quantize_plan *plan, char **text_ret) {
    *text_ret = NULL;
    if (is_compressed_tensors(plan)) return MOE4_OK;
    json_t *json =
        json_pack("{s:{s:s, s:s}, s:{s:s, s:i, s:n, s:o}}", "producer", "name", "moe4", "version", moe4_version(), "quantization",
                  "quant_algo", "NVFP4", "group_size", MOE4_BLOCK, "kv_cache_quant_algo", "exclude_modules", ignored(plan));
    *text_ret = json ? json_dumps(json, JSON_INDENT(2)) : NULL;
    json_decref(json);
    return *text_ret ? MOE4_OK : no_memory(plan, "hf_quant_config.json");
}

/* ---- the index ---- */

moe4_status quantize_describe_index(const struct quantize_plan *plan, char **text_ret) {
    *text_ret = NULL;
    if (plan->n_shards == 1) return MOE4_OK;
    json_t *map = json_object();
    bool fine = map;
    for (size_t s = 0; s < plan->n_shards; s++)
        for (size_t i = plan->shards[s].first; i < plan->shards[s].end; i++) {
            struct quantize_part parts[N_PARTS];
            char name[QUANTIZE_NAME_BYTES];
            for (size_t p = 0, n = quantize_parts(plan, &plan->items[i], parts); p < n; p++)
                fine &=
                    json_object_set_new(map, quantize_part_name(name, &plan->items[i], &parts[p]), json_string(plan->shards[s].file)) == 0;
        }
    json_t *index = json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)plan->bytes_out, "weight_map", map);
    *text_ret = fine && index ? json_dumps(index, JSON_INDENT(2)) : NULL;
    json_decref(index);
    return *text_ret ? MOE4_OK : no_memory(plan, "model.safetensors.index.json");
}
