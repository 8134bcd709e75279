/* moe4 run's inputs: activations, token ids, routing, and what y should be. */
#include <stdlib.h>

#include "run.h"

static const moe4_dtype float_dtypes[] = {MOE4_BF16, MOE4_F16, MOE4_F32, MOE4_F64}; /* activations: the first three */

int run_read_input(struct run *r) {
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

int run_read_token_ids(struct run *r) {
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

int run_read_wanted(struct run *r) {
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

int run_read_routing(struct run *r) {
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
