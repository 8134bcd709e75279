/* A shard is streamed in batches of about 64 MB of input. In each batch all threads first find the largest values, from which follow the
 * global scales; then they quantize pieces of rows and write each to its final offset. The batch's pages are dropped behind. */
#include "quantize/stream.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "quantize/block.h"

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

static void note_call(struct batch *b, moe4_status status, const struct quantize_item *item) {
    const char *why = moe4_ctx_error(b->plan->lm->ctx);
    note_failure(b, status, item->in.name, *why ? why : moe4_status_text(status));
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
    size_t step = item->cols < QUANTIZE_PIECE_ELEMENTS ? QUANTIZE_PIECE_ELEMENTS / item->cols : 1;
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
    float amax;
    moe4_status status = quantize_piece_amax(b->plan, piece, &amax);
    if (status != MOE4_OK) {
        note_call(b, status, piece->item);
        return;
    }
    uint32_t bits, seen = atomic_load_explicit(&piece->item->amax, memory_order_relaxed);
    memcpy(&bits, &amax, sizeof bits);
    while (bits > seen &&
           !atomic_compare_exchange_weak_explicit(&piece->item->amax, &seen, bits, memory_order_relaxed, memory_order_relaxed)) {
    }
}

static float item_amax(const struct quantize_item *item) {
    uint32_t bits = item->amax;
    float amax;
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
             item->in.file, item->in.name, row, col, isnan(item_amax(item)) ? "NaN" : "infinite");
    return lm_fail(b->plan->lm, MOE4_ERROR_FORMAT, "%s: %s: changed while it was read", item->in.file, item->in.name);
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

static void encode(struct batch *b, const struct quantize_piece *piece) {
    const struct quantize_item *item = piece->item;
    size_t row_codes = item->cols / 2, row_scales = item->cols / MOE4_BLOCK;
    uint8_t *codes = malloc(piece->n * (row_codes + row_scales)), *scales = codes + piece->n * row_codes;
    float global;
    moe4_status status = codes ? MOE4_OK : MOE4_ERROR_MEMORY;
    if (status == MOE4_OK) status = stored_global(b->plan, &global, shared_amax(item), b->plan->options->four_over_six);
    if (status == MOE4_OK) status = quantize_piece_encode(b->plan, piece, codes, scales, global);
    if (status != MOE4_OK)
        note_call(b, status, item);
    else if (!quantize_write_at(b->file->fd, codes, piece->n * row_codes, item->offset[PART_WEIGHT] + piece->row * row_codes) ||
             !quantize_write_at(b->file->fd, scales, piece->n * row_scales, item->offset[PART_SCALE] + piece->row * row_scales))
        note_write(b);
    free(codes);
}

static void widen(struct batch *b, const struct quantize_piece *piece) {
    size_t row_bytes = piece->item->cols * sizeof(uint16_t);
    uint16_t *values = malloc(piece->n * row_bytes);
    moe4_status status = values ? quantize_piece_widen(b->plan, piece, values) : MOE4_ERROR_MEMORY;
    if (status != MOE4_OK)
        note_call(b, status, piece->item);
    else if (!quantize_write_at(b->file->fd, values, piece->n * row_bytes, piece->item->offset[PART_WEIGHT] + piece->row * row_bytes))
        note_write(b);
    free(values);
}

static void piece_task(void *arg, size_t task) {
    struct batch *b = arg;
    const struct quantize_piece *piece = &b->pieces.data[task];
    const struct quantize_item *item = piece->item;
    if (b->failed) return;
    if (item->how == QUANTIZE_NVFP4)
        encode(b, piece);
    else if (item->how == QUANTIZE_BF16)
        widen(b, piece);
    else if (!quantize_write_at(b->file->fd, (const char *)item->in.data + piece->row, piece->n, item->offset[PART_WEIGHT] + piece->row))
        note_write(b);
}

/* The two numbers of a matrix. */
static moe4_status write_numbers(struct batch *b, const struct quantize_item *item) {
    struct lm *lm = b->plan->lm;
    float global;
    LM_TRY(lm, stored_global(b->plan, &global, shared_amax(item), b->plan->options->four_over_six));
    LM_TRY(lm, quantize_file_write(b->file, &global, sizeof global, item->offset[PART_GLOBAL]));
    if (!b->plan->options->calibrate) return MOE4_OK;
    LM_TRY(lm, stored_global(b->plan, &global, item->input_amax, false));
    return quantize_file_write(b->file, &global, sizeof global, item->offset[PART_INPUT]);
}

