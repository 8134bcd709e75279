/* What this machine could do at most: how fast its memory is read and its disk written. */
#ifndef QUANTIZE_SPEED_H
#define QUANTIZE_SPEED_H

#include "lm/lm.h"

/* Bytes a second that all threads together read of memory; 0 when it cannot be measured. */
double quantize_memory_rate(struct lm *lm);
/* Bytes a second that reach the disk of this folder, synced, from a file without a name of about `like` bytes, 64 to 512 MB: short writes
 * may be faster than long ones. 0 when it cannot be measured. */
double quantize_disk_rate(const char *folder, uint64_t like);

#endif
