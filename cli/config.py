"""`millpond config`: check a configuration file, print a sample or the reference."""

from typing import Annotated, Any

import msgspec
import typer

from millpond.cli.configdoc import reference as reference_page
from millpond.cli.configdoc import sample as sample_file
from millpond.cli.configfile import load_any
from millpond.cli.configtypes import FILES, CacheFile
from millpond.cli.output import print_json
from millpond.cli.run import USAGE, CommandError

app = typer.Typer(
    name="config",
    help="Configuration files: check one, print a sample, print the reference.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(parent: typer.Typer) -> None:
    """Add the noun to the command tree."""
    parent.add_typer(app)


@app.command("check")
def check(
    file: Annotated[str, typer.Argument(help="a cache.toml or store.toml", metavar="FILE")],
    json: Annotated[bool, typer.Option("--json", help="print what it says, in bytes")] = False,
) -> None:
    """Read a file as the daemon would; nothing is started or changed."""
    found = load_any(file)
    if json:
        print_json(msgspec.to_builtins(found, enc_hook=_number))
    else:
        print(f"{file}: a {'cache' if isinstance(found, CacheFile) else 'store'}'s file, no error")


def _number(value: Any) -> int | float:
    """Sizes, rates, durations and modes without their names."""
    return float(value) if isinstance(value, float) else int(value)


@app.command("sample")
def sample(
    kind: Annotated[str, typer.Argument(help="cache or store", metavar="cache|store")],
) -> None:
    """Print a commented file to start with."""
    if kind not in FILES:
        raise CommandError(f"{kind!r} has no configuration; cache and store have", exit_code=USAGE)
    print(sample_file(kind), end="")


@app.command("reference")
def reference() -> None:
    """Print every table and key, as Markdown."""
    print(reference_page(), end="")
