/* slots_evict.c - which slot makes room: a small first-in-first-out window, CLOCK, and a duel
 * between the two.
 *
 * Happy path: what is new enters the window. What leaves the window, oldest first, duels by
 * frequency with the victim that CLOCK proposes among the other slots; the loser's slot is given to
 * what is new. So a scan passes through the window and leaves the hot set alone, and what is used
 * again soon is still there. No data moves: being in the window is a flag and an entry in a ring.
 *
 * Failure modes: a ring entry whose slot was invalidated meanwhile is dropped when it is met (if
 * the slot came back into the window, its older entry merely makes it leave earlier). Where
 * everything looked at is pinned, nothing is evicted. Both looks are bounded: O(1) whatever the
 * table looks like.
 *
 */
#include "slots_table.h"

#include <assert.h>

static uint32_t pop_window(struct mp_slots *slots)
{
	uint32_t index = slots->window[slots->window_head];

	assert(slots->window_used > 0);
	slots->window_head = (slots->window_head + 1) % slots->window_size;
	slots->window_used--;
	return index;
}

static void push_window(struct mp_slots *slots, uint32_t index)
{
	assert(slots->window_used < slots->window_size);
	slots->window[(slots->window_head + slots->window_used) % slots->window_size] = index;
	slots->window_used++;
}

void slots_enter_window(struct mp_slots *slots, uint32_t index)
{
	/* Full only while free slots exist: the oldest joins the others without a duel, nobody
	 * has to go. */
	if (slots->window_used == slots->window_size)
		slot_flag(&slots->table[pop_window(slots)], SLOT_WINDOW, 0);
	slot_flag(&slots->table[index], SLOT_WINDOW, 1);
	push_window(slots, index);
}

/* The oldest of a full window that can go. SLOT_NONE and *is_full 0: there is room for one more.
 * What a minimum protects leaves the window without a duel. */
static uint32_t window_candidate(struct mp_slots *slots, uint32_t origin, int *is_full)
{
	for (unsigned int look = 0; look < WINDOW_LOOKS; look++) {
		uint32_t index;

		*is_full = slots->window_used == slots->window_size;
		if (!*is_full)
			return SLOT_NONE;
		index = pop_window(slots);
		slots->counters.looks++;
		if (!slot_is(&slots->table[index], SLOT_WINDOW))
			continue;
		if (slots_is_protected(slots, index, origin)) {
			slot_flag(&slots->table[index], SLOT_WINDOW, 0);
			continue;
		}
		if (slots->table[index].pins == 0)
			return index;
		push_window(slots, index);
	}
	return SLOT_NONE;
}

/* The first slot outside the window without heat and pins; else the coolest seen. Each look
 * cools by one. */
static uint32_t clock_victim(struct mp_slots *slots, uint32_t origin)
{
	uint32_t coolest = SLOT_NONE;
	unsigned int coolest_heat = HEAT_MAX + 1;

	for (unsigned int look = 0; look < CLOCK_LOOKS; look++) {
		uint32_t index = slots->hand;
		struct slot *slot = &slots->table[index];
		unsigned int heat = slot_heat(slot);

		slots->hand = index + 1 == slots->slot_count ? 0 : index + 1;
		slots->counters.looks++;
		if (!slot_is(slot, SLOT_USED) || slot_is(slot, SLOT_WINDOW) || slot->pins > 0 ||
		    slots_is_protected(slots, index, origin))
			continue;
		if (heat == 0)
			return index;
		slot->heat_flags--; /* heat is the low bits and above zero */
		if (heat < coolest_heat) {
			coolest_heat = heat;
			coolest = index;
		}
	}
	return coolest;
}

static int candidate_wins(struct mp_slots *slots, uint32_t candidate, uint32_t victim)
{
	return mp_duel(mp_sketch_estimate(slots->sketch, slots->table[candidate].key),
		       mp_sketch_estimate(slots->sketch, slots->table[victim].key), &slots->random);
}

uint32_t slots_evict(struct mp_slots *slots, uint32_t origin)
{
	int is_full = 0;
	uint32_t candidate = window_candidate(slots, origin, &is_full);
	uint32_t victim = SLOT_NONE;

	if (candidate != SLOT_NONE || !is_full)
		victim = clock_victim(slots, origin);
	if (candidate != SLOT_NONE) {
		/* Either way it has left the ring. */
		slot_flag(&slots->table[candidate], SLOT_WINDOW, 0);
		if (victim == SLOT_NONE || !candidate_wins(slots, candidate, victim))
			victim = candidate;
	}
	if (victim == SLOT_NONE)
		return SLOT_NONE;
	slots_vacate(slots, victim);
	slots->counters.evictions++;
	return victim;
}

/* An origin at its maximum makes room among its own: a clock of its own that passes over, and does
 * not cool, what others hold. Where it meets none within its looks, the newcomer is not admitted:
 * the smaller a share, the more it takes to get in. */
uint32_t slots_evict_own(struct mp_slots *slots, uint32_t origin)
{
	struct owner *owner = slots_owner(slots, origin);
	uint32_t coolest = SLOT_NONE;
	unsigned int coolest_heat = HEAT_MAX + 1;

	for (unsigned int look = 0; look < CLOCK_LOOKS && coolest_heat > 0; look++) {
		uint32_t index = owner->hand;
		struct slot *slot = &slots->table[index];

		owner->hand = index + 1 >= slots->fresh ? 0 : index + 1;
		slots->counters.looks++;
		if (!slot_is(slot, SLOT_USED) || slot->pins > 0 ||
		    slot->key >> KEY_UNIT_BITS != origin)
			continue;
		if (slot_heat(slot) < coolest_heat) {
			coolest_heat = slot_heat(slot);
			coolest = index;
		}
		if (slot_heat(slot) > 0)
			slot->heat_flags--;
	}
	if (coolest == SLOT_NONE)
		return SLOT_NONE;
	slots_vacate(slots, coolest);
	slots->counters.evictions++;
	return coolest;
}
