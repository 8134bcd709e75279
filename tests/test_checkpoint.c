/* Checkpoints: folders and indexes, files that change, threads, memory. */
#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint_case.h"

static void test_bundled_model(void **state) {
    (void)state;
    moe4_checkpoint *ckpt;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, MODEL), MOE4_OK);
    assert_int_equal(moe4_checkpoint_n_files(ckpt), 1);
    assert_int_equal(moe4_checkpoint_n_tensors(ckpt), 2113);
    moe4_model_info info = MOE4_MODEL_INFO_INIT;
    assert_int_equal(moe4_checkpoint_info(ckpt, &info), MOE4_OK);
    assert_string_equal(info.family, "glm4_moe");
    assert_string_equal(info.architecture, "Glm4MoeForCausalLM");
    assert_string_equal(info.quantization, "modelopt NVFP4");
    assert_int_equal(info.n_layers, 6);
    assert_int_equal(info.intermediate, 768);
    assert_int_equal(info.n_experts, 32);
    assert_int_equal(info.router.kind, MOE4_ROUTER_SIGMOID_BIAS);
    assert_int_equal(info.router.top_k, 6);
    assert_true(info.router.scale == 2.5f);
    for (size_t layer = 0; layer < 6; layer++) {
        moe4_layer_kind kind;
        assert_int_equal(moe4_checkpoint_layer_kind(ckpt, &kind, layer), MOE4_OK);
        assert_int_equal(kind, layer ? MOE4_LAYER_MOE : MOE4_LAYER_DENSE);
        for (int64_t e = layer ? MOE4_EXPERT_SHARED : MOE4_EXPERT_DENSE; e < (layer ? 32 : -1); e++)
            for (int p = MOE4_GATE; p <= MOE4_DOWN; p++) {
                size_t inter = layer ? 128 : 768;
                moe4_weight w;
                assert_int_equal(moe4_checkpoint_expert(ckpt, &w, layer, e, (moe4_proj)p), MOE4_OK);
                assert_int_equal(w.dtype, MOE4_NVFP4);
                assert_int_equal(w.rows, p == MOE4_DOWN ? 256 : inter);
                assert_int_equal(w.cols, p == MOE4_DOWN ? inter : 256);
                assert_true(w.global > 0 && w.input_scale > 0);
            }
        moe4_weight gate;
        moe4_tensor bias;
        assert_int_equal(moe4_checkpoint_router(ckpt, &gate, &bias, layer), layer ? MOE4_OK : MOE4_ERROR_ARGUMENT);
        if (!layer) continue;
        assert_int_equal(gate.dtype, MOE4_BF16);
        assert_int_equal(bias.shape[0], 32);
    }
    moe4_checkpoint_close(ckpt);
}

/* ---- folders and indexes ---- */

#define INDEX(map) "{\"metadata\":{},\"weight_map\":{" map "}}"

static void test_folder_without_index(void **state) {
    (void)state;
    expect_open("empty folder", MOE4_ERROR_NOT_FOUND, "no .safetensors file");
    files_safetensors("b.safetensors", U8("b"), "\3\4", 2);
    files_safetensors("a.safetensors", U8("a"), "\1\2", 2);
    files_text(".hidden.safetensors", "no checkpoint");
    files_text("notes.txt", "no checkpoint");
    moe4_checkpoint *ckpt;
    moe4_tensor t;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_OK);
    assert_int_equal(moe4_checkpoint_n_files(ckpt), 2);
    for (size_t i = 0; i < 2; i++) { /* in order of name */
        assert_int_equal(moe4_checkpoint_tensor(ckpt, &t, i), MOE4_OK);
        assert_string_equal(t.name, i ? "b" : "a");
        assert_string_equal(t.file, i ? "b.safetensors" : "a.safetensors");
        assert_int_equal(*(const uint8_t *)t.data, i ? 3 : 1);
    }
    moe4_model_info info = MOE4_MODEL_INFO_INIT;
    assert_int_equal(moe4_checkpoint_info(ckpt, &info), MOE4_ERROR_NOT_FOUND);
    expect_words("no config", "no config.json");
    moe4_checkpoint_close(ckpt);

    files_safetensors("c.safetensors", U8("a"), NULL, 2);
    expect_open("one tensor in two files", MOE4_ERROR_FORMAT, "tensor a stands in two files|a.safetensors|c.safetensors");
    files_safetensors("model.safetensors", U8("m"), NULL, 2);
    expect_open("model.safetensors is taken alone", MOE4_OK, "");
    files_text("model.safetensors", "no checkpoint");
    expect_open("and must be good", MOE4_ERROR_FORMAT, "model.safetensors");
}

