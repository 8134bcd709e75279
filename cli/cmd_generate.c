/* moe4 generate: text from a model, a token at a time. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli_lm.h"

struct options {
    const char *prompt, *token_ids, *act;
    size_t n, seed;
    double temperature, top_p;
    struct cli_common common;
};

struct generation {
    struct lm_run *run;
    struct lm_sampler sampler;
    float *logits;
    struct lm_candidate *scratch;
    int32_t *made; /* [n] */
    size_t n_made;
    double first_seconds, rest_seconds;
    uint64_t rest_bytes; /* weights read for the tokens after the first */
    int as_text, quiet;
};

static int read_prompt(struct cli_lm *m, struct lm_tokens *prompt, const struct options *o) {
    if (o->token_ids) {
        moe4_status status = lm_tokens_from_ids(&m->lm, prompt, o->token_ids, 0);
        if (status != MOE4_OK) return cli_lm_fail(m, status, o->token_ids);
        return prompt->n ? CLI_FINE : cli_error(CLI_BAD_DATA, o->token_ids, "0 tokens, need 1");
    }
    if (!m->model->byte_level)
        return cli_error(CLI_BAD_USAGE, "--prompt",
                         "this model's %zu tokens are not bytes; give the prompt's token ids with --token-ids FILE",
                         m->model->config.info.vocab);
    prompt->n = strlen(o->prompt);
    prompt->data = calloc(prompt->n, sizeof *prompt->data);
    if (!prompt->data) return cli_error(CLI_BAD_DATA, "--prompt", "no memory for %zu tokens", prompt->n);
    for (size_t i = 0; i < prompt->n; i++) prompt->data[i] = (unsigned char)o->prompt[i];
    return CLI_FINE;
}

static void show(const struct generation *g, int32_t token) {
    if (g->quiet) return;
    if (g->as_text)
        putchar(token);
    else
        printf("%d ", token);
    fflush(stdout);
}

/* Samples the token after the last of `tokens`, which are new to the run. */
static moe4_status step(struct generation *g, const int32_t *tokens, size_t n) {
    size_t vocab = g->run->model->config.info.vocab;
    LM_TRY(g->run->model->lm, lm_forward(g->run, tokens, 1, n));
    LM_TRY(g->run->model->lm, lm_logits(g->run, g->logits, n - 1, 1));
    g->made[g->n_made] = lm_sample(&g->sampler, g->logits, vocab, g->scratch);
    show(g, g->made[g->n_made++]);
    return MOE4_OK;
}

static moe4_status generate_tokens(struct generation *g, const struct lm_tokens *prompt, size_t n) {
    struct lm *lm = g->run->model->lm;
    double start = lm_seconds();
    for (size_t i = 0; i < prompt->n && g->as_text; i++) show(g, prompt->data[i]);
    LM_TRY(lm, step(g, prompt->data, prompt->n));
    double first = lm_seconds();
    uint64_t bytes = g->run->weight_bytes;
    while (g->n_made < n) LM_TRY(lm, step(g, &g->made[g->n_made - 1], 1));
    g->first_seconds = first - start;
    g->rest_seconds = lm_seconds() - first;
    g->rest_bytes = g->run->weight_bytes - bytes;
    return MOE4_OK;
}

/* ---- the report ---- */

struct speed {
    double rate, bytes, bandwidth, share; /* tokens/s after the first; weights a token; bytes/s; of the rate the bandwidth allows */
};

static struct speed measure_speed(const struct generation *g) {
    struct speed s = {0, 0, 0, 0};
    if (g->n_made < 2 || g->rest_seconds <= 0) return s;
    double n = (double)(g->n_made - 1);
    s.rate = n / g->rest_seconds;
    s.bytes = (double)g->rest_bytes / n;
    s.bandwidth = lm_read_bandwidth(g->run->model);
    s.share = s.bandwidth > 0 ? s.rate * s.bytes / s.bandwidth : 0;
    return s;
}

static json_t *text_or_null(const struct generation *g) {
    if (!g->as_text) return json_null();
    char *text = malloc(g->n_made);
    for (size_t i = 0; text && i < g->n_made; i++) text[i] = (char)g->made[i];
    json_t *json = text ? json_stringn(text, g->n_made) : NULL; /* NULL when it is not UTF-8 */
    free(text);
    return json ? json : json_null();
}

static int print_json(const struct cli_lm *m, const struct generation *g) {
    struct speed s = measure_speed(g);
    json_t *ids = json_array();
    for (size_t i = 0; i < g->n_made; i++) json_array_append_new(ids, json_integer(g->made[i]));
    return cli_print_json(json_pack(
        "{s:o, s:o, s:f, s:f, s:f, s:f, s:f, s:I, s:s, s:s, s:s, s:I}", "text", text_or_null(g), "token_ids", ids, "first_token_seconds",
        g->first_seconds, "tokens_per_second", s.rate, "weight_bytes_per_token", s.bytes, "read_bytes_per_second", s.bandwidth,
        "share_of_floor", s.share, "saturated_blocks", (json_int_t)g->run->n_saturated, "act", moe4_act_name(m->model->act), "device",
        moe4_ctx_device(m->lm.ctx), "isa", moe4_ctx_isa(m->lm.ctx), "threads", (json_int_t)moe4_ctx_n_threads(m->lm.ctx)));
}

