/* Rows of x to what the products read, of every kind: prepare.cu has the one that most calls need. Rows may be multiplied by their slot's
 * weight first, may be NVFP4 already, may belong to a dispatcher's slots, of which only the listed ones are touched, and may
 * stay fp32 for unquantized experts. Where a row has one slot and its expert takes the prefill kernel, it goes straight into that kernel's
 * tiles. */
#include "round_x.cuh"

#define ROW_THREADS 128 /* of a row */
#define ROWS 2          /* of a block */
#define THREADS (ROWS * ROW_THREADS)
#define MOST_BLOCKS 4096
#define AT_ONCE 4 /* blocks of 16 elements of two bytes whose loads are under way in a thread */

/* A row of x as the products see it, and where it comes from. */
struct source {
    int row;             /* of the run's x: token, slot, or (DIAGONAL, for who reads it as h) place in the list of slots */
    int place;           /* in the list of slots, where the row has one slot */
    int expert;          /* whose input scale it takes */
    size_t given, first; /* row of the caller's x; its first element where rows are not NVFP4 */
    float weight;
};

static __device__ bool takes_slots(const moe4_layer_run &run) {
    return run.slots_are != MOE4_SLOTS_BY_ID || x_is_by_slot(run);
}

static __device__ int n_sources(const moe4_layer_run &run) {
    return takes_slots(run) ? run.state->n_slots : run.n_tokens;
}

static __device__ source find_source(const moe4_layer_run &run, int i) {
    if (!takes_slots(run)) return {i, i, 0, (size_t)i, (size_t)i * run.x_in_ld, 1.f};
    int slot = run.slots[i], part = slot % run.top_k;
    size_t given = (size_t)(slot / run.top_k), first = given * run.x_in_ld;
    bool diagonal = run.slots_are == MOE4_SLOTS_DIAGONAL;
    if (diagonal) {
        given = (size_t)slot;
        first += (size_t)part * (size_t)run.w.hidden;
    }
    return {diagonal ? i : slot, i, slot_expert(run, slot), given, first, run.weight_x ? run.weight_x[slot] : 1.f};
}

static __device__ bool is_wide(const moe4_layer_run &run) {
    return run.x_dtype == MOE4_F32;
}

/* v = the 16 elements of block b of a row that is not NVFP4, wherever it begins and ends; zeros past its end. */
static __device__ void load_any_block(float v[16], const moe4_layer_run &run, const source &s, int b) {
    int left = run.w.hidden - 16 * b;
    const char *x = (const char *)run.x_in + (s.first + (size_t)(16 * b)) * (is_wide(run) ? 4 : 2);
    if (left >= 16)
        load_16(v, x, run.x_dtype);
    else
        for (int i = 0; i < 16; i++) v[i] = i >= left ? 0.f : load_1(x, run.x_dtype, (size_t)i);
}

template <bool WIDE> struct raw_block { uint4 word[WIDE ? 4 : 2]; };

template <bool WIDE> static __device__ __forceinline__ void widen_block(float v[16], const raw_block<WIDE> &raw, moe4_dtype dtype) {
    const uint32_t *w = (const uint32_t *)raw.word;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        uint32_t half = w[i / 2] >> 16 * (i & 1) & 0xFFFF;
        v[i] = WIDE                 ? __uint_as_float(w[i])
               : dtype == MOE4_BF16 ? __uint_as_float(half << 16)
                                    : __half2float(__ushort_as_half((unsigned short)half));
    }
}

/* f(b, v) for this thread's blocks of a row, in all lanes of a warp that has some; zeros past the row's end. The loads of several are under
 * way together. */
template <bool WIDE, class F> static __device__ __forceinline__ void for_blocks(const moe4_layer_run &run, const source &s, F f) {
    constexpr int n_raw = WIDE ? AT_ONCE / 2 : AT_ONCE;
    const char *x = (const char *)run.x_in + s.first * (WIDE ? 4 : 2);
    int aligned = ((uintptr_t)x & 15) == 0 ? run.w.hidden / 16 : 0, n = run.w.hidden_units * 4;
    for (int b0 = (int)threadIdx.x % ROW_THREADS; (b0 & ~31) < n; b0 += n_raw * ROW_THREADS) {
        raw_block<WIDE> raw[n_raw];
#pragma unroll
        for (int j = 0; j < n_raw; j++)
            if (b0 + j * ROW_THREADS < aligned) {
                const uint4 *from = (const uint4 *)(x + (size_t)(b0 + j * ROW_THREADS) * (WIDE ? 64 : 32));
#pragma unroll
                for (int i = 0; i < (WIDE ? 4 : 2); i++) raw[j].word[i] = from[i];
            }
#pragma unroll
        for (int j = 0; j < n_raw; j++) {
            int b = b0 + j * ROW_THREADS;
            float v[16];
            if ((b & ~31) >= n) break;
            if (b < aligned) {
                widen_block<WIDE>(v, raw[j], run.x_dtype);
            } else {
                fill_16(v, 0.f);
                if (16 * b < run.w.hidden) load_any_block(v, run, s, b);
            }
            if (run.weight_x)
                for (int i = 0; i < 16; i++) v[i] = __fmul_rn(v[i], s.weight);
            f(b, v);
        }
    }
}

