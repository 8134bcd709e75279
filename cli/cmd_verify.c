/* moe4 verify: every problem of a checkpoint, as the library tells them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

struct verify {
    const char *model;
    struct cli_common common;
    struct cli_progress progress;
    moe4_ctx *ctx;
    moe4_checkpoint *ckpt;
    json_t *problems; /* with --json */
    uint64_t n_problems, bytes;
    double seconds;
};

static void on_problem(void *user, const char *name, const char *problem) {
    struct verify *v = user;
    cli_progress_finish(&v->progress);
    if (v->common.json)
        json_array_append_new(v->problems, json_pack("{s:o, s:o}", "name", cli_json_text(name), "problem", cli_json_text(problem)));
    else
        printf("%s: %s\n", name, problem);
}

static int on_progress(void *user, uint64_t done, uint64_t total) {
    struct verify *v = user;
    fflush(stdout);
    cli_progress_show(&v->progress, done, total);
    return 0;
}

/* A file that cannot be read as a checkpoint is an error like any command's, and with --json a problem as well. */
static int open_failed(struct verify *v, moe4_status status) {
    int exit_status = cli_fail(v->ctx, status, v->model);
    if (v->common.json && exit_status == CLI_BAD_DATA) {
        v->n_problems = 1;
        on_problem(v, v->model, moe4_ctx_error(v->ctx));
    }
    return exit_status;
}

static void count_bytes(struct verify *v) {
    moe4_tensor t;
    for (size_t i = 0; i < moe4_checkpoint_n_tensors(v->ckpt); i++)
        if (moe4_checkpoint_tensor(v->ckpt, &t, i) == MOE4_OK) v->bytes += t.bytes;
}

static int check(struct verify *v) {
    double start = cli_seconds();
    moe4_status status = moe4_checkpoint_open(&v->ckpt, v->ctx, v->model);
    if (status != MOE4_OK) return open_failed(v, status);
    status = moe4_checkpoint_verify(v->ckpt, &v->n_problems, on_problem, on_progress, v);
    cli_progress_finish(&v->progress);
    if (status != MOE4_OK) return cli_fail(v->ctx, status, v->model);
    v->seconds = cli_seconds() - start;
    count_bytes(v);
    return v->n_problems ? CLI_BAD_DATA : CLI_FINE;
}

static void print_summary(const struct verify *v) {
    char text[24];
    size_t n_tensors = moe4_checkpoint_n_tensors(v->ckpt), n_files = moe4_checkpoint_n_files(v->ckpt);
    printf("%s: %zu tensors in %zu %s, %s, %.2f s: %llu %s\n", v->model, n_tensors, n_files, n_files == 1 ? "file" : "files",
           cli_bytes(text, v->bytes), v->seconds, (unsigned long long)v->n_problems, v->n_problems == 1 ? "problem" : "problems");
}

static int print_json(struct verify *v) {
    json_t *problems = v->problems;
    v->problems = NULL;
    return cli_print_json(json_pack("{s:o, s:I, s:I, s:I, s:f, s:I, s:o}", "model", cli_json_text(v->model), "files",
                                    (json_int_t)(v->ckpt ? moe4_checkpoint_n_files(v->ckpt) : 0), "tensors",
                                    (json_int_t)(v->ckpt ? moe4_checkpoint_n_tensors(v->ckpt) : 0), "bytes", (json_int_t)v->bytes,
                                    "seconds", v->seconds, "n_problems", (json_int_t)v->n_problems, "problems", problems));
}

int cmd_verify(int argc, char **argv) {
    struct verify v = {.progress = {.what = "verify"}};
    const struct cli_option options[] = {CLI_COMMON_OPTIONS(&v.common)};
    const struct cli_usage usage = {
        .synopsis = "MODEL [options]",
        .about =
            "Reads all of a checkpoint and lists every problem: companions of quantized matrices with their shapes and dtypes, NaN or\n"
            "signed block scales, global and input scales that are not positive and finite, non-finite values, and whatever of\n"
            "layers, experts, routers, norms and attention config.json promises and no file has.\n"
            "MODEL is a checkpoint folder, or one .safetensors file (then completeness is not checked).",
        .options = options,
        .n_options = sizeof options / sizeof *options,
        .examples = "moe4 verify models/novels-18m-nvfp4\n"
                    "moe4 verify MODEL --json",
    };
    int exit_status;
    if (!cli_parse(argc, argv, &usage, &v.model, 1, &exit_status)) return exit_status;
    v.problems = json_array();
    exit_status = cli_open_ctx(&v.ctx, &v.common);
    if (exit_status == CLI_FINE) {
        exit_status = check(&v);
        if (v.common.json && (v.ckpt || v.n_problems)) {
            int printed = print_json(&v);
            if (printed != CLI_FINE) exit_status = printed;
        } else if (v.ckpt) {
            print_summary(&v);
        }
    }
    json_decref(v.problems);
    moe4_checkpoint_close(v.ckpt);
    moe4_ctx_destroy(v.ctx);
    return exit_status;
}
