#include "quantize/task.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* ---- what is made, from what ---- */

/* FNV-1a of a file's bytes. */
static moe4_status hash_file(const struct quantize_plan *plan, const char *path, uint64_t *hash_ret) {
    FILE *f = fopen(path, "rb");
    LM_CHECK(plan->lm, f, errno == ENOENT ? MOE4_ERROR_NOT_FOUND : MOE4_ERROR_IO, "%s: %s", path, strerror(errno));
    uint64_t hash = 0xcbf29ce484222325u;
    unsigned char buffer[4096];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, f)) > 0;)
        for (size_t i = 0; i < n; i++) hash = (hash ^ buffer[i]) * 0x100000001b3u;
    bool fine = !ferror(f);
    fclose(f);
    LM_CHECK(plan->lm, fine, MOE4_ERROR_IO, "%s: cannot be read", path);
    *hash_ret = hash;
    return MOE4_OK;
}

moe4_status quantize_task_options(struct quantize_plan *plan) {
    static const char *const recipes[] = {"modelopt", "modelopt_static", "activation", "compressed_tensors"};
    const struct quantize_options *o = plan->options;
    char text[32] = "none";
    uint64_t hash;
    if (o->calibrate) {
        LM_TRY(plan->lm, hash_file(plan, o->calibrate, &hash));
        snprintf(text, sizeof text, "text %016llx", (unsigned long long)hash);
    }
    plan->made_with = json_pack("{s:s, s:s, s:s, s:s}", "recipe", recipes[o->recipe], "four-over-six", o->four_over_six ? "yes" : "no",
                                "search", o->search ? "yes" : "no", "calibration", text);
    LM_CHECK(plan->lm, plan->made_with, MOE4_ERROR_MEMORY, "no memory for the task");
    return MOE4_OK;
}

static moe4_status input_files(const struct quantize_plan *plan, const char *in, json_t *list) {
    const char *last = "";
    for (size_t i = 0; i < plan->n_items; i++) {
        const char *file = plan->items[i].in.file;
        char path[4096];
        struct stat st;
        if (strcmp(file, last) == 0) continue;
        last = file;
        snprintf(path, sizeof path, "%s/%s", in, file);
        LM_CHECK(plan->lm, stat(path, &st) == 0, MOE4_ERROR_IO, "%s: %s", path, strerror(errno));
        json_array_append_new(
            list, json_pack("[s, I, I, I]", file, (json_int_t)st.st_size, (json_int_t)st.st_mtim.tv_sec, (json_int_t)st.st_mtim.tv_nsec));
    }
    return MOE4_OK;
}

moe4_status quantize_task_describe(const struct quantize_plan *plan, const char *in, json_t **task_ret) {
    const struct quantize_options *o = plan->options;
    json_t *files = json_array(), *exclude = json_array();
    moe4_status status = input_files(plan, in, files);
    for (size_t i = 0; i < o->n_exclude; i++) json_array_append_new(exclude, json_string(o->exclude[i]));
    *task_ret =
        json_pack("{s:s, s:s, s:o, s:o, s:I, s:s}", "what", "unfinished work of moe4 quantize", "version", moe4_version(), "input files",
                  files, "exclude", exclude, "max-shard-size", (json_int_t)o->max_shard_bytes, "isa of the calibration",
                  o->calibrate ? moe4_ctx_isa(plan->lm->ctx) : "none"); /* sums may differ between ISAs, and with them scales */
    if (status != MOE4_OK) return status;
    LM_CHECK(plan->lm, *task_ret && json_object_update(*task_ret, plan->made_with) == 0, MOE4_ERROR_MEMORY, "journal: no memory");
    return MOE4_OK;
}

/* ---- a shard that stands there ---- */

static json_t *shard_metadata(const struct quantize_folder *folder, const char *name) {
    void *header;
    size_t bytes;
    if (!quantize_folder_header(folder, name, &header, &bytes)) return NULL;
    json_t *json = json_loadb(header, bytes, JSON_REJECT_DUPLICATES, NULL), *metadata = json_incref(json_object_get(json, "__metadata__"));
    json_decref(json);
    free(header);
    return metadata;
}

moe4_status quantize_task_check_shards(const struct quantize_plan *plan, const struct quantize_folder *folder) {
    moe4_status status = MOE4_OK;
    for (size_t s = 0; status == MOE4_OK && s < plan->n_shards; s++) {
        json_t *metadata = shard_metadata(folder, plan->shards[s].file), *value;
        const char *key;
        json_object_foreach(plan->made_with, key, value) {
            const char *was = json_string_value(json_object_get(metadata, key)), *is = json_string_value(value);
            if (status == MOE4_OK && was && strcmp(was, is) != 0)
                status = lm_fail(plan->lm, MOE4_ERROR_ARGUMENT, "%s/%s: finished, with another %s: %.150s, now %s", folder->path,
                                 plan->shards[s].file, key, was, is);
        }
        json_decref(metadata);
    }
    return status;
}
