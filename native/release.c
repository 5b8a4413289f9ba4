/* release.c - give log segments back: keep what is worth keeping as read slots, then let the
 * segment wait for a checkpoint.
 *
 * Happy path: the tail segment of a chain is wholly destaged and free segments run low (three
 * quarters of all while the guests rest, one while they write) -> read it
 * -> each block that the index still finds here is offered to the slots (admission decides) and
 * written there from the scan's memory -> the index forgets it -> no pins left -> the segment
 * leaves the chain and waits until a checkpoint that began later is durable.
 *
 * What a crash leaves: the segment is untouched until that checkpoint; the last checkpoint's index
 * may point into it, rightly.
 * Failure modes: unreadable or not verifying: its data is at the store already; the index forgets
 * it, slots get nothing.
 */
#include "encode.h"

/* Of the log that is free. Resting: room for the next burst, in which nothing is given back until
 * the log is short; that is also where checkpoints begin to hurry (engine.c). */
enum { RESTING_QUARTERS = 3, SHORT_QUARTERS = 1 };

struct promotion {
	struct mp_io io;
	struct iovec iov;
	struct mp_engine *engine;
	int64_t slot;
	uint64_t first_block;
	uint32_t count, address;
	uint32_t checksums[MP_SLOT_BLOCKS_MAX];
};

/* Where the records of the tail end. */
static uint64_t end_sequence(const struct mp_engine *engine, const struct volume *volume)
{
	uint32_t next = engine->segments[volume->tail_segment].next;

	return next == NO_SEGMENT ? volume->last_sequence + 1
				  : engine->segments[next].first_sequence;
}

static bool is_releasable(const struct volume *volume)
{
	const struct mp_engine *engine = volume->engine;
	uint32_t tail = volume->tail_segment, i;

	if (tail == NO_SEGMENT || volume->failed)
		return false;
	/* A head too, when nothing is under way to it: or idle volumes would hold a segment each,
	 * for ever. */
	if (tail == volume->head_segment &&
	    (volume->appends_inflight ||
	     (!list_is_empty(&volume->ready) && !volume->share.starved)))
		return false;
	if (end_sequence(engine, volume) > volume->destaged_sequence + 1)
		return false;
	if (engine->cut.volume == volume && engine->cut.scan.segment == tail)
		return false;
	/* A tombstone must be gone before a newer block under it leaves the index. */
	for (i = 0; i < volume->tombstones.count; i++)
		if (volume->tombstones.items[i].sequence <= volume->destaged_sequence)
			return false;
	return true;
}

static bool is_below(const struct mp_engine *engine, uint64_t quarters)
{
	uint64_t wanted = engine->segment_count * quarters / 4;
	uint64_t minimums = engine->segment_count / 4 + engine->unmet_segments / 2;

	return engine->segments_free + engine->segments_waiting <
	       (wanted > minimums ? wanted : minimums);
}

/* Reading segments and writing slots would take the device from a burst of writes. */
static uint64_t rests_from_ns(const struct mp_engine *engine)
{
	return engine->appended_ns + RELEASE_REST_NS;
}

static bool release_wanted(const struct mp_engine *engine)
{
	return is_below(engine, SHORT_QUARTERS) || engine->release_pressed ||
	       (is_below(engine, RESTING_QUARTERS) && rests_from_ns(engine) <= engine->now_ns) ||
	       engine->index.zeros > engine->zeros_max / 2;
}

/* When the guests will have rested for long enough; UINT64_MAX: nothing waits for that. */
uint64_t release_timer_ns(const struct mp_engine *engine)
{
	bool waits = !engine->release.volume && is_below(engine, RESTING_QUARTERS) &&
		     rests_from_ns(engine) > engine->now_ns;

	return waits ? rests_from_ns(engine) : UINT64_MAX;
}

static struct volume *choose(const struct mp_engine *engine)
{
	struct volume *best = NULL;
	uint64_t most = 0;
	uint32_t i;

	/* The longest releasable chain first; ordinals count segments. */
	for (i = 0; i < engine->volume_count; i++) {
		struct volume *volume = engine->volumes[i];
		uint64_t length;

		if (!volume || !is_releasable(volume))
			continue;
		length = volume->head_ordinal - engine->segments[volume->tail_segment].ordinal;
		if (!best || length > most) {
			most = length;
			best = volume;
		}
	}
	return best;
}

/* ---- promotion ---- */

static void forget_block(struct volume *volume, uint64_t block, uint32_t address)
{
	struct index_slot *slot = index_find(&volume->engine->index, volume->number, block);

	if (slot && slot->address == address)
		index_delete(&volume->engine->index, slot);
}

static bool is_current(struct volume *volume, uint64_t block, uint32_t address)
{
	const struct index_slot *slot =
		index_find(&volume->engine->index, volume->number, block);
	uint64_t range = tombstones_find(&volume->tombstones, block);

	return slot && slot->address == address &&
	       (!range || (int32_t)(slot->sequence - (uint32_t)range) > 0);
}

