/* What moe4 run reads, runs and reports. */
#ifndef MOE4_RUN_H
#define MOE4_RUN_H

#include "cli.h"
#include "mirror.h"
#include "tensorfile.h"

struct run_args {
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
    const struct run_args *args;
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

/* Each returns an exit status, after its message: what --input, --token-ids, --check and --routing name, beside the model. */
int run_read_input(struct run *r);
int run_read_token_ids(struct run *r);
int run_read_wanted(struct run *r);
int run_read_routing(struct run *r);

/* y beside what --check names; then y to --output and the report to stdout, as exit statuses too. */
void run_compare(struct run *r);
int run_write_output(const struct run *r);
void run_print_table(const struct run *r);
int run_print_json(const struct run *r);

#endif
