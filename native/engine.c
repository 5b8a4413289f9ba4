/* engine.c - one shard's reactor: the turn, its start and its end, events, failures.
 *
 * A turn: wait (completions run, sockets are read) -> commands of the control plane -> connections
 * that waited for buffers -> misses leave -> appends -> sync -> background slices (destage,
 * release, sweep, checkpoint, verification) -> replies.
 * Failure modes: a failed log write or sync is rescued (rescue.c); when that fails too,
 * acknowledging ends for good (engine_fail): mutations and flushes get EIO, reads go on. A volume
 * fails alone when its log does not verify, or when the store refuses it.
 */
#include "engine_internal.h"

#include <stdio.h>

enum { PUBLISH_NS = 5000000 };
#define STOP_GRACE_NS 1000000000ULL

void engine_submit(struct mp_engine *engine, struct mp_io *io)
{
	engine->ios_inflight++;
	engine->driver->submit(engine->driver->self, &io, 1);
}

/* ---- events and failures ---- */

void engine_event(struct mp_engine *engine, const struct mp_event *event)
{
	struct event_node *node = malloc(sizeof *node);

	assert(node); /* an event that is lost would stall its volume silently */
	node->event = *event;
	node->next = NULL;
	pthread_mutex_lock(&engine->mutex);
	*engine->events_tail = node;
	engine->events_tail = &node->next;
	engine->event_count++;
	pthread_mutex_unlock(&engine->mutex);
	engine->notify_wanted = true;
}

void engine_volume_event(struct volume *volume, uint32_t type, int status, uint64_t cookie)
{
	struct mp_event event;

	memset(&event, 0, sizeof event);
	event.type = type;
	event.status = status;
	memcpy(event.volume, volume->id, sizeof event.volume);
	event.cookie = cookie;
	event.last_sequence = volume->applied_sequence;
	engine_event(volume->engine, &event);
}

void volume_fail(struct volume *volume, int error, const char *what)
{
	struct mp_event event;

	if (volume->failed)
		return;
	volume->failed = true;
	volume->error = error;
	memset(&event, 0, sizeof event);
	event.type = MP_EVENT_VOLUME_FAILED;
	event.status = -error;
	memcpy(event.volume, volume->id, sizeof event.volume);
	snprintf(event.message, sizeof event.message, "%s", what);
	engine_event(volume->engine, &event);
}

void fail_waiting(struct volume *volume)
{
	while (!list_is_empty(&volume->ready))
		mutation_failed(CONTAINER(volume->ready.next, struct mutation, in_queue), EIO);
	while (!list_is_empty(&volume->ready_ranges))
		mutation_failed(CONTAINER(volume->ready_ranges.next, struct mutation, in_queue),
				EIO);
	while (!list_is_empty(&volume->syncs)) {
		struct request *request =
			CONTAINER(volume->syncs.next, struct request, in_sync);
		list_remove(&request->in_sync);
		request_error(request, EIO);
		request_finish(request);
	}
}

void engine_fail(struct mp_engine *engine, int error, const char *what)
{
	struct mp_event event;

	if (engine->failed)
		return;
	engine->failed = error ? error : EIO;
	engine->counters.device_errors++;
	engine->counters.failed = (uint64_t)engine->failed;
	memset(&event, 0, sizeof event);
	event.type = MP_EVENT_ENGINE_FAILED;
	event.status = -engine->failed;
	snprintf(event.message, sizeof event.message, "%s: %s; writes get I/O errors from now on",
		 what, strerror(engine->failed));
	engine_event(engine, &event);
}

/* ---- the turn ---- */

static void publish(struct mp_engine *engine, bool now)
{
	struct mp_engine_counters *counters = &engine->counters;
	struct mp_slots_counters slots;
	uint32_t i, count = 0;

	if (!now && engine->now_ns - engine->published_ns < PUBLISH_NS)
		return;
	engine->published_ns = engine->now_ns;
	mp_slots_counters(engine->slots, &slots);
	counters->slots_used = slots.used_slots;
	counters->segments_free = engine->segments_free;
	counters->segments_waiting = engine->segments_waiting;
	counters->index_entries = engine->index.used;
	counters->buffer_bytes_used = mp_buffers_used_bytes(engine->buffers);
	counters->memory_bytes = index_memory_bytes(&engine->index) +
				 mp_slots_memory_bytes(engine->slots);
	pthread_mutex_lock(&engine->mutex);
	engine->published_counters = *counters;
	for (i = 0; i < engine->volume_count; i++)
		if (engine->volumes[i])
			volume_publish(engine->volumes[i], &engine->published[count++]);
	engine->published_count = count;
	pthread_mutex_unlock(&engine->mutex);
}

