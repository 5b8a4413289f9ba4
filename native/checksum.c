/* checksum.c - checksums of blocks and headers, and two cheap looks at a block before encoding.
 *
 * Rules: pure functions, any thread. A checksum is never 0, so that 0 can mean "none" everywhere.
 * Happy path: the volume's seed is computed once, then one mp_block_checksum per block.
 * Failure modes: none; a wrong guess of mp_looks_random costs time or space, never a byte.
 * The choice of mix and of thresholds: README.md, section Checksums.
 */
#include <assert.h>
#include <string.h>

#include <xxhash.h>
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
/* Chooses AVX2 or AVX-512 when the machine has it: 76 ns instead of 214 ns per 4 KiB. The header is
 * installed only with a library that was built to dispatch. Same values. */
#include <xxh_x86dispatch.h>
#endif

#include "record.h"

/* Pairs of equal bytes among 512 uniform ones: mean 512 * 511 / 2 / 256 = 511, deviation 22.6; the
 * bounds are four deviations away on either side. */
enum { SAMPLE_STRETCHES = 16, SAMPLE_STRETCH_BYTES = 32,
	SAMPLE_BYTES = SAMPLE_STRETCHES * SAMPLE_STRETCH_BYTES,
	RANDOM_PAIRS_MIN = 420, RANDOM_PAIRS_MAX = 602 };

static uint64_t never_zero(uint64_t checksum)
{
	return checksum ? checksum : 1;
}

/* splitmix64's finalizer: a bijection in which every input bit moves every output bit. */
static uint64_t mix(uint64_t value)
{
	value += 0x9e3779b97f4a7c15ULL;
	value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ULL;
	value = (value ^ (value >> 27)) * 0x94d049bb133111ebULL;
	return value ^ (value >> 31);
}

uint64_t mp_xxh3(const void *data, uint64_t length_bytes)
{
	return never_zero(XXH3_64bits(data, length_bytes));
}

uint64_t mp_xxh3_seeded(uint64_t seed, const void *data, uint64_t length_bytes)
{
	return never_zero(XXH3_64bits_withSeed(data, length_bytes, seed));
}

uint64_t mp_volume_seed(const uint8_t *volume)
{
	return mp_xxh3(volume, MP_VOLUME_ID_BYTES);
}

uint64_t mp_block_checksum(uint64_t volume_seed, uint64_t block, const void *data,
			   uint64_t length_bytes)
{
	return mp_xxh3_seeded(volume_seed ^ mix(block), data, length_bytes);
}

int mp_is_zero(const void *data, uint64_t length_bytes)
{
	uint64_t word;

	assert(length_bytes % sizeof word == 0);
	if (length_bytes == 0)
		return 1;
	memcpy(&word, data, sizeof word);
	/* Zero in the first word and equal to itself one word on: zero, at memcmp's speed. */
	return word == 0 &&
	       memcmp(data, (const uint8_t *)data + sizeof word, length_bytes - sizeof word) == 0;
}

int mp_looks_random(const void *data, uint64_t length_bytes)
{
	const uint8_t *stretch = data;
	uint64_t step_bytes = length_bytes / SAMPLE_STRETCHES;
	uint16_t seen[256] = {0};
	uint32_t pairs = 0;

	if (length_bytes < SAMPLE_BYTES)
		return 0; /* too little to tell */
	for (int i = 0; i < SAMPLE_STRETCHES; i++, stretch += step_bytes)
		for (int j = 0; j < SAMPLE_STRETCH_BYTES; j++)
			pairs += seen[stretch[j]]++;
	return pairs >= RANDOM_PAIRS_MIN && pairs <= RANDOM_PAIRS_MAX;
}
