/* driver_linux_files.c - file numbers to descriptors, for the real driver.
 *
 * Happy path: a device is one descriptor. In a directory, file n is sixteen hexadecimal digits
 * and ".seg", opened on first use and kept open until it is the longest unused of
 * MP_LINUX_FILES.
 * Failure modes: a file that is not there or not openable is the io's -errno; a descriptor with
 * I/O in flight is never closed (its number could be reused by another file while the kernel
 * still writes); a removed file leaves the table at once, so that a new file of the same number
 * is not written through the old one's descriptor.
 */
#include "driver_linux.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { NAME_DIGITS = 16, NAME_BYTES = 24 };

static void file_name(uint64_t number, char name[NAME_BYTES])
{
	int written = snprintf(name, NAME_BYTES, "%016" PRIx64 ".seg", number);
	assert(written == NAME_DIGITS + 4);
}

/* Strict: exactly what file_name makes; anything else in the directory is not ours. */
static bool parse_name(const char *name, uint64_t *number)
{
	uint64_t value = 0;

	for (int i = 0; i < NAME_DIGITS; i++) {
		char c = name[i];
		uint64_t digit;
		if (c >= '0' && c <= '9')
			digit = (uint64_t)(c - '0');
		else if (c >= 'a' && c <= 'f')
			digit = (uint64_t)(c - 'a') + 10;
		else
			return false;
		value = value << 4 | digit;
	}
	*number = value;
	return strcmp(name + NAME_DIGITS, ".seg") == 0;
}

static struct mp_linux_file **bucket_of(struct mp_linux_files *files, uint64_t number)
{
	uint64_t mixed = number * 0x9e3779b97f4a7c15u;
	return &files->buckets[mixed >> 32 & (MP_LINUX_FILE_BUCKETS - 1)];
}

static void unlink_age(struct mp_linux_files *files, struct mp_linux_file *file)
{
	*(file->older ? &file->older->newer : &files->oldest) = file->newer;
	*(file->newer ? &file->newer->older : &files->newest) = file->older;
	file->older = file->newer = NULL;
}

static void link_newest(struct mp_linux_files *files, struct mp_linux_file *file)
{
	file->older = files->newest;
	file->newer = NULL;
	*(file->older ? &file->older->newer : &files->oldest) = file;
	files->newest = file;
}

static void unlink_bucket(struct mp_linux_files *files, struct mp_linux_file *file)
{
	struct mp_linux_file **link = bucket_of(files, file->number);

	while (*link != file)
		link = &(*link)->bucket_next;
	*link = file->bucket_next;
}

static void close_file(struct mp_linux_files *files, struct mp_linux_file *file)
{
	assert(file->in_flight == 0);
	close(file->fd);
	file->fd = -1;
	file->older = files->unused;
	files->unused = file;
}

void mp_linux_files_init(struct mp_linux_files *files, int fd, bool is_device)
{
	files->is_device = is_device;
	files->directory_fd = fd;
	files->device.fd = fd;
	for (int i = 0; i < MP_LINUX_FILES; i++) {
		files->pool[i].fd = -1;
		files->pool[i].older = files->unused;
		files->unused = &files->pool[i];
	}
}

void mp_linux_files_close(struct mp_linux_files *files)
{
	while (files->oldest) {
		struct mp_linux_file *file = files->oldest;
		unlink_age(files, file);
		unlink_bucket(files, file);
		close_file(files, file);
	}
	close(files->directory_fd);
}

static struct mp_linux_file *take_unused(struct mp_linux_files *files)
{
	if (!files->unused) {
		struct mp_linux_file *victim = files->oldest;
		while (victim && victim->in_flight)
			victim = victim->newer;
		assert(victim); /* MP_LINUX_FILES > MP_LINUX_AIO_DEPTH + MP_LINUX_AIO_BATCH */
		unlink_age(files, victim);
		unlink_bucket(files, victim);
		close_file(files, victim);
	}
	struct mp_linux_file *file = files->unused;
	files->unused = file->older;
	memset(file, 0, sizeof *file);
	return file;
}

int mp_linux_file_acquire(struct mp_linux_files *files, uint64_t number, struct mp_linux_file **out)
{
	struct mp_linux_file *file;

	if (files->is_device) {
		if (number != 0)
			return -ENOENT;
		file = &files->device;
		file->in_flight++;
		*out = file;
		return 0;
	}
	for (file = *bucket_of(files, number); file; file = file->bucket_next) {
		if (file->number == number)
			break;
	}
	if (file) {
		unlink_age(files, file);
	} else {
		int fd = mp_linux_file_open(files, number, O_RDWR | O_DIRECT);
		if (fd < 0)
			return fd;
		file = take_unused(files);
		file->number = number;
		file->fd = fd;
		struct mp_linux_file **bucket = bucket_of(files, number);
		file->bucket_next = *bucket;
		*bucket = file;
	}
	link_newest(files, file);
	file->in_flight++;
	*out = file;
	return 0;
}

