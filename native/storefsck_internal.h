/* storefsck_internal.h - state of a check of a store, and what its files ask of one another.
 *
 * One thread, blocking reads, no writes. "The store" is what a normal open finds (checkpoint and
 * roll-forward, in memory); "the log" is what its records alone say, from the first segment on.
 */
#ifndef MILLPOND_STOREFSCK_INTERNAL_H
#define MILLPOND_STOREFSCK_INTERNAL_H

#include "store_internal.h"
#include "storefsck.h"

enum {
	/* header and table of a record fit, at any offset within a block */
	FSCK_WINDOW_BYTES = 1 << 20,
	FSCK_AHEAD_BYTES = 256 << 10,       /* read at once */
	FSCK_VOLUME_BUCKETS = 4096,
	FSCK_LEAVES_MIN = 4,
	FSCK_MARK_REFERRED = 15,            /* bit n: a map refers to block n of the extent */
	FSCK_MARK_SEEN = 128                /* a record of the log has the extent */
};
#define FSCK_NUMBER_LOST UINT32_MAX

/* Part of a file, read ahead. What get returned is valid until the next get. */
struct fsck_window {
	uint64_t file, from, to;
	uint8_t *buffer;
	int64_t error;                      /* why the last get returned NULL */
};

struct fsck_segment {
	uint64_t id, length_bytes;          /* of log in it */
	uint64_t head_commit;               /* without a table: of its first group */
	uint64_t first_commit, last_commit; /* 0: none seen */
	uint8_t *marks;                     /* one per extent: FSCK_MARK_* */
	uint32_t mark_count;
	uint32_t next_index;                /* of the next data extent, or FSCK_NUMBER_LOST */
	uint8_t damaged, missing;
};

/* A volume as the log tells it. */
struct fsck_volume {
	struct fsck_volume *next;
	struct mp_volume_state state;       /* id: always; the rest: of its newest VOLUME record */
	uint64_t state_commit;              /* of that; 0: none seen */
	uint64_t last_commit;               /* of its newest record of any kind */
	uint64_t applied_sequence, lineage, epoch; /* with its batches; epoch: the highest seen */
	/* Commit of the newest record that does not follow on the volume's one before it: the log
	 * has lost what was between. UINT64_MAX: behind its last. */
	uint64_t gap_commit;
	struct fsck_leaf *leaves;           /* of this pass */
	uint8_t deleted, map_damaged;
};

/* 512 blocks of a volume's map, rebuilt. */
struct fsck_leaf {
	struct fsck_leaf *hash_next, *volume_next;
	struct fsck_volume *volume;
	uint64_t index, hash;
	uint8_t compared;
	uint64_t addresses[1 << MP_MAP_LEAF_BITS];
};

/* Commits that no record of the log is there for: first to end - 1. */
struct fsck_missing { uint64_t first, end; };

struct fsck_note {
	struct fsck_note *next;
	struct mp_fsck_finding finding;
};

struct fsck_tree {
	struct mp_page_ref root;
	uint32_t height, leaf_bits;
	const uint8_t *volume;              /* a map's; NULL: an extent table, or nobody's */
	uint64_t segment;                   /* of an extent table */
	void (*leaf)(struct mp_fsck *fsck, const struct fsck_tree *tree, uint64_t first_key,
		     const uint8_t *data);
	void *context;
};

enum fsck_task { FSCK_OPEN, FSCK_SCAN, FSCK_MAPS, FSCK_GRAVES, FSCK_TABLES, FSCK_COUNTS,
	FSCK_DONE };

struct mp_fsck {
	struct mp_driver *driver;
	struct mp_store *store;             /* NULL: there is no usable superblock or checkpoint */
	struct mp_fsck_summary summary;
	enum fsck_task task;
	uint64_t at;                        /* of the task: segment or volume */
	uint8_t comparable;                 /* the store is at a known position of its log */
	uint8_t refused;                    /* a later group proves that this is not the end */
	uint8_t ended;                      /* the world, in a simulation */
	struct fsck_note *notes, *notes_last;
	struct fsck_window head, data;      /* of records; of stored bytes */

	/* storefscklog.c */
	struct fsck_segment *segments;      /* with log, ascending */
	uint64_t segment_count, segment_capacity;
	uint64_t next_commit, synced_commit;
	uint64_t last_checksum;             /* of the group before; 0: not known */
	struct fsck_missing *missing;       /* ascending */
	uint64_t missing_count, missing_capacity;

	/* storefsckvolume.c */
	struct fsck_volume *volumes[FSCK_VOLUME_BUCKETS];
	uint64_t volume_count;

	/* storefsckmap.c: the leaves of this pass, those with low <= hash <= high */
	struct fsck_leaf **leaves;
	uint64_t leaf_count, leaf_limit, low, high;

	/* storefscktree.c */
	uint8_t counting;                   /* pages: they are counted and reported */
	uint64_t *page_bytes;               /* referred to, per segment of the store */
	uint64_t map_pages_bad, table_pages_bad;
	struct mp_page_ref inner[STORE_LEVELS][1 << MP_INNER_BITS];
	struct mp_extent_entry entries[1 << MP_EXTENT_LEAF_BITS]; /* leaf of a table, read last */
	uint64_t entries_segment, entries_first;
	int entries_error;
};

