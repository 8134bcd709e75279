/* Routes four tokens and runs layer 3 of a checkpoint. The marked lines are the README's example; the tests run this file. */
#include <stdio.h>
#include <stdlib.h>

#include <moe4.h>

static moe4_ctx *ctx;

static void must(moe4_status status) {
    if (status == MOE4_OK) return;
    fprintf(stderr, "%s: %s\n", moe4_status_text(status), ctx ? moe4_ctx_error(ctx) : "");
    exit(1);
}

static moe4_workspace workspace(size_t bytes) {
    moe4_workspace w = {aligned_alloc(64, (bytes / 64 + 1) * 64), bytes};
    if (!w.data) must(MOE4_ERROR_MEMORY);
    return w;
}

int main(int argc, char **argv) {
    enum { TOKENS = 4, HIDDEN = 256, TOP_K = 6 };
    static float x[TOKENS * HIDDEN], y[TOKENS * HIDDEN], weights[TOKENS * TOP_K];
    static int32_t ids[TOKENS * TOP_K];
    for (int i = 0; i < TOKENS * HIDDEN; i++) x[i] = (float)(i * 37 % 101 - 50) / 50;
    const char *folder = argc > 1 ? argv[1] : "models/novels-18m-nvfp4";

    /* README */
    moe4_checkpoint *model;
    moe4_router *router;
    moe4_moe *layer;
    moe4_moe_options options = MOE4_MOE_OPTIONS_INIT;
    options.x_dtype = options.y_dtype = MOE4_F32;
    must(moe4_ctx_create(&ctx, NULL));
    must(moe4_checkpoint_open(&model, ctx, folder));
    must(moe4_router_create_from_checkpoint(&router, ctx, model, 3, NULL));
    must(moe4_moe_create_from_checkpoint(&layer, ctx, model, 3, &options));

    size_t for_router, for_layer;
    must(moe4_router_workspace_bytes(router, &for_router, TOKENS));
    must(moe4_moe_workspace_bytes(layer, &for_layer, TOKENS));
    moe4_workspace scratch = workspace(for_router > for_layer ? for_router : for_layer);

    must(moe4_router_forward(router, ids, weights, x, NULL, TOKENS, &scratch, NULL));
    must(moe4_moe_forward(layer, y, x, ids, weights, TOKENS, &scratch, NULL));
    printf("y[0] = %g, mostly from expert %d\n", (double)y[0], ids[0]);
    /* end */

    free(scratch.data);
    moe4_moe_destroy(layer);
    moe4_router_destroy(router);
    moe4_checkpoint_close(model);
    moe4_ctx_destroy(ctx);
    return 0;
}
