/* An engine with a pipeline of its own: it has sorted its rows by expert and wants the products alone. Two calls of the grouped linear
 * around the engine's own activation; the tests run this file. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <moe4.h>

enum { LAYER = 3, EXPERTS = 32, HIDDEN = 256, INNER = 128, ROWS = 64 };

static moe4_ctx *ctx;
static moe4_checkpoint *model;
static float x[ROWS * HIDDEN], gate_up[2][ROWS * INNER], h[ROWS * INNER], y[ROWS * HIDDEN];

static void must(moe4_status status) {
    if (status == MOE4_OK) return;
    fprintf(stderr, "%s: %s\n", moe4_status_text(status), ctx ? moe4_ctx_error(ctx) : "");
    exit(1);
}

/* out[ROWS, N] = rows of `in` against their experts' projection. */
static void product(float *out, const float *in, moe4_proj proj, const int32_t *offsets) {
    moe4_weight w[EXPERTS];
    moe4_grouped_options options = MOE4_GROUPED_OPTIONS_INIT;
    moe4_grouped *grouped;
    moe4_workspace scratch;
    options.x_dtype = options.y_dtype = MOE4_F32;
    for (int e = 0; e < EXPERTS; e++) must(moe4_checkpoint_expert(model, &w[e], LAYER, e, proj));
    must(moe4_grouped_create(&grouped, ctx, w, EXPERTS, &options)); /* an engine makes this once */
    must(moe4_grouped_workspace_bytes(grouped, &scratch.bytes, ROWS));
    if (!(scratch.data = aligned_alloc(64, (scratch.bytes + 63) / 64 * 64))) must(MOE4_ERROR_MEMORY);
    must(moe4_grouped_forward(grouped, out, NULL, in, offsets, ROWS, &scratch, NULL));
    free(scratch.data);
    moe4_grouped_destroy(grouped);
}

int main(int argc, char **argv) {
    int32_t offsets[EXPERTS + 1];
    for (int i = 0; i < ROWS * HIDDEN; i++) x[i] = (float)(i * 37 % 101 - 50) / 50;
    for (int e = 0; e <= EXPERTS; e++) offsets[e] = e * ROWS / EXPERTS; /* the engine's dispatch */
    must(moe4_ctx_create(&ctx, NULL));
    must(moe4_checkpoint_open(&model, ctx, argc > 1 ? argv[1] : "models/novels-18m-nvfp4"));

    product(gate_up[0], x, MOE4_GATE, offsets);
    product(gate_up[1], x, MOE4_UP, offsets);
    for (int i = 0; i < ROWS * INNER; i++) h[i] = gate_up[0][i] / (1 + expf(-gate_up[0][i])) * gate_up[1][i];
    product(y, h, MOE4_DOWN, offsets);
    printf("row 0 %.5f, row %d %.5f\n", (double)y[0], ROWS - 1, (double)y[(ROWS - 1) * HIDDEN]);

    moe4_checkpoint_close(model);
    moe4_ctx_destroy(ctx);
    return 0;
}
