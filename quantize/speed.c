#include "quantize/speed.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MEMORY_BYTES = 256 << 20, LEAST_DISK_BYTES = 64 << 20, MOST_DISK_BYTES = 512 << 20, PIECE_BYTES = 1 << 20, N_PASSES = 3 };

struct read_job {
    const uint64_t *data;
    _Atomic uint64_t sum; /* so that no load can be left out */
};

static void read_task(void *arg, size_t task) {
    struct read_job *job = arg;
    const uint64_t *at = job->data + task * (PIECE_BYTES / sizeof *at);
    uint64_t lane[8] = {0};
    for (size_t i = 0; i < PIECE_BYTES / sizeof *at; i += 8)
        for (size_t k = 0; k < 8; k++) lane[k] ^= at[i + k];
    for (size_t k = 1; k < 8; k++) lane[0] ^= lane[k];
    atomic_fetch_xor(&job->sum, lane[0]);
}

double quantize_memory_rate(struct lm *lm) {
    uint64_t *data = malloc(MEMORY_BYTES);
    double best = 0;
    if (!data) return 0;
    memset(data, 0x5a, MEMORY_BYTES);
    struct read_job job = {.data = data};
    for (int pass = 0; pass < N_PASSES; pass++) {
        double start = lm_seconds();
        moe4_parallel_for(lm->ctx, MEMORY_BYTES / PIECE_BYTES, read_task, &job);
        double rate = MEMORY_BYTES / (lm_seconds() - start);
        best = rate > best ? rate : best;
    }
    free(data);
    return best;
}

double quantize_disk_rate(const char *folder, uint64_t like) {
    uint64_t bytes = like < LEAST_DISK_BYTES  ? LEAST_DISK_BYTES
                     : like > MOST_DISK_BYTES ? MOST_DISK_BYTES
                                              : like / PIECE_BYTES * PIECE_BYTES;
    int fd = open(folder, O_TMPFILE | O_WRONLY | O_CLOEXEC, 0600);
    char *data = malloc(PIECE_BYTES);
    bool fine = fd >= 0 && data;
    if (data) memset(data, 0x5a, PIECE_BYTES);
    double start = lm_seconds();
    for (uint64_t at = 0; fine && at < bytes; at += PIECE_BYTES) fine = write(fd, data, PIECE_BYTES) == PIECE_BYTES;
    fine = fine && fsync(fd) == 0;
    double seconds = lm_seconds() - start;
    if (fd >= 0) close(fd);
    free(data);
    return fine ? (double)bytes / seconds : 0;
}