/* The grace is over: what waits for a store that is away, or for "dirty" on record, ends without an
 * answer. */
static void cut_off(struct mp_engine *engine)
{
	struct link *link;
	uint32_t i;

	for (link = engine->connections.next; link != &engine->connections; link = link->next)
		CONTAINER(link, struct connection, in_engine)->broken = true;
	fetches_abandon(engine);
	for (i = 0; i < engine->volume_count; i++)
		if (engine->volumes[i]) {
			mutations_unhold(engine->volumes[i]);
			fail_waiting(engine->volumes[i]);
		}
}

static void stop_step(struct mp_engine *engine)
{
	struct checkpoint *checkpoint = &engine->checkpoint;
	uint32_t i;

	if (engine->connection_count) {
		if (engine->now_ns - engine->stop_ns >= STOP_GRACE_NS)
			cut_off(engine);
		return;
	}
	fetches_abandon(engine); /* read ahead: nobody waits for it */
	if (engine->release.volume || engine->cut.volume || engine->sync.running ||
	    engine->fills_inflight || engine->rescue.stage)
		return;
	for (i = 0; i < engine->volume_count; i++)
		if (engine->volumes[i] && engine->volumes[i]->appends_inflight)
			return;
	if (!engine->failed && (checkpoint->running || !checkpoint->clean)) {
		/* One that begins now, and is the end of every chain. */
		checkpoint->wanted = !checkpoint->clean;
		return;
	}
	if (engine->ios_inflight)
		return;
	engine->stopped = true;
	{
		struct mp_event event = {.type = MP_EVENT_STOPPED};
		engine_event(engine, &event);
	}
}

static void tell_opened(struct mp_engine *engine)
{
	uint32_t i;

	for (i = 0; i < engine->volume_count; i++) {
		struct volume *volume = engine->volumes[i];
		if (!volume || !volume->open_pending ||
		    (engine->checkpoint.completed_serial < volume->open_serial && !engine->failed))
			continue;
		volume->open_pending = false;
		engine_volume_event(volume, MP_EVENT_OPENED, engine->failed ? -EIO : 0,
				    volume->open_cookie);
	}
}

static void background(struct mp_engine *engine)
{
	uint32_t freed;

	rescue_step(engine);
	cut_step(engine);
	release_step(engine);
	if (engine->tombstone_count)
		sweep_step(engine);
	/* A checkpoint costs a walk over index and slots: let several segments wait for one. Whom a
	 * segment was refused wants it at once (shares.c). */
	freed = checkpoint_would_free(engine);
	if (freed && shares_spare_segments(engine) < engine->segment_count / 4 &&
	    (freed >= engine->segment_count / 8 || freed >= engine->segments_free))
		engine->checkpoint.wanted = true;
	engine->checkpoint.wanted |= checkpoint_due_ns(engine) <= engine->now_ns;
	checkpoint_step(engine);
	scrub_step(engine);
}

static bool background_pending(const struct mp_engine *engine)
{
	const struct release *release = &engine->release;

	if (engine->tombstone_count && sweep_pending(engine))
		return true;
	return release->volume && !release->scan.busy && !release->parsed &&
	       release->fills < FILLS_MAX;
}

static int64_t wait_ns(const struct mp_engine *engine, int64_t timeout_ns, uint64_t timer_ns)
{
	if (background_pending(engine) || commands_waiting(engine) || engine->stopped ||
	    engine->walks_pending ||
	    /* Room has come: whom it was refused asks again, in log_append_ready. */
	    (engine->shares_stale && !engine->failed && !engine->rescue.stage) ||
	    (engine->paused && engine->resume_wanted))
		return 0;
	if (engine->has_thread && engine->published_ns < engine->active_ns)
		timer_ns = timer_ns < engine->now_ns + PUBLISH_NS ? timer_ns
								  : engine->now_ns + PUBLISH_NS;
	if (engine->stopping && timer_ns > engine->now_ns + STOP_GRACE_NS)
		timer_ns = engine->now_ns + STOP_GRACE_NS;
	if (timer_ns != UINT64_MAX) {
		int64_t until = timer_ns > engine->now_ns ? (int64_t)(timer_ns - engine->now_ns)
							  : 0;
		if (timeout_ns < 0 || until < timeout_ns)
			return until;
	}
	return timeout_ns;
}

