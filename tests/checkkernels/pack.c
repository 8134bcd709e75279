/* Packed weights: an ISA's packing writes the same bytes as the plain one, whatever columns a call has. Packed activations: codes under a
 * zero scale are zero. */
#include "checkkernels.h"
#include "cpu/pack.h"

/* Rows given as codes, all scales 0: the sums are exactly 0. */
static void check_zero_scales(struct check *c) {
    enum { K = 80, N = 24 };
    const struct moe4_gemm *gemm = c->k->w4a4;
    uint8_t codes[N * K / 2], scales[N * K / 16], zeros[K / 16] = {0};
    for (size_t i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)random_u64(&c->random);
    for (size_t i = 0; i < sizeof scales; i++) scales[i] = (uint8_t)random_below(&c->random, 127);
    struct moe4_matrix m = {.w = {.dtype = MOE4_NVFP4, .rows = N, .cols = K, .data = codes, .scale = scales, .global = 1}};
    const size_t bytes = gemm->packed_bytes(&m.w);
    if (bytes) {
        void *packed = guarded(bytes, AT_END);
        gemm->pack(packed, &m.w, 0, N);
        m.packed = packed;
    }
    void *row = guarded(gemm->row_bytes(K), AT_END);
    float factor, y[N];
    gemm->pack_codes(c->k, row, &factor, codes, zeros, K);
    const void *rows[] = {row, row};
    float pair[2 * N];
    void *scratch = guarded(gemm->scratch_bytes, AT_END);
    gemm->gemm(y, N, rows, 1, &m, 0, N, NULL, scratch);
    gemm->gemm(pair, N, rows, 2, &m, 0, N, NULL, scratch);
    bool ok = true;
    for (size_t j = 0; j < N; j++) ok &= y[j] == 0 && pair[j] == 0 && pair[N + j] == 0;
    ok &= guarded_release();
    check_line(c, "pack_codes", "nothing comes of a zero scale", ok);
}

/* Files keep packed weights by the layout's name: what packs has one, and no other layout's bytes. */
static void check_layouts(struct check *c) {
    const struct moe4_gemm *all[] = {c->k->w4a4, c->k->w4a16, c->k->wide};
    const moe4_weight w = {.dtype = MOE4_NVFP4, .rows = 32, .cols = 64, .global = 1};
    bool ok = true;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        const bool packs = all[i]->packed_bytes(&w) > 0;
        ok &= packs == (all[i]->layout != NULL) && packs == (all[i]->pack != NULL);
    }
    check_line(c, "layout", "named by every family that packs", ok);
}

#if defined(__x86_64__)
static void check_weights(struct check *c) {
    static const size_t ks[] = {16, 64, 112, 128, 144, 192, 256, 640}, ns[] = {1, 15, 16, 17, 48, 70};
    bool ok = true;
    void (*pack)(void *packed, const moe4_weight *w, size_t col0, size_t n_cols) = c->k->w4a4->pack;
    if (!pack || pack == moe4_tile16_pack) return;
    for (size_t i = 0; i < sizeof ks / sizeof *ks; i++)
        for (size_t j = 0; j < sizeof ns / sizeof *ns; j++) {
            const enum side side = random_below(&c->random, N_SIDES);
            uint8_t *codes = guarded(ks[i] * ns[j] / 2, side), *scales = guarded(ks[i] * ns[j] / 16, side);
            for (size_t k = 0; k < ks[i] * ns[j] / 2; k++) codes[k] = (uint8_t)random_u64(&c->random);
            for (size_t k = 0; k < ks[i] * ns[j] / 16; k++)
                scales[k] = (uint8_t)(random_below(&c->random, 4) ? random_below(&c->random, 127) : 0);
            const moe4_weight w = {.dtype = MOE4_NVFP4, .rows = ns[j], .cols = ks[i], .data = codes, .scale = scales, .global = 1};
            const size_t bytes = moe4_tile16_bytes(&w);
            char *got = guarded(bytes, AT_END), *want = guarded(bytes, AT_END);
            moe4_tile16_pack(want, &w, 0, ns[j]);
            for (size_t col = 0, n; col < ns[j]; col += n) {
                n = 16 * (1 + random_below(&c->random, 3));
                if (n > ns[j] - col) n = ns[j] - col;
                pack(got, &w, col, n);
            }
            ok &= same_bytes(got, want, bytes);
            ok &= guarded_release();
        }
    check_line(c, "pack", "same bytes as the plain one", ok);
}
#else
static void check_weights(struct check *c) {
    (void)c;
}
#endif

void check_pack(struct check *c) {
    check_zero_scales(c);
    check_layouts(c);
    check_weights(c);
}
