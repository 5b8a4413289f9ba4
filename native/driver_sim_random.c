/* driver_sim_random.c - the simulator's chance (xoshiro256**, seeded by splitmix64).
 *
 * Same seed, generation and stream: same numbers, on every machine. Separate streams, so that
 * one more random_bytes of the core does not change which write a crash loses.
 */
#include <stdlib.h>

#include "driver_sim_private.h"

static uint64_t splitmix(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15u;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

static uint64_t rotate_left(uint64_t value, int bits)
{
	return value << bits | value >> (64 - bits);
}

void mp_sim_random_seed(struct mp_sim_random *random, uint64_t seed, uint64_t generation,
			uint64_t stream)
{
	uint64_t state = seed;

	state = splitmix(&state) ^ generation;
	state = splitmix(&state) ^ stream;
	for (int i = 0; i < 4; i++)
		random->state[i] = splitmix(&state);
}

uint64_t mp_sim_random_next(struct mp_sim_random *random)
{
	uint64_t *s = random->state;
	uint64_t result = rotate_left(s[1] * 5, 7) * 9, shifted = s[1] << 17;

	s[2] ^= s[0];
	s[3] ^= s[1];
	s[1] ^= s[2];
	s[0] ^= s[3];
	s[2] ^= shifted;
	s[3] = rotate_left(s[3], 45);
	return result;
}

/* The bias of the remainder (below 2^-40 for the bounds used here) does not matter to a test. */
uint64_t mp_sim_random_below(struct mp_sim_random *random, uint64_t bound)
{
	assert(bound > 0);
	return mp_sim_random_next(random) % bound;
}

/* Doubling growth; elements are moved, new ones are not initialised. */
void *mp_sim_grow(void *array, uint64_t *capacity, uint64_t needed, uint64_t element_bytes)
{
	if (needed <= *capacity)
		return array;
	uint64_t larger = *capacity ? *capacity : 8;
	while (larger < needed)
		larger *= 2;
	array = realloc(array, larger * element_bytes);
	assert(array);
	*capacity = larger;
	return array;
}
