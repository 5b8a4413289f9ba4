/* storeapply.c - what durable groups do to maps, extent tables and the catalogue.
 *
 * Happy path: in log order; a batch first makes every page dirty that it will change (prepare,
 * which may have to wait for pages and starts again), then changes them all in one turn. Then the
 * position moves on. Recovery applies the same groups with the same code. Extents are numbered in
 * log order within their segment, applied or not, so that an address means the same after a
 * replay.
 * Failure modes: a page that cannot be had fails the store: the log goes on from the checkpoint.
 */
#include "store_internal.h"

static void describe_extent(struct mp_extent_entry *entry, const struct mp_extent *extent,
			    const struct store_group *group, uint32_t origin, uint64_t offset_bytes)
{
	*entry = (struct mp_extent_entry){
		.segment_origin = group->segment->id << MP_ORIGIN_BITS | origin,
		.first_block = extent->first_block,
		.offset_bytes = (uint32_t)offset_bytes,
		.stored_length_bytes = (uint16_t)extent->stored_length_bytes,
		.codec_blocks = (uint8_t)(extent->codec << 4 | extent->block_count),
		.live = (uint8_t)((1 << extent->block_count) - 1),
		.born_commit = group->commit,
	};
	memcpy(entry->checksum, extent->checksum, sizeof entry->checksum);
}

static uint32_t origin_number(struct mp_store *store, const uint8_t *origin)
{
	/* Nearly always the volume that wrote last: newest first. */
	for (uint64_t i = store->origin_count; i > 0; i--)
		if (!memcmp(store->origins[i - 1], origin, MP_VOLUME_ID_BYTES))
			return (uint32_t)(i - 1);
	assert(store->origin_count < 1 << MP_ORIGIN_BITS);
	store->origins = store_grow(store->origins, &store->origin_capacity,
				    store->origin_count + 1,
				    sizeof *store->origins);
	memcpy(store->origins[store->origin_count], origin, MP_VOLUME_ID_BYTES);
	return (uint32_t)store->origin_count++;
}

static uint64_t address_of(const struct store_segment *segment, uint32_t index)
{
	return (segment->id << MP_ADDRESS_EXTENT_BITS | index) << MP_ADDRESS_BLOCK_BITS;
}

/* Walk to the old address of each block of a data extent. visit 0: make all pages dirty. */
static int place_extent(struct mp_store *store, struct store_volume *volume,
			const struct mp_extent *extent, uint64_t address, int prepare)
{
	struct mp_extent_entry *entry;
	int missing = 0;

	for (uint32_t i = 0; i < extent->block_count; i++) {
		uint64_t block = extent->first_block + i, *slot;
		uint8_t *leaf;
		int error = store_tree_leaf(store, &volume->map, block, STORE_CREATE, &leaf);

		if (!error) {
			slot = (uint64_t *)(void *)leaf + (block & ((1 << MP_MAP_LEAF_BITS) - 1));
			if (!prepare) {
				uint64_t old = *slot;
				*slot = address + i;
				if (old)
					store_extent_kill(store, volume, old);
			} else if (*slot) {
				error = store_extent_get(store, *slot, STORE_DIRTY, &entry);
			}
		}
		if (error && error != -EAGAIN)
			return error;
		missing |= error;
	}
	return missing ? -EAGAIN : 0;
}

static int apply_extent(struct mp_store *store, struct store_volume *volume,
			struct store_group *group,
			const struct mp_extent *extent, uint32_t index, uint64_t offset_bytes,
				int prepare)
{
	uint64_t address = address_of(group->segment, index);
	struct mp_extent_entry *entry;
	int error, missing = 0;

	if (!extent->stored_length_bytes)
		return store_map_clear(store, volume, extent->first_block,
				       extent->first_block + extent->block_count, prepare);
	error = store_extent_get(store, address, STORE_CREATE, &entry);
	if (error && error != -EAGAIN)
		return error;
	missing = error;
	if (!prepare) {
		describe_extent(entry, extent, group, origin_number(store, extent->origin),
				group->offset_bytes + offset_bytes);
		group->segment->live_bytes += extent->stored_length_bytes;
		store->counters.live_bytes += extent->stored_length_bytes;
		__atomic_fetch_add(&volume->stored_bytes, extent->stored_length_bytes,
				   __ATOMIC_RELAXED);
	}
	error = place_extent(store, volume, extent, address, prepare);
	return error ? error : missing;
}

/* One pass over the parts of the batch at offset; *next is what follows it. *data: extents
 * numbered. */
static int pass(struct mp_store *store, struct store_volume *volume, struct store_group *group,
		uint64_t *next, uint32_t *data, int prepare)
{
	uint32_t index = group->segment->extent_count;
	int missing = 0, last = 0;

	while (!last && *next < group->length_bytes) {
		const struct mp_record *record = (const void *)(group->buffer + *next);
		const struct mp_extent *extent = (const void *)(record + 1);
		uint64_t offset_bytes = *next + record->header_length_bytes;

		if (record->type != MP_RECORD_BATCH)
			break;
		for (uint32_t i = 0; i < record->extent_count; i++, extent++) {
			int error = volume ? apply_extent(store, volume, group, extent, index,
							  offset_bytes, prepare)
					   : 0;
			if (error && error != -EAGAIN)
				return error;
			missing |= error;
			index += extent->stored_length_bytes != 0;
			offset_bytes += extent->stored_length_bytes;
		}
		last = record->flags & MP_RECORD_LAST_OF_BATCH;
		*next += store_align(record->header_length_bytes + record->payload_length_bytes, 8);
	}
	*data = index - group->segment->extent_count;
	return missing ? -EAGAIN : 0;
}

