"""`clarion migrate`: up, status, sql."""

from typing import Any

import anyio
import click
import msgspec

from clarion.cli.options import COMMON, prepare, setting_flags


@click.group("migrate")
def command() -> None:
    """Create or upgrade the database schema."""


@command.command()
@setting_flags(*COMMON)
def up(**flags: Any) -> None:
    """Apply what is missing. Any number of processes may do so at once."""
    from clarion.migrate import migrate

    applied = anyio.run(migrate, prepare(flags))
    for step in applied:
        click.echo(f"applied {step.version:04} {step.name}")
    if not applied:
        click.echo("nothing to do: the schema is up to date")


@command.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON array, for scripts.")
@setting_flags(*COMMON)
def status(*, as_json: bool, **flags: Any) -> None:
    """Say which migrations this database has seen."""
    from clarion.migrate import migration_status

    steps = anyio.run(migration_status, prepare(flags))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(steps)))
        return
    for step in steps:
        state = f"applied {step.applied_at:%Y-%m-%d %H:%M:%S}Z" if step.applied_at else "pending"
        click.echo(f"{step.version:04} {step.name:30} {state}")


@command.command()
def sql() -> None:
    """Print all DDL; needs no database."""
    from clarion.migrate import migration_script

    click.echo(migration_script())
