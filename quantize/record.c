/* What calibration found, as a file: a run that is resumed does not run the text again. The head, then for each matrix that is quantized
 * the largest magnitude that entered it and, for the search, the mean squares of its channels. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "quantize/calibrate.h"

struct head {
    char magic[8];
    uint64_t n_tokens, n_inputs, n_unreached;
};
static const char magic[8] = "moe4cal1";

/* Floats of an item in the file. */
static size_t n_floats(const struct quantize_plan *plan, const struct quantize_item *item) {
    return item->how != QUANTIZE_NVFP4 ? 0 : 1 + (plan->options->search ? item->cols : 0);
}

static size_t record_bytes(const struct quantize_plan *plan) {
    size_t n = 0;
    for (size_t i = 0; i < plan->n_items; i++) n += n_floats(plan, &plan->items[i]);
    return sizeof(struct head) + n * sizeof(float);
}

/* Points the items into the record. */
static bool apply(struct quantize_plan *plan, struct quantize_report *report, const void *record) {
    const struct head *head = record;
    const float *at = (const float *)(const void *)(head + 1);
    if (memcmp(head->magic, magic, sizeof magic) != 0) return false;
    for (size_t i = 0; i < plan->n_items; i++) {
        struct quantize_item *item = &plan->items[i];
        size_t n = n_floats(plan, item);
        if (!n) continue;
        if (!(at[0] > 0) || !isfinite(at[0])) return false;
        item->input_amax = at[0];
        item->channel_weight = n > 1 ? at + 1 : NULL;
        at += n;
    }
    report->n_tokens = head->n_tokens;
    report->n_inputs = head->n_inputs;
    report->n_unreached = head->n_unreached;
    return true;
}

static void fill(const struct quantize_plan *plan, const struct quantize_report *report, void *record) {
    struct head *head = record;
    float *at = (float *)(void *)(head + 1);
    *head = (struct head){.n_tokens = report->n_tokens, .n_inputs = report->n_inputs, .n_unreached = report->n_unreached};
    memcpy(head->magic, magic, sizeof magic);
    for (size_t i = 0; i < plan->n_items; i++) {
        const struct quantize_item *item = &plan->items[i];
        size_t n = n_floats(plan, item);
        if (!n) continue;
        at[0] = item->input_amax;
        if (n > 1) memcpy(at + 1, item->channel_weight, item->cols * sizeof *at);
        at += n;
    }
}

moe4_status quantize_calibrated(void **record_ret, struct quantize_plan *plan, const struct quantize_folder *folder,
                                struct quantize_report *report, const char *in) {
    size_t bytes = record_bytes(plan);
    struct quantize_calibration *calibration = NULL;
    LM_TRY(plan->lm, quantize_folder_read(folder, QUANTIZE_CALIBRATION, record_ret, bytes));
    if (*record_ret && apply(plan, report, *record_ret)) return MOE4_OK;
    free(*record_ret);
    *record_ret = malloc(bytes);
    LM_CHECK(plan->lm, *record_ret, MOE4_ERROR_MEMORY, "no memory for %zu bytes of calibration", bytes);
    moe4_status status = quantize_calibrate(&calibration, plan, report, in);
    if (status == MOE4_OK) {
        fill(plan, report, *record_ret);
        apply(plan, report, *record_ret);
        status = quantize_folder_text(folder, QUANTIZE_CALIBRATION, *record_ret, bytes);
    }
    quantize_calibration_free(calibration);
    return status;
}
