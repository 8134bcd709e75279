/* Verify: every module's companions, every value, every tensor that config.json promises. Goes on after each problem. */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "hash_table.h"
#include "values.h"
#include "weight.h"

enum { CHUNK_BYTES = 1 << 20, WINDOW_BYTES = 64 << 20, WINDOW_CHUNKS = 4096, MAX_UNSUPPORTED = 16 };

/* A piece of a tensor, one task. */
struct chunk {
    const moe4_tensor *t;
    size_t begin, n; /* elements */
    struct moe4_value_rule rule;
    uint64_t n_bad;
    size_t first_bad;
};

struct verify {
    const moe4_checkpoint *ckpt;
    moe4_problem_fn problem;
    moe4_progress_fn progress;
    void *user;
    uint64_t n_problems, bytes_done, bytes_total;
    bool stopped;

    /* Formats that are known but not run: one problem each, however many modules. */
    struct unsupported {
        char text[160], first[MOE4_MAX_NAME + 1];
        size_t n;
    } unsupported[MAX_UNSUPPORTED];
    size_t n_unsupported;

    struct chunk *chunks; /* the window */
    size_t n_chunks, window_bytes;
    struct chunk sum; /* of the tensor whose chunks are being added up */
};

static void report(struct verify *v, const char *name, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void report(struct verify *v, const char *name, const char *fmt, ...) {
    char text[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    v->n_problems++;
    if (v->problem) v->problem(v->user, name, text);
}

/* ---- companions ---- */

static void on_finding(void *user, moe4_status status, const char *name, const char *text) {
    struct verify *v = user;
    if (status != MOE4_ERROR_UNSUPPORTED) {
        report(v, name, "%s", text);
        return;
    }
    struct unsupported *u = v->unsupported, *end = u + v->n_unsupported;
    while (u < end && strcmp(u->text, text) != 0) u++;
    if (u == end && v->n_unsupported == MAX_UNSUPPORTED) {
        report(v, name, "unsupported: %s", text);
        return;
    }
    if (u == end) {
        v->n_unsupported++;
        snprintf(u->text, sizeof u->text, "%s", text);
        snprintf(u->first, sizeof u->first, "%s", name);
    }
    u->n++;
}

static void check_modules(struct verify *v) {
    const moe4_checkpoint *ckpt = v->ckpt;
    char alone[64] = "";
    const struct moe4_config *c = &ckpt->config;
    if (c->family && c->family->left_alone) moe4_family_name(alone, sizeof alone, c->place, c->family->left_alone, 0, 0, "");
    for (size_t i = 0; i < ckpt->n_tensors; i++) {
        const moe4_tensor *t = ckpt->by_name[i];
        bool is_main;
        size_t n = moe4_module_length(t->name, &is_main);
        if (ckpt->indexed && !ckpt->indexed[i]) report(v, t->name, "stands in %s, but not in %s", t->file, MOE4_INDEX_NAME);
        if (!n || (*alone && strncmp(t->name, alone, strlen(alone)) == 0)) continue;
        char module[MOE4_MAX_NAME + 1];
        snprintf(module, sizeof module, "%.*s", (int)n, t->name);
        moe4_weight w;
        if (is_main)
            moe4_weight_read(ckpt, &w, module, 0, 0, on_finding, v);
        else if (!moe4_module_has_main(ckpt, module))
            report(v, t->name, "no weight stands beside it");
    }
    for (const struct unsupported *u = v->unsupported; u < v->unsupported + v->n_unsupported; u++)
        report(v, u->first, u->n > 1 ? "unsupported: %s (and %zu more)" : "unsupported: %s", u->text, u->n - 1);
}

/* ---- values ---- */

static void count_chunk(void *arg, size_t i) {
    struct chunk *c = &((struct verify *)arg)->chunks[i];
    c->n_bad = moe4_count_bad(&c->rule, (const uint8_t *)c->t->data + c->begin * c->rule.elem_bytes, c->n, &c->first_bad);
    c->first_bad += c->begin;
}

static void report_sum(struct verify *v) {
    const struct chunk *c = &v->sum;
    if (!c->t || !c->n_bad) return;
    size_t cols = c->t->n_dims ? c->t->shape[c->t->n_dims - 1] : 1;
    report(v, c->t->name, "%" PRIu64 " of %zu values %s, the first 0x%0*" PRIx64 " at row %zu column %zu", c->n_bad,
           c->t->bytes / c->rule.elem_bytes, c->rule.bad, (int)(2 * c->rule.elem_bytes),
           moe4_value_bits(c->t->data, c->rule.elem_bytes, c->first_bad), c->first_bad / cols, c->first_bad % cols);
}

/* Told once, before bytes are read that may be there no more. */
static bool changed(struct verify *v, const struct moe4_safetensors *shard) {
    moe4_begin(v->ckpt->ctx);
    if (moe4_map_check(v->ckpt->ctx, &shard->map, shard->path) == MOE4_OK) return false;
    report(v, shard->file, "%s", moe4_ctx_error(v->ckpt->ctx));
    moe4_begin(v->ckpt->ctx);
    return true;
}

/* Runs the window's tasks, adds up by tensor, and lets the pages go. */
static void flush_window(struct verify *v, const struct moe4_safetensors *shard) {
    if (!v->n_chunks) return;
    if (changed(v, shard)) {
        v->n_chunks = v->window_bytes = 0;
        v->stopped = true;
        return;
    }
    moe4_parallel_for(v->ckpt->ctx, v->n_chunks, count_chunk, v);
    for (size_t i = 0; i < v->n_chunks; i++) {
        const struct chunk *c = &v->chunks[i];
        if (c->t != v->sum.t) {
            report_sum(v);
            v->sum = *c;
        } else {
            if (!v->sum.n_bad) v->sum.first_bad = c->first_bad;
            v->sum.n_bad += c->n_bad;
        }
    }
    const struct chunk *first = &v->chunks[0];
    size_t offset = (size_t)((const uint8_t *)first->t->data - shard->map.data) + first->begin * first->rule.elem_bytes;
    moe4_map_drop(&shard->map, offset, v->window_bytes);
    v->bytes_done += v->window_bytes;
    v->n_chunks = v->window_bytes = 0;
    if (v->progress && v->progress(v->user, v->bytes_done, v->bytes_total)) v->stopped = true;
}

static bool ends_with(const char *name, const char *suffix) {
    size_t n = strlen(name), k = strlen(suffix);
    return n >= k && strcmp(name + n - k, suffix) == 0;
}

/* The one number of a global or input scale has been checked with its module. */
static bool checked_with_module(const moe4_tensor *t) {
    bool is_main;
    return t->dtype == MOE4_F32 && t->bytes == sizeof(float) && moe4_module_length(t->name, &is_main) && !is_main;
}

static void check_shard_values(struct verify *v, const struct moe4_safetensors *shard) {
    for (size_t i = 0; i < shard->n_tensors && !v->stopped; i++) {
        const moe4_tensor *t = &shard->tensors[i];
        struct moe4_value_rule rule = moe4_value_rule_for(t->dtype, ends_with(t->name, ".weight_scale"));
        if (checked_with_module(t)) rule.bad = NULL;
        size_t n = t->bytes / rule.elem_bytes, step = CHUNK_BYTES / rule.elem_bytes;
        for (size_t begin = 0; begin < n && !v->stopped; begin += step) {
            struct chunk c = {.t = t, .begin = begin, .n = n - begin < step ? n - begin : step, .rule = rule};
            v->chunks[v->n_chunks++] = c;
            v->window_bytes += c.n * rule.elem_bytes;
            if (v->n_chunks == WINDOW_CHUNKS || v->window_bytes >= WINDOW_BYTES) flush_window(v, shard);
        }
    }
    flush_window(v, shard);
    report_sum(v);
    v->sum.t = NULL;
}

static moe4_status check_values(struct verify *v) {
    const moe4_checkpoint *ckpt = v->ckpt;
    v->chunks = moe4_calloc(ckpt->ctx, WINDOW_CHUNKS, sizeof *v->chunks, "verify window");
    if (!v->chunks) return MOE4_ERROR_MEMORY;
    for (size_t s = 0; s < ckpt->n_shards && !v->stopped; s++) check_shard_values(v, &ckpt->shards[s]);
    moe4_free(ckpt->ctx, v->chunks);
    return MOE4_OK;
}

/* ---- completeness ---- */

static void ignore_finding(void *user, moe4_status status, const char *name, const char *text) {
    (void)user, (void)status, (void)name, (void)text;
}

/* A matrix that must be there; what is wrong inside its module has been told already. rows or cols 0: not stated, not compared. */
static void expect_matrix(struct verify *v, const char *name, size_t rows, size_t cols) {
    moe4_weight w;
    moe4_status status = moe4_weight_read(v->ckpt, &w, name, 0, 0, ignore_finding, NULL);
    if (status == MOE4_ERROR_NOT_FOUND)
        report(v, name, "missing: config.json promises it");
    else if (status == MOE4_OK && ((rows && w.rows != rows) || (cols && w.cols != cols)))
        report(v, name, "%zux%zu, need %zux%zu by config.json", w.rows, w.cols, rows ? rows : w.rows, cols ? cols : w.cols);
}

static void expect_vector(struct verify *v, const char *name, size_t n) {
    const moe4_tensor *t = moe4_checkpoint_lookup(v->ckpt, name);
    if (!t)
        report(v, name, "missing: config.json promises it");
    else if (t->n_dims != 1 || (n && t->shape[0] != n))
        report(v, name, "%zu elements in %zu dimensions, need %zu in 1 by config.json", t->bytes / moe4_dtype_bytes(t->dtype), t->n_dims,
               n);
    else if (t->dtype != MOE4_F32 && t->dtype != MOE4_BF16 && t->dtype != MOE4_F16)
        report(v, name, "dtype %s, need F32, BF16 or F16", moe4_dtype_name(t->dtype));
}

/* Of any number of dimensions: the first, and the elements behind it; 0: not stated, not compared. */
static void expect_tensor(struct verify *v, const char *name, size_t rows, size_t cols) {
    const moe4_tensor *t = moe4_checkpoint_lookup(v->ckpt, name);
    size_t n = t ? t->bytes / moe4_dtype_bytes(t->dtype) : 0, first = t && t->n_dims ? t->shape[0] : 1;
    if (!t)
        report(v, name, "missing: config.json promises it");
    else if ((rows && first != rows) || (cols && (!first || n / first != cols)))
        report(v, name, "%zux%zu, need %zux%zu by config.json", first, first ? n / first : 0, rows ? rows : first, cols ? cols : n / first);
    else if (t->dtype != MOE4_F32 && t->dtype != MOE4_BF16 && t->dtype != MOE4_F16)
        report(v, name, "dtype %s, need F32, BF16 or F16", moe4_dtype_name(t->dtype));
}

/* `has`: MOE4_IF_ bits of the model, and of the layer where it is one. */
static void expect_parts(struct verify *v, const struct moe4_part *part, const char *prefix, unsigned has) {
    const struct moe4_config *c = &v->ckpt->config;
    for (; part->name; part++) {
        if ((part->when & has) != part->when) continue;
        char name[MOE4_MAX_NAME + 1], rest[MOE4_MAX_NAME + 1];
        moe4_family_name(rest, sizeof rest, c->place, part->name, 0, 0, "");
        snprintf(name, sizeof name, "%.200s%.55s", prefix, rest);
        if (part->cols == MOE4_DIM_NONE)
            expect_vector(v, name, c->dim[part->rows]);
        else if (part->kind == MOE4_PART_TENSOR)
            expect_tensor(v, name, c->dim[part->rows], c->dim[part->cols]);
        else
            expect_matrix(v, name, c->dim[part->rows], c->dim[part->cols]);
    }
}

static void expect_mlp(struct verify *v, const char *pattern, size_t layer, size_t expert, size_t inter) {
    const struct moe4_config *c = &v->ckpt->config;
    size_t hidden = c->dim[MOE4_DIM_HIDDEN];
    for (int p = MOE4_GATE; p <= MOE4_DOWN; p++) {
        char name[MOE4_MAX_NAME + 1];
        if (!c->family->proj[p]) continue;
        moe4_family_name(name, sizeof name, c->place, pattern, layer, expert, c->family->proj[p]);
        expect_matrix(v, name, p == MOE4_DOWN ? hidden : inter, p == MOE4_DOWN ? inter : hidden);
    }
}

/* One row for each token id: experts that are there, none of them twice. */
static void expect_hash_table(struct verify *v, size_t layer) {
    const struct moe4_config *c = &v->ckpt->config;
    char name[MOE4_MAX_NAME + 1];
    moe4_family_name(name, sizeof name, c->place, c->family->hash_table, layer, 0, "");
    const moe4_tensor *t = moe4_checkpoint_lookup(v->ckpt, name);
    size_t rows = c->dim[MOE4_DIM_VOCAB];
    struct moe4_hash_table table = {NULL, MOE4_I64, rows, c->dim[MOE4_DIM_TOP_K]};
    struct moe4_hash_entry bad;
    if (!t) {
        report(v, name, "missing: config.json promises it");
    } else if ((t->dtype != MOE4_I64 && t->dtype != MOE4_I32) || t->n_dims != 2 || t->shape[0] != rows || t->shape[1] != table.top_k) {
        report(v, name, "%s, %zu elements in %zu dimensions, need I64 or I32, %zux%zu by config.json", moe4_dtype_name(t->dtype),
               t->bytes / moe4_dtype_bytes(t->dtype), t->n_dims, rows, table.top_k);
    } else {
        table.data = t->data;
        table.dtype = t->dtype;
        if (!moe4_hash_table_ok(&table, c->dim[MOE4_DIM_N_EXPERTS], &bad))
            report(v, name, "token id %zu has expert %" PRId64 " %s", bad.token_id, bad.expert, bad.twice ? "twice" : "of none");
    }
}

static void expect_moe(struct verify *v, size_t layer) {
    const struct moe4_config *c = &v->ckpt->config;
    const struct moe4_family *f = c->family;
    char name[MOE4_MAX_NAME + 1];
    size_t n_experts = c->dim[MOE4_DIM_N_EXPERTS];
    moe4_family_name(name, sizeof name, c->place, f->router, layer, 0, "");
    expect_matrix(v, name, n_experts, c->dim[MOE4_DIM_HIDDEN]);
    if (layer < c->n_hash_layers) {
        expect_hash_table(v, layer);
    } else if (f->router_bias) {
        moe4_family_name(name, sizeof name, c->place, f->router_bias, layer, 0, "");
        expect_vector(v, name, n_experts);
    }
    if (f->router_alt_bias) {
        moe4_family_name(name, sizeof name, c->place, f->router_alt_bias, layer, 0, "");
        if (moe4_checkpoint_lookup(v->ckpt, name)) expect_vector(v, name, n_experts);
    }
    if (c->dim[MOE4_DIM_N_SHARED]) expect_mlp(v, f->shared, layer, 0, c->dim[MOE4_DIM_SHARED]);
    if (moe4_fused_experts(v->ckpt, layer)) return; /* told with its module */
    for (size_t e = 0; e < n_experts; e++) expect_mlp(v, f->expert, layer, e, c->dim[MOE4_DIM_EXPERT]);
    moe4_family_name(name, sizeof name, c->place, f->expert, layer, n_experts, f->proj[f->proj[MOE4_GATE] ? MOE4_GATE : MOE4_UP]);
    if (moe4_module_has_main(v->ckpt, name)) report(v, name, "one expert more than the %zu of config.json", n_experts);
}

static void check_complete(struct verify *v) {
    const moe4_checkpoint *ckpt = v->ckpt;
    const struct moe4_config *c = &ckpt->config;
    if (!ckpt->has_config) {
        if (ckpt->is_folder) report(v, "config.json", "missing: nothing says whether the model is complete");
        return;
    }
    if (c->status != MOE4_OK) {
        report(v, "config.json", "%s", c->problem);
        return;
    }
    expect_parts(v, c->family->model_parts, "", c->has);
    for (size_t layer = 0; layer < c->dim[MOE4_DIM_LAYERS]; layer++) {
        char prefix[MOE4_MAX_NAME + 1];
        moe4_family_name(prefix, sizeof prefix, c->place, c->family->layer, layer, 0, "");
        expect_parts(v, c->family->layer_parts, prefix, c->has | c->layer_has[layer]);
        if (c->layer_kind[layer] == MOE4_LAYER_MOE)
            expect_moe(v, layer);
        else if (c->layer_kind[layer] == MOE4_LAYER_DENSE)
            expect_mlp(v, c->family->dense, layer, 0, c->dim[MOE4_DIM_DENSE]);
    }
}

/* ---- public ---- */

moe4_status moe4_checkpoint_verify(moe4_checkpoint *ckpt, uint64_t *n_problems_ret, moe4_problem_fn problem, moe4_progress_fn progress,
                                   void *user) {
    moe4_begin(ckpt->ctx);
    struct verify *v = moe4_calloc(ckpt->ctx, 1, sizeof *v, "verify");
    if (!v) return MOE4_ERROR_MEMORY;
    v->ckpt = ckpt;
    v->problem = problem;
    v->progress = progress;
    v->user = user;
    for (size_t s = 0; s < ckpt->n_shards; s++)
        for (size_t i = 0; i < ckpt->shards[s].n_tensors; i++) v->bytes_total += ckpt->shards[s].tensors[i].bytes;
    for (size_t s = 0; s < ckpt->n_shards; s++) v->stopped |= changed(v, &ckpt->shards[s]);
    if (!v->stopped) {
        check_complete(v);
        check_modules(v);
    }
    moe4_status status = check_values(v);
    if (n_problems_ret && status == MOE4_OK) *n_problems_ret = v->n_problems;
    moe4_free(ckpt->ctx, v);
    return status;
}
