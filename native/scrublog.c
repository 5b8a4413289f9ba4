/* scrublog.c - verification of the write log: chain by chain, record by record.
 *
 * Read as destage will read it, and judged by what hangs on it *when it is judged*: of a record
 * that is not yet destaged everything is needed, its header and table, and every block, because a
 * batch is cut from whole records, also from blocks that were overwritten since. Of one that is
 * destaged, the blocks that reads still find here.
 *
 * Happy path: a segment of the stage's kind (with undestaged records, or without) -> read in steps,
 * as far as it was applied when that began -> each record verified -> the next segment. Between two
 * steps nothing is pinned: a segment that was released, purged or left by a rescue meanwhile is
 * simply left.
 *
 * Failure modes: what does not verify, or cannot be read, is read once more before it is believed:
 * a volume must not stop for a bit that flipped on its way. Then, undestaged: the volume fails,
 * loudly, as when destage finds it. Nothing that the guest could still write would mend it: the
 * batches behind the damage wait for this record whatever becomes of its blocks, so each further
 * acknowledgement would promise what no store will get. Cut, and on its way to the store: the next
 * pass sees what came of it. Destaged: the index forgets the block,
 * reads miss and the store has it; a header that is gone takes what is destaged behind it in its
 * segment. The checkpoint that follows forgets it, too.
 */
#include "scrub_internal.h"

#include <stdio.h>

void scrub_log_begin(struct mp_engine *engine)
{
	struct scrub *scrub = engine->scrub;

	scrub->number = 0;
	scrub->next_ordinal = scrub->last_ordinal = 0;
	scrub->volume = NULL;
}

void scrub_forget(struct mp_engine *engine, const struct volume *volume)
{
	if (engine->scrub && (!volume || engine->scrub->volume == volume))
		engine->scrub->volume = NULL;
}

bool scrub_is_reading(const struct volume *volume)
{
	const struct mp_engine *engine = volume->engine;

	return engine->scrub && engine->scrub->scan.busy &&
	       engine->segments[engine->scrub->scan.segment].number == volume->number;
}

/* ---- reading ---- */

static void scan_done(struct mp_io *io)
{
	struct mp_engine *engine = io->context;

	engine->scrub->unreadable = !scan_arrived(engine, &engine->scrub->scan);
}

static void charge(struct mp_engine *engine)
{
	scrub_charge(engine, engine->scrub->scan.iov.iov_len);
	engine->counters.scrub_read_bytes += engine->scrub->scan.iov.iov_len;
}

/* From the next record on. */
static void read_here(struct mp_engine *engine, uint32_t segment)
{
	struct scrub *scrub = engine->scrub;

	scrub->unreadable = false;
	scan_start(engine, &scrub->scan, segment, scrub->offset_bytes, scan_done);
	charge(engine);
}

static void read_more(struct mp_engine *engine)
{
	scan_more(engine, &engine->scrub->scan, scan_done);
	charge(engine);
}

static bool holds_undestaged(const struct volume *volume, uint32_t segment)
{
	const struct segment *segments = volume->engine->segments;
	uint32_t next = segments[segment].next;
	uint64_t last = next == NO_SEGMENT ? volume->applied_sequence
					   : segments[next].first_sequence - 1;

	return last > volume->destaged_sequence;
}

/* The next segment of this volume in this stage. */
static uint32_t segment_of(const struct mp_engine *engine, const struct volume *volume)
{
	const struct scrub *scrub = engine->scrub;
	uint32_t at = volume->tail_segment;

	for (; at != NO_SEGMENT; at = engine->segments[at].next) {
		const struct segment *segment = &engine->segments[at];

		if (segment->ordinal >= scrub->next_ordinal &&
		    segment->ordinal <= scrub->last_ordinal &&
		    segment->first_sequence <= volume->applied_sequence &&
		    holds_undestaged(volume, at) == (scrub->stage == MP_SCRUB_DIRTY))
			return at;
	}
	return NO_SEGMENT;
}

static void begin_segment(struct mp_engine *engine, struct volume *volume, uint32_t at)
{
	struct scrub *scrub = engine->scrub;

	scrub->volume = volume;
	scrub->ordinal = engine->segments[at].ordinal;
	scrub->next_ordinal = scrub->ordinal + 1;
	scrub->offset_bytes = 0;
	scrub->next_sequence = engine->segments[at].first_sequence;
	scrub->limit_sequence = volume->applied_sequence;
	scrub->doubted = false;
	read_here(engine, at);
}

