/* What becomes of each tensor. */
#include "quantize/plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quantize/task.h"

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
        if (item->own_name) {
            parts[PART_WEIGHT] = matrix(NULL, t->dtype, item->rows, item->cols);
            parts[PART_WEIGHT].n_dims = item->is_vector ? 1 : 2;
            return 1;
        }
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
    if (!part->suffix) return item->name;
    snprintf(name, QUANTIZE_NAME_BYTES, "%.*s%s", (int)quantize_module_length(item->name), item->name, part->suffix);
    return name;
}

/* ---- one tensor ---- */

struct quantize_item *quantize_plan_add(struct quantize_plan *plan, const moe4_tensor *in, size_t number) {
    if (plan->n_items == plan->items_room) {
        size_t room = plan->items_room ? 2 * plan->items_room : 1024;
        struct quantize_item *items = room < SIZE_MAX / sizeof *items ? realloc(plan->items, room * sizeof *items) : NULL;
        if (!items) {
            lm_fail(plan->lm, MOE4_ERROR_MEMORY, "no memory for %zu tensors", room);
            return NULL;
        }
        plan->items = items;
        plan->items_room = room;
    }
    struct quantize_item *item = &plan->items[plan->n_items++];
    *item = (struct quantize_item){.in = *in, .name = in->name, .number = number, .bytes_in = in->bytes};
    return item;
}

static moe4_status add_tensor(struct quantize_plan *plan, const moe4_tensor *t, size_t number) {
    struct lm *lm = plan->lm;
    moe4_tensor scales;
    bool is_fused;
    LM_TRY(lm, quantize_refuse(plan, t));
    LM_TRY(lm, quantize_add_fused(plan, t, number, &is_fused));
    if (is_fused) return MOE4_OK;
    struct quantize_item *item = quantize_plan_add(plan, t, number);
    if (!item) return MOE4_ERROR_MEMORY;
    LM_TRY(lm, quantize_form_of(plan, t, &item->form, &scales));
    size_t width = t->n_dims == 2 ? t->shape[1] : 1;
    if (t->n_dims == 2) {
        item->rows = t->shape[0];
        item->cols = item->form == QUANTIZE_MXFP4 ? 2 * width : width;
    }
    LM_TRY(lm, quantize_view_make(plan, &item->values, t, width));
    return item->form == QUANTIZE_WIDE ? MOE4_OK : quantize_view_make(plan, &item->scales, &scales, scales.shape[1]);
}

/* A block-scaled matrix that is no linear layer of the model keeps its format if it is MXFP4, and becomes bf16 if it is FP8. */
static bool is_widened(const struct quantize_item *item) {
    return item->form == QUANTIZE_FP8 || (item->form == QUANTIZE_MXFP4 && item->is_linear);
}

static moe4_status decide(struct quantize_plan *plan, struct quantize_item *item, size_t n_layers) {
    moe4_dtype dtype = item->in.dtype;
    bool wide = dtype == MOE4_F32 || dtype == MOE4_BF16 || dtype == MOE4_F16, is_matrix = item->in.n_dims == 2 || item->own_name;
    if (item->how == QUANTIZE_DROP) return MOE4_OK;
    item->is_linear = is_matrix && !item->is_vector && quantize_is_linear(item->name, n_layers);
    LM_CHECK(plan->lm, !item->is_linear || wide || item->form != QUANTIZE_WIDE, MOE4_ERROR_UNSUPPORTED,
             "%s: %s; moe4 quantizes from BF16, F16, F32, block-scaled FP8 and MXFP4", item->name, moe4_dtype_name(dtype));
    bool can = item->is_linear && item->rows && item->cols && item->cols % MOE4_BLOCK == 0;
    if (can && !quantize_matches(item->name, plan->options->exclude, plan->options->n_exclude))
        item->how = QUANTIZE_NVFP4;
    else
        item->how = is_widened(item) ? QUANTIZE_BF16 : QUANTIZE_COPY;
    return MOE4_OK;
}

/* ---- all of them ---- */

static int by_item_name(const void *a, const void *b) {
    return strcmp((*(struct quantize_item *const *)a)->name, (*(struct quantize_item *const *)b)->name);
}

/* The item of a name, by bisection over by_name; NULL when there is none. */
static struct quantize_item *find_item(const struct quantize_plan *plan, struct quantize_item *const *by_name, const char *name) {
    size_t low = 0, high = plan->n_items;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        if (strcmp(by_name[mid]->name, name) < 0)
            low = mid + 1;
        else
            high = mid;
    }
    return low < plan->n_items && strcmp(by_name[low]->name, name) == 0 ? by_name[low] : NULL;
}

