/* format.h - bytes on disk and on the wire. Changing anything here is a new format version.
 *
 * History
 *   version 1 (2026-11): first format.
 *   wire version 1, feature "block-status" (2026-11): BLOCK_STATUS frames. A cache sends them only
 *   to a store whose HELLO_REPLY names the feature.
 *
 * Rules: little endian, natural alignment, no packed structs, holes are named `reserved`, written
 * as zero and checked on read. Magic and checksum come first; 0 is never a valid address or
 * checksum. An unknown incompatible feature bit refuses the object; an unknown compatible bit is
 * ignored. Checksums are XXH3-64. Headers: unseeded (but see mp_frame), over everything behind the
 * checksum field. Data: seeded with (origin volume, block), see mp_volume_seed in record.h, so that
 * a block in the wrong place fails.
 */
#ifndef MILLPOND_FORMAT_H
#define MILLPOND_FORMAT_H

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */
enum {
	MP_FORMAT_VERSION = 1,
	MP_WIRE_VERSION = 1,
	MP_BLOCK_BYTES = 4096,
	MP_EXTENT_BLOCKS = 4,             /* at most this many blocks are compressed together */
	MP_VOLUME_ID_BYTES = 16,
	MP_NAME_BYTES = 256,              /* UTF-8, NUL padded, so at most 255 bytes of name */
	MP_LINEAGES = 8,                  /* lineages remembered per volume */
	MP_RECORD_HEADER_BYTES = 192,
	MP_EXTENT_BYTES = 120,
	MP_FRAME_HEADER_BYTES = 64,
	MP_GROUP_HEADER_BYTES = 128,
	/* per record; also bounds what a hostile count can cost */
	MP_RECORD_EXTENTS_MAX = 8192,
	MP_RECORD_PAYLOAD_MAX = 4194304,  /* bytes of payload in one record */
	MP_BATCH_PARTS_MAX = 64,          /* records in one batch */
	MP_FRAME_PAYLOAD_MAX = 16777216,  /* bytes behind a frame header */
	MP_READ_BLOCKS_MAX = 256,         /* blocks asked for in one READ frame */
	MP_STATUS_RUNS_MAX = 4096,        /* runs in one BLOCK_STATUS_REPLY */
	MP_CACHE_SEGMENT_BYTES = 8388608, /* write log segment on the cache device */
	MP_SLOT_BLOCKS_MAX = 16
};

enum mp_codec { MP_CODEC_NONE = 1, MP_CODEC_LZ4 = 2, MP_CODEC_ZSTD = 3, MP_CODEC_ZERO = 4,
	MP_CODEC_TRIM = 5 };

enum mp_record_type {
	MP_RECORD_LOG = 1,        /* in a cache's write log: raw blocks, payload 4 KiB aligned */
	/* part of a destage batch; the same bytes on wire and in the store's log */
	MP_RECORD_BATCH = 2,
	/* write log: no extents, tells how far the log is known to be synced */
	MP_RECORD_SYNCED = 3,
	MP_RECORD_VOLUME = 4,     /* store: payload is one struct mp_volume_state, absolute */
	MP_RECORD_PAGES = 5,      /* store: payload is map and extent-table pages of a checkpoint */
	MP_RECORD_CHECKPOINT = 6, /* store: payload is a checkpoint's root structure */
	MP_RECORD_DELETE = 7      /* store: the volume named in the header is deleted */
};

enum mp_record_flag { MP_RECORD_LAST_OF_BATCH = 1 };

/* One extent of a record. Data extents: at most MP_EXTENT_BLOCKS blocks. Zero and trim: any
 * count. */
