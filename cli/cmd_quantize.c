/* moe4 quantize: an NVFP4 checkpoint from a folder of wide weights. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli_lm.h"
#include "quantize/quantize.h"
#include "quantize/speed.h"

#define DEFAULT_SHARD_BYTES 5000000000u /* Hugging Face's 5GB */

struct options {
    const char *recipe, *calibrate, *shard_size;
    bool four_over_six, search, resume, measure;
    struct cli_list exclude;
    struct cli_common common;
};

static bool recipe_from_name(moe4_recipe *recipe, const char *name) {
    static const struct {
        const char *name;
        moe4_recipe recipe;
    } recipes[] = {{"modelopt", MOE4_RECIPE_MODELOPT},
                   {"modelopt_static", MOE4_RECIPE_MODELOPT_STATIC},
                   {"compressed_tensors", MOE4_RECIPE_COMPRESSED_TENSORS}};
    for (size_t i = 0; i < sizeof recipes / sizeof *recipes; i++)
        if (strcmp(name, recipes[i].name) == 0) {
            *recipe = recipes[i].recipe;
            return true;
        }
    return false;
}

/* "5G", "5GB", "512MiB", "100000": decimal units unless they say otherwise. */
static bool size_from_text(uint64_t *bytes, const char *text) {
    static const char units[] = "KMGT";
    char *end;
    if (!*text || strspn(text, "0123456789") == 0) return false;
    unsigned long long n = strtoull(text, &end, 10);
    const char *unit = *end ? strchr(units, *end) : NULL;
    uint64_t factor = 1, step = unit && end[1] == 'i' ? 1024 : 1000;
    for (const char *u = units; unit && u <= unit; u++) factor *= step;
    if (unit) end += step == 1024 ? 2 : 1;
    if (*end == 'B') end++;
    return !*end && n && !__builtin_mul_overflow(n, factor, bytes) && *bytes <= INT64_MAX;
}

static void show_progress(void *user, const char *step, uint64_t done, uint64_t total) {
    struct cli_progress *progress = user;
    if (progress->what != step) cli_progress_finish(progress);
    progress->what = step;
    cli_progress_show(progress, done, total);
    if (done == total) cli_progress_finish(progress);
}

/* How fast it was, and with --measure beside what memory and disk can do. */
struct speed {
    double rate, memory, disk, share; /* bytes a second; share of the slower of the two; 0: not measured */
};

static struct speed measure(struct lm *lm, const struct quantize_report *r, const char *out, bool ceilings) {
    struct speed s = {.rate = r->seconds > 0 ? (double)(r->bytes_read + r->bytes_written) / r->seconds : 0};
    if (ceilings) {
        s.memory = quantize_memory_rate(lm);
        s.disk = quantize_disk_rate(out, r->bytes_written);
    }
    if (s.memory > 0 && s.disk > 0) s.share = s.rate / (s.memory < s.disk ? s.memory : s.disk);
    return s;
}

static json_t *measured(double x) {
    return x > 0 ? json_real(x) : json_null();
}

/* What came from MXFP4, and which of it lost something. */
static json_t *recast_json(const struct quantize_report *r) {
    json_t *inexact = json_array();
    for (size_t i = 0; i < r->n_inexact; i++) {
        const struct quantize_inexact *m = &r->inexact[i];
        json_array_append_new(inexact,
                              json_pack("{s:o, s:I, s:I, s:f}", "name", cli_json_text(m->name), "blocks_inexact", (json_int_t)m->n_inexact,
                                        "blocks", (json_int_t)m->n_blocks, "relative_error", m->relative_error));
    }
    return json_pack("{s:I, s:o}", "matrices", (json_int_t)r->n_recast, "inexact", inexact);
}

