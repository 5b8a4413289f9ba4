"""Run one command: the event loop it needs, and the exit code its failure becomes.

Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 exists, 5 busy, 6 unreachable (retrying may
help), 13 permission. Every failure is one line on stderr: `millpond: error: ...`.
"""

import asyncio
import os
import sys
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import uvloop

from millpond.store.errors import Code, StoreError, one_line

T = TypeVar("T")

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
EXISTS: Final = 4
BUSY: Final = 5
UNREACHABLE: Final = 6
PERMISSION: Final = 13
INTERRUPTED: Final = 130

EXIT_OF_CODE: Final[dict[str, int]] = {
    Code.NOT_FOUND: NOT_FOUND,
    Code.EXISTS: EXISTS,
    Code.BUSY: BUSY,
    Code.DIRTY: BUSY,
    Code.EPOCH: BUSY,
    Code.UNREACHABLE: UNREACHABLE,
    Code.PERMISSION: PERMISSION,
}


class CommandError(Exception):
    """A command failed in a way that the operator should read in one line."""

    def __init__(self, message: str, *, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the event loop that ships."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def exit_code_of(error: BaseException) -> int:
    """The documented exit code of a failure."""
    match error:
        case CommandError():
            return error.exit_code
        case StoreError():
            return EXIT_OF_CODE.get(error.code, FAILED)
        case PermissionError():
            return PERMISSION
        case FileNotFoundError():
            return NOT_FOUND
        case FileExistsError():
            return EXISTS
        case ConnectionError() | TimeoutError():
            return UNREACHABLE
        case KeyboardInterrupt():
            return INTERRUPTED
    return FAILED


def message_of(error: BaseException) -> str:
    """One line for people; an OSError names its file."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return one_line(f"{where}{os.strerror(error.errno)}")
    return one_line(str(error) or type(error).__name__, limit=1000)


def complain(error: BaseException) -> int:
    """Print the one line and return the exit code."""
    sys.stdout.flush()
    print(f"millpond: error: {message_of(error)}", file=sys.stderr)
    return exit_code_of(error)
