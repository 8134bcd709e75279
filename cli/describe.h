/* A command's options in words, all from its cli_usage: --help, and its part of the manual page and of what shells complete. */
#ifndef MOE4_DESCRIBE_H
#define MOE4_DESCRIBE_H

#include "cli.h"

#define CLI_ABOUT "Runs NVFP4 checkpoints' linear and mixture-of-experts layers."
#define CLI_EXIT_STATUS "0 fine, 1 the data is wrong, 2 wrong usage."

bool cli_is_short(const struct cli_option *option); /* of one letter, with one dash */
const char *cli_dashes(const struct cli_option *option);

void cli_help(const char *command, const struct cli_usage *usage);

/* The manual page ("man") or a completion script ("bash", "zsh") for the whole program. cli_describe prints the frame and asks every
 * command for its part by running it with CLI_DESCRIBE "man" alone; cli_parse answers with cli_describe_command. The tables stay where
 * the options are read. Both return false, having printed nothing, when `as` is none of these. */
#define CLI_DESCRIBE "--describe="
bool cli_describe(const char *as, const struct cli_command *commands);
bool cli_describe_command(const char *as, const char *command, const struct cli_usage *usage, size_t n_operands);

/* complete.c: what describe.c puts together. */
void cli_bash_begin(const struct cli_command *commands);
void cli_bash_command(const char *command, const struct cli_usage *usage, size_t n_operands);
void cli_bash_end(void);
void cli_zsh_begin(const struct cli_command *commands);
void cli_zsh_command(const char *command, const struct cli_usage *usage, size_t n_operands);
void cli_zsh_end(void);

#endif
