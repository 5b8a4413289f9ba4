"""make sanitize: the suite over a core that was built with a sanitizer, daemons and all.

    python tests/sanitize.py address|thread [PYTEST ARGUMENT ...]

The checkout is copied to .run/sanitize/NAME/tree, with a virtual environment and a build of its
own, so that the ordinary ones stay as they are.  The copy's `python` loads the sanitizer's run-time
library before everything else and forgets it at once: daemons and forks have it, the programs that
tests start (qemu, fio, gcc) do not.

Happy path: copy what changed, build if the core changed, run pytest; its exit code.
Failure modes: what a sanitizer reports is written to .run/sanitize/NAME/report.PID, printed at the
end, and makes the run fail even where no test noticed (a daemon that died while it was stopped).
"""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".run" / "sanitize"
# pytest's faulthandler would hide what the sanitizer has to say.
OURS = "handle_segv=2:handle_sigbus=2:handle_sigfpe=2"
FORGET = "import os; os.environ.pop('LD_PRELOAD', None)\n"
# Works only without: what it measures is the allocator's, which a sanitizer replaces, or the time
# that the core takes.  tests/README.md has the reasons.
LEFT_OUT = (
    "tests/test_tidy.py",
    "tests/fuzz",
    "tests/store/test_core_space.py::test_pages_in_memory_take_their_size_and_little_more",
)


@dataclass(frozen=True)
class Sanitizer:
    """How one is built and told what to do."""

    flags: str  # of -fsanitize
    library: str
    options: dict[str, str]


SANITIZERS = {
    "address": Sanitizer(
        "address,undefined",
        "libasan.so",
        {
            # Python keeps at its end what it never gives back.
            "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error=1:{OURS}",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        },
    ),
    "thread": Sanitizer(
        "thread",
        "libtsan.so",
        {
            "TSAN_OPTIONS": f"halt_on_error=1:die_after_fork=0:{OURS}:"
            f"suppressions={ROOT / 'tests' / 'tsan.suppressions'}"
        },
    ),
}


def copy(tree: Path) -> None:
    """What git would commit, with its times: only what changed is written."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    names = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    for name in names:
        source, target = ROOT / name, tree / name
        if target.exists() and target.lstat().st_mtime == source.lstat().st_mtime:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    for path in (tree / "tests").rglob("*.py"):
        if str(path.relative_to(tree)) not in names:
            path.unlink()


def build(sanitizer: Sanitizer, tree: Path) -> None:
    """The environment with the instrumented core, if anything of the core is newer."""
    stamp = tree.parent / "built"
    native = [*(tree / "native").glob("*.[ch]"), *(tree / "native").glob("*.py")]
    newest = max(path.stat().st_mtime for path in (tree / "pyproject.toml", *native))
    if stamp.exists() and stamp.stat().st_mtime > newest:
        return
    python = tree / ".venv" / "bin" / "python"
    environment = os.environ | sanitizer.options | {"MILLPOND_SANITIZE": sanitizer.flags}
    print(f"make sanitize: building {tree.relative_to(ROOT)} with {sanitizer.flags}", flush=True)
    if stamp.exists():  # an edit: what depends on it
        setup = [str(python), "-W", "ignore", "-c", "import setuptools; setuptools.setup()", "-q"]
        setup += ["build_ext", "--inplace", "--build-temp", str(tree.parent / "objects")]
        subprocess.run(setup, cwd=tree, check=True, env=environment)
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", tree / ".venv"], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-e", ".[dev]"], cwd=tree, check=True, env=environment)
        wrap(sanitizer, python)
    stamp.touch()


def wrap(sanitizer: Sanitizer, python: Path) -> None:
    """Python with the sanitizer's library before all others, under its own name."""
    found = subprocess.run(
        ["gcc", f"-print-file-name={sanitizer.library}"], check=True, capture_output=True, text=True
    )
    library, real = shlex.quote(found.stdout.strip()), python.resolve()
    python.unlink()
    python.write_text(f'#!/bin/bash\nLD_PRELOAD={library} exec -a "$0" {real} "$@"\n')
    python.chmod(0o755)
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    (site / "forget_preload.pth").write_text(FORGET)


def test(name: str, tree: Path, arguments: list[str]) -> int:
    """Pytest's exit code, or 1 when a sanitizer reported anything."""
    sanitizer, report = SANITIZERS[name], tree.parent / "report"
    for old in tree.parent.glob("report.*"):
        old.unlink()
    options = {
        variable: f"{text}:log_path={report}" for variable, text in sanitizer.options.items()
    }
    command = [
        *(str(tree / ".venv" / "bin" / "python"), "-m", "pytest", "-q"),
        *("-p", "no:cacheprovider", "-o", "faulthandler_timeout=1800"),
        *(f"--deselect={test}" for test in LEFT_OUT if "::" in test),
        *(f"--ignore={path}" for path in LEFT_OUT if "::" not in path),
        *arguments,
    ]
    # Python's own arenas would hide from it what is freed too early or used too far.
    environment = os.environ | options | {"PYTHONMALLOC": "malloc", "PYTHONSAFEPATH": "1"}
    code = subprocess.run(command, cwd=tree, env=environment, check=False).returncode
    reports = sorted(tree.parent.glob("report.*"))
    for path in reports:
        print(f"\n{path}:\n{path.read_text(errors='replace')[:8000]}", flush=True)
    print(f"make sanitize WHAT={name}: pytest ended with {code}, {len(reports)} reports")
    return code or int(bool(reports))


def main() -> int:
    """Copy, build, test."""
    name = sys.argv[1]
    tree = WORK / name / "tree"
    copy(tree)
    build(SANITIZERS[name], tree)
    return test(name, tree, sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
