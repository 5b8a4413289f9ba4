/* storeimage.c - what is where in a store's image; checksums made right from the leaves up.
 *
 * Where things are is noted once, from the image before it was changed: what a changed number
 * points to elsewhere is not resealed, and need not be.
 */
#include "storeimage.h"

enum { EXTENTS_MAX = 4, STRUCTS_MAX = 32, COPY_BYTES = MP_BLOCK_BYTES };

static void add(struct store_image *store, const struct group *group, uint32_t kind, uint64_t at,
		uint64_t length_bytes)
{
	places_add(&store->places, (struct place){group->file, group->offset_bytes + at,
						  length_bytes, kind});
}

/* ---- what is where ---- */

static void note_pages(struct store_image *store, struct group *group)
{
	uint64_t at = RECORDS_AT + MP_RECORD_HEADER_BYTES, count = 0, head;

	do {
		count++;
		head = (at + count * sizeof(struct mp_page_descriptor) + MP_PAGE_BYTES - 1) /
		       MP_PAGE_BYTES * MP_PAGE_BYTES;
	} while (head + count * MP_PAGE_BYTES < group->length_bytes);
	CHECK(head + count * MP_PAGE_BYTES == group->length_bytes);
	for (uint64_t i = 0; i < count; i++) {
		struct page *page = &store->pages[store->page_count++];
		struct mp_page_descriptor about;

		CHECK(store->page_count < PAGES_MAX);
		page->group = (uint32_t)(group - store->groups);
		page->descriptor_at = at + i * sizeof about;
		page->page_at = head + i * MP_PAGE_BYTES;
		page->place = group->file << MP_PLACE_PAGE_BITS |
			      (group->offset_bytes + page->page_at) / MP_PAGE_BYTES;
		memcpy(&about, group->bytes + page->descriptor_at, sizeof about);
		page->level = about.level;
		CHECK(page->level < PAGE_LEVELS);
		add(store, group, STORE_DESCRIPTOR, page->descriptor_at, sizeof about);
		add(store, group, page->level ? STORE_INNER : STORE_LEAF, page->page_at,
		    MP_PAGE_BYTES);
	}
}

static void structs(struct store_image *store, const struct group *group, uint32_t kind,
		    uint64_t *at, uint64_t count, uint64_t bytes)
{
	for (uint64_t i = 0; i < count && i < STRUCTS_MAX; i++)
		add(store, group, kind, *at + i * bytes, bytes);
	*at += count * bytes;
}

static void note_root(struct store_image *store, struct group *group)
{
	uint64_t at = RECORDS_AT + MP_RECORD_HEADER_BYTES;
	struct mp_checkpoint header;

	memcpy(&header, group->bytes + at, sizeof header);
	structs(store, group, STORE_CHECKPOINT, &at, 1, sizeof header);
	structs(store, group, STORE_VOLUME, &at, header.volume_count,
		sizeof(struct mp_checkpoint_volume));
	structs(store, group, STORE_SEGMENT, &at, header.segment_count,
		sizeof(struct mp_checkpoint_segment));
	structs(store, group, STORE_ORIGIN, &at, header.origin_count, MP_VOLUME_ID_BYTES);
	structs(store, group, STORE_GRAVE, &at, header.grave_count,
		sizeof(struct mp_checkpoint_grave));
	group->is_root = true;
}

static void note_records(struct store_image *store, struct group *group)
{
	uint64_t at = RECORDS_AT;

	add(store, group, STORE_GROUP, 0, MP_GROUP_HEADER_BYTES);
	for (uint32_t i = 0; i < group->record_count; i++) {
		int64_t length = mp_record_check(group->bytes + at, group->length_bytes - at);
		struct mp_record header;

		CHECK(length > 0);
		memcpy(&header, group->bytes + at, sizeof header);
		add(store, group, STORE_RECORD, at, sizeof header);
		for (uint32_t j = 0; j < header.extent_count && j < EXTENTS_MAX; j++)
			add(store, group, STORE_EXTENT,
			    at + MP_RECORD_HEADER_BYTES + j * MP_EXTENT_BYTES,
			    MP_EXTENT_BYTES);
		if (header.type == MP_RECORD_VOLUME)
			add(store, group, STORE_STATE, at + header.header_length_bytes,
			    header.payload_length_bytes);
		if (header.type == MP_RECORD_PAGES)
			note_pages(store, group);
		if (header.type == MP_RECORD_CHECKPOINT)
			note_root(store, group);
		at += ((uint64_t)length + 7) / 8 * 8;
	}
}

static bool note_group(struct store_image *store, struct mp_sim *sim, uint64_t file,
		       uint64_t offset_bytes)
{
	struct group *group = &store->groups[store->group_count];
	struct mp_group header;

	if (mp_sim_peek(sim, file, offset_bytes, &header, sizeof header) < 0 ||
	    header.magic != MP_GROUP_MAGIC || header.segment != file ||
	    header.offset_bytes != offset_bytes)
		return false;
	CHECK(++store->group_count < GROUPS_MAX);
	*group = (struct group){.file = file, .offset_bytes = offset_bytes,
				.length_bytes = header.length_bytes, .checksum = header.checksum,
				.commit = header.commit, .kind = header.kind,
				.record_count = header.record_count,
				.bytes = malloc(header.length_bytes)};
	CHECK(group->bytes);
	CHECK(mp_sim_peek(sim, file, offset_bytes, group->bytes, group->length_bytes) > 0);
	note_records(store, group);
	return true;
}

