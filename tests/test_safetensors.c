/* The reader of .safetensors files against one malformed file per rule, and against well-formed odd ones. */
#include <unistd.h>

#include "checkpoint_case.h"

/* t.safetensors must be refused with this status and a sentence that has these words (separated by '|'). */
static void expect_refused(const char *what, moe4_status status, const char *words) {
    expect_open_of("t.safetensors", what, status, words);
}

#define A "\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}"
#define ENTRY(dtype, shape, offsets) "{\"a\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static const struct {
    const char *what, *header;
    size_t data_bytes;
    moe4_status status;
    const char *words;
} malformed[] = {
    {"no brace first", " {" A "}", 2, MOE4_ERROR_FORMAT, "t.safetensors|'{'"},
    {"empty header", "", 0, MOE4_ERROR_FORMAT, "header of 0 bytes"},
    {"cut JSON", "{" A, 2, MOE4_ERROR_FORMAT, "not valid JSON|of 52"},
    {"text behind the JSON", "{" A "}x", 2, MOE4_ERROR_FORMAT, "not valid JSON"},
    {"duplicate tensor", "{" A "," A "}", 2, MOE4_ERROR_FORMAT, "duplicate object key"},
    {"duplicate key", "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 2, MOE4_ERROR_FORMAT,
     "duplicate"},
    {"NUL in a name", "{\"a\\u0000b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 2, MOE4_ERROR_FORMAT, "NUL"},
    {"empty name", "{\"\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 2, MOE4_ERROR_FORMAT, "name of tensor 0: 0 bytes"},
    {"escape in a name", "{\"\\u001b[2J\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 2, MOE4_ERROR_FORMAT, "control"},
    {"C1 control in a name", "{\"\\u009b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 2, MOE4_ERROR_FORMAT, "control"},
    {"entry is a number", "{\"a\":7}", 0, MOE4_ERROR_FORMAT, "tensor a|object"},
    {"no dtype", "{\"a\":{\"shape\":[2],\"data_offsets\":[0,2]}}", 2, MOE4_ERROR_FORMAT, "tensor a|no dtype"},
    {"no shape", "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,2]}}", 2, MOE4_ERROR_FORMAT, "tensor a|no shape"},
    {"no offsets", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2]}}", 2, MOE4_ERROR_FORMAT, "tensor a|no data_offsets"},
    {"a key too many", "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2],\"x\":1}}", 2, MOE4_ERROR_FORMAT, "tensor a|4 keys"},
    {"dtype no string", "{\"a\":{\"dtype\":8,\"shape\":[2],\"data_offsets\":[0,2]}}", 2, MOE4_ERROR_FORMAT, "dtype is not a string"},
    {"unknown dtype", ENTRY("Q3", "[2]", "[0,2]"), 2, MOE4_ERROR_UNSUPPORTED, "unsupported|tensor a|\"Q3\""},
    {"sub-byte dtype", ENTRY("F4", "[2]", "[0,1]"), 1, MOE4_ERROR_UNSUPPORTED, "unsupported|tensor a|\"F4\""},
    {"six-bit dtype", ENTRY("F6_E2M3", "[4]", "[0,3]"), 3, MOE4_ERROR_UNSUPPORTED, "\"F6_E2M3\""},
    {"complex dtype", ENTRY("C64", "[1]", "[0,8]"), 8, MOE4_ERROR_UNSUPPORTED, "\"C64\""},
    {"NVFP4 is no stored dtype", ENTRY("NVFP4", "[2]", "[0,1]"), 1, MOE4_ERROR_UNSUPPORTED, "\"NVFP4\""},
    {"shape no array", ENTRY("U8", "2", "[0,2]"), 2, MOE4_ERROR_FORMAT, "shape is not an array"},
    {"negative dimension", ENTRY("U8", "[-2]", "[0,2]"), 2, MOE4_ERROR_FORMAT, "shape[0]"},
    {"fractional dimension", ENTRY("U8", "[2.0]", "[0,2]"), 2, MOE4_ERROR_FORMAT, "shape[0]"},
    {"dimension as text", ENTRY("U8", "[\"2\"]", "[0,2]"), 2, MOE4_ERROR_FORMAT, "shape[0]"},
    {"dimension 2^63", ENTRY("U8", "[9223372036854775808]", "[0,2]"), 2, MOE4_ERROR_FORMAT, "too big"},
    {"nine dimensions", ENTRY("U8", "[1,1,1,1,1,1,1,1,2]", "[0,2]"), 2, MOE4_ERROR_FORMAT, "9 dimensions, at most 8"},
    {"product overflows", ENTRY("U8", "[4294967296,4294967296]", "[0,2]"), 2, MOE4_ERROR_FORMAT, "shape[1] = 4294967296|overflow"},
    {"product overflows beside a 0", ENTRY("U8", "[0,9223372036854775807,4]", "[0,0]"), 0, MOE4_ERROR_FORMAT, "overflow"},
    {"bytes overflow", ENTRY("F64", "[4611686018427387904]", "[0,2]"), 2, MOE4_ERROR_FORMAT, "overflow"},
    {"offsets too short", ENTRY("F32", "[2]", "[0,4]"), 4, MOE4_ERROR_FORMAT, "span 4 bytes|needs 8"},
    {"offsets too long", ENTRY("F32", "[2]", "[0,12]"), 12, MOE4_ERROR_FORMAT, "span 12 bytes|needs 8"},
    {"scalar of no bytes", ENTRY("F32", "[]", "[0,0]"), 0, MOE4_ERROR_FORMAT, "span 0 bytes|needs 4"},
    {"offsets no pair", ENTRY("U8", "[2]", "[0,2,2]"), 2, MOE4_ERROR_FORMAT, "not a pair"},
    {"offset negative", ENTRY("U8", "[2]", "[-2,0]"), 2, MOE4_ERROR_FORMAT, "data_offsets[0]"},
    {"offset fractional", ENTRY("U8", "[2]", "[0,2.0]"), 2, MOE4_ERROR_FORMAT, "data_offsets[1]"},
    {"offsets backwards", ENTRY("U8", "[2]", "[2,0]"), 2, MOE4_ERROR_FORMAT, "end at 0|begin at 2"},
    {"past the end", ENTRY("U8", "[3]", "[0,3]"), 2, MOE4_ERROR_FORMAT, "data_offsets end at 3|2 bytes of data"},
    {"far past the end", ENTRY("U8", "[2]", "[9223372036854775805,9223372036854775807]"), 2, MOE4_ERROR_FORMAT,
     "9223372036854775807|2 bytes"},
    {"overlap", "{" A ",\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]}}", 3, MOE4_ERROR_FORMAT,
     "tensor b begins at 1|overlaps a|ends at 2"},
    {"two tensors in one place", "{" A ",\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 2, MOE4_ERROR_FORMAT, "overlaps"},
    {"gap", "{" A ",\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[3,4]}}", 4, MOE4_ERROR_FORMAT,
     "tensor b begins at 3|gap|ends at 2"},
    {"gap at the beginning", ENTRY("U8", "[2]", "[1,3]"), 3, MOE4_ERROR_FORMAT, "tensor a begins at 1|the header"},
    {"bytes behind the last", "{" A "}", 3, MOE4_ERROR_FORMAT, "end at 2|3 bytes of data"},
    {"bytes without tensors", "{}", 1, MOE4_ERROR_FORMAT, "end at 0|1 bytes"},
    {"metadata no object", "{\"__metadata__\":[]," A "}", 2, MOE4_ERROR_FORMAT, "__metadata__ is not an object"},
    {"metadata value no string", "{\"__metadata__\":{\"n\":1}," A "}", 2, MOE4_ERROR_FORMAT, "__metadata__|n is not a string"},
};

static void test_malformed(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof malformed / sizeof *malformed; i++) {
        files_safetensors("t.safetensors", malformed[i].header, NULL, malformed[i].data_bytes);
        expect_refused(malformed[i].what, malformed[i].status, malformed[i].words);
    }
}

static void test_header_length(void **state) {
    (void)state;
    files_write("t.safetensors", "", 0);
    expect_refused("empty file", MOE4_ERROR_FORMAT, "0 bytes|needs 8");
    files_write("t.safetensors", "\1\0\0\0\0\0\0", 7);
    expect_refused("7 bytes", MOE4_ERROR_FORMAT, "7 bytes|needs 8");
    files_write("t.safetensors", "\x05\0\0\0\0\0\0\0{}", 10);
    expect_refused("header longer than the file", MOE4_ERROR_FORMAT, "header of 5 bytes|2 are left");
    files_write("t.safetensors", "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10);
    expect_refused("header of 2^64 - 1", MOE4_ERROR_FORMAT, "18446744073709551615|100000000");
    files_write("t.safetensors", "\x01\xe1\xf5\x05\0\0\0\0{}", 10);
    expect_refused("header of 100,000,001", MOE4_ERROR_FORMAT, "100000001|100000000");
    files_safetensors("t.safetensors", "{}", NULL, 0);
    moe4_checkpoint *ckpt;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("t.safetensors")), MOE4_OK);
    assert_int_equal(moe4_checkpoint_n_tensors(ckpt), 0);
    moe4_checkpoint_close(ckpt);
}

static void test_depth(void **state) {
    (void)state;
    enum { DEPTH = 100000 };
    char *deep = malloc(DEPTH + 8);
    strcpy(deep, "{\"a\":");
    memset(deep + 5, '[', DEPTH);
    deep[5 + DEPTH] = '\0';
    files_safetensors("t.safetensors", deep, NULL, 0);
    free(deep);
    expect_refused("deep nesting", MOE4_ERROR_FORMAT, "maximum parsing depth");
}

static void test_long_name(void **state) {
    (void)state;
    for (size_t n = 255; n <= 256; n++) {
        char name[300], header[512];
        memset(name, 'x', n);
        name[n] = '\0';
        snprintf(header, sizeof header, "{\"%s\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", name);
        files_safetensors("t.safetensors", header, NULL, 2);
        if (n == 256) {
            expect_refused("name of 256", MOE4_ERROR_FORMAT, "256 bytes|255");
            continue;
        }
        moe4_checkpoint *ckpt;
        assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("t.safetensors")), MOE4_OK);
        moe4_checkpoint_close(ckpt);
    }
}

