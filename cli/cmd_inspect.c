/* moe4 inspect: what a checkpoint is, which of it is quantized, and per layer the facts that decide correctness and speed. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "inspect.h"

struct inspect {
    const char *model;
    size_t only_layer; /* CLI_UNSET: all */
    struct cli_common common;
    moe4_ctx *ctx;
    moe4_checkpoint *ckpt;
    moe4_status info_status;
    bool has_info;
    moe4_model_info info;
    struct inspect_kinds kinds;
    struct inspect_layer *layers;      /* n_layers */
    size_t n_layers, n_dense, n_other; /* n_layers: those read */
};

/* ---- text ---- */

static const char *router_name(moe4_router_kind kind) {
    static const char *const names[] = {"none", "softmax_topk", "sigmoid_bias", "topk_softmax", "sqrtsoftplus_bias",
                                        "hash", "sigmoid_top1"};
    return (unsigned)kind < sizeof names / sizeof *names ? names[kind] : "?";
}

static const char *activation_name(moe4_activation activation) {
    static const char *const names[] = {"swiglu", "gelu_tanh", "relu2"};
    return (unsigned)activation < sizeof names / sizeof *names ? names[activation] : "?";
}

static const char *kind_name(moe4_layer_kind kind) {
    return kind == MOE4_LAYER_MOE ? "moe" : kind == MOE4_LAYER_DENSE ? "dense" : "other";
}

static void print_model(const struct inspect *in) {
    const moe4_model_info *m = &in->info;
    char text[24];
    printf("model         %s\n", in->model);
    if (in->has_info) {
        printf("family        %s (%s)\n", m->family, *m->architecture ? m->architecture : "no architecture named");
        printf("quantization  %s\n", m->quantization);
        printf("layers        %zu: %zu dense, %zu mixture of experts", m->n_layers, in->n_dense, m->n_layers - in->n_dense - in->n_other);
        if (in->n_other) printf(", %zu without either", in->n_other);
        printf("\n");
        printf("sizes         hidden %zu, vocabulary %zu, intermediate %zu (dense) and %zu (expert)\n", m->hidden, m->vocab,
               m->intermediate, m->moe_intermediate);
        printf("experts       %zu, top %zu, %zu shared\n", m->n_experts, m->router.top_k, m->n_shared_experts);
        printf("router        %s, %s, scale %g", router_name(m->router.kind), m->router.normalize ? "normalized" : "not normalized",
               (double)m->router.scale);
        if (m->router.n_group > 1) printf(", %zu of %zu groups", m->router.topk_group, m->router.n_group);
        if (m->n_hash_layers) printf("; by hash of the token id in the first %zu layers", m->n_hash_layers);
        printf("\nactivation    %s", activation_name(m->activation));
        if (m->swiglu_limit > 0) printf(", limit %g", (double)m->swiglu_limit);
        printf("\n");
    }
    printf("files         %zu, %zu tensors, %s\n", moe4_checkpoint_n_files(in->ckpt), moe4_checkpoint_n_tensors(in->ckpt),
           cli_bytes(text, in->kinds.bytes));
}

static void print_kinds(const struct inspect *in) {
    printf("\n%-52s %-8s %-14s %7s %9s\n", "module or tensor", "format", "shape", "count", "bytes");
    for (size_t i = 0; i < in->kinds.n; i++) {
        const struct inspect_kind *k = &in->kinds.list[i];
        char bytes[24];
        printf("%-52s %-8s %-14s %7zu %9s\n", k->pattern, k->format, k->shape, k->count, cli_bytes(bytes, k->bytes));
    }
}

static double percent(uint64_t part, uint64_t all) {
    return all ? 100.0 * (double)part / (double)all : 0;
}

static void print_layers(const struct inspect *in) {
    if (!in->n_layers) return;
    printf("\n%-6s %-6s %-7s %10s %13s %9s %7s %17s %17s %8s %11s\n", "layer", "kind", "format", "blocks", "block scales", "at 448", "pow2",
           "gate/up globals", "gate/up inputs", "missing", "implausible");
    printf("%-6s %-6s %-7s %10s %13s %9s %7s %17s %17s %8s %11s\n", "", "", "", "", "", "", "", "differ", "differ", "inputs", "inputs");
    for (size_t i = 0; i < in->n_layers; i++) {
        const struct inspect_layer *l = &in->layers[i];
        char range[32], globals[24], inputs[24];
        snprintf(range, sizeof range, "%.4g..%.4g", (double)l->scale_min, (double)l->scale_max);
        snprintf(globals, sizeof globals, "%zu of %zu", l->n_global_differ, l->n_experts);
        snprintf(inputs, sizeof inputs, "%zu of %zu", l->n_input_differ, l->n_experts);
        if (l->n_blocks)
            printf("%-6zu %-6s %-7s %10llu %13s %9llu %6.1f%% %17s %17s %8zu %11zu\n", l->layer, kind_name(l->kind), l->format,
                   (unsigned long long)l->n_blocks, range, (unsigned long long)l->n_scale_448, percent(l->n_scale_pow2, l->n_blocks),
                   globals, inputs, l->n_input_missing, l->n_implausible);
        else
            printf("%-6zu %-6s %-7s %10s\n", l->layer, kind_name(l->kind), l->format, "-");
    }
    size_t n_notes = 0;
    for (size_t i = 0; i < in->n_layers; i++)
        for (size_t j = 0; j < in->layers[i].n_notes; j++)
            printf("%s%s\n", n_notes++ ? "" : "\nImplausible input scales:\n", in->layers[i].notes[j]);
    if (n_notes) printf("(%s)\n", inspect_implausible);
}

