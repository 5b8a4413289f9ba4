/* rescue.c - after a failed write or sync of the log: write everything since the last good sync
 * again, elsewhere.
 *
 * A device that failed a sync may have dropped what it covered, and a later sync that succeeds says
 * nothing about it. So, and before anybody is acknowledged again:
 *
 *   drain       nothing new is submitted; wait for what is in flight
 *   copy        each volume with unsynced records goes on in fresh segments: applied records are
 *               read back, verified, linked anew and written; then those that were in flight, from
 *               the guests' buffers
 *   sync        one for all
 *   checkpoint  it names positions in the new segments: from here on recovery follows them
 *   settle      acknowledge in order; the old segments wait for the next checkpoint
 *
 * What a crash leaves: before the checkpoint's superblock the old chain, untouched: recovery
 * follows it as far as the device kept it, and nothing was acknowledged since the failure. New
 * segments have ordinals behind the old head, and their first record another predecessor, so the
 * old chain never runs into them. After: the new chain.
 * Failure modes: an applied record that does not read back and verify is lost: its volume fails,
 * loudly. A second failure, or no free segment: the engine fails; the device needs its operator,
 * and a restart recovers what it kept.
 */
#include "encode.h"

void log_failed(struct mp_engine *engine, int error, const char *what)
{
	engine->counters.device_errors++;
	if (engine->failed)
		return;
	if (engine->rescue.stage) {
		engine_fail(engine, error, what);
		return;
	}
	engine->rescue.stage = RESCUE_DRAIN;
	scrub_forget(engine, NULL); /* what it has read of chains may be left behind */
	engine->counters.log_rescues++;
}

static void io_done(struct mp_io *io)
{
	struct mp_engine *engine = io->context;

	engine->ios_inflight--;
	engine->rescue.busy = false;
	if (io->result < 0)
		log_failed(engine, (int)-io->result, "the log failed again while it was rescued");
}

static void submit(struct mp_engine *engine, uint32_t op, uint64_t offset_bytes, void *buffer,
		   uint64_t length_bytes)
{
	struct rescue *rescue = &engine->rescue;

	memset(&rescue->io, 0, sizeof rescue->io);
	rescue->iov.iov_base = buffer;
	rescue->iov.iov_len = length_bytes;
	rescue->io.op = op;
	rescue->io.iov = &rescue->iov;
	rescue->io.iov_count = length_bytes ? 1 : 0;
	rescue->io.offset_bytes = offset_bytes;
	rescue->io.length_bytes = length_bytes;
	rescue->io.done = io_done;
	rescue->io.context = engine;
	rescue->busy = true;
	engine_submit(engine, &rescue->io);
}

/* ---- drain ---- */

static bool appends_are_done(const struct volume *volume)
{
	const struct link *link;

	for (link = volume->appends.next; link != &volume->appends; link = link->next)
		if (!CONTAINER(link, struct append, in_volume)->done)
			return false;
	return true;
}

static bool is_quiet(const struct mp_engine *engine)
{
	uint32_t i;

	if (engine->sync.running || engine->checkpoint.io.context || engine->release.volume ||
	    engine->cut.volume)
		return false;
	for (i = 0; i < engine->volume_count; i++) {
		const struct volume *volume = engine->volumes[i];
		/* Segments that an earlier rescue left must be read out before more are left. */
		if (volume && (volume->doomed_segment != NO_SEGMENT || !appends_are_done(volume)))
			return false;
	}
	return true;
}

static void drain(struct mp_engine *engine)
{
	struct rescue *rescue = &engine->rescue;

	if (!is_quiet(engine))
		return;
	checkpoint_abandon(engine);
	if (!rescue->scan.memory)
		rescue->scan.memory =
			aligned_alloc(MP_BLOCK_BYTES, engine->super.log_segment_bytes);
	if (!rescue->scan.memory) {
		engine_fail(engine, ENOMEM, "no memory to rescue the log");
		return;
	}
	rescue->number = 0;
	rescue->forked = false;
	rescue->stage = RESCUE_COPY;
}

