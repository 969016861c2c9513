"""`clarion dev`: everything, in one command."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import click
import msgspec

from clarion.cli.options import COMMON, prepare, setting_flags
from clarion.settings import Settings

_DATA = Path(".clarion/postgres")


@click.command("dev")
@click.argument("target", metavar="[MODULE:NAME]", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--db", "directory", type=click.Path(path_type=Path), default=_DATA, show_default=True,
              help="Where the embedded Postgres keeps its data.")  # fmt: skip
@click.option("--ephemeral", "throw_away", is_flag=True, help="Throw-away data, gone at the end.")
@click.option("--demo/--no-demo", "with_demo", default=True, show_default=True, help="Run the demo.* tasks.")
@click.option("--reload", "with_reload", is_flag=True, help="Restart the worker when a Python file changes.")
@click.option("--queues", default="", help="Queues to work on, comma-separated; default: those that the tasks name.")
@setting_flags(*COMMON, "concurrency", "lease_seconds")
def command(
    *,
    target: str | None,
    host: str,
    port: int,
    directory: Path,
    throw_away: bool,
    with_demo: bool,
    with_reload: bool,
    queues: str,
    **flags: Any,
) -> None:
    """Postgres, API, worker and maintenance, for development. MODULE:NAME is a worker of your own."""
    from clarion.cli.dev_stack import WorkerOptions, run_stack
    from clarion.main import bind, url_of

    settings = prepare(flags, needs_database=False)
    listening = bind(settings, host, port)
    options = WorkerOptions(target=target, queues=queues, with_demo=with_demo, with_reload=with_reload)
    with _database(settings, directory, throw_away=throw_away) as (settings, where):
        banner = _banner(url_of(listening), where, with_demo=with_demo)
        anyio.run(run_stack, settings, listening, options, banner, backend_options={"use_uvloop": True})


@contextmanager
def _database(settings: Settings, directory: Path, *, throw_away: bool) -> Iterator[tuple[Settings, str]]:
    if settings.database_url:
        yield settings, "in the database you named"
        return
    from clarion.embedded import running_postgres

    with running_postgres(None if throw_away else directory) as server:
        where = f"{server.directory}{' (gone at the end)' if throw_away else ''}"
        yield msgspec.structs.replace(settings, database_url=server.url, ephemeral=throw_away), where


def _banner(url: str, where: str, *, with_demo: bool) -> str:
    lines = [f"Clarion is ready:  {url}", f"Data:              {where}"]
    if with_demo:
        lines += [
            "Try it:",
            f"  curl -s {url}/v1/jobs -H 'content-type: application/json' "
            """-d '{"task": "demo.echo", "args": {"hello": "world"}}'""",
        ]
    return "\n".join([*lines, "Ctrl-C stops everything."])
