/* fuzz_cache.c - a cache device whose superblock, checkpoint or log says anything.
 *
 * The device lived an ordinary life and was stopped or killed. The input changes numbers in its
 * structures; then all checksums are made right again, from the records up to the superblock, so
 * that what is wrong is met behind them. The engine may refuse in one line, or fail a volume; what
 * it serves, it serves to its end.
 */
#include "fuzz.h"

enum { SUPERBLOCK_COPY_BYTES = 65536, RECORDS_MAX = 256, PATCHES_MAX = 16, EXTENTS_MAX = 6,
	ENTRIES_MAX = 12 };

struct log_record { uint64_t offset_bytes, header_bytes, length_bytes, checksum; };
struct device {
	struct image image;
	struct places places;
	struct mp_cache_super super;
	struct log_record records[RECORDS_MAX]; /* in the order of their segments' places */
	uint32_t record_count;
};

/* ---- a life ---- */

static void live_a_while(struct cache_world *world, uint8_t token)
{
	static const struct { uint16_t command; uint32_t block, blocks; } requests[] = {
		{NBD_WRITE, 8, 1}, {NBD_WRITE, 100, 16}, {NBD_TRIM, 1000, 600}, {NBD_READ, 300, 64},
		{NBD_WRITE, 101, 2}, {NBD_ZEROES, 2000, 40}, {NBD_ZEROES, 12, 2},
		{NBD_READ, 1500, 200}, {NBD_WRITE, 2010, 3}, {NBD_FLUSH, 0, 0}, {NBD_WRITE, 9, 1},
		{NBD_WRITE, 3000, 70}, {NBD_TRIM, 1100, 9}, {NBD_READ, 302, 16}, {NBD_FLUSH, 0, 0}};

	for (uint32_t i = 0; i < sizeof requests / sizeof *requests; i++) {
		guest_ask(world, requests[i].command, 0,
			  requests[i].block * (uint64_t)MP_BLOCK_BYTES,
			  requests[i].blocks * MP_BLOCK_BYTES, (uint8_t)(token + i));
		for (int turn = 0; turn < 6; turn++) {
			cache_turns(world, 2);
			fetch_answer_all(world);
		}
		if (i == 9)
			cache_ship(world);
	}
	cache_turns(world, 40); /* the record that tells of the sync */
}

/* ---- what is where ---- */

static void peek(struct mp_sim *sim, uint64_t offset_bytes, void *out, uint64_t length_bytes)
{
	CHECK(mp_sim_peek(sim, 0, offset_bytes, out, length_bytes) == (int64_t)length_bytes);
}

static void poke(struct mp_sim *sim, uint64_t offset_bytes, const void *in, uint64_t length_bytes)
{
	CHECK(mp_sim_poke(sim, 0, offset_bytes, in, length_bytes) == (int64_t)length_bytes);
}

static void entries(struct device *device, uint32_t kind, uint64_t *at, uint64_t count,
		    uint64_t bytes)
{
	for (uint64_t i = 0; i < count && i < ENTRIES_MAX; i++)
		places_add(&device->places, (struct place){0, *at + i * bytes, bytes, kind});
	*at += count * bytes;
}

static void note_checkpoint(struct device *device, struct mp_sim *sim)
{
	const struct mp_cache_super *super = &device->super;
	uint64_t at = super->checkpoint_offset_bytes[super->checkpoint_area];
	struct mp_cache_checkpoint header;

	peek(sim, at, &header, sizeof header);
	places_add(&device->places, (struct place){0, at, sizeof header - sizeof header.reserved,
						   CACHE_CHECKPOINT});
	at += MP_BLOCK_BYTES;
	entries(device, CACHE_VOLUME, &at, header.volume_count, sizeof(struct mp_cache_volume));
	entries(device, CACHE_SEGMENT, &at, header.segment_count, sizeof(struct mp_segment_entry));
	entries(device, CACHE_TOMBSTONE, &at, header.tombstone_count, sizeof(struct mp_tombstone));
	entries(device, CACHE_INDEX, &at, header.index_count, sizeof(struct mp_index_entry));
	entries(device, CACHE_SLOT, &at, header.slot_count,
		sizeof(struct mp_slot_entry) + header.slot_blocks * sizeof(uint32_t));
}

