/* The JSON files of a quantized model, and the task as the journal keeps it. */
#ifndef QUANTIZE_DESCRIBE_H
#define QUANTIZE_DESCRIBE_H

#include <jansson.h>

#include "quantize/plan.h"

/* Text for *text_ret, the caller's to free; NULL where this model or recipe has no such file. */
moe4_status quantize_describe_config(const struct quantize_plan *plan, char **text_ret);   /* config.json with quantization_config */
moe4_status quantize_describe_hf_quant(const struct quantize_plan *plan, char **text_ret); /* hf_quant_config.json */
moe4_status quantize_describe_index(const struct quantize_plan *plan, char **text_ret);    /* model.safetensors.index.json */
/* What decides every byte of the output: the input files with size and time, the options, the calibration text. */
moe4_status quantize_describe_task(const struct quantize_plan *plan, const char *in, json_t **task_ret);

#endif
