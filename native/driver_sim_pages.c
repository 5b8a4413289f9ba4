/* driver_sim_pages.c - sparse content of a simulated file: a two-level table of 4 KiB pages.
 *
 * A hole is NULL; a page of zeroes is one shared constant, so that a formatted GiB costs
 * pointers only. Pages never change in place: whoever holds a pointer (table or unsynced change)
 * owns it alone.
 */
#include <stdlib.h>
#include <string.h>

#include "driver_sim_private.h"

static const uint8_t ZEROES[MP_BLOCK_BYTES];

const uint8_t *mp_sim_page_zero(void)
{
	return ZEROES;
}

const uint8_t *mp_sim_page_copy(const void *bytes)
{
	if (memcmp(bytes, ZEROES, MP_BLOCK_BYTES) == 0)
		return ZEROES;
	uint8_t *page = malloc(MP_BLOCK_BYTES);
	assert(page);
	memcpy(page, bytes, MP_BLOCK_BYTES);
	return page;
}

void mp_sim_page_free(const uint8_t *page)
{
	if (page != ZEROES)
		free((void *)(uintptr_t)page);
}

const uint8_t *mp_sim_page_get(const struct mp_sim_file *file, uint64_t index)
{
	uint64_t leaf = index / MP_SIM_LEAF_PAGES;

	if (leaf >= file->leaf_count || !file->leaves[leaf])
		return NULL;
	return file->leaves[leaf]->pages[index % MP_SIM_LEAF_PAGES];
}

/* Install page (ownership passes) and return the one that was there (ownership passes back). */
const uint8_t *mp_sim_page_swap(struct mp_sim_disk *disk, struct mp_sim_file *file, uint64_t index,
				const uint8_t *page)
{
	uint64_t leaf = index / MP_SIM_LEAF_PAGES;

	if (!page && !mp_sim_page_get(file, index))
		return NULL;
	if (leaf >= file->leaf_count) {
		uint64_t count = file->leaf_count;
		file->leaves = mp_sim_grow(file->leaves, &file->leaf_count, leaf + 1,
					   sizeof *file->leaves);
		memset(file->leaves + count, 0, (file->leaf_count - count) * sizeof *file->leaves);
	}
	if (!file->leaves[leaf]) {
		file->leaves[leaf] = calloc(1, sizeof *file->leaves[leaf]);
		assert(file->leaves[leaf]);
	}
	const uint8_t **place = &file->leaves[leaf]->pages[index % MP_SIM_LEAF_PAGES];
	const uint8_t *old = *place;
	*place = page;
	disk->allocated_pages += (uint64_t)(page != NULL);
	disk->allocated_pages -= (uint64_t)(old != NULL);
	return old;
}

/* A page of which each sector is, by chance, the old or the new. NULL is a hole. */
const uint8_t *mp_sim_page_tear(const uint8_t *old, const uint8_t *new,
				struct mp_sim_random *random)
{
	uint8_t torn[MP_BLOCK_BYTES];

	for (uint32_t at = 0; at < MP_BLOCK_BYTES; at += MP_SIM_SECTOR_BYTES) {
		const uint8_t *from = mp_sim_random_below(random, 2) ? new : old;
		memcpy(torn + at, from ? from + at : ZEROES, MP_SIM_SECTOR_BYTES);
	}
	return mp_sim_page_copy(torn);
}

void mp_sim_pages_free(struct mp_sim_disk *disk, struct mp_sim_file *file)
{
	for (uint64_t leaf = 0; leaf < file->leaf_count; leaf++) {
		if (!file->leaves[leaf])
			continue;
		for (uint64_t i = 0; i < MP_SIM_LEAF_PAGES; i++)
			mp_sim_page_free(mp_sim_page_swap(disk, file, leaf * MP_SIM_LEAF_PAGES + i,
							  NULL));
		free(file->leaves[leaf]);
	}
	free(file->leaves);
	file->leaves = NULL;
	file->leaf_count = 0;
}