struct mp_extent {
	/* volume that wrote these blocks: part of every checksum seed */
	uint8_t origin[16];
	uint64_t first_block;
	uint64_t block_count;
	uint64_t sequence;             /* of the newest mutation in this extent */
	uint32_t stored_length_bytes;  /* in the payload; 0 for zero and trim */
	uint8_t codec;                 /* enum mp_codec */
	uint8_t reserved0[3];
	/* raw: one per block; compressed: [0] over the stored bytes */
	uint64_t checksum[4];
	uint8_t nonce[24];             /* reserved for ciphers, zero */
	uint8_t tag[16];               /* reserved for ciphers, zero */
};

/* record = header | extent table | (log records: zero padding to 4 KiB) | payload */
struct mp_record {
	uint64_t magic;
	/* over the header behind this field, the extent table and padding */
	uint64_t checksum;
	uint16_t version;
	uint16_t type;                 /* enum mp_record_type */
	uint32_t flags;                /* enum mp_record_flag */
	uint32_t compatible_features;
	uint32_t incompatible_features;
	uint8_t volume[16];
	uint64_t lineage;
	uint64_t first_sequence;       /* of the record (log) or of the whole batch (batch parts) */
	uint64_t last_sequence;
	uint64_t epoch;
	uint32_t part_index;           /* of a batch: 0, 1, ... */
	uint32_t extent_count;
	uint64_t header_length_bytes;  /* header, table and padding: where the payload starts */
	uint64_t payload_length_bytes;
	uint32_t cipher;               /* reserved, zero */
	uint32_t key_id;               /* reserved, zero */
	/* Link of a write log chain; zero when shipped and in the store. */
	/* of the log: (counter << 32) | random, ascending along a chain */
	uint64_t incarnation;
	uint64_t previous_checksum;    /* header checksum of the predecessor in the chain */
	uint64_t segment_ordinal;      /* ordinal of this segment within the chain */
	uint64_t segment_offset_bytes; /* of this record within its segment */
	/* all of the chain up to here was synced when this was written */
	uint64_t synced_sequence;
	/* VOLUME, PAGES, CHECKPOINT: XXH3-64 of the payload; else zero */
	uint64_t payload_checksum;
	uint8_t reserved[32];
};

/* ---- the cache device, per shard ---- */

/* Two copies, at byte 0 and at byte 65536; the valid one with the higher generation counts. */
struct mp_cache_super {
	uint64_t magic;
	uint64_t checksum;             /* over the whole 4 KiB behind this field */
	uint32_t version;
	uint32_t reserved0;
	uint32_t compatible_features;
	uint32_t incompatible_features;
	/* random, identifies the holder of dirty data at the stores */
	uint8_t cache_id[16];
	uint64_t generation;
	uint32_t shard_index;
	uint32_t shard_count;
	uint64_t device_bytes;
	uint64_t log_offset_bytes;
	uint64_t log_segment_bytes;
	uint64_t log_segment_count;
	uint64_t slots_offset_bytes;
	uint64_t slot_bytes;
	uint64_t slot_count;
	uint64_t checkpoint_offset_bytes[2];
	uint64_t checkpoint_capacity_bytes;
	/* of the log; a new one is synced here before the first append */
	uint64_t incarnation;
	uint64_t checkpoint_generation;/* 0: none yet */
	uint64_t checkpoint_length_bytes;
	uint64_t checkpoint_checksum;  /* of the whole checkpoint */
	uint32_t checkpoint_area;      /* 0 or 1 */
	/* 1: the checkpoint is the end of every chain; nothing came after */
	uint32_t clean;
	uint8_t reserved[3912];
};

/* checkpoint = header | volumes | segment table | tombstones | index entries | slot table; the
 * fuzzy parts (index, slots) may hold changes made while it was written: the log from each volume's
 * head on is replayed over them. Counts are given here; index_count is final when the header is
 * sealed */
struct mp_cache_checkpoint {
	uint64_t magic;
	uint64_t checksum;             /* over the header behind this field */
	uint64_t generation;
	uint64_t volume_count;
	uint64_t index_count;
	uint64_t tombstone_count;
	uint64_t slot_count;
	uint64_t slot_blocks;
	uint64_t segment_count;
	uint64_t reserved[7];
};

