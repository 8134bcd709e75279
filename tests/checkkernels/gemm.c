/* The products: every family of an ISA against fp64 on the same rounded operands, exactly where the numbers are integers, and with the
 * same bits however columns and rows are split. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "checkkernels.h"

enum {
    MOST_K = 1552,
    FEW_N = 40,
    MOST_N = 300 /* past the widest panel */,
    FEW_ROWS = 30,
    MOST_ROWS = 99 /* past what a kernel takes at once */,
    N_CASES = 63
};

/* One product: operands as the kernels read them, and as fp64. */
struct product {
    const struct moe4_gemm *gemm;
    struct moe4_matrix w;
    moe4_act act;
    size_t k, n, n_rows;
    const void *rows[MOST_ROWS];
    float factor[MOST_ROWS];
    void *scratch;
    double *a, *b; /* values [n_rows, k] and [n, k] */
    bool counted;  /* saturated blocks as the scalar quantizer counts them */
    bool kept;     /* codes packed as they are give the row that rounding gave */
};

static double weight_at(const moe4_weight *w, size_t i) {
    const uint8_t *data = w->data;
    uint16_t half;
    float x;
    if (w->dtype == MOE4_NVFP4)
        return (double)moe4_e2m1_to_float(data[i / 2] >> 4 * (i % 2) & 15) * moe4_e4m3_to_float(w->scale[i / MOE4_BLOCK]);
    if (w->dtype == MOE4_F32) return memcpy(&x, data + 4 * i, 4), x;
    memcpy(&half, data + 2 * i, 2);
    return w->dtype == MOE4_BF16 ? moe4_bf16_to_float(half) : moe4_f16_to_float(half);
}

/* Random weights at an address of any parity; `integers`: small ones, block scales powers of two. */
static void make_weight(struct check *c, struct product *p, moe4_dtype dtype, enum side side, bool integers) {
    size_t count = p->k * p->n, size = dtype == MOE4_F32 ? 4 : 2, odd = random_below(&c->random, 2);
    uint8_t *data = guarded((dtype == MOE4_NVFP4 ? count / 2 : count * size) + odd, side);
    if (side == AT_START) data += odd;
    p->w.w = (moe4_weight){.dtype = dtype, .rows = p->n, .cols = p->k, .data = data, .global = 3};
    if (dtype == MOE4_NVFP4) {
        uint8_t *scale = guarded(count / MOE4_BLOCK, side);
        for (size_t i = 0; i < count / 2; i++) data[i] = (uint8_t)random_u64(&c->random);
        for (size_t i = 0; i < count / MOE4_BLOCK; i++)
            scale[i] = (uint8_t)(integers ? 0x30 + 8 * random_below(&c->random, 3) : random_below(&c->random, 0x7f));
        p->w.w.scale = scale;
    }
    for (size_t i = 0; dtype != MOE4_NVFP4 && i < count; i++) {
        float x = integers ? (float)random_below(&c->random, 17) - 8 : random_normal(&c->random);
        uint16_t half = dtype == MOE4_BF16 ? moe4_bf16_from_float(x) : moe4_f16_from_float(x);
        memcpy(data + i * size, size == 4 ? (void *)&x : &half, size);
    }
    for (size_t i = 0; i < count; i++) p->b[i] = weight_at(&p->w.w, i);
    size_t bytes = p->gemm->packed_bytes(&p->w.w);
    if (!bytes) return;
    void *packed = guarded((bytes + 63) / 64 * 64, side);
    for (size_t col = 0; col < p->n; col += MOE4_TASK_COLS)
        p->gemm->pack(packed, &p->w.w, col, p->n - col < MOE4_TASK_COLS ? p->n - col : MOE4_TASK_COLS);
    p->w.packed = packed;
}

/* A row that its mode rounds to itself: e2m1 values with a 6 in every block (its scale is then 1), or small integers. */
static void integer_row(struct check *c, float *x, size_t k, moe4_act act) {
    for (size_t i = 0; i < k; i++) {
        x[i] = act == MOE4_ACT_TOKEN ? moe4_e2m1_to_float((uint8_t)random_below(&c->random, 16)) : (float)random_below(&c->random, 17) - 8;
        if (act == MOE4_ACT_TOKEN && i % MOE4_BLOCK == 0) x[i] = -6;
    }
}

