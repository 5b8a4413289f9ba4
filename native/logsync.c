/* logsync.c - durability of the write log: one fdatasync for all chains, and who waits for it.
 *
 * Happy path: FLUSH and FUA want a sync -> one is submitted per turn, for everything applied by
 * then -> done: each volume's synced position moves, waiters whose writes it covers are answered,
 * the others want the next. A record that tells of the sync is appended when nothing else follows
 * for SYNCED_RECORD_DELAY_NS (log.c says why).
 *
 * Failure modes: a sync that fails says nothing about what it covered, and a later one that
 * succeeds does not either: everything since the last good sync is written again elsewhere
 * (rescue.c) before anybody is answered.
 */
#include "engine_internal.h"

static void finish_synced(struct volume *volume)
{
	struct link *link = volume->syncs.next;

	while (link != &volume->syncs) {
		struct request *request = CONTAINER(link, struct request, in_sync);
		link = link->next;
		if (volume->engine->failed)
			request->error = request->error ? request->error : EIO;
		else if (request->sync_sequence > volume->synced_sequence)
			continue;
		list_remove(&request->in_sync);
		request_finish(request);
	}
	if (!list_is_empty(&volume->syncs))
		volume->engine->sync.wanted = true;
}

/* All that is applied is durable now (rescue.c). */
void log_synced(struct volume *volume)
{
	volume->synced_sequence = volume->applied_sequence;
	volume->synced_position = log_applied_position(volume);
	volume->synced_at_ns = volume->engine->now_ns;
	finish_synced(volume);
}

static void sync_done(struct mp_io *io)
{
	struct mp_engine *engine = io->context;
	uint32_t i;

	engine->ios_inflight--;
	engine->sync.running = false;
	engine->sync.ended_ns = engine->now_ns;
	if (io->result < 0 && !fault(engine, MP_FAULT_FAILED_SYNC_IS_GOOD)) {
		log_failed(engine, (int)-io->result, "a sync of the log failed");
		engine->sync.wanted = true;
		return;
	}
	engine->sync.completed = engine->sync.started;
	/* it was for the checkpoint: nobody is answered before that is whole */
	if (engine->rescue.stage)
		return;
	for (i = 0; i < engine->volume_count; i++) {
		struct volume *volume = engine->volumes[i];
		if (!volume)
			continue;
		if (!engine->failed && volume->syncing_sequence > volume->synced_sequence) {
			volume->synced_sequence = volume->syncing_sequence;
			volume->synced_position = volume->syncing_position;
			volume->synced_at_ns = engine->now_ns;
		}
		finish_synced(volume);
		if (volume->tell_after_sync &&
		    (volume->synced_sequence > volume->destaged_sequence ||
		     fault(engine, MP_FAULT_SHIP_UNSYNCED))) {
			volume->tell_after_sync = false;
			volume->dirty_ready_told = true;
			engine_volume_event(volume, MP_EVENT_DIRTY_READY, 0, 0);
		}
	}
}

void log_want_sync_for_destage(struct mp_engine *engine)
{
	engine->sync.due_ns = engine->sync.ended_ns + DESTAGE_SYNC_NS;
}

void log_sync_if_wanted(struct mp_engine *engine)
{
	bool held = engine->rescue.stage && engine->rescue.stage != RESCUE_CHECKPOINT;
	uint32_t i;

	if (engine->sync.due_ns && engine->sync.due_ns <= engine->now_ns)
		engine->sync.wanted = true;
	if (!engine->sync.wanted || engine->sync.running || engine->failed || held)
		return;
	engine->sync.wanted = false;
	engine->sync.due_ns = 0;
	engine->sync.running = true;
	engine->sync.started++;
	for (i = 0; i < engine->volume_count; i++) {
		struct volume *volume = engine->volumes[i];
		if (!volume || engine->rescue.stage)
			continue;
		volume->syncing_sequence = volume->applied_sequence;
		volume->syncing_position = log_applied_position(volume);
	}
	engine->counters.syncs++;
	memset(&engine->sync.io, 0, sizeof engine->sync.io);
	engine->sync.io.op = MP_OP_SYNC;
	engine->sync.io.done = sync_done;
	engine->sync.io.context = engine;
	if (fault(engine, MP_FAULT_SKIP_SYNC)) {
		engine->ios_inflight++;
		sync_done(&engine->sync.io);
		return;
	}
	engine_submit(engine, &engine->sync.io);
}

void log_wait_for_sync(struct volume *volume, struct request *request)
{
	request->sync_sequence = volume->applied_sequence;
	if (volume->engine->failed)
		request->error = request->error ? request->error : EIO;
	if (volume->engine->failed || request->sync_sequence <= volume->synced_sequence) {
		request_finish(request);
		return;
	}
	list_append(&volume->syncs, &request->in_sync);
	volume->engine->sync.wanted = true;
}

static bool wants_synced_record(const struct volume *volume)
{
	const struct mp_engine *engine = volume->engine;

	/* A failed volume's chain may be damaged at its head: nothing is written over that. */
	return !engine->failed && !engine->rescue.stage && !volume->failed &&
	       volume->synced_sequence > volume->logged_synced_sequence &&
	       volume->synced_sequence > volume->destaged_sequence &&
	       volume->appends_inflight == 0;
}

static uint64_t telling_due_ns(const struct volume *volume)
{
	return wants_synced_record(volume) ? volume->synced_at_ns + SYNCED_RECORD_DELAY_NS
					   : UINT64_MAX;
}

/* A telling that is due, in the turn: a refusal must not hide from wait_ns that room has come. */
void log_tell_if_due(struct volume *volume)
{
	if (telling_due_ns(volume) <= volume->engine->now_ns)
		log_synced_record(volume);
}

/* When the next record that tells of a sync is due, or a slowed guest's next data; UINT64_MAX:
 * none. */
uint64_t log_next_timer_ns(const struct mp_engine *engine)
{
	bool may_sync = !engine->sync.running && !engine->failed && !engine->rescue.stage;
	uint64_t next = engine->sync.due_ns && may_sync ? engine->sync.due_ns : UINT64_MAX;
	uint32_t i;

	for (i = 0; i < engine->volume_count; i++) {
		struct volume *volume = engine->volumes[i];
		uint64_t due;

		if (!volume)
			continue;
		due = share_timer_ns(volume);
		next = due < next ? due : next;
		due = telling_due_ns(volume);
		/* Else it was refused in this turn, and waits for room as everything else. */
		if (due > engine->now_ns)
			next = due < next ? due : next;
	}
	return next;
}
