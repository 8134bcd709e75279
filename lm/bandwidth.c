/* How fast the model's weights can be read at all: the floor under the time of a token. */
#include "lm.h"

#include <stdatomic.h>
#include <string.h>

enum { WORDS = 8, MIN_BYTES = 4096, PIECE_BYTES = 1 << 16, MAX_PIECES = 4096, PIECES_PER_TASK = 8, N_PASSES = 6 };

struct read_job {
    const uint8_t *piece[MAX_PIECES];
    size_t bytes[MAX_PIECES], n_pieces;
    _Atomic uint64_t sum; /* so that no load can be left out */
};

static uint64_t read_piece(const uint8_t *piece, size_t bytes) {
    uint64_t lane[WORDS] = {0}, word[WORDS];
    for (size_t i = 0; i + sizeof word <= bytes; i += sizeof word) {
        memcpy(word, piece + i, sizeof word);
        for (int j = 0; j < WORDS; j++) lane[j] ^= word[j];
    }
    for (int j = 1; j < WORDS; j++) lane[0] ^= lane[j];
    return lane[0];
}

static void read_task(void *arg, size_t task) {
    struct read_job *job = arg;
    uint64_t sum = 0;
    for (size_t i = task * PIECES_PER_TASK; i < (task + 1) * PIECES_PER_TASK && i < job->n_pieces; i++)
        sum ^= read_piece(job->piece[i], job->bytes[i]);
    atomic_fetch_xor(&job->sum, sum);
}

double lm_read_bandwidth(const struct lm_model *model) {
    struct read_job job = {.n_pieces = 0};
    moe4_ceilings device = MOE4_CEILINGS_INIT;
    moe4_tensor t;
    if (strcmp(moe4_ctx_device(model->lm->ctx), "cpu") != 0)
        return moe4_ctx_ceilings(model->lm->ctx, &device) == MOE4_OK ? device.read_bytes : 0;
    size_t total = 0;
    for (size_t i = 0; i < moe4_checkpoint_n_tensors(model->ckpt) && moe4_checkpoint_tensor(model->ckpt, &t, i) == MOE4_OK; i++)
        for (size_t at = 0; t.bytes - at >= MIN_BYTES && job.n_pieces < MAX_PIECES;) {
            size_t n = t.bytes - at < PIECE_BYTES ? t.bytes - at : PIECE_BYTES;
            job.piece[job.n_pieces] = (const uint8_t *)t.data + at;
            job.bytes[job.n_pieces++] = n;
            total += n;
            at += n;
        }
    double best = 0.0;
    for (int pass = 0; pass < N_PASSES; pass++) {
        double start = lm_seconds();
        moe4_parallel_for(model->lm->ctx, (job.n_pieces + PIECES_PER_TASK - 1) / PIECES_PER_TASK, read_task, &job);
        double rate = (double)total / (lm_seconds() - start);
        best = rate > best ? rate : best;
    }
    return best;
}