/* ---- JSON ---- */

static json_t *model_json(const struct inspect *in) {
    const moe4_model_info *m = &in->info;
    return json_pack("{s:s, s:o, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:s, s:b, s:f, s:I, s:I, s:I, s:I, s:s, s:f}", "family",
                     m->family, "architecture", cli_json_text(m->architecture), "quantization", m->quantization, "n_layers",
                     (json_int_t)m->n_layers, "n_dense_layers", (json_int_t)in->n_dense, "hidden", (json_int_t)m->hidden, "vocab",
                     (json_int_t)m->vocab, "intermediate", (json_int_t)m->intermediate, "moe_intermediate", (json_int_t)m->moe_intermediate,
                     "n_experts", (json_int_t)m->n_experts, "top_k", (json_int_t)m->router.top_k, "n_shared_experts",
                     (json_int_t)m->n_shared_experts, "router", router_name(m->router.kind), "router_normalize", m->router.normalize,
                     "router_scale", (double)m->router.scale, "n_group", (json_int_t)m->router.n_group, "topk_group",
                     (json_int_t)m->router.topk_group, "n_hash_layers", (json_int_t)m->n_hash_layers, "n_other_layers",
                     (json_int_t)in->n_other, "activation", activation_name(m->activation), "swiglu_limit", (double)m->swiglu_limit);
}

static json_t *kinds_json(const struct inspect *in) {
    json_t *list = json_array();
    for (size_t i = 0; i < in->kinds.n; i++) {
        const struct inspect_kind *k = &in->kinds.list[i];
        json_t *shape = json_array();
        for (size_t d = 0; d < k->n_dims; d++) json_array_append_new(shape, json_integer((json_int_t)k->dims[d]));
        json_array_append_new(list, json_pack("{s:o, s:s, s:o, s:I, s:I}", "pattern", cli_json_text(k->pattern), "format", k->format,
                                              "shape", shape, "count", (json_int_t)k->count, "bytes", (json_int_t)k->bytes));
    }
    return list;
}

static json_t *layers_json(const struct inspect *in) {
    json_t *list = json_array();
    for (size_t i = 0; i < in->n_layers; i++) {
        const struct inspect_layer *l = &in->layers[i];
        json_t *notes = json_array();
        for (size_t j = 0; j < l->n_notes; j++) json_array_append_new(notes, cli_json_text(l->notes[j]));
        json_array_append_new(
            list, json_pack("{s:I, s:s, s:s, s:I, s:I, s:f, s:f, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o}", "layer",
                            (json_int_t)l->layer, "kind", kind_name(l->kind), "format", l->format, "n_experts", (json_int_t)l->n_experts,
                            "n_blocks", (json_int_t)l->n_blocks, "scale_min", (double)l->scale_min, "scale_max", (double)l->scale_max,
                            "n_scale_448", (json_int_t)l->n_scale_448, "n_scale_pow2", (json_int_t)l->n_scale_pow2, "n_scale_zero",
                            (json_int_t)l->n_scale_zero, "n_scale_bad", (json_int_t)l->n_scale_bad, "gate_up_global_differ",
                            (json_int_t)l->n_global_differ, "gate_up_input_differ", (json_int_t)l->n_input_differ, "input_scale_missing",
                            (json_int_t)l->n_input_missing, "input_scale_implausible", (json_int_t)l->n_implausible, "implausible", notes));
    }
    return list;
}

static int print_json(const struct inspect *in) {
    json_t *object = in->has_info ? model_json(in) : json_object();
    json_object_set_new(object, "model", cli_json_text(in->model));
    json_object_set_new(object, "files", json_integer((json_int_t)moe4_checkpoint_n_files(in->ckpt)));
    json_object_set_new(object, "tensors", json_integer((json_int_t)moe4_checkpoint_n_tensors(in->ckpt)));
    json_object_set_new(object, "bytes", json_integer((json_int_t)in->kinds.bytes));
    json_object_set_new(object, "kinds", kinds_json(in));
    json_object_set_new(object, "layers", layers_json(in));
    return cli_print_json(object);
}

