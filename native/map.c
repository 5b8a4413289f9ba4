/* map.c - trees of copy-on-write pages: a volume's map, a segment's extent table.
 *
 * A tree has inner pages of 256 references above leaves; a missing reference is a hole. Walking
 * down in order to change something makes every page on the way dirty (pages.c), which changes no
 * content and may therefore be broken off (-EAGAIN) and started again at will. Contents change
 * only when all pages a mutation needs are dirty, in one turn of the reactor: readers see all of
 * it or nothing. A range that covers whole subtrees detaches them unseen; storegrave.c walks them
 * later.
 * Failure modes: the error of a page that cannot be had.
 */
#include "store_internal.h"

static uint32_t shift_of(const struct store_tree *tree, uint32_t level)
{
	return tree->leaf_bits + level * MP_INNER_BITS;
}

/* Does the tree, at its height, have room for key? */
static int covers(const struct store_tree *tree, uint64_t key)
{
	uint32_t shift = shift_of(tree, tree->height);

	return shift >= 64 || key >> shift == 0;
}

static struct mp_page_descriptor describe(const struct store_tree *tree, uint64_t key,
					  uint32_t level)
{
	struct mp_page_descriptor about = {.segment = tree->segment, .level = level};

	memcpy(about.volume, tree->volume, sizeof about.volume);
	about.first_key = key >> shift_of(tree, level) << shift_of(tree, level);
	return about;
}

/* The page behind ref, made dirty or created as asked. NULL: a hole. */
static int step(struct mp_store *store, struct store_tree *tree, uint64_t key, uint32_t level,
		enum store_walk how, struct mp_page_ref *ref, struct store_page **page)
{
	struct mp_page_descriptor about = describe(tree, key, level);
	int error;

	*page = NULL;
	if (!ref->place) {
		if (how == STORE_CREATE)
			*page = store_page_new(store, ref, &about);
		return 0;
	}
	error = store_page_get(store, ref, page);
	if (!error && how != STORE_LOOK)
		*page = store_page_dirty(store, *page, ref, &about);
	return error;
}

/* The reference to the page of level that covers key. A hole above it: *ref is NULL, *hole its
 * level. */
static int walk(struct mp_store *store, struct store_tree *tree, uint64_t key, uint32_t level,
		enum store_walk how, struct mp_page_ref **ref, uint32_t *hole)
{
	assert(covers(tree, key) && level <= tree->height);
	*ref = &tree->root;
	for (uint32_t at = tree->height; at > level; at--) {
		struct store_page *page;
		int error = step(store, tree, key, at, how, *ref, &page);

		if (error)
			return error;
		if (!page) {
			*ref = NULL;
			*hole = at;
			return 0;
		}
		error = store_page_check_inner(page);
		if (error)
			return error;
		*ref = (struct mp_page_ref *)(void *)page->data +
		       ((key >> shift_of(tree, at - 1)) & ((1 << MP_INNER_BITS) - 1));
	}
	return 0;
}

int store_tree_leaf(struct mp_store *store, struct store_tree *tree, uint64_t key,
		    enum store_walk how,
		    uint8_t **leaf)
{
	struct mp_page_ref *ref;
	struct store_page *page;
	uint32_t hole;
	int error;

	*leaf = NULL;
	/* A forged record in the log may reach anywhere; who sends one was asked before. */
	if (!covers(tree, key))
		return how == STORE_CREATE ? -EBADMSG : 0;
	error = walk(store, tree, key, 0, how, &ref, &hole);
	if (error || !ref)
		return error;
	error = step(store, tree, key, 0, how, ref, &page);
	if (!error && page)
		*leaf = page->data;
	return error;
}

