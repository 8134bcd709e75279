/* Weights: every layer's objects are made when the model opens, so an incomplete checkpoint is refused before the first token. */
#include "lm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NAME_BYTES = 160 };

float lm_element(const void *data, moe4_dtype dtype, size_t i) {
    const char *p = (const char *)data + i * moe4_dtype_bytes(dtype);
    uint16_t bits;
    float value;
    if (dtype == MOE4_F32) {
        memcpy(&value, p, sizeof value);
        return value;
    }
    memcpy(&bits, p, sizeof bits);
    return dtype == MOE4_BF16 ? moe4_bf16_to_float(bits) : moe4_f16_to_float(bits);
}

static bool is_wide(moe4_dtype dtype) {
    return dtype == MOE4_F32 || dtype == MOE4_BF16 || dtype == MOE4_F16;
}

/* *vector_ret = the n values of a tensor in fp32, the caller's to free. */
static moe4_status load_vector(struct lm_model *model, float **vector_ret, size_t n, const char *name) {
    struct lm *lm = model->lm;
    moe4_tensor t;
    LM_TRY(lm, moe4_checkpoint_find(model->ckpt, &t, name));
    LM_CHECK(lm, is_wide(t.dtype), MOE4_ERROR_UNSUPPORTED, "%s: %s, moe4 reads F32, BF16 or F16", name, moe4_dtype_name(t.dtype));
    LM_CHECK(lm, t.n_dims == 1 && t.shape[0] == n, MOE4_ERROR_FORMAT, "%s: %zu values in %zu dimensions, need %zu in one", name,
             t.bytes / moe4_dtype_bytes(t.dtype), t.n_dims, n);
    float *v = lm_calloc(lm, n, sizeof *v, name);
    if (!v) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) v[i] = lm_element(t.data, t.dtype, i);
    model->fixed_bytes += t.bytes;
    *vector_ret = v;
    return MOE4_OK;
}

static moe4_status load_layer_vector(struct lm_model *model, float **vector_ret, size_t n, size_t layer, const char *what) {
    char name[NAME_BYTES];
    snprintf(name, sizeof name, "model.layers.%zu.%s", layer, what);
    return load_vector(model, vector_ret, n, name);
}

/* The mode for matrices of this format: what was asked for is for NVFP4, the others have one of their own. */
static moe4_act act_for(struct lm_model *model, moe4_act asked, bool nvfp4) {
    if (!nvfp4) return MOE4_ACT_DEFAULT;
    model->act = asked == MOE4_ACT_DEFAULT ? MOE4_ACT_TOKEN : asked;
    return asked;
}

static uint64_t weight_bytes(const moe4_weight *w) {
    moe4_dtype kept = w->dtype != MOE4_F8_E4M3 ? w->dtype : w->scale_dtype == MOE4_F8_E8M0 ? MOE4_BF16 : MOE4_F32;
    return w->dtype == MOE4_NVFP4 ? (uint64_t)w->rows * (w->cols / 2 + w->cols / MOE4_BLOCK)
                                  : (uint64_t)w->rows * w->cols * moe4_dtype_bytes(kept);
}

static moe4_status find_matrix(struct lm_model *model, moe4_weight *w, size_t rows, size_t cols, const char *module) {
    LM_TRY(model->lm, moe4_checkpoint_weight(model->ckpt, w, module));
    LM_CHECK(model->lm, w->rows == rows && w->cols == cols, MOE4_ERROR_FORMAT, "%s: %zux%zu, config.json says %zux%zu", module, w->rows,
             w->cols, rows, cols);
    model->fixed_bytes += weight_bytes(w);
    return MOE4_OK;
}

static moe4_status make_linear(struct lm_model *model, moe4_linear **linear_ret, const moe4_weight *weights, size_t n_weights,
                               moe4_act asked) {
    moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
    o.act = act_for(model, asked, weights[0].dtype == MOE4_NVFP4);
    LM_TRY(model->lm, moe4_linear_create(linear_ret, model->lm->ctx, weights, n_weights, &o));
    return MOE4_OK;
}