void store_image_note(struct store_image *store, struct mp_sim *sim)
{
	CHECK(mp_sim_peek(sim, 0, 0, &store->super, sizeof store->super) > 0);
	places_add(&store->places, (struct place){
		0, 0, sizeof store->super - sizeof store->super.reserved, STORE_SUPER});
	for (uint64_t i = 0; i < store->image.file_count; i++) {
		uint64_t file = store->image.files[i].number, at = 0;

		while (file && note_group(store, sim, file, at))
			at += store->groups[store->group_count - 1].length_bytes;
	}
	CHECK(store->group_count > 3);
}

/* ---- checksums made right ---- */

/* Every reference to this place, at whole 8 bytes of a part of a group. */
static void refer(uint8_t *bytes, uint64_t length_bytes, uint64_t place, uint64_t checksum)
{
	for (uint64_t at = 0; at + sizeof(struct mp_page_ref) <= length_bytes; at += 8) {
		struct mp_page_ref ref;

		memcpy(&ref, bytes + at, sizeof ref);
		if (ref.place != place)
			continue;
		ref.checksum = checksum;
		memcpy(bytes + at, &ref, sizeof ref);
	}
}

static void reseal_page(struct store_image *store, const struct page *page)
{
	uint8_t *bytes = store->groups[page->group].bytes;
	uint64_t checksum = mp_xxh3(bytes + page->page_at, MP_PAGE_BYTES);
	struct mp_page_descriptor about;

	memcpy(&about, bytes + page->descriptor_at, sizeof about);
	about.checksum = checksum;
	memcpy(bytes + page->descriptor_at, &about, sizeof about);
	for (uint32_t i = 0; i < store->page_count; i++)
		if (store->pages[i].level > page->level)
			refer(store->groups[store->pages[i].group].bytes + store->pages[i].page_at,
			      MP_PAGE_BYTES, page->place, checksum);
	for (uint32_t i = 0; i < store->group_count; i++)
		if (store->groups[i].is_root)
			refer(store->groups[i].bytes + RECORDS_AT + MP_RECORD_HEADER_BYTES,
			      store->groups[i].length_bytes - RECORDS_AT - MP_RECORD_HEADER_BYTES,
			      page->place, checksum);
}

static uint64_t renewed(const struct store_image *store, const uint64_t *checksums, uint64_t old)
{
	for (uint32_t i = 0; i < store->group_count; i++)
		if (store->groups[i].checksum == old)
			return checksums[i];
	return old;
}

/* Its records, then its header; its predecessor was done before. */
static void reseal_group(const struct store_image *store, uint32_t index, uint64_t *checksums)
{
	const struct group *group = &store->groups[index];
	struct mp_group *header = (void *)group->bytes;
	uint64_t at = RECORDS_AT;

	if (group->is_root) {
		struct mp_checkpoint *root =
			(void *)(group->bytes + RECORDS_AT + MP_RECORD_HEADER_BYTES);
		root->log_checksum = renewed(store, checksums, root->log_checksum);
	}
	for (uint32_t i = 0; i < group->record_count && at < group->length_bytes; i++) {
		struct mp_record record;

		if (group->length_bytes - at < sizeof record)
			break;
		reseal_record(group->bytes + at, group->length_bytes - at);
		memcpy(&record, group->bytes + at, sizeof record);
		if (record.header_length_bytes > group->length_bytes ||
		    record.payload_length_bytes > group->length_bytes)
			break;
		at += (record.header_length_bytes + record.payload_length_bytes + 7) / 8 * 8;
	}
	header->previous_checksum = renewed(store, checksums, header->previous_checksum);
	header->checksum = mp_xxh3(group->bytes + 16, sizeof *header - 16);
	checksums[index] = header->checksum;
}

/* Data groups by commit, then what a checkpoint wrote. */
static void reseal_groups(struct store_image *store, uint64_t *checksums)
{
	uint64_t last = 0, next;

	for (uint32_t i = 0; i < store->group_count; i++)
		checksums[i] = store->groups[i].checksum;
	do {
		next = UINT64_MAX;
		for (uint32_t i = 0; i < store->group_count; i++) {
			const struct group *group = &store->groups[i];

			if (group->kind != MP_GROUP_DATA || group->commit < last)
				continue;
			if (group->commit == last)
				reseal_group(store, i, checksums);
			else if (group->commit < next)
				next = group->commit;
		}
		last = next;
	} while (next != UINT64_MAX);
	for (uint32_t i = 0; i < store->group_count; i++)
		if (store->groups[i].kind != MP_GROUP_DATA)
			reseal_group(store, i, checksums);
}

static void exchange(struct store_image *store, struct mp_sim *sim, bool read)
{
	for (uint32_t i = 0; i < store->group_count; i++) {
		const struct group *group = &store->groups[i];
		int64_t done = read ? mp_sim_peek(sim, group->file, group->offset_bytes,
						  group->bytes, group->length_bytes)
				    : mp_sim_poke(sim, group->file, group->offset_bytes,
						  group->bytes, group->length_bytes);
		CHECK(done == (int64_t)group->length_bytes);
	}
}

void store_image_reseal(struct store_image *store, struct mp_sim *sim)
{
	uint64_t checksums[GROUPS_MAX];
	struct mp_store_super super;

	exchange(store, sim, true);
	for (uint32_t level = 0; level < PAGE_LEVELS; level++)
		for (uint32_t i = 0; i < store->page_count; i++)
			if (store->pages[i].level == level)
				reseal_page(store, &store->pages[i]);
	reseal_groups(store, checksums);
	exchange(store, sim, false);
	CHECK(mp_sim_peek(sim, 0, 0, &super, sizeof super) > 0);
	super.checkpoint_checksum = renewed(store, checksums, super.checkpoint_checksum);
	super.checksum = mp_xxh3(&super.version, sizeof super - 16);
	CHECK(mp_sim_poke(sim, 0, 0, &super, sizeof super) > 0);
	CHECK(mp_sim_poke(sim, 0, COPY_BYTES, &super, sizeof super) > 0);
}
