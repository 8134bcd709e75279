/* moe4 run: one layer of a checkpoint on stored activations. Read, route, run, report, write, compare: cmd_run at the end is the index. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "mirror.h"
#include "tensorfile.h"

struct args {
    const char *model, *input, *routing, *token_ids, *output, *check;
    size_t layer, repeat;
    moe4_act act;
    moe4_dtype output_dtype;
    bool shared;
    double tol;
    struct cli_common common;
};

/* How far y is from what it should be. */
struct difference {
    double relative_l2, cosine, largest;
    bool passed;
};

struct run {
    const struct args *args;
    moe4_ctx *ctx;
    moe4_checkpoint *ckpt;
    moe4_router *router;
    moe4_moe *moe;
    moe4_model_info info;
    moe4_layer_kind kind;
    moe4_act act;
    bool by_token_id;                                 /* the layer's experts are named by a table of token ids */
    struct cli_matrix x, ids, weights, y, wanted;     /* no ids and weights in a dense layer */
    struct cli_matrix token_ids;                      /* I32 [T,1]; for layers by_token_id */
    struct cli_mirror on_x, on_ids, on_weights, on_y; /* where the layer runs */
    moe4_moe_report report;
    uint64_t least_tokens, most_tokens; /* of an expert that was hit */
    double load_seconds, route_seconds, forward_seconds;
    struct difference difference;
};

/* ---- reading ---- */

static const moe4_dtype float_dtypes[] = {MOE4_BF16, MOE4_F16, MOE4_F32, MOE4_F64}; /* activations: the first three */

static bool read_args(struct args *a, int argc, char **argv, int *exit_ret) {
    const char *act = NULL, *dtype = "bf16";
    double tol = -1;
    const struct cli_option options[] = {
        {"layer", CLI_SIZE, &a->layer, "L", "the layer, counted from 0"},
        {"input", CLI_TEXT, &a->input, "FILE[:TENSOR]", "activations [T,H], BF16, F16 or F32 (tensor x)"},
        {"routing", CLI_TEXT, &a->routing, "FILE", "topk_idx (I32 or I64) and topk_weight (F32), [T,k], instead of the layer's router"},
        {"token-ids", CLI_TEXT, &a->token_ids, "FILE",
         "FILE or FILE:TENSOR, I32 or I64 [T] (tensor token_ids), for layers that route by token id"},
        {"act", CLI_TEXT, &act, "MODE", "w4a16, static, tensor or token (default for NVFP4); bf16 (for unquantized)"},
        {"shared", CLI_FLAG, &a->shared, NULL, "add the shared expert"},
        {"output", CLI_TEXT, &a->output, "FILE", "write y, and topk_idx and topk_weight as routed"},
        {"output-dtype", CLI_TEXT, &dtype, "DTYPE", "of y: bf16 (default) or f32"},
        {"check", CLI_TEXT, &a->check, "FILE:TENSOR", "compare y with [T,H] F64, F32, F16 or BF16"},
        {"tol", CLI_NUMBER, &tol, "X", "largest relative L2 that passes --check (2e-3)"},
        {"repeat", CLI_SIZE, &a->repeat, "N", "run N times and report the fastest (1)"},
        CLI_DEVICE_OPTION(&a->common),
        CLI_CACHE_OPTION(&a->common),
        CLI_COMMON_OPTIONS(&a->common),
    };
    const struct cli_usage usage = {
        .synopsis = "MODEL --layer L --input FILE[:TENSOR] [options]",
        .about = "Runs the feed-forward part of one layer: y is the routed experts' weighted sum for each token, or the output\n"
                 "of a dense layer's MLP. MODEL is a checkpoint folder or a .safetensors file beside its config.json.",
        .options = options,
        .n_options = sizeof options / sizeof *options,
        .examples = "moe4 run models/novels-18m-nvfp4 --layer 3 --input models/novels-18m-golden.safetensors:tale.layer3.x\n"
                    "moe4 run MODEL --layer 10 --input x.safetensors --act w4a16 --shared --output y.safetensors\n"
                    "moe4 run MODEL --layer 10 --input x.safetensors --check y.safetensors:y --tol 1e-4 --output-dtype f32 --json",
    };
    if (!cli_parse(argc, argv, &usage, &a->model, 1, exit_ret)) return false;
    bool f32 = strcmp(dtype, "f32") == 0;
    a->output_dtype = f32 ? MOE4_F32 : MOE4_BF16;
    a->tol = tol >= 0 ? tol : 2e-3;
    if (a->layer == CLI_UNSET || !a->input)
        *exit_ret = cli_error(CLI_BAD_USAGE, "run", "%s is missing (see moe4 run --help)", a->input ? "--layer" : "--input");
    else if (act && moe4_act_from_name(&a->act, act) != MOE4_OK)
        *exit_ret = cli_error(CLI_BAD_USAGE, "--act", "\"%s\" is none of w4a16, static, tensor, token, bf16", act);
    else if (!f32 && strcmp(dtype, "bf16") != 0)
        *exit_ret = cli_error(CLI_BAD_USAGE, "--output-dtype", "\"%s\" is neither bf16 nor f32", dtype);
    else if (a->repeat == 0)
        *exit_ret = cli_error(CLI_BAD_USAGE, "--repeat", "0 is too few");
    else if (tol >= 0 && !a->check)
        *exit_ret = cli_error(CLI_BAD_USAGE, "--tol", "needs --check");
    else
        *exit_ret = CLI_FINE;
    return *exit_ret == CLI_FINE;
}