static moe4_status load_attention(struct lm_model *model, struct lm_layer *l, size_t layer, moe4_act asked) {
    struct lm *lm = model->lm;
    const struct lm_attention *a = &model->config.attention;
    size_t hidden = model->config.info.hidden, n_q = a->n_heads * a->head_dim, n_kv = a->n_kv_heads * a->head_dim;
    const struct {
        const char *name;
        size_t rows, cols;
        bool has_bias;
        float **bias;
    } proj[4] = {{"q_proj", n_q, hidden, a->qkv_bias, &l->q_bias},
                 {"k_proj", n_kv, hidden, a->qkv_bias, &l->k_bias},
                 {"v_proj", n_kv, hidden, a->qkv_bias, &l->v_bias},
                 {"o_proj", hidden, n_q, a->o_bias, &l->o_bias}};
    moe4_weight w[4];
    for (int i = 0; i < 4; i++) {
        char name[NAME_BYTES];
        snprintf(name, sizeof name, "model.layers.%zu.self_attn.%s", layer, proj[i].name);
        LM_TRY(lm, find_matrix(model, &w[i], proj[i].rows, proj[i].cols, name));
        strcat(name, ".bias");
        if (proj[i].has_bias) LM_TRY(lm, load_vector(model, proj[i].bias, proj[i].rows, name));
    }
    if (a->qk_norm) {
        LM_TRY(lm, load_layer_vector(model, &l->q_norm, a->head_dim, layer, "self_attn.q_norm.weight"));
        LM_TRY(lm, load_layer_vector(model, &l->k_norm, a->head_dim, layer, "self_attn.k_norm.weight"));
    }
    LM_TRY(lm, make_linear(model, &l->qkv, w, 3, asked));
    return make_linear(model, &l->o, &w[3], 1, asked);
}

/* Whether any matrix of a layer's MLP is NVFP4: published checkpoints leave single experts or the shared one unquantized. */
static moe4_status mlp_has_nvfp4(struct lm_model *model, bool *has_ret, size_t layer, moe4_layer_kind kind) {
    const moe4_model_info *info = &model->config.info;
    int64_t first = kind == MOE4_LAYER_DENSE ? MOE4_EXPERT_DENSE : info->n_shared_experts ? MOE4_EXPERT_SHARED : 0;
    int64_t end = kind == MOE4_LAYER_DENSE ? MOE4_EXPERT_DENSE + 1 : (int64_t)info->n_experts;
    *has_ret = false;
    for (int64_t e = first; e < end && !*has_ret; e++)
        for (int p = MOE4_GATE; p <= MOE4_DOWN && !*has_ret; p++) {
            moe4_weight w;
            LM_TRY(model->lm, moe4_checkpoint_expert(model->ckpt, &w, layer, e, (moe4_proj)p));
            *has_ret = w.dtype == MOE4_NVFP4;
        }
    return MOE4_OK;
}

static moe4_status load_mlp(struct lm_model *model, struct lm_layer *l, size_t layer, moe4_act asked) {
    struct lm *lm = model->lm;
    moe4_layer_kind kind;
    bool nvfp4;
    LM_TRY(lm, moe4_checkpoint_layer_kind(model->ckpt, &kind, layer));
    LM_TRY(lm, mlp_has_nvfp4(model, &nvfp4, layer, kind));

    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    o.act = act_for(model, asked, nvfp4);
    o.x_dtype = o.y_dtype = MOE4_F32;
    o.with_shared = kind == MOE4_LAYER_MOE && model->config.info.n_shared_experts > 0;
    LM_TRY(lm, moe4_moe_create_from_checkpoint(&l->mlp, lm->ctx, model->ckpt, layer, &o));
    if (kind == MOE4_LAYER_DENSE) return MOE4_OK;

    moe4_weight gate;
    moe4_tensor bias;
    LM_TRY(lm, moe4_checkpoint_router(model->ckpt, &gate, &bias, layer));
    model->fixed_bytes += weight_bytes(&gate);
    moe4_router_options r = MOE4_ROUTER_OPTIONS_INIT;
    LM_TRY(lm, moe4_router_create_from_checkpoint(&l->router, lm->ctx, model->ckpt, layer, &r));
    return MOE4_OK;
}

