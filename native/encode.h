/* encode.h - between cut.c (engine thread) and encode.c (helper thread), and scan.c. */
#ifndef MILLPOND_ENCODE_H
#define MILLPOND_ENCODE_H

#include "engine_internal.h"

/* Any thread: touches nothing but *cut and its memory. Returns the frame's bytes, or -EBADMSG: the
 * log does not verify. */
int64_t batch_encode_log(const struct cut *cut, uint8_t **frame);

bool scan_arrived(struct mp_engine *engine, struct scan *scan);
int64_t scan_record(const struct mp_engine *engine, const struct scan *scan,
		    const struct volume *volume, uint64_t offset_bytes, uint64_t next_sequence);

#endif