static int open_model(struct run *r) {
    const struct args *a = r->args;
    moe4_status status = moe4_checkpoint_open(&r->ckpt, r->ctx, a->model);
    if (status == MOE4_OK) status = moe4_checkpoint_info(r->ckpt, &r->info);
    if (status != MOE4_OK) return cli_fail(r->ctx, status, a->model);
    if (a->layer >= r->info.n_layers)
        return cli_error(CLI_BAD_USAGE, "--layer", "%zu, and %s has %zu layers, counted from 0", a->layer, a->model, r->info.n_layers);
    status = moe4_checkpoint_layer_kind(r->ckpt, &r->kind, a->layer);
    if (status != MOE4_OK) return cli_fail(r->ctx, status, a->model);
    if (r->kind == MOE4_LAYER_DENSE && (a->routing || a->shared))
        return cli_error(CLI_BAD_USAGE, a->routing ? "--routing" : "--shared", "layer %zu is dense: it has no experts", a->layer);
    if (r->kind == MOE4_LAYER_OTHER)
        return cli_error(CLI_BAD_USAGE, "--layer", "%zu of %s has no feed-forward part (it is neither dense nor of experts)", a->layer,
                         a->model);
    r->by_token_id = a->layer < r->info.n_hash_layers;
    if (a->token_ids && (a->routing || !r->by_token_id))
        return cli_error(CLI_BAD_USAGE, "--token-ids", a->routing ? "does not go with --routing" : "layer %zu routes without them",
                         a->layer);
    if (r->by_token_id && !a->token_ids && !a->routing)
        return cli_error(CLI_BAD_USAGE, "run", "layer %zu routes by token id: --token-ids or --routing is missing", a->layer);
    if (a->shared && r->info.n_shared_experts == 0) return cli_error(CLI_BAD_USAGE, "--shared", "%s has no shared expert", a->model);
    return CLI_FINE;
}

static int read_input(struct run *r) {
    char *file;
    const char *tensor;
    int exit_status = cli_split_spec(&file, &tensor, r->args->input, "x");
    if (exit_status == CLI_FINE) exit_status = cli_matrix_read(&r->x, r->ctx, file, tensor, float_dtypes, 3);
    if (exit_status == CLI_FINE && r->x.cols != r->info.hidden)
        exit_status = cli_error(CLI_BAD_DATA, file, "%s: is [%zu, %zu], need [T, %zu] for %s", tensor, r->x.rows, r->x.cols, r->info.hidden,
                                r->args->model);
    free(file);
    return exit_status;
}

/* As the router takes them: int32. */
static int narrow_ids(struct cli_matrix *ids, const char *file) {
    int32_t *narrow = calloc(ids->rows + 1, sizeof *narrow);
    if (!narrow) return cli_error(CLI_BAD_DATA, file, "out of memory (%zu token ids)", ids->rows);
    for (size_t t = 0; t < ids->rows; t++) {
        int64_t id = ids->dtype == MOE4_I64 ? ((const int64_t *)ids->data)[t] : ((const int32_t *)ids->data)[t];
        if (id < 0 || id > INT32_MAX) {
            free(narrow);
            return cli_error(CLI_BAD_DATA, file, "token %zu: id %lld", t, (long long)id);
        }
        narrow[t] = (int32_t)id;
    }
    cli_matrix_free(ids);
    ids->data = narrow;
    ids->dtype = MOE4_I32;
    return CLI_FINE;
}

