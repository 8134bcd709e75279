/* One matrix of two models, read from their files piece by piece: how far its values and its bytes are apart. */
#ifndef QUANTIZE_DIFFERENCE_H
#define QUANTIZE_DIFFERENCE_H

#include "quantize/compare.h"
#include "quantize/source.h"

/* A model and its files. */
struct quantize_side {
    moe4_checkpoint *ckpt;
    struct quantize_files files;
};

enum { QUANTIZE_DIFFERENCE_BYTES = QUANTIZE_WHY_BYTES + 100 };
/* Adds to d's sums and counts: `a` of side a beside `b` of side b, of one shape. For many threads at once; `why` says what went wrong. */
moe4_status quantize_difference_add(moe4_ctx *ctx, struct quantize_difference *d, const struct quantize_side *side_a, const moe4_weight *a,
                                    const struct quantize_side *side_b, const moe4_weight *b, char why[static QUANTIZE_DIFFERENCE_BYTES]);
/* Whether two tensors of as many bytes have the same. */
moe4_status quantize_same_bytes(bool *same_ret, const struct quantize_side *side_a, const moe4_tensor *a,
                                const struct quantize_side *side_b, const moe4_tensor *b, char why[static QUANTIZE_DIFFERENCE_BYTES]);

#endif
