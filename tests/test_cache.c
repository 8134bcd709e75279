/* The cache of packed weights: found, shared, and never believed. */
#include <dirent.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <signal.h>
#include <unistd.h>

#include "files.h"
#include "one_layer.h"

enum { H = 128, I = 64, E = 3, T = 9, HEADER = 4096 };

static struct one_layer layer;
static float want[T * H];
static const char *folder;
static char lines[2048];

static void keep_line(void *user, const char *line) {
    (void)user;
    size_t at = strlen(lines);
    snprintf(lines + at, sizeof lines - at, "%s\n", line);
}

static moe4_ctx *open_ctx(const char *cache, const char *isa) {
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.n_threads = 2;
    o.isa_mask = moe4_isa_mask(isa);
    o.cache = cache;
    o.log = keep_line;
    moe4_ctx *ctx;
    lines[0] = '\0';
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_OK);
    return ctx;
}

/* In /proc/self/maps: this process has that file mapped. */
static bool is_mapped(const char *path) {
    char line[4096];
    bool found = false;
    FILE *f = fopen("/proc/self/maps", "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f)) found |= strstr(line, path) != NULL;
    fclose(f);
    return found;
}

/* Runs the layer in a context of its own: the bits are always the same. True when its weights came from `path`. */
static bool run(const char *cache, const char *path, const char *isa) {
    moe4_ctx *ctx = open_ctx(cache, isa);
    float y[T * H];
    moe4_moe *moe = one_layer_forward(&layer, ctx, y, MOE4_ACT_DEFAULT);
    if (!isa) assert_memory_equal(y, want, sizeof y);
    assert_string_equal(moe4_ctx_error(ctx), "");
    const bool mapped = path && is_mapped(path);
    moe4_moe_destroy(moe);
    moe4_ctx_destroy(ctx);
    return mapped;
}

/* The one file in the folder, and none besides. */
static const char *only_file(void) {
    static char path[512];
    size_t n = 0;
    DIR *d = opendir(folder);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
        n++;
    }
    closedir(d);
    assert_int_equal(n, 1);
    return path;
}

static bool packs(void) { /* does the best ISA here pack at all? */
    moe4_ctx *ctx = open_ctx(NULL, NULL);
    const bool in_place = strcmp(moe4_ctx_isa(ctx), "scalar") == 0 || strcmp(moe4_ctx_isa(ctx), "neon") == 0;
    moe4_ctx_destroy(ctx);
    return !in_place;
}

static int set_up(void **state) {
    (void)state;
    layer = one_layer_make(H, I, E, T);
    moe4_ctx *ctx = open_ctx(NULL, NULL);
    moe4_moe_destroy(one_layer_forward(&layer, ctx, want, MOE4_ACT_DEFAULT));
    moe4_ctx_destroy(ctx);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    one_layer_free(&layer);
    return 0;
}

static int make_folder(void **state) {
    (void)state;
    folder = files_make();
    return 0;
}

static int remove_folder(void **state) {
    (void)state;
    files_remove();
    return 0;
}

/* ---- tests ---- */

static void test_written_then_mapped(void **state) {
    (void)state;
    if (!packs()) skip();
    assert_false(run(folder, "moe4pack", NULL));
    assert_string_equal(lines, "");
    struct stat first, later;
    const char *path = only_file();
    assert_int_equal(stat(path, &first), 0);
    assert_true(run(folder, path, NULL));
    assert_false(is_mapped(path));
    assert_string_equal(lines, "");
    assert_int_equal(stat(only_file(), &later), 0);
    assert_int_equal(first.st_ino, later.st_ino);
    run(folder, NULL, "scalar"); /* reads weights in place: no file */
    only_file();
#if defined(__x86_64__)
    assert_true(run(folder, path, "avx2")); /* the same layout */
#endif
}

/* Every ISA in every mode: the bits are those without a folder, whether the file is there or not. */
static void test_every_mode(void **state) {
    (void)state;
    static const char *const isas[] = {"scalar", "avx2", "avx512vnni", "avx512bf16", "neon", "neondot", "neoni8mm"};
    float y[3][T * H];
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++)
        for (int act = MOE4_ACT_W4A16; act <= MOE4_ACT_TOKEN; act++) {
            for (int n = 0; n < 3; n++) {
                moe4_ctx *ctx = open_ctx(n ? folder : NULL, isas[i]);
                moe4_moe_destroy(one_layer_forward(&layer, ctx, y[n], (moe4_act)act));
                moe4_ctx_destroy(ctx);
                assert_string_equal(lines, "");
            }
            assert_memory_equal(y[1], y[0], sizeof *y);
            assert_memory_equal(y[2], y[0], sizeof *y);
        }
}

