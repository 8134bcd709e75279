/* Verify on the bundled model, whole and damaged: every damage is told, by name, and nothing else is. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>
#include <cmocka.h>

#include "files.h"
#include "internal.h"
#include "values.h"

#define MODEL MOE4_SOURCE_DIR "/models/novels-18m-nvfp4"

static moe4_ctx *ctx;
static uint8_t *model; /* bytes of model.safetensors, damaged by each test */
static size_t model_bytes;

static int set_up(void **state) {
    (void)state;
    files_make();
    files_copy_folder(MODEL);
    model = files_read(MODEL "/model.safetensors", &model_bytes);
    return moe4_ctx_create(&ctx, NULL);
}

static int tear_down(void **state) {
    (void)state;
    moe4_ctx_destroy(ctx);
    free(model);
    files_remove();
    return 0;
}

/* ---- damage ---- */

/* The place of a tensor's data in `model`. */
static uint8_t *data_of(const char *name) {
    moe4_checkpoint *ckpt;
    moe4_tensor first, t;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, MODEL), MOE4_OK);
    assert_int_equal(moe4_checkpoint_tensor(ckpt, &first, 0), MOE4_OK);
    assert_int_equal(moe4_checkpoint_find(ckpt, &t, name), MOE4_OK);
    uint64_t header = 0;
    memcpy(&header, model, 8);
    size_t at = 8 + header + (size_t)((const uint8_t *)t.data - (const uint8_t *)first.data);
    moe4_checkpoint_close(ckpt);
    return model + at;
}

static void set_float(const char *name, float value) {
    memcpy(data_of(name), &value, sizeof value);
}

/* Replaces text of the header by text of the same length, everywhere; returns how often. */
static size_t rename_in_header(const char *from, const char *to) {
    assert_int_equal(strlen(from), strlen(to));
    uint64_t header;
    memcpy(&header, model, 8);
    size_t n = 0;
    for (uint8_t *at = model; (at = memmem(at, (size_t)(model + 8 + header - at), from, strlen(from))); n++) memcpy(at, to, strlen(to));
    return n;
}

