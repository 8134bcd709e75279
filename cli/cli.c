#include "cli.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "describe.h"

/* ---- errors ---- */

int cli_error(int status, const char *what, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fflush(stdout);
    fprintf(stderr, "moe4: %s: ", what);
    vfprintf(stderr, fmt, args);
    fputc('\n', stderr);
    va_end(args);
    return status;
}

int cli_fail(const moe4_ctx *ctx, moe4_status status, const char *what) {
    const char *why = moe4_ctx_error(ctx);
    int exit_status = status == MOE4_ERROR_ARGUMENT ? CLI_BAD_USAGE : CLI_BAD_DATA;
    size_t n = strlen(what);
    if (strncmp(why, what, n) == 0 && strncmp(why + n, ": ", 2) == 0) why += n + 2; /* the library already begins with the thing */
    return cli_error(exit_status, what, "%s", *why ? why : moe4_status_text(status));
}

/* ---- options ---- */

enum { MAX_OPTIONS = 32, HELP = 1000 };

/* Stores one option's text; the sentence of what is wrong with it, or NULL. */
static const char *store(const struct cli_option *o, const char *text) {
    char *end;
    switch (o->kind) {
    case CLI_FLAG: *(bool *)o->to = true; return NULL;
    case CLI_TEXT: *(const char **)o->to = text; return *text ? NULL : "is empty";
    case CLI_LIST: {
        struct cli_list *list = o->to;
        if (!*text) return "is empty";
        if (list->n == CLI_MAX_LIST) return "is one too many";
        list->items[list->n++] = text;
        return NULL;
    }
    case CLI_SIZE: {
        errno = 0;
        unsigned long long n = strtoull(text, &end, 10);
        if (!*text || text[strspn(text, "0123456789")] || errno || n >= CLI_UNSET) return "is not a whole number";
        *(size_t *)o->to = (size_t)n;
        return NULL;
    }
    case CLI_NUMBER: {
        double x = strtod(text, &end);
        if (!*text || *end || !isfinite(x) || signbit(x) || strchr(" \t\n\v\f\r", *text)) return "is not a number of 0 or more";
        *(double *)o->to = x;
        return NULL;
    }
    }
    return "has no kind";
}

static int wrong_option(const char *command, char **argv, int given, const struct cli_usage *usage) {
    char what[64], cluster[3] = {'-', (char)optopt, '\0'};
    if (optopt >= 1 && optopt <= (int)usage->n_options) /* one of ours, used wrongly */
        snprintf(what, sizeof what, "--%s", usage->options[optopt - 1].name);
    else /* a short option sits anywhere in its word; optopt has it */
        snprintf(what, sizeof what, "%s", optopt && optopt != HELP ? cluster : argv[optind - 1]);
    const char *why = given == ':'                                               ? "needs an argument"
                      : optopt == HELP || (optopt >= 1 && optopt <= MAX_OPTIONS) ? "takes no argument"
                                                                                 : "unknown or ambiguous option";
    return cli_error(CLI_BAD_USAGE, what, "%s (see moe4 %s --help)", why, command);
}

static const struct cli_option *find_short(const struct cli_usage *usage, int letter) {
    const struct cli_option *o = usage->options;
    while (!cli_is_short(o) || o->name[0] != letter) o++;
    return o;
}

bool cli_parse(int argc, char **argv, const struct cli_usage *usage, const char **operands, size_t n_operands, int *exit_ret) {
    const size_t describe = sizeof CLI_DESCRIBE - 1;
    if (argc == 2 && strncmp(argv[1], CLI_DESCRIBE, describe) == 0 &&
        cli_describe_command(argv[1] + describe, argv[0], usage, n_operands)) {
        *exit_ret = CLI_FINE;
        return false;
    }
    struct option options[MAX_OPTIONS + 2] = {{"help", no_argument, NULL, HELP}};
    char letters[2 * MAX_OPTIONS + 3] = ":h"; /* options of one letter, as getopt wants them */
    size_t n_letters = 2, n_long = 1;
    for (size_t i = 0; i < usage->n_options && i < MAX_OPTIONS; i++) {
        const struct cli_option *o = &usage->options[i];
        if (cli_is_short(o)) {
            letters[n_letters++] = o->name[0];
            if (o->arg) letters[n_letters++] = ':';
        } else
            options[n_long++] = (struct option){o->name, o->arg ? required_argument : no_argument, NULL, (int)i + 1};
    }

    opterr = 0;
    optind = 0; /* from the start, also in a second call */
    for (int given; (given = getopt_long(argc, argv, letters, options, NULL)) != -1;) {
        if (given == HELP || given == 'h') {
            cli_help(argv[0], usage);
            *exit_ret = CLI_FINE;
            return false;
        }
        if (given == '?' || given == ':') {
            *exit_ret = wrong_option(argv[0], argv, given, usage);
            return false;
        }
        const struct cli_option *o = given > (int)usage->n_options ? find_short(usage, given) : &usage->options[given - 1];
        const char *why = store(o, optarg);
        if (why) {
            char what[64];
            snprintf(what, sizeof what, "%s%s", cli_dashes(o), o->name);
            *exit_ret = cli_error(CLI_BAD_USAGE, what, "\"%s\" %s", optarg, why);
            return false;
        }
    }
    size_t n = (size_t)(argc - optind);
    if (n != n_operands) {
        *exit_ret = n > n_operands ? cli_error(CLI_BAD_USAGE, argv[optind + (int)n_operands], "unexpected (see moe4 %s --help)", argv[0])
                                   : cli_error(CLI_BAD_USAGE, argv[0], "usage: moe4 %s %s", argv[0], usage->synopsis);
        return false;
    }
    for (size_t i = 0; i < n; i++) operands[i] = argv[optind + (int)i];
    return true;
}

