/* Block scales from one layout to another. */
#include "codec.cuh"

/* Row and quad of dst's word i; rows past the matrix are padding. Index is 32 bits wide where that is enough: divisions are what this
 * costs. */
template <class Index>
static __device__ void word_place(moe4_scale_layout layout, Index rows, Index n_quads, Index i, Index *row, Index *quad) {
    if (layout == MOE4_SCALES_128X4) {
        Index tile = i / 128, in_tile = i % 128;
        *row = tile / n_quads * 128 + in_tile % 4 * 32 + in_tile / 4;
        *quad = tile % n_quads;
    } else if (layout == MOE4_SCALES_WORDS) {
        *row = i % rows;
        *quad = i / rows;
    } else {
        *row = i / n_quads;
        *quad = i % n_quads;
    }
}

template <class Index>
static __global__ void __launch_bounds__(THREADS) convert_kernel(const __grid_constant__ moe4_scales_conversion s, Index n_words) {
    Index rows = (Index)s.rows, n_quads = (Index)((s.n_blocks + 3) / 4), row, quad;
    for (size_t matrix = blockIdx.y; matrix < s.n_matrices; matrix += gridDim.y)
        for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n_words; i += (size_t)gridDim.x * THREADS) {
            word_place(s.dst_layout, rows, n_quads, (Index)i, &row, &quad);
            size_t n = min((size_t)4, s.n_blocks - 4 * (size_t)quad);
            uint8_t *to = s.dst + matrix * s.dst_bytes + moe4_scales_at(s.dst_layout, s.rows, s.n_blocks, row, quad);
            bool inside = row < rows;
            const uint8_t *from = s.src + matrix * s.src_bytes + (inside ? moe4_scales_at(s.src_layout, s.rows, s.n_blocks, row, quad) : 0);
            if (n == 4 && (((uintptr_t)to | (uintptr_t)from) & 3) == 0) {
                *(uint32_t *)to = inside ? *(const uint32_t *)from : 0;
                continue;
            }
            for (size_t k = 0; k < (s.dst_layout == MOE4_SCALES_LINEAR ? n : 4); k++) to[k] = inside && k < n ? from[k] : 0;
        }
}

cudaError_t moe4_cuda_scales_convert(const moe4_scales_conversion *s, cudaStream_t stream) {
    size_t rows = s->dst_layout == MOE4_SCALES_128X4 ? (s->rows + 127) / 128 * 128 : s->rows, n_words = rows * ((s->n_blocks + 3) / 4);
    if (!n_words || !s->n_matrices) return cudaSuccess;
    dim3 grid(grid_for((n_words + 31) / 32), (unsigned)(s->n_matrices < 65535 ? s->n_matrices : 65535));
    if (n_words < (size_t)1 << 31)
        convert_kernel<uint32_t><<<grid, THREADS, 0, stream>>>(*s, (uint32_t)n_words);
    else
        convert_kernel<size_t><<<grid, THREADS, 0, stream>>>(*s, n_words);
    return cudaGetLastError();
}
