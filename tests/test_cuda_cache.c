/* A layer's packed weights from a cache folder: the same results, a damaged file made again, and proof that the file is what runs. Skipped
 * (77) without a device. */
#include "reference.h"

#include "device.h"

#include <glob.h>
#include <unistd.h>

#include "cache.h"

enum { E = 3, HIDDEN = 208, INTERMEDIATE = 96, TOP = 2, T = 9 };

static char folder[] = "/tmp/moe4-cuda-cache-XXXXXX";

static moe4_ctx *open_cached(void) {
    moe4_ctx *ctx = NULL;
    moe4_ctx_options o = MOE4_CTX_OPTIONS_INIT;
    o.device = "cuda:0";
    o.cache = folder;
    o.log = keep_log;
    logged[0] = '\0';
    assert_int_equal(moe4_ctx_create(&ctx, &o), MOE4_OK);
    return ctx;
}

struct setup {
    moe4_expert expert[E];
    float x[T * HIDDEN], weights[T * TOP];
    int32_t ids[T * TOP];
};

static void make_setup(struct setup *s) {
    for (int e = 0; e < E; e++)
        s->expert[e] = (moe4_expert){.gate = ref_random_weight(MOE4_NVFP4, INTERMEDIATE, HIDDEN),
                                     .up = ref_random_weight(MOE4_NVFP4, INTERMEDIATE, HIDDEN),
                                     .down = ref_random_weight(MOE4_NVFP4, HIDDEN, INTERMEDIATE)};
    for (int i = 0; i < T * HIDDEN; i++) s->x[i] = ref_normal();
    for (int i = 0; i < T * TOP; i++) {
        s->weights[i] = 0.5f;
        s->ids[i] = (int32_t)(ref_random() % E);
    }
}

static void free_setup(struct setup *s) {
    for (int e = 0; e < E; e++) {
        ref_free_weight(&s->expert[e].gate);
        ref_free_weight(&s->expert[e].up);
        ref_free_weight(&s->expert[e].down);
    }
}

/* y of a layer, and of a linear with expert 0's gate, made in a context of their own with the folder (or without: ctx). */
static void run(float *y, float *g, const struct setup *s, moe4_ctx *without) {
    moe4_ctx *ctx = without ? without : open_cached();
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.n_experts = E;
    o.top_k = TOP;
    o.x_dtype = o.y_dtype = MOE4_F32;
    moe4_moe *moe;
    moe4_linear *linear;
    size_t bytes, linear_bytes;
    OK(ctx, moe4_moe_create(&moe, ctx, s->expert, &o));
    OK(ctx, moe4_linear_create(&linear, ctx, &s->expert[0].gate, 1, NULL));
    OK(ctx, moe4_moe_workspace_bytes(moe, &bytes, T));
    OK(ctx, moe4_linear_workspace_bytes(linear, &linear_bytes, T));
    if (linear_bytes > bytes) bytes = linear_bytes;
    moe4_workspace ws = {on_device(NULL, bytes, 0), bytes};
    void *x = on_device(s->x, sizeof s->x, 0), *ids = on_device(s->ids, sizeof s->ids, 0), *w = on_device(s->weights, sizeof s->weights, 0);
    void *dy = on_device(NULL, sizeof s->x, 0);
    OK(ctx, moe4_moe_forward(moe, dy, x, ids, w, T, &ws, NULL));
    from_device(y, dy, sizeof s->x);
    OK(ctx, moe4_linear_forward(linear, &dy, NULL, x, T, &ws, NULL));
    from_device(g, dy, T * INTERMEDIATE * sizeof *g);
    void *all[] = {ws.data, x, ids, w, dy};
    for (int i = 0; i < 5; i++) free_device(all[i], 0);
    moe4_linear_destroy(linear);
    moe4_moe_destroy(moe);
    if (!without) moe4_ctx_destroy(ctx);
}

