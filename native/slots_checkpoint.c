/* slots_checkpoint.c - the table as checkpoint entries and back.
 *
 * Happy path: an entry is struct mp_slot_entry and one checksum per block, index by index, so that
 * the place on the device is the place in the checkpoint. The heat byte holds the slot's 2-bit
 * counter (bits 0 and 1) and the sketch's estimate (bits 4 to 7): losing the frequencies at a
 * restart costs nearly as much as losing the data.
 *
 * Failure modes: what is being filled is not valid, so it is not saved. The checkpoint as a whole
 * is checked by its reader; an entry that makes no sense all the same (a reserved bit, a key twice)
 * is skipped: a free slot is a miss, never wrong data. A loaded block may have been overwritten
 * after the checkpoint: it is marked restored.
 *
 */
#include "slots_table.h"

#include <assert.h>
#include <string.h>

enum { HEAT_BITS = 0xf3, FREQUENCY_SHIFT = 4 };

uint64_t mp_slots_entry_bytes(const struct mp_slots *slots)
{
	return sizeof(struct mp_slot_entry) + slots->slot_blocks * sizeof(uint32_t);
}

void mp_slots_save(const struct mp_slots *slots, uint64_t first, uint64_t count, void *out)
{
	uint64_t entry_bytes = mp_slots_entry_bytes(slots);
	uint8_t *to = out;

	assert(first <= slots->slot_count && count <= slots->slot_count - first);
	memset(out, 0, count * entry_bytes);
	for (uint64_t index = first; index < first + count; index++, to += entry_bytes) {
		const struct slot *slot = &slots->table[index];
		struct mp_slot_entry entry = { .key = slot->key, .valid = slot->valid };
		uint64_t at = index * slots->slot_blocks;
		unsigned int frequency;

		if (slot->valid == 0)
			continue;
		frequency = mp_sketch_estimate(slots->sketch, slot->key);
		entry.heat = (uint8_t)(slot_heat(slot) | frequency << FREQUENCY_SHIFT);
		memcpy(to, &entry, sizeof(entry));
		for (unsigned int place = 0; place < slots->slot_blocks; place++)
			if ((slot->valid >> place & 1U) != 0)
				memcpy(to + sizeof(entry) + place * sizeof(uint32_t),
				       &slots->checksums[at + place], sizeof(uint32_t));
	}
}

static int is_sound(const struct mp_slots *slots, const struct mp_slot_entry *entry)
{
	return entry->valid != 0 && entry->valid >> slots->slot_blocks == 0 &&
	       entry->reserved0 == 0 && entry->reserved1 == 0 && (entry->heat & ~HEAT_BITS) == 0 &&
	       slots_is_key(entry->key) && slots_lookup(slots, entry->key) == SLOT_NONE;
}

void mp_slots_load(struct mp_slots *slots, uint64_t first, uint64_t count, const void *in)
{
	uint64_t entry_bytes = mp_slots_entry_bytes(slots);
	const uint8_t *from = in;

	assert(first >= slots->fresh && first <= slots->slot_count);
	assert(count <= slots->slot_count - first);
	for (uint64_t index = first; index < first + count; index++, from += entry_bytes) {
		struct slot *slot = &slots->table[index];
		struct mp_slot_entry entry;
		unsigned int frequency;

		memcpy(&entry, from, sizeof(entry));
		if (!is_sound(slots, &entry))
			continue;
		slots_skip_fresh(slots, (uint32_t)index);
		slots->fresh = (uint32_t)index + 1;
		slots_occupy(slots, (uint32_t)index, entry.key);
		slot->valid = entry.valid;
		slot->heat_flags = (uint8_t)(slot->heat_flags | (entry.heat & HEAT_MAX));
		for (unsigned int place = 0; place < slots->slot_blocks; place++) {
			uint64_t at = index * slots->slot_blocks + place;

			if ((slot->valid >> place & 1U) == 0)
				continue;
			memcpy(&slots->checksums[at],
			       from + sizeof(entry) + place * sizeof(uint32_t), sizeof(uint32_t));
			slots_set_restored(slots, at, 1);
			slots->counters.valid_blocks++;
		}
		/* Never start with a sketch that knows less than who is here: any newcomer would
		 * win. */
		frequency = entry.heat >> FREQUENCY_SHIFT;
		mp_sketch_raise(slots->sketch, entry.key, frequency > 0 ? frequency : 1);
	}
}
