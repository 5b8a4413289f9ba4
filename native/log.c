/* log.c - the write log: records appended to each volume's own chain of segments, acknowledged in
 * order.
 *
 * Happy path, once per turn and volume: all mutations that became ready are gathered into one
 * record (header block, then the guests' own buffers, one write, no copy); when the write is
 * complete and all before it are, its blocks enter the index, its mutations are acknowledged. One
 * fdatasync covers all chains. No other metadata is written.
 *
 * What a crash leaves: before the write completed: nothing was acknowledged; recovery finds the
 * record whole, or the end of the chain. After: the record is on the device (daemon crash) or,
 * without a sync, may be lost with all behind it (power loss), which no FLUSH or FUA had promised.
 * A record names its predecessor's checksum and the incarnation of this open, so that old bytes
 * behind the tail never continue a chain.
 *
 * A synced tail must not look like a torn one. Each record tells how far the chain was synced when
 * it was built; when nothing follows a sync for SYNCED_RECORD_DELAY_NS, a record without extents
 * tells it. A record that does not verify below such a point is corruption, not an end.
 *
 * Failure modes: no free segment, or none of its share: data waits in ready, holding no log space
 * (shares.c; the guest is slowed before it stalls). Trims and zeroes of ranges go past it, since
 * nothing in ready overlaps, into room of their own; when that is full they wait, too. What is in
 * reserve beyond is the rescue's.
 * A failed write: nothing is acknowledged until all since the last good sync is written elsewhere
 * and synced (rescue.c).
 */
#include "engine_internal.h"

uint64_t segment_offset_bytes(const struct mp_engine *engine, uint32_t segment)
{
	assert(segment < engine->segment_count);
	return engine->super.log_offset_bytes + segment * engine->super.log_segment_bytes;
}

uint32_t segment_of_address(const struct mp_engine *engine, uint32_t address)
{
	uint64_t offset = (uint64_t)address * MP_BLOCK_BYTES - engine->super.log_offset_bytes;

	assert(offset / engine->super.log_segment_bytes < engine->segment_count);
	return (uint32_t)(offset / engine->super.log_segment_bytes);
}

static bool take_segment(struct volume *volume, enum log_use use)
{
	struct mp_engine *engine = volume->engine;
	uint32_t i, at;

	if (use != LOG_RESCUE && !share_allows_segment(volume, use))
		return false;
	if (engine->segments_free == 0)
		return false;
	for (i = 0; i < engine->segment_count; i++) {
		at = (engine->next_free_hint + i) % engine->segment_count;
		if (engine->segments[at].state == SEGMENT_FREE)
			break;
	}
	assert(i < engine->segment_count && engine->segments[at].pins == 0);
	engine->next_free_hint = at + 1;
	engine->segments_free--;
	engine->segments[at] = (struct segment){.state = SEGMENT_CHAIN, .next = NO_SEGMENT,
						.number = volume->number,
						.ordinal = ++volume->head_ordinal,
						.first_sequence = volume->last_sequence + 1};
	if (volume->head_segment == NO_SEGMENT)
		volume->tail_segment = at;
	else
		engine->segments[volume->head_segment].next = at;
	volume->head_segment = at;
	volume->head_offset_bytes = 0;
	shares_update(engine);
	return true;
}

bool log_make_room(struct volume *volume, uint64_t bytes, enum log_use use)
{
	const struct mp_engine *engine = volume->engine;
	uint64_t room = volume->head_segment == NO_SEGMENT
				? 0
				: engine->super.log_segment_bytes - volume->head_offset_bytes;

	if (bytes + (use == LOG_DATA ? RANGE_ROOM_BYTES : 0) <= room)
		return true;
	/* The end of a share's last segment is for trims and tellings. */
	if (use == LOG_DATA && bytes <= room)
		return share_allows_segment(volume, use);
	return take_segment(volume, use);
}

static void extent_init(struct mp_extent *extent, const struct mutation *mutation, uint64_t block,
			uint64_t count, uint8_t codec)
{
	memset(extent, 0, sizeof *extent);
	memcpy(extent->origin, mutation->volume->id, sizeof extent->origin);
	extent->first_block = block;
	extent->block_count = count;
	extent->sequence = mutation->sequence;
	extent->codec = codec;
}

