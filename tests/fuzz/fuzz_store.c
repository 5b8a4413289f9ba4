/* fuzz_store.c - a store directory whose superblocks, log, checkpoint or map pages say anything.
 *
 * The store lived an ordinary life: overwrites, trims, a deleted volume, a checkpoint, a log behind
 * it. The input changes numbers in its structures; then all checksums are made right again. The
 * store may refuse in one line, answer with a status, or fail with a message.
 */
#include "storeimage.h"

enum { PATCHES_MAX = 16, READ_BLOCKS = 64 };

static void send_batch(struct store_world *world, uint32_t number, uint64_t first, uint64_t count,
		       uint8_t token)
{
	store_send(world, 1, MP_FRAME_BATCH, store_batch(world, number, first, count, token));
	store_turns(world, 12);
}

static void live_a_while(struct store_world *world, uint8_t token)
{
	for (uint32_t i = 0; i < 6; i++)
		send_batch(world, 0, 3 + i * 23, 20 + i, (uint8_t)(token + i));
	send_batch(world, 0, 1000, 5, token);
	send_batch(world, 0, 3, 8, 0); /* zeroes */
	CHECK(world->status == MP_STATUS_OK);
}

static void make(struct store_world *world, uint32_t number)
{
	store_state(world, number);
	store_send(world, 0, MP_FRAME_PUT_VOLUME, sizeof(struct mp_volume_state));
	store_turns(world, 12);
}

static struct store_image *images(void)
{
	static struct store_image made[2]; /* killed with a log behind the checkpoint; stopped */
	struct store_world world;
	struct mp_sim *sim;

	if (made[0].image.page_count)
		return made;
	sim = store_formatted();
	CHECK(store_open(&world, sim) == 0);
	make(&world, 1);
	send_batch(&world, 1, 600, 60, 9);
	make(&world, 0);
	world.sequence = 0;
	live_a_while(&world, 10);
	memcpy(world.frame + sizeof(struct mp_frame), cache_volume_id(1), MP_VOLUME_ID_BYTES);
	store_send(&world, 0, MP_FRAME_DELETE_VOLUME, MP_VOLUME_ID_BYTES);
	store_send(&world, 0, MP_FRAME_CHECKPOINT, 0);
	store_turns(&world, 30);
	live_a_while(&world, 30);
	image_take(&made[0].image, sim, world.driver, 0);
	store_image_note(&made[0], sim);
	store_stop(&world);
	world.driver = mp_sim_driver(sim);
	image_take(&made[1].image, sim, world.driver, 0);
	mp_driver_destroy(world.driver);
	store_image_note(&made[1], sim);
	CHECK(made[0].page_count > 2);
	mp_sim_free(sim);
	return made;
}

static void use(struct store_world *world)
{
	struct mp_volume_state state;

	for (uint64_t block = 0; block < VOLUME_BLOCKS; block += READ_BLOCKS) {
		store_ask(world, 2, 0, MP_FRAME_READ, block, READ_BLOCKS);
		if (block % 1024 == 0) {
			store_ask(world, 3, 0, MP_FRAME_BLOCK_STATUS, block, 1024);
			store_turns(world, 4);
		}
	}
	store_turns(world, 20);
	if (mp_store_get_volume(world->store, cache_volume_id(0), &state) == 0) {
		world->sequence = state.applied_sequence;
		if (world->sequence < INT64_MAX)
			send_batch(world, 0, 20, 40, 77);
		if (world->sequence < INT64_MAX)
			send_batch(world, 0, 512, 40, 0);
	}
	make(world, 1);
	store_send(world, 0, MP_FRAME_CHECKPOINT, 0);
	store_turns(world, 30);
	memcpy(world->frame + sizeof(struct mp_frame), cache_volume_id(0), MP_VOLUME_ID_BYTES);
	store_send(world, 0, MP_FRAME_DELETE_VOLUME, MP_VOLUME_ID_BYTES);
	store_turns(world, 30);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
	struct input input = {data, length_bytes};
	uint64_t how = input_number(&input, 1);
	struct store_image *store = &images()[how & 1];
	struct mp_sim *sim = image_world(&store->image);
	struct store_world world;
	char message[512];

	places_patch(&store->places, sim, &input, PATCHES_MAX);
	if (!(how & 2))
		store_image_reseal(store, sim);
	if (store_open(&world, sim) == 0) {
		use(&world);
		message[0] = 0;
		if (mp_store_failure(world.store, message, sizeof message))
			CHECK(message[0] && !strchr(message, '\n'));
		if (how & 4)
			store_crash(&world);
		else
			store_stop(&world);
		if (store_open(&world, sim) == 0)
			store_crash(&world);
	} else {
		CHECK(length_bytes > 1); /* nobody changed anything */
	}
	mp_sim_free(sim);
	return 0;
}