static moe4_status load_ends(struct lm_model *model, moe4_act asked) {
    struct lm *lm = model->lm;
    const moe4_model_info *info = &model->config.info;
    static const char embedding[] = "model.embed_tokens.weight";
    moe4_tensor *t = &model->embedding;
    LM_TRY(lm, moe4_checkpoint_find(model->ckpt, t, embedding));
    LM_CHECK(lm, is_wide(t->dtype), MOE4_ERROR_UNSUPPORTED, "%s: %s, moe4 reads F32, BF16 or F16", embedding, moe4_dtype_name(t->dtype));
    LM_CHECK(lm, t->n_dims == 2 && t->shape[0] == info->vocab && t->shape[1] == info->hidden, MOE4_ERROR_FORMAT,
             "%s: %zux%zu in %zu dimensions, config.json says %zux%zu", embedding, t->shape[0], t->n_dims > 1 ? t->shape[1] : 0, t->n_dims,
             info->vocab, info->hidden);
    LM_TRY(lm, load_vector(model, &model->final_norm, info->hidden, "model.norm.weight"));
    moe4_weight head;
    LM_TRY(lm, find_matrix(model, &head, info->vocab, info->hidden, model->config.tied ? "model.embed_tokens" : "lm_head"));
    return make_linear(model, &model->head, &head, 1, asked);
}

static moe4_status load(struct lm_model *model, const char *path, moe4_act asked) {
    struct lm *lm = model->lm;
    LM_TRY(lm, moe4_checkpoint_open(&model->ckpt, lm->ctx, path));
    LM_TRY(lm, lm_config_read(lm, &model->config, model->ckpt));
    const moe4_model_info *info = &model->config.info;
    model->act = MOE4_ACT_BF16;
    LM_TRY(lm, load_ends(model, asked));
    model->layers = lm_calloc(lm, info->n_layers, sizeof *model->layers, "layers");
    if (!model->layers) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < info->n_layers; i++) {
        struct lm_layer *l = &model->layers[i];
        LM_TRY(lm, load_layer_vector(model, &l->input_norm, info->hidden, i, "input_layernorm.weight"));
        LM_TRY(lm, load_attention(model, l, i, asked));
        LM_TRY(lm, load_layer_vector(model, &l->post_norm, info->hidden, i, "post_attention_layernorm.weight"));
        LM_TRY(lm, load_mlp(model, l, i, asked));
    }
    LM_CHECK(lm, asked == MOE4_ACT_DEFAULT || asked == model->act, MOE4_ERROR_ARGUMENT, "mode %s: no matrix of this model is NVFP4",
             moe4_act_name(asked));
    return MOE4_OK;
}

static bool has_tokenizer(const char *folder) {
    static const char *const files[] = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"};
    char path[4096];
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        if ((size_t)snprintf(path, sizeof path, "%s/%s", folder, files[i]) < sizeof path && access(path, F_OK) == 0) return true;
    return false;
}

moe4_status lm_model_open(struct lm_model **model_ret, struct lm *lm, const char *path, moe4_act act) {
    *model_ret = NULL;
    lm->error[0] = '\0';
    struct lm_model *model = lm_calloc(lm, 1, sizeof *model, "model");
    if (!model) return MOE4_ERROR_MEMORY;
    model->lm = lm;
    moe4_status status = load(model, path, act);
    if (status != MOE4_OK) {
        lm_model_close(model);
        return status;
    }
    model->byte_level = model->config.info.vocab == 256 && !has_tokenizer(path);
    *model_ret = model;
    return MOE4_OK;
}

static void free_layer(struct lm_layer *l) {
    float *const vectors[] = {l->input_norm, l->post_norm, l->q_bias, l->k_bias, l->v_bias, l->o_bias, l->q_norm, l->k_norm};
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) free(vectors[i]);
    moe4_linear_destroy(l->qkv);
    moe4_linear_destroy(l->o);
    moe4_router_destroy(l->router);
    moe4_moe_destroy(l->mlp);
}

void lm_model_close(struct lm_model *model) {
    if (!model) return;
    for (size_t i = 0; model->layers && i < model->config.info.n_layers; i++) free_layer(&model->layers[i]);
    free(model->layers);
    free(model->final_norm);
    moe4_linear_destroy(model->head);
    moe4_checkpoint_close(model->ckpt);
    free(model);
}
