/* main for a fuzz target without libFuzzer: runs it over files and folders of inputs, and over generated ones.
 * Usage: fuzz_TARGET [-runs=N] [-max_len=BYTES] PATH... . The options are libFuzzer's; inputs are made from fixed seeds, half of them by
 * changing a few bytes of one of the files. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_FILES = 4096 };

static struct {
    uint8_t *data;
    size_t size;
} files[MAX_FILES];
static size_t n_files;

static void give_up(const char *what) {
    perror(what);
    exit(2);
}

static void read_file(const char *path, size_t size) {
    FILE *f = fopen(path, "rb");
    uint8_t *data = malloc(size ? size : 1);
    if (!f || !data || fread(data, 1, size, f) != size) give_up(path);
    fclose(f);
    if (n_files == MAX_FILES) give_up("too many files");
    files[n_files].data = data;
    files[n_files++].size = size;
}

static void read_path(const char *path) {
    struct stat s;
    if (stat(path, &s) != 0) give_up(path);
    if (!S_ISDIR(s.st_mode)) {
        read_file(path, (size_t)s.st_size);
        return;
    }
    struct dirent **entries;
    int n = scandir(path, &entries, NULL, alphasort);
    if (n < 0) give_up(path);
    for (int i = 0; i < n; i++) {
        char below[4096];
        if (entries[i]->d_name[0] != '.' && snprintf(below, sizeof below, "%s/%s", path, entries[i]->d_name) < (int)sizeof below)
            read_path(below);
        free(entries[i]);
    }
    free(entries);
}

static uint64_t next(uint64_t *state) { /* xorshift64* */
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1d;
}

static void run(const uint8_t *data, size_t size) {
    uint8_t *copy = malloc(size ? size : 1); /* exactly as long as the input: a sanitizer sees reads past it */
    if (!copy) give_up("memory");
    if (size) memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

static void run_generated(uint64_t seed, size_t max_len) {
    uint64_t state = seed * 0x9e3779b97f4a7c15 + 1;
    size_t size = (size_t)(next(&state) % (max_len + 1));
    uint8_t *data;
    if (n_files && seed % 2) {
        size_t file = (size_t)(next(&state) % n_files);
        if (size > files[file].size || next(&state) % 4) size = files[file].size;
        data = malloc(size ? size : 1);
        if (!data) give_up("memory");
        memcpy(data, files[file].data, size);
        for (uint64_t n = size ? 1 + next(&state) % 8 : 0; n; n--) data[next(&state) % size] = (uint8_t)next(&state);
    } else {
        data = malloc(size ? size : 1);
        if (!data) give_up("memory");
        for (size_t i = 0; i < size; i++) data[i] = (uint8_t)(next(&state) >> 56);
    }
    run(data, size);
    free(data);
}

int main(int argc, char **argv) {
    unsigned long long runs = 0, max_len = 4096;
    for (int i = 1; i < argc; i++)
        if (sscanf(argv[i], "-runs=%llu", &runs) != 1 && sscanf(argv[i], "-max_len=%llu", &max_len) != 1) read_path(argv[i]);
    for (size_t i = 0; i < n_files; i++) run(files[i].data, files[i].size);
    for (unsigned long long seed = 1; seed <= runs; seed++) run_generated(seed, (size_t)max_len);
    printf("%zu files and %llu generated inputs\n", n_files, runs);
    for (size_t i = 0; i < n_files; i++) free(files[i].data);
    return 0;
}
