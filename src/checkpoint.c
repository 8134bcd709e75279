/* Opening: which files, their directories in parallel, one table of names, config.json. */
#include "checkpoint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "folder.h"
#include "weight.h"

enum { MAX_CONFIG_BYTES = 16 << 20 };

/* ---- shards ---- */

struct shard_job {
    moe4_checkpoint *ckpt;
    const char *const *files;
    struct shard_result {
        moe4_status status;
        char *problem;
    } * results;
};

/* Each shard fails on its own, whichever thread takes it; its sentence is handed over to the caller's thread. */
static void open_shard(void *arg, size_t i) {
    const struct shard_job *job = arg;
    const moe4_ctx *ctx = job->ckpt->ctx;
    struct shard_result *result = &job->results[i];
    moe4_begin(ctx);
    char *path = moe4_path_join(ctx, job->ckpt->path, job->files[i]);
    result->status = path ? moe4_safetensors_open(ctx, &job->ckpt->shards[i], path, job->files[i]) : MOE4_ERROR_MEMORY;
    moe4_free(ctx, path);
    if (result->status != MOE4_OK) {
        const char *why = moe4_ctx_error(ctx);
        result->problem = moe4_text_copy(ctx, why, strlen(why));
        moe4_begin(ctx);
    }
}

/* The first failure by order of files, whatever the threads did; the others go to the log. */
static moe4_status shard_failure(const moe4_ctx *ctx, const struct shard_result *results, size_t n) {
    size_t n_failed = 0, first = 0;
    for (size_t i = n; i-- > 0;)
        if (results[i].status != MOE4_OK) {
            first = i;
            n_failed++;
        }
    if (!n_failed) return MOE4_OK;
    for (size_t i = first + 1; ctx->log && i < n; i++)
        if (results[i].problem) ctx->log(ctx->log_user, results[i].problem);
    const char *why = results[first].problem ? results[first].problem : "out of memory";
    if (n_failed == 1) return moe4_fail(ctx, results[first].status, "%s", why);
    return moe4_fail(ctx, results[first].status, "%s (and %zu more)", why, n_failed - 1);
}

static moe4_status open_shards(moe4_checkpoint *ckpt, const char *const *files, size_t n) {
    const moe4_ctx *ctx = ckpt->ctx;
    ckpt->shards = moe4_calloc(ctx, n, sizeof *ckpt->shards, "shards");
    if (!ckpt->shards) return MOE4_ERROR_MEMORY;
    ckpt->n_shards = n;
    struct shard_result *results = moe4_calloc(ctx, n, sizeof *results, "shards");
    if (!results) return MOE4_ERROR_MEMORY;
    struct shard_job job = {ckpt, files, results};
    moe4_parallel_for(ckpt->ctx, n, open_shard, &job);
    moe4_status status = shard_failure(ctx, results, n);
    for (size_t i = 0; i < n; i++) moe4_free(ctx, results[i].problem);
    moe4_free(ctx, results);
    return status;
}

/* ---- names ---- */

static int by_name(const void *a, const void *b) {
    return strcmp((*(const moe4_tensor *const *)a)->name, (*(const moe4_tensor *const *)b)->name);
}

