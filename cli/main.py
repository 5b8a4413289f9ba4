"""The `millpond` command: `millpond NOUN VERB [ARGS]`.

Each module in MODULES owns some nouns and adds them in its `register(app)`. Nothing but data goes
to stdout; errors are one line on stderr with the exit codes of cli/run.py. A programming error
keeps its traceback: it is a report for us, not a message for the operator.
"""

import os
import sys
from typing import Any

import typer

from millpond.cli import (
    cache,
    config,
    device,
    flush,
    hook,
    map,
    status,
    store,
    up,
    version,
    volume,
)
from millpond.cli.run import FAILED, USAGE, CommandError, complain
from millpond.store.errors import StoreError

MODULES = (
    up,
    volume,
    store,
    cache,
    device,
    config,
    status,
    flush,
    map,
    hook,
    version,
)

# typer vendors or imports click depending on its version; its one public usage error leads there.
UsageError: Any = typer.BadParameter.__mro__[1]
ClickException: Any = UsageError.__mro__[1]

app = typer.Typer(
    name="millpond",
    help="Virtual machine disks at local SSD speed, kept by log-structured storage servers.",
    epilog="Start with: millpond up DIR",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,
)


for module in MODULES:
    module.register(app)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns (and, as console script, exits with) the exit code."""
    try:
        result = app(arguments, standalone_mode=False)
    except BrokenPipeError:
        # The reader of our output went away: not a failure of ours, and nobody reads a complaint.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (StoreError, CommandError, OSError, KeyboardInterrupt, EOFError) as error:
        return complain(error)
    except typer.Abort as error:
        return complain(CommandError(str(error) or "aborted"))
    except ClickException as error:
        return _complain_usage(error)
    return result if isinstance(result, int) else 0


def _complain_usage(error: Any) -> int:
    """A wrong command line: help when nothing was given, else one line and where help is."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
        return USAGE
    context = getattr(error, "ctx", None)
    hint = f"; see '{context.command_path} --help'" if context is not None else ""
    message = " ".join(str(error.format_message()).split()).rstrip(".")
    return complain(CommandError(message + hint, exit_code=USAGE))


if __name__ == "__main__":
    sys.exit(main())
