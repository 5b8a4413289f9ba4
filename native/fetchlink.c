/* fetchlink.c - the fetch connection to each store: READ frames out, replies in.
 *
 * The control plane connects and shakes hands, then hands the socket over: a miss passes through no
 * other thread of this process.
 *
 * Happy path: fetches that a turn started wait in their store's queue; once per turn they become
 * frames, as many as fit, in one send. What arrives is cut into frames; fetch.c decodes them.
 * Failure modes: the store is away (no socket): fetches wait. The connection ends, or carries
 * something that is no reply to a READ: it is closed, what was sent waits again, oldest first, and
 * MP_EVENT_LINK_BROKEN asks the control plane for another. The store does not read: -EAGAIN, the
 * queue waits for the socket; what guests may have in flight bounds it.
 */
#include "engine_internal.h"

#include <stdio.h>

/* A reply that ships a whole extent for every block asked for. */
enum { REPLY_BYTES_MAX = MP_FRAME_HEADER_BYTES + (int)sizeof(struct mp_read_reply) +
	FETCH_BLOCKS_MAX * ((int)sizeof(struct mp_piece) + MP_EXTENT_BLOCKS * MP_BLOCK_BYTES) };

static void watch(struct store_link *store, bool writing)
{
	struct mp_driver *driver = store->engine->driver;
	uint32_t interest = MP_SOCKET_READ | (writing ? MP_SOCKET_WRITE : 0U);

	if (interest == store->interest)
		return;
	store->interest = interest;
	driver->watch(driver->self, store->socket, interest, store);
}

/* The socket goes; what was sent on it waits again, before everything younger. */
static void drop(struct store_link *store)
{
	struct mp_driver *driver = store->engine->driver;

	driver->close_socket(driver->self, store->socket);
	store->socket = -1;
	store->interest = 0;
	store->out_begin = store->out_end = 0;
	store->in_length = 0;
	statuses_abandon(store);
	while (!list_is_empty(&store->sent)) {
		struct link *youngest = store->sent.previous;
		struct fetch *fetch = CONTAINER(youngest, struct fetch, in_queue);
		list_remove(youngest);
		fetch->sent = false;
		list_append(fetch->background ? store->background.next : store->waiting.next,
			    youngest);
	}
}

static void broken(struct store_link *store, int status)
{
	struct mp_event event;

	if (status == -EPROTO)
		store->engine->counters.protocol_errors++;
	memset(&event, 0, sizeof event);
	event.type = MP_EVENT_LINK_BROKEN;
	event.status = status;
	event.cookie = store->cookie;
	snprintf(event.message, sizeof event.message, "%s",
		 status == -EPROTO ? "a reply of the store is malformed: connect again"
		 : status	   ? strerror(-status)
				   : "the store closed the connection");
	drop(store);
	engine_event(store->engine, &event);
}

/* ---- out ---- */

static void frame_of(const struct fetch *fetch, uint8_t *out)
{
	const struct volume *volume = fetch->volume;
	struct { struct mp_frame frame; struct mp_read_request request; } wire;

	memset(&wire, 0, sizeof wire);
	wire.frame.type = MP_FRAME_READ;
	wire.frame.payload_bytes = wire.frame.checked_bytes = sizeof wire.request;
	wire.frame.request_id = fetch->request_id;
	memcpy(wire.request.volume, volume->id, sizeof wire.request.volume);
	wire.request.epoch = volume->epoch;
	wire.request.minimum_sequence = volume->destaged_sequence;
	wire.request.first_block = fetch->first_block;
	wire.request.block_count = fetch->count;
	mp_frame_seal(&wire.frame);
	memcpy(out, &wire, READ_FRAME_BYTES);
}

static bool is_waiting(const struct store_link *store)
{
	return !list_is_empty(&store->waiting) || !list_is_empty(&store->background);
}

