/* Layers and routers of a checkpoint: what moe4_moe_create and moe4_router_create want, found by layer number. */
#include "backend.h"
#include "checkpoint.h"

static moe4_status load_expert(const moe4_checkpoint *ckpt, moe4_expert *expert, size_t layer, int64_t number, moe4_activation activation) {
    *expert = (moe4_expert){0};
    if (activation != MOE4_RELU2) MOE4_TRY(moe4_checkpoint_expert(ckpt, &expert->gate, layer, number, MOE4_GATE));
    MOE4_TRY(moe4_checkpoint_expert(ckpt, &expert->up, layer, number, MOE4_UP));
    return moe4_checkpoint_expert(ckpt, &expert->down, layer, number, MOE4_DOWN);
}

/* The family's activation; and what config.json says, where the caller left a 0. */
static void fill_options(moe4_moe_options *o, const moe4_model_info *info, moe4_layer_kind kind) {
    o->n_experts = kind == MOE4_LAYER_DENSE ? 1 : info->n_experts;
    if (!o->top_k) o->top_k = kind == MOE4_LAYER_DENSE ? 1 : info->router.top_k;
    if (o->swiglu_limit == 0) o->swiglu_limit = info->swiglu_limit;
    o->activation = info->activation;
}

static moe4_status create(moe4_moe **moe_ret, moe4_ctx *ctx, const moe4_checkpoint *ckpt, size_t layer, moe4_layer_kind kind,
                          moe4_expert *experts, moe4_moe_options *o, bool shared) {
    for (size_t e = 0; e < o->n_local; e++)
        MOE4_TRY(load_expert(ckpt, &experts[e], layer, kind == MOE4_LAYER_DENSE ? MOE4_EXPERT_DENSE : (int64_t)(o->first_expert + e),
                             o->activation));
    moe4_expert shared_expert;
    if (shared) MOE4_TRY(load_expert(ckpt, &shared_expert, layer, MOE4_EXPERT_SHARED, o->activation));
    o->shared = shared ? &shared_expert : NULL;
    return moe4_moe_create(moe_ret, ctx, experts, o);
}

moe4_status moe4_moe_create_from_checkpoint(moe4_moe **moe_ret, moe4_ctx *ctx, const moe4_checkpoint *ckpt, size_t layer,
                                            const moe4_moe_options *options) {
    moe4_begin(ctx);
    MOE4_CHECK(ctx, moe_ret, MOE4_ERROR_ARGUMENT, "moe4_moe_create_from_checkpoint: NULL moe_ret");
    *moe_ret = NULL;
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    MOE4_CHECK(ctx, moe4_options_read(&o, sizeof o, options), MOE4_ERROR_ARGUMENT, "options: struct_size is wrong, or a field is unknown");
    moe4_model_info info = MOE4_MODEL_INFO_INIT;
    moe4_layer_kind kind;
    MOE4_TRY(moe4_checkpoint_check_files(ckpt));
    MOE4_TRY(moe4_checkpoint_info(ckpt, &info));
    MOE4_TRY(moe4_checkpoint_layer_kind(ckpt, &kind, layer));
    MOE4_CHECK(ctx, kind != MOE4_LAYER_OTHER, MOE4_ERROR_ARGUMENT, "layer %zu is neither dense nor of experts", layer);
    fill_options(&o, &info, kind);
    MOE4_CHECK(ctx, o.first_expert < o.n_experts && o.n_local <= o.n_experts - o.first_expert, MOE4_ERROR_ARGUMENT,
               "options: experts %zu + %zu, but layer %zu has %zu", o.first_expert, o.n_local, layer, o.n_experts);
    if (!o.n_local) o.n_local = o.n_experts - o.first_expert;
    moe4_expert *experts = moe4_calloc(ctx, o.n_local, sizeof *experts, "experts");
    if (!experts) return MOE4_ERROR_MEMORY;
    bool shared = o.with_shared && kind == MOE4_LAYER_MOE && info.n_shared_experts;
    moe4_status status = create(moe_ret, ctx, ckpt, layer, kind, experts, &o, shared);
    if (status == MOE4_OK && !ctx->plugin) (*moe_ret)->ckpt = ckpt; /* a device has copies */
    moe4_free(ctx, experts);
    return status;
}

/* A vector of F32, BF16 or F16; NULL for no tensor. */
static moe4_status read_floats(moe4_ctx *ctx, float **x_ret, const moe4_tensor *t) {
    if (!t) return MOE4_OK;
    *x_ret = moe4_calloc(ctx, t->shape[0], sizeof **x_ret, "router bias");
    if (!*x_ret) return MOE4_ERROR_MEMORY;
    const moe4_weight row = {.dtype = t->dtype, .rows = 1, .cols = t->shape[0], .data = t->data};
    return moe4_weight_values(ctx, *x_ret, &row, 0, 1);
}

/* The bias by which image tokens choose, where the family has one and the layer does. */
static moe4_status load_alt_bias(moe4_ctx *ctx, float **x_ret, const moe4_checkpoint *ckpt, size_t layer) {
    const moe4_tensor *t;
    MOE4_TRY(moe4_router_vector(ckpt, &t, ckpt->config.family->router_alt_bias, layer));
    return read_floats(ctx, x_ret, layer < ckpt->config.n_hash_layers ? NULL : t);
}

moe4_status moe4_router_create_from_checkpoint(moe4_router **router_ret, moe4_ctx *ctx, const moe4_checkpoint *ckpt, size_t layer,
                                               const moe4_router_options *options) {
    moe4_begin(ctx);
    MOE4_CHECK(ctx, router_ret, MOE4_ERROR_ARGUMENT, "moe4_router_create_from_checkpoint: NULL router_ret");
    *router_ret = NULL;
    moe4_router_options o = MOE4_ROUTER_OPTIONS_INIT;
    MOE4_CHECK(ctx, moe4_options_read(&o, sizeof o, options), MOE4_ERROR_ARGUMENT, "options: struct_size is wrong, or a field is unknown");
    moe4_model_info info = MOE4_MODEL_INFO_INIT;
    moe4_weight gate;
    moe4_tensor bias, table;
    MOE4_TRY(moe4_checkpoint_check_files(ckpt));
    MOE4_TRY(moe4_checkpoint_info(ckpt, &info));
    MOE4_TRY(moe4_checkpoint_router(ckpt, &gate, &bias, layer));
    MOE4_TRY(moe4_checkpoint_hash_table(ckpt, &table, layer));
    info.router.x_dtype = o.x_dtype;
    info.router.x_ld = o.x_ld;
    info.router.alt_bias = o.alt_bias;
    if (table.data) {
        info.router.kind = MOE4_ROUTER_HASH;
        info.router.table = table.data;
        info.router.table_dtype = table.dtype;
        info.router.n_token_ids = table.shape[0];
    }
    float *b = NULL, *alt = NULL;
    moe4_status status = read_floats(ctx, &b, bias.data ? &bias : NULL);
    if (status == MOE4_OK && !o.alt_bias) status = load_alt_bias(ctx, &alt, ckpt, layer);
    if (alt) info.router.alt_bias = alt;
    if (status == MOE4_OK) status = moe4_router_create(router_ret, ctx, &gate, b, &info.router);
    if (status == MOE4_OK && !ctx->plugin) (*router_ret)->ckpt = ckpt;
    moe4_free(ctx, alt);
    moe4_free(ctx, b);
    return status;
}