/* A chain ends, for one pass, where it did when its turn came: it may grow faster than we read. */
static bool next_segment(struct mp_engine *engine)
{
	struct scrub *scrub = engine->scrub;

	for (; scrub->number < engine->volume_count; scrub->number++) {
		struct volume *volume = engine->volumes[scrub->number];
		uint32_t at = NO_SEGMENT;

		if (volume && !volume->failed) {
			if (scrub->next_ordinal == 0)
				scrub->last_ordinal = volume->applied_ordinal;
			at = segment_of(engine, volume);
		}
		if (at != NO_SEGMENT) {
			begin_segment(engine, volume, at);
			return true;
		}
		scrub->next_ordinal = 0;
	}
	return false;
}

/* ---- what was found ---- */

static void lost(struct volume *volume, int status, const char *where, uint64_t number)
{
	char what[120];

	volume->engine->counters.scrub_log_errors++;
	snprintf(what, sizeof what, "%s %llu of the write log %s; destage stopped, nothing dropped",
		 where, (unsigned long long)number,
		 status == -EIO ? "cannot be read" : "does not verify");
	scrub_found(volume, status, "%s", what);
	volume_fail(volume, EIO, what);
}

/* What was asked of the store before is older than what is dropped: see fill_allowed. */
static void forget(struct volume *volume, struct index_slot *slot)
{
	volume->release_generation++;
	index_delete(&volume->engine->index, slot);
	volume->engine->checkpoint.wanted = true;
}

/* A block that is destaged and served from here. While an older trim covers it, that would hide
 * what the store has: it stays, and the next pass finds it again. */
static void drop(struct volume *volume, uint64_t block)
{
	struct mp_engine *engine = volume->engine;
	bool covered = tombstones_find(&volume->tombstones, block) != 0;

	engine->counters.scrub_log_errors++;
	if (!covered)
		forget(volume, index_find(&engine->index, volume->number, block));
	scrub_found(volume, -EBADMSG, "block %llu: its place in the write log does not verify; %s",
		    (unsigned long long)block,
		    covered ? "kept until a trim before it is swept"
			    : "dropped, the store has it");
}

/* Nothing tells what lies behind this place in its segment: all that is destaged of it goes. One
 * walk over the index, as when such a segment is released. */
static void drop_rest(struct mp_engine *engine, struct volume *volume, int status)
{
	const struct scrub *scrub = engine->scrub;
	uint64_t begin = segment_offset_bytes(engine, scrub->scan.segment) + scrub->offset_bytes;
	uint64_t end = segment_offset_bytes(engine, scrub->scan.segment) +
		       engine->super.log_segment_bytes;
	uint64_t start = index_walk_start(&engine->index), step = 0, dropped = 0;

	while (step < engine->index.capacity) {
		struct index_slot *slot = index_walk(&engine->index, start, step);
		uint64_t at = (uint64_t)slot->address * MP_BLOCK_BYTES;

		if (index_is_live(slot) && at >= begin && at < end &&
		    index_number(slot) == volume->number &&
		    (int32_t)(slot->sequence - (uint32_t)volume->destaged_sequence) <= 0 &&
		    !tombstones_find(&volume->tombstones, index_block(slot))) {
			forget(volume, slot);
			dropped++;
		} else
			step++;
	}
	engine->counters.scrub_log_errors++;
	scrub_found(volume, status,
		    "record %llu of the write log %s; it is destaged, %llu blocks dropped, "
		    "the store has them",
		    (unsigned long long)scrub->next_sequence,
		    status == -EIO ? "cannot be read" : "does not verify",
		    (unsigned long long)dropped);
}

/* ---- records ---- */

/* A batch with it is cut: a copy that was verified is on its way, and what becomes of that decides.
 * To stop the volume would stop the copy. */
static bool is_on_its_way(const struct volume *volume, uint64_t sequence)
{
	return volume->batch && sequence > volume->destaged_sequence &&
	       sequence <= volume->batch_last_sequence;
}

static bool is_served(const struct volume *volume, uint64_t block, uint32_t address)
{
	const struct index_slot *slot =
		index_find(&volume->engine->index, volume->number, block);
	uint64_t range = tombstones_find(&volume->tombstones, block);

	return slot && slot->address == address &&
	       (!range || (int32_t)(slot->sequence - (uint32_t)range) > 0);
}