static void edit_config(const char *from, const char *to) {
    size_t bytes;
    char *text = (char *)files_read(MODEL "/config.json", &bytes), *at = strstr(text, from);
    assert_non_null(at);
    char *edited = malloc(bytes + strlen(to) + 1);
    sprintf(edited, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    files_text("config.json", edited);
    free(edited);
    free(text);
}

/* ---- what verify says ---- */

static struct {
    char text[64][640];
    size_t n;
} told;

static void on_problem(void *user, const char *name, const char *problem) {
    (void)user;
    if (told.n < 64) snprintf(told.text[told.n], sizeof told.text[0], "%s: %s", name, problem);
    told.n++;
}

static void verify(void) {
    files_write("model.safetensors", model, model_bytes);
    moe4_checkpoint *ckpt;
    uint64_t n = 12345;
    told.n = 0;
    if (moe4_checkpoint_open(&ckpt, ctx, files_path("")) != MOE4_OK) fail_msg("%s", moe4_ctx_error(ctx));
    assert_int_equal(moe4_checkpoint_verify(ckpt, &n, on_problem, NULL, NULL), MOE4_OK);
    assert_int_equal(n, told.n);
    moe4_checkpoint_close(ckpt);
}

static void expect_told(const char *sentence) {
    for (size_t i = 0; i < told.n && i < 64; i++)
        if (strcmp(told.text[i], sentence) == 0) return;
    for (size_t i = 0; i < told.n && i < 64; i++) print_message("told: %s\n", told.text[i]);
    fail_msg("verify did not say: %s", sentence);
}

/* ---- tests ---- */

static void test_intact(void **state) {
    (void)state;
    verify();
    assert_int_equal(told.n, 0);
}

static void test_missing_expert(void **state) {
    (void)state;
    assert_int_equal(rename_in_header("layers.3.mlp.experts.17.", "layers.3.mlp.experts.77."), 12);
    verify();
    assert_int_equal(told.n, 3);
    expect_told("model.layers.3.mlp.experts.17.gate_proj: missing: config.json promises it");
    expect_told("model.layers.3.mlp.experts.17.up_proj: missing: config.json promises it");
    expect_told("model.layers.3.mlp.experts.17.down_proj: missing: config.json promises it");
}

static void test_missing_parts(void **state) {
    (void)state;
    static const char *const parts[][2] = {
        {"\"lm_head.weight", "\"xx_head.weight"},
        {"model.norm.", "model.xxxx."},
        {"model.embed_tokens.", "model.xxxxx_tokens."},
        {"model.layers.2.input_layernorm.", "model.layers.2.xxxxx_layernorm."},
        {"model.layers.4.mlp.gate.weight", "model.layers.4.mlp.xxxx.weight"},
        {"model.layers.4.mlp.gate.e_score_correction_bias", "model.layers.4.mlp.gate.x_score_correction_bias"},
        {"model.layers.5.mlp.shared_experts.up_proj.", "model.layers.5.mlp.xxxxxx_experts.up_proj."},
        {"model.layers.0.mlp.down_proj.", "model.layers.0.mlp.xxxx_proj."},
        {"model.layers.1.self_attn.o_proj.", "model.layers.1.self_attn.x_proj."},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) assert_in_range(rename_in_header(parts[i][0], parts[i][1]), 1, 4);
    verify();
    assert_int_equal(told.n, 9);
    expect_told("lm_head: missing: config.json promises it");
    expect_told("model.norm.weight: missing: config.json promises it");
    expect_told("model.embed_tokens: missing: config.json promises it");
    expect_told("model.layers.2.input_layernorm.weight: missing: config.json promises it");
    expect_told("model.layers.4.mlp.gate: missing: config.json promises it");
    expect_told("model.layers.4.mlp.gate.e_score_correction_bias: missing: config.json promises it");
    expect_told("model.layers.5.mlp.shared_experts.up_proj: missing: config.json promises it");
    expect_told("model.layers.0.mlp.down_proj: missing: config.json promises it");
    expect_told("model.layers.1.self_attn.o_proj: missing: config.json promises it");
}

static void test_block_scales(void **state) {
    (void)state;
    uint8_t *scale = data_of("model.layers.3.mlp.experts.17.down_proj.weight_scale"); /* 256 x 8 */
    scale[200 * 8 + 5] = 0x7F;
    scale[255 * 8 + 7] = 0xFF;
    data_of("model.layers.0.mlp.gate_proj.weight_scale")[0] = 0x80 | 0x38;
    verify();
    assert_int_equal(told.n, 2);
    expect_told("model.layers.3.mlp.experts.17.down_proj.weight_scale: 2 of 2048 values NaN or signed, the first 0x7f at row 200 column 5");
    expect_told("model.layers.0.mlp.gate_proj.weight_scale: 1 of 12288 values NaN or signed, the first 0xb8 at row 0 column 0");
}

static void test_globals(void **state) {
    (void)state;
    set_float("model.layers.1.mlp.experts.0.gate_proj.weight_scale_2", 0.f);
    set_float("model.layers.1.mlp.experts.1.up_proj.weight_scale_2", -1.f);
    set_float("model.layers.1.mlp.experts.1.up_proj.input_scale", 1.f / 0.f);
    set_float("model.layers.2.self_attn.q_proj.input_scale", 0.f / 0.f);
    set_float("model.layers.2.self_attn.q_proj.weight_scale_2", 1.f / 0.f);
    verify();
    assert_int_equal(told.n, 5);
    expect_told("model.layers.1.mlp.experts.0.gate_proj.weight_scale_2: 0, need a positive finite number");
    expect_told("model.layers.1.mlp.experts.1.up_proj.weight_scale_2: -1, need a positive finite number");
    expect_told("model.layers.1.mlp.experts.1.up_proj.input_scale: inf, need a positive finite number");
    expect_told("model.layers.2.self_attn.q_proj.weight_scale_2: inf, need a positive finite number");
}

static void test_unquantized_values(void **state) {
    (void)state;
    memcpy(data_of("model.norm.weight") + 2 * 255, "\x80\x7f", 2);    /* bf16 infinity */
    memcpy(data_of("lm_head.weight") + 2 * 256 * 3, "\xc1\xff", 2);   /* a NaN */
    memcpy(data_of("lm_head.weight") + 2 * 256 * 255, "\xc1\xff", 2); /* another */
    set_float("model.layers.5.mlp.gate.e_score_correction_bias", -1.f / 0.f);
    verify();
    assert_int_equal(told.n, 3);
    expect_told("model.norm.weight: 1 of 256 values NaN or infinite, the first 0x7f80 at row 0 column 255");
    expect_told("lm_head.weight: 2 of 65536 values NaN or infinite, the first 0xffc1 at row 3 column 0");
    expect_told("model.layers.5.mlp.gate.e_score_correction_bias: 1 of 32 values NaN or infinite, the first 0xff800000 at row 0 column 0");
}

static void test_companions(void **state) {
    (void)state;
    rename_in_header("layers.1.mlp.experts.2.up_proj.weight_scale\"", "layers.1.mlp.experts.2.up_proj.weight_xcale\"");
    rename_in_header("layers.1.mlp.experts.3.up_proj.weight\"", "layers.1.mlp.experts.3.up_proj.xeight\"");
    verify();
    assert_int_equal(told.n, 4);
    expect_told(
        "model.layers.1.mlp.experts.2.up_proj: weight, weight_scale_2, input_scale without weight_scale, which modelopt NVFP4 needs");
    expect_told("model.layers.1.mlp.experts.3.up_proj.weight_scale: no weight stands beside it");
    expect_told("model.layers.1.mlp.experts.3.up_proj.weight_scale_2: no weight stands beside it");
    expect_told("model.layers.1.mlp.experts.3.up_proj.input_scale: no weight stands beside it");
}

static void test_truncated(void **state) {
    (void)state;
    files_write("model.safetensors", model, model_bytes - 1);
    moe4_checkpoint *ckpt;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("")), MOE4_ERROR_FORMAT);
    assert_non_null(strstr(moe4_ctx_error(ctx), "model.safetensors"));
    assert_non_null(strstr(moe4_ctx_error(ctx), "10474703")); /* what is left of the data */
}

