/* quantize_run is the index: plan, take the folder, calibrate, stream the shards, and only then what makes them a model. */
#include "quantize/quantize.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "quantize/calibrate.h"
#include "quantize/describe.h"
#include "quantize/stream.h"
#include "quantize/task.h"

static const char config_name[] = "config.json", hf_quant_name[] = "hf_quant_config.json", index_name[] = "model.safetensors.index.json";

struct texts {
    char *config, *hf_quant, *index;
};

static moe4_status describe(const struct quantize_plan *plan, struct texts *t) {
    LM_TRY(plan->lm, quantize_describe_config(plan, &t->config));
    LM_TRY(plan->lm, quantize_describe_hf_quant(plan, &t->hf_quant));
    return quantize_describe_index(plan, &t->index);
}

static moe4_status write_text(const struct quantize_folder *folder, const char *name, const char *text) {
    return text ? quantize_folder_text(folder, name, text, strlen(text)) : MOE4_OK;
}

/* A text that is not written is not looked for. */
static bool text_is_there(const struct quantize_folder *folder, const char *name, const char *text) {
    const size_t n = text ? strlen(text) : 0;
    return !text || quantize_folder_has(folder, name, text, n, n);
}

static moe4_status add_inexact(const struct quantize_plan *plan, struct quantize_report *report, const struct quantize_item *item) {
    const struct quantize_recast_loss *loss = &item->loss;
    struct quantize_inexact *list = realloc(report->inexact, (report->n_inexact + 1) * sizeof *list);
    LM_CHECK(plan->lm, list, MOE4_ERROR_MEMORY, "no memory for the report");
    report->inexact = list;
    char *name = strndup(item->name, quantize_module_length(item->name));
    LM_CHECK(plan->lm, name, MOE4_ERROR_MEMORY, "no memory for the report");
    list[report->n_inexact++] = (struct quantize_inexact){name, loss->n_inexact, loss->n_blocks, sqrt(loss->error_sq / loss->norm_sq)};
    return MOE4_OK;
}

static moe4_status count(const struct quantize_plan *plan, struct quantize_report *report) {
    for (size_t i = 0; i < plan->n_items; i++) {
        const struct quantize_item *item = &plan->items[i];
        report->n_recast += item->how == QUANTIZE_NVFP4 && item->form == QUANTIZE_MXFP4;
        if (item->loss.n_inexact) LM_TRY(plan->lm, add_inexact(plan, report, item));
        report->n_quantized += item->how == QUANTIZE_NVFP4;
        report->n_left += item->how != QUANTIZE_NVFP4 && item->is_linear;
        report->n_copied += item->how != QUANTIZE_NVFP4 && item->how != QUANTIZE_DROP && !item->is_linear;
    }
    report->n_shards = plan->n_shards;
    return MOE4_OK;
}

void quantize_report_free(struct quantize_report *report) {
    for (size_t i = 0; i < report->n_inexact; i++) free(report->inexact[i].name);
    free(report->inexact);
    report->inexact = NULL;
    report->n_inexact = 0;
}

/* A folder without a journal is ours only when it is, file by file, what this task ends with. */
static moe4_status check_finished(struct quantize_plan *plan, const struct quantize_folder *folder, const struct texts *t,
                                  struct quantize_report *report) {
    LM_TRY(plan->lm, quantize_task_check_shards(plan, folder));
    bool same = text_is_there(folder, config_name, t->config) && text_is_there(folder, hf_quant_name, t->hf_quant) &&
                text_is_there(folder, index_name, t->index);
    for (size_t s = 0; same && s < plan->n_shards; s++) same = quantize_shard_is_there(&plan->shards[s], folder);
    LM_CHECK(plan->lm, same, MOE4_ERROR_ARGUMENT, "%s: not empty, and not unfinished work of moe4 quantize", folder->path);
    uint64_t done = 0;
    for (size_t s = 0; s < plan->n_shards; s++) LM_TRY(plan->lm, quantize_shard_look(plan, &plan->shards[s], report, &done));
    return MOE4_OK;
}

static moe4_status write_model(struct quantize_plan *plan, const struct quantize_folder *folder, const struct texts *t, const char *in,
                               struct quantize_report *report) {
    struct lm *lm = plan->lm;
    double start = lm_seconds();
    uint64_t done = 0;
    for (size_t s = 0; s < plan->n_shards; s++) LM_TRY(lm, quantize_shard_write(plan, folder, &plan->shards[s], report, &done));
    report->seconds = lm_seconds() - start;
    LM_TRY(lm, quantize_folder_copy(folder, in));
    LM_TRY(lm, write_text(folder, index_name, t->index));
    LM_TRY(lm, write_text(folder, hf_quant_name, t->hf_quant));
    return write_text(folder, config_name, t->config);
}

static moe4_status make(struct quantize_plan *plan, struct quantize_folder *folder, const struct texts *t, const char *in,
                        struct quantize_report *report) {
    void *calibration = NULL;
    if (folder->finished) return check_finished(plan, folder, t, report);
    moe4_status status = plan->options->calibrate ? quantize_calibrated(&calibration, plan, folder, report, in) : MOE4_OK;
    if (status == MOE4_OK) status = write_model(plan, folder, t, in, report);
    if (status == MOE4_OK) status = quantize_folder_finish(folder);
    free(calibration);
    return status;
}

moe4_status quantize_run(struct lm *lm, struct quantize_report *report, const char *in, const char *out,
                         const struct quantize_options *options) {
    struct quantize_plan plan;
    struct quantize_folder folder = {.fd = -1};
    struct texts texts = {NULL, NULL, NULL};
    json_t *task = NULL;
    lm->error[0] = '\0';
    *report = (struct quantize_report){0};
    moe4_status status = quantize_plan_make(&plan, lm, in, options);
    if (status == MOE4_OK) status = describe(&plan, &texts);
    if (status == MOE4_OK) status = quantize_task_describe(&plan, in, &task);
    if (status == MOE4_OK) status = quantize_folder_open(&folder, lm, out, task, options->resume);
    if (status == MOE4_OK) status = make(&plan, &folder, &texts, in, report);
    if (status == MOE4_OK) status = count(&plan, report);
    quantize_folder_close(&folder);
    quantize_plan_free(&plan);
    json_decref(task);
    free(texts.config);
    free(texts.hf_quant);
    free(texts.index);
    return status;
}