template <bool WIDE> static __device__ uint32_t row_amax(const moe4_layer_run &run, const source &s) {
    uint32_t amax = 0;
    for_blocks<WIDE>(run, s, [&](int, const float v[16]) { amax = max(amax, amax_bits_16(v)); });
    return reduce_row<ROW_THREADS, ROWS, true>(amax);
}

/* Where a rounded row goes. */
struct target {
    __nv_bfloat16 *tile; /* of the prefill kernel; NULL: a row of run.x or x_wide */
    int columns, column; /* of the tile, rounded up; the row's */
    int row;
};

static __device__ target find_target(const moe4_layer_run &run, const source &s) {
    target none = {NULL, 0, 0, s.row};
    if (!run.prefill_from || !moe4_cuda_rows_are_slots(&run)) return none;
    int first = 0, end = run.state->n_prefill_tiles; /* tiles stand in the order of their slots */
    while (end - first > 1) {
        int middle = (first + end) / 2;
        if (run.prefill_tiles[middle].first <= s.place)
            first = middle;
        else
            end = middle;
    }
    if (first == end) return none;
    moe4_tile tile = run.prefill_tiles[first];
    int column = s.place - tile.first;
    if (column < 0 || column >= tile.n) return none;
    return {prefill_tile(run.x_tiles, tile, run.w.hidden_units), prefill_columns(tile.n), column, s.row};
}

/* Block b of a row, by a whole warp; lanes whose block is past the row's end store nothing. */
static __device__ void store_block(const moe4_layer_run &run, const target &to, int b, const float v[16]) {
    size_t at = (size_t)to.row * (size_t)(run.w.hidden_units * MOE4_UNIT_K) + (size_t)(16 * b);
    bool here = b < run.w.hidden_units * 4;
    uint32_t w[8];
    if (to.tile) {
        uint4 chunk[2];
        pack_bf16_16(w, v);
        prefill_chunks(chunk, w);
        prefill_store_chunks(to.tile, to.columns, to.column, b, run.w.hidden_units, chunk);
    } else if (here && run.act != MOE4_ACT_BF16) {
        pack_bf16_16(w, v);
        store_bf16_16(run.x + at, w);
    } else if (here) {
        for (int i = 0; i < 4; i++) *(float4 *)(run.x_wide + at + 4 * i) = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
    }
}

static __device__ void finish_row(const moe4_layer_run &run, int row, bool bad, int saturated, float factor) {
    if (threadIdx.x % ROW_THREADS) return;
    run.x_bad[row] = bad;
    run.x_saturated[row] = saturated;
    if (run.x_factor) run.x_factor[row] = factor;
}

/* A row that is not rounded to NVFP4 is read once: a NaN in it makes its products NaN, and an Inf becomes one. */
template <bool WIDE> static __device__ void convert_row(const moe4_layer_run &run, const source &s) {
    target to = find_target(run, s);
    uint32_t amax = 0;
    for_blocks<WIDE>(run, s, [&](int b, float v[16]) {
        uint32_t most = amax_bits_16(v);
        if (most >= MOE4_INF_BITS)
            for (int i = 0; i < 16; i++) v[i] = isfinite(v[i]) ? v[i] : __uint_as_float(0x7FFFFFFFu);
        amax = max(amax, most);
        store_block(run, to, b, v);
    });
    finish_row(run, s.row, reduce_row<ROW_THREADS, ROWS, true>(amax) >= MOE4_INF_BITS, 0, 1.f);
}

template <bool WIDE> static __device__ void round_row(const moe4_layer_run &run, const source &s) {
    uint32_t amax = row_amax<WIDE>(run, s), saturated = 0;
    float S = 1.f, decode = 1.f;
    bool bad = amax >= MOE4_INF_BITS;
    target to = find_target(run, s);
    if (run.act == MOE4_ACT_TENSOR) amax = run.x_amax[run.slots_are == MOE4_SLOTS_DIAGONAL ? s.expert : 0];
    if (!bad) S = encode_scale(run.act, amax, run.w.scale_x, s.expert, &decode);
    for_blocks<WIDE>(run, s, [&](int b, float v[16]) {
        if (bad)
            fill_16(v, __uint_as_float(0x7FFFFFFFu));
        else
            saturated += (uint32_t)round_16(v, S);
        store_block(run, to, b, v);
    });
    finish_row(run, s.row, bad, (int)reduce_row<ROW_THREADS, ROWS, false>(saturated), decode);
}

/* ---- rows that are NVFP4 already ---- */

