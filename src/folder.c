#include "folder.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "checkpoint.h"

static const char suffix[] = ".safetensors";

static bool has_suffix(const char *name) {
    size_t n = strlen(name), s = sizeof suffix - 1;
    return n > s && strcmp(name + n - s, suffix) == 0;
}

moe4_status moe4_is_folder(const moe4_ctx *ctx, bool *is_folder_ret, const char *path) {
    struct stat st;
    *is_folder_ret = false;
    if (stat(path, &st) == 0) {
        *is_folder_ret = S_ISDIR(st.st_mode);
        return MOE4_OK;
    }
    bool missing = errno == ENOENT || errno == ENOTDIR;
    return moe4_fail(ctx, missing ? MOE4_ERROR_NOT_FOUND : MOE4_ERROR_IO, "%s: %s", path,
                     missing ? "no such file or folder" : "cannot be read");
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static moe4_status add_file(const moe4_ctx *ctx, struct moe4_folder *folder, size_t *room, const char *name) {
    if (folder->n_files == *room) {
        size_t n = *room ? 2 * *room : 16;
        char **files = moe4_regrow(ctx, folder->files, folder->n_files, n, sizeof *files, "list of files");
        if (!files) return MOE4_ERROR_MEMORY;
        folder->files = files;
        *room = n;
    }
    char *copy = moe4_text_copy(ctx, name, strlen(name));
    if (!copy) return MOE4_ERROR_MEMORY;
    folder->files[folder->n_files++] = copy;
    return MOE4_OK;
}

/* ---- the index ---- */

static moe4_status check_file_name(const moe4_ctx *ctx, const char *tensor, const json_t *file) {
    const char *name = json_string_value(file);
    MOE4_CHECK(ctx, moe4_name_ok(tensor, strlen(tensor)), MOE4_ERROR_FORMAT,
               "%s: a tensor name of %zu bytes, need 1 to %d without control characters", MOE4_INDEX_NAME, strlen(tensor), MOE4_MAX_NAME);
    MOE4_CHECK(ctx, name && moe4_name_ok(name, strlen(name)), MOE4_ERROR_FORMAT, "%s: tensor %s: its file is not a printable name",
               MOE4_INDEX_NAME, tensor);
    MOE4_CHECK(ctx, !strchr(name, '/') && !strchr(name, '\\') && name[0] != '.', MOE4_ERROR_FORMAT,
               "%s: tensor %s: \"%.120s\" is not a file in the model's folder", MOE4_INDEX_NAME, tensor, name);
    MOE4_CHECK(ctx, has_suffix(name), MOE4_ERROR_FORMAT, "%s: tensor %s: \"%.120s\" is not a %s file", MOE4_INDEX_NAME, tensor, name,
               suffix);
    return MOE4_OK;
}

/* The distinct files of the weight map. A JSON object serves as the set: its hash is seeded, names cannot be chosen against it. */
static moe4_status collect_files(const moe4_ctx *ctx, struct moe4_folder *folder, json_t *set) {
    const char *name;
    json_t *value;
    const char *last = "";
    json_object_foreach(folder->weight_map, name, value) {
        MOE4_TRY(check_file_name(ctx, name, value));
        const char *file = json_string_value(value);
        if (strcmp(file, last) == 0) continue; /* most often */
        MOE4_CHECK(ctx, json_object_set_new(set, file, json_null()) == 0, MOE4_ERROR_MEMORY, "%s: no memory", MOE4_INDEX_NAME);
        last = file;
    }
    size_t room = 0;
    json_object_foreach(set, name, value) MOE4_TRY(add_file(ctx, folder, &room, name));
    return MOE4_OK;
}

moe4_status moe4_index_read(const moe4_ctx *ctx, struct moe4_folder *folder, const void *text, size_t bytes) {
    MOE4_CHECK(ctx, bytes <= MOE4_MAX_HEADER_BYTES, MOE4_ERROR_FORMAT, "%s: %zu bytes, at most %zu", MOE4_INDEX_NAME, bytes,
               MOE4_MAX_HEADER_BYTES);
    MOE4_TRY(moe4_json_parse(ctx, &folder->index, MOE4_INDEX_NAME, text, bytes));
    folder->weight_map = json_object_get(folder->index, "weight_map");
    MOE4_CHECK(ctx, json_is_object(folder->weight_map), MOE4_ERROR_FORMAT, "%s: no object weight_map", MOE4_INDEX_NAME);
    MOE4_CHECK(ctx, json_object_size(folder->weight_map), MOE4_ERROR_FORMAT, "%s: weight_map is empty", MOE4_INDEX_NAME);
    json_t *set = json_object();
    MOE4_CHECK(ctx, set, MOE4_ERROR_MEMORY, "%s: no memory", MOE4_INDEX_NAME);
    moe4_status status = collect_files(ctx, folder, set);
    json_decref(set);
    return status;
}

/* ---- the folder ---- */

static moe4_status list_files(const moe4_ctx *ctx, struct moe4_folder *folder, const char *path) {
    DIR *dir = opendir(path);
    MOE4_CHECK(ctx, dir, MOE4_ERROR_IO, "%s: the folder cannot be listed", path);
    moe4_status status = MOE4_OK;
    size_t room = 0;
    for (const struct dirent *entry; status == MOE4_OK && (entry = readdir(dir));)
        if (has_suffix(entry->d_name) && entry->d_name[0] != '.') {
            if (!moe4_name_ok(entry->d_name, strlen(entry->d_name)))
                status = moe4_fail(ctx, MOE4_ERROR_FORMAT, "%s: a file's name has control characters", path);
            else
                status = add_file(ctx, folder, &room, entry->d_name);
        }
    closedir(dir);
    MOE4_TRY(status);
    MOE4_CHECK(ctx, folder->n_files, MOE4_ERROR_NOT_FOUND, "%s: no %s file in this folder", path, suffix);
    return MOE4_OK;
}

/* Keeps model.safetensors alone when it is there. */
static void prefer_single(const moe4_ctx *ctx, struct moe4_folder *folder) {
    for (size_t i = 0; i < folder->n_files; i++)
        if (strcmp(folder->files[i], "model.safetensors") == 0) {
            char *single = folder->files[i];
            for (size_t j = 0; j < folder->n_files; j++)
                if (j != i) moe4_free(ctx, folder->files[j]);
            folder->files[0] = single;
            folder->n_files = 1;
        }
}

moe4_status moe4_folder_read(const moe4_ctx *ctx, struct moe4_folder *folder, const char *path) {
    *folder = (struct moe4_folder){0};
    char *index = moe4_path_join(ctx, path, MOE4_INDEX_NAME);
    if (!index) return MOE4_ERROR_MEMORY;
    struct moe4_map map;
    moe4_status status = moe4_map_open(ctx, &map, index);
    moe4_free(ctx, index);
    if (status == MOE4_ERROR_NOT_FOUND) {
        moe4_begin(ctx); /* a model need not have an index */
        status = list_files(ctx, folder, path);
        prefer_single(ctx, folder);
    } else if (status == MOE4_OK) {
        status = moe4_index_read(ctx, folder, map.data, map.bytes);
        moe4_map_close(&map);
    }
    MOE4_TRY(status);
    qsort(folder->files, folder->n_files, sizeof *folder->files, by_text);
    return MOE4_OK;
}

void moe4_folder_free(const moe4_ctx *ctx, struct moe4_folder *folder) {
    for (size_t i = 0; i < folder->n_files; i++) moe4_free(ctx, folder->files[i]);
    moe4_free(ctx, folder->files);
    json_decref(folder->index);
    *folder = (struct moe4_folder){0};
}
