/* slots.c - the read cache's table: which blocks are in which slot.
 *
 * Happy path: a seeded hash finds the slot of (origin, slot-sized block); a hit is one saturating
 * increment. A miss reserves a slot (free, or evicted: slots_evict.c), the caller fills it and
 * installs. A slot is at any time in one of three places: never used (index >= fresh; its memory
 * was never touched), on the free list, or in a hash chain.
 *
 * Failure modes: a pinned slot is never evicted or freed, and no block of it is overwritten while
 * someone may still read or write it. The checksum's place of a block that is not valid says why it
 * must wait (enum fill). Those states end with the slot's last pin, so a fill that failed needs no
 * more than its unpin. A slot with PINS_BUSY pins is reported as a miss, which is always correct
 * for clean data, so the pins cannot overflow.
 */
#include "slots_table.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum fill {
	FILL_IDLE = 0,
	FILL_CLAIMED = 1, /* reserved: a second reserve is refused until the slot's pins are gone */
	FILL_STALE = 2,   /* invalidated under pins: what is being filled is not installed */
};

/* KEY_NONE: so far out (beyond 4 PiB at 4 KiB slots) that the key cannot name it; such blocks
 * are never cached. */
static uint64_t key_of(const struct mp_slots *slots, uint32_t origin, uint64_t block)
{
	uint64_t unit = block / slots->slot_blocks;

	assert(origin < ORIGIN_LIMIT);
	return unit >> KEY_UNIT_BITS == 0 ? (uint64_t)origin << KEY_UNIT_BITS | unit : KEY_NONE;
}

static uint32_t *head_of(const struct mp_slots *slots, uint64_t key)
{
	return &slots->heads[mp_mix(key ^ slots->hash_seed) & slots->head_mask];
}

static struct slot *slot_at(const struct mp_slots *slots, int64_t index)
{
	assert(index >= 0 && index < slots->fresh && slot_is(&slots->table[index], SLOT_USED));
	return &slots->table[index];
}

static uint64_t checksum_index(const struct mp_slots *slots, uint64_t index, unsigned int place)
{
	return index * slots->slot_blocks + place;
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
	uint64_t head_count = 1;

	while (head_count * 2 <= slot_count)
		head_count *= 2;
	slots->head_mask = (uint32_t)(head_count - 1);
	slots->window_size = (uint32_t)((uint64_t)slot_count * WINDOW_PERCENT / 100);
	if (slots->window_size == 0)
		slots->window_size = 1;
	/* calloc: what is not used yet costs no memory, and every zero means "nothing". */
	slots->table = calloc(slot_count, sizeof(*slots->table));
	slots->checksums = calloc(block_count, sizeof(*slots->checksums));
	slots->restored = calloc(slots_restored_bytes(slot_count, slot_blocks), 1);
	slots->heads = malloc(head_count * sizeof(*slots->heads));
	slots->window = calloc(slots->window_size, sizeof(*slots->window));
	slots->sketch = mp_sketch_new(slot_count, mp_mix(seed ^ 2));
	if (slot_blocks > 1)
		slots->visits = calloc(VISITS, sizeof(*slots->visits));
	if (slots->table == NULL || slots->checksums == NULL || slots->restored == NULL ||
	    slots->heads == NULL || slots->window == NULL || slots->sketch == NULL ||
	    slots_owners_new(slots) < 0 || (slot_blocks > 1 && slots->visits == NULL))
		return -ENOMEM;
	memset(slots->heads, 0xff, head_count * sizeof(*slots->heads));
	return 0;
}

struct mp_slots *mp_slots_new(uint32_t slot_count, uint32_t slot_blocks, uint64_t seed)
{
	struct mp_slots *slots;