/* The scale byte of a row's block; docs/format.md has the layouts. */
static __device__ uint8_t given_scale(const moe4_layer_run &run, size_t row, int b) {
    const uint8_t *scales = (const uint8_t *)run.x_rows.scales;
    size_t n_blocks = (size_t)(run.w.hidden / 16), n_quads = (n_blocks + 3) / 4, quad = (size_t)b / 4, in_quad = (size_t)b % 4;
    if (run.x_rows.layout == MOE4_SCALES_LINEAR) return scales[row * n_blocks + (size_t)b];
    if (run.x_rows.layout == MOE4_SCALES_WORDS) return scales[4 * (quad * (size_t)run.n_tokens + row) + in_quad];
    return scales[512 * (row / 128 * n_quads + quad) + row % 32 * 16 + row % 128 / 32 * 4 + in_quad];
}

static __device__ void copy_row(const moe4_layer_run &run, const source &s) {
    int n_blocks = run.w.hidden / 16, t = (int)threadIdx.x % ROW_THREADS;
    const uint8_t *codes = run.x_rows.codes + s.given * (size_t)(run.w.hidden / 2);
    float factor = run.x_rows.global[run.x_rows.global_per_row ? s.given : 0] * s.weight;
    uint32_t most = 0;
    for (int b = t; b < n_blocks; b += ROW_THREADS) most = max(most, (uint32_t)given_scale(run, s.given, b));
    bool bad = reduce_row<ROW_THREADS, ROWS, true>(most) > 0x7E || !isfinite(factor);
    target to = find_target(run, s);
    for (int b = t; (b & ~31) < run.w.hidden_units * 4; b += ROW_THREADS) {
        float v[16];
        fill_16(v, 0.f);
        if (b < n_blocks && !bad) {
            float scale = e4m3_value(given_scale(run, s.given, b));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                uint32_t pair = codes[8 * b + i];
                v[2 * i] = copysignf(e2m1_value(pair & 7) * scale, pair & 8 ? -1.f : 1.f);
                v[2 * i + 1] = copysignf(e2m1_value(pair >> 4 & 7) * scale, pair & 0x80 ? -1.f : 1.f);
            }
        }
        store_block(run, to, b, v);
    }
    finish_row(run, s.row, bad, 0, bad ? __uint_as_float(0x7FFFFFFFu) : factor);
}

/* ---- kernels ---- */

/* The rows of a block, in turn; a row's threads wait for each other alone. */
template <class F> static __device__ __forceinline__ void for_rows(const moe4_layer_run &run, F f) {
    for (int i = (int)blockIdx.x * ROWS + (int)threadIdx.x / ROW_THREADS, n = n_sources(run); i < n; i += (int)gridDim.x * ROWS)
        f(find_source(run, i));
}

static __global__ void __launch_bounds__(THREADS, 3) copy_kernel(const __grid_constant__ moe4_layer_run run) {
    for_rows(run, [&](const source &s) { copy_row(run, s); });
}

template <bool WIDE> static __global__ void __launch_bounds__(THREADS, 3) convert_kernel(const __grid_constant__ moe4_layer_run run) {
    for_rows(run, [&](const source &s) { convert_row<WIDE>(run, s); });
}

template <bool WIDE> static __global__ void __launch_bounds__(THREADS, 2) round_kernel(const __grid_constant__ moe4_layer_run run) {
    for_rows(run, [&](const source &s) { round_row<WIDE>(run, s); });
}

template <bool WIDE> static __global__ void __launch_bounds__(THREADS, 3) amax_kernel(const __grid_constant__ moe4_layer_run run) {
    for_rows(run, [&](const source &s) {
        uint32_t amax = row_amax<WIDE>(run, s);
        if (threadIdx.x % ROW_THREADS || amax >= MOE4_INF_BITS) return;
        atomicMax(run.x_amax + (run.slots_are == MOE4_SLOTS_DIAGONAL ? s.expert : 0), amax);
    });
}

cudaError_t moe4_cuda_round_rows(const moe4_layer_run *run, cudaStream_t stream) {
    long long rows = (long long)run->n_tokens * run->top_k, all = (rows + ROWS - 1) / ROWS;
    if (!rows) return cudaSuccess;
    unsigned blocks = (unsigned)(all < MOST_BLOCKS ? all : MOST_BLOCKS); /* of max_rows, few may be there */
    bool wide = run->x_dtype == MOE4_F32;
    if (run->x_dtype == MOE4_NVFP4) {
        copy_kernel<<<blocks, THREADS, 0, stream>>>(*run);
        return cudaGetLastError();
    }
    if (run->act == MOE4_ACT_W4A16 || run->act == MOE4_ACT_BF16) {
        (wide ? convert_kernel<true> : convert_kernel<false>)<<<blocks, THREADS, 0, stream>>>(*run);
        return cudaGetLastError();
    }
    if (run->act == MOE4_ACT_TENSOR) {
        size_t n = run->slots_are == MOE4_SLOTS_DIAGONAL ? (size_t)run->w.n : 1;
        cudaError_t error = cudaMemsetAsync(run->x_amax, 0, n * sizeof *run->x_amax, stream);
        if (error != cudaSuccess) return error;
        (wide ? amax_kernel<true> : amax_kernel<false>)<<<blocks, THREADS, 0, stream>>>(*run);
    }
    (wide ? round_kernel<true> : round_kernel<false>)<<<blocks, THREADS, 0, stream>>>(*run);
    return cudaGetLastError();
}