static void promotion_done(struct mp_io *io)
{
	struct promotion *promotion = io->context;
	struct mp_engine *engine = promotion->engine;
	struct volume *volume = engine->release.volume;
	uint32_t i;

	engine->ios_inflight--;
	if (io->result < 0)
		engine->counters.device_errors++;
	for (i = 0; i < promotion->count; i++) {
		uint64_t block = promotion->first_block + i;
		if (io->result >= 0 && is_current(volume, block, promotion->address + i)) {
			mp_slots_install(engine->slots, promotion->slot, block,
					 promotion->checksums[i]);
			engine->counters.promoted_blocks++;
		}
		forget_block(volume, block, promotion->address + i);
		mp_slots_unpin(engine->slots, promotion->slot);
	}
	checkpoint_note_fill(engine, promotion->iov.iov_len);
	free(promotion);
	engine->release.fills--;
}

static uint32_t claim(struct volume *volume, uint64_t block, uint32_t count, int64_t *slot)
{
	uint32_t claimed = 0;

	while (claimed < count) {
		int64_t got = mp_slots_reserve(volume->engine->slots, volume->origin,
					       block + claimed);
		if (got < 0)
			break;
		*slot = got;
		claimed++;
	}
	return claimed;
}

/* While writes are short of log, only what was read lately is worth a second write to the device: a
 * stream of writes would pay for every block twice, just when it can least. */
static bool is_worth_keeping(const struct volume *volume, uint64_t block)
{
	const struct mp_engine *engine = volume->engine;

	return !is_below(engine, SHORT_QUARTERS) ||
	       mp_slots_frequency(engine->slots, volume->origin, block) > 0;
}

/* Write what the slots admit of consecutive blocks of one slot; returns how many of them. */
static uint32_t promote(struct mp_engine *engine, const struct mp_extent *extent, uint64_t block,
			uint32_t count, const uint8_t *data, uint32_t address)
{
	struct promotion *promotion;
	int64_t slot = -1;
	uint32_t i, claimed = claim(engine->release.volume, block, count, &slot);

	if (claimed == 0)
		return 0;
	promotion = calloc(1, sizeof *promotion);
	if (!promotion) {
		for (i = 0; i < claimed; i++)
			mp_slots_unpin(engine->slots, slot);
		return 0;
	}
	promotion->engine = engine;
	promotion->slot = slot;
	promotion->first_block = block;
	promotion->count = claimed;
	promotion->address = address;
	for (i = 0; i < claimed; i++)
		promotion->checksums[i] =
			mp_slots_checksum(extent->checksum[block - extent->first_block + i]);
	promotion->iov.iov_base = (void *)(uintptr_t)data;
	promotion->iov.iov_len = (size_t)claimed * MP_BLOCK_BYTES;
	promotion->io.op = MP_OP_WRITE;
	promotion->io.iov = &promotion->iov;
	promotion->io.iov_count = 1;
	promotion->io.length_bytes = promotion->iov.iov_len;
	promotion->io.offset_bytes = engine->super.slots_offset_bytes +
				     (uint64_t)slot * engine->super.slot_bytes +
				     block % engine->slot_blocks * MP_BLOCK_BYTES;
	promotion->io.done = promotion_done;
	promotion->io.context = promotion;
	engine->release.fills++;
	engine->counters.slot_writes++;
	engine->counters.slot_bytes_written += promotion->iov.iov_len;
	engine_submit(engine, &promotion->io);
	return claimed;
}

static void release_data(struct mp_engine *engine, const struct mp_extent *extent,
			 const uint8_t *data, uint32_t address)
{
	struct volume *volume = engine->release.volume;
	uint32_t i, run, kept;

	for (i = 0; i < extent->block_count; i += run) {
		uint64_t block = extent->first_block + i;
		uint64_t room = engine->slot_blocks - block % engine->slot_blocks;
		bool good = is_current(volume, block, address + i);

		for (run = 1; i + run < extent->block_count && run < room &&
			      is_current(volume, block + run, address + i + run) == good;
		     run++)
			;
		kept = 0;
		if (good && is_worth_keeping(volume, block) &&
		    mp_extent_verify(extent, i, run, data + (uint64_t)i * MP_BLOCK_BYTES,
					     (uint64_t)run * MP_BLOCK_BYTES) == 0)
			kept = promote(engine, extent, block, run,
				       data + (uint64_t)i * MP_BLOCK_BYTES, address + i);
		for (; kept < run; kept++)
			forget_block(volume, block + kept, address + i + kept);
	}
}

/* Short zeroes of this segment: the store has them; the index need not. */
static void release_zeroes(struct mp_engine *engine, const struct mp_extent *extent)
{
	struct volume *volume = engine->release.volume;
	uint64_t i;

	for (i = 0; extent->block_count < RANGE_BLOCKS_MIN && i < extent->block_count; i++) {
		struct index_slot *slot =
			index_find(&engine->index, volume->number, extent->first_block + i);
		if (slot && slot->address == 0 && slot->sequence == (uint32_t)extent->sequence)
			index_delete(&engine->index, slot);
	}
}

/* ---- walking the segment ---- */

static void scan_done(struct mp_io *io)
{
	struct mp_engine *engine = io->context;

	if (!scan_arrived(engine, &engine->release.scan))
		engine->release.parsed = engine->release.broken = true;
}

