/* Matrices of a checkpoint: their companions by format, experts and routers by layer. */
#include "checkpoint_case.h"

/* ---- modules and their companions ---- */

struct entry {
    const char *name, *dtype, *shape;
    size_t bytes;
    const char *data; /* NULL: zeros */
};
#define ONE "\0\0\x80\x3f"
#define CODES(n) "a.weight", "U8", "[2," #n "]", 2 * n, NULL
#define SCALES(n) "a.weight_scale", "F8_E4M3", "[2," #n "]", 2 * n, NULL
#define GLOBAL "a.weight_scale_2", "F32", "[]", 4, ONE
#define TWO "\0\0\0\x40"
#define PACKED(n) "a.weight_packed", "U8", "[2," #n "]", 2 * n, NULL
#define GLOBAL_OF(bytes) "a.weight_global_scale", "F32", "[1]", 4, bytes

static void write_entries(const struct entry *e) {
    char header[2048], data[2048] = {0};
    size_t at = (size_t)sprintf(header, "{"), offset = 0;
    for (int i = 0; e[i].name; i++) {
        at += (size_t)sprintf(header + at, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", i ? "," : "", e[i].name,
                              e[i].dtype, e[i].shape, offset, offset + e[i].bytes);
        if (e[i].data) memcpy(data + offset, e[i].data, e[i].bytes);
        offset += e[i].bytes;
    }
    sprintf(header + at, "}");
    files_safetensors("model.safetensors", header, data, offset);
}

