"""The storage server: catalogue, connections, wire protocol (both ends of it) and transfers."""