static void test_not_a_file(void **state) {
    (void)state;
    expect_refused("nothing there", MOE4_ERROR_NOT_FOUND, "t.safetensors");
    assert_int_equal(symlink("/dev/null", files_path("t.safetensors")), 0);
    expect_refused("a device", MOE4_ERROR_IO, "not a regular file");
    moe4_checkpoint *ckpt;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, NULL), MOE4_ERROR_ARGUMENT);
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, ""), MOE4_ERROR_ARGUMENT);
    assert_int_equal(moe4_checkpoint_open(NULL, ctx, "x"), MOE4_ERROR_ARGUMENT);
    assert_int_equal(unlink(files_path("t.safetensors")), 0);
}

/* Every dtype, an order of names that is not that of offsets, empty tensors, scalars, padding, metadata. */
static void test_well_formed(void **state) {
    (void)state;
    files_safetensors("t.safetensors",
                      "{\"__metadata__\":{\"format\":\"pt\"},"
                      "\"z\":{\"dtype\":\"U8\",\"shape\":[2,3],\"data_offsets\":[0,6]},"
                      "\"none\":{\"dtype\":\"F32\",\"shape\":[4,0],\"data_offsets\":[6,6]},"
                      "\"b\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[8,12]},"
                      "\"a\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[6,8]}}   ",
                      "\1\2\3\4\5\6\x80\x3f\0\0\0\x40", 12);
    moe4_checkpoint *ckpt;
    assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("t.safetensors")), MOE4_OK);
    static const char *const order[] = {"z", "none", "a", "b"};
    moe4_tensor t;
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(moe4_checkpoint_tensor(ckpt, &t, i), MOE4_OK);
        assert_string_equal(t.name, order[i]);
        assert_string_equal(t.file, "t.safetensors");
    }
    assert_int_equal(moe4_checkpoint_tensor(ckpt, &t, 4), MOE4_ERROR_ARGUMENT);
    assert_int_equal(moe4_checkpoint_find(ckpt, &t, "z"), MOE4_OK);
    assert_int_equal(t.dtype, MOE4_U8);
    assert_int_equal(t.n_dims, 2);
    assert_int_equal(t.shape[1], 3);
    assert_memory_equal(t.data, "\1\2\3\4\5\6", 6);
    assert_int_equal(moe4_checkpoint_find(ckpt, &t, "b"), MOE4_OK);
    assert_int_equal(t.n_dims, 0);
    float two;
    memcpy(&two, t.data, sizeof two);
    assert_true(two == 2.0f);
    assert_int_equal(moe4_checkpoint_find(ckpt, &t, "none"), MOE4_OK);
    assert_int_equal(t.bytes, 0);
    assert_int_equal(moe4_checkpoint_find(ckpt, &t, "c"), MOE4_ERROR_NOT_FOUND);
    assert_non_null(strstr(moe4_ctx_error(ctx), "no tensor c"));
    size_t bytes = 1;
    assert_string_equal(moe4_checkpoint_config(ckpt, &bytes), "");
    assert_int_equal(bytes, 0);
    moe4_checkpoint_close(ckpt);
}