/* ---- reading ---- */

static int read_layers(struct inspect *in) {
    struct cli_progress progress = {.what = "inspect"};
    size_t first = in->only_layer == CLI_UNSET ? 0 : in->only_layer, end = in->only_layer == CLI_UNSET ? in->info.n_layers : first + 1;
    if (in->only_layer != CLI_UNSET && in->only_layer >= in->info.n_layers)
        return cli_error(CLI_BAD_USAGE, "--layer", "%zu, and %s has %zu layers, counted from 0", first, in->model, in->info.n_layers);
    for (size_t l = 0; l < in->info.n_layers; l++) {
        moe4_layer_kind kind;
        if (moe4_checkpoint_layer_kind(in->ckpt, &kind, l) != MOE4_OK) continue;
        in->n_dense += kind == MOE4_LAYER_DENSE;
        in->n_other += kind == MOE4_LAYER_OTHER;
    }
    in->layers = calloc(end - first, sizeof *in->layers);
    if (!in->layers) return cli_error(CLI_BAD_DATA, "inspect", "out of memory");
    for (size_t l = first; l < end; l++) {
        cli_progress_show(&progress, l - first, end - first);
        moe4_status status = inspect_layer_read(&in->layers[in->n_layers++], in->ctx, in->ckpt, &in->info, l);
        if (status == MOE4_ERROR_UNSUPPORTED) { /* what there is is shown, then this said */
            inspect_layer_free(&in->layers[--in->n_layers]);
            in->info_status = status;
            break;
        }
        if (status != MOE4_OK) {
            cli_progress_finish(&progress);
            return cli_fail(in->ctx, status, in->model);
        }
    }
    cli_progress_finish(&progress);
    return CLI_FINE;
}

/* A single file has no config and no layers. */
static int read_all(struct inspect *in) {
    moe4_status status = moe4_checkpoint_open(&in->ckpt, in->ctx, in->model);
    if (status != MOE4_OK) return cli_fail(in->ctx, status, in->model);
    if (!inspect_kinds_read(&in->kinds, in->ckpt)) return cli_error(CLI_BAD_DATA, "inspect", "out of memory");
    in->info_status = moe4_checkpoint_info(in->ckpt, &in->info);
    in->has_info = in->info_status == MOE4_OK;
    if (in->has_info) return read_layers(in);
    bool shown = in->info_status == MOE4_ERROR_NOT_FOUND || in->info_status == MOE4_ERROR_UNSUPPORTED;
    if (shown && in->only_layer == CLI_UNSET) return CLI_FINE;
    return cli_fail(in->ctx, in->info_status, in->model);
}

int cmd_inspect(int argc, char **argv) {
    struct inspect in = {.only_layer = CLI_UNSET, .info = MOE4_MODEL_INFO_INIT};
    const struct cli_option options[] = {
        {"layer", CLI_SIZE, &in.only_layer, "L", "look into this layer only, counted from 0"},
        CLI_COMMON_OPTIONS(&in.common),
    };
    const struct cli_usage usage = {
        .synopsis = "MODEL [--layer L] [options]",
        .about = "Says what a checkpoint is: family, sizes, what is quantized and what is not; and for each layer the range of its block\n"
                 "scales, blocks at 448 (the largest scale), the share of scales that are powers of two, experts whose gate and up have\n"
                 "different global or input scales, and input scales that are missing or implausible.\n"
                 "MODEL is a checkpoint folder, or one .safetensors file (then without layers).",
        .options = options,
        .n_options = sizeof options / sizeof *options,
        .examples = "moe4 inspect models/novels-18m-nvfp4\n"
                    "moe4 inspect MODEL --layer 10 --json",
    };
    int exit_status;
    if (!cli_parse(argc, argv, &usage, &in.model, 1, &exit_status)) return exit_status;
    exit_status = cli_open_ctx(&in.ctx, &in.common);
    if (exit_status == CLI_FINE) exit_status = read_all(&in);
    if (exit_status == CLI_FINE && in.common.json) {
        exit_status = print_json(&in);
    } else if (exit_status == CLI_FINE) {
        print_model(&in);
        print_kinds(&in);
        print_layers(&in);
    }
    if (exit_status == CLI_FINE && in.info_status == MOE4_ERROR_UNSUPPORTED) /* what there is has been shown; still, moe4 cannot run it */
        exit_status = cli_fail(in.ctx, in.info_status, in.model);
    for (size_t i = 0; i < in.n_layers; i++) inspect_layer_free(&in.layers[i]);
    free(in.layers);
    inspect_kinds_free(&in.kinds);
    moe4_checkpoint_close(in.ckpt);
    moe4_ctx_destroy(in.ctx);
    return exit_status;
}
