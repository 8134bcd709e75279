/* What every command shares: options, errors, a context, numbers, progress. A command is one function in cmd_NAME.c and one row of the
 * table in moe4.c. Nothing here sees more of the library than moe4.h.
 *
 * Results go to standard output: a table for people, or with --json exactly one object. Everything else goes to standard error, errors
 * as `moe4: what: why`. */
#ifndef MOE4_CLI_H
#define MOE4_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "moe4.h"

/* Exit statuses, the same for every command. */
enum { CLI_FINE = 0, CLI_BAD_DATA = 1, CLI_BAD_USAGE = 2 };

struct cli_command {
    const char *name, *summary;
    int (*run)(int argc, char **argv); /* argv[0] is the command's name; returns an exit status */
};

int cmd_inspect(int argc, char **argv);
int cmd_verify(int argc, char **argv);
int cmd_run(int argc, char **argv);
int cmd_eval(int argc, char **argv);
int cmd_generate(int argc, char **argv);
int cmd_bench(int argc, char **argv);
int cmd_quantize(int argc, char **argv);
int cmd_compare(int argc, char **argv);

/* ---- options ---- */

#define CLI_UNSET SIZE_MAX /* the usual start of a CLI_SIZE that has no default */

enum cli_kind {
    CLI_FLAG,  /* bool: true when given */
    CLI_TEXT,  /* const char *: not empty */
    CLI_LIST,  /* struct cli_list: texts, not empty; the option may be given several times */
    CLI_SIZE,  /* size_t: decimal digits only, below CLI_UNSET */
    CLI_NUMBER /* double: finite, not negative */
};

enum { CLI_MAX_LIST = 64 };
struct cli_list {
    const char *items[CLI_MAX_LIST];
    size_t n;
};

struct cli_option {
    const char *name; /* without the dashes; one of a single letter has one dash */
    enum cli_kind kind;
    void *to;
    const char *arg, *help; /* arg: what --help calls the argument; NULL for a flag */
};

struct cli_usage {
    const char *synopsis; /* "MODEL [--layer L]": what follows "moe4 NAME" */
    const char *about;    /* sentences; each line as printed */
    const struct cli_option *options;
    size_t n_options;
    const char *examples; /* each line as printed, without indentation */
};

/* Reads argv. operands[n_operands] gets what is not an option; fewer or more is an error. --help and -h are understood everywhere,
 * and what describe.h asks. Returns false when the command is over (help printed, wrong usage) and *exit_ret its status. */
bool cli_parse(int argc, char **argv, const struct cli_usage *usage, const char **operands, size_t n_operands, int *exit_ret);

/* The options every command has; put CLI_COMMON_OPTIONS(&common) last in the table. */
struct cli_common {
    size_t n_threads; /* 0: the library chooses */
    const char *isa;  /* NULL: the library chooses */
    bool json;
    const char *device; /* of the commands that take --device; NULL: the CPU */
    const char *cache;  /* of the commands that take --cache; NULL: none */
};
/* --device names something other than the CPU. */
bool cli_on_device(const struct cli_common *common);
#define CLI_DEVICE_OPTION(c) \
    { "device", CLI_TEXT, &(c)->device, "DEVICE", "cpu (default), cuda or cuda:N" }
#define CLI_CACHE_OPTION(c) \
    { "cache", CLI_TEXT, &(c)->cache, "FOLDER", "keep packed weights in FOLDER, and map them from there the next time" }
#define CLI_COMMON_OPTIONS(c)                                                                                           \
    {"threads", CLI_SIZE, &(c)->n_threads, "N", "use N threads (all that this process may use)"},                       \
        {"isa", CLI_TEXT, &(c)->isa, "NAME", "use this instruction set, such as scalar or avx2 (the best there is)"}, { \
        "json", CLI_FLAG, &(c)->json, NULL, "print one JSON object instead of a table"                                  \
    }

/* ---- errors ---- */

/* Prints "moe4: what: why" and returns `status`. */
int cli_error(int status, const char *what, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* The same for a failed library call: why is moe4_ctx_error(ctx), or `status` in words when that is empty. A refused argument is wrong
 * usage, everything else wrong data. */
int cli_fail(const moe4_ctx *ctx, moe4_status status, const char *what);

/* ---- library ---- */

/* A context as --threads and --isa ask. CLI_FINE, or an exit status with the error printed and *ctx_ret NULL. */
int cli_open_ctx(moe4_ctx **ctx_ret, const struct cli_common *common);

/* ---- output ---- */

/* Prints `object` and a newline, and releases it. NULL (out of memory while it was made) is an error. Returns an exit status. */
int cli_print_json(json_t *object);
/* A JSON string of text that may not be UTF-8 (a path, a sentence cut short): then with '?' for every byte above 127. */
json_t *cli_json_text(const char *text);
/* "10.7 MB", decimal units. Returns `text`. */
const char *cli_bytes(char text[static 24], uint64_t bytes);
double cli_seconds(void); /* a monotonic clock */

/* A bar on standard error with the rate and the time left, drawn ten times a second at most and only on a terminal. Zero it, name it,
 * finish it. */
struct cli_progress {
    const char *what;
    double started_at; /* 0: nothing shown yet */
    double drawn_at;   /* 0: nothing drawn */
};
void cli_progress_show(struct cli_progress *progress, uint64_t done, uint64_t total);
void cli_progress_finish(struct cli_progress *progress);

#endif
