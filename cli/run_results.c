/* What moe4 run writes, prints and compares. */
#include <math.h>
#include <stdio.h>

#include "run.h"

void run_compare(struct run *r) {
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

int run_write_output(const struct run *r) {
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

void run_print_table(const struct run *r) {
    const moe4_moe_report *p = &r->report;
    const struct run_args *a = r->args;
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

int run_print_json(const struct run *r) {
    const moe4_moe_report *p = &r->report;
    const struct run_args *a = r->args;
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
