"""A cache that serves a block device of its own host must never wait for that device itself.

The kernel writes dirty pages to our device when memory is short, and waits for us to take them.  If
our own next page came from that same reclaim, or if we were swapped out or killed for memory, it
would wait for ever.  So, before any thread exists (all of it is inherited by threads):

    PR_SET_IO_FLUSHER   our allocations start no I/O and wait for none
    mlockall            what we have touched stays in memory
    oom_score_adj       somebody else is killed first

Rules: O_DIRECT for device and journal does the rest: none of our writes sits in the page cache.
MCL_ONFAULT: without it every reserved range and thread stack would be filled at once.  A limit on
locked memory would turn later allocations into failures: nothing is locked then.
Failure modes: each step that is not permitted is left out and named in one line; a cache that only
listens on sockets needs none of them.
"""

import ctypes
import logging
import resource
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("millpond.cache")

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4  # linux/include/uapi/asm-generic/mman.h
PR_SET_IO_FLUSHER, PR_GET_IO_FLUSHER = 57, 58  # linux/include/uapi/linux/prctl.h, since 5.6
CAP_IPC_LOCK = 14
OOM_NEVER = "-1000"
_OOM_SCORE = Path("/proc/self/oom_score_adj")


def protect_from_memory_shortage() -> None:
    """Do what this process may do, before threads exist.  log_protection() says what is missing."""
    for step in (_become_io_flusher, _lock_memory, _leave_the_oom_killer):
        with suppress(OSError):
            step()


def log_protection() -> None:
    """One line when something is missing, as the kernel has it."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = {
        "io-flusher": libc.prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1,
        "locked-memory": int(_status("VmLck").split()[0]) > 0,
        "oom-score": _OOM_SCORE.read_text().strip() == OOM_NEVER,
    }
    missing = [name for name, is_here in here.items() if not is_here]
    if missing:
        log.info(
            "memory shortage may stop kernel devices missing=%s reason=%s",
            ",".join(missing),
            '"needs CAP_SYS_RESOURCE and CAP_IPC_LOCK"',
        )


def _become_io_flusher() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_IO_FLUSHER")
    # Others had it wrong for years, and nothing told them.
    assert libc.prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1, "the kernel took it and does not say so"


def _lock_memory() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and not _may_lock():
        raise PermissionError(1, "RLIMIT_MEMLOCK")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT):
        raise OSError(ctypes.get_errno(), "mlockall")


def _may_lock() -> bool:
    return bool(int(_status("CapEff"), 16) >> CAP_IPC_LOCK & 1)


def _status(key: str) -> str:
    """A value of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{key}:"))


def _leave_the_oom_killer() -> None:
    _OOM_SCORE.write_text(OOM_NEVER)
