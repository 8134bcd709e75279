/* The folder that is being written: what stands in it is complete. */
#ifndef QUANTIZE_FOLDER_H
#define QUANTIZE_FOLDER_H

#include <jansson.h>

#include "lm/lm.h"

struct quantize_folder {
    struct lm *lm;
    const char *path;
    int fd;        /* of the folder, locked; -1 */
    bool finished; /* nothing is left to do, as far as the journal says */
};

/* A file under its temporary name. */
struct quantize_file {
    const struct quantize_folder *folder;
    const char *name;
    int fd;
};

/* The journal: what is being made, there while the folder is unfinished. */
#define QUANTIZE_JOURNAL "moe4-quantize.json"
/* What calibration found, likewise. */
#define QUANTIZE_CALIBRATION ".moe4-calibration"

/* Makes or takes over the folder and writes `task` as its journal; with `resume` an unfinished folder of an equal task, or a folder
 * without a journal (folder->finished: the caller must see whether it is what it would have made). Errors: ARGUMENT (something else is in
 * it, another task's, or another process is at it), IO. */
moe4_status quantize_folder_open(struct quantize_folder *folder, struct lm *lm, const char *path, const json_t *task, bool resume);
/* Drops the journal: the folder is finished. */
moe4_status quantize_folder_finish(struct quantize_folder *folder);
void quantize_folder_close(struct quantize_folder *folder);

/* A new file of a known size (0: unknown). keep syncs and renames it to its name; drop removes it, and does nothing after keep. */
moe4_status quantize_file_create(struct quantize_file *file, const struct quantize_folder *folder, const char *name, uint64_t bytes);
moe4_status quantize_file_write(struct quantize_file *file, const void *data, size_t bytes, uint64_t offset);
moe4_status quantize_file_keep(struct quantize_file *file);
void quantize_file_drop(struct quantize_file *file);
/* pwrite of everything; false with errno. For many threads at once. */
bool quantize_write_at(int fd, const void *data, size_t bytes, uint64_t offset);

/* A whole small file. */
moe4_status quantize_folder_text(const struct quantize_folder *folder, const char *name, const char *text, size_t bytes);
/* True when `name` is a file of just these bytes at its beginning and this size. */
bool quantize_folder_has(const struct quantize_folder *folder, const char *name, const void *begin, size_t n_begin, uint64_t bytes);
/* The bytes of a file, the caller's to free; *data_ret is NULL when it is not there or is not of this size. */
moe4_status quantize_folder_read(const struct quantize_folder *folder, const char *name, void **data_ret, size_t bytes);
/* The text of a safetensors file's header, the caller's to free; false when there is none. */
bool quantize_folder_header(const struct quantize_folder *folder, const char *name, void **text_ret, size_t *bytes_ret);
/* Copies what `in` holds beside the checkpoint itself: tokenizer, licence, subfolders. */
moe4_status quantize_folder_copy(const struct quantize_folder *folder, const char *in);

#endif