static int read_token_ids(struct run *r) {
    static const moe4_dtype id_dtypes[] = {MOE4_I32, MOE4_I64};
    if (!r->args->token_ids) return CLI_FINE;
    char *file;
    const char *tensor;
    int exit_status = cli_split_spec(&file, &tensor, r->args->token_ids, "token_ids");
    if (exit_status == CLI_FINE) exit_status = cli_vector_read(&r->token_ids, r->ctx, file, tensor, id_dtypes, 2);
    if (exit_status == CLI_FINE && r->token_ids.rows != r->x.rows)
        exit_status =
            cli_error(CLI_BAD_DATA, file, "%s: has %zu token ids, and the input %zu tokens", tensor, r->token_ids.rows, r->x.rows);
    if (exit_status == CLI_FINE) exit_status = narrow_ids(&r->token_ids, file);
    free(file);
    return exit_status;
}

static int read_wanted(struct run *r) {
    if (!r->args->check) return CLI_FINE;
    char *file;
    const char *tensor;
    int exit_status = cli_split_spec(&file, &tensor, r->args->check, NULL);
    if (exit_status == CLI_FINE) exit_status = cli_matrix_read(&r->wanted, r->ctx, file, tensor, float_dtypes, 4);
    if (exit_status == CLI_FINE && (r->wanted.rows != r->x.rows || r->wanted.cols != r->x.cols))
        exit_status = cli_error(CLI_BAD_DATA, file, "%s: is [%zu, %zu], and the input is [%zu, %zu]", tensor, r->wanted.rows,
                                r->wanted.cols, r->x.rows, r->x.cols);
    free(file);
    return exit_status;
}

static int read_routing(struct run *r) {
    static const moe4_dtype id_dtypes[] = {MOE4_I32, MOE4_I64}, weight_dtype = MOE4_F32;
    const char *file = r->args->routing;
    int exit_status = cli_matrix_read(&r->ids, r->ctx, file, "topk_idx", id_dtypes, 2);
    if (exit_status == CLI_FINE) exit_status = cli_matrix_read(&r->weights, r->ctx, file, "topk_weight", &weight_dtype, 1);
    if (exit_status != CLI_FINE) return exit_status;
    const struct cli_matrix *const both[] = {&r->ids, &r->weights};
    for (int i = 0; i < 2; i++)
        if (both[i]->rows != r->x.rows || both[i]->cols != r->ids.cols || both[i]->cols == 0)
            return cli_error(CLI_BAD_DATA, file, "%s: is [%zu, %zu], need [%zu, %zu]", i ? "topk_weight" : "topk_idx", both[i]->rows,
                             both[i]->cols, r->x.rows, r->ids.cols ? r->ids.cols : r->info.router.top_k);
    return CLI_FINE;
}

/* ---- running ---- */

static int new_matrix(struct cli_matrix *m, moe4_dtype dtype, size_t rows, size_t cols) {
    *m = (struct cli_matrix){dtype, rows, cols, calloc(rows * cols + 1, moe4_dtype_bytes(dtype))};
    return m->data ? CLI_FINE : cli_error(CLI_BAD_DATA, "run", "out of memory ([%zu, %zu] %s)", rows, cols, moe4_dtype_name(dtype));
}

/* The inputs, where the layer runs. */
static int open_mirrors(struct run *r) {
    int exit_status = cli_mirror_open(&r->on_x, r->ctx, &r->args->common, &r->x);
    if (exit_status == CLI_FINE) exit_status = cli_mirror_open(&r->on_ids, r->ctx, &r->args->common, &r->ids);
    return exit_status == CLI_FINE ? cli_mirror_open(&r->on_weights, r->ctx, &r->args->common, &r->weights) : exit_status;
}

