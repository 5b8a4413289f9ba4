"""The control socket's two ends: a cache that is slow is not one that is gone."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from millpond.cache.control import ControlServer, Request, call
from millpond.cache.errors import CacheAway
from millpond.cache.tasks import Tasks


async def never(request: Request) -> dict[str, Any]:
    """An operation that takes longer than anybody waits."""
    await asyncio.sleep(3600)
    return {}


@pytest.mark.parametrize(
    ("op", "says"),
    [
        ("attach", "has not finished after 0.1 s; see `millpond device list`"),
        ("detach", "has not finished after 0.1 s; see `millpond device list`"),
        ("status", "has not finished after 0.1 s"),
    ],
)
def test_cache_is_slow(tmp_path: Path, op: str, says: str) -> None:
    async def main() -> None:
        tasks = Tasks(lambda error: pytest.fail(str(error)))
        server = ControlServer(dict.fromkeys(("attach", "detach", "status"), never), tasks)
        path = str(tmp_path / "control.sock")
        await server.listen(path)
        with pytest.raises(CacheAway) as refused:
            await call(path, op, timeout_s=0.1)
        assert str(refused.value) == f"the cache at {path} {says}"
        await server.close()
        await tasks.cancel_all()

    asyncio.run(main())


def test_no_cache_is_there(tmp_path: Path) -> None:
    with pytest.raises(CacheAway, match="no cache answers at .*: No such file"):
        asyncio.run(call(str(tmp_path / "control.sock"), "status"))