/* A sorted table instead of a hash: no names can be chosen to make it slow, and neighbours show duplicates and prefixes. */
static moe4_status sort_names(moe4_checkpoint *ckpt) {
    const moe4_ctx *ctx = ckpt->ctx;
    ckpt->first = moe4_calloc(ctx, ckpt->n_shards + 1, sizeof *ckpt->first, "shards");
    if (!ckpt->first) return MOE4_ERROR_MEMORY;
    for (size_t s = 0; s < ckpt->n_shards; s++) ckpt->first[s + 1] = ckpt->first[s] + ckpt->shards[s].n_tensors;
    ckpt->n_tensors = ckpt->first[ckpt->n_shards];
    ckpt->by_name = moe4_calloc(ctx, ckpt->n_tensors, sizeof *ckpt->by_name, "tensor names");
    if (!ckpt->by_name) return MOE4_ERROR_MEMORY;
    const moe4_tensor **at = ckpt->by_name;
    for (size_t s = 0; s < ckpt->n_shards; s++)
        for (size_t i = 0; i < ckpt->shards[s].n_tensors; i++) *at++ = &ckpt->shards[s].tensors[i];
    qsort(ckpt->by_name, ckpt->n_tensors, sizeof *ckpt->by_name, by_name);
    for (size_t i = 1; i < ckpt->n_tensors; i++) {
        const moe4_tensor *a = ckpt->by_name[i - 1], *b = ckpt->by_name[i];
        MOE4_CHECK(ctx, strcmp(a->name, b->name) != 0, MOE4_ERROR_FORMAT, "tensor %s stands in two files, %s and %s", a->name,
                   a->file < b->file ? a->file : b->file, a->file < b->file ? b->file : a->file);
    }
    return MOE4_OK;
}

