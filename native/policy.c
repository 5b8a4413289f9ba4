/* policy.c - the counting sketch and the admission duel.
 *
 * Happy path: an access increments the smaller of a key's two counters (conservative update); the
 * estimate is their minimum. After PERIODS x capacity accesses every counter is halved, AGE_LINES
 * lines per following access, so that no access pays for the whole table: what was hot a while ago
 * and is no longer used loses to what is used now.
 *
 * Failure modes: collisions only overestimate. A guest that could aim collisions would need the
 * seed. While a halving is under way (under 0.2 % of a period) lines on both sides of its cursor
 * are off by a factor of two.
 *
 */
#include "policy.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
	ROWS = 2,               /* 4 cost 0.1 to 0.3 points in so little memory */
	LINE_WORDS = 8,
	LINE_BYTES = 64,
	COUNTER_BITS = 2,       /* 4 bits, half as many: 0.4 points less */
	COUNTER_MAX = 3,
	WORD_COUNTERS = 32,
	ROW_WORDS = LINE_WORDS / ROWS,
	ROW_COUNTERS = ROW_WORDS * WORD_COUNTERS,
	KEY_COUNTERS = 8,       /* per key of the capacity: 2 bytes */
	PERIODS = 10,           /* 5 costs 0.4 points, 20 costs 0.2 */
	AGE_LINES = 8,
	TIE_SHIFT = 7,          /* one tie in 128 goes to the candidate */
};

struct mp_sketch {
	uint64_t (*lines)[LINE_WORDS];
	uint64_t line_count;
	uint64_t seed;
	uint64_t period;        /* accesses between two halvings */
	uint64_t accesses;      /* since the last halving began */
	uint64_t age_cursor;    /* next line to halve; line_count: no halving under way */
	uint64_t ages;
};

/* The finish of splitmix64 (Steele, Lea, Flood 2014). */
uint64_t mp_mix(uint64_t value)
{
	value ^= value >> 30;
	value *= 0xbf58476d1ce4e5b9ULL;
	value ^= value >> 27;
	value *= 0x94d049bb133111ebULL;
	return value ^ (value >> 31);
}

struct mp_sketch *mp_sketch_new(uint64_t capacity, uint64_t seed)
{
	struct mp_sketch *sketch;
	uint64_t line_count;
	void *lines;

	assert(capacity > 0 && capacity <= UINT32_MAX);
	line_count = capacity * KEY_COUNTERS * COUNTER_BITS / 8 / LINE_BYTES + 1;
	sketch = calloc(1, sizeof(*sketch));
	if (sketch == NULL)
		return NULL;
	/* calloc, not aligned_alloc + memset: a large sketch stays unbacked until its lines are
	 * used. */
	lines = calloc(line_count, LINE_BYTES);
	if (lines == NULL) {
		free(sketch);
		errno = ENOMEM;
		return NULL;
	}
	sketch->lines = lines;
	sketch->line_count = line_count;
	sketch->age_cursor = line_count;
	sketch->period = capacity * PERIODS;
	sketch->seed = mp_mix(seed + 0x9e3779b97f4a7c15ULL);
	return sketch;
}

void mp_sketch_free(struct mp_sketch *sketch)
{
	if (sketch == NULL)
		return;
	free(sketch->lines);
	free(sketch);
}

/* A counter per row of one line: word and bit position of each. The top bits choose the line, the
 * low 14 the counters. */
struct place { uint64_t *line; unsigned int word[ROWS]; unsigned int shift[ROWS]; };

static struct place place_of(const struct mp_sketch *sketch, uint64_t key)
{
	uint64_t hash = mp_mix(key ^ sketch->seed);
	struct place place;

	place.line = sketch->lines[(hash >> 32) * sketch->line_count >> 32];
	for (unsigned int row = 0; row < ROWS; row++) {
		unsigned int counter = (unsigned int)(hash >> (7 * row)) % ROW_COUNTERS;

		place.word[row] = row * ROW_WORDS + counter / WORD_COUNTERS;
		place.shift[row] = counter % WORD_COUNTERS * COUNTER_BITS;
	}
	return place;
}

static unsigned int counter_of(const struct place *place, unsigned int row)
{
	return (unsigned int)(place->line[place->word[row]] >> place->shift[row]) & COUNTER_MAX;
}

static unsigned int minimum(const struct place *place)
{
	unsigned int least = COUNTER_MAX;

	for (unsigned int row = 0; row < ROWS; row++) {
		unsigned int counter = counter_of(place, row);

		least = counter < least ? counter : least;
	}
	return least;
}

static void raise_to(struct place *place, unsigned int frequency)
{
	for (unsigned int row = 0; row < ROWS; row++) {
		uint64_t counter = counter_of(place, row);

		if (counter < frequency)
			place->line[place->word[row]] += (frequency - counter) << place->shift[row];
	}
}

static void halve_some_lines(struct mp_sketch *sketch)
{
	for (unsigned int n = 0; n < AGE_LINES && sketch->age_cursor < sketch->line_count; n++) {
		uint64_t *line = sketch->lines[sketch->age_cursor++];

		for (unsigned int word = 0; word < LINE_WORDS; word++)
			if (line[word] != 0) /* a line never used stays unbacked */
				line[word] = (line[word] >> 1) & 0x5555555555555555ULL;
	}
}

void mp_sketch_count_elsewhere(struct mp_sketch *sketch)
{
	if (sketch->age_cursor < sketch->line_count)
		halve_some_lines(sketch);
	if (++sketch->accesses >= sketch->period && sketch->age_cursor >= sketch->line_count) {
		sketch->accesses = 0;
		sketch->age_cursor = 0;
		sketch->ages++;
	}
}

void mp_sketch_count(struct mp_sketch *sketch, uint64_t key)
{
	struct place place = place_of(sketch, key);
	unsigned int frequency = minimum(&place);

	if (frequency < COUNTER_MAX)
		raise_to(&place, frequency + 1);
	mp_sketch_count_elsewhere(sketch);
}

void mp_sketch_raise(struct mp_sketch *sketch, uint64_t key, unsigned int frequency)
{
	struct place place = place_of(sketch, key);

	raise_to(&place, frequency < COUNTER_MAX ? frequency : COUNTER_MAX);
}

unsigned int mp_sketch_estimate(const struct mp_sketch *sketch, uint64_t key)
{
	struct place place = place_of(sketch, key);

	return minimum(&place);
}

uint64_t mp_sketch_ages(const struct mp_sketch *sketch)
{
	return sketch->ages;
}

uint64_t mp_sketch_memory_bytes(const struct mp_sketch *sketch)
{
	return sizeof(*sketch) + sketch->line_count * LINE_BYTES;
}

int mp_duel(unsigned int candidate_frequency, unsigned int victim_frequency, uint64_t *random)
{
	if (candidate_frequency != victim_frequency)
		return candidate_frequency > victim_frequency;
	*random += 0x9e3779b97f4a7c15ULL;
	return (mp_mix(*random) >> (64 - TIE_SHIFT)) == 0;
}
