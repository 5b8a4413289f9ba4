"""The style that no linter can say: rooms, headers, lengths, and what must not appear where.

Happy path: every file of every room passes every rule. Failure modes: one assertion per
rule, naming file and line. A rule that has to change changes here first.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("nbd", "cache", "store", "native")  # imports may only point rightwards
ROOMS = (*LAYERS, "cli", "tests", "bench")
# What the guest's side may know of the store: how to talk to one, not how one works; and the one
# way to make a socket.
STORE_DOOR = {"address", "client", "errors", "limits", "unixsocket", "wire"}
GENERATED = "_native.pyi"  # by native/build_native.py, not checked in
MAX_LINES = 600
MAX_FUNCTION_LINES = 70
MAX_COLUMNS = 100


def files(*suffixes: str) -> list[Path]:
    """Every file of the rooms with one of the suffixes, outside hidden and built folders."""
    found = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    inside = [path for path in found if not _hidden(path) and path.name != GENERATED]
    return sorted(path for path in inside if path.suffix in suffixes)


def _hidden(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return any(part.startswith((".", "__pycache__", "build")) for part in parts)


def name_of(path: Path) -> str:
    """The test id of a file."""
    return str(path.relative_to(ROOT))


PYTHON = files(".py")
C_CODE = files(".c", ".h")
TEXT = [*files(".py", ".pyi", ".c", ".h", ".sh"), ROOT / "Makefile", ROOT / ".ci" / "run"]
DOCUMENTS = [
    *files(".md"),
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    ROOT / "pyproject.toml",
]

each_python = pytest.mark.parametrize("path", PYTHON, ids=name_of)
each_c = pytest.mark.parametrize("path", C_CODE, ids=name_of)


def room_of(path: Path) -> str:
    """The top-level folder a file is in."""
    return path.relative_to(ROOT).parts[0]


def imports(tree: ast.Module) -> Iterator[str]:
    """Full dotted names of everything a module imports; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_readme(room: str) -> None:
    """House style, rule 4."""
    readme = ROOT / room / "README.md"
    assert readme.is_file() and len(readme.read_text()) > 200, f"{room}/README.md: say what it is"


@each_python
def test_python_module_opens_with_what_it_is_for(path: Path) -> None:
    """House style, rule 3."""
    assert ast.get_docstring(ast.parse(path.read_text())), "no header docstring"


@each_python
def test_imports_point_one_way(path: Path) -> None:
    """nbd -> cache -> store -> native; cli sees all, nobody sees cli."""
    room = room_of(path)
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "millpond" or len(parts) < 2:
            continue
        target = parts[1]
        if room not in ("cli", "tests", "bench"):
            assert target != "cli", f"{room} must not import cli"
            assert LAYERS.index(target) >= LAYERS.index(room), f"{room} must not import {name}"
        if room in ("nbd", "cache") and target == "store":
            assert len(parts) < 3 or parts[2] in STORE_DOOR, f"{room} must not import {name}"
        if room == "bench":
            inside = target == "native" or "micro" in path.parts
            assert inside, f"bench drives the command line or the core, not {name}"


@each_python
def test_only_the_doorway_imports_the_extension(path: Path) -> None:
    """native/*.py is the one place where -errno becomes OSError."""
    if room_of(path) == "native":
        return
    for name in imports(ast.parse(path.read_text())):
        assert not name.startswith("millpond.native._native"), f"import it from {name[:15]}"


@each_python
def test_python_functions_are_short(path: Path) -> None:
    """House style, rule 8."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"line {node.lineno}: {node.name}: {length} lines"


@each_c
def test_c_file_opens_with_its_name_and_purpose(path: Path) -> None:
    """House style, rule 3: /* name.c - purpose"""
    first = path.read_text().partition("\n")[0]
    assert first.startswith(f"/* {path.name} - "), f"first line is {first!r}"


@each_c
def test_c_functions_are_short(path: Path) -> None:
    """House style, rule 8. A function opens with { in column 0, or with ) { at a line's end."""
    start = 0
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.startswith("}"):
            assert not start or number - start < MAX_FUNCTION_LINES, f"line {start}: too long"
            start = 0
        elif line == "{" or (line[:1].isalpha() and line.endswith(") {")):
            start = number


CLOCK_OR_CHANCE = re.compile(
    r"(?<![\w>.])(clock_gettime|clock_nanosleep|gettimeofday|nanosleep|usleep|sleep|time|"
    r"rand|srand|random|drand48|getrandom|arc4random)\s*\("
)


@each_c
def test_clock_and_chance_come_through_the_driver(path: Path) -> None:
    """House style, rule 30: otherwise the simulator does not own the world."""
    if path.name == "driver_linux.c":
        return
    code = re.sub(r"/\*.*?\*/|//[^\n]*|\"(\\.|[^\"\\])*\"", "", path.read_text(), flags=re.DOTALL)
    found = CLOCK_OR_CHANCE.search(code)
    assert not found, f"{found[1]}() outside driver_linux.c" if found else ""


@pytest.mark.parametrize("path", [p for p in TEXT if room_of(p) not in ("tests",)], ids=name_of)
def test_deliberate_faults_are_switched_on_only_in_tests(path: Path) -> None:
    """The switches exist so that tests prove they can fail; production never sets one."""
    text = path.read_text()
    found = re.search(r"\btest_faults\s*(=(?!=)|\|=)\s*(?!0\b)", text)
    assert not found, f"sets {found[0]!r}" if found else ""
    if path.suffix == ".py":
        assert "_FAULT_" not in text, "names a fault"
    if not path.name.startswith("driver_failing."):
        assert "mp_driver_failing" not in text, "makes a disk that fails"


@pytest.mark.parametrize("path", TEXT, ids=name_of)
def test_lines_and_files_are_short(path: Path) -> None:
    """100 columns (a tab counts 8) and fewer than 600 lines."""
    lines = path.read_text().splitlines()
    assert len(lines) < MAX_LINES, f"{len(lines)} lines: split it"
    for number, line in enumerate(lines, start=1):
        columns = len(line.expandtabs(8))
        assert columns <= MAX_COLUMNS, f"line {number}: {columns} columns"
        assert line == line.rstrip(), f"line {number}: trailing space"


# Places of one machine: a clone elsewhere has none of them.
MACHINE = re.compile(r"/(?:root|home)/\w|/wor[k]/|\.intern[a]l\b|\b(?:10|192\.168)(?:\.\d+){2,3}\b")


@pytest.mark.parametrize("path", [*TEXT, *DOCUMENTS], ids=name_of)
def test_nothing_of_one_machine_is_named(path: Path) -> None:
    """No home directory, private address or internal host name in what we publish."""
    found = MACHINE.search(path.read_text())
    assert not found, f"names {found[0]!r}" if found else ""


def test_every_c_file_is_built() -> None:
    """What pyproject does not list is not compiled."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    native = ROOT / "native"
    sources = {name_of(path) for path in native.glob("*.c")}
    assert sources == set(extension["sources"])
