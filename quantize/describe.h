/* The JSON files of a quantized model. */
#ifndef QUANTIZE_DESCRIBE_H
#define QUANTIZE_DESCRIBE_H

#include <jansson.h>

#include "quantize/plan.h"

/* Text for *text_ret, the caller's to free; NULL where this model or recipe has no such file. */
moe4_status quantize_describe_config(const struct quantize_plan *plan, char **text_ret);   /* config.json with quantization_config */
moe4_status quantize_describe_hf_quant(const struct quantize_plan *plan, char **text_ret); /* hf_quant_config.json */
moe4_status quantize_describe_index(const struct quantize_plan *plan, char **text_ret);    /* model.safetensors.index.json */

#endif