	/* The last index would collide with SLOT_NONE. */
	if (slot_count == 0 || slot_count == SLOT_NONE || !is_power_of_two(slot_blocks) ||
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
	free(slots->checksums);
	free(slots->restored);
	free(slots->heads);
	free(slots->window);
	free(slots->visits);
	free(slots->owners);
	mp_sketch_free(slots->sketch);
	free(slots);
}

/* ---- chains and the free list ---- */

uint32_t slots_lookup(const struct mp_slots *slots, uint64_t key)
{
	uint32_t index = *head_of(slots, key);

	while (index != SLOT_NONE && slots->table[index].key != key)
		index = slots->table[index].next;
	return index;
}

void slots_occupy(struct mp_slots *slots, uint32_t index, uint64_t key)
{
	struct slot *slot = &slots->table[index];
	uint32_t *head = head_of(slots, key);

	assert(!slot_is(slot, SLOT_USED) && slot->valid == 0 && slot->pins == 0);
	*slot = (struct slot){ .key = key, .next = *head };
	slot_flag(slot, SLOT_USED, 1);
	*head = index;
	slots->counters.used_slots++;
	slots_owner(slots, (uint32_t)(key >> KEY_UNIT_BITS))->slots++;
}

void slots_set_restored(struct mp_slots *slots, uint64_t at, int on)
{
	uint8_t bit = (uint8_t)(1U << at % 8);
	uint8_t *byte = &slots->restored[at / 8];

	if (((*byte & bit) != 0) != on) /* an unused page of the bitmap stays unbacked */
		*byte ^= bit;
}

void slots_vacate(struct mp_slots *slots, uint32_t index)
{
	struct slot *slot = &slots->table[index];
	uint32_t *link = head_of(slots, slot->key);

	assert(slot_is(slot, SLOT_USED) && slot->pins == 0 && !slot_is(slot, SLOT_CLAIMED));
	while (*link != index) {
		assert(*link != SLOT_NONE);
		link = &slots->table[*link].next;
	}
	*link = slot->next;
	for (unsigned int place = 0; place < slots->slot_blocks; place++) {
		uint64_t at = checksum_index(slots, index, place);

		slots->counters.valid_blocks -= slot->valid >> place & 1U;
		slots->checksums[at] = FILL_IDLE;
		slots_set_restored(slots, at, 0);
	}
	slots_owner(slots, (uint32_t)(slot->key >> KEY_UNIT_BITS))->slots--;
	*slot = (struct slot){ .next = SLOT_NONE };
	slots->counters.used_slots--;
}

void slots_release(struct mp_slots *slots, uint32_t index)
{
	slots_vacate(slots, index);
	slots->table[index].next = slots->free_head;
	slots->free_head = index;
}

void slots_skip_fresh(struct mp_slots *slots, uint32_t first)
{
	while (slots->fresh < first) {
		slots->table[slots->fresh].next = slots->free_head;
		slots->free_head = slots->fresh++;
	}
}

uint32_t slots_take_free(struct mp_slots *slots)
{
	uint32_t index = slots->free_head;

	if (index != SLOT_NONE) {
		slots->free_head = slots->table[index].next;
		return index;
	}
	return slots->fresh < slots->slot_count ? slots->fresh++ : SLOT_NONE;
}

/* ---- lookups and accesses ---- */

int64_t mp_slots_find(const struct mp_slots *slots, uint32_t origin, uint64_t block,
		      uint32_t *checksum, int *restored)
{
	uint32_t index = slots_lookup(slots, key_of(slots, origin, block));
	unsigned int place = place_of(slots, block);
	uint64_t at;

	if (index == SLOT_NONE)
		return -1;
	if ((slots->table[index].valid >> place & 1U) == 0 || slots->table[index].pins >= PINS_BUSY)
		return -1;
	at = checksum_index(slots, index, place);
	*checksum = slots->checksums[at];
	*restored = slots->restored[at / 8] >> at % 8 & 1;
	return index;
}

void mp_slots_verified(struct mp_slots *slots, int64_t slot, uint64_t block)
{
	slot_at(slots, slot);
	slots_set_restored(slots, checksum_index(slots, (uint64_t)slot, place_of(slots, block)), 0);
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

void mp_slots_touch(struct mp_slots *slots, uint32_t origin, uint64_t block)
{
	uint64_t key = key_of(slots, origin, block);
	uint32_t index;

	if (key == KEY_NONE || !visit_begins(slots, key, place_of(slots, block)))
		return;
	mp_sketch_count(slots->sketch, key);
	index = slots_lookup(slots, key);
	if (index != SLOT_NONE && slot_heat(&slots->table[index]) < HEAT_MAX)
		slots->table[index].heat_flags++; /* heat is the low bits and below its maximum */
}

/* ---- filling ---- */

static int64_t claim(struct mp_slots *slots, uint32_t index, unsigned int place)
{
	struct slot *slot = &slots->table[index];
	uint64_t at = checksum_index(slots, index, place);

	/* Valid: nothing to fill, and a reader may be under way. Claimed or stale: someone may
	 * be writing. */
	if ((slot->valid >> place & 1U) != 0 || slots->checksums[at] != FILL_IDLE)
		return -1;
	if (slot->pins >= PINS_BUSY)
		return -1;
	slots->checksums[at] = FILL_CLAIMED;
	slot_flag(slot, SLOT_CLAIMED, 1);
	slot->pins++;
	return index;
}

unsigned int mp_slots_frequency(const struct mp_slots *slots, uint32_t origin, uint64_t block)
{
	return mp_sketch_estimate(slots->sketch, key_of(slots, origin, block));
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

	if (key == KEY_NONE)
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
	struct slot *entry = slot_at(slots, slot);
	unsigned int place = place_of(slots, block);
	uint64_t at = checksum_index(slots, (uint64_t)slot, place);
	uint64_t unit = slots_unit(entry->key);

	assert(entry->pins > 0 && unit == block / slots->slot_blocks);
	if ((entry->valid >> place & 1U) == 0) {
		if (slots->checksums[at] == FILL_STALE)
			return; /* invalidated since the reserve: the fill is of the past */
		entry->valid = (uint16_t)(entry->valid | 1U << place);
		slots->counters.valid_blocks++;
	}
	slots->checksums[at] = checksum;
	slots_set_restored(slots, at, 0);
}

void mp_slots_pin(struct mp_slots *slots, int64_t slot)
{
	struct slot *entry = slot_at(slots, slot);

	assert(entry->pins < UINT8_MAX);
	entry->pins++;
}

void mp_slots_unpin(struct mp_slots *slots, int64_t slot)
{
	struct slot *entry = slot_at(slots, slot);

	assert(entry->pins > 0);
	if (--entry->pins > 0)
		return;
	if (slot_is(entry, SLOT_CLAIMED)) {
		uint64_t at = checksum_index(slots, (uint64_t)slot, 0);

		for (unsigned int place = 0; place < slots->slot_blocks; place++)
			if ((entry->valid >> place & 1U) == 0)
				slots->checksums[at + place] = FILL_IDLE;
		slot_flag(entry, SLOT_CLAIMED, 0);
	}
	if (entry->valid == 0)
		slots_release(slots, (uint32_t)slot);
}

int mp_slots_pins(const struct mp_slots *slots, int64_t slot)
{
	return slot_at(slots, slot)->pins;
}

/* ---- invalidation ---- */

/* The blocks of this slot that lie in [first_block, end_block) are no longer valid. */
static void invalidate_in_slot(struct mp_slots *slots, uint32_t index, uint64_t first_block,
			       uint64_t end_block)
{
	struct slot *slot = &slots->table[index];
	uint64_t base = slots_unit(slot->key) * slots->slot_blocks;

	for (unsigned int place = 0; place < slots->slot_blocks; place++) {
		uint64_t at = checksum_index(slots, index, place);
		uint16_t bit = (uint16_t)(1U << place);

		if (base + place < first_block || base + place >= end_block)
			continue;
		if ((slot->valid & bit) != 0) {
			slot->valid = (uint16_t)(slot->valid & ~bit);
			slots->counters.valid_blocks--;
			slots->counters.invalidated++;
			slots_set_restored(slots, at, 0);
		}
		/* Valid or not: a fill of this block may be under way. */
		slots->checksums[at] = slot->pins > 0 ? FILL_STALE : FILL_IDLE;
		if (slot->pins > 0)
			slot_flag(slot, SLOT_CLAIMED, 1);
	}
	if (slot->valid == 0 && slot->pins == 0)
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
		if (!slot_is(&slots->table[index], SLOT_USED) ||
		    slots->table[index].key >> KEY_UNIT_BITS != origin)
			continue;
		unit = slots_unit(slots->table[index].key);
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
	       count * slots->slot_blocks * sizeof(*slots->checksums) +
	       slots_restored_bytes(count, slots->slot_blocks) +
	       (slots->head_mask + 1ULL) * sizeof(*slots->heads) +
	       slots->window_size * sizeof(*slots->window) +
	       (slots->owner_mask + 1ULL) * sizeof(*slots->owners) +
	       (slots->visits != NULL ? VISITS * sizeof(struct visit) : 0) +
	       mp_sketch_memory_bytes(slots->sketch);
}
