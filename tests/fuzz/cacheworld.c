/* cacheworld.c - an engine in a simulated world, its guest, and the store that it talks to. */
#include <endian.h>

#include "fuzz.h"

enum { ASKED_BYTES_MAX = 64 * 1024, LINEAGE = 7, STOP_TURNS = 2000, FRAME_BYTES = 112 };

const uint8_t *cache_volume_id(uint32_t number)
{
	static const uint8_t ids[CACHE_VOLUMES][MP_VOLUME_ID_BYTES] = {"volume A of fuzz",
								       "volume B of fuzz"};

	return ids[number % CACHE_VOLUMES];
}

struct mp_sim *cache_formatted(void)
{
	struct mp_sim_options options = {.seed = 1, .device_bytes = CACHE_DEVICE_BYTES,
					 .latency_ns = 1000};
	struct mp_cache_format_options format = {.device_bytes = CACHE_DEVICE_BYTES,
						 .slot_bytes = CACHE_SLOT_BYTES,
						 .log_bytes = CACHE_SEGMENTS * CACHE_SEGMENT_BYTES,
						 .segment_bytes = CACHE_SEGMENT_BYTES,
						 .cache_id = "the fuzzed cache"};
	struct mp_sim *sim = mp_sim_new(&options);
	struct mp_driver *driver = mp_sim_driver(sim);
	char message[256];

	CHECK(mp_cache_format(driver, &format, NULL, message, sizeof message) == 0);
	mp_driver_destroy(driver);
	return sim;
}

struct mp_sim *cache_blank(void)
{
	static struct image blank;

	if (!blank.page_count) {
		struct mp_sim *sim = cache_formatted();
		struct mp_driver *driver = mp_sim_driver(sim);

		image_take(&blank, sim, driver, CACHE_DEVICE_BYTES);
		mp_driver_destroy(driver);
		mp_sim_free(sim);
	}
	return image_world(&blank);
}

int cache_open(struct cache_world *world, struct mp_sim *sim)
{
	struct mp_engine_options options = {0};
	char message[256] = "";
	int error = 0;

	memset(world, 0, sizeof *world);
	world->sim = sim;
	world->driver = mp_sim_driver(sim);
	world->engine = mp_engine_open(world->driver, &options, &error, message, sizeof message);
	if (world->engine) {
		world->asked = malloc(ASKED_BYTES_MAX);
		CHECK(world->asked);
		return 0;
	}
	CHECK(error < 0 && error != -ENOMEM && message[0] && !strchr(message, '\n'));
	mp_driver_destroy(world->driver);
	return error;
}

/* What the control plane hears, and what a guest is told: nobody reads it here. */
static void hear(struct cache_world *world)
{
	static uint8_t ignored[64 * 1024];
	struct mp_event events[32];
	int64_t count = mp_engine_events(world->engine, events, 32), got;

	for (int64_t i = 0; i < count; i++) {
		if (events[i].type == MP_EVENT_OPENED && events[i].status == 0)
			world->opened++;
		if (events[i].type == MP_EVENT_BATCH)
			world->batch = events[i];
		if (events[i].type == MP_EVENT_LINK_BROKEN && events[i].cookie == world->links)
			world->fetch_is_gone = true;
	}
	while (world->guest && mp_sim_socket_pop(world->sim, world->guest, ignored,
						 sizeof ignored) > 0)
		;
	while (world->fetch && world->asked_bytes + FRAME_BYTES <= ASKED_BYTES_MAX) {
		got = mp_sim_socket_pop(world->sim, world->fetch, world->asked + world->asked_bytes,
					ASKED_BYTES_MAX - world->asked_bytes);
		if (got <= 0)
			break;
		world->asked_bytes += (uint64_t)got;
	}
}

void cache_turns(struct cache_world *world, uint32_t turns)
{
	for (uint32_t i = 0; i < turns; i++) {
		CHECK(mp_engine_step(world->engine, TURN_NS) >= 0);
		hear(world);
	}
}