/* MXFP4's global scale is a power of two and shared with MXFP4 alone. */
static void find_partner(struct quantize_plan *plan, struct quantize_item *item, struct quantize_item *const *by_name) {
    char name[QUANTIZE_NAME_BYTES];
    if (item->how != QUANTIZE_NVFP4 || !quantize_partner_name(name, item->name)) return;
    struct quantize_item *found = find_item(plan, by_name, name);
    if (found && found->how == QUANTIZE_NVFP4 && (found->form == QUANTIZE_MXFP4) == (item->form == QUANTIZE_MXFP4)) item->partner = found;
}

/* Scales go with their matrix, unless that is copied. And no name may come twice: an expert's share could be called as a tensor is. */
static moe4_status drop_scales(struct quantize_plan *plan, struct quantize_item *const *by_name) {
    for (size_t i = 0; i < plan->n_items; i++) {
        struct quantize_item *item = by_name[i];
        char name[QUANTIZE_NAME_BYTES];
        LM_CHECK(plan->lm, i == 0 || strcmp(by_name[i - 1]->name, item->name) != 0, MOE4_ERROR_FORMAT,
                 "%s: there, and in the tensor of all experts too", item->name);
        if (item->own_name || !quantize_is_scales(plan, &item->in)) continue;
        bool inverse = quantize_ends_with(item->name, "_scale_inv");
        int n = (int)(strlen(item->name) - strlen(inverse ? "_scale_inv" : ".scale"));
        snprintf(name, sizeof name, "%.*s%s", n, item->name, inverse ? "" : ".weight");
        const struct quantize_item *main = find_item(plan, by_name, name);
        if (main && main->form != QUANTIZE_WIDE && main->how != QUANTIZE_COPY) item->how = QUANTIZE_DROP;
    }
    return MOE4_OK;
}

static moe4_status decide_all(struct quantize_plan *plan) {
    struct lm *lm = plan->lm;
    moe4_model_info info = MOE4_MODEL_INFO_INIT;
    size_t n_layers = moe4_checkpoint_info(plan->ckpt, &info) == MOE4_OK ? info.n_layers : SIZE_MAX; /* unknown families go by names */
    size_t n_quantized = 0;
    for (size_t i = 0; i < plan->n_items; i++) {
        LM_TRY(lm, decide(plan, &plan->items[i], n_layers));
        plan->bytes_in += plan->items[i].bytes_in;
        n_quantized += plan->items[i].how == QUANTIZE_NVFP4;
    }
    LM_CHECK(lm, n_quantized, MOE4_ERROR_FORMAT, "no linear layer to quantize among %zu tensors", plan->n_items);
    struct quantize_item **by_name = lm_calloc(lm, plan->n_items, sizeof *by_name, "plan");
    if (!by_name) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < plan->n_items; i++) by_name[i] = &plan->items[i];
    qsort(by_name, plan->n_items, sizeof *by_name, by_item_name);
    moe4_status status = drop_scales(plan, by_name);
    for (size_t i = 0; i < plan->n_items; i++) find_partner(plan, &plan->items[i], by_name);
    free(by_name);
    return status;
}

moe4_status quantize_plan_make(struct quantize_plan *plan, struct lm *lm, const char *in, const struct quantize_options *options) {
    *plan = (struct quantize_plan){.lm = lm, .options = options};
    LM_TRY(lm, moe4_checkpoint_open(&plan->ckpt, lm->ctx, in));
    LM_CHECK(lm, *moe4_checkpoint_config(plan->ckpt, NULL), MOE4_ERROR_NOT_FOUND, "%s: no config.json", in);
    for (int i = 0; i < 256; i++) plan->e4m3[i] = moe4_e4m3_to_float((uint8_t)i);
    LM_TRY(lm, quantize_files_open(&plan->files, lm, plan->ckpt, in));
    for (size_t i = 0; i < moe4_checkpoint_n_tensors(plan->ckpt); i++) {
        moe4_tensor t;
        LM_TRY(lm, moe4_checkpoint_tensor(plan->ckpt, &t, i));
        LM_TRY(lm, add_tensor(plan, &t, i));
    }
    LM_TRY(lm, decide_all(plan));
    LM_TRY(lm, quantize_task_options(plan));
    return quantize_plan_shards(plan);
}

void quantize_plan_free(struct quantize_plan *plan) {
    for (size_t i = 0; plan->shards && i < plan->n_shards; i++) free(plan->shards[i].header);
    free(plan->shards);
    for (size_t i = 0; i < plan->n_items; i++) free(plan->items[i].own_name);
    free(plan->items);
    json_decref(plan->made_with);
    quantize_files_close(&plan->files);
    moe4_checkpoint_close(plan->ckpt);
}
