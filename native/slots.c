/* slots.c - the read cache's table: which blocks are in which slot.
 *
 * Happy path: a seeded hash finds the slot of (origin, slot-sized block); a hit is one saturating
 * increment. A miss reserves a slot (free, or evicted: slots_evict.c), the caller fills it and
 * installs. A slot is at any time in one of three places: never used (index >= fresh; its memory
 * was never touched), on the free list, or in a hash chain. Its frequency is in the slot while it
 * is in a chain, in the sketch otherwise.
 *
 * Failure modes: a pinned slot is never evicted or freed, and no block of it is overwritten while
 * someone may still read or write it. The word of a block that is not valid says why it must wait
 * (enum block_word). Those states end with the slot's last pin, so a fill that failed needs no more
 * than its unpin. A slot with PINS_BUSY pins is reported as a miss, which is always correct for
 * clean data, so the pins cannot overflow.
 */
#include "slots_table.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* KEY_NONE: so far out (beyond 256 TiB at 4 KiB slots) that the key cannot name it; such blocks
 * are never cached. */
static uint64_t key_of(const struct mp_slots *slots, uint32_t origin, uint64_t block)
{
	uint64_t unit = block / slots->slot_blocks;

	assert(origin < ORIGIN_LIMIT);
	return unit >> KEY_UNIT_BITS == 0 ? (uint64_t)origin << KEY_UNIT_BITS | unit : KEY_NONE;
}

static uint32_t *head_of(const struct mp_slots *slots, uint64_t key)
{
	return &slots->heads[(mp_mix(key ^ slots->hash_seed) >> 32) * slots->head_count >> 32];
}

static struct slot *slot_at(const struct mp_slots *slots, int64_t index)
{
	assert(index >= 0 && index < slots->fresh && slot_is_used(&slots->table[index]));
	return &slots->table[index];
}

static unsigned int pins_of(const struct mp_slots *slots, uint32_t index)
{
	const struct pin *pin = slots_pin_of(&slots->pins, index);

	return pin != NULL ? pin->pins : 0;
}

static unsigned int place_of(const struct mp_slots *slots, uint64_t block)
{
	return (unsigned int)(block % slots->slot_blocks);
}

static int is_power_of_two(uint32_t value)
{
	return value != 0 && (value & (value - 1)) == 0;
}

static int allocate(struct mp_slots *slots, uint64_t seed)
{
	uint32_t slot_count = slots->slot_count, slot_blocks = slots->slot_blocks;
	uint64_t block_count = (uint64_t)slot_count * slot_blocks;

	slots->head_count = slot_count / SLOTS_PER_HEAD + 1;
	slots->window_size = (uint32_t)((uint64_t)slot_count * WINDOW_PERCENT / 100);
	if (slots->window_size == 0)
		slots->window_size = 1;
	/* calloc: what is not used yet costs no memory, and every zero means "nothing". */
	slots->table = calloc(slot_count, sizeof(*slots->table));
	slots->blocks = calloc(block_count, sizeof(*slots->blocks));
	slots->heads = malloc(slots->head_count * sizeof(*slots->heads));
	slots->window = calloc(slots->window_size, sizeof(*slots->window));
	slots->sketch = mp_sketch_new(slot_count, mp_mix(seed ^ 2));
	if (slot_blocks > 1)
		slots->visits = calloc(VISITS, sizeof(*slots->visits));
	if (slots->table == NULL || slots->blocks == NULL || slots->heads == NULL ||
	    slots->window == NULL || slots->sketch == NULL || slots_owners_new(slots) < 0 ||
	    slots_pins_new(&slots->pins) < 0 || (slot_blocks > 1 && slots->visits == NULL))
		return -ENOMEM;
	for (uint32_t head = 0; head < slots->head_count; head++)
		slots->heads[head] = SLOT_NONE;
	return 0;
}

struct mp_slots *mp_slots_new(uint32_t slot_count, uint32_t slot_blocks, uint64_t seed)
{
	struct mp_slots *slots;

