#include "safetensors.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"

/* What the entries are checked against. */
struct directory {
    const moe4_ctx *ctx;
    struct moe4_safetensors *st;
    const uint8_t *data; /* the tensors' bytes */
    size_t data_bytes;
    char *next_name;
};

/* A whole number that fits in size_t; -1, 1.5, 2^64 and "1" are none. */
static bool read_size(size_t *size_ret, const json_t *json) {
    if (!json_is_integer(json) || json_integer_value(json) < 0 || (uintmax_t)json_integer_value(json) > SIZE_MAX) return false;
    *size_ret = (size_t)json_integer_value(json);
    return true;
}

static moe4_status read_dtype(const struct directory *d, moe4_tensor *t, const json_t *json) {
    if (!json_is_string(json)) return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: dtype is not a string", t->file, t->name);
    const char *name = json_string_value(json);
    for (int i = 0; i < MOE4_NVFP4; i++)
        if (strcmp(name, moe4_dtype_name((moe4_dtype)i)) == 0) {
            t->dtype = (moe4_dtype)i;
            return MOE4_OK;
        }
    if (!moe4_name_ok(name, strlen(name)))
        return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: dtype is empty, too long or not printable", t->file, t->name);
    return moe4_fail(d->ctx, MOE4_ERROR_UNSUPPORTED, "unsupported: %s: tensor %s: dtype \"%s\"", t->file, t->name, name);
}

/* shape, and *bytes_ret what it needs. */
static moe4_status read_shape(const struct directory *d, moe4_tensor *t, size_t *bytes_ret, const json_t *json) {
    if (!json_is_array(json)) return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: shape is not an array", t->file, t->name);
    t->n_dims = json_array_size(json);
    if (t->n_dims > MOE4_MAX_DIMS)
        return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: %zu dimensions, at most %d", t->file, t->name, t->n_dims,
                         MOE4_MAX_DIMS);
    size_t bytes = moe4_dtype_bytes(t->dtype);
    bool empty = false;
    for (size_t i = 0; i < t->n_dims; i++) {
        if (!read_size(&t->shape[i], json_array_get(json, i)))
            return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: shape[%zu] is not a whole number from 0 to 2^63-1", t->file,
                             t->name, i);
        empty |= t->shape[i] == 0;
    }
    for (size_t i = 0; i < t->n_dims; i++) /* a 0 anywhere does not excuse a product that overflows */
        if (!moe4_mul(&bytes, bytes, t->shape[i] ? t->shape[i] : 1))
            return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: shape[%zu] = %zu makes the size overflow", t->file, t->name, i,
                             t->shape[i]);
    *bytes_ret = empty ? 0 : bytes;
    return MOE4_OK;
}

static moe4_status read_offsets(const struct directory *d, moe4_tensor *t, size_t need, const json_t *json) {
    if (!json_is_array(json) || json_array_size(json) != 2)
        return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: data_offsets is not a pair", t->file, t->name);
    size_t at[2];
    for (size_t i = 0; i < 2; i++)
        if (!read_size(&at[i], json_array_get(json, i)))
            return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: data_offsets[%zu] is not a whole number from 0 to 2^63-1", t->file,
                             t->name, i);
    if (at[1] < at[0])
        return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: data_offsets end at %zu before they begin at %zu", t->file, t->name,
                         at[1], at[0]);
    if (at[1] > d->data_bytes)
        return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: data_offsets end at %zu, but the file has %zu bytes of data", t->file,
                         t->name, at[1], d->data_bytes);
    t->data = d->data + at[0];
    t->bytes = at[1] - at[0];
    if (t->bytes != need)
        return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: data_offsets span %zu bytes, its shape needs %zu", t->file, t->name,
                         t->bytes, need);
    return MOE4_OK;
}

static moe4_status read_entry(struct directory *d, moe4_tensor *t, const char *name, size_t i, json_t *entry) {
    size_t length = strlen(name);
    t->file = d->st->file;
    if (!moe4_name_ok(name, length))
        return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: name of tensor %zu: %zu bytes, need 1 to %d without control characters", t->file,
                         i, length, MOE4_MAX_NAME);
    t->name = memcpy(d->next_name, name, length + 1);
    d->next_name += length + 1;

    if (!json_is_object(entry)) return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: not described by an object", t->file, t->name);
    static const char *const keys[] = {"dtype", "shape", "data_offsets"};
    for (int k = 0; k < 3; k++)
        if (!json_object_get(entry, keys[k]))
            return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: no %s", t->file, t->name, keys[k]);
    if (json_object_size(entry) != 3)
        return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s: %zu keys, need 3 (dtype, shape, data_offsets)", t->file, t->name,
                         json_object_size(entry));
    size_t need = 0;
    MOE4_TRY(read_dtype(d, t, json_object_get(entry, "dtype")));
    MOE4_TRY(read_shape(d, t, &need, json_object_get(entry, "shape")));
    return read_offsets(d, t, need, json_object_get(entry, "data_offsets"));
}

static moe4_status check_metadata(const struct directory *d, json_t *metadata) {
    if (!json_is_object(metadata)) return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: __metadata__ is not an object", d->st->file);
    const char *key;
    json_t *value;
    json_object_foreach(metadata, key, value) if (!json_is_string(value)) return moe4_fail(
        d->ctx, MOE4_ERROR_FORMAT, "%s: __metadata__: the value of %s is not a string", d->st->file,
        moe4_name_ok(key, strlen(key)) ? key : "a key");
    return MOE4_OK;
}

