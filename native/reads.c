/* reads.c - a slice of consecutive blocks, gathered from tombstones, write log, read slots and the
 * store.
 *
 * Happy path: look every block up (newest first: log index and tombstones by sequence, then slots),
 * read runs straight into the slice's buffer, verify each block's checksum, reply. What is nowhere
 * here is fetched (fetch.c).
 * Failure modes: a slot that does not verify is dropped and fetched again; a log block that does
 * not verify is EIO, counted, and fails the volume loudly: it is the only copy of acknowledged
 * data, never a miss, never zeroes.
 */
#include "engine_internal.h"

struct read *read_new(struct volume *volume, uint64_t first_block, uint32_t block_count)
{
	struct read *read = malloc(sizeof *read + block_count * sizeof read->sources[0]);

	if (!read)
		return NULL;
	memset(read, 0, sizeof *read);
	list_init(&read->in_request);
	read->volume = volume;
	read->first_block = first_block;
	read->block_count = block_count;
	read->buffer_bytes = (uint64_t)block_count * MP_BLOCK_BYTES;
	read->buffer = volume_buffer(volume, read->buffer_bytes);
	if (!read->buffer) {
		free(read);
		return NULL;
	}
	return read;
}

/* Free when nobody needs the buffer: no slot write from it, and the reply (or the mutation) is done
 * with it. */
void read_release(struct read *read)
{
	if (!read->finished || read->fills || read->pending || read->request || read->mutation)
		return;
	volume_buffer_put(read->volume, read->buffer, read->buffer_bytes);
	free(read);
}

static void finish(struct read *read)
{
	struct mutation *mutation = read->mutation;

	read->finished = true;
	if (mutation) {
		mutation_base_done(mutation, read);
		read->mutation = NULL;
		read_release(read);
		return;
	}
	assert(read->request);
	if (read->prefetch) {
		prefetch_done(read);
		return;
	}
	if (read->error && !read->request->error)
		read->request->error = read->error;
	request_slice_done(read->request);
}

void read_part_done(struct read *read)
{
	assert(read->pending);
	if (--read->pending == 0)
		finish(read);
}

void source_find(struct volume *volume, uint64_t block, struct source *source)
{
	struct mp_engine *engine = volume->engine;
	uint64_t range = tombstones_find(&volume->tombstones, block);
	struct index_slot *logged = index_find(&engine->index, volume->number, block);
	int restored = 0;
	uint32_t checksum = 0;
	int64_t slot;

	if (logged && (!range || (int32_t)(logged->sequence - (uint32_t)range) > 0)) {
		source->kind = logged->address ? SOURCE_LOG : SOURCE_ZERO;
		source->place = logged->address;
		source->checksum = logged->checksum;
		return;
	}
	if (range) {
		source->kind = SOURCE_ZERO;
		return;
	}
	slot = mp_slots_find(engine->slots, volume->origin, block, &checksum, &restored);
	source->kind = slot < 0 ? SOURCE_MISS : checksum ? SOURCE_SLOT : SOURCE_ZERO;
	source->place = slot < 0 ? 0 : (uint32_t)slot;
	source->checksum = checksum;
	source->restored = restored != 0;
}

static uint64_t source_offset_bytes(const struct read *read, uint32_t i)
{
	const struct mp_engine *engine = read->volume->engine;
	const struct source *source = &read->sources[i];

	if (source->kind == SOURCE_LOG)
		return (uint64_t)source->place * MP_BLOCK_BYTES;
	return engine->super.slots_offset_bytes + source->place * engine->super.slot_bytes +
	       (read->first_block + i) % engine->slot_blocks * MP_BLOCK_BYTES;
}

/* Of the blocks of a part, is this the first in its slot? */
static bool enters_slot(const struct read *read, uint32_t first, uint32_t i)
{
	return i == first || read->sources[i].place != read->sources[i - 1].place;
}

static void pin(struct read *read, uint32_t first, uint32_t count)
{
	struct mp_engine *engine = read->volume->engine;
	uint32_t i;

	if (read->sources[first].kind == SOURCE_LOG) {
		engine->segments[segment_of_address(engine, read->sources[first].place)].pins++;
		return;
	}
	for (i = first; i < first + count; i++)
		if (enters_slot(read, first, i))
			mp_slots_pin(engine->slots, read->sources[i].place);
}

