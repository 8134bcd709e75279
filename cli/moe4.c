/* The command-line program: a table of commands. What each does is its cmd_NAME.c. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "cli.h"
#include "describe.h"

static const struct cli_command commands[] = {
    {"inspect", "say what a checkpoint is and what its scales are like", cmd_inspect},
    {"verify", "list every problem of a checkpoint", cmd_verify},
    {"run", "run one layer on stored activations", cmd_run},
    {"eval", "measure a model's bits per byte on a text", cmd_eval},
    {"generate", "continue a text with a model", cmd_generate},
    {"bench", "time a layer beside what the machine can do", cmd_bench},
    {"quantize", "make an NVFP4 checkpoint from an unquantized one", cmd_quantize},
    {"compare", "say what quantizing cost, matrix by matrix", cmd_compare},
    {NULL, NULL, NULL},
};

static void print_usage(FILE *to) {
    fprintf(to, "Usage: moe4 COMMAND ...\n\n" CLI_ABOUT "\n\nCommands:\n");
    for (const struct cli_command *c = commands; c->name; c++) fprintf(to, "  %-10s %s\n", c->name, c->summary);
    fprintf(to, "\nmoe4 COMMAND --help explains a command, with examples; moe4 --version prints the version,\n"
                "moe4 --man the manual page, moe4 --completion bash|zsh what a shell completes.\n");
}

static int run(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "";
    for (const struct cli_command *c = commands; c->name; c++)
        if (strcmp(name, c->name) == 0) return c->run(argc - 1, argv + 1);
    if (strcmp(name, "--version") == 0) {
        printf("moe4 %s\n", moe4_version());
        return CLI_FINE;
    }
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
        print_usage(stdout);
        return CLI_FINE;
    }
    if (strcmp(name, "--man") == 0) {
        cli_describe("man", commands);
        return CLI_FINE;
    }
    if (strcmp(name, "--completion") == 0) {
        const char *shell = argc > 2 ? argv[2] : "";
        bool known = (strcmp(shell, "bash") == 0 || strcmp(shell, "zsh") == 0) && cli_describe(shell, commands);
        return known ? CLI_FINE : cli_error(CLI_BAD_USAGE, name, "needs bash or zsh");
    }
    if (*name) return cli_error(CLI_BAD_USAGE, name, "unknown command (see moe4 --help)");
    print_usage(stderr);
    return CLI_BAD_USAGE;
}

int main(int argc, char **argv) {
    int status = run(argc, argv);
    errno = 0;
    int failed = fflush(stdout) != 0 || ferror(stdout); /* a full disk shows here at the latest */
    return failed ? cli_error(CLI_BAD_DATA, "standard output", "%s", errno ? strerror(errno) : "cannot be written") : status;
}
