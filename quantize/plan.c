/* What becomes of each tensor. */
#include "quantize/plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FP8_BLOCK = 128 };

static bool is_wide(moe4_dtype dtype) {
    return dtype == MOE4_F32 || dtype == MOE4_BF16 || dtype == MOE4_F16;
}

/* ---- parts ---- */

static struct quantize_part matrix(const char *suffix, moe4_dtype dtype, size_t rows, size_t cols) {
    return (struct quantize_part){suffix, dtype, 2, {rows, cols}, (uint64_t)rows * cols * moe4_dtype_bytes(dtype)};
}

static struct quantize_part number(const char *suffix, bool one_dim) {
    return (struct quantize_part){suffix, MOE4_F32, one_dim, {1}, sizeof(float)};
}

size_t quantize_parts(const struct quantize_plan *plan, const struct quantize_item *item, struct quantize_part parts[static N_PARTS]) {
    const moe4_tensor *t = &item->in;
    bool ct = plan->options->recipe == MOE4_RECIPE_COMPRESSED_TENSORS;
    switch (item->how) {
    case QUANTIZE_DROP: return 0;
    case QUANTIZE_COPY:
        parts[PART_WEIGHT] = (struct quantize_part){.dtype = t->dtype, .n_dims = t->n_dims, .bytes = t->bytes};
        memcpy(parts[PART_WEIGHT].shape, t->shape, sizeof t->shape);
        return 1;
    case QUANTIZE_BF16: parts[PART_WEIGHT] = matrix(NULL, MOE4_BF16, item->rows, item->cols); return 1;
    case QUANTIZE_NVFP4: break;
    }
    parts[PART_WEIGHT] = matrix(ct ? ".weight_packed" : ".weight", MOE4_U8, item->rows, item->cols / 2);
    parts[PART_SCALE] = matrix(".weight_scale", MOE4_F8_E4M3, item->rows, item->cols / MOE4_BLOCK);
    parts[PART_GLOBAL] = number(ct ? ".weight_global_scale" : ".weight_scale_2", ct);
    parts[PART_INPUT] = number(ct ? ".input_global_scale" : ".input_scale", ct);
    return plan->options->calibrate ? N_PARTS : N_PARTS - 1;
}

const char *quantize_part_name(char name[static QUANTIZE_NAME_BYTES], const struct quantize_item *item, const struct quantize_part *part) {
    if (!part->suffix) return item->in.name;
    snprintf(name, QUANTIZE_NAME_BYTES, "%.*s%s", (int)quantize_module_length(item->in.name), item->in.name, part->suffix);
    return name;
}

/* ---- one tensor ---- */

static int by_item_name(const void *a, const void *b) {
    return strcmp((*(struct quantize_item *const *)a)->in.name, (*(struct quantize_item *const *)b)->in.name);
}

/* The item of a name, by bisection over by_name; NULL when there is none. */
static struct quantize_item *find_item(const struct quantize_plan *plan, struct quantize_item *const *by_name, const char *name) {
    size_t low = 0, high = plan->n_items;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        if (strcmp(by_name[mid]->in.name, name) < 0)
            low = mid + 1;
        else
            high = mid;
    }
    return low < plan->n_items && strcmp(by_name[low]->in.name, name) == 0 ? by_name[low] : NULL;
}

/* A matrix stored as FP8 with an fp32 factor for each 128x128 block, as DeepSeek ships: checks the factors and takes them out. */
static moe4_status pair_fp8(struct quantize_plan *plan, struct quantize_item *item, struct quantize_item *const *by_name) {
    struct lm *lm = plan->lm;
    const moe4_tensor *t = &item->in;
    char name[QUANTIZE_NAME_BYTES];
    snprintf(name, sizeof name, "%s_scale_inv", t->name);
    struct quantize_item *scale = find_item(plan, by_name, name);
    LM_CHECK(lm, scale, MOE4_ERROR_UNSUPPORTED,
             "%s: F8_E4M3 without weight_scale_inv; moe4 quantizes from BF16, F16, F32 and "
             "block-scaled FP8",
             t->name);
    const moe4_tensor *s = &scale->in;
    size_t rows = (t->shape[0] + FP8_BLOCK - 1) / FP8_BLOCK, cols = (t->shape[1] + FP8_BLOCK - 1) / FP8_BLOCK;
    LM_CHECK(lm, s->dtype == MOE4_F32, MOE4_ERROR_UNSUPPORTED, "%s: %s, need F32", name, moe4_dtype_name(s->dtype));
    LM_CHECK(lm, s->n_dims == 2 && s->shape[0] == rows && s->shape[1] == cols, MOE4_ERROR_FORMAT,
             "%s: %zux%zu in %zu dimensions, need %zux%zu for blocks of %dx%d", name, s->n_dims ? s->shape[0] : 0,
             s->n_dims > 1 ? s->shape[1] : 0, s->n_dims, rows, cols, FP8_BLOCK, FP8_BLOCK);
    item->fp8_scale = *s;
    scale->how = QUANTIZE_DROP;
    return MOE4_OK;
}

