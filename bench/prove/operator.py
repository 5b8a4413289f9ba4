"""make prove WHAT=operator: what an operator relies on, with a real installation.

The paths of tests named here are agreed: a test that moves takes its line with it.
"""

import shutil
import signal
import subprocess
import sys

from prove.runner import ROOT, WORK, Outcome, Registry, main, run, tests

registry = Registry("operator")
READY_TIMEOUT_S = 120


@registry.line("install", "make install into an empty prefix serves a disk; uninstall leaves none")
def install() -> Outcome:
    """The package index is asked, as on any machine."""
    root = WORK / "root"
    command = f"make install PREFIX={root.relative_to(ROOT)}, up, make uninstall"
    shutil.rmtree(root, ignore_errors=True)
    where = [f"PREFIX={root}", f"SYSCONFDIR={root}/etc"]
    code, text = run(["make", "-C", str(ROOT), "install", *where], "install")
    if code:
        return Outcome(command, text.strip().splitlines()[-1], passed=False)
    program = str(root / "bin" / "millpond")
    code, version = run([program, "version"], "install-version", cwd=WORK)
    served = not code and _serves(program)
    code, _ = run(["make", "-C", str(ROOT), "uninstall", *where], "uninstall")
    left = [path for path in root.rglob("*") if not path.is_dir()]
    shutil.rmtree(root, ignore_errors=True)
    figure = f"{', '.join(version.split(chr(10))[:2])}; {len(left)} files left"
    return Outcome(command, figure, passed=served and not code and not left)


def _serves(program: str) -> bool:
    """Does `up` come up, and end well when asked to?"""
    pond = WORK / "pond"
    shutil.rmtree(pond, ignore_errors=True)
    arguments = [program, "up", str(pond), "--size", "64MiB", "--cache-size", "256MiB"]
    with (WORK / "install-up.log").open("w") as log:
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=log, text=True, cwd=WORK
        )
    assert process.stdout is not None
    ready = process.stdout.readline().startswith("nbd+unix://")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=READY_TIMEOUT_S)
    shutil.rmtree(pond, ignore_errors=True)
    return ready and process.returncode == 0


@registry.line("unprivileged", "store, cache and NBD on a unix socket run without any right")
def unprivileged() -> Outcome:
    """As nobody, when this runs as root."""
    return tests("unprivileged", "tests/cli/test_unprivileged.py")


@registry.line("settings", "configuration files: samples, reference, every mistake one line")
def settings() -> Outcome:
    """And the daemons serve what they say."""
    return tests("settings", "tests/cli/test_config.py", "tests/cli/test_install.py")


@registry.line("machine", "too old a kernel or Python, no O_DIRECT, exit codes: one line each")
def machine() -> Outcome:
    """Simulated where this machine has them."""
    return tests("machine", "tests/cli/test_machine.py")


@registry.line("change", "resize, rename and flush under a guest, and across every cut")
def change() -> Outcome:
    """Store, cache, engine and command line."""
    return tests(
        "change",
        "tests/store/test_catalogue.py",
        "tests/cache/test_resize.py",
        "tests/sim/test_grow.py",
        "tests/cli/test_operate.py",
    )


if __name__ == "__main__":
    sys.exit(main(registry))