/* ---- copy ---- */

static bool needs_rescue(const struct volume *volume)
{
	return volume && !volume->failed &&
	       (volume->applied_sequence > volume->synced_sequence ||
		!list_is_empty(&volume->appends));
}

/* Room at the head of the new chain for a record whose first new sequence is given. */
static bool make_room(struct volume *volume, uint64_t bytes, uint64_t first_sequence)
{
	struct mp_engine *engine = volume->engine;

	if (!log_make_room(volume, bytes, LOG_RESCUE)) {
		engine_fail(engine, ENOSPC, "no free log segment to rescue unsynced writes to");
		return false;
	}
	if (volume->head_offset_bytes == 0)
		engine->segments[volume->head_segment].first_sequence = first_sequence;
	return true;
}

/* Set the old chain aside, behind its last good sync, and begin a new one. */
static void fork_chain(struct mp_engine *engine, struct volume *volume)
{
	struct rescue *rescue = &engine->rescue;
	const struct position *synced = &volume->synced_position;
	uint32_t at = volume->tail_segment;

	while (at != NO_SEGMENT && engine->segments[at].ordinal < synced->ordinal)
		at = engine->segments[at].next;
	rescue->old_tail = volume->tail_segment;
	rescue->scan.segment = at;
	rescue->offset_bytes = at != NO_SEGMENT && engine->segments[at].ordinal == synced->ordinal
				       ? synced->offset_bytes
				       : 0;
	rescue->scan.begin_bytes = rescue->scan.end_bytes = rescue->offset_bytes;
	rescue->unreadable = false;
	rescue->sequence = volume->synced_sequence + 1;
	rescue->append = volume->appends.next;
	rescue->forked = true;
	volume->tail_segment = volume->head_segment = volume->cut_segment = NO_SEGMENT;
	volume->head_checksum = synced->checksum;
	volume->head_incarnation = synced->incarnation;
	if (!make_room(volume, MP_BLOCK_BYTES, rescue->sequence))
		return;
	/* What a checkpoint says of a chain without a copied record yet. */
	volume->applied_ordinal = volume->head_ordinal;
	volume->applied_offset_bytes = 0;
	volume->applied_checksum = synced->checksum;
	volume->applied_incarnation = engine->super.incarnation;
}

/* Join what is good of the old chain with the new one; the rest is doomed. */
static void join_chain(struct mp_engine *engine, struct volume *volume)
{
	uint32_t at = engine->rescue.old_tail, keep = NO_SEGMENT;

	while (at != NO_SEGMENT &&
	       engine->segments[at].ordinal <= volume->synced_position.ordinal) {
		keep = at;
		at = engine->segments[at].next;
	}
	volume->doomed_segment = at;
	if (keep != NO_SEGMENT) {
		engine->segments[keep].next = volume->tail_segment;
		volume->tail_segment = engine->rescue.old_tail;
	}
	engine->rescue.forked = false;
	engine->rescue.number++;
}

static void move_index(struct volume *volume, const struct rescue *rescue)
{
	const struct mp_record *record = rescue->copying;
	const struct mp_extent *table =
		(const struct mp_extent *)(const void *)((const uint8_t *)record +
							 MP_RECORD_HEADER_BYTES);
	uint32_t i, block = 0, j;

	for (i = 0; i < record->extent_count; i++)
		for (j = 0; j < table[i].stored_length_bytes / MP_BLOCK_BYTES; j++, block++) {
			struct index_slot *slot = index_find(&volume->engine->index, volume->number,
							     table[i].first_block + j);
			if (slot && slot->address == rescue->from_address + block)
				slot->address = rescue->to_address + block;
		}
}

static uint32_t payload_address(const struct mp_engine *engine, uint32_t segment,
				const struct mp_record *record)
{
	return (uint32_t)((segment_offset_bytes(engine, segment) + record->segment_offset_bytes +
			   record->header_length_bytes) / MP_BLOCK_BYTES);
}