static uint64_t next_timer_ns(const struct mp_engine *engine)
{
	uint64_t log = log_next_timer_ns(engine), checkpoint = checkpoint_due_ns(engine);
	uint64_t release = release_timer_ns(engine), scrub = scrub_timer_ns(engine);
	uint64_t next = log < checkpoint ? log : checkpoint;

	next = next < release ? next : release;
	return next < scrub ? next : scrub;
}

int64_t mp_engine_step(struct mp_engine *engine, int64_t timeout_ns)
{
	int64_t handled = engine->driver->wait(engine->driver->self,
					       wait_ns(engine, timeout_ns, next_timer_ns(engine)));

	if (handled < 0)
		return handled;
	engine->now_ns = engine->driver->now_ns(engine->driver->self);
	if (handled)
		engine->active_ns = engine->now_ns;
	commands_run(engine);
	connections_resume(engine);
	walks_step(engine);
	fetch_links_flush(engine);
	log_append_ready(engine);
	log_sync_if_wanted(engine);
	if (engine->failed) {
		uint32_t i;
		for (i = 0; i < engine->volume_count; i++)
			if (engine->volumes[i])
				fail_waiting(engine->volumes[i]);
	}
	background(engine);
	tell_opened(engine);
	connections_flush(engine);
	fetch_links_flush(engine);
	log_sync_if_wanted(engine);
	if (engine->stopping && !engine->stopped)
		stop_step(engine);
	publish(engine, !engine->has_thread || engine->stopped);
	if (engine->notify_wanted) {
		engine->notify_wanted = false;
		engine->driver->notify(engine->driver->self);
	}
	return handled;
}

/* ---- start and end ---- */

static void set_defaults(struct mp_engine_options *options)
{
	uint64_t least = 2 * NBD_PAYLOAD_MAX;

	if (!options->buffer_bytes)
		options->buffer_bytes = 256ULL * 1024 * 1024;
	if (options->buffer_bytes < least)
		options->buffer_bytes = least;
	if (!options->checkpoint_every_bytes)
		options->checkpoint_every_bytes = 512ULL * 1024 * 1024;
	if (!options->scrub_patience_ns)
		options->scrub_patience_ns = SCRUB_PATIENCE_NS;
}

static int allocate(struct mp_engine *engine)
{
	uint64_t segments = engine->super.log_segment_count, i, seed;
	uint64_t blocks = segments * (engine->super.log_segment_bytes / MP_BLOCK_BYTES);

	engine->segment_count = engine->segments_free = (uint32_t)segments;
	engine->slot_blocks = engine->super.slot_bytes / MP_BLOCK_BYTES;
	engine->segments = calloc(segments, sizeof *engine->segments);
	engine->published = calloc(VOLUMES_MAX, sizeof *engine->published);
	engine->cut.scan.memory = aligned_alloc(MP_BLOCK_BYTES, engine->super.log_segment_bytes);
	engine->release.scan.memory =
		aligned_alloc(MP_BLOCK_BYTES, engine->super.log_segment_bytes);
	engine->checkpoint.buffer =
		aligned_alloc(MP_BLOCK_BYTES, CHECKPOINT_STEP_BYTES + MP_BLOCK_BYTES);
	engine->buffers = mp_buffers_new(engine->options.buffer_bytes + INTERNAL_BYTES);
	engine->driver->random_bytes(engine->driver->self, &seed, sizeof seed);
	engine->slots = mp_slots_new((uint32_t)engine->super.slot_count,
				     (uint32_t)engine->slot_blocks, seed);
	if (!engine->segments || !engine->published || !engine->cut.scan.memory ||
	    !engine->release.scan.memory || !engine->checkpoint.buffer || !engine->buffers ||
	    !engine->slots || index_init(&engine->index, blocks, ~seed))
		return -ENOMEM;
	engine->zeros_max = index_zeros_limit(&engine->index, blocks);
	for (i = 0; i < segments; i++)
		engine->segments[i].next = NO_SEGMENT;
	engine->counters.segments_total = segments;
	engine->counters.slots_total = engine->super.slot_count;
	engine->counters.slot_bytes = engine->super.slot_bytes;
	return 0;
}

