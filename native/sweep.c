/* sweep.c - take what tombstones hide out of index and slots, in bounded slices; then forget the
 * tombstone.
 *
 * A tombstone outlives its sweep: it goes only when index and slots hold nothing older of its range
 * and the store has applied it, and no checkpoint is being written. Until then every lookup asks it
 * first, so it does not matter when the sweep gets to run.
 * Failure modes: none; a crash loses only progress (the log or the checkpoint still has the
 * tombstone).
 */
#include "engine_internal.h"

static bool is_hidden(const struct volume *volume, const struct index_slot *slot,
		      const struct tombstone *item)
{
	uint64_t block = index_block(slot);

	return index_number(slot) == volume->number && block >= item->first_block &&
	       block - item->first_block < item->block_count &&
	       (int32_t)(slot->sequence - (uint32_t)item->sequence) < 0;
}

static void sweep_blocks(struct volume *volume, struct tombstone *item, uint64_t stop)
{
	struct index *index = &volume->engine->index;

	for (; item->cursor < stop; item->cursor++) {
		struct index_slot *slot =
			index_find(index, volume->number, item->first_block + item->cursor);
		if (slot && is_hidden(volume, slot, item))
			index_delete(index, slot);
	}
}

/* What is put meanwhile is newer than the tombstone: it may be missed. */
static void sweep_table(struct volume *volume, struct tombstone *item, uint64_t stop)
{
	struct index *index = &volume->engine->index;

	if (item->cursor == 0)
		item->start = index_walk_start(index);
	while (item->cursor < stop || (item->cursor < index->capacity &&
				       !index_may_pause(index, item->start, item->cursor))) {
		struct index_slot *slot = index_walk(index, item->start, item->cursor);
		if (index_is_live(slot) && is_hidden(volume, slot, item))
			index_delete(index, slot);
		else
			item->cursor++;
	}
}

/* By block or by table slot, whichever walk is shorter. */
static void sweep_index(struct volume *volume, struct tombstone *item)
{
	uint64_t capacity = volume->engine->index.capacity;
	bool by_block = item->block_count <= capacity;
	uint64_t end = by_block ? item->block_count : capacity;
	uint64_t stop = end - item->cursor > SWEEP_STEPS ? item->cursor + SWEEP_STEPS : end;

	if (by_block)
		sweep_blocks(volume, item, stop);
	else
		sweep_table(volume, item, stop);
	if (item->cursor == end) {
		item->phase = 1;
		item->cursor = 0;
	}
}

static void sweep_one(struct volume *volume, struct tombstone *item)
{
	if (item->phase == 0)
		sweep_index(volume, item);
	else
		item->cursor = mp_slots_sweep(volume->engine->slots, volume->origin,
					      item->first_block, item->block_count, item->cursor,
					      SWEEP_STEPS);
	if (item->cursor == UINT64_MAX)
		item->phase = 2;
}

/* Not while a checkpoint walks: it captured the tombstone, and would meet what is newer under it
 * neither in the index nor in the log once that is released. Recovery would then read zeroes. */
static bool is_over(const struct volume *volume, const struct tombstone *item)
{
	if (fault(volume->engine, MP_FAULT_DROP_TOMBSTONE))
		return true;
	return item->phase == 2 && item->sequence <= volume->destaged_sequence &&
	       !volume->engine->checkpoint.running;
}

static void sweep_volume(struct volume *volume)
{
	struct tombstones *tombstones = &volume->tombstones;
	bool dropping = fault(volume->engine, MP_FAULT_DROP_TOMBSTONE);
	uint32_t i, kept = 0, steps = 4;

	volume->sweep_wanted = false;
	for (i = 0; i < tombstones->count; i++) {
		struct tombstone *item = &tombstones->items[i];

		for (; item->phase < 2 && steps && !dropping; steps--)
			sweep_one(volume, item);
		volume->sweep_wanted |= item->phase < 2;
		if (is_over(volume, item))
			continue;
		if (kept != i)
			tombstones->items[kept] = *item;
		kept++;
	}
	if (kept == tombstones->count)
		return;
	volume->release_generation++;
	volume->engine->shares_stale = true; /* what waited for it asks again */
	volume->engine->tombstone_count -= tombstones->count - kept;
	tombstones->count = kept;
}

void sweep_step(struct mp_engine *engine)
{
	uint32_t i;

	for (i = 0; i < engine->volume_count; i++)
		if (engine->volumes[i] && engine->volumes[i]->sweep_wanted)
			sweep_volume(engine->volumes[i]);
}

bool sweep_pending(const struct mp_engine *engine)
{
	uint32_t i;

	for (i = 0; i < engine->volume_count; i++)
		if (engine->volumes[i] && engine->volumes[i]->sweep_wanted)
			return true;
	return false;
}

void sweep_again(struct mp_engine *engine)
{
	uint32_t i;

	for (i = 0; i < engine->volume_count; i++)
		if (engine->volumes[i] && engine->volumes[i]->tombstones.count)
			engine->volumes[i]->sweep_wanted = true;
}