/* Give the record in memory a new link and write it to its new place; the index follows when it is
 * there. */
static void place_record(struct mp_engine *engine, struct volume *volume, struct mp_record *record,
			 uint64_t length)
{
	struct rescue *rescue = &engine->rescue;

	if (!make_room(volume, length, record->first_sequence))
		return;
	rescue->from_address = payload_address(engine, rescue->scan.segment, record);
	record->incarnation = engine->super.incarnation;
	record->previous_checksum = volume->head_checksum;
	record->segment_ordinal = volume->head_ordinal;
	record->segment_offset_bytes = volume->head_offset_bytes;
	record->synced_sequence = volume->synced_sequence;
	mp_record_seal(record);
	rescue->to_address = payload_address(engine, volume->head_segment, record);
	rescue->copying = record;
	rescue->copying_bytes = length;
	submit(engine, MP_OP_WRITE,
	       segment_offset_bytes(engine, volume->head_segment) + volume->head_offset_bytes,
	       record, length);
	volume->head_checksum = record->checksum;
	volume->head_incarnation = record->incarnation;
	volume->head_offset_bytes += length;
}

static void record_copied(struct mp_engine *engine, struct volume *volume)
{
	struct rescue *rescue = &engine->rescue;

	move_index(volume, rescue);
	volume->applied_ordinal = volume->head_ordinal;
	volume->applied_offset_bytes = volume->head_offset_bytes;
	volume->applied_checksum = volume->head_checksum;
	volume->applied_incarnation = volume->head_incarnation;
	rescue->offset_bytes += rescue->copying_bytes;
	rescue->sequence = rescue->copying->last_sequence + 1;
	rescue->copying = NULL;
}

static void scan_done(struct mp_io *io)
{
	struct mp_engine *engine = io->context;

	if (!scan_arrived(engine, &engine->rescue.scan))
		engine->rescue.unreadable = true;
}

static void lost(struct mp_engine *engine, struct volume *volume)
{
	engine->rescue.sequence = volume->applied_sequence + 1; /* the rest is not to be had */
	volume_fail(volume, EIO,
		    "acknowledged writes did not survive a failed sync of the cache device");
}

/* Copy the next applied record, or read on towards it. */
static void copy_record(struct mp_engine *engine, struct volume *volume)
{
	struct rescue *rescue = &engine->rescue;
	struct mp_record *record;
	int64_t length;
	uint32_t next;

	if (rescue->scan.segment == NO_SEGMENT || rescue->unreadable) {
		lost(engine, volume);
		return;
	}
	next = engine->segments[rescue->scan.segment].next;
	if (next != NO_SEGMENT && engine->segments[next].first_sequence == rescue->sequence) {
		rescue->scan.segment = next;
		rescue->offset_bytes = rescue->scan.begin_bytes = rescue->scan.end_bytes = 0;
		return;
	}
	record = (struct mp_record *)(void *)(rescue->scan.memory + rescue->offset_bytes);
	length = scan_record(engine, &rescue->scan, volume, rescue->offset_bytes, rescue->sequence);
	if (length == -EAGAIN)
		scan_more(engine, &rescue->scan, scan_done);
	else if (length < 0 || mp_record_check_payload(record, (uint64_t)length))
		lost(engine, volume);
	else if (record->type == MP_RECORD_SYNCED)
		rescue->offset_bytes += (uint64_t)length;
	else
		place_record(engine, volume, record, (uint64_t)length);
}

/* A record that was in flight: from the guests' buffers to its new place. */
static void copy_append(struct mp_engine *engine, struct volume *volume)
{
	struct rescue *rescue = &engine->rescue;
	struct append *append = CONTAINER(rescue->append, struct append, in_volume);
	const struct mp_record *record = (const struct mp_record *)(const void *)append->header;
	uint64_t first = record->type == MP_RECORD_LOG ? append->first_sequence
						       : append->last_sequence + 1;

	if (!make_room(volume, append->header_bytes + append->payload_bytes, first))
		return;
	engine->segments[append->segment].pins--;
	append_place(append);
	append->io.done = io_done;
	append->io.context = engine;
	rescue->append = rescue->append->next;
	rescue->busy = true;
	engine_submit(engine, &append->io);
}

