"""A stamping client in a thread that survives its server: it connects again and verifies.

Happy path: Guest(...) runs until ask_to_stop(); join() waits for everything in flight, verifies
once more, and leaves the stamper's image as the truth.  Failure modes: whatever is wrong (Wrong, or
an error that a guest must not see) ends the thread and is raised by check() and join().
"""

import random
import threading
import time

import nbdclient
from nbdclient import ConnectionLost, NbdClient, OptionRefused
from torture.stamping import Stamper

PATIENCE_S = 300.0  # against hanging for ever
PAUSE_S = 0.1


class Guest:
    """One part of one volume."""

    def __init__(
        self,
        uri: str,
        export: str,
        chance: random.Random,
        *,
        who: int = 0,
        share_bytes: int,
        depth: int,
        replies_per_death: int = 0,
    ) -> None:
        """replies_per_death: how often the guest itself is killed, on average; 0: never."""
        self.stamper = Stamper(chance, who * share_bytes, share_bytes, depth, who=who)
        self.reconnects = 0
        self._replies = 0
        self._uri, self._export, self._deaths = uri, export, replies_per_death
        self._failure: BaseException | None = None
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Soon."""
        self._enough.set()

    def check(self) -> None:
        """Raise what is wrong."""
        if self._failure is not None:
            raise self._failure

    def wait_for_more(self, replies: int) -> None:
        """Until it has got so many more."""
        goal, end = self._replies + replies, time.perf_counter() + PATIENCE_S
        while self._replies < goal:
            self.check()
            assert time.perf_counter() < end, "a guest hangs"
            time.sleep(0.001)

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(PATIENCE_S)
        self.check()
        assert not self._thread.is_alive(), "a guest hangs"

    def _run(self) -> None:
        try:
            while True:
                self.stamper.attach(self._connected())
                try:
                    self._work()
                    return
                except ConnectionLost:
                    self.stamper.lost()
                    self.reconnects += 1
        except BaseException as error:
            self._failure = error

    def _work(self) -> None:
        """Everything is verified before anything is changed, and at the end."""
        self.stamper.verify()
        while not self._enough.is_set():
            self._replies += self.stamper.step()
            if self._deaths and self.stamper.chance.randrange(self._deaths) == 0:
                raise ConnectionLost("the guest itself was killed")
        self.stamper.finish()
        self.stamper.verify()
        self.stamper.close()

    def _connected(self) -> NbdClient:
        """As a guest with reconnect-delay: again and again."""
        end = time.perf_counter() + PATIENCE_S
        while True:
            try:
                return nbdclient.connect(self._uri, export=self._export, timeout_s=PATIENCE_S)
            except (OSError, OptionRefused, ConnectionLost):
                if time.perf_counter() > end:
                    raise
                time.sleep(PAUSE_S)


def guests_of(
    uri: str,
    export: str,
    count: int,
    *,
    seed: object,
    share_bytes: int,
    depth: int,
    replies_per_death: int = 0,
) -> list[Guest]:
    """Side by side on one volume, each on a part of its own."""
    return [
        Guest(
            uri,
            export,
            random.Random(f"{seed} {who}"),
            who=who,
            share_bytes=share_bytes,
            depth=depth,
            replies_per_death=replies_per_death,
        )
        for who in range(count)
    ]
