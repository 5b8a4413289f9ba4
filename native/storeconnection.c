/* storeconnection.c - byte streams in and out, frames in between.
 *
 * Happy path: the daemon feeds what a socket brought; whole frames, checked, go to the reactor's
 * inbox; replies queue up as chunks until the daemon takes them. A connection is fed by one thread
 * at a time; take, ready, hangup and the reactor's replies may run beside it.
 * Failure modes: bytes that are no frame, or a frame that has no business here: an ERROR frame is
 * queued and the connection takes no more. After a hang-up, replies to its requests are dropped.
 */
#include "store_internal.h"

static struct store_connection **slot_of(struct mp_store *store, uint64_t id)
{
	struct store_connection **slot = &store->connections[id % STORE_CONNECTION_BUCKETS];

	while (*slot && (*slot)->id != id)
		slot = &(*slot)->next;
	return slot;
}

/* Under mutex. */
struct store_connection *store_connection_get(struct mp_store *store, uint64_t id)
{
	struct store_connection **slot = slot_of(store, id);

	if (!*slot) {
		*slot = store_allocate(sizeof **slot);
		(*slot)->id = id;
		(*slot)->references = 1;
	}
	return *slot;
}

static void drop_chunks(struct store_connection *connection)
{
	while (connection->out) {
		struct store_chunk *next = connection->out->next;
		free(connection->out);
		connection->out = next;
	}
	connection->out_last = NULL;
	connection->out_bytes = 0;
}

/* Under mutex. */
static void release(struct store_connection *connection)
{
	assert(connection->references);
	if (--connection->references)
		return;
	drop_chunks(connection);
	if (connection->request) {
		free(connection->request->buffer);
		free(connection->request);
	}
	free(connection);
}

/* Under mutex. */
static void push_chunk(struct mp_store *store, struct store_connection *connection,
		       struct store_chunk *chunk)
{
	if (connection->out_last)
		connection->out_last->next = chunk;
	else
		connection->out = chunk;
	connection->out_last = chunk;
	connection->out_bytes += chunk->length_bytes - chunk->taken_bytes;
	if (connection->by_socket) {
		store->sockets_changed = 1;
		return;
	}
	if (connection->is_ready)
		return;
	connection->is_ready = 1;
	connection->ready_next = NULL;
	if (store->ready_last)
		store->ready_last->ready_next = connection;
	else
		store->ready = connection;
	store->ready_last = connection;
}

/* Under mutex. */
static void unready(struct mp_store *store, struct store_connection *connection)
{
	struct store_connection *previous = NULL, *at = store->ready;

	if (!connection->is_ready)
		return;
	while (at != connection) {
		previous = at;
		at = at->ready_next;
	}
	if (previous)
		previous->ready_next = connection->ready_next;
	else
		store->ready = connection->ready_next;
	if (store->ready_last == connection)
		store->ready_last = previous;
	connection->is_ready = 0;
}

void store_request_free(struct mp_store *store, struct store_request *request)
{
	pthread_mutex_lock(&store->mutex);
	release(request->connection);
	pthread_mutex_unlock(&store->mutex);
	free(request->buffer);
	free(request);
}

/* A reply frame to request with room for payload, which the caller fills in. */
struct store_chunk *store_reply_start(const struct store_request *request, uint64_t payload_bytes,
				      uint64_t checked_bytes, uint32_t status, uint8_t **payload)
{
	struct store_chunk *chunk =
		malloc(sizeof *chunk + MP_FRAME_HEADER_BYTES + payload_bytes);
	struct mp_frame *frame;

	assert(chunk);
	memset(chunk, 0, sizeof *chunk + MP_FRAME_HEADER_BYTES);
	chunk->length_bytes = MP_FRAME_HEADER_BYTES + payload_bytes;
	frame = (struct mp_frame *)(void *)chunk->bytes;
	frame->type = (uint16_t)(request->frame.type + 1);
	frame->payload_bytes = (uint32_t)payload_bytes;
	frame->checked_bytes = (uint32_t)checked_bytes;
	frame->status = status;
	frame->request_id = request->frame.request_id;
	frame->trace_id = request->frame.trace_id;
	frame->tenant = request->frame.tenant;
	*payload = chunk->bytes + MP_FRAME_HEADER_BYTES;
	return chunk;
}