static void test_index(void **state) {
    (void)state;
    files_safetensors("a.safetensors", U8("a"), NULL, 2);
    files_safetensors("b.safetensors", U8("b"), NULL, 2);
    files_text("c.safetensors", "no checkpoint, and not in the index");
    static const struct {
        const char *what, *index;
        moe4_status status;
        const char *words;
    } cases[] = {
        {"good", INDEX("\"a\":\"a.safetensors\",\"b\":\"b.safetensors\""), MOE4_OK, ""},
        {"b not named", INDEX("\"a\":\"a.safetensors\""), MOE4_OK, ""},
        {"not JSON", "{", MOE4_ERROR_FORMAT, "model.safetensors.index.json|not valid JSON"},
        {"a list", "[]", MOE4_ERROR_FORMAT, "index.json: not a JSON object"},
        {"no map", "{}", MOE4_ERROR_FORMAT, "no object weight_map"},
        {"map is a list", "{\"weight_map\":[]}", MOE4_ERROR_FORMAT, "no object weight_map"},
        {"empty map", INDEX(""), MOE4_ERROR_FORMAT, "weight_map is empty"},
        {"twice", INDEX("\"a\":\"a.safetensors\",\"a\":\"b.safetensors\""), MOE4_ERROR_FORMAT, "duplicate"},
        {"file is a number", INDEX("\"a\":1"), MOE4_ERROR_FORMAT, "tensor a|printable"},
        {"file is empty", INDEX("\"a\":\"\""), MOE4_ERROR_FORMAT, "tensor a|printable"},
        {"name with escape", INDEX("\"\\u001b[2J\":\"a.safetensors\""), MOE4_ERROR_FORMAT, "a tensor name of 4 bytes"},
        {"above", INDEX("\"a\":\"../a.safetensors\""), MOE4_ERROR_FORMAT, "\"../a.safetensors\" is not a file in the model's folder"},
        {"absolute", INDEX("\"a\":\"/tmp/a.safetensors\""), MOE4_ERROR_FORMAT, "\"/tmp/a.safetensors\" is not a file in"},
        {"folder below", INDEX("\"a\":\"x/a.safetensors\""), MOE4_ERROR_FORMAT, "is not a file in"},
        {"dots", INDEX("\"a\":\"..\""), MOE4_ERROR_FORMAT, "\"..\" is not a file in"},
        {"no .safetensors", INDEX("\"a\":\"a.bin\""), MOE4_ERROR_FORMAT, "\"a.bin\" is not a .safetensors file"},
        {"missing shard", INDEX("\"a\":\"a.safetensors\",\"d\":\"d.safetensors\""), MOE4_ERROR_NOT_FOUND, "d.safetensors|cannot open"},
        {"malformed shard", INDEX("\"a\":\"a.safetensors\",\"c\":\"c.safetensors\""), MOE4_ERROR_FORMAT, "c.safetensors"},
        {"shard lacks it", INDEX("\"a\":\"a.safetensors\",\"x\":\"a.safetensors\""), MOE4_ERROR_FORMAT, "tensor x is not in a.safetensors"},
        {"in the other shard", INDEX("\"a\":\"b.safetensors\",\"b\":\"a.safetensors\""), MOE4_ERROR_FORMAT,
         "tensor a is not in b.safetensors but in a.safetensors"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        files_text("model.safetensors.index.json", cases[i].index);
        expect_open(cases[i].what, cases[i].status, cases[i].words);
    }
    files_safetensors("b.safetensors", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", NULL, 2);
    files_text("model.safetensors.index.json", INDEX("\"a\":\"a.safetensors\",\"b\":\"b.safetensors\""));
    expect_open("in two shards", MOE4_ERROR_FORMAT, "tensor a stands in two files");
}

/* ---- files that change while open ---- */

static void count_problem(void *user, const char *name, const char *problem) {
    assert_string_equal(name, "model.safetensors");
    assert_non_null(strstr(problem, "changed while open"));
    ++*(int *)user;
}

/* Making a layer or a router, and verify, must all say so; nothing may read the file. */
static void expect_changed(const moe4_checkpoint *ckpt, const char *words) {
    moe4_moe *moe;
    moe4_router *router;
    uint64_t n = 99;
    int told = 0;
    assert_int_equal(moe4_moe_create_from_checkpoint(&moe, ctx, ckpt, 1, NULL), MOE4_ERROR_IO);
    expect_words("layer", words);
    assert_int_equal(moe4_router_create_from_checkpoint(&router, ctx, ckpt, 1, NULL), MOE4_ERROR_IO);
    expect_words("router", words);
    assert_int_equal(moe4_checkpoint_verify((moe4_checkpoint *)ckpt, &n, count_problem, NULL, &told), MOE4_OK);
    assert_int_equal(n, 1);
    assert_int_equal(told, 1);
}

static void expect_unchanged(const moe4_checkpoint *ckpt) {
    moe4_moe *moe;
    uint64_t n = 99;
    if (moe4_moe_create_from_checkpoint(&moe, ctx, ckpt, 1, NULL) != MOE4_OK) fail_msg("%s", moe4_ctx_error(ctx));
    moe4_moe_destroy(moe);
    assert_int_equal(moe4_checkpoint_verify((moe4_checkpoint *)ckpt, &n, NULL, NULL, NULL), MOE4_OK);
    assert_int_equal(n, 0);
}

static void test_changed_files(void **state) {
    (void)state;
    size_t bytes, config_bytes;
    uint8_t *model = files_read(MODEL "/model.safetensors", &bytes);
    char *config = (char *)files_read(MODEL "/config.json", &config_bytes), file[512], other[512];
    files_text("config.json", config);
    snprintf(file, sizeof file, "%s", files_path("model.safetensors"));
    snprintf(other, sizeof other, "%s", files_path("other"));
    for (int i = 0; i < 4; i++) {
        moe4_checkpoint *ckpt;
        char words[128] = "changed while open: written to";
        files_write("model.safetensors", model, bytes);
        assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_OK);
        expect_unchanged(ckpt);
        if (i == 0) { /* cut short */
            assert_int_equal(truncate(file, (off_t)bytes / 2), 0);
            snprintf(words, sizeof words, "model.safetensors: changed while open: %zu bytes, was %zu", bytes / 2, bytes);
            expect_changed(ckpt, words);
        } else if (i == 1) { /* written over; times may be as coarse as a second, so one long ago */
            assert_int_equal(utimensat(AT_FDCWD, file, (struct timespec[]){{1, 0}, {1, 0}}, 0), 0);
            expect_changed(ckpt, words);
        } else if (i == 2) { /* replaced */
            files_text("other", "no checkpoint");
            assert_int_equal(rename(other, file), 0);
            expect_unchanged(ckpt);
        } else { /* deleted */
            assert_int_equal(unlink(file), 0);
            expect_unchanged(ckpt);
        }
        moe4_checkpoint_close(ckpt);
    }
    free(model);
    free(config);
}

/* ---- threads ---- */

static void *look_up_all(void *arg) {
    const moe4_checkpoint *ckpt = arg;
    for (int64_t e = 0; e < 32; e++)
        for (size_t layer = 1; layer < 6; layer++) {
            moe4_weight w;
            moe4_tensor t;
            if (moe4_checkpoint_expert(ckpt, &w, layer, e, MOE4_UP) != MOE4_OK || w.rows != 128) return "expert";
            if (moe4_checkpoint_find(ckpt, &t, "nothing") != MOE4_ERROR_NOT_FOUND) return "find";
            if (!strstr(moe4_ctx_error(ctx), "no tensor nothing")) return "error text";
        }
    return NULL;
}

static void test_threads(void **state) {
    (void)state;
    moe4_checkpoint *ckpt;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, MODEL), MOE4_OK);
    pthread_t thread[4];
    for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&thread[i], NULL, look_up_all, ckpt), 0);
    for (int i = 0; i < 4; i++) {
        void *wrong;
        assert_int_equal(pthread_join(thread[i], &wrong), 0);
        if (wrong) fail_msg("%s", (const char *)wrong);
    }
    moe4_checkpoint_close(ckpt);
}

