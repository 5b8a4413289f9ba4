/* store.c - the store's reactor: one turn after the other, and what other threads may ask.
 *
 * Happy path: wait runs completions; then the inbox is handed out and everything that became
 * possible is started: log, apply, reads, graves, checkpoint, reclaim. The rest of the files never
 * wait.
 * Failure modes: a failed write or sync of log or checkpoint: the store is failed; everything but
 * reads is answered MP_STATUS_IO until it is opened again. The world ended (simulated crash): step
 * says so.
 */
#include <stdarg.h>
#include <stdio.h>

#include "store_internal.h"

enum { MIN_CLEAN_PAGES = 64 };

void *store_allocate(uint64_t length_bytes)
{
	void *memory = calloc(1, length_bytes);

	assert(memory);
	return memory;
}

void *store_allocate_aligned(uint64_t length_bytes)
{
	void *memory = aligned_alloc(MP_BLOCK_BYTES, store_align(length_bytes, MP_BLOCK_BYTES));

	assert(memory);
	return memory;
}

void *store_grow(void *array, uint64_t *capacity, uint64_t needed, uint64_t item_bytes)
{
	if (needed <= *capacity)
		return array;
	*capacity = needed * 2 + 16;
	array = realloc(array, *capacity * item_bytes);
	assert(array);
	return array;
}

static void completed(struct mp_io *io)
{
	struct store_io *mine = io->context;

	mine->store->ios_in_flight--;
	mine->done(mine);
}

void store_submit(struct mp_store *store, struct store_io *io, uint32_t op, uint64_t file,
		  uint64_t offset_bytes, void *buffer, uint64_t length_bytes)
{
	struct mp_io *submitted = &io->io;

	memset(submitted, 0, sizeof *submitted);
	io->store = store;
	io->iov = (struct iovec){buffer, length_bytes};
	submitted->op = op;
	submitted->file = file;
	submitted->offset_bytes = offset_bytes;
	submitted->length_bytes = length_bytes;
	submitted->iov = &io->iov;
	submitted->iov_count = buffer != NULL;
	submitted->done = completed;
	submitted->context = io;
	store->ios_in_flight++;
	store->driver->submit(store->driver->self, &submitted, 1);
}

void store_fail(struct mp_store *store, int error, const char *what, uint64_t file,
		uint64_t offset_bytes)
{
	store->counters.io_errors++;
	if (store->failure)
		return;
	pthread_mutex_lock(&store->mutex);
	store->failure = error;
	store->counters.failed = 1;
	snprintf(store->failure_message, sizeof store->failure_message,
		 "%s %llu at offset %llu: error %d; "
		 "nothing is acknowledged any more: check the disk, "
		 "then restart the store", what, (unsigned long long)file,
		 (unsigned long long)offset_bytes, -error);
	pthread_mutex_unlock(&store->mutex);
	/* The daemon must hear of it now, not with the next answer: there may be no client. */
	store->driver->notify(store->driver->self);
}

void store_queue_push(struct store_queue *queue, struct store_request *request)
{
	request->next = NULL;
	if (queue->tail)
		queue->tail->next = request;
	else
		queue->head = request;
	queue->tail = request;
	queue->bytes += request->frame.payload_bytes;
}

struct store_request *store_queue_pop(struct store_queue *queue)
{
	struct store_request *request = queue->head;

	if (!request)
		return NULL;
	queue->head = request->next;
	if (!queue->head)
		queue->tail = NULL;
	queue->bytes -= request->frame.payload_bytes;
	request->next = NULL;
	return request;
}

static struct store_volume **volume_slot(struct mp_store *store, const uint8_t *id)
{
	uint64_t hash = mp_xxh3(id, MP_VOLUME_ID_BYTES);
	struct store_volume **slot = &store->volumes[hash % STORE_VOLUME_BUCKETS];

	while (*slot && memcmp((*slot)->admitted.id, id, MP_VOLUME_ID_BYTES) != 0)
		slot = &(*slot)->next;
	return slot;
}

