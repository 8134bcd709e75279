/* The codec's kernels: bit-exact with the scalar ones, glu_row within its tolerance and bit-exact with itself at any position. */
#include <float.h>
#include <stdio.h>

#include "checkkernels.h"

static const moe4_dtype dtypes[] = {MOE4_F32, MOE4_BF16, MOE4_F16};
static const char *const dtype_names[] = {"f32", "bf16", "f16"};
static const size_t dtype_bytes[] = {4, 2, 2};
enum { N_DTYPES = 3, MOST = 300 };

static void check_widen(struct check *c, int d) {
    char what[64];
    bool ok = true;
    for (size_t n = 0; n <= MOST; n += n < 40 ? 1 : 37)
        for (int side = 0; side < N_SIDES; side++) {
            size_t bytes = n * dtype_bytes[d], odd = n % 2; /* odd addresses too */
            uint8_t *src = guarded(bytes + odd, side);
            float *dst = guarded(n * 4, side), want[MOST];
            for (size_t i = 0; i < bytes + odd; i++) src[i] = (uint8_t)random_u64(&c->random);
            src += side == AT_START ? odd : 0;
            c->k->widen_row(dst, src, dtypes[d], n);
            c->scalar->widen_row(want, src, dtypes[d], n);
            ok &= same_bytes(dst, want, n * 4);
            ok &= guarded_release();
        }
    snprintf(what, sizeof what, "%s, any bits", dtype_names[d]);
    check_line(c, "widen_row", what, ok);
}

static void check_narrow(struct check *c, int d) {
    char what[64];
    bool ok = true;
    for (size_t n = 0; n <= MOST; n += n < 40 ? 1 : 37)
        for (int side = 0; side < N_SIDES; side++)
            for (int kind = 0; kind <= RANDOM_KINDS; kind++) {
                size_t bytes = n * dtype_bytes[d], odd = n % 2;
                uint8_t *dst = guarded(bytes + odd, side), want[MOST * 4];
                float *src = guarded(n * 4, side);
                if (kind < RANDOM_KINDS) random_row(&c->random, src, n, kind);
                for (size_t i = 0; kind == RANDOM_KINDS && i < n; i++) {
                    uint32_t bits = (uint32_t)random_u64(&c->random); /* NaN and Inf too */
                    if (i % 3 == 0) bits |= 0x7f800000;
                    if (i % 5 == 0) bits = (bits & 0xffff0000) | 0x8000;     /* ties of bf16 */
                    if (i % 7 == 0) bits = (bits & 0x8fffe000) | 0x30001000; /* of f16 */
                    memcpy(&src[i], &bits, 4);
                }
                dst += side == AT_START ? odd : 0;
                c->k->narrow_row(dst, dtypes[d], src, n);
                c->scalar->narrow_row(want, dtypes[d], src, n);
                ok &= same_bytes(dst, want, bytes);
                if (side == AT_START && odd) dst[-1] = 0xa5;
                ok &= guarded_release();
            }
    snprintf(what, sizeof what, "%s, ties, NaN, subnormals", dtype_names[d]);
    check_line(c, "narrow_row", what, ok);
}

static void check_amax(struct check *c) {
    bool ok = true;
    for (size_t n = 0; n <= MOST; n += n < 80 ? 1 : 37)
        for (int side = 0; side < N_SIDES; side++)
            for (int kind = 0; kind < RANDOM_KINDS + 2; kind++) {
                float *x = guarded(n * 4, side);
                random_row(&c->random, x, n, kind % RANDOM_KINDS);
                if (kind >= RANDOM_KINDS && n) x[random_below(&c->random, n)] = kind == RANDOM_KINDS ? -NAN : INFINITY;
                float got = c->k->amax_row(x, n), want = c->scalar->amax_row(x, n);
                ok &= same_bytes(&got, &want, sizeof got);
                if (kind >= RANDOM_KINDS && n) ok &= !isfinite(got);
                ok &= guarded_release();
            }
    check_line(c, "amax_row", "finite, NaN, Inf", ok);
}

