/* Making NVFP4 checkpoints: a folder of wide weights in, a folder of quantized ones out, streamed. The engine behind `moe4 quantize`; it
 * sees include/moe4.h and, for its errors and for calibration, lm/. quantize.c is the place to start reading. */
#ifndef QUANTIZE_H
#define QUANTIZE_H

#include "lm/lm.h"

/* bytes_done of bytes_total of the input, now and then. */
typedef void (*quantize_progress_fn)(void *user, const char *step, uint64_t done, uint64_t total);

struct quantize_options {
    moe4_recipe recipe;         /* MODELOPT, MODELOPT_STATIC or COMPRESSED_TENSORS */
    bool four_over_six;         /* MODELOPT only */
    bool search;                /* the scale byte of each block by least squared error, weighted when calibrated */
    const char *const *exclude; /* fnmatch patterns of modules that stay as they are */
    size_t n_exclude;
    uint64_t max_shard_bytes; /* of tensors; a larger tensor gets a shard of its own */
    const char *calibrate;    /* text (or token ids, as for eval) that sets input scales; NULL: none */
    bool resume;              /* OUT may be unfinished work of the same task */
    quantize_progress_fn progress;
    void *progress_user;
};

/* A matrix of MXFP4 that could not be recast without loss: some blocks are too small for its scales. */
struct quantize_inexact {
    char *name;                   /* of the module */
    uint64_t n_inexact, n_blocks; /* of 32 */
    double relative_error;        /* |a - b| / |a| of the whole matrix */
};

struct quantize_report {
    size_t n_quantized;             /* matrices */
    size_t n_left;                  /* linear layers that stay as they are: excluded, or K no multiple of 16 */
    size_t n_copied;                /* all other tensors */
    size_t n_shards, n_shards_kept; /* kept: complete from an earlier run */
    size_t n_tokens;                /* of calibration */
    size_t n_inputs;                /* experts' inputs with a scale, and how many of them no token reached */
    size_t n_unreached;
    size_t n_recast;                  /* matrices from MXFP4 */
    struct quantize_inexact *inexact; /* those that lost something, in the order of the checkpoint */
    size_t n_inexact;
    uint64_t bytes_read, bytes_written;
    double seconds; /* of reading, quantizing and writing tensors */
};

/* Writes OUT, which must be absent, empty, or with `resume` unfinished work of the same task. Files get their names when complete and on
 * the disk; config.json comes last. Errors: the library's; FORMAT (a NaN weight: tensor, row and column), UNSUPPORTED (a format that is
 * not read), IO (a full disk: the file), ARGUMENT (OUT holds something else). After an error OUT can be resumed. */
moe4_status quantize_run(struct lm *lm, struct quantize_report *report, const char *in, const char *out,
                         const struct quantize_options *options);

/* After success and failure alike. */
void quantize_report_free(struct quantize_report *report);

#endif
