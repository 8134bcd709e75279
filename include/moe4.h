/* moe4: 4-bit (NVFP4) linear and mixture-of-experts layers.
 *
 * What is computed, bit by bit where bits are promised, is docs/numerics.md; file formats are docs/format.md.
 *
 * Conventions, true of every function unless it says otherwise:
 * - Shapes are written [rows, cols], row-major, the last dimension contiguous. A leading dimension (`ld`) counts elements
 *   from one row to the next; 0 means "contiguous". Buffers need the natural alignment of their element type, workspaces 64 bytes.
 * - The destination comes first. Results are written only when MOE4_OK is returned; a created object is NULL otherwise.
 * - Inputs are borrowed for the call. What an object keeps borrowing (weights, a checkpoint) is stated at its create function.
 * - A context and all that is made from it may be used by several threads at once; creating and destroying one object is for one
 *   thread, and a context outlives what was made from it.
 * - On failure moe4_ctx_error() has a sentence that names the thing and the numbers. It belongs to the calling thread.
 * - Option structs begin with struct_size; fill them with their _INIT, as the structs that come back (info, stats, report). A NULL option
 *   struct means all defaults.
 * - A pointer that may be NULL is said to; a NULL object is not looked for. Destroy, close and free ignore NULL, and no call that uses the
 *   object may be under way.
 * - `stream` is the device's, a cudaStream_t: the call's work is queued there, and NULL is the default stream. On the CPU it is not looked
 *   at, and a call returns when its results are written.
 */
#ifndef MOE4_H
#define MOE4_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOE4_VERSION_MAJOR 0
#define MOE4_VERSION_MINOR 1
#define MOE4_VERSION_PATCH 0

#if defined(__GNUC__)
#define MOE4_API __attribute__((visibility("default")))
#else
#define MOE4_API
#endif

/* "0.1.0", static. */
MOE4_API const char *moe4_version(void);

/* ---- status ------------------------------------------------------------------------------------------------------------------ */

typedef enum moe4_status {
    MOE4_OK = 0,
    MOE4_ERROR_ARGUMENT = 1,    /* the caller's argument: a size, a pointer, an option */
    MOE4_ERROR_FORMAT = 2,      /* a file, or what it holds, is malformed or implausible */
    MOE4_ERROR_UNSUPPORTED = 3, /* well-formed, but moe4 does not run it */
    MOE4_ERROR_NOT_FOUND = 4,   /* a file or tensor that should be there is not */
    MOE4_ERROR_MEMORY = 5,      /* an allocation failed */
    MOE4_ERROR_IO = 6,          /* the system refused to open, map, read or write */
    MOE4_ERROR_DEVICE = 7       /* the device, its driver or its plug-in */
} moe4_status;

/* A few words for a status, static; never NULL. */
MOE4_API const char *moe4_status_text(moe4_status status);

/* ---- context ----------------------------------------------------------------------------------------------------------------- */

typedef struct moe4_ctx moe4_ctx;

/* Bits of moe4_ctx_options.isa_mask. MOE4_ISA_SCALAR is the readable reference and always there. */
#define MOE4_ISA_SCALAR 1u
#define MOE4_ISA_AVX2 2u       /* AVX2 + FMA + F16C */
#define MOE4_ISA_AVX512VNNI 4u /* AVX-512 F, BW, VL, DQ, VBMI and VNNI: Ice Lake, Zen 4 and later */
#define MOE4_ISA_AVX512BF16 8u /* and BF16 */
#define MOE4_ISA_NEON 16u      /* every AArch64 CPU */
#define MOE4_ISA_NEONDOT 32u   /* and int8 dot products (SDOT) */
#define MOE4_ISA_NEONI8MM 64u  /* and int8 matrix products (SMMLA) */

/* alloc: `bytes` > 0 at a multiple of `align` (a power of two), or NULL. free takes what alloc gave. Both may be called from any thread.
 * All memory of the library comes from here, but for what others take for themselves: jansson for the trees of config.json, index and
 * headers while a checkpoint is opened, the system for threads and mapped files. */
typedef void *(*moe4_alloc_fn)(void *user, size_t bytes, size_t align);
typedef void (*moe4_free_fn)(void *user, void *data);
/* One line without a newline; may be called from any thread. */
typedef void (*moe4_log_fn)(void *user, const char *line);

/* fn(arg, task) for one task. */
typedef void (*moe4_task_fn)(void *arg, size_t task);
/* An engine's own threads instead of moe4's: fn(arg, task) exactly once for each task < n_tasks, in any order and on any threads; returns
 * when all of them have. moe4 asks for at most n_threads tasks at a time, which share the work out among themselves, so none needs to wait
 * for another and running all of them one after the other is correct. It is called from every thread that calls moe4, from several at
 * once, also inside a task of the engine's that calls moe4; moe4's own tasks never call it. It cannot fail (with no thread to spare it
 * runs the tasks itself) and must not unwind through moe4. What a task wrote must be seen by the thread that asked, as a join sees it.
 * The floating-point settings of its threads do not matter. */
typedef void (*moe4_run_fn)(void *user, size_t n_tasks, moe4_task_fn fn, void *arg);

/* The folder of options.cache must be there; the copy of its path is the context's. What layers, linears and grouped linears pack of NVFP4
 * weights is written to a file in it, and found again by a digest of all that went in: codes, scales, shapes and the layout's name; and
 * checked, byte for byte, by a digest of what is in it. Contexts, processes and users of other ISAs may share the folder, at once too. No
 * call fails for its sake: a file that is damaged is replaced, one that cannot be written is not, and the log hears why. Files may be
 * deleted at any time, but not written to; who can write there decides what is computed. A device keeps files of its own there. */
typedef struct moe4_ctx_options {
    size_t struct_size;
    size_t n_threads;    /* 0: as many as the affinity mask and the cgroup's CPU quota allow; the calling thread counts as one. A thread
                          * without work looks for some for 50 microseconds, then it sleeps */
    uint32_t isa_mask;   /* 0: everything this CPU has; otherwise the MOE4_ISA_ bits that may be used (SCALAR always may) */
    const char *device;  /* NULL or "cpu"; "cuda" or "cuda:N" when libmoe4_cuda.so is there */
    moe4_alloc_fn alloc; /* both or neither; NULL: the C library's */
    moe4_free_fn free;
    void *alloc_user;
    moe4_log_fn log; /* NULL: silent */
    void *log_user;
    moe4_run_fn run; /* NULL: threads of moe4's own; otherwise none are started, and n_threads is how many this runs on at once */
    void *run_user;
    const char *cache; /* a folder that keeps packed weights, so that the next object of the same weights maps them; NULL: none */
} moe4_ctx_options;
#define MOE4_CTX_OPTIONS_INIT \
    { sizeof(moe4_ctx_options), 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL }

/* Makes a context. Errors: ARGUMENT (an unknown ISA bit, an unknown device, half an allocator, more threads than 1024), MEMORY, DEVICE (no
 * plug-in, driver or device, or one too old). As there is no context to ask, the sentence goes to options->log. */
MOE4_API moe4_status moe4_ctx_create(moe4_ctx **ctx_ret, const moe4_ctx_options *options);
MOE4_API void moe4_ctx_destroy(moe4_ctx *ctx);

/* The sentence about the calling thread's last failed call in this context, or "". Valid until that thread's next call. */
MOE4_API const char *moe4_ctx_error(const moe4_ctx *ctx);

/* Memory for the buffers of forward calls: the device's in a context on a device, otherwise the context allocator's. At a multiple of 64
 * bytes; 0 bytes are fine. Free is for what alloc of the same context gave. Copy takes either kind of memory on either side, in `stream`'s
 * order, and returns when it is done. Forward calls on a device take device memory only, but weights may be in either. Errors: ARGUMENT,
 * MEMORY (bytes asked for and free), DEVICE. */
MOE4_API moe4_status moe4_memory_alloc(moe4_ctx *ctx, void **data_ret, size_t bytes);
MOE4_API void moe4_memory_free(moe4_ctx *ctx, void *data);
MOE4_API moe4_status moe4_memory_copy(moe4_ctx *ctx, void *dst, const void *src, size_t bytes, void *stream);

/* What a device can do at most, for floors. It waits for the device, takes about a tenth of a second and a gigabyte of its memory. */
typedef struct moe4_ceilings {
    size_t struct_size;
    const char *device; /* "NVIDIA H200"; owned by the context */
    double read_bytes;  /* a second, reading far more memory than its caches hold */
    double bf16_macs;   /* multiply-adds a second of a large bf16 product by cuBLAS; 0 where that is not found */
} moe4_ceilings;
#define MOE4_CEILINGS_INIT \
    { sizeof(moe4_ceilings), NULL, 0., 0. }

/* Errors: UNSUPPORTED (the CPU), MEMORY, DEVICE. */
MOE4_API moe4_status moe4_ctx_ceilings(moe4_ctx *ctx, moe4_ceilings *ceilings_ret);

/* Threads that a call may run on, the calling one among them. */
MOE4_API size_t moe4_ctx_n_threads(const moe4_ctx *ctx);
/* The ISA in use ("avx2") and why that one ("best of scalar, avx2 on this CPU"); owned by the context. */
MOE4_API const char *moe4_ctx_isa(const moe4_ctx *ctx);
MOE4_API const char *moe4_ctx_isa_reason(const moe4_ctx *ctx);
/* Where the context's layers run: "cpu", or the device as "cuda:0"; owned by the context. */
MOE4_API const char *moe4_ctx_device(const moe4_ctx *ctx);
/* fn(arg, task) once for each task < n_tasks on the context's threads, the calling one among them; returns when all are done. For what an
 * engine computes between layers, without a second pool. Which thread takes which task is not fixed: tasks write to places of their own.
 * Any number of threads may be in it at once. */
MOE4_API void moe4_parallel_for(moe4_ctx *ctx, size_t n_tasks, moe4_task_fn fn, void *arg);
/* The isa_mask for a name as moe4_ctx_isa gives it: that ISA and all below. 0 for an unknown name. */
MOE4_API uint32_t moe4_isa_mask(const char *name);

/* ---- element types ----------------------------------------------------------------------------------------------------------- */

typedef enum moe4_dtype {
    MOE4_F32 = 0,
    MOE4_F16,
    MOE4_BF16,
    MOE4_F64,
    MOE4_I8,
    MOE4_U8,
    MOE4_I16,
    MOE4_U16,
    MOE4_I32,
    MOE4_U32,
    MOE4_I64,
    MOE4_U64,
    MOE4_BOOL,
    MOE4_F8_E4M3,
    MOE4_F8_E5M2,
    MOE4_F8_E8M0,
    MOE4_NVFP4, /* only as moe4_weight.dtype: codes, block scales and a global scale together */
    MOE4_N_DTYPES
} moe4_dtype;

/* "BF16", as safetensors writes it; "?" for a number that is none. Bytes of one element; 0 for MOE4_NVFP4 and for no dtype. */
MOE4_API const char *moe4_dtype_name(moe4_dtype dtype);
MOE4_API size_t moe4_dtype_bytes(moe4_dtype dtype);

/* ---- the NVFP4 format: conversions, quantize, dequantize ---------------------------------------------------------------------- */

#define MOE4_BLOCK 16 /* consecutive k that share a block scale */

/* E2M1: bit 3 sign, bits 2..0 index {0, .5, 1, 1.5, 2, 3, 4, 6}. To nearest, ties to the even code, saturating at 6, NaN -> 7 (6.0),
 * -0 and negative underflow -> 8. Codes above 15 are taken modulo 16. */
MOE4_API uint8_t moe4_e2m1_from_float(float x);
MOE4_API float moe4_e2m1_to_float(uint8_t code);
/* E4M3 (OCP, no infinities): to nearest even, saturating at 448, NaN -> 0x7F with the sign kept. */
MOE4_API uint8_t moe4_e4m3_from_float(float x);
MOE4_API float moe4_e4m3_to_float(uint8_t byte);
/* To nearest even; NaN stays NaN. */
MOE4_API uint16_t moe4_bf16_from_float(float x);
MOE4_API float moe4_bf16_to_float(uint16_t bits);
MOE4_API uint16_t moe4_f16_from_float(float x);
MOE4_API float moe4_f16_to_float(uint16_t bits);

/* How scales are chosen and rounded: docs/numerics.md has the exact order of operations. `global` is the number that recipe stores:
 * MODELOPT, MODELOPT_STATIC: s2 = amax/2688, a factor of the value (ModelOpt's weight_scale_2).
 * ACTIVATION: S = 2688/amax, the encode scale; the value's factor is 1/S in fp32.
 * COMPRESSED_TENSORS: gs = 2688/amax, the value's divisor (weight_global_scale). */
typedef enum moe4_recipe {
    MOE4_RECIPE_MODELOPT = 0,
    MOE4_RECIPE_MODELOPT_STATIC,
    MOE4_RECIPE_ACTIVATION,
    MOE4_RECIPE_COMPRESSED_TENSORS
} moe4_recipe;

/* Where the block scales of a matrix [rows, cols], n = cols/16, lie; docs/format.md has the formulas. */
typedef enum moe4_scale_layout {
    MOE4_SCALES_LINEAR = 0, /* bytes [rows, n] */
    MOE4_SCALES_WORDS,      /* 32-bit words [ceil(n/4), rows]: a word has four consecutive blocks' scales, the lowest byte first */
    MOE4_SCALES_128X4       /* tiles of 128 rows x 4 blocks, padded: what cuBLASLt, CUTLASS and FlashInfer read */
} moe4_scale_layout;

