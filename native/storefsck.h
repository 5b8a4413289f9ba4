/* storefsck.h - a store that nobody serves, held against its log: every record, and what is
 * derived from them.
 *
 * Reads only, through a driver of the store's directory. README-store.md says what is compared with
 * what and what may be missing.
 */
#ifndef MILLPOND_STOREFSCK_H
#define MILLPOND_STOREFSCK_H

#include "driver.h"
#include "format.h"

/* cdef: begin */
enum mp_fsck_kind {
	MP_FSCK_OPEN = 1,   /* the store does not open */
	MP_FSCK_SUPER,      /* a superblock does not verify */
	MP_FSCK_FILE,       /* a segment's file is missing or too short */
	MP_FSCK_RECORD,     /* a group or record of the log does not verify, or does not chain on */
	MP_FSCK_DATA,       /* stored bytes that a volume needs do not verify */
	MP_FSCK_PAGE,       /* a page of a map or of an extent table does not verify */
	MP_FSCK_MAP,        /* a map says something else than the log */
	MP_FSCK_EXTENTS,    /* an extent table says something else than the log or the maps */
	MP_FSCK_COUNT,      /* a count is not what it counts */
	MP_FSCK_CATALOGUE   /* a volume's state is not what the log says */
};
enum { MP_FSCK_TEXT_BYTES = 384 };
struct mp_fsck_finding {
	uint32_t kind;                     /* enum mp_fsck_kind */
	uint32_t reserved;
	uint8_t volume[16];                /* zero: none in particular */
	uint64_t first_block, block_count; /* of the volume; 0 blocks: none in particular */
	uint64_t segment;                  /* 0: none in particular, or the superblocks */
	uint64_t offset_bytes;
	char text[MP_FSCK_TEXT_BYTES];     /* one line: what was found */
};
struct mp_fsck_summary {
	uint64_t segments, groups, records, extents, pages, volumes, mapped_blocks;
	uint64_t verified_bytes;           /* stored bytes of live extents that verified */
	uint64_t bad_bytes;                /* that did not */
	uint64_t missing_commits;          /* groups that are not in the log any more */
	uint64_t unproven_blocks;          /* mapped; what the log says of them was lost */
	uint64_t passes;                   /* over the log, for the maps */
	uint64_t findings;
	uint64_t compared;                 /* 1: maps, tables and catalogue were compared */
};
struct mp_fsck;
/* memory_bytes: of maps rebuilt at a time; more than that is rebuilt in passes. The driver stays
 * the caller's and must outlive it. One thread. */
struct mp_fsck *mp_fsck_new(struct mp_driver *driver, uint64_t memory_bytes);
/* A piece of work, a segment or a volume at the most. 1: go on; 0: finished; -errno: the world
 * ended. */
int mp_fsck_step(struct mp_fsck *fsck);
/* The next finding, oldest first, which is then forgotten. 1; 0: none. Take them all between two
 * steps, or memory grows with them. */
int mp_fsck_take(struct mp_fsck *fsck, struct mp_fsck_finding *out);
void mp_fsck_summary(const struct mp_fsck *fsck, struct mp_fsck_summary *out);
/* The volumes that the store has, or that the log knows: -ENOENT behind the last. */
int mp_fsck_volume(const struct mp_fsck *fsck, const uint8_t *id, struct mp_volume_state *out);
void mp_fsck_free(struct mp_fsck *fsck);
/* cdef: end */

#endif
