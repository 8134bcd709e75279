#include "inspect.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- kinds of tensors ---- */

/* "a.3.b" -> "a.*.b": a component of digits only is a number. dst has room for all of name. */
static void make_pattern(char *dst, const char *name) {
    for (const char *p = name; *p;) {
        size_t n = strcspn(p, "."), digits = strspn(p, "0123456789");
        if (n && n == digits) {
            *dst++ = '*';
        } else {
            memcpy(dst, p, n);
            dst += n;
        }
        p += n;
        if (*p == '.') *dst++ = *p++;
    }
    *dst = '\0';
}

static bool ends_with(const char *name, const char *suffix) {
    size_t n = strlen(name), k = strlen(suffix);
    return n > k && strcmp(name + n - k, suffix) == 0;
}

/* The codes of the NVFP4 module that the tensor belongs to, by names and dtypes alone: no value is touched. False when there is none. */
static bool nvfp4_codes(moe4_tensor *codes, char *module, size_t module_bytes, const moe4_checkpoint *ckpt, const moe4_tensor *t) {
    static const struct {
        const char *suffix, *codes, *global; /* the tensor is .suffix; of this layout when .codes and .global stand beside it */
    } layouts[] = {
        {".weight", ".weight", ".weight_scale_2"},
        {".weight_scale", ".weight", ".weight_scale_2"},
        {".weight_scale_2", ".weight", ".weight_scale_2"},
        {".input_scale", ".weight", ".weight_scale_2"},
        {".weight_packed", ".weight_packed", ".weight_global_scale"},
        {".weight_scale", ".weight_packed", ".weight_global_scale"},
        {".weight_global_scale", ".weight_packed", ".weight_global_scale"},
        {".input_global_scale", ".weight_packed", ".weight_global_scale"},
    };
    char name[600];
    moe4_tensor other;
    if (ends_with(t->name, ".weight") && t->dtype != MOE4_U8) return false; /* most of an unquantized model */
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        if (!ends_with(t->name, layouts[i].suffix)) continue;
        int n = (int)(strlen(t->name) - strlen(layouts[i].suffix));
        snprintf(module, module_bytes, "%.*s", n, t->name);
        snprintf(name, sizeof name, "%s%s", module, layouts[i].global);
        if (moe4_checkpoint_find(ckpt, &other, name) != MOE4_OK) continue;
        snprintf(name, sizeof name, "%s%s", module, layouts[i].codes);
        if (moe4_checkpoint_find(ckpt, codes, name) == MOE4_OK && codes->dtype == MOE4_U8 && codes->n_dims == 2) return true;
    }
    return false;
}

static bool same_kind(const struct inspect_kind *k, const char *pattern, const char *format, const size_t *dims, size_t n_dims) {
    return k->n_dims == n_dims && memcmp(k->dims, dims, n_dims * sizeof *dims) == 0 && strcmp(k->format, format) == 0 &&
           strcmp(k->pattern, pattern) == 0;
}

static bool new_kind(struct inspect_kinds *kinds, const char *pattern, const char *format, const size_t *dims, size_t n_dims) {
    struct inspect_kind *list = realloc(kinds->list, (kinds->n + 1) * sizeof *list);
    if (!list) return false;
    kinds->list = list;
    struct inspect_kind *k = &list[kinds->n];
    *k = (struct inspect_kind){.pattern = strdup(pattern), .format = format, .n_dims = n_dims};
    if (!k->pattern) return false;
    kinds->n++;
    size_t at = (size_t)snprintf(k->shape, sizeof k->shape, "[");
    for (size_t d = 0; d < n_dims; d++) {
        k->dims[d] = dims[d];
        if (at < sizeof k->shape) at += (size_t)snprintf(k->shape + at, sizeof k->shape - at, "%s%zu", d ? ", " : "", dims[d]);
    }
    if (at < sizeof k->shape) snprintf(k->shape + at, sizeof k->shape - at, "]");
    return true;
}

