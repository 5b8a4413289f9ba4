"""Fixtures of the micro benchmarks."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from micro.core import Core

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def directory() -> Path:
    """An empty directory on the disk that holds the repository, not on a RAM disk."""
    place = ROOT / ".run" / "micro"
    place.mkdir(parents=True, exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    return place


@pytest.fixture
def core(directory: Path) -> Iterator[Core]:
    """A fresh store core."""
    made = Core(directory)
    yield made
    made.close()


@pytest.fixture
def dice() -> random.Random:
    """The same dice every run."""
    return random.Random(20261120)
