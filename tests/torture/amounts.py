"""How much of a torture is done: a sample in `make test`, all of it in `make prove`.

MILLPOND_PROVE=1 asks for what the issue asks for; MILLPOND_KILLS=3 and the like for any amount.
MILLPOND_SEED repeats a run: each test prints the one it took.
"""

import os


def amount(name: str, *, usual: int, prove: int) -> int:
    """From MILLPOND_NAME, or by the kind of run."""
    if value := os.environ.get(f"MILLPOND_{name}"):
        return int(value)
    return prove if os.environ.get("MILLPOND_PROVE") else usual


def seed_for(test: str, default: int) -> int:
    """The seed of a test, printed with the command that repeats it."""
    seed = int(os.environ.get("MILLPOND_SEED", default))
    print(f"seed {seed}; again: MILLPOND_SEED={seed} .venv/bin/pytest -s {test}")
    return seed
