/* Linears with many rows: where a matrix is multiplied by so many, decoding it once to bf16, which holds NVFP4 exactly, and cuBLAS take
 * less time than a kernel that decodes it for each tile of rows, and x is read where it lies. */
#include "cublas.h"
#include "linear.h"
#include "nvfp4_layout.h"

#define DECODED_BYTES ((size_t)128 << 20) /* of a matrix at a time */
#define BLAS_ALIGN 256                    /* of cuBLAS' workspace; a caller's is a multiple of 64 */

/* Elements of all matrices up to which so few rows are enough: the kernels for few rows leave most multiprocessors idle there. */
static const struct size { size_t up_to, tokens; } FEW[] = {{(size_t)1 << 23, 16}, {(size_t)1 << 24, 32}};
enum { N_FEW = sizeof FEW / sizeof *FEW, MOST_TOKENS = 8192 };

/* Microseconds of both ways, as measured on an H200 (docs/hopper.md): the prefill kernel at its usual clock, with the rows put into its
 * tiles; two launches, decoding, and a product at cuBLAS' rate. */
static double prefill_us(const moe4_linear *l, size_t n_tokens) {
    double cycles = 0, x = 9 + 1.4e-6 * (double)(n_tokens * l->cols);
    for (size_t i = 0; i < l->n_weights; i++)
        cycles += moe4_cuda_unit_cycles((long long)n_tokens, moe4_units(l->weight[i].rows), moe4_cuda_of(l->ctx)->n_sms);
    return cycles * moe4_units(l->cols) / 1450 + x + 8 * (double)l->n_weights;
}

static double decoded_us(const moe4_linear *l, size_t n_tokens) {
    double us = 0;
    for (size_t i = 0; i < l->n_weights; i++) us += 12 + (double)(l->weight[i].rows * l->cols) * (0.78e-6 + 2.5e-9 * (double)n_tokens);
    return us;
}

static bool may_decode(const moe4_linear *l) {
    if (l->weight->dtype != MOE4_NVFP4 || l->o.act != MOE4_ACT_W4A16 || l->o.x_dtype != MOE4_BF16 || l->o.x_ld > INT32_MAX) return false;
    for (size_t i = 0; i < l->n_weights; i++)
        if (l->weight[i].bias) return false; /* it is added before y is rounded */
    return true;
}

/* Whether it is the faster way for so many rows: the prefill kernel takes them in whole rounds of the multiprocessors. */
static bool is_faster(const moe4_linear *l, size_t n_tokens) {
    size_t elements = 0;
    for (size_t i = 0; i < l->n_weights; i++) elements += l->weight[i].rows * l->cols;
    for (size_t i = 0; i < N_FEW; i++)
        if (elements <= FEW[i].up_to) return n_tokens >= FEW[i].tokens;
    if (n_tokens < MOE4_PREFILL_TOKENS) return false;
    return !moe4_cuda_uses_sm90(moe4_cuda_of(l->ctx)) || decoded_us(l, n_tokens) < prefill_us(l, n_tokens);
}

size_t moe4_cuda_decoded_from(const moe4_linear *l) {
    if (may_decode(l))
        for (size_t n = 1; n <= MOST_TOKENS; n++)
            if (is_faster(l, n)) return n;
    return SIZE_MAX;
}

bool moe4_cuda_decodes(const moe4_linear *l, size_t n_tokens) {
    return n_tokens >= ((const struct moe4_cuda_linear *)l->prepared)->decoded_from && is_faster(l, n_tokens);
}

/* Rows of a matrix that are decoded at a time. */
static size_t part_rows(const moe4_linear *l) {
    size_t tiles = DECODED_BYTES / (MOE4_UNIT_ROWS * l->cols * sizeof(moe4_bf16));
    return (tiles ? tiles : 1) * MOE4_UNIT_ROWS;
}

size_t moe4_cuda_decoded_bytes(const moe4_linear *l) {
    size_t rows = 0, part = part_rows(l);
    for (size_t i = 0; i < l->n_weights; i++)
        if (l->weight[i].rows > rows) rows = l->weight[i].rows;
    return BLAS_ALIGN - 64 + MOE4_CUBLAS_WORKSPACE + (rows < part ? rows : part) * l->cols * sizeof(moe4_bf16);
}

static moe4_status multiply(const struct moe4_linear_call *c, size_t i) {
    const moe4_linear *l = c->linear;
    const struct moe4_cuda_linear *p = l->prepared;
    const moe4_weight *w = &l->weight[i];
    const struct moe4_packed_experts *packed = &p->matrix[i].packed;
    char *blas_workspace = (char *)(((uintptr_t)c->workspace + BLAS_ALIGN - 1) & ~(uintptr_t)(BLAS_ALIGN - 1));
    moe4_bf16 *values = (moe4_bf16 *)(blas_workspace + MOE4_CUBLAS_WORKSPACE);
    size_t part = part_rows(l), y_bytes = l->o.y_dtype == MOE4_F32 ? sizeof(float) : sizeof(moe4_bf16);
    for (size_t row = 0; row < w->rows; row += part) {
        int rows = (int)(w->rows - row < part ? w->rows - row : part);
        const uint8_t *units = packed->down + row / MOE4_UNIT_ROWS * (size_t)packed->intermediate_units * MOE4_UNIT_BYTES;
        CUDA_TRY(l->ctx, moe4_cuda_unpack(values, units, rows, (int)l->cols, 0, c->stream), "moe4_linear_forward: decoding");
        struct moe4_cublas_call product = {.y = (char *)c->y[i] + row * y_bytes,
                                           .y_type = l->o.y_dtype == MOE4_F32 ? CUDA_R_32F : CUDA_R_16BF,
                                           .y_ld = w->rows,
                                           .x = c->x,
                                           .x_ld = l->o.x_ld,
                                           .w = values,
                                           .alpha = w->global,
                                           .T = (int)c->n_tokens,
                                           .N = rows,
                                           .K = (int)l->cols,
                                           .workspace = blas_workspace,
                                           .stream = c->stream};
        int status = moe4_cublas_product(p->blas, &product);
        MOE4_CHECK(l->ctx, status == 0, MOE4_ERROR_DEVICE, "moe4_linear_forward: cuBLAS: status %d for %zu x %d x %zu", status, c->n_tokens,
                   rows, l->cols);
    }
    return MOE4_OK;
}

moe4_status moe4_cuda_decoded_forward(const struct moe4_linear_call *c) {
    const moe4_linear *l = c->linear;
    for (size_t i = 0; i < l->n_weights; i++) {
        MOE4_TRY(multiply(c, i));
        struct moe4_rows_check check = {c->y[i],   l->o.y_dtype,     l->weight[i].rows,      c->x,
                                        l->o.x_ld, (int)c->n_tokens, (int)l->weight[i].rows, (int)l->cols};
        CUDA_TRY(l->ctx, moe4_cuda_settle_rows(&check, c->stream), "moe4_linear_forward");
    }
    return MOE4_OK;
}