static void copy(struct mp_engine *engine)
{
	struct rescue *rescue = &engine->rescue;
	struct volume *volume;

	while (rescue->number < engine->volume_count && !rescue->forked &&
	       !needs_rescue(engine->volumes[rescue->number]))
		rescue->number++;
	if (rescue->number == engine->volume_count) {
		rescue->stage = RESCUE_SYNC;
		submit(engine, MP_OP_SYNC, 0, NULL, 0);
		return;
	}
	volume = engine->volumes[rescue->number];
	if (!rescue->forked)
		fork_chain(engine, volume);
	else if (rescue->copying)
		record_copied(engine, volume);
	else if (rescue->sequence <= volume->applied_sequence)
		copy_record(engine, volume);
	else if (!volume->failed && rescue->append != &volume->appends)
		copy_append(engine, volume);
	else
		join_chain(engine, volume);
}

/* ---- the end of it ---- */

static void settle_volume(struct volume *volume)
{
	while (!list_is_empty(&volume->appends))
		append_finish(CONTAINER(volume->appends.next, struct append, in_volume));
	if (!volume->failed)
		log_synced(volume);
}

static void settle(struct mp_engine *engine)
{
	uint32_t i;

	engine->rescue.stage = RESCUE_NONE;
	for (i = 0; i < engine->volume_count; i++)
		if (engine->volumes[i])
			settle_volume(engine->volumes[i]);
}

static void reap(struct mp_engine *engine, struct volume *volume)
{
	while (volume->doomed_segment != NO_SEGMENT &&
	       engine->segments[volume->doomed_segment].pins == 0) {
		struct segment *segment = &engine->segments[volume->doomed_segment];

		volume->doomed_segment = segment->next;
		segment->state = SEGMENT_WAITING;
		segment->next = NO_SEGMENT;
		segment->released_serial = engine->checkpoint.serial;
		engine->segments_waiting++;
	}
}

static void step(struct mp_engine *engine)
{
	struct rescue *rescue = &engine->rescue;

	switch (rescue->stage) {
	case RESCUE_DRAIN:
		drain(engine);
		break;
	case RESCUE_COPY:
		copy(engine);
		break;
	case RESCUE_SYNC:
		rescue->stage = RESCUE_CHECKPOINT;
		rescue->serial = engine->checkpoint.serial + 1;
		engine->checkpoint.wanted = true;
		break;
	default:
		if (engine->checkpoint.completed_serial >= rescue->serial)
			settle(engine);
	}
}

/* The engine has failed: what waited for the rescue is an error now, and a stop need not wait. */
static void give_up(struct mp_engine *engine)
{
	uint32_t i;

	if (engine->rescue.busy || engine->rescue.scan.busy)
		return;
	engine->rescue.stage = RESCUE_NONE; /* what is in flight still ends in append_done */
	for (i = 0; i < engine->volume_count; i++) {
		struct volume *volume = engine->volumes[i];

		while (volume && !list_is_empty(&volume->appends)) {
			struct append *append =
				CONTAINER(volume->appends.next, struct append, in_volume);
			if (!append->done)
				break;
			append_finish(append);
		}
	}
}

void rescue_step(struct mp_engine *engine)
{
	struct rescue *rescue = &engine->rescue;
	uint32_t i;

	if (engine->failed) {
		give_up(engine);
		return;
	}
	for (i = 0; i < engine->volume_count; i++)
		if (engine->volumes[i] && rescue->stage != RESCUE_COPY)
			reap(engine, engine->volumes[i]);
	while (rescue->stage && !rescue->busy && !rescue->scan.busy && !engine->failed) {
		enum rescue_stage before = rescue->stage;

		step(engine);
		if (rescue->stage == before && before != RESCUE_COPY)
			break;
	}
}
