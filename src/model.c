/* A checkpoint as its family reads it: numbers, layers, experts, routers. */
#include <stdio.h>
#include <string.h>

#include "weight.h"

moe4_status moe4_checkpoint_need_config(const moe4_checkpoint *ckpt) {
    MOE4_CHECK(ckpt->ctx, ckpt->has_config, MOE4_ERROR_NOT_FOUND, "%s: no config.json", ckpt->path);
    MOE4_CHECK(ckpt->ctx, ckpt->config.status == MOE4_OK, ckpt->config.status, "%s", ckpt->config.problem);
    return MOE4_OK;
}

moe4_status moe4_checkpoint_info(const moe4_checkpoint *ckpt, moe4_model_info *info_ret) {
    moe4_begin(ckpt->ctx);
    MOE4_CHECK(ckpt->ctx, info_ret, MOE4_ERROR_ARGUMENT, "info_ret is NULL");
    MOE4_TRY(moe4_checkpoint_need_config(ckpt));
    const struct moe4_config *c = &ckpt->config;
    moe4_model_info info = MOE4_MODEL_INFO_INIT;
    info.family = c->family->name;
    info.architecture = c->architecture;
    info.quantization = ckpt->quantization;
    info.n_layers = c->dim[MOE4_DIM_LAYERS];
    info.hidden = c->dim[MOE4_DIM_HIDDEN];
    info.vocab = c->dim[MOE4_DIM_VOCAB];
    info.intermediate = c->dim[MOE4_DIM_DENSE];
    info.n_experts = c->dim[MOE4_DIM_N_EXPERTS];
    info.moe_intermediate = c->dim[MOE4_DIM_EXPERT];
    info.n_shared_experts = c->dim[MOE4_DIM_N_SHARED];
    info.router.kind = c->family->router_kind;
    info.router.hidden = info.hidden;
    info.router.n_experts = info.n_experts;
    info.router.top_k = c->dim[MOE4_DIM_TOP_K];
    info.router.n_group = c->dim[MOE4_DIM_N_GROUP];
    info.router.topk_group = c->dim[MOE4_DIM_TOPK_GROUP];
    info.router.normalize = c->normalize;
    info.router.scale = c->routed_scale;
    info.router.gate_temp = c->gate_temp;
    info.swiglu_limit = c->swiglu_limit;
    info.activation = c->family->activation;
    info.n_hash_layers = c->n_hash_layers;
    moe4_struct_write(info_ret, &info, sizeof info);
    return MOE4_OK;
}

static moe4_status need_layer(const moe4_checkpoint *ckpt, size_t layer) {
    MOE4_TRY(moe4_checkpoint_need_config(ckpt));
    size_t n = ckpt->config.dim[MOE4_DIM_LAYERS];
    MOE4_CHECK(ckpt->ctx, layer < n, MOE4_ERROR_ARGUMENT, "layer %zu, the model has 0 to %zu", layer, n - 1);
    return MOE4_OK;
}

static moe4_status need_kind(const moe4_checkpoint *ckpt, size_t layer, moe4_layer_kind need) {
    static const char *const is[] = {"dense: it has no experts and no router", "not dense", "neither dense nor of experts"};
    MOE4_TRY(need_layer(ckpt, layer));
    moe4_layer_kind kind = (moe4_layer_kind)ckpt->config.layer_kind[layer];
    MOE4_CHECK(ckpt->ctx, kind == need, MOE4_ERROR_ARGUMENT, "layer %zu is %s", layer, is[kind]);
    return MOE4_OK;
}

moe4_status moe4_checkpoint_layer_kind(const moe4_checkpoint *ckpt, moe4_layer_kind *kind_ret, size_t layer) {
    moe4_begin(ckpt->ctx);
    MOE4_CHECK(ckpt->ctx, kind_ret, MOE4_ERROR_ARGUMENT, "kind_ret is NULL");
    MOE4_TRY(need_layer(ckpt, layer));
    *kind_ret = (moe4_layer_kind)ckpt->config.layer_kind[layer];
    return MOE4_OK;
}