/* Blocks of an extent that are needed and do not verify. act: drop them, or fail the volume. */
static uint32_t check_extent(struct volume *volume, const struct mp_extent *extent,
			     const uint8_t *data, uint32_t address, bool undestaged, bool act)
{
	uint32_t i, bad = 0;

	for (i = 0; i < extent->block_count; i++) {
		uint64_t block = extent->first_block + i;

		if (!undestaged && !is_served(volume, block, address + i))
			continue;
		volume->engine->counters.scrub_verified_bytes += act ? 0 : MP_BLOCK_BYTES;
		if (mp_block_checksum(volume->seed, block, data + (uint64_t)i * MP_BLOCK_BYTES,
				      MP_BLOCK_BYTES) == extent->checksum[i])
			continue;
		bad++;
		if (act && undestaged)
			lost(volume, -EBADMSG, "block", block);
		else if (act)
			drop(volume, block);
	}
	return bad;
}

static uint32_t check_record(struct mp_engine *engine, bool act)
{
	struct scrub *scrub = engine->scrub;
	struct volume *volume = scrub->volume;
	const uint8_t *bytes = scrub->scan.memory + scrub->offset_bytes;
	const struct mp_record *record = (const struct mp_record *)(const void *)bytes;
	const struct mp_extent *table =
		(const struct mp_extent *)(const void *)(bytes + MP_RECORD_HEADER_BYTES);
	uint64_t at = scrub->offset_bytes + record->header_length_bytes;
	uint32_t i, bad = 0;

	for (i = 0; i < record->extent_count; i++) {
		uint64_t place = segment_offset_bytes(engine, scrub->scan.segment) + at;

		if (table[i].codec == MP_CODEC_NONE)
			bad += check_extent(volume, &table[i], scrub->scan.memory + at,
					    (uint32_t)(place / MP_BLOCK_BYTES),
					    record->last_sequence > volume->destaged_sequence, act);
		at += table[i].stored_length_bytes;
	}
	return bad;
}

/* The segment is still what it was when we began with it. */
static bool is_there(const struct mp_engine *engine)
{
	const struct scrub *scrub = engine->scrub;
	const struct segment *segment = &engine->segments[scrub->scan.segment];

	return !scrub->volume->failed && segment->state == SEGMENT_CHAIN &&
	       segment->number == scrub->volume->number && segment->ordinal == scrub->ordinal;
}

static bool is_at_end(const struct mp_engine *engine)
{
	const struct scrub *scrub = engine->scrub;
	uint32_t next = engine->segments[scrub->scan.segment].next;

	return scrub->next_sequence > scrub->limit_sequence ||
	       (next != NO_SEGMENT &&
		engine->segments[next].first_sequence == scrub->next_sequence);
}

/* The record here cannot be had: nor can what follows it. */
static void no_record(struct mp_engine *engine, int status)
{
	struct scrub *scrub = engine->scrub;
	struct segment *segment = &engine->segments[scrub->scan.segment];

	if (is_on_its_way(scrub->volume, scrub->next_sequence)) {
		scrub->volume = NULL;
		return;
	}
	if (scrub->next_sequence > scrub->volume->destaged_sequence)
		lost(scrub->volume, status, "record", scrub->next_sequence);
	else if (!segment->damage_told)
		drop_rest(engine, scrub->volume, status);
	segment->damage_told = true;
	scrub->volume = NULL;
}

/* Verify what is in memory. True: more is being read; false: done with this segment. */
static bool walk(struct mp_engine *engine)
{
	struct scrub *scrub = engine->scrub;

	while (scrub->volume && is_there(engine) && !is_at_end(engine)) {
		const struct mp_record *record =
			(const struct mp_record *)(const void *)(scrub->scan.memory +
								 scrub->offset_bytes);
		int64_t length = scrub->unreadable
					 ? -EIO
					 : scan_record(engine, &scrub->scan, scrub->volume,
						       scrub->offset_bytes, scrub->next_sequence);

		if (length == -EAGAIN) {
			read_more(engine);
			return true;
		}
		if ((length < 0 || check_record(engine, false)) && !scrub->doubted) {
			scrub->doubted = true;
			read_here(engine, scrub->scan.segment);
			return true;
		}
		if (length < 0) {
			no_record(engine, length == -EIO ? -EIO : -EBADMSG);
			return false;
		}
		if (scrub->doubted && !is_on_its_way(scrub->volume, record->last_sequence))
			check_record(engine, true);
		scrub->doubted = false;
		scrub->offset_bytes += (uint64_t)length;
		scrub->next_sequence = record->last_sequence + 1;
	}
	scrub->volume = NULL;
	return false;
}

bool scrub_log_step(struct mp_engine *engine)
{
	return (engine->scrub->volume && walk(engine)) || next_segment(engine);
}