/* Other codes, another scale, the same bytes as two matrices in the other order: other files. */
static void test_found_by_content(void **state) {
    (void)state;
    if (!packs()) skip();
    run(folder, NULL, NULL);
    const char *path = only_file();
    uint8_t *code = (uint8_t *)layer.experts[1].down.data + 77, *scale = (uint8_t *)layer.experts[2].gate.scale + 5;
    *code ^= 1;
    assert_false(run(folder, path, "avx512bf16"));
    *code ^= 1;
    *scale ^= 1;
    assert_false(run(folder, path, "avx512bf16"));
    *scale ^= 1;
    const moe4_weight up = layer.experts[0].up;
    layer.experts[0].up = layer.experts[0].gate;
    layer.experts[0].gate = up;
    assert_false(run(folder, path, "avx512bf16"));
    layer.experts[0].gate = layer.experts[0].up;
    layer.experts[0].up = up;
    assert_true(run(folder, path, NULL));
    layer.experts[0].up.global *= 2; /* is not packed */
    assert_true(run(folder, path, "avx512bf16"));
    layer.experts[0].up.global /= 2;
}

/* One matrix; packs to as many bytes with twice the rows of half the length. */
static void run_linear(const char *cache, float *y, moe4_weight w) {
    moe4_ctx *ctx = open_ctx(cache, NULL);
    moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
    moe4_linear *linear;
    moe4_workspace ws;
    o.act = MOE4_ACT_TOKEN;
    OK(ctx, moe4_linear_create(&linear, ctx, &w, 1, &o));
    OK(ctx, moe4_linear_workspace_bytes(linear, &ws.bytes, 1));
    ws.data = aligned_alloc(64, ws.bytes);
    OK(ctx, moe4_linear_forward(linear, (void *[]){y}, NULL, layer.x, 1, &ws, NULL));
    free(ws.data);
    moe4_linear_destroy(linear);
    moe4_ctx_destroy(ctx);
}

static void test_other_shape(void **state) {
    (void)state;
    if (!packs()) skip();
    const moe4_weight wide = layer.experts[0].gate;
    moe4_weight tall = wide;
    tall.rows = 2 * I;
    tall.cols = H / 2;
    float y[2 * I], tall_want[2 * I];
    run_linear(NULL, tall_want, tall);
    run_linear(folder, y, wide);
    run_linear(folder, y, tall);
    assert_string_equal(lines, "");
    assert_memory_equal(y, tall_want, sizeof y);
}

static void put(const char *path, const uint8_t *data, size_t bytes) {
    remove(path);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    assert_int_equal(fclose(f), 0);
}

/* Any change of any byte of the header and of some of the rest, cut short or made longer: said, and made again as it was. */
static void test_damaged_files(void **state) {
    (void)state;
    if (!packs()) skip();
    run(folder, NULL, NULL);
    char path[512];
    size_t bytes, n;
    snprintf(path, sizeof path, "%s", only_file());
    uint8_t *good = files_read(path, &bytes), *again;
    assert_true(bytes > HEADER + 1000);
    for (size_t at = 0; at < bytes; at += at < 96 ? 1 : at < HEADER ? 97 : 997) {
        good[at] ^= (uint8_t)(1u << at % 8);
        put(path, good, bytes);
        good[at] ^= (uint8_t)(1u << at % 8);
        assert_false(run(folder, path, NULL));
        if (!strstr(lines, path) || !strstr(lines, "packing again")) fail_msg("byte %zu: \"%s\"", at, lines);
        again = files_read(only_file(), &n);
        assert_int_equal(n, bytes);
        assert_memory_equal(again, good, bytes);
        free(again);
    }
    const size_t sizes[] = {0, 1, 87, 88, HEADER - 1, HEADER, HEADER + 1, bytes - 1, bytes + 1};
    uint8_t *longer = calloc(1, bytes + 1);
    memcpy(longer, good, bytes);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        put(path, longer, sizes[i]);
        assert_false(run(folder, path, NULL));
        char expected[64];
        snprintf(expected, sizeof expected, "%zu bytes, need %zu", sizes[i], bytes);
        assert_non_null(strstr(lines, expected));
        assert_true(run(folder, path, NULL));
    }
    free(longer);
    free(good);
}

