/* A file of packed weights that is not what moe4 wrote: whatever stands there, the product has the same bits. Input: a little-endian
 * 32-bit length to cut the file to or to fill it up to (past twice its own: as it is), then changes of 4 bytes: an offset of three, a
 * value. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "moe4.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { N = 48, K = 128 };

static char folder[] = "/tmp/moe4-fuzz-cache-XXXXXX", path[512];
static uint8_t codes[N * K / 2], scales[N * K / 16], *file, *changed;
static size_t file_bytes;
static float want[N];
static moe4_ctx *ctx;

static void product(float *y) {
    const moe4_weight w = {.dtype = MOE4_NVFP4, .rows = N, .cols = K, .data = codes, .scale = scales, .global = 1};
    moe4_linear *linear;
    moe4_workspace ws;
    float x[K];
    for (int i = 0; i < K; i++) x[i] = (float)(i % 7 - 3);
    if (moe4_linear_create(&linear, ctx, &w, 1, NULL) != MOE4_OK) abort();
    if (moe4_linear_workspace_bytes(linear, &ws.bytes, 1) != MOE4_OK || !(ws.data = aligned_alloc(64, ws.bytes))) abort();
    if (moe4_linear_forward(linear, (void *[]){y}, NULL, x, 1, &ws, NULL) != MOE4_OK) abort();
    free(ws.data);
    moe4_linear_destroy(linear);
}

static void remove_folder(void) {
    remove(path);
    rmdir(folder);
    moe4_ctx_destroy(ctx);
    free(file);
    free(changed);
}

/* The file that moe4 writes. An ISA that reads weights in place writes none, and then there is nothing to try. */
static void start(void) {
    moe4_ctx_options options = MOE4_CTX_OPTIONS_INIT;
    options.n_threads = 1;
    options.cache = folder;
    for (size_t i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)(i * 37);
    for (size_t i = 0; i < sizeof scales; i++) scales[i] = (uint8_t)(0x30 + i % 16);
    if (!mkdtemp(folder) || moe4_ctx_create(&ctx, &options) != MOE4_OK || atexit(remove_folder) != 0) abort();
    product(want);
    DIR *d = opendir(folder);
    if (!d) abort();
    for (struct dirent *e; (e = readdir(d));)
        if (e->d_name[0] != '.') snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
    closedir(d);
    FILE *f = path[0] ? fopen(path, "rb") : NULL;
    if (!f) return;
    if (fseek(f, 0, SEEK_END) != 0) abort();
    file_bytes = (size_t)ftell(f);
    rewind(f);
    file = malloc(file_bytes);
    changed = calloc(2, file_bytes);
    if (!file || !changed || fread(file, 1, file_bytes, f) != file_bytes || fclose(f) != 0) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!ctx) start();
    if (!file || size < 4) return 0;
    size_t bytes = data[0] | (size_t)data[1] << 8 | (size_t)data[2] << 16 | (size_t)data[3] << 24;
    if (bytes > 2 * file_bytes) bytes = file_bytes;
    memcpy(changed, file, file_bytes);
    for (size_t at = 4; at + 4 <= size; at += 4)
        changed[(data[at] | (size_t)data[at + 1] << 8 | (size_t)data[at + 2] << 16) % file_bytes] = data[at + 3];
    remove(path);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(changed, 1, bytes, f) != bytes || fclose(f) != 0) abort();
    float y[N];
    product(y);
    if (memcmp(y, want, sizeof y) != 0 || moe4_ctx_error(ctx)[0]) abort();
    return 0;
}
