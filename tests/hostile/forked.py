"""One hostile case in a process of its own: a crash or a hang ends that, and is reported.

fork copies the simulated world as it is, so a case costs milliseconds and spoils nothing for the
next one.  The C cores of the simulator have no threads.
"""

import os
import signal
import traceback
from collections.abc import Callable

HANG_S = 60


class Broken(AssertionError):
    """The case ended in what no input may cause; the message says how to repeat it."""


Tell = Callable[[str], None]


def in_fork(work: Callable[[Tell], str]) -> str:
    """What work returned.  Broken: it died by a signal, hung or raised; with what it had told."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        _run(work, sending)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        told, _, result = pipe.read().decode("utf-8", "replace").rpartition("\0")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        died = "it hangs" if number == signal.SIGALRM else signal.strsignal(number)
        raise Broken(f"{died}: {told}{result}")
    if os.WEXITSTATUS(status):
        raise Broken(f"{told}\n{result}")
    return result


def _run(work: Callable[[Tell], str], sending: int) -> None:
    """In the child: never returns."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(HANG_S)
        text = work(lambda told: _write(sending, told))
        code = 0
    except BaseException:
        text = traceback.format_exc()
    try:
        _write(sending, "\0" + text)
    finally:
        os._exit(code)


def _write(sending: int, text: str) -> None:
    os.write(sending, text.encode()[-30_000:])  # a pipe holds 64 KiB: this never waits
