"""`millpond flush`: wait until everything a guest was promised is at the store.

Happy path: the cache says where the volume stands, hurries, and we watch it get there.
Failure modes: not there in time: exit code 6, nothing is lost and shipping goes on; the volume
stopped: exit code 1 and its problem.
"""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import typer

from millpond.cache.control import call
from millpond.cli.foreground import expected_errors
from millpond.cli.output import format_size, parse_duration_s, print_json, progress
from millpond.cli.run import FAILED, UNREACHABLE, CommandError, run
from millpond.cli.status import CacheDirOption, ControlOption, JsonOption, control_path

POLL_S = 0.1


def register(parent: typer.Typer) -> None:
    """Add the command."""
    parent.command("flush")(flush)


def flush(
    name: Annotated[str, typer.Argument(help="name or id of the volume", metavar="NAME")],
    directory: CacheDirOption = None,
    control: ControlOption = None,
    now: Annotated[bool, typer.Option("--now", help="faster than the rates allow")] = False,
    timeout: Annotated[
        str | None, typer.Option("--timeout", help="give up after this long, like 30s")
    ] = None,
    json: JsonOption = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="draw no bar")] = False,
) -> None:
    """Wait until all that was acknowledged before this call is at the store."""
    path = control_path(directory, control)
    limit_s = parse_duration_s(timeout) if timeout is not None else None
    with expected_errors(), progress(f"flushing {name}", enabled=not no_progress) as update:
        volume = run(_flush(path, name, now, limit_s, update))
    if json:
        print_json(volume)


async def _flush(
    path: str, name: str, now: bool, limit_s: float | None, update: Callable[[int, int], None]
) -> dict[str, Any]:
    goal = await call(path, "flush", volume=name, now=now)
    last: dict[str, Any] = {"dirty_bytes": 0}
    try:
        async with asyncio.timeout(limit_s):
            return await _watch(path, goal, last, update)
    except TimeoutError:
        raise CommandError(
            f"volume {name!r}: {format_size(last['dirty_bytes'])} not at the store yet"
            f"{_because(last)}; shipping goes on",
            exit_code=UNREACHABLE,
        ) from None


async def _watch(
    path: str, goal: dict[str, Any], last: dict[str, Any], update: Callable[[int, int], None]
) -> dict[str, Any]:
    first_bytes = 0
    destaged = goal["destaged_sequence"]
    while True:
        volumes = (await call(path, "volumes"))["volumes"]
        found = next((volume for volume in volumes if volume["id"] == goal["id"]), None)
        if found is not None:
            last.update(found)
            destaged = max(destaged, found.get("destaged_sequence", 0))
        if destaged >= goal["target"]:
            return {"id": goal["id"], "target": goal["target"], "destaged_sequence": destaged}
        if last.get("state") == "failed":
            raise CommandError(
                f"volume {last['name']!r} stopped: {last['problem']}", exit_code=FAILED
            )
        first_bytes = max(first_bytes, last["dirty_bytes"])
        update(first_bytes - last["dirty_bytes"], first_bytes)
        await asyncio.sleep(POLL_S)


def _because(volume: dict[str, Any]) -> str:
    reason = volume.get("problem") or volume.get("destage_problem")
    return f" ({reason})" if reason else ""
