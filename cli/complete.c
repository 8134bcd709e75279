/* What bash and zsh complete. */
#include <stdio.h>
#include <string.h>

#include "describe.h"

/* What an argument may be, by what --help calls it: words, a file (NULL), or anything else ("", nothing to offer). */
static const char *words_of(const char *arg) {
    static const struct {
        const char *arg, *words;
    } known[] = {
        {"MODE,...", "w4a16 static tensor token"},
        {"MODE", "w4a16 static tensor token bf16"},
        {"NAME", "scalar avx2 avx512vnni avx512bf16 neon neondot neoni8mm"},
        {"NAME|H,I,E,K", "v4-pro v4-flash qwen3-30b"},
        {"DTYPE", "bf16 f32"},
        {"DEVICE", "cpu cuda"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(arg, known[i].arg) == 0) return known[i].words;
    return strncmp(arg, "FILE", 4) == 0 ? NULL : "";
}

void cli_bash_command(const char *command, const struct cli_usage *usage, size_t n_operands) {
    printf("    %s)\n        operand=%s\n        options='", command, n_operands ? "file" : "");
    for (size_t i = 0; i < usage->n_options; i++) printf("%s%s ", cli_dashes(&usage->options[i]), usage->options[i].name);
    puts("--help'\n        case $before in");
    for (size_t i = 0; i < usage->n_options; i++) {
        const struct cli_option *o = &usage->options[i];
        if (!o->arg) continue;
        const char *words = words_of(o->arg);
        printf("        %s%s) kind=%s words='%s' ;;\n", cli_dashes(o), o->name, words ? "words" : "file", words ? words : "");
    }
    puts("        esac\n        ;;");
}

/* ---- bash ---- */

void cli_bash_begin(const struct cli_command *commands) {
    puts("# bash completion for moe4, printed by moe4 --completion bash\n"
         "_moe4() {\n"
         "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}\n"
         "    local kind= words= options= operand=\n"
         "    # --option=value arrives as three words\n"
         "    if [ \"$word\" = = ]; then\n"
         "        word=\n"
         "    elif [ \"$before\" = = ]; then\n"
         "        before=${COMP_WORDS[COMP_CWORD - 2]}\n"
         "    fi\n"
         "    COMPREPLY=()\n"
         "    if [ \"$COMP_CWORD\" -eq 1 ]; then");
    fputs("        COMPREPLY=($(compgen -W '", stdout);
    for (const struct cli_command *c = commands; c->name; c++) printf("%s ", c->name);
    puts("--help --version --man --completion' -- \"$word\"))\n"
         "        return\n"
         "    fi\n"
         "    case ${COMP_WORDS[1]} in\n"
         "    --completion) kind=words words='bash zsh' ;;");
}

void cli_bash_end(void) {
    puts("    esac\n"
         "    if [ -z \"$kind\" ]; then\n"
         "        case $word in\n"
         "        -*) kind=words words=$options ;;\n"
         "        *) kind=$operand ;;\n"
         "        esac\n"
         "    fi\n"
         "    case $kind in\n"
         "    words) COMPREPLY=($(compgen -W \"$words\" -- \"$word\")) ;;\n"
         "    file)\n"
         "        compopt -o filenames 2>/dev/null\n"
         "        local IFS=$'\\n'\n"
         "        COMPREPLY=($(compgen -f -- \"$word\"))\n"
         "        ;;\n"
         "    esac\n"
         "}\n"
         "complete -F _moe4 moe4");
}

/* ---- zsh ---- */

/* Inside single quotes, where _arguments and _describe read colons and brackets. */
static void zsh_text(const char *text) {
    for (; *text; text++) {
        if (*text == '\'') fputs("'\\'", stdout);
        if (strchr("\\[]:", *text)) putchar('\\');
        putchar(*text == '\n' ? ' ' : *text);
    }
}

void cli_zsh_begin(const struct cli_command *commands) {
    puts("#compdef moe4\n# zsh completion for moe4, printed by moe4 --completion zsh\n"
         "_moe4() {\n"
         "    local state line\n"
         "    local -a commands=(");
    for (const struct cli_command *c = commands; c->name; c++) {
        printf("        '%s:", c->name);
        zsh_text(c->summary);
        puts("'");
    }
    puts("    )\n"
         "    _arguments -C \\\n"
         "        '(- *)--help[list the commands]' \\\n"
         "        '(- *)--version[print the version]' \\\n"
         "        '(- *)--man[print the manual page]' \\\n"
         "        '(- *)--completion[print what a shell completes]:shell:(bash zsh)' \\\n"
         "        '1:command:->command' \\\n"
         "        '*::argument:->arguments'\n"
         "    case $state in\n"
         "    command) _describe command commands ;;\n"
         "    arguments)\n"
         "        case $words[1] in");
}

void cli_zsh_command(const char *command, const struct cli_usage *usage, size_t n_operands) {
    printf("        %s)\n            _arguments \\\n", command);
    for (size_t i = 0; i < usage->n_options; i++) {
        const struct cli_option *o = &usage->options[i];
        printf("                '%s%s%s[", cli_dashes(o), o->name, !o->arg ? "" : cli_is_short(o) ? "+" : "=");
        zsh_text(o->help);
        putchar(']');
        if (o->arg) {
            const char *words = words_of(o->arg);
            putchar(':');
            zsh_text(o->arg);
            printf(!words ? ":_files" : *words ? ":(%s)" : ": ", words);
        }
        puts("' \\");
    }
    if (n_operands) puts("                '1:MODEL:_files' \\");
    puts("                '--help[explain this command]'\n            ;;");
}

void cli_zsh_end(void) {
    puts("        esac\n        ;;\n    esac\n}\n_moe4 \"$@\"");
}
