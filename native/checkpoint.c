/* checkpoint.c - the log index and the slot table, saved, so that log segments may be used again.
 *
 * Order, each step durable before the next: body (volumes, segment table, tombstones as of one
 * instant; then index and slots as they are when the walk passes) -> header -> one sync, which also
 * covers every log record that is applied -> superblock (the other copy) -> sync -> segments
 * released before it began are free.
 * Two areas take turns, so that the last checkpoint stays whole until the superblock names the
 * next.
 *
 * Why the fuzzy parts are right: recovery replays the log from each volume's position in the
 * captured part. Whatever the walk saw that is newer was applied before the sync, so its record is
 * durable and replayed as well. What the walk missed because it was released meanwhile is in slots
 * or at the store, and its segment is not used again before the next checkpoint. Tombstones are
 * captured first: what they hide may be saved, they hide it again. None is forgotten before the
 * end, because what is newer under it may be released only then (release.c).
 *
 * What a crash leaves: before the superblock: the old checkpoint, whole. After: the new one.
 * Failure modes: a failed write: begun again, CHECKPOINT_FAILURES_MAX times, then the engine fails.
 * A failed sync puts the log's unsynced records in doubt as well: rescue.c, then begun again.
 */
#include <xxhash.h>
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h> /* see checksum.c */
#endif

#include "engine_internal.h"

enum { STAGE_IDLE, STAGE_CAPTURED, STAGE_INDEX, STAGE_SLOTS, STAGE_TAIL, STAGE_HEADER, STAGE_SYNC,
	STAGE_SUPER, STAGE_SUPER_SYNC, STAGE_SECOND };

void checkpoint_fill_volume(const struct volume *volume, struct mp_cache_volume *out)
{
	memset(out, 0, sizeof *out);
	memcpy(out->id, volume->id, sizeof out->id);
	out->size_bytes = volume->size_bytes;
	out->epoch = volume->epoch;
	out->lineage = volume->lineage;
	out->destaged_sequence = volume->destaged_sequence;
	out->last_sequence = volume->applied_sequence;
	out->synced_sequence = volume->synced_sequence;
	if (volume->tail_segment != NO_SEGMENT)
		out->tail_ordinal = volume->engine->segments[volume->tail_segment].ordinal;
	out->head_ordinal = volume->applied_ordinal;
	out->head_offset_bytes = volume->applied_offset_bytes;
	out->head_checksum = volume->applied_checksum;
	out->head_incarnation = volume->applied_incarnation;
	out->slots_sequence = volume->applied_sequence;
	out->origin = volume->origin;
	out->number = volume->number;
}

static uint8_t *capture_volumes(struct mp_engine *engine, uint8_t *out)
{
	struct mp_cache_volume state;
	uint32_t i;

	for (i = 0; i < engine->volume_count; i++)
		if (engine->volumes[i]) {
			checkpoint_fill_volume(engine->volumes[i], &state);
			memcpy(out, &state, sizeof state);
			out += sizeof state;
			engine->checkpoint.header.volume_count++;
		}
	return out;
}

static uint8_t *capture_segments(struct mp_engine *engine, uint8_t *out)
{
	uint32_t i;

	for (i = 0; i < engine->segment_count; i++) {
		const struct segment *segment = &engine->segments[i];
		bool chained = segment->state == SEGMENT_CHAIN;
		struct mp_segment_entry entry = {.ordinal = chained ? segment->ordinal : 0,
						 .number = chained ? segment->number : 0,
						 .state = chained};
		memcpy(out, &entry, sizeof entry);
		out += sizeof entry;
	}
	engine->checkpoint.header.segment_count = engine->segment_count;
	return out;
}

static uint8_t *capture_tombstones(struct mp_engine *engine, uint8_t *out)
{
	uint32_t i, j;

	for (i = 0; i < engine->volume_count; i++) {
		const struct volume *volume = engine->volumes[i];
		for (j = 0; volume && j < volume->tombstones.count; j++) {
			const struct tombstone *item = &volume->tombstones.items[j];
			struct mp_tombstone entry = {.first_block = item->first_block,
						     .block_count = item->block_count,
						     .sequence = item->sequence,
						     .number = volume->number};
			memcpy(out, &entry, sizeof entry);
			out += sizeof entry;
			engine->checkpoint.header.tombstone_count++;
		}
	}
	return out;
}

