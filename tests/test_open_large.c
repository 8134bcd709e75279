/* Opening a checkpoint as large as they come: 95 shards, 200,000 tensors, 413 GB of data that is a hole in the file. Prints what it
 * measures; the bounds that fail are three times what is promised (1 s, 200 MB), as the machine may be busy. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

#include "files.h"
#include "moe4.h"

enum { N_SHARDS = 95, N_TENSORS = 200000, N_EXPERTS = 256, ROWS = 2048, COLS = 7168 };
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SLACK = 100 }; /* a sanitizer's time and memory are not ours */
#else
enum { SLACK = 3 };
#endif

/* Tensor i's name, entry without offsets, and bytes. */
static uint64_t describe(char name[128], char entry[128], size_t i) {
    static const char *const proj[] = {"gate_proj", "up_proj", "down_proj"};
    static const char *const suffix[] = {"weight", "weight_scale", "weight_scale_2", "input_scale"};
    size_t s = i % 4, p = i / 4 % 3, e = i / 12 % N_EXPERTS, layer = i / 12 / N_EXPERTS;
    snprintf(name, 128, "model.layers.%zu.mlp.experts.%zu.%s.%s", layer, e, proj[p], suffix[s]);
    size_t rows = p == 2 ? COLS : ROWS, cols = p == 2 ? ROWS : COLS;
    if (s >= 2) {
        snprintf(entry, 128, "\"dtype\":\"F32\",\"shape\":[]");
        return 4;
    }
    size_t stored = s ? cols / 16 : cols / 2;
    snprintf(entry, 128, "\"dtype\":\"%s\",\"shape\":[%zu,%zu]", s ? "F8_E4M3" : "U8", rows, stored);
    return (uint64_t)rows * stored;
}

static void write_shard(const char *file, size_t first, size_t end) {
    char *header = malloc((end - first) * 256 + 64);
    size_t at = (size_t)sprintf(header, "{");
    uint64_t offset = 0;
    for (size_t i = first; i < end; i++) {
        char name[128], entry[128];
        uint64_t bytes = describe(name, entry, i);
        at += (size_t)sprintf(header + at, "%s\"%s\":{%s,\"data_offsets\":[%llu,%llu]}", i > first ? "," : "", name, entry,
                              (unsigned long long)offset, (unsigned long long)(offset + bytes));
        offset += bytes;
    }
    sprintf(header + at, "}");
    files_safetensors(file, header, NULL, 0);
    assert_int_equal(truncate(files_path(file), (off_t)(8 + at + 1 + offset)), 0);
    free(header);
}

static void write_checkpoint(void) {
    FILE *index = fopen(files_path("model.safetensors.index.json"), "w");
    assert_non_null(index);
    fprintf(index, "{\"metadata\":{\"total_size\":1},\"weight_map\":{");
    for (size_t s = 0; s < N_SHARDS; s++) {
        size_t first = N_TENSORS * s / N_SHARDS, end = N_TENSORS * (s + 1) / N_SHARDS;
        char file[64], name[128], entry[128];
        snprintf(file, sizeof file, "model-%05zu-of-%05d.safetensors", s + 1, N_SHARDS);
        write_shard(file, first, end);
        for (size_t i = first; i < end; i++) {
            describe(name, entry, i);
            fprintf(index, "%s\"%s\":\"%s\"", i ? "," : "", name, file);
        }
    }
    fprintf(index, "}}");
    assert_int_equal(fclose(index), 0);
}

static double seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Opens it, and says how long that took: by the clock, or by the CPU's time, which is the longer one but on a busy machine. */
static double open_timed(moe4_checkpoint **ckpt, moe4_ctx *ctx, const char *folder) {
    double begin = seconds(CLOCK_MONOTONIC), cpu_begin = seconds(CLOCK_PROCESS_CPUTIME_ID);
    moe4_status status = moe4_checkpoint_open(ckpt, ctx, folder);
    double took = seconds(CLOCK_MONOTONIC) - begin, cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu_begin;
    if (status != MOE4_OK) fail_msg("%s", moe4_ctx_error(ctx));
    return took < cpu ? took : cpu;
}

static void test_large(void **state) {
    (void)state;
    const char *folder = files_make();
    pid_t writer = fork(); /* its memory shall not count */
    if (writer == 0) {
        write_checkpoint();
        _exit(0);
    }
    int exit_status;
    assert_int_equal(waitpid(writer, &exit_status, 0), writer);
    assert_int_equal(exit_status, 0);

    moe4_ctx *ctx;
    moe4_checkpoint *ckpt;
    assert_int_equal(moe4_ctx_create(&ctx, NULL), MOE4_OK);
    double took = open_timed(&ckpt, ctx, folder);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double mb = (double)usage.ru_maxrss * 1024 / 1e6;
    for (int again = 0; again < 4 && took >= 1.0 * SLACK; again++) { /* neighbours on the machine slow the CPU itself */
        moe4_checkpoint_close(ckpt);
        double retook = open_timed(&ckpt, ctx, folder);
        took = retook < took ? retook : took;
    }
    printf("opened %d shards, %zu tensors: %.3f s, peak %.0f MB, %zu threads\n", N_SHARDS, moe4_checkpoint_n_tensors(ckpt), took, mb,
           moe4_ctx_n_threads(ctx));
    assert_int_equal(moe4_checkpoint_n_tensors(ckpt), N_TENSORS);
    moe4_tensor t;
    char name[128], entry[128];
    for (size_t i = 0; i < N_TENSORS; i += 997) {
        uint64_t bytes = describe(name, entry, i);
        assert_int_equal(moe4_checkpoint_find(ckpt, &t, name), MOE4_OK);
        assert_int_equal(t.bytes, bytes);
    }
    moe4_checkpoint_close(ckpt);
    moe4_ctx_destroy(ctx);
    files_remove();
    assert_true(took < 1.0 * SLACK);
    assert_true(mb < 200.0 * SLACK);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_large)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