typedef struct moe4_quantize_options {
    size_t struct_size;
    moe4_recipe recipe;
    const float *global; /* NULL: from the amax of x; otherwise the recipe's stored number: one, or [rows] with per_row */
    int per_row;         /* a global scale for each row instead of one for all */
    int four_over_six;   /* MODELOPT only: s2 = amax/1536 and the better of two scales per block */
    moe4_scale_layout scale_layout;
    size_t interleave; /* 0, or a granularity: the rows of the unquantized matrix are gate and up in groups of so many, those of codes,
                        * scales and global are [gate; up] halves, in scale_layout two matrices [rows/2, cols] one after the other */
    void *stream;      /* the device's, for matrices in its memory */
} moe4_quantize_options;
#define MOE4_QUANTIZE_OPTIONS_INIT \
    { sizeof(moe4_quantize_options), MOE4_RECIPE_MODELOPT, NULL, 0, 0, MOE4_SCALES_LINEAR, 0, NULL }

/* In a context on a device these calls also take matrices in its memory: x (or y), codes and scales are then all the device's; global,
 * global_ret and n_saturated_ret stay the host's. The bits are the CPU's. They queue their work in options->stream (moe4_amax in the
 * default stream) and wait for it, because they answer with what they found. Errors besides: ARGUMENT (host and device memory mixed:
 * which), MEMORY, DEVICE. */

/* codes[rows, cols/2], scales[rows, cols/16] = quantize(x[rows, cols]); low nibble = even k; scales are E4M3 bytes, linear unless the
 * options say otherwise (moe4_scales_bytes has their size; padding is zeroed).
 * x is F32, BF16 or F16; cols a multiple of 16; ld as in the conventions. global_ret (or NULL) gets the global scale used, one or
 * [rows]; n_saturated_ret (or NULL) the number of blocks whose scale before rounding exceeds 464.
 * Errors: ARGUMENT (cols, dtype, ld, a global that is not positive and finite, an interleave that does not divide rows/2), FORMAT (x has a
 * NaN or Inf: row and column). */
MOE4_API moe4_status moe4_nvfp4_quantize(moe4_ctx *ctx, uint8_t *codes, uint8_t *scales, float *global_ret, uint64_t *n_saturated_ret,
                                         const void *x, moe4_dtype x_dtype, size_t rows, size_t cols, size_t x_ld,
                                         const moe4_quantize_options *options);

/* y[rows, cols] = the values of codes and scales; `global` as options would store it (one, or [rows] with per_row), y F32, BF16 or F16,
 * rounded once. Errors: ARGUMENT (as quantize; no options->global); FORMAT for a scale byte that is NaN or signed (row and block). */
MOE4_API moe4_status moe4_nvfp4_dequantize(moe4_ctx *ctx, void *y, moe4_dtype y_dtype, size_t y_ld, const uint8_t *codes,
                                           const uint8_t *scales, size_t rows, size_t cols, const moe4_quantize_options *options);

/* *amax_ret = largest |x| of x[rows, cols]; a NaN or Inf anywhere makes it NaN or Inf. x is F32, BF16 or F16. 0 for an empty x.
 * Errors: ARGUMENT. */
MOE4_API moe4_status moe4_amax(moe4_ctx *ctx, float *amax_ret, const void *x, moe4_dtype x_dtype, size_t rows, size_t cols, size_t x_ld);

/* ---- weights ----------------------------------------------------------------------------------------------------------------- */

/* One matrix W[rows = N, cols = K], borrowed. y[T,N] = x[T,K] @ W^T. K is a multiple of 16 for NVFP4. No alignment is needed.
 * FP8 (MOE4_F8_E4M3) has a scale for each block of scale_rows x scale_cols elements, [ceil(N/scale_rows), ceil(K/scale_cols)] of them; a
 * value is e4m3 * scale, rounded once to fp32. An object that gets an FP8 matrix reads it once and keeps its values, in BF16 where the
 * scales are powers of two (F8_E8M0), otherwise in F32, and runs it as an unquantized one; the host must be able to read it. */
typedef struct moe4_weight {
    moe4_dtype dtype; /* MOE4_NVFP4, or MOE4_BF16, MOE4_F16, MOE4_F32, MOE4_F8_E4M3 */
    size_t rows, cols;
    const void *data;              /* NVFP4: codes [N, K/2]; otherwise [N, K] */
    const uint8_t *scale;          /* NVFP4: E4M3 [N, K/16], linear; FP8: of scale_dtype; otherwise NULL */
    float global;                  /* NVFP4: factor of the value (weight_scale_2; 1/weight_global_scale) */
    float input_scale;             /* NVFP4: decode global of the calibrated input; 0 when there is none */
    const float *bias;             /* fp32 [N], added to the finished product; or NULL */
    moe4_dtype scale_dtype;        /* FP8: F32, BF16, F16 or F8_E8M0 */
    size_t scale_rows, scale_cols; /* FP8: of a block; N and K for one scale in all */
} moe4_weight;

/* y[n_rows, cols] fp32, contiguous = the values of rows [row, row + n_rows) of a weight of any dtype, in host memory. Errors: ARGUMENT (a
 * dtype that is none of a weight, a NULL, rows beyond the last), FORMAT (NVFP4: a scale byte that is NaN or signed). An FP8 byte or scale
 * that is NaN gives NaN. */
MOE4_API moe4_status moe4_weight_values(moe4_ctx *ctx, float *y, const moe4_weight *weight, size_t row, size_t n_rows);

typedef struct moe4_weight_stats {
    size_t struct_size;
    uint64_t n_blocks;
    uint64_t n_scale_448;  /* blocks whose scale is the largest, 448 */
    uint64_t n_scale_pow2; /* blocks whose scale is a power of two */
    uint64_t n_scale_zero;
    uint64_t n_scale_bad;       /* NaN or signed */
    float scale_min, scale_max; /* over the good ones; 0 when there is none */
} moe4_weight_stats;
#define MOE4_WEIGHT_STATS_INIT \
    { sizeof(moe4_weight_stats), 0, 0, 0, 0, 0, 0.f, 0.f }

/* Counts over the block scales of an NVFP4 weight. Errors: ARGUMENT (not NVFP4). */
MOE4_API moe4_status moe4_weight_inspect(moe4_ctx *ctx, moe4_weight_stats *stats_ret, const moe4_weight *weight);

/* ---- layouts ------------------------------------------------------------------------------------------------------------------ */