static bool begin(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;
	uint64_t bytes = (uint64_t)engine->volume_count * sizeof(struct mp_cache_volume) +
			 (uint64_t)engine->segment_count * sizeof(struct mp_segment_entry) +
			 engine->tombstone_count * sizeof(struct mp_tombstone);
	uint8_t *out;

	checkpoint->captured = malloc(bytes + 1);
	checkpoint->hash = XXH3_createState();
	if (!checkpoint->captured || !checkpoint->hash) {
		free(checkpoint->captured);
		XXH3_freeState(checkpoint->hash);
		return false;
	}
	XXH3_64bits_reset(checkpoint->hash);
	memset(&checkpoint->header, 0, sizeof checkpoint->header);
	out = capture_volumes(engine, checkpoint->captured);
	out = capture_segments(engine, out);
	out = capture_tombstones(engine, out);
	checkpoint->captured_bytes = (uint64_t)(out - checkpoint->captured);
	checkpoint->running = true;
	checkpoint->wanted = false;
	checkpoint->serial++;
	checkpoint->frees = engine->segments_waiting;
	checkpoint->log_bytes = 0;
	checkpoint->slot_changes = checkpoint->slot_bytes = 0;
	checkpoint->began_ns = engine->now_ns;
	checkpoint->clean = engine->stopping;
	checkpoint->zeros = 0;
	ledger_checkpoint_begins(engine);
	checkpoint->cursor = 0;
	checkpoint->filled_bytes = 0;
	checkpoint->offset_bytes = MP_BLOCK_BYTES; /* the header comes last, in front */
	checkpoint->index_moves = 0;
	checkpoint->stage = STAGE_CAPTURED;
	return true;
}

static void end(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;

	free(checkpoint->captured);
	XXH3_freeState(checkpoint->hash);
	checkpoint->captured = NULL;
	checkpoint->hash = NULL;
	checkpoint->running = false;
	checkpoint->sync_goal = 0;
	checkpoint->stage = STAGE_IDLE;
	sweep_again(engine);
}

uint32_t checkpoint_would_free(const struct mp_engine *engine)
{
	uint32_t already = engine->checkpoint.running ? engine->checkpoint.frees : 0;

	return engine->segments_waiting > already ? engine->segments_waiting - already : 0;
}

static void free_waiting(struct mp_engine *engine)
{
	uint32_t i;

	for (i = 0; i < engine->segment_count && engine->segments_waiting; i++) {
		struct segment *segment = &engine->segments[i];
		if (segment->state == SEGMENT_WAITING &&
		    segment->released_serial < engine->checkpoint.serial) {
			segment->state = SEGMENT_FREE;
			engine->shares_stale = true;
			engine->segments_waiting--;
			engine->segments_free++;
		}
	}
}

static void completed(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;

	checkpoint->failures = 0;
	checkpoint->super_in_doubt = false;
	engine->super = checkpoint->super;
	engine->super_copy ^= 1;
	engine->counters.checkpoints++;
	engine->counters.checkpoint_bytes += checkpoint->offset_bytes;
	checkpoint->completed_serial = checkpoint->serial;
	ledger_checkpoint_ends(engine);
	free_waiting(engine);
	end(engine);
}

/* Without success. A superblock that was written may be on the device or not: until one like it is
 * known to be, neither the checkpoint that it names nor the one before may be overwritten. */
static void give_up(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;

	checkpoint->super_in_doubt |= checkpoint->stage >= STAGE_SUPER;
	end(engine);
	checkpoint->wanted = true;
}

/* ---- one I/O at a time ---- */