static void note_records(struct device *device, struct mp_sim *sim, uint64_t segment_offset)
{
	static uint8_t bytes[CACHE_SEGMENT_BYTES];
	uint64_t at = 0;

	peek(sim, segment_offset, bytes, sizeof bytes);
	while (at < sizeof bytes && device->record_count < RECORDS_MAX) {
		int64_t length = mp_record_check(bytes + at, sizeof bytes - at);
		uint64_t offset = segment_offset + at;
		struct mp_record header;

		if (length <= 0)
			return;
		memcpy(&header, bytes + at, sizeof header);
		device->records[device->record_count++] = (struct log_record){
			offset, header.header_length_bytes, (uint64_t)length, header.checksum};
		places_add(&device->places, (struct place){0, offset, sizeof header, CACHE_RECORD});
		for (uint32_t i = 0; i < header.extent_count && i < EXTENTS_MAX; i++)
			places_add(&device->places, (struct place){
				0, offset + MP_RECORD_HEADER_BYTES + i * MP_EXTENT_BYTES,
				MP_EXTENT_BYTES, CACHE_EXTENT});
		at += (uint64_t)length;
	}
}

static void note(struct device *device, struct mp_sim *sim)
{
	struct mp_cache_super *super = &device->super;

	peek(sim, 0, super, sizeof *super);
	places_add(&device->places, (struct place){
		0, 0, sizeof *super - sizeof super->reserved, CACHE_SUPER});
	note_checkpoint(device, sim);
	for (uint64_t i = 0; i < super->log_segment_count; i++)
		note_records(device, sim, super->log_offset_bytes + i * super->log_segment_bytes);
	CHECK(device->record_count > 4 && device->places.count > 20);
}

static struct device *devices(void)
{
	static struct device made[2]; /* stopped; killed */
	struct cache_world world;
	struct mp_sim *sim;

	if (made[0].image.page_count)
		return made;
	sim = cache_formatted();
	CHECK(cache_open(&world, sim) == 0 && cache_serve(&world, 1, 0));
	live_a_while(&world, 0);
	cache_stop(&world);
	world.driver = mp_sim_driver(sim);
	image_take(&made[0].image, sim, world.driver, CACHE_DEVICE_BYTES);
	mp_driver_destroy(world.driver);
	note(&made[0], sim);
	CHECK(cache_open(&world, sim) == 0 && cache_serve(&world, 2, 0));
	live_a_while(&world, 50);
	image_take(&made[1].image, sim, world.driver, CACHE_DEVICE_BYTES);
	cache_crash(&world);
	note(&made[1], sim);
	mp_sim_free(sim);
	return made;
}

/* ---- checksums made right ---- */

/* What the record with this checksum has now; the same when there is none. */
static uint64_t renewed(const struct device *device, const uint64_t *checksums, uint64_t old)
{
	for (uint32_t i = 0; i < device->record_count; i++)
		if (device->records[i].checksum == old)
			return checksums[i];
	return old;
}

/* Until nothing changes: a predecessor may lie behind its successor. */
static void reseal_log(const struct device *device, struct mp_sim *sim, uint64_t *checksums)
{
	static uint8_t bytes[CACHE_SEGMENT_BYTES];
	bool changed = true;

	for (uint32_t i = 0; i < device->record_count; i++)
		checksums[i] = device->records[i].checksum;
	for (int round = 0; changed && round < CACHE_SEGMENTS; round++) {
		changed = false;
		for (uint32_t i = 0; i < device->record_count; i++) {
			const struct log_record *record = &device->records[i];
			struct mp_record header;

			peek(sim, record->offset_bytes, bytes, record->length_bytes);
			memcpy(&header, bytes, sizeof header);
			header.previous_checksum =
				renewed(device, checksums, header.previous_checksum);
			memcpy(bytes, &header, sizeof header);
			reseal_record(bytes, record->length_bytes);
			memcpy(&header, bytes, sizeof header);
			changed |= header.checksum != checksums[i];
			checksums[i] = header.checksum;
			poke(sim, record->offset_bytes, bytes, record->header_bytes);
		}
	}
}

