#include "weight.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* ---- formats by their tensors' suffixes ---- */

enum suffix {
    WEIGHT,
    WEIGHT_SCALE,
    WEIGHT_SCALE_2,
    INPUT_SCALE,
    WEIGHT_PACKED,
    WEIGHT_GLOBAL_SCALE,
    INPUT_GLOBAL_SCALE,
    WEIGHT_SCALE_INV,
    SCALE,
    BLOCKS,
    SCALES,
    QWEIGHT,
    N_SUFFIXES
};
static const char *const suffixes[N_SUFFIXES] = {
    [WEIGHT] = ".weight",
    [WEIGHT_SCALE] = ".weight_scale",
    [WEIGHT_SCALE_2] = ".weight_scale_2",
    [INPUT_SCALE] = ".input_scale",
    [WEIGHT_PACKED] = ".weight_packed",
    [WEIGHT_GLOBAL_SCALE] = ".weight_global_scale",
    [INPUT_GLOBAL_SCALE] = ".input_global_scale",
    [WEIGHT_SCALE_INV] = ".weight_scale_inv",
    [SCALE] = ".scale",
    [BLOCKS] = "_blocks",
    [SCALES] = "_scales",
    [QWEIGHT] = ".qweight",
};
#define BIT(suffix) (1u << (suffix))
enum { MAIN = BIT(WEIGHT) | BIT(WEIGHT_PACKED) | BIT(BLOCKS) | BIT(QWEIGHT) };

struct module {
    const moe4_checkpoint *ckpt;
    const char *name;
    size_t rows, cols; /* wanted; 0: any */
    const moe4_tensor *part[N_SUFFIXES];
    unsigned found; /* BITs */
    moe4_finding_fn finding;
    void *user;
    moe4_status status; /* of the first problem */
};

static void read_plain(struct module *m, moe4_weight *w);
static void read_modelopt(struct module *m, moe4_weight *w);
static void read_compressed_tensors(struct module *m, moe4_weight *w);
static void read_fp8(struct module *m, moe4_weight *w);

#define DTYPE(d) (1u << (d))
static const struct format {
    const char *name;
    unsigned needs, allows;                         /* BITs of suffixes */
    unsigned marks;                                 /* those that no other format has */
    unsigned dtypes;                                /* of the tensor that holds the values; 0: any */
    unsigned scale_dtypes;                          /* of weight_scale; 0: any */
    void (*read)(struct module *m, moe4_weight *w); /* NULL: known, not run */
} formats[] = {
    {"none", BIT(WEIGHT), 0, 0, DTYPE(MOE4_BF16) | DTYPE(MOE4_F16) | DTYPE(MOE4_F32), 0, read_plain},
    {"modelopt NVFP4", BIT(WEIGHT) | BIT(WEIGHT_SCALE) | BIT(WEIGHT_SCALE_2), BIT(INPUT_SCALE), BIT(WEIGHT_SCALE_2), 0, 0, read_modelopt},
    {"compressed-tensors nvfp4-pack-quantized", BIT(WEIGHT_PACKED) | BIT(WEIGHT_SCALE) | BIT(WEIGHT_GLOBAL_SCALE), BIT(INPUT_GLOBAL_SCALE),
     BIT(WEIGHT_PACKED) | BIT(WEIGHT_GLOBAL_SCALE) | BIT(INPUT_GLOBAL_SCALE), 0, 0, read_compressed_tensors},
    {"compressed-tensors MXFP4 (weight_packed, 8-bit weight_scale)", BIT(WEIGHT_PACKED) | BIT(WEIGHT_SCALE), 0, 0, 0,
     DTYPE(MOE4_U8) | DTYPE(MOE4_F8_E8M0), NULL},
    {"compressed-tensors integers (weight_packed, floating-point weight_scale)", BIT(WEIGHT_PACKED) | BIT(WEIGHT_SCALE), 0, 0,
     DTYPE(MOE4_I32), DTYPE(MOE4_BF16) | DTYPE(MOE4_F16) | DTYPE(MOE4_F32), NULL},
    {"FP8 block-scaled (weight_scale_inv)", BIT(WEIGHT) | BIT(WEIGHT_SCALE_INV), BIT(INPUT_SCALE), BIT(WEIGHT_SCALE_INV), 0, 0, read_fp8},
    {"FP8 (weight_scale)", BIT(WEIGHT) | BIT(WEIGHT_SCALE), BIT(INPUT_SCALE), 0, DTYPE(MOE4_F8_E4M3), 0, read_fp8},
    {"FP8 block-scaled (scale)", BIT(WEIGHT) | BIT(SCALE), 0, 0, DTYPE(MOE4_F8_E4M3), 0, read_fp8},
    {"MXFP4 (scale)", BIT(WEIGHT) | BIT(SCALE), 0, 0, DTYPE(MOE4_I8) | DTYPE(MOE4_U8), 0, NULL},
    {"MXFP4 (blocks, scales)", BIT(BLOCKS) | BIT(SCALES), 0, BIT(BLOCKS), 0, 0, NULL},
    {"GPTQ or AWQ (qweight)", BIT(QWEIGHT), 0, BIT(QWEIGHT), 0, 0, NULL},
};
enum { N_FORMATS = sizeof formats / sizeof *formats };