static void print_recast(const struct quantize_report *r) {
    if (!r->n_recast) return;
    printf("%-18s %zu matrices of MXFP4, %zu without loss\n", "recast", r->n_recast, r->n_recast - r->n_inexact);
    for (size_t i = 0; i < r->n_inexact; i++) {
        const struct quantize_inexact *m = &r->inexact[i];
        printf("%-18s %s: %llu of %llu blocks of 32 are below its scales; relative error %.3g\n", "", m->name,
               (unsigned long long)m->n_inexact, (unsigned long long)m->n_blocks, m->relative_error);
    }
}

static int print_json(const struct quantize_report *r, const struct speed *s, const char *out, const struct quantize_options *o) {
    json_t *calibration = json_null();
    if (o->calibrate)
        calibration = json_pack("{s:I, s:I, s:I}", "tokens", (json_int_t)r->n_tokens, "expert_inputs", (json_int_t)r->n_inputs,
                                "expert_inputs_unreached", (json_int_t)r->n_unreached);
    return cli_print_json(json_pack(
        "{s:o, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:o, s:o, s:o, s:o, s:o}", "model", cli_json_text(out), "quantized",
        (json_int_t)r->n_quantized, "left", (json_int_t)r->n_left, "copied", (json_int_t)r->n_copied, "shards", (json_int_t)r->n_shards,
        "shards_kept", (json_int_t)r->n_shards_kept, "bytes_read", (json_int_t)r->bytes_read, "bytes_written", (json_int_t)r->bytes_written,
        "seconds", r->seconds, "bytes_per_second", s->rate, "memory_bytes_per_second", measured(s->memory), "disk_bytes_per_second",
        measured(s->disk), "share_of_slower", measured(s->share), "calibration", calibration, "recast", recast_json(r)));
}

static int print_table(const struct quantize_report *r, const struct speed *s, const struct quantize_options *o) {
    char text[24];
    printf("%-18s %zu matrices\n", "quantized", r->n_quantized);
    print_recast(r);
    if (r->n_left) printf("%-18s %zu linear layers, as they were\n", "left", r->n_left);
    printf("%-18s %zu tensors\n", "copied", r->n_copied);
    printf("%-18s %zu", "shards", r->n_shards);
    if (r->n_shards_kept) printf(", %zu of them complete before", r->n_shards_kept);
    printf("\n%-18s %s\n", "read", cli_bytes(text, r->bytes_read));
    printf("%-18s %s\n", "written", cli_bytes(text, r->bytes_written));
    printf("%-18s %.2f, %s/s", "seconds", r->seconds, cli_bytes(text, (uint64_t)s->rate));
    if (s->share > 0) {
        char disk[24];
        printf("; memory reads %s/s,", cli_bytes(text, (uint64_t)s->memory));
        printf(" the disk writes %s/s: %.0f %% of the slower", cli_bytes(disk, (uint64_t)s->disk), 100 * s->share);
    }
    putchar('\n');
    if (o->calibrate && r->n_tokens)
        printf("%-18s %zu tokens; %zu of %zu experts' inputs reached by none: they have their layer's largest\n", "calibrated on",
               r->n_tokens, r->n_unreached, r->n_inputs);
    return CLI_FINE;
}

static int quantize(const char *const *paths, const struct quantize_options *o, bool ceilings, const struct cli_common *common) {
    struct cli_lm m = {.model = NULL};
    struct quantize_report report;
    int exit_status = cli_open_ctx(&m.lm.ctx, common);
    if (exit_status != CLI_FINE) return exit_status;
    struct cli_progress progress = {.what = "quantize"};
    struct quantize_options options = *o;
    options.progress = show_progress;
    options.progress_user = &progress;
    moe4_status status = quantize_run(&m.lm, &report, paths[0], paths[1], &options);
    cli_progress_finish(&progress);
    if (status != MOE4_OK) {
        exit_status = cli_lm_fail(&m, status, "quantize");
    } else {
        struct speed speed = measure(&m.lm, &report, paths[1], ceilings);
        exit_status = common->json ? print_json(&report, &speed, paths[1], o) : print_table(&report, &speed, o);
    }
    quantize_report_free(&report);
    cli_lm_close(&m);
    return exit_status;
}