/* ---- library ---- */

static void print_log(void *user, const char *line) {
    (void)user;
    fprintf(stderr, "moe4: %s\n", line); /* it begins with the thing, as all sentences of the library do */
}

bool cli_on_device(const struct cli_common *common) {
    return common->device && strcmp(common->device, "cpu") != 0;
}

int cli_open_ctx(moe4_ctx **ctx_ret, const struct cli_common *common) {
    moe4_ctx_options options = MOE4_CTX_OPTIONS_INIT;
    *ctx_ret = NULL;
    options.n_threads = common->n_threads;
    options.device = common->device;
    options.cache = common->cache;
    options.log = print_log; /* where a context that cannot be made says why */
    if (common->isa) {
        options.isa_mask = moe4_isa_mask(common->isa);
        if (!options.isa_mask)
            return cli_error(CLI_BAD_USAGE, "--isa", "\"%s\" is no instruction set that moe4 uses (such as scalar or avx2)", common->isa);
    }
    moe4_status status = moe4_ctx_create(ctx_ret, &options);
    return status == MOE4_OK ? CLI_FINE : status == MOE4_ERROR_ARGUMENT ? CLI_BAD_USAGE : CLI_BAD_DATA;
}

/* ---- output ---- */

int cli_print_json(json_t *object) {
    int failed = !object || json_dumpf(object, stdout, JSON_INDENT(2)) != 0;
    json_decref(object);
    if (failed) return cli_error(CLI_BAD_DATA, "--json", "cannot be written");
    putchar('\n');
    return CLI_FINE;
}

json_t *cli_json_text(const char *text) {
    json_t *json = json_string(text);
    char *ascii = json ? NULL : strdup(text);
    if (!ascii) return json;
    for (char *c = ascii; *c; c++)
        if ((unsigned char)*c > 127) *c = '?';
    json = json_string(ascii);
    free(ascii);
    return json;
}

const char *cli_bytes(char text[static 24], uint64_t bytes) {
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
    double x = (double)bytes;
    size_t unit = 0;
    while (x >= 999.5 && unit + 1 < sizeof units / sizeof *units) {
        x /= 1000;
        unit++;
    }
    snprintf(text, 24, "%.*f %s", unit && x < 99.95, x, units[unit]);
    return text;
}

double cli_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void cli_progress_show(struct cli_progress *progress, uint64_t done, uint64_t total) {
    double now = cli_seconds();
    if (!isatty(STDERR_FILENO) || (progress->drawn_at != 0 && now - progress->drawn_at < 0.1)) return;
    if (progress->started_at == 0) progress->started_at = now;
    progress->drawn_at = now;
    double part = total ? (double)done / (double)total : 1, seconds = now - progress->started_at;
    int filled = (int)(40 * part);
    char a[24], b[24], c[24], speed[80] = "";
    if (seconds > 0.5 && done) {
        double rate = (double)done / seconds;
        snprintf(speed, sizeof speed, ", %s/s, %.0f s left", cli_bytes(c, (uint64_t)rate), (double)(total - done) / rate);
    }
    fprintf(stderr, "\r%s [%.*s%*s] %3d %%, %s of %s%s\033[K", progress->what, filled, "########################################",
            40 - filled, "", (int)(100 * part), cli_bytes(a, done), cli_bytes(b, total), speed);
}

void cli_progress_finish(struct cli_progress *progress) {
    if (progress->drawn_at != 0) fputs("\r\033[K", stderr);
    progress->started_at = progress->drawn_at = 0;
}
