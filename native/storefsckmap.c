/* storefsckmap.c - maps rebuilt from the log in bounded memory, held against the store's.
 *
 * Happy path: the log is replayed into leaves of 512 addresses, the newest record winning. Leaves
 * are in order of a hash; those that fit into memory are of this pass, from the lowest hash that
 * no earlier pass had; when memory is short the upper half gives way to a later pass. Then the
 * store's map is walked beside them, and each address it has is marked at its extent.
 * What may differ: where the log has data and the map a hole, a segment that is gone may have held
 * the trim. That takes missing commits behind the data, and a record of this very volume that is
 * missing: its sequences or its epoch show that.
 * Failure modes: below a page that cannot be read nothing is compared.
 */
#include "storefsck_internal.h"

enum { LEAF_BLOCKS = 1 << MP_MAP_LEAF_BITS,
	ADDRESS_SHIFT = MP_ADDRESS_EXTENT_BITS + MP_ADDRESS_BLOCK_BITS };

static uint64_t hash_of(const struct fsck_volume *volume, uint64_t index)
{
	struct { uint8_t id[MP_VOLUME_ID_BYTES]; uint64_t index; } key = {.index = index};

	memcpy(key.id, volume->state.id, sizeof key.id);
	return mp_xxh3(&key, sizeof key);
}

static int is_chosen(const struct mp_fsck *fsck, uint64_t hash)
{
	return hash >= fsck->low && hash <= fsck->high;
}

static struct fsck_leaf *find(const struct mp_fsck *fsck, const struct fsck_volume *volume,
			      uint64_t index)
{
	uint64_t hash = hash_of(volume, index);
	struct fsck_leaf *leaf = fsck->leaves[hash % fsck->leaf_limit];

	while (leaf && (leaf->volume != volume || leaf->index != index))
		leaf = leaf->hash_next;
	return leaf;
}

/* Out of the list of its volume and out of memory, those above high. */
static void drop_above(struct mp_fsck *fsck, struct fsck_volume *volume, uint64_t high)
{
	struct fsck_leaf **link = &volume->leaves;

	while (*link) {
		struct fsck_leaf *leaf = *link, **bucket;

		if (leaf->hash <= high) {
			link = &leaf->volume_next;
			continue;
		}
		bucket = &fsck->leaves[leaf->hash % fsck->leaf_limit];
		while (*bucket != leaf)
			bucket = &(*bucket)->hash_next;
		*bucket = leaf->hash_next;
		*link = leaf->volume_next;
		fsck->leaf_count--;
		free(leaf);
	}
}

static void make_room(struct mp_fsck *fsck)
{
	while (fsck->leaf_count >= fsck->leaf_limit && fsck->low < fsck->high) {
		fsck->high = fsck->low + (fsck->high - fsck->low) / 2;
		for (uint32_t i = 0; i < FSCK_VOLUME_BUCKETS; i++)
			for (struct fsck_volume *each = fsck->volumes[i]; each; each = each->next)
				drop_above(fsck, each, fsck->high);
	}
}

/* NULL: of another pass. */
static struct fsck_leaf *get(struct mp_fsck *fsck, struct fsck_volume *volume, uint64_t index)
{
	uint64_t hash = hash_of(volume, index);
	struct fsck_leaf *leaf, **bucket = &fsck->leaves[hash % fsck->leaf_limit];

	if (!is_chosen(fsck, hash))
		return NULL;
	leaf = find(fsck, volume, index);
	if (leaf)
		return leaf;
	make_room(fsck);
	if (!is_chosen(fsck, hash))
		return NULL;
	leaf = store_allocate(sizeof *leaf);
	leaf->volume = volume;
	leaf->index = index;
	leaf->hash = hash;
	leaf->hash_next = *bucket;
	*bucket = leaf;
	leaf->volume_next = volume->leaves;
	volume->leaves = leaf;
	fsck->leaf_count++;
	return leaf;
}

void fsck_map_begin(struct mp_fsck *fsck)
{
	if (!fsck->leaves) {
		fsck->leaves = store_allocate(fsck->leaf_limit * sizeof(struct fsck_leaf *));
		return;
	}
	fsck->low = fsck->high + 1;
	fsck->high = UINT64_MAX;
}

