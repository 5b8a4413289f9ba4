/* fuzz.h - what the harnesses share: an input's numbers, checks, checksums made right, worlds.
 *
 * A harness plays one input in a simulated world of its own and ends it: nothing is left over for
 * the next, so that an input does the same alone. What the input cannot say is fixed. No harness
 * tells right data from wrong: that is for tests/sim and tests/hostile. Here is asked: no crash, no
 * report of a sanitizer, no hang, no memory that a few bytes can ask for, and an error that says
 * something.
 */
#ifndef MILLPOND_FUZZ_H
#define MILLPOND_FUZZ_H

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "driver_sim.h"
#include "engine.h"
#include "record.h"
#include "store.h"
#include "store_format.h"

#define CHECK(condition) ((condition) ? (void)0 : fuzz_broken(__FILE__, __LINE__, #condition))
_Noreturn void fuzz_broken(const char *file, int line, const char *condition);

/* ---- input.c: what an input says ---- */

struct input { const uint8_t *at; uint64_t left_bytes; };
/* The next bytes as a little endian number; zeroes stand for what is missing. */
uint64_t input_number(struct input *input, uint32_t bytes);
/* At most so many of the next bytes, which stay the input's; how many there are. */
uint64_t input_bytes(struct input *input, uint64_t most_bytes, const uint8_t **bytes);
/* Change one number somewhere in bytes: 2 bytes of offset, 1 how (bits 0 and 1: width 1, 2, 4, 8;
 * bits 2 and 3: set, add, exclusive or, set to its neighbour), 8 of value. */
void input_patch(struct input *input, uint8_t *bytes, uint64_t length_bytes);

/* ---- reseal.c: checksums that fit again ---- */

/* Checksums of every extent whose fields are possible, of a payload of pages or states, and of the
 * header. Lengths in it may be anything; nothing beyond length_bytes is touched. */
void reseal_record(uint8_t *record, uint64_t length_bytes);
/* Every record of a BATCH payload. */
void reseal_batch(uint8_t *payload, uint64_t length_bytes);
/* One extent over its stored bytes, of which there are available_bytes. */
void reseal_extent(struct mp_extent *extent, const uint8_t *stored, uint64_t available_bytes);
/* A frame's header as it must be for its payload; checked_bytes 0 or all, by its type. */
uint64_t frame_seal(uint8_t *frame, uint16_t type, uint32_t status, uint64_t request_id,
		    uint64_t payload_bytes, uint64_t checked_bytes);

/* ---- image.c: a disk to begin with, and places in it ---- */

struct image_page { uint64_t file, index; uint8_t bytes[MP_BLOCK_BYTES]; };
struct image {
	uint64_t device_bytes;               /* 0: a directory */
	struct { uint64_t number, length_bytes; } files[64];
	uint64_t file_count;
	struct image_page *pages;            /* those that hold anything */
	uint64_t page_count, page_capacity;
};
void image_take(struct image *image, struct mp_sim *sim, struct mp_driver *driver,
		uint64_t device_bytes);
struct mp_sim *image_world(const struct image *image);

/* Structures that lie somewhere in an image, by kind: seeds.py has the same kinds in the same
 * order, and so reaches every field of each. */
enum cache_kind { CACHE_SUPER, CACHE_CHECKPOINT, CACHE_VOLUME, CACHE_SEGMENT, CACHE_TOMBSTONE,
	CACHE_INDEX, CACHE_SLOT, CACHE_RECORD, CACHE_EXTENT };
enum store_kind { STORE_SUPER, STORE_GROUP, STORE_RECORD, STORE_EXTENT, STORE_STATE,
	STORE_DESCRIPTOR, STORE_LEAF, STORE_INNER, STORE_CHECKPOINT, STORE_VOLUME, STORE_SEGMENT,
	STORE_ORIGIN, STORE_GRAVE };
struct place { uint64_t file, offset_bytes, length_bytes; uint32_t kind; };
struct places { struct place *items; uint64_t count; };
void places_add(struct places *places, struct place place);
/* The input's patches to the disk, at most so many: each 2 bytes of place (number within its kind,
 * kind), then as input_patch. */
void places_patch(const struct places *places, struct mp_sim *sim, struct input *input,
		  uint32_t patches_max);

/* ---- cacheworld.c: an engine on a device, a guest, and the other end of its fetch link ---- */

