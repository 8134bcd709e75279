/* What the readers of JSON share: strict parsing of hostile text, and numbers with bounds. */
#ifndef MOE4_JSON_H
#define MOE4_JSON_H

#include <jansson.h>

#include "internal.h"

/* An object from `bytes` of text, duplicate keys refused; `file` names it in the sentence. Freed by json_decref. Errors: FORMAT. */
moe4_status moe4_json_parse(const moe4_ctx *ctx, json_t **object_ret, const char *file, const void *text, size_t bytes);

#endif
