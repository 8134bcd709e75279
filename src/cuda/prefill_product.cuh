/* The main loop of the prefill kernel: a warpgroup's row tiles times a tile's columns. Its instructions are counted: beside wgmma a warp
 * gets one through in four or five cycles (docs/hopper.md). */
#ifndef MOE4_CUDA_PREFILL_PRODUCT_CUH
#define MOE4_CUDA_PREFILL_PRODUCT_CUH

#include "prefill_items.cuh"
#include "wgmma.cuh"

template <class S> struct consumer {
    stage_ring<S> stage;
    uint32_t codes, scales; /* codes, scales: within a stage, this lane's of the first row tile */
    uint32_t nowhere;
    bool tells; /* one lane of a warp */
};

static __device__ __forceinline__ uint32_t load_shared_2(uint32_t address) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

/* Unit u of a row tile's weights in a stage: four A fragments, one for each 16 k. */
template <class S> static __device__ __forceinline__ void decode_unit(uint32_t (&a)[16], const consumer<S> &self, int tile, int u) {
    uint32_t at = self.stage.at + (uint32_t)(tile * S::tile_bytes + u * MOE4_UNIT_BYTES);
    uint4 words = load_shared_16(at + self.codes);
    uint32_t scales = load_shared_2(at + self.scales);
    uint32_t scale_g = scale_multiplier<0>(scales), scale_g8 = scale_multiplier<1>(scales);
    decode_word(a, words.x, scale_g, scale_g8);
    decode_word(a + 4, words.y, scale_g, scale_g8);
    decode_word(a + 8, words.z, scale_g, scale_g8);
    decode_word(a + 12, words.w, scale_g, scale_g8);
}

template <int N, int M> static __device__ __forceinline__ void add_columns(float (&acc)[M], const uint32_t (&a)[16], uint32_t b) {
#pragma unroll
    for (int q = 0; q < 4; q++) wgmma<N>::add(acc, a + 4 * q, wgmma_operand(b, q), 1);
    wgmma_commit(); /* here: behind a branch's end it would be a wgmma of its own, and then the wait one for this unit */
}

/* A row tile's products, with 8 * width columns: one of LO .. HI, in steps of 2 up to 16. Only these branches know it: with a loop for each
 * width, ptxas would give each its own registers. */
template <int LO, int HI, int M>
static __device__ __forceinline__ void add_between(float (&acc)[M], const uint32_t (&a)[16], uint32_t b, int width) {
    if constexpr (LO == HI) {
        add_columns<8 * LO>(acc, a, b);
    } else {
        constexpr int half = (LO + HI + 1) / 2, middle = half < 16 ? half & ~1 : half, below = middle - (middle > 16 ? 1 : 2);
        static_assert(LO % 2 == 0 || LO > 16, "steps of 2");
        constexpr int from = middle > LO ? middle : LO + 2, to = middle > LO ? below : LO;
        if (width < from)
            add_between<LO, to>(acc, a, b, width);
        else
            add_between<from, HI>(acc, a, b, width);
    }
}

/* Stage after stage, unit after unit, row tile after row tile; a unit has unit_bytes of activations. A group of products runs while the
 * next fragments are decoded, into a and b in turn; once it has ended, its fragments' registers are free, and after a stage's last one the
 * stage. */
template <class S>
static __device__ __forceinline__ void product(float (&acc)[S::tiles][S::columns / 2], consumer<S> *self, int width, int units,
                                               uint32_t unit_bytes) {
    static_assert(S::units == 2 || (S::tiles == 1 && S::units == 1), "a and b in turn");
    uint32_t a[16], b[16], before = self->nowhere;
#pragma unroll
    for (int t = 0; t < S::tiles; t++)
#pragma unroll
        for (int i = 0; i < S::columns / 2; i++) acc[t][i] = 0.f;
    auto multiply = [&](float(&sums)[S::columns / 2], uint32_t(&fragments)[16], int tile, int u) {
        decode_unit(fragments, *self, tile, u);
        wgmma_fence();
        add_between<S::fewest / 8, S::columns / 8>(sums, fragments, self->stage.at + (uint32_t)u * unit_bytes, width);
        wgmma_wait<1>();
    };
    auto release = [&] {
        if (self->tells) mbarrier_arrive(before);
        before = self->stage.at + S::empty;
    };
#pragma unroll 1
    for (;;) {
        mbarrier_wait(self->stage.at + S::full, self->stage.parity);
        multiply(acc[0], a, 0, 0);
        release();
        if constexpr (S::tiles == 1 && S::units == 1) {
            self->stage.next();
            if (--units == 0) break;
            mbarrier_wait(self->stage.at + S::full, self->stage.parity);
            multiply(acc[0], b, 0, 0);
            release();
        } else if constexpr (S::tiles == 1) {
            if (--units == 0) {
                self->stage.next();
                break;
            }
            multiply(acc[0], b, 0, 1);
        } else {
            multiply(acc[1], b, 1, 0);
            if (--units == 0) {
                self->stage.next();
                break;
            }
            multiply(acc[0], a, 0, 1);
            multiply(acc[1], b, 1, 1);
        }
        self->stage.next();
        if (--units == 0) break;
    }
    wgmma_wait<0>();
    if (self->tells) mbarrier_arrive(before);
}

#endif
