"""Builds the harnesses of this folder with libFuzzer and runs one.

The core is compiled once, instrumented, into .run/fuzz/; what is newer than its object is compiled
again, and a header's edit compiles all.  Needs clang with its run-time libraries (`make fuzz` and
`make test` install them).

Happy path: build() once, then run() or fuzz() each harness; both give what libFuzzer printed.
Failure modes: BuildError with the compiler's words; Found when an input crashed, hung or asked for
too much memory: it is kept in .run/fuzz/found/, and the message says how to run it again.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "fuzz"
WORK = ROOT / ".run" / "fuzz"
REGRESSIONS = HERE / "regressions"
HARNESSES = ("record", "nbd", "fetch", "wire", "cache", "store")
SHARED = ("input", "reseal", "image", "cacheworld", "storeworld", "storeimage")
# Drivers of a real machine, and of tests in Python: no harness runs them.
LEFT_OUT = ("driver_linux", "driver_test", "driver_slow")
FLAGS = (
    *("-std=c11", "-g", "-O1", "-fno-omit-frame-pointer", "-D_GNU_SOURCE", "-Wall", "-Wextra"),
    *("-iquote", str(ROOT / "native"), "-iquote", str(HERE)),
    *("-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=all"),
)
LINK = ("-fsanitize=fuzzer,address,undefined", "-llz4", "-lxxhash", "-pthread")
MEMORY_MIB = 512  # of a harness; it needs some 70
HANG_S = 25
INPUT_BYTES = 4096
ENVIRONMENT = {
    # Freed memory is kept for a while, to see who still uses it: less, or it fills the limit.
    "ASAN_OPTIONS": "quarantine_size_mb=16:detect_leaks=0:allocator_may_return_null=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


class BuildError(Exception):
    """The compiler's words."""


class Found(AssertionError):
    """An input did what no input may do."""


@dataclass(frozen=True)
class Report:
    """What a run did."""

    runs: int
    output: str


def build() -> None:
    """All harnesses, from what is newer than they are.  BuildError."""
    if shutil.which("clang") is None:
        raise BuildError("no clang: make test installs it")
    (WORK / "objects").mkdir(parents=True, exist_ok=True)
    native = ROOT / "native"
    core = [path for path in native.glob("*.c") if not path.name.startswith(LEFT_OUT)]
    sources = [*core, *(HERE / f"{name}.c" for name in SHARED)]
    mains = [HERE / f"fuzz_{name}.c" for name in HARNESSES]
    newest = max(path.stat().st_mtime for path in (*native.glob("*.h"), *HERE.glob("*.[hp]*")))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: _compile(source, newest), [*sources, *mains]))
        objects = [_object_of(source) for source in sources]
        list(pool.map(lambda name: _link(name, objects), HARNESSES))


def run(name: str, *, runs: int, seed: int) -> Report:
    """So many inputs made from seeds and regressions, the same every time.  Found."""
    inputs = seeds_of(name)
    scratch = WORK / "scratch" / name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    folders = [scratch, inputs, *_existing(REGRESSIONS / name)]
    return _fuzz(name, [f"-runs={runs}", f"-seed={seed}"], folders)


def fuzz(name: str, *, seconds: int) -> Report:
    """As long as that, from what earlier calls found worth keeping.  Found."""
    corpus = WORK / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    folders = [corpus, seeds_of(name), *_existing(REGRESSIONS / name)]
    return _fuzz(name, [f"-max_total_time={seconds}"], folders)


def replay(name: str, path: Path) -> None:
    """One input.  Found."""
    _fuzz(name, ["-runs=1"], [path])


def regressions() -> Iterator[tuple[str, Path]]:
    """Harness and input of every situation that was a bug."""
    for name in HARNESSES:
        for path in sorted(_existing(REGRESSIONS / name)):
            yield from ((name, each) for each in sorted(path.iterdir()))


def seeds_of(name: str) -> Path:
    """The folder with the inputs that fuzz/seeds.py makes, made anew."""
    from fuzz import seeds

    folder = WORK / "seeds" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, data in enumerate(seeds.make(name)):
        (folder / f"{index:03}").write_bytes(data)
    return folder


def _existing(path: Path) -> list[Path]:
    return [path] if path.exists() else []


def _object_of(source: Path) -> Path:
    return WORK / "objects" / f"{source.stem}.o"


def _compile(source: Path, newest_header: float) -> None:
    target = _object_of(source)
    if target.exists() and target.stat().st_mtime > max(newest_header, source.stat().st_mtime):
        return
    _do(["clang", *FLAGS, "-c", str(source), "-o", str(target)])


def _link(name: str, objects: Sequence[Path]) -> None:
    target, main = WORK / name, WORK / "objects" / f"fuzz_{name}.o"
    newest = max(path.stat().st_mtime for path in (*objects, main))
    if target.exists() and target.stat().st_mtime > newest:
        return
    _do(["clang", str(main), *map(str, objects), *LINK, "-o", str(target)])


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(done.stderr[-8000:])


def _fuzz(name: str, amount: list[str], inputs: Sequence[Path]) -> Report:
    found = WORK / "found"
    found.mkdir(parents=True, exist_ok=True)
    command = [
        *(str(WORK / name), *amount, f"-timeout={HANG_S}", f"-rss_limit_mb={MEMORY_MIB}"),
        *(f"-max_len={INPUT_BYTES}", "-len_control=20", "-use_value_profile=1"),
        *(f"-artifact_prefix={found}/{name}-", "-print_final_stats=1"),
        *map(str, inputs),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False,
        env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    if done.returncode:
        kept = re.findall(r"Test unit written to (\S+)", done.stderr)
        again = f"{command[0]} {' '.join(kept) or ' '.join(map(str, inputs))}"
        raise Found(f"{done.stderr[-12000:]}\nagain: {again}")
    counted = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    return Report(int(counted[1]) if counted else len(inputs), done.stderr)
