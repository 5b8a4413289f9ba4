/* recovery.c - from what a crash left on the device to a state that may serve.
 *
 * Order: newest valid superblock -> its checkpoint (volumes, segment table, tombstones, index,
 * slots) -> first record of every segment that the checkpoint does not know in a chain -> each
 * chain is followed from its position in the checkpoint, record by record, data verified, index and
 * slots brought up to date -> one sync, so that what was found is durable before it is built upon
 * -> a new incarnation in the superblock, synced, before anything is appended.
 *
 * A chain ends at the first record that does not verify or does not follow. When anything behind it
 * proves that the chain had been synced beyond that point, it is not an end but corruption: the
 * volume fails, nothing of it is changed.
 *
 * What a crash during recovery leaves: nothing was written before the superblock; that write goes
 * to the older copy.
 * Failure modes: no valid superblock, an unknown version or feature, a checkpoint that does not
 * verify: one line, no start.
 */
#include <stdio.h>

#include "engine_internal.h"

/* First record of a segment outside the chains of the checkpoint: a chain may go on there. */
struct candidate {
	uint8_t volume[16];
	uint64_t ordinal, previous_checksum, incarnation, synced_sequence;
	bool valid;
	/* not valid, and not blank: its first record may be what is damaged */
	bool suspect;
};
struct recovery {
	struct mp_engine *engine;
	struct candidate *candidates; /* per segment */
	uint8_t *memory;              /* one segment */
	char *message;
	uint64_t message_bytes;
	int error;                    /* met while a chain was followed */
};

static int complain(struct recovery *recovery, int error, const char *what)
{
	snprintf(recovery->message, recovery->message_bytes, "%s", what);
	return error;
}

/* ---- chains ---- */

/* The record at offset of memory, if it is whole and belongs at this place. */
static const struct mp_record *record_at(const struct mp_engine *engine, const uint8_t *memory,
					 uint64_t offset_bytes, int64_t *length)
{
	const struct mp_record *record =
		(const struct mp_record *)(const void *)(memory + offset_bytes);

	if (offset_bytes + MP_BLOCK_BYTES > engine->super.log_segment_bytes)
		return NULL;
	*length = mp_record_check(record, engine->super.log_segment_bytes - offset_bytes);
	if (*length <= 0 || (uint64_t)*length > engine->super.log_segment_bytes - offset_bytes ||
	    record->segment_offset_bytes != offset_bytes ||
	    (record->type != MP_RECORD_LOG && record->type != MP_RECORD_SYNCED))
		return NULL;
	return record;
}

static int read_candidates(struct recovery *recovery)
{
	struct mp_engine *engine = recovery->engine;
	uint32_t i;

	for (i = 0; i < engine->segment_count; i++) {
		struct candidate *candidate = &recovery->candidates[i];
		const struct mp_record *record;
		int64_t length, rc;

		/* The longest header is 64 KiB; its first block tells whether more is worth
		 * reading. The second tells a segment that was never used from one whose header was
		 * wiped. */
		rc = mp_driver_read(engine->driver, 0, segment_offset_bytes(engine, i),
				    recovery->memory, 2 * MP_BLOCK_BYTES);
		record = (const struct mp_record *)(const void *)recovery->memory;
		if (rc >= 0 && record->magic == MP_RECORD_MAGIC &&
		    record->header_length_bytes > MP_BLOCK_BYTES)
			rc = mp_driver_read(engine->driver, 0, segment_offset_bytes(engine, i),
					    recovery->memory, 65536);
		if (rc < 0)
			/* a chain may go on there: to take it for ended could drop writes */
			return (int)rc;
		record = record_at(engine, recovery->memory, 0, &length);
		candidate->suspect = !record && !mp_is_zero(recovery->memory, 2 * MP_BLOCK_BYTES);
		if (!record)
			continue;
		memcpy(candidate->volume, record->volume, sizeof candidate->volume);
		candidate->ordinal = record->segment_ordinal;
		candidate->previous_checksum = record->previous_checksum;
		candidate->incarnation = record->incarnation;
		candidate->synced_sequence = record->synced_sequence;
		candidate->valid = true;
		if (record->incarnation >> 32 > engine->super.incarnation >> 32)
			return complain(recovery, -EBADMSG,
					"the log is newer than the superblock: the newest "
					"superblock "
					"is damaged; nothing was changed");
		if (engine->segments[i].state == SEGMENT_CHAIN)
			engine->segments[i].first_sequence =
				record->type == MP_RECORD_LOG ? record->first_sequence
							      : record->last_sequence + 1;
	}
	return 0;
}