/* ---- quantize ---- */

/* A global scale that suits the row, one that saturates, one that is too large, extremes. */
static struct moe4_quantizer quantizer(struct check *c, moe4_recipe recipe, int four_over_six, float amax, int kind) {
    struct moe4_quantizer z = {.recipe = recipe, .four_over_six = four_over_six, .amax = amax > 0 ? amax : 2688};
    bool encodes = recipe == MOE4_RECIPE_ACTIVATION || recipe == MOE4_RECIPE_COMPRESSED_TENSORS;
    float fit = amax > 0 ? fmaxf(amax / 2688, 0x1p-126f) : 1;
    if (encodes) fit = fminf(2688 / fmaxf(amax, 0x1p-149f), FLT_MAX);
    switch (kind) {
    case 0: z.global = fit; break;
    case 1: z.global = fit * (encodes ? 7 : 0.15f); break;
    case 2: z.global = fit * (encodes ? 1e-3f : 1e3f); break;
    case 3: z.global = encodes ? 0x1.8p-127f : 0x1p-149f; break;
    case 4: z.global = FLT_MAX; break;
    default: z.global = ldexpf(1 + random_unit(&c->random), (int)random_below(&c->random, 240) - 120); break;
    }
    if (!(z.global <= FLT_MAX)) z.global = FLT_MAX;
    if (!(z.global >= 0x1p-149f)) z.global = 0x1p-149f;
    return z;
}
enum { QUANTIZER_KINDS = 7 };

static bool quantize_case(struct check *c, size_t n, enum side side, int kind, const struct moe4_quantizer *fixed, moe4_recipe recipe,
                          int four_over_six, int z_kind) {
    float *x = guarded(n * 4, side);
    uint8_t *codes = guarded(n / 2, side), *scales = guarded(n / 16, side), want_codes[MOST], want_scales[MOST];
    random_row(&c->random, x, n, kind);
    struct moe4_quantizer z = fixed ? *fixed : quantizer(c, recipe, four_over_six, c->scalar->amax_row(x, n), z_kind);
    uint64_t n_saturated = c->k->quantize_row(codes, scales, x, n, &z);
    uint64_t want_saturated = c->scalar->quantize_row(want_codes, want_scales, x, n, &z);
    bool ok = n_saturated == want_saturated && same_bytes(codes, want_codes, n / 2) && same_bytes(scales, want_scales, n / 16);
    for (size_t i = 0; i < n / 16; i++) ok &= scales[i] <= 0x7e;
    return guarded_release() && ok;
}

static void check_quantize(struct check *c, moe4_recipe recipe, int four_over_six, const char *name) {
    bool ok = true;
    for (size_t n = 0; n <= 288; n += 16)
        for (int side = 0; side < N_SIDES; side++)
            for (int kind = 0; kind < RANDOM_KINDS; kind++)
                for (int z = 0; z < QUANTIZER_KINDS; z++) ok &= quantize_case(c, n, side, kind, NULL, recipe, four_over_six, z);
    check_line(c, "quantize_row", name, ok);
}

