/* For the tests of the runner: models opened, altered copies of a model folder. */
#ifndef LM_UTIL_H
#define LM_UTIL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lm/lm.h"

#define BUNDLED MOE4_SOURCE_DIR "/models/novels-18m-nvfp4"

struct opened {
    struct lm lm;
    struct lm_model *model;
};

static inline moe4_status try_open_isa(struct opened *o, const char *path, moe4_act act, size_t n_threads, const char *isa) {
    moe4_ctx_options options = MOE4_CTX_OPTIONS_INIT;
    options.n_threads = n_threads;
    options.isa_mask = isa ? moe4_isa_mask(isa) : 0;
    *o = (struct opened){.model = NULL};
    assert_int_equal(moe4_ctx_create(&o->lm.ctx, &options), MOE4_OK);
    return lm_model_open(&o->model, &o->lm, path, act);
}

static inline moe4_status try_open(struct opened *o, const char *path, moe4_act act, size_t n_threads) {
    return try_open_isa(o, path, act, n_threads, NULL);
}

static inline void open_model(struct opened *o, const char *path, moe4_act act, size_t n_threads) {
    moe4_status status = try_open(o, path, act, n_threads);
    if (status != MOE4_OK) fail_msg("%s: %s", path, o->lm.error);
}

static inline void close_model(struct opened *o) {
    lm_model_close(o->model);
    moe4_ctx_destroy(o->lm.ctx);
}

/* logits [n_seqs * n_new, vocab] of a fresh run over the tokens, in calls of at most n_step positions; the caller's to free. */
static inline float *run_logits(struct opened *o, const int32_t *tokens, size_t n_seqs, size_t n_new, size_t n_step) {
    size_t vocab = o->model->config.info.vocab;
    struct lm_run_options options = {.n_seqs = n_seqs, .context = n_new, .max_tokens = n_seqs * n_step};
    struct lm_run *run;
    if (lm_run_create(&run, o->model, &options) != MOE4_OK) fail_msg("%s", o->lm.error);
    float *logits = malloc(n_seqs * n_new * vocab * sizeof *logits), *some = malloc(n_seqs * n_step * vocab * sizeof *some);
    int32_t *step = malloc(n_seqs * n_step * sizeof *step);
    for (size_t at = 0; at < n_new; at += n_step) {
        size_t n = n_new - at < n_step ? n_new - at : n_step;
        for (size_t s = 0; s < n_seqs; s++) memcpy(step + s * n, tokens + s * n_new + at, n * sizeof *step);
        if (lm_forward(run, step, n_seqs, n) != MOE4_OK) fail_msg("%s", o->lm.error);
        assert_int_equal(lm_logits(run, some, 0, n_seqs * n), MOE4_OK);
        for (size_t s = 0; s < n_seqs; s++) memcpy(logits + (s * n_new + at) * vocab, some + s * n * vocab, n * vocab * sizeof *logits);
    }
    free(some);
    free(step);
    lm_run_destroy(run);
    return logits;
}

/* |a - b| / |b| */
static inline double relative_l2(const float *a, const float *b, size_t n) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    return sqrt(difference / norm);
}

/* The tensor of an open file; fails the test when it is not there. */
static inline moe4_tensor find_tensor(const moe4_checkpoint *file, const char *name) {
    moe4_tensor t;
    if (moe4_checkpoint_find(file, &t, name) != MOE4_OK) fail_msg("no tensor %s", name);
    return t;
}

static inline char *read_whole(const char *path, size_t *bytes_ret) {
    FILE *f = fopen(path, "rb");
    if (!f) fail_msg("%s cannot be read", path);
    fseek(f, 0, SEEK_END);
    size_t n = (size_t)ftell(f);
    rewind(f);
    char *data = malloc(n + 1);
    assert_int_equal(fread(data, 1, n, f), n);
    fclose(f);
    data[n] = '\0';
    *bytes_ret = n;
    return data;
}

static inline void write_whole(const char *path, const void *data, size_t bytes) {
    FILE *f = fopen(path, "wb");
    if (!f) fail_msg("%s cannot be written", path);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    fclose(f);
}

/* The text with its one occurrence of `from` replaced; the caller's to free. */
static inline char *replaced(const char *text, const char *from, const char *to) {
    const char *at = strstr(text, from);
    if (!at) fail_msg("\"%s\" is not there", from);
    char *result = malloc(strlen(text) + strlen(to) + 1);
    sprintf(result, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    return result;
}

/* A folder of its own under the temporary ones; its name goes to path. */
static inline void make_folder(char path[static 64]) {
    strcpy(path, "/tmp/moe4-test-XXXXXX");
    assert_non_null(mkdtemp(path));
}

static inline void remove_folder(const char *path) {
    static const char *const files[] = {"config.json", "model.safetensors", "tokenizer.json", "ids.bin", "text"};
    char name[128];
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        snprintf(name, sizeof name, "%s/%s", path, files[i]);
        unlink(name);
    }
    assert_int_equal(rmdir(path), 0);
}

#endif
