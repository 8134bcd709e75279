/* The parser of .safetensors files. The input is tried as a file; and its bytes choose the entries of a header that is nearly right, as
 * few changed bytes leave JSON well-formed. What the parser accepts must lie inside the file, all of it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "safetensors.h"
#include "source.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static moe4_ctx *ctx;

static void parse(const uint8_t *data, size_t size) {
    struct moe4_safetensors st = {.map = {.data = data, .bytes = size}};
    st.file = moe4_text_copy(ctx, "input", 5);
    moe4_begin(ctx);
    moe4_status status = moe4_safetensors_parse(ctx, &st);
    if ((status == MOE4_OK) != (moe4_ctx_error(ctx)[0] == '\0')) abort(); /* every failure has its sentence */
    const uint8_t *at = NULL;
    for (size_t i = 0; status == MOE4_OK && i < st.n_tensors; i++) {
        const moe4_tensor *t = &st.tensors[i];
        size_t bytes = moe4_dtype_bytes(t->dtype);
        for (size_t d = 0; d < t->n_dims; d++) bytes *= t->shape[d];
        if (bytes != t->bytes || (at && t->data != at) || !memchr(t->name, 0, MOE4_MAX_NAME + 1)) abort();
        at = (const uint8_t *)t->data + t->bytes;
    }
    if (at && at != data + size) abort();
    st.map = (struct moe4_map){0}; /* not ours to unmap */
    moe4_safetensors_close(ctx, &st);
}

/* ---- a header from bytes ---- */

static const char *number(struct source *s, char text[static 24], size_t likely) {
    static const char *const odd[] = {"-1", "1.0", "null", "\"1\"", "4294967296", "9223372036854775807", "18446744073709551616", "1e3"};
    unsigned choice = take(s);
    if (choice >= 240) return odd[choice % 8];
    snprintf(text, 24, "%zu", choice < 200 ? likely : choice % 16);
    return text;
}

enum { MAX_HEADER = 16384, MAX_ENTRY = 1024 };

/* Returns its length; *data_bytes_ret: of the data it describes. */
static size_t write_header(char *header, size_t *data_bytes_ret, struct source *s) {
    static const char *const dtypes[] = {"F32", "F16", "BF16", "F64", "U8", "F8_E4M3", "F8_E8M0", "BOOL", "I64", "F4", "", "x"};
    static const size_t bytes_of[] = {4, 2, 2, 8, 1, 1, 1, 1, 8, 1, 1, 1};
    char a[24], b[24];
    size_t at = (size_t)sprintf(header, "{"), offset = 0;
    for (int i = 0; s->left && at + MAX_ENTRY < MAX_HEADER; i++) {
        unsigned choice = take(s), dtype = take(s) % (choice < 128 ? 9 : 12), n_dims = take(s) % (choice < 128 ? 4 : 10);
        size_t bytes = bytes_of[dtype];
        at += (size_t)sprintf(header + at, "%s\"%c%c\":{\"dtype\":\"%s\",\"shape\":[", i ? "," : "", 'a' + i % 26,
                              choice % 64 ? 'a' + i / 26 % 26 : 'a', dtypes[dtype]);
        for (unsigned d = 0; d < n_dims; d++) {
            size_t dim = take(s) % 5;
            at += (size_t)sprintf(header + at, "%s%s", d ? "," : "", number(s, a, dim));
            bytes *= dim;
        }
        at += (size_t)sprintf(header + at, "],\"data_offsets\":[%s,%s]}", number(s, a, offset), number(s, b, offset + bytes));
        offset += bytes;
    }
    *data_bytes_ret = offset;
    return at + (size_t)sprintf(header + at, "}");
}

static void parse_generated(const uint8_t *data, size_t size) {
    struct source source = {data, size};
    unsigned choice = take(&source);
    size_t data_bytes = 0;
    uint8_t *file = calloc(1, 8 + MAX_HEADER);
    if (!file) abort();
    size_t n = write_header((char *)file + 8, &data_bytes, &source);
    if (choice >= 200) data_bytes = choice - 200;
    if (data_bytes > 1 << 20) data_bytes = 1 << 20;
    for (int i = 0; i < 8; i++) file[i] = (uint8_t)((uint64_t)n >> 8 * i);
    uint8_t *exact = calloc(1, 8 + n + data_bytes); /* a sanitizer sees the first byte behind */
    if (!exact) abort();
    memcpy(exact, file, 8 + n);
    free(file);
    parse(exact, 8 + n + data_bytes);
    free(exact);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    moe4_ctx_options options = MOE4_CTX_OPTIONS_INIT;
    options.n_threads = 1;
    if (!ctx && moe4_ctx_create(&ctx, &options) != MOE4_OK) abort();
    parse(data, size);
    parse_generated(data, size);
    return 0;
}