static int apply_batch(struct mp_store *store, struct store_group *group,
		       const struct mp_record *record)
{
	struct store_volume *volume = store_volume_find(store, record->volume);
	uint64_t next = group->apply_offset;
	uint32_t data;
	int error;

	/* Replay meets batches again that the checkpoint has: they keep their numbers, nothing
	 * else. */
	if (volume && (!volume->visible ||
		       (record->last_sequence <= volume->state.applied_sequence &&
					    record->lineage == volume->state.lineage)))
		volume = NULL;
	error = pass(store, volume, group, &next, &data, 1);
	if (error)
		return error;
	next = group->apply_offset;
	error = pass(store, volume, group, &next, &data, 0);
	assert(!error);
	group->segment->extent_count += data;
	group->apply_offset = next;
	if (!volume)
		return 0;
	pthread_mutex_lock(&store->mutex);
	if (record->last_sequence > volume->state.applied_sequence)
		volume->state.applied_sequence = record->last_sequence;
	volume->state.lineage = record->lineage;
	pthread_mutex_unlock(&store->mutex);
	store->counters.applied_batches++;
	return 0;
}

static uint64_t blocks_of(const struct mp_volume_state *state)
{
	return state->size_bytes / MP_BLOCK_BYTES + (state->size_bytes % MP_BLOCK_BYTES != 0);
}

static int apply_volume(struct mp_store *store, const struct mp_record *record)
{
	const struct mp_volume_state *state = (const void *)(record + 1);
	struct store_volume *volume = store_volume_find(store, state->id);
	uint64_t old_blocks, blocks = blocks_of(state);

	if (!volume)
		volume = store_volume_add(store, state->id);
	old_blocks = volume->visible ? blocks_of(&volume->state) : 0;
	/* What a shrunk volume no longer has must not come back when it grows again. */
	if (blocks < old_blocks) {
		int error = store_map_clear(store, volume, blocks, old_blocks, 1);
		if (error)
			return error;
		store_map_clear(store, volume, blocks, old_blocks, 0);
	}
	store_tree_grow(store, &volume->map, blocks);
	pthread_mutex_lock(&store->mutex);
	store->counters.volumes += !volume->visible;
	volume->state = *state;
	volume->visible = 1;
	pthread_mutex_unlock(&store->mutex);
	return 0;
}

static void apply_delete(struct mp_store *store, const struct mp_record *record)
{
	struct store_volume *volume = store_volume_find(store, record->volume);

	if (!volume)
		return;
	store_bury(store, &volume->map.root, volume->map.height, MP_GRAVE_MAP);
	store->counters.volumes -= volume->visible;
	store_volume_remove(store, volume);
}

static int apply_record(struct mp_store *store, struct store_group *group)
{
	const struct mp_record *record = (const void *)(group->buffer + group->apply_offset);
	int error = 0;

	if (record->type == MP_RECORD_BATCH)
		return apply_batch(store, group, record);
	if (record->type == MP_RECORD_VOLUME)
		error = apply_volume(store, record);
	else
		apply_delete(store, record);
	if (!error)
		group->apply_offset += store_align(
			record->header_length_bytes + record->payload_length_bytes, 8);
	return error;
}

static int has_record(const struct store_group *group)
{
	const uint64_t *magic = (const void *)(group->buffer + group->apply_offset);

	return group->record_count && group->apply_offset < group->length_bytes &&
	       *magic == MP_RECORD_MAGIC;
}

int store_apply_group(struct mp_store *store, struct store_group *group)
{
	const struct mp_group *header = (const void *)group->buffer;

	if (!group->apply_offset)
		group->apply_offset = MP_GROUP_HEADER_BYTES;
	while (has_record(group)) {
		int error = apply_record(store, group);
		if (error)
			return error == -EAGAIN ? 0 : error;
	}
	group->segment->applied = 1;
	store->applied = (struct store_position){group->segment->id,
						 group->offset_bytes + group->length_bytes,
						 group->commit + 1, group->checksum,
							header->incarnation};
	return 1;
}

static void ready(struct mp_store *store, struct store_wait *wait)
{
	(void)wait;
	store->apply_blocked = 0;
}

static void answer(struct mp_store *store, struct store_group *group)
{
	struct store_request *request;

	while ((request = store_queue_pop(&group->requests)) ||
	       (request = store_queue_pop(&group->riders)))
		store_reply(store, request, MP_STATUS_OK);
	store_group_free(store, group);
	store->groups_unapplied--;
}

void store_apply_advance(struct mp_store *store)
{
	while (store->durable && !store->apply_blocked && !store->failure) {
		struct store_group *group = store->durable;
		int result = store_apply_group(store, group);

		if (result < 0) {
			store_fail(store, result, "cannot read the map to apply segment",
				   group->segment->id, group->offset_bytes);
			return;
		}
		if (!result) {
			store->apply_blocked = 1;
			store->apply_wait.ready = ready;
			store_page_wait(store, &store->apply_wait);
			return;
		}
		store->durable = group->next;
		if (!store->durable)
			store->durable_last = NULL;
		answer(store, group);
	}
}