	/* Links have 31 bits, and SLOT_NONE is one of them. */
	if (slot_count == 0 || slot_count > SLOT_NONE || !is_power_of_two(slot_blocks) ||
	    slot_blocks > MP_SLOT_BLOCKS_MAX) {
		errno = EINVAL;
		return NULL;
	}
	slots = calloc(1, sizeof(*slots));
	if (slots == NULL)
		return NULL;
	slots->slot_count = slot_count;
	slots->slot_blocks = slot_blocks;
	slots->free_head = SLOT_NONE;
	slots->age_cursor = slot_count;
	slots->hash_seed = mp_mix(seed ^ 1);
	slots->random = mp_mix(seed ^ 3);
	if (allocate(slots, seed) < 0) {
		mp_slots_free(slots);
		errno = ENOMEM;
		return NULL;
	}
	return slots;
}

void mp_slots_free(struct mp_slots *slots)
{
	if (slots == NULL)
		return;
	free(slots->table);
	free(slots->blocks);
	free(slots->heads);
	free(slots->window);
	free(slots->visits);
	free(slots->owners);
	free(slots->pins.places);
	mp_sketch_free(slots->sketch);
	free(slots);
}

/* ---- chains and the free list ---- */

uint32_t slots_lookup(const struct mp_slots *slots, uint64_t key)
{
	uint32_t index = *head_of(slots, key);

	while (index != SLOT_NONE && slot_key(&slots->table[index]) != key)
		index = slot_next(&slots->table[index]);
	return index;
}

void slots_occupy(struct mp_slots *slots, uint32_t index, uint64_t key)
{
	struct slot *slot = &slots->table[index];
	uint32_t *head = head_of(slots, key);
	uint64_t word = (key + 1) << FREQUENCY_BITS;

	assert(!slot_is_used(slot) && slots_pin_of(&slots->pins, index) == NULL);
	*slot = (struct slot){ .key_low = (uint32_t)word,
			       .key_high = (uint32_t)(word >> 32),
			       .link = *head };
	slot_set_frequency(slot, mp_sketch_estimate(slots->sketch, key));
	*head = index;
	slots->counters.used_slots++;
	slots_owner(slots, slot_origin(slot))->slots++;
}

static void unchain(struct mp_slots *slots, uint32_t index)
{
	struct slot *slot = &slots->table[index], *before;
	uint32_t *head = head_of(slots, slot_key(slot));

	if (*head == index) {
		*head = slot_next(slot);
		return;
	}
	assert(*head != SLOT_NONE);
	before = &slots->table[*head];
	while (slot_next(before) != index) {
		assert(slot_next(before) != SLOT_NONE);
		before = &slots->table[slot_next(before)];
	}
	slot_set_next(before, slot_next(slot));
}

void slots_vacate(struct mp_slots *slots, uint32_t index)
{
	struct slot *slot = &slots->table[index];
	uint32_t *blocks = slots_blocks(slots, index);

	assert(slot_is_used(slot) && slots_pin_of(&slots->pins, index) == NULL);
	unchain(slots, index);
	for (unsigned int place = 0; place < slots->slot_blocks; place++) {
		slots->counters.valid_blocks -= (uint64_t)block_is_valid(blocks[place]);
		blocks[place] = BLOCK_IDLE;
	}
	slots_owner(slots, slot_origin(slot))->slots--;
	mp_sketch_raise(slots->sketch, slot_key(slot), slot_frequency(slot));
	*slot = (struct slot){ .link = SLOT_NONE };
	slots->counters.used_slots--;
}

void slots_release(struct mp_slots *slots, uint32_t index)
{
	slots_vacate(slots, index);
	slot_set_next(&slots->table[index], slots->free_head);
	slots->free_head = index;
}

void slots_skip_fresh(struct mp_slots *slots, uint32_t first)
{
	while (slots->fresh < first) {
		slots->table[slots->fresh].link = slots->free_head;
		slots->free_head = slots->fresh++;
	}
}

uint32_t slots_take_free(struct mp_slots *slots)
{
	uint32_t index = slots->free_head;

	if (index != SLOT_NONE) {
		slots->free_head = slot_next(&slots->table[index]);
		return index;
	}
	return slots->fresh < slots->slot_count ? slots->fresh++ : SLOT_NONE;
}

/* ---- lookups and accesses ---- */

uint32_t mp_slots_checksum(uint64_t checksum)
{
	uint32_t low = (uint32_t)checksum & ~BLOCK_RESTORED;

	return low < CHECKSUM_LEAST ? CHECKSUM_LEAST : low;
}