size_t moe4_checkpoint_seek(const moe4_checkpoint *ckpt, const char *name) {
    size_t low = 0, high = ckpt->n_tensors;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        if (strcmp(ckpt->by_name[mid]->name, name) < 0)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

const moe4_tensor *moe4_checkpoint_lookup(const moe4_checkpoint *ckpt, const char *name) {
    size_t i = moe4_checkpoint_seek(ckpt, name);
    return i < ckpt->n_tensors && strcmp(ckpt->by_name[i]->name, name) == 0 ? ckpt->by_name[i] : NULL;
}

/* ---- the index against the shards ---- */

static moe4_status check_index(moe4_checkpoint *ckpt, const struct moe4_folder *folder) {
    const moe4_ctx *ctx = ckpt->ctx;
    ckpt->indexed = moe4_calloc(ctx, ckpt->n_tensors, 1, "index");
    if (!ckpt->indexed) return MOE4_ERROR_MEMORY;
    const char *name;
    json_t *file;
    json_object_foreach(folder->weight_map, name, file) {
        size_t i = moe4_checkpoint_seek(ckpt, name);
        const moe4_tensor *t = i < ckpt->n_tensors && strcmp(ckpt->by_name[i]->name, name) == 0 ? ckpt->by_name[i] : NULL;
        MOE4_CHECK(ctx, t, MOE4_ERROR_FORMAT, "%s: tensor %s is not in %s", MOE4_INDEX_NAME, name, json_string_value(file));
        MOE4_CHECK(ctx, strcmp(t->file, json_string_value(file)) == 0, MOE4_ERROR_FORMAT, "%s: tensor %s is not in %s but in %s",
                   MOE4_INDEX_NAME, name, json_string_value(file), t->file);
        ckpt->indexed[i] = 1;
    }
    return MOE4_OK;
}

/* ---- open and close ---- */

/* The family's first place where layers stand. */
static void find_place(moe4_checkpoint *ckpt) {
    const struct moe4_family *f = ckpt->config.family;
    for (const struct moe4_place *p = f ? f->places : NULL; p && p->root; p++) {
        char prefix[64];
        int length = snprintf(prefix, sizeof prefix, "%slayers.", p->root);
        size_t i = moe4_checkpoint_seek(ckpt, prefix);
        if (i == ckpt->n_tensors || strncmp(ckpt->by_name[i]->name, prefix, (size_t)length) != 0) continue;
        ckpt->config.place = p;
        return;
    }
}

static moe4_status read_config(moe4_checkpoint *ckpt) {
    const moe4_ctx *ctx = ckpt->ctx;
    struct moe4_map map;
    char *path = moe4_path_join(ctx, ckpt->path, "config.json");
    if (!path) return MOE4_ERROR_MEMORY;
    moe4_status status = moe4_map_open(ctx, &map, path);
    moe4_free(ctx, path);
    if (status == MOE4_ERROR_NOT_FOUND) {
        moe4_begin(ctx); /* it may be absent; the calls that need it say so */
        return MOE4_OK;
    }
    if (status == MOE4_OK && map.bytes > MAX_CONFIG_BYTES)
        status = moe4_fail(ctx, MOE4_ERROR_FORMAT, "config.json: %zu bytes, at most %d", map.bytes, MAX_CONFIG_BYTES);
    if (status == MOE4_OK) {
        ckpt->config_text = moe4_text_copy(ctx, (const char *)map.data, map.bytes);
        status = ckpt->config_text ? MOE4_OK : MOE4_ERROR_MEMORY;
        ckpt->config_bytes = map.bytes;
        moe4_map_close(&map);
    }
    MOE4_TRY(status);
    ckpt->has_config = true;
    return moe4_config_read(ctx, &ckpt->config, ckpt->config_text, ckpt->config_bytes);
}

static moe4_status open_folder(moe4_checkpoint *ckpt) {
    MOE4_TRY(read_config(ckpt));
    struct moe4_folder folder;
    moe4_status status = moe4_folder_read(ckpt->ctx, &folder, ckpt->path);
    if (status == MOE4_OK) status = open_shards(ckpt, (const char *const *)folder.files, folder.n_files);
    if (status == MOE4_OK) status = sort_names(ckpt);
    if (status == MOE4_OK && folder.weight_map) status = check_index(ckpt, &folder);
    moe4_folder_free(ckpt->ctx, &folder);
    if (status == MOE4_OK) find_place(ckpt);
    return status;
}

static moe4_status open_file(moe4_checkpoint *ckpt) {
    const char *slash = strrchr(ckpt->path, '/'), *file = slash ? slash + 1 : ckpt->path;
    MOE4_CHECK(ckpt->ctx, moe4_name_ok(file, strlen(file)), MOE4_ERROR_ARGUMENT, "path: the file's name has control characters");
    ckpt->shards = moe4_calloc(ckpt->ctx, 1, sizeof *ckpt->shards, "shards");
    if (!ckpt->shards) return MOE4_ERROR_MEMORY;
    ckpt->n_shards = 1;
    MOE4_TRY(moe4_safetensors_open(ckpt->ctx, ckpt->shards, ckpt->path, file));
    return sort_names(ckpt);
}

moe4_status moe4_checkpoint_open(moe4_checkpoint **ckpt_ret, moe4_ctx *ctx, const char *path) {
    if (!ctx) return MOE4_ERROR_ARGUMENT;
    moe4_begin(ctx);
    MOE4_CHECK(ctx, ckpt_ret, MOE4_ERROR_ARGUMENT, "ckpt_ret is NULL");
    *ckpt_ret = NULL;
    MOE4_CHECK(ctx, path && *path, MOE4_ERROR_ARGUMENT, "path is %s", path ? "empty" : "NULL");
    bool is_folder;
    MOE4_TRY(moe4_is_folder(ctx, &is_folder, path));
    moe4_checkpoint *ckpt = moe4_calloc(ctx, 1, sizeof *ckpt, "checkpoint");
    if (!ckpt) return MOE4_ERROR_MEMORY;
    ckpt->ctx = ctx;
    ckpt->is_folder = is_folder;
    ckpt->path = moe4_text_copy(ctx, path, strlen(path));
    moe4_status status = ckpt->path ? (is_folder ? open_folder(ckpt) : open_file(ckpt)) : MOE4_ERROR_MEMORY;
    if (status != MOE4_OK) {
        moe4_checkpoint_close(ckpt);
        return status;
    }
    moe4_quantization_name(ckpt->quantization, sizeof ckpt->quantization, ckpt);
    *ckpt_ret = ckpt;
    return MOE4_OK;
}

void moe4_checkpoint_close(moe4_checkpoint *ckpt) {
    if (!ckpt) return;
    const moe4_ctx *ctx = ckpt->ctx;
    for (size_t i = 0; i < ckpt->n_shards; i++) moe4_safetensors_close(ctx, &ckpt->shards[i]);
    moe4_config_free(ctx, &ckpt->config);
    moe4_free(ctx, ckpt->shards);
    moe4_free(ctx, ckpt->first);
    moe4_free(ctx, ckpt->by_name);
    moe4_free(ctx, ckpt->indexed);
    moe4_free(ctx, ckpt->config_text);
    moe4_free(ctx, ckpt->path);
    moe4_free(ctx, ckpt);
}

moe4_status moe4_checkpoint_check_files(const moe4_checkpoint *ckpt) {
    for (size_t i = 0; i < ckpt->n_shards; i++) MOE4_TRY(moe4_map_check(ckpt->ctx, &ckpt->shards[i].map, ckpt->shards[i].path));
    return MOE4_OK;
}

moe4_status moe4_checkpoint_check(const moe4_checkpoint *ckpt) {
    moe4_begin(ckpt->ctx);
    return moe4_checkpoint_check_files(ckpt);
}

moe4_status moe4_checkpoint_watch(const moe4_checkpoint *ckpt) {
    enum { EVERY_MS = 10 };
    moe4_checkpoint *c = (moe4_checkpoint *)ckpt; /* no caller sees what is kept here */
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    int64_t now = (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
    if (!atomic_load_explicit(&c->changed, memory_order_relaxed)) {
        if (now - atomic_load_explicit(&c->looked_ms, memory_order_relaxed) < EVERY_MS) return MOE4_OK;
        atomic_store_explicit(&c->looked_ms, now, memory_order_relaxed);
    }
    moe4_status status = moe4_checkpoint_check_files(ckpt);
    if (status != MOE4_OK) atomic_store_explicit(&c->changed, true, memory_order_relaxed);
    return status;
}

/* ---- looking up ---- */

size_t moe4_checkpoint_n_tensors(const moe4_checkpoint *ckpt) {
    return ckpt->n_tensors;
}

size_t moe4_checkpoint_n_files(const moe4_checkpoint *ckpt) {
    return ckpt->n_shards;
}

const moe4_tensor *moe4_checkpoint_at(const moe4_checkpoint *ckpt, size_t i) {
    size_t low = 0, high = ckpt->n_shards; /* the shard with first[shard] <= i < first[shard + 1] */
    while (high - low > 1) {
        size_t mid = low + (high - low) / 2;
        if (ckpt->first[mid] <= i)
            low = mid;
        else
            high = mid;
    }
    return &ckpt->shards[low].tensors[i - ckpt->first[low]];
}

moe4_status moe4_checkpoint_tensor(const moe4_checkpoint *ckpt, moe4_tensor *tensor_ret, size_t i) {
    moe4_begin(ckpt->ctx);
    MOE4_CHECK(ckpt->ctx, tensor_ret, MOE4_ERROR_ARGUMENT, "tensor_ret is NULL");
    MOE4_CHECK(ckpt->ctx, i < ckpt->n_tensors, MOE4_ERROR_ARGUMENT, "tensor %zu of %zu", i, ckpt->n_tensors);
    *tensor_ret = *moe4_checkpoint_at(ckpt, i);
    return MOE4_OK;
}

moe4_status moe4_checkpoint_find(const moe4_checkpoint *ckpt, moe4_tensor *tensor_ret, const char *name) {
    moe4_begin(ckpt->ctx);
    MOE4_CHECK(ckpt->ctx, tensor_ret && name, MOE4_ERROR_ARGUMENT, "%s is NULL", tensor_ret ? "name" : "tensor_ret");
    const moe4_tensor *t = moe4_checkpoint_lookup(ckpt, name);
    MOE4_CHECK(ckpt->ctx, t, MOE4_ERROR_NOT_FOUND, "%s: no tensor %s", ckpt->path, name);
    *tensor_ret = *t;
    return MOE4_OK;
}

const char *moe4_checkpoint_config(const moe4_checkpoint *ckpt, size_t *bytes_ret) {
    if (bytes_ret) *bytes_ret = ckpt->config_bytes;
    return ckpt->config_text ? ckpt->config_text : "";
}
