/* The main loop of the prefill kernel: a warpgroup's row tiles times a tile's columns. Its instructions are counted: beside wgmma a warp
 * gets one through in four or five cycles (docs/hopper.md). */
#ifndef MOE4_CUDA_PREFILL_PRODUCT_CUH
#define MOE4_CUDA_PREFILL_PRODUCT_CUH

#include "prefill_items.cuh"
#include "wgmma.cuh"

template <class S> struct consumer {
    stage_ring<S> stage;
    uint32_t codes, scales; /* codes, scales: within a stage, this lane's of the first row tile */
    bool tells;             /* one lane of a warp */
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
    uint32_t both = scale_multipliers<0>(scales), scale_g = both_halves<0>(both), scale_g8 = both_halves<1>(both);
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

/* The loop for one width: stage after stage, unit after unit, row tile after row tile; a unit has unit_bytes of activations. Where a
 * warpgroup has two row tiles, one's product runs while the other's fragments are decoded; where it has one, the other warpgroups' do. At a
 * stage's end all have ended: what is under way at a loop's end ptxas would give registers of its own in every loop. */
template <class S, int N>
static __device__ __forceinline__ void multiply(float (&acc)[S::tiles][S::columns / 2], consumer<S> *self, int units, uint32_t unit_bytes) {
    uint32_t fragments[S::tiles][16];
#pragma unroll 1
    do {
        mbarrier_wait(self->stage.at + S::full, self->stage.parity);
#pragma unroll
        for (int u = 0; u < S::units; u++) {
            if (u > 0 && units <= u) break;
#pragma unroll
            for (int t = 0; t < S::tiles; t++) {
                decode_unit(fragments[t], *self, t, u);
                wgmma_fence();
                add_columns<N>(acc[t], fragments[t], self->stage.at + (uint32_t)u * unit_bytes);
                wgmma_wait<S::tiles - 1>();
            }
        }
        wgmma_wait<0>();
        if (self->tells) mbarrier_arrive(self->stage.at + S::empty);
        self->stage.next();
    } while ((units -= S::units) > 0);
}

/* The loop that has the width, in eights: one of LO .. HI. */
template <class S, int LO, int HI>
static __device__ __forceinline__ void product(float (&acc)[S::tiles][S::columns / 2], consumer<S> *self, int width, int units,
                                               uint32_t unit_bytes) {
    if constexpr (LO == HI) {
        multiply<S, 8 * LO>(acc, self, units, unit_bytes);
    } else {
        constexpr int middle = (LO + HI + 1) / 2;
        if (width < middle)
            product<S, LO, middle - 1>(acc, self, width, units, unit_bytes);
        else
            product<S, middle, HI>(acc, self, width, units, unit_bytes);
    }
}

#endif