static void test_dtypes(void **state) {
    (void)state;
    for (int d = 0; d < MOE4_NVFP4; d++) {
        char header[128];
        size_t bytes = moe4_dtype_bytes((moe4_dtype)d);
        assert_in_range(bytes, 1, 8);
        snprintf(header, sizeof header, ENTRY("%s", "[3]", "[0,%zu]"), moe4_dtype_name((moe4_dtype)d), 3 * bytes);
        files_safetensors("t.safetensors", header, NULL, 3 * bytes);
        moe4_checkpoint *ckpt;
        moe4_tensor t;
        assert_int_equal(moe4_checkpoint_open(&ckpt, ctx, files_path("t.safetensors")), MOE4_OK);
        assert_int_equal(moe4_checkpoint_find(ckpt, &t, "a"), MOE4_OK);
        assert_int_equal(t.dtype, d);
        moe4_checkpoint_close(ckpt);
    }
    assert_string_equal(moe4_dtype_name(MOE4_NVFP4), "NVFP4");
    assert_string_equal(moe4_dtype_name(MOE4_N_DTYPES), "?");
    assert_string_equal(moe4_dtype_name((moe4_dtype)-1), "?");
    assert_int_equal(moe4_dtype_bytes(MOE4_NVFP4), 0);
    assert_int_equal(moe4_dtype_bytes(MOE4_N_DTYPES), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_malformed),  TEST(test_header_length), TEST(test_depth),  TEST(test_long_name),
        TEST(test_not_a_file), TEST(test_well_formed),   TEST(test_dtypes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