static int print_summary(const struct cli_lm *m, const struct generation *g) {
    struct speed s = measure_speed(g);
    char bytes[24], bandwidth[24];
    putchar('\n');
    fflush(stdout);
    fprintf(stderr, "%zu tokens, the first after %.1f ms", g->n_made, 1e3 * g->first_seconds);
    if (s.rate > 0)
        fprintf(stderr, ", then %.1f tokens/s: %.0f %% of what reading %s of weights a token at %s/s allows", s.rate, 100 * s.share,
                cli_bytes(bytes, (uint64_t)s.bytes), cli_bytes(bandwidth, (uint64_t)s.bandwidth));
    size_t n_threads = moe4_ctx_n_threads(m->lm.ctx);
    fprintf(stderr, " (%s, %s%s, %zu thread%s)\n", moe4_act_name(m->model->act), cli_lm_products(m), moe4_ctx_isa(m->lm.ctx), n_threads,
            n_threads == 1 ? "" : "s");
    return CLI_FINE;
}

/* ---- the command ---- */

static int prepare(struct cli_lm *m, struct generation *g, const struct lm_tokens *prompt, const struct options *o) {
    size_t vocab = m->model->config.info.vocab, context = m->model->config.max_context;
    if (prompt->n > context || o->n > context - prompt->n)
        return cli_error(CLI_BAD_USAGE, "-n", "a prompt of %zu tokens and %zu more: the model's context is %zu", prompt->n, o->n, context);
    struct lm_run_options run_options = {.n_seqs = 1, .context = prompt->n + o->n, .max_tokens = prompt->n};
    moe4_status status = lm_run_create(&g->run, m->model, &run_options);
    if (status != MOE4_OK) return cli_lm_fail(m, status, "generate");
    g->logits = lm_calloc(&m->lm, vocab, sizeof *g->logits, "logits");
    g->scratch = lm_calloc(&m->lm, vocab, sizeof *g->scratch, "candidates");
    g->made = lm_calloc(&m->lm, o->n, sizeof *g->made, "tokens");
    if (!g->logits || !g->scratch || !g->made) return cli_lm_fail(m, MOE4_ERROR_MEMORY, "generate");
    g->sampler = (struct lm_sampler){o->temperature, o->top_p, o->seed};
    g->as_text = m->model->byte_level && !o->token_ids;
    g->quiet = o->common.json;
    return CLI_FINE;
}

static int generate(struct cli_lm *m, struct generation *g, struct lm_tokens *prompt, const char *path, const struct options *o) {
    int exit_status = cli_lm_open(m, path, o->act, &o->common);
    if (exit_status == CLI_FINE) exit_status = read_prompt(m, prompt, o);
    if (exit_status == CLI_FINE) exit_status = prepare(m, g, prompt, o);
    if (exit_status != CLI_FINE) return exit_status;
    moe4_status status = generate_tokens(g, prompt, o->n);
    if (status != MOE4_OK) return cli_lm_fail(m, status, path);
    return o->common.json ? print_json(m, g) : print_summary(m, g);
}

int cmd_generate(int argc, char **argv) {
    struct options o = {.prompt = "\n", .n = 256, .temperature = 0.8, .top_p = 0.95, .seed = 1};
    const struct cli_option table[] = {
        {"prompt", CLI_TEXT, &o.prompt, "TEXT", "begin with TEXT (a new line)"},
        {"token-ids", CLI_TEXT, &o.token_ids, "FILE", "begin with the token ids of FILE (as eval reads them) and print ids, not text"},
        {"n", CLI_SIZE, &o.n, "N", "make N tokens (256)"},
        {"temperature", CLI_NUMBER, &o.temperature, "T", "flatten (above 1) or sharpen the choice; 0 takes the most likely token (0.8)"},
        {"top-p", CLI_NUMBER, &o.top_p, "P", "choose among the likeliest tokens that together have probability P (0.95)"},
        {"seed", CLI_SIZE, &o.seed, "S", "the same seed gives the same text, whatever the threads (1)"},
        {"act", CLI_TEXT, &o.act, "MODE", CLI_LM_ACT_HELP},
        CLI_DEVICE_OPTION(&o.common),
        CLI_CACHE_OPTION(&o.common),
        CLI_COMMON_OPTIONS(&o.common),
    };
    const struct cli_usage usage = {
        .synopsis = "MODEL [--prompt TEXT | --token-ids FILE] [-n N] [--temperature T] [--top-p P] [--seed S] [--act MODE]",
        .about = "Prints the prompt and what the model makes of it, then on standard error its speed: the time to the first token,\n"
                 "tokens a second after it, and that as a share of the time that only reading the weights would take.\n"
                 "moe4 has no tokenizers: a model whose tokens are not bytes is spoken to in token ids.",
        .options = table,
        .n_options = sizeof table / sizeof *table,
        .examples = "moe4 generate models/novels-18m-nvfp4 --prompt \"It was a cold night\" -n 400\n"
                    "moe4 generate models/novels-18m-nvfp4 --temperature 0 --act w4a16\n",
    };
    const char *path;
    int exit_status;
    if (!cli_parse(argc, argv, &usage, &path, 1, &exit_status)) return exit_status;
    if (o.n == 0) return cli_error(CLI_BAD_USAGE, "-n", "0 is too few");
    if (o.top_p > 1) return cli_error(CLI_BAD_USAGE, "--top-p", "%g is more than 1", o.top_p);
    struct cli_lm m;
    struct generation g = {.run = NULL};
    struct lm_tokens prompt = {NULL, 0};
    exit_status = generate(&m, &g, &prompt, path, &o);
    lm_run_destroy(g.run);
    free(g.logits);
    free(g.scratch);
    free(g.made);
    free(prompt.data);
    cli_lm_close(&m);
    return exit_status;
}