/* The leaf that covers key, NULL for a hole; *end: the first key behind that leaf or hole. */
int store_tree_span(struct mp_store *store, struct store_tree *tree, uint64_t key, uint8_t **leaf,
		    uint64_t *end)
{
	struct mp_page_ref *ref;
	struct store_page *page = NULL;
	uint32_t hole = 0, shift;
	int error;

	*leaf = NULL;
	*end = UINT64_MAX;
	if (!covers(tree, key))
		return 0;
	error = walk(store, tree, key, 0, STORE_LOOK, &ref, &hole);
	if (!error && ref)
		error = step(store, tree, key, 0, STORE_LOOK, ref, &page);
	if (error)
		return error;
	if (page)
		*leaf = page->data;
	shift = shift_of(tree, ref ? 0 : hole);
	if (shift < 64)
		*end = ((key >> shift) + 1) << shift;
	return 0;
}

/* Add levels until the tree has room for so many keys. */
void store_tree_grow(struct mp_store *store, struct store_tree *tree, uint64_t keys)
{
	while (keys && !covers(tree, keys - 1)) {
		struct mp_page_ref old = tree->root;

		tree->height++;
		assert(tree->height < STORE_LEVELS);
		if (old.place) {
			struct mp_page_descriptor about = describe(tree, 0, tree->height);
			struct store_page *root = store_page_new(store, &tree->root, &about);
			struct mp_page_ref *first = (struct mp_page_ref *)(void *)root->data;
			struct store_page *child;

			*first = old;
			/* A dirty root refers back to its reference, which has just moved. */
			if (old.place & STORE_IN_MEMORY) {
				int error = store_page_get(store, first, &child);
				assert(!error);
				child->home = first;
			}
		}
	}
}

int store_tree_move(struct mp_store *store, struct store_tree *tree,
		    const struct mp_page_descriptor *about, uint64_t segment)
{
	struct mp_page_ref *ref;
	struct store_page *page;
	uint32_t hole;
	int error;

	if (about->level > tree->height || !covers(tree, about->first_key))
		return 0;
	error = walk(store, tree, about->first_key, about->level, STORE_LOOK, &ref, &hole);
	if (error || !ref || ref->place >> MP_PLACE_PAGE_BITS != segment ||
	    ref->checksum != about->checksum)
		return error;
	error = walk(store, tree, about->first_key, about->level, STORE_DIRTY, &ref, &hole);
	if (!error)
		error = step(store, tree, about->first_key, about->level, STORE_DIRTY, ref, &page);
	return error ? error : 1;
}

int store_extent_get(struct mp_store *store, uint64_t address, enum store_walk how,
		     struct mp_extent_entry **entry)
{
	uint64_t index = address >> MP_ADDRESS_BLOCK_BITS & ((1 << MP_ADDRESS_EXTENT_BITS) - 1);
	struct store_segment *segment = store_segment_find(
		store, address >> (MP_ADDRESS_EXTENT_BITS + MP_ADDRESS_BLOCK_BITS));
	uint8_t *leaf;
	int error;

	/* An address comes from a page: its checksum is right, and yet it may be forged. */
	if (!segment || segment->kind != MP_GROUP_DATA)
		return -EBADMSG;
	if (how == STORE_CREATE)
		store_tree_grow(store, &segment->extents, index + 1);
	error = store_tree_leaf(store, &segment->extents, index, how, &leaf);
	if (error)
		return error;
	if (!leaf)
		return -EBADMSG;
	*entry = (struct mp_extent_entry *)(void *)leaf +
		 (index & ((1 << MP_EXTENT_LEAF_BITS) - 1));
	return 0;
}

/* No map refers to address any more. Its table page is dirty already. volume: whose bytes they
 * were, or NULL. */