/* The ties of e2m1 and their neighbours: with these global scales and a 6 in the block its scale is 1, and elements stay as they are. */
static void check_ties(struct check *c) {
    static const float ties[] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.f, 0x1p-126f};
    static const uint8_t want[3][8] = {{0, 1, 2, 3, 4, 5, 6, 0}, {0, 2, 2, 4, 4, 6, 6, 0}, {1, 2, 3, 4, 5, 6, 7, 0}};
    static const moe4_recipe recipes[] = {MOE4_RECIPE_MODELOPT, MOE4_RECIPE_MODELOPT_STATIC, MOE4_RECIPE_ACTIVATION,
                                          MOE4_RECIPE_COMPRESSED_TENSORS};
    bool ok = true;
    for (int r = 0; r < 4; r++)
        for (int nudge = 0; nudge < 3; nudge++) { /* below, at, above */
            const struct moe4_quantizer z = {.recipe = recipes[r], .global = 1, .amax = 2688};
            float x[32];
            uint8_t codes[16], scales[2];
            for (int i = 0; i < 32; i++) {
                float tie = ties[i / 2 % 8], near = nudge == 1 ? tie : nextafterf(tie, nudge ? 9 : 0);
                x[i] = i % 2 ? -near : near;
            }
            x[14] = x[30] = 6; /* in place of a subnormal */
            c->k->quantize_row(codes, scales, x, 32, &z);
            for (int i = 0; i < 16; i++) ok &= codes[i] == (i % 8 == 7 ? 0x87 : want[nudge][i % 8] * 0x11 + 0x80);
            ok &= scales[0] == 0x38 && scales[1] == 0x38;
        }
    check_line(c, "quantize_row", "ties and their neighbours", ok);
}

/* Every code with every scale byte, and the factors' extremes. */
static void check_dequant(struct check *c) {
    static const float factors[] = {1, 0.1f, -3, 0x1p-149f, FLT_MAX, 0x1.234568p-120f};
    bool ok = true;
    for (size_t f = 0; f < sizeof factors / sizeof *factors; f++)
        for (int side = 0; side < N_SIDES; side++)
            for (size_t n = 16; n <= 256 * 16; n = n < 160 ? n + 16 : n + 16 * 41) {
                uint8_t *codes = guarded(n / 2, side), *scales = guarded(n / 16, side);
                float *y = guarded(n * 4, side);
                static float want[256 * 16];
                for (size_t i = 0; i < n / 16; i++) scales[i] = (uint8_t)(n > 160 ? i : random_u64(&c->random));
                for (size_t i = 0; i < n / 2; i++)
                    codes[i] = (uint8_t)(n > 160 ? (2 * i % 16) | (2 * i + 1) % 16 << 4 : random_u64(&c->random));
                c->k->dequant_row(y, codes, scales, n, factors[f]);
                c->scalar->dequant_row(want, codes, scales, n, factors[f]);
                for (size_t i = 0; i < n; i++) ok &= isnan(want[i]) ? isnan(y[i]) : same_bytes(&y[i], &want[i], 4);
                ok &= guarded_release();
            }
    check_line(c, "dequant_row", "16 codes x 256 scales", ok);
}

/* ---- the activation ---- */

static const struct moe4_glu glus[] = {
    {MOE4_SWIGLU, 1, 0, 0}, {MOE4_SWIGLU, 1, 0, 7}, {MOE4_SWIGLU, 1.702f, 1, 7}, {MOE4_GELU_TANH, 1, 0, 0}, {MOE4_RELU2, 1, 0, 0}};
static const char *const glu_names[] = {"SwiGLU", "SwiGLU, limit 7", "SwiGLU-OAI", "GELU-tanh", "ReLU^2"};

static double glu_reference(double g, double u, const struct moe4_glu *p) {
    if (p->kind == MOE4_RELU2) return u > 0 ? u * u : 0;
    if (p->limit > 0) g = fmin(g, p->limit), u = fmax(fmin(u, p->limit), -p->limit);
    if (p->kind == MOE4_GELU_TANH) return 0.5 * g * (1 + tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))) * u;
    return g / (1 + exp(-p->alpha * g)) * (u + p->beta);
}