/* One volume as the cache remembers it: identity, position and the ends of its chain. */
struct mp_cache_volume {
	uint8_t id[16];
	uint64_t size_bytes;
	uint64_t epoch;
	uint64_t lineage;
	uint64_t destaged_sequence;    /* acknowledged by the store */
	uint64_t last_sequence;        /* newest in the chain at the checkpoint */
	uint64_t synced_sequence;
	uint64_t tail_ordinal;         /* oldest segment that is still needed */
	uint64_t head_ordinal;         /* segment of the next append */
	uint64_t head_offset_bytes;
	uint64_t head_checksum;        /* of the newest record: predecessor of the next */
	uint64_t head_incarnation;
	uint64_t slots_sequence;       /* slots of this volume are valid for this position */
	uint32_t origin;               /* small number of this volume in slot keys */
	uint32_t number;               /* small number of this volume in the log index */
	uint64_t flags;
	uint64_t reserved[4];
};

/* One log segment: which chain holds it. state 0: free, then the rest is zero; 1: in a chain. */
struct mp_segment_entry { uint64_t ordinal; uint32_t number; uint32_t state; };

/* address: in 4 KiB units from the start of the device; 0: the block is zeroes. */
struct mp_index_entry { uint64_t block; uint64_t sequence; uint64_t checksum; uint32_t address;
	uint32_t number; };
struct mp_tombstone { uint64_t first_block; uint64_t block_count; uint64_t sequence;
	uint32_t number;
	uint32_t flags; };
struct mp_slot_entry { uint64_t key; uint32_t reserved0; uint16_t valid; uint8_t heat;
	uint8_t reserved1; }; /* key: origin << 40 | slot-sized block; followed by the checksums */

/* ---- the store ---- */

/* A volume (later: any version) as the store's catalogue holds it. Every change is logged whole. */
struct mp_lineage { uint64_t id; uint64_t first_sequence; };
struct mp_volume_state {
	uint8_t id[16];
	uint8_t parent[16];            /* version tree; zero for a volume of its own */
	/* cache id that may hold acknowledged writes not shipped; zero: none */
	uint8_t dirty_holder[16];
	/* cache id of the writer of this epoch; zero: closed cleanly */
	uint8_t open_holder[16];
	uint64_t size_bytes;
	uint64_t epoch;
	uint64_t lineage;              /* of the newest applied record */
	uint64_t applied_sequence;     /* position of the image, with lineage */
	uint64_t created_commit;       /* store-wide commit number of its birth */
	uint64_t flags;
	struct mp_lineage lineages[8]; /* newest last */
	uint8_t name[256];
	uint64_t reserved[24];
};

/* File 0 of the store. Two copies, at byte 0 and byte 4096; the valid, higher generation counts. */
struct mp_store_super {
	uint64_t magic;
	uint64_t checksum;
	uint32_t version;
	uint32_t reserved0;
	uint32_t compatible_features;
	uint32_t incompatible_features;
	uint8_t store_id[16];
	uint64_t generation;
	/* of the log; synced before the first append of every open */
	uint64_t incarnation;
	uint64_t segment_bytes;
	uint64_t checkpoint_segment;   /* 0: none yet */
	uint64_t checkpoint_offset_bytes;
	uint64_t checkpoint_length_bytes;
	uint64_t checkpoint_checksum;  /* header checksum of the group that holds it */
	uint8_t reserved[3992];
};

/* The store appends groups, 4 KiB aligned: header | records, verbatim, each 8-byte aligned |
 * padding. A group is one append and at most one sync. */
