/* The task as the journal and the shards keep it, and whether what stands in a folder is of the same. */
#ifndef QUANTIZE_TASK_H
#define QUANTIZE_TASK_H

#include "quantize/folder.h"
#include "quantize/plan.h"

/* Sets plan->made_with: the options that neither names nor shapes of the output show, as strings. Each shard says them. */
moe4_status quantize_task_options(struct quantize_plan *plan);
/* What decides every byte of the output: the input files with size and time, the options, the calibration text. */
moe4_status quantize_task_describe(const struct quantize_plan *plan, const char *in, json_t **task_ret);
/* Finds a shard of the folder whose header says that it was made with another option. Errors: ARGUMENT, with the option and both values. */
moe4_status quantize_task_check_shards(const struct quantize_plan *plan, const struct quantize_folder *folder);

#endif