uint32_t slots_block_word(uint32_t checksum)
{
	return checksum == 0 ? BLOCK_ZEROES : mp_slots_checksum(checksum);
}

uint32_t slots_block_checksum(uint32_t word)
{
	uint32_t checksum = word & ~BLOCK_RESTORED;

	assert(block_is_valid(word));
	return checksum == BLOCK_ZEROES ? 0 : checksum;
}

int64_t mp_slots_find(const struct mp_slots *slots, uint32_t origin, uint64_t block,
		      uint32_t *checksum, int *restored)
{
	uint32_t index = slots_lookup(slots, key_of(slots, origin, block));
	uint32_t word;

	if (index == SLOT_NONE)
		return -1;
	word = slots_blocks(slots, index)[place_of(slots, block)];
	if (!block_is_valid(word) || pins_of(slots, index) >= PINS_BUSY ||
	    !slots_pins_have_room(&slots->pins))
		return -1;
	*checksum = slots_block_checksum(word);
	*restored = (word & BLOCK_RESTORED) != 0;
	return index;
}

uint32_t mp_slots_stored(const struct mp_slots *slots, uint64_t slot, uint32_t *origin,
			 uint64_t *first_block, uint32_t *checksums)
{
	const struct slot *found = &slots->table[slot];
	const uint32_t *blocks = slots_blocks(slots, slot);
	uint32_t stored = 0;

	assert(slot < slots->fresh);
	if (!slot_is_used(found) || pins_of(slots, (uint32_t)slot) >= PINS_BUSY ||
	    !slots_pins_have_room(&slots->pins))
		return 0;
	*origin = slot_origin(found);
	*first_block = slots_unit(slot_key(found)) * slots->slot_blocks;
	for (unsigned int place = 0; place < slots->slot_blocks; place++) {
		uint32_t word = blocks[place];

		checksums[place] = block_is_valid(word) ? slots_block_checksum(word) : 0;
		stored += checksums[place] != 0;
	}
	return stored;
}

void mp_slots_verified(struct mp_slots *slots, int64_t slot, uint64_t block)
{
	uint32_t *word;

	assert(slot >= 0 && slot < slots->fresh);
	word = &slots_blocks(slots, (uint64_t)slot)[place_of(slots, block)];
	if (block_is_valid(*word)) /* or invalidated while it was read, the slot even released */
		*word &= ~BLOCK_RESTORED;
}

/* A pass over a slot's blocks is one access, or a scan in small requests would look like the
 * hottest slots there are. A pass ends when a block comes again, or when another slot takes its
 * place in this small table. */
static int visit_begins(struct mp_slots *slots, uint64_t key, unsigned int place)
{
	struct visit *visit;
	uint64_t bit = 1ULL << place;

	if (slots->visits == NULL)
		return 1;
	visit = &slots->visits[mp_mix(key ^ ~slots->hash_seed) % VISITS];
	if (visit->key == key && visit->touched != 0 && (visit->touched & bit) == 0) {
		visit->touched |= bit;
		return 0;
	}
	visit->key = key;
	visit->touched = bit;
	return 1;
}

/* Everything fades with the sketch, some slots per access. */
static void halve_some_slots(struct mp_slots *slots)
{
	for (unsigned int n = 0; n < AGE_SLOTS && slots->age_cursor < slots->fresh; n++) {
		struct slot *slot = &slots->table[slots->age_cursor++];

		slot_set_frequency(slot, slot_frequency(slot) / 2);
	}
	if (slots->age_cursor >= slots->fresh)
		slots->age_cursor = slots->slot_count;
}

void mp_slots_touch(struct mp_slots *slots, uint32_t origin, uint64_t block)
{
	uint64_t key = key_of(slots, origin, block), ages = mp_sketch_ages(slots->sketch);
	uint32_t index;

	if (key == KEY_NONE || !visit_begins(slots, key, place_of(slots, block)))
		return;
	index = slots_lookup(slots, key);
	if (index == SLOT_NONE) {
		mp_sketch_count(slots->sketch, key);
	} else {
		struct slot *slot = &slots->table[index];

		mp_sketch_count_elsewhere(slots->sketch);
		slot->key_low += slot_frequency(slot) < FREQUENCY_MAX; /* its low bits */
	}
	if (mp_sketch_ages(slots->sketch) != ages)
		slots->age_cursor = 0;
	if (slots->age_cursor < slots->slot_count)
		halve_some_slots(slots);
}