/* Within 8 ulp of fp64 and what an ulp of the exponential's argument moves, or both below 1e-36, where the denominator overflows. */
static bool close_to_glu(float h, double g, double u, const struct moe4_glu *p) {
    double want = glu_reference(g, u, p), s = p->kind == MOE4_GELU_TANH ? 1.6 * (g + 0.044715 * g * g * g) : p->alpha * g;
    if (fabs(want) > FLT_MAX) return isinf(h) || fabsf(h) > 0x1.ffffp127f;
    double moved = p->kind == MOE4_RELU2 || p->alpha == 1 ? 0 : fabs(s);
    if (p->kind == MOE4_GELU_TANH) moved = 4 * fabs(s);
    double cancel = p->beta != 0 ? fabs(g) * 0x1p-22 : 0; /* u near -beta */
    return fabs(h - want) <= (8 + moved) * 0x1p-24 * fabs(want) + cancel + 1e-36 * fmax(1, fabs(u)) +
                                 (p->kind == MOE4_GELU_TANH ? 1e-13 * fabs(u) : 0); /* fp64's 1 + tanh cancels too */
}

static void check_glu(struct check *c, const struct moe4_glu *glu, const char *name) {
    char what[64];
    bool ok = true, placed = true, nan_stays = true;
    for (size_t n = 0; n <= 100; n++)
        for (int side = 0; side < N_SIDES; side++) {
            float *g = guarded(n * 4, side), *u = guarded(n * 4, side), *h = guarded(n * 4, side);
            for (size_t i = 0; i < n; i++) {
                g[i] = (i % 2 ? 8 : 120) * random_normal(&c->random);
                u[i] = 5 * random_normal(&c->random);
            }
            c->k->glu_row(h, g, u, n, glu);
            for (size_t i = 0; i < n; i++) {
                float alone;
                c->k->glu_row(&alone, g + i, u + i, 1, glu);
                ok &= close_to_glu(h[i], g[i], u[i], glu);
                placed &= same_bytes(&alone, &h[i], sizeof alone);
            }
            for (size_t i = 0; i < n; i++) (i % 2 && glu->kind != MOE4_RELU2 ? g : u)[i] = NAN;
            c->k->glu_row(g, g, u, n, glu); /* in place */
            for (size_t i = 0; i < n; i++) nan_stays &= isnan(g[i]) != 0;
            ok &= guarded_release();
        }
    snprintf(what, sizeof what, "%s, against fp64", name);
    check_line(c, "glu_row", what, ok);
    snprintf(what, sizeof what, "%s, same bits at any position", name);
    check_line(c, "glu_row", what, placed);
    snprintf(what, sizeof what, "%s, NaN stays", name);
    check_line(c, "glu_row", what, nan_stays);
}

static void check_swiglu_ends(struct check *c) {
    static const float g[] = {-1e30f, -200, -104, -89, -88.5f, 88.5f, 89, 104, 200, 1e30f, 0.f, -0.f, 1e-40f, -1e-40f};
    enum { N = sizeof g / sizeof *g };
    float u[N], h[N];
    bool ok = true;
    for (int i = 0; i < N; i++) u[i] = 1;
    c->k->glu_row(h, g, u, N, &glus[0]);
    for (int i = 0; i < N; i++) ok &= g[i] > 80 ? h[i] == g[i] : g[i] < -80 ? h[i] <= 0 && h[i] > -1e-35f : h[i] == g[i] / 2;
    check_line(c, "glu_row", "SwiGLU saturates, never NaN", ok);
}

void check_codec(struct check *c) {
    for (int d = 0; d < N_DTYPES; d++) check_widen(c, d);
    for (int d = 0; d < N_DTYPES; d++) check_narrow(c, d);
    check_amax(c);
    check_quantize(c, MOE4_RECIPE_MODELOPT, 0, "modelopt");
    check_quantize(c, MOE4_RECIPE_MODELOPT, 1, "modelopt, four over six");
    check_quantize(c, MOE4_RECIPE_MODELOPT_STATIC, 0, "modelopt_static");
    check_quantize(c, MOE4_RECIPE_ACTIVATION, 0, "activation");
    check_quantize(c, MOE4_RECIPE_COMPRESSED_TENSORS, 0, "compressed_tensors");
    check_ties(c);
    check_dequant(c);
    for (size_t i = 0; i < sizeof glus / sizeof *glus; i++) check_glu(c, &glus[i], glu_names[i]);
    check_swiglu_ends(c);
}