/* Companions of formats that are quantized already, or that moe4 does not read. */
static moe4_status refuse_quantized(struct lm *lm, const moe4_tensor *t) {
    static const struct {
        const char *suffix, *format;
    } known[] = {{".weight_scale_2", "ModelOpt NVFP4 already"},
                 {".weight_packed", "compressed-tensors already"},
                 {".qweight", "GPTQ or AWQ already"},
                 {"_blocks", "MXFP4, which moe4 does not recast yet"}};
    size_t n = strlen(t->name);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        size_t k = strlen(known[i].suffix);
        LM_CHECK(lm, n <= k || strcmp(t->name + n - k, known[i].suffix) != 0, MOE4_ERROR_UNSUPPORTED, "%s: %s", t->name, known[i].format);
    }
    LM_CHECK(lm, !(t->n_dims == 3 && quantize_is_fused_experts(t->name)), MOE4_ERROR_UNSUPPORTED,
             "%s: all experts in one 3-D tensor, which moe4 does not quantize yet", t->name);
    return MOE4_OK;
}

static moe4_status decide(struct quantize_plan *plan, struct quantize_item *item, size_t n_layers, struct quantize_item *const *by_name) {
    struct lm *lm = plan->lm;
    const moe4_tensor *t = &item->in;
    LM_TRY(lm, refuse_quantized(lm, t));
    if (item->how == QUANTIZE_DROP) return MOE4_OK; /* an FP8 matrix before it took it */
    bool fp8 = t->dtype == MOE4_F8_E4M3 && t->n_dims == 2 && quantize_module_length(t->name);
    item->is_linear = t->n_dims == 2 && quantize_is_linear(t->name, n_layers);
    if (t->n_dims == 2) {
        item->rows = t->shape[0];
        item->cols = t->shape[1];
    }
    if (fp8) LM_TRY(lm, pair_fp8(plan, item, by_name));
    LM_CHECK(lm, !item->is_linear || fp8 || is_wide(t->dtype), MOE4_ERROR_UNSUPPORTED,
             "%s: %s; moe4 quantizes from BF16, F16, F32 and block-scaled FP8", t->name, moe4_dtype_name(t->dtype));
    bool can = item->is_linear && item->rows && item->cols && item->cols % MOE4_BLOCK == 0;
    if (can && !quantize_matches(t->name, plan->options->exclude, plan->options->n_exclude))
        item->how = QUANTIZE_NVFP4;
    else
        item->how = fp8 ? QUANTIZE_BF16 : QUANTIZE_COPY;
    return MOE4_OK;
}

/* ---- all of them ---- */

static void find_partner(struct quantize_plan *plan, size_t i, struct quantize_item *const *by_name) {
    struct quantize_item *item = &plan->items[i];
    char name[QUANTIZE_NAME_BYTES];
    if (item->how != QUANTIZE_NVFP4 || !quantize_partner_name(name, item->in.name)) return;
    struct quantize_item *found = find_item(plan, by_name, name);
    if (found && found->how == QUANTIZE_NVFP4) item->partner = found;
}

static moe4_status decide_all(struct quantize_plan *plan, struct quantize_item **by_name) {
    struct lm *lm = plan->lm;
    moe4_model_info info = MOE4_MODEL_INFO_INIT;
    size_t n_layers = moe4_checkpoint_info(plan->ckpt, &info) == MOE4_OK ? info.n_layers : SIZE_MAX; /* unknown families go by names */
    for (size_t i = 0; i < plan->n_items; i++) {
        LM_TRY(lm, moe4_checkpoint_tensor(plan->ckpt, &plan->items[i].in, i));
        by_name[i] = &plan->items[i];
    }
    qsort(by_name, plan->n_items, sizeof *by_name, by_item_name);
    for (size_t i = 0; i < plan->n_items; i++) LM_TRY(lm, decide(plan, &plan->items[i], n_layers, by_name));
    size_t n_quantized = 0;
    for (size_t i = 0; i < plan->n_items; i++) {
        find_partner(plan, i, by_name);
        plan->bytes_in += plan->items[i].in.bytes;
        n_quantized += plan->items[i].how == QUANTIZE_NVFP4;
    }
    LM_CHECK(lm, n_quantized, MOE4_ERROR_FORMAT, "no linear layer to quantize among %zu tensors", plan->n_items);
    return MOE4_OK;
}

moe4_status quantize_plan_make(struct quantize_plan *plan, struct lm *lm, const char *in, const struct quantize_options *options) {
    *plan = (struct quantize_plan){.lm = lm, .options = options};
    LM_TRY(lm, moe4_checkpoint_open(&plan->ckpt, lm->ctx, in));
    LM_CHECK(lm, *moe4_checkpoint_config(plan->ckpt, NULL), MOE4_ERROR_NOT_FOUND, "%s: no config.json", in);
    for (int i = 0; i < 256; i++) plan->e4m3[i] = moe4_e4m3_to_float((uint8_t)i);
    plan->n_items = moe4_checkpoint_n_tensors(plan->ckpt);
    plan->items = lm_calloc(lm, plan->n_items, sizeof *plan->items, "plan");
    struct quantize_item **by_name = plan->items ? lm_calloc(lm, plan->n_items, sizeof *by_name, "plan") : NULL;
    moe4_status status = by_name ? decide_all(plan, by_name) : MOE4_ERROR_MEMORY;
    free(by_name);
    return status == MOE4_OK ? quantize_plan_shards(plan) : status;
}

void quantize_plan_free(struct quantize_plan *plan) {
    for (size_t i = 0; plan->shards && i < plan->n_shards; i++) free(plan->shards[i].header);
    free(plan->shards);
    free(plan->items);
    moe4_checkpoint_close(plan->ckpt);
}
