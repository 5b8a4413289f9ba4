/* slots_checkpoint.c - the table as checkpoint entries and back.
 *
 * Happy path: an entry is struct mp_slot_entry and one checksum per block, index by index, so that
 * the place on the device is the place in the checkpoint. The heat byte holds the slot's frequency
 * (bits 4 to 7; bits 0 and 1, at most 3, once were a counter of its own): losing the frequencies at
 * a restart costs nearly as much as losing the data.
 *
 * Failure modes: what is being filled is not valid, so it is not saved. The checkpoint as a whole
 * is checked by its reader; an entry that makes no sense all the same (a reserved bit, a key twice
 * or beyond what a slot's key can name) is skipped: a free slot is a miss, never wrong data. A
 * loaded block may have been overwritten after the checkpoint: it is marked restored.
 *
 */
#include "slots_table.h"

#include <assert.h>
#include <string.h>

enum { HEAT_BITS = 0xf3, HEAT_MAX = 3, FREQUENCY_SHIFT = 4 };
enum { ENTRY_UNIT_BITS = 40 }; /* of an entry's key; a slot's has KEY_UNIT_BITS */

uint64_t mp_slots_entry_bytes(const struct mp_slots *slots)
{
	return sizeof(struct mp_slot_entry) + slots->slot_blocks * sizeof(uint32_t);
}

static uint64_t key_of_entry(uint64_t entry_key)
{
	uint64_t origin = entry_key >> ENTRY_UNIT_BITS;
	uint64_t unit = entry_key & ((1ULL << ENTRY_UNIT_BITS) - 1);

	return origin < ORIGIN_LIMIT && unit >> KEY_UNIT_BITS == 0 ? origin << KEY_UNIT_BITS | unit
								   : KEY_NONE;
}

/* The entry of a slot, and its checksums behind it. */
static void save_slot(const struct mp_slots *slots, uint64_t index, uint8_t *to)
{
	const struct slot *slot = &slots->table[index];
	const uint32_t *blocks = slots_blocks(slots, index);
	unsigned int frequency = slot_frequency(slot);
	struct mp_slot_entry entry = { 0 };

	for (unsigned int place = 0; place < slots->slot_blocks; place++) {
		uint32_t checksum;

		if (!block_is_valid(blocks[place]))
			continue;
		entry.valid = (uint16_t)(entry.valid | 1U << place);
		checksum = slots_block_checksum(blocks[place]);
		memcpy(to + sizeof(entry) + place * sizeof(checksum), &checksum, sizeof(checksum));
	}
	if (entry.valid == 0)
		return;
	entry.key = (uint64_t)slot_origin(slot) << ENTRY_UNIT_BITS | slots_unit(slot_key(slot));
	entry.heat = (uint8_t)((frequency < HEAT_MAX ? frequency : HEAT_MAX) |
			       frequency << FREQUENCY_SHIFT);
	memcpy(to, &entry, sizeof(entry));
}

uint64_t mp_slots_fresh(const struct mp_slots *slots)
{
	return slots->fresh;
}

void mp_slots_save(const struct mp_slots *slots, uint64_t first, uint64_t count, void *out)
{
	uint64_t entry_bytes = mp_slots_entry_bytes(slots);
	uint8_t *to = out;

	assert(first <= slots->slot_count && count <= slots->slot_count - first);
	memset(out, 0, count * entry_bytes);
	for (uint64_t index = first; index < first + count && index < slots->fresh; index++) {
		save_slot(slots, index, to);
		to += entry_bytes;
	}
}

static int is_sound(const struct mp_slots *slots, const struct mp_slot_entry *entry)
{
	uint64_t key = key_of_entry(entry->key);

	return entry->valid != 0 && entry->valid >> slots->slot_blocks == 0 &&
	       entry->reserved0 == 0 && entry->reserved1 == 0 && (entry->heat & ~HEAT_BITS) == 0 &&
	       key != KEY_NONE && slots_lookup(slots, key) == SLOT_NONE;
}

static void load_slot(struct mp_slots *slots, uint32_t index, const struct mp_slot_entry *entry,
		      const uint8_t *checksums)
{
	unsigned int frequency = entry->heat >> FREQUENCY_SHIFT;
	uint32_t *blocks = slots_blocks(slots, index);

	slots_occupy(slots, index, key_of_entry(entry->key));
	/* Never 0, or any newcomer would win. */
	slot_set_frequency(&slots->table[index], frequency > 0 ? frequency : 1);
	for (unsigned int place = 0; place < slots->slot_blocks; place++) {
		uint32_t checksum;

		if ((entry->valid >> place & 1U) == 0)
			continue;
		memcpy(&checksum, checksums + place * sizeof(checksum), sizeof(checksum));
		blocks[place] = slots_block_word(checksum) | BLOCK_RESTORED;
		slots->counters.valid_blocks++;
	}
}

void mp_slots_load(struct mp_slots *slots, uint64_t first, uint64_t count, const void *in)
{
	uint64_t entry_bytes = mp_slots_entry_bytes(slots);
	const uint8_t *from = in;

	assert(first >= slots->fresh && first <= slots->slot_count);
	assert(count <= slots->slot_count - first);
	for (uint64_t index = first; index < first + count; index++, from += entry_bytes) {
		struct mp_slot_entry entry;

		memcpy(&entry, from, sizeof(entry));
		if (!is_sound(slots, &entry))
			continue;
		slots_skip_fresh(slots, (uint32_t)index);
		slots->fresh = (uint32_t)index + 1;
		load_slot(slots, (uint32_t)index, &entry, from + sizeof(entry));
	}
}