static void unpin(struct read *read, uint32_t first, uint32_t count)
{
	struct mp_engine *engine = read->volume->engine;
	uint32_t i;

	if (read->sources[first].kind == SOURCE_LOG) {
		engine->segments[segment_of_address(engine, read->sources[first].place)].pins--;
		return;
	}
	for (i = first; i < first + count; i++)
		if (enters_slot(read, first, i))
			mp_slots_unpin(engine->slots, read->sources[i].place);
}

static void log_block_bad(struct read *read, uint32_t i)
{
	struct volume *volume = read->volume;

	volume->counters.log_checksum_errors++;
	volume->engine->counters.log_checksum_errors++;
	read->error = EIO;
	read->sources[i].kind = SOURCE_ZERO;
	memset(read->buffer + (uint64_t)i * MP_BLOCK_BYTES, 0, MP_BLOCK_BYTES);
	volume_fail(volume, EIO, "a block of the write log does not verify");
}

static void slot_block_bad(struct read *read, uint32_t i)
{
	struct mp_engine *engine = read->volume->engine;

	if (read->sources[i].restored && !engine->was_clean)
		engine->counters.slot_stale_after_restart++;
	else
		engine->counters.slot_checksum_errors++;
	mp_slots_invalidate(engine->slots, read->volume->origin, read->first_block + i, 1);
	read->sources[i].kind = SOURCE_MISS;
}

static void verify(struct part *part)
{
	struct read *read = part->read;
	struct mp_engine *engine = read->volume->engine;
	uint32_t i;

	if (fault(engine, MP_FAULT_SKIP_DATA_CHECKSUM))
		return;
	for (i = part->first; i < part->first + part->count; i++) {
		struct source *source = &read->sources[i];
		uint64_t found = mp_block_checksum(read->volume->seed, read->first_block + i,
						   read->buffer + (uint64_t)i * MP_BLOCK_BYTES,
						   MP_BLOCK_BYTES);
		if (source->kind == SOURCE_LOG && found != source->checksum &&
		    fault(engine, MP_FAULT_DIRTY_IS_MISS))
			source->kind = SOURCE_MISS;
		else if (source->kind == SOURCE_LOG && found != source->checksum)
			log_block_bad(read, i);
		else if (source->kind == SOURCE_SLOT) {
			if (mp_slots_checksum(found) != source->checksum)
				slot_block_bad(read, i);
			else if (source->restored)
				mp_slots_verified(engine->slots, source->place,
						  read->first_block + i);
		}
	}
}

/* A device error is no reason to lose data that is elsewhere: slots become misses, the log is
 * EIO. */
static void device_error(struct part *part)
{
	struct read *read = part->read;
	uint32_t i;

	read->volume->engine->counters.device_errors++;
	for (i = part->first; i < part->first + part->count; i++) {
		if (read->sources[i].kind == SOURCE_SLOT) {
			mp_slots_invalidate(read->volume->engine->slots, read->volume->origin,
					    read->first_block + i, 1);
			read->sources[i].kind = SOURCE_MISS;
		} else
			read->error = EIO;
	}
}

static void fetch_runs(struct read *read, uint32_t first, uint32_t end)
{
	uint32_t i = first, run;

	while (i < end) {
		if (read->sources[i].kind != SOURCE_MISS) {
			i++;
			continue;
		}
		for (run = 1; i + run < end && read->sources[i + run].kind == SOURCE_MISS; run++)
			;
		fetch_start(read, i, run);
		i += run;
	}
}

static void part_done(struct mp_io *io)
{
	struct part *part = io->context;
	struct read *read = part->read;

	read->volume->engine->ios_inflight--;
	read->volume->engine->guest_ios--;
	unpin(read, part->first, part->count);
	if (io->result < 0)
		device_error(part);
	else
		verify(part);
	fetch_runs(read, part->first, part->first + part->count);
	free(part);
	read_part_done(read);
}