/* ---- problems ---- */

static void wrong(struct module *m, moe4_status status, const char *name, const char *fmt, ...) __attribute__((format(printf, 4, 5)));
static void wrong(struct module *m, moe4_status status, const char *name, const char *fmt, ...) {
    char text[480];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    if (m->finding)
        m->finding(m->user, status, name, text);
    else if (m->status == MOE4_OK && status == MOE4_ERROR_UNSUPPORTED)
        moe4_fail(m->ckpt->ctx, status, "unsupported: %s: %s", name, text);
    else if (m->status == MOE4_OK)
        moe4_fail(m->ckpt->ctx, status, "%s: %s", name, text);
    if (m->status == MOE4_OK) m->status = status;
}

/* "256x8"; "[]" for a scalar. */
static const char *shape_text(char text[static 64], const moe4_tensor *t) {
    size_t at = 0;
    snprintf(text, 64, "[]");
    for (size_t i = 0; i < t->n_dims && at < 64; i++) at += (size_t)snprintf(text + at, 64 - at, "%s%zu", i ? "x" : "", t->shape[i]);
    return text;
}

/* "weight, weight_scale" of a set of suffixes. */
static const char *suffix_text(char text[static 200], unsigned set) {
    size_t at = 0;
    text[0] = '\0';
    for (int s = 0; s < N_SUFFIXES && at < 200; s++)
        if (set & BIT(s)) at += (size_t)snprintf(text + at, 200 - at, "%s%s", at ? ", " : "", suffixes[s] + 1);
    return text;
}

/* ---- the readers ---- */

static void check_shape(struct module *m, const moe4_tensor *t, size_t rows, size_t cols) {
    char shape[64];
    if (t->n_dims != 2 || t->shape[0] != rows || t->shape[1] != cols)
        wrong(m, MOE4_ERROR_FORMAT, t->name, "%s, need %zux%zu", shape_text(shape, t), rows, cols);
}

static bool check_matrix(struct module *m, const moe4_tensor *t) {
    char shape[64];
    if (t->n_dims == 3)
        wrong(m, MOE4_ERROR_UNSUPPORTED, t->name, "fused 3-D experts (%s)", shape_text(shape, t));
    else if (t->n_dims != 2 || t->bytes == 0)
        wrong(m, MOE4_ERROR_FORMAT, t->name, "%s, need a matrix", shape_text(shape, t));
    else
        return true;
    return false;
}

static void read_plain(struct module *m, moe4_weight *w) {
    const moe4_tensor *t = m->part[WEIGHT];
    if (m->finding && !m->rows && t->n_dims != 2) return; /* a norm or a convolution: well-formed, and nobody asks for a matrix */
    if (!check_matrix(m, t)) return;
    if (m->rows) check_shape(m, t, m->rows, m->cols);
    *w = (moe4_weight){.dtype = t->dtype, .rows = t->shape[0], .cols = t->shape[1], .data = t->data};
}

