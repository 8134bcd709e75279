/* A shard is streamed in batches of about 64 MB of input. In each batch all threads first find the largest values, from which follow the
 * global scales; then they read pieces of rows again (the system has them in memory still), quantize them and write each to its final
 * offset. */
#include "quantize/stream.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quantize/batch.h"

enum { BATCH_BYTES = 64 << 20, COPY_PIECE_BYTES = 1 << 20 };

/* ---- pieces ---- */

static moe4_status add_piece(struct lm *lm, struct quantize_pieces *list, struct quantize_piece piece) {
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

static moe4_status add_rows(struct lm *lm, struct quantize_pieces *list, struct quantize_item *item) {
    size_t step = item->cols < QUANTIZE_PIECE_ELEMENTS ? QUANTIZE_PIECE_ELEMENTS / (item->cols ? item->cols : 1) : 1;
    bool by_column = item->values.col_bytes != moe4_dtype_bytes(item->values.dtype);
    if (by_column && step < QUANTIZE_COLUMN_ROWS) step = QUANTIZE_COLUMN_ROWS;
    for (size_t row = 0; row < item->rows; row += step)
        LM_TRY(lm, add_piece(lm, list, (struct quantize_piece){item, row, item->rows - row < step ? item->rows - row : step}));
    return MOE4_OK;
}

static moe4_status add_bytes(struct lm *lm, struct quantize_pieces *list, struct quantize_item *item) {
    for (size_t at = 0; at < item->in.bytes; at += COPY_PIECE_BYTES) {
        size_t n = item->in.bytes - at < COPY_PIECE_BYTES ? item->in.bytes - at : COPY_PIECE_BYTES;
        LM_TRY(lm, add_piece(lm, list, (struct quantize_piece){item, at, n}));
    }
    return MOE4_OK;
}

static moe4_status failure(const struct quantize_batch *b) {
    return b->failed ? lm_fail(b->plan->lm, b->status, "%s", b->problem) : MOE4_OK;
}

static moe4_status want_amax(struct quantize_batch *b, struct quantize_item *item) {
    if (!item || item->has_amax) return MOE4_OK;
    item->has_amax = true;
    return add_rows(b->plan->lm, &b->amaxes, item);
}

static moe4_status check_finite(struct quantize_batch *b, struct quantize_item *item) {
    size_t row = 0, col = 0;
    if (!item || isfinite(quantize_item_amax(item))) return MOE4_OK;
    LM_CHECK(b->plan->lm, !quantize_find_nonfinite(b->plan, item, &row, &col), MOE4_ERROR_FORMAT, "%s: %s: row %zu column %zu is %s",
             item->in.file, item->name, row, col, isnan(quantize_item_amax(item)) ? "NaN" : "infinite");
    return lm_fail(b->plan->lm, MOE4_ERROR_IO, "%s: %s: changed while it was read", item->in.file, item->name);
}

/* ---- batches ---- */

static bool is_wanted(const struct quantize_batch *b, const struct quantize_item *item) {
    return b->file ? item->how != QUANTIZE_DROP : item->how == QUANTIZE_NVFP4 && item->form == QUANTIZE_MXFP4;
}

static moe4_status run_batch(struct quantize_batch *b) {
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
    moe4_parallel_for(lm->ctx, b->amaxes.n, quantize_amax_task, b);
    LM_TRY(lm, failure(b));
    for (size_t i = b->first; i < b->end; i++) {
        if (plan->items[i].how != QUANTIZE_NVFP4 || !is_wanted(b, &plan->items[i])) continue;
        LM_TRY(lm, check_finite(b, &plan->items[i]));
        LM_TRY(lm, check_finite(b, plan->items[i].partner));
    }
    moe4_parallel_for(lm->ctx, b->pieces.n, quantize_piece_task, b);
    LM_TRY(lm, failure(b));
    for (size_t i = b->first; b->file && i < b->end; i++)
        if (plan->items[i].how == QUANTIZE_NVFP4) LM_TRY(lm, quantize_write_numbers(b, &plan->items[i]));
    return MOE4_OK;
}

static moe4_status write_batch(struct quantize_plan *plan, struct quantize_file *file, size_t first, size_t end) {
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    struct quantize_batch b = {.plan = plan, .file = file, .first = first, .end = end, .lock = &lock};
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