static uint32_t describe_data(struct append *append, const struct mutation *mutation,
			      struct mp_extent *table)
{
	uint32_t extents = 0, i = 0;

	while (i < mutation->block_count) {
		bool zero = mutation->checksums[i] == 0;
		uint32_t run = 1, limit = zero ? SLICE_BLOCKS : MP_EXTENT_BLOCKS, j;
		struct mp_extent *extent = &table[extents++];

		while (i + run < mutation->block_count && run < limit &&
		       (mutation->checksums[i + run] == 0) == zero)
			run++;
		extent_init(extent, mutation, mutation->first_block + i, run,
			    zero ? MP_CODEC_ZERO : MP_CODEC_NONE);
		if (!zero) {
			struct iovec *iov = &append->iov[append->io.iov_count++];
			iov->iov_base = mutation->buffer + (uint64_t)i * MP_BLOCK_BYTES;
			iov->iov_len = (size_t)run * MP_BLOCK_BYTES;
			extent->stored_length_bytes = run * MP_BLOCK_BYTES;
			append->payload_bytes += extent->stored_length_bytes;
			for (j = 0; j < run; j++)
				extent->checksum[j] = mutation->checksums[i + j];
		}
		i += run;
	}
	return extents;
}

static uint32_t describe(struct append *append, const struct mutation *mutation,
			 struct mp_extent *table)
{
	if (mutation->kind == MUTATION_DATA)
		return describe_data(append, mutation, table);
	extent_init(table, mutation, mutation->first_block, mutation->block_count,
		    mutation->kind == MUTATION_TRIM ? MP_CODEC_TRIM : MP_CODEC_ZERO);
	return 1;
}

static void append_done(struct mp_io *io);

/* Where the record of this append goes: at the head, which moves behind it. */
void append_place(struct append *append)
{
	struct volume *volume = append->volume;
	struct mp_engine *engine = volume->engine;
	struct mp_record *record = (struct mp_record *)(void *)append->header;

	append->segment = volume->head_segment;
	engine->segments[append->segment].pins++;
	append->io.offset_bytes =
		segment_offset_bytes(engine, append->segment) + volume->head_offset_bytes;
	append->address =
		(uint32_t)((append->io.offset_bytes + append->header_bytes) / MP_BLOCK_BYTES);
	record->incarnation = engine->super.incarnation;
	record->previous_checksum = volume->head_checksum;
	record->segment_ordinal = volume->head_ordinal;
	record->segment_offset_bytes = volume->head_offset_bytes;
	record->synced_sequence = volume->synced_sequence;
	mp_record_seal(record);
	volume->logged_synced_sequence = volume->synced_sequence;
	volume->head_checksum = record->checksum;
	volume->head_incarnation = record->incarnation;
	volume->head_offset_bytes += append->header_bytes + append->payload_bytes;
	append->end_offset_bytes = volume->head_offset_bytes;
	append->ordinal = volume->head_ordinal;
}

static void append_fill(struct append *append, uint32_t extents, uint16_t type)
{
	const struct volume *volume = append->volume;
	struct mp_record *record = (struct mp_record *)append->header;

	record->type = type;
	memcpy(record->volume, volume->id, sizeof record->volume);
	record->lineage = volume->lineage;
	record->first_sequence = append->first_sequence;
	record->last_sequence = append->last_sequence;
	record->epoch = volume->epoch;
	record->extent_count = extents;
	record->header_length_bytes = append->header_bytes;
	record->payload_length_bytes = append->payload_bytes;
}

static void append_submit(struct append *append)
{
	struct volume *volume = append->volume;
	struct mp_engine *engine = volume->engine;
	uint64_t length = append->header_bytes + append->payload_bytes;

	append_place(append);
	append->io.op = MP_OP_WRITE;
	append->io.length_bytes = length;
	append->io.iov = append->iov;
	append->iov[0].iov_base = append->header;
	append->iov[0].iov_len = append->header_bytes;
	append->io.done = append_done;
	append->io.context = append;
	volume->appends_inflight++;
	list_append(&volume->appends, &append->in_volume);
	engine->counters.log_records++;
	engine->counters.log_bytes += length;
	checkpoint_note_log(engine, length);
	engine->guest_ios++;
	engine_submit(engine, &append->io);
}