static int by_offset(const void *a, const void *b) {
    const moe4_tensor *s = a, *t = b;
    if (s->data != t->data) return s->data < t->data ? -1 : 1;
    return (s->bytes > t->bytes) - (s->bytes < t->bytes); /* empty ones stand before what begins at the same place */
}

/* The format's own rule: no overlap, no gap, nothing behind the last. */
static moe4_status check_cover(const struct directory *d) {
    const struct moe4_safetensors *st = d->st;
    size_t at = 0;
    const char *before = "the header";
    for (size_t i = 0; i < st->n_tensors; i++) {
        const moe4_tensor *t = &st->tensors[i];
        size_t begin = (size_t)((const uint8_t *)t->data - d->data);
        if (begin < at)
            return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s begins at %zu and overlaps %s, which ends at %zu", t->file, t->name,
                             begin, before, at);
        if (begin > at)
            return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: tensor %s begins at %zu, a gap after %s, which ends at %zu", t->file, t->name,
                             begin, before, at);
        at = begin + t->bytes;
        before = t->name;
    }
    if (at != d->data_bytes)
        return moe4_fail(d->ctx, MOE4_ERROR_FORMAT, "%s: the tensors end at %zu, but the file has %zu bytes of data", st->file, at,
                         d->data_bytes);
    return MOE4_OK;
}

static moe4_status read_directory(struct directory *d, json_t *header) {
    struct moe4_safetensors *st = d->st;
    size_t name_bytes = 0, n = json_object_size(header);
    const char *name;
    json_t *entry;
    json_object_foreach(header, name, entry) name_bytes += strlen(name) + 1;
    st->tensors = moe4_calloc(d->ctx, n, sizeof *st->tensors, "tensor directory");
    if (!st->tensors) return MOE4_ERROR_MEMORY;
    st->names = d->next_name = moe4_calloc(d->ctx, name_bytes, 1, "tensor names");
    if (!st->names) return MOE4_ERROR_MEMORY;

    json_object_foreach(header, name, entry) {
        if (strcmp(name, "__metadata__") == 0) {
            MOE4_TRY(check_metadata(d, entry));
            continue;
        }
        MOE4_TRY(read_entry(d, &st->tensors[st->n_tensors], name, st->n_tensors, entry));
        st->n_tensors++;
    }
    qsort(st->tensors, st->n_tensors, sizeof *st->tensors, by_offset);
    return check_cover(d);
}

moe4_status moe4_safetensors_parse(const moe4_ctx *ctx, struct moe4_safetensors *st) {
    size_t file_bytes = st->map.bytes;
    MOE4_CHECK(ctx, file_bytes >= 8, MOE4_ERROR_FORMAT, "%s: %zu bytes, a header length alone needs 8", st->file, file_bytes);
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; i--) header_bytes = header_bytes << 8 | st->map.data[i];
    MOE4_CHECK(ctx, header_bytes <= MOE4_MAX_HEADER_BYTES, MOE4_ERROR_FORMAT, "%s: header of %" PRIu64 " bytes, at most %zu", st->file,
               header_bytes, MOE4_MAX_HEADER_BYTES);
    MOE4_CHECK(ctx, header_bytes <= file_bytes - 8, MOE4_ERROR_FORMAT, "%s: header of %" PRIu64 " bytes, but %zu are left in the file",
               st->file, header_bytes, file_bytes - 8);
    size_t n = (size_t)header_bytes;
    const uint8_t *text = st->map.data + 8;
    MOE4_CHECK(ctx, n && text[0] == '{', MOE4_ERROR_FORMAT, "%s: the header of %zu bytes does not begin with '{'", st->file, n);

    json_t *header;
    MOE4_TRY(moe4_json_parse(ctx, &header, st->file, text, n));
    struct directory d = {.ctx = ctx, .st = st, .data = text + n, .data_bytes = file_bytes - 8 - n};
    moe4_status status = read_directory(&d, header);
    json_decref(header);
    return status;
}

moe4_status moe4_safetensors_open(const moe4_ctx *ctx, struct moe4_safetensors *st, const char *path, const char *file) {
    *st = (struct moe4_safetensors){0};
    moe4_status status = moe4_map_open(ctx, &st->map, path);
    if (status == MOE4_OK) {
        st->path = moe4_text_copy(ctx, path, strlen(path));
        st->file = moe4_text_copy(ctx, file, strlen(file));
        status = st->path && st->file ? moe4_safetensors_parse(ctx, st) : MOE4_ERROR_MEMORY;
    }
    if (status != MOE4_OK) {
        moe4_safetensors_close(ctx, st);
    } else if (st->n_tensors) {
        moe4_map_drop(&st->map, 0, (size_t)((const uint8_t *)st->tensors[0].data - st->map.data)); /* the text is not needed again */
    }
    return status;
}

void moe4_safetensors_close(const moe4_ctx *ctx, struct moe4_safetensors *st) {
    moe4_map_close(&st->map);
    moe4_free(ctx, st->path);
    moe4_free(ctx, st->file);
    moe4_free(ctx, st->tensors);
    moe4_free(ctx, st->names);
    *st = (struct moe4_safetensors){0};
}