/* ---- memory ---- */

static size_t allocations_left;
static void *limited_alloc(void *user, size_t bytes, size_t align) {
    (void)user;
    if (allocations_left == 0) return NULL;
    allocations_left--;
    void *p = NULL;
    return posix_memalign(&p, align, bytes) == 0 ? p : NULL;
}
static void limited_free(void *user, void *data) {
    (void)user;
    free(data);
}

/* Every allocation fails once: MEMORY each time, nothing leaks (the sanitizer build sees that), and at last it opens. */
static void test_out_of_memory(void **state) {
    (void)state;
    files_copy_folder(MODEL);
    files_text("a.safetensors", ""); /* listed, then left aside */
    moe4_ctx_options options = MOE4_CTX_OPTIONS_INIT;
    options.n_threads = 1;
    options.alloc = limited_alloc;
    options.free = limited_free;
    allocations_left = SIZE_MAX;
    moe4_ctx *limited;
    assert_int_equal(moe4_ctx_create(&limited, &options), MOE4_OK);
    size_t n = 0;
    for (moe4_status status = MOE4_ERROR_MEMORY; status != MOE4_OK; n++) {
        moe4_checkpoint *ckpt;
        allocations_left = n;
        status = moe4_checkpoint_open(&ckpt, limited, files_path(""));
        if (status == MOE4_OK)
            moe4_checkpoint_close(ckpt);
        else
            assert_int_equal(status, MOE4_ERROR_MEMORY);
        assert_in_range(n, 0, 200);
    }
    assert_in_range(n, 10, 200);
    allocations_left = SIZE_MAX;
    moe4_ctx_destroy(limited);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_bundled_model), TEST(test_folder_without_index), TEST(test_index), TEST(test_changed_files),
        TEST(test_threads),       TEST(test_out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
