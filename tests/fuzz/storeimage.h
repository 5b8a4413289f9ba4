/* storeimage.h - the groups, records and pages of a store's image, and their checksums. */
#ifndef MILLPOND_FUZZ_STOREIMAGE_H
#define MILLPOND_FUZZ_STOREIMAGE_H

#include "fuzz.h"

enum { GROUPS_MAX = 256, PAGES_MAX = 512, PAGE_LEVELS = 4, RECORDS_AT = MP_GROUP_HEADER_BYTES };

struct group {
	uint64_t file, offset_bytes, length_bytes, checksum, commit;
	uint16_t kind;
	uint32_t record_count;
	bool is_root;
	uint8_t *bytes;                     /* while it is resealed */
};
struct page { uint32_t group, level; uint64_t descriptor_at, page_at, place; };
struct store_image {
	struct image image;
	struct places places;
	struct mp_store_super super;
	struct group groups[GROUPS_MAX];
	struct page pages[PAGES_MAX];
	uint32_t group_count, page_count;
};
/* Find everything in a store that was taken as an image. */
void store_image_note(struct store_image *store, struct mp_sim *sim);
/* Pages, from leaves to roots; records; groups in the log's order; superblocks. */
void store_image_reseal(struct store_image *store, struct mp_sim *sim);

#endif