/* One positive finite F32; 0 when it is none. */
static float read_global(struct module *m, const moe4_tensor *t) {
    char shape[64];
    if (t->dtype != MOE4_F32) {
        wrong(m, MOE4_ERROR_FORMAT, t->name, "dtype %s, need F32", moe4_dtype_name(t->dtype));
    } else if (t->n_dims > 1 || t->bytes != sizeof(float)) {
        wrong(m, MOE4_ERROR_FORMAT, t->name, "%s, need [] or 1", shape_text(shape, t));
    } else {
        float value;
        memcpy(&value, t->data, sizeof value);
        if (isfinite(value) && value > 0) return value;
        wrong(m, MOE4_ERROR_FORMAT, t->name, "%g, need a positive finite number", (double)value);
    }
    return 0;
}

/* Codes and block scales are alike in all NVFP4 layouts; the factors are not. */
static void read_nvfp4(struct module *m, moe4_weight *w, const moe4_tensor *codes, float global, float input_scale) {
    const moe4_tensor *scale = m->part[WEIGHT_SCALE];
    if (codes->dtype != MOE4_U8) wrong(m, MOE4_ERROR_FORMAT, codes->name, "dtype %s, need U8", moe4_dtype_name(codes->dtype));
    if (scale->dtype != MOE4_F8_E4M3) wrong(m, MOE4_ERROR_FORMAT, scale->name, "dtype %s, need F8_E4M3", moe4_dtype_name(scale->dtype));
    if (!check_matrix(m, codes)) return;
    if (codes->shape[1] % (MOE4_BLOCK / 2)) {
        wrong(m, MOE4_ERROR_FORMAT, codes->name, "%zux%zu bytes: K = %zu is not a multiple of %d", codes->shape[0], codes->shape[1],
              2 * codes->shape[1], MOE4_BLOCK);
        return;
    }
    check_shape(m, scale, codes->shape[0], codes->shape[1] / (MOE4_BLOCK / 2));
    if (m->rows && m->cols % MOE4_BLOCK)
        wrong(m, MOE4_ERROR_UNSUPPORTED, m->name, "%zux%zu in NVFP4: K = %zu is not a multiple of %d", m->rows, m->cols, m->cols,
              MOE4_BLOCK);
    else if (m->rows)
        check_shape(m, codes, m->rows, m->cols / 2);
    *w = (moe4_weight){.dtype = MOE4_NVFP4,
                       .rows = codes->shape[0],
                       .cols = 2 * codes->shape[1],
                       .data = codes->data,
                       .scale = scale->data,
                       .global = global,
                       .input_scale = input_scale};
}

static void read_modelopt(struct module *m, moe4_weight *w) {
    float global = read_global(m, m->part[WEIGHT_SCALE_2]);
    float input_scale = m->part[INPUT_SCALE] ? read_global(m, m->part[INPUT_SCALE]) : 0;
    read_nvfp4(m, w, m->part[WEIGHT], global, input_scale);
}

/* A stored divisor as the factor it stands for. */
static float read_divisor(struct module *m, const moe4_tensor *t) {
    float divisor = read_global(m, t), factor = divisor > 0 ? 1 / divisor : 0;
    if (isfinite(factor)) return factor;
    wrong(m, MOE4_ERROR_FORMAT, t->name, "%g: its inverse is not finite", (double)divisor);
    return 0;
}

static void read_compressed_tensors(struct module *m, moe4_weight *w) {
    float global = read_divisor(m, m->part[WEIGHT_GLOBAL_SCALE]);
    float input_scale = m->part[INPUT_GLOBAL_SCALE] ? read_divisor(m, m->part[INPUT_GLOBAL_SCALE]) : 0;
    read_nvfp4(m, w, m->part[WEIGHT_PACKED], global, input_scale);
}

