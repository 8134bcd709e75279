#include "quantize/batch.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- failures of threads ---- */

static void note_failure(struct quantize_batch *b, moe4_status status, const char *name, const char *why) {
    pthread_mutex_lock(b->lock);
    if (!atomic_exchange(&b->failed, true)) {
        b->status = status;
        snprintf(b->problem, sizeof b->problem, "%s: %s", name, why);
    }
    pthread_mutex_unlock(b->lock);
}

static void note_write(struct quantize_batch *b) {
    char what[300];
    snprintf(what, sizeof what, "%s/%s", b->file->folder->path, b->file->name);
    note_failure(b, MOE4_ERROR_IO, what, strerror(errno));
}

static void note_call(struct quantize_batch *b, moe4_status status, const struct quantize_item *item, const char *why) {
    if (!*why) why = moe4_ctx_error(b->plan->lm->ctx);
    note_failure(b, status, item->name, *why ? why : moe4_status_text(status));
}

/* ---- largest values ---- */

void quantize_amax_task(void *arg, size_t task) {
    struct quantize_batch *b = arg;
    const struct quantize_piece *piece = &b->amaxes.data[task];
    char why[QUANTIZE_WHY_BYTES] = "";
    uint32_t bits, seen;
    if (b->failed) return;
    moe4_status status = quantize_piece_amax(b->plan, piece, &bits, why);
    if (status != MOE4_OK) {
        note_call(b, status, piece->item, why);
        return;
    }
    seen = atomic_load_explicit(&piece->item->amax, memory_order_relaxed);
    while (bits > seen &&
           !atomic_compare_exchange_weak_explicit(&piece->item->amax, &seen, bits, memory_order_relaxed, memory_order_relaxed)) {
    }
}

float quantize_item_amax(const struct quantize_item *item) {
    uint32_t bits = item->amax;
    float amax;
    if (item->form == QUANTIZE_MXFP4) return bits == QUANTIZE_MX_NAN ? NAN : (float)bits;
    memcpy(&amax, &bits, sizeof amax);
    return amax;
}

/* ---- quantize and write ---- */

/* The global scale as the recipe stores it, from its formula in the library: that of a block with this largest value. */
static moe4_status stored_global(const struct quantize_plan *plan, float *global_ret, float amax, bool four_over_six) {
    float x[MOE4_BLOCK] = {amax};
    uint8_t codes[MOE4_BLOCK / 2], scale;
    moe4_quantize_options o = MOE4_QUANTIZE_OPTIONS_INIT;
    o.recipe = plan->options->recipe;
    o.four_over_six = four_over_six;
    LM_TRY(plan->lm, moe4_nvfp4_quantize(plan->lm->ctx, codes, &scale, global_ret, NULL, x, MOE4_F32, 1, MOE4_BLOCK, 0, &o));
    return MOE4_OK;
}

static float shared_amax(const struct quantize_item *item) {
    float own = quantize_item_amax(item), partner = item->partner ? quantize_item_amax(item->partner) : 0;
    return own > partner ? own : partner;
}

/* The number that a matrix stores: of MXFP4 a power of two, or its inverse, whatever the recipe. */
static moe4_status item_global(const struct quantize_plan *plan, float *global_ret, const struct quantize_item *item) {
    if (item->form != QUANTIZE_MXFP4) return stored_global(plan, global_ret, shared_amax(item), plan->options->four_over_six);
    int c = quantize_recast_global((uint32_t)shared_amax(item));
    *global_ret = ldexpf(1, plan->options->recipe == MOE4_RECIPE_COMPRESSED_TENSORS ? -c : c);
    return MOE4_OK;
}

static void add_loss(struct quantize_batch *b, struct quantize_item *item, const struct quantize_recast_loss *loss) {
    pthread_mutex_lock(b->lock);
    item->loss.n_blocks += loss->n_blocks;
    item->loss.n_inexact += loss->n_inexact;
    item->loss.error_sq += loss->error_sq;
    item->loss.norm_sq += loss->norm_sq;
    pthread_mutex_unlock(b->lock);
}