static void io_done(struct mp_io *io)
{
	struct mp_engine *engine = io->context;
	struct checkpoint *checkpoint = &engine->checkpoint;

	engine->ios_inflight--;
	io->context = NULL; /* idle */
	checkpoint->filled_bytes -= checkpoint->flushing_bytes;
	memmove(checkpoint->buffer, checkpoint->buffer + checkpoint->flushing_bytes,
		checkpoint->filled_bytes);
	checkpoint->flushing_bytes = 0;
	if (io->result < 0) {
		engine->counters.device_errors++;
		give_up(engine);
		if (++checkpoint->failures >= CHECKPOINT_FAILURES_MAX)
			engine_fail(engine, (int)-io->result, "checkpoints cannot be written");
	} else if (checkpoint->stage == STAGE_HEADER)
		checkpoint->stage = STAGE_SYNC;
	else if (checkpoint->stage == STAGE_SUPER)
		checkpoint->stage = STAGE_SUPER_SYNC;
	else if (checkpoint->stage == STAGE_SECOND)
		completed(engine);
}

static void submit(struct mp_engine *engine, uint64_t offset_bytes, uint64_t length_bytes)
{
	struct checkpoint *checkpoint = &engine->checkpoint;

	memset(&checkpoint->io, 0, sizeof checkpoint->io);
	checkpoint->iov.iov_base = checkpoint->buffer;
	checkpoint->iov.iov_len = length_bytes;
	checkpoint->io.op = MP_OP_WRITE;
	checkpoint->io.iov = &checkpoint->iov;
	checkpoint->io.iov_count = 1;
	checkpoint->io.offset_bytes = offset_bytes;
	checkpoint->io.length_bytes = length_bytes;
	checkpoint->io.done = io_done;
	checkpoint->io.context = engine;
	engine_submit(engine, &checkpoint->io);
}

static uint64_t area_offset_bytes(const struct mp_engine *engine)
{
	uint32_t area = engine->super.checkpoint_generation ? engine->super.checkpoint_area ^ 1 : 0;

	return engine->super.checkpoint_offset_bytes[area];
}

/* Write whole blocks of what is in the buffer; the rest stays for the next, but for the last, which
 * is padded. */
static void flush(struct mp_engine *engine, bool last)
{
	struct checkpoint *checkpoint = &engine->checkpoint;
	uint64_t bytes = checkpoint->filled_bytes / MP_BLOCK_BYTES * MP_BLOCK_BYTES;

	if (last && bytes < checkpoint->filled_bytes) {
		bytes += MP_BLOCK_BYTES;
		memset(checkpoint->buffer + checkpoint->filled_bytes, 0,
		       bytes - checkpoint->filled_bytes);
		checkpoint->filled_bytes = bytes;
	}
	XXH3_64bits_update(checkpoint->hash, checkpoint->buffer, bytes);
	assert(checkpoint->offset_bytes + bytes <= engine->super.checkpoint_capacity_bytes);
	checkpoint->flushing_bytes = bytes;
	submit(engine, area_offset_bytes(engine) + checkpoint->offset_bytes, bytes);
	checkpoint->offset_bytes += bytes;
}

/* ---- filling the buffer; each returns true when its section is done ---- */

static uint64_t room(const struct checkpoint *checkpoint)
{
	return CHECKPOINT_STEP_BYTES - checkpoint->filled_bytes;
}

static bool fill_captured(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;
	uint64_t left = checkpoint->captured_bytes - checkpoint->cursor;
	uint64_t take = left < room(checkpoint) ? left : room(checkpoint);

	memcpy(checkpoint->buffer + checkpoint->filled_bytes,
	       checkpoint->captured + checkpoint->cursor, take);
	checkpoint->filled_bytes += take;
	checkpoint->cursor += take;
	return checkpoint->cursor == checkpoint->captured_bytes;
}

static void fill_entry(struct mp_engine *engine, const struct index_slot *slot)
{
	struct checkpoint *checkpoint = &engine->checkpoint;
	const struct volume *volume = engine->volumes[index_number(slot)];
	struct mp_index_entry entry;

	assert(volume);
	entry.block = index_block(slot);
	entry.sequence = volume->last_sequence -
			 (uint32_t)((uint32_t)volume->last_sequence - slot->sequence);
	entry.checksum = slot->checksum;
	entry.address = slot->address;
	entry.number = index_number(slot);
	memcpy(checkpoint->buffer + checkpoint->filled_bytes, &entry, sizeof entry);
	checkpoint->filled_bytes += sizeof entry;
	checkpoint->header.index_count++;
	checkpoint->zeros += entry.address == 0;
}

