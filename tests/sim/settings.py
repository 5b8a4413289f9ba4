"""What a simulated world is made from; the same settings give the same world."""

from dataclasses import dataclass, field

from millpond.native.drivers import Op as DiskOp
from sim.history import Shape
from sim.nodes import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A whole world."""

    seed: int = 1
    shape: Shape = field(default_factory=Shape)
    depth: int = 4
    lose: bool = False  # a crash is a loss of power
    tear: bool = False
    reorder: bool = False
    soft_first: bool = False  # the first crash takes only the process
    cut: str = ""  # "cache" or "store": whose I/O is counted
    cut_after: int = 0
    cut_both: bool = False  # the other machine falls with it
    cut_again_after: int = 0  # of the next life of what fell
    requests_after_cut: int = 10
    checkpoint_bytes: int = 2 * MIB  # of log, between the cache's checkpoints
    fail_op: DiskOp | None = (
        None  # the cache's disk fails the fail_io'th of these, in its first life
    )
    fail_io: int = 0
    scrub_bytes_per_s: int = 0  # of the cache's background verification
    engine_faults: int = 0
    store_faults: int = 0