/* Seal, send and forget the request. */
void store_reply_finish(struct mp_store *store, struct store_request *request,
			struct store_chunk *chunk)
{
	struct store_connection *connection = request->connection;
	int by_socket;

	mp_frame_seal((struct mp_frame *)(void *)chunk->bytes);
	pthread_mutex_lock(&store->mutex);
	by_socket = connection->by_socket;
	connection->pending_bytes -= MP_FRAME_HEADER_BYTES + request->frame.payload_bytes;
	if (connection->gone)
		free(chunk);
	else
		push_chunk(store, connection, chunk);
	pthread_mutex_unlock(&store->mutex);
	if (!by_socket)
		store->driver->notify(store->driver->self);
	store_request_free(store, request);
}

/* A reply to anything that reads no data. */
void store_reply(struct mp_store *store, struct store_request *request, uint32_t status)
{
	struct mp_batch_reply batch = {0};
	struct store_chunk *chunk;
	uint8_t *payload;

	if (request->frame.type != MP_FRAME_BATCH) {
		chunk = store_reply_start(request, 0, 0, status, &payload);
		store_reply_finish(store, request, chunk);
		return;
	}
	if (request->batch.volume) {
		struct store_volume *volume = store_volume_find(store, request->batch.volume);

		memcpy(batch.volume, request->batch.volume, sizeof batch.volume);
		if (volume && volume->visible) {
			batch.epoch = volume->state.epoch;
			batch.lineage = volume->state.lineage;
			batch.applied_sequence = volume->state.applied_sequence;
		}
	}
	chunk = store_reply_start(request, sizeof batch, sizeof batch, status, &payload);
	memcpy(payload, &batch, sizeof batch);
	store_reply_finish(store, request, chunk);
}

static int may_send(const struct store_connection *connection, uint16_t type)
{
	if (type == MP_FRAME_READ || type == MP_FRAME_BLOCK_STATUS)
		return 1;
	if (type == MP_FRAME_BATCH)
		return !connection->by_socket;
	return connection->id == 0 &&
	       (type == MP_FRAME_PUT_VOLUME || type == MP_FRAME_DELETE_VOLUME ||
		type == MP_FRAME_CHECKPOINT);
}

/* A buffer is made for what a header announces: no more than its kind of frame may need. */
static uint64_t payload_max(uint16_t type)
{
	return type == MP_FRAME_READ || type == MP_FRAME_BLOCK_STATUS ? STORE_QUERY_BYTES_MAX
								     : MP_FRAME_PAYLOAD_MAX;
}

/* Header complete: a buffer for the frame. */
static int start_frame(struct store_connection *connection)
{
	struct store_request *request;
	struct mp_frame frame;
	int64_t total = mp_frame_check(connection->head, sizeof connection->head);

	if (total < 0 && total != -EAGAIN)
		return (int)total;
	memcpy(&frame, connection->head, sizeof frame);
	if (frame.payload_bytes > payload_max(frame.type) || !may_send(connection, frame.type))
		return -EPROTO;
	request = store_allocate(sizeof *request);
	request->buffer = store_allocate_aligned(store_align(
		MP_GROUP_HEADER_BYTES + store_align(frame.payload_bytes, 8), MP_BLOCK_BYTES));
	request->frame = frame;
	request->connection = connection;
	memcpy(request->buffer + MP_FRAME_HEADER_BYTES, connection->head, sizeof frame);
	connection->request = request;
	return 0;
}

/* Frame complete: to the reactor. */
static int finish_frame(struct mp_store *store, struct store_connection *connection)
{
	struct store_request *request = connection->request;
	uint64_t frame_bytes = MP_FRAME_HEADER_BYTES + request->frame.payload_bytes;
	int64_t total = mp_frame_check(request->buffer + MP_FRAME_HEADER_BYTES, frame_bytes);

	if (total < 0)
		return (int)total;
	connection->request = NULL;
	connection->have_bytes = 0;
	pthread_mutex_lock(&store->mutex);
	connection->references++;
	connection->pending_bytes += frame_bytes;
	store_queue_push(&store->inbox, request);
	pthread_mutex_unlock(&store->mutex);
	return 1;
}