/* The segment of this chain with the lowest ordinal from ordinal on. */
static uint32_t chain_segment(const struct mp_engine *engine, const struct volume *volume,
			      uint64_t ordinal)
{
	uint32_t i, best = NO_SEGMENT;

	for (i = 0; i < engine->segment_count; i++) {
		const struct segment *segment = &engine->segments[i];
		if (segment->state == SEGMENT_CHAIN && segment->number == volume->number &&
		    segment->ordinal >= ordinal &&
		    (best == NO_SEGMENT || segment->ordinal < engine->segments[best].ordinal))
			best = i;
	}
	return best;
}

/* Is this where the checkpoint says it is? The head may hold nothing yet. */
static bool is_sound(const struct recovery *recovery, const struct volume *volume, uint32_t at)
{
	const struct segment *segment = &recovery->engine->segments[at];
	const struct candidate *candidate = &recovery->candidates[at];

	if (segment->ordinal == volume->head_ordinal && volume->head_offset_bytes == 0)
		return true;
	return candidate->valid && candidate->ordinal == segment->ordinal &&
	       memcmp(candidate->volume, volume->id, sizeof candidate->volume) == 0;
}

/* Link the segments of a chain from the checkpoint's table, tail to head; a rescue leaves gaps in
 * the ordinals. Segments that were taken but held nothing applied yet lie behind the checkpoint's
 * position: they are candidates like any free segment. False: damaged. */
static bool link_chain(struct recovery *recovery, struct volume *volume)
{
	struct mp_engine *engine = recovery->engine;
	uint32_t at = chain_segment(engine, volume, 0);
	bool sound = true;

	while (at != NO_SEGMENT) {
		struct segment *segment = &engine->segments[at];
		uint32_t next = chain_segment(engine, volume, segment->ordinal + 1);

		if (segment->ordinal > volume->head_ordinal) {
			segment->state = SEGMENT_FREE;
			engine->segments_free++;
		} else {
			if (volume->head_segment == NO_SEGMENT)
				volume->tail_segment = at;
			else
				engine->segments[volume->head_segment].next = at;
			segment->next = NO_SEGMENT;
			volume->head_segment = at;
			sound &= is_sound(recovery, volume, at);
		}
		at = next;
	}
	/* No segment: all was destaged, and the head released as well. */
	return volume->head_segment == NO_SEGMENT ||
	       (sound && engine->segments[volume->head_segment].ordinal == volume->head_ordinal);
}

static bool incarnation_follows(const struct volume *volume, uint64_t incarnation)
{
	const struct mp_engine *engine = volume->engine;
	uint64_t known = engine->super.incarnation;

	if (fault(engine, MP_FAULT_NO_INCARNATION))
		return true;
	/* Along a chain the counter never falls, and never passes the superblock's. */
	return incarnation >> 32 >= volume->head_incarnation >> 32 &&
	       (incarnation >> 32 < known >> 32 || incarnation == known);
}

/* Could an engine have logged it? What a checkpoint has no room for was never there. The index
 * grows for a log that was filled when its limits were wider. */
static bool is_possible(struct recovery *recovery, const struct mp_record *record)
{
	struct mp_engine *engine = recovery->engine;
	const struct mp_extent *table = (const struct mp_extent *)(const void *)(
		(const uint8_t *)record + MP_RECORD_HEADER_BYTES);
	uint64_t entries = 0, ranges = 0;
	uint32_t i;

	for (i = 0; i < record->extent_count; i++) {
		const struct mp_extent *extent = &table[i];
		bool data = extent->codec == MP_CODEC_NONE;

		if (extent->block_count > VOLUME_BLOCKS_MAX ||
		    extent->first_block > VOLUME_BLOCKS_MAX - extent->block_count)
			return false;
		if (data || extent->block_count < RANGE_BLOCKS_MIN)
			entries += extent->block_count;
		else
			ranges++;
	}
	entries += engine->index.used;
	if (entries > index_entries_max(engine) ||
	    engine->tombstone_count + 2 * ranges > TOMBSTONES_MAX)
		return false;
	recovery->error = index_reserve(&engine->index, entries);
	return recovery->error == 0;
}