static int route(struct run *r) {
    const struct args *a = r->args;
    if (r->kind == MOE4_LAYER_DENSE) return open_mirrors(r);
    if (a->routing) {
        int given = read_routing(r);
        return given == CLI_FINE ? open_mirrors(r) : given;
    }
    moe4_router_options options = MOE4_ROUTER_OPTIONS_INIT;
    options.x_dtype = r->x.dtype;
    size_t bytes = 0, k = r->info.router.top_k;
    moe4_workspace workspace = {NULL, 0};
    moe4_router_tokens tokens = MOE4_ROUTER_TOKENS_INIT;
    tokens.token_ids = r->token_ids.data;
    moe4_status status = moe4_router_create_from_checkpoint(&r->router, r->ctx, r->ckpt, a->layer, &options);
    if (status == MOE4_OK) status = moe4_router_workspace_bytes(r->router, &bytes, r->x.rows);
    if (status != MOE4_OK) return cli_fail(r->ctx, status, a->model);
    int exit_status = new_matrix(&r->ids, MOE4_I32, r->x.rows, k);
    if (exit_status == CLI_FINE) exit_status = new_matrix(&r->weights, MOE4_F32, r->x.rows, k);
    if (exit_status == CLI_FINE) exit_status = cli_workspace_open(&workspace, r->ctx, bytes);
    if (exit_status == CLI_FINE) exit_status = open_mirrors(r);
    if (exit_status == CLI_FINE) {
        double start = cli_seconds();
        status = moe4_router_forward(r->router, r->on_ids.data, r->on_weights.data, r->on_x.data, &tokens, r->x.rows, &workspace, NULL);
        exit_status = status == MOE4_OK ? cli_mirror_read(&r->on_ids, r->ctx) : cli_fail(r->ctx, status, a->model);
        r->route_seconds = cli_seconds() - start;
        if (exit_status == CLI_FINE) exit_status = cli_mirror_read(&r->on_weights, r->ctx);
    }
    cli_workspace_close(&workspace, r->ctx);
    return exit_status;
}

static int load_layer(struct run *r) {
    const struct args *a = r->args;
    moe4_moe_options options = MOE4_MOE_OPTIONS_INIT;
    options.act = a->act;
    options.y_dtype = a->output_dtype;
    options.x_dtype = r->x.dtype;
    options.with_shared = a->shared;
    if (r->ids.data) {
        options.top_k = r->ids.cols;
        options.ids_dtype = r->ids.dtype;
    }
    double start = cli_seconds();
    moe4_status status = moe4_moe_create_from_checkpoint(&r->moe, r->ctx, r->ckpt, a->layer, &options);
    r->load_seconds = cli_seconds() - start;
    if (status != MOE4_OK) return cli_fail(r->ctx, status, a->model);
    r->act = moe4_moe_act(r->moe);
    return new_matrix(&r->y, options.y_dtype, r->x.rows, r->x.cols);
}

static int read_report(struct run *r, const moe4_workspace *workspace) {
    size_t n_experts = r->kind == MOE4_LAYER_MOE ? r->info.n_experts : 1;
    uint64_t *tokens = calloc(n_experts, sizeof *tokens);
    if (!tokens) return cli_error(CLI_BAD_DATA, "run", "out of memory (%zu experts)", n_experts);
    r->report = (moe4_moe_report)MOE4_MOE_REPORT_INIT;
    moe4_status status = moe4_moe_report_read(r->moe, &r->report, tokens, workspace, NULL);
    for (size_t e = 0; e < n_experts; e++) {
        if (tokens[e] && (!r->least_tokens || tokens[e] < r->least_tokens)) r->least_tokens = tokens[e];
        if (tokens[e] > r->most_tokens) r->most_tokens = tokens[e];
    }
    free(tokens);
    return status == MOE4_OK ? CLI_FINE : cli_fail(r->ctx, status, r->args->model);
}

static int forward(struct run *r) {
    size_t bytes = 0;
    moe4_workspace workspace = {NULL, 0};
    moe4_status status = moe4_moe_workspace_bytes(r->moe, &bytes, r->x.rows);
    if (status != MOE4_OK) return cli_fail(r->ctx, status, r->args->model);
    int exit_status = cli_workspace_open(&workspace, r->ctx, bytes);
    if (exit_status == CLI_FINE) exit_status = cli_mirror_open(&r->on_y, r->ctx, &r->args->common, &r->y);
    for (size_t i = 0; exit_status == CLI_FINE && i < r->args->repeat; i++) {
        double start = cli_seconds();
        status = moe4_moe_forward(r->moe, r->on_y.data, r->on_x.data, r->on_ids.data, r->on_weights.data, r->x.rows, &workspace, NULL);
        if (status == MOE4_OK) exit_status = cli_mirror_wait(&r->on_y, r->ctx);
        double seconds = cli_seconds() - start;
        if (status != MOE4_OK) {
            exit_status = cli_fail(r->ctx, status, r->args->model);
        } else if (exit_status == CLI_FINE && (i == 0 || seconds < r->forward_seconds)) {
            r->forward_seconds = seconds;
            exit_status = read_report(r, &workspace);
        }
    }
    if (exit_status == CLI_FINE) exit_status = cli_mirror_read(&r->on_y, r->ctx);
    cli_workspace_close(&workspace, r->ctx);
    return exit_status;
}

