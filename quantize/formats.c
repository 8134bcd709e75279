/* How matrices are stored that are not wide, told by their names and companions. */
#include <stdio.h>
#include <string.h>

#include "quantize/plan.h"

static bool is_wide(moe4_dtype dtype) {
    return dtype == MOE4_F32 || dtype == MOE4_BF16 || dtype == MOE4_F16;
}

static bool is_byte(moe4_dtype dtype) {
    return dtype == MOE4_U8 || dtype == MOE4_I8;
}

/* The tensor X.weight_scale_inv or X.scale of X.weight. */
static bool find_scales(const struct quantize_plan *plan, const moe4_tensor *t, moe4_tensor *scales) {
    size_t n = quantize_module_length(t->name);
    char name[QUANTIZE_NAME_BYTES];
    if (snprintf(name, sizeof name, "%s_scale_inv", t->name) < (int)sizeof name &&
        moe4_checkpoint_find(plan->ckpt, scales, name) == MOE4_OK)
        return true;
    return snprintf(name, sizeof name, "%.*s.scale", (int)n, t->name) < (int)sizeof name &&
           moe4_checkpoint_find(plan->ckpt, scales, name) == MOE4_OK;
}

static moe4_status check_scales(struct lm *lm, const moe4_tensor *s, bool dtype_fits, const char *dtypes, size_t rows, size_t cols,
                                const char *blocks) {
    LM_CHECK(lm, dtype_fits, MOE4_ERROR_UNSUPPORTED, "%s: %s, need %s", s->name, moe4_dtype_name(s->dtype), dtypes);
    LM_CHECK(lm, s->n_dims == 2 && s->shape[0] == rows && s->shape[1] == cols, MOE4_ERROR_FORMAT,
             "%s: %zux%zu in %zu dimensions, need %zux%zu for blocks of %s", s->name, s->n_dims ? s->shape[0] : 0,
             s->n_dims > 1 ? s->shape[1] : 0, s->n_dims, rows, cols, blocks);
    return MOE4_OK;
}

moe4_status quantize_form_of(struct quantize_plan *plan, const moe4_tensor *t, enum quantize_form *form_ret, moe4_tensor *scales_ret) {
    struct lm *lm = plan->lm;
    *form_ret = QUANTIZE_WIDE;
    if (t->n_dims != 2 || !quantize_module_length(t->name) || is_wide(t->dtype)) return MOE4_OK;
    bool found = find_scales(plan, t, scales_ret);
    if (t->dtype == MOE4_F8_E4M3) {
        LM_CHECK(lm, found, MOE4_ERROR_UNSUPPORTED,
                 "%s: F8_E4M3 without weight_scale_inv or scale; moe4 quantizes from BF16, F16, F32, "
                 "block-scaled FP8 and MXFP4",
                 t->name);
        size_t rows = (t->shape[0] + QUANTIZE_FP8_BLOCK - 1) / QUANTIZE_FP8_BLOCK,
               cols = (t->shape[1] + QUANTIZE_FP8_BLOCK - 1) / QUANTIZE_FP8_BLOCK;
        *form_ret = QUANTIZE_FP8;
        return check_scales(lm, scales_ret, scales_ret->dtype == MOE4_F32 || scales_ret->dtype == MOE4_F8_E8M0, "F32 or F8_E8M0", rows,
                            cols, "128x128");
    }
    if (!is_byte(t->dtype) || !found || !quantize_ends_with(scales_ret->name, ".scale")) return MOE4_OK;
    size_t values = QUANTIZE_MX_BLOCK / 2;
    LM_CHECK(lm, t->shape[1] % values == 0, MOE4_ERROR_FORMAT, "%s: rows of %zu bytes, need a multiple of %zu for MXFP4", t->name,
             t->shape[1], values);
    *form_ret = QUANTIZE_MXFP4;
    return check_scales(lm, scales_ret, is_byte(scales_ret->dtype) || scales_ret->dtype == MOE4_F8_E8M0, "F8_E8M0 or U8", t->shape[0],
                        t->shape[1] / values, "32");
}

bool quantize_is_scales(struct quantize_plan *plan, const moe4_tensor *t) {
    char name[QUANTIZE_NAME_BYTES];
    moe4_tensor main, scales;
    if (quantize_ends_with(t->name, ".weight_scale_inv"))
        snprintf(name, sizeof name, "%.*s", (int)(strlen(t->name) - strlen("_scale_inv")), t->name);
    else if (quantize_ends_with(t->name, ".scale"))
        snprintf(name, sizeof name, "%.*s.weight", (int)(strlen(t->name) - strlen(".scale")), t->name);
    else
        return false;
    return moe4_checkpoint_find(plan->ckpt, &main, name) == MOE4_OK && main.n_dims == 2 && !is_wide(main.dtype) &&
           find_scales(plan, &main, &scales) && strcmp(scales.name, t->name) == 0;
}

moe4_status quantize_refuse(struct quantize_plan *plan, const moe4_tensor *t) {
    static const struct {
        const char *suffix, *format;
    } known[] = {{".weight_scale_2", "ModelOpt NVFP4 already"},
                 {".weight_packed", "compressed-tensors already"},
                 {".qweight", "GPTQ or AWQ already"}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        LM_CHECK(plan->lm, !quantize_ends_with(t->name, known[i].suffix), MOE4_ERROR_UNSUPPORTED, "%s: %s", t->name, known[i].format);
    return MOE4_OK;
}
