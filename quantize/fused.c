/* Tensors that hold all experts of a layer: which of their elements are whose. How they are ordered is no matter of their names but of the
 * family, so only families whose order is known are split. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "quantize/plan.h"

/* Wide tensors are [E, K, N], gate and up being columns: halves, or every other one. MXFP4 ones are [E, N, K/32, 16] and [E, N, K/32]. */
static const struct layout {
    const char *model_type;
    bool interleaved;
} layouts[] = {
    {"gpt_oss", true}, {"llama4", false}, {"llama4_text", false}, {"qwen3_vl_moe", false}, {"qwen3_vl_moe_text", false},
};

enum part { WEIGHT, BIAS, BLOCKS, SCALES, N_SUFFIXES };
static const char *const suffixes[N_SUFFIXES] = {"", "_bias", "_blocks", "_scales"};
static const char gate_up[] = ".experts.gate_up_proj", down[] = ".experts.down_proj";

/* What a name says: its part, whether it is gate and up, and how long what stands before "gate_up_proj" is. */
static bool take_name(const char *name, enum part *part, bool *is_gate_up, size_t *prefix) {
    for (int p = N_SUFFIXES - 1; p >= 0; p--)
        for (int g = 0; g < 2; g++) {
            const char *stem = g ? gate_up : down;
            size_t n = strlen(name), s = strlen(suffixes[p]), k = strlen(stem);
            if (n <= s + k || strcmp(name + n - s, suffixes[p]) != 0 || strncmp(name + n - s - k, stem, k) != 0) continue;
            *part = (enum part)p;
            *is_gate_up = g;
            *prefix = n - s - k + strlen(".experts.");
            return true;
        }
    return false;
}

/* The layout of the model's family, and its hidden size (0: not said). */
static moe4_status find_layout(const struct quantize_plan *plan, const struct layout **layout_ret, size_t *hidden_ret, const char *tensor) {
    size_t bytes;
    const char *text = moe4_checkpoint_config(plan->ckpt, &bytes);
    json_t *config = json_loadb(text, bytes, 0, NULL), *inner = json_object_get(config, "text_config");
    const json_t *model = json_is_object(inner) ? inner : config;
    const char *type = json_string_value(json_object_get(model, "model_type"));
    json_int_t hidden = json_integer_value(json_object_get(model, "hidden_size"));
    char shown[64];
    snprintf(shown, sizeof shown, "%s", type ? type : "none");
    *layout_ret = NULL;
    *hidden_ret = hidden > 0 ? (size_t)hidden : 0;
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++)
        if (type && strcmp(layouts[i].model_type, type) == 0) *layout_ret = &layouts[i];
    json_decref(config);
    LM_CHECK(plan->lm, *layout_ret, MOE4_ERROR_UNSUPPORTED,
             "%s: all experts in one tensor, in an order that moe4 does not know for model_type %s (known: gpt_oss, llama4, qwen3_vl_moe)",
             tensor, shown);
    return MOE4_OK;
}

static bool has_shape(const moe4_tensor *t, size_t n_dims, size_t d0, size_t d1, size_t d2) {
    return t->n_dims == n_dims && t->shape[0] == d0 && t->shape[1] == d1 && (n_dims < 3 || t->shape[2] == d2);
}

/* The shares' common numbers: E experts of [rows, cols], rows of gate and up together. */
struct fused {
    const moe4_tensor *t;
    size_t number;
    enum part part;
    bool is_gate_up, interleaved;
    size_t prefix, n_experts, rows, cols;
    struct quantize_view values, scales; /* of the whole tensor; row_bytes and col_bytes as in a share of one expert */
    uint64_t expert_bytes, expert_scales;
};

static moe4_status take_wide(const struct quantize_plan *plan, struct fused *f, size_t hidden) {
    const moe4_tensor *t = f->t;
    LM_CHECK(plan->lm, t->n_dims == 3 && (t->dtype == MOE4_F32 || t->dtype == MOE4_BF16 || t->dtype == MOE4_F16), MOE4_ERROR_UNSUPPORTED,
             "%s: %s in %zu dimensions; moe4 splits experts of BF16, F16 or F32 in 3 dimensions", t->name, moe4_dtype_name(t->dtype),
             t->n_dims);
    f->cols = t->shape[1];
    f->rows = t->shape[2];
    size_t seen = f->is_gate_up ? f->cols : f->rows;
    LM_CHECK(plan->lm, !hidden || seen == hidden, MOE4_ERROR_FORMAT, "%s: [%zu, %zu, %zu], need hidden_size %zu in place of %zu", t->name,
             t->shape[0], t->shape[1], t->shape[2], hidden, seen);
    LM_TRY(plan->lm, quantize_view_make(plan, &f->values, t, 1));
    f->values.row_bytes = moe4_dtype_bytes(t->dtype);
    f->values.col_bytes = f->rows * f->values.row_bytes;
    f->expert_bytes = (uint64_t)f->cols * f->values.col_bytes;
    return MOE4_OK;
}

