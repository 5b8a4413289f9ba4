/* cut.c - destage: cut a contiguous stretch of synced log, coalesce inside, encode it as one atomic
 * batch.
 *
 * Happy path: cut asked -> read the chain from the destaged position -> take records while they are
 * synced, of one lineage and within the size -> off the engine thread: verify their data, coalesce,
 * compress, seal -> MP_EVENT_BATCH -> the control plane ships the frame -> destaged(sequence).
 * A batch ends with a segment at the latest. It is a copy: nothing is pinned while it waits or
 * travels.
 *
 * What a crash leaves: nothing of a batch is on the device. Whatever the store did not confirm is
 * cut again.
 * Failure modes: a record or block that does not verify below the synced point: nothing is shipped,
 * the volume fails (EIO, loudly); only unsynced records: a sync is started and the answer is
 * -ENODATA.
 */
#include "engine_internal.h"
#include "encode.h"

static void cut_finish(struct mp_engine *engine, int status)
{
	struct cut *cut = &engine->cut;
	struct volume *volume = cut->volume;
	struct mp_event event;

	cut->volume = NULL;
	memset(&event, 0, sizeof event);
	event.type = MP_EVENT_BATCH;
	event.status = status;
	memcpy(event.volume, volume->id, sizeof event.volume);
	event.cookie = volume->cut_cookie;
	if (status == 0) {
		event.first_sequence = cut->first_sequence;
		event.last_sequence = cut->last_sequence;
		event.bytes = volume->batch_bytes;
	}
	engine_event(engine, &event);
}

static void cut_corrupt(struct mp_engine *engine)
{
	struct volume *volume = engine->cut.volume;

	volume->counters.log_checksum_errors++;
	engine->counters.log_checksum_errors++;
	volume_fail(volume, EIO,
		    "the write log does not verify; destage stopped, nothing was dropped");
	cut_finish(engine, -EIO);
}

void cut_reset(struct volume *volume)
{
	free(volume->batch);
	volume->batch = NULL;
	volume->batch_bytes = volume->batch_taken = 0;
}

/* ---- encoding, off the engine thread ---- */

static void encode_call(struct mp_io *io)
{
	struct cut *cut = io->context;

	cut->frame = NULL;
	cut->frame_bytes = batch_encode_log(cut, &cut->frame);
}

static void encode_done(struct mp_io *io)
{
	struct cut *cut = io->context;
	struct volume *volume = cut->volume;
	struct mp_engine *engine = volume->engine;

	engine->ios_inflight--;
	if (cut->frame_bytes < 0) {
		if (cut->frame_bytes == -EBADMSG)
			cut_corrupt(engine);
		else
			cut_finish(engine, (int)cut->frame_bytes);
		return;
	}
	pthread_mutex_lock(&engine->mutex);
	volume->batch = cut->frame;
	volume->batch_bytes = (uint64_t)cut->frame_bytes;
	volume->batch_taken = 0;
	pthread_mutex_unlock(&engine->mutex);
	volume->batch_last_sequence = cut->last_sequence;
	volume->batch_end_offset_bytes = cut->end_offset_bytes;
	engine->counters.batches++;
	engine->counters.batch_bytes += volume->batch_bytes;
	cut_finish(engine, 0);
}

static void encode(struct mp_engine *engine)
{
	struct cut *cut = &engine->cut;

	memcpy(cut->volume_id, cut->volume->id, sizeof cut->volume_id);
	cut->epoch = cut->volume->epoch;
	cut->faults = engine->options.test_faults;
	memset(&cut->call, 0, sizeof cut->call);
	cut->call.op = MP_OP_CALL;
	cut->call.call = encode_call;
	cut->call.done = encode_done;
	cut->call.context = cut;
	engine_submit(engine, &cut->call);
}

/* ---- reading the chain ---- */

static uint64_t shippable_sequence(const struct volume *volume)
{
	return fault(volume->engine, MP_FAULT_SHIP_UNSYNCED) ? volume->applied_sequence
							     : volume->synced_sequence;
}

/* The segment that holds the next sequence to ship, and where in it parsing may begin. */
static bool cut_locate(struct volume *volume)
{
	const struct mp_engine *engine = volume->engine;
	uint32_t at = volume->tail_segment;

	if (volume->cut_segment != NO_SEGMENT &&
	    volume->cut_sequence <= volume->destaged_sequence + 1)
		return true;
	while (at != NO_SEGMENT && engine->segments[at].next != NO_SEGMENT &&
	       engine->segments[engine->segments[at].next].first_sequence <=
		       volume->destaged_sequence + 1)
		at = engine->segments[at].next;
	if (at == NO_SEGMENT)
		return false;
	volume->cut_segment = at;
	volume->cut_offset_bytes = 0;
	volume->cut_sequence = engine->segments[at].first_sequence;
	return true;
}

static void nothing_to_ship(struct mp_engine *engine)
{
	struct volume *volume = engine->cut.volume;

	/* When there is something to sync, the sync's end says MP_EVENT_DIRTY_READY. */
	volume->dirty_ready_told = volume->applied_sequence > volume->synced_sequence;
	if (volume->dirty_ready_told) {
		log_want_sync_for_destage(engine);
		volume->tell_after_sync = true;
	}
	cut_finish(engine, -ENODATA);
}

static void scan_done(struct mp_io *io);

/* Records end in this segment where the next segment's begin. */
static bool segment_ends(const struct mp_engine *engine)
{
	const struct cut *cut = &engine->cut;
	uint32_t next = engine->segments[cut->volume->cut_segment].next;

	return next != NO_SEGMENT &&
	       engine->segments[next].first_sequence == cut->next_sequence &&
	       cut->next_sequence > cut->destaged_sequence;
}