/* The same numbers in another order. n_matrices matrices (experts) stand one after another on both sides; dst and src do not overlap, need
 * no alignment and may be NULL where they have no bytes. Any size is fine, 0 too. Errors: ARGUMENT (both numbers). In a context on a
 * device scales may be in its memory on both sides; what moves rows and transposes takes host memory only (else UNSUPPORTED). */

/* Bytes of the scales of n_matrices matrices [rows, cols], cols a multiple of 16. With n = cols/16, in bytes for each matrix:
 * LINEAR rows * n, WORDS rows * 4 * ceil(n/4), 128X4 roundup(rows, 128) * 4 * ceil(n/4). */
MOE4_API moe4_status moe4_scales_bytes(moe4_ctx *ctx, size_t *bytes_ret, moe4_scale_layout layout, size_t n_matrices, size_t rows,
                                       size_t cols);
/* Scales of n_matrices matrices [rows, cols] from one layout to another. Each matrix is padded by itself, dst's padding is zeroed, src's
 * not looked at. Gate and up are two matrices here: with [gate; up] halves of E experts pass n_matrices 2 * E and the rows of one half. */
MOE4_API moe4_status moe4_scales_convert(moe4_ctx *ctx, void *dst, moe4_scale_layout dst_layout, const void *src,
                                         moe4_scale_layout src_layout, size_t n_matrices, size_t rows, size_t cols);

/* The same, queued in `stream` without waiting for it, for scales in a device's memory. */
MOE4_API moe4_status moe4_scales_convert_async(moe4_ctx *ctx, void *dst, moe4_scale_layout dst_layout, const void *src,
                                               moe4_scale_layout src_layout, size_t n_matrices, size_t rows, size_t cols, void *stream);

/* Rows [gate; up] of each matrix [rows, row_bytes], the first half gate's, to groups of `granularity` gate rows and as many of up in turn;
 * and back. `rows` counts both and is even; granularity divides rows/2. A row is anything: cols/2 bytes of codes, cols/16 of linear
 * scales, an unquantized row, 4 bytes of an fp32 bias. */
MOE4_API moe4_status moe4_rows_interleave(moe4_ctx *ctx, void *dst, const void *src, size_t n_matrices, size_t rows, size_t row_bytes,
                                          size_t granularity);
MOE4_API moe4_status moe4_rows_deinterleave(moe4_ctx *ctx, void *dst, const void *src, size_t n_matrices, size_t rows, size_t row_bytes,
                                            size_t granularity);

/* dst [n_matrices, cols, rows] = src [n_matrices, rows, cols] with the last two dimensions exchanged; element_bytes 1, 2 or 4. For weights
 * given K-major, as Llama-4 and gpt-oss checkpoints have them, where a byte holds k and k+1 of one column n: codes [E,K/2,N] to [E,N,K/2]
 * with rows K/2, scales [E,K/16,N] to [E,N,K/16] with rows K/16, unquantized [E,K,N] with rows K; cols N. */
MOE4_API moe4_status moe4_transpose(moe4_ctx *ctx, void *dst, const void *src, size_t n_matrices, size_t rows, size_t cols,
                                    size_t element_bytes);

/* ---- activation modes --------------------------------------------------------------------------------------------------------- */

/* What the input of an NVFP4 matrix is rounded to. Unquantized matrices always run BF16: weights as stored, fp32 activations.
 * An explicit mode that no matrix of an object can run is an ARGUMENT error. */
typedef enum moe4_act {
    MOE4_ACT_DEFAULT = 0, /* TOKEN for NVFP4, BF16 for unquantized */
    MOE4_ACT_W4A16,       /* rounded to bf16 */
    MOE4_ACT_STATIC,      /* NVFP4 with the checkpoint's input_scale (the larger, where matrices share an input) */
    MOE4_ACT_TENSOR,      /* NVFP4, one global scale over the batch; results depend on the batch */
    MOE4_ACT_TOKEN,       /* NVFP4, one global scale per row */
    MOE4_ACT_BF16         /* for unquantized matrices only */
} moe4_act;

/* "token"; "?" for none. The reverse: MOE4_ERROR_ARGUMENT for an unknown name. */
MOE4_API const char *moe4_act_name(moe4_act act);
MOE4_API moe4_status moe4_act_from_name(moe4_act *act_ret, const char *name);

/* Rows of activations that are NVFP4 already. An object whose x_dtype is MOE4_NVFP4 takes a pointer to this as its x: values enter the
 * product as they are, and only h is rounded by the mode. A row with a NaN or signed scale byte, or a global that is not finite, comes
 * out NaN. On a device the struct is read during the call, on the host, and what it points to is device memory. */
typedef struct moe4_nvfp4_rows {
    const uint8_t *codes; /* [rows, K/2], contiguous */
    const void *scales;
    moe4_scale_layout layout;
    const float *global; /* factor of the values: one, or [rows] with global_per_row */
    int global_per_row;
} moe4_nvfp4_rows;

/* Scratch memory, the caller's, 64-byte aligned; one per call under way. It carries the report of the last call that used it. */
typedef struct moe4_workspace {
    void *data;
    size_t bytes;
} moe4_workspace;

/* ---- checkpoints -------------------------------------------------------------------------------------------------------------- */

typedef struct moe4_checkpoint moe4_checkpoint;

#define MOE4_MAX_DIMS 8

typedef struct moe4_tensor {
    const char *name; /* owned by the checkpoint, as is file */
    const char *file; /* the shard's file name, without folder */
    moe4_dtype dtype;
    size_t n_dims;
    size_t shape[MOE4_MAX_DIMS];
    const void *data; /* mapped, read-only; alignment as the file has it */
    size_t bytes;
} moe4_tensor;

/* Opens a model folder (config.json, optionally an index, .safetensors shards) or one .safetensors file (then without a config).
 * Files are mapped, and must not be written to while open. Replacing (rename) or deleting one does no harm: the old bytes stay. One that
 * has been written to or cut short is noticed by its size and time of writing: an IO error of the calls that make layers and routers from
 * it and, once it is a hundredth of a second old, of these objects' forward calls on the CPU, and a problem for verify. What a call reads
 * while a file changes is undefined, and pages that it no longer has end the process with SIGBUS. Errors: NOT_FOUND, IO, FORMAT (file,
 * tensor and numbers), UNSUPPORTED (a dtype moe4 has not), MEMORY; the log gets a line for each further shard that is malformed. An
 * unknown model family opens, and so does a folder without config.json; the calls that need it then say UNSUPPORTED or NOT_FOUND. */
MOE4_API moe4_status moe4_checkpoint_open(moe4_checkpoint **ckpt_ret, moe4_ctx *ctx, const char *path);
/* What points into it (tensors, weights, strings) and objects made from it must be gone. */
MOE4_API void moe4_checkpoint_close(moe4_checkpoint *ckpt);