/* What stands there may be no file at all. */
static void test_no_regular_file(void **state) {
    (void)state;
    if (!packs()) skip();
    run(folder, NULL, NULL);
    char path[512];
    snprintf(path, sizeof path, "%s", only_file());
    remove(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_false(run(folder, path, NULL));
    assert_non_null(strstr(lines, "not a regular file"));
    assert_true(run(folder, path, NULL)); /* renamed over the FIFO */
    remove(path);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_false(run(folder, path, NULL));
    assert_non_null(strstr(lines, "cannot write"));
    assert_string_equal(only_file(), path); /* nothing temporary is left */
    rmdir(path);
}

/* A full disk, here a limit on the file's size: the layer runs, nothing is left behind. */
static void test_cannot_write(void **state) {
    (void)state;
    if (!packs()) skip();
    struct rlimit old, small = {HEADER + 512, 0};
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    small.rlim_max = old.rlim_max;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    assert_false(run(folder, "moe4pack", NULL));
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    signal(SIGXFSZ, SIG_DFL);
    assert_non_null(strstr(lines, "cannot write"));
    assert_int_equal(rmdir(folder), 0); /* empty */
    assert_int_equal(mkdir(folder, 0700), 0);
}

static void test_processes_at_once(void **state) {
    (void)state;
    if (!packs()) skip();
    run(folder, NULL, NULL);
    char path[512];
    snprintf(path, sizeof path, "%s", only_file());
    pid_t child[6];
    for (int i = 0; i < 6; i++) {
        child[i] = fork();
        assert_true(child[i] >= 0);
        if (child[i] == 0) {
            for (int round = 0; round < 6; round++) {
                if (round == i) remove(path);
                run(folder, NULL, NULL);
                if (lines[0]) _exit(1);
            }
            _exit(0);
        }
    }
    for (int i = 0; i < 6; i++) {
        int status;
        assert_int_equal(waitpid(child[i], &status, 0), child[i]);
        assert_int_equal(status, 0);
    }
    run(folder, NULL, NULL);
    assert_string_equal(only_file(), path); /* nothing temporary is left */
    assert_true(run(folder, path, NULL));
}

/* Replacing an expert changes neither the file nor what others see. */
static void test_replaced_expert(void **state) {
    (void)state;
    if (!packs()) skip();
    run(folder, NULL, NULL);
    char path[512];
    size_t before_bytes, after_bytes;
    snprintf(path, sizeof path, "%s", only_file());
    uint8_t *before = files_read(path, &before_bytes), *after;
    moe4_ctx *ctx = open_ctx(folder, NULL);
    float y[T * H];
    moe4_moe *moe = one_layer_forward(&layer, ctx, y, MOE4_ACT_DEFAULT);
    assert_true(is_mapped(path));
    OK(ctx, moe4_moe_replace_expert(moe, 0, &layer.experts[1]));
    assert_true(run(folder, path, NULL));
    moe4_moe_destroy(moe);
    moe4_ctx_destroy(ctx);
    after = files_read(path, &after_bytes);
    assert_int_equal(before_bytes, after_bytes);
    assert_memory_equal(before, after, before_bytes);
    free(before);
    free(after);
}

static size_t n_allocated, fail_at;
static void *failing_alloc(void *user, size_t bytes, size_t align) {
    (void)user;
    if (++n_allocated == fail_at) return NULL;
    return aligned_alloc(align, (bytes + align - 1) / align * align);
}
static void plain_free(void *user, void *data) {
    (void)user;
    free(data);
}

/* Whichever allocation fails, with a file there and without: MEMORY, or a layer and no sentence left behind. */
static void test_failing_allocations(void **state) {
    (void)state;
    if (!packs()) skip();
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.n_threads = 1;
    o.cache = folder;
    o.log = keep_line;
    o.alloc = failing_alloc;
    o.free = plain_free;
    const moe4_moe_options mo = one_layer_options(&layer, MOE4_ACT_DEFAULT);
    for (int with_file = 0; with_file < 2; with_file++) {
        size_t n_made = 0;
        bool failed = true;
        for (fail_at = 1; failed; fail_at++) {
            moe4_ctx *ctx;
            moe4_moe *moe;
            if (with_file) run(folder, NULL, NULL);
            lines[0] = '\0';
            n_allocated = 0;
            moe4_status status = moe4_ctx_create(&ctx, &o);
            if (status == MOE4_OK) {
                status = moe4_moe_create(&moe, ctx, layer.experts, &mo);
                if (status == MOE4_OK) assert_string_equal(moe4_ctx_error(ctx), "");
                if (status == MOE4_OK && n_allocated >= fail_at) { /* only the digest of the packed bytes may fail unseen */
                    assert_non_null(strstr(lines, "no memory for the digest"));
                    n_made++;
                }
                moe4_moe_destroy(moe);
            }
            failed = n_allocated >= fail_at;
            assert_true(status == MOE4_OK || status == MOE4_ERROR_MEMORY);
            moe4_ctx_destroy(ctx);
            files_remove();
            folder = o.cache = files_make();
        }
        assert_true(n_made > 0);
    }
}

static void test_folder(void **state) {
    (void)state;
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    moe4_ctx *ctx;
    o.log = keep_line;
    o.cache = "/nowhere/at/all";
    lines[0] = '\0';
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_ERROR_NOT_FOUND);
    assert_non_null(strstr(lines, "/nowhere/at/all"));
    o.cache = "/proc/self/maps";
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_ERROR_IO);
    assert_non_null(strstr(lines, "not a folder"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_written_then_mapped, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_every_mode, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_found_by_content, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_other_shape, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_damaged_files, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_no_regular_file, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_cannot_write, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_processes_at_once, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_replaced_expert, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_failing_allocations, make_folder, remove_folder),
        cmocka_unit_test(test_folder),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
