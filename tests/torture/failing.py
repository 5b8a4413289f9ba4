"""`millpond` on a disk that fails when told to: native's driver_failing.c, then the real one.

    python failing.py SOCKET_FD COMMAND...

Each line on the socket is a rule as JSON (the fields of struct mp_failing_rule) or empty; the
answer is how many operations have failed under the rule so far, before the new one counts.
Everything else is the product's.  Only daemons.py starts it.
"""

import json
import runpy
import socket
import sys
import threading
from typing import Any

from millpond import native

REAL = native.lib


class FailingLibrary:
    """The C library, but that devices and directories get a disk that fails on demand."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inner: dict[Any, Any] = {}  # the real driver behind each

    def mp_driver_linux_device(self, fd: int) -> Any:
        """Of a cache."""
        return self._before(REAL.mp_driver_linux_device(fd))

    def mp_driver_linux_directory(self, fd: int) -> Any:
        """Of a store."""
        return self._before(REAL.mp_driver_linux_directory(fd))

    def mp_driver_linux_notify_fd(self, driver: Any) -> int:
        """Of the real driver."""
        return REAL.mp_driver_linux_notify_fd(self._inner[driver])

    def mp_driver_destroy(self, driver: Any) -> None:
        """It fails no more."""
        with self._lock:
            del self._inner[driver]
        REAL.mp_driver_destroy(driver)

    def __getattr__(self, name: str) -> Any:
        return getattr(REAL, name)

    def _before(self, inner: Any) -> Any:
        if inner == native.ffi.NULL:
            return inner
        driver = REAL.mp_driver_failing(inner)
        assert driver != native.ffi.NULL
        with self._lock:
            self._inner[driver] = inner
        return driver

    def obey(self, commands: socket.socket) -> None:
        """Answer each line; for ever, in a thread of its own."""
        with commands.makefile("rw") as lines:
            for line in lines:
                with self._lock:
                    failed = sum(REAL.mp_driver_failing_count(each) for each in self._inner)
                    if line.strip():
                        rule = native.ffi.new("struct mp_failing_rule *", json.loads(line))
                        for each in self._inner:
                            REAL.mp_driver_failing_set(each, rule)
                lines.write(f"{failed}\n")
                lines.flush()


if __name__ == "__main__":
    descriptor, *arguments = sys.argv[1:]
    library = FailingLibrary()
    orders = socket.socket(fileno=int(descriptor))
    threading.Thread(target=library.obey, args=[orders], daemon=True).start()
    vars(native)["lib"] = library
    sys.argv[1:] = arguments
    runpy.run_module("millpond.cli.main", run_name="__main__")