void cache_link(struct cache_world *world, const uint8_t *received, uint64_t received_bytes)
{
	world->fetch = mp_sim_socket(world->sim);
	world->fetch_is_gone = false;
	world->asked_bytes = 0;
	mp_engine_fetch_open(world->engine, 0, world->fetch, MP_STORE_BLOCK_STATUS, received,
			     received_bytes, ++world->links);
	cache_turns(world, 1);
}

bool cache_serve(struct cache_world *world, uint64_t epoch, uint32_t flags)
{
	struct mp_engine_volume known[CACHE_VOLUMES + 8];
	uint32_t number;

	for (number = 0; number < CACHE_VOLUMES; number++) {
		const uint8_t *id = cache_volume_id(number);
		int64_t count = mp_engine_list_volumes(world->engine, known, CACHE_VOLUMES + 8);
		uint64_t applied = 0;

		for (int64_t i = 0; i < count && i < CACHE_VOLUMES + 8; i++)
			if (!memcmp(known[i].id, id, MP_VOLUME_ID_BYTES))
				applied = known[i].destaged_sequence;
		mp_engine_open_volume(world->engine, id, VOLUME_BLOCKS * MP_BLOCK_BYTES, epoch,
				      LINEAGE + epoch, applied, 1, 0, number);
	}
	cache_turns(world, 40);
	if (world->opened < CACHE_VOLUMES)
		return false;
	for (number = 0; number < CACHE_VOLUMES; number++)
		mp_engine_dirty_recorded(world->engine, cache_volume_id(number), 1);
	world->guest = mp_sim_socket(world->sim);
	mp_engine_connect(world->engine, cache_volume_id(0), world->guest, flags, NULL, 0, 1);
	cache_link(world, NULL, 0);
	return true;
}

/* ---- the guest ---- */

void guest_send(struct cache_world *world, const void *bytes, uint64_t length_bytes)
{
	mp_sim_socket_push(world->sim, world->guest, bytes, length_bytes);
}

void guest_ask(struct cache_world *world, uint16_t command, uint16_t flags, uint64_t offset_bytes,
	       uint32_t length_bytes, uint8_t token)
{
	struct { uint32_t magic; uint16_t flags, command; uint64_t handle, offset; } head = {
		htobe32(0x25609513), htobe16(flags), htobe16(command), htobe64(++world->handle),
		htobe64(offset_bytes)};
	uint32_t length = htobe32(length_bytes);
	uint8_t *data;

	guest_send(world, &head, sizeof head);
	guest_send(world, &length, sizeof length);
	if (command != NBD_WRITE || length_bytes > 2 * MIB)
		return;
	data = malloc(length_bytes + 1);
	CHECK(data);
	for (uint32_t i = 0; i < length_bytes; i++)
		data[i] = token & 1 ? (uint8_t)(token + i * i / 7) : token;
	guest_send(world, data, length_bytes);
	free(data);
}

/* ---- the store at the other end ---- */

bool fetch_take(struct cache_world *world, struct mp_frame *frame,
		struct mp_read_request *request)
{
	if (world->asked_bytes < FRAME_BYTES)
		return false;
	memcpy(frame, world->asked, sizeof *frame);
	memcpy(request, world->asked + sizeof *frame, sizeof *request);
	CHECK(mp_frame_check(world->asked, FRAME_BYTES) == FRAME_BYTES);
	world->asked_bytes -= FRAME_BYTES;
	memmove(world->asked, world->asked + FRAME_BYTES, world->asked_bytes);
	return true;
}

void fetch_reply_push(struct cache_world *world, const uint8_t *frame, uint64_t length_bytes)
{
	mp_sim_socket_push(world->sim, world->fetch, frame, length_bytes);
}

static uint64_t honest_status(const struct mp_read_request *asked, uint8_t *payload)
{
	struct mp_status_request request;
	struct mp_status_reply reply = {0};
	struct mp_status_run runs[2] = {{.block_count = 1}, {.hole = 1}};

	memcpy(&request, asked, sizeof request);
	memcpy(reply.volume, request.volume, sizeof reply.volume);
	reply.first_block = request.first_block;
	reply.run_count = request.block_count > 1 ? 2 : 1;
	runs[1].block_count = request.block_count - 1;
	memcpy(payload, &reply, sizeof reply);
	memcpy(payload + sizeof reply, runs, reply.run_count * sizeof *runs);
	return sizeof reply + reply.run_count * sizeof *runs;
}