static void start_part(struct read *read, uint32_t first, uint32_t count)
{
	struct mp_engine *engine = read->volume->engine;
	struct part *part = calloc(1, sizeof *part);

	if (!part) {
		read->error = EIO;
		return;
	}
	part->read = read;
	part->first = first;
	part->count = count;
	part->iov.iov_base = read->buffer + (uint64_t)first * MP_BLOCK_BYTES;
	part->iov.iov_len = (size_t)count * MP_BLOCK_BYTES;
	part->io.op = MP_OP_READ;
	part->io.iov = &part->iov;
	part->io.iov_count = 1;
	part->io.offset_bytes = source_offset_bytes(read, first);
	part->io.length_bytes = part->iov.iov_len;
	part->io.done = part_done;
	part->io.context = part;
	pin(read, first, count);
	if (read->sources[first].kind == SOURCE_SLOT)
		engine->counters.slot_hits += count;
	read->pending++;
	engine->guest_ios++;
	engine_submit(engine, &part->io);
}

/* A run is one device read: same kind, consecutive on the device (slots that were filled one after
 * the other are), within one segment. */
static uint32_t run_length(const struct read *read, uint32_t first)
{
	const struct mp_engine *engine = read->volume->engine;
	const struct source *source = &read->sources[first];
	uint32_t run;

	for (run = 1; first + run < read->block_count; run++) {
		const struct source *next = &read->sources[first + run];
		if (next->kind != source->kind)
			break;
		if (source->kind == SOURCE_SLOT &&
		    source_offset_bytes(read, first + run) !=
			    source_offset_bytes(read, first) + (uint64_t)run * MP_BLOCK_BYTES)
			break;
		if (source->kind == SOURCE_LOG &&
		    (next->place != source->place + run ||
		     segment_of_address(engine, next->place) !=
			     segment_of_address(engine, source->place)))
			break;
	}
	return run;
}

static void count_blocks(struct read *read)
{
	struct volume *volume = read->volume;
	struct mp_engine *engine = volume->engine;
	uint32_t i;

	if (read->mutation || read->prefetch)
		return;
	for (i = 0; i < read->block_count; i++) {
		if (read->sources[i].kind == SOURCE_MISS) {
			volume->counters.read_miss_blocks++;
			engine->counters.misses++;
		} else {
			volume->counters.read_hit_blocks++;
			volume->counters.read_zero_blocks += read->sources[i].kind == SOURCE_ZERO;
			engine->counters.hits++;
		}
	}
}

static void touch(struct read *read)
{
	struct mp_engine *engine = read->volume->engine;
	uint64_t end = read->first_block + read->block_count, block;

	for (block = read->first_block; block < end;
	     block = (block / engine->slot_blocks + 1) * engine->slot_blocks)
		mp_slots_touch(engine->slots, read->volume->origin, block);
}

/* One run of zeroes that the reply can say: they need not be made, nor sent. */
static bool is_hole(const struct read *read)
{
	return read->may_be_hole && read->sources[0].kind == SOURCE_ZERO &&
	       run_length(read, 0) == read->block_count;
}

void read_start(struct read *read)
{
	uint32_t i, run;
	bool missed = false;

	read->pending = 1; /* ours, until everything is started */
	for (i = 0; i < read->block_count; i++)
		source_find(read->volume, read->first_block + i, &read->sources[i]);
	count_blocks(read);
	touch(read);
	read->hole = is_hole(read);
	for (i = 0; i < read->block_count && !read->hole; i += run) {
		uint8_t kind = read->sources[i].kind;

		run = run_length(read, i);
		if (read->prefetch && kind != SOURCE_MISS)
			continue;
		if (kind == SOURCE_ZERO)
			memset(read->buffer + (uint64_t)i * MP_BLOCK_BYTES, 0,
			       (size_t)run * MP_BLOCK_BYTES);
		else if (kind == SOURCE_MISS)
			fetch_start(read, i, run);
		else
			start_part(read, i, run);
		missed |= kind == SOURCE_MISS;
	}
	if (!read->mutation && !read->prefetch)
		readahead_note(read, missed);
	read_part_done(read);
}