struct store_volume *store_volume_find(struct mp_store *store, const uint8_t *id)
{
	return *volume_slot(store, id);
}

struct store_volume *store_volume_add(struct mp_store *store, const uint8_t *id)
{
	struct store_volume *volume = store_allocate(sizeof *volume);

	memcpy(volume->admitted.id, id, MP_VOLUME_ID_BYTES);
	memcpy(volume->map.volume, id, MP_VOLUME_ID_BYTES);
	volume->map.leaf_bits = MP_MAP_LEAF_BITS;
	pthread_mutex_lock(&store->mutex);
	*volume_slot(store, id) = volume;
	pthread_mutex_unlock(&store->mutex);
	return volume;
}

void store_volume_remove(struct mp_store *store, struct store_volume *volume)
{
	pthread_mutex_lock(&store->mutex);
	*volume_slot(store, volume->admitted.id) = volume->next;
	pthread_mutex_unlock(&store->mutex);
	free(volume);
}

/* One checked frame to where it is worked on. */
static void dispatch(struct mp_store *store, struct store_request *request)
{
	if (request->frame.type == MP_FRAME_READ) {
		store_read_start(store, request);
		return;
	}
	if (request->frame.type == MP_FRAME_BLOCK_STATUS) {
		store_status_start(store, request);
		return;
	}
	if (store->failure) {
		store_reply(store, request, MP_STATUS_IO);
		return;
	}
	if (request->frame.type == MP_FRAME_CHECKPOINT) {
		store_queue_push(&store->checkpoint_requests, request);
		return;
	}
	if (request->frame.type == MP_FRAME_BATCH) {
		request->status = store_batch_check(store, request->buffer + MP_GROUP_HEADER_BYTES,
						    request->frame.payload_bytes, &request->batch);
		store->counters.payload_bytes += request->frame.payload_bytes;
		store->counters.checksum_errors += request->status == MP_STATUS_CORRUPT;
	}
	store_queue_push(&store->queue, request);
}

void store_dispatch(struct mp_store *store)
{
	struct store_queue inbox;
	struct store_request *request;

	pthread_mutex_lock(&store->mutex);
	inbox = store->inbox;
	store->inbox = (struct store_queue){0};
	pthread_mutex_unlock(&store->mutex);
	if (inbox.head)
		store->client_ns = store->turn_ns;
	while ((request = store_queue_pop(&inbox)))
		dispatch(store, request);
}

static int quiet(const struct mp_store *store)
{
	if (store->reads || store->reads_waiting.head || store->statuses ||
	    store->statuses_waiting.head || store->ios_in_flight)
		return 0;
	return store->failure || (store_log_idle(store) && !store->checkpoint);
}

/* Asked to stop: what was accepted is finished, then one checkpoint, then nothing is in flight. */
static void wind_down(struct mp_store *store)
{
	int stopping;

	pthread_mutex_lock(&store->mutex);
	stopping = store->stopping && !store->inbox.head;
	pthread_mutex_unlock(&store->mutex);
	store->winding_down = stopping != 0;
	if (!stopping || !quiet(store))
		return;
	if (!store->failure && store->final_checkpoint == 0 &&
	    (store->log_bytes != store->checkpoint_log_bytes || store->dirty_pages)) {
		store->final_checkpoint = 1;
		store->driver->wake(store->driver->self);
		return;
	}
	/* No space for it is no reason to wait: the log is whole. */
	if (store->failure || store->final_checkpoint != 1 ||
	    store->turn_ns < store->full_until_ns) {
		pthread_mutex_lock(&store->mutex);
		store->stopped = !store_reclaiming(store) || store->failure;
		pthread_mutex_unlock(&store->mutex);
	}
}