int cmd_quantize(int argc, char **argv) {
    struct options o = {.recipe = "modelopt"};
    const struct cli_option table[] = {
        {"recipe", CLI_TEXT, &o.recipe, "NAME", "modelopt, modelopt_static or compressed_tensors (modelopt)"},
        {"four-over-six", CLI_FLAG, &o.four_over_six, NULL, "map each block's largest value to 6 or to 4, whichever is closer (modelopt)"},
        {"search", CLI_FLAG, &o.search, NULL, "try block scales for the least squared error; weighted by the inputs with --calibrate"},
        {"calibrate", CLI_TEXT, &o.calibrate, "FILE", "run the model over this text (or token ids) to set input scales"},
        {"exclude", CLI_LIST, &o.exclude, "PATTERN", "leave modules of this name as they are; * matches anything; may be repeated"},
        {"max-shard-size", CLI_TEXT, &o.shard_size, "SIZE", "begin a new file past this, as 5G, 500M or 2GiB (5G)"},
        {"resume", CLI_FLAG, &o.resume, NULL, "go on where a run that was interrupted stopped"},
        {"measure", CLI_FLAG, &o.measure, NULL, "then measure memory and disk, and set the speed beside them"},
        CLI_COMMON_OPTIONS(&o.common),
    };
    const struct cli_usage usage = {
        .synopsis = "MODEL OUT [--recipe NAME] [--four-over-six] [--search] [--calibrate FILE] [--resume] [options]",
        .about = "Quantizes the linear layers of a checkpoint folder (BF16, F16, F32, block-scaled FP8 or MXFP4) to NVFP4 and writes the\n"
                 "folder OUT: shards, index, config.json and hf_quant_config.json; all other files are copied. lm_head, routers,\n"
                 "embeddings and norms stay as they are. gate and up of an expert share a global scale. MXFP4 keeps its codes, and what\n"
                 "its scales lose, if anything, is listed. The experts of gpt-oss, Llama-4 and Qwen3-VL are split.\n"
                 "Files appear under their names when they are complete; a run that was killed goes on with --resume.",
        .options = table,
        .n_options = sizeof table / sizeof *table,
        .examples = "moe4 quantize GLM-4.5 GLM-4.5-NVFP4\n"
                    "moe4 quantize GLM-4.5 GLM-4.5-NVFP4 --four-over-six --exclude '*.self_attn.*'\n"
                    "moe4 quantize MODEL OUT --search --calibrate text.txt",
    };
    const char *paths[2];
    int exit_status;
    if (!cli_parse(argc, argv, &usage, paths, 2, &exit_status)) return exit_status;
    struct quantize_options options = {.four_over_six = o.four_over_six,
                                       .search = o.search,
                                       .exclude = o.exclude.items,
                                       .n_exclude = o.exclude.n,
                                       .max_shard_bytes = DEFAULT_SHARD_BYTES,
                                       .calibrate = o.calibrate,
                                       .resume = o.resume};
    if (!recipe_from_name(&options.recipe, o.recipe))
        return cli_error(CLI_BAD_USAGE, "--recipe", "\"%s\" is unknown (moe4 has: modelopt, modelopt_static, compressed_tensors)",
                         o.recipe);
    if (o.four_over_six && options.recipe != MOE4_RECIPE_MODELOPT)
        return cli_error(CLI_BAD_USAGE, "--four-over-six", "recipe %s lacks it, only modelopt has it", o.recipe);
    if (o.shard_size && !size_from_text(&options.max_shard_bytes, o.shard_size))
        return cli_error(CLI_BAD_USAGE, "--max-shard-size", "\"%s\" is not a size such as 5G, 500M or 2GiB", o.shard_size);
    signal(SIGXFSZ, SIG_IGN); /* a file limit is an error like a full disk */
    return quantize(paths, &options, o.measure, &o.common);
}