/* ---- results ---- */

static void compare(struct run *r) {
    double yy = 0, ww = 0, yw = 0, dd = 0, largest = 0;
    for (size_t i = 0; i < r->y.rows * r->y.cols; i++) {
        double y = cli_matrix_get(&r->y, i), w = cli_matrix_get(&r->wanted, i), d = fabs(y - w);
        yy += y * y;
        ww += w * w;
        yw += y * w;
        dd += d * d;
        if (d > largest || isnan(d)) largest = d; /* a NaN stays */
    }
    struct difference *d = &r->difference;
    d->relative_l2 = dd == 0 ? 0 : sqrt(dd / ww); /* a NaN fails, and so does anything against all zeros */
    d->cosine = yy == 0 && ww == 0 ? 1 : yw / sqrt(yy * ww);
    d->largest = largest;
    d->passed = d->relative_l2 <= r->args->tol;
}

static int write_output(const struct run *r) {
    /* The 4-byte elements first, so that all are aligned. */
    const char *const names[] = {"topk_weight", "topk_idx", "y"};
    const struct cli_matrix *const matrices[] = {&r->weights, &r->ids, &r->y};
    if (!r->args->output) return CLI_FINE;
    size_t skip = r->ids.data ? 0 : 2;
    return cli_tensorfile_write(r->args->output, names + skip, matrices + skip, 3 - skip);
}

static double weight_rate(const struct run *r) { /* GB/s */
    return r->forward_seconds > 0 ? 1e-9 * (double)r->report.weight_bytes / r->forward_seconds : 0;
}

static void print_table(const struct run *r) {
    const moe4_moe_report *p = &r->report;
    const struct args *a = r->args;
    char text[24], experts[96] = "";
    if (r->kind == MOE4_LAYER_MOE)
        snprintf(experts, sizeof experts, ", %zu experts, top %zu%s", r->info.n_experts, r->ids.cols,
                 a->shared ? ", with the shared expert" : "");
    printf("layer         %zu of %s: %s%s\n", a->layer, a->model, r->kind == MOE4_LAYER_MOE ? "mixture of experts" : "dense", experts);
    printf("activations   %s\n", moe4_act_name(r->act));
    printf("tokens        %llu\n", (unsigned long long)p->n_tokens);
    if (r->kind == MOE4_LAYER_MOE) {
        printf("slots         %llu of %zu ran\n", (unsigned long long)p->n_slots, r->ids.rows * r->ids.cols);
        printf("experts hit   %llu of %zu, %llu to %llu tokens each\n", (unsigned long long)p->n_experts_hit, r->info.n_experts,
               (unsigned long long)r->least_tokens, (unsigned long long)r->most_tokens);
    }
    if (cli_on_device(&r->args->common)) {
        printf("device        %s\n", moe4_ctx_device(r->ctx));
    } else {
        printf("isa           %s: %s\n", moe4_ctx_isa(r->ctx), moe4_ctx_isa_reason(r->ctx));
        printf("threads       %zu\n", moe4_ctx_n_threads(r->ctx));
    }
    printf("kernels       %s\n\n", p->kernels);
    printf("%-13s %9.3f ms\n", "load", 1e3 * r->load_seconds);
    if (r->router) printf("%-13s %9.3f ms\n", "route", 1e3 * r->route_seconds);
    for (int i = 0; i < MOE4_N_STAGES && !cli_on_device(&a->common); i++) /* a device does not time them */
        printf("%-13s %9.3f ms\n", moe4_stage_name((moe4_stage)i), 1e3 * p->seconds[i]);
    printf("%-13s %9.3f ms\n", "layer", 1e3 * r->forward_seconds);
    printf("weights       %s read, %.2f GB/s\n\n", cli_bytes(text, p->weight_bytes), weight_rate(r));
    printf("saturated     %llu blocks\nnon-finite    %llu rows\n", (unsigned long long)p->n_saturated_blocks,
           (unsigned long long)p->n_nonfinite_rows);
    if (a->output) printf("written       %s\n", a->output);
    if (a->check)
        printf("check         relative L2 %.3g, cosine %.9f, largest difference %.3g: %s\n", r->difference.relative_l2,
               r->difference.cosine, r->difference.largest, r->difference.passed ? "passed" : "FAILED");
}

static json_t *number(double x) { /* JSON has no NaN and no infinity */
    return isfinite(x) ? json_real(x) : json_null();
}

