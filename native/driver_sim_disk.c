/* driver_sim_disk.c - the simulated disk: files, reads, mutations, durability.
 *
 * Happy path: a completed mutation changes the content at once and leaves an undo record in its
 * file's list of unsynced changes; a SYNC drops the records it covers.
 * Failure modes: past the end -EIO (read) or -ENOSPC (device write), no such file -ENOENT; a
 * failed SYNC makes what it covered doubtful: no later SYNC of the same process makes that
 * durable, as on a real disk whose kernel has reported the error once and forgotten it. A process
 * that starts anew reads what the device has (O_DIRECT, there is no page that only looks written):
 * what is there then, a SYNC that succeeds covers. driver_sim_loss.c uses the records after a loss
 * of power.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "driver_sim_private.h"

/* Index of the first file whose number is not below. */
static uint64_t find_place(const struct mp_sim_disk *disk, uint64_t number)
{
	uint64_t low = 0, high = disk->file_count;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		if (disk->files[middle]->number < number)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

struct mp_sim_file *mp_sim_disk_find(const struct mp_sim_disk *disk, uint64_t number)
{
	uint64_t place = find_place(disk, number);

	if (place == disk->file_count || disk->files[place]->number != number)
		return NULL;
	return disk->files[place];
}

static struct mp_sim_file *add_file(struct mp_sim_disk *disk, uint64_t number)
{
	struct mp_sim_file *file = calloc(1, sizeof *file);
	uint64_t place = find_place(disk, number);

	assert(file);
	file->number = number;
	disk->files = mp_sim_grow(disk->files, &disk->file_capacity, disk->file_count + 1,
				  sizeof(struct mp_sim_file *));
	memmove(disk->files + place + 1, disk->files + place,
		(disk->file_count - place) * sizeof *disk->files);
	disk->files[place] = file;
	disk->file_count++;
	return file;
}

static void free_file(struct mp_sim_disk *disk, struct mp_sim_file *file)
{
	for (uint64_t i = 0; i < file->change_count; i++)
		mp_sim_change_free(file->changes[i]);
	free(file->changes);
	mp_sim_pages_free(disk, file);
	free(file);
}

void mp_sim_disk_init(struct mp_sim_disk *disk, uint64_t device_bytes)
{
	disk->is_device = device_bytes > 0;
	if (!disk->is_device)
		return;
	struct mp_sim_file *file = add_file(disk, 0);
	file->length_bytes = file->durable_length_bytes = device_bytes;
}

void mp_sim_disk_free(struct mp_sim_disk *disk)
{
	for (uint64_t i = 0; i < disk->file_count; i++)
		free_file(disk, disk->files[i]);
	free(disk->files);
	assert(disk->allocated_pages == 0);
}

int64_t mp_sim_disk_create(struct mp_sim_disk *disk, uint64_t number)
{
	if (disk->is_device)
		return -ENOTSUP;
	if (mp_sim_disk_find(disk, number))
		return -EEXIST;
	add_file(disk, number);
	return 0;
}

int64_t mp_sim_disk_remove(struct mp_sim_disk *disk, uint64_t number)
{
	uint64_t place = find_place(disk, number);

	if (disk->is_device)
		return -ENOTSUP;
	if (place == disk->file_count || disk->files[place]->number != number)
		return -ENOENT;
	free_file(disk, disk->files[place]);
	disk->file_count--;
	memmove(disk->files + place, disk->files + place + 1,
		(disk->file_count - place) * sizeof *disk->files);
	return 0;
}

int64_t mp_sim_disk_read(const struct mp_sim_disk *disk, const struct mp_io *io)
{
	const struct mp_sim_file *file = mp_sim_disk_find(disk, io->file);
	uint64_t index = io->offset_bytes / MP_BLOCK_BYTES;

	if (!file)
		return -ENOENT;
	if (io->offset_bytes + io->length_bytes > file->length_bytes)
		return -EIO;
	for (uint32_t i = 0; i < io->iov_count; i++) {
		uint8_t *out = io->iov[i].iov_base;
		for (uint64_t at = 0; at < io->iov[i].iov_len; at += MP_BLOCK_BYTES, index++) {
			const uint8_t *page = mp_sim_page_get(file, index);
			memcpy(out + at, page ? page : mp_sim_page_zero(), MP_BLOCK_BYTES);
		}
	}
	return (int64_t)io->length_bytes;
}

/* The content of one page after the mutation; NULL: a hole. Walks io->iov with the position. */
struct cursor {
	const struct mp_io *io;
	uint32_t iov;
	uint64_t at;
};

static const uint8_t *new_page(struct cursor *cursor, const uint8_t *old)
{
	const struct mp_io *io = cursor->io;

	if (io->op == MP_OP_PUNCH)
		return NULL;
	if (io->op == MP_OP_ALLOCATE)
		return old ? mp_sim_page_copy(old) : mp_sim_page_zero();
	while (cursor->at == io->iov[cursor->iov].iov_len) {
		cursor->iov++;
		cursor->at = 0;
	}
	const uint8_t *from = (const uint8_t *)io->iov[cursor->iov].iov_base + cursor->at;
	cursor->at += MP_BLOCK_BYTES;
	return mp_sim_page_copy(from);
}

static bool has_room(const struct mp_sim_disk *disk, const struct mp_sim_file *file,
		     const struct mp_io *io)
{
	uint64_t first = io->offset_bytes / MP_BLOCK_BYTES, pages = 0;

	if (disk->capacity_pages == 0 || io->op == MP_OP_PUNCH)
		return true;
	for (uint64_t i = 0; i < io->length_bytes / MP_BLOCK_BYTES; i++)
		pages += !mp_sim_page_get(file, first + i);
	return pages == 0 || disk->allocated_pages + pages <= disk->capacity_pages;
}

static int64_t check_change(const struct mp_sim_disk *disk, const struct mp_sim_file *file,
			    const struct mp_io *io)
{
	uint64_t end_bytes = io->offset_bytes + io->length_bytes;

	if (!file)
		return -ENOENT;
	if (disk->is_device && end_bytes > file->length_bytes && io->op != MP_OP_PUNCH)
		return -ENOSPC;
	if (end_bytes > (uint64_t)1 << MP_SIM_MAX_FILE_BYTES_LOG2)
		return -EFBIG;
	return has_room(disk, file, io) ? 0 : -ENOSPC;
}

/* Make the change visible and remember how to undo it. Torn: each sector of it or not, by
 * chance. */
int64_t mp_sim_disk_change(struct mp_sim_disk *disk, const struct mp_io *io,
			   enum mp_sim_extent extent,
			   struct mp_sim_random *random)
{
	struct mp_sim_file *file = mp_sim_disk_find(disk, io->file);
	struct cursor cursor = {io, 0, 0};
	uint64_t end_bytes = io->offset_bytes + io->length_bytes;
	int64_t result = check_change(disk, file, io);

	if (result < 0 || extent == MP_SIM_NOTHING || io->length_bytes == 0)
		return result;
	if (io->op == MP_OP_PUNCH && end_bytes > file->length_bytes)
		end_bytes = file->length_bytes;
	if (io->offset_bytes >= end_bytes)
		return 0;
	uint64_t count = (end_bytes - io->offset_bytes + MP_BLOCK_BYTES - 1) / MP_BLOCK_BYTES;
	struct mp_sim_change *change = malloc(sizeof *change + count * sizeof change->items[0]);
	assert(change);
	change->sequence = ++disk->sequence;
	change->end_bytes = io->op == MP_OP_PUNCH ? 0 : end_bytes;
	change->count = count;
	change->op = io->op;
	change->doubtful = false;
	for (uint64_t i = 0; i < count; i++) {
		uint64_t index = io->offset_bytes / MP_BLOCK_BYTES + i;
		const uint8_t *old = mp_sim_page_get(file, index);
		const uint8_t *page = new_page(&cursor, old);
		if (extent == MP_SIM_TORN) {
			const uint8_t *torn = mp_sim_page_tear(old, page, random);
			mp_sim_page_free(page);
			page = torn;
		}
		change->items[i].index = index;
		change->items[i].page = mp_sim_page_swap(disk, file, index, page);
	}
	if (file->length_bytes < change->end_bytes)
		file->length_bytes = change->end_bytes;
	file->changes = mp_sim_grow(file->changes, &file->change_capacity, file->change_count + 1,
				    sizeof(struct mp_sim_change *));
	file->changes[file->change_count++] = change;
	return io->op == MP_OP_WRITE ? (int64_t)io->length_bytes : 0;
}

/* A doubtful change below one that is now durable: where both touch a page, the newer has
 * replaced it for good, and undoing the older would bring back what is neither. */
static void supersede(struct mp_sim_change *doubtful, const struct mp_sim_change *durable)
{
	uint64_t kept = 0;

	for (uint64_t i = 0; i < doubtful->count; i++) {
		const struct mp_sim_item *item = &doubtful->items[i];
		bool replaced = false;
		for (uint64_t j = 0; j < durable->count && !replaced; j++)
			replaced = durable->items[j].index == item->index;
		if (replaced)
			mp_sim_page_free(item->page);
		else
			doubtful->items[kept++] = *item;
	}
	doubtful->count = kept;
}

void mp_sim_disk_reopen(struct mp_sim_disk *disk)
{
	for (uint64_t f = 0; f < disk->file_count; f++)
		for (uint64_t i = 0; i < disk->files[f]->change_count; i++)
			disk->files[f]->changes[i]->doubtful = false;
}

int64_t mp_sim_disk_sync(struct mp_sim_disk *disk, uint64_t number, uint64_t covers, bool fails)
{
	struct mp_sim_file *file = mp_sim_disk_find(disk, number);
	uint64_t kept = 0;

	if (!file)
		return -ENOENT;
	for (uint64_t i = 0; i < file->change_count; i++) {
		struct mp_sim_change *change = file->changes[i];
		bool covered = change->sequence <= covers && !change->doubtful;
		if (covered && fails)
			change->doubtful = true;
		if (!covered || fails) {
			file->changes[kept++] = change;
			continue;
		}
		for (uint64_t j = 0; j < kept; j++)
			supersede(file->changes[j], change);
		if (file->durable_length_bytes < change->end_bytes)
			file->durable_length_bytes = change->end_bytes;
		mp_sim_change_free(change);
	}
	file->change_count = kept;
	return 0;
}
