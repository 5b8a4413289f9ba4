/* checkpointload.c - read the checkpoint that the superblock names, at recovery.
 *
 * Happy path: read it whole, verify header and body, take over volumes, segment table, tombstones,
 * index and slots.
 * Failure modes: it does not verify, or makes no sense: one line, no start; nothing on the device
 * was changed.
 */
#include <xxhash.h>
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h> /* see checksum.c */
#endif

#include <stdio.h>

#include "engine_internal.h"

static int complain(char *message, uint64_t message_bytes, int error, const char *what)
{
	snprintf(message, message_bytes, "%s", what);
	return error;
}

/* A checksum does not make it possible: later code takes these for granted. */
static bool volume_is_possible(struct mp_engine *engine, const struct mp_cache_volume *state)
{
	return state->number < VOLUMES_MAX && !engine->volumes[state->number] &&
	       !volume_by_id(engine, state->id) && state->origin && state->origin < ORIGINS_MAX &&
	       state->size_bytes <= VOLUME_BYTES_MAX &&
	       state->last_sequence < UINT64_MAX / 2 &&
	       state->destaged_sequence <= state->last_sequence &&
	       state->head_ordinal < UINT64_MAX / 2 &&
	       state->head_offset_bytes <= engine->super.log_segment_bytes &&
	       state->head_offset_bytes % MP_BLOCK_BYTES == 0;
}

static int load_volumes(struct mp_engine *engine, const uint8_t *in, uint64_t count)
{
	uint64_t i;

	for (i = 0; i < count; i++) {
		struct mp_cache_volume state;
		struct volume *volume;

		memcpy(&state, in + i * sizeof state, sizeof state);
		if (!volume_is_possible(engine, &state))
			return -EPROTO;
		volume = volume_new(engine, state.id, state.number);
		if (!volume)
			return -ENOMEM;
		volume->origin = state.origin;
		volume->size_bytes = state.size_bytes;
		volume->epoch = state.epoch;
		volume->lineage = state.lineage;
		volume->destaged_sequence = state.destaged_sequence;
		volume->last_sequence = volume->applied_sequence = state.last_sequence;
		volume->synced_sequence = state.synced_sequence;
		volume->head_ordinal = state.head_ordinal;
		volume->head_offset_bytes = state.head_offset_bytes;
		volume->head_checksum = state.head_checksum;
		volume->head_incarnation = state.head_incarnation;
		if (state.origin >= engine->next_origin)
			engine->next_origin = state.origin + 1;
	}
	return 0;
}

static int load_segments(struct mp_engine *engine, const uint8_t *in, uint64_t count)
{
	uint64_t i;

	if (count != engine->segment_count)
		return -EPROTO;
	for (i = 0; i < count; i++) {
		struct mp_segment_entry entry;

		memcpy(&entry, in + i * sizeof entry, sizeof entry);
		if (entry.state == 0)
			continue;
		if (entry.state != 1 || entry.number >= VOLUMES_MAX ||
		    !engine->volumes[entry.number] || entry.ordinal >= UINT64_MAX / 2)
			return -EPROTO;
		engine->segments[i].state = SEGMENT_CHAIN;
		engine->segments[i].number = entry.number;
		engine->segments[i].ordinal = entry.ordinal;
		engine->segments_free--;
	}
	return 0;
}

static int load_tombstones(struct mp_engine *engine, const uint8_t *in, uint64_t count)
{
	uint64_t i;

	for (i = 0; i < count; i++) {
		struct mp_tombstone entry;
		struct volume *volume;
		uint64_t before;

		memcpy(&entry, in + i * sizeof entry, sizeof entry);
		volume = entry.number < VOLUMES_MAX ? engine->volumes[entry.number] : NULL;
		before = volume ? volume->tombstones.count : 0;
		if (!volume || !entry.block_count || entry.block_count > VOLUME_BLOCKS_MAX ||
		    entry.first_block > VOLUME_BLOCKS_MAX - entry.block_count ||
		    tombstones_put(&volume->tombstones, entry.first_block, entry.block_count,
				   entry.sequence))
			return -EPROTO;
		/* Disjoint as saved; forged ones replace and split each other. */
		engine->tombstone_count += volume->tombstones.count;
		engine->tombstone_count -= before;
	}
	return engine->tombstone_count > TOMBSTONES_MAX ? -EPROTO : 0;
}

uint64_t index_entries_max(const struct mp_engine *engine)
{
	return engine->super.checkpoint_capacity_bytes / sizeof(struct mp_index_entry);
}

static int load_index(struct mp_engine *engine, const uint8_t *in, uint64_t count)
{
	uint64_t i;

	if (index_reserve(&engine->index, count))
		return -ENOMEM;
	for (i = 0; i < count; i++) {
		struct mp_index_entry entry;
		struct index_slot *slot;
		uint64_t place;

		memcpy(&entry, in + i * sizeof entry, sizeof entry);
		place = (uint64_t)entry.address * MP_BLOCK_BYTES;
		if (entry.number >= VOLUMES_MAX || !engine->volumes[entry.number] ||
		    entry.block >= VOLUME_BLOCKS_MAX ||
		    (place && (place < engine->super.log_offset_bytes ||
			       place >= engine->super.slots_offset_bytes)))
			return -EPROTO;
		slot = index_put(&engine->index, entry.number, entry.block, entry.address);
		slot->sequence = (uint32_t)entry.sequence;
		slot->checksum = entry.checksum;
	}
	engine->ledger.saved.zeros = engine->index.zeros;
	return 0;
}

