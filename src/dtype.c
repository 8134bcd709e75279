/* Names and sizes of element types. */
#include "moe4.h"

static const struct {
    const char *name;
    size_t bytes;
} dtypes[MOE4_N_DTYPES] = {
    [MOE4_F32] = {"F32", 4},     [MOE4_F16] = {"F16", 2},         [MOE4_BF16] = {"BF16", 2},       [MOE4_F64] = {"F64", 8},
    [MOE4_I8] = {"I8", 1},       [MOE4_U8] = {"U8", 1},           [MOE4_I16] = {"I16", 2},         [MOE4_U16] = {"U16", 2},
    [MOE4_I32] = {"I32", 4},     [MOE4_U32] = {"U32", 4},         [MOE4_I64] = {"I64", 8},         [MOE4_U64] = {"U64", 8},
    [MOE4_BOOL] = {"BOOL", 1},   [MOE4_F8_E4M3] = {"F8_E4M3", 1}, [MOE4_F8_E5M2] = {"F8_E5M2", 1}, [MOE4_F8_E8M0] = {"F8_E8M0", 1},
    [MOE4_NVFP4] = {"NVFP4", 0},
};

const char *moe4_dtype_name(moe4_dtype dtype) {
    return (unsigned)dtype < MOE4_N_DTYPES ? dtypes[dtype].name : "?";
}

size_t moe4_dtype_bytes(moe4_dtype dtype) {
    return (unsigned)dtype < MOE4_N_DTYPES ? dtypes[dtype].bytes : 0;
}
