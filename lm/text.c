/* Files of text and of token ids. */
#include "lm.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The first `limit` bytes of a file (0: all), the caller's to free. */
static moe4_status read_file(struct lm *lm, uint8_t **data_ret, size_t *bytes_ret, const char *path, size_t limit) {
    FILE *f = fopen(path, "rb");
    LM_CHECK(lm, f, errno == ENOENT ? MOE4_ERROR_NOT_FOUND : MOE4_ERROR_IO, "%s: %s", path, strerror(errno));
    size_t most = limit ? limit : SIZE_MAX, room = 0, n = 0, got = 1;
    uint8_t *data = NULL;
    while (got && n < most) {
        if (n == room) {
            room = room ? room * 2 : 1 << 16;
            uint8_t *larger = realloc(data, room);
            if (!larger) {
                free(data);
                fclose(f);
                return lm_fail(lm, MOE4_ERROR_MEMORY, "%s: no memory for %zu bytes", path, room);
            }
            data = larger;
        }
        size_t want = room - n < most - n ? room - n : most - n;
        got = fread(data + n, 1, want, f);
        n += got;
    }
    int error = ferror(f) ? errno : 0;
    fclose(f);
    if (error) {
        free(data);
        return lm_fail(lm, MOE4_ERROR_IO, "%s: %s", path, strerror(error));
    }
    *data_ret = data;
    *bytes_ret = n;
    return MOE4_OK;
}

static moe4_status allocate(struct lm *lm, struct lm_tokens *tokens, size_t n) {
    tokens->data = lm_calloc(lm, n, sizeof *tokens->data, "tokens");
    tokens->n = n;
    return tokens->data ? MOE4_OK : MOE4_ERROR_MEMORY;
}

moe4_status lm_tokens_from_text(struct lm *lm, struct lm_tokens *tokens, const char *path, size_t limit) {
    uint8_t *data;
    size_t bytes;
    lm->error[0] = '\0';
    *tokens = (struct lm_tokens){NULL, 0};
    LM_TRY(lm, read_file(lm, &data, &bytes, path, limit));
    moe4_status status = allocate(lm, tokens, bytes);
    for (size_t i = 0; status == MOE4_OK && i < bytes; i++) tokens->data[i] = data[i];
    free(data);
    return status;
}

static int32_t little_endian(const uint8_t *p) {
    return (int32_t)((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
}

static moe4_status from_raw(struct lm *lm, struct lm_tokens *tokens, const char *path, size_t limit) {
    uint8_t *data;
    size_t bytes;
    LM_CHECK(lm, limit <= SIZE_MAX / 4, MOE4_ERROR_ARGUMENT, "a limit of %zu tokens", limit);
    LM_TRY(lm, read_file(lm, &data, &bytes, path, limit * 4));
    moe4_status status = bytes % 4 == 0 ? allocate(lm, tokens, bytes / 4)
                                        : lm_fail(lm, MOE4_ERROR_FORMAT, "%s: %zu bytes, which is no whole number of int32", path, bytes);
    for (size_t i = 0; status == MOE4_OK && i < tokens->n; i++) tokens->data[i] = little_endian(data + 4 * i);
    free(data);
    return status;
}

/* The one tensor that can be meant; token ids past int32 are past every vocabulary and become -1, which lm_forward refuses. */
static moe4_status from_tensors(struct lm *lm, struct lm_tokens *tokens, const moe4_checkpoint *file, const char *path, size_t limit) {
    moe4_tensor ids = {0}, t;
    size_t n_found = 0;
    for (size_t i = 0; i < moe4_checkpoint_n_tensors(file); i++) {
        LM_TRY(lm, moe4_checkpoint_tensor(file, &t, i));
        if (t.n_dims != 1 || (t.dtype != MOE4_I32 && t.dtype != MOE4_I64)) continue;
        ids = t;
        n_found++;
    }
    LM_CHECK(lm, n_found == 1, MOE4_ERROR_FORMAT, "%s: %zu tensors of type I32 or I64 and one dimension, need 1", path, n_found);
    LM_TRY(lm, allocate(lm, tokens, limit && limit < ids.shape[0] ? limit : ids.shape[0]));
    const uint8_t *p = ids.data;
    for (size_t i = 0; i < tokens->n; i++, p += moe4_dtype_bytes(ids.dtype))
        tokens->data[i] = ids.dtype == MOE4_I64 && little_endian(p + 4) != 0 ? -1 : little_endian(p);
    return MOE4_OK;
}

moe4_status lm_tokens_from_ids(struct lm *lm, struct lm_tokens *tokens, const char *path, size_t limit) {
    static const char suffix[] = ".safetensors";
    size_t n = strlen(path), n_suffix = sizeof suffix - 1;
    lm->error[0] = '\0';
    *tokens = (struct lm_tokens){NULL, 0};
    if (n < n_suffix || strcmp(path + n - n_suffix, suffix) != 0) return from_raw(lm, tokens, path, limit);
    moe4_checkpoint *file;
    LM_TRY(lm, moe4_checkpoint_open(&file, lm->ctx, path));
    moe4_status status = from_tensors(lm, tokens, file, path, limit);
    moe4_checkpoint_close(file);
    return status;
}
