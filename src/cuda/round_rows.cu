/* Rows of x to what the products read, of every kind: prepare.cu has the one that most calls need. Rows may be multiplied by their slot's
 * weight first, may be NVFP4 already, may belong to a dispatcher's slots, of which only the listed ones are touched, and may
 * stay fp32 for unquantized experts. Where a row has one slot and its expert takes the prefill kernel, it goes straight into that kernel's
 * tiles. A block has a row at a time. */
#include "activation.cuh"
#include "prefill.cuh"
#include "slots.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)
#define MOST_BLOCKS 1024

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

/* v = the 16 elements of block b of a row that is not NVFP4; zeros past its end. */
static __device__ void load_block(float v[16], const moe4_layer_run &run, const source &s, int b) {
    int left = run.w.hidden - 16 * b, size = run.x_dtype == MOE4_F32 ? 4 : 2;
    const char *x = (const char *)run.x_in + (s.first + (size_t)(16 * b)) * (size_t)size;
    if (left >= 16) {
        load_16(v, x, run.x_dtype);
    } else {
        for (int i = 0; i < 16; i++) v[i] = i >= left ? 0.f : load_1(x, run.x_dtype, (size_t)i);
    }
    if (run.weight_x)
        for (int i = 0; i < 16; i++) v[i] = __fmul_rn(v[i], s.weight);
}

static __device__ uint32_t block_max(uint32_t v) {
    __shared__ uint32_t warp_max[WARPS];
    v = __reduce_max_sync(0xFFFFFFFFu, v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) warp_max[threadIdx.x >> 5] = v;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) v = max(v, warp_max[w]);
    return v;
}

static __device__ int block_sum(int v) {
    __shared__ int warp_sum[WARPS];
    v = __reduce_add_sync(0xFFFFFFFFu, v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) warp_sum[threadIdx.x >> 5] = v;
    __syncthreads();
    int sum = 0;
    for (int w = 0; w < WARPS; w++) sum += warp_sum[w];
    return sum;
}

/* The largest |x| of a row; first = the thread's first block of it. */
static __device__ uint32_t row_amax(float first[16], const moe4_layer_run &run, const source &s) {
    uint32_t amax = 0;
    fill_16(first, 0.f);
    if (16 * (int)threadIdx.x < run.w.hidden) load_block(first, run, s, (int)threadIdx.x);
    amax = amax_bits_16(first);
    for (int b = THREADS + (int)threadIdx.x; 16 * b < run.w.hidden; b += THREADS) {
        float v[16];
        load_block(v, run, s, b);
        amax = max(amax, amax_bits_16(v));
    }
    return block_max(amax);
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
    return {prefill_tile(run.x_tiles, tile, first, run.w.hidden_units), prefill_columns(tile.n), column, s.row};
}

/* Block b of a row, by a whole warp; lanes whose block is past the row's end store nothing. */
static __device__ void store_block(const moe4_layer_run &run, const target &to, int b, const float v[16]) {
    size_t at = (size_t)to.row * (size_t)(run.w.hidden_units * MOE4_UNIT_K) + (size_t)(16 * b);
    bool here = b < run.w.hidden_units * 4;
    if (to.tile) {
        uint4 chunk[2];
        prefill_chunks(chunk, v);
        prefill_store_chunks(to.tile, to.columns, to.column, b, run.w.hidden_units, chunk);
    } else if (here && run.act != MOE4_ACT_BF16) {
        store_bf16_16(run.x + at, v);
    } else if (here) {
        for (int i = 0; i < 4; i++) *(float4 *)(run.x_wide + at + 4 * i) = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
    }
}

/* Whether a warp has blocks of a row from its lanes' b on. */
static __device__ bool has_blocks(const moe4_layer_run &run, int b) {
    return (b & ~31) < run.w.hidden_units * 4;
}