uint64_t fetch_honest(const struct mp_frame *frame, const struct mp_read_request *request,
		      uint8_t *payload, uint64_t *checked_bytes)
{
	struct mp_read_reply reply = {.first_block = request->first_block,
				      .block_count = request->block_count,
				      .piece_count = request->block_count};
	uint64_t at = sizeof reply + request->block_count * sizeof(struct mp_piece);
	uint8_t block[MP_BLOCK_BYTES];

	if (frame->type == MP_FRAME_BLOCK_STATUS)
		return *checked_bytes = honest_status(request, payload);
	memcpy(reply.volume, request->volume, sizeof reply.volume);
	memcpy(payload, &reply, sizeof reply);
	for (uint32_t i = 0; i < request->block_count; i++) {
		struct mp_piece piece = {.first_block = request->first_block + i,
					 .block_count = 1};

		memset(block, piece.first_block % 3 ? 0 : 1 + (int)(piece.first_block % 200),
		       sizeof block);
		if (piece.first_block % 2 == 0 && piece.first_block % 3 == 0)
			for (uint32_t j = 0; j < sizeof block; j++)
				block[j] = (uint8_t)(block[j] + j * j / 7);
		piece.extent.sequence = 1;
		piece.shipped_bytes = (uint32_t)mp_extent_encode(&piece.extent, request->volume,
								 piece.first_block, 1, block,
								 payload + at);
		at += piece.shipped_bytes;
		memcpy(payload + sizeof reply + i * sizeof piece, &piece, sizeof piece);
	}
	*checked_bytes = sizeof reply + request->block_count * sizeof(struct mp_piece);
	return at;
}

void fetch_answer_all(struct cache_world *world)
{
	struct mp_frame frame;
	struct mp_read_request request;

	while (fetch_take(world, &frame, &request)) {
		uint8_t *reply = malloc(FETCH_BYTES_MAX);
		uint64_t checked = 0, length;

		CHECK(reply);
		length = fetch_honest(&frame, &request, reply + sizeof frame, &checked);
		length = frame_seal(reply, (uint16_t)(frame.type + 1), 0, frame.request_id, length,
				    checked);
		fetch_reply_push(world, reply, length);
		free(reply);
	}
}

/* ---- the control plane ---- */

void cache_ship(struct cache_world *world)
{
	const uint8_t *id = cache_volume_id(0);
	uint8_t *frame;

	memset(&world->batch, 0, sizeof world->batch);
	mp_engine_cut(world->engine, id, MIB, 1);
	for (int i = 0; i < 100 && !world->batch.type; i++)
		cache_turns(world, 1);
	if (!world->batch.type || world->batch.status)
		return;
	frame = malloc(world->batch.bytes);
	CHECK(frame);
	CHECK(mp_engine_take_batch(world->engine, id, frame, world->batch.bytes) ==
	      (int64_t)world->batch.bytes);
	CHECK(mp_frame_check(frame, world->batch.bytes) == (int64_t)world->batch.bytes);
	free(frame);
	mp_engine_destaged(world->engine, id, world->batch.last_sequence);
	cache_turns(world, 4);
}

static void leave(struct cache_world *world)
{
	mp_engine_free(world->engine);
	mp_driver_destroy(world->driver);
	free(world->asked);
	world->engine = NULL;
}

void cache_stop(struct cache_world *world)
{
	uint32_t turns = 0;

	mp_engine_request_stop(world->engine);
	while (!mp_engine_stopped(world->engine)) {
		CHECK(turns++ < STOP_TURNS);
		/* A guest that takes a few bytes per turn keeps the clock from moving by itself. */
		mp_sim_advance_ns(world->sim, TURN_NS);
		cache_turns(world, 1);
	}
	leave(world);
}

void cache_crash(struct cache_world *world)
{
	mp_sim_crash(world->sim);
	leave(world);
}