static json_t *seconds_json(const struct run *r) {
    json_t *seconds = json_pack("{s:f, s:o, s:f}", "load", r->load_seconds, "route", r->router ? json_real(r->route_seconds) : json_null(),
                                "forward", r->forward_seconds);
    for (int i = 0; i < MOE4_N_STAGES; i++) json_object_set_new(seconds, moe4_stage_name((moe4_stage)i), json_real(r->report.seconds[i]));
    return seconds;
}

static json_t *check_json(const struct run *r) {
    const struct difference *d = &r->difference;
    if (!r->args->check) return json_null();
    return json_pack("{s:o, s:o, s:o, s:o, s:f, s:b}", "against", cli_json_text(r->args->check), "relative_l2", number(d->relative_l2),
                     "cosine", number(d->cosine), "largest", number(d->largest), "tol", r->args->tol, "passed", d->passed);
}

static int print_json(const struct run *r) {
    const moe4_moe_report *p = &r->report;
    const struct args *a = r->args;
    json_t *layer = json_pack("{s:o, s:I, s:s, s:s, s:b, s:s, s:s, s:s, s:s, s:I}", "model", cli_json_text(a->model), "layer",
                              (json_int_t)a->layer, "kind", r->kind == MOE4_LAYER_MOE ? "moe" : "dense", "act", moe4_act_name(r->act),
                              "shared", a->shared, "device", moe4_ctx_device(r->ctx), "kernels", p->kernels, "isa", moe4_ctx_isa(r->ctx),
                              "isa_reason", moe4_ctx_isa_reason(r->ctx), "threads", (json_int_t)moe4_ctx_n_threads(r->ctx));
    json_t *work = json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:f}", "tokens", (json_int_t)p->n_tokens, "slots",
                             (json_int_t)p->n_slots, "experts_hit", (json_int_t)p->n_experts_hit, "least_tokens_of_an_expert",
                             (json_int_t)r->least_tokens, "most_tokens_of_an_expert", (json_int_t)r->most_tokens, "saturated_blocks",
                             (json_int_t)p->n_saturated_blocks, "nonfinite_rows", (json_int_t)p->n_nonfinite_rows, "weight_bytes",
                             (json_int_t)p->weight_bytes, "weight_gb_per_s", weight_rate(r));
    json_t *results = json_pack("{s:o, s:o, s:o}", "seconds", seconds_json(r), "output", a->output ? cli_json_text(a->output) : json_null(),
                                "check", check_json(r));
    bool whole = json_object_update(layer, work) == 0 && json_object_update(layer, results) == 0; /* false for a NULL, too */
    json_decref(work);
    json_decref(results);
    if (!whole) {
        json_decref(layer);
        layer = NULL;
    }
    return cli_print_json(layer);
}

static void release(struct run *r) {
    moe4_moe_destroy(r->moe);
    moe4_router_destroy(r->router);
    moe4_checkpoint_close(r->ckpt);
    struct cli_mirror *const mirrors[] = {&r->on_x, &r->on_ids, &r->on_weights, &r->on_y};
    for (size_t i = 0; i < sizeof mirrors / sizeof *mirrors; i++) cli_mirror_close(mirrors[i], r->ctx);
    moe4_ctx_destroy(r->ctx);
    struct cli_matrix *const all[] = {&r->x, &r->ids, &r->weights, &r->y, &r->wanted, &r->token_ids};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) cli_matrix_free(all[i]);
}

int cmd_run(int argc, char **argv) {
    struct args args = {.layer = CLI_UNSET, .repeat = 1};
    struct run r = {.args = &args, .info = MOE4_MODEL_INFO_INIT};
    int exit_status;
    if (!read_args(&args, argc, argv, &exit_status)) return exit_status;
    static int (*const steps[])(struct run *) = {open_model, read_input, read_token_ids, read_wanted, route, load_layer, forward};
    exit_status = cli_open_ctx(&r.ctx, &args.common);
    for (size_t i = 0; exit_status == CLI_FINE && i < sizeof steps / sizeof *steps; i++) exit_status = steps[i](&r);
    if (exit_status == CLI_FINE) exit_status = write_output(&r);
    if (exit_status == CLI_FINE) {
        if (args.check) compare(&r);
        if (args.common.json)
            exit_status = print_json(&r);
        else
            print_table(&r);
        if (exit_status == CLI_FINE && args.check && !r.difference.passed)
            exit_status = cli_error(CLI_BAD_DATA, args.check, "relative L2 %.3g, above %.3g", r.difference.relative_l2, args.tol);
    }
    release(&r);
    return exit_status;
}
