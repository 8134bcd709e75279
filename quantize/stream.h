/* One shard from the input to its place on the disk. */
#ifndef QUANTIZE_STREAM_H
#define QUANTIZE_STREAM_H

#include "quantize/folder.h"
#include "quantize/plan.h"

/* Writes shard `shard` unless a complete one is there (*kept_ret). Counts into report; *done counts input bytes for the progress. */
moe4_status quantize_shard_write(struct quantize_plan *plan, const struct quantize_folder *folder, struct quantize_shard *shard,
                                 struct quantize_report *report, uint64_t *done);
/* The same for a shard that is there: counts what was lost by it, and writes nothing. */
moe4_status quantize_shard_look(struct quantize_plan *plan, struct quantize_shard *shard, struct quantize_report *report, uint64_t *done);
/* Whether the shard stands there complete: its name is given only then, so its size and header are enough to see that it is this plan's. */
bool quantize_shard_is_there(const struct quantize_shard *shard, const struct quantize_folder *folder);

#endif