static struct append *append_new(struct volume *volume, uint64_t extents)
{
	struct append *append = malloc(sizeof *append);
	uint64_t bytes = MP_RECORD_HEADER_BYTES + extents * MP_EXTENT_BYTES;

	if (!append)
		return NULL;
	memset(append, 0, offsetof(struct append, iov)); /* of iov, what is used is written */
	append->volume = volume;
	append->header_bytes = (bytes + MP_BLOCK_BYTES - 1) / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
	append->header_capacity_bytes = append->header_bytes;
	append->header = mp_buffers_get(volume->engine->buffers, append->header_capacity_bytes);
	if (!append->header) {
		free(append);
		return NULL;
	}
	memset(append->header, 0, append->header_bytes);
	append->io.iov_count = 1;
	list_init(&append->mutations);
	list_init(&append->in_volume);
	return append;
}

static void append_free(struct append *append)
{
	mp_buffers_put(append->volume->engine->buffers, append->header,
		       append->header_capacity_bytes);
	free(append);
}

/* How many of the ready mutations go into the next record; bounds on what they need, before
 * building. */
static uint32_t measure(const struct volume *volume, const struct link *queue, uint64_t most_bytes,
			uint64_t *extents, uint64_t *bytes, struct needs *needs)
{
	/* A quarter, so that what blocks the next record is enough to make releases wanted. */
	uint64_t zeros_max = volume->engine->zeros_max / 4;
	const struct link *link;
	uint32_t count = 0;

	zeros_max = zeros_max < APPEND_ZEROS_MAX ? zeros_max : APPEND_ZEROS_MAX;
	*extents = *bytes = 0;
	*needs = (struct needs){0, 0};
	for (link = queue->next; link != queue; link = link->next) {
		const struct mutation *mutation = CONTAINER(link, struct mutation, in_queue);
		bool is_data = mutation->kind == MUTATION_DATA;
		uint64_t more = is_data ? mutation->block_count : 1;
		uint64_t payload = is_data ? mutation->block_count * MP_BLOCK_BYTES : 0;
		struct needs its = needs_of_mutation(mutation);

		if (count && (*extents + more > APPEND_EXTENTS_MAX ||
			      *bytes + payload > most_bytes ||
			      needs->zeros + its.zeros > zeros_max))
			break;
		needs_add(needs, its);
		*extents += more;
		*bytes += payload;
		count++;
	}
	return count;
}

static void ack_early(struct mutation *mutation)
{
	struct request *request = mutation->request;

	mutation->request = NULL;
	if (request)
		request_slice_done(request);
}

static void ack_all_early(struct append *append)
{
	struct link *at;

	for (at = append->mutations.next; at != &append->mutations; at = at->next)
		ack_early(CONTAINER(at, struct mutation, in_queue));
}

