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

static void set_in_window(struct slot *slot, int on)
{
	slot->link = on ? slot->link | LINK_WINDOW : slot->link & ~LINK_WINDOW;
}

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
		set_in_window(&slots->table[pop_window(slots)], 0);
	set_in_window(&slots->table[index], 1);
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
		if (!slot_is_in_window(&slots->table[index]))
			continue;
		if (slots_is_protected(slots, index, origin)) {
			set_in_window(&slots->table[index], 0);
			continue;
		}
		if (slots_pin_of(&slots->pins, index) == NULL)
			return index;
		push_window(slots, index);
	}
	return SLOT_NONE;
}

/* The better of two victims: what is used less, then the earlier. */
static uint32_t least(const struct mp_slots *slots, uint32_t victim, uint32_t index)
{
	return victim == SLOT_NONE || slot_frequency(&slots->table[index]) <
					      slot_frequency(&slots->table[victim])
		       ? index
		       : victim;
}

/* The least frequent of the next CLOCK_CHOICE slots outside the window that could go. */
static uint32_t clock_victim(struct mp_slots *slots, uint32_t origin)
{
	uint32_t victim = SLOT_NONE;

	for (unsigned int look = 0, met = 0; look < CLOCK_LOOKS && met < CLOCK_CHOICE; look++) {
		uint32_t index = slots->hand;
		const struct slot *slot = &slots->table[index];

		slots->hand = index + 1 == slots->slot_count ? 0 : index + 1;
		slots->counters.looks++;
		if (!slot_is_used(slot) || slot_is_in_window(slot) ||
		    slots_pin_of(&slots->pins, index) != NULL ||
		    slots_is_protected(slots, index, origin))
			continue;
		met++;
		victim = least(slots, victim, index);
		if (slot_frequency(&slots->table[victim]) == 0)
			break;
	}
	return victim;
}

static int candidate_wins(struct mp_slots *slots, uint32_t candidate, uint32_t victim)
{
	return mp_duel(slot_frequency(&slots->table[candidate]),
		       slot_frequency(&slots->table[victim]), &slots->random);
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
		set_in_window(&slots->table[candidate], 0);
		if (victim == SLOT_NONE || !candidate_wins(slots, candidate, victim))
			victim = candidate;
	}
	if (victim == SLOT_NONE)
		return SLOT_NONE;
	slots_vacate(slots, victim);
	slots->counters.evictions++;
	return victim;
}

/* An origin at its maximum makes room among its own: a clock of its own that passes over what
 * others hold. Where it meets none within its looks, the newcomer is not admitted: the smaller a
 * share, the more it takes to get in. */
uint32_t slots_evict_own(struct mp_slots *slots, uint32_t origin)
{
	struct owner *owner = slots_owner(slots, origin);
	uint32_t victim = SLOT_NONE;

	for (unsigned int look = 0, met = 0; look < CLOCK_LOOKS && met < CLOCK_CHOICE; look++) {
		uint32_t index = owner->hand;
		const struct slot *slot = &slots->table[index];

		owner->hand = index + 1 >= slots->fresh ? 0 : index + 1;
		slots->counters.looks++;
		if (!slot_is_used(slot) || slot_origin(slot) != origin ||
		    slots_pin_of(&slots->pins, index) != NULL)
			continue;
		met++;
		victim = least(slots, victim, index);
	}
	if (victim == SLOT_NONE)
		return SLOT_NONE;
	slots_vacate(slots, victim);
	slots->counters.evictions++;
	return victim;
}
