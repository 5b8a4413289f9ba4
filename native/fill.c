/* fill.c - what a store sent, written to read slots.
 *
 * Happy path: blocks of an answered fetch are claimed slot by slot, written from the read's buffer
 * and installed when the write is done.
 * A fill installs only if nothing newer happened to its block since the miss (fill_allowed): no log
 * entry, no tombstone, and no release of either (release_generation).
 * Failure modes: no slot, too many fills in flight, a failed write: the block is not cached, that
 * is all.
 */
#include "engine_internal.h"

bool fill_allowed(struct volume *volume, uint64_t block, uint64_t generation)
{
	if (fault(volume->engine, MP_FAULT_STALE_FILL))
		return true;
	return volume->release_generation == generation &&
	       !index_find(&volume->engine->index, volume->number, block) &&
	       !tombstones_find(&volume->tombstones, block);
}

static void unclaim(struct mp_engine *engine, int64_t slot, uint32_t count)
{
	while (count--)
		mp_slots_unpin(engine->slots, slot);
}

static void fill_done(struct mp_io *io)
{
	struct fill *fill = io->context;
	struct read *read = fill->read;
	struct volume *volume = read->volume;
	struct mp_engine *engine = volume->engine;
	uint32_t i;

	engine->ios_inflight--;
	engine->fills_inflight--;
	volume->fills_inflight--;
	if (io->result < 0)
		engine->counters.device_errors++;
	for (i = 0; io->result >= 0 && i < fill->count; i++) {
		uint64_t block = read->first_block + fill->first + i;
		if (fill_allowed(volume, block, fill->generation))
			mp_slots_install(engine->slots, fill->slot, block, fill->checksums[i]);
	}
	unclaim(engine, fill->slot, fill->count);
	checkpoint_note_fill(engine, fill->iov.iov_len);
	free(fill);
	read->fills--;
	read_release(read);
}

static void fill_submit(struct mp_engine *engine, struct fill *fill)
{
	uint64_t block = fill->read->first_block + fill->first;

	fill->iov.iov_base = fill->read->buffer + (uint64_t)fill->first * MP_BLOCK_BYTES;
	fill->iov.iov_len = (size_t)fill->count * MP_BLOCK_BYTES;
	fill->io.op = MP_OP_WRITE;
	fill->io.iov = &fill->iov;
	fill->io.iov_count = 1;
	fill->io.length_bytes = fill->iov.iov_len;
	fill->io.offset_bytes = engine->super.slots_offset_bytes +
				(uint64_t)fill->slot * engine->super.slot_bytes +
				block % engine->slot_blocks * MP_BLOCK_BYTES;
	fill->io.done = fill_done;
	fill->io.context = fill;
	fill->read->fills++;
	engine->fills_inflight++;
	fill->read->volume->fills_inflight++;
	engine->counters.slot_writes++;
	engine->counters.slot_bytes_written += fill->iov.iov_len;
	engine_submit(engine, &fill->io);
}

static bool fill_is_zero(const struct fill *fill)
{
	uint32_t i;

	for (i = 0; i < fill->count; i++)
		if (fill->checksums[i])
			return false;
	return true;
}

/* Claim consecutive blocks of one slot, from first on; returns how many. A block that is valid,
 * being filled, or changed since the miss ends the run. */
static uint32_t claim(struct read *read, uint32_t first, uint32_t count, uint64_t generation,
		      int64_t *slot)
{
	struct volume *volume = read->volume;
	uint32_t claimed = 0;

	while (claimed < count) {
		uint64_t block = read->first_block + first + claimed;
		int64_t got = fill_allowed(volume, block, generation)
				      ? mp_slots_reserve(volume->engine->slots, volume->origin,
							 block)
				      : -1;
		if (got < 0)
			break;
		*slot = got;
		claimed++;
	}
	return claimed;
}

/* Fill what can be claimed of blocks [first, first + count), all of one slot; returns the blocks
 * dealt with. */
static uint32_t fill_slot(struct read *read, uint32_t first, uint32_t count, uint64_t generation)
{
	struct volume *volume = read->volume;
	struct mp_engine *engine = volume->engine;
	struct fill *fill;
	int64_t slot = -1;
	uint32_t i, claimed = claim(read, first, count, generation, &slot);

	if (claimed == 0)
		return 1;
	fill = calloc(1, sizeof *fill);
	if (!fill) {
		unclaim(engine, slot, claimed);
		return claimed;
	}
	fill->read = read;
	fill->first = first;
	fill->count = claimed;
	fill->slot = slot;
	fill->generation = generation;
	for (i = 0; i < claimed; i++) {
		const uint8_t *data = read->buffer + (uint64_t)(first + i) * MP_BLOCK_BYTES;
		uint64_t checksum = mp_block_checksum(
			volume->seed, read->first_block + first + i, data, MP_BLOCK_BYTES);
		fill->checksums[i] =
			mp_is_zero(data, MP_BLOCK_BYTES) ? 0 : mp_slots_checksum(checksum);
	}
	if (fill_is_zero(fill)) {
		for (i = 0; i < claimed; i++)
			mp_slots_install(engine->slots, slot, read->first_block + first + i, 0);
		unclaim(engine, slot, claimed);
		checkpoint_note_fill(engine, 0);
		free(fill);
	} else
		fill_submit(engine, fill);
	return claimed;
}

void fill_run(struct read *read, uint32_t first, uint32_t count, uint64_t generation)
{
	struct mp_engine *engine = read->volume->engine;

	while (count && engine->fills_inflight < FILLS_MAX) {
		uint64_t within = (read->first_block + first) % engine->slot_blocks;
		uint64_t room = engine->slot_blocks - within;
		uint32_t run = fill_slot(read, first, count < room ? count : (uint32_t)room,
					 generation);

		first += run;
		count -= run;
	}
}