static bool follows(struct recovery *recovery, const struct volume *volume,
		    const struct mp_record *record, uint64_t ordinal)
{
	if (memcmp(record->volume, volume->id, sizeof record->volume) != 0 ||
	    record->segment_ordinal != ordinal ||
	    !incarnation_follows(volume, record->incarnation) || !is_possible(recovery, record))
		return false;
	if (!fault(volume->engine, MP_FAULT_NO_INCARNATION) &&
	    record->previous_checksum != volume->head_checksum)
		return false;
	if (record->type == MP_RECORD_SYNCED)
		return record->last_sequence == volume->last_sequence;
	return record->first_sequence == volume->last_sequence + 1;
}

static void replay(struct volume *volume, const struct mp_record *record, uint64_t length,
		   uint32_t segment)
{
	struct mp_engine *engine = volume->engine;
	const uint8_t *bytes = (const uint8_t *)record;
	const struct mp_extent *table =
		(const struct mp_extent *)(const void *)(bytes + MP_RECORD_HEADER_BYTES);
	uint32_t address = (uint32_t)((segment_offset_bytes(engine, segment) +
				       record->segment_offset_bytes + record->header_length_bytes) /
				      MP_BLOCK_BYTES);
	uint32_t origin = volume->origin, i;

	if (fault(engine, MP_FAULT_KEEP_STALE_SLOTS))
		volume->origin = 0; /* nobody's: the slots of this volume stay as they are */
	for (i = 0; i < record->extent_count; i++) {
		log_index_extent(volume, &table[i], address);
		needs_add(&engine->ledger.since, needs_of_extent(&table[i]));
		address += table[i].stored_length_bytes / MP_BLOCK_BYTES;
	}
	volume->origin = origin;
	if (record->type == MP_RECORD_LOG)
		volume->last_sequence = volume->applied_sequence = record->last_sequence;
	volume->epoch = record->epoch > volume->epoch ? record->epoch : volume->epoch;
	volume->lineage = record->lineage;
	volume->head_checksum = record->checksum;
	volume->head_incarnation = record->incarnation;
	volume->head_offset_bytes = record->segment_offset_bytes + length;
	volume->logged_synced_sequence = record->synced_sequence;
	if (record->synced_sequence > volume->synced_sequence)
		volume->synced_sequence = record->synced_sequence;
	engine->counters.recovered_records++;
	engine->counters.recovered_bytes += length;
}

static int load_segment(struct recovery *recovery, uint32_t segment)
{
	const struct mp_engine *engine = recovery->engine;
	uint64_t at;
	int64_t rc = 0;

	for (at = 0; at < engine->super.log_segment_bytes && rc >= 0; at += SCAN_STEP_BYTES)
		rc = mp_driver_read(engine->driver, 0, segment_offset_bytes(engine, segment) + at,
				    recovery->memory + at, SCAN_STEP_BYTES);
	return rc < 0 ? (int)rc : 0;
}

/* Follow the chain within the segment in memory, from the volume's head offset. */
static void follow_segment(struct recovery *recovery, struct volume *volume, uint32_t segment)
{
	const struct mp_engine *engine = recovery->engine;
	uint64_t ordinal = engine->segments[segment].ordinal;

	for (;;) {
		int64_t length = 0;
		const struct mp_record *record = record_at(engine, recovery->memory,
							   volume->head_offset_bytes, &length);

		if (!record || !follows(recovery, volume, record, ordinal))
			return;
		if (!fault(engine, MP_FAULT_SKIP_DATA_CHECKSUM) &&
		    mp_record_check_payload(record, (uint64_t)length))
			return;
		replay(volume, record, (uint64_t)length, segment);
	}
}

