/* mailbox.c - commands of the control plane: posted from any thread, carried out by the engine
 * thread.
 *
 * Happy path: mp_engine_... copies its arguments into a command and wakes the engine, which carries
 * out all that wait, in the order of the calls, once per turn. Answers are events (outbox.c).
 * Failure modes: no memory: -ENOMEM, nothing was posted (a socket handed over is closed). What
 * cannot be done is said by the status of its event.
 */
#include "engine_internal.h"

enum { COMMAND_OPEN, COMMAND_CLOSE, COMMAND_CONNECT, COMMAND_DISCONNECT, COMMAND_DIRTY, COMMAND_CUT,
	COMMAND_DESTAGED, COMMAND_FETCH_OPEN, COMMAND_FETCH_CLOSE, COMMAND_GROW,
	COMMAND_POSITION, COMMAND_CONFIGURE, COMMAND_LEAVE, COMMAND_STOP };

static void reply(struct mp_engine *engine, const struct command *command, uint32_t type,
		  int status)
{
	struct mp_event event;

	memset(&event, 0, sizeof event);
	event.type = type;
	event.status = status;
	event.cookie = command->cookie;
	memcpy(event.volume, command->volume, sizeof event.volume);
	engine_event(engine, &event);
}

static void do_connect(struct mp_engine *engine, const struct command *command)
{
	struct volume *volume = volume_by_id(engine, command->volume);

	if (volume && volume->open && !volume->open_pending && !engine->stopping &&
	    engine->connection_count < CONNECTIONS_MAX &&
	    connection_open(engine, volume, command) == 0)
		return;
	engine->driver->close_socket(engine->driver->self, command->socket);
	reply(engine, command, MP_EVENT_CONNECTION_CLOSED, -ENOTCONN);
}

static void do_end(struct mp_engine *engine, const struct command *command)
{
	struct link *link = engine->connections.next;

	for (; link != &engine->connections; link = link->next) {
		struct connection *connection = CONTAINER(link, struct connection, in_engine);
		if (connection->cookie != command->cookie)
			continue;
		if (command->kind == COMMAND_LEAVE)
			connection_leave(connection);
		else
			connection_stop(connection);
		return;
	}
}

static void do_dirty(struct mp_engine *engine, const struct command *command)
{
	struct volume *volume = volume_by_id(engine, command->volume);

	if (!volume)
		return;
	if (command->flag) {
		volume->dirty_recorded = true;
		mutations_unhold(volume);
		return;
	}
	if (volume->applied_sequence > volume->destaged_sequence ||
	    !list_is_empty(&volume->mutations) || !list_is_empty(&volume->held)) {
		engine_volume_event(volume, MP_EVENT_DIRTY_CLEAR, -EBUSY, 0);
		return;
	}
	volume->dirty_recorded = volume->dirty_asked = false;
	engine_volume_event(volume, MP_EVENT_DIRTY_CLEAR, 0, 0);
}

static void do_cut(struct mp_engine *engine, const struct command *command)
{
	struct volume *volume = volume_by_id(engine, command->volume);

	if (!volume || engine->cut.volume == volume || volume->cut_queued) {
		reply(engine, command, MP_EVENT_BATCH, volume ? -EBUSY : -ENOENT);
		return;
	}
	volume->cut_queued = true;
	volume->cut_max_bytes = command->length_bytes;
	volume->cut_cookie = command->cookie;
}

static void do_position(struct mp_engine *engine, const struct command *command)
{
	struct volume *volume = volume_by_id(engine, command->volume);
	struct mp_event event;

	memset(&event, 0, sizeof event);
	event.type = MP_EVENT_POSITION;
	event.status = volume ? 0 : -ENOENT;
	event.cookie = command->cookie;
	memcpy(event.volume, command->volume, sizeof event.volume);
	if (volume) {
		event.first_sequence = volume->destaged_sequence;
		event.last_sequence = volume->applied_sequence;
	}
	engine_event(engine, &event);
}

static void do_stop(struct mp_engine *engine)
{
	struct link *link = engine->connections.next;

	if (engine->stopping)
		return;
	engine->stopping = true;
	engine->stop_ns = engine->now_ns;
	for (; link != &engine->connections; link = link->next)
		connection_stop(CONTAINER(link, struct connection, in_engine));
}

