/* moe4 compare: what quantizing cost, matrix by matrix. */
#include <math.h>
#include <stdio.h>

#include "cli_lm.h"
#include "quantize/compare.h"

enum { DEFAULT_ROWS = 20 };

struct options {
    size_t layer, limit;
    struct cli_common common;
};

static void show_progress(void *user, size_t n_done, size_t n_total, double unused) {
    (void)unused;
    cli_progress_show(user, n_done, n_total);
}

static json_t *number_or_null(double x) {
    return isfinite(x) ? json_real(x) : json_null();
}

static int print_json(const struct quantize_comparison *r, size_t n_rows) {
    json_t *rows = json_array();
    for (size_t i = 0; i < n_rows; i++) {
        const struct quantize_difference *d = &r->matrices[i];
        json_array_append_new(rows, json_pack("{s:o, s:[I, I], s:o, s:o, s:o, s:o}", "name", cli_json_text(d->name), "shape",
                                              (json_int_t)d->rows, (json_int_t)d->cols, "relative_error",
                                              number_or_null(quantize_relative_error(d->error_sq, d->norm_sq)), "snr_db",
                                              number_or_null(quantize_snr(d->error_sq, d->norm_sq)), "scales_differing",
                                              d->both_nvfp4 ? json_integer((json_int_t)d->n_scales) : json_null(), "codes_differing",
                                              d->both_nvfp4 ? json_integer((json_int_t)d->n_codes) : json_null()));
    }
    return cli_print_json(json_pack("{s:o, s:o, s:I, s:I, s:I, s:I, s:I, s:o}", "relative_error",
                                    number_or_null(quantize_relative_error(r->error_sq, r->norm_sq)), "snr_db",
                                    number_or_null(quantize_snr(r->error_sq, r->norm_sq)), "n_matrices", (json_int_t)r->n_matrices,
                                    "others_same", (json_int_t)r->n_same, "others_differing", (json_int_t)r->n_differ, "only_a",
                                    (json_int_t)r->n_only_a, "only_b", (json_int_t)r->n_only_b, "matrices", rows));
}

static void print_row(const char *name, double error_sq, double norm_sq) {
    double snr = quantize_snr(error_sq, norm_sq);
    printf("%-56s %9.5f", name, quantize_relative_error(error_sq, norm_sq));
    if (isinf(snr))
        printf(" %8s", "-");
    else
        printf(" %8.2f", snr);
}

static int print_table(const struct quantize_comparison *r, size_t n_rows) {
    printf("%-56s %9s %8s %12s %12s\n", "matrix, most damage first", "rel error", "SNR dB", "scales differ", "codes differ");
    for (size_t i = 0; i < n_rows; i++) {
        const struct quantize_difference *d = &r->matrices[i];
        print_row(d->name, d->error_sq, d->norm_sq);
        if (d->both_nvfp4)
            printf(" %12.4f%% %11.4f%%\n", 100. * (double)d->n_scales / ((double)d->rows * (double)d->cols / MOE4_BLOCK),
                   100. * (double)d->n_codes / ((double)d->rows * (double)d->cols));
        else
            printf(" %13s %12s\n", "-", "-");
    }
    if (n_rows < r->n_matrices) printf("and %zu more (--limit 0 shows all)\n", r->n_matrices - n_rows);
    print_row("all", r->error_sq, r->norm_sq);
    printf("\n%zu matrices; other tensors: %zu the same, %zu differ; only in the first: %zu, only in the second: %zu\n", r->n_matrices,
           r->n_same, r->n_differ, r->n_only_a, r->n_only_b);
    return CLI_FINE;
}

int cmd_compare(int argc, char **argv) {
    struct options o = {.layer = CLI_UNSET, .limit = CLI_UNSET};
    const struct cli_option table[] = {
        {"layer", CLI_SIZE, &o.layer, "L", "compare this layer alone"},
        {"limit", CLI_SIZE, &o.limit, "N", "list the N worst, 0 for all (20; all with --json)"},
        CLI_COMMON_OPTIONS(&o.common),
    };
    const struct cli_usage usage = {
        .synopsis = "MODEL OTHER [--layer L] [--limit N] [options]",
        .about = "Compares the values of a model's matrices with another's: its source, or another quantization of it. Relative error is\n"
                 "|MODEL - OTHER| / |OTHER|; where both are NVFP4, block scales and codes that differ are counted too.\n"
                 "Each is a checkpoint folder or one .safetensors file.",
        .options = table,
        .n_options = sizeof table / sizeof *table,
        .examples = "moe4 compare GLM-4.5-NVFP4 GLM-4.5\n"
                    "moe4 compare MODEL OTHER --layer 3 --json",
    };
    const char *paths[2];
    int exit_status;
    if (!cli_parse(argc, argv, &usage, paths, 2, &exit_status)) return exit_status;
    struct cli_lm m = {.model = NULL};
    exit_status = cli_open_ctx(&m.lm.ctx, &o.common);
    if (exit_status != CLI_FINE) return exit_status;
    struct quantize_comparison r;
    struct cli_progress progress = {.what = "compare"};
    size_t layer = o.layer == CLI_UNSET ? QUANTIZE_ALL_LAYERS : o.layer;
    moe4_status status = quantize_compare(&m.lm, &r, paths[0], paths[1], layer, show_progress, &progress);
    cli_progress_finish(&progress);
    if (o.limit == CLI_UNSET) o.limit = o.common.json ? 0 : DEFAULT_ROWS;
    size_t n_rows = o.limit && o.limit < r.n_matrices ? o.limit : r.n_matrices;
    if (status != MOE4_OK)
        exit_status = cli_lm_fail(&m, status, "compare");
    else
        exit_status = o.common.json ? print_json(&r, n_rows) : print_table(&r, n_rows);
    quantize_comparison_free(&r);
    cli_lm_close(&m);
    return exit_status;
}