/* ---- filling ---- */

static int64_t claim(struct mp_slots *slots, uint32_t index, unsigned int place)
{
	uint32_t *word = &slots_blocks(slots, index)[place];

	/* Valid: nothing to fill, and a reader may be under way. Claimed or stale: someone may
	 * be writing. */
	if (*word != BLOCK_IDLE || pins_of(slots, index) >= PINS_BUSY)
		return -1;
	*word = BLOCK_CLAIMED;
	slots_pin_add(&slots->pins, index)->has_fills = 1;
	return index;
}

unsigned int mp_slots_frequency(const struct mp_slots *slots, uint32_t origin, uint64_t block)
{
	uint64_t key = key_of(slots, origin, block);
	uint32_t index = slots_lookup(slots, key);

	return index != SLOT_NONE ? slot_frequency(&slots->table[index])
				  : mp_sketch_estimate(slots->sketch, key);
}

static int is_at_most(struct mp_slots *slots, uint32_t origin)
{
	const struct owner *owner = slots_owner(slots, origin);

	return owner->slots >= owner->most_slots;
}

int64_t mp_slots_reserve(struct mp_slots *slots, uint32_t origin, uint64_t block)
{
	uint64_t key = key_of(slots, origin, block);
	uint32_t index = slots_lookup(slots, key);

	if (key == KEY_NONE || !slots_pins_have_room(&slots->pins))
		return -1;
	if (index != SLOT_NONE)
		return claim(slots, index, place_of(slots, block));
	if (is_at_most(slots, origin)) {
		index = slots_evict_own(slots, origin);
	} else {
		index = slots_take_free(slots);
		if (index == SLOT_NONE)
			index = slots_evict(slots, origin);
	}
	if (index == SLOT_NONE) {
		slots->counters.rejected++;
		return -1;
	}
	slots_occupy(slots, index, key);
	slots_enter_window(slots, index);
	slots->counters.admitted++;
	return claim(slots, index, place_of(slots, block));
}

void mp_slots_install(struct mp_slots *slots, int64_t slot, uint64_t block, uint32_t checksum)
{
	uint64_t unit = slots_unit(slot_key(slot_at(slots, slot)));
	uint32_t *word = &slots_blocks(slots, (uint64_t)slot)[place_of(slots, block)];

	assert(pins_of(slots, (uint32_t)slot) > 0 && unit == block / slots->slot_blocks);
	if (*word == BLOCK_STALE)
		return; /* invalidated since the reserve: the fill is of the past */
	slots->counters.valid_blocks += (uint64_t)!block_is_valid(*word);
	*word = slots_block_word(checksum);
}

void mp_slots_pin(struct mp_slots *slots, int64_t slot)
{
	slot_at(slots, slot);
	slots_pin_add(&slots->pins, (uint32_t)slot);
}

static int has_valid(const struct mp_slots *slots, uint32_t index)
{
	const uint32_t *blocks = slots_blocks(slots, index);

	for (unsigned int place = 0; place < slots->slot_blocks; place++)
		if (block_is_valid(blocks[place]))
			return 1;
	return 0;
}

void mp_slots_unpin(struct mp_slots *slots, int64_t slot)
{
	struct pin *pin;
	uint32_t *blocks;
	int had_fills;

	slot_at(slots, slot);
	pin = slots_pin_of(&slots->pins, (uint32_t)slot);
	assert(pin != NULL);
	if (pin->pins > 1) {
		pin->pins--;
		return;
	}
	had_fills = pin->has_fills;
	slots_pin_remove(&slots->pins, pin);
	if (!had_fills)
		return; /* what it had valid when it was pinned it still has */
	blocks = slots_blocks(slots, (uint64_t)slot);
	for (unsigned int place = 0; place < slots->slot_blocks; place++)
		if (!block_is_valid(blocks[place]))
			blocks[place] = BLOCK_IDLE;
	if (!has_valid(slots, (uint32_t)slot))
		slots_release(slots, (uint32_t)slot);
}

