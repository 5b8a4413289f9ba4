/* store_format.h - bytes only the store reads: references, extent entries, checkpoints.
 *
 * History
 *   version 1 (2026-11): first format.
 *
 * Rules as in format.h. README-store.md describes them in words.
 */
#ifndef MILLPOND_STORE_FORMAT_H
#define MILLPOND_STORE_FORMAT_H

#include "format.h"

enum {
	MP_PAGE_BYTES = 4096,
	MP_MAP_LEAF_BITS = 9,        /* 512 addresses in a leaf of a volume's map */
	MP_EXTENT_LEAF_BITS = 6,     /* 64 entries in a leaf of a segment's extent table */
	MP_INNER_BITS = 8,           /* 256 references in an inner page */
	MP_ADDRESS_EXTENT_BITS = 22, /* extents of one segment */
	MP_ADDRESS_BLOCK_BITS = 2,   /* block within its extent */
	MP_PLACE_PAGE_BITS = 24,     /* page within its segment file */
	MP_ORIGIN_BITS = 24,
	MP_GROUP_DATA = 1,
	MP_GROUP_META = 2,
	MP_PAGES_PER_GROUP = 256,
	MP_GRAVE_MAP = 1,
	MP_GRAVE_EXTENTS = 2
};

/* An address never changes: segment << 24 | extent index << 2 | block within the extent. 0: a
 * hole. */

/* What a tree holds about a page. place = segment << 24 | offset in the file / 4096; 0: none. */
struct mp_page_ref {
	uint64_t place;
	uint64_t checksum;           /* XXH3-64 of the page */
};

/* One extent of a segment. All zero: none. */
struct mp_extent_entry {
	/* file that holds the bytes << 24 | number in the origin table */
	uint64_t segment_origin;
	uint64_t first_block;
	uint32_t offset_bytes;       /* of the stored bytes in the file */
	uint16_t stored_length_bytes;
	uint8_t codec_blocks;        /* enum mp_codec << 4 | block count */
	uint8_t live;                /* bit n: some map still refers to block n */
	uint64_t born_commit;
	uint64_t checksum[4];        /* as in struct mp_extent */
};

/* Which page of which tree this is: lets a scan of a meta segment find the owner of each page. */
struct mp_page_descriptor {
	uint8_t volume[16];          /* zero: the extent table of segment */
	uint64_t segment;
	uint64_t first_key;
	uint32_t level;              /* 0: leaf */
	uint32_t reserved0;
	uint64_t checksum;           /* of the page */
};

/* CHECKPOINT payload = header | volumes | segments | origins (16 bytes each) | graves, cut into
 * records of at most MP_RECORD_PAYLOAD_MAX, all in one group. */
struct mp_checkpoint {
	uint64_t version;
	uint64_t length_bytes;       /* of the whole payload */
	uint64_t volume_count;
	uint64_t segment_count;
	uint64_t origin_count;
	uint64_t grave_count;
	uint64_t next_segment;
	/* Where roll-forward starts: behind the last group that is in this checkpoint. */
	uint64_t log_segment;        /* 0: the log was empty */
	uint64_t log_offset_bytes;
	uint64_t log_commit;         /* of the next group */
	uint64_t log_checksum;       /* of the last group: predecessor of the next */
	uint64_t log_incarnation;
	uint64_t log_extents;        /* extents numbered so far in log_segment */
	uint64_t reserved[3];
};

struct mp_checkpoint_volume {
	struct mp_volume_state state;
	struct mp_page_ref root;
	uint32_t height;             /* levels of inner pages above the leaves */
	uint32_t reserved0;
	uint64_t stored_bytes;
	uint64_t reserved[2];
};

struct mp_checkpoint_segment {
	uint64_t id;
	uint64_t live_bytes;
	uint64_t length_bytes;       /* used so far */
	uint64_t first_commit;
	struct mp_page_ref extents;  /* root of the extent table */
	uint32_t extent_count;
	uint16_t kind;               /* MP_GROUP_DATA or MP_GROUP_META */
	uint16_t height;
	uint64_t reserved;
};

/* A tree, or part of one, that nobody refers to any more and that is being given back. */
struct mp_checkpoint_grave {
	struct mp_page_ref root;
	uint32_t level;
	uint32_t kind;
	uint64_t reserved;
};

_Static_assert(sizeof(struct mp_page_ref) << MP_INNER_BITS == MP_PAGE_BYTES, "inner page");
_Static_assert(sizeof(uint64_t) << MP_MAP_LEAF_BITS == MP_PAGE_BYTES, "map leaf");
_Static_assert(sizeof(struct mp_extent_entry) << MP_EXTENT_LEAF_BITS == MP_PAGE_BYTES, "extents");
_Static_assert(sizeof(struct mp_page_descriptor) == 48, "descriptor");
_Static_assert(sizeof(struct mp_checkpoint) == 128, "checkpoint");
_Static_assert(sizeof(struct mp_checkpoint_volume) == 736, "checkpoint volume");
_Static_assert(sizeof(struct mp_checkpoint_segment) == 64, "checkpoint segment");
_Static_assert(sizeof(struct mp_checkpoint_grave) == 32, "checkpoint grave");

#endif
