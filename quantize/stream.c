/* A shard is streamed in batches of about 64 MB of input. In each batch all threads first find the largest values, from which follow the
 * global scales; then they read pieces of rows again (the system has them in memory still), quantize them and write each to its final
 * offset. */
#include "quantize/stream.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "quantize/recast.h"

enum { BATCH_BYTES = 64 << 20, COPY_PIECE_BYTES = 1 << 20 };

struct piece_list {
    struct quantize_piece *data; /* of a copied tensor row and n count bytes */
    size_t n, room;
};

struct batch {
    struct quantize_plan *plan;
    struct quantize_file *file;
    struct piece_list amaxes, pieces;
    size_t first, end; /* items */
    atomic_bool failed;
    pthread_mutex_t *lock; /* of what follows */
    moe4_status status;
    char problem[400];
};

/* ---- failures of threads ---- */

static void note_failure(struct batch *b, moe4_status status, const char *name, const char *why) {
    pthread_mutex_lock(b->lock);
    if (!atomic_exchange(&b->failed, true)) {
        b->status = status;
        snprintf(b->problem, sizeof b->problem, "%s: %s", name, why);
    }
    pthread_mutex_unlock(b->lock);
}

static void note_write(struct batch *b) {
    char what[300];
    snprintf(what, sizeof what, "%s/%s", b->file->folder->path, b->file->name);
    note_failure(b, MOE4_ERROR_IO, what, strerror(errno));
}

static void note_call(struct batch *b, moe4_status status, const struct quantize_item *item, const char *why) {
    if (!*why) why = moe4_ctx_error(b->plan->lm->ctx);
    note_failure(b, status, item->name, *why ? why : moe4_status_text(status));
}

static moe4_status failure(const struct batch *b) {
    return b->failed ? lm_fail(b->plan->lm, b->status, "%s", b->problem) : MOE4_OK;
}

/* ---- pieces ---- */

static moe4_status add_piece(struct lm *lm, struct piece_list *list, struct quantize_piece piece) {
    if (list->n == list->room) {
        size_t room = list->room ? 2 * list->room : 256;
        struct quantize_piece *data = realloc(list->data, room * sizeof *data);
        LM_CHECK(lm, data, MOE4_ERROR_MEMORY, "no memory for %zu pieces", room);
        list->data = data;
        list->room = room;
    }
    list->data[list->n++] = piece;
    return MOE4_OK;
}

static moe4_status add_rows(struct lm *lm, struct piece_list *list, struct quantize_item *item) {
    size_t step = item->cols < QUANTIZE_PIECE_ELEMENTS ? QUANTIZE_PIECE_ELEMENTS / (item->cols ? item->cols : 1) : 1;
    bool by_column = item->values.col_bytes != moe4_dtype_bytes(item->values.dtype);
    if (by_column && step < QUANTIZE_COLUMN_ROWS) step = QUANTIZE_COLUMN_ROWS;
    for (size_t row = 0; row < item->rows; row += step)
        LM_TRY(lm, add_piece(lm, list, (struct quantize_piece){item, row, item->rows - row < step ? item->rows - row : step}));
    return MOE4_OK;
}

static moe4_status add_bytes(struct lm *lm, struct piece_list *list, struct quantize_item *item) {
    for (size_t at = 0; at < item->in.bytes; at += COPY_PIECE_BYTES) {
        size_t n = item->in.bytes - at < COPY_PIECE_BYTES ? item->in.bytes - at : COPY_PIECE_BYTES;
        LM_TRY(lm, add_piece(lm, list, (struct quantize_piece){item, at, n}));
    }
    return MOE4_OK;
}

/* ---- largest values ---- */

