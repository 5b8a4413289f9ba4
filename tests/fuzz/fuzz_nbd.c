/* fuzz_nbd.c - a guest that sends anything: whole requests, half ones, and bytes that are none.
 *
 * The store at the other end is honest. At the end the engine stops or crashes, and must open
 * again: nothing that a guest sends makes a device that cannot be used.
 */
#include "fuzz.h"

enum { REQUEST, BYTES, TURN, ANSWER, NARROW, HANG_UP, AGAIN, SHIP, STEPS };

static uint32_t connect_flags;

static void connect_again(struct cache_world *world)
{
	mp_sim_socket_hangup(world->sim, world->guest);
	cache_turns(world, 3);
	world->guest = mp_sim_socket(world->sim);
	mp_engine_connect(world->engine, cache_volume_id(0), world->guest, connect_flags, NULL, 0,
			  2);
}

/* Mostly within the volume, sometimes anywhere. */
static void request(struct cache_world *world, struct input *input)
{
	uint16_t command = (uint16_t)input_number(input, 1), flags;
	uint64_t offset, length;

	flags = (uint16_t)(command >> 4);
	command &= 15;
	offset = input_number(input, 4);
	length = input_number(input, 3);
	if (flags == 15) {
		flags = (uint16_t)input_number(input, 2);
		offset = input_number(input, 8);
		length = input_number(input, 4);
		command = (uint16_t)input_number(input, 2);
	} else {
		flags = flags & 1 ? (uint16_t)(1U << (flags >> 1)) : 0;
		offset %= VOLUME_BLOCKS * MP_BLOCK_BYTES;
		length %= command == NBD_TRIM || command == NBD_ZEROES || command == NBD_STATUS
				  ? VOLUME_BLOCKS * MP_BLOCK_BYTES - offset + 1
				  : length & 7 ? 20 * 1024 : 300 * 1024;
	}
	guest_ask(world, command, flags, offset, (uint32_t)length, (uint8_t)input_number(input, 1));
}

static void step(struct cache_world *world, struct input *input)
{
	const uint8_t *bytes;
	uint64_t length;

	switch (input_number(input, 1) % STEPS) {
	case REQUEST:
		request(world, input);
		break;
	case BYTES:
		length = input_bytes(input, input_number(input, 1), &bytes);
		guest_send(world, bytes, length);
		break;
	case TURN:
		cache_turns(world, 1 + (uint32_t)input_number(input, 1) % 8);
		break;
	case ANSWER:
		cache_turns(world, 1);
		fetch_answer_all(world);
		break;
	case NARROW: /* a guest that does not read */
		mp_sim_socket_limit(world->sim, world->guest, input_number(input, 2));
		break;
	case HANG_UP:
		mp_sim_socket_hangup(world->sim, world->guest);
		break;
	case AGAIN:
		connect_again(world);
		break;
	default:
		cache_ship(world);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
	struct input input = {data, length_bytes};
	uint64_t how = input_number(&input, 1);
	struct cache_world world;
	struct mp_sim *sim = cache_blank();

	CHECK(cache_open(&world, sim) == 0);
	connect_flags = how & 7;
	CHECK(cache_serve(&world, 1, connect_flags));
	while (input.left_bytes)
		step(&world, &input);
	cache_turns(&world, 4);
	fetch_answer_all(&world);
	cache_turns(&world, 4);
	if (how & 8)
		cache_stop(&world);
	else
		cache_crash(&world);
	CHECK(cache_open(&world, sim) == 0);
	cache_crash(&world);
	mp_sim_free(sim);
	return 0;
}