static __device__ void finish_row(const moe4_layer_run &run, int row, bool bad, int saturated, float factor) {
    if (threadIdx.x) return;
    run.x_bad[row] = bad;
    run.x_saturated[row] = saturated;
    if (run.x_factor) run.x_factor[row] = factor;
}

static __device__ void round_row(const moe4_layer_run &run, const source &s) {
    float v[16], S = 1.f, decode = 1.f;
    uint32_t amax = row_amax(v, run, s);
    bool bad = amax >= MOE4_INF_BITS, rounds = run.act != MOE4_ACT_W4A16 && run.act != MOE4_ACT_BF16;
    target to = find_target(run, s);
    if (run.act == MOE4_ACT_TENSOR) amax = run.x_amax[run.slots_are == MOE4_SLOTS_DIAGONAL ? s.expert : 0];
    if (rounds && !bad) S = encode_scale(run.act, amax, run.w.scale_x, s.expert, &decode);
    int saturated = 0;
    for (int b = threadIdx.x; has_blocks(run, b); b += THREADS) {
        if (b >= THREADS) {
            fill_16(v, 0.f);
            if (16 * b < run.w.hidden) load_block(v, run, s, b);
        }
        if (bad)
            fill_16(v, __uint_as_float(0x7FFFFFFFu));
        else if (rounds)
            saturated += round_16(v, S);
        store_block(run, to, b, v);
    }
    if (rounds) saturated = block_sum(saturated);
    finish_row(run, s.row, bad, saturated, decode);
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
    int n_blocks = run.w.hidden / 16;
    const uint8_t *codes = run.x_rows.codes + s.given * (size_t)(run.w.hidden / 2);
    float factor = run.x_rows.global[run.x_rows.global_per_row ? s.given : 0] * s.weight;
    uint32_t most = 0;
    for (int b = threadIdx.x; b < n_blocks; b += THREADS) most = max(most, (uint32_t)given_scale(run, s.given, b));
    bool bad = block_max(most) > 0x7E || !isfinite(factor);
    target to = find_target(run, s);
    for (int b = threadIdx.x; has_blocks(run, b); b += THREADS) {
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

static __global__ void __launch_bounds__(THREADS) round_kernel(const __grid_constant__ moe4_layer_run run) {
    for (int i = blockIdx.x, n = n_sources(run); i < n; i += gridDim.x) {
        source s = find_source(run, i);
        if (run.x_dtype == MOE4_NVFP4)
            copy_row(run, s);
        else
            round_row(run, s);
    }
}

static __global__ void __launch_bounds__(THREADS) amax_kernel(const __grid_constant__ moe4_layer_run run) {
    for (int i = blockIdx.x, n = n_sources(run); i < n; i += gridDim.x) {
        source s = find_source(run, i);
        float first[16];
        uint32_t amax = row_amax(first, run, s);
        if (threadIdx.x == 0 && amax < MOE4_INF_BITS) atomicMax(run.x_amax + (run.slots_are == MOE4_SLOTS_DIAGONAL ? s.expert : 0), amax);
    }
}

cudaError_t moe4_cuda_round_rows(const moe4_layer_run *run, cudaStream_t stream) {
    long long rows = (long long)run->n_tokens * run->top_k;
    if (!rows) return cudaSuccess;
    unsigned blocks = (unsigned)(rows < MOST_BLOCKS ? rows : MOST_BLOCKS);
    if (run->act == MOE4_ACT_TENSOR && run->x_dtype != MOE4_NVFP4) {
        size_t n = run->slots_are == MOE4_SLOTS_DIAGONAL ? (size_t)run->w.n : 1;
        cudaError_t error = cudaMemsetAsync(run->x_amax, 0, n * sizeof *run->x_amax, stream);
        if (error != cudaSuccess) return error;
        amax_kernel<<<blocks, THREADS, 0, stream>>>(*run);
    }
    round_kernel<<<blocks, THREADS, 0, stream>>>(*run);
    return cudaGetLastError();
}