static void execute(struct mp_engine *engine, const struct command *command)
{
	struct volume *volume;
	int rc;

	switch (command->kind) {
	case COMMAND_OPEN:
		rc = volume_open(engine, command);
		if (rc)
			reply(engine, command, MP_EVENT_OPENED, rc);
		break;
	case COMMAND_CLOSE:
		reply(engine, command, MP_EVENT_CLOSED, volume_close(engine, command));
		break;
	case COMMAND_CONFIGURE:
		volume_configure(engine, command);
		break;
	case COMMAND_CONNECT:
		do_connect(engine, command);
		break;
	case COMMAND_DISCONNECT:
	case COMMAND_LEAVE:
		do_end(engine, command);
		break;
	case COMMAND_DIRTY:
		do_dirty(engine, command);
		break;
	case COMMAND_CUT:
		do_cut(engine, command);
		break;
	case COMMAND_DESTAGED:
		volume = volume_by_id(engine, command->volume);
		if (volume)
			destaged(volume, command->sequence);
		break;
	case COMMAND_GROW:
		volume_grow(engine, command);
		break;
	case COMMAND_POSITION:
		do_position(engine, command);
		break;
	case COMMAND_FETCH_OPEN:
		fetch_link_open(engine, command);
		break;
	case COMMAND_FETCH_CLOSE:
		fetch_link_close(engine, command->store);
		break;
	default:
		do_stop(engine);
	}
}

void commands_run(struct mp_engine *engine)
{
	struct command *command, *next;

	pthread_mutex_lock(&engine->mutex);
	command = engine->commands;
	engine->commands = NULL;
	engine->commands_tail = &engine->commands;
	pthread_mutex_unlock(&engine->mutex);
	for (; command; command = next) {
		next = command->next;
		execute(engine, command);
		free(command);
	}
}

/* What it misses comes with the wake that follows it. */
bool commands_waiting(const struct mp_engine *engine)
{
	return __atomic_load_n(&engine->commands, __ATOMIC_RELAXED) != NULL;
}

void mailbox_free(struct mp_engine *engine)
{
	while (engine->commands) {
		struct command *command = engine->commands;
		engine->commands = command->next;
		if (command->kind == COMMAND_CONNECT || command->kind == COMMAND_FETCH_OPEN)
			engine->driver->close_socket(engine->driver->self, command->socket);
		free(command);
	}
	while (engine->events) {
		struct event_node *node = engine->events;
		engine->events = node->next;
		free(node);
	}
}

/* ---- any thread ---- */

static struct command *command_new(int kind, const uint8_t *volume, const void *bytes,
				   uint64_t length)
{
	struct command *command = calloc(1, sizeof *command + length);

	if (!command)
		return NULL;
	command->kind = kind;
	if (volume)
		memcpy(command->volume, volume, sizeof command->volume);
	command->length_bytes = length;
	if (length)
		memcpy(command->bytes, bytes, length);
	return command;
}

static int post(struct mp_engine *engine, struct command *command)
{
	if (!command)
		return -ENOMEM;
	pthread_mutex_lock(&engine->mutex);
	/* Atomic for commands_waiting, which looks at the first without the mutex. */
	__atomic_store_n(engine->commands_tail, command, __ATOMIC_RELAXED);
	engine->commands_tail = &command->next;
	pthread_mutex_unlock(&engine->mutex);
	engine->driver->wake(engine->driver->self);
	return 0;
}

int mp_engine_open_volume(struct mp_engine *engine, const uint8_t *id, uint64_t size_bytes,
			  uint64_t epoch, uint64_t lineage, uint64_t applied_sequence,
			  int keep_slots, uint32_t store, uint64_t cookie)
{
	struct command *command =
		store < STORES_MAX ? command_new(COMMAND_OPEN, id, NULL, 0) : NULL;

	if (store >= STORES_MAX)
		return -EINVAL;
	if (!command)
		return -ENOMEM;
	command->size_bytes = size_bytes;
	command->epoch = epoch;
	command->lineage = lineage;
	command->sequence = applied_sequence;
	command->flag = keep_slots;
	command->store = store;
	command->cookie = cookie;
	return post(engine, command);
}

