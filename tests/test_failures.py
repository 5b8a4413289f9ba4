"""README's table of failures: every test that it names as proof exists.

Happy path: the table is there and every cell of its last column leads to a test.  Failure modes: a
row without proof, a test that was renamed, words of a status that nothing in the code says.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTION = "## When something fails"
PROOF = re.compile(r"`([\w/]+)::(\w+)`")
WORDS = re.compile(r"`([^`]+)`")
ROWS_MIN = 30
HEADS = ("what", "the guest", "status", "the operator", "proof")


def rows() -> list[list[str]]:
    """The cells of each row of the section's tables, without their heads."""
    text = (ROOT / "README.md").read_text()
    section = text.split(SECTION)[1].split("\n## ")[0]
    found = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return [row for row in found if len(row) == len(HEADS) and set(row[0]) != {"-"}]


ROWS = [row for row in rows() if row[-1] != HEADS[-1]]


def functions_of(path: Path) -> set[str]:
    """Names of the test functions in a file."""
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def said_in_code() -> str:
    """Every string of ours, with those that the compiler joins joined."""
    parts = []
    for room in ("native", "cache", "store", "nbd", "cli"):
        for path in sorted((ROOT / room).glob("*.*")):
            if path.suffix in (".py", ".c"):
                parts.append(path.read_text())
    return re.sub(r'"\s*\n?\s*f?"', "", "\n".join(parts))


CODE = said_in_code()


def test_the_table_is_long() -> None:
    assert len(ROWS) >= ROWS_MIN, f"{len(ROWS)} rows"


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:60] for row in ROWS])
def test_every_failure_names_tests_that_exist(row: list[str]) -> None:
    proofs = PROOF.findall(row[-1])
    assert proofs, "no proof"
    for file, name in proofs:
        path = ROOT / "tests" / f"{file}.py"
        assert path.is_file(), f"there is no tests/{file}.py"
        assert name in functions_of(path), f"tests/{file}.py has no {name}"


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:60] for row in ROWS])
def test_every_word_of_status_is_said_by_the_code(row: list[str]) -> None:
    for words in WORDS.findall(row[2]):
        for part in words.split("..."):
            assert part.strip() in CODE, f"nothing says {part.strip()!r}"
