/* storeroot.c - the root structure of a checkpoint: encode it, find it again.
 *
 * Happy path: header, volumes, segments, origins and graves in one payload; recovery reads the
 * group that the superblock names, verifies it, and builds the tables.
 * Failure modes: anything that does not verify or does not add up refuses to open: the superblock
 * is written after the checkpoint was synced, so this is damage and not a crash.
 */
#include <stdio.h>

#include "store_internal.h"

static uint8_t *put(uint8_t *at, const void *bytes, uint64_t length_bytes)
{
	memcpy(at, bytes, length_bytes);
	return at + length_bytes;
}

static uint8_t *put_volumes(struct mp_store *store, uint8_t *at)
{
	for (uint32_t i = 0; i < STORE_VOLUME_BUCKETS; i++) {
		struct store_volume *volume = store->volumes[i];

		for (; volume; volume = volume->next) {
			struct mp_checkpoint_volume entry = {
				.state = volume->state,
				.root = volume->map.root,
				.height = volume->map.height,
				.stored_bytes = volume->stored_bytes,
			};
			if (volume->visible)
				at = put(at, &entry, sizeof entry);
		}
	}
	return at;
}

static int is_durable(const struct mp_store *store, const struct store_segment *segment)
{
	return segment->applied || segment == store->active_meta ||
	       (segment->kind == MP_GROUP_META && segment->live_bytes);
}

static uint8_t *put_segments(struct mp_store *store, uint8_t *at, uint64_t *count)
{
	for (uint64_t i = 0; i < store->segment_count; i++) {
		const struct store_segment *segment = store->segments[i];
		struct mp_checkpoint_segment entry = {
			.id = segment->id,
			.live_bytes = segment->live_bytes,
			.length_bytes = segment->id == store->applied.segment
						? store->applied.offset_bytes
						: segment->length_bytes,
			.first_commit = segment->first_commit,
			.extents = segment->extents.root,
			.extent_count = segment->extent_count,
			.kind = segment->kind,
			.height = (uint16_t)segment->extents.height,
		};
		/* Segments that only hold groups behind the position are found by roll-forward. An
		 * entry of zeroes keeps the length what it was reckoned to be. */
		if (is_durable(store, segment)) {
			at = put(at, &entry, sizeof entry);
			++*count;
		}
	}
	return at;
}

uint8_t *store_checkpoint_encode(struct mp_store *store, uint64_t *length_bytes)
{
	const struct store_segment *last = store_segment_find(store, store->applied.segment);
	struct mp_checkpoint header = {
		.version = MP_FORMAT_VERSION,
		.volume_count = store->counters.volumes,
		.origin_count = store->origin_count,
		.grave_count = store->grave_count,
		.next_segment = store->next_segment,
		.log_segment = store->applied.segment,
		.log_offset_bytes = store->applied.offset_bytes,
		.log_commit = store->applied.commit,
		.log_checksum = store->applied.checksum,
		.log_incarnation = store->applied.incarnation,
		.log_extents = last ? last->extent_count : 0,
	};
	uint8_t *payload, *at;

	*length_bytes = sizeof header + header.volume_count * sizeof(struct mp_checkpoint_volume) +
			store->segment_count * sizeof(struct mp_checkpoint_segment) +
			store->origin_count * MP_VOLUME_ID_BYTES +
			store->grave_count * sizeof(struct mp_checkpoint_grave);
	payload = store_allocate(*length_bytes);
	header.length_bytes = *length_bytes;
	at = put_volumes(store, payload + sizeof header);
	at = put_segments(store, at, &header.segment_count);
	if (store->origin_count)
		at = put(at, store->origins, store->origin_count * MP_VOLUME_ID_BYTES);
	for (struct store_grave *grave = store->graves; grave; grave = grave->next) {
		struct mp_checkpoint_grave entry = {grave->root, grave->level, grave->kind, 0};
		at = put(at, &entry, sizeof entry);
	}
	assert(at <= payload + *length_bytes);
	memcpy(payload, &header, sizeof header);
	return payload;
}