/* The next record, of data or of ranges, from what waits in queue. */
static bool append_next(struct volume *volume, struct link *queue)
{
	struct mp_engine *engine = volume->engine;
	uint64_t extents, bytes, table_bytes;
	uint32_t used = 0, count;
	struct mp_extent *table;
	struct append *append;
	struct needs needs;
	bool is_data = queue == &volume->ready;

	count = measure(volume, queue, is_data ? share_record_bytes(volume) : APPEND_BYTES_MAX,
			&extents, &bytes, &needs);
	table_bytes = MP_RECORD_HEADER_BYTES + extents * MP_EXTENT_BYTES + MP_BLOCK_BYTES;
	if (!ledger_allows(engine, needs) ||
	    !log_make_room(volume, bytes + table_bytes, is_data ? LOG_DATA : LOG_RANGE))
		return false;
	append = append_new(volume, extents);
	if (!append)
		return false;
	table = (struct mp_extent *)(void *)(append->header + MP_RECORD_HEADER_BYTES);
	append->first_sequence = volume->last_sequence + 1;
	while (count--) {
		struct mutation *mutation =
			CONTAINER(queue->next, struct mutation, in_queue);
		list_remove(&mutation->in_queue);
		list_append(&append->mutations, &mutation->in_queue);
		mutation->sequence = ++volume->last_sequence;
		mutation->state = MUTATION_LOGGING;
		used += describe(append, mutation, table + used);
		if (fault(engine, MP_FAULT_ACK_BEFORE_WRITE) ||
		    (fault(engine, MP_FAULT_ACK_TRIM_EARLY) && mutation->kind != MUTATION_DATA))
			ack_early(mutation);
	}
	append->last_sequence = volume->last_sequence;
	append->needs = needs;
	ledger_appended(engine, needs);
	bytes = MP_RECORD_HEADER_BYTES + (uint64_t)used * MP_EXTENT_BYTES;
	append->header_bytes = (bytes + MP_BLOCK_BYTES - 1) / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
	append_fill(append, used, MP_RECORD_LOG);
	append_submit(append);
	engine->appended_ns = engine->now_ns;
	if (is_data)
		share_charge(volume, append->header_bytes + append->payload_bytes);
	return true;
}

static void append_queue(struct volume *volume, struct link *queue)
{
	while (!list_is_empty(queue) && volume->appends_inflight < APPENDS_MAX &&
	       (queue != &volume->ready || share_admits(volume)))
		if (!append_next(volume, queue))
			break;
}

void log_append_ready(struct mp_engine *engine)
{
	uint32_t i;

	if (engine->failed || engine->rescue.stage)
		return;
	if (engine->shares_stale)
		shares_update(engine);
	/* In turn: where log space is short, it is not always the same who gets it. */
	engine->append_turn++;
	for (i = 0; i < engine->volume_count; i++) {
		uint32_t at = (engine->append_turn + i) % engine->volume_count;
		struct volume *volume = engine->volumes[at];
		if (!volume)
			continue;
		if (volume->failed)
			fail_waiting(volume); /* it may wait for a share that never comes */
		append_queue(volume, &volume->ready_ranges);
		append_queue(volume, &volume->ready);
		log_tell_if_due(volume);
	}
}

void log_synced_record(struct volume *volume)
{
	struct append *append;

	if (!log_make_room(volume, MP_BLOCK_BYTES, LOG_RANGE))
		return;
	append = append_new(volume, 0);
	if (!append)
		return;
	append->first_sequence = append->last_sequence = volume->last_sequence;
	append_fill(append, 0, MP_RECORD_SYNCED);
	append_submit(append);
}

/* Every other sample, twice as far apart: ages stay right to a hundredth of what they span. */
static void thin_ages(struct volume *volume)
{
	uint32_t i;

	for (i = 0; i < AGE_SAMPLES / 2; i++)
		volume->ages[(volume->age_first + i) % AGE_SAMPLES] =
			volume->ages[(volume->age_first + 2 * i) % AGE_SAMPLES];
	volume->age_count = AGE_SAMPLES / 2;
	volume->age_gap_ns *= 2;
}

static void note_age(struct volume *volume, uint64_t sequence)
{
	uint64_t now = volume->engine->now_ns;
	uint32_t last = (volume->age_first + volume->age_count - 1) % AGE_SAMPLES;

	if (!volume->age_count)
		volume->age_gap_ns = AGE_RESOLUTION_NS;
	else if (now - volume->ages[last].time_ns < volume->age_gap_ns)
		return;
	if (volume->age_count == AGE_SAMPLES)
		thin_ages(volume);
	volume->ages[(volume->age_first + volume->age_count++) % AGE_SAMPLES] =
		(struct age_sample){.sequence = sequence, .time_ns = now};
}

static void put_block(struct volume *volume, uint64_t block, uint64_t sequence, uint32_t address,
		      uint64_t checksum)
{
	struct index_slot *slot =
		index_put(&volume->engine->index, volume->number, block, address);

	slot->sequence = (uint32_t)sequence;
	slot->checksum = checksum;
}