void mp_linux_file_release(struct mp_linux_files *files, struct mp_linux_file *file)
{
	assert(file->in_flight > 0);
	file->in_flight--;
	if (file->forgotten && file->in_flight == 0)
		close_file(files, file);
}

void mp_linux_file_forget(struct mp_linux_files *files, uint64_t number)
{
	struct mp_linux_file *file;

	for (file = *bucket_of(files, number); file; file = file->bucket_next) {
		if (file->number == number)
			break;
	}
	if (!file)
		return;
	unlink_age(files, file);
	unlink_bucket(files, file);
	file->forgotten = true;
	if (file->in_flight == 0)
		close_file(files, file);
}

/* A device does not grow: a regular file in its place must not either, or a wrong offset would
 * hide. */
int mp_linux_device_room(struct mp_linux_files *files, uint64_t end_bytes)
{
	if (!files->is_device || end_bytes <= files->device_bytes)
		return 0;
	int64_t length_bytes = mp_linux_file_length(files, 0);
	if (length_bytes < 0)
		return (int)length_bytes;
	files->device_bytes = (uint64_t)length_bytes;
	return end_bytes <= files->device_bytes ? 0 : -ENOSPC;
}

static int compare_numbers(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
	return a < b ? -1 : a > b;
}

int64_t mp_linux_list_files(const struct mp_linux_files *files, uint64_t *numbers,
			    uint64_t capacity)
{
	uint64_t count = 0;

	if (files->is_device) {
		if (capacity > 0)
			numbers[0] = 0;
		return 1;
	}
	int fd = openat(files->directory_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	DIR *directory = fdopendir(fd);
	if (!directory) {
		int error = errno;
		close(fd);
		return -error;
	}
	int error;
	for (;;) {
		uint64_t number;
		errno = 0;
		struct dirent *entry = readdir(directory);
		error = errno;
		if (!entry)
			break;
		if (!parse_name(entry->d_name, &number))
			continue;
		if (count < capacity)
			numbers[count] = number;
		count++;
	}
	closedir(directory);
	if (error)
		return -error;
	uint64_t filled = count < capacity ? count : capacity;
	if (filled > 0)
		qsort(numbers, filled, sizeof *numbers, compare_numbers);
	return (int64_t)count;
}

int64_t mp_linux_file_length(const struct mp_linux_files *files, uint64_t number)
{
	struct stat status;
	char name[NAME_BYTES];

	if (!files->is_device) {
		file_name(number, name);
		if (fstatat(files->directory_fd, name, &status, AT_SYMLINK_NOFOLLOW) < 0)
			return -errno;
		return status.st_size;
	}
	if (number != 0)
		return -ENOENT;
	if (fstat(files->device.fd, &status) < 0)
		return -errno;
	if (!S_ISBLK(status.st_mode))
		return status.st_size;
	uint64_t length_bytes;
	if (ioctl(files->device.fd, BLKGETSIZE64, &length_bytes) < 0)
		return -errno;
	return (int64_t)length_bytes;
}

int mp_linux_file_open(const struct mp_linux_files *files, uint64_t number, int flags)
{
	char name[NAME_BYTES];

	file_name(number, name);
	int fd = openat(files->directory_fd, name, flags | O_CLOEXEC | O_NOFOLLOW, 0600);
	return fd < 0 ? -errno : fd;
}

static int64_t sync_and_close(int fd)
{
	int error = fsync(fd) < 0 ? errno : 0;
	close(fd);
	return -error;
}

/* Durable when it returns: the inode first, then the name, so that no name leads to nothing. */
int64_t mp_linux_file_create(const struct mp_linux_files *files, uint64_t number)
{
	if (files->is_device)
		return -ENOTSUP;
	int fd = mp_linux_file_open(files, number, O_RDWR | O_CREAT | O_EXCL | O_DIRECT);
	if (fd < 0)
		return fd;
	int64_t result = sync_and_close(fd);
	if (result == 0 && fsync(files->directory_fd) < 0)
		result = -errno;
	return result;
}

int64_t mp_linux_file_remove(const struct mp_linux_files *files, uint64_t number)
{
	char name[NAME_BYTES];

	if (files->is_device)
		return -ENOTSUP;
	file_name(number, name);
	if (unlinkat(files->directory_fd, name, 0) < 0)
		return -errno;
	return fsync(files->directory_fd) < 0 ? -errno : 0;
}