/* The group at the place the superblock names, verified; its records' payloads are put together. */
static uint8_t *read_payload(struct mp_store *store, uint64_t *length_bytes)
{
	uint64_t group_bytes = store->super.checkpoint_length_bytes, at = MP_GROUP_HEADER_BYTES;
	int64_t file_bytes = store->driver->file_length_bytes(store->driver->self,
							      store->super.checkpoint_segment);
	struct mp_group *header;
	uint8_t *group, *payload;

	*length_bytes = 0;
	if (group_bytes < MP_BLOCK_BYTES || group_bytes % MP_BLOCK_BYTES ||
	    group_bytes > STORE_META_GROUP_MAX_BYTES ||
	    /* or a number alone could have memory reserved for what is not there */
	    file_bytes < 0 || group_bytes > (uint64_t)file_bytes)
		return NULL;
	group = store_allocate_aligned(group_bytes);
	payload = store_allocate(group_bytes);
	header = (struct mp_group *)(void *)group;
	if (mp_driver_read(store->driver, store->super.checkpoint_segment,
			   store->super.checkpoint_offset_bytes, group, group_bytes) >= 0 &&
	    header->checksum == store->super.checkpoint_checksum &&
	    store_group_check(header, store->super.checkpoint_segment,
			      store->super.checkpoint_offset_bytes) == 0 &&
	    header->kind == MP_GROUP_META && header->length_bytes == group_bytes) {
		for (uint32_t i = 0; i < header->record_count && at < group_bytes; i++) {
			int64_t bytes = mp_record_check(group + at, group_bytes - at);

			if (bytes < 0 || (uint64_t)bytes > group_bytes - at ||
			    mp_record_check_payload(group + at, (uint64_t)bytes))
				break;
			memcpy(payload + *length_bytes, group + at + MP_RECORD_HEADER_BYTES,
			       (uint64_t)bytes - MP_RECORD_HEADER_BYTES);
			*length_bytes += (uint64_t)bytes - MP_RECORD_HEADER_BYTES;
			at += store_align((uint64_t)bytes, 8);
		}
	}
	free(group);
	return payload;
}

static int adds_up(const struct mp_checkpoint *header, uint64_t length_bytes)
{
	uint64_t left = length_bytes;
	const uint64_t counts[] = {header->volume_count, header->segment_count,
				   header->origin_count,
				   header->grave_count};
	const uint64_t sizes[] = {sizeof(struct mp_checkpoint_volume),
				  sizeof(struct mp_checkpoint_segment),
				  MP_VOLUME_ID_BYTES, sizeof(struct mp_checkpoint_grave)};

	if (left < sizeof *header || header->version != MP_FORMAT_VERSION ||
	    header->length_bytes != length_bytes)
		return 0;
	left -= sizeof *header;
	for (int i = 0; i < 4; i++) {
		if (counts[i] > left / sizes[i])
			return 0;
		left -= counts[i] * sizes[i];
	}
	return 1;
}

/* Checksums tell of damage, not of sense: what later code takes for granted is checked here. */
static int header_is_possible(const struct mp_store *store, const struct mp_checkpoint *header)
{
	return header->next_segment < STORE_SEGMENTS_MAX &&
	       header->log_segment < STORE_SEGMENTS_MAX &&
	       header->log_offset_bytes < STORE_FILE_MAX_BYTES &&
	       header->log_offset_bytes % MP_BLOCK_BYTES == 0 && header->log_commit &&
	       header->log_commit < UINT64_MAX / 2 &&
	       header->log_incarnation >> 32 <= store->super.incarnation >> 32 &&
	       header->origin_count < 1ULL << MP_ORIGIN_BITS;
}

static int volume_is_possible(struct mp_store *store, const struct mp_checkpoint_volume *entry)
{
	return !store_volume_find(store, entry->state.id) &&
	       entry->height < STORE_LEVELS - 1 &&
	       !(entry->root.place & STORE_IN_MEMORY) &&
	       memchr(entry->state.name, 0, sizeof entry->state.name) &&
	       entry->state.applied_sequence < STORE_SEQUENCES_MAX;
}

static int segment_is_possible(struct mp_store *store, const struct mp_checkpoint_segment *entry)
{
	return entry->id && entry->id < STORE_SEGMENTS_MAX &&
	       !store_segment_find(store, entry->id) &&
	       (entry->kind == MP_GROUP_DATA || entry->kind == MP_GROUP_META) &&
	       entry->length_bytes <= STORE_FILE_MAX_BYTES &&
	       entry->length_bytes % MP_BLOCK_BYTES == 0 &&
	       entry->extent_count <= 1U << MP_ADDRESS_EXTENT_BITS &&
	       entry->height < STORE_LEVELS - 1 && !(entry->extents.place & STORE_IN_MEMORY);
}