struct fsck_where {
	const uint8_t *volume;
	uint64_t first_block, block_count, segment, offset_bytes;
};

/* storefsck.c */
/* A run of blocks with the same text becomes one finding. */
void fsck_report(struct mp_fsck *fsck, uint32_t kind, struct fsck_where where, const char *format,
		 ...)
	__attribute__((format(printf, 4, 5)));
/* Ascending; the caller frees them. */
uint64_t *fsck_files(const struct mp_fsck *fsck, uint64_t *count);
uint64_t fsck_file_bytes(const struct mp_fsck *fsck, uint64_t file, int *missing);
/* length bytes at offset, 8-byte aligned as offset is; NULL and window->error */
const uint8_t *fsck_window_get(struct mp_fsck *fsck, struct fsck_window *window, uint64_t file,
			       uint64_t offset_bytes, uint64_t length_bytes);

/* storefscklog.c */
void fsck_log_prepare(struct mp_fsck *fsck);       /* which segments, and how far */
void fsck_log_begin(struct mp_fsck *fsck);         /* a pass */
void fsck_log_scan(struct mp_fsck *fsck, struct fsck_segment *segment);
void fsck_log_end(struct mp_fsck *fsck);           /* the first pass */
struct fsck_segment *fsck_segment_find(struct mp_fsck *fsck, uint64_t id);
/* marks[index] is there from then on */
void fsck_mark(struct fsck_segment *segment, uint32_t index, uint8_t mark);
int fsck_is_missing(const struct mp_fsck *fsck, uint64_t commit);
int fsck_missing_after(const struct mp_fsck *fsck, uint64_t commit);

/* storefsckread.c */
/* The header of a group of the log at this place? */
int fsck_group_at(struct mp_fsck *fsck, const struct fsck_segment *segment, uint64_t offset_bytes,
		  struct mp_group *group);
/* Header, table, and of a volume's state the payload: verified, valid until the next header is
 * read. NULL and *error. */
const struct mp_record *fsck_record_at(struct mp_fsck *fsck, const struct fsck_segment *segment,
				       uint64_t offset_bytes, uint64_t room_bytes, int *error);
const char *fsck_why(int error);
/* The live blocks of an extent, read and verified; what does not verify is reported. */
void fsck_verify_extent(struct mp_fsck *fsck, const uint8_t *volume, const struct mp_extent *extent,
			uint32_t live, uint64_t file, uint64_t offset_bytes);

/* storefscktail.c */
/* An open is refused for what is behind the end of the log: what is it? */
void fsck_tail(struct mp_fsck *fsck);

/* storefsckvolume.c */
struct fsck_volume *fsck_volume_find(const struct mp_fsck *fsck, const uint8_t *id);
struct fsck_volume *fsck_volume_get(struct mp_fsck *fsck, const uint8_t *id);
void fsck_volume_batch(struct mp_fsck *fsck, struct fsck_volume *volume,
		       const struct mp_record *record, uint64_t commit);
void fsck_volume_state(struct mp_fsck *fsck, struct fsck_volume *volume,
		       const struct mp_volume_state *state, uint64_t commit);
void fsck_volume_delete(struct fsck_volume *volume, uint64_t commit);
/* Which of the store's states the log's end cannot tell; before maps are compared. */
void fsck_volumes_end(struct mp_fsck *fsck);
void fsck_volumes_compare(struct mp_fsck *fsck);
void fsck_volumes_free(struct mp_fsck *fsck);

/* storefsckmap.c */
void fsck_map_begin(struct mp_fsck *fsck);         /* a pass */
int fsck_map_more(const struct mp_fsck *fsck);     /* another pass is needed */
void fsck_map_put(struct mp_fsck *fsck, struct fsck_volume *volume, uint64_t first_block,
		  uint64_t block_count, uint64_t address);
void fsck_map_clear(struct mp_fsck *fsck, struct fsck_volume *volume, uint64_t first_block,
		    uint64_t end_block);
void fsck_map_compare(struct mp_fsck *fsck, struct store_volume *mine);
void fsck_map_drop(struct mp_fsck *fsck);
void fsck_graves_mark(struct mp_fsck *fsck);

/* storefscktree.c */
void fsck_walk(struct mp_fsck *fsck, const struct fsck_tree *tree);
/* Entry number index of a segment's extent table; NULL: none, or *error. */
const struct mp_extent_entry *fsck_entry(struct mp_fsck *fsck, uint64_t segment, uint32_t index,
					 int *error);
/* The first entry from index on whose bytes are at offset. FSCK_NUMBER_LOST: there is none. */
uint32_t fsck_entry_at(struct mp_fsck *fsck, uint64_t segment, uint32_t index,
		       uint64_t offset_bytes);
void fsck_table_compare(struct mp_fsck *fsck, struct fsck_segment *segment);
void fsck_counts_compare(struct mp_fsck *fsck);

#endif