/* Stops for a flush in the upper half of the buffer, as soon as the walk may pause. Thousands of
 * entries without an empty slot between them do not happen; if they do, the checkpoint begins again
 * when any of them moved meanwhile. */
static bool fill_index(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;
	struct index *index = &engine->index;

	if (checkpoint->cursor == 0)
		checkpoint->index_start = index_walk_start(index);
	checkpoint->index_moves = 0;
	for (; checkpoint->cursor < index->capacity; checkpoint->cursor++) {
		const struct index_slot *slot =
			index_walk(index, checkpoint->index_start, checkpoint->cursor);

		if (room(checkpoint) < CHECKPOINT_STEP_BYTES / 2 &&
		    index_may_pause(index, checkpoint->index_start, checkpoint->cursor))
			return false;
		if (room(checkpoint) < sizeof(struct mp_index_entry)) {
			checkpoint->index_moves = index->moves + 1;
			return false;
		}
		if (index_is_live(slot))
			fill_entry(engine, slot);
	}
	return true;
}

/* Those from fresh on were never used. */
static bool fill_slots(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;
	uint64_t bytes = mp_slots_entry_bytes(engine->slots);
	uint64_t fresh = mp_slots_fresh(engine->slots), left = fresh - checkpoint->cursor;
	uint64_t take = room(checkpoint) / bytes;

	take = take < left ? take : left;
	mp_slots_save(engine->slots, checkpoint->cursor, take,
		      checkpoint->buffer + checkpoint->filled_bytes);
	checkpoint->filled_bytes += take * bytes;
	checkpoint->cursor += take;
	checkpoint->header.slot_count = checkpoint->cursor;
	return checkpoint->cursor == fresh;
}

static bool fill(struct mp_engine *engine)
{
	switch (engine->checkpoint.stage) {
	case STAGE_CAPTURED:
		return fill_captured(engine);
	case STAGE_INDEX:
		return fill_index(engine);
	default:
		return fill_slots(engine);
	}
}

/* ---- the end of it ---- */

static void write_header(struct mp_engine *engine)
{
	/* The buffer is empty: the tail was flushed whole. */
	struct checkpoint *checkpoint = &engine->checkpoint;
	struct mp_cache_checkpoint *header = &checkpoint->header;

	header->magic = MP_CACHE_CHECKPOINT_MAGIC;
	header->generation = engine->super.checkpoint_generation + 1;
	header->slot_blocks = engine->slot_blocks;
	header->checksum = mp_xxh3(&header->generation,
				   sizeof *header - offsetof(struct mp_cache_checkpoint,
							     generation));
	memset(checkpoint->buffer, 0, MP_BLOCK_BYTES);
	memcpy(checkpoint->buffer, header, sizeof *header);
	submit(engine, area_offset_bytes(engine), MP_BLOCK_BYTES);
}

static void make_super(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;
	struct mp_cache_super *super = &checkpoint->super;

	*super = engine->super;
	super->checkpoint_area = super->checkpoint_generation ? super->checkpoint_area ^ 1 : 0;
	super->checkpoint_generation++;
	super->checkpoint_length_bytes = checkpoint->offset_bytes;
	super->checkpoint_checksum = XXH3_64bits_digest(checkpoint->hash);
	super->clean = checkpoint->clean;
}

/* To the copy that is not the newest known to be good. */
static void write_super(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;
	struct mp_cache_super *super = &checkpoint->super;

	super->generation++;
	super_seal(super);
	memcpy(checkpoint->buffer, super, sizeof *super);
	submit(engine, engine->super_copy ? 0 : SUPER_COPY_BYTES, sizeof *super);
}

/* A sync of the log that begins from now on: it covers all that was written here, and all that is
 * applied. */