static moe4_status encode_piece(struct quantize_batch *b, const struct quantize_piece *piece, uint8_t *codes, uint8_t *scales, char *why) {
    struct quantize_item *item = piece->item;
    struct quantize_recast_loss loss = {0};
    float global;
    if (item->form != QUANTIZE_MXFP4) {
        moe4_status status = item_global(b->plan, &global, item);
        return status == MOE4_OK ? quantize_piece_encode(b->plan, piece, codes, scales, global, why) : status;
    }
    int c = quantize_recast_global((uint32_t)shared_amax(item));
    moe4_status status = quantize_recast(b->plan, piece, codes, scales, c, &loss, why);
    add_loss(b, item, &loss);
    return status;
}

static void encode(struct quantize_batch *b, const struct quantize_piece *piece) {
    const struct quantize_item *item = piece->item;
    size_t row_codes = item->cols / 2, row_scales = item->cols / MOE4_BLOCK;
    uint8_t *codes = malloc(piece->n * (row_codes + row_scales)), *scales = codes + piece->n * row_codes;
    char why[QUANTIZE_WHY_BYTES] = "";
    moe4_status status = codes ? encode_piece(b, piece, codes, scales, why) : MOE4_ERROR_MEMORY;
    if (status != MOE4_OK)
        note_call(b, status, item, why);
    else if (b->file && /* a shard that stands there already is looked at again for what MXFP4 lost */
             (!quantize_write_at(b->file->fd, codes, piece->n * row_codes, item->offset[PART_WEIGHT] + piece->row * row_codes) ||
              !quantize_write_at(b->file->fd, scales, piece->n * row_scales, item->offset[PART_SCALE] + piece->row * row_scales)))
        note_write(b);
    free(codes);
}

/* Rows of a matrix that is not quantized: bf16, or as they are. */
static void write_rows(struct quantize_batch *b, const struct quantize_piece *piece) {
    const struct quantize_item *item = piece->item;
    bool widened = item->how == QUANTIZE_BF16;
    size_t row_bytes = item->cols * moe4_dtype_bytes(widened ? MOE4_BF16 : item->values.dtype);
    char why[QUANTIZE_WHY_BYTES] = "";
    void *values = malloc(piece->n * row_bytes);
    moe4_status status = !values   ? MOE4_ERROR_MEMORY
                         : widened ? quantize_piece_widen(b->plan, piece, values, why)
                                   : quantize_view_read(b->plan, &item->values, values, piece->row, piece->n, item->cols, why);
    if (status != MOE4_OK)
        note_call(b, status, item, why);
    else if (!quantize_write_at(b->file->fd, values, piece->n * row_bytes, item->offset[PART_WEIGHT] + piece->row * row_bytes))
        note_write(b);
    free(values);
}

/* Bytes of a tensor that is copied whole. */
static void write_bytes(struct quantize_batch *b, const struct quantize_piece *piece) {
    const struct quantize_item *item = piece->item;
    struct quantize_view bytes = {item->values.file, MOE4_U8, item->values.offset, 1, 1};
    char why[QUANTIZE_WHY_BYTES] = "";
    void *data = malloc(piece->n);
    moe4_status status = data ? quantize_view_read(b->plan, &bytes, data, piece->row, piece->n, 1, why) : MOE4_ERROR_MEMORY;
    if (status != MOE4_OK)
        note_call(b, status, item, why);
    else if (!quantize_write_at(b->file->fd, data, piece->n, item->offset[PART_WEIGHT] + piece->row))
        note_write(b);
    free(data);
}

void quantize_piece_task(void *arg, size_t task) {
    struct quantize_batch *b = arg;
    const struct quantize_piece *piece = &b->pieces.data[task];
    if (b->failed) return;
    if (piece->item->how == QUANTIZE_NVFP4)
        encode(b, piece);
    else if (piece->item->how == QUANTIZE_COPY && !piece->item->own_name)
        write_bytes(b, piece);
    else
        write_rows(b, piece);
}

/* The two numbers of a matrix. */
moe4_status quantize_write_numbers(struct quantize_batch *b, const struct quantize_item *item) {
    struct lm *lm = b->plan->lm;
    float global;
    LM_TRY(lm, item_global(b->plan, &global, item));
    LM_TRY(lm, quantize_file_write(b->file, &global, sizeof global, item->offset[PART_GLOBAL]));
    if (!b->plan->options->calibrate) return MOE4_OK;
    LM_TRY(lm, stored_global(b->plan, &global, item->input_amax, false));
    return quantize_file_write(b->file, &global, sizeof global, item->offset[PART_INPUT]);
}