static void begin(struct mp_engine *engine)
{
	struct cut *cut = &engine->cut;
	struct volume *volume = cut->volume;

	if (volume->destaged_sequence >= shippable_sequence(volume)) {
		nothing_to_ship(engine);
		return;
	}
	if (!cut_locate(volume)) {
		cut_corrupt(engine); /* undestaged sequences, and no chain that holds them */
		return;
	}
	cut->parse_offset_bytes = volume->cut_offset_bytes;
	cut->next_sequence = volume->cut_sequence;
	cut->begin_offset_bytes = UINT64_MAX;
	cut->raw_bytes = 0;
	cut->limit_sequence = shippable_sequence(volume);
	cut->destaged_sequence = volume->destaged_sequence;
	cut->first_sequence = volume->destaged_sequence + 1;
	/* The last batch may have ended where its segment ends, to the byte. */
	while (segment_ends(engine)) {
		volume->cut_segment = engine->segments[volume->cut_segment].next;
		volume->cut_offset_bytes = cut->parse_offset_bytes = 0;
		volume->cut_sequence = cut->next_sequence;
	}
	scan_start(engine, &cut->scan, volume->cut_segment, cut->parse_offset_bytes, scan_done);
}

/* Take the record at the parse position into the batch, or skip it. False: the batch ends before
 * it. */
static bool take_record(struct mp_engine *engine, const struct mp_record *record, uint64_t length)
{
	struct cut *cut = &engine->cut;
	struct volume *volume = cut->volume;

	if (record->type == MP_RECORD_SYNCED || record->last_sequence <= cut->destaged_sequence) {
		cut->next_sequence = record->last_sequence + 1;
		return true;
	}
	if (record->last_sequence > cut->limit_sequence)
		return false;
	if (cut->raw_bytes && (cut->raw_bytes + length > volume->cut_max_bytes ||
			       record->lineage != cut->lineage))
		return false;
	if (cut->raw_bytes == 0) {
		cut->begin_offset_bytes = cut->parse_offset_bytes;
		cut->lineage = record->lineage;
	}
	cut->raw_bytes += length;
	cut->last_sequence = record->last_sequence;
	cut->next_sequence = record->last_sequence + 1;
	return true;
}

static void parse(struct mp_engine *engine)
{
	struct cut *cut = &engine->cut;
	struct volume *volume = cut->volume;

	while (cut->next_sequence <= cut->limit_sequence && !segment_ends(engine)) {
		const struct mp_record *record =
			(const struct mp_record *)(const void *)(cut->scan.memory +
								 cut->parse_offset_bytes);
		int64_t length = scan_record(engine, &cut->scan, volume, cut->parse_offset_bytes,
					     cut->next_sequence);

		if (length == -EAGAIN) {
			scan_more(engine, &cut->scan, scan_done);
			return;
		}
		if (length < 0) {
			cut_corrupt(engine);
			return;
		}
		if (!take_record(engine, record, (uint64_t)length))
			break;
		cut->parse_offset_bytes += (uint64_t)length;
	}
	cut->end_offset_bytes = cut->parse_offset_bytes;
	if (cut->raw_bytes) {
		encode(engine);
	} else if (segment_ends(engine)) {
		volume->cut_segment = engine->segments[volume->cut_segment].next;
		volume->cut_offset_bytes = 0;
		volume->cut_sequence = cut->next_sequence;
		begin(engine);
	} else
		cut_corrupt(engine);
}

static void scan_done(struct mp_io *io)
{
	struct mp_engine *engine = io->context;

	if (!scan_arrived(engine, &engine->cut.scan))
		cut_finish(engine, -EIO);
	else
		parse(engine);
}

static void start(struct volume *volume)
{
	struct mp_engine *engine = volume->engine;

	volume->cut_queued = false;
	engine->cut.volume = volume;
	pthread_mutex_lock(&engine->mutex);
	cut_reset(volume);
	pthread_mutex_unlock(&engine->mutex);
	if (volume->failed || engine->failed) {
		cut_finish(engine, -EIO);
		return;
	}
	begin(engine);
}

void cut_step(struct mp_engine *engine)
{
	uint32_t i;

	if (engine->rescue.stage) /* the chains are being rewritten */
		return;
	for (i = 0; i < engine->volume_count && !engine->cut.volume; i++) {
		uint32_t at = (engine->cut_turn + i) % engine->volume_count;
		if (engine->volumes[at] && engine->volumes[at]->cut_queued) {
			engine->cut_turn = at + 1;
			start(engine->volumes[at]);
		}
	}
}

void destaged(struct volume *volume, uint64_t sequence)
{
	struct mp_engine *engine = volume->engine;

	if (sequence > volume->applied_sequence)
		sequence = volume->applied_sequence;
	if (sequence <= volume->destaged_sequence)
		return;
	volume->destaged_sequence = sequence;
	engine->shares_stale = true;
	volume->sweep_wanted = volume->tombstones.count > 0;
	if (volume->batch && engine->cut.volume != volume) {
		if (sequence >= volume->batch_last_sequence) {
			volume->cut_offset_bytes = volume->batch_end_offset_bytes;
			volume->cut_sequence = volume->batch_last_sequence + 1;
		}
		pthread_mutex_lock(&engine->mutex);
		cut_reset(volume);
		pthread_mutex_unlock(&engine->mutex);
	}
	while (volume->age_count && volume->ages[volume->age_first].sequence <= sequence) {
		uint32_t following = (volume->age_first + 1) % AGE_SAMPLES;
		/* A sample stands for all up to the next one. */
		if (volume->age_count > 1 && volume->ages[following].sequence > sequence + 1)
			break;
		if (volume->age_count == 1 && sequence < volume->applied_sequence)
			break;
		volume->age_first = following;
		volume->age_count--;
	}
}