static bool at_end(const struct mp_engine *engine)
{
	return engine->release.next_sequence == engine->release.end_sequence;
}

/* Offer extents of the record at the parse position; returns the blocks looked at. True when the
 * record is done. */
static bool release_record(struct mp_engine *engine, uint32_t *steps)
{
	struct release *release = &engine->release;
	const uint8_t *bytes = release->scan.memory + release->parse_offset_bytes;
	const struct mp_record *record = (const struct mp_record *)(const void *)bytes;
	const struct mp_extent *table =
		(const struct mp_extent *)(const void *)(bytes + MP_RECORD_HEADER_BYTES);

	if (release->extent == 0)
		release->payload_offset_bytes =
			release->parse_offset_bytes + record->header_length_bytes;
	for (; release->extent < record->extent_count && *steps; release->extent++) {
		const struct mp_extent *extent = &table[release->extent];
		uint64_t place = segment_offset_bytes(engine, release->scan.segment) +
				 release->payload_offset_bytes;

		if (release->fills >= FILLS_MAX)
			return false;
		if (extent->codec == MP_CODEC_NONE)
			release_data(engine, extent,
				     release->scan.memory + release->payload_offset_bytes,
				     (uint32_t)(place / MP_BLOCK_BYTES));
		else
			release_zeroes(engine, extent);
		release->payload_offset_bytes += extent->stored_length_bytes;
		*steps -= *steps < 4 ? *steps : 4;
	}
	return release->extent == record->extent_count;
}

static void walk(struct mp_engine *engine)
{
	struct release *release = &engine->release;
	uint32_t steps = PROMOTE_STEPS;

	while (!release->parsed && !release->scan.busy && steps) {
		const struct mp_record *record =
			(const struct mp_record *)(const void *)(release->scan.memory +
								 release->parse_offset_bytes);
		int64_t length;

		if (at_end(engine)) {
			release->parsed = true;
			break;
		}
		length = scan_record(engine, &release->scan, release->volume,
				     release->parse_offset_bytes, release->next_sequence);
		if (length == -EAGAIN) {
			scan_more(engine, &release->scan, scan_done);
			break;
		}
		if (length < 0) {
			engine->counters.log_checksum_errors++;
			release->parsed = release->broken = true;
			break;
		}
		if (!release_record(engine, &steps))
			break;
		release->extent = 0;
		release->parse_offset_bytes += (uint64_t)length;
		release->next_sequence = record->last_sequence + 1;
	}
}

/* The segment could not be walked: find by place what the index still has of it. */
static void forget_by_place(struct mp_engine *engine, uint32_t segment)
{
	uint64_t start = index_walk_start(&engine->index), step = 0;

	while (step < engine->index.capacity) {
		struct index_slot *slot = index_walk(&engine->index, start, step);
		if (index_is_live(slot) && slot->address &&
		    segment_of_address(engine, slot->address) == segment)
			index_delete(&engine->index, slot);
		else
			step++;
	}
}

static void finish(struct mp_engine *engine)
{
	struct release *release = &engine->release;
	struct volume *volume = release->volume;
	uint32_t at = release->scan.segment;
	struct segment *segment = &engine->segments[at];

	if (release->broken)
		forget_by_place(engine, at);
	release->broken = false;
	if (segment->pins)
		return; /* reads in flight; nothing new can find it */
	volume->tail_segment = segment->next;
	if (volume->head_segment == at)
		volume->head_segment = NO_SEGMENT; /* the chain goes on in a new one */
	if (volume->cut_segment == at)
		volume->cut_segment = NO_SEGMENT;
	volume->release_generation++;
	engine->shares_stale = true;
	segment->state = SEGMENT_WAITING;
	segment->next = NO_SEGMENT;
	segment->released_serial = engine->checkpoint.serial;
	engine->segments_waiting++;
	if (fault(engine, MP_FAULT_REUSE_SEGMENT_EARLY)) {
		segment->state = SEGMENT_FREE;
		engine->segments_waiting--;
		engine->segments_free++;
	}
	release->volume = NULL;
}

void release_step(struct mp_engine *engine)
{
	struct release *release = &engine->release;

	if (!release->volume) {
		if (engine->stopping || engine->rescue.stage || !release_wanted(engine))
			return;
		release->volume = choose(engine);
		if (!release->volume)
			return;
		release->parsed = release->broken = false;
		/* From here on blocks leave the index: what was asked of the store before is too
		 * old to keep. */
		release->volume->release_generation++;
		release->extent = 0;
		release->parse_offset_bytes = 0;
		release->end_sequence = end_sequence(engine, release->volume);
		if (release->volume->tail_segment == release->volume->head_segment)
			/* full */
			release->volume->head_offset_bytes = engine->super.log_segment_bytes;
		release->next_sequence =
			engine->segments[release->volume->tail_segment].first_sequence;
		scan_start(engine, &release->scan, release->volume->tail_segment, 0, scan_done);
		return;
	}
	walk(engine);
	if (release->parsed && !release->scan.busy && !release->fills)
		finish(engine);
}
