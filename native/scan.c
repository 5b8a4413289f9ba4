/* scan.c - read a log segment into memory, a step at a time: for destage, release, verification.
 *
 * The caller's done callback runs with scan->end_bytes moved on, or with io.result negative. The
 * segment is pinned while a read is in flight.
 */
#include "engine_internal.h"

static void submit(struct mp_engine *engine, struct scan *scan, void (*done)(struct mp_io *))
{
	uint64_t room = engine->super.log_segment_bytes - scan->end_bytes;
	uint64_t step = scan->step_bytes ? scan->step_bytes : SCAN_STEP_BYTES;

	assert(!scan->busy && room);
	scan->busy = true;
	memset(&scan->io, 0, sizeof scan->io);
	scan->iov.iov_base = scan->memory + scan->end_bytes;
	scan->iov.iov_len = room < step ? room : step;
	scan->io.op = MP_OP_READ;
	scan->io.iov = &scan->iov;
	scan->io.iov_count = 1;
	scan->io.offset_bytes = segment_offset_bytes(engine, scan->segment) + scan->end_bytes;
	scan->io.length_bytes = scan->iov.iov_len;
	scan->io.done = done;
	scan->io.context = engine;
	engine->segments[scan->segment].pins++;
	engine_submit(engine, &scan->io);
}

void scan_start(struct mp_engine *engine, struct scan *scan, uint32_t segment, uint64_t begin_bytes,
		void (*done)(struct mp_io *))
{
	scan->segment = segment;
	scan->begin_bytes = scan->end_bytes = begin_bytes;
	submit(engine, scan, done);
}

void scan_more(struct mp_engine *engine, struct scan *scan, void (*done)(struct mp_io *))
{
	submit(engine, scan, done);
}

bool scan_arrived(struct mp_engine *engine, struct scan *scan)
{
	engine->ios_inflight--;
	engine->segments[scan->segment].pins--;
	scan->busy = false;
	if (scan->io.result < 0) {
		engine->counters.device_errors++;
		return false;
	}
	scan->end_bytes += scan->iov.iov_len;
	return true;
}

/* The record at offset, when it is whole in memory and follows on sequence: its length; -EAGAIN:
 * read more; else it is no record of this chain. */
int64_t scan_record(const struct mp_engine *engine, const struct scan *scan,
		    const struct volume *volume, uint64_t offset_bytes, uint64_t next_sequence)
{
	const uint8_t *at = scan->memory + offset_bytes;
	const struct mp_record *record = (const struct mp_record *)(const void *)at;
	bool more = scan->end_bytes < engine->super.log_segment_bytes;
	int64_t length;

	if (scan->end_bytes - offset_bytes < MP_BLOCK_BYTES)
		return more ? -EAGAIN : -EPROTO;
	length = mp_record_check(at, scan->end_bytes - offset_bytes);
	if (length == -EAGAIN)
		return more ? -EAGAIN : -EPROTO;
	if (length < 0)
		return length;
	if (memcmp(record->volume, volume->id, sizeof record->volume) != 0 ||
	    record->segment_offset_bytes != offset_bytes ||
	    record->segment_ordinal != engine->segments[scan->segment].ordinal ||
	    (record->type == MP_RECORD_LOG && record->first_sequence != next_sequence) ||
	    (record->type == MP_RECORD_SYNCED && record->last_sequence != next_sequence - 1) ||
	    (record->type != MP_RECORD_LOG && record->type != MP_RECORD_SYNCED))
		return -EPROTO;
	if ((uint64_t)length > scan->end_bytes - offset_bytes)
		return more ? -EAGAIN : -EPROTO;
	return length;
}
