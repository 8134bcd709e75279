/* moe4 run: one layer of a checkpoint on stored activations. Read, route, run, report, write, compare: cmd_run at the end is the index. */
#include <stdlib.h>
#include <string.h>

#include "run.h"

static bool read_args(struct run_args *a, int argc, char **argv, int *exit_ret) {
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
    const struct run_args *a = r->args;
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
    const struct run_args *a = r->args;
    if (r->kind == MOE4_LAYER_DENSE) return open_mirrors(r);
    if (a->routing) {
        int given = run_read_routing(r);
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
    const struct run_args *a = r->args;
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
    struct run_args args = {.layer = CLI_UNSET, .repeat = 1};
    struct run r = {.args = &args, .info = MOE4_MODEL_INFO_INIT};
    int exit_status;
    if (!read_args(&args, argc, argv, &exit_status)) return exit_status;
    static int (*const steps[])(struct run *) = {open_model, run_read_input, run_read_token_ids, run_read_wanted, route,
                                                 load_layer, forward};
    exit_status = cli_open_ctx(&r.ctx, &args.common);
    for (size_t i = 0; exit_status == CLI_FINE && i < sizeof steps / sizeof *steps; i++) exit_status = steps[i](&r);
    if (exit_status == CLI_FINE) exit_status = run_write_output(&r);
    if (exit_status == CLI_FINE) {
        if (args.check) run_compare(&r);
        if (args.common.json)
            exit_status = run_print_json(&r);
        else
            run_print_table(&r);
        if (exit_status == CLI_FINE && args.check && !r.difference.passed)
            exit_status = cli_error(CLI_BAD_DATA, args.check, "relative L2 %.3g, above %.3g", r.difference.relative_l2, args.tol);
    }
    release(&r);
    return exit_status;
}