static void amax_task(void *arg, size_t task) {
    struct batch *b = arg;
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

static float item_amax(const struct quantize_item *item) {
    uint32_t bits = item->amax;
    float amax;
    if (item->form == QUANTIZE_MXFP4) return bits == QUANTIZE_MX_NAN ? NAN : (float)bits;
    memcpy(&amax, &bits, sizeof amax);
    return amax;
}

static moe4_status want_amax(struct batch *b, struct quantize_item *item) {
    if (!item || item->has_amax) return MOE4_OK;
    item->has_amax = true;
    return add_rows(b->plan->lm, &b->amaxes, item);
}

static moe4_status check_finite(struct batch *b, struct quantize_item *item) {
    size_t row = 0, col = 0;
    if (!item || isfinite(item_amax(item))) return MOE4_OK;
    LM_CHECK(b->plan->lm, !quantize_find_nonfinite(b->plan, item, &row, &col), MOE4_ERROR_FORMAT, "%s: %s: row %zu column %zu is %s",
             item->in.file, item->name, row, col, isnan(item_amax(item)) ? "NaN" : "infinite");
    return lm_fail(b->plan->lm, MOE4_ERROR_IO, "%s: %s: changed while it was read", item->in.file, item->name);
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
    float own = item_amax(item), partner = item->partner ? item_amax(item->partner) : 0;
    return own > partner ? own : partner;
}

/* The number that a matrix stores: of MXFP4 a power of two, or its inverse, whatever the recipe. */
static moe4_status item_global(const struct quantize_plan *plan, float *global_ret, const struct quantize_item *item) {
    if (item->form != QUANTIZE_MXFP4) return stored_global(plan, global_ret, shared_amax(item), plan->options->four_over_six);
    int c = quantize_recast_global((uint32_t)shared_amax(item));
    *global_ret = ldexpf(1, plan->options->recipe == MOE4_RECIPE_COMPRESSED_TENSORS ? -c : c);
    return MOE4_OK;
}

static void add_loss(struct batch *b, struct quantize_item *item, const struct quantize_recast_loss *loss) {
    pthread_mutex_lock(b->lock);
    item->loss.n_blocks += loss->n_blocks;
    item->loss.n_inexact += loss->n_inexact;
    item->loss.error_sq += loss->error_sq;
    item->loss.norm_sq += loss->norm_sq;
    pthread_mutex_unlock(b->lock);
}

static moe4_status encode_piece(struct batch *b, const struct quantize_piece *piece, uint8_t *codes, uint8_t *scales, char *why) {
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

static void encode(struct batch *b, const struct quantize_piece *piece) {
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
static void write_rows(struct batch *b, const struct quantize_piece *piece) {
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
static void write_bytes(struct batch *b, const struct quantize_piece *piece) {
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

static void piece_task(void *arg, size_t task) {
    struct batch *b = arg;
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
static moe4_status write_numbers(struct batch *b, const struct quantize_item *item) {
    struct lm *lm = b->plan->lm;
    float global;
    LM_TRY(lm, item_global(b->plan, &global, item));
    LM_TRY(lm, quantize_file_write(b->file, &global, sizeof global, item->offset[PART_GLOBAL]));
    if (!b->plan->options->calibrate) return MOE4_OK;
    LM_TRY(lm, stored_global(b->plan, &global, item->input_amax, false));
    return quantize_file_write(b->file, &global, sizeof global, item->offset[PART_INPUT]);
}

/* ---- batches ---- */

static bool is_wanted(const struct batch *b, const struct quantize_item *item) {
    return b->file ? item->how != QUANTIZE_DROP : item->how == QUANTIZE_NVFP4 && item->form == QUANTIZE_MXFP4;
}

static moe4_status run_batch(struct batch *b) {
    struct quantize_plan *plan = b->plan;
    struct lm *lm = plan->lm;
    for (size_t i = b->first; i < b->end; i++) {
        struct quantize_item *item = &plan->items[i];
        if (!is_wanted(b, item)) continue;
        if (item->how == QUANTIZE_NVFP4) {
            LM_TRY(lm, want_amax(b, item));
            LM_TRY(lm, want_amax(b, item->partner));
        }
        bool whole = item->how == QUANTIZE_COPY && !item->own_name;
        LM_TRY(lm, whole ? add_bytes(lm, &b->pieces, item) : add_rows(lm, &b->pieces, item));
    }
    moe4_parallel_for(lm->ctx, b->amaxes.n, amax_task, b);
    LM_TRY(lm, failure(b));
    for (size_t i = b->first; i < b->end; i++) {
        if (plan->items[i].how != QUANTIZE_NVFP4 || !is_wanted(b, &plan->items[i])) continue;
        LM_TRY(lm, check_finite(b, &plan->items[i]));
        LM_TRY(lm, check_finite(b, plan->items[i].partner));
    }
    moe4_parallel_for(lm->ctx, b->pieces.n, piece_task, b);
    LM_TRY(lm, failure(b));
    for (size_t i = b->first; b->file && i < b->end; i++)
        if (plan->items[i].how == QUANTIZE_NVFP4) LM_TRY(lm, write_numbers(b, &plan->items[i]));
    return MOE4_OK;
}

static moe4_status write_batch(struct quantize_plan *plan, struct quantize_file *file, size_t first, size_t end) {
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    struct batch b = {.plan = plan, .file = file, .first = first, .end = end, .lock = &lock};
    moe4_status status = run_batch(&b);
    free(b.amaxes.data);
    free(b.pieces.data);
    return status;
}

/* All of a shard's batches; with file NULL only what MXFP4 loses is counted. */
static moe4_status run_batches(struct quantize_plan *plan, struct quantize_file *file, const struct quantize_shard *shard,
                               struct quantize_report *report, uint64_t *done) {
    for (size_t first = shard->first, end; first < shard->end; first = end) {
        uint64_t bytes = 0;
        for (end = first; end < shard->end && (end == first || bytes + plan->items[end].bytes_in <= BATCH_BYTES); end++)
            bytes += plan->items[end].bytes_in;
        LM_TRY(plan->lm, write_batch(plan, file, first, end));
        if (file) sync_file_range(file->fd, 0, 0, SYNC_FILE_RANGE_WRITE); /* the disk works while the next batch is made; only a hint */
        if (file) report->bytes_read += bytes;
        *done += bytes;
        if (plan->options->progress) plan->options->progress(plan->options->progress_user, "quantize", *done, plan->bytes_in);
    }
    return MOE4_OK;
}

bool quantize_shard_is_there(const struct quantize_shard *shard, const struct quantize_folder *folder) {
    return quantize_folder_has(folder, shard->file, shard->header, shard->header_bytes, shard->bytes);
}

moe4_status quantize_shard_look(struct quantize_plan *plan, struct quantize_shard *shard, struct quantize_report *report, uint64_t *done) {
    report->n_shards_kept++;
    return run_batches(plan, NULL, shard, report, done);
}

moe4_status quantize_shard_write(struct quantize_plan *plan, const struct quantize_folder *folder, struct quantize_shard *shard,
                                 struct quantize_report *report, uint64_t *done) {
    if (quantize_shard_is_there(shard, folder)) return quantize_shard_look(plan, shard, report, done);
    struct quantize_file file;
    LM_TRY(plan->lm, quantize_file_create(&file, folder, shard->file, shard->bytes));
    moe4_status status = quantize_file_write(&file, shard->header, shard->header_bytes, 0);
    if (status == MOE4_OK) status = run_batches(plan, &file, shard, report, done);
    if (status == MOE4_OK) report->bytes_written += shard->bytes;
    if (status == MOE4_OK) return quantize_file_keep(&file);
    quantize_file_drop(&file);
    return status;
}
