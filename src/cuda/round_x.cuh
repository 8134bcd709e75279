/* Rows of x rounded to what the products read and put where they read them: in the rows of run.x, or in the columns of the prefill kernel's
 * tiles. G threads take a row, and ROWS rows a block. */
#ifndef MOE4_CUDA_ROUND_X_CUH
#define MOE4_CUDA_ROUND_X_CUH

#include "activation.cuh"
#include "prefill.cuh"
#include "slots.cuh"

/* Waits for the other threads of a row, of which a block has 1, 2 or 4. Barriers have constant numbers: for others a block is given all. */
template <int ID, int G> static __device__ __forceinline__ void sync_one(void) {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(G) : "memory");
}
template <int G, int ROWS> static __device__ __forceinline__ void row_sync(void) {
    static_assert(ROWS == 1 || ROWS == 2 || ROWS == 4, "rows of a block");
    int row = (int)threadIdx.x / G;
    if (ROWS == 1)
        __syncthreads();
    else if (row == 0)
        sync_one<1, G>();
    else if (row == 1)
        sync_one<2, G>();
    else if (row == 2)
        sync_one<ROWS == 4 ? 3 : 1, G>();
    else
        sync_one<ROWS == 4 ? 4 : 1, G>();
}

/* Over the threads of a row; the largest or the sum. */
template <int G, int ROWS, bool MAX> static __device__ uint32_t reduce_row(uint32_t v) {
    __shared__ uint32_t by_warp[G * ROWS / 32];
    int first = (int)threadIdx.x / G * (G / 32);
    v = MAX ? __reduce_max_sync(0xFFFFFFFFu, v) : __reduce_add_sync(0xFFFFFFFFu, v);
    row_sync<G, ROWS>(); /* what was there has been read */
    if ((threadIdx.x & 31) == 0) by_warp[threadIdx.x >> 5] = v;
    row_sync<G, ROWS>();
    v = by_warp[first];
    for (int w = 1; w < G / 32; w++) v = MAX ? max(v, by_warp[first + w]) : v + by_warp[first + w];
    return v;
}

static __device__ const void *x_at(const moe4_layer_run &run, int token, int k) {
    size_t i = (size_t)token * run.x_in_ld + (size_t)k;
    return (const char *)run.x_in + i * (run.x_dtype == MOE4_F32 ? 4 : 2);
}

/* A row's way to L2, by the block. */
static __device__ void x_row_fetch(const moe4_layer_run &run, int token) {
    int step = run.x_dtype == MOE4_F32 ? 32 : 64; /* a line */
    for (int k = step * (int)threadIdx.x; k < run.w.hidden; k += step * (int)blockDim.x) prefetch_l2(x_at(run, token, k));
}

/* The largest |x| of a row; v = the thread's first block of it. */
template <int G, int ROWS> static __device__ uint32_t x_row_amax(const moe4_layer_run &run, int token, float v[16]) {
    int blocks = run.w.hidden / 16, t = (int)threadIdx.x % G;
    fill_16(v, 0.f);
    if (t < blocks) load_16(v, x_at(run, token, 16 * t), run.x_dtype);
    uint32_t amax = amax_bits_16(v);
#pragma unroll 2
    for (int b = t + G; b < blocks; b += G) {
        float other[16];
        load_16(other, x_at(run, token, 16 * b), run.x_dtype);
        amax = max(amax, amax_bits_16(other));
    }
    return reduce_row<G, ROWS, true>(amax);
}

/* Block b of a row that slots [first, first + n) read, by all lanes of a warp; `here`: the row has such a block. */
static __device__ void store_x_block(const moe4_layer_run &run, int row, int first, int n, int b, bool here, const uint32_t w[8]) {
    bool as_row = run.x_is_kept || !moe4_cuda_tiles_x(&run);
    if (moe4_cuda_tiles_x(&run)) {
        int lane = threadIdx.x & 31;
        uint4 chunk[2];
        prefill_chunks(chunk, w);
        for (int k0 = 0; k0 < n; k0 += 32) {
            moe4_prefill_place mine = {-1, 0, 0, 0};
            if (k0 + lane < n) mine = run.x_places[first + k0 + lane];
            bool is_decoded = mine.base < 0 && k0 + lane < n && local_expert(run, first + k0 + lane) >= 0;
            as_row |= __any_sync(0xFFFFFFFFu, is_decoded);
            for (uint32_t tiled = __ballot_sync(0xFFFFFFFFu, mine.base >= 0 && mine.window == run.window); tiled; tiled &= tiled - 1) {
                int at = __ffs(tiled) - 1, base = __shfl_sync(0xFFFFFFFFu, mine.base, at);
                int column = __shfl_sync(0xFFFFFFFFu, (int)mine.column, at), nt = 16 * __shfl_sync(0xFFFFFFFFu, (int)mine.steps, at);
                __nv_bfloat16 *tile = run.x_tiles + (size_t)base * (size_t)(run.w.hidden_units * MOE4_UNIT_K);
                prefill_store_chunks(tile, nt, column, b, run.w.hidden_units, chunk);
            }
        }
    }
    if (as_row && here && !run.window) store_bf16_16(run.x + (size_t)row * (size_t)(run.w.hidden_units * MOE4_UNIT_K) + 16 * b, w);
}