int mp_engine_configure_volume(struct mp_engine *engine, const uint8_t *id,
			       const struct mp_volume_shares *shares)
{
	return post(engine, command_new(COMMAND_CONFIGURE, id, shares, sizeof *shares));
}

int mp_engine_close_volume(struct mp_engine *engine, const uint8_t *id, int forget_slots,
			   uint64_t cookie)
{
	struct command *command = command_new(COMMAND_CLOSE, id, NULL, 0);

	if (!command)
		return -ENOMEM;
	command->flag = forget_slots;
	command->cookie = cookie;
	return post(engine, command);
}

int mp_engine_grow_volume(struct mp_engine *engine, const uint8_t *id, uint64_t size_bytes)
{
	struct command *command = command_new(COMMAND_GROW, id, NULL, 0);

	if (!command)
		return -ENOMEM;
	command->size_bytes = size_bytes;
	return post(engine, command);
}

int mp_engine_position(struct mp_engine *engine, const uint8_t *id, uint64_t cookie)
{
	struct command *command = command_new(COMMAND_POSITION, id, NULL, 0);

	if (!command)
		return -ENOMEM;
	command->cookie = cookie;
	return post(engine, command);
}

int mp_engine_connect(struct mp_engine *engine, const uint8_t *id, int socket, uint32_t flags,
		      const void *bytes, uint64_t length_bytes, uint64_t cookie)
{
	struct command *command = command_new(COMMAND_CONNECT, id, bytes, length_bytes);

	if (!command) {
		engine->driver->close_socket(engine->driver->self, socket);
		return -ENOMEM;
	}
	command->socket = socket;
	command->flag = (int)flags;
	command->cookie = cookie;
	return post(engine, command);
}

static int end_connection(struct mp_engine *engine, int kind, uint64_t cookie)
{
	struct command *command = command_new(kind, NULL, NULL, 0);

	if (!command)
		return -ENOMEM;
	command->cookie = cookie;
	return post(engine, command);
}

int mp_engine_disconnect(struct mp_engine *engine, uint64_t cookie)
{
	return end_connection(engine, COMMAND_DISCONNECT, cookie);
}

int mp_engine_leave(struct mp_engine *engine, uint64_t cookie)
{
	return end_connection(engine, COMMAND_LEAVE, cookie);
}

int mp_engine_dirty_recorded(struct mp_engine *engine, const uint8_t *id, int recorded)
{
	struct command *command = command_new(COMMAND_DIRTY, id, NULL, 0);

	if (!command)
		return -ENOMEM;
	command->flag = recorded;
	return post(engine, command);
}

int mp_engine_cut(struct mp_engine *engine, const uint8_t *id, uint64_t max_bytes, uint64_t cookie)
{
	struct command *command = command_new(COMMAND_CUT, id, NULL, 0);

	if (!command)
		return -ENOMEM;
	command->length_bytes = max_bytes;
	command->cookie = cookie;
	return post(engine, command);
}

int mp_engine_destaged(struct mp_engine *engine, const uint8_t *id, uint64_t sequence)
{
	struct command *command = command_new(COMMAND_DESTAGED, id, NULL, 0);

	if (!command)
		return -ENOMEM;
	command->sequence = sequence;
	return post(engine, command);
}

int mp_engine_fetch_open(struct mp_engine *engine, uint32_t store, int socket, uint32_t features,
			 const void *bytes, uint64_t length_bytes, uint64_t cookie)
{
	struct command *command = command_new(COMMAND_FETCH_OPEN, NULL, bytes, length_bytes);

	assert(store < STORES_MAX);
	if (!command) {
		engine->driver->close_socket(engine->driver->self, socket);
		return -ENOMEM;
	}
	command->store = store;
	command->flag = (int)features;
	command->socket = socket;
	command->cookie = cookie;
	return post(engine, command);
}

int mp_engine_fetch_close(struct mp_engine *engine, uint32_t store)
{
	struct command *command = command_new(COMMAND_FETCH_CLOSE, NULL, NULL, 0);

	assert(store < STORES_MAX);
	if (!command)
		return -ENOMEM;
	command->store = store;
	return post(engine, command);
}

void mp_engine_request_stop(struct mp_engine *engine)
{
	post(engine, command_new(COMMAND_STOP, NULL, NULL, 0));
}