int fsck_map_more(const struct mp_fsck *fsck)
{
	return fsck->high != UINT64_MAX;
}

void fsck_map_drop(struct mp_fsck *fsck)
{
	for (uint32_t i = 0; fsck->leaves && i < FSCK_VOLUME_BUCKETS; i++)
		for (struct fsck_volume *volume = fsck->volumes[i]; volume; volume = volume->next)
			while (volume->leaves) {
				struct fsck_leaf *next = volume->leaves->volume_next;

				free(volume->leaves);
				volume->leaves = next;
			}
	if (fsck->leaves)
		memset(fsck->leaves, 0, fsck->leaf_limit * sizeof(struct fsck_leaf *));
	fsck->leaf_count = 0;
}

void fsck_map_put(struct mp_fsck *fsck, struct fsck_volume *volume, uint64_t first_block,
		  uint64_t block_count, uint64_t address)
{
	for (uint64_t i = 0; fsck->comparable && i < block_count; i++) {
		uint64_t block = first_block + i;
		struct fsck_leaf *leaf = get(fsck, volume, block / LEAF_BLOCKS);

		if (leaf)
			leaf->addresses[block % LEAF_BLOCKS] = address + i;
	}
}

static void clear_leaf(struct fsck_leaf *leaf, uint64_t first_block, uint64_t end_block)
{
	uint64_t first = leaf->index * LEAF_BLOCKS, end = first + LEAF_BLOCKS;

	if (first_block > first)
		first = first_block;
	if (end_block < end)
		end = end_block;
	if (first < end)
		memset(&leaf->addresses[first % LEAF_BLOCKS], 0,
		       (end - first) * sizeof leaf->addresses[0]);
}

void fsck_map_clear(struct mp_fsck *fsck, struct fsck_volume *volume, uint64_t first_block,
		    uint64_t end_block)
{
	uint64_t first = first_block / LEAF_BLOCKS, last = (end_block - 1) / LEAF_BLOCKS;

	if (!volume->leaves || first_block >= end_block)
		return;
	if (last - first >= fsck->leaf_count) {
		for (struct fsck_leaf *leaf = volume->leaves; leaf; leaf = leaf->volume_next)
			clear_leaf(leaf, first_block, end_block);
		return;
	}
	for (uint64_t index = first; index <= last; index++) {
		struct fsck_leaf *leaf = find(fsck, volume, index);

		if (leaf)
			clear_leaf(leaf, first_block, end_block);
	}
}

/* The mark of an address's extent. NULL: in no segment of the log. */
static uint8_t *mark_of(struct mp_fsck *fsck, uint64_t address, struct fsck_segment **segment)
{
	uint32_t index = address >> MP_ADDRESS_BLOCK_BITS & ((1 << MP_ADDRESS_EXTENT_BITS) - 1);

	*segment = fsck_segment_find(fsck, address >> ADDRESS_SHIFT);
	if (!*segment)
		return NULL;
	fsck_mark(*segment, index, 0);
	return &(*segment)->marks[index];
}

static void refer(struct mp_fsck *fsck, uint64_t address)
{
	struct fsck_segment *segment;
	uint8_t *mark = mark_of(fsck, address, &segment);

	if (mark)
		*mark |= (uint8_t)(1 << (address & (MP_EXTENT_BLOCKS - 1)));
}

/* The place of an address's bytes, as far as it is known. */
static struct fsck_where place_of(struct mp_fsck *fsck, const struct fsck_volume *volume,
				  uint64_t block, uint64_t address)
{
	struct fsck_where where = {volume->state.id, block, 1, address >> ADDRESS_SHIFT, 0};
	uint32_t index = address >> MP_ADDRESS_BLOCK_BITS & ((1 << MP_ADDRESS_EXTENT_BITS) - 1);
	int error;
	const struct mp_extent_entry *entry = fsck_entry(fsck, where.segment, index, &error);

	if (entry)
		where.offset_bytes = entry->offset_bytes;
	return where;
}