static void test_companions(void **state) {
    (void)state;
    static const struct {
        const char *what;
        moe4_status status;
        const char *words;
        struct entry e[6];
    } cases[] = {
        {"NVFP4", MOE4_OK, "", {{CODES(16)}, {SCALES(2)}, {GLOBAL}, {"a.input_scale", "F32", "[1]", 4, ONE}}},
        {"NVFP4 without input_scale", MOE4_OK, "", {{CODES(8)}, {SCALES(1)}, {GLOBAL}}},
        {"nothing", MOE4_ERROR_NOT_FOUND, "a: no weight of this name", {{"b.weight", "F32", "[1,1]", 4, NULL}}},
        {"no global",
         MOE4_ERROR_FORMAT,
         "a: weight, weight_scale (U8), but neither weight_scale and weight_scale_2|nor",
         {{CODES(8)}, {SCALES(1)}}},
        {"codes alone", MOE4_ERROR_FORMAT, "a: weight (U8), but neither", {{CODES(8)}}},
        {"no scales", MOE4_ERROR_FORMAT, "without weight_scale, which modelopt NVFP4 needs", {{CODES(8)}, {GLOBAL}}},
        {"no weight", MOE4_ERROR_FORMAT, "without weight, which modelopt NVFP4 needs", {{SCALES(1)}, {GLOBAL}}},
        {"bf16 with a global", MOE4_ERROR_FORMAT, "without weight_scale", {{"a.weight", "BF16", "[2,16]", 64, NULL}, {GLOBAL}}},
        {"two formats",
         MOE4_ERROR_FORMAT,
         "companions of two formats: weight_scale_2 (modelopt NVFP4) and weight_global_scale (compressed-tensors",
         {{CODES(8)}, {SCALES(1)}, {GLOBAL}, {"a.weight_global_scale", "F32", "[1]", 4, ONE}}},
        {"two formats' weights",
         MOE4_ERROR_FORMAT,
         "companions of two formats|weight_packed",
         {{CODES(8)}, {SCALES(1)}, {GLOBAL}, {"a.weight_packed", "U8", "[2,8]", 16, NULL}}},
        {"NVFP4 and FP8",
         MOE4_ERROR_FORMAT,
         "companions of two formats|weight_scale_inv",
         {{CODES(8)}, {SCALES(1)}, {GLOBAL}, {"a.weight_scale_inv", "F32", "[1]", 4, ONE}}},
        {"scale too narrow", MOE4_ERROR_FORMAT, "a.weight_scale: 2x1, need 2x2", {{CODES(16)}, {SCALES(1)}, {GLOBAL}}},
        {"scale too wide", MOE4_ERROR_FORMAT, "a.weight_scale: 2x2, need 2x1", {{CODES(8)}, {SCALES(2)}, {GLOBAL}}},
        {"scale flat",
         MOE4_ERROR_FORMAT,
         "a.weight_scale: 2, need 2x1",
         {{CODES(8)}, {"a.weight_scale", "F8_E4M3", "[2]", 2, NULL}, {GLOBAL}}},
        {"scale U8",
         MOE4_ERROR_FORMAT,
         "a.weight_scale: dtype U8, need F8_E4M3",
         {{CODES(8)}, {"a.weight_scale", "U8", "[2,1]", 2, NULL}, {GLOBAL}}},
        {"codes I8", MOE4_ERROR_FORMAT, "a.weight: dtype I8, need U8", {{"a.weight", "I8", "[2,8]", 16, NULL}, {SCALES(1)}, {GLOBAL}}},
        {"K of 8", MOE4_ERROR_FORMAT, "a.weight: 2x4 bytes: K = 8 is not a multiple of 16", {{CODES(4)}, {SCALES(1)}, {GLOBAL}}},
        {"no elements", MOE4_ERROR_FORMAT, "a.weight: 0x8, need a matrix", {{"a.weight", "U8", "[0,8]", 0, NULL}, {SCALES(1)}, {GLOBAL}}},
        {"global F16",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: dtype F16, need F32",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F16", "[]", 2, NULL}}},
        {"global of two",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: 2, need [] or 1",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F32", "[2]", 8, NULL}}},
        {"global 1x1",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: 1x1, need [] or 1",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F32", "[1,1]", 4, ONE}}},
        {"global 0",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: 0, need a positive",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F32", "[]", 4, NULL}}},
        {"global negative",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: -1",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F32", "[]", 4, "\0\0\x80\xbf"}}},
        {"global infinite",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: inf",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F32", "[]", 4, "\0\0\x80\x7f"}}},
        {"global NaN",
         MOE4_ERROR_FORMAT,
         "weight_scale_2: nan",
         {{CODES(8)}, {SCALES(1)}, {"a.weight_scale_2", "F32", "[]", 4, "\0\0\xc0\x7f"}}},
        {"input 0",
         MOE4_ERROR_FORMAT,
         "a.input_scale: 0, need a positive",
         {{CODES(8)}, {SCALES(1)}, {GLOBAL}, {"a.input_scale", "F32", "[]", 4, NULL}}},
        {"bf16", MOE4_OK, "", {{"a.weight", "BF16", "[2,3]", 12, NULL}, {"a.bias", "BF16", "[2]", 4, NULL}}},
        {"a vector", MOE4_ERROR_FORMAT, "a.weight: 6, need a matrix", {{"a.weight", "BF16", "[6]", 12, NULL}}},
        {"3-D", MOE4_ERROR_UNSUPPORTED, "unsupported: a.weight: fused 3-D experts (2x3x1)", {{"a.weight", "BF16", "[2,3,1]", 12, NULL}}},
        {"I32", MOE4_ERROR_UNSUPPORTED, "a.weight: dtype I32 without scales", {{"a.weight", "I32", "[2,3]", 24, NULL}}},
        {"FP8 block", MOE4_OK, "", {{"a.weight", "F8_E4M3", "[2,200]", 400, NULL}, {"a.weight_scale_inv", "F32", "[1,2]", 8, NULL}}},
        {"FP8 block of 32", MOE4_OK, "", {{"a.weight", "F8_E4M3", "[2,200]", 400, NULL}, {"a.scale", "F8_E8M0", "[1,7]", 7, NULL}}},
        {"FP8 row", MOE4_OK, "", {{"a.weight", "F8_E4M3", "[2,200]", 400, NULL}, {"a.weight_scale", "BF16", "[2,1]", 4, NULL}}},
        {"FP8",
         MOE4_OK,
         "",
         {{"a.weight", "F8_E4M3", "[2,8]", 16, NULL}, {"a.weight_scale", "F32", "[]", 4, ONE}, {"a.input_scale", "F32", "[]", 4, ONE}}},
        {"FP8 with blocks of 50",
         MOE4_ERROR_FORMAT,
         "a.weight_scale_inv: 1x4, no scales of 2x200",
         {{"a.weight", "F8_E4M3", "[2,200]", 400, NULL}, {"a.weight_scale_inv", "F32", "[1,4]", 16, NULL}}},
        {"FP8 with integers for scales",
         MOE4_ERROR_FORMAT,
         "a.weight_scale_inv: dtype I32, need F32, BF16, F16 or F8_E8M0",
         {{"a.weight", "F8_E4M3", "[2,8]", 16, NULL}, {"a.weight_scale_inv", "I32", "[1,1]", 4, NULL}}},
        {"E5M2",
         MOE4_ERROR_FORMAT,
         "a.weight: dtype F8_E5M2, need F8_E4M3",
         {{"a.weight", "F8_E5M2", "[2,8]", 16, NULL}, {"a.weight_scale_inv", "F32", "[1,1]", 4, ONE}}},
        {"compressed-tensors", MOE4_OK, "", {{PACKED(16)}, {SCALES(2)}, {GLOBAL_OF(TWO)}, {"a.input_global_scale", "F32", "[1]", 4, TWO}}},
        {"compressed-tensors without an input scale", MOE4_OK, "", {{PACKED(8)}, {SCALES(1)}, {GLOBAL_OF(ONE)}}},
        {"compressed-tensors, narrow scales",
         MOE4_ERROR_FORMAT,
         "a.weight_scale: 2x1, need 2x2",
         {{PACKED(16)}, {SCALES(1)}, {GLOBAL_OF(ONE)}}},
        {"compressed-tensors, global 0",
         MOE4_ERROR_FORMAT,
         "a.weight_global_scale: 0, need a positive",
         {{PACKED(8)}, {SCALES(1)}, {GLOBAL_OF(NULL)}}},
        {"compressed-tensors, no inverse",
         MOE4_ERROR_FORMAT,
         "a.weight_global_scale: 1.4013e-45: its inverse is not finite",
         {{PACKED(8)}, {SCALES(1)}, {GLOBAL_OF("\1\0\0\0")}}},
        {"compressed-tensors, no inverse of the input",
         MOE4_ERROR_FORMAT,
         "a.input_global_scale: 1.4013e-45: its inverse is not finite",
         {{PACKED(8)}, {SCALES(1)}, {GLOBAL_OF(ONE)}, {"a.input_global_scale", "F32", "[1]", 4, "\1\0\0\0"}}},
        {"compressed-tensors, a factor's input scale",
         MOE4_ERROR_FORMAT,
         "a: input_scale beside compressed-tensors",
         {{PACKED(8)}, {SCALES(1)}, {GLOBAL_OF(ONE)}, {"a.input_scale", "F32", "[1]", 4, ONE}}},
        {"compressed-tensors, no global",
         MOE4_ERROR_FORMAT,
         "a: weight_scale, weight_packed without weight_global_scale",
         {{PACKED(8)}, {SCALES(1)}}},
        {"compressed-tensors MXFP4",
         MOE4_ERROR_UNSUPPORTED,
         "unsupported: a: compressed-tensors MXFP4",
         {{PACKED(16)}, {"a.weight_scale", "U8", "[2,1]", 2, NULL}}},
        {"compressed-tensors integers",
         MOE4_ERROR_UNSUPPORTED,
         "unsupported: a: compressed-tensors integers",
         {{"a.weight_packed", "I32", "[2,2]", 16, NULL}, {"a.weight_scale", "BF16", "[2,1]", 4, NULL}}},
        {"MXFP4",
         MOE4_ERROR_UNSUPPORTED,
         "unsupported: a: MXFP4 (scale)",
         {{"a.weight", "I8", "[2,16]", 32, NULL}, {"a.scale", "F8_E8M0", "[2,1]", 2, NULL}}},
        {"MXFP4 blocks",
         MOE4_ERROR_UNSUPPORTED,
         "unsupported: a: MXFP4 (blocks, scales)",
         {{"a_blocks", "U8", "[2,1,1,16]", 32, NULL}, {"a_scales", "U8", "[2,1,1]", 2, NULL}}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_entries(cases[i].e);
        moe4_checkpoint *ckpt;
        moe4_weight w = {.rows = 99};
        if (moe4_checkpoint_open(&ckpt, ctx, files_path("")) != MOE4_OK) fail_msg("%s: %s", cases[i].what, moe4_ctx_error(ctx));
        moe4_status status = moe4_checkpoint_weight(ckpt, &w, "a");
        if (status != cases[i].status) fail_msg("%s: status %d (%s)", cases[i].what, status, moe4_ctx_error(ctx));
        expect_words(cases[i].what, cases[i].words);
        assert_int_equal(w.rows, status == MOE4_OK ? 2 : 99); /* results only with OK */
        if (i == 0) {
            assert_int_equal(w.dtype, MOE4_NVFP4);
            assert_int_equal(w.cols, 32);
            assert_true(w.global == 1 && w.input_scale == 1);
        }
        if (i == 1) assert_true(w.input_scale == 0);
        if (strcmp(cases[i].what, "FP8 block") == 0) assert_true(w.scale_rows == 2 && w.scale_cols == 128 && w.scale_dtype == MOE4_F32);
        if (strcmp(cases[i].what, "FP8 block of 32") == 0) assert_true(w.scale_cols == 32 && w.scale_dtype == MOE4_F8_E8M0);
        if (strcmp(cases[i].what, "FP8 row") == 0) assert_true(w.scale_rows == 1 && w.scale_cols == 200);
        if (strcmp(cases[i].what, "FP8") == 0) assert_true(w.scale_rows == 2 && w.scale_cols == 8);
        if (strcmp(cases[i].what, "compressed-tensors") == 0) { /* divisors, of 2 */
            assert_int_equal(w.dtype, MOE4_NVFP4);
            assert_int_equal(w.cols, 32);
            assert_true(w.global == 0.5f && w.input_scale == 0.5f);
        }
        moe4_checkpoint_close(ckpt);
    }
}