const moe4_tensor *moe4_fused_experts(const moe4_checkpoint *ckpt, size_t layer) {
    const struct moe4_config *c = &ckpt->config;
    char prefix[MOE4_MAX_NAME + 1];
    if (!c->family->fused_experts) return NULL;
    moe4_family_name(prefix, sizeof prefix, c->place, c->family->fused_experts, layer, 0, "");
    size_t i = moe4_checkpoint_seek(ckpt, prefix);
    bool fused = i < ckpt->n_tensors && strncmp(ckpt->by_name[i]->name, prefix, strlen(prefix)) == 0;
    return fused ? ckpt->by_name[i] : NULL;
}

moe4_status moe4_checkpoint_expert(const moe4_checkpoint *ckpt, moe4_weight *weight_ret, size_t layer, int64_t expert, moe4_proj proj) {
    moe4_begin(ckpt->ctx);
    const moe4_ctx *ctx = ckpt->ctx;
    const struct moe4_config *c = &ckpt->config;
    MOE4_CHECK(ctx, weight_ret, MOE4_ERROR_ARGUMENT, "weight_ret is NULL");
    MOE4_CHECK(ctx, (unsigned)proj <= MOE4_DOWN, MOE4_ERROR_ARGUMENT, "proj is %d, need 0 to 2", (int)proj);
    MOE4_TRY(need_kind(ckpt, layer, expert == MOE4_EXPERT_DENSE ? MOE4_LAYER_DENSE : MOE4_LAYER_MOE));
    MOE4_CHECK(ctx, c->family->proj[proj], MOE4_ERROR_ARGUMENT, "layer %zu: experts of %s have no gate", layer, c->family->name);
    const char *pattern = c->family->dense;
    size_t inter = c->dim[MOE4_DIM_DENSE], hidden = c->dim[MOE4_DIM_HIDDEN];
    if (expert == MOE4_EXPERT_SHARED) {
        MOE4_CHECK(ctx, c->dim[MOE4_DIM_N_SHARED], MOE4_ERROR_ARGUMENT, "layer %zu: the model has no shared expert", layer);
        pattern = c->family->shared;
        inter = c->dim[MOE4_DIM_SHARED];
    } else if (expert != MOE4_EXPERT_DENSE) {
        size_t n = c->dim[MOE4_DIM_N_EXPERTS];
        MOE4_CHECK(ctx, expert >= 0 && (uint64_t)expert < n, MOE4_ERROR_ARGUMENT, "layer %zu expert %lld, need 0 to %zu", layer,
                   (long long)expert, n - 1);
        const moe4_tensor *fused = moe4_fused_experts(ckpt, layer); /* none of the names looked for: not NOT_FOUND but this */
        MOE4_CHECK(ctx, !fused, MOE4_ERROR_UNSUPPORTED, "unsupported: fused 3-D experts (found %s)", fused->name);
        pattern = c->family->expert;
        inter = c->dim[MOE4_DIM_EXPERT];
    }
    char name[MOE4_MAX_NAME + 1];
    moe4_family_name(name, sizeof name, c->place, pattern, layer, expert < 0 ? 0 : (size_t)expert, c->family->proj[proj]);
    bool down = proj == MOE4_DOWN;
    char bias[sizeof name + 8];
    snprintf(bias, sizeof bias, "%s.bias", name);
    MOE4_CHECK(ctx, !moe4_checkpoint_lookup(ckpt, bias), MOE4_ERROR_UNSUPPORTED, "unsupported: %s: an expert's bias", bias);
    return moe4_weight_read(ckpt, weight_ret, name, down ? hidden : inter, down ? inter : hidden, NULL, NULL);
}

static bool by_hash(const struct moe4_config *c, size_t layer) {
    return layer < c->n_hash_layers;
}

