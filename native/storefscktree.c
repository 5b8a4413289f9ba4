/* storefscktree.c - the store's trees of pages, walked; entries of extent tables.
 *
 * Happy path: every page of a tree is visited once, leaves are handed on; what is visited counts
 * for the segment that holds the page.
 * Failure modes: a page that cannot be had is reported, once, and what is below it left out.
 */
#include "storefsck_internal.h"

static uint32_t shift_of(const struct fsck_tree *tree, uint32_t level)
{
	return tree->leaf_bits + level * MP_INNER_BITS;
}

static void count_page(struct mp_fsck *fsck, uint64_t place)
{
	const struct mp_store *store = fsck->store;
	uint64_t low = 0, high = store->segment_count, id = place >> MP_PLACE_PAGE_BITS;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (store->segments[middle]->id < id)
			low = middle + 1;
		else
			high = middle;
	}
	if (low < store->segment_count && store->segments[low]->id == id)
		fsck->page_bytes[low] += MP_PAGE_BYTES;
}

static void bad_page(struct mp_fsck *fsck, const struct fsck_tree *tree, uint64_t place,
		     uint32_t level, uint64_t first_key, int error)
{
	struct fsck_where where = {
		.segment = place >> MP_PLACE_PAGE_BITS,
		.offset_bytes = (place & ((1 << MP_PLACE_PAGE_BITS) - 1)) * MP_PAGE_BYTES};
	const char *why = error == -EBADMSG ? "does not verify" : "cannot be read: I/O error";

	if (!fsck->counting)
		return;
	if (!tree->segment)
		fsck->map_pages_bad++;
	else
		fsck->table_pages_bad++;
	if (tree->segment) {
		fsck_report(fsck, MP_FSCK_PAGE, where,
			    "a page of the extent table of segment %llu %s",
			    (unsigned long long)tree->segment, why);
		return;
	}
	if (!tree->volume) {
		fsck_report(fsck, MP_FSCK_PAGE, where,
			    "a page of what is being given back %s", why);
		return;
	}
	where.volume = tree->volume;
	where.first_block = first_key;
	where.block_count = UINT64_C(1) << shift_of(tree, level);
	fsck_report(fsck, MP_FSCK_PAGE, where, "a page of the map %s", why);
}

/* The page's data, valid until the next page; NULL: it cannot be had. */
static const uint8_t *visit(struct mp_fsck *fsck, const struct fsck_tree *tree,
			    const struct mp_page_ref *ref, uint32_t level, uint64_t first_key)
{
	struct store_page *page;
	int error;

	store_pages_trim(fsck->store);
	if (fsck->counting && !(ref->place & STORE_IN_MEMORY))
		count_page(fsck, ref->place);
	error = store_page_get(fsck->store, ref, &page);
	if (error) {
		fsck->ended |= error == -ESHUTDOWN;
		bad_page(fsck, tree, ref->place, level, first_key, error);
		return NULL;
	}
	fsck->summary.pages += fsck->counting;
	return page->data;
}

void fsck_walk(struct mp_fsck *fsck, const struct fsck_tree *tree)
{
	uint32_t level = tree->height, at[STORE_LEVELS + 1] = {0};
	struct mp_page_ref ref = tree->root;
	uint64_t key = 0;

	assert(tree->height < STORE_LEVELS);
	while (!fsck->ended) {
		const uint8_t *data = ref.place ? visit(fsck, tree, &ref, level, key) : NULL;

		if (data && level) { /* down */
			memcpy(fsck->inner[level], data, MP_PAGE_BYTES);
			at[level] = 0;
			ref = fsck->inner[level--][0];
			continue;
		}
		if (data)
			tree->leaf(fsck, tree, key, data);
		while (level < tree->height && at[level + 1] == (1 << MP_INNER_BITS) - 1) {
			key -= (uint64_t)at[level + 1] << shift_of(tree, level);
			level++;
		}
		if (level == tree->height)
			return;
		at[level + 1]++;
		key += UINT64_C(1) << shift_of(tree, level);
		ref = fsck->inner[level + 1][at[level + 1]];
	}
}

/* The leaf that has entry index into memory, unless it is there: the log asks in order. */
static void load_entries(struct mp_fsck *fsck, uint64_t segment, uint32_t index)
{
	struct store_segment *mine = store_segment_find(fsck->store, segment);
	uint32_t first = index >> MP_EXTENT_LEAF_BITS << MP_EXTENT_LEAF_BITS;
	uint8_t *leaf = NULL;

	if (fsck->entries_segment == segment && fsck->entries_first == first)
		return;
	fsck->entries_segment = segment;
	fsck->entries_first = first;
	memset(fsck->entries, 0, sizeof fsck->entries);
	store_pages_trim(fsck->store);
	fsck->entries_error =
		mine ? store_tree_leaf(fsck->store, &mine->extents, index, STORE_LOOK, &leaf) : 0;
	if (leaf)
		memcpy(fsck->entries, leaf, sizeof fsck->entries);
}

const struct mp_extent_entry *fsck_entry(struct mp_fsck *fsck, uint64_t segment, uint32_t index,
					 int *error)
{
	const struct mp_extent_entry *entry;

	load_entries(fsck, segment, index);
	entry = &fsck->entries[index & ((1 << MP_EXTENT_LEAF_BITS) - 1)];
	*error = fsck->entries_error;
	return *error || !entry->codec_blocks ? NULL : entry;
}

uint32_t fsck_entry_at(struct mp_fsck *fsck, uint64_t segment, uint32_t index,
		       uint64_t offset_bytes)
{
	const struct store_segment *mine = store_segment_find(fsck->store, segment);

	for (; mine && index < mine->extent_count; index++) {
		int error;
		const struct mp_extent_entry *entry = fsck_entry(fsck, segment, index, &error);

		if (entry && entry->offset_bytes == offset_bytes)
			return index;
		if (entry && entry->offset_bytes > offset_bytes)
			break;
	}
	return FSCK_NUMBER_LOST;
}