static void test_config_promises(void **state) {
    (void)state;
    edit_config("\"n_routed_experts\": 32", "\"n_routed_experts\": 33");
    verify();
    assert_int_equal(told.n, 5 * 5);
    expect_told("model.layers.1.mlp.gate: 32x256, need 33x256 by config.json");
    expect_told("model.layers.1.mlp.gate.e_score_correction_bias: 32 elements in 1 dimensions, need 33 in 1 by config.json");
    expect_told("model.layers.5.mlp.experts.32.down_proj: missing: config.json promises it");
    edit_config("\"n_routed_experts\": 32", "\"n_routed_experts\": 31");
    verify();
    assert_int_equal(told.n, 3 * 5);
    expect_told("model.layers.2.mlp.experts.31.gate_proj: one expert more than the 31 of config.json");
    edit_config("\"moe_intermediate_size\": 128", "\"moe_intermediate_size\": 112");
    verify();
    assert_int_equal(told.n, 5 * 33 * 3);
    edit_config("\"use_qk_norm\": false", "\"use_qk_norm\": true");
    verify();
    assert_int_equal(told.n, 12);
    expect_told("model.layers.0.self_attn.q_norm.weight: missing: config.json promises it");
    edit_config("\"attention_bias\": false", "\"attention_bias\": true");
    verify();
    assert_int_equal(told.n, 18);
    edit_config("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 4");
    verify();
    assert_int_equal(told.n, 12);
    expect_told("model.layers.0.self_attn.k_proj: 128x256, need 256x256 by config.json");
    edit_config("\"num_hidden_layers\": 6", "\"num_hidden_layers\": 7");
    verify();
    assert_int_equal(told.n, 2 + 4 + 2 + 33 * 3);
    edit_config("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
    verify();
    assert_int_equal(told.n, 0);
    edit_config("\"glm4_moe\"", "\"llama\"");
    verify();
    assert_int_equal(told.n, 1);
    assert_non_null(strstr(told.text[0], "config.json: unsupported: model_type \"llama\""));
    assert_int_equal(unlink(files_path("config.json")), 0);
    verify();
    assert_int_equal(told.n, 1);
    expect_told("config.json: missing: nothing says whether the model is complete");
}

/* ---- families ---- */

struct expected {
    const char *name;
    size_t rows, cols; /* cols 0: a vector */
};

/* All tensors in BF16 but `without`; its name is what verify must miss, and nothing else. */
static void verify_without(const struct expected *all, size_t n, size_t without) {
    char header[16384];
    size_t at = (size_t)sprintf(header, "{\"x\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}"), offset = 0;
    for (size_t i = 0; i < n; i++) {
        if (i == without) continue;
        size_t bytes = 2 * all[i].rows * (all[i].cols ? all[i].cols : 1);
        at += (size_t)sprintf(header + at, ",\"%s\":{\"dtype\":\"BF16\",\"shape\":[%zu", all[i].name, all[i].rows);
        if (all[i].cols) at += (size_t)sprintf(header + at, ",%zu", all[i].cols);
        at += (size_t)sprintf(header + at, "],\"data_offsets\":[%zu,%zu]}", offset, offset + bytes);
        offset += bytes;
    }
    sprintf(header + at, "}");
    files_safetensors("model.safetensors", header, NULL, offset);
    free(model);
    model = files_read(files_path("model.safetensors"), &model_bytes);
    verify();
    if (told.n != (without < n))
        fail_msg("%s: %zu problems, the first %s", without < n ? all[without].name : "all there", told.n, told.text[0]);
    if (without == n) return;
    char sentence[256];
    int length = (int)strlen(all[without].name);
    if (all[without].cols) length -= 7; /* ".weight": a matrix is named by its module */
    snprintf(sentence, sizeof sentence, "%.*s: missing: config.json promises it", length, all[without].name);
    expect_told(sentence);
}

#define MODEL_PARTS                                                       \
    {"model.embed_tokens.weight", 5, 16}, {"model.norm.weight", 16, 0}, { \
        "lm_head.weight", 5, 16                                           \
    }
#define NORMS(l)                                                     \
    {"model.layers." #l ".input_layernorm.weight", 16, 0}, {         \
        "model.layers." #l ".post_attention_layernorm.weight", 16, 0 \
    }
#define MLP(module, n)                                                        \
    {module ".gate_proj.weight", n, 16}, {module ".up_proj.weight", n, 16}, { \
        module ".down_proj.weight", 16, n                                     \
    }

static void test_deepseek_complete(void **state) {
    (void)state;
#define MLA(l)                                                                                                                             \
    {"model.layers." #l ".self_attn.q_a_proj.weight", 6, 16}, {"model.layers." #l ".self_attn.q_a_layernorm.weight", 6, 0},                \
        {"model.layers." #l ".self_attn.q_b_proj.weight", 2 * (4 + 3), 6},                                                                 \
        {"model.layers." #l ".self_attn.kv_a_proj_with_mqa.weight", 8 + 3, 16},                                                            \
        {"model.layers." #l ".self_attn.kv_a_layernorm.weight", 8, 0}, {"model.layers." #l ".self_attn.kv_b_proj.weight", 2 * (4 + 7), 8}, \
    {                                                                                                                                      \
        "model.layers." #l ".self_attn.o_proj.weight", 16, 2 * 7                                                                           \
    }
    static const struct expected all[] = {MODEL_PARTS,
                                          NORMS(0),
                                          NORMS(1),
                                          MLA(0),
                                          MLA(1),
                                          MLP("model.layers.0.mlp", 48),
                                          {"model.layers.1.mlp.gate.weight", 2, 16},
                                          {"model.layers.1.mlp.gate.e_score_correction_bias", 2, 0},
                                          MLP("model.layers.1.mlp.experts.0", 32),
                                          MLP("model.layers.1.mlp.experts.1", 32),
                                          MLP("model.layers.1.mlp.shared_experts", 64)};
    enum { N = sizeof all / sizeof *all };
    files_text("config.json",
               "{\"model_type\":\"deepseek_v3\",\"hidden_size\":16,\"vocab_size\":5,\"num_hidden_layers\":2,\"n_routed_experts\":2,"
               "\"num_experts_per_tok\":1,\"moe_intermediate_size\":32,\"n_shared_experts\":2,\"norm_topk_prob\":true,"
               "\"first_k_dense_replace\":1,\"intermediate_size\":48,\"num_attention_heads\":2,\"num_key_value_heads\":2,"
               "\"q_lora_rank\":6,\"kv_lora_rank\":8,\"qk_nope_head_dim\":4,\"qk_rope_head_dim\":3,\"v_head_dim\":7}");
    for (size_t i = 0; i <= N; i++) verify_without(all, N, i);
}

static void test_qwen_complete(void **state) {
    (void)state;
#define GQA(l)                                                                                                            \
    {"model.layers." #l ".self_attn.q_proj.weight", 24, 16}, {"model.layers." #l ".self_attn.k_proj.weight", 12, 16},     \
        {"model.layers." #l ".self_attn.v_proj.weight", 12, 16}, {"model.layers." #l ".self_attn.o_proj.weight", 16, 24}, \
        {"model.layers." #l ".self_attn.q_norm.weight", 12, 0}, {"model.layers." #l ".self_attn.k_norm.weight", 12, 0},   \
        {"model.layers." #l ".self_attn.q_proj.bias", 24, 0}, {"model.layers." #l ".self_attn.k_proj.bias", 12, 0},       \
        {"model.layers." #l ".self_attn.v_proj.bias", 12, 0}, {                                                           \
        "model.layers." #l ".self_attn.o_proj.bias", 16, 0                                                                \
    }
    static const struct expected all[] = {MODEL_PARTS,
                                          NORMS(0),
                                          GQA(0),
                                          {"model.layers.0.mlp.gate.weight", 2, 16},
                                          MLP("model.layers.0.mlp.experts.0", 32),
                                          MLP("model.layers.0.mlp.experts.1", 32)};
    enum { N = sizeof all / sizeof *all };
    files_text("config.json", "{\"model_type\":\"qwen3_moe\",\"hidden_size\":16,\"vocab_size\":5,\"num_hidden_layers\":1,\"num_experts\":2,"
                              "\"num_experts_per_tok\":1,\"moe_intermediate_size\":32,\"norm_topk_prob\":true,\"num_attention_heads\":2,"
                              "\"num_key_value_heads\":1,\"head_dim\":12,\"attention_bias\":true}");
    for (size_t i = 0; i <= N; i++) verify_without(all, N, i);
}

static void test_single_file(void **state) {
    (void)state;
    set_float("model.layers.1.mlp.experts.0.gate_proj.weight_scale_2", 0.f);
    files_write("model.safetensors", model, model_bytes);
    moe4_checkpoint *ckpt;
    uint64_t n;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("model.safetensors")), MOE4_OK);
    assert_int_equal(moe4_checkpoint_verify(ckpt, &n, NULL, NULL, NULL), MOE4_OK);
    assert_int_equal(n, 1); /* and no word about config.json */
    moe4_checkpoint_close(ckpt);
}

static void test_not_in_index(void **state) {
    (void)state;
    files_safetensors("a.safetensors",
                      "{\"x\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"y\":{\"dtype\":\"U8\",\"shape\":[0],"
                      "\"data_offsets\":[2,2]}}",
                      NULL, 2);
    files_text("model.safetensors.index.json", "{\"weight_map\":{\"x\":\"a.safetensors\"}}");
    edit_config("\"glm4_moe\"", "\"llama\"");
    verify();
    assert_int_equal(told.n, 2);
    expect_told("y: stands in a.safetensors, but not in model.safetensors.index.json");
}

static void test_unsupported_formats(void **state) {
    (void)state;
    files_safetensors("model.safetensors",
                      "{\"a.weight\":{\"dtype\":\"I8\",\"shape\":[2,1],\"data_offsets\":[0,2]},"
                      "\"a.scale\":{\"dtype\":\"F8_E8M0\",\"shape\":[1,1],\"data_offsets\":[2,3]},"
                      "\"b.weight\":{\"dtype\":\"I8\",\"shape\":[2,1],\"data_offsets\":[3,5]},"
                      "\"b.scale\":{\"dtype\":\"F8_E8M0\",\"shape\":[1,1],\"data_offsets\":[5,6]}}",
                      NULL, 6);
    free(model);
    model = files_read(files_path("model.safetensors"), &model_bytes);
    edit_config("\"glm4_moe\"", "\"llama\"");
    verify();
    assert_int_equal(told.n, 2);
    expect_told("a: unsupported: MXFP4 (scale) (and 1 more)");
}

static int stop_at_once(void *user, uint64_t done, uint64_t total) {
    uint64_t *seen = user;
    assert_in_range(done, 1, total);
    *seen = done;
    return 1;
}

/* A gigabyte of one tensor: its pages are dropped behind, progress is told on the way and can stop the check. */
static void test_memory_stays_bounded(void **state) {
    (void)state;
    const size_t bytes = (size_t)1 << 30;
    files_safetensors("big.safetensors", "{\"x\":{\"dtype\":\"BF16\",\"shape\":[536870912],\"data_offsets\":[0,1073741824]}}", NULL, 0);
    assert_int_equal(truncate(files_path("big.safetensors"), (off_t)(8 + 72 + bytes)), 0);
    moe4_checkpoint *ckpt;
    uint64_t n, seen = 0;
    struct rusage before, after;
    if (moe4_checkpoint_open(&ckpt, ctx, files_path("big.safetensors"))) fail_msg("%s", moe4_ctx_error(ctx));
    getrusage(RUSAGE_SELF, &before);
    assert_int_equal(moe4_checkpoint_verify(ckpt, &n, NULL, NULL, NULL), MOE4_OK);
    assert_int_equal(n, 0);
    getrusage(RUSAGE_SELF, &after);
    print_message("1 GiB verified, %ld MB more at the peak\n", (after.ru_maxrss - before.ru_maxrss) / 1000);
#ifndef __SANITIZE_THREAD__ /* it remembers every byte that was read */
    assert_true(after.ru_maxrss - before.ru_maxrss < 300 * 1000);
#endif
    assert_int_equal(moe4_checkpoint_verify(ckpt, &n, NULL, stop_at_once, &seen), MOE4_OK);
    assert_in_range(seen, 1, bytes / 4);
    moe4_checkpoint_close(ckpt);
}

/* moe4_count_bad against plain arithmetic: every value of the 8- and 16-bit types, at every place of a group of eight bytes. */
static void test_every_value(void **state) {
    (void)state;
    static const struct {
        moe4_dtype dtype;
        bool is_scale;
    } kinds[] = {{MOE4_F8_E4M3, true}, {MOE4_F8_E4M3, false}, {MOE4_F8_E5M2, false}, {MOE4_F8_E8M0, false},
                 {MOE4_BOOL, false},   {MOE4_BF16, false},    {MOE4_F16, false}};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        struct moe4_value_rule rule = moe4_value_rule_for(kinds[k].dtype, kinds[k].is_scale);
        size_t e = rule.elem_bytes, n_values = e == 1 ? 256 : 65536, n = 21;
        for (uint32_t value = 0; value < n_values; value++) {
            bool bad = false;
            switch (kinds[k].dtype) {
            case MOE4_F8_E4M3: bad = (value & 0x7f) == 0x7f || (kinds[k].is_scale && value > 0x7f); break;
            case MOE4_F8_E5M2: bad = (value & 0x7f) >= 0x7c; break;
            case MOE4_F8_E8M0: bad = value == 0xff; break;
            case MOE4_BOOL: bad = value > 1; break;
            case MOE4_BF16: bad = (value & 0x7fff) >= 0x7f80; break;
            default: bad = (value & 0x7fff) >= 0x7c00; break;
            }
            uint8_t row[64] = {0};
            size_t at = value % n, first;
            memcpy(row + 1 + at * e, &value, e); /* +1: no alignment */
            assert_int_equal(moe4_count_bad(&rule, row + 1, n, &first), bad);
            if (bad) assert_int_equal(first, at);
            memcpy(row + 1 + 20 * e, &value, e);
            assert_int_equal(moe4_count_bad(&rule, row + 1, n, &first), bad * (at == 20 ? 1 : 2));
        }
    }
    struct moe4_value_rule f32 = moe4_value_rule_for(MOE4_F32, false), f64 = moe4_value_rule_for(MOE4_F64, false);
    float f[3] = {3.4e38f, -0.f, 0.f / 0.f};
    double d[2] = {1e308, -1.0 / 0.0};
    size_t first;
    assert_int_equal(moe4_count_bad(&f32, f, 3, &first), 1);
    assert_int_equal(first, 2);
    assert_int_equal(moe4_count_bad(&f64, d, 2, &first), 1);
    assert_int_equal(first, 1);
    assert_int_equal(moe4_count_bad(&f64, d, 1, &first), 0);
}

#define TEST(t) cmocka_unit_test_setup_teardown(t, set_up, tear_down)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_intact),          TEST(test_missing_expert),      TEST(test_missing_parts),        TEST(test_block_scales),
        TEST(test_globals),         TEST(test_unquantized_values),  TEST(test_companions),           TEST(test_truncated),
        TEST(test_config_promises), TEST(test_deepseek_complete),   TEST(test_qwen_complete),        TEST(test_single_file),
        TEST(test_not_in_index),    TEST(test_unsupported_formats), TEST(test_memory_stays_bounded), TEST(test_every_value),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