void log_index_extent(struct volume *volume, const struct mp_extent *extent, uint32_t address)
{
	struct mp_engine *engine = volume->engine;
	bool data = extent->codec == MP_CODEC_NONE;
	uint64_t i;

	if (!data && extent->block_count >= RANGE_BLOCKS_MIN) {
		/* The sweep takes older index entries and slots away; until then the tombstone
		 * hides them. */
		uint32_t before = volume->tombstones.count;
		int rc = tombstones_put(&volume->tombstones, extent->first_block,
					extent->block_count, extent->sequence);
		/* One range may replace many: the difference is signed. */
		engine->tombstone_count += volume->tombstones.count;
		engine->tombstone_count -= before;
		volume->sweep_wanted = true;
		if (rc) /* out of memory: a trim must not be forgotten */
			volume_fail(volume, ENOMEM, "no memory to remember a trim");
		return;
	}
	for (i = 0; i < extent->block_count; i++)
		put_block(volume, extent->first_block + i, extent->sequence,
			  data ? address + (uint32_t)i : 0, data ? extent->checksum[i] : 0);
	mp_slots_invalidate(engine->slots, volume->origin, extent->first_block,
			    extent->block_count);
}

struct position log_applied_position(const struct volume *volume)
{
	return (struct position){.ordinal = volume->applied_ordinal,
				 .offset_bytes = volume->applied_offset_bytes,
				 .checksum = volume->applied_checksum,
				 .incarnation = volume->applied_incarnation};
}

static void append_apply(struct append *append)
{
	struct volume *volume = append->volume;
	const struct mp_record *record = (const struct mp_record *)append->header;
	const struct mp_extent *table =
		(const struct mp_extent *)(const void *)(append->header + MP_RECORD_HEADER_BYTES);
	uint32_t address = append->address, i;

	for (i = 0; i < record->extent_count; i++) {
		log_index_extent(volume, &table[i], address);
		address += table[i].stored_length_bytes / MP_BLOCK_BYTES;
	}
	volume->applied_offset_bytes = append->end_offset_bytes;
	volume->applied_checksum = record->checksum;
	volume->applied_incarnation = record->incarnation;
	volume->applied_ordinal = append->ordinal;
	if (record->extent_count == 0)
		return;
	volume->applied_sequence = append->last_sequence;
	note_age(volume, append->first_sequence);
	if (!volume->dirty_ready_told && volume->applied_sequence > volume->destaged_sequence) {
		volume->dirty_ready_told = true;
		engine_volume_event(volume, MP_EVENT_DIRTY_READY, 0, 0);
	}
}

void append_finish(struct append *append)
{
	struct volume *volume = append->volume;
	struct mp_engine *engine = volume->engine;

	list_remove(&append->in_volume);
	volume->appends_inflight--;
	engine->segments[append->segment].pins--;
	ledger_applied(engine, append->needs);
	if (!engine->failed)
		append_apply(append);
	while (!list_is_empty(&append->mutations)) {
		struct mutation *mutation =
			CONTAINER(append->mutations.next, struct mutation, in_queue);
		list_remove(&mutation->in_queue);
		if (engine->failed || volume->failed)
			mutation_failed(mutation, EIO);
		else
			mutation_applied(mutation);
	}
	append_free(append);
}

static void append_done(struct mp_io *io)
{
	struct append *append = io->context;
	struct volume *volume = append->volume;
	struct mp_engine *engine = volume->engine;

	engine->ios_inflight--;
	engine->guest_ios--;
	append->done = true;
	if (io->result < 0)
		log_failed(engine, (int)-io->result, "a write to the log failed");
	else if (fault(engine, MP_FAULT_ACK_OUT_OF_ORDER))
		ack_all_early(append);
	/* In order: a later record may be complete, but recovery would not reach it before this
	 * one. After a failure nobody is acknowledged before all since the last good sync is
	 * written elsewhere. */
	while (!list_is_empty(&volume->appends) && !engine->rescue.stage) {
		append = CONTAINER(volume->appends.next, struct append, in_volume);
		if (!append->done)
			break;
		append_finish(append);
	}
}