static void fill_out(struct store_link *store)
{
	if (store->out_begin != store->out_end)
		return;
	store->out_begin = store->out_end = 0;
	while (store->out_end + READ_FRAME_BYTES <= FETCH_OUT_BYTES && is_waiting(store)) {
		struct link *next = list_is_empty(&store->waiting) ? store->background.next
								   : store->waiting.next;
		struct fetch *fetch = CONTAINER(next, struct fetch, in_queue);

		frame_of(fetch, store->out + store->out_end);
		store->out_end += READ_FRAME_BYTES;
		list_remove(&fetch->in_queue);
		list_append(&store->sent, &fetch->in_queue);
		fetch->sent = true;
	}
	/* The guests' reads go first. */
	while (!list_is_empty(&store->statuses_waiting) &&
	       store->out_end + READ_FRAME_BYTES <= FETCH_OUT_BYTES) {
		status_frame(store, store->out + store->out_end);
		store->out_end += READ_FRAME_BYTES;
	}
}

static void send_frames(struct store_link *store)
{
	struct mp_driver *driver = store->engine->driver;

	for (;;) {
		struct iovec iov;
		int64_t sent;

		fill_out(store);
		iov.iov_base = store->out + store->out_begin;
		iov.iov_len = store->out_end - store->out_begin;
		if (iov.iov_len == 0)
			break;
		sent = driver->send(driver->self, store->socket, &iov, 1);
		if (sent == -EAGAIN)
			break;
		if (sent < 0) {
			broken(store, (int)sent);
			return;
		}
		store->out_begin += (uint32_t)sent;
		atomic_fetch_add_explicit(&store->sent_bytes, (uint64_t)sent,
					  memory_order_relaxed);
	}
	watch(store, store->out_begin != store->out_end);
}

void fetch_link_queue(struct fetch *fetch)
{
	const struct volume *volume = fetch->volume;
	struct store_link *store = &volume->engine->stores[volume->store];

	list_append(fetch->background ? &store->background : &store->waiting, &fetch->in_queue);
	volume->engine->fetches_wait = true;
}

void fetch_link_hurry(struct fetch *fetch)
{
	if (!fetch->background)
		return;
	fetch->background = false;
	if (fetch->sent)
		return;
	list_remove(&fetch->in_queue);
	fetch_link_queue(fetch);
}

void fetch_links_flush(struct mp_engine *engine)
{
	uint32_t i;

	if (!engine->fetches_wait)
		return;
	engine->fetches_wait = false;
	for (i = 0; i < STORES_MAX; i++) {
		struct store_link *store = &engine->stores[i];
		if (store_link_is_up(store) &&
		    (is_waiting(store) || !list_is_empty(&store->statuses_waiting)))
			send_frames(store);
	}
}

/* ---- in ---- */

static bool make_room(struct store_link *store, uint64_t bytes)
{
	uint8_t *memory;

	if (bytes <= store->in_capacity)
		return true;
	memory = realloc(store->in, bytes);
	if (!memory)
		return false;
	store->in = memory;
	store->in_capacity = bytes;
	return true;
}

/* Whole frames go to their fetches. 0, or why the connection is useless. */
static int parse(struct store_link *store)
{
	uint64_t at = 0;
	int error = 0;

	while (!error && at < store->in_length) {
		const uint8_t *frame = store->in + at;
		uint64_t available = store->in_length - at;
		int64_t total = mp_frame_check(frame, available);

		if (total == -EAGAIN)
			break;
		if (total < 0 || total > REPLY_BYTES_MAX)
			return -EPROTO;
		if ((uint64_t)total > available)
			break;
		error = fetch_reply(store, frame, (uint64_t)total);
		at += (uint64_t)total;
	}
	store->in_length -= at;
	memmove(store->in, store->in + at, store->in_length);
	return error;
}