/* The segment in which the chain goes on behind its head, or NO_SEGMENT. */
static uint32_t next_segment(const struct recovery *recovery, const struct volume *volume)
{
	const struct mp_engine *engine = recovery->engine;
	uint32_t i, best = NO_SEGMENT;

	for (i = 0; i < engine->segment_count; i++) {
		const struct candidate *candidate = &recovery->candidates[i];
		if (!candidate->valid || engine->segments[i].state == SEGMENT_CHAIN ||
		    memcmp(candidate->volume, volume->id, sizeof candidate->volume) != 0 ||
		    candidate->ordinal != volume->head_ordinal + 1 ||
		    candidate->previous_checksum != volume->head_checksum ||
		    !incarnation_follows(volume, candidate->incarnation))
			continue;
		if (best == NO_SEGMENT ||
		    candidate->incarnation > recovery->candidates[best].incarnation)
			best = i;
	}
	return best;
}

static void adopt(struct volume *volume, uint32_t segment)
{
	struct mp_engine *engine = volume->engine;

	engine->segments[segment] = (struct segment){.state = SEGMENT_CHAIN,
						     .next = NO_SEGMENT,
						     .number = volume->number,
						     .ordinal = volume->head_ordinal + 1,
						     .first_sequence = volume->last_sequence + 1};
	engine->segments_free--;
	if (volume->head_segment == NO_SEGMENT)
		volume->tail_segment = segment;
	else
		engine->segments[volume->head_segment].next = segment;
	volume->head_segment = segment;
	volume->head_ordinal++;
	volume->head_offset_bytes = 0;
}

/* Is there, in the segment in memory, a record behind the chain's end that tells of a sync beyond
 * it? Old bytes of other chains and of earlier lives of the segment have lower ordinals, other
 * volumes or incarnations. */
static bool memory_tells(const struct recovery *recovery, const struct volume *volume,
			 uint64_t offset_bytes)
{
	const struct mp_engine *engine = recovery->engine;
	int64_t length;

	for (; offset_bytes < engine->super.log_segment_bytes; offset_bytes += MP_BLOCK_BYTES) {
		const struct mp_record *record =
			record_at(engine, recovery->memory, offset_bytes, &length);
		if (record && memcmp(record->volume, volume->id, sizeof record->volume) == 0 &&
		    record->segment_ordinal >= volume->head_ordinal &&
		    incarnation_follows(volume, record->incarnation) &&
		    record->synced_sequence > volume->last_sequence)
			return true;
	}
	return false;
}

static bool may_tell(const struct recovery *recovery, const struct volume *volume, uint32_t segment)
{
	const struct candidate *candidate = &recovery->candidates[segment];

	if (recovery->engine->segments[segment].state == SEGMENT_CHAIN)
		return false;
	return candidate->suspect ||
	       (candidate->valid && candidate->ordinal > volume->head_ordinal &&
		memcmp(candidate->volume, volume->id, sizeof candidate->volume) == 0 &&
		incarnation_follows(volume, candidate->incarnation));
}

/* Does anything behind the end prove that the chain was synced further than it goes? 1: yes. A
 * damaged record at the start of a segment hides the whole of it from next_segment, so segments
 * that do not begin as they should are read, too. */
static int synced_beyond(struct recovery *recovery, const struct volume *volume,
			 bool memory_is_head)
{
	const struct mp_engine *engine = recovery->engine;
	uint32_t i;

	if (volume->synced_sequence > volume->last_sequence ||
	    (memory_is_head && memory_tells(recovery, volume, volume->head_offset_bytes)))
		return 1;
	for (i = 0; i < engine->segment_count; i++) {
		int rc = may_tell(recovery, volume, i) ? load_segment(recovery, i) : 1;

		if (rc < 0)
			return rc;
		if (rc == 0 && memory_tells(recovery, volume, 0))
			return 1;
	}
	return 0;
}

/* What lies behind the damage is the operator's: keep those segments from being used again. */
static void preserve(const struct recovery *recovery, const struct volume *volume)
{
	struct mp_engine *engine = recovery->engine;
	uint32_t i;

	for (i = 0; i < engine->segment_count; i++) {
		const struct candidate *candidate = &recovery->candidates[i];
		if (engine->segments[i].state == SEGMENT_FREE &&
		    (candidate->suspect ||
		     (candidate->valid &&
		      memcmp(candidate->volume, volume->id, sizeof candidate->volume) == 0))) {
			engine->segments[i].state = SEGMENT_WAITING;
			/* no checkpoint frees it */
			engine->segments[i].released_serial = UINT64_MAX;
			engine->segments_free--;
		}
	}
}