/* Frames from bytes. The count of whole ones, or what is wrong with them. */
static int assemble(struct mp_store *store, struct store_connection *connection,
		    const uint8_t *bytes,
		    uint64_t length_bytes)
{
	int frames = 0, error;

	while (length_bytes || connection->request) {
		uint64_t have = connection->have_bytes, want = MP_FRAME_HEADER_BYTES;
		uint8_t *to = connection->head + have;

		if (connection->request) {
			want += connection->request->frame.payload_bytes;
			to = connection->request->buffer + MP_FRAME_HEADER_BYTES + have;
		}
		if (want - have > length_bytes)
			want = have + length_bytes;
		if (want > have)
			memcpy(to, bytes, want - have);
		bytes += want - have;
		length_bytes -= want - have;
		connection->have_bytes = want;
		if (!connection->request && want == MP_FRAME_HEADER_BYTES) {
			error = start_frame(connection);
			if (error)
				return error;
		}
		if (!connection->request ||
		    want < MP_FRAME_HEADER_BYTES + connection->request->frame.payload_bytes) {
			if (length_bytes)
				continue;
			break;
		}
		error = finish_frame(store, connection);
		if (error < 0)
			return error;
		frames++;
	}
	return frames;
}

static void queue_error(struct mp_store *store, struct store_connection *connection)
{
	struct store_chunk *chunk = malloc(sizeof *chunk + MP_FRAME_HEADER_BYTES);
	struct mp_frame frame = {.type = MP_FRAME_ERROR, .status = MP_STATUS_INVALID};

	assert(chunk);
	memset(chunk, 0, sizeof *chunk);
	chunk->length_bytes = MP_FRAME_HEADER_BYTES;
	mp_frame_seal(&frame);
	memcpy(chunk->bytes, &frame, sizeof frame);
	pthread_mutex_lock(&store->mutex);
	connection->broken = 1;
	push_chunk(store, connection, chunk);
	pthread_mutex_unlock(&store->mutex);
	store->driver->notify(store->driver->self);
}

int store_connection_feed(struct mp_store *store, struct store_connection *connection,
			  const uint8_t *bytes, uint64_t length_bytes)
{
	int frames;

	if (connection->broken)
		return -EPROTO;
	frames = assemble(store, connection, bytes, length_bytes);
	if (frames < 0)
		queue_error(store, connection);
	return frames;
}

void store_connection_push(struct mp_store *store, struct store_connection *connection,
			   struct store_chunk *chunk)
{
	pthread_mutex_lock(&store->mutex);
	push_chunk(store, connection, chunk);
	pthread_mutex_unlock(&store->mutex);
}

void store_connection_sent(struct mp_store *store, struct store_connection *connection,
			   uint64_t bytes)
{
	pthread_mutex_lock(&store->mutex);
	connection->out_bytes -= bytes;
	while (connection->out) {
		struct store_chunk *chunk = connection->out;
		uint64_t left = chunk->length_bytes - chunk->taken_bytes;

		if (left > bytes) {
			chunk->taken_bytes += bytes;
			break;
		}
		bytes -= left;
		connection->out = chunk->next;
		free(chunk);
	}
	if (!connection->out)
		connection->out_last = NULL;
	pthread_mutex_unlock(&store->mutex);
}

void store_connection_ended(struct mp_store *store, struct store_connection *connection)
{
	pthread_mutex_lock(&store->mutex);
	if (!connection->gone) {
		store->ended = store_grow(store->ended, &store->ended_capacity,
					  store->ended_count + 1, sizeof *store->ended);
		store->ended[store->ended_count++] = connection->id;
	}
	connection->gone = 1;
	drop_chunks(connection);
	release(connection);
	pthread_mutex_unlock(&store->mutex);
	store->driver->notify(store->driver->self);
}