/* The files of the folder; the larger one is the layer's. */
static void find_files(glob_t *files) {
    char pattern[128];
    snprintf(pattern, sizeof pattern, "%s/cuda-*.moe4pack", folder);
    assert_int_equal(glob(pattern, 0, NULL, files), 0);
    assert_int_equal(files->gl_pathc, 2);
}

static void read_key(struct moe4_cache_key *key, const char *path) {
    FILE *f = fopen(path, "rb");
    uint64_t bytes;
    assert_non_null(f);
    memset(key, 0, sizeof *key);
    assert_int_equal(fseek(f, 16, SEEK_SET), 0); /* docs/format.md: bytes, then the digest of the contents; the layout's name at 56 */
    assert_int_equal(fread(&bytes, sizeof bytes, 1, f), 1);
    assert_int_equal(fread(&key->content, sizeof key->content, 1, f), 1);
    assert_int_equal(fseek(f, 56, SEEK_SET), 0);
    assert_int_equal(fread(key->layout, sizeof key->layout, 1, f), 1);
    key->bytes = (size_t)bytes;
    fclose(f);
}

static void test_cache(void **state) {
    (void)state;
    static struct setup s;
    static float want[T * HIDDEN], got[T * HIDDEN], want_g[T * INTERMEDIATE], got_g[T * INTERMEDIATE];
    glob_t files;
    make_setup(&s);
    run(want, want_g, &s, gpu);
    for (int i = 0; i < 2; i++) { /* written, then read */
        run(got, got_g, &s, NULL);
        assert_string_equal(logged, "");
        assert_memory_equal(got, want, sizeof want);
        assert_memory_equal(got_g, want_g, sizeof want_g);
    }
    find_files(&files);

    for (size_t i = 0; i < files.gl_pathc; i++) { /* a byte of each changed: packed again, and said */
        FILE *f = fopen(files.gl_pathv[i], "r+b");
        assert_int_equal(fseek(f, 4096 + 77, SEEK_SET), 0);
        int byte = fgetc(f);
        assert_int_equal(fseek(f, 4096 + 77, SEEK_SET), 0);
        fputc(byte ^ 1, f);
        fclose(f);
    }
    run(got, got_g, &s, NULL);
    assert_non_null(strstr(logged, "packing again"));
    assert_memory_equal(got, want, sizeof want);
    assert_memory_equal(got_g, want_g, sizeof want_g);
    run(got, got_g, &s, NULL);
    assert_string_equal(logged, "");

    moe4_ctx *writer = open_cached(); /* whole files of zeros under those keys: if they are read, nothing comes out */
    for (size_t i = 0; i < files.gl_pathc; i++) {
        struct moe4_cache_key key;
        read_key(&key, files.gl_pathv[i]);
        assert_string_equal(key.layout, "cuda-64x64-2");
        void *zeros = calloc(key.bytes, 1);
        moe4_cache_write(writer, &key, zeros);
        free(zeros);
    }
    moe4_ctx_destroy(writer);
    run(got, got_g, &s, NULL);
    for (int i = 0; i < T * HIDDEN; i++) assert_true(got[i] == 0);
    for (int i = 0; i < T * INTERMEDIATE; i++) assert_true(got_g[i] == 0);

    ((uint8_t *)s.expert[1].up.data)[5] ^= 1; /* other weights: another file */
    run(got, got_g, &s, NULL);
    assert_true(got[0] != 0 || got[1] != 0);
    globfree(&files);
    char pattern[128];
    snprintf(pattern, sizeof pattern, "%s/*", folder);
    assert_int_equal(glob(pattern, 0, NULL, &files), 0);
    assert_int_equal(files.gl_pathc, 3);
    for (size_t i = 0; i < files.gl_pathc; i++) unlink(files.gl_pathv[i]);
    globfree(&files);
    rmdir(folder);
    free_setup(&s);
}

int main(void) {
    int status = open_both("test_cuda_cache", MOE4_ISA_SCALAR);
    if (status) return status;
    if (!mkdtemp(folder)) return 1;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_cache)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    close_both();
    return failed;
}