struct mp_group {
	uint64_t magic;
	uint64_t checksum;             /* over the header behind this field */
	uint16_t version;
	uint16_t kind;                 /* 1: data, 2: meta (pages and checkpoints) */
	uint32_t record_count;
	uint64_t incarnation;
	uint64_t commit;               /* store-wide; data groups ascend by one */
	uint64_t segment;
	uint64_t offset_bytes;         /* in the segment file */
	uint64_t length_bytes;         /* with header and padding */
	uint64_t previous_checksum;    /* of the previous group of the log */
	uint64_t synced_commit;        /* all groups up to here were synced when this was written */
	uint64_t reserved[6];
};

/* ---- the wire ---- */

enum mp_frame_type {
	MP_FRAME_HELLO = 1, MP_FRAME_HELLO_REPLY = 2,
	/* JSON payload, control connections only */
	MP_FRAME_CONTROL = 3, MP_FRAME_CONTROL_REPLY = 4,
	MP_FRAME_READ = 5, MP_FRAME_READ_REPLY = 6,
	MP_FRAME_BATCH = 7, MP_FRAME_BATCH_REPLY = 8,
	MP_FRAME_PUT_VOLUME = 9, MP_FRAME_PUT_VOLUME_REPLY = 10,       /* within the daemon only */
	MP_FRAME_DELETE_VOLUME = 11, MP_FRAME_DELETE_VOLUME_REPLY = 12,/* within the daemon only */
	MP_FRAME_CHECKPOINT = 13, MP_FRAME_CHECKPOINT_REPLY = 14,      /* within the daemon only */
	/* the peer broke the protocol; the connection ends after it */
	MP_FRAME_ERROR = 15,
	/* 16 is none: an even number is a reply to the one before it */
	MP_FRAME_BLOCK_STATUS = 17, MP_FRAME_BLOCK_STATUS_REPLY = 18
};

enum mp_status {
	MP_STATUS_OK = 0, MP_STATUS_UNKNOWN_VOLUME = 1, MP_STATUS_STALE_EPOCH = 2,
	MP_STATUS_BEHIND = 3, MP_STATUS_GAP = 4, MP_STATUS_LINEAGE = 5, MP_STATUS_CORRUPT = 6,
	MP_STATUS_IO = 7, MP_STATUS_FULL = 8, MP_STATUS_INVALID = 9, MP_STATUS_RANGE = 10,
	MP_STATUS_CONFLICT = 11
};

struct mp_frame {
	uint32_t magic;
	uint16_t version;
	uint16_t type;                 /* enum mp_frame_type */
	/* header behind this field and the first checked_bytes of payload; seeded with the 8 bytes
	 * before it, so that they count too */
	uint64_t checksum;
	uint32_t payload_bytes;
	/* what follows carries its own checksums (records, stored extents) */
	uint32_t checked_bytes;
	uint32_t status;               /* enum mp_status, replies only */
	uint32_t flags;
	uint64_t request_id;
	uint64_t trace_id;
	uint32_t tenant;
	uint32_t reserved;
	uint64_t deadline_ns;          /* a duration; 0: none */
};

struct mp_read_request {           /* READ: payload; checked */
	uint8_t volume[16];
	uint64_t epoch;
	uint64_t minimum_sequence;     /* a store that has applied less answers MP_STATUS_BEHIND */
	uint64_t first_block;
	uint32_t block_count;
	uint32_t reserved;
};

/* READ_REPLY: payload = mp_read_reply | pieces (both checked) | stored bytes of each piece in
 * order. Pieces tile the range asked for, ascending. A raw piece ships only the wanted blocks, a
 * compressed one its whole extent; a hole is a piece whose extent has codec ZERO. */
struct mp_read_reply {
	uint8_t volume[16];
	uint64_t lineage;
	uint64_t sequence;
	uint64_t first_block;
	uint32_t block_count;
	uint32_t piece_count;
};
struct mp_piece {
	uint64_t first_block;          /* wanted */
	uint32_t block_count;          /* wanted */
	uint32_t shipped_bytes;
	struct mp_extent extent;       /* as stored; the wanted blocks lie within */
};

