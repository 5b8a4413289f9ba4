"""The door to the C core: the only place that imports the extension.

ffi and lib are cffi's: numbers and pointers in, numbers out, -errno for an error.  Fields
and constants are those of the headers beside this file.  Typed wrappers for records and
frames are in record.py; engine and store are called through lib directly.
"""

import os

from millpond.native._native import ffi, lib

__all__ = ["check", "ffi", "lib"]


def check(result: int) -> int:
    """The result of a C call that returns -errno: itself when >= 0, else OSError(errno)."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
