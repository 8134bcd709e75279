/* Input scales: the model runs over a text, and the inputs of its linear layers are watched. */
#ifndef QUANTIZE_CALIBRATE_H
#define QUANTIZE_CALIBRATE_H

#include "quantize/plan.h"

struct quantize_calibration; /* keeps the channel weights that items point to */

/* Sets input_amax, and with the search channel_weight, of every quantized item. Errors: UNSUPPORTED (a family that lm/ does not run),
 * FORMAT, IO (the text), MEMORY. */
moe4_status quantize_calibrate(struct quantize_calibration **calibration_ret, struct quantize_plan *plan, struct quantize_report *report,
                               const char *in);
void quantize_calibration_free(struct quantize_calibration *calibration);

#endif