/* OK, or IO when a file has been written to or cut short since it was opened (the file and both sizes): for programs that read tensors or
 * run linears from it by themselves. Two microseconds a file. */
MOE4_API moe4_status moe4_checkpoint_check(const moe4_checkpoint *ckpt);

MOE4_API size_t moe4_checkpoint_n_tensors(const moe4_checkpoint *ckpt);
MOE4_API size_t moe4_checkpoint_n_files(const moe4_checkpoint *ckpt);
/* Tensor i, 0 <= i < n_tensors, in order of file, then of offset; and the one of that name. What tensor_ret points to lives
 * until close. Errors: ARGUMENT (i and n_tensors), NOT_FOUND. */
MOE4_API moe4_status moe4_checkpoint_tensor(const moe4_checkpoint *ckpt, moe4_tensor *tensor_ret, size_t i);
MOE4_API moe4_status moe4_checkpoint_find(const moe4_checkpoint *ckpt, moe4_tensor *tensor_ret, const char *name);
/* config.json as it stands, bytes_ret (or NULL) its length; "" for a single file.
 * Owned by the checkpoint. */
MOE4_API const char *moe4_checkpoint_config(const moe4_checkpoint *ckpt, size_t *bytes_ret);

/* What stands between gate/up and down; the exact formulas are in docs/numerics.md. */
typedef enum moe4_activation {
    MOE4_SWIGLU = 0, /* g = min(g, L), u = clamp(u, -L, L); g * sigmoid(alpha * g) * (u + beta). gpt-oss: alpha 1.702, beta 1, L 7 */
    MOE4_GELU_TANH,  /* GELU(g) by tanh, times u */
    MOE4_RELU2       /* max(u, 0)^2; there is no gate */
} moe4_activation;

/* How logits l become experts and weights; b is the bias, which chooses and (but for TOPK_SOFTMAX) never weighs. Ties: the lower index.
 * With `normalize` the chosen weights are divided by their sum; then all are multiplied by `scale`. */
typedef enum moe4_router_kind {
    MOE4_ROUTER_NONE = 0,
    MOE4_ROUTER_SOFTMAX_TOPK,      /* p = softmax(l); top-k of p; weights p (Mixtral, Qwen) */
    MOE4_ROUTER_SIGMOID_BIAS,      /* s = sigmoid(l); top-k of s + b, group-limited; weights s, 1e-20 added to their sum (DeepSeek-V3) */
    MOE4_ROUTER_TOPK_SOFTMAX,      /* top-k of l + b; weights softmax over the k chosen (gpt-oss); no normalize */
    MOE4_ROUTER_SQRTSOFTPLUS_BIAS, /* s = sqrt(softplus(l / gate_temp)), softplus(l) = l above 20; top-k of s + b; weights s (DeepSeek-V4)
                                    */
    MOE4_ROUTER_HASH,              /* experts from a table by token id; weights s as SQRTSOFTPLUS_BIAS (DeepSeek-V4's first layers) */
    MOE4_ROUTER_SIGMOID_TOP1       /* the largest l; weight sigmoid(l), meant for MOE4_WEIGHT_ON_X (Llama-4); top_k 1 */
} moe4_router_kind;

typedef struct moe4_router_options {
    size_t struct_size;
    moe4_router_kind kind;
    size_t hidden, n_experts, top_k;
    size_t n_group, topk_group; /* SIGMOID_BIAS; 0 or 1: no groups. The score of a group is the sum of its two best s + b */
    int normalize;              /* divide the chosen weights by their sum; a sum of 0 leaves zeros */
    float scale;                /* routed_scaling_factor, applied once, in the weights; 0 means 1 */
    float gate_temp;            /* SQRTSOFTPLUS_BIAS, HASH; 0 means 1 */
    const float *alt_bias;      /* [n_experts], copied: a second bias, for the tokens that forward names (images); or NULL */
    const void *table;          /* HASH: [n_token_ids, top_k] experts of each token id, borrowed host memory; no alignment is needed */
    moe4_dtype table_dtype;     /* I32 or I64 */
    size_t n_token_ids;
    moe4_dtype x_dtype; /* of forward's x: F32, BF16 or F16 */
    size_t x_ld;
} moe4_router_options;
#define MOE4_ROUTER_OPTIONS_INIT \
    { sizeof(moe4_router_options), MOE4_ROUTER_NONE, 0, 0, 0, 0, 0, 0, 0.f, 0.f, NULL, NULL, MOE4_I32, 0, MOE4_F32, 0 }

typedef struct moe4_model_info {
    size_t struct_size;
    const char *family;       /* "glm4_moe": the row of the family table; owned by the checkpoint, as are the other strings */
    const char *architecture; /* config.json's architectures[0], or "" */
    const char *quantization; /* "modelopt NVFP4", "none", as the tensors say */
    size_t n_layers, hidden, vocab;
    size_t intermediate; /* of the dense layers; 0 when there are none */
    size_t n_experts, moe_intermediate, n_shared_experts;
    moe4_router_options router; /* hidden, n_experts, top_k, … filled in; the kind of layers that do not choose by hash */
    float swiglu_limit;         /* 0: none */
    size_t n_hash_layers;       /* the first layers, whose experts a table of token ids names */
    moe4_activation activation;
} moe4_model_info;
#define MOE4_MODEL_INFO_INIT \
    { sizeof(moe4_model_info), NULL, NULL, NULL, 0, 0, 0, 0, 0, 0, 0, MOE4_ROUTER_OPTIONS_INIT, 0.f, 0, MOE4_SWIGLU }

/* What config.json says, checked. Errors: UNSUPPORTED ("… (found …)"), FORMAT, NOT_FOUND (no config.json), ARGUMENT. */
MOE4_API moe4_status moe4_checkpoint_info(const moe4_checkpoint *ckpt, moe4_model_info *info_ret);

typedef enum moe4_layer_kind {
    MOE4_LAYER_DENSE = 0,
    MOE4_LAYER_MOE = 1,
    MOE4_LAYER_OTHER = 2 /* no feed-forward part at all: a Mamba or attention layer of Nemotron */
} moe4_layer_kind;
typedef enum moe4_proj { MOE4_GATE = 0, MOE4_UP = 1, MOE4_DOWN = 2 } moe4_proj;
/* Expert numbers of moe4_checkpoint_expert that are not routed experts. */
#define MOE4_EXPERT_SHARED (-1)
#define MOE4_EXPERT_DENSE (-2) /* the one MLP of a dense layer */

