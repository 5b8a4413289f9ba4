/* scrub_internal.h - state of the background verification, shared by scrub.c and scrublog.c only.
 *
 * Engine thread only. At most one of its reads is in flight, into memory of its own: it takes no
 * buffer that a guest could want.
 */
#ifndef MILLPOND_SCRUB_INTERNAL_H
#define MILLPOND_SCRUB_INTERNAL_H

#include "encode.h"

/* A slot that is being read: what was valid in it, and what it should hold. */
struct scrub_slot {
	bool pinned;              /* else there is nothing in it to verify */
	uint32_t origin;
	uint64_t first_block;
	uint32_t checksums[MP_SLOT_BLOCKS_MAX]; /* 0: not this block */
};

struct scrub {
	enum mp_scrub_stage stage;
	uint64_t due_ns;          /* when the budget allows the next read */
	uint64_t held_ns;         /* since when that waits for guests; 0: it does not */
	uint64_t guests_ns;       /* when one was last seen to wait */
	uint64_t began_ns;        /* this pass */

	/* scrublog.c: the chain of volume `number`, from next_ordinal to last_ordinal */
	struct scan scan;
	uint32_t number;
	uint64_t next_ordinal, last_ordinal;
	struct volume *volume;    /* whose segment is being walked; NULL: none */
	uint64_t ordinal;         /* of that segment */
	uint64_t offset_bytes, next_sequence; /* of its next record */
	uint64_t limit_sequence;  /* applied when reading it began: later ones may be half here */
	bool unreadable;          /* the last read failed */
	bool doubted;             /* the record here did not verify and was read once more */

	/* scrub.c: slots [slot, slot + slot_count) are being read */
	struct mp_io io;
	struct iovec iov;
	uint8_t *memory;          /* SCRUB_READ_BYTES */
	bool busy;
	uint64_t slot;
	uint32_t slot_count;
	uint64_t careful_end;     /* up to here slot by slot: one of them cannot be read */
	struct scrub_slot slots[SCRUB_SLOTS_MAX];
};

/* scrub.c */
/* A read of so many bytes goes out. */
void scrub_charge(struct mp_engine *engine, uint64_t length_bytes);
/* One line for the operator; status: -EBADMSG does not verify, -EIO cannot be read. */
__attribute__((format(printf, 3, 4))) void scrub_found(struct volume *volume, int status,
						       const char *format, ...);

/* scrublog.c */
void scrub_log_begin(struct mp_engine *engine);
/* False: nothing is left to read in this stage. */
bool scrub_log_step(struct mp_engine *engine);

#endif