static void sockets_ready(void *owner, void *context, uint32_t ready)
{
	if (!fetch_link_ready(owner, context, ready))
		connections_ready(owner, context, ready);
}

static struct mp_engine *engine_new(struct mp_driver *driver,
				    const struct mp_engine_options *options)
{
	struct mp_engine *engine = calloc(1, sizeof *engine);

	if (!engine)
		return NULL;
	engine->driver = driver;
	engine->options = *options;
	set_defaults(&engine->options);
	list_init(&engine->connections);
	fetch_links_init(engine);
	list_init(&engine->walks);
	engine->commands_tail = &engine->commands;
	engine->events_tail = &engine->events;
	engine->next_origin = 1;
	engine->now_ns = driver->now_ns(driver->self);
	driver->random_bytes(driver->self, &engine->next_request_id,
			     sizeof engine->next_request_id);
	engine->next_request_id >>= 1;
	driver->on_ready = sockets_ready;
	driver->owner = engine;
	driver->poll_ns = options->poll_ns;
	pthread_mutex_init(&engine->mutex, NULL);
	return engine;
}

struct mp_engine *mp_engine_open(struct mp_driver *driver, const struct mp_engine_options *options,
				 int *error, char *message, uint64_t message_bytes)
{
	struct mp_engine *engine = engine_new(driver, options);
	int64_t device_bytes = driver->file_length_bytes(driver->self, 0);
	int rc = engine ? 0 : -ENOMEM;

	if (message_bytes)
		message[0] = 0;
	if (rc == 0 && device_bytes < 0)
		rc = (int)device_bytes;
	rc = rc ? rc
		: super_load(driver, &engine->super, &engine->super_copy, message, message_bytes);
	rc = rc ? rc
		: super_check(&engine->super, (uint64_t)device_bytes, message, message_bytes);
	rc = rc ? rc : allocate(engine);
	rc = rc ? rc : recovery_run(engine, message, message_bytes);
	rc = rc ? rc : scrub_new(engine);
	if (rc == 0) {
		shares_update(engine);
		publish(engine, true);
		return engine;
	}
	if (message_bytes && !message[0])
		snprintf(message, message_bytes, "the cache device cannot be opened: %s",
			 strerror(-rc));
	*error = rc;
	if (engine)
		mp_engine_free(engine);
	return NULL;
}

void mp_engine_free(struct mp_engine *engine)
{
	uint32_t i;

	mailbox_free(engine);
	fetch_links_free(engine);
	/* After a simulated crash, work is still in flight. */
	connections_free(engine);
	left_free(engine);
	for (i = 0; i < engine->volume_count; i++)
		volume_free(engine->volumes[i]);
	scrub_free(engine);
	index_free(&engine->index);
	if (engine->slots)
		mp_slots_free(engine->slots);
	if (engine->buffers)
		mp_buffers_free(engine->buffers);
	free(engine->segments);
	free(engine->published);
	free(engine->cut.scan.memory);
	free(engine->release.scan.memory);
	free(engine->checkpoint.buffer);
	free(engine->rescue.scan.memory);
	free(engine->checkpoint.captured);
	pthread_mutex_destroy(&engine->mutex);
	free(engine);
}

static void *run(void *argument)
{
	struct mp_engine *engine = argument;

	pthread_setname_np(pthread_self(), "mp-engine"); /* for top -H */
	while (!engine->stopped)
		if (mp_engine_step(engine, -1) < 0)
			break;
	return NULL;
}

int mp_engine_start(struct mp_engine *engine)
{
	int rc;

	assert(!engine->has_thread);
	engine->has_thread = true;
	rc = pthread_create(&engine->thread, NULL, run, engine);
	if (rc)
		engine->has_thread = false;
	return -rc;
}

void mp_engine_stop(struct mp_engine *engine)
{
	mp_engine_request_stop(engine);
	if (engine->has_thread)
		pthread_join(engine->thread, NULL);
	engine->has_thread = false;
}
