/* A language model run with moe4: the runner behind `moe4 eval` and `moe4 generate`, and an example of an engine on top of the library.
 * It sees include/moe4.h and nothing of src/. Every matrix product is the library's (moe4_linear, moe4_router, moe4_moe); norms, rotary,
 * attention and the residual stream are the small fp32 files beside this one. forward.c is the place to start reading. */
#ifndef LM_H
#define LM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "moe4.h"

/* What every call needs: the library's context, and the sentence about the last failure (its own or the library's). */
struct lm {
    moe4_ctx *ctx;
    char error[512];
};

moe4_status lm_fail(struct lm *lm, moe4_status status, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* After a call that failed: keeps the library's sentence unless there is one already. */
void lm_note(struct lm *lm);
/* n * size zeroed bytes, 64-byte aligned; NULL with the error set. Freed with free(). */
void *lm_calloc(struct lm *lm, size_t n, size_t size, const char *what);

#define LM_CHECK(lm, cond, status, ...)                         \
    do {                                                        \
        if (!(cond)) return lm_fail((lm), status, __VA_ARGS__); \
    } while (0)
#define LM_TRY(lm, expr)                 \
    do {                                 \
        moe4_status try_status = (expr); \
        if (try_status != MOE4_OK) {     \
            lm_note(lm);                 \
            return try_status;           \
        }                                \
    } while (0)

/* ---- model: config.json and the weights (config.c, attention_*.c, model.c) ---- */

/* What differs between the families' attention; the MLP side of config.json is the library's. */
struct lm_attention {
    size_t n_heads, n_kv_heads, head_dim;
    size_t rotary_dim; /* the first so many of head_dim turn, as two halves */
    double rope_theta;
    bool qkv_bias, o_bias;
    bool qk_norm; /* RMSNorm of each head of q and k before rotary */
};

struct json_t;
struct lm_family {
    const char *name; /* moe4_model_info.family */
    moe4_status (*read_attention)(struct lm *lm, struct lm_attention *a, const struct json_t *config);
};
moe4_status lm_attention_glm4(struct lm *lm, struct lm_attention *a, const struct json_t *config);
moe4_status lm_attention_qwen3(struct lm *lm, struct lm_attention *a, const struct json_t *config);

struct lm_config {
    moe4_model_info info;
    struct lm_attention attention;
    float norm_eps;
    size_t max_context;
    bool tied; /* lm_head is the embedding */
};

/* config.json through the family table. Errors: FORMAT, UNSUPPORTED. */
moe4_status lm_config_read(struct lm *lm, struct lm_config *config, const moe4_checkpoint *ckpt);

struct lm_layer {
    float *input_norm, *post_norm;   /* [hidden] */
    float *q_bias, *k_bias, *v_bias; /* NULL without qkv_bias */
    float *o_bias;                   /* NULL without */
    float *q_norm, *k_norm;          /* [head_dim], NULL without qk_norm */
    moe4_linear *qkv, *o;
    moe4_router *router; /* NULL in a dense layer */
    moe4_moe *mlp;       /* the experts and the shared one, or the one MLP of a dense layer */
};

struct lm_model {
    struct lm *lm;
    moe4_checkpoint *ckpt;
    struct lm_config config;
    moe4_act act;          /* of the NVFP4 matrices; BF16 when there is none */
    moe4_tensor embedding; /* [vocab, hidden] */
    struct lm_layer *layers;
    float *final_norm;
    moe4_linear *head;
    uint64_t fixed_bytes; /* weights that every token reads: all but the experts */
    bool byte_level;      /* 256 tokens and no tokenizer: a token is a byte */
};

/* Element i of stored F32, BF16 or F16. */
float lm_element(const void *data, moe4_dtype dtype, size_t i);

/* Opens a model folder and makes every layer, so that whatever is missing is missed here. act is for the NVFP4 matrices. `lm` is
 * borrowed until close. Errors: the library's; ARGUMENT when no matrix can run act. */
moe4_status lm_model_open(struct lm_model **model_ret, struct lm *lm, const char *path, moe4_act act);
void lm_model_close(struct lm_model *model);

/* ---- running it (kv.c, norm.c, attention.c, products.c, forward.c) ---- */

/* Keys and values of past positions in fp32, by layer, sequence and head. Keys lie in groups of LM_KEY_GROUP positions,
 * [group][head_dim][LM_KEY_GROUP], so that scores of neighbouring positions are one vector; values are [position][value_dim], padded. */
enum { LM_KEY_GROUP = 16 };
struct lm_kv {
    size_t n_layers, n_seqs, n_heads, head_dim, value_dim;
    size_t capacity; /* positions */
    size_t length;   /* of every sequence */
    float *keys, *values;
};

/* one_shot: a single layer's cache that all layers share, enough when no call continues an earlier one. */
moe4_status lm_kv_create(struct lm *lm, struct lm_kv *kv, const struct lm_config *config, size_t n_seqs, size_t capacity, bool one_shot);
void lm_kv_free(struct lm_kv *kv);
/* Where head `head` of `seq` begins. */
float *lm_kv_keys(const struct lm_kv *kv, size_t layer, size_t seq, size_t head);
float *lm_kv_values(const struct lm_kv *kv, size_t layer, size_t seq, size_t head);

/* Where a run can be watched: before the products that read x [n_tokens, cols]. At LM_AT_MLP run->topk_ids has the router's choice. */
enum lm_point { LM_AT_QKV, LM_AT_O, LM_AT_MLP };
struct lm_run;
typedef moe4_status (*lm_watch_fn)(void *user, const struct lm_run *run, size_t layer, enum lm_point point, const float *x,
                                   size_t n_tokens);

struct lm_run_options {
    size_t n_seqs;     /* sequences side by side */
    size_t context;    /* positions of each; 0: the model's */
    size_t max_tokens; /* tokens of one lm_forward, all sequences together */
    bool one_shot;     /* every lm_forward starts at position 0 */
    lm_watch_fn watch; /* or NULL; an error of it ends the lm_forward */
    void *watch_user;
};

/* On a device, the memory that its products read and write; all NULL on the CPU. */
struct lm_staging {
    float *x; /* [max_tokens, the widest input] */
    float *y;
    size_t y_floats;
    int32_t *topk_ids;
    float *topk_weights;
};

struct lm_run {
    struct lm_model *model;
    struct lm_run_options options;
    struct lm_kv kv;
    float *cosine, *sine;   /* [context, rotary_dim / 2] */
    float *x, *h, *y;       /* [T, hidden]: the residual stream; what enters a block; what it adds to the stream */
    float *q, *k, *v, *mix; /* [T, heads * head_dim]; mix is what attention makes of them */
    int32_t *topk_ids;
    float *topk_weights;
    moe4_workspace workspace; /* where the products run */
    struct lm_staging staging;
    uint64_t n_saturated;  /* activation blocks saturated so far, over all matrices */
    uint64_t weight_bytes; /* weights read so far, each matrix once a call */
};

moe4_status lm_run_create(struct lm_run **run_ret, struct lm_model *model, const struct lm_run_options *options);
void lm_run_destroy(struct lm_run *run);

/* Runs n_new tokens of each of n_seqs sequences, tokens [n_seqs, n_new], after those already in the cache. run->h [n_seqs * n_new, hidden]
 * is then what lm_head reads. Same tokens, same bits, in one call or many, whatever the threads (act tensor excepted).
 * Errors: ARGUMENT (a token past the vocabulary, more positions than the context has). */
moe4_status lm_forward(struct lm_run *run, const int32_t *tokens, size_t n_seqs, size_t n_new);
/* logits [n_rows, vocab] of rows [row0, row0 + n_rows) of the last lm_forward. Errors: FORMAT (a logit is NaN or Inf). */
moe4_status lm_logits(struct lm_run *run, float *logits, size_t row0, size_t n_rows);
/* Forgets all positions. */
void lm_run_reset(struct lm_run *run);

/* The products of lm_forward (products.c). On a device they copy: x and results are the host's here. out[i].to is [n_tokens, cols]. */
enum { LM_MAX_OUTPUTS = 3 };
struct lm_output {
    float *to;
    size_t cols;
};
moe4_status lm_linear(struct lm_run *run, const moe4_linear *l, const struct lm_output *out, size_t n_out, const float *x, size_t cols,
                      size_t n_tokens);
/* y = MLP(h): the router's choice of experts and the shared one, or the one MLP of a dense layer. */
moe4_status lm_mlp(struct lm_run *run, size_t layer, float *y, const float *h, size_t n_tokens);
moe4_status lm_products_create(struct lm_run *run);
void lm_products_free(struct lm_run *run);

/* x += y (or not: NULL), then h = x / rms(x) * weight, for each of n_rows rows of n. */
void lm_add_norm_rows(const struct lm *lm, float *h, float *x, const float *y, const float *weight, float eps, size_t n_rows, size_t n);
/* One row; h may be x. The sum of squares is fp32 in eight lanes. */
void lm_norm_row(float *h, const float *x, const float *weight, float eps, size_t n);

/* q, k and v of the last products into place: bias, q/k norm, rotary, and k and v into the cache. */
void lm_attention_prepare(struct lm_run *run, size_t layer, size_t n_seqs, size_t n_new);
/* run->mix = softmax(q k^T / sqrt(head_dim)) v, each position seeing itself and what is before. */
void lm_attention_mix(struct lm_run *run, size_t layer, size_t n_seqs, size_t n_new);

/* ---- text and numbers (text.c, sample.c, bits.c) ---- */

struct lm_tokens {
    int32_t *data;
    size_t n;
};

/* The bytes of a file as tokens, at most `limit` of them (0: all); or token ids from raw little-endian int32 or, when the name ends in
 * .safetensors, its one I32 or I64 tensor of one dimension. Free data with free(). Errors: IO, NOT_FOUND, FORMAT. */
moe4_status lm_tokens_from_text(struct lm *lm, struct lm_tokens *tokens, const char *path, size_t limit);
moe4_status lm_tokens_from_ids(struct lm *lm, struct lm_tokens *tokens, const char *path, size_t limit);

struct lm_sampler {
    double temperature; /* 0: the most likely token */
    double top_p;       /* the smallest set of tokens that together reaches this; 1: all */
    uint64_t seed;      /* advances with every sample */
};
/* A token drawn from softmax(logits[n] / temperature) cut to top_p. scratch has n entries. */
struct lm_candidate {
    double p;
    int32_t id;
};
int32_t lm_sample(struct lm_sampler *sampler, const float *logits, size_t n, struct lm_candidate *scratch);

typedef void (*lm_progress_fn)(void *user, size_t n_done, size_t n_total, double bits);

struct lm_bits_options {
    size_t window; /* tokens of context that predict as many */
    size_t batch;  /* windows run together */
    lm_progress_fn progress;
    void *progress_user;
};
struct lm_bits {
    size_t n_predicted;
    double bits; /* of all of them */
    double seconds;
    uint64_t n_saturated;
};
/* What the model pays for `tokens`: windows that do not overlap, window j predicts tokens jw + 1 .. jw + w from jw .. jw + w - 1, the
 * last one whatever is left. Errors: ARGUMENT (fewer than two tokens, a window past the model's context), and lm_forward's. */
moe4_status lm_bits_measure(struct lm_model *model, struct lm_bits *bits, const struct lm_tokens *tokens,
                            const struct lm_bits_options *options);

/* Bytes a second that all threads together read of the model's own mapped weights: best of a few passes over at most 256 MB. On a device,
 * what reading its memory gives; 0 when that cannot be measured. */
double lm_read_bandwidth(const struct lm_model *model);
double lm_seconds(void);

#endif