/* Neighbours in a file are most often of the same few kinds: the last ones are looked at first. */
static struct inspect_kind *find_kind(struct inspect_kinds *kinds, const char *pattern, const char *format, const size_t *dims,
                                      size_t n_dims) {
    for (size_t i = kinds->n; i-- > 0;)
        if (same_kind(&kinds->list[i], pattern, format, dims, n_dims)) return &kinds->list[i];
    return new_kind(kinds, pattern, format, dims, n_dims) ? &kinds->list[kinds->n - 1] : NULL;
}

bool inspect_kinds_read(struct inspect_kinds *kinds, const moe4_checkpoint *ckpt) {
    char module[512], pattern[512];
    for (size_t i = 0; i < moe4_checkpoint_n_tensors(ckpt); i++) {
        moe4_tensor t, codes;
        if (moe4_checkpoint_tensor(ckpt, &t, i) != MOE4_OK || strlen(t.name) >= sizeof module) continue;
        struct inspect_kind *k;
        if (nvfp4_codes(&codes, module, sizeof module, ckpt, &t)) {
            make_pattern(pattern, module);
            k = find_kind(kinds, pattern, "NVFP4", (size_t[]){codes.shape[0], 2 * codes.shape[1]}, 2);
            if (k) k->count += t.data == codes.data;
        } else {
            make_pattern(pattern, t.name);
            k = find_kind(kinds, pattern, moe4_dtype_name(t.dtype), t.shape, t.n_dims);
            if (k) k->count++;
        }
        if (!k) return false;
        k->bytes += t.bytes;
        kinds->bytes += t.bytes;
    }
    return true;
}

void inspect_kinds_free(struct inspect_kinds *kinds) {
    for (size_t i = 0; i < kinds->n; i++) free(kinds->list[i].pattern);
    free(kinds->list);
}

/* ---- one layer ---- */

enum { LEAST_FOR_MEDIAN = 4 };
static const float least_input = 4e-8f, most_input = 400.f, far_from_median = 2.5f;
const char inspect_implausible[] = "implausible: below 4e-8 or above 400, or more than 2.5 times smaller or larger than the median of the "
                                   "layer's experts for that projection";

static const char *const proj_names[] = {"gate", "up", "down"};

static moe4_status add_stats(struct inspect_layer *l, moe4_ctx *ctx, const moe4_weight *w) {
    const char *format = moe4_dtype_name(w->dtype);
    l->format = !l->format || strcmp(l->format, format) == 0 ? format : "mixed";
    if (w->dtype != MOE4_NVFP4) return MOE4_OK;
    moe4_weight_stats s = MOE4_WEIGHT_STATS_INIT;
    moe4_status status = moe4_weight_inspect(ctx, &s, w);
    if (status != MOE4_OK) return status;
    if (s.n_blocks > s.n_scale_bad) {
        bool first = l->n_blocks == l->n_scale_bad;
        if (first || s.scale_min < l->scale_min) l->scale_min = s.scale_min;
        if (first || s.scale_max > l->scale_max) l->scale_max = s.scale_max;
    }
    l->n_blocks += s.n_blocks;
    l->n_scale_448 += s.n_scale_448;
    l->n_scale_pow2 += s.n_scale_pow2;
    l->n_scale_zero += s.n_scale_zero;
    l->n_scale_bad += s.n_scale_bad;
    return MOE4_OK;
}

static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Of those that are there; 0 when they are too few to say what is usual. */
static float median_of(const float *x, size_t n) {
    float *sorted = malloc(n * sizeof *sorted);
    size_t m = 0;
    for (size_t i = 0; sorted && i < n; i++)
        if (x[i] > 0) sorted[m++] = x[i];
    if (sorted) qsort(sorted, m, sizeof *sorted, by_value);
    float median = m < LEAST_FOR_MEDIAN ? 0 : sorted[m / 2];
    free(sorted);
    return median;
}

static void note(struct inspect_layer *l, size_t expert, int proj, float x, float median) {
    char text[160], **notes = realloc(l->notes, (l->n_notes + 1) * sizeof *notes);
    l->n_implausible++;
    if (!notes) return;
    l->notes = notes;
    int n = snprintf(text, sizeof text, "layer %zu", l->layer);
    if (l->kind == MOE4_LAYER_MOE) n += snprintf(text + n, sizeof text - (size_t)n, " expert %zu", expert);
    n += snprintf(text + n, sizeof text - (size_t)n, " %s_proj.input_scale %.4g", proj_names[proj], (double)x);
    if (median > 0) snprintf(text + n, sizeof text - (size_t)n, ", %.2f of the median", (double)(x / median));
    notes[l->n_notes] = strdup(text);
    if (notes[l->n_notes]) l->n_notes++;
}

