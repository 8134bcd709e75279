/* A piece of a matrix: its values as floats, its largest, its codes and scales. Called from many threads at once; where a status is
 * returned, `why` [QUANTIZE_WHY_BYTES] may say more, or the context's error. */
#ifndef QUANTIZE_BLOCK_H
#define QUANTIZE_BLOCK_H

#include "quantize/plan.h"

/* A row may be longer. Pieces of a matrix that is stored column by column are of more rows, so that reads are long enough. */
enum { QUANTIZE_PIECE_ELEMENTS = 1 << 16, QUANTIZE_COLUMN_ROWS = 256 };

/* Rows [row, row + n) of an item's matrix. */
struct quantize_piece {
    struct quantize_item *item;
    size_t row, n;
};

/* Bits of the largest magnitude of the piece, as item->amax has them; NaN or infinity when one is in it. */
moe4_status quantize_piece_amax(const struct quantize_plan *plan, const struct quantize_piece *piece, uint32_t *amax_ret, char *why);
/* codes [n, cols/2] and scales [n, cols/16] with the recipe's stored global scale. */
moe4_status quantize_piece_encode(const struct quantize_plan *plan, const struct quantize_piece *piece, uint8_t *codes, uint8_t *scales,
                                  float global, char *why);
/* bf16 [n, cols]. */
moe4_status quantize_piece_widen(const struct quantize_plan *plan, const struct quantize_piece *piece, uint16_t *values, char *why);
/* Row and column of the first value of an item that is not finite; false when all are, or cannot be read. */
bool quantize_find_nonfinite(const struct quantize_plan *plan, struct quantize_item *item, size_t *row_ret, size_t *col_ret);

/* Chooses each block's scale byte again, for the least squared error under the element step of the recipe; weight [cols] or NULL. codes
 * and scales hold a plain quantization of x [rows, cols]; blocks of zeros stay as they are. isa: bits of MOE4_ISA_ that may be used;
 * bytes do not depend on them (search.c). */
void quantize_search(uint8_t *codes, uint8_t *scales, const float *x, size_t rows, size_t cols, float global, bool divides,
                     const float *weight, uint32_t isa);

#endif