/* Rows that the products read as they are. */
static __host__ bool copies_x(const moe4_layer_run &run) {
    return run.act == MOE4_ACT_W4A16 && run.x_dtype == MOE4_BF16 && ((uintptr_t)run.x_in & 15) == 0 && run.x_in_ld % 8 == 0;
}

/* A block of 16 bf16 of such a row; what is larger, the numbers' bits without signs or `amax`, by halves. */
static __device__ __forceinline__ uint32_t load_words(uint32_t w[8], const moe4_layer_run &run, int token, int b, uint32_t amax) {
    const uint4 *from = (const uint4 *)x_at(run, token, 16 * b);
    *(uint4 *)w = __ldcg(from);
    *(uint4 *)(w + 4) = __ldcg(from + 1);
#pragma unroll
    for (int i = 0; i < 8; i++) amax = __vmaxu2(amax, w[i] & 0x7FFF7FFFu);
    return amax;
}

/* The same as round_x_row without a conversion to and fro, which is most of its instructions. */
template <int G, int ROWS> static __device__ void copy_x_row(const moe4_layer_run &run, int row) {
    int t = (int)threadIdx.x % G, blocks = run.w.hidden / 16;
    uint32_t w[8] = {0}, amax = 0;
    if (t < blocks) amax = load_words(w, run, row, t, amax);
#pragma unroll 3
    for (int b = t + G; b < blocks; b += G) {
        uint32_t other[8];
        amax = load_words(other, run, row, b, amax);
    }
    bool bad = reduce_row<G, ROWS, true>(max(amax & 0xFFFF, amax >> 16)) >= MOE4_INF_BITS >> 16;
    for (int b = t; (b & ~31) < run.w.hidden_units * 4; b += G) {
        if (b >= G) {
            for (int i = 0; i < 8; i++) w[i] = 0;
            if (b < blocks) load_words(w, run, row, b, 0);
        }
        for (int i = 0; bad && i < 8; i++) w[i] = 0x7FFF7FFFu; /* NaNs */
        store_x_block(run, row, row * run.top_k, run.top_k, b, b < run.w.hidden_units * 4, w);
    }
    if (t) return;
    run.x_bad[row] = bad;
    run.x_saturated[row] = 0;
}

/* A row of x: token's, or in STATIC slot's, as experts have their own input scales. */
template <int G, int ROWS> static __device__ void round_x_row(const moe4_layer_run &run, int row) {
    bool by_slot = run.act == MOE4_ACT_STATIC;
    int token = by_slot ? row / run.top_k : row, expert = by_slot ? local_expert(run, row) : 0, t = (int)threadIdx.x % G;
    float v[16];
    uint32_t amax = x_row_amax<G, ROWS>(run, token, v);
    bool bad = amax >= MOE4_INF_BITS;
    if (t == 0 && (!by_slot || row % run.top_k == 0)) run.x_bad[token] = bad;
    if (expert < 0) {
        if (t == 0) run.x_saturated[row] = 0;
        return;
    }
    float S = 1.f, decode = 1.f;
    if (run.act != MOE4_ACT_W4A16 && !bad)
        S = encode_scale(run.act, run.act == MOE4_ACT_TENSOR ? *run.x_amax : amax, run.w.scale_x, expert, &decode);
    uint32_t saturated = 0;
    int first = by_slot ? row : row * run.top_k, n = by_slot ? 1 : run.top_k, blocks = run.w.hidden_units * 4;
    for (int b = t; (b & ~31) < blocks; b += G) {
        bool here = b < blocks;
        if (b >= G) {
            fill_16(v, 0.f);
            if (b < run.w.hidden / 16) load_16(v, x_at(run, token, 16 * b), run.x_dtype);
        }
        if (bad)
            fill_16(v, __uint_as_float(0x7FFFFFFFu));
        else if (run.act != MOE4_ACT_W4A16 && here)
            saturated += (uint32_t)round_16(v, S);
        uint32_t w[8];
        pack_bf16_16(w, v);
        store_x_block(run, row, first, n, b, here, w);
    }
    if (run.act != MOE4_ACT_W4A16) saturated = reduce_row<G, ROWS, false>(saturated);
    if (t == 0) {
        run.x_saturated[row] = (int)saturated;
        if (run.x_factor) run.x_factor[row] = decode;
    }
}

template <bool COPIES, int G, int ROWS> static __device__ __forceinline__ void put_x_row(const moe4_layer_run &run, int row) {
    if (COPIES)
        copy_x_row<G, ROWS>(run, row);
    else
        round_x_row<G, ROWS>(run, row);
}

#endif
