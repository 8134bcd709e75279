#include "json.h"

#include <ctype.h>
#include <string.h>

moe4_status moe4_json_parse(const moe4_ctx *ctx, json_t **object_ret, const char *file, const void *text, size_t bytes) {
    *object_ret = NULL;
    json_error_t error;
    json_t *json = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!json) {
        for (char *c = error.text; *c; c++) /* it may quote the file: nothing of that goes to a terminal raw */
            if (iscntrl((unsigned char)*c)) *c = '?';
        return moe4_fail(ctx, MOE4_ERROR_FORMAT, "%s: not valid JSON at byte %d of %zu: %s", file, error.position, bytes, error.text);
    }
    if (!json_is_object(json)) {
        json_decref(json);
        return moe4_fail(ctx, MOE4_ERROR_FORMAT, "%s: not a JSON object", file);
    }
    *object_ret = json;
    return MOE4_OK;
}