/* The map has a hole, the log an address: may the record that made the hole be gone? */
static int may_be_trimmed(struct mp_fsck *fsck, const struct fsck_volume *volume, uint64_t address)
{
	const struct fsck_segment *segment = fsck_segment_find(fsck, address >> ADDRESS_SHIFT);

	return fsck_missing_after(fsck, segment->first_commit) &&
	       volume->gap_commit > segment->first_commit;
}

static void difference(struct mp_fsck *fsck, const struct fsck_volume *volume, uint64_t block,
		       uint64_t mine, uint64_t logged)
{
	struct fsck_segment *segment;
	uint8_t *mark = mine ? mark_of(fsck, mine, &segment) : NULL;
	const char *text = "the map is older than the log";

	if (!mine) {
		if (may_be_trimmed(fsck, volume, logged))
			return;
		text = "the map has a hole where the log has data";
	} else if (!mark) {
		text = "the map points into a segment that is not there";
	} else if (!(*mark & FSCK_MARK_SEEN)) {
		if (segment->damaged && logged < mine) {
			fsck->summary.unproven_blocks++;
			return;
		}
		text = "the map points to an extent that the log does not have";
	}
	fsck_report(fsck, MP_FSCK_MAP, place_of(fsck, volume, block, mine ? mine : logged), "%s",
		    text);
}

static void compare(struct mp_fsck *fsck, const struct fsck_volume *volume, uint64_t first_block,
		    const uint64_t *mine, const struct fsck_leaf *leaf)
{
	for (uint32_t i = 0; i < LEAF_BLOCKS; i++) {
		uint64_t logged = leaf ? leaf->addresses[i] : 0, own = mine ? mine[i] : 0;

		if (own) {
			refer(fsck, own);
			fsck->summary.mapped_blocks++;
		}
		if (own != logged)
			difference(fsck, volume, first_block + i, own, logged);
	}
}

static void compare_leaf(struct mp_fsck *fsck, const struct fsck_tree *tree, uint64_t first_key,
			 const uint8_t *data)
{
	struct fsck_volume *volume = tree->context;
	struct fsck_leaf *leaf;

	if (!is_chosen(fsck, hash_of(volume, first_key / LEAF_BLOCKS)))
		return;
	leaf = find(fsck, volume, first_key / LEAF_BLOCKS);
	if (leaf)
		leaf->compared = 1;
	compare(fsck, volume, first_key, (const uint64_t *)(const void *)data, leaf);
}

/* A volume of the store against its leaves of this pass. */
void fsck_map_compare(struct mp_fsck *fsck, struct store_volume *mine)
{
	struct fsck_volume *volume = fsck_volume_get(fsck, mine->map.volume);
	const struct fsck_tree tree = {.root = mine->map.root, .height = mine->map.height,
				       .leaf_bits = MP_MAP_LEAF_BITS,
				       .volume = mine->map.volume, .leaf = compare_leaf,
				       .context = volume};
	uint64_t bad = fsck->map_pages_bad;

	fsck_walk(fsck, &tree);
	volume->map_damaged |= fsck->map_pages_bad != bad;
	for (struct fsck_leaf *leaf = volume->leaves; leaf; leaf = leaf->volume_next)
		if (!leaf->compared && !volume->map_damaged)
			compare(fsck, volume, leaf->index * LEAF_BLOCKS, NULL, leaf);
}

static void mark_leaf(struct mp_fsck *fsck, const struct fsck_tree *tree, uint64_t first_key,
		      const uint8_t *data)
{
	const uint64_t *addresses = (const uint64_t *)(const void *)data;

	(void)first_key;
	for (uint32_t i = 0; tree->leaf_bits == MP_MAP_LEAF_BITS && i < LEAF_BLOCKS; i++)
		if (addresses[i])
			refer(fsck, addresses[i]);
}

/* What is buried keeps its extents alive until it is emptied. */
void fsck_graves_mark(struct mp_fsck *fsck)
{
	for (struct store_grave *grave = fsck->store->graves; grave; grave = grave->next) {
		const struct fsck_tree tree = {
			.root = grave->root, .height = grave->level, .leaf = mark_leaf,
			.leaf_bits = grave->kind == MP_GRAVE_MAP ? MP_MAP_LEAF_BITS
								 : MP_EXTENT_LEAF_BITS};

		fsck_walk(fsck, &tree);
	}
}
