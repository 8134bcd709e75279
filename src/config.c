#include "config.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "json.h"

/* Reading goes on after a problem: the first one is kept, the values it concerns are 0. */
struct reader {
    struct moe4_config *config;
    const json_t *json;
};

static void wrong(const struct reader *r, moe4_status status, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void wrong(const struct reader *r, moe4_status status, const char *fmt, ...) {
    if (r->config->status != MOE4_OK) return;
    r->config->status = status;
    va_list args;
    va_start(args, fmt);
    vsnprintf(r->config->problem, sizeof r->config->problem, fmt, args);
    va_end(args);
}

/* The value of a key; NULL when it is not there or null. */
static const json_t *value_of(const struct reader *r, const char *key) {
    const json_t *v = json_object_get(r->json, key);
    return json_is_null(v) ? NULL : v;
}

enum { REQUIRED = -1 };

/* A whole number in [min, max]; `otherwise` when the key is not there, unless that is REQUIRED. */
static size_t read_size(const struct reader *r, const char *key, size_t min, size_t max, long long otherwise) {
    const json_t *v = value_of(r, key);
    if (!v && otherwise != REQUIRED) return (size_t)otherwise;
    if (!v) {
        wrong(r, MOE4_ERROR_FORMAT, "config.json: no %s", key);
    } else if (!json_is_integer(v)) {
        wrong(r, MOE4_ERROR_FORMAT, "config.json: %s is not a whole number", key);
    } else {
        long long n = json_integer_value(v);
        if (n >= 0 && (size_t)n >= min && (size_t)n <= max) return (size_t)n;
        wrong(r, MOE4_ERROR_FORMAT, "config.json: %s is %lld, need %zu to %zu", key, n, min, max);
    }
    return 0;
}

static bool read_bool(const struct reader *r, const char *key, int otherwise) {
    const json_t *v = value_of(r, key);
    if (v && !json_is_boolean(v))
        wrong(r, MOE4_ERROR_FORMAT, "config.json: %s is neither true nor false", key);
    else if (!v && otherwise == REQUIRED)
        wrong(r, MOE4_ERROR_FORMAT, "config.json: no %s", key);
    return v ? json_is_true(v) : otherwise > 0;
}

/* A finite number >= 0. */
static float read_float(const struct reader *r, const char *key, float otherwise) {
    const json_t *v = value_of(r, key);
    if (!v) return otherwise;
    double x = json_number_value(v);
    if (json_is_number(v) && x >= 0 && isfinite((float)x)) return (float)x;
    if (json_is_number(v))
        wrong(r, MOE4_ERROR_FORMAT, "config.json: %s is %g, need a number from 0 to 3.4e38", key, x);
    else
        wrong(r, MOE4_ERROR_FORMAT, "config.json: %s is not a number", key);
    return otherwise;
}

/* A string fit to print; NULL when there is none. */
static const char *read_text(const struct reader *r, const char *key) {
    const json_t *v = value_of(r, key);
    const char *text = json_string_value(v);
    if (v && (!text || !moe4_name_ok(text, strlen(text)))) {
        wrong(r, MOE4_ERROR_FORMAT, "config.json: %s is not a string of 1 to %d printable bytes", key, MOE4_MAX_NAME);
        return NULL;
    }
    return text;
}

/* A key that chooses an algorithm: only one is run. */
static void need_text(const struct reader *r, const char *key, const char *need) {
    const char *text = read_text(r, key);
    if (text && strcmp(text, need) != 0)
        wrong(r, MOE4_ERROR_UNSUPPORTED, "unsupported: config.json: %s \"%s\" (moe4 runs \"%s\")", key, text, need);
}

/* ---- sections ---- */

static moe4_status read_architecture(const moe4_ctx *ctx, const struct reader *r) {
    const json_t *list = value_of(r, "architectures");
    const char *text = list ? json_string_value(json_array_get(list, 0)) : "";
    if (!text || (*text && !moe4_name_ok(text, strlen(text)))) {
        wrong(r, MOE4_ERROR_FORMAT, "config.json: architectures is not a list of printable strings");
        text = "";
    }
    struct moe4_config *c = r->config;
    c->architecture = moe4_calloc(ctx, strlen(text) + 1, 1, "architecture");
    if (!c->architecture) return MOE4_ERROR_MEMORY;
    strcpy(c->architecture, text);
    return MOE4_OK;
}

static void read_family(const struct reader *r) {
    struct moe4_config *c = r->config;
    const char *model_type = read_text(r, "model_type"), *why = model_type ? moe4_family_refused(model_type) : NULL;
    c->family = model_type ? moe4_family_find(model_type) : NULL;
    if (c->family) {
        c->place = c->family->places;
        return;
    }
    if (why) wrong(r, MOE4_ERROR_UNSUPPORTED, "unsupported: model_type \"%s\": %s", model_type, why);
    char known[256] = "";
    for (size_t i = 0, at = 0; i < moe4_n_families && at < sizeof known; i++)
        at += (size_t)snprintf(known + at, sizeof known - at, "%s%s", i ? ", " : "", moe4_families[i].name);
    wrong(r, MOE4_ERROR_UNSUPPORTED, "unsupported: model_type \"%.80s\" (found architecture \"%.80s\"; moe4 runs %s)",
          model_type ? model_type : "", c->architecture, known);
}

enum { MAX_SIZE = 1 << 24, MAX_LAYERS = 10000, MAX_EXPERTS = 65536, MAX_ALL_EXPERTS = 1 << 20 };

/* Of a router that limits its choice to some groups of experts. */
static void read_groups(const struct reader *r, size_t n_experts, size_t k) {
    size_t groups = r->config->dim[MOE4_DIM_N_GROUP] = read_size(r, "n_group", 1, n_experts, 1);
    size_t chosen = r->config->dim[MOE4_DIM_TOPK_GROUP] = read_size(r, "topk_group", 1, groups, 1);
    if (r->config->status != MOE4_OK || groups == 1) return;
    if (n_experts % groups)
        wrong(r, MOE4_ERROR_FORMAT, "config.json: %zu experts cannot be split into n_group %zu", n_experts, groups);
    else if (n_experts / groups < 2)
        wrong(r, MOE4_ERROR_FORMAT, "config.json: groups of %zu expert, need 2 (a group's score is the sum of its two best)",
              n_experts / groups);
    else if (k > chosen * (n_experts / groups))
        wrong(r, MOE4_ERROR_FORMAT, "config.json: num_experts_per_tok is %zu, but topk_group %zu leaves %zu experts to choose from", k,
              chosen, chosen * (n_experts / groups));
}

static void read_router(const struct reader *r) {
    struct moe4_config *c = r->config;
    moe4_router_kind kind = c->family->router_kind;
    c->normalize = read_bool(r, "norm_topk_prob", c->family->normalizes ? true : REQUIRED);
    c->routed_scale = c->gate_temp = 1.f;
    if (kind != MOE4_ROUTER_SIGMOID_BIAS && kind != MOE4_ROUTER_SQRTSOFTPLUS_BIAS) return;
    need_text(r, "scoring_func", kind == MOE4_ROUTER_SIGMOID_BIAS ? "sigmoid" : "sqrtsoftplus");
    need_text(r, "topk_method", "noaux_tc");
    c->routed_scale = read_float(r, "routed_scaling_factor", 1.f);
    if (c->routed_scale == 0) wrong(r, MOE4_ERROR_FORMAT, "config.json: routed_scaling_factor is 0");
    if (kind == MOE4_ROUTER_SIGMOID_BIAS) {
        read_groups(r, c->dim[MOE4_DIM_N_EXPERTS], c->dim[MOE4_DIM_TOP_K]);
    } else {
        c->gate_temp = read_float(r, "gate_temp", 1.f);
        if (c->gate_temp == 0) wrong(r, MOE4_ERROR_FORMAT, "config.json: gate_temp is 0");
    }
}

static void read_moe(const struct reader *r) {
    struct moe4_config *c = r->config;
    const struct moe4_family *f = c->family;
    size_t *dim = c->dim;
    const char *newer = "num_local_experts"; /* what transformers 5 calls every family's number when it writes one */
    const char *key = !value_of(r, f->key_n_experts) && value_of(r, newer) ? newer : f->key_n_experts;
    size_t n_experts = dim[MOE4_DIM_N_EXPERTS] = read_size(r, key, 1, MAX_EXPERTS, REQUIRED);
    size_t again = read_size(r, newer, 1, MAX_EXPERTS, (long long)n_experts);
    if (again != n_experts) wrong(r, MOE4_ERROR_FORMAT, "config.json: %s is %zu, but %s is %zu", key, n_experts, newer, again);
    dim[MOE4_DIM_TOP_K] = read_size(r, "num_experts_per_tok", 1, n_experts, REQUIRED);
    dim[MOE4_DIM_EXPERT] = read_size(r, f->key_expert, 1, MAX_SIZE, REQUIRED);
    if (f->shared) dim[MOE4_DIM_N_SHARED] = read_size(r, "n_shared_experts", 0, 64, 0);
    dim[MOE4_DIM_SHARED] = dim[MOE4_DIM_EXPERT] * dim[MOE4_DIM_N_SHARED];
    if (f->key_shared && dim[MOE4_DIM_N_SHARED]) dim[MOE4_DIM_SHARED] = read_size(r, f->key_shared, 1, MAX_SIZE, REQUIRED);
    need_text(r, f->key_activation, f->activation == MOE4_RELU2 ? "relu2" : "silu");
    if (f->activation == MOE4_SWIGLU) c->swiglu_limit = read_float(r, "swiglu_limit", 0.f);
    size_t latent = read_size(r, "moe_latent_size", 1, MAX_SIZE, 0);
    if (latent)
        wrong(r, MOE4_ERROR_UNSUPPORTED, "unsupported: config.json: moe_latent_size %zu (experts that work on a projection of x)", latent);
    read_router(r);
}

/* A letter or a word for each layer; the letters' words are those of layers_block_type. */
static void read_pattern(const struct reader *r, size_t n) {
    static const struct {
        char letter;
        const char *word;
        moe4_layer_kind kind;
        unsigned has;
    } known[] = {{'E', "moe", MOE4_LAYER_MOE, 0},
                 {'-', "mlp", MOE4_LAYER_DENSE, 0},
                 {'M', "mamba", MOE4_LAYER_OTHER, MOE4_IF_MAMBA},
                 {'*', "attention", MOE4_LAYER_OTHER, MOE4_IF_ATTENTION}};
    enum { N_KNOWN = sizeof known / sizeof *known };
    const json_t *words = value_of(r, "layers_block_type");
    const char *key = words ? "layers_block_type" : "hybrid_override_pattern", *letters = words ? NULL : read_text(r, key);
    size_t length = words ? json_array_size(words) : letters ? strlen(letters) : 0;
    if (length != n) {
        wrong(r, MOE4_ERROR_FORMAT, "config.json: %s has %zu layers, num_hidden_layers is %zu", key, length, n);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        const char *word = words ? json_string_value(json_array_get(words, i)) : "";
        int k = 0;
        while (k < N_KNOWN && !(words ? word && strcmp(word, known[k].word) == 0 : letters[i] == known[k].letter)) k++;
        if (k == N_KNOWN) {
            wrong(r, MOE4_ERROR_FORMAT, "config.json: %s: layer %zu is none of E - M * (moe, mlp, mamba, attention)", key, i);
        } else {
            r->config->layer_kind[i] = (uint8_t)known[k].kind;
            r->config->layer_has[i] = (uint16_t)known[k].has;
        }
    }
}

static moe4_status read_layers(const moe4_ctx *ctx, const struct reader *r) {
    struct moe4_config *c = r->config;
    size_t n = c->dim[MOE4_DIM_LAYERS] = read_size(r, "num_hidden_layers", 1, MAX_LAYERS, REQUIRED);
    c->layer_kind = moe4_calloc(ctx, n, 1, "kinds of layers");
    c->layer_has = moe4_calloc(ctx, n, sizeof *c->layer_has, "parts of layers");
    if (!c->layer_kind || !c->layer_has) return MOE4_ERROR_MEMORY;
    size_t n_dense = 0;
    if (c->family->layer_rule == MOE4_LAYERS_ALL) {
        memset(c->layer_kind, MOE4_LAYER_MOE, n);
    } else if (c->family->layer_rule == MOE4_LAYERS_PATTERN) {
        read_pattern(r, n);
    } else if (c->family->layer_rule == MOE4_LAYERS_FIRST_K) {
        size_t first = read_size(r, "first_k_dense_replace", 0, n, REQUIRED);
        size_t step = read_size(r, "moe_layer_freq", 1, MAX_LAYERS, 1);
        for (size_t i = 0; i < n && step; i++) c->layer_kind[i] = i >= first && i % step == 0 ? MOE4_LAYER_MOE : MOE4_LAYER_DENSE;
    } else {
        size_t step = read_size(r, "decoder_sparse_step", 1, MAX_LAYERS, 1);
        for (size_t i = 0; i < n && step; i++) c->layer_kind[i] = (i + 1) % step == 0 ? MOE4_LAYER_MOE : MOE4_LAYER_DENSE;
        const json_t *dense = value_of(r, "mlp_only_layers");
        if (dense && !json_is_array(dense)) wrong(r, MOE4_ERROR_FORMAT, "config.json: mlp_only_layers is not a list");
        for (size_t i = 0; i < json_array_size(dense); i++) {
            const json_t *v = json_array_get(dense, i);
            if (json_is_integer(v) && json_integer_value(v) >= 0 && (size_t)json_integer_value(v) < n)
                c->layer_kind[json_integer_value(v)] = MOE4_LAYER_DENSE;
            else
                wrong(r, MOE4_ERROR_FORMAT, "config.json: mlp_only_layers[%zu] is no layer from 0 to %zu", i, n ? n - 1 : 0);
        }
    }
    size_t experts = n * c->dim[MOE4_DIM_N_EXPERTS];
    if (experts > MAX_ALL_EXPERTS)
        wrong(r, MOE4_ERROR_FORMAT, "config.json: %zu layers of %zu experts, at most %d together", n, c->dim[MOE4_DIM_N_EXPERTS],
              MAX_ALL_EXPERTS);
    if (c->family->hash_table) c->n_hash_layers = read_size(r, "num_hash_layers", 0, n, 0);
    for (size_t i = 0; i < n; i++) n_dense += c->layer_kind[i] == MOE4_LAYER_DENSE;
    if (n_dense) c->dim[MOE4_DIM_DENSE] = read_size(r, "intermediate_size", 1, MAX_SIZE, REQUIRED);
    return MOE4_OK;
}

/* Attention is not run here, only checked for completeness: a size that is not stated is 0 and then not compared. */
static void read_attention(const struct reader *r) {
    struct moe4_config *c = r->config;
    size_t *dim = c->dim;
    size_t heads = dim[MOE4_DIM_HEADS] = read_size(r, "num_attention_heads", 1, 65536, 0);
    dim[MOE4_DIM_KV_HEADS] = read_size(r, "num_key_value_heads", 1, 65536, (long long)heads);
    dim[MOE4_DIM_HEAD] = read_size(r, "head_dim", 1, 65536, (long long)(heads ? dim[MOE4_DIM_HIDDEN] / heads : 0));
    dim[MOE4_DIM_Q_LORA] = read_size(r, "q_lora_rank", 1, MAX_SIZE, 0);
    dim[MOE4_DIM_KV_LORA] = read_size(r, "kv_lora_rank", 1, MAX_SIZE, 0);
    dim[MOE4_DIM_NOPE] = read_size(r, "qk_nope_head_dim", 1, 65536, 0);
    dim[MOE4_DIM_ROPE] = read_size(r, "qk_rope_head_dim", 1, 65536, 0);
    dim[MOE4_DIM_V] = read_size(r, "v_head_dim", 1, 65536, 0);
    dim[MOE4_DIM_Q] = heads * dim[MOE4_DIM_HEAD];
    dim[MOE4_DIM_KV] = dim[MOE4_DIM_KV_HEADS] * dim[MOE4_DIM_HEAD];
    if (dim[MOE4_DIM_KV_LORA] && dim[MOE4_DIM_NOPE] && dim[MOE4_DIM_ROPE] && dim[MOE4_DIM_V]) {
        dim[MOE4_DIM_MLA_Q] = heads * (dim[MOE4_DIM_NOPE] + dim[MOE4_DIM_ROPE]);
        dim[MOE4_DIM_MLA_KV_A] = dim[MOE4_DIM_KV_LORA] + dim[MOE4_DIM_ROPE];
        dim[MOE4_DIM_MLA_KV_B] = heads * (dim[MOE4_DIM_NOPE] + dim[MOE4_DIM_V]);
        dim[MOE4_DIM_MLA_O] = heads * dim[MOE4_DIM_V];
    }
    c->has |= dim[MOE4_DIM_Q_LORA] ? MOE4_IF_Q_LORA : MOE4_IF_NO_Q_LORA;
    if (read_bool(r, "attention_bias", false)) c->has |= MOE4_IF_ATTN_BIAS;
    if (read_bool(r, "use_qk_norm", false)) c->has |= MOE4_IF_QK_NORM;
}

/* ---- what verify looks for besides: sizes that are not stated are not compared ---- */

static void read_mamba(const struct reader *r) {
    size_t *dim = r->config->dim;
    size_t heads = dim[MOE4_DIM_MAMBA_HEADS] = read_size(r, "mamba_num_heads", 1, 65536, 0);
    size_t inner = dim[MOE4_DIM_MAMBA_INNER] = heads * read_size(r, "mamba_head_dim", 1, 65536, 0);
    size_t state = read_size(r, "n_groups", 1, 65536, 0) * read_size(r, "ssm_state_size", 1, 65536, 0);
    dim[MOE4_DIM_MAMBA_KERNEL] = read_size(r, "conv_kernel", 1, 65536, 0);
    if (inner && state) {
        dim[MOE4_DIM_MAMBA_CONV] = inner + 2 * state;
        dim[MOE4_DIM_MAMBA_IN] = inner + dim[MOE4_DIM_MAMBA_CONV] + heads;
    }
    if (read_bool(r, "use_conv_bias", true)) r->config->has |= MOE4_IF_CONV_BIAS;
}

/* DeepSeek-V4's attention and residual streams. */
static void read_streams(const struct reader *r) {
    size_t *dim = r->config->dim;
    size_t groups = read_size(r, "o_groups", 1, 65536, 0), hc = dim[MOE4_DIM_HC] = read_size(r, "hc_mult", 1, 256, 0);
    dim[MOE4_DIM_O_LORA] = groups * read_size(r, "o_lora_rank", 1, MAX_SIZE, 0);
    if (groups) dim[MOE4_DIM_O_GROUP] = dim[MOE4_DIM_Q] / groups;
    dim[MOE4_DIM_HC_HIDDEN] = hc * dim[MOE4_DIM_HIDDEN];
    dim[MOE4_DIM_HC_MIX] = (2 + hc) * hc;
    if (hc) r->config->has |= MOE4_IF_HC;
}

/* Sets `bit` in the layers that the key lists. */
static void read_layer_list(const struct reader *r, const char *key, unsigned bit) {
    const json_t *list = value_of(r, key);
    struct moe4_config *c = r->config;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i);
        long long layer = json_integer_value(v);
        if (json_is_integer(v) && layer >= 0 && (size_t)layer < c->dim[MOE4_DIM_LAYERS])
            c->layer_has[layer] |= (uint16_t)bit;
        else
            wrong(r, MOE4_ERROR_FORMAT, "config.json: %s[%zu] is no layer from 0 to %zu", key, i, c->dim[MOE4_DIM_LAYERS] - 1);
    }
}

