/* Input scales: the model runs over a text, and the inputs of its linear layers are watched. */
#ifndef QUANTIZE_CALIBRATE_H
#define QUANTIZE_CALIBRATE_H

#include "quantize/folder.h"
#include "quantize/plan.h"

/* What quantize_calibrate sets, from the folder when an earlier run left it there; otherwise it is left there now. The items point into
 * *record_ret, the caller's to free, also after an error (record.c). */
moe4_status quantize_calibrated(void **record_ret, struct quantize_plan *plan, const struct quantize_folder *folder,
                                struct quantize_report *report, const char *in);

struct quantize_calibration; /* keeps the channel weights that items point to */

/* Sets input_amax, and with the search channel_weight, of every quantized item. Errors: UNSUPPORTED (a family that lm/ does not run),
 * FORMAT, IO (the text), MEMORY. */
moe4_status quantize_calibrate(struct quantize_calibration **calibration_ret, struct quantize_plan *plan, struct quantize_report *report,
                               const char *in);
void quantize_calibration_free(struct quantize_calibration *calibration);

#endif
