/* nbd_internal.h - what the parts of the NBD transmission share: nbd.c (in), nbdrequest.c (what is
 * asked for) and nbdreply.c (out).
 *
 * Engine thread only.
 */
#ifndef MILLPOND_NBD_INTERNAL_H
#define MILLPOND_NBD_INTERNAL_H

#include "engine_internal.h"

enum { REQUEST_MAGIC = 0x25609513, REPLY_MAGIC = 0x67446698, REQUEST_BYTES = 28 };
enum { COMMAND_READ = 0, COMMAND_WRITE, COMMAND_DISC, COMMAND_FLUSH, COMMAND_TRIM, COMMAND_CACHE,
	COMMAND_WRITE_ZEROES };
enum { FLAG_FUA = 1, FLAG_NO_HOLE = 2 };

/* nbd.c */
void connection_break(struct connection *connection); /* nothing more is read or answered */
void connection_abandon_write(struct connection *connection);
bool connection_may_receive(const struct connection *connection);

/* nbdrequest.c */
struct request *request_new(struct connection *connection, const uint8_t *header);
/* The errno of a request that must not be carried out, or 0. */
int request_validate(const struct request *request);
void request_start(struct request *request); /* any but a WRITE */
/* One more slice of the request; NULL: no memory. */
struct mutation *request_mutation(struct request *request, enum mutation_kind kind,
				  uint64_t first_byte, uint64_t length_bytes);

/* nbdreply.c */
void request_free(struct request *request);
void connection_watch(struct connection *connection, bool write);

#endif