static void make_row(struct check *c, struct product *p, size_t m, enum side side, bool integers) {
    float *x = guarded(p->k * sizeof *x, side);
    struct moe4_rounding rounding = {.act = p->act, .S = 1, .decode = 1};
    uint8_t codes[MOST_K / 2], scales[MOST_K / MOE4_BLOCK];
    uint64_t n_saturated = 0;
    if (integers) {
        integer_row(c, x, p->k, p->act);
    } else {
        random_row(&c->random, x, p->k, m % 3 == 0 ? 0 : m % 3 == 1 ? 5 : 6);
        rounding.S = 2688 / fmaxf(c->scalar->amax_row(x, p->k), 1e-3f) * (m % 4 == 3 ? 3 : 1); /* some rows saturate */
        rounding.decode = 1 / rounding.S;
    }
    void *row = guarded(p->gemm->row_bytes(p->k), side);
    memset(row, 0, p->gemm->row_bytes(p->k));
    uint64_t got = p->gemm->pack_row(c->k, row, &p->factor[m], x, p->k, &rounding);
    p->rows[m] = row;
    if (p->act == MOE4_ACT_TOKEN) {
        const struct moe4_quantizer z = {.recipe = MOE4_RECIPE_ACTIVATION, .global = rounding.S};
        n_saturated = c->scalar->quantize_row(codes, scales, x, p->k, &z);
        size_t bytes = p->gemm->row_bytes(p->k);
        float factor;
        void *given = guarded(bytes, side);
        memset(given, 0, bytes);
        p->gemm->pack_codes(c->k, given, &factor, codes, scales, p->k);
        p->kept &= factor == 1 && same_bytes(given, row, bytes);
    }
    p->counted &= got == n_saturated;
    const moe4_weight as_weight = {.dtype = MOE4_NVFP4, .data = codes, .scale = scales};
    for (size_t i = 0; i < p->k; i++) {
        double *a = &p->a[m * p->k + i];
        if (p->act == MOE4_ACT_TOKEN)
            *a = weight_at(&as_weight, i) * rounding.decode;
        else
            *a = p->act == MOE4_ACT_W4A16 ? moe4_bf16_to_float(moe4_bf16_from_float(x[i])) : x[i];
    }
}

static bool close_to_fp64(const struct product *p, const float *y, size_t y_ld, bool integers) {
    for (size_t m = 0; m < p->n_rows; m++)
        for (size_t j = 0; j < p->n; j++) {
            double sum = 0, sum_abs = 0, got = (double)y[m * y_ld + j] * p->factor[m];
            for (size_t i = 0; i < p->k; i++) {
                double t = p->a[m * p->k + i] * p->b[j * p->k + i];
                sum += t;
                sum_abs += fabs(t);
            }
            if (integers ? got != sum : !(fabs(got - sum) <= (double)(p->k + 16) * 0x1p-23 * sum_abs)) return false;
        }
    return true;
}

/* The same product in pieces: columns at a random multiple of the tile, rows at a random one, in any order of calls. */
static bool same_in_pieces(struct check *c, const struct product *p, const float *y, size_t y_ld, enum side side) {
    float *z = guarded(p->n_rows * p->n * sizeof *z, side);
    size_t tile = p->gemm->tile_cols, col = random_below(&c->random, p->n / tile + 1) * tile, row = random_below(&c->random, p->n_rows + 1);
    for (int piece = 3; piece >= 0; piece--) {
        size_t col0 = piece % 2 ? col : 0, n = piece % 2 ? p->n - col : col, m = piece / 2 ? row : 0,
               n_m = piece / 2 ? p->n_rows - row : row;
        if (n && n_m) p->gemm->gemm(z + m * p->n + col0, p->n, p->rows + m, n_m, &p->w, col0, n, NULL, p->scratch);
    }
    bool same = true;
    for (size_t m = 0; m < p->n_rows; m++) same &= same_bytes(z + m * p->n, y + m * y_ld, p->n * sizeof *z);
    return same;
}

