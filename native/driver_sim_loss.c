/* driver_sim_loss.c - what a loss of power leaves of a simulated disk.
 *
 * All unsynced changes are undone, newest first, by exchanging pages with their records: the
 * file is then what is durable, and each record holds what its change had written. Then those
 * that chance lets live are done again, oldest first, whole or torn. What is left is durable,
 * and no record remains.
 */
#include <stdlib.h>

#include "driver_sim_private.h"

enum { CHANCES = 4 };

void mp_sim_change_free(struct mp_sim_change *change)
{
	for (uint64_t i = 0; i < change->count; i++)
		mp_sim_page_free(change->items[i].page);
	free(change);
}

static void exchange(struct mp_sim_disk *disk, struct mp_sim_file *file,
		     struct mp_sim_change *change)
{
	for (uint64_t i = 0; i < change->count; i++) {
		struct mp_sim_item *item = &change->items[i];
		item->page = mp_sim_page_swap(disk, file, item->index, item->page);
	}
}

static void undo_all(struct mp_sim_disk *disk, struct mp_sim_file *file)
{
	for (uint64_t i = file->change_count; i > 0; i--)
		exchange(disk, file, file->changes[i - 1]);
	file->length_bytes = file->durable_length_bytes;
}

/* ALLOCATE holds a copy of what it found; what it promises is only that no hole is left. */
static void redo(struct mp_sim_disk *disk, struct mp_sim_file *file, struct mp_sim_change *change,
		 bool torn, struct mp_sim_random *random)
{
	for (uint64_t i = 0; i < change->count; i++) {
		struct mp_sim_item *item = &change->items[i];
		const uint8_t *old = mp_sim_page_get(file, item->index);
		const uint8_t *page = item->page;
		if (change->op == MP_OP_ALLOCATE && old)
			continue;
		if (change->op == MP_OP_ALLOCATE)
			page = mp_sim_page_zero();
		else if (torn)
			page = mp_sim_page_tear(old, page, random);
		else
			item->page = NULL; /* the file owns it now */
		mp_sim_page_free(mp_sim_page_swap(disk, file, item->index, page));
	}
	if (file->length_bytes < change->end_bytes)
		file->length_bytes = change->end_bytes;
}

struct verdict {
	bool reorder, tear;
	uint64_t cut;        /* in order: changes up to this sequence live */
	uint64_t edge;       /* in order and tearing: this one is torn; 0: none */
	uint64_t of_four;    /* out of order: so many of four live */
};

static int compare_sequences(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
	return a < b ? -1 : a > b;
}

/* One cut through the changes of all files, so that what survives is what a disk in order would
 * hold. */
static void choose_cut(const struct mp_sim_disk *disk, struct mp_sim_random *random,
		       struct verdict *verdict)
{
	uint64_t *sequences = NULL, count = 0, capacity = 0;

	for (uint64_t f = 0; f < disk->file_count; f++) {
		const struct mp_sim_file *file = disk->files[f];
		sequences = mp_sim_grow(sequences, &capacity, count + file->change_count,
					sizeof(uint64_t));
		for (uint64_t i = 0; i < file->change_count; i++)
			sequences[count++] = file->changes[i]->sequence;
	}
	if (count > 0) {
		qsort(sequences, count, sizeof *sequences, compare_sequences);
		uint64_t survivors = mp_sim_random_below(random, count + 1);
		verdict->cut = survivors ? sequences[survivors - 1] : 0;
		if (verdict->tear && survivors < count && mp_sim_random_below(random, 2))
			verdict->edge = sequences[survivors];
	}
	free(sequences);
}

static enum mp_sim_extent judge(const struct mp_sim_change *change, const struct verdict *verdict,
				struct mp_sim_random *random)
{
	if (!verdict->reorder && !change->doubtful) {
		if (change->sequence <= verdict->cut)
			return MP_SIM_WHOLE;
		return change->sequence == verdict->edge ? MP_SIM_TORN : MP_SIM_NOTHING;
	}
	bool mixed = verdict->of_four > 0 && verdict->of_four < CHANCES;
	if (verdict->tear && mixed && mp_sim_random_below(random, 2))
		return MP_SIM_TORN;
	return mp_sim_random_below(random, CHANCES) < verdict->of_four ? MP_SIM_WHOLE
		: MP_SIM_NOTHING;
}

void mp_sim_disk_power_loss(struct mp_sim_disk *disk, struct mp_sim_random *random, bool reorder,
			    bool tear)
{
	struct verdict verdict = {.reorder = reorder, .tear = tear};

	/* From "all lost" to "all kept": both ends are worth meeting often. */
	verdict.of_four = mp_sim_random_below(random, CHANCES + 1);
	if (!reorder)
		choose_cut(disk, random, &verdict);
	for (uint64_t f = 0; f < disk->file_count; f++) {
		struct mp_sim_file *file = disk->files[f];
		undo_all(disk, file);
		for (uint64_t i = 0; i < file->change_count; i++) {
			struct mp_sim_change *change = file->changes[i];
			enum mp_sim_extent extent = judge(change, &verdict, random);
			if (extent != MP_SIM_NOTHING)
				redo(disk, file, change, extent == MP_SIM_TORN, random);
			mp_sim_change_free(change);
		}
		file->change_count = 0;
		file->durable_length_bytes = file->length_bytes;
	}
}
