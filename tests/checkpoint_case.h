/* What the tests of checkpoints share: a context and a temporary folder for each, and what an error must say. */
#ifndef MOE4_TESTS_CHECKPOINT_CASE_H
#define MOE4_TESTS_CHECKPOINT_CASE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "files.h"
#include "moe4.h"

/* A file's header with one tensor of two bytes. */
#define U8(name) "{\"" name "\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}"

/* Keys of a config.json, without braces. */
#define GLM                                                                                                            \
    "\"model_type\":\"glm4_moe\",\"hidden_size\":64,\"vocab_size\":9,\"num_hidden_layers\":4,\"n_routed_experts\":16," \
    "\"num_experts_per_tok\":4,\"moe_intermediate_size\":32,\"norm_topk_prob\":true,\"first_k_dense_replace\":1,"      \
    "\"intermediate_size\":48,"

#define MODEL MOE4_SOURCE_DIR "/models/novels-18m-nvfp4"

static moe4_ctx *ctx;

static inline int make_ctx(void **state) {
    (void)state;
    files_make();
    return moe4_ctx_create(&ctx, NULL);
}

static inline int drop_ctx(void **state) {
    (void)state;
    moe4_ctx_destroy(ctx);
    files_remove();
    return 0;
}
/* The calling thread's error must have these words (separated by '|'). */
static inline void expect_words(const char *what, const char *words) {
    const char *error = moe4_ctx_error(ctx);
    char word[128];
    for (const char *w = words; *w;) {
        size_t n = strcspn(w, "|");
        snprintf(word, sizeof word, "%.*s", (int)n, w);
        if (!strstr(error, word)) fail_msg("%s: \"%s\" lacks \"%s\"", what, error, word);
        w += n + (w[n] == '|');
    }
}

/* Opening a file of the folder gives this status and these words; "": the folder. */
static inline void expect_open_of(const char *file, const char *what, moe4_status status, const char *words) {
    moe4_checkpoint *ckpt = (moe4_checkpoint *)1;
    moe4_status got = moe4_checkpoint_open(&ckpt, ctx, files_path(file));
    if (got != status) fail_msg("%s: status %d, want %d (\"%s\")", what, got, status, moe4_ctx_error(ctx));
    if (status == MOE4_OK)
        moe4_checkpoint_close(ckpt);
    else
        assert_null(ckpt);
    expect_words(what, words);
}

static inline void expect_open(const char *what, moe4_status status, const char *words) {
    expect_open_of("", what, status, words);
}

#define TEST(t) cmocka_unit_test_setup_teardown(t, make_ctx, drop_ctx)

#endif
