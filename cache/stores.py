"""The stores that a cache is connected to, and on which of them a volume lives.

Rules: nobody tells the cache where a volume is: all stores are asked at once, and one that is away
holds up nothing that another one has.  A name (or an id) that two stores have is an error that
names both, never a guess.  "No such volume" is said only when every store has answered.

Happy path: one store says yes, the others say no, the volume is opened there.
Failure modes: found while another store does not answer: taken, unless that other store is where
this name was seen before.  Not found while a store is away: StoreAway.  Of what is open here,
nobody but its own store is asked.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from millpond.cache import limits
from millpond.cache.errors import CacheError, StoreAway, VolumeRefused, VolumeUnknown, escaped
from millpond.cache.replicas import ReplicaSet, StoreNode, VolumeRecord


@dataclass(frozen=True, slots=True)
class Found:
    """A volume's record, and where it lives."""

    record: VolumeRecord
    node: StoreNode

    @property
    def replicas(self) -> ReplicaSet:
        """The set behind the volume."""
        return ReplicaSet((self.node,))


class Stores:
    """All stores of one cache.  Event loop only."""

    def __init__(self, nodes: Sequence[StoreNode]) -> None:
        if not 1 <= len(nodes) <= limits.STORES_MAX:
            raise CacheError(f"a cache has 1 to {limits.STORES_MAX} stores, not {len(nodes)}")
        addresses = [node.address for node in nodes]
        twice = {address for address in addresses if addresses.count(address) > 1}
        if twice:
            raise CacheError(f"the store {escaped(twice.pop())} is given twice")
        self.nodes = tuple(nodes)
        self._seen: dict[str, StoreNode] = {}  # by name: where it was last
        self._listed: dict[int, list[str]] = {}  # by store: names as last heard

    @property
    def names(self) -> list[str]:
        """As last heard; those of a store that is away included."""
        return sorted({name for names in self._listed.values() for name in names})

    async def find(self, name: str) -> Found:
        """A volume by name."""
        found = await self._find(f"volume {escaped(name)}", name=name)
        self._seen[name] = found.node
        return found

    async def find_open(self, known: Found) -> Found:
        """A volume that is open here: its own store is asked, and while that is silent, what we
        know stands; nobody else can have opened it meanwhile."""
        name = known.record.name
        try:
            async with asyncio.timeout(limits.STORES_GRACE_S):
                record = await known.node.find(name=name)
        except (TimeoutError, StoreAway):
            if self._seen.setdefault(name, known.node) is known.node:
                return known
        except VolumeUnknown:
            pass  # renamed
        else:
            if record.volume_id == known.record.volume_id:
                self._seen[name] = known.node
                return Found(record, known.node)
        return await self.find(name)

    async def find_id(self, volume_id: bytes) -> Found:
        """A volume by id."""
        return await self._find(f"volume {volume_id.hex()}", volume_id=volume_id)

    async def list(self) -> Sequence[Found]:
        """Every volume of every store; StoreAway unless all answer, after noting what was heard."""
        found, problems = await self._list()
        for problem in problems:
            raise problem
        return found

    async def list_heard(self) -> Sequence[Found]:
        """Every volume of the stores that answer."""
        return (await self._list())[0]

    async def _list(self) -> tuple[Sequence[Found], Sequence[CacheError]]:
        answers = await _ask({node: node.list() for node in self.nodes})
        found = []
        for node, answer in answers.items():
            if isinstance(answer, list):
                self._listed[node.index] = [record.name for record in answer]
                found += [Found(record, node) for record in answer]
        self._note_places(found, answers)
        return found, [answer for answer in answers.values() if isinstance(answer, CacheError)]

    def _note_places(self, found: Iterable[Found], answers: "dict[StoreNode, Any]") -> None:
        """Where names are; one that moved is believed when its old store answered without it."""
        places: dict[str, set[StoreNode]] = {}
        for each in found:
            places.setdefault(each.record.name, set()).add(each.node)
        for name, nodes in places.items():
            node = next(iter(nodes))
            before = self._seen.get(name, node)
            agreed = before is node or not isinstance(answers[before], CacheError)
            if len(nodes) == 1 and agreed:
                self._seen[name] = node

    async def _find(self, label: str, **selector: Any) -> Found:
        answers = await _ask(
            {node: node.find(**selector) for node in self.nodes}, grace_s=limits.STORES_GRACE_S
        )
        found = [
            Found(record, node)
            for node, record in answers.items()
            if isinstance(record, VolumeRecord)
        ]
        if len(found) > 1:
            first, second = found[0].node.address, found[1].node.address
            raise VolumeRefused(
                f"{label} is on two stores, {escaped(first)} and {escaped(second)};"
                " rename or delete one of them"
            )
        if found:
            self._check_place(label, found[0], answers)
            return found[0]
        problems = [answer for answer in answers.values() if isinstance(answer, CacheError)]
        for problem in problems:
            if not isinstance(problem, VolumeUnknown):
                raise problem
        if len(self.nodes) == 1:
            raise problems[0]
        raise VolumeUnknown(f"none of the {len(self.nodes)} stores has {label}")

    def _check_place(self, label: str, found: Found, answers: "dict[StoreNode, Any]") -> None:
        """A name that moved to another store is believed only when the old one agrees."""
        seen = self._seen.get(found.record.name, found.node)
        if seen is not found.node and not isinstance(answers.get(seen), VolumeUnknown):
            raise StoreAway(
                f"{label} was on the store {escaped(seen.address)}, which does not answer,"
                f" and {escaped(found.node.address)} has one of that name too"
            )


async def _ask(
    questions: "dict[StoreNode, Coroutine[Any, Any, Any]]", grace_s: float | None = None
) -> "dict[StoreNode, Any]":
    """Every store's answer: a result or a CacheError.

    With grace_s, those that keep silent so long after another's good answer are StoreAway.
    """
    tasks = {asyncio.ensure_future(question): node for node, question in questions.items()}
    waiting = set(tasks)
    limit_s: float | None = None
    try:
        while waiting:
            done, waiting = await asyncio.wait(
                waiting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                break
            if grace_s is not None and any(task.exception() is None for task in done):
                limit_s = grace_s
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {node: _answer(task, node) for task, node in tasks.items()}


def _answer(task: "asyncio.Future[Any]", node: StoreNode) -> Any:
    if task.cancelled():
        return StoreAway(f"the store at {node.address} does not answer")
    error = task.exception()
    if error is None:
        return task.result()
    if not isinstance(error, CacheError):
        raise error
    return error