void store_extent_kill(struct mp_store *store, struct store_volume *volume, uint64_t address)
{
	uint8_t bit = (uint8_t)(1 << (address & (MP_EXTENT_BLOCKS - 1)));
	struct mp_extent_entry *entry;
	struct store_segment *segment;
	uint64_t offset_bytes, length_bytes;
	int error = store_extent_get(store, address, STORE_DIRTY, &entry);

	assert(!error);
	if (!(entry->live & bit)) {
		store_fail(store, -EBADMSG, "a map refers to an extent that is dead", 0, address);
		return;
	}
	entry->live = (uint8_t)(entry->live & ~bit);
	offset_bytes = entry->offset_bytes;
	length_bytes = entry->stored_length_bytes;
	if (entry->codec_blocks >> 4 == MP_CODEC_NONE) {
		offset_bytes += (address & (MP_EXTENT_BLOCKS - 1)) * MP_BLOCK_BYTES;
		length_bytes = MP_BLOCK_BYTES;
	} else if (entry->live) {
		return;
	}
	segment = store_segment_find(store, entry->segment_origin >> MP_ORIGIN_BITS);
	if (!segment || segment->live_bytes < length_bytes) {
		store_fail(store, -EBADMSG, "an extent is larger than what its segment holds",
			   entry->segment_origin >> MP_ORIGIN_BITS, offset_bytes);
		return;
	}
	segment->live_bytes -= length_bytes;
	store->counters.live_bytes -= length_bytes;
	if (volume)
		__atomic_fetch_sub(&volume->stored_bytes, length_bytes, __ATOMIC_RELAXED);
	store_dead_range(store, segment->id, offset_bytes, length_bytes);
}

/* Blocks [first, end) of one leaf. */
static int clear_in_leaf(struct mp_store *store, struct store_volume *volume, uint64_t first_block,
			 uint64_t end_block, int prepare)
{
	uint64_t mask = (1 << MP_MAP_LEAF_BITS) - 1;
	uint64_t *addresses;
	uint8_t *leaf;
	int error = store_tree_leaf(store, &volume->map, first_block, STORE_DIRTY, &leaf);
	int missing = 0;

	if (error || !leaf)
		return error;
	addresses = (uint64_t *)(void *)leaf;
	for (uint64_t block = first_block; block < end_block; block++) {
		uint64_t address = addresses[block & mask];
		struct mp_extent_entry *entry;

		if (!address)
			continue;
		if (!prepare) {
			addresses[block & mask] = 0;
			store_extent_kill(store, volume, address);
			continue;
		}
		error = store_extent_get(store, address, STORE_DIRTY, &entry);
		if (error && error != -EAGAIN)
			return error;
		missing |= error;
	}
	return missing ? -EAGAIN : 0;
}

/* Clear from first on: the largest whole subtree, or part of a leaf. *next: where to go on. */
static int clear_some(struct mp_store *store, struct store_volume *volume, uint64_t first,
		      uint64_t end, int prepare, uint64_t *next)
{
	struct store_tree *tree = &volume->map;
	struct mp_page_ref *ref;
	uint32_t level = 0, hole;
	uint64_t span = UINT64_C(1) << MP_MAP_LEAF_BITS;
	int error;

	if (first % span || end - first < span) {
		*next = (first / span + 1) * span < end ? (first / span + 1) * span : end;
		return clear_in_leaf(store, volume, first, *next, prepare);
	}
	while (level < tree->height && first % (span << MP_INNER_BITS) == 0 &&
	       end - first >= span << MP_INNER_BITS) {
		span <<= MP_INNER_BITS;
		level++;
	}
	error = walk(store, tree, first, level, STORE_DIRTY, &ref, &hole);
	if (error)
		return error;
	if (!ref) {
		span = UINT64_C(1) << shift_of(tree, hole);
		*next = (first / span + 1) * span < end ? (first / span + 1) * span : end;
		return 0;
	}
	*next = first + span;
	if (ref->place && !prepare) {
		store_bury(store, ref, level, MP_GRAVE_MAP);
		*ref = (struct mp_page_ref){0};
	}
	return 0;
}

int store_map_clear(struct mp_store *store, struct store_volume *volume, uint64_t first_block,
		    uint64_t end_block, int prepare)
{
	uint32_t shift = shift_of(&volume->map, volume->map.height);
	int missing = 0;

	if (shift < 63 && end_block > UINT64_C(1) << shift)
		end_block = UINT64_C(1) << shift;
	while (first_block < end_block) {
		uint64_t next = 0;
		int error = clear_some(store, volume, first_block, end_block, prepare, &next);

		if (error && error != -EAGAIN)
			return error;
		/* the way down is missing: what is behind it is not known yet */
		if (error && !next)
			return error;
		missing |= error;
		first_block = next;
	}
	assert(prepare || !missing);
	return missing ? -EAGAIN : 0;
}