/* ---- batches ---- */

static void drop_pages(const moe4_tensor *t) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = (uintptr_t)t->data / page * page;
    if (t->bytes) madvise((void *)begin, (uintptr_t)t->data + t->bytes - begin, MADV_DONTNEED);
}

static moe4_status run_batch(struct batch *b) {
    struct quantize_plan *plan = b->plan;
    struct lm *lm = plan->lm;
    for (size_t i = b->first; i < b->end; i++) {
        struct quantize_item *item = &plan->items[i];
        if (item->how == QUANTIZE_NVFP4) {
            LM_TRY(lm, want_amax(b, item));
            LM_TRY(lm, want_amax(b, item->partner));
        }
        if (item->how != QUANTIZE_DROP)
            LM_TRY(lm, item->how == QUANTIZE_COPY ? add_bytes(lm, &b->pieces, item) : add_rows(lm, &b->pieces, item));
    }
    moe4_parallel_for(lm->ctx, b->amaxes.n, amax_task, b);
    LM_TRY(lm, failure(b));
    for (size_t i = b->first; i < b->end; i++) {
        if (plan->items[i].how != QUANTIZE_NVFP4) continue;
        LM_TRY(lm, check_finite(b, &plan->items[i]));
        LM_TRY(lm, check_finite(b, plan->items[i].partner));
    }
    moe4_parallel_for(lm->ctx, b->pieces.n, piece_task, b);
    LM_TRY(lm, failure(b));
    for (size_t i = b->first; i < b->end; i++)
        if (plan->items[i].how == QUANTIZE_NVFP4) LM_TRY(lm, write_numbers(b, &plan->items[i]));
    return MOE4_OK;
}

static moe4_status write_batch(struct quantize_plan *plan, struct quantize_file *file, size_t first, size_t end) {
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    struct batch b = {.plan = plan, .file = file, .first = first, .end = end, .lock = &lock};
    moe4_status status = run_batch(&b);
    for (size_t i = 0; i < b.amaxes.n; i++)
        if (b.amaxes.data[i].row == 0) drop_pages(&b.amaxes.data[i].item->in);
    for (size_t i = first; i < end; i++) drop_pages(&plan->items[i].in);
    free(b.amaxes.data);
    free(b.pieces.data);
    return status;
}

static moe4_status write_batches(struct quantize_plan *plan, struct quantize_file *file, const struct quantize_shard *shard,
                                 struct quantize_report *report, uint64_t *done) {
    LM_TRY(plan->lm, quantize_file_write(file, shard->header, shard->header_bytes, 0));
    for (size_t first = shard->first, end; first < shard->end; first = end) {
        uint64_t bytes = 0;
        for (end = first; end < shard->end && (end == first || bytes + plan->items[end].in.bytes <= BATCH_BYTES); end++)
            bytes += plan->items[end].in.bytes;
        LM_TRY(plan->lm, write_batch(plan, file, first, end));
        sync_file_range(file->fd, 0, 0, SYNC_FILE_RANGE_WRITE); /* the disk works while the next batch is made; only a hint */
        report->bytes_read += bytes;
        *done += bytes;
        if (plan->options->progress) plan->options->progress(plan->options->progress_user, "quantize", *done, plan->bytes_in);
    }
    report->bytes_written += shard->bytes;
    return MOE4_OK;
}

bool quantize_shard_is_there(const struct quantize_shard *shard, const struct quantize_folder *folder) {
    return quantize_folder_has(folder, shard->file, shard->header, shard->header_bytes, shard->bytes);
}

moe4_status quantize_shard_write(struct quantize_plan *plan, const struct quantize_folder *folder, struct quantize_shard *shard,
                                 struct quantize_report *report, uint64_t *done) {
    if (quantize_shard_is_there(shard, folder)) {
        for (size_t i = shard->first; i < shard->end; i++) *done += plan->items[i].in.bytes;
        report->n_shards_kept++;
        return MOE4_OK;
    }
    struct quantize_file file;
    LM_TRY(plan->lm, quantize_file_create(&file, folder, shard->file, shard->bytes));
    moe4_status status = write_batches(plan, &file, shard, report, done);
    if (status == MOE4_OK) return quantize_file_keep(&file);
    quantize_file_drop(&file);
    return status;
}
