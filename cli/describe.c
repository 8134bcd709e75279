#include "describe.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

bool cli_is_short(const struct cli_option *option) {
    return option->name[1] == '\0';
}

const char *cli_dashes(const struct cli_option *option) {
    return cli_is_short(option) ? "-" : "--";
}

/* The line at `text` without its end, as printf's %.*s takes it; *next_ret is the line after it. */
static int line_length(const char *text, const char **next_ret) {
    size_t n = strcspn(text, "\n");
    *next_ret = text + n + (text[n] == '\n');
    return (int)n;
}

/* ---- help ---- */

void cli_help(const char *command, const struct cli_usage *usage) {
    printf("Usage: moe4 %s %s\n\n%s\n\nOptions:\n", command, usage->synopsis, usage->about);
    for (size_t i = 0; i < usage->n_options; i++) {
        const struct cli_option *o = &usage->options[i];
        char left[64];
        snprintf(left, sizeof left, "%s%s%s%s", cli_dashes(o), o->name, o->arg ? " " : "", o->arg ? o->arg : "");
        printf("  %-24s %s\n", left, o->help);
    }
    printf("  %-24s %s\n\nExamples:\n", "--help", "print this");
    for (const char *line = usage->examples, *next; *line; line = next) {
        int n = line_length(line, &next);
        printf("  %.*s\n", n, line);
    }
    printf("\nExit status: " CLI_EXIT_STATUS "\n");
}

/* ---- the manual page ---- */

/* Text as roff reads it: what it would take for its own is escaped, and a dash is the one people type. */
static void man_text(const char *text, size_t n) {
    for (size_t i = 0; i < n; i++) switch (text[i]) {
        case '\\': fputs("\\e", stdout); break;
        case '-': fputs("\\-", stdout); break;
        case '\'': fputs(i == 0 ? "\\&\\(aq" : "\\(aq", stdout); break;
        case '.': fputs(i == 0 ? "\\&." : ".", stdout); break;
        case '"': fputs("\\(dq", stdout); break;
        case '^': fputs("\\(ha", stdout); break;
        case '~': fputs("\\(ti", stdout); break;
        case '`': fputs("\\(ga", stdout); break;
        default: putchar(text[i]);
        }
}

/* What to type: words with a dash in bold, words of capitals, which stand for something, in italics. */
static void man_syntax(const char *text) {
    while (*text) {
        size_t n = 1;
        const char *font = "R";
        if (*text == '-') {
            font = "B";
            while (isalnum((unsigned char)text[n]) || text[n] == '-') n++;
        } else if (isupper((unsigned char)*text)) {
            font = "I";
            while (isupper((unsigned char)text[n])) n++;
        }
        if (*font != 'R') printf("\\f%s", font);
        man_text(text, n);
        if (*font != 'R') fputs("\\fR", stdout);
        text += n;
    }
    putchar('\n');
}

static void man_lines(const char *text) {
    for (const char *line = text, *next; *line; line = next) {
        size_t n = (size_t)line_length(line, &next);
        man_text(line, n);
        putchar('\n');
    }
}

static void man_command(const char *command, const struct cli_usage *usage, size_t n_operands) {
    (void)n_operands; /* the synopsis says it in words */
    printf(".SS moe4 %s\n.B moe4 %s\n", command, command);
    man_syntax(usage->synopsis);
    puts(".PP");
    man_lines(usage->about);
    for (size_t i = 0; i < usage->n_options; i++) {
        const struct cli_option *o = &usage->options[i];
        fputs(".TP\n\\fB", stdout);
        man_text(cli_dashes(o), strlen(cli_dashes(o)));
        man_text(o->name, strlen(o->name));
        printf("\\fR%s", o->arg ? " " : "");
        man_syntax(o->arg ? o->arg : "");
        man_lines(o->help);
    }
    puts(".PP\nExamples:\n.PP\n.RS 4\n.nf");
    man_lines(usage->examples);
    puts(".fi\n.RE");
}

static void man_begin(const struct cli_command *commands) {
    printf(".\\\" Printed by moe4 \\-\\-man from the tables that \\-\\-help is printed from.\n"
           ".TH MOE4 1 \"\" \"moe4 %s\" \"User Commands\"\n"
           ".SH NAME\nmoe4 \\- run 4\\-bit (NVFP4) linear and mixture\\-of\\-experts layers\n"
           ".SH SYNOPSIS\n.B moe4\n\\fICOMMAND\\fR\\ ...\n"
           ".br\n.B moe4 \\-\\-help\n.br\n.B moe4 \\-\\-version\n.br\n.B moe4 \\-\\-man\n"
           ".br\n.B moe4 \\-\\-completion\n\\fBbash\\fR|\\fBzsh\\fR\n.SH DESCRIPTION\n",
           moe4_version());
    man_lines(CLI_ABOUT);
    puts("Results go to standard output, as a table for people or with\n.B \\-\\-json\nas exactly one object.\n"
         "Everything else goes to standard error, errors as one line that names the thing.\n"
         "Every command prints its own help with\n.BR \\-\\-help ;\n"
         ".B moe4 \\-\\-man\nprints this page,\n.B moe4 \\-\\-completion\nwhat a shell completes.\n.SH COMMANDS");
    for (const struct cli_command *c = commands; c->name; c++) {
        printf(".TP\n.B %s\n", c->name);
        man_lines(c->summary);
    }
}

static void man_end(void) {
    puts(".SH EXIT STATUS");
    man_lines(CLI_EXIT_STATUS);
}

/* ---- the whole program ---- */

static const struct describer {
    const char *as;
    void (*begin)(const struct cli_command *commands);
    void (*command)(const char *command, const struct cli_usage *usage, size_t n_operands);
    void (*end)(void);
} describers[] = {
    {"man", man_begin, man_command, man_end},
    {"bash", cli_bash_begin, cli_bash_command, cli_bash_end},
    {"zsh", cli_zsh_begin, cli_zsh_command, cli_zsh_end},
};

static const struct describer *find_describer(const char *as) {
    for (size_t i = 0; i < sizeof describers / sizeof *describers; i++)
        if (strcmp(as, describers[i].as) == 0) return &describers[i];
    return NULL;
}

bool cli_describe(const char *as, const struct cli_command *commands) {
    const struct describer *d = find_describer(as);
    if (!d) return false;
    char option[sizeof CLI_DESCRIBE + 8];
    snprintf(option, sizeof option, CLI_DESCRIBE "%s", d->as);
    d->begin(commands);
    for (const struct cli_command *c = commands; c->name; c++) {
        char name[32];
        snprintf(name, sizeof name, "%s", c->name);
        c->run(2, (char *[]){name, option, NULL});
    }
    d->end();
    return true;
}

bool cli_describe_command(const char *as, const char *command, const struct cli_usage *usage, size_t n_operands) {
    const struct describer *d = find_describer(as);
    if (d) d->command(command, usage, n_operands);
    return d != NULL;
}
