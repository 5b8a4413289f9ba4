/* fuzz_fetch.c - a store that answers the cache with anything.
 *
 * A guest reads; the replies to its misses are made honestly, then changed by the input and sealed
 * again, or not. Whatever comes, the cache ends well, and the guest's connection with it.
 */
#include "fuzz.h"

enum { ASK, REPLY, BYTES, TURN, HANG_UP, ANSWER, SHIP, STEPS };

/* Flags of a reply. */
enum { UNSEALED = 1, FOREIGN = 2, ERROR_STATUS = 4, CUT = 8, OTHER_TYPE = 16, NO_EXTENTS = 32,
	LESS_CHECKED = 64, TWICE = 128 };

static void reseal_pieces(uint8_t *payload, uint64_t length_bytes)
{
	struct mp_read_reply reply;
	uint64_t at;

	if (length_bytes < sizeof reply)
		return;
	memcpy(&reply, payload, sizeof reply);
	at = sizeof reply + (uint64_t)reply.piece_count * sizeof(struct mp_piece);
	for (uint32_t i = 0; i < reply.piece_count && at <= length_bytes; i++) {
		uint8_t *to = payload + sizeof reply + i * sizeof(struct mp_piece);
		struct mp_piece piece;

		memcpy(&piece, to, sizeof piece);
		reseal_extent(&piece.extent, payload + at, length_bytes - at);
		memcpy(to, &piece, sizeof piece);
		at += piece.shipped_bytes;
	}
}

static void reply(struct cache_world *world, struct input *input)
{
	uint64_t flags = input_number(input, 1), patches = input_number(input, 1) % 8;
	uint64_t length, checked = 0, total;
	struct mp_read_request request;
	struct mp_frame frame;
	uint8_t *bytes, *payload;
	uint16_t type;

	if (!fetch_take(world, &frame, &request))
		return;
	bytes = calloc(1, FETCH_BYTES_MAX);
	CHECK(bytes);
	payload = bytes + sizeof frame;
	length = fetch_honest(&frame, &request, payload, &checked);
	type = (uint16_t)(frame.type + 1);
	while (patches--)
		input_patch(input, payload, length < 600 ? length : 600);
	if (flags & CUT)
		length = input_number(input, 3) % (length + MIB);
	if (!(flags & NO_EXTENTS) && frame.type == MP_FRAME_READ)
		reseal_pieces(payload, length);
	checked = checked < length ? checked : length;
	if (flags & LESS_CHECKED)
		checked = input_number(input, 3) % (length + 1);
	if (flags & OTHER_TYPE)
		type = (uint16_t)(input_number(input, 1) % 20);
	total = frame_seal(bytes, type,
			   flags & ERROR_STATUS ? (uint32_t)input_number(input, 1) : 0,
			   frame.request_id + (flags & FOREIGN ? input_number(input, 1) : 0),
			   length, checked);
	if (flags & UNSEALED)
		input_patch(input, bytes, sizeof frame);
	fetch_reply_push(world, bytes, total);
	if (flags & TWICE)
		fetch_reply_push(world, bytes, total);
	free(bytes);
}

static void step(struct cache_world *world, struct input *input)
{
	const uint8_t *bytes;
	uint64_t length, at;

	switch (input_number(input, 1) % STEPS) {
	case ASK:
		at = input_number(input, 2) % VOLUME_BLOCKS;
		length = 1 + input_number(input, 1) % (VOLUME_BLOCKS - at);
		guest_ask(world, at % 3 == 1 ? NBD_STATUS : at % 7 == 2 ? NBD_WRITE : NBD_READ, 0,
			  at * MP_BLOCK_BYTES, (uint32_t)length * MP_BLOCK_BYTES, 3);
		break;
	case REPLY:
		cache_turns(world, 1);
		reply(world, input);
		break;
	case BYTES:
		length = input_bytes(input, input_number(input, 1), &bytes);
		fetch_reply_push(world, bytes, length);
		break;
	case HANG_UP:
		mp_sim_socket_hangup(world->sim, world->fetch);
		cache_turns(world, 1);
		length = input_bytes(input, input_number(input, 1) % 100, &bytes);
		cache_link(world, bytes, length);
		break;
	case ANSWER:
		fetch_answer_all(world);
		break;
	case SHIP:
		cache_ship(world);
		break;
	default:
		cache_turns(world, 1 + (uint32_t)input_number(input, 1) % 4);
	}
	/* As the control plane does: another link. */
	if (world->fetch_is_gone)
		cache_link(world, NULL, 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
	struct input input = {data, length_bytes};
	uint64_t how = input_number(&input, 1);
	struct cache_world world;
	struct mp_sim *sim = cache_blank();

	CHECK(cache_open(&world, sim) == 0);
	CHECK(cache_serve(&world, 1, MP_CONNECT_STRUCTURED | MP_CONNECT_ALLOCATION));
	while (input.left_bytes)
		step(&world, &input);
	cache_turns(&world, 4);
	if (how & 1)
		cache_stop(&world);
	else
		cache_crash(&world);
	CHECK(cache_open(&world, sim) == 0);
	cache_crash(&world);
	mp_sim_free(sim);
	return 0;
}
