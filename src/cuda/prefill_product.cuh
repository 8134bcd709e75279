/* The main loop of the prefill kernel: a warpgroup's 64 rows times a tile's columns. */
#ifndef MOE4_CUDA_PREFILL_PRODUCT_CUH
#define MOE4_CUDA_PREFILL_PRODUCT_CUH

#include "prefill_items.cuh"
#include "wgmma.cuh"

template <class S> struct consumer {
    prefill_shared<S> *s;
    uint32_t b, w; /* the rings of activations and of weights; w is this lane's place */
    int group, warp, lane;
    prefill_ring stage;
};

static __device__ __forceinline__ uint32_t load_shared_2(uint32_t address) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

/* The weights of a stage, when they are there: four A fragments, one for each 16 k. */
template <class S>
static __device__ __forceinline__ void decode_unit(uint32_t (&a)[16], const consumer<S> *self, const prefill_ring &stage) {
    uint32_t w = self->w + (uint32_t)(stage.i * S::w_bytes);
    mbarrier_wait(smem_address(&self->s->full[stage.i]), stage.parity);
    uint4 words = load_shared_16(w + 512 * self->warp + 16 * self->lane);
    uint32_t scales = load_shared_2(w + MOE4_UNIT_CODE_BYTES + 8 * self->lane + 2 * self->warp);
    uint32_t scale_g = scale_multiplier<0>(scales), scale_g8 = scale_multiplier<1>(scales);
    decode_word(a, words.x, scale_g, scale_g8);
    decode_word(a + 4, words.y, scale_g, scale_g8);
    decode_word(a + 8, words.z, scale_g, scale_g8);
    decode_word(a + 12, words.w, scale_g, scale_g8);
}

template <int NT, int M> static __device__ __forceinline__ void add_unit(float (&acc)[M], const uint32_t (&a)[16], uint64_t operand) {
    wgmma<NT>::add(acc, a, operand, 1);
    wgmma<NT>::add(acc, a + 4, operand + 2, 1);
    wgmma<NT>::add(acc, a + 8, operand + 4, 1);
    wgmma<NT>::add(acc, a + 12, operand + 6, 1);
    wgmma_commit(); /* here: behind a branch's end it would be a wgmma of its own, and then the wait one for this unit */
}

/* A unit by the fragments `a`, 8 * width columns. While it runs, the unit before it ends, which gives its stage back. Only the switch knows
 * the number of columns: with a loop for each, ptxas would give each its own registers. */
template <class S>
static __device__ __forceinline__ void multiply_unit(float (&acc)[S::columns / 2], const uint32_t (&a)[16], consumer<S> *self, int width,
                                                     int *before) {
    uint64_t operand = wgmma_operand(self->b + (uint32_t)(self->stage.i * S::b_bytes));
    wgmma_fence();
    switch (width) {
#define CASE(i)                                                                                    \
    case i:                                                                                        \
        if constexpr (8 * i >= S::fewest && 8 * i <= S::columns) add_unit<8 * i>(acc, a, operand); \
        break
        CASE(2);
        CASE(4);
        CASE(6);
        CASE(8);
        CASE(10);
        CASE(16);
        CASE(17);
        CASE(18);
        CASE(19);
        CASE(20);
        CASE(21);
        CASE(22);
        CASE(23);
        CASE(24);
        CASE(25);
        CASE(26);
        CASE(27);
        CASE(28);
        CASE(29);
        CASE(30);
        CASE(31);
        CASE(32);
#undef CASE
    }
    wgmma_wait<1>();
    if (*before >= 0 && self->lane == 0) mbarrier_arrive(smem_address(&self->s->empty[*before]));
    *before = self->stage.i;
    self->stage.next(S::n_stages);
}

template <class S> static __device__ __forceinline__ void product(float (&acc)[S::columns / 2], consumer<S> *self, int width, int units) {
    uint32_t a[16], b[16];
    int before = -1; /* the stage of the unit before */
#pragma unroll
    for (int i = 0; i < S::columns / 2; i++) acc[i] = 0.f;
    decode_unit(a, self, self->stage);
#pragma unroll 1
    for (;;) {
        multiply_unit<S>(acc, a, self, width, &before);
        if (--units == 0) break;
        decode_unit(b, self, self->stage);
        multiply_unit<S>(acc, b, self, width, &before);
        if (--units == 0) break;
        decode_unit(a, self, self->stage);
    }
    wgmma_wait<0>();
    if (self->lane == 0) mbarrier_arrive(smem_address(&self->s->empty[before]));
}

#endif
