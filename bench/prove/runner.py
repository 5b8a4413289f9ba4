"""Runs the lines of one file of this folder and prints line, command, figure, pass or short.

A line is a function that returns an Outcome; `line(...)` puts it into the registry in the
order of the file. A line that tests prove runs pytest on their paths: it passes when at
least one test ran, none failed and none was skipped. Its figure is what the tests recorded
with pytest's own `record_property("figure", "...")`, and the number of tests. They run in full:
FULL asks for what the issue asks for, where `make test` is content with a sample.

Failure modes: a missing path, a skipped test or an unexpected exception is `short`, never a
pass; the rest of the lines still run; the exit code is the number of short lines.
"""

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".run" / "prove"
PYTEST = Path(sys.executable).with_name("pytest")
FULL = {"MILLPOND_PROVE": "1", "MILLPOND_SIM_FULL": "1"}


@dataclass(frozen=True)
class Outcome:
    """What a line showed: the command that anybody can repeat, the figure, and whether it holds."""

    command: str
    figure: str
    passed: bool


Show = Callable[[], Outcome]


@dataclass
class Registry:
    """The lines of one issue, in order."""

    name: str
    lines: list[tuple[str, str, Show]] = field(default_factory=list)

    def line(self, key: str, text: str) -> Callable[[Show], Show]:
        """Register the decorated function as the line `key` that says `text`."""

        def add(show: Show) -> Show:
            self.lines.append((key, text, show))
            return show

        return add


def run(command: list[str], log_name: str, cwd: Path = ROOT) -> tuple[int, str]:
    """Run a command with its output in .run/prove/LOG_NAME.log; (exit code, output)."""
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / f"{log_name}.log"
    with log.open("w") as file:
        code = subprocess.run(
            command,
            cwd=cwd,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
            env=os.environ | FULL,
        ).returncode
    return code, log.read_text(errors="replace")


def tests(log_name: str, *paths: str) -> Outcome:
    """A line that tests prove."""
    switches = " ".join(f"{name}={value}" for name, value in FULL.items())
    command = f"make build && {switches} .venv/bin/pytest -m '' {' '.join(paths)}"
    missing = [path for path in paths if not (ROOT / path.partition("::")[0]).exists()]
    if missing:
        return Outcome(command, f"no {' '.join(missing)}", passed=False)
    report = WORK / f"{log_name}.xml"
    report.unlink(missing_ok=True)
    code, _ = run([str(PYTEST), "-q", "-m", "", f"--junitxml={report}", *paths], log_name)
    if not report.exists():
        return Outcome(
            command, f"pytest ended with {code}: .run/prove/{log_name}.log", passed=False
        )
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = sum(
        case.find("failure") is not None or case.find("error") is not None for case in cases
    )
    figures = [
        f"{entry.get('value')}"
        for case in cases
        for entry in case.iter("property")
        if entry.get("name") == "figure"
    ]
    counts = f"{len(cases) - failed - skipped} tests passed"
    counts += f", {failed} failed" if failed else ""
    counts += f", {skipped} skipped" if skipped else ""
    passed = code == 0 and bool(cases) and not failed and not skipped
    return Outcome(command, "; ".join([*figures, counts]), passed)


def guarded(show: Show) -> Outcome:
    """A line that breaks is short, with the reason as its figure."""
    try:
        return show()
    except (Exception, SystemExit) as error:
        return Outcome("-", f"{type(error).__name__}: {error}", passed=False)


def main(registry: Registry) -> int:
    """Run all lines, or those named on the command line; the number of short lines."""
    parser = argparse.ArgumentParser(prog=f"make prove WHAT={registry.name} ARGS=")
    keys = [key for key, _, _ in registry.lines]
    parser.add_argument("only", nargs="*", help=f"only these lines: {' '.join(keys)}")
    only = parser.parse_args().only
    if unknown := set(only) - set(keys):
        parser.error(f"no line {' '.join(sorted(unknown))}; lines: {' '.join(keys)}")
    table = Table(title=f"make prove WHAT={registry.name}", show_lines=True)
    for column in ("line", "command", "figure", "result"):
        table.add_column(column, overflow="fold")
    short = 0
    for key, text, show in registry.lines:
        if only and key not in only:
            continue
        begin = time.perf_counter()
        print(f"{key}: {text}", flush=True)
        outcome = guarded(show)
        result = "pass" if outcome.passed else "short"
        print(f"    {outcome.command}\n    {outcome.figure}", flush=True)
        print(f"    {result} after {time.perf_counter() - begin:.0f} s", flush=True)
        table.add_row(text, outcome.command, outcome.figure, result)
        short += not outcome.passed
    Console(width=160 if not sys.stdout.isatty() else None, markup=False).print(table)
    return short
