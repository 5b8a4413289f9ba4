"""Every limit of the store room, with the relations between them asserted below.

A limit exists where the outside could make us wait, grow or loop. Numbers that belong to the
format (frame and record sizes) live in native/format.h.
"""

MIB = 1024 * 1024

# Wire. A data frame's payload is bounded by MP_FRAME_PAYLOAD_MAX (native/format.h).
HELLO_PAYLOAD_MAX_BYTES = 16 * 1024
CONTROL_PAYLOAD_MAX_BYTES = 1 * MIB
CONTROL_REPLY_MAX_BYTES = 16 * MIB  # a list of VOLUMES_MAX volumes fits: about 800 bytes each
FRAME_BYTES_MAX = 16 * MIB + 64  # = MP_FRAME_PAYLOAD_MAX + MP_FRAME_HEADER_BYTES; a test compares

# Connections.
HANDSHAKE_TIMEOUT_S = 10.0
CONNECTIONS_MAX = 1024
LISTEN_BACKLOG = 128
CONTROL_IN_FLIGHT_MAX = 64  # calls of one connection; above it we stop reading
RECEIVE_BYTES = 256 * 1024  # one wake-up reads at most this
SEND_HIGH_BYTES = 4 * MIB  # unsent reply bytes of one connection before we stop taking
SEND_LOW_BYTES = 1 * MIB
TAKE_BYTES = 1 * MIB  # one take from the core
TAKE_TURN_BYTES = 8 * MIB  # taken for one connection before others get their turn

# Bytes fed to the core and not answered: above high we stop reading, below low we go on. A frame
# that is still arriving counts, so low must exceed the largest frame or we would wait for ever.
DESTAGE_PENDING_HIGH_BYTES = 64 * MIB
DESTAGE_PENDING_LOW_BYTES = 32 * MIB
# Of fetch connections the core itself takes care: STORE_FETCH_* in native/store_internal.h.
HELLO_RECEIVE_BYTES = 16 * 1024  # until a connection has said what it is

# Catalogue.
VOLUMES_MAX = 16384
NAME_BYTES_MAX = 255
CLIENT_NAME_MAX = 255
VOLUME_BYTES_MAX = 1 << 52  # what a cache can open: core_limits.h, VOLUME_BYTES_MAX
CONFLICT_RETRIES_MAX = 64  # a state that batches keep moving under us

# Transfers (import and export).
IMPORT_WINDOW_BYTES = 4 * MIB  # raw bytes of one batch
IMPORT_IN_FLIGHT_MAX = 8
EXPORT_IN_FLIGHT_MAX = 16

CONNECT_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 5.0

assert DESTAGE_PENDING_LOW_BYTES > FRAME_BYTES_MAX
assert DESTAGE_PENDING_HIGH_BYTES > DESTAGE_PENDING_LOW_BYTES
assert CONTROL_PAYLOAD_MAX_BYTES >= HELLO_PAYLOAD_MAX_BYTES
assert VOLUMES_MAX * 900 <= CONTROL_REPLY_MAX_BYTES
assert SEND_HIGH_BYTES > SEND_LOW_BYTES
