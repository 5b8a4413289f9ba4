/* storeworld.c - a store's core in a simulated world, its daemon and its peers. */
#include "fuzz.h"

enum { LINEAGE = 7, STOP_TURNS = 20000, SOCKET_CONNECTION = 3 };

struct mp_sim *store_formatted(void)
{
	struct mp_sim_options options = {.seed = 1, .latency_ns = 1000};
	struct mp_sim *sim = mp_sim_new(&options);
	struct mp_driver *driver = mp_sim_driver(sim);

	CHECK(mp_store_format(driver, (const uint8_t *)"the fuzzed store", STORE_SEGMENT_BYTES) ==
	      0);
	mp_driver_destroy(driver);
	return sim;
}

int store_open(struct store_world *world, struct mp_sim *sim)
{
	/* Few pages, so that maps are read again and again; checkpoints by themselves, too. */
	struct mp_store_options options = {.page_cache_bytes = 64 * MP_PAGE_BYTES,
					   .checkpoint_every_bytes = 4 * MIB};
	char message[512] = "";
	int error = 0;

	memset(world, 0, sizeof *world);
	world->sim = sim;
	world->driver = mp_sim_driver(sim);
	world->store = mp_store_open(world->driver, &options, &error, message, sizeof message);
	if (world->store) {
		world->frame = malloc(STORE_FRAME_BYTES_MAX);
		CHECK(world->frame);
		return 0;
	}
	CHECK(error < 0 && error != -ENOMEM && message[0] && !strchr(message, '\n'));
	mp_driver_destroy(world->driver);
	return error;
}

/* Whole frames, which our own core sealed. */
static void hear(struct store_world *world, const uint8_t *bytes, uint64_t length_bytes)
{
	while (length_bytes) {
		int64_t total = mp_frame_check(bytes, length_bytes);
		struct mp_frame frame;

		CHECK(total > 0 && (uint64_t)total <= length_bytes);
		memcpy(&frame, bytes, sizeof frame);
		world->status = frame.status;
		world->replies++;
		bytes += total;
		length_bytes -= (uint64_t)total;
	}
}

static void take(struct store_world *world, uint64_t connection)
{
	static uint8_t bytes[8 * MIB];
	bool is_whole = true;
	int64_t got;

	do {
		got = connection == SOCKET_CONNECTION
			      ? mp_sim_socket_pop(world->sim, world->socket, bytes, sizeof bytes)
			      : mp_store_take(world->store, connection, bytes, sizeof bytes);
		is_whole &= got < (int64_t)sizeof bytes;
		if (is_whole && got > 0)
			hear(world, bytes, (uint64_t)got);
	} while (got > 0);
}

void store_turns(struct store_world *world, uint32_t turns)
{
	uint64_t ended[8];

	for (uint32_t i = 0; i < turns; i++) {
		CHECK(mp_store_step(world->store, TURN_NS) >= 0);
		for (uint64_t j = 0; j < STORE_CONNECTIONS; j++)
			if (j != SOCKET_CONNECTION || world->socket)
				take(world, j);
		while (mp_store_ended(world->store, ended, 8) > 0) {
			mp_store_hangup(world->store, SOCKET_CONNECTION);
			world->socket = 0;
		}
	}
}

/* Connection 3: its socket is the core's. */
static int send_to_socket(struct store_world *world, const uint8_t *bytes, uint64_t length_bytes)
{
	if (!world->socket) {
		world->socket = mp_sim_socket(world->sim);
		CHECK(mp_store_connect(world->store, SOCKET_CONNECTION, world->socket, NULL, 0,
				       NULL, 0) == 0);
		store_turns(world, 1);
	}
	if (world->socket)
		mp_sim_socket_push(world->sim, world->socket, bytes, length_bytes);
	return 0;
}

int store_send(struct store_world *world, uint64_t connection, uint16_t type,
	       uint64_t payload_bytes)
{
	uint64_t checked = type == MP_FRAME_BATCH ? 0 : payload_bytes, length;

	length = frame_seal(world->frame, type, 0, ++world->request_id, payload_bytes, checked);
	connection %= STORE_CONNECTIONS;
	if (connection == SOCKET_CONNECTION)
		return send_to_socket(world, world->frame, length);
	return mp_store_feed(world->store, connection, world->frame, length);
}

struct mp_volume_state *store_state(struct store_world *world, uint32_t number)
{
	struct mp_volume_state *state = (void *)(world->frame + sizeof(struct mp_frame));

	memset(state, 0, sizeof *state);
	memcpy(state->id, cache_volume_id(number), sizeof state->id);
	state->size_bytes = VOLUME_BLOCKS * MP_BLOCK_BYTES;
	state->epoch = 1;
	state->lineages[0] = (struct mp_lineage){LINEAGE, 1};
	memcpy(state->name, state->id, 8);
	return state;
}

uint64_t store_batch(struct store_world *world, uint32_t number, uint64_t first_block,
		     uint64_t block_count, uint8_t token)
{
	uint64_t bytes = block_count * MP_BLOCK_BYTES, last = 0;
	uint8_t *data = malloc(bytes + 1);
	int64_t length;

	CHECK(data);
	for (uint64_t i = 0; i < bytes; i++)
		data[i] = i / MP_BLOCK_BYTES % 4 == 3 ? 0 : (uint8_t)(token * (i * i / 5));
	length = mp_batch_encode(cache_volume_id(number), LINEAGE, 1, world->sequence + 1,
				 first_block, block_count, data,
				 world->frame + sizeof(struct mp_frame),
				 STORE_FRAME_BYTES_MAX - sizeof(struct mp_frame), &last);
	free(data);
	CHECK(length > 0);
	world->sequence = last;
	return (uint64_t)length;
}

void store_ask(struct store_world *world, uint64_t connection, uint32_t number, uint16_t type,
	       uint64_t first_block, uint64_t block_count)
{
	struct mp_status_request request = {.epoch = UINT64_MAX, .first_block = first_block,
					    .block_count = block_count};

	if (type == MP_FRAME_READ) /* a number of 32 bits and a hole */
		request.block_count &= UINT32_MAX;
	memcpy(request.volume, cache_volume_id(number), sizeof request.volume);
	memcpy(world->frame + sizeof(struct mp_frame), &request, sizeof request);
	store_send(world, connection, type, sizeof request);
}

static void leave(struct store_world *world)
{
	mp_store_free(world->store);
	mp_driver_destroy(world->driver);
	free(world->frame);
	world->store = NULL;
}

void store_stop(struct store_world *world)
{
	/* Nothing else drives it: stop turns by itself until all is done. A hang is libFuzzer's
	 * to find. */
	mp_store_stop(world->store);
	leave(world);
}

void store_crash(struct store_world *world)
{
	mp_sim_crash(world->sim);
	leave(world);
}