int64_t mp_store_ended(struct mp_store *store, uint64_t *connections, uint64_t capacity)
{
	uint64_t count;

	pthread_mutex_lock(&store->mutex);
	count = store->ended_count < capacity ? store->ended_count : capacity;
	store->ended_count -= count;
	for (uint64_t i = 0; i < count; i++)
		connections[i] = store->ended[store->ended_count + i];
	pthread_mutex_unlock(&store->mutex);
	return (int64_t)count;
}

int mp_store_feed(struct mp_store *store, uint64_t connection_id, const void *bytes,
		  uint64_t length_bytes)
{
	struct store_connection *connection;
	int frames = -EPROTO, broken, stopping;

	pthread_mutex_lock(&store->mutex);
	connection = store_connection_get(store, connection_id);
	connection->references++;
	broken = connection->broken;
	stopping = store->stopping;
	pthread_mutex_unlock(&store->mutex);
	if (stopping)
		frames = -ESHUTDOWN;
	else if (!broken)
		frames = assemble(store, connection, bytes, length_bytes);
	if (frames < 0 && !broken && !stopping)
		queue_error(store, connection);
	pthread_mutex_lock(&store->mutex);
	release(connection);
	pthread_mutex_unlock(&store->mutex);
	if (frames > 0)
		store->driver->wake(store->driver->self);
	return frames < 0 ? frames : 0;
}

int64_t mp_store_take(struct mp_store *store, uint64_t connection_id, void *out,
		      uint64_t capacity_bytes)
{
	struct store_connection *connection;
	uint64_t taken = 0;

	pthread_mutex_lock(&store->mutex);
	connection = *slot_of(store, connection_id);
	while (connection && connection->out && taken < capacity_bytes) {
		struct store_chunk *chunk = connection->out;
		uint64_t bytes = chunk->length_bytes - chunk->taken_bytes;

		if (bytes > capacity_bytes - taken)
			bytes = capacity_bytes - taken;
		memcpy((uint8_t *)out + taken, chunk->bytes + chunk->taken_bytes, bytes);
		taken += bytes;
		chunk->taken_bytes += bytes;
		connection->out_bytes -= bytes;
		if (chunk->taken_bytes < chunk->length_bytes)
			break;
		connection->out = chunk->next;
		if (!connection->out)
			connection->out_last = NULL;
		free(chunk);
	}
	if (connection && !connection->out)
		unready(store, connection);
	pthread_mutex_unlock(&store->mutex);
	return (int64_t)taken;
}

int64_t mp_store_ready(struct mp_store *store, uint64_t *connections, uint64_t capacity)
{
	uint64_t count = 0;

	pthread_mutex_lock(&store->mutex);
	for (struct store_connection *at = store->ready; at &&
	     count < capacity; at = at->ready_next)
		connections[count++] = at->id;
	pthread_mutex_unlock(&store->mutex);
	return (int64_t)count;
}

void mp_store_hangup(struct mp_store *store, uint64_t connection_id)
{
	struct store_connection **slot, *connection;

	pthread_mutex_lock(&store->mutex);
	slot = slot_of(store, connection_id);
	connection = *slot;
	if (connection) {
		*slot = connection->next;
		unready(store, connection);
		if (connection->by_socket)
			store->hung_up = 1; /* what it sends is the reactor's */
		else
			drop_chunks(connection);
		connection->gone = 1;
		release(connection);
	}
	pthread_mutex_unlock(&store->mutex);
	store->driver->wake(store->driver->self);
}

uint64_t mp_store_pending_bytes(struct mp_store *store, uint64_t connection_id)
{
	struct store_connection *connection;
	uint64_t pending = 0;

	pthread_mutex_lock(&store->mutex);
	connection = *slot_of(store, connection_id);
	if (connection)
		pending = connection->pending_bytes;
	pthread_mutex_unlock(&store->mutex);
	return pending;
}

void store_connections_free(struct mp_store *store)
{
	for (uint32_t i = 0; i < STORE_CONNECTION_BUCKETS; i++) {
		while (store->connections[i]) {
			struct store_connection *connection = store->connections[i];
			store->connections[i] = connection->next;
			release(connection);
		}
	}
}