/* inputs[proj][expert]: 0 where there is none. */
static void judge_inputs(struct inspect_layer *l, float *const inputs[3]) {
    for (int p = 0; p < 3; p++) {
        float median = median_of(inputs[p], l->n_experts);
        for (size_t e = 0; e < l->n_experts; e++) {
            float x = inputs[p][e];
            if (x == 0) continue;
            bool far = median > 0 && (x * far_from_median < median || x > median * far_from_median);
            if (far || x < least_input || x > most_input) note(l, e, p, x, median);
        }
    }
}

/* Experts without a gate begin at up. */
static int first_proj(const moe4_model_info *info) {
    return info->activation == MOE4_RELU2 ? MOE4_UP : MOE4_GATE;
}

static moe4_status read_experts(struct inspect_layer *l, moe4_ctx *ctx, const moe4_checkpoint *ckpt, const moe4_model_info *info,
                                float *const inputs[3]) {
    for (size_t e = 0; e < l->n_experts; e++) {
        moe4_weight w[3] = {{0}};
        for (int p = first_proj(info); p < 3; p++) {
            moe4_status status =
                moe4_checkpoint_expert(ckpt, &w[p], l->layer, l->kind == MOE4_LAYER_MOE ? (int64_t)e : MOE4_EXPERT_DENSE, (moe4_proj)p);
            if (status == MOE4_OK) status = add_stats(l, ctx, &w[p]);
            if (status != MOE4_OK) return status;
            inputs[p][e] = w[p].input_scale;
            l->n_input_missing += w[p].dtype == MOE4_NVFP4 && w[p].input_scale == 0;
        }
        if (w[MOE4_GATE].dtype != MOE4_NVFP4 || w[MOE4_UP].dtype != MOE4_NVFP4) continue;
        l->n_global_differ += w[MOE4_GATE].global != w[MOE4_UP].global;
        l->n_input_differ += w[MOE4_GATE].input_scale != w[MOE4_UP].input_scale;
    }
    return MOE4_OK;
}

moe4_status inspect_layer_read(struct inspect_layer *layer, moe4_ctx *ctx, const moe4_checkpoint *ckpt, const moe4_model_info *info,
                               size_t number) {
    *layer = (struct inspect_layer){.layer = number, .format = "-"};
    moe4_status status = moe4_checkpoint_layer_kind(ckpt, &layer->kind, number);
    if (status != MOE4_OK || layer->kind == MOE4_LAYER_OTHER) return status;
    bool is_moe = layer->kind == MOE4_LAYER_MOE;
    layer->format = NULL;
    layer->n_experts = is_moe ? info->n_experts : 1;
    float *all = calloc(3 * layer->n_experts, sizeof *all);
    if (!all) return MOE4_ERROR_MEMORY;
    float *const inputs[3] = {all, all + layer->n_experts, all + 2 * layer->n_experts};
    status = read_experts(layer, ctx, ckpt, info, inputs);
    for (int p = first_proj(info); p < 3 && status == MOE4_OK && is_moe && info->n_shared_experts; p++) {
        moe4_weight w;
        status = moe4_checkpoint_expert(ckpt, &w, number, MOE4_EXPERT_SHARED, (moe4_proj)p);
        if (status == MOE4_OK) {
            status = add_stats(layer, ctx, &w);
        } else if (status == MOE4_ERROR_UNSUPPORTED) { /* the others run without it */
            layer->format = "mixed";
            status = MOE4_OK;
        }
    }
    if (status == MOE4_OK) judge_inputs(layer, inputs);
    free(all);
    return status;
}

void inspect_layer_free(struct inspect_layer *layer) {
    for (size_t i = 0; i < layer->n_notes; i++) free(layer->notes[i]);
    free(layer->notes);
}
