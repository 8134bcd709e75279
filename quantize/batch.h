/* A batch of items, and what the threads do with its pieces. */
#ifndef QUANTIZE_BATCH_H
#define QUANTIZE_BATCH_H

#include <pthread.h>

#include "quantize/folder.h"
#include "quantize/recast.h"

struct quantize_pieces {
    struct quantize_piece *data; /* of a copied tensor row and n count bytes */
    size_t n, room;
};

struct quantize_batch {
    struct quantize_plan *plan;
    struct quantize_file *file; /* NULL: nothing is written, only what MXFP4 loses is counted */
    struct quantize_pieces amaxes, pieces;
    size_t first, end; /* items */
    atomic_bool failed;
    pthread_mutex_t *lock; /* of what follows */
    moe4_status status;
    char problem[400];
};

/* Tasks of moe4_parallel_for over a batch: the largest value of piece `task` of amaxes; piece `task` of pieces, quantized or copied, into
 * its place. A failure is the batch's, the first one with its name and reason. */
void quantize_amax_task(void *batch, size_t task);
void quantize_piece_task(void *batch, size_t task);
/* The two numbers of a matrix: on one thread, after its tasks. */
moe4_status quantize_write_numbers(struct quantize_batch *b, const struct quantize_item *item);
/* NaN when a value is. */
float quantize_item_amax(const struct quantize_item *item);

#endif