/* The rows or columns that n scales over `size` of them stand for: all, one, or the 128 or 32 that are in use; 0 for none of these. */
static size_t fp8_block(size_t size, size_t n) {
    if (n == 1) return size;
    if (n == size) return 1;
    return (size + 127) / 128 == n ? 128 : (size + 31) / 32 == n ? 32 : 0;
}

/* An input_scale beside it is of no use here: inputs are not rounded. */
static void read_fp8(struct module *m, moe4_weight *w) {
    const moe4_tensor *t = m->part[WEIGHT], *s = m->part[WEIGHT_SCALE_INV];
    char a[64], b[64];
    if (!s) s = m->part[WEIGHT_SCALE] ? m->part[WEIGHT_SCALE] : m->part[SCALE];
    if (t->dtype != MOE4_F8_E4M3) wrong(m, MOE4_ERROR_FORMAT, t->name, "dtype %s, need F8_E4M3", moe4_dtype_name(t->dtype));
    if (!check_matrix(m, t)) return;
    if (m->rows) check_shape(m, t, m->rows, m->cols);
    if (!(DTYPE(s->dtype) & (DTYPE(MOE4_F32) | DTYPE(MOE4_BF16) | DTYPE(MOE4_F16) | DTYPE(MOE4_F8_E8M0))))
        wrong(m, MOE4_ERROR_FORMAT, s->name, "dtype %s, need F32, BF16, F16 or F8_E8M0", moe4_dtype_name(s->dtype));
    size_t rows = t->shape[0], cols = t->shape[1];
    *w = (moe4_weight){.dtype = t->dtype, .rows = rows, .cols = cols, .data = t->data, .scale = s->data, .scale_dtype = s->dtype};
    w->scale_rows = s->n_dims <= 2 ? fp8_block(rows, s->n_dims ? s->shape[0] : 1) : 0;
    w->scale_cols = fp8_block(cols, s->n_dims > 1 ? s->shape[1] : 1);
    if (!w->scale_rows || !w->scale_cols)
        wrong(m, MOE4_ERROR_FORMAT, s->name, "%s, no scales of %s: moe4 reads one, one a row, and blocks of 128x128 or 32x32",
              shape_text(a, s), shape_text(b, t));
}

/* ---- choosing ---- */

static const moe4_tensor *main_part(const struct module *m) {
    for (int s = 0; s < N_SUFFIXES; s++)
        if (m->part[s] && MAIN & BIT(s)) return m->part[s];
    return NULL;
}

static bool fits(const struct format *f, const struct module *m) {
    if ((m->found & f->needs) != f->needs || m->found & ~(f->needs | f->allows)) return false;
    if (f->dtypes && !(f->dtypes & DTYPE(main_part(m)->dtype))) return false;
    return !f->scale_dtypes || f->scale_dtypes & DTYPE(m->part[WEIGHT_SCALE]->dtype);
}

/* No format fits: says whether there are too many or too few companions. */
static void explain(struct module *m) {
    char a[200], b[200];
    const struct format *marked[2];
    int n_marked = 0;
    for (int i = 0; i < N_FORMATS && n_marked < 2; i++)
        if (formats[i].marks & m->found) marked[n_marked++] = &formats[i];
    const moe4_tensor *t = main_part(m);
    if (n_marked == 2)
        wrong(m, MOE4_ERROR_FORMAT, m->name, "companions of two formats: %s (%s) and %s (%s)", suffix_text(a, marked[0]->marks & m->found),
              marked[0]->name, suffix_text(b, marked[1]->marks & m->found), marked[1]->name);
    else if (n_marked == 1 && marked[0]->needs & ~m->found)
        wrong(m, MOE4_ERROR_FORMAT, m->name, "%s without %s, which %s needs", suffix_text(a, m->found),
              suffix_text(b, marked[0]->needs & ~m->found), marked[0]->name);
    else if (n_marked == 1)
        wrong(m, MOE4_ERROR_FORMAT, m->name, "%s beside %s", suffix_text(a, m->found & ~(marked[0]->needs | marked[0]->allows)),
              marked[0]->name);
    else if (m->found == BIT(WEIGHT) && t->dtype != MOE4_U8)
        wrong(m, MOE4_ERROR_UNSUPPORTED, t->name, "dtype %s without scales", moe4_dtype_name(t->dtype));
    else
        wrong(m, MOE4_ERROR_FORMAT, m->name,
              "%s (%s), but neither weight_scale and weight_scale_2 (modelopt NVFP4) nor another known format's companions",
              suffix_text(a, m->found), t ? moe4_dtype_name(t->dtype) : "no weight");
}