static moe4_status take_mxfp4(const struct quantize_plan *plan, struct fused *f) {
    const moe4_tensor *t = f->t;
    moe4_tensor s;
    char name[QUANTIZE_NAME_BYTES];
    snprintf(name, sizeof name, "%.*s%s", (int)(strlen(t->name) - strlen(suffixes[BLOCKS])), t->name, suffixes[SCALES]);
    LM_CHECK(plan->lm, t->n_dims == 4 && t->dtype == MOE4_U8 && t->shape[3] == QUANTIZE_MX_BLOCK / 2, MOE4_ERROR_UNSUPPORTED,
             "%s: %s in %zu dimensions, need U8 [experts, rows, blocks, 16] of MXFP4", t->name, moe4_dtype_name(t->dtype), t->n_dims);
    LM_TRY(plan->lm, moe4_checkpoint_find(plan->ckpt, &s, name));
    LM_CHECK(plan->lm, moe4_dtype_bytes(s.dtype) == 1 && has_shape(&s, 3, t->shape[0], t->shape[1], t->shape[2]), MOE4_ERROR_FORMAT,
             "%s: need bytes [%zu, %zu, %zu], a scale for each 32 of %s", name, t->shape[0], t->shape[1], t->shape[2], t->name);
    f->rows = t->shape[1];
    f->cols = t->shape[2] * QUANTIZE_MX_BLOCK;
    LM_TRY(plan->lm, quantize_view_make(plan, &f->values, t, f->cols / 2));
    LM_TRY(plan->lm, quantize_view_make(plan, &f->scales, &s, t->shape[2]));
    f->expert_bytes = (uint64_t)f->rows * f->values.row_bytes;
    f->expert_scales = (uint64_t)f->rows * f->scales.row_bytes;
    return MOE4_OK;
}

static moe4_status take_bias(const struct quantize_plan *plan, struct fused *f) {
    LM_CHECK(plan->lm, f->t->n_dims == 2, MOE4_ERROR_FORMAT, "%s: %zu dimensions, need 2", f->t->name, f->t->n_dims);
    f->rows = f->t->shape[1];
    f->cols = 1;
    LM_TRY(plan->lm, quantize_view_make(plan, &f->values, f->t, 1));
    f->expert_bytes = f->rows * f->values.row_bytes;
    return MOE4_OK;
}

/* The rows of gate (side 0) or up (side 1) of a view of both; all rows when it is down's. */
static struct quantize_view share(const struct fused *f, const struct quantize_view *view, uint64_t expert_bytes, size_t e, int side) {
    struct quantize_view v = *view;
    v.offset += e * expert_bytes;
    if (!f->is_gate_up) return v;
    v.offset += side * (uint64_t)(f->interleaved ? v.row_bytes : f->rows / 2 * v.row_bytes);
    if (f->interleaved) v.row_bytes *= 2;
    return v;
}

static moe4_status add_share(struct quantize_plan *plan, const struct fused *f, size_t e, int side) {
    static const char *const names[] = {"gate_proj", "up_proj"};
    struct quantize_item *item = quantize_plan_add(plan, f->t, f->number);
    char name[QUANTIZE_NAME_BYTES];
    if (!item) return MOE4_ERROR_MEMORY;
    snprintf(name, sizeof name, "%.*s%zu.%s%s", (int)f->prefix, f->t->name, e, f->is_gate_up ? names[side] : "down_proj",
             f->part == BIAS ? ".bias" : ".weight");
    item->name = item->own_name = strdup(name);
    LM_CHECK(plan->lm, item->name, MOE4_ERROR_MEMORY, "no memory for a name");
    item->form = f->part == BLOCKS ? QUANTIZE_MXFP4 : QUANTIZE_WIDE;
    item->rows = f->is_gate_up ? f->rows / 2 : f->rows;
    item->cols = f->cols;
    item->is_vector = f->part == BIAS;
    item->values = share(f, &f->values, f->expert_bytes, e, side);
    if (item->form == QUANTIZE_MXFP4) item->scales = share(f, &f->scales, f->expert_scales, e, side);
    item->bytes_in = (f->expert_bytes + f->expert_scales) / (f->is_gate_up ? 2 : 1);
    return MOE4_OK;
}

moe4_status quantize_add_fused(struct quantize_plan *plan, const moe4_tensor *t, size_t number, bool *is_fused_ret) {
    struct lm *lm = plan->lm;
    struct fused f = {.t = t, .number = number};
    const struct layout *layout;
    size_t hidden;
    *is_fused_ret = take_name(t->name, &f.part, &f.is_gate_up, &f.prefix);
    if (!*is_fused_ret) return MOE4_OK;
    LM_CHECK(lm, strlen(t->name) < QUANTIZE_NAME_BYTES - 40, MOE4_ERROR_UNSUPPORTED, "%.80s...: a name of %zu bytes, at most %d", t->name,
             strlen(t->name), QUANTIZE_NAME_BYTES - 41);
    LM_TRY(lm, find_layout(plan, &layout, &hidden, t->name));
    f.interleaved = layout->interleaved;
    f.n_experts = t->n_dims ? t->shape[0] : 0;
    if (f.part == SCALES) { /* its blocks have it */
        struct quantize_item *item = quantize_plan_add(plan, t, number);
        if (item) item->how = QUANTIZE_DROP;
        return item ? MOE4_OK : MOE4_ERROR_MEMORY;
    }
    LM_TRY(lm, f.part == WEIGHT ? take_wide(plan, &f, hidden) : f.part == BLOCKS ? take_mxfp4(plan, &f) : take_bias(plan, &f));
    LM_CHECK(lm, !f.is_gate_up || f.rows % 2 == 0, MOE4_ERROR_FORMAT, "%s: %zu rows of gate and up, need an even number", t->name, f.rows);
    for (size_t e = 0; e < f.n_experts; e++)
        for (int side = 0; side < (f.is_gate_up ? 2 : 1); side++) LM_TRY(lm, add_share(plan, &f, e, side));
    return MOE4_OK;
}
