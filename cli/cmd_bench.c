/* moe4 bench: a synthetic layer's speed, each figure beside the floor that the machine set in the same run. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

static const struct bench_shape presets[] = {
    {"v4-pro", 7168, 3072, 48, 6},
    {"v4-flash", 4096, 2048, 32, 6},
    {"qwen3-30b", 2048, 768, 128, 8},
};
enum { N_PRESETS = sizeof presets / sizeof *presets, MAX_LIST = 16, MAX_ACTS = 4 };

struct args {
    struct bench_shape shape;
    moe4_act acts[MAX_ACTS];
    size_t n_acts, tokens[MAX_LIST], n_tokens, threads[MAX_LIST], n_threads;
    double seconds;
    const char *csv, *act;
    bool cpu_time, explain;
    struct cli_common common;
};

/* ---- options ---- */

/* Numbers of at least 1 between commas; their count, or 0 when text is something else. */
static size_t read_list(size_t list[MAX_LIST], const char *text) {
    size_t n = 0;
    for (const char *at = text; n < MAX_LIST; at++) {
        char *end;
        errno = 0;
        if (*at < '0' || *at > '9') return 0;
        const unsigned long long v = strtoull(at, &end, 10);
        if (errno || v == 0 || v > 1u << 30) return 0;
        list[n++] = (size_t)v;
        if (*end == '\0') return n;
        if (*end != ',') return 0;
        at = end;
    }
    return 0;
}

/* Modes between commas; their count, or 0 when one is none of NVFP4's. */
static size_t read_acts(moe4_act acts[MAX_ACTS], const char *text) {
    for (size_t n = 0; n < MAX_ACTS; n++) {
        const size_t length = strcspn(text, ",");
        char name[16];
        if (length >= sizeof name) return 0;
        snprintf(name, sizeof name, "%.*s", (int)length, text);
        if (moe4_act_from_name(&acts[n], name) != MOE4_OK || acts[n] == MOE4_ACT_BF16) return 0;
        if (!text[length]) return n + 1;
        text += length + 1;
    }
    return 0;
}

static bool read_shape(struct bench_shape *shape, const char *text) {
    size_t list[MAX_LIST];
    for (int i = 0; i < N_PRESETS; i++)
        if (strcmp(text, presets[i].name) == 0) {
            *shape = presets[i];
            return true;
        }
    if (read_list(list, text) != 4 || list[0] % MOE4_BLOCK || list[1] % MOE4_BLOCK || list[3] > list[2]) return false;
    *shape = (struct bench_shape){text, list[0], list[1], list[2], list[3]};
    return true;
}