enum { MIB = 1 << 20 };
enum {
	CACHE_SEGMENT_BYTES = 3 * MIB / 2,
	CACHE_SEGMENTS = 6,
	CACHE_DEVICE_BYTES = 7 * MIB + CACHE_SEGMENTS * CACHE_SEGMENT_BYTES + 3 * MIB / 2,
	CACHE_SLOT_BYTES = 16384,
	CACHE_VOLUMES = 2,
	VOLUME_BLOCKS = 4096,
	FETCH_BYTES_MAX = 2 * MIB,
};
#define TURN_NS 10000000LL
enum { NBD_READ, NBD_WRITE, NBD_DISC, NBD_FLUSH, NBD_TRIM, NBD_CACHE, NBD_ZEROES, NBD_STATUS };

struct cache_world {
	struct mp_sim *sim;
	struct mp_driver *driver;
	struct mp_engine *engine;
	int guest, fetch;
	uint64_t handle, opened, links;      /* requests made; volumes opened; links made */
	bool fetch_is_gone;
	uint8_t *asked;                      /* what came over the fetch link, unanswered */
	uint64_t asked_bytes;
	struct mp_event batch;               /* the latest MP_EVENT_BATCH */
};
const uint8_t *cache_volume_id(uint32_t number);
struct mp_sim *cache_formatted(void);    /* a new world with an empty cache device */
struct mp_sim *cache_blank(void);        /* the same, from an image: faster */
/* Recover. 0, or the engine's error, which must say something. */
int cache_open(struct cache_world *world, struct mp_sim *sim);
/* Known, open, "dirty" on record, and, for volume 0, a guest and a fetch link; false: refused. */
bool cache_serve(struct cache_world *world, uint64_t epoch, uint32_t flags);
void cache_turns(struct cache_world *world, uint32_t turns);
void cache_link(struct cache_world *world, const uint8_t *received, uint64_t received_bytes);
void guest_send(struct cache_world *world, const void *bytes, uint64_t length_bytes);
/* A whole request; a WRITE's data is made from the token. */
void guest_ask(struct cache_world *world, uint16_t command, uint16_t flags, uint64_t offset_bytes,
	       uint32_t length_bytes, uint8_t token);
/* The frame that was asked first, taken away; false: none. */
bool fetch_take(struct cache_world *world, struct mp_frame *frame,
		struct mp_read_request *request);
/* Push a reply, as the store sends it. */
void fetch_reply_push(struct cache_world *world, const uint8_t *frame, uint64_t length_bytes);
/* An honest payload for what was asked: data in every third block. How much of it is checked. */
uint64_t fetch_honest(const struct mp_frame *frame, const struct mp_read_request *request,
		      uint8_t *payload, uint64_t *checked_bytes);
void fetch_answer_all(struct cache_world *world);
/* Cut one batch of volume 0, take it and say that the store has it. */
void cache_ship(struct cache_world *world);
/* Stop, which must end; or crash. The disk stays. */
void cache_stop(struct cache_world *world);
void cache_crash(struct cache_world *world);

/* ---- storeworld.c: a store on a directory ---- */

enum { STORE_SEGMENT_BYTES = 256 * 1024, STORE_FRAME_BYTES_MAX = 1 * MIB, STORE_CONNECTIONS = 4 };

struct store_world {
	struct mp_sim *sim;
	struct mp_driver *driver;
	struct mp_store *store;
	int socket;                          /* of connection 3, which the core reads itself */
	uint64_t request_id, sequence;
	uint8_t *frame;                      /* STORE_FRAME_BYTES_MAX to build one in */
	uint32_t status;                     /* of the latest reply */
	uint64_t replies;
};
struct mp_sim *store_formatted(void);
int store_open(struct store_world *world, struct mp_sim *sim);
void store_turns(struct store_world *world, uint32_t turns);
/* Feed a frame whose payload stands behind world->frame's header; 0 or why it was refused. */
int store_send(struct store_world *world, uint64_t connection, uint16_t type,
	       uint64_t payload_bytes);
/* The volume as PUT_VOLUME wants it, into the payload. */
struct mp_volume_state *store_state(struct store_world *world, uint32_t number);
/* A batch of block_count blocks, into the payload; its length. */
uint64_t store_batch(struct store_world *world, uint32_t number, uint64_t first_block,
		     uint64_t block_count, uint8_t token);
void store_ask(struct store_world *world, uint64_t connection, uint32_t number, uint16_t type,
	       uint64_t first_block, uint64_t block_count);
/* Stop, which must end; or leave all as it is. The disk stays. */
void store_stop(struct store_world *world);
void store_crash(struct store_world *world);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes);

#endif