/* Slots of a volume that was forgotten keep its origin: nobody may get that again while they
 * last. */
static void keep_origins_apart(struct mp_engine *engine, const uint8_t *in, uint64_t count)
{
	uint64_t i, bytes = mp_slots_entry_bytes(engine->slots);

	for (i = 0; i < count; i++) {
		struct mp_slot_entry entry;

		memcpy(&entry, in + i * bytes, sizeof entry);
		if (entry.valid && entry.key >> 40 < ORIGINS_MAX &&
		    entry.key >> 40 >= engine->next_origin)
			engine->next_origin = (uint32_t)(entry.key >> 40) + 1;
	}
}

static int load_body(struct mp_engine *engine, const struct mp_cache_checkpoint *header,
		     const uint8_t *body, uint64_t body_bytes)
{
	const uint8_t *in = body;
	uint64_t need;
	int rc;

	if (header->volume_count > VOLUMES_MAX || header->tombstone_count > TOMBSTONES_MAX ||
	    header->segment_count != engine->segment_count ||
	    header->index_count > index_entries_max(engine) ||
	    header->slot_count > engine->super.slot_count ||
	    header->slot_blocks != engine->slot_blocks)
		return -EPROTO;
	need = header->volume_count * sizeof(struct mp_cache_volume) +
	       header->segment_count * sizeof(struct mp_segment_entry) +
	       header->tombstone_count * sizeof(struct mp_tombstone) +
	       header->index_count * sizeof(struct mp_index_entry) +
	       header->slot_count * mp_slots_entry_bytes(engine->slots);
	if (need > body_bytes)
		return -EPROTO;
	rc = load_volumes(engine, in, header->volume_count);
	in += header->volume_count * sizeof(struct mp_cache_volume);
	rc = rc ? rc : load_segments(engine, in, header->segment_count);
	in += header->segment_count * sizeof(struct mp_segment_entry);
	rc = rc ? rc : load_tombstones(engine, in, header->tombstone_count);
	engine->ledger.saved.ranges = engine->tombstone_count;
	sweep_again(engine);
	in += header->tombstone_count * sizeof(struct mp_tombstone);
	rc = rc ? rc : load_index(engine, in, header->index_count);
	in += header->index_count * sizeof(struct mp_index_entry);
	if (rc)
		return rc;
	mp_slots_load(engine->slots, 0, header->slot_count, in);
	keep_origins_apart(engine, in, header->slot_count);
	return 0;
}

int checkpoint_load(struct mp_engine *engine, char *message, uint64_t message_bytes)
{
	const struct mp_cache_super *super = &engine->super;
	uint64_t offset = super->checkpoint_offset_bytes[super->checkpoint_area];
	uint64_t bytes = super->checkpoint_length_bytes, at;
	struct mp_cache_checkpoint header;
	uint8_t *memory;
	int64_t rc = 0;

	engine->was_clean = super->clean != 0;
	if (super->checkpoint_generation == 0)
		return 0;
	if (bytes < MP_BLOCK_BYTES || bytes % MP_BLOCK_BYTES ||
	    bytes > super->checkpoint_capacity_bytes)
		return complain(message, message_bytes, -EPROTO,
				"the superblock names an impossible checkpoint");
	memory = aligned_alloc(MP_BLOCK_BYTES, bytes);
	if (!memory)
		return complain(message, message_bytes, -ENOMEM,
				"no memory to load the checkpoint");
	for (at = 0; at < bytes && rc >= 0; at += CHECKPOINT_STEP_BYTES) {
		uint64_t step = bytes - at < CHECKPOINT_STEP_BYTES ? bytes - at
								   : CHECKPOINT_STEP_BYTES;
		rc = mp_driver_read(engine->driver, 0, offset + at, memory + at, step);
	}
	memcpy(&header, memory, sizeof header);
	if (rc >= 0 && (header.magic != MP_CACHE_CHECKPOINT_MAGIC ||
			header.generation != super->checkpoint_generation ||
			header.checksum != mp_xxh3(&header.generation, sizeof header - 16) ||
			super->checkpoint_checksum !=
				XXH3_64bits(memory + MP_BLOCK_BYTES, bytes - MP_BLOCK_BYTES)))
		rc = -EBADMSG;
	if (rc >= 0)
		rc = load_body(engine, &header, memory + MP_BLOCK_BYTES, bytes - MP_BLOCK_BYTES);
	free(memory);
	if (rc == -EBADMSG)
		complain(message, message_bytes, 0,
			 "the checkpoint does not verify: the device is damaged; nothing was "
			 "changed");
	else if (rc < 0)
		complain(message, message_bytes, 0,
			 "the checkpoint cannot be loaded; nothing was changed");
	return rc < 0 ? (int)rc : 0;
}