static bool read_args(struct args *a, int argc, char **argv, int *exit_ret) {
    const char *shape = "v4-flash", *tokens = "1,8,64", *threads = NULL;
    a->seconds = 2;
    const struct cli_option options[] = {
        {"shape", CLI_TEXT, &shape, "NAME|H,I,E,K", "a preset, or hidden, intermediate, experts, experts a token (v4-flash)"},
        {"tokens", CLI_TEXT, &tokens, "T,...", "batches to time (1,8,64)"},
        {"act", CLI_TEXT, &a->act, "MODE,...", "w4a16, static, tensor or token (default)"},
        {"threads", CLI_TEXT, &threads, "N,...", "thread counts, sampled in turn (all that this process may use)"},
        {"isa", CLI_TEXT, &a->common.isa, "NAME", "use this instruction set, such as scalar or avx2 (the best there is)"},
        {"seconds", CLI_NUMBER, &a->seconds, "S", "time for each batch (2)"},
        {"cpu-time", CLI_FLAG, &a->cpu_time, NULL,
         "count CPU time, not the clock's, for a machine that others use; with --threads 1, and no stages"},
        CLI_DEVICE_OPTION(&a->common),
        {"csv", CLI_TEXT, &a->csv, "FILE", "write every figure to FILE"},
        {"explain", CLI_FLAG, &a->explain, NULL, "show every stage, and say what the columns mean"},
        {"json", CLI_FLAG, &a->common.json, NULL, "print one JSON object instead of a table"},
    };
    const struct cli_usage usage = {
        .synopsis = "[options]",
        .about = "Times one mixture-of-experts layer with random weights. Each token picks its experts uniformly. The floor of a\n"
                 "figure is the larger of two times measured in the same run: reading the weights of the experts that were\n"
                 "hit at the machine's read bandwidth, and the products' multiply-adds at the rate of their inner step alone\n"
                 "(on a device: at that of a large bf16 product by cuBLAS, where that is found).\n"
                 "Presets: v4-pro 7168,3072,48,6; v4-flash 4096,2048,32,6; qwen3-30b 2048,768,128,8.",
        .options = options,
        .n_options = sizeof options / sizeof *options,
        .examples = "moe4 bench\n"
                    "moe4 bench --shape 7168,3072,8,6 --tokens 1,4,16,256 --threads 1,2 --explain\n"
                    "moe4 bench --shape qwen3-30b --tokens 64,256 --act w4a16 --csv qwen3.csv\n"
                    "moe4 bench --device cuda --shape v4-pro --tokens 1,8,64 --act w4a16,token",
    };
    if (!cli_parse(argc, argv, &usage, NULL, 0, exit_ret)) return false;
    *exit_ret = CLI_FINE;
    a->n_tokens = read_list(a->tokens, tokens);
    a->n_threads = threads ? read_list(a->threads, threads) : 1;
    a->n_acts = a->act ? read_acts(a->acts, a->act) : 1;
    a->common.n_threads = a->threads[0];
    if (!read_shape(&a->shape, shape))
        *exit_ret = cli_error(CLI_BAD_USAGE, "--shape", "\"%s\" is no preset, nor H,I,E,K with H and I multiples of %d and K <= E", shape,
                              MOE4_BLOCK);
    else if (a->n_tokens == 0)
        *exit_ret = cli_error(CLI_BAD_USAGE, "--tokens", "\"%s\" is not a list of at most %d numbers above 0", tokens, MAX_LIST);
    else if (a->n_threads == 0)
        *exit_ret = cli_error(CLI_BAD_USAGE, "--threads", "\"%s\" is not a list of at most %d numbers above 0", threads, MAX_LIST);
    else if (a->n_acts == 0)
        *exit_ret =
            cli_error(CLI_BAD_USAGE, "--act", "\"%s\" is not a list of at most %d of w4a16, static, tensor, token", a->act, MAX_ACTS);
    else if (cli_on_device(&a->common) && (a->cpu_time || a->n_threads > 1))
        *exit_ret =
            cli_error(CLI_BAD_USAGE, a->cpu_time ? "--cpu-time" : "--threads", "is for the CPU, not for --device %s", a->common.device);
    for (size_t i = 0; *exit_ret == CLI_FINE && a->cpu_time && i < a->n_threads; i++)
        if (a->threads[i] != 1)
            *exit_ret =
                cli_error(CLI_BAD_USAGE, "--cpu-time", "is for --threads 1: more of them use the CPU while they wait for work, too");
    return *exit_ret == CLI_FINE;
}

/* ---- output ---- */

struct output {
    const struct args *args;
    FILE *csv;
    json_t *rows;
    moe4_act act;     /* of the layer at hand, as is what follows */
    char isa[32];     /* on a device: "cuda:0" */
    char device[256]; /* "NVIDIA H200"; "" on the CPU */
    const char *step; /* what bounds arithmetic; NULL: not known */
};

static void print_header(const struct output *o, const struct bench_pack *packs) {
    const struct args *a = o->args;
    const struct bench_shape *s = &a->shape;
    if (a->common.json) return;
    printf("%s: hidden %zu, intermediate %zu, %zu experts, top %zu; %s on %s%s%s\n", s->name, s->hidden, s->intermediate, s->n_experts,
           s->top_k, moe4_act_name(o->act), o->isa, *o->device ? ", " : "", o->device);
    for (size_t i = 0; i < a->n_threads; i++)
        if (packs[i].again > 0)
            printf(
                "prepared at %.1f GB/s read and written into new memory, of which the system clears %.1f GB/s (%.2f of the rate of both\n"
                "one after the other); at %.1f into the same again, %.2f of read bandwidth\n",
                packs[i].fresh / 1e9, packs[i].pages / 1e9, packs[i].fresh * (0.5 / packs[i].pages + 1 / packs[i].again),
                packs[i].again / 1e9, packs[i].again / packs[i].read);
        else
            printf("prepared at %.1f GB/s read and written\n", packs[i].fresh / 1e9);
    printf("\n%6s %7s  %-9s %10s %10s %9s %8s %10s  %-10s %6s\n", "tokens", "threads", "what", "median ms", "best ms", "GMAC/s", "GB/s",
           "floor ms", "bound by", "share");
}

