/* fuzz_wire.c - peers of a store that send anything: every frame, whole, changed, or no frame.
 *
 * Connection 0 is the daemon's own, 1 and 2 are a cache's, 3 has its socket in the core. At the end
 * the store has not failed, stops or crashes, and must open again: no peer makes a store that
 * cannot be used.
 */
#include "fuzz.h"

enum { FRAME, ASK, BATCH, VOLUME, DELETE, CHECKPOINT, BYTES, HANG_UP, TURN, STEPS };

static const struct image *lived(void)
{
	static struct image image;
	struct store_world world;
	struct mp_sim *sim;

	if (image.page_count)
		return &image;
	sim = store_formatted();
	CHECK(store_open(&world, sim) == 0);
	store_state(&world, 0);
	store_send(&world, 0, MP_FRAME_PUT_VOLUME, sizeof(struct mp_volume_state));
	store_turns(&world, 20);
	store_send(&world, 1, MP_FRAME_BATCH, store_batch(&world, 0, 10, 40, 3));
	store_turns(&world, 20);
	CHECK(world.replies == 2 && world.status == MP_STATUS_OK);
	image_take(&image, sim, world.driver, 0);
	store_crash(&world);
	mp_sim_free(sim);
	return &image;
}

static void frame(struct store_world *world, struct input *input)
{
	uint64_t connection = input_number(input, 1);
	uint16_t type = (uint16_t)(input_number(input, 1) % 20);
	const uint8_t *bytes;
	uint64_t length = input_bytes(input, input_number(input, 2) % 2048, &bytes);

	memcpy(world->frame + sizeof(struct mp_frame), bytes, length);
	store_send(world, connection, type, length);
}

static void batch(struct store_world *world, struct input *input)
{
	uint64_t how = input_number(input, 1), first = input_number(input, 2) % VOLUME_BLOCKS;
	uint64_t count = 1 + input_number(input, 1) % 16, sequence = world->sequence;
	uint8_t *payload = world->frame + sizeof(struct mp_frame);
	uint64_t length = store_batch(world, how & 1, first, count, (uint8_t)(how >> 1));
	uint64_t patches = how >> 5;

	while (patches--)
		input_patch(input, payload, length < 1024 ? length : 1024);
	if (how & 2)
		reseal_batch(payload, length);
	if (how & 4)
		world->sequence = sequence;
	store_send(world, how & 8 ? 3 : 1, MP_FRAME_BATCH, length);
}

static void volume(struct store_world *world, struct input *input)
{
	uint64_t how = input_number(input, 1), patches = how >> 5;
	struct mp_volume_state *state = store_state(world, how & 1);

	while (patches--)
		input_patch(input, (uint8_t *)state, sizeof *state);
	store_send(world, how & 2, MP_FRAME_PUT_VOLUME, sizeof *state);
}

static void hang_up(struct store_world *world, uint64_t connection)
{
	if (connection == 3) {
		if (world->socket)
			mp_sim_socket_hangup(world->sim, world->socket);
	} else {
		mp_store_hangup(world->store, connection);
	}
}

static void step(struct store_world *world, struct input *input)
{
	uint64_t number, first, count;
	const uint8_t *bytes;

	switch (input_number(input, 1) % STEPS) {
	case FRAME:
		frame(world, input);
		break;
	case ASK:
		number = input_number(input, 1);
		first = input_number(input, 2) % (VOLUME_BLOCKS + 8);
		count = number & 16 ? input_number(input, 8) : number >> 5;
		store_ask(world, number >> 1, number & 1,
			  number & 8 ? MP_FRAME_BLOCK_STATUS : MP_FRAME_READ, first, count);
		break;
	case BATCH:
		batch(world, input);
		break;
	case VOLUME:
		volume(world, input);
		break;
	case DELETE:
		memcpy(world->frame + sizeof(struct mp_frame),
		       cache_volume_id((uint32_t)input_number(input, 1)), MP_VOLUME_ID_BYTES);
		store_send(world, 0, MP_FRAME_DELETE_VOLUME, MP_VOLUME_ID_BYTES);
		break;
	case CHECKPOINT:
		store_send(world, 0, MP_FRAME_CHECKPOINT, 0);
		break;
	case BYTES:
		number = input_number(input, 1) % 3;
		count = input_bytes(input, input_number(input, 1), &bytes);
		mp_store_feed(world->store, number, bytes, count);
		break;
	case HANG_UP:
		hang_up(world, input_number(input, 1) % STORE_CONNECTIONS);
		break;
	default:
		store_turns(world, 1 + (uint32_t)input_number(input, 1) % 8);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
	struct input input = {data, length_bytes};
	struct mp_sim *sim = image_world(lived());
	uint64_t how = input_number(&input, 1);
	struct mp_volume_state state;
	struct store_world world;
	char message[512];

	CHECK(store_open(&world, sim) == 0);
	CHECK(mp_store_get_volume(world.store, cache_volume_id(0), &state) == 0);
	world.sequence = state.applied_sequence;
	while (input.left_bytes)
		step(&world, &input);
	store_turns(&world, 8);
	CHECK(mp_store_failure(world.store, message, sizeof message) == 0);
	if (how & 1)
		store_stop(&world);
	else
		store_crash(&world);
	CHECK(store_open(&world, sim) == 0);
	store_crash(&world);
	mp_sim_free(sim);
	return 0;
}
