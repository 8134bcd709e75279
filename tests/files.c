#include "files.h"

#include <dirent.h>
#include <stdarg.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

static char folder[64];
static char path[512];

const char *files_make(void) {
    snprintf(folder, sizeof folder, "/tmp/moe4-test-XXXXXX");
    assert_non_null(mkdtemp(folder));
    return folder;
}

const char *files_path(const char *name) {
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

void files_remove(void) {
    DIR *dir = opendir(folder);
    assert_non_null(dir);
    for (const struct dirent *e; (e = readdir(dir));)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0) remove(files_path(e->d_name));
    closedir(dir);
    assert_int_equal(rmdir(folder), 0);
}

void files_write(const char *name, const void *data, size_t bytes) {
    FILE *f = fopen(files_path(name), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    assert_int_equal(fclose(f), 0);
}

void files_text(const char *name, const char *text) {
    files_write(name, text, strlen(text));
}

void files_safetensors(const char *name, const char *header, const void *data, size_t n) {
    size_t h = strlen(header);
    uint8_t *bytes = calloc(1, 8 + h + n);
    assert_non_null(bytes);
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)((uint64_t)h >> 8 * i);
    memcpy(bytes + 8, header, h);
    if (data) memcpy(bytes + 8 + h, data, n);
    files_write(name, bytes, 8 + h + n);
    free(bytes);
}

uint8_t *files_read(const char *file, size_t *bytes_ret) {
    FILE *f = fopen(file, "rb");
    assert_non_null(f);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    *bytes_ret = (size_t)ftell(f);
    rewind(f);
    uint8_t *data = malloc(*bytes_ret + 1);
    assert_non_null(data);
    assert_int_equal(fread(data, 1, *bytes_ret, f), *bytes_ret);
    data[*bytes_ret] = 0;
    fclose(f);
    return data;
}

void files_copy_folder(const char *from) {
    DIR *dir = opendir(from);
    assert_non_null(dir);
    for (const struct dirent *e; (e = readdir(dir));) {
        if (e->d_name[0] == '.') continue;
        char file[512];
        snprintf(file, sizeof file, "%s/%s", from, e->d_name);
        size_t bytes;
        uint8_t *data = files_read(file, &bytes);
        files_write(e->d_name, data, bytes);
        free(data);
    }
    closedir(dir);
}