static void print_explanation(const struct output *o) {
    printf("\nmedian, best   over the samples of this run\n"
           "GMAC/s, GB/s   useful multiply-adds, and weight bytes of the experts hit, by the median time\n");
    if (*o->device)
        printf("sample         many calls queued one behind the other, with %d routings and inputs in turn, by the clock;\n"
               "               a pause between samples\n"
               "floor          max(bytes / read bandwidth, multiply-adds / ceiling), measured before the samples;\n"
               "               ceiling: %s\n"
               "tiles          passes over an expert's weights x the slots that share one; which kernel takes an expert is\n"
               "               decided on the device, by its slots\n",
               BENCH_ROUTINGS, o->step ? o->step : "not known, as cuBLAS is not found: only memory counts");
    else
        printf("floor          max(bytes / read bandwidth, multiply-adds / ceiling), both measured just before each sample of\n"
               "               the layer; ceiling: %s\n",
               o->step ? o->step : "not known for this ISA, so only memory counts");
    printf("share          floor / time: 1.00 is what the machine can do\n");
}

static void put_figure(const struct output *o, const struct bench_result *r, int what) {
    const struct args *a = o->args;
    const struct bench_figure *f = &r->figure[what];
    const bool product = f->floor_seconds > 0;
    const double part = what == BENCH_GATE_UP ? 2. / 3 : what == BENCH_DOWN ? 1. / 3 : product ? 1 : 0;
    const double macs = part * r->macs / f->seconds, bytes = part * r->bytes / f->seconds;
    const char *bound = !product ? "" : f->by_memory ? "memory" : "arithmetic";
    if (!a->common.json && (a->explain || what <= BENCH_PRODUCTS)) {
        printf("%6zu %7zu  %-9s %10.4f %10.4f ", r->n_tokens, r->n_threads, bench_what_name((enum bench_what)what), f->seconds * 1e3,
               f->best_seconds * 1e3);
        if (product)
            printf("%9.2f %8.2f %10.4f  %-10s %6.3f\n", macs / 1e9, bytes / 1e9, f->floor_seconds * 1e3, bound, f->share);
        else
            printf("\n");
    }
    if (o->csv)
        fprintf(o->csv, "\"%s\",%zu,%zu,%zu,%zu,%s,%s,%zu,%zu,%s,%zu,%.9f,%.9f,%.3f,%.3f,%.9f,%s,%.4f,%.3f,%.3f,%.4f\n", a->shape.name,
                a->shape.hidden, a->shape.intermediate, a->shape.n_experts, a->shape.top_k, moe4_act_name(o->act), o->isa, r->n_threads,
                r->n_tokens, bench_what_name((enum bench_what)what), r->n_samples, f->seconds, f->best_seconds, macs / 1e9, bytes / 1e9,
                f->floor_seconds, bound, f->share, r->read_bytes / 1e9, r->ceiling_macs / 1e9, r->speedup);
    if (o->rows)
        json_array_append_new(o->rows, json_pack("{ss sI sI ss sI sf sf sf sf sf ss sf sf sf sf}", "act", moe4_act_name(o->act), "tokens",
                                                 (json_int_t)r->n_tokens, "threads", (json_int_t)r->n_threads, "what",
                                                 bench_what_name((enum bench_what)what), "samples", (json_int_t)r->n_samples, "median_s",
                                                 f->seconds, "best_s", f->best_seconds, "gmac_s", macs / 1e9, "gb_s", bytes / 1e9,
                                                 "floor_s", f->floor_seconds, "bound", bound, "share", f->share, "read_gb_s",
                                                 r->read_bytes / 1e9, "ceiling_gmac_s", r->ceiling_macs / 1e9, "speedup", r->speedup));
}