int mp_slots_pins(const struct mp_slots *slots, int64_t slot)
{
	slot_at(slots, slot);
	return (int)pins_of(slots, (uint32_t)slot);
}

/* ---- invalidation ---- */

/* The blocks of this slot that lie in [first_block, end_block) are no longer valid. */
static void invalidate_in_slot(struct mp_slots *slots, uint32_t index, uint64_t first_block,
			       uint64_t end_block)
{
	uint64_t base = slots_unit(slot_key(&slots->table[index])) * slots->slot_blocks;
	struct pin *pin = slots_pin_of(&slots->pins, index);
	uint32_t *blocks = slots_blocks(slots, index);

	for (unsigned int place = 0; place < slots->slot_blocks; place++) {
		if (base + place < first_block || base + place >= end_block)
			continue;
		if (block_is_valid(blocks[place])) {
			slots->counters.valid_blocks--;
			slots->counters.invalidated++;
		}
		/* Valid or not: a fill of this block may be under way. */
		blocks[place] = pin != NULL ? BLOCK_STALE : BLOCK_IDLE;
		if (pin != NULL)
			pin->has_fills = 1;
	}
	if (pin == NULL && !has_valid(slots, index))
		slots_release(slots, index);
}

uint64_t mp_slots_sweep(struct mp_slots *slots, uint32_t origin, uint64_t first_block,
			uint64_t block_count, uint64_t cursor, uint32_t budget)
{
	uint64_t limit = (uint64_t)slots->slot_blocks << KEY_UNIT_BITS; /* no key lies beyond */
	uint64_t end_block = block_count > limit ? limit : block_count;
	uint64_t first_unit, last_unit, steps;
	int by_range;

	assert(budget > 0);
	if (first_block >= limit || block_count == 0)
		return UINT64_MAX;
	end_block = end_block > limit - first_block ? limit : first_block + end_block;
	first_unit = first_block / slots->slot_blocks;
	last_unit = (end_block - 1) / slots->slot_blocks;
	steps = last_unit - first_unit + 1;
	/* By the size of the table, never by what is used now: a cursor must outlive that. */
	by_range = steps <= slots->slot_count;
	if (!by_range)
		steps = slots->fresh; /* it only grows, by what is newer than the sweep */
	for (; cursor < steps && budget > 0; cursor++, budget--) {
		uint32_t index = (uint32_t)cursor;
		uint64_t unit;

		if (by_range) {
			unit = first_unit + cursor;
			unit *= slots->slot_blocks;
			index = slots_lookup(slots, key_of(slots, origin, unit));
			if (index == SLOT_NONE)
				continue;
		}
		if (!slot_is_used(&slots->table[index]) ||
		    slot_origin(&slots->table[index]) != origin)
			continue;
		unit = slots_unit(slot_key(&slots->table[index]));
		if (unit >= first_unit && unit <= last_unit)
			invalidate_in_slot(slots, index, first_block, end_block);
	}
	return cursor < steps ? cursor : UINT64_MAX;
}

void mp_slots_invalidate(struct mp_slots *slots, uint32_t origin, uint64_t first_block,
			 uint64_t block_count)
{
	uint64_t cursor = 0;

	do
		cursor = mp_slots_sweep(slots, origin, first_block, block_count, cursor,
					UINT32_MAX);
	while (cursor != UINT64_MAX);
}

/* ---- figures ---- */

void mp_slots_counters(const struct mp_slots *slots, struct mp_slots_counters *out)
{
	*out = slots->counters;
	out->ages = mp_sketch_ages(slots->sketch);
}

uint64_t mp_slots_memory_bytes(const struct mp_slots *slots)
{
	uint64_t count = slots->slot_count;

	return sizeof(*slots) + count * sizeof(*slots->table) +
	       count * slots->slot_blocks * sizeof(*slots->blocks) +
	       slots->head_count * sizeof(*slots->heads) +
	       slots->window_size * sizeof(*slots->window) +
	       (slots->owner_mask + 1ULL) * sizeof(*slots->owners) +
	       (slots->pins.mask + 1ULL) * sizeof(*slots->pins.places) +
	       (slots->visits != NULL ? VISITS * sizeof(struct visit) : 0) +
	       mp_sketch_memory_bytes(slots->sketch);
}