static void check_family(struct check *c, const struct moe4_gemm *gemm, moe4_dtype dtype, moe4_act act, const char *name) {
    static const size_t ks[] = {16, 32, 48, 112, 256, 272, 512, 528, 1040, MOST_K};
    bool close = true, exact = true, same = true, counted = true, kept = true, clean = true;
    char what[80];
    if (!gemm) {
        check_line(c, name, "is missing", false);
        return;
    }
    double *a = malloc(MOST_ROWS * MOST_K * sizeof *a), *b = malloc(MOST_N * MOST_K * sizeof *b);
    for (int i = 0; i < N_CASES; i++) {
        enum side side = i % 2 ? AT_START : AT_END;
        bool integers = i % 3 == 0;
        struct product p = {.gemm = gemm, .act = act, .a = a, .b = b, .counted = true, .kept = true, .n_rows = 1 + (size_t)i % FEW_ROWS};
        p.k = ks[random_below(&c->random, sizeof ks / sizeof *ks)];
        if (dtype != MOE4_NVFP4) p.k -= random_below(&c->random, 16); /* any k at all */
        p.n = i < FEW_N           ? 1 + (size_t)i
              : i < 60 || i == 62 ? 1 + random_below(&c->random, FEW_N)
                                  : 257 + random_below(&c->random, MOST_N - 256);
        if (i >= 60) p.n_rows = i == 62 ? MOST_ROWS : FEW_ROWS - (size_t)i % 3;
        make_weight(c, &p, dtype, side, integers);
        for (size_t m = 0; m < p.n_rows; m++) make_row(c, &p, m, side, integers);
        size_t y_ld = p.n + random_below(&c->random, 3);
        float *y = guarded(((p.n_rows - 1) * y_ld + p.n) * sizeof *y, side);
        for (size_t j = 0; j < (p.n_rows - 1) * y_ld + p.n; j++) y[j] = NAN; /* a result must be written, and nothing between rows */
        p.scratch = guarded(gemm->scratch_bytes, AT_END);
        gemm->gemm(y, y_ld, p.rows, p.n_rows, &p.w, 0, p.n, NULL, p.scratch);
        *(integers ? &exact : &close) &= close_to_fp64(&p, y, y_ld, integers);
        same &= same_in_pieces(c, &p, y, y_ld, side);
        for (size_t m = 0; m + 1 < p.n_rows; m++)
            for (size_t j = p.n; j < y_ld; j++) clean &= isnan(y[m * y_ld + j]) != 0;
        counted &= p.counted;
        kept &= p.kept;
        clean &= guarded_release();
    }
    free(a);
    free(b);
    const struct {
        const char *what;
        bool ok;
    } lines[] = {{"close to fp64", close},      {"exact on integers", exact},        {"same bits in pieces", same},
                 {"saturated blocks", counted}, {"keeps rows that are NVFP4", kept}, {"stays inside", clean}};
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        snprintf(what, sizeof what, "%s (%s)", lines[i].what, gemm->name);
        check_line(c, name, what, lines[i].ok);
    }
}

/* ---- rows of results ---- */

static void check_rows(struct check *c) {
    bool add = true, scale = true, odd = true;
    for (size_t n = 0; n < 100; n++)
        for (int side = 0; side < N_SIDES; side++) {
            float *x = guarded(n * 4, side), *y = guarded(n * 4, side), *z = guarded(n * 4, side), want[100], want_z[100];
            float a = random_normal(&c->random), b = ldexpf(random_normal(&c->random), -140);
            random_row(&c->random, x, n, 7);
            random_row(&c->random, y, n, 7);
            random_row(&c->random, z, n, 1);
            memcpy(want, y, n * 4);
            memcpy(want_z, z, n * 4);
            c->k->add_scaled_row(y, x, a, n);
            for (size_t i = 0; i < n; i++) {
                volatile float product = a * x[i]; /* rounded on its own: nothing may fuse it with the sum */
                want[i] += product;
            }
            c->k->scale_row(z, a, b, n);
            c->scalar->scale_row(want_z, a, b, n);
            add &= same_bytes(y, want, n * 4);
            scale &= same_bytes(z, want_z, n * 4);
            for (int divides = 0; divides < 2; divides++) { /* products of the codec's values, then anything fp32 holds */
                random_row(&c->random, x, n, (int)(n % RANDOM_KINDS));
                memcpy(want, x, n * 4);
                const float by = ldexpf(random_normal(&c->random), (int)random_below(&c->random, 260) - 140);
                c->k->scale_row_to_odd(x, by, divides, n);
                c->scalar->scale_row_to_odd(want, by, divides, n);
                odd &= same_bytes(x, want, n * 4);
            }
            bool clean = guarded_release();
            add &= clean;
            scale &= clean;
            odd &= clean;
        }
    check_line(c, "add_scaled_row", "any length", add);
    check_line(c, "scale_row", "any length", scale);
    check_line(c, "scale_row_to_odd", "any length, any exponent", odd);
}

void check_gemm(struct check *c) {
    check_rows(c);
    check_family(c, c->k->w4a4, MOE4_NVFP4, MOE4_ACT_TOKEN, "w4a4");
    check_family(c, c->k->w4a16, MOE4_NVFP4, MOE4_ACT_W4A16, "w4a16");
    check_family(c, c->k->wide, MOE4_BF16, MOE4_ACT_BF16, "wide bf16");
    check_family(c, c->k->wide, MOE4_F16, MOE4_ACT_BF16, "wide f16");
    check_family(c, c->k->wide, MOE4_F32, MOE4_ACT_BF16, "wide f32");
}