static void put_result(const struct output *o, const struct bench_result *r) {
    const int n_whats = o->args->cpu_time || *o->device ? BENCH_LAYER + 1 : N_BENCH_WHATS;
    for (int what = 0; what < n_whats; what++) put_figure(o, r, what);
    if (!o->args->common.json && r->n_threads != o->args->threads[0] && r->speedup > 0)
        printf("%6s %7s  %.2f times the rate of %zu thread%s\n", "", "", r->speedup, o->args->threads[0],
               o->args->threads[0] == 1 ? "" : "s");
    if (!o->args->common.json && o->args->explain)
        printf("%6s %7s  read %.2f GB/s, ceiling %.2f GMAC/s, %zu samples, kernels %s\n", "", "", r->read_bytes / 1e9,
               r->ceiling_macs / 1e9, r->n_samples, r->kernels);
    if (!o->args->common.json) fflush(stdout);
}

/* What is measured: the one or the other. */
struct measured {
    struct bench *cpu;
    struct bench_device *device;
    struct bench_pack packs[MAX_LIST];
};

static int open_measured(struct measured *m, const struct args *a, moe4_act act) {
    *m = (struct measured){.cpu = NULL};
    if (cli_on_device(&a->common)) return bench_device_open(&m->device, &a->shape, act, &a->common, &m->packs->fresh);
    return bench_open(&m->cpu, &a->shape, act, a->threads, a->n_threads, a->common.isa, a->cpu_time, m->packs);
}

static void name_measured(struct output *o, const struct measured *m) {
    snprintf(o->isa, sizeof o->isa, "%s", m->device ? bench_device_where(m->device) : bench_isa(m->cpu));
    snprintf(o->device, sizeof o->device, "%s", m->device ? bench_device_name(m->device) : "");
    o->act = m->device ? bench_device_act(m->device) : bench_act(m->cpu);
    o->step = m->device ? bench_device_step(m->device) : bench_step(m->cpu);
}

static int measure(const struct args *a, const struct measured *m, const struct output *o) {
    struct bench_result results[MAX_LIST];
    for (size_t i = 0; i < a->n_tokens; i++) {
        int exit_status = m->device ? bench_device_measure(m->device, results, a->tokens[i], a->seconds)
                                    : bench_measure(m->cpu, results, a->tokens[i], a->seconds);
        if (exit_status != CLI_FINE) return exit_status;
        for (size_t j = 0; j < a->n_threads; j++) put_result(o, &results[j]);
        if (m->device && a->explain && !a->common.json) bench_device_explain(m->device);
    }
    return CLI_FINE;
}

/* One mode: a layer of its own. */
static int run(const struct args *a, struct output *o, size_t i) {
    struct measured m;
    int exit_status = open_measured(&m, a, a->acts[i]);
    if (exit_status == CLI_FINE) {
        name_measured(o, &m);
        if (i > 0 && !a->common.json) putchar('\n');
        print_header(o, m.packs);
        exit_status = measure(a, &m, o);
    }
    bench_close(m.cpu);
    bench_device_close(m.device);
    return exit_status;
}

static json_t *results_json(const struct output *o, const char *acts) {
    const bool one = o->args->n_acts == 1;
    return json_pack("{ss ss ss ss* ss* sO}", "shape", o->args->shape.name, "act", one ? moe4_act_name(o->act) : acts, "isa", o->isa,
                     "device", *o->device ? o->device : NULL, "step", one ? o->step : NULL, "figures", o->rows);
}

int cmd_bench(int argc, char **argv) {
    struct args args = {.n_threads = 0};
    struct output o = {.args = &args};
    int exit_status;
    if (!read_args(&args, argc, argv, &exit_status)) return exit_status;
    if (args.csv && !(o.csv = fopen(args.csv, "w"))) return cli_error(CLI_BAD_DATA, args.csv, "%s", strerror(errno));
    if (o.csv)
        fprintf(o.csv, "shape,hidden,intermediate,experts,top_k,act,isa,threads,tokens,what,samples,median_s,best_s,gmac_s,gb_s,"
                       "floor_s,bound,share,read_gb_s,ceiling_gmac_s,speedup\n");
    if (args.common.json) o.rows = json_array();
    for (size_t i = 0; i < args.n_acts && exit_status == CLI_FINE; i++) exit_status = run(&args, &o, i);
    if (exit_status == CLI_FINE && args.explain && !args.common.json) print_explanation(&o);
    if (o.csv && fclose(o.csv) != 0 && exit_status == CLI_FINE) exit_status = cli_error(CLI_BAD_DATA, args.csv, "%s", strerror(errno));
    if (exit_status == CLI_FINE && args.common.json) exit_status = cli_print_json(results_json(&o, args.act));
    json_decref(o.rows);
    return exit_status;
}
