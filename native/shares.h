/* shares.h - what each volume may take of the write log, and how its guest is slowed; shares.c.
 *
 * Engine thread only. All of it is derived state: nothing of it is on the device.
 */
#ifndef MILLPOND_SHARES_H
#define MILLPOND_SHARES_H

#include <stdbool.h>
#include <stdint.h>

#include "engine.h"

struct volume;

/* What a piece of log is for: a guest's data; its trims and zeroes of ranges, and tellings of a
 * sync; records that a rescue writes again. */
enum log_use { LOG_DATA, LOG_RANGE, LOG_RESCUE };

struct volume_share {
	struct mp_volume_shares set;    /* by the operator; zeroes: nothing */
	/* As of the last shares_update: */
	uint64_t least_segments;        /* reserved for it */
	uint64_t limit_segments;        /* most that may hold undestaged data, now */
	uint64_t held_segments, dirty_segments;
	int64_t dirty_base_bytes;       /* undestaged bytes, less the head's offset */
	/* Data waits until then; its guest is slowed. */
	uint64_t paced_until_ns;
	bool starved;                   /* data waited for a segment at the last attempt */
};

/* Anything changed that limits depend on: segments taken, given back, destaged; volumes. */
void shares_update(struct mp_engine *engine);
/* Minimum and maximum of each volume's slots, after they were set or an origin changed. */
void shares_of_slots(struct mp_engine *engine);
/* May this volume take one more segment, for data or ranges? A refusal sees to it that what can be
 * given back is, where that helps. */
bool share_allows_segment(struct volume *volume, enum log_use use);
/* May data go into a record now? Else when (UINT64_MAX: when something is destaged). */
bool share_admits(const struct volume *volume);
uint64_t share_timer_ns(const struct volume *volume);
/* How much payload the next record may carry: less when slowed, so that the guest goes evenly. */
uint64_t share_record_bytes(const struct volume *volume);
/* A record of data of so many bytes is on its way. */
void share_charge(struct volume *volume, uint64_t bytes);
bool share_is_slowed(const struct volume *volume);
uint64_t share_dirty_bytes(const struct volume *volume);
uint64_t share_limit_bytes(const struct volume *volume);
/* What the guest may write per second now; UINT64_MAX: not slowed, 0: stopped. */
uint64_t share_rate_bytes_per_s(const struct volume *volume);
/* Segments that nobody has reserved: free ones, less the reserve and unmet minimums. */
uint64_t shares_spare_segments(const struct mp_engine *engine);

#endif