/* BLOCK_STATUS: payload; checked. Position and epoch are held to the same rules as READ's. */
struct mp_status_request {
	uint8_t volume[16];
	uint64_t epoch;
	uint64_t minimum_sequence;
	uint64_t first_block;
	uint64_t block_count;
};

/* BLOCK_STATUS_REPLY: payload = mp_status_reply | runs; all checked. Runs tile the range asked for
 * from first_block on, perhaps not to its end: ask again from there. Neighbours may be alike. */
struct mp_status_reply {
	uint8_t volume[16];
	uint64_t lineage;
	uint64_t sequence;
	uint64_t first_block;
	uint32_t run_count;
	uint32_t reserved;
};
struct mp_status_run {
	uint64_t block_count;
	uint32_t hole;                 /* 1: never written, zeroed or trimmed; reads as zeroes */
	uint32_t reserved;
};

/* BATCH: payload = the records of one batch, all parts in order, each followed by zeroes to 8
 * bytes. */
struct mp_batch_reply {            /* BATCH_REPLY: payload; checked */
	uint8_t volume[16];
	uint64_t epoch;                /* the store's */
	uint64_t lineage;
	uint64_t applied_sequence;
	uint64_t reserved;
};
/* cdef: end */

#define MP_RECORD_MAGIC 0x31434552444e504dULL          /* "MPNDREC1" */
#define MP_CACHE_SUPER_MAGIC 0x31504353444e504dULL     /* "MPNDSCP1" */
#define MP_CACHE_CHECKPOINT_MAGIC 0x31504b43444e504dULL
#define MP_STORE_SUPER_MAGIC 0x31505353444e504dULL
#define MP_GROUP_MAGIC 0x31505247444e504dULL
#define MP_FRAME_MAGIC 0x31444e4dU

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "formats are little endian");
_Static_assert(sizeof(struct mp_extent) == MP_EXTENT_BYTES, "extent");
_Static_assert(offsetof(struct mp_extent, checksum) == 48, "extent");
_Static_assert(sizeof(struct mp_record) == MP_RECORD_HEADER_BYTES, "record");
_Static_assert(offsetof(struct mp_record, volume) == 32, "record");
_Static_assert(offsetof(struct mp_record, incarnation) == 112, "record");
_Static_assert(sizeof(struct mp_cache_super) == MP_BLOCK_BYTES, "cache superblock");
_Static_assert(sizeof(struct mp_cache_checkpoint) == 128, "checkpoint");
_Static_assert(sizeof(struct mp_cache_volume) == 160, "cache volume");
_Static_assert(sizeof(struct mp_segment_entry) == 16, "segment entry");
_Static_assert(sizeof(struct mp_index_entry) == 32, "index entry");
_Static_assert(sizeof(struct mp_tombstone) == 32, "tombstone");
_Static_assert(sizeof(struct mp_slot_entry) == 16, "slot entry");
_Static_assert(sizeof(struct mp_volume_state) == 688, "volume state");
_Static_assert(sizeof(struct mp_store_super) == MP_BLOCK_BYTES, "store superblock");
_Static_assert(sizeof(struct mp_group) == MP_GROUP_HEADER_BYTES, "group");
_Static_assert(sizeof(struct mp_frame) == MP_FRAME_HEADER_BYTES, "frame");
_Static_assert(sizeof(struct mp_read_request) == 48, "read request");
_Static_assert(sizeof(struct mp_status_request) == 48, "status request");
_Static_assert(sizeof(struct mp_status_reply) == 48, "status reply");
_Static_assert(sizeof(struct mp_status_run) == 16, "status run");
_Static_assert(sizeof(struct mp_read_reply) == 48, "read reply");
_Static_assert(sizeof(struct mp_piece) == 136, "piece");
_Static_assert(sizeof(struct mp_batch_reply) == 48, "batch reply");

#endif
