"""A control socket with the operations of kernel devices, played: no kernel, no cache.

with PlayedCache(path) as cache:
    cache.volumes = {"web1"}; cache.refuse["web2"] = "E_UNREACHABLE"
    ... millpond map --control PATH ...
    assert cache.devices == {"web1": ...}; assert cache.asked == [...]
"""

import hashlib
import json
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any


def id_of(name: str) -> str:
    """The id that a played volume has."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


class PlayedCache:
    """Serves "devices", "attach", "detach" and "status" from a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.volumes: set[str] = set()
        self.devices: dict[str, dict[str, Any]] = {}  # volume -> what "devices" says of it
        self.refuse: dict[str, tuple[str, int]] = {}  # volume -> code, and how often
        self.read_only = False  # all of it
        self.asked: list[dict[str, Any]] = []
        self.after_attach: Callable[[], None] = lambda: None  # before the answer
        played = self

        class Connection(socketserver.StreamRequestHandler):
            """One asker."""

            def handle(self) -> None:
                for line in self.rfile:
                    try:
                        answer = {"ok": True, **played.answer(json.loads(line))}
                    except LookupError as error:
                        code, message = error.args
                        answer = {"ok": False, "code": code, "message": message}
                    self.wfile.write(json.dumps(answer).encode() + b"\n")

        class Server(socketserver.ThreadingUnixStreamServer):
            """All askers."""

            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """An asker that left early."""

        self._lock = threading.Lock()
        self._server = Server(str(path), Connection)
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05])

    def __enter__(self) -> "PlayedCache":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.path.unlink()

    def ops(self, op: str) -> list[str]:
        """The volumes that were asked for with this operation, in order."""
        return [request["volume"] for request in self.asked if request["op"] == op]

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """LookupError(code, message) refuses."""
        with self._lock:
            self.asked.append(request)
            if request["op"] == "devices":
                return {"devices": list(self.devices.values())}
            if request["op"] == "status":
                named = [{"name": name, "id": id_of(name)} for name in sorted(self.volumes)]
                return {"volumes": named, "stores": []}
            done = self._attach if request["op"] == "attach" else self._detach
            answer = done(request)
        self.after_attach()
        return answer

    def _name(self, text: str) -> str:
        """Of a volume that is named by its id."""
        return next((name for name in self.volumes if text == id_of(name)), text)

    def _attach(self, request: dict[str, Any]) -> dict[str, Any]:
        volume = self._name(request["volume"])
        if code := self._refused(volume):
            raise LookupError(code, f"volume {volume!r} cannot be attached")
        if volume not in self.volumes:
            raise LookupError("E_NOT_FOUND", f"no volume {volume!r}")
        if volume in self.devices:
            raise LookupError("E_EXISTS", f"volume {volume!r} is attached already")
        taken = {each["device"] for each in self.devices.values()}
        device = request.get("device") or next(
            path for number in range(100) if (path := f"/dev/nbd{number}") not in taken
        )
        if device in taken:
            raise LookupError("E_BUSY", f"{device} is in use by another NBD client")
        self.devices[volume] = {
            "device": device,
            "volume": volume,
            "id": id_of(volume),
            "link": f"/dev/millpond/{volume}",
            "read_only": request.get("read_only", False) or self.read_only,
        }
        return dict(self.devices[volume])

    def _detach(self, request: dict[str, Any]) -> dict[str, Any]:
        volume = self._name(request["volume"])
        if volume not in self.devices:
            raise LookupError("E_NOT_FOUND", f"volume {volume!r} is not attached")
        if code := self._refused(volume):
            raise LookupError(code, f"volume {volume!r} is mounted")
        del self.devices[volume]
        return {}

    def _refused(self, volume: str) -> str:
        """The code to refuse it with this time, or nothing."""
        code, times = self.refuse.pop(volume, ("", 0))
        if times > 1:
            self.refuse[volume] = (code, times - 1)
        return code