static void turn(struct mp_store *store)
{
	store->turn_ns = store->driver->now_ns(store->driver->self);
	store_sockets_adopt(store);
	store_dispatch(store);
	store_reads_advance(store);
	store_statuses_advance(store);
	store_log_advance(store);
	store_apply_advance(store);
	store_log_advance(store);
	store_graves_advance(store);
	store_checkpoint_advance(store);
	store_sweep_advance(store);
	store_scrub_advance(store);
	store_reclaim(store);
	store_sockets_flush(store);
	store_pages_trim(store);
	wind_down(store);
	pthread_mutex_lock(&store->mutex);
	store->published = store->counters;
	pthread_mutex_unlock(&store->mutex);
}

/* How long the reactor may sleep. */
static int64_t patience_ns(const struct mp_store *store, int64_t timeout_ns)
{
	int64_t limit_ns = -1;
	uint64_t scrub_ns = store_scrub_wake_ns(store);

	if (store->winding_down && !store->ios_in_flight)
		return 0;
	if (store->graves && !store->grave_blocked && store->dirty_pages < store->dirty_limit)
		return 0;
	if (store->evidence_commit < store->synced_commit && !store->failure)
		limit_ns = store->evidence_due_ns > store->turn_ns
				   ? (int64_t)(store->evidence_due_ns - store->turn_ns) : 0;
	if (store->full_until_ns > store->turn_ns && store->queue.head)
		limit_ns = (int64_t)(store->full_until_ns - store->turn_ns);
	if (scrub_ns != UINT64_MAX) {
		int64_t left_ns = scrub_ns > store->turn_ns ? (int64_t)(scrub_ns - store->turn_ns)
							    : 0;

		if (limit_ns < 0 || left_ns < limit_ns)
			limit_ns = left_ns;
	}
	if (limit_ns >= 0 && (timeout_ns < 0 || timeout_ns > limit_ns))
		return limit_ns;
	return timeout_ns;
}

int64_t mp_store_step(struct mp_store *store, int64_t timeout_ns)
{
	int64_t handled;

	if (store->world_ended)
		return -ESHUTDOWN;
	turn(store);
	handled = store->driver->wait(store->driver->self, patience_ns(store, timeout_ns));
	if (handled < 0) {
		store->world_ended = 1;
		return handled;
	}
	turn(store);
	return handled;
}

static int is_stopped(struct mp_store *store)
{
	int stopped;

	pthread_mutex_lock(&store->mutex);
	stopped = store->stopped;
	pthread_mutex_unlock(&store->mutex);
	return stopped;
}

static void *run(void *argument)
{
	struct mp_store *store = argument;

	pthread_setname_np(pthread_self(), "mp-store"); /* for top -H */
	while (!is_stopped(store) && mp_store_step(store, -1) >= 0)
		;
	return NULL;
}

int mp_store_start(struct mp_store *store)
{
	int error = pthread_create(&store->thread, NULL, run, store);

	store->started = error == 0;
	return -error;
}

void mp_store_stop(struct mp_store *store)
{
	pthread_mutex_lock(&store->mutex);
	__atomic_store_n(&store->stopping, 1, __ATOMIC_RELAXED); /* storelog.c has no mutex */
	pthread_mutex_unlock(&store->mutex);
	store->driver->wake(store->driver->self);
	if (store->started)
		pthread_join(store->thread, NULL);
	else
		run(store);
	store->started = 0;
}

static void set_limits(struct mp_store *store, const struct mp_store_options *options)
{
	uint64_t pages;

	store->options = *options;
	if (!store->options.segment_bytes)
		store->options.segment_bytes = store->super.segment_bytes;
	if (!store->options.page_cache_bytes)
		store->options.page_cache_bytes = 64 << 20;
	if (!store->options.checkpoint_every_bytes)
		store->options.checkpoint_every_bytes = 512 << 20;
	pages = store->options.page_cache_bytes / MP_PAGE_BYTES;
	store->clean_limit = pages / 2 < MIN_CLEAN_PAGES ? MIN_CLEAN_PAGES : pages / 2;
	/* A checkpoint should fit into one segment. */
	store->dirty_limit = store->clean_limit;
	if (store->dirty_limit > store->options.segment_bytes / MP_PAGE_BYTES / 2)
		store->dirty_limit = store->options.segment_bytes / MP_PAGE_BYTES / 2;
}