/* Takes the module's tensors out of the table of names. */
static void gather(struct module *m) {
    char name[MOE4_MAX_NAME + 32];
    size_t length = strlen(m->name);
    if (length > MOE4_MAX_NAME) return;
    memcpy(name, m->name, length);
    for (int s = 0; s < N_SUFFIXES; s++) {
        strcpy(name + length, suffixes[s]);
        m->part[s] = moe4_checkpoint_lookup(m->ckpt, name);
        if (m->part[s]) m->found |= BIT(s);
    }
}

moe4_status moe4_weight_read(const moe4_checkpoint *ckpt, moe4_weight *weight_ret, const char *name, size_t rows, size_t cols,
                             moe4_finding_fn finding, void *user) {
    struct module m = {.ckpt = ckpt, .name = name, .rows = rows, .cols = cols, .finding = finding, .user = user};
    gather(&m);
    if (!m.found) {
        wrong(&m, MOE4_ERROR_NOT_FOUND, name, "no weight of this name");
        return m.status;
    }
    moe4_weight w = {0};
    const struct format *f = formats;
    while (f < formats + N_FORMATS && !fits(f, &m)) f++;
    if (f == formats + N_FORMATS)
        explain(&m);
    else if (!f->read)
        wrong(&m, MOE4_ERROR_UNSUPPORTED, name, "%s", f->name);
    else
        f->read(&m, &w);
    if (m.status == MOE4_OK) *weight_ret = w;
    return m.status;
}

size_t moe4_module_length(const char *name, bool *is_main_ret) {
    size_t n = strlen(name);
    for (int s = 0; s < N_SUFFIXES; s++) {
        size_t k = strlen(suffixes[s]);
        if (n > k && strcmp(name + n - k, suffixes[s]) == 0) {
            *is_main_ret = MAIN & BIT(s);
            return n - k;
        }
    }
    return 0;
}

bool moe4_module_has_main(const moe4_checkpoint *ckpt, const char *name) {
    struct module m = {.ckpt = ckpt, .name = name};
    gather(&m);
    return main_part(&m);
}

void moe4_quantization_name(char *dst, size_t dst_bytes, const moe4_checkpoint *ckpt) {
    unsigned found = 0;
    for (size_t i = 0; i < ckpt->n_tensors; i++) {
        const moe4_tensor *t = ckpt->by_name[i];
        size_t n = strlen(t->name);
        for (int s = WEIGHT_SCALE; s < N_SUFFIXES; s++) {
            size_t k = strlen(suffixes[s]);
            if (n > k && strcmp(t->name + n - k, suffixes[s]) == 0) found |= BIT(s);
        }
    }
    size_t at = 0;
    snprintf(dst, dst_bytes, "none");
    for (int i = 0; i < N_FORMATS && at < dst_bytes; i++)
        if (formats[i].marks & found) at += (size_t)snprintf(dst + at, dst_bytes - at, "%s%s", at ? " and " : "", formats[i].name);
    if (at == 0 && found & (BIT(WEIGHT_SCALE) | BIT(SCALE))) snprintf(dst, dst_bytes, "unknown");
}

/* ---- public ---- */

moe4_status moe4_checkpoint_weight(const moe4_checkpoint *ckpt, moe4_weight *weight_ret, const char *module) {
    moe4_begin(ckpt->ctx);
    MOE4_CHECK(ckpt->ctx, weight_ret && module, MOE4_ERROR_ARGUMENT, "%s is NULL", weight_ret ? "module" : "weight_ret");
    return moe4_weight_read(ckpt, weight_ret, module, 0, 0, NULL, NULL);
}