static uint64_t reseal_checkpoint(const struct device *device, struct mp_sim *sim,
				  const uint64_t *checksums)
{
	const struct mp_cache_super *super = &device->super;
	uint64_t offset = super->checkpoint_offset_bytes[super->checkpoint_area], sum;
	uint64_t length = super->checkpoint_length_bytes;
	struct mp_cache_checkpoint header;
	uint8_t *bytes = malloc(length);

	CHECK(bytes);
	peek(sim, offset, bytes, length);
	for (uint32_t i = 0; i < CACHE_VOLUMES; i++) {
		struct mp_cache_volume volume;
		uint8_t *at = bytes + MP_BLOCK_BYTES + i * sizeof volume;

		memcpy(&volume, at, sizeof volume);
		volume.head_checksum = renewed(device, checksums, volume.head_checksum);
		memcpy(at, &volume, sizeof volume);
	}
	memcpy(&header, bytes, sizeof header);
	header.checksum = mp_xxh3(&header.generation, sizeof header - 16);
	memcpy(bytes, &header, sizeof header);
	poke(sim, offset, bytes, length);
	sum = mp_xxh3(bytes + MP_BLOCK_BYTES, length - MP_BLOCK_BYTES);
	free(bytes);
	return sum;
}

static void reseal(const struct device *device, struct mp_sim *sim)
{
	uint64_t checksums[RECORDS_MAX];
	struct mp_cache_super super;

	reseal_log(device, sim, checksums);
	peek(sim, 0, &super, sizeof super);
	super.checkpoint_checksum = reseal_checkpoint(device, sim, checksums);
	super.checksum = mp_xxh3(&super.version, sizeof super - 16);
	poke(sim, 0, &super, sizeof super);
	poke(sim, SUPERBLOCK_COPY_BYTES, &super, sizeof super);
}

/* ---- what comes of it ---- */

/* What lives of the volume is read, and some holes. */
static void use(struct cache_world *world)
{
	static const struct { uint32_t block, blocks; } reads[] = {
		{0, 32}, {99, 20}, {300, 64}, {990, 24}, {1500, 16}, {1996, 48}, {3000, 72}};

	for (uint32_t i = 0; i < sizeof reads / sizeof *reads; i++) {
		guest_ask(world, NBD_READ, 0, reads[i].block * (uint64_t)MP_BLOCK_BYTES,
			  reads[i].blocks * MP_BLOCK_BYTES, 0);
		cache_turns(world, 2);
		fetch_answer_all(world);
	}
	guest_ask(world, NBD_WRITE, 0, 99 * MP_BLOCK_BYTES, 8 * MP_BLOCK_BYTES, 5);
	guest_ask(world, NBD_TRIM, 0, 990 * MP_BLOCK_BYTES, 100 * MP_BLOCK_BYTES, 0);
	guest_ask(world, NBD_FLUSH, 0, 0, 0, 0);
	cache_turns(world, 8);
	fetch_answer_all(world);
	for (int i = 0; i < 4; i++)
		cache_ship(world);
	cache_turns(world, 20);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
	struct input input = {data, length_bytes};
	uint64_t how = input_number(&input, 1);
	struct device *device = &devices()[how & 1];
	struct mp_sim *sim = image_world(&device->image);
	struct cache_world world;

	places_patch(&device->places, sim, &input, PATCHES_MAX);
	if (!(how & 2))
		reseal(device, sim);
	if (cache_open(&world, sim) == 0) {
		if (cache_serve(&world, 3, how & 4 ? MP_CONNECT_STRUCTURED : 0))
			use(&world);
		if (how & 8)
			cache_crash(&world);
		else
			cache_stop(&world);
		if (cache_open(&world, sim) == 0)
			cache_crash(&world);
	} else {
		CHECK(length_bytes > 1); /* nobody changed anything */
	}
	mp_sim_free(sim);
	return 0;
}
