/* The model families moe4 knows: one row each. Tensor names, the router, the keys of config.json and what every layer must have are
 * data; a new family is a new row, and a line of code only where it needs a rule that no other has. */
#ifndef MOE4_FAMILIES_H
#define MOE4_FAMILIES_H

#include "internal.h"

/* Sizes that config.json states or that follow from it. */
enum moe4_dim {
    MOE4_DIM_NONE,
    MOE4_DIM_UNSTATED, /* a side of a matrix that config.json does not tell: 0, not compared */
    MOE4_DIM_HIDDEN,
    MOE4_DIM_VOCAB,
    MOE4_DIM_LAYERS,
    MOE4_DIM_DENSE,  /* intermediate of a dense layer */
    MOE4_DIM_EXPERT, /* intermediate of an expert */
    MOE4_DIM_SHARED, /* intermediate of the shared expert: EXPERT times their number */
    MOE4_DIM_N_EXPERTS,
    MOE4_DIM_TOP_K,
    MOE4_DIM_N_SHARED,
    MOE4_DIM_N_GROUP,
    MOE4_DIM_TOPK_GROUP,
    MOE4_DIM_HEADS,
    MOE4_DIM_KV_HEADS,
    MOE4_DIM_HEAD,   /* one head of q, k and v */
    MOE4_DIM_Q,      /* HEADS * HEAD */
    MOE4_DIM_KV,     /* KV_HEADS * HEAD */
    MOE4_DIM_Q_LORA, /* the rest is multi-head latent attention's */
    MOE4_DIM_KV_LORA,
    MOE4_DIM_NOPE,
    MOE4_DIM_ROPE,
    MOE4_DIM_V,
    MOE4_DIM_MLA_Q,    /* HEADS * (NOPE + ROPE) */
    MOE4_DIM_MLA_KV_A, /* KV_LORA + ROPE */
    MOE4_DIM_MLA_KV_B, /* HEADS * (NOPE + V) */
    MOE4_DIM_MLA_O,    /* HEADS * V */
    MOE4_DIM_INDEX_HEADS,
    MOE4_DIM_INDEX_HEAD,
    MOE4_DIM_INDEX_HEAD_TWICE,
    MOE4_DIM_INDEX_Q, /* INDEX_HEADS * INDEX_HEAD */
    MOE4_DIM_HEAD_TWICE,
    MOE4_DIM_O_LORA,    /* all groups' */
    MOE4_DIM_O_GROUP,   /* the heads of one group */
    MOE4_DIM_HC,        /* streams of hyper-connections */
    MOE4_DIM_HC_HIDDEN, /* HC * HIDDEN */
    MOE4_DIM_HC_MIX,    /* (2 + HC) * HC */
    MOE4_DIM_MAMBA_HEADS,
    MOE4_DIM_MAMBA_INNER, /* MAMBA_HEADS times their size */
    MOE4_DIM_MAMBA_CONV,  /* INNER and two states for each group */
    MOE4_DIM_MAMBA_IN,    /* INNER + CONV + HEADS */
    MOE4_DIM_MAMBA_KERNEL,
    MOE4_DIM_ONE,
    MOE4_DIM_THREE,
    MOE4_N_DIMS
};

/* When a part is there: bits that config.json switches, for the model or for a layer. */
enum {
    MOE4_IF_UNTIED = 1,    /* lm_head is not the embedding */
    MOE4_IF_ATTN_BIAS = 2, /* attention_bias */
    MOE4_IF_QK_NORM = 4,   /* use_qk_norm, or a family that always has it */
    MOE4_IF_Q_LORA = 8,
    MOE4_IF_NO_Q_LORA = 16,
    MOE4_IF_HC = 32, /* hyper-connections */
    MOE4_IF_CONV_BIAS = 64,
    MOE4_IF_ATTENTION = 128, /* from here on of a layer */
    MOE4_IF_MAMBA = 256,
    MOE4_IF_COMPRESSOR = 512,
    MOE4_IF_POOLED = 1024, /* a compressor of more than one token */
    MOE4_IF_INDEXER = 2048,
    MOE4_IF_ENGRAM = 4096
};

/* A tensor that must be there: a matrix [rows, cols], maybe quantized, named by its module; or a tensor of its own name. */
struct moe4_part {
    const char *name;
    enum moe4_dim rows, cols; /* of a tensor: its first dimension, and the elements behind it; NONE: a vector */
    unsigned when;            /* MOE4_IF_ bits that must all be set */
    enum { MOE4_PART_MATRIX, MOE4_PART_TENSOR } kind;
};

enum moe4_layer_rule {
    MOE4_LAYERS_ALL,         /* every layer is MoE */
    MOE4_LAYERS_FIRST_K,     /* dense below first_k_dense_replace, then every moe_layer_freq-th is MoE */
    MOE4_LAYERS_SPARSE_STEP, /* every decoder_sparse_step-th is MoE, but for mlp_only_layers */
    MOE4_LAYERS_PATTERN      /* a letter or a word for each layer: MoE, dense, or neither */
};

/* How config.json says which layers have a compressor or an indexer. */
enum moe4_sparse_rule {
    MOE4_SPARSE_NONE,
    MOE4_SPARSE_TYPES,  /* an indexer in all layers, or in those that indexer_types calls full */
    MOE4_SPARSE_RATIOS, /* compress_ratios: 4 an indexer, above 1 a compressor (DeepSeek-V4) */
    MOE4_SPARSE_SOURCES /* lists of layers whose keys or indices others read (DeepSeek-V4.1) */
};

/* Where a model stands among the names of its checkpoint, which may hold more than it (images, sound): what the names of its body and of
 * its head begin with. */
struct moe4_place {
    const char *root, *head;
};

struct moe4_family {
    const char *name; /* also config.json's model_type */
    /* Names: R stands for the root, H for the head, L for the layer, E for the expert, P for the projection, each behind an @. */
    const char *layer, *expert, *shared, *dense;   /* NULL where there is none */
    const char *proj[3];                           /* gate NULL: experts without */
    const char *router, *router_bias, *hash_table; /* a module and tensors; NULL where there is none */
    const char *router_alt_bias;                   /* a tensor that may be there: a second bias, for image tokens */
    const char *fused_experts;                     /* prefix of 3-D tensors that hold all experts: known, not run; or NULL */
    const char *left_alone;                        /* prefix of modules beside the layers that are not judged; or NULL */
    const struct moe4_place *places;               /* the usual one first; ended by a NULL root */
    moe4_router_kind router_kind;                  /* of layers that do not choose by hash */
    bool normalizes;                               /* the chosen weights, when config.json does not say */
    moe4_activation activation;
    const char *key_activation, *key_n_experts, *key_expert, *key_shared; /* key_shared NULL: the experts' size times n_shared_experts */
    enum moe4_layer_rule layer_rule;
    enum moe4_sparse_rule sparse;
    unsigned always;                                   /* MOE4_IF_ bits whatever config.json says */
    const struct moe4_part *model_parts, *layer_parts; /* ended by a NULL name */
};

extern const struct moe4_family moe4_families[];
extern const size_t moe4_n_families;

/* The row for a model_type; NULL for none. */
const struct moe4_family *moe4_family_find(const char *model_type);
/* Why a family that has no row is not run, where that is known: "gpt-oss: …"; NULL otherwise. */
const char *moe4_family_refused(const char *model_type);
/* dst = pattern with what stands behind each @ filled in; names that do not fit are cut and so never found. */
void moe4_family_name(char *dst, size_t dst_bytes, const struct moe4_place *place, const char *pattern, size_t layer, size_t expert,
                      const char *proj);

#endif
