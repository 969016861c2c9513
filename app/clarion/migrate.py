"""Numbered SQL with checksums, applied one transaction each under one advisory lock."""

from __future__ import annotations

from datetime import datetime

import anyio
import asyncpg
import msgspec
import structlog

from clarion.db import connect, translated_errors
from clarion.errors import UnsafeGround
from clarion.events import Event
from clarion.settings import Settings
from clarion.statements import Migration, bootstrap, migrations, statement

log = structlog.get_logger()


_LOCK_WAIT_SECONDS = 5
_LOCK_POLL_SECONDS = 0.1


class Applied(msgspec.Struct, frozen=True):
    """A migration that a database has seen."""

    version: int
    name: str
    checksum: str
    applied_at: datetime


class MigrationStatus(msgspec.Struct, frozen=True):
    """One migration beside what the database says of it; `applied_at` None means pending."""

    version: int
    name: str
    applied_at: datetime | None


async def migrate(settings: Settings) -> list[Migration]:
    """Applies what is missing and answers it; any number of processes may call this at once.

    Raises UnsafeGround when the database is ahead of this code or saw another text of a migration.
    """
    connection = await connect(settings, name="migrate", statement_timeout_seconds=0)
    try:
        with translated_errors():
            await _lock(connection)
            await connection.execute(bootstrap())
            seen = await _read_applied(connection)
            pending = [step for step in _checked(seen) if step.version not in seen]
            for step in pending:
                await _apply(connection, step)
            return pending
    finally:
        await connection.close()


async def migration_status(settings: Settings) -> list[MigrationStatus]:
    """Every migration known to the code, with the moment it was applied; changes nothing."""
    connection = await connect(settings, name="migrate")
    try:
        with translated_errors():
            seen = await _read_applied(connection)
    finally:
        await connection.close()
    steps = _checked(seen)
    return [
        MigrationStatus(step.version, step.name, seen[step.version].applied_at if step.version in seen else None)
        for step in steps
    ]


def migration_script() -> str:
    """All DDL as one script, for people who apply it themselves; needs no database."""
    parts = [bootstrap()]
    for step in migrations():
        record = (
            f"insert into clarion.schema_migrations (version, name, checksum) "  # noqa: S608  text for people, from our own files
            f"values ({step.version}, '{step.name}', '{step.checksum}');"
        )
        parts.append(f"-- {step.version:04} {step.name}\nbegin;\n{step.sql}\n{record}\ncommit;")
    return "\n\n".join(parts)


async def _lock(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    waited = False
    while not await connection.fetchval(statement("lock_migrations")):
        if not waited:
            log.info(Event.MIGRATION_AWAITED, reason="another process is migrating this database")
        waited = True
        await anyio.sleep(_LOCK_POLL_SECONDS)


async def _apply(connection: asyncpg.Connection[asyncpg.Record], step: Migration) -> None:
    async with connection.transaction():
        # A migration that waits for a lock makes everybody behind it wait too: rather give up, and be run again.
        await connection.execute(statement("limit_lock_wait"), f"{_LOCK_WAIT_SECONDS}s")
        await connection.execute(step.sql)
        await connection.execute(statement("record_migration"), step.version, step.name, step.checksum)
    log.info(Event.MIGRATION_APPLIED, version=step.version, name=step.name)


async def _read_applied(connection: asyncpg.Connection[asyncpg.Record]) -> dict[int, Applied]:
    try:
        rows = await connection.fetch(statement("read_migrations"))
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return {}  # never migrated
    return {row["version"]: Applied(*row) for row in rows}


def _checked(seen: dict[int, Applied]) -> tuple[Migration, ...]:
    """The code's migrations, once it is certain that the database's are a prefix of them."""
    known = {step.version: step for step in migrations()}
    for version, applied in seen.items():
        if version not in known:
            raise UnsafeGround(
                f"the database has migration {version:04} ({applied.name}), which this version of Clarion "
                "does not know: run the newer Clarion"
            )
        if known[version].checksum != applied.checksum:
            raise UnsafeGround(
                f"migration {version:04} ({applied.name}) was applied with another text than this version of "
                "Clarion ships: install the Clarion that made this database, or restore the file"
            )
    skipped = [step for step in migrations() if step.version not in seen and step.version < max(seen, default=0)]
    if skipped:
        raise UnsafeGround(
            f"the database lacks migration {skipped[0].version:04} ({skipped[0].name}) though it has a later one: "
            "restore the rows of clarion.schema_migrations"
        )
    return migrations()
