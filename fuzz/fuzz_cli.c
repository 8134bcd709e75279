/* Command lines: whatever is typed, cli_parse either fills a table within its kinds' promises or says what is wrong and asks for exit
 * status 2 (0 after --help). Input: arguments, one a line. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../cli/cli.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_ARGS = 40 };

static void must(bool truth) {
    if (!truth) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bool quiet;
    if (!quiet) quiet = freopen("/dev/null", "w", stdout) && freopen("/dev/null", "w", stderr);
    char *text = malloc(size + 1), *argv[MAX_ARGS + 2] = {(char *)"fuzz"};
    int argc = 1;
    memcpy(text, data, size);
    text[size] = '\0';
    for (char *line = text; argc <= MAX_ARGS && line;) {
        argv[argc++] = line;
        if ((line = strchr(line, '\n'))) *line++ = '\0';
    }
    argv[argc] = NULL;

    bool flag = false;
    const char *name = NULL, *operands[2] = {NULL, NULL};
    size_t count = CLI_UNSET, short_count = CLI_UNSET;
    double number = 1;
    struct cli_common common = {0};
    const struct cli_option options[] = {
        {"flag", CLI_FLAG, &flag, NULL, "a flag"},        {"name", CLI_TEXT, &name, "TEXT", "a text"},
        {"count", CLI_SIZE, &count, "N", "a size"},       {"n", CLI_SIZE, &short_count, "N", "a size, one letter"},
        {"number", CLI_NUMBER, &number, "X", "a number"}, CLI_COMMON_OPTIONS(&common),
    };
    const struct cli_usage usage = {"A B", "For the fuzzer.", options, sizeof options / sizeof *options, "moe4 fuzz a b\n"};
    int status = -1;
    if (cli_parse(argc, argv, &usage, operands, 2, &status)) {
        must(operands[0] && operands[1]);
        must(!name || *name);
        must(!common.isa || *common.isa);
        must(isfinite(number) && number >= 0);
    } else {
        must(status == CLI_FINE || status == CLI_BAD_USAGE);
    }
    free(text);
    return 0;
}