static struct mp_store *make(struct mp_driver *driver, const struct mp_store_options *options)
{
	struct mp_store *store = store_allocate(sizeof *store);

	store->driver = driver;
	pthread_mutex_init(&store->mutex, NULL);
	driver->on_ready = store_sockets_ready;
	driver->owner = store;
	set_limits(store, options);
	store->clean_limit = UINT64_MAX; /* until segment_bytes is known */
	return store;
}

struct mp_store *mp_store_open(struct mp_driver *driver, const struct mp_store_options *options,
			       int *error,
			       char *message, uint64_t message_bytes)
{
	struct mp_store *store = make(driver, options);

	*error = store_recover(store, message, message_bytes);
	if (*error) {
		mp_store_free(store);
		return NULL;
	}
	set_limits(store, options);
	store->published = store->counters;
	return store;
}

struct mp_store *store_open_to_look(struct mp_driver *driver,
				    const struct mp_store_options *options, enum store_look *look,
				    char *message, uint64_t message_bytes)
{
	struct mp_store *store = make(driver, options);

	*look = store_recover_look(store, message, message_bytes);
	set_limits(store, options);
	return store;
}

void mp_store_free(struct mp_store *store)
{
	struct store_request *request;

	while ((request = store_queue_pop(&store->inbox)))
		store_request_free(store, request);
	store_reads_free(store);
	store_statuses_free(store);
	store_log_free(store);
	store_checkpoint_free(store);
	store_sockets_free(store);
	store_connections_free(store);
	free(store->ended);
	while (store->graves) {
		struct store_grave *next = store->graves->next;
		free(store->graves);
		store->graves = next;
	}
	for (uint32_t i = 0; i < STORE_VOLUME_BUCKETS; i++) {
		while (store->volumes[i]) {
			struct store_volume *next = store->volumes[i]->next;
			free(store->volumes[i]);
			store->volumes[i] = next;
		}
	}
	store_pages_free(store);
	free(store->sweep.head);
	store_scrub_free(store);
	store_segments_free(store);
	free(store->origins);
	pthread_mutex_destroy(&store->mutex);
	free(store);
}

int mp_store_get_volume(struct mp_store *store, const uint8_t *id, struct mp_volume_state *out)
{
	struct store_volume *volume;
	int error = -ENOENT;

	pthread_mutex_lock(&store->mutex);
	volume = store_volume_find(store, id);
	if (volume && volume->visible) {
		*out = volume->state;
		error = 0;
	}
	pthread_mutex_unlock(&store->mutex);
	return error;
}

int64_t mp_store_list_volumes(struct mp_store *store, struct mp_volume_state *out,
			      uint64_t capacity)
{
	uint64_t count = 0;

	pthread_mutex_lock(&store->mutex);
	for (uint32_t i = 0; i < STORE_VOLUME_BUCKETS; i++)
		for (struct store_volume *volume = store->volumes[i]; volume; volume = volume->next)
			if (volume->visible && count < capacity)
				out[count++] = volume->state;
	pthread_mutex_unlock(&store->mutex);
	return (int64_t)count;
}

uint64_t mp_store_volume_bytes(struct mp_store *store, const uint8_t *id)
{
	struct store_volume *volume;
	uint64_t bytes = 0;

	pthread_mutex_lock(&store->mutex);
	volume = store_volume_find(store, id);
	if (volume)
		bytes = __atomic_load_n(&volume->stored_bytes, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&store->mutex);
	return bytes;
}

void mp_store_counters(struct mp_store *store, struct mp_store_counters *out)
{
	pthread_mutex_lock(&store->mutex);
	*out = store->published;
	pthread_mutex_unlock(&store->mutex);
}

int mp_store_failure(struct mp_store *store, char *message, uint64_t message_bytes)
{
	int failure;

	pthread_mutex_lock(&store->mutex);
	failure = store->failure;
	snprintf(message, message_bytes, "%s", store->failure_message);
	pthread_mutex_unlock(&store->mutex);
	return failure;
}