/* What config.json says of that layer. Errors: ARGUMENT (no such layer), UNSUPPORTED. */
MOE4_API moe4_status moe4_checkpoint_layer_kind(const moe4_checkpoint *ckpt, moe4_layer_kind *kind_ret, size_t layer);
/* The matrix of a module by name ("model.layers.0.self_attn.q_proj"): its format from its tensors' suffixes and its companions checked
 * (dtype, shape, globals positive and finite; block scales are checked by verify). Points into the mapped file.
 * Errors: NOT_FOUND, FORMAT (both or neither of two formats' companions, a wrong shape: both shapes), UNSUPPORTED. */
MOE4_API moe4_status moe4_checkpoint_weight(const moe4_checkpoint *ckpt, moe4_weight *weight_ret, const char *module);
/* The same for an expert's projection, shapes checked against config.json. Experts with a bias are UNSUPPORTED; MOE4_RELU2 experts have
 * no gate: ARGUMENT. */
MOE4_API moe4_status moe4_checkpoint_expert(const moe4_checkpoint *ckpt, moe4_weight *weight_ret, size_t layer, int64_t expert,
                                            moe4_proj proj);
/* The router of a layer: gate [E,H]; and its bias [E] as stored, F32 (or BF16 or F16, where an export has cut it), data NULL where the
 * family has none. Either may be NULL. Errors: ARGUMENT (a dense layer), NOT_FOUND, FORMAT, UNSUPPORTED. */
MOE4_API moe4_status moe4_checkpoint_router(const moe4_checkpoint *ckpt, moe4_weight *gate_ret, moe4_tensor *bias_ret, size_t layer);

/* The table of a layer whose experts are chosen by token id: [vocab, top_k] I32 or I64; such a layer's router has no bias. data NULL for
 * any other layer. Errors: as moe4_checkpoint_router. */
MOE4_API moe4_status moe4_checkpoint_hash_table(const moe4_checkpoint *ckpt, moe4_tensor *table_ret, size_t layer);

/* Called for every problem: the tensor or file concerned, and a sentence, both gone after the call. */
typedef void (*moe4_problem_fn)(void *user, const char *name, const char *problem);
/* Called now and then; returning non-zero stops verify, which then returns MOE4_OK with what it has counted. */
typedef int (*moe4_progress_fn)(void *user, uint64_t bytes_done, uint64_t bytes_total);
/* Reads every byte: companions, shapes, dtypes, scale bytes, global and input scales, non-finite bf16/f16/f32 values, and that every
 * layer has the experts, router, norms and attention that config.json promises. *n_problems_ret counts; the status is MOE4_OK when
 * the check itself could be done. It ends at a file that has changed. Memory stays bounded: mapped pages are dropped behind. Callbacks may
 * be NULL; they run on the calling thread, one at a time. Errors: ARGUMENT, MEMORY. */
MOE4_API moe4_status moe4_checkpoint_verify(moe4_checkpoint *ckpt, uint64_t *n_problems_ret, moe4_problem_fn problem,
                                            moe4_progress_fn progress, void *user);

/* ---- router ------------------------------------------------------------------------------------------------------------------- */

typedef struct moe4_router moe4_router;

/* gate [n_experts, hidden] BF16, F16 or F32, borrowed until destroy; NULL when only select is used. bias fp32 [n_experts] is copied;
 * NULL: zeros; kinds without a b take none. Errors: ARGUMENT, FORMAT (a bias that is not finite; a row of the hash table with an expert
 * twice or out of range), MEMORY. */
MOE4_API moe4_status moe4_router_create(moe4_router **router_ret, moe4_ctx *ctx, const moe4_weight *gate, const float *bias,
                                        const moe4_router_options *options);
/* The router of a layer, kind, numbers, hash table and biases from the checkpoint; options (or NULL) gives x_dtype, x_ld and, to put it in
 * the place of the checkpoint's own (DeepSeek-V4's gate.bias_vl), alt_bias. Borrows
 * ckpt. */
MOE4_API moe4_status moe4_router_create_from_checkpoint(moe4_router **router_ret, moe4_ctx *ctx, const moe4_checkpoint *ckpt, size_t layer,
                                                        const moe4_router_options *options);
MOE4_API void moe4_router_destroy(moe4_router *router);

/* Bytes that forward needs for up to n_tokens. Errors: ARGUMENT when the size overflows. */
MOE4_API moe4_status moe4_router_workspace_bytes(const moe4_router *router, size_t *bytes_ret, size_t n_tokens);
/* What a router wants to know of the tokens besides x; all [T]. */
typedef struct moe4_router_tokens {
    size_t struct_size;
    const int32_t *token_ids; /* HASH */
    const uint8_t *alt_bias;  /* non-zero: this token chooses by alt_bias; or NULL: none does */
} moe4_router_tokens;
#define MOE4_ROUTER_TOKENS_INIT \
    { sizeof(moe4_router_tokens), NULL, NULL }

/* topk_ids [T,k] int32, topk_weights [T,k] fp32 from x [T,hidden]: fp32 logits, best expert first, ties to the lower index. A row with a
 * NaN or Inf gets ids 0 .. k-1 and NaN weights, so that its result is NaN. `tokens` may be NULL
 * where nothing in it is needed; its arrays are device memory on a device, where a token id outside the table gives a row as one of a NaN
 * does. Errors: ARGUMENT (elsewhere such an id: the token and both numbers), IO (a router of a checkpoint whose file
 * changed), DEVICE. */
MOE4_API moe4_status moe4_router_forward(const moe4_router *router, int32_t *topk_ids, float *topk_weights, const void *x,
                                         const moe4_router_tokens *tokens, size_t n_tokens, const moe4_workspace *workspace, void *stream);
/* The same from logits [T,E] fp32, contiguous; needs no workspace. Errors: as forward. */
MOE4_API moe4_status moe4_router_select(const moe4_router *router, int32_t *topk_ids, float *topk_weights, const float *logits,
                                        const moe4_router_tokens *tokens, size_t n_tokens, void *stream);

/* ---- mixture-of-experts layer --------------------------------------------------------------------------------------------------- */

typedef struct moe4_moe moe4_moe;

/* Where a slot's routing weight is applied, once. */
typedef enum moe4_weighting {
    MOE4_WEIGHT_AFTER_DOWN = 0,
    MOE4_WEIGHT_BEFORE_DOWN, /* on h, before it is rounded (DeepSeek's own reference code) */
    MOE4_WEIGHT_ON_X         /* on x, before it is rounded (Llama-4) */
} moe4_weighting;

typedef struct moe4_expert {
    moe4_weight gate, up; /* [intermediate, hidden]; with MOE4_RELU2 gate is not read */
    moe4_weight down;     /* [hidden, intermediate] */
} moe4_expert;