static bool synced(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;

	if (!checkpoint->sync_goal) {
		checkpoint->sync_goal = engine->sync.started + 1;
		engine->sync.wanted = true;
	}
	if (engine->sync.completed < checkpoint->sync_goal)
		return false;
	checkpoint->sync_goal = 0;
	return true;
}

/* One stage on; false: waits. */
static bool advance(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;

	switch (checkpoint->stage) {
	case STAGE_CAPTURED:
	case STAGE_INDEX:
	case STAGE_SLOTS:
		if (fill(engine)) {
			checkpoint->stage++;
			checkpoint->cursor = 0;
		} else
			flush(engine, false);
		return true;
	case STAGE_TAIL:
		if (checkpoint->filled_bytes) {
			flush(engine, true);
			return true;
		}
		checkpoint->stage = STAGE_HEADER;
		write_header(engine);
		return true;
	case STAGE_SYNC:
		if (!synced(engine))
			return false;
		make_super(engine);
		checkpoint->stage = STAGE_SUPER;
		write_super(engine);
		return true;
	case STAGE_SUPER_SYNC:
		if (!synced(engine))
			return false;
		/* The same again over the old copy, which nothing needs any more: one damaged copy
		 * loses nothing. It needs no sync; the copy that was synced stays as it is. */
		checkpoint->stage = STAGE_SECOND;
		submit(engine, engine->super_copy ? SUPER_COPY_BYTES : 0,
		       sizeof checkpoint->super);
		return true;
	default:
		return false; /* the completion moves on */
	}
}

void checkpoint_abandon(struct mp_engine *engine)
{
	assert(!engine->checkpoint.io.context);
	if (engine->checkpoint.running)
		give_up(engine);
}

/* What a restart has to read again; twice a large checkpoint, or it would be most of what is
 * written. */
void checkpoint_note_log(struct mp_engine *engine, uint64_t bytes)
{
	uint64_t limit = 2 * engine->super.checkpoint_length_bytes;

	if (limit < engine->options.checkpoint_every_bytes)
		limit = engine->options.checkpoint_every_bytes;
	engine->checkpoint.log_bytes += bytes;
	if (engine->checkpoint.log_bytes >= limit)
		engine->checkpoint.wanted = true;
}

void checkpoint_note_fill(struct mp_engine *engine, uint64_t bytes)
{
	uint64_t limit = engine->super.checkpoint_length_bytes * CHECKPOINT_FILLS_FACTOR;

	engine->checkpoint.slot_changes++;
	engine->checkpoint.slot_bytes += bytes;
	limit = limit > CHECKPOINT_FILLS_BYTES ? limit : CHECKPOINT_FILLS_BYTES;
	engine->checkpoint.wanted |= engine->checkpoint.slot_bytes >= limit;
}

uint64_t checkpoint_due_ns(const struct mp_engine *engine)
{
	const struct checkpoint *checkpoint = &engine->checkpoint;

	if (!checkpoint->slot_changes || checkpoint->running || engine->failed ||
	    engine->super.checkpoint_length_bytes > CHECKPOINT_CHEAP_BYTES)
		return UINT64_MAX;
	return checkpoint->began_ns + CHECKPOINT_FILLS_NS;
}

void checkpoint_step(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;

	bool held = engine->rescue.stage && engine->rescue.stage != RESCUE_CHECKPOINT;

	if (engine->failed || checkpoint->io.context || held)
		return;
	if (!checkpoint->running && checkpoint->super_in_doubt) {
		/* The checkpoint that it names is whole; only its name has to be written again. */
		checkpoint->running = true;
		checkpoint->stage = STAGE_SUPER;
		write_super(engine);
		return;
	}
	if (!checkpoint->running && (!checkpoint->wanted || !begin(engine)))
		return;
	if (checkpoint->index_moves && checkpoint->index_moves != engine->index.moves + 1) {
		end(engine); /* what the walk has not seen may lie behind it: begin again */
		checkpoint->wanted = true;
		return;
	}
	while (checkpoint->running && !checkpoint->io.context && advance(engine))
		;
}
