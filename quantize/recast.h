/* MXFP4 as NVFP4. The codes are the same; a block of 32 with scale 2^e becomes two of 16 with the E4M3 number 2^(e - c), where 2^c is the
 * matrix's global scale. E4M3 has 2^-9 .. 2^8, so nothing is rounded unless the exponents of a matrix are more than 17 apart. */
#ifndef QUANTIZE_RECAST_H
#define QUANTIZE_RECAST_H

#include "quantize/block.h"

/* The item's `amax`: 0 when all is zero, otherwise 1 + the largest scale byte of a block that is not zero. */
enum { QUANTIZE_MX_NAN = 256 }; /* a scale is NaN: byte 255 */
moe4_status quantize_recast_amax(const struct quantize_plan *plan, const struct quantize_piece *piece, uint32_t *amax_ret, char *why);
/* c, for a matrix (or gate and up together) with this largest. */
int quantize_recast_global(uint32_t amax);
/* codes [n, cols/2] and scales [n, cols/16] of a piece; *loss is what the blocks below 2^(c - 9) lost. */
moe4_status quantize_recast(const struct quantize_plan *plan, const struct quantize_piece *piece, uint8_t *codes, uint8_t *scales, int c,
                            struct quantize_recast_loss *loss, char *why);
/* The piece in fp32; a NaN scale gives NaN. */
moe4_status quantize_recast_floats(const struct quantize_plan *plan, const struct quantize_piece *piece, float *x, char *why);

#endif