moe4_status moe4_router_vector(const moe4_checkpoint *ckpt, const moe4_tensor **tensor_ret, const char *pattern, size_t layer) {
    const moe4_ctx *ctx = ckpt->ctx;
    size_t n_experts = ckpt->config.dim[MOE4_DIM_N_EXPERTS];
    char name[MOE4_MAX_NAME + 1];
    *tensor_ret = NULL;
    if (!pattern) return MOE4_OK;
    moe4_family_name(name, sizeof name, ckpt->config.place, pattern, layer, 0, "");
    const moe4_tensor *t = *tensor_ret = moe4_checkpoint_lookup(ckpt, name);
    if (!t) return MOE4_OK;
    MOE4_CHECK(ctx, t->dtype == MOE4_F32 || t->dtype == MOE4_BF16 || t->dtype == MOE4_F16, MOE4_ERROR_UNSUPPORTED,
               "unsupported: %s: dtype %s (moe4 reads F32, BF16 and F16)", name, moe4_dtype_name(t->dtype));
    MOE4_CHECK(ctx, t->n_dims == 1 && t->shape[0] == n_experts, MOE4_ERROR_FORMAT, "%s: %zu elements in %zu dimensions, need %zu in 1",
               name, t->bytes / moe4_dtype_bytes(t->dtype), t->n_dims, n_experts);
    return MOE4_OK;
}

moe4_status moe4_checkpoint_router(const moe4_checkpoint *ckpt, moe4_weight *gate_ret, moe4_tensor *bias_ret, size_t layer) {
    moe4_begin(ckpt->ctx);
    const moe4_ctx *ctx = ckpt->ctx;
    MOE4_TRY(need_kind(ckpt, layer, MOE4_LAYER_MOE));
    const struct moe4_config *c = &ckpt->config;
    const struct moe4_family *f = c->family;
    size_t n_experts = c->dim[MOE4_DIM_N_EXPERTS];
    char name[MOE4_MAX_NAME + 1];
    moe4_weight gate;
    moe4_family_name(name, sizeof name, c->place, f->router, layer, 0, "");
    MOE4_TRY(moe4_weight_read(ckpt, &gate, name, n_experts, c->dim[MOE4_DIM_HIDDEN], NULL, NULL));
    MOE4_CHECK(ctx, gate.dtype != MOE4_NVFP4, MOE4_ERROR_UNSUPPORTED, "unsupported: %s: a router in NVFP4", name);
    moe4_tensor bias = {0};
    if (f->router_bias && !by_hash(c, layer)) {
        const moe4_tensor *t;
        MOE4_TRY(moe4_router_vector(ckpt, &t, f->router_bias, layer));
        moe4_family_name(name, sizeof name, c->place, f->router_bias, layer, 0, "");
        MOE4_CHECK(ctx, t, MOE4_ERROR_NOT_FOUND, "%s: no tensor of this name", name);
        bias = *t;
    }
    if (gate_ret) *gate_ret = gate;
    if (bias_ret) *bias_ret = bias;
    return MOE4_OK;
}

moe4_status moe4_checkpoint_hash_table(const moe4_checkpoint *ckpt, moe4_tensor *table_ret, size_t layer) {
    moe4_begin(ckpt->ctx);
    const moe4_ctx *ctx = ckpt->ctx;
    const struct moe4_config *c = &ckpt->config;
    MOE4_CHECK(ctx, table_ret, MOE4_ERROR_ARGUMENT, "table_ret is NULL");
    MOE4_TRY(need_kind(ckpt, layer, MOE4_LAYER_MOE));
    moe4_tensor table = {0};
    if (by_hash(c, layer)) {
        size_t rows = c->dim[MOE4_DIM_VOCAB], cols = c->dim[MOE4_DIM_TOP_K];
        char name[MOE4_MAX_NAME + 1];
        moe4_family_name(name, sizeof name, c->place, c->family->hash_table, layer, 0, "");
        const moe4_tensor *t = moe4_checkpoint_lookup(ckpt, name);
        MOE4_CHECK(ctx, t, MOE4_ERROR_NOT_FOUND, "%s: no tensor of this name", name);
        MOE4_CHECK(ctx, t->dtype == MOE4_I64 || t->dtype == MOE4_I32, MOE4_ERROR_UNSUPPORTED,
                   "unsupported: %s: dtype %s (moe4 reads I64 and I32)", name, moe4_dtype_name(t->dtype));
        MOE4_CHECK(ctx, t->n_dims == 2 && t->shape[0] == rows && t->shape[1] == cols, MOE4_ERROR_FORMAT,
                   "%s: %zu elements in %zu dimensions, need %zux%zu", name, t->bytes / moe4_dtype_bytes(t->dtype), t->n_dims, rows, cols);
        table = *t;
    }
    *table_ret = table;
    return MOE4_OK;
}
