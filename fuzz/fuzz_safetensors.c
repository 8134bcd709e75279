/* The parser of .safetensors files: any bytes. What it accepts must lie inside the input, all of it. */
#include <stdlib.h>
#include <string.h>

#include "safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static moe4_ctx *ctx;
    moe4_ctx_options options = MOE4_CTX_OPTIONS_INIT;
    options.n_threads = 1;
    if (!ctx && moe4_ctx_create(&ctx, &options) != MOE4_OK) abort();

    struct moe4_safetensors st = {.map = {data, size}};
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
    st.map = (struct moe4_map){NULL, 0}; /* not ours to unmap */
    moe4_safetensors_close(ctx, &st);
    return 0;
}
