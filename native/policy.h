/* policy.h - how often was this key used lately: a sketch of 2-bit counters that fades.
 *
 * Pure state, no I/O, no allocation after mp_sketch_new. Engine thread only (one owner, no locks).
 * Every function is O(1): a key's two counters share one 64-byte line, and fading is spread over
 * the accesses that follow its start.
 *
 */
#ifndef MILLPOND_POLICY_H
#define MILLPOND_POLICY_H

#include <stdint.h>

/* cdef: begin */
struct mp_sketch;
/* capacity: keys that fit into the cache; the seed hides which keys collide. NULL: errno. */
struct mp_sketch *mp_sketch_new(uint64_t capacity, uint64_t seed);
void mp_sketch_free(struct mp_sketch *sketch);
void mp_sketch_count(struct mp_sketch *sketch, uint64_t key); /* one access */
void mp_sketch_count_elsewhere(struct mp_sketch *sketch); /* of a key that somebody else counts */
/* Make the estimate of this key at least frequency (more than 3 is 3); not an access, so nothing
 * fades by it. */
void mp_sketch_raise(struct mp_sketch *sketch, uint64_t key, unsigned int frequency);
unsigned int mp_sketch_estimate(const struct mp_sketch *sketch, uint64_t key); /* 0 to 3 */
uint64_t mp_sketch_ages(const struct mp_sketch *sketch); /* how often everything was halved */
uint64_t mp_sketch_memory_bytes(const struct mp_sketch *sketch);
uint64_t mp_mix(uint64_t value); /* any thread: a bijection that spreads every bit */
/* Does the candidate take the victim's place? random: state of the caller's generator, advanced
 * on ties only. */
int mp_duel(unsigned int candidate_frequency, unsigned int victim_frequency, uint64_t *random);
/* cdef: end */

#endif
