/* Small files in a temporary folder, for tests of the readers. Failures to write fail the test. */
#ifndef MOE4_TESTS_FILES_H
#define MOE4_TESTS_FILES_H

#include <stddef.h>
#include <stdint.h>

/* Makes an empty folder and returns its path; the next call forgets it. files_remove deletes it with all its files. */
const char *files_make(void);
void files_remove(void);
/* "folder/name"; the text stays until the next call. */
const char *files_path(const char *name);
void files_write(const char *name, const void *data, size_t bytes);
void files_text(const char *name, const char *text);
/* A .safetensors file of a header and n zero bytes of data, or `data` of n bytes. */
void files_safetensors(const char *name, const char *header, const void *data, size_t n);
/* Copies every file of a folder into the temporary one. */
void files_copy_folder(const char *folder);
/* The bytes of a file; the caller frees them. */
uint8_t *files_read(const char *path, size_t *bytes_ret);

#endif