static void receive(struct store_link *store)
{
	struct mp_driver *driver = store->engine->driver;
	int i, error = 0;

	for (i = 0; i < FETCH_RECEIVES && !error; i++) {
		struct iovec iov;
		int64_t got;

		if (!make_room(store, store->in_length + FETCH_RECEIVE_BYTES)) {
			broken(store, -ENOMEM);
			return;
		}
		iov.iov_base = store->in + store->in_length;
		iov.iov_len = store->in_capacity - store->in_length;
		got = driver->receive(driver->self, store->socket, &iov, 1);
		if (got == -EAGAIN)
			return;
		if (got <= 0) {
			broken(store, (int)got);
			return;
		}
		store->in_length += (uint64_t)got;
		atomic_fetch_add_explicit(&store->received_bytes, (uint64_t)got,
					  memory_order_relaxed);
		error = parse(store);
		/* The socket is empty: asking again would be a system call for nothing. */
		if ((uint64_t)got < iov.iov_len)
			break;
	}
	if (error)
		broken(store, error);
}

bool fetch_link_ready(struct mp_engine *engine, void *context, uint32_t ready)
{
	uintptr_t at = (uintptr_t)context, first = (uintptr_t)engine->stores;
	struct store_link *store = context;

	if (at < first || at >= first + sizeof engine->stores)
		return false;
	if (ready & MP_SOCKET_WRITE)
		send_frames(store);
	/* After a hang-up too: what the store said before is read, then the end. */
	if (store_link_is_up(store) && (ready & (MP_SOCKET_READ | MP_SOCKET_HANGUP)))
		receive(store);
	return true;
}

/* ---- handed over, given back ---- */

void fetch_link_open(struct mp_engine *engine, const struct command *command)
{
	struct store_link *store = &engine->stores[command->store];
	int error;

	if (store_link_is_up(store))
		drop(store);
	store->socket = command->socket;
	store->cookie = command->cookie;
	store->block_status = command->flag & MP_STORE_BLOCK_STATUS;
	if (!store->out)
		store->out = malloc(FETCH_OUT_BYTES);
	if (!store->out || command->length_bytes > REPLY_BYTES_MAX ||
	    !make_room(store, command->length_bytes + FETCH_RECEIVE_BYTES)) {
		broken(store, -ENOMEM);
		return;
	}
	memcpy(store->in, command->bytes, command->length_bytes);
	store->in_length = command->length_bytes;
	watch(store, false);
	error = parse(store);
	if (error)
		broken(store, error);
	engine->fetches_wait = true;
}

void fetch_link_close(struct mp_engine *engine, uint32_t store)
{
	if (store_link_is_up(&engine->stores[store]))
		drop(&engine->stores[store]);
}

void fetch_links_init(struct mp_engine *engine)
{
	uint32_t i;

	for (i = 0; i < FETCH_BUCKETS; i++) {
		list_init(&engine->fetches[i]);
		list_init(&engine->fetch_places[i]);
	}
	list_init(&engine->ahead);
	for (i = 0; i < STORES_MAX; i++) {
		struct store_link *store = &engine->stores[i];
		store->engine = engine;
		store->socket = -1;
		list_init(&store->waiting);
		list_init(&store->background);
		list_init(&store->sent);
		list_init(&store->statuses_waiting);
		list_init(&store->statuses);
	}
}

void fetch_links_free(struct mp_engine *engine)
{
	uint32_t i;

	for (i = 0; i < FETCH_BUCKETS; i++)
		while (!list_is_empty(&engine->fetches[i])) {
			struct fetch *fetch =
				CONTAINER(engine->fetches[i].next, struct fetch, in_bucket);
			while (!list_is_empty(&fetch->waiters)) {
				struct link *first = fetch->waiters.next;
				list_remove(first);
				free(CONTAINER(first, struct waiter, in_fetch));
			}
			fetch_free(fetch);
		}
	readahead_forget(engine, NULL);
	for (i = 0; i < STORES_MAX; i++) {
		struct store_link *store = &engine->stores[i];
		if (store_link_is_up(store))
			engine->driver->close_socket(engine->driver->self, store->socket);
		free(store->out);
		free(store->in);
	}
}