static int grave_is_possible(const struct mp_checkpoint_grave *entry)
{
	return entry->root.place && !(entry->root.place & STORE_IN_MEMORY) &&
	       entry->level < STORE_LEVELS &&
	       (entry->kind == MP_GRAVE_MAP || entry->kind == MP_GRAVE_EXTENTS);
}

static const uint8_t *load_volumes(struct mp_store *store, const uint8_t *at, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++) {
		struct mp_checkpoint_volume entry;
		struct store_volume *volume;

		memcpy(&entry, at, sizeof entry);
		at += sizeof entry;
		if (!volume_is_possible(store, &entry))
			return NULL;
		volume = store_volume_add(store, entry.state.id);
		volume->state = volume->admitted = entry.state;
		volume->visible = 1;
		volume->map.root = entry.root;
		volume->map.height = entry.height;
		volume->stored_bytes = entry.stored_bytes;
	}
	store->counters.volumes = count;
	return at;
}

static const uint8_t *load_segments(struct mp_store *store, const uint8_t *at, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++) {
		struct mp_checkpoint_segment entry;
		struct store_segment *segment;

		memcpy(&entry, at, sizeof entry);
		at += sizeof entry;
		if (!segment_is_possible(store, &entry))
			return NULL;
		segment = store_segment_add(store, entry.id, entry.kind);
		segment->live_bytes = entry.live_bytes;
		segment->length_bytes = entry.length_bytes;
		segment->first_commit = entry.first_commit;
		segment->extents.root = entry.extents;
		segment->extents.height = entry.height;
		segment->extent_count = segment->extents_planned = entry.extent_count;
		segment->applied = segment->kind == MP_GROUP_DATA;
		segment->sealed = 1;
		if (segment->kind == MP_GROUP_DATA)
			store->counters.live_bytes += entry.live_bytes;
	}
	return at;
}

static int load_graves(struct mp_store *store, const uint8_t *at, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++) {
		struct mp_checkpoint_grave entry;

		memcpy(&entry, at, sizeof entry);
		at += sizeof entry;
		if (!grave_is_possible(&entry))
			return 0;
		store_bury(store, &entry.root, entry.level, entry.kind);
	}
	return 1;
}

/* Take over all tables; 0: they make no sense. */
static int load_tables(struct mp_store *store, const struct mp_checkpoint *header,
		       const uint8_t *at)
{
	if (!header_is_possible(store, header))
		return 0;
	at = load_volumes(store, at, header->volume_count);
	if (at)
		at = load_segments(store, at, header->segment_count);
	if (!at)
		return 0;
	store->origins = store_grow(store->origins, &store->origin_capacity,
				    header->origin_count + 1, sizeof *store->origins);
	memcpy(store->origins, at, header->origin_count * MP_VOLUME_ID_BYTES);
	store->origin_count = header->origin_count;
	return load_graves(store, at + header->origin_count * MP_VOLUME_ID_BYTES,
			   header->grave_count);
}

int store_checkpoint_load(struct mp_store *store, char *message, uint64_t message_bytes)
{
	uint64_t length_bytes;
	uint8_t *payload = read_payload(store, &length_bytes);
	struct mp_checkpoint header = {0};

	if (payload && length_bytes >= sizeof header)
		memcpy(&header, payload, sizeof header);
	if (!adds_up(&header, length_bytes) ||
	    !load_tables(store, &header, payload + sizeof header)) {
		free(payload);
		snprintf(message, message_bytes,
			 "the checkpoint in segment %llu at %llu does not verify: "
			 "the store is damaged, "
			 "restore it from a replica",
			 (unsigned long long)store->super.checkpoint_segment,
			 (unsigned long long)store->super.checkpoint_offset_bytes);
		return -EBADMSG;
	}
	if (header.next_segment > store->next_segment)
		store->next_segment = header.next_segment;
	store->applied = (struct store_position){header.log_segment, header.log_offset_bytes,
						 header.log_commit, header.log_checksum,
						 header.log_incarnation};
	free(payload);
	return 0;
}
