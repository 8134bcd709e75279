/* Expert parallelism: a dispatcher brings rows sorted by local expert and takes them back row for row. Here two "ranks" hold half of a
 * layer's experts each; the tests run this file. */
#include <stdio.h>
#include <stdlib.h>

#include <moe4.h>

enum { LAYER = 3, EXPERTS = 32, LOCAL = EXPERTS / 2, HIDDEN = 256, ROWS = 64 };

static moe4_ctx *ctx;
static float x[ROWS * HIDDEN], y[ROWS * HIDDEN];

static void must(moe4_status status) {
    if (status == MOE4_OK) return;
    fprintf(stderr, "%s: %s\n", moe4_status_text(status), ctx ? moe4_ctx_error(ctx) : "");
    exit(1);
}

/* What one rank does with the rows it received: y[n_rows, hidden] from x, offsets of its LOCAL experts. */
static void run_rank(const moe4_checkpoint *model, size_t rank, float *out, const float *in, const int32_t *offsets, size_t n_rows) {
    moe4_moe *layer;
    moe4_moe_options options = MOE4_MOE_OPTIONS_INIT;
    moe4_workspace scratch;
    options.x_dtype = options.y_dtype = MOE4_F32;
    options.first_expert = rank * LOCAL;
    options.n_local = LOCAL;
    must(moe4_moe_create_from_checkpoint(&layer, ctx, model, LAYER, &options)); /* an engine makes this once */
    must(moe4_moe_rows_workspace_bytes(layer, &scratch.bytes, n_rows, 0));
    if (!(scratch.data = aligned_alloc(64, (scratch.bytes + 63) / 64 * 64))) must(MOE4_ERROR_MEMORY);
    must(moe4_moe_forward_sorted(layer, out, in, offsets, NULL, NULL, n_rows, 0, &scratch, NULL));
    free(scratch.data);
    moe4_moe_destroy(layer);
}

int main(int argc, char **argv) {
    moe4_checkpoint *model;
    int32_t offsets[LOCAL + 1];
    for (int i = 0; i < ROWS * HIDDEN; i++) x[i] = (float)(i * 37 % 101 - 50) / 50;
    for (int e = 0; e <= LOCAL; e++) offsets[e] = e * (ROWS / 2) / LOCAL; /* both ranks received the same number */
    must(moe4_ctx_create(&ctx, NULL));
    must(moe4_checkpoint_open(&model, ctx, argc > 1 ? argv[1] : "models/novels-18m-nvfp4"));
    for (size_t rank = 0; rank < 2; rank++)
        run_rank(model, rank, y + rank * (ROWS / 2) * HIDDEN, x + rank * (ROWS / 2) * HIDDEN, offsets, ROWS / 2);
    printf("row 0 %.5f, row %d %.5f\n", (double)y[0], ROWS - 1, (double)y[(ROWS - 1) * HIDDEN]);
    moe4_checkpoint_close(model);
    moe4_ctx_destroy(ctx);
    return 0;
}
