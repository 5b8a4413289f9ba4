/* storefscktable.c - extent tables against log and maps, counts against what they count.
 *
 * Happy path: each entry's record was seen in the log; its live mask is what maps and graves refer
 * to; the live masks add up to the live bytes of their segments, pages to those of meta segments.
 * Failure modes: where the log is damaged an entry stands for its record, and its bytes are
 * verified by it. Where pages of maps are bad, an extent may be alive that nothing seen refers to.
 */
#include "storefsck_internal.h"

struct tally { struct fsck_segment *segment; uint64_t live_bytes; };

static uint64_t live_bytes(const struct mp_extent_entry *entry)
{
	if (entry->codec_blocks >> 4 == MP_CODEC_NONE)
		return (uint64_t)__builtin_popcount(entry->live) * MP_BLOCK_BYTES;
	return entry->live ? entry->stored_length_bytes : 0;
}

static void compare_entry(struct mp_fsck *fsck, struct tally *tally,
			  const struct mp_extent_entry *entry, uint32_t index)
{
	struct fsck_segment *segment = tally->segment;
	struct mp_extent extent = {0};
	uint32_t mark = index < segment->mark_count ? segment->marks[index] : 0;
	uint32_t referred = mark & FSCK_MARK_REFERRED;
	struct fsck_where where = {extent.origin, entry->first_block, entry->codec_blocks & 15,
				   segment->id, entry->offset_bytes};

	(void)store_extent_describe(fsck->store, entry, &extent); /* if it fails, nobody's */
	tally->live_bytes += live_bytes(entry);
	if (!(mark & FSCK_MARK_SEEN) && !segment->damaged)
		fsck_report(fsck, MP_FSCK_EXTENTS, where,
			    "the extent table has an extent that the log does not have");
	/* Of a file that is gone this names what is lost. */
	if (!(mark & FSCK_MARK_SEEN) && segment->damaged)
		fsck_verify_extent(fsck, extent.origin, &extent, entry->live, segment->id,
				   entry->offset_bytes);
	if (referred & ~(uint32_t)entry->live)
		fsck_report(fsck, MP_FSCK_EXTENTS, where,
			    "the extent table calls dead what a map refers to");
	else if (referred != entry->live && !fsck->map_pages_bad)
		fsck_report(fsck, MP_FSCK_EXTENTS, where,
			    "the extent table calls alive what no map refers to");
}

static void compare_leaf(struct mp_fsck *fsck, const struct fsck_tree *tree, uint64_t first_key,
			 const uint8_t *data)
{
	const struct mp_extent_entry *entries = (const void *)data;
	struct tally *tally = tree->context;

	for (uint32_t i = 0; i < 1 << MP_EXTENT_LEAF_BITS; i++)
		if (entries[i].codec_blocks)
			compare_entry(fsck, tally, &entries[i], (uint32_t)first_key + i);
}

void fsck_table_compare(struct mp_fsck *fsck, struct fsck_segment *segment)
{
	const struct store_segment *mine = store_segment_find(fsck->store, segment->id);
	struct fsck_where where = {.segment = segment->id};
	struct tally tally = {segment, 0};
	struct fsck_tree tree = {.root = mine->extents.root, .height = mine->extents.height,
				 .leaf_bits = MP_EXTENT_LEAF_BITS, .segment = segment->id,
				 .leaf = compare_leaf, .context = &tally};
	uint64_t bad = fsck->table_pages_bad;

	fsck_walk(fsck, &tree);
	if (fsck->table_pages_bad != bad)
		return;
	if (tally.live_bytes != mine->live_bytes)
		fsck_report(fsck, MP_FSCK_COUNT, where,
			    "%llu bytes of it are alive, the segment table says %llu",
			    (unsigned long long)tally.live_bytes,
			    (unsigned long long)mine->live_bytes);
	if (!segment->damaged && segment->next_index != mine->extent_count)
		fsck_report(fsck, MP_FSCK_COUNT, where,
			    "the log has %u extents in it, the segment table says %u",
			    segment->next_index, mine->extent_count);
}

/* Pages in meta segments; the checkpoint counts for the one that holds it. */
void fsck_counts_compare(struct mp_fsck *fsck)
{
	const struct mp_store *store = fsck->store;

	for (uint64_t i = 0; i < store->segment_count; i++) {
		const struct store_segment *segment = store->segments[i];
		uint64_t bytes = fsck->page_bytes[i];

		if (segment->id == store->super.checkpoint_segment)
			bytes += store->super.checkpoint_length_bytes;
		if (segment->kind == MP_GROUP_META && bytes != segment->live_bytes &&
		    !fsck->map_pages_bad && !fsck->table_pages_bad)
			fsck_report(fsck, MP_FSCK_COUNT,
				    (struct fsck_where){.segment = segment->id},
				    "%llu bytes of its pages are referred to, the segment table "
				    "says %llu", (unsigned long long)bytes,
				    (unsigned long long)segment->live_bytes);
	}
}
