/* nbd_internal.h - what the parts of the NBD transmission share: nbd.c (in), nbdrequest.c (what is
 * asked for), nbdfence.c (what dead connections left), nbdleave.c (what goes on elsewhere) and
 * nbdreply.c (out).
 *
 * Engine thread only.
 */
#ifndef MILLPOND_NBD_INTERNAL_H
#define MILLPOND_NBD_INTERNAL_H

#include "engine_internal.h"

enum { REQUEST_MAGIC = 0x25609513, REPLY_MAGIC = 0x67446698, CHUNK_MAGIC = 0x668e33ef,
	REQUEST_BYTES = 28 };
enum { COMMAND_READ = 0, COMMAND_WRITE, COMMAND_DISC, COMMAND_FLUSH, COMMAND_TRIM, COMMAND_CACHE,
	COMMAND_WRITE_ZEROES, COMMAND_BLOCK_STATUS };
enum { FLAG_FUA = 1, FLAG_NO_HOLE = 2, FLAG_DF = 4, FLAG_REQ_ONE = 8, FLAG_FAST_ZERO = 16 };
enum { ALLOCATION_HOLE = 1, ALLOCATION_ZERO = 2, ALLOCATION_CONTEXT = 1 };

/* BLOCK_STATUS (nbdstatus.c): runs of blocks as the cache knows them; the store is asked for the
 * unknown ones. */
enum run_kind { RUN_DATA, RUN_ZERO, RUN_UNKNOWN };
struct status_run { uint64_t block_count; enum run_kind kind; };
struct status {
	struct link in_queue;     /* of the store_link, while the store is asked */
	struct request *request;
	uint64_t request_id;
	uint64_t first_block;     /* of runs */
	uint64_t asked_first, asked_end; /* what the store is asked about */
	uint32_t run_count, descriptor_count;
	struct status_run runs[STATUS_RUNS_MAX];
	uint32_t descriptors[2 * STATUS_RUNS_MAX]; /* big endian: length, flags */
};

/* nbd.c */
void connection_break(struct connection *connection); /* nothing more is read or answered */
void connection_abandon_write(struct connection *connection);
bool connection_may_receive(const struct connection *connection);
void connection_receive(struct connection *connection); /* what is there, and start it */
void connection_unfence(struct connection *connection); /* if it waits, and need not any more */

/* nbdfence.c */
void fence_volume(struct volume *volume); /* a new connection comes */
/* Whether a write that came on a connection which is over is still to happen. */
bool connection_is_fenced(const struct connection *connection);

/* nbdleave.c */
struct left { struct left *next; uint64_t cookie; int socket; uint32_t length_bytes;
	uint8_t bytes[]; };
bool connection_may_leave(const struct connection *connection);
bool connection_left(struct connection *connection); /* false: no memory, it stays */

/* nbdrequest.c */
struct request *request_new(struct connection *connection, const uint8_t *header);
/* The errno of a request that must not be carried out, or 0. */
int request_validate(const struct request *request);
void request_start(struct request *request); /* any but a WRITE */
/* One more slice of the request; NULL: no memory. */
struct mutation *request_mutation(struct request *request, enum mutation_kind kind,
				  uint64_t first_byte, uint64_t length_bytes);

/* nbdwalk.c: CACHE and BLOCK_STATUS go through their range in bounded steps */
void walk_start(struct request *request);

/* nbdstatus.c */
bool status_walk(struct request *request, uint32_t *steps); /* true: at the end of the walk */
void status_walked(struct request *request);                /* ask the store, or answer */

/* nbdreply.c */
void request_free(struct request *request);
void connection_watch(struct connection *connection, bool write);

#endif
