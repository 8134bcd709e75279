/* moe4 eval: what a model pays for a text, in bits per byte (or per token). */
#include <stdio.h>
#include <stdlib.h>

#include "cli_lm.h"

enum { DEFAULT_WINDOW = 512, DEFAULT_BATCH = 8, DEFAULT_TENSOR_BATCH = 32 };

struct options {
    const char *text, *token_ids, *act;
    size_t window, batch, limit;
    struct cli_common common;
};

static int read_tokens(struct cli_lm *m, struct lm_tokens *tokens, const struct options *o) {
    const char *path = o->text ? o->text : o->token_ids;
    size_t most = o->limit == CLI_UNSET ? 0 : o->limit + 1; /* n predictions need n + 1 tokens */
    if (o->text && !m->model->byte_level)
        return cli_error(CLI_BAD_USAGE, "--text", "this model's %zu tokens are not bytes; give its token ids with --token-ids FILE",
                         m->model->config.info.vocab);
    moe4_status status = o->text ? lm_tokens_from_text(&m->lm, tokens, path, most) : lm_tokens_from_ids(&m->lm, tokens, path, most);
    if (status != MOE4_OK) return cli_lm_fail(m, status, path);
    if (tokens->n < 2)
        return cli_error(CLI_BAD_DATA, path, "%zu %s%s: nothing to predict, need 2", tokens->n, o->text ? "byte" : "token",
                         tokens->n == 1 ? "" : "s");
    return CLI_FINE;
}

static void show_progress(void *user, size_t n_done, size_t n_total, double bits) {
    (void)bits;
    cli_progress_show(user, n_done, n_total);
}

static int print_json(const struct cli_lm *m, const struct lm_bits *bits, const struct options *o) {
    double each = bits->bits / (double)bits->n_predicted, rate = (double)bits->n_predicted / bits->seconds;
    return cli_print_json(json_pack(
        "{s:s, s:o, s:o, s:f, s:I, s:f, s:f, s:I, s:s, s:s, s:s, s:I, s:I, s:I}", "family", m->model->config.info.family, "bits_per_byte",
        o->text ? json_real(each) : json_null(), "bytes", o->text ? json_integer((json_int_t)bits->n_predicted) : json_null(),
        "bits_per_token", each, "tokens", (json_int_t)bits->n_predicted, "seconds", bits->seconds, "tokens_per_second", rate,
        "saturated_blocks", (json_int_t)bits->n_saturated, "act", moe4_act_name(m->model->act), "device", moe4_ctx_device(m->lm.ctx), "isa",
        moe4_ctx_isa(m->lm.ctx), "threads", (json_int_t)moe4_ctx_n_threads(m->lm.ctx), "window", (json_int_t)o->window, "batch",
        (json_int_t)o->batch));
}

static int print_table(const struct cli_lm *m, const struct lm_bits *bits, const struct options *o) {
    printf("%-18s %.5f\n", o->text ? "bits per byte" : "bits per token", bits->bits / (double)bits->n_predicted);
    printf("%-18s %zu\n", o->text ? "bytes" : "tokens", bits->n_predicted);
    printf("%-18s %.2f\n", "seconds", bits->seconds);
    printf("%-18s %.0f\n", "tokens per second", (double)bits->n_predicted / bits->seconds);
    printf("%-18s %llu\n", "saturated blocks", (unsigned long long)bits->n_saturated);
    size_t n_threads = moe4_ctx_n_threads(m->lm.ctx);
    printf("%-18s %s, %s%s, %zu thread%s\n", "mode", moe4_act_name(m->model->act), cli_lm_products(m), moe4_ctx_isa(m->lm.ctx), n_threads,
           n_threads == 1 ? "" : "s");
    return CLI_FINE;
}

static int eval(struct cli_lm *m, struct lm_tokens *tokens, const char *path, struct options *o) {
    int exit_status = cli_lm_open(m, path, o->act, &o->common);
    if (exit_status == CLI_FINE) exit_status = read_tokens(m, tokens, o);
    if (exit_status != CLI_FINE) return exit_status;
    if (o->batch == CLI_UNSET) o->batch = m->model->act == MOE4_ACT_TENSOR ? DEFAULT_TENSOR_BATCH : DEFAULT_BATCH;
    struct cli_progress progress = {.what = "eval"};
    struct lm_bits_options options = {o->window, o->batch, show_progress, &progress};
    struct lm_bits bits;
    moe4_status status = lm_bits_measure(m->model, &bits, tokens, &options);
    cli_progress_finish(&progress);
    if (status != MOE4_OK) return cli_lm_fail(m, status, path);
    return o->common.json ? print_json(m, &bits, o) : print_table(m, &bits, o);
}

int cmd_eval(int argc, char **argv) {
    struct options o = {.window = DEFAULT_WINDOW, .batch = CLI_UNSET, .limit = CLI_UNSET};
    const struct cli_option table[] = {
        {"text", CLI_TEXT, &o.text, "FILE", "predict the bytes of FILE"},
        {"token-ids", CLI_TEXT, &o.token_ids, "FILE", "predict token ids: raw little-endian int32, or the one tensor of a .safetensors"},
        {"act", CLI_TEXT, &o.act, "MODE", CLI_LM_ACT_HELP},
        {"window", CLI_SIZE, &o.window, "N", "predict N tokens from at most N before each (512)"},
        {"batch", CLI_SIZE, &o.batch, "N", "run N windows together (8; 32 in mode tensor, where it changes the result)"},
        {"limit", CLI_SIZE, &o.limit, "N", "predict at most N bytes or tokens"},
        CLI_DEVICE_OPTION(&o.common),
        CLI_CACHE_OPTION(&o.common),
        CLI_COMMON_OPTIONS(&o.common),
    };
    const struct cli_usage usage = {
        .synopsis = "MODEL (--text FILE | --token-ids FILE) [--act MODE] [--window N] [--limit N] [--json]",
        .about = "Measures how many bits the model needs for each byte of a text: -log2 of the probability it gave to what came next.\n"
                 "The text is cut into windows that do not overlap; window j predicts tokens jN + 1 .. jN + N from jN .. jN + N - 1.",
        .options = table,
        .n_options = sizeof table / sizeof *table,
        .examples = "moe4 eval models/novels-18m-nvfp4 --text models/tale-excerpt.txt\n"
                    "moe4 eval models/novels-18m-nvfp4 --text models/tale-excerpt.txt --act w4a16 --json\n",
    };
    const char *path;
    int exit_status;
    if (!cli_parse(argc, argv, &usage, &path, 1, &exit_status)) return exit_status;
    if (!o.text == !o.token_ids) return cli_error(CLI_BAD_USAGE, argv[0], "needs --text FILE or --token-ids FILE, not both");
    if (o.window == 0 || o.batch == 0 || o.limit == 0)
        return cli_error(CLI_BAD_USAGE, o.window == 0 ? "--window" : o.batch == 0 ? "--batch" : "--limit", "0 is too few");
    struct cli_lm m;
    struct lm_tokens tokens = {NULL, 0};
    exit_status = eval(&m, &tokens, path, &o);
    free(tokens.data);
    cli_lm_close(&m);
    return exit_status;
}
