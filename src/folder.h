/* Which .safetensors files make up a model folder. */
#ifndef MOE4_FOLDER_H
#define MOE4_FOLDER_H

#include "file.h"
#include "json.h"

struct moe4_folder {
    char **files; /* names without folder, sorted */
    size_t n_files;
    json_t *index;      /* model.safetensors.index.json; NULL when there is none */
    json_t *weight_map; /* in it: tensor name -> one of files */
};

moe4_status moe4_is_folder(const moe4_ctx *ctx, bool *is_folder_ret, const char *path);
/* The files the index names; without an index model.safetensors; without that all *.safetensors. On failure too moe4_folder_free
 * frees what there is. Errors: NOT_FOUND, IO, FORMAT, MEMORY. */
moe4_status moe4_folder_read(const moe4_ctx *ctx, struct moe4_folder *folder, const char *path);
/* The index alone, from text: files, index and weight_map. */
moe4_status moe4_index_read(const moe4_ctx *ctx, struct moe4_folder *folder, const void *text, size_t bytes);
void moe4_folder_free(const moe4_ctx *ctx, struct moe4_folder *folder);

#endif
