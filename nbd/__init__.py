"""A guest's connection arrives here: NBD negotiation, listening sockets and their limits.

The transmission phase (every read and write of a guest) is not here but in the C engine: this
room negotiates, then hands the connected socket over.  See README.md.
"""