/* indexer_types has "full" for a layer with an indexer of its own. With an index_topk_freq alone it is not known which those are. */
static void read_indexer_types(const struct reader *r) {
    struct moe4_config *c = r->config;
    const json_t *types = value_of(r, "indexer_types");
    bool all = !types && c->dim[MOE4_DIM_INDEX_HEADS] && !value_of(r, "index_topk_freq");
    for (size_t i = 0; i < c->dim[MOE4_DIM_LAYERS]; i++) {
        const char *type = json_string_value(json_array_get(types, i));
        if (all || (type && strcmp(type, "full") == 0)) c->layer_has[i] |= MOE4_IF_INDEXER;
    }
}

static void read_sparse(const struct reader *r) {
    struct moe4_config *c = r->config;
    enum moe4_sparse_rule rule = c->family->sparse;
    size_t heads = c->dim[MOE4_DIM_INDEX_HEADS] = read_size(r, "index_n_heads", 1, 65536, 0);
    size_t head = c->dim[MOE4_DIM_INDEX_HEAD] = read_size(r, "index_head_dim", 1, 65536, 0);
    c->dim[MOE4_DIM_INDEX_Q] = heads * head;
    c->dim[MOE4_DIM_INDEX_HEAD_TWICE] = 2 * head;
    c->dim[MOE4_DIM_HEAD_TWICE] = 2 * c->dim[MOE4_DIM_HEAD];
    if (rule == MOE4_SPARSE_TYPES) read_indexer_types(r);
    if (rule != MOE4_SPARSE_RATIOS && rule != MOE4_SPARSE_SOURCES) return;
    read_streams(r);
    const json_t *ratios = value_of(r, "compress_ratios"); /* the predicting layers' behind the others' */
    if (rule == MOE4_SPARSE_SOURCES) {
        read_layer_list(r, "kv_source_layer_ids", MOE4_IF_COMPRESSOR);
        read_layer_list(r, "index_source_layer_ids", MOE4_IF_INDEXER);
        read_layer_list(r, "engram_layer_ids", MOE4_IF_ENGRAM);
    }
    for (size_t i = 0; i < c->dim[MOE4_DIM_LAYERS] && i < json_array_size(ratios); i++) {
        long long ratio = json_integer_value(json_array_get(ratios, i));
        if (rule == MOE4_SPARSE_RATIOS && ratio > 1) c->layer_has[i] |= ratio == 4 ? MOE4_IF_INDEXER : MOE4_IF_COMPRESSOR;
        if (rule == MOE4_SPARSE_SOURCES && ratio > 1 && c->layer_has[i] & MOE4_IF_COMPRESSOR) c->layer_has[i] |= MOE4_IF_POOLED;
    }
}

