/* A router on the device: its biases and its table of token ids live there from when it is made. */
#include "device.h"

#include "../hash_table.h"

struct prepared {
    float *bias;    /* [n_experts]; then the second one, if there is one */
    int32_t *table; /* [n_token_ids, top_k], or NULL */
};

static moe4_status copy_biases(const moe4_router *r, struct prepared *p) {
    size_t n = r->o.n_experts, bytes = n * sizeof *p->bias;
    void *data = NULL;
    MOE4_TRY(moe4_cuda_alloc(r->ctx, &data, 2 * bytes, "router bias"));
    p->bias = data;
    CUDA_TRY(r->ctx, cudaMemcpy(p->bias, r->bias, bytes, cudaMemcpyHostToDevice), "copying a router's bias to the device");
    if (r->alt_bias)
        CUDA_TRY(r->ctx, cudaMemcpy(p->bias + n, r->alt_bias, bytes, cudaMemcpyHostToDevice), "copying a router's bias to the device");
    return MOE4_OK;
}

static moe4_status copy_table(const moe4_router *r, struct prepared *p) {
    const struct moe4_hash_table table = {r->o.table, r->o.table_dtype, r->o.n_token_ids, r->o.top_k};
    size_t n;
    void *data = NULL;
    if (r->o.kind != MOE4_ROUTER_HASH) return MOE4_OK;
    MOE4_CHECK(r->ctx, moe4_mul(&n, table.n_token_ids, table.top_k) && n <= SIZE_MAX / sizeof *p->table, MOE4_ERROR_MEMORY,
               "hash table: %zu x %zu is too large", table.n_token_ids, table.top_k);
    int32_t *narrow = moe4_calloc(r->ctx, n, sizeof *narrow, "hash table");
    if (!narrow) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) narrow[i] = (int32_t)moe4_hash_table_at(&table, i / table.top_k, i % table.top_k);
    moe4_status status = moe4_cuda_alloc(r->ctx, &data, n * sizeof *narrow, "hash table");
    p->table = data;
    if (status == MOE4_OK)
        status = moe4_cuda_check(r->ctx, cudaMemcpy(data, narrow, n * sizeof *narrow, cudaMemcpyHostToDevice), "copying a hash table");
    moe4_free(r->ctx, narrow);
    return status;
}

moe4_status moe4_cuda_router_prepare(moe4_router *r) {
    struct prepared *p = moe4_calloc(r->ctx, 1, sizeof *p, "router");
    if (!p) return MOE4_ERROR_MEMORY;
    r->prepared = p; /* release frees what a failure leaves */
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(r->ctx, &saved));
    moe4_status status = copy_biases(r, p);
    if (status == MOE4_OK) status = copy_table(r, p);
    moe4_cuda_leave(saved);
    return status;
}

void moe4_cuda_router_release(moe4_router *r) {
    struct prepared *p = r->prepared;
    struct moe4_cuda_current saved;
    if (!p) return;
    if (moe4_cuda_enter(r->ctx, &saved) == MOE4_OK) {
        cudaFree(p->bias);
        cudaFree(p->table);
        moe4_cuda_leave(saved);
    }
    moe4_free(r->ctx, p);
    r->prepared = NULL;
}

moe4_status moe4_cuda_select(const struct moe4_select_call *c) {
    const moe4_router *r = c->router;
    const moe4_ctx *ctx = r->ctx;
    const struct prepared *p = r->prepared;
    if (!c->n_tokens) return MOE4_OK;
    MOE4_TRY(moe4_cuda_check_pointer(ctx, c->topk_ids, "topk_ids"));
    MOE4_TRY(moe4_cuda_check_pointer(ctx, c->topk_weights, "topk_weights"));
    MOE4_TRY(moe4_cuda_check_pointer(ctx, c->logits, "logits"));
    if (c->alt_bias) MOE4_TRY(moe4_cuda_check_pointer(ctx, c->alt_bias, "tokens.alt_bias"));
    if (p->table) MOE4_TRY(moe4_cuda_check_pointer(ctx, c->token_ids, "tokens.token_ids"));
    const struct moe4_selection s = {.ids = c->topk_ids,
                                     .weights = c->topk_weights,
                                     .logits = c->logits,
                                     .o = &r->o,
                                     .bias = p->bias,
                                     .alt_bias = p->bias + r->o.n_experts,
                                     .takes_alt_bias = c->alt_bias,
                                     .token_ids = c->token_ids,
                                     .table = p->table,
                                     .n_tokens = c->n_tokens};
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    cudaError_t error = moe4_cuda_select_topk(&s, c->stream);
    moe4_cuda_leave(saved);
    return moe4_cuda_check(ctx, error, "router");
}