/* ---- experts by number ---- */

static void test_experts(void **state) {
    (void)state;
    moe4_checkpoint *ckpt;
    moe4_weight w;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, MODEL), MOE4_OK);
    static const struct {
        size_t layer;
        int64_t expert;
        int proj;
        const char *words;
    } wrong[] = {
        {6, 0, 0, "layer 6|0 to 5"},
        {1, 32, 0, "layer 1 expert 32, need 0 to 31"},
        {1, -3, 0, "expert -3"},
        {1, INT64_MIN, 0, "layer 1 expert"},
        {1, 0, 3, "proj is 3"},
        {0, 0, 0, "layer 0 is dense"},
        {0, MOE4_EXPERT_SHARED, 0, "dense"},
        {1, MOE4_EXPERT_DENSE, 0, "layer 1 is not dense"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_equal(moe4_checkpoint_expert(ckpt, &w, wrong[i].layer, wrong[i].expert, (moe4_proj)wrong[i].proj), MOE4_ERROR_ARGUMENT);
        expect_words("expert", wrong[i].words);
    }
    assert_int_equal(moe4_checkpoint_weight(ckpt, &w, "model.layers.0.self_attn.q_proj"), MOE4_OK);
    assert_int_equal(w.rows, 256);
    assert_int_equal(moe4_checkpoint_weight(ckpt, &w, "model.layers.0.self_attn"), MOE4_ERROR_NOT_FOUND);
    char longest[600];
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = '\0';
    assert_int_equal(moe4_checkpoint_weight(ckpt, &w, longest), MOE4_ERROR_NOT_FOUND);
    assert_int_equal(moe4_checkpoint_weight(ckpt, &w, NULL), MOE4_ERROR_ARGUMENT);
    moe4_checkpoint_close(ckpt);

    files_copy_folder(MODEL); /* the same file under a config that says otherwise */
    size_t bytes;
    char *config = (char *)files_read(MODEL "/config.json", &bytes);
    memcpy(strstr(config, "\"moe_intermediate_size\": 128"), "\"moe_intermediate_size\": 112", 28);
    files_text("config.json", config);
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_OK);
    assert_int_equal(moe4_checkpoint_expert(ckpt, &w, 1, 0, MOE4_DOWN), MOE4_ERROR_FORMAT);
    expect_words("shape", "model.layers.1.mlp.experts.0.down_proj.weight: 256x64, need 256x56");
    moe4_checkpoint_close(ckpt);
    memcpy(strstr(config, "\"moe_intermediate_size\": 112"), "\"moe_intermediate_size\": 120", 28);
    files_text("config.json", config);
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_OK);
    assert_int_equal(moe4_checkpoint_expert(ckpt, &w, 1, 0, MOE4_DOWN), MOE4_ERROR_UNSUPPORTED);
    expect_words("K", "256x120 in NVFP4: K = 120 is not a multiple of 16");
    moe4_checkpoint_close(ckpt);
    free(config);
}

