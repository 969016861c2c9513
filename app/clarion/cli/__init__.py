"""The `clarion` command. Each subcommand is a module of its own, imported when it is called."""

import importlib
import sys
import traceback
from typing import Any

import click

from clarion import __version__
from clarion.errors import ClarionError, Unavailable, UsageError

# Name → module, and what `clarion --help` says; so that help imports nothing.
_COMMANDS = {
    "dev": "One command: Postgres, API, worker and maintenance, for development.",
    "serve": "Answer HTTP.",
    "worker": "Run jobs with the handlers of a module.",
    "scheduler": "Promote due jobs, take back expired leases, keep the history's partitions.",
    "migrate": "Create or upgrade the database schema.",
    "conformance": "Check a worker of your own, in any language, against the HTTP protocol.",
    "settings": "Print every setting, its value and what it is for.",
}

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 5


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"clarion.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="clarion")
def cli() -> None:
    """Job orchestration on PostgreSQL."""


def main(arguments: list[str] | None = None) -> Any:
    """Runs the command line; every error Clarion raises on purpose ends in one line and an exit code."""
    try:
        return cli(arguments, prog_name="clarion")
    except (ClarionError, BaseExceptionGroup) as error:
        if _only_clarion_error(error) is None:
            raise
        sys.exit(report(error))


def report(error: BaseException) -> int:
    """Prints an error as a user should see it, a bug with its traceback; answers the exit code."""
    known = _only_clarion_error(error)
    if known is None:
        traceback.print_exception(error)
        return EXIT_FAILED
    click.secho(f"clarion: {known}", fg="red", err=True)
    return _exit_code(known)


def _only_clarion_error(error: BaseException) -> ClarionError | None:
    """The error itself, out of the groups that task groups wrap it in; None when a bug is among them."""
    if isinstance(error, BaseExceptionGroup):
        found = [_only_clarion_error(member) for member in error.exceptions]
        return found[0] if all(found) else None
    return error if isinstance(error, ClarionError) else None


def _exit_code(error: ClarionError) -> int:
    if isinstance(error, UsageError):
        return EXIT_USAGE
    return EXIT_UNREACHABLE if isinstance(error, Unavailable) else EXIT_FAILED
