/* Rows of x rounded to what the products read and put where they read them: in the rows of run.x, or in the columns of the prefill kernel's
 * tiles. G threads take a row. */
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

/* N blocks of 16 of a row: b, b + G, ...; zeros past its end. */
template <int G, int N> struct x_blocks {
    float v[N][16];
    uint32_t w[N][8]; /* bf16, as the products read them */

    __device__ __forceinline__ void load(const moe4_layer_run &run, int token, int b) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            fill_16(v[i], 0.f);
            if (b + G * i < run.w.hidden / 16) load_16(v[i], x_at(run, token, 16 * (b + G * i)), run.x_dtype);
        }
    }
    __device__ __forceinline__ uint32_t amax(void) const {
        uint32_t amax = 0;
#pragma unroll
        for (int i = 0; i < N; i++) amax = max(amax, amax_bits_16(v[i]));
        return amax;
    }
    /* Fills w; how many of the blocks saturate. */
    __device__ __forceinline__ uint32_t round(bool to_nvfp4, float S, bool bad) {
        uint32_t saturated = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (bad)
                fill_16(v[i], __uint_as_float(0x7FFFFFFFu));
            else if (to_nvfp4)
                saturated += (uint32_t)round_16(v[i], S);
            pack_bf16_16(w[i], v[i]);
        }
        return saturated;
    }
    /* Where slots [first, first + n) read them, by all lanes of a warp. */
    __device__ __forceinline__ void store(const moe4_layer_run &run, int row, int first, int n, int b) {
        bool tiled = moe4_cuda_tiles_x(&run), as_row = run.x_is_kept || !tiled;
        int lane = threadIdx.x & 31;
        moe4_prefill_place mine = {-1, 0, 0, 0};
        for (int k0 = 0; tiled && k0 < n; k0 += 32) { /* its first 32 slots' places stay at hand */
            moe4_prefill_place place = {0, 0, 0, 0};
            if (k0 + lane < n) place = run.x_places[first + k0 + lane];
            if (k0 == 0 && lane < n) mine = place;
            as_row |= __any_sync(0xFFFFFFFFu, place.base < 0 && local_expert(run, first + k0 + lane) >= 0);
        }
        __nv_bfloat16 *to = run.x + (size_t)row * (size_t)(run.w.hidden_units * MOE4_UNIT_K);
#pragma unroll
        for (int i = 0; i < N; i++)
            if (as_row && !run.window && b + G * i < run.w.hidden_units * 4) store_bf16_16(to + 16 * (b + G * i), w[i]);
        if (!tiled) return;
        uint4 chunk[N][2];
#pragma unroll
        for (int i = 0; i < N; i++) prefill_chunks(chunk[i], w[i]);
        for (int k0 = 0; k0 < n; k0 += 32) {
            if (k0) mine = k0 + lane < n ? run.x_places[first + k0 + lane] : moe4_prefill_place{-1, 0, 0, 0};
            for (uint32_t left = __ballot_sync(0xFFFFFFFFu, mine.base >= 0 && mine.window == run.window); left; left &= left - 1) {
                int at = __ffs(left) - 1, base = __shfl_sync(0xFFFFFFFFu, mine.base, at);
                int column = __shfl_sync(0xFFFFFFFFu, (int)mine.column, at), nt = 16 * __shfl_sync(0xFFFFFFFFu, (int)mine.steps, at);
                __nv_bfloat16 *tile = run.x_tiles + (size_t)base * (size_t)(run.w.hidden_units * MOE4_UNIT_K);
#pragma unroll
                for (int i = 0; i < N; i++) prefill_store_chunks(tile, nt, column, b + G * i, run.w.hidden_units, chunk[i]);
            }
        }
    }
};

/* Blocks of a row that stay in registers while its largest |x| is looked for: a row of 8192. Those past them are loaded twice. */
#define MOE4_KEPT_BLOCKS 512

/* A row of x, or in STATIC a slot's, as experts have their own input scales. WAITS: the kernel that places slots may still run until the
 * row is there and rounded. */
template <bool WAITS, int G> static __device__ void put_x_row(const moe4_layer_run &run, int row) {
    constexpr int N = MOE4_KEPT_BLOCKS / G;
    bool by_slot = run.act == MOE4_ACT_STATIC;
    int token = by_slot ? row / run.top_k : row, expert = by_slot ? local_expert(run, row) : 0, t = (int)threadIdx.x % G;
    int first = by_slot ? row : row * run.top_k, n = by_slot ? 1 : run.top_k, blocks = run.w.hidden_units * 4;
    x_blocks<G, N> kept;
    kept.load(run, token, t);
    uint32_t amax = kept.amax(), saturated = 0;
    for (int b = t + N * G; b < blocks; b += G) {
        x_blocks<G, 1> other;
        other.load(run, token, b);
        amax = max(amax, other.amax());
    }
    amax = reduce_row<G, 1, true>(amax);
    bool bad = amax >= MOE4_INF_BITS, to_nvfp4 = run.act != MOE4_ACT_W4A16;
    float S = 1.f, decode = 1.f;
    if (to_nvfp4 && !bad && expert >= 0)
        S = encode_scale(run.act, run.act == MOE4_ACT_TENSOR ? *run.x_amax : amax, run.w.scale_x, expert, &decode);
    if (expert >= 0) saturated = kept.round(to_nvfp4, S, bad);
#if __CUDA_ARCH__ == 900
    if (WAITS) dependency_wait();
#endif
    if (t == 0 && (!by_slot || row % run.top_k == 0)) run.x_bad[token] = bad;
    if (expert >= 0) kept.store(run, row, first, n, t);
    for (int b = t + N * G; expert >= 0 && (b & ~31) < blocks; b += G) {
        x_blocks<G, 1> other;
        other.load(run, token, b);
        saturated += other.round(to_nvfp4, S, bad);
        other.store(run, row, first, n, b);
    }
    if (to_nvfp4) saturated = reduce_row<G, 1, false>(saturated);
    if (t) return;
    run.x_saturated[row] = (int)saturated;
    if (run.x_factor && expert >= 0) run.x_factor[row] = decode;
}

#endif