typedef struct moe4_moe_options {
    size_t struct_size;
    size_t n_experts;    /* E of the whole layer: ids are global, 0 <= id < E */
    size_t first_expert; /* this object has experts [first, first + n_local) */
    size_t n_local;      /* 0: all from first_expert on */
    size_t top_k;        /* ids per token */
    moe4_act act;
    moe4_activation activation;
    float swiglu_limit; /* L; 0: none */
    float swiglu_alpha; /* 0 means 1 */
    float swiglu_beta;
    moe4_weighting weighting;  /* of routed slots; the shared expert has none */
    int with_shared;           /* from a checkpoint: add the layer's shared expert */
    const moe4_expert *shared; /* create: a shared expert every token visits with weight 1, its own intermediate size; or NULL */
    moe4_dtype x_dtype;        /* F32, BF16 or F16; or NVFP4: x is a moe4_nvfp4_rows */
    size_t x_ld;
    moe4_dtype y_dtype; /* F32 or BF16 */
    size_t y_ld;
    moe4_dtype ids_dtype; /* I32 or I64 */
} moe4_moe_options;
#define MOE4_MOE_OPTIONS_INIT                                                                                                              \
    {                                                                                                                                      \
        sizeof(moe4_moe_options), 0, 0, 0, 0, MOE4_ACT_DEFAULT, MOE4_SWIGLU, 0.f, 0.f, 0.f, MOE4_WEIGHT_AFTER_DOWN, 0, NULL, MOE4_BF16, 0, \
            MOE4_BF16, 0, MOE4_I32                                                                                                         \
    }

/* A layer from n_local experts' pointers; the struct array is copied, the weights it points to stay borrowed until destroy.
 * Errors: ARGUMENT (the expert and both numbers), FORMAT (a block scale that is NaN or signed, an FP8 value that is not finite: its place),
 * UNSUPPORTED (what a device does not run), MEMORY, DEVICE. */
MOE4_API moe4_status moe4_moe_create(moe4_moe **moe_ret, moe4_ctx *ctx, const moe4_expert *experts, const moe4_moe_options *options);
/* A layer of a checkpoint; the activation is the family's, sizes, top_k and the limit come from config.json where options leaves 0. A dense
 * layer is one expert with top_k 1. Borrows ckpt. Errors: as moe4_checkpoint_expert and moe4_moe_create; IO (a file changed). */
MOE4_API moe4_status moe4_moe_create_from_checkpoint(moe4_moe **moe_ret, moe4_ctx *ctx, const moe4_checkpoint *ckpt, size_t layer,
                                                     const moe4_moe_options *options);
MOE4_API void moe4_moe_destroy(moe4_moe *moe);

/* The mode the layer runs: what DEFAULT came to mean, or the one asked for. */
MOE4_API moe4_act moe4_moe_act(const moe4_moe *moe);
/* Bytes that forward needs for up to n_tokens. Errors: ARGUMENT when the size overflows. */
MOE4_API moe4_status moe4_moe_workspace_bytes(const moe4_moe *moe, size_t *bytes_ret, size_t n_tokens);

/* y[T,hidden] = for each token the sum over its top_k slots of weight * expert(x), plus the shared expert if there is one; summed in
 * fp32 in slot order, rounded once.
 * x [T,hidden] and y in the dtypes and leading dimensions of the options; they may not overlap. topk_ids [T,top_k], topk_weights
 * [T,top_k] fp32, both contiguous; slots whose id is negative or not local are skipped, a token without any gets exact zeros (and then
 * the shared expert). With n_experts 1 both may be NULL: every token, weight 1. A row of x with a NaN or Inf comes out NaN where an
 * expert read it; other rows are untouched. Same input, same bits, whatever the threads; except for MOE4_ACT_TENSOR a token's result
 * does not depend on the rest of the batch. n_tokens 0 is fine.
 * Allocates nothing. `stream` is the device's stream; NULL on the CPU, where the call returns when y is written.
 * Errors: ARGUMENT (a NULL, a workspace too small: both numbers; n_tokens * top_k is at most 2^31 - 1), IO (a layer of a checkpoint whose
 * file changed), DEVICE. */
MOE4_API moe4_status moe4_moe_forward(const moe4_moe *moe, void *y, const void *x, const void *topk_ids, const float *topk_weights,
                                      size_t n_tokens, const moe4_workspace *workspace, void *stream);

/* For engines that dispatch themselves (expert parallelism): rows that already stand with their experts. Only the local routed experts
 * run. x and y rows as the options say; `weights` [rows] fp32, or NULL: 1.
 *
 * sorted: rows [offsets[e], offsets[e + 1]) of x [n_rows,hidden] are local expert e's; offsets is int32 [n_local + 1] in host memory, from
 * 0, never falling, at most n_rows. With row_token NULL y is [n_rows,hidden], row for row, weighted, not summed; rows past the last offset
 * are not written. Otherwise y is [n_tokens,hidden] and row r is added to y[row_token[r]] in order of r (int32 [n_rows]; negative:
 * dropped); tokens without a row get zeros. batched: x and y are [n_local, max_rows, hidden] with counts[e] rows each (int32 [n_local],
 * host memory), weights [n_local, max_rows]; the others are not touched. Their workspace is that of n_rows = n_local * max_rows and
 * n_tokens 0; sorted rows without row_token have n_tokens 0 too. Allocates nothing. Errors: ARGUMENT (an offset, count or token out of
 * range: which, and both numbers; at most 2^31 - 1 rows), IO and DEVICE as moe4_moe_forward.
 *
 * On a device offsets, counts and row_token are device memory and only read there, so that a captured call may meet others when it is
 * replayed. What is out of range is no error then: an offset is at least the one before and at most n_rows, a count 0 to max_rows,
 * and a row for a token that is not there is dropped. */
MOE4_API moe4_status moe4_moe_rows_workspace_bytes(const moe4_moe *moe, size_t *bytes_ret, size_t n_rows, size_t n_tokens);
MOE4_API moe4_status moe4_moe_forward_sorted(const moe4_moe *moe, void *y, const void *x, const int32_t *offsets, const float *weights,
                                             const int32_t *row_token, size_t n_rows, size_t n_tokens, const moe4_workspace *workspace,
                                             void *stream);
MOE4_API moe4_status moe4_moe_forward_batched(const moe4_moe *moe, void *y, const void *x, const int32_t *counts, const float *weights,
                                              size_t max_rows, const moe4_workspace *workspace, void *stream);

/* Puts other weights of the same shapes and dtypes in local expert e's place (load balancing). No forward of this layer may be under way.
 * On failure the old expert stays. Errors: as moe4_moe_create. */
MOE4_API moe4_status moe4_moe_replace_expert(moe4_moe *moe, size_t e, const moe4_expert *expert);