static void test_routers(void **state) {
    (void)state;
    static const struct {
        const char *what, *entries;
        moe4_status status;
        const char *words;
    } cases[] = {
#define GATE "\"model.layers.1.mlp.gate.weight\":{\"dtype\":\"BF16\",\"shape\":[16,64],\"data_offsets\":[0,2048]}"
#define BIAS(dtype, n, end) \
    ",\"model.layers.1.mlp.gate.e_score_correction_bias\":{\"dtype\":\"" dtype "\",\"shape\":[" #n "],\"data_offsets\":[2048," #end "]}"
        {"F32", GATE BIAS("F32", 16, 2112), MOE4_OK, ""},
        {"BF16", GATE BIAS("BF16", 16, 2080), MOE4_OK, ""},
        {"U8", GATE BIAS("U8", 16, 2064), MOE4_ERROR_UNSUPPORTED, "e_score_correction_bias: dtype U8"},
        {"too short", GATE BIAS("F32", 15, 2108), MOE4_ERROR_FORMAT, "15 elements in 1 dimensions, need 16"},
        {"no bias", GATE, MOE4_ERROR_NOT_FOUND, "model.layers.1.mlp.gate.e_score_correction_bias: no tensor"},
        {"gate of another size", "\"model.layers.1.mlp.gate.weight\":{\"dtype\":\"BF16\",\"shape\":[64,16],\"data_offsets\":[0,2048]}",
         MOE4_ERROR_FORMAT, "model.layers.1.mlp.gate.weight: 64x16, need 16x64"},
        {"no gate", "", MOE4_ERROR_NOT_FOUND, "model.layers.1.mlp.gate: no weight"},
    };
    files_text("config.json", "{" GLM "\"n_group\":1}");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char header[512];
        const char *end = strrchr(cases[i].entries, ',');
        snprintf(header, sizeof header, "{%s}", cases[i].entries);
        files_safetensors("model.safetensors", header, NULL, end ? strtoul(end + 1, NULL, 10) : 0);
        moe4_checkpoint *ckpt;
        moe4_weight gate;
        moe4_tensor bias = {0};
        assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_OK);
        assert_int_equal(moe4_checkpoint_router(ckpt, &gate, &bias, 1), cases[i].status);
        expect_words(cases[i].what, cases[i].words);
        if (cases[i].status == MOE4_OK) assert_int_equal(bias.bytes, 16 * moe4_dtype_bytes(bias.dtype));
        assert_int_equal(moe4_checkpoint_router(ckpt, NULL, NULL, 1), cases[i].status);
        moe4_checkpoint_close(ckpt);
    }
}

static void test_fused_experts(void **state) {
    (void)state;
    files_safetensors("model.safetensors",
                      "{\"model.layers.1.mlp.experts.gate_up_proj\":{\"dtype\":\"BF16\",\"shape\":[16,64,64],\"data_offsets\":[0,131072]}}",
                      NULL, 131072);
    files_text("config.json", "{" GLM "\"n_group\":1}");
    moe4_checkpoint *ckpt;
    moe4_weight w;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_OK);
    assert_int_equal(moe4_checkpoint_expert(ckpt, &w, 1, 0, MOE4_GATE), MOE4_ERROR_UNSUPPORTED);
    expect_words("fused", "unsupported: fused 3-D experts (found model.layers.1.mlp.experts.gate_up_proj)");
    assert_int_equal(moe4_checkpoint_expert(ckpt, &w, 2, 0, MOE4_GATE), MOE4_ERROR_NOT_FOUND);
    moe4_checkpoint_close(ckpt);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_companions),
        TEST(test_experts),
        TEST(test_routers),
        TEST(test_fused_experts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
