/* A whole model folder: config.json, an index and two shards, all from one input, through open, info, weights, experts and verify.
 * Input: three little-endian 16-bit lengths, of config.json, of the index and of a.safetensors, then these; the rest is b.safetensors.
 * Files of length 0 are left out. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char *const names[] = {"config.json", MOE4_INDEX_NAME, "a.safetensors", "b.safetensors"};
static char folder[] = "/tmp/moe4-fuzz-XXXXXX";
static moe4_ctx *ctx;

static void remove_folder(void) {
    for (int i = 0; i < 4; i++) {
        char path[128];
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        remove(path);
    }
    rmdir(folder);
    moe4_ctx_destroy(ctx);
}

static void start(void) {
    moe4_ctx_options options = MOE4_CTX_OPTIONS_INIT;
    options.n_threads = 1;
    if (!mkdtemp(folder) || moe4_ctx_create(&ctx, &options) != MOE4_OK || atexit(remove_folder) != 0) abort();
}

static void write_files(const uint8_t *data, size_t size) {
    size_t at = size < 6 ? size : 6;
    for (int i = 0; i < 4; i++) {
        char path[128];
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        size_t n = size - at;
        if (i < 3) {
            size_t stated = size < 6 ? 0 : (size_t)data[2 * i] | (size_t)data[2 * i + 1] << 8;
            n = stated < n ? stated : n;
        }
        remove(path);
        if (!n) continue;
        FILE *f = fopen(path, "wb");
        if (!f || fwrite(data + at, 1, n, f) != n || fclose(f) != 0) abort();
        at += n;
    }
}

static void count(void *user, const char *name, const char *problem) {
    if (!name || !*problem) abort();
    ++*(uint64_t *)user;
}

/* What a user does with a weight: its values, and an object that reads all of it. */
static void use_weight(const moe4_weight *w) {
    float *y = calloc(w->cols, sizeof *y);
    moe4_linear *linear;
    if (!y) abort();
    moe4_weight_values(ctx, y, w, w->rows - 1, 1);
    if (moe4_linear_create(&linear, ctx, w, 1, NULL) == MOE4_OK) moe4_linear_destroy(linear);
    free(y);
}

static void use(moe4_checkpoint *ckpt) {
    moe4_model_info info = MOE4_MODEL_INFO_INIT;
    moe4_weight w;
    moe4_tensor t, bias;
    for (size_t i = 0; i < moe4_checkpoint_n_tensors(ckpt); i++) {
        char module[MOE4_MAX_NAME + 1];
        if (moe4_checkpoint_tensor(ckpt, &t, i) != MOE4_OK || moe4_checkpoint_find(ckpt, &t, t.name) != MOE4_OK) abort();
        snprintf(module, sizeof module, "%s", t.name);
        for (char *dot; (dot = strrchr(module, '.'));) {
            *dot = '\0';
            if (moe4_checkpoint_weight(ckpt, &w, module) != MOE4_OK) continue;
            use_weight(&w);
            if (w.dtype != MOE4_NVFP4) continue;
            moe4_weight_stats stats = MOE4_WEIGHT_STATS_INIT;
            if (moe4_weight_inspect(ctx, &stats, &w) != MOE4_OK) abort();
        }
    }
    bool small = true;
    if (moe4_checkpoint_info(ckpt, &info) == MOE4_OK) {
        small = info.n_layers * info.n_experts < 2000; /* else verify has too much to miss for a fuzzer */
        for (size_t layer = 0; layer <= info.n_layers && layer < 4; layer++) {
            moe4_checkpoint_router(ckpt, &w, &bias, layer);
            moe4_checkpoint_hash_table(ckpt, &t, layer);
            moe4_router *router;
            moe4_moe *moe;
            moe4_moe_options options = MOE4_MOE_OPTIONS_INIT;
            options.with_shared = 1;
            if (moe4_router_create_from_checkpoint(&router, ctx, ckpt, layer, NULL) == MOE4_OK) moe4_router_destroy(router);
            if (small && moe4_moe_create_from_checkpoint(&moe, ctx, ckpt, layer, &options) == MOE4_OK) moe4_moe_destroy(moe);
            for (int64_t e = MOE4_EXPERT_DENSE; e < 3; e++)
                for (int p = 0; p < 3; p++) moe4_checkpoint_expert(ckpt, &w, layer, e, (moe4_proj)p);
        }
    }
    uint64_t n = 0, counted = 0;
    if (small && (moe4_checkpoint_verify(ckpt, &n, count, NULL, &counted) != MOE4_OK || n != counted)) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!ctx) start();
    write_files(data, size);
    moe4_checkpoint *ckpt;
    moe4_status status = moe4_checkpoint_open(&ckpt, ctx, folder);
    if ((status == MOE4_OK) != (moe4_ctx_error(ctx)[0] == '\0')) abort();
    if (status != MOE4_OK) return 0;
    use(ckpt);
    moe4_checkpoint_close(ckpt);
    return 0;
}