static void damaged(const struct recovery *recovery, struct volume *volume)
{
	volume->corrupt = true;
	preserve(recovery, volume);
	volume_fail(volume, EIO, "the write log is damaged below a synced point; nothing was "
				 "dropped, restore the device or accept the loss");
}

static int follow_chain(struct recovery *recovery, struct volume *volume)
{
	uint32_t segment, next;
	bool loaded = false;
	int rc;

	if (!link_chain(recovery, volume)) {
		damaged(recovery, volume);
		return 0;
	}
	segment = volume->head_segment;
	if (segment != NO_SEGMENT) {
		rc = load_segment(recovery, segment);
		if (rc)
			return rc;
		loaded = true;
		follow_segment(recovery, volume, segment);
	}
	while (!recovery->error && (next = next_segment(recovery, volume)) != NO_SEGMENT) {
		rc = load_segment(recovery, next);
		if (rc)
			return rc;
		adopt(volume, next);
		loaded = true;
		follow_segment(recovery, volume, next);
		if (volume->head_offset_bytes == 0)
			break; /* its first record has a good header and bad data: the end */
	}
	if (recovery->error)
		return recovery->error;
	rc = synced_beyond(recovery, volume, loaded);
	if (rc == 1)
		damaged(recovery, volume);
	return rc < 0 ? rc : 0;
}

/* ---- the whole ---- */

static int follow_chains(struct recovery *recovery)
{
	struct mp_engine *engine = recovery->engine;
	uint64_t segment_blocks = engine->super.log_segment_bytes / MP_BLOCK_BYTES;
	uint32_t i;
	int rc = read_candidates(recovery);

	for (i = 0; i < engine->volume_count && rc == 0; i++) {
		struct volume *volume = engine->volumes[i];
		if (!volume)
			continue;
		rc = follow_chain(recovery, volume);
		volume->applied_offset_bytes = volume->head_offset_bytes;
		volume->applied_checksum = volume->head_checksum;
		volume->applied_incarnation = volume->head_incarnation;
		volume->applied_ordinal = volume->head_ordinal;
	}
	/* Earlier builds allowed more zeroes: data up to the whole log must still find room. */
	if (rc == 0)
		rc = index_reserve(&engine->index,
				   engine->index.zeros + engine->segment_count * segment_blocks);
	if (rc && !recovery->message[0])
		complain(recovery, rc, "the write log cannot be read");
	return rc;
}

/* What was found must be durable before anything builds on it; then a new incarnation, before the
 * first append. */
static int seal_recovery(struct mp_engine *engine)
{
	struct mp_cache_super super = engine->super;
	uint32_t low, i;
	int64_t rc = mp_driver_sync(engine->driver, 0);

	if (rc < 0)
		return (int)rc;
	for (i = 0; i < engine->volume_count; i++) {
		struct volume *volume = engine->volumes[i];
		if (volume && !volume->failed) {
			volume->synced_sequence = volume->applied_sequence;
			volume->synced_position = log_applied_position(volume);
			volume->synced_at_ns = engine->now_ns;
		}
	}
	engine->driver->random_bytes(engine->driver->self, &low, sizeof low);
	super.incarnation = ((super.incarnation >> 32) + 1) << 32 | low;
	super.clean = 0;
	rc = super_write(engine->driver, &super, &engine->super_copy);
	if (rc == 0)
		engine->super = super;
	return (int)rc;
}

int recovery_run(struct mp_engine *engine, char *message, uint64_t message_bytes)
{
	struct recovery recovery = {
		.engine = engine, .message = message, .message_bytes = message_bytes};
	int rc;

	recovery.candidates = calloc(engine->segment_count, sizeof *recovery.candidates);
	recovery.memory = aligned_alloc(MP_BLOCK_BYTES, engine->super.log_segment_bytes);
	rc = recovery.candidates && recovery.memory
		     ? checkpoint_load(engine, message, message_bytes) : -ENOMEM;
	if (rc == 0)
		rc = follow_chains(&recovery);
	if (rc == 0) {
		rc = seal_recovery(engine);
		if (rc)
			complain(&recovery, rc, "the superblock cannot be written");
	}
	free(recovery.candidates);
	free(recovery.memory);
	return rc;
}
