/* driver_sim_private.h - the inside of the simulated world: for driver_sim*.c only.
 *
 * One test thread owns everything. Chance comes only from struct mp_sim_random; nothing decides
 * by an address, a clock or the order of a hash. Out of memory is an assert: a test has no use
 * for less.
 */
#ifndef MILLPOND_DRIVER_SIM_PRIVATE_H
#define MILLPOND_DRIVER_SIM_PRIVATE_H

#include <stdatomic.h>
#include <stdbool.h>

#include "driver_private.h"
#include "driver_sim.h"

enum { MP_SIM_SECTOR_BYTES = 512, MP_SIM_LEAF_PAGES = 512 };
enum { MP_SIM_MAX_FILE_BYTES_LOG2 = 44 };   /* 16 TiB, as ext4 */

struct mp_sim_random {
	uint64_t state[4];                   /* xoshiro256** */
};

/* How much of a mutation happens. */
enum mp_sim_extent { MP_SIM_WHOLE, MP_SIM_TORN, MP_SIM_NOTHING };

struct mp_sim_leaf {
	const uint8_t *pages[MP_SIM_LEAF_PAGES];
};

/* A page's other content: before the change while the change stands, after it once it is undone. */
struct mp_sim_item {
	uint64_t index;
	const uint8_t *page;
};

/* A completed WRITE, PUNCH or ALLOCATE that no SYNC covers yet. */
struct mp_sim_change {
	uint64_t sequence;                   /* in order of completion, over the whole disk */
	uint64_t end_bytes;
	uint64_t count;
	uint32_t op;
	bool doubtful;                       /* a SYNC that covered it failed: no later one helps */
	struct mp_sim_item items[];
};

struct mp_sim_file {
	uint64_t number;
	uint64_t length_bytes;               /* as read now */
	uint64_t durable_length_bytes;
	struct mp_sim_leaf **leaves;
	uint64_t leaf_count;
	struct mp_sim_change **changes;      /* unsynced, by sequence */
	uint64_t change_count, change_capacity;
};

struct mp_sim_disk {
	bool is_device;
	struct mp_sim_file **files;          /* by number */
	uint64_t file_count, file_capacity;
	uint64_t allocated_pages, capacity_pages; /* 0: no limit */
	uint64_t sequence;                   /* of the newest change */
};

struct mp_sim_bytes {
	uint8_t *data;
	uint64_t first, end, capacity_bytes;
};

struct mp_sim_socket {
	struct mp_sim_bytes to_core, from_core;
	uint64_t limit_bytes;
	uint32_t interest;
	void *context;
	bool closed;                         /* by the core */
	bool dead;                           /* the core's process ended with it open */
	bool hung_up;                        /* by the peer */
};

struct mp_sim_pending {
	struct mp_io *io;
	uint64_t due_ns;
	uint64_t covers;                     /* SYNC: changes up to this sequence */
	bool fails, strays;
};

struct mp_sim {
	struct mp_sim_options options;
	struct mp_driver *driver;
	struct mp_sim_disk disk;
	/* what happens when; what survives; random_bytes */
	struct mp_sim_random schedule, fate, core;
	uint64_t generation;                 /* of seeding: mp_sim_set with the same seed differs */
	uint64_t now_ns;
	bool crashed, in_wait;
	atomic_bool woken, notified;
	struct mp_sim_pending *pending;      /* in order of submission */
	uint64_t pending_count, pending_capacity;
	uint64_t mutations, fail_counted, writes;
	uint64_t completed[MP_OP_CALL + 1];
	struct mp_sim_socket *sockets;
	uint64_t socket_count;
};

/* driver_sim_random.c */
void mp_sim_random_seed(struct mp_sim_random *random, uint64_t seed, uint64_t generation,
			uint64_t stream);
uint64_t mp_sim_random_next(struct mp_sim_random *random);
uint64_t mp_sim_random_below(struct mp_sim_random *random, uint64_t bound); /* bound > 0 */
void *mp_sim_grow(void *array, uint64_t *capacity, uint64_t needed, uint64_t element_bytes);

/* driver_sim_pages.c: the content of one file */
const uint8_t *mp_sim_page_get(const struct mp_sim_file *file, uint64_t index);
const uint8_t *mp_sim_page_swap(struct mp_sim_disk *disk, struct mp_sim_file *file, uint64_t index,
				const uint8_t *page);
const uint8_t *mp_sim_page_zero(void);                /* allocated, all zeroes, costs nothing */
const uint8_t *mp_sim_page_copy(const void *bytes);
void mp_sim_page_free(const uint8_t *page);
const uint8_t *mp_sim_page_tear(const uint8_t *old, const uint8_t *new,
				struct mp_sim_random *random);
void mp_sim_pages_free(struct mp_sim_disk *disk, struct mp_sim_file *file);

/* driver_sim_disk.c: files and what is not durable of them */
void mp_sim_disk_init(struct mp_sim_disk *disk, uint64_t device_bytes);
void mp_sim_disk_free(struct mp_sim_disk *disk);
struct mp_sim_file *mp_sim_disk_find(const struct mp_sim_disk *disk, uint64_t number);
void mp_sim_disk_reopen(struct mp_sim_disk *disk);    /* by a new process */
int64_t mp_sim_disk_create(struct mp_sim_disk *disk, uint64_t number);
int64_t mp_sim_disk_remove(struct mp_sim_disk *disk, uint64_t number);
int64_t mp_sim_disk_read(const struct mp_sim_disk *disk, const struct mp_io *io);
int64_t mp_sim_disk_change(struct mp_sim_disk *disk, const struct mp_io *io,
			   enum mp_sim_extent extent,
			   struct mp_sim_random *random);
int64_t mp_sim_disk_sync(struct mp_sim_disk *disk, uint64_t number, uint64_t covers, bool fails);

/* driver_sim_loss.c: what power loss leaves */
void mp_sim_disk_power_loss(struct mp_sim_disk *disk, struct mp_sim_random *random, bool reorder,
			    bool tear);
void mp_sim_change_free(struct mp_sim_change *change);

/* driver_sim_socket.c */
int64_t mp_sim_receive(void *self, int socket, struct iovec *iov, int count);
int64_t mp_sim_send(void *self, int socket, const struct iovec *iov, int count);
int mp_sim_watch(void *self, int socket, uint32_t interest, void *context);
uint32_t mp_sim_closed_by_peer(void *self, int socket);
void mp_sim_close_socket(void *self, int socket);
void mp_sim_release_socket(void *self, int socket);
int64_t mp_sim_sockets_run(struct mp_sim *sim);       /* on_ready of all that are */
void mp_sim_sockets_kill(struct mp_sim *sim);         /* the core's process is gone */
void mp_sim_sockets_free(struct mp_sim *sim);

#endif