typedef enum moe4_stage {
    MOE4_STAGE_DISPATCH = 0, /* slots sorted by expert */
    MOE4_STAGE_QUANTIZE_X,
    MOE4_STAGE_GATE_UP, /* both products and SwiGLU */
    MOE4_STAGE_QUANTIZE_H,
    MOE4_STAGE_DOWN,
    MOE4_STAGE_COMBINE,
    MOE4_N_STAGES
} moe4_stage;
/* "gate/up", static; "?" for none. */
MOE4_API const char *moe4_stage_name(moe4_stage stage);

/* A kernel and the routed experts that took it: those with `from` slots or more, up to the next range's `from`. */
typedef struct moe4_kernel_range {
    const char *name; /* static */
    size_t from;
    size_t tile_slots; /* at most so many slots share a pass over an expert's weights; an expert's are split evenly */
} moe4_kernel_range;
enum { MOE4_MAX_KERNEL_RANGES = 4 };

typedef struct moe4_moe_report {
    size_t struct_size;
    uint64_t n_tokens;
    uint64_t n_slots;              /* routed slots that ran here */
    uint64_t n_experts_hit;        /* distinct local experts with a slot */
    uint64_t weight_bytes;         /* codes and scales of those experts (and the shared one) */
    uint64_t n_saturated_blocks;   /* activation blocks, per slot, whose scale was past what E4M3 holds */
    uint64_t n_nonfinite_rows;     /* rows of x with a NaN or Inf */
    double seconds[MOE4_N_STAGES]; /* wall time, CPU only */
    const char *kernels;           /* which path the products took, such as "w4a4 avx512vnni" or "decode sm_90"; static */
    moe4_kernel_range kernel[MOE4_MAX_KERNEL_RANGES]; /* which expert took which path, in the order of their slots */
    size_t n_kernels;                                 /* 0 on the CPU, where all take the same */
} moe4_moe_report;
#define MOE4_MOE_REPORT_INIT \
    { sizeof(moe4_moe_report), 0, 0, 0, 0, 0, 0, {0}, NULL, {{NULL, 0, 0}}, 0 }

/* What the last forward with this workspace did; tokens_per_expert [n_local] in host memory, or NULL. Errors: ARGUMENT
 * (a workspace that is none), DEVICE. On a device it waits for the stream. */
MOE4_API moe4_status moe4_moe_report_read(const moe4_moe *moe, moe4_moe_report *report_ret, uint64_t *tokens_per_expert,
                                          const moe4_workspace *workspace, void *stream);

/* ---- linear ------------------------------------------------------------------------------------------------------------------- */

typedef struct moe4_linear moe4_linear;

typedef struct moe4_linear_options {
    size_t struct_size;
    moe4_act act;
    moe4_dtype x_dtype; /* F32, BF16 or F16; or NVFP4: x is a moe4_nvfp4_rows */
    size_t x_ld;
    moe4_dtype y_dtype; /* F32 or BF16; contiguous [T, N_i] each */
} moe4_linear_options;
#define MOE4_LINEAR_OPTIONS_INIT \
    { sizeof(moe4_linear_options), MOE4_ACT_DEFAULT, MOE4_F32, 0, MOE4_F32 }

/* n_weights >= 1 matrices [N_i, K] of one format that share an input (q, k and v; gate and up): it is rounded once, in `static` with the
 * largest of their input scales. The structs are copied, what they point to stays borrowed. Errors: as moe4_moe_create. */
MOE4_API moe4_status moe4_linear_create(moe4_linear **linear_ret, moe4_ctx *ctx, const moe4_weight *weights, size_t n_weights,
                                        const moe4_linear_options *options);
MOE4_API void moe4_linear_destroy(moe4_linear *linear);
/* Bytes that forward needs for up to n_tokens. Errors: ARGUMENT when the size overflows. */
MOE4_API moe4_status moe4_linear_workspace_bytes(const moe4_linear *linear, size_t *bytes_ret, size_t n_tokens);
/* y[i][T, N_i] = x[T,K] @ W_i^T for each matrix. Properties as moe4_moe_forward's; but where a device leaves many bf16 rows in w4a16 to
 * cuBLAS (docs/hopper.md), a row's last bits may depend on T. n_saturated_ret (or NULL; host memory) counts saturated blocks of x, once for
 * all matrices. Errors: ARGUMENT (a NULL, a workspace too small: both numbers), DEVICE. */
MOE4_API moe4_status moe4_linear_forward(const moe4_linear *linear, void *const *y, uint64_t *n_saturated_ret, const void *x,
                                         size_t n_tokens, const moe4_workspace *workspace, void *stream);

/* ---- grouped linear ------------------------------------------------------------------------------------------------------------- */

typedef struct moe4_grouped moe4_grouped;

typedef struct moe4_grouped_options {
    size_t struct_size;
    moe4_act act;
    moe4_dtype x_dtype; /* F32, BF16 or F16; or NVFP4: x is a moe4_nvfp4_rows */
    size_t x_ld;
    moe4_dtype y_dtype; /* F32 or BF16 */
    size_t y_ld;
    int block_diagonal;
} moe4_grouped_options;
#define MOE4_GROUPED_OPTIONS_INIT \
    { sizeof(moe4_grouped_options), MOE4_ACT_DEFAULT, MOE4_BF16, 0, MOE4_BF16, 0, 0 }

/* The products of an engine's own pipeline: n_groups matrices [N,K] of one shape and format, each with its own global scale, input scale
 * and bias; group g's rows meet matrix g. The structs are copied, what they point to stays borrowed. Errors: as moe4_moe_create.
 * Plain: rows [offsets[g], offsets[g + 1]) of x [n_rows,K] and y [n_rows,N] are group g's.
 * block_diagonal: x is [n_rows, n_groups * K], y [n_rows, n_groups * N], and columns g of each belong together; offsets are NULL; TENSOR
 * takes its scale over each group's columns. */
MOE4_API moe4_status moe4_grouped_create(moe4_grouped **grouped_ret, moe4_ctx *ctx, const moe4_weight *weights, size_t n_groups,
                                         const moe4_grouped_options *options);
MOE4_API void moe4_grouped_destroy(moe4_grouped *grouped);
/* Bytes that forward needs for up to n_rows. Errors: ARGUMENT when the size overflows. */
MOE4_API moe4_status moe4_grouped_workspace_bytes(const moe4_grouped *grouped, size_t *bytes_ret, size_t n_rows);
/* offsets int32 [n_groups + 1] as for moe4_moe_forward_sorted, in host memory or the device's. Properties as moe4_moe_forward's;
 * n_saturated_ret as moe4_linear_forward's. Errors: ARGUMENT (an offset: which, and both numbers; a workspace too small: both numbers). */
MOE4_API moe4_status moe4_grouped_forward(const moe4_grouped *grouped, void *y, uint64_t *n_saturated_ret, const void *x,
                                          const int32_t *offsets, size_t n_rows, const moe4_workspace *workspace, void *stream);

#ifdef __cplusplus
}
#endif

#endif