static moe4_status read_all(const moe4_ctx *ctx, struct reader *r) {
    struct moe4_config *c = r->config;
    MOE4_TRY(read_architecture(ctx, r));
    const json_t *text = value_of(r, "text_config"); /* a model of more than text: the rest is about its language model */
    if (text && !json_is_object(text)) wrong(r, MOE4_ERROR_FORMAT, "config.json: text_config is not an object");
    if (json_is_object(text)) r->json = text;
    read_family(r);
    if (!c->family) return MOE4_OK;
    c->dim[MOE4_DIM_HIDDEN] = read_size(r, "hidden_size", 1, MAX_SIZE, REQUIRED);
    c->dim[MOE4_DIM_VOCAB] = read_size(r, "vocab_size", 1, (size_t)1 << 31, REQUIRED);
    if (!read_bool(r, "tie_word_embeddings", false)) c->has |= MOE4_IF_UNTIED;
    read_moe(r);
    MOE4_TRY(read_layers(ctx, r));
    read_attention(r);
    c->dim[MOE4_DIM_ONE] = 1;
    c->dim[MOE4_DIM_THREE] = 3;
    if (c->family->layer_rule == MOE4_LAYERS_PATTERN) read_mamba(r);
    if (c->family->sparse != MOE4_SPARSE_NONE && c->status == MOE4_OK) read_sparse(r);
    c->has |= c->family->always;
    return MOE4_OK;
}

moe4_status moe4_config_read(const moe4_ctx *ctx, struct moe4_config *config, const char *text, size_t bytes) {
    *config = (struct moe4_config){.status = MOE4_OK};
    json_t *json;
    MOE4_TRY(moe4_json_parse(ctx, &json, "config.json", text, bytes));
    struct reader r = {config, json};
    moe4_status status = read_all(ctx, &r);
    json_decref(json);
    return status;
}

void moe4_config_free(const moe4_ctx *ctx, struct moe4_config *config) {
    moe4_free(ctx, config->architecture);
    moe4_free(ctx, config->layer_kind);
    moe4_free(ctx, config->layer_has);
    config->architecture = NULL;
    config->layer_kind = NULL;
    config->layer_has = NULL;
}
