"""Start-up refuses a database on which the promises cannot be kept, and says how to mend it."""

from collections.abc import AsyncIterator, Callable

import asyncpg
import msgspec
import pytest
from structlog.testing import capture_logs

from clarion import ground as ground_module
from clarion.db import Database, open_database
from clarion.errors import Unavailable, UnsafeGround
from clarion.ground import check_ground, find_faults, wait_for_ground
from clarion.settings import Settings
from clarion.statements import schema_version
from clarion.store import Ground, Store
from conftest import settings_for

SAFE = Ground(
    fsync=True,
    read_only=False,
    server_version=150000,
    synchronous_commit=True,
    schema_version=schema_version(),
    unlogged_tables=[],
    missing_unique_indexes=[],
)


@pytest.fixture
def settings(new_database: Callable[[], str]) -> Settings:
    """A database for each test, to spoil."""
    return settings_for(new_database())


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    async with open_database(settings, name="test") as pool:
        yield pool


class Flaky:
    """A database that is away for the first few statements."""

    def __init__(self, database: Database, failures: int) -> None:
        self._database = database
        self.failures = failures

    async def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        if self.failures:
            self.failures -= 1
            raise Unavailable("away")
        return await self._database.fetch(sql, *args)


async def refusal(store: Store, settings: Settings) -> str:
    with pytest.raises(UnsafeGround) as refused:
        await check_ground(store, settings)
    return str(refused.value)


# -- Each fault, as Postgres reports it


async def test_a_migrated_database_is_safe(store: Store, settings: Settings) -> None:
    await check_ground(store, settings)


async def test_fsync_is_reported_and_may_be_off_for_data_to_throw_away(
    store: Store, settings: Settings, database: Database
) -> None:
    (row,) = await database.fetch("select current_setting('fsync') = 'on' as fsync")
    assert (await store.read_ground()).fsync == row["fsync"]
    durable = msgspec.structs.replace(settings, ephemeral=False)
    if row["fsync"]:
        await check_ground(store, durable)
    else:
        assert "fsync is off" in await refusal(store, durable)
    await check_ground(store, settings)


@pytest.mark.parametrize(
    "table", ["jobs", "job_history_default", "attempts", "job_events", "job_logs", "idempotency_keys"]
)
async def test_a_table_that_a_crash_would_empty_is_refused(
    store: Store, settings: Settings, database: Database, table: str
) -> None:
    await database.fetch(f"alter table clarion.{table} set unlogged")
    assert f"clarion.{table}: `alter table … set logged`" in await refusal(store, settings)
    await database.fetch(f"alter table clarion.{table} set logged")
    await check_ground(store, settings)


@pytest.mark.parametrize("table", ["jobs", "job_history", "attempts", "job_logs", "idempotency_keys"])
async def test_a_missing_primary_key_is_refused(
    store: Store, settings: Settings, database: Database, table: str
) -> None:
    await database.fetch(f"alter table clarion.{table} drop constraint {table}_pkey")
    assert f"the primary key is missing or invalid on: clarion.{table}" in await refusal(store, settings)


async def test_an_invalid_primary_key_is_refused(store: Store, settings: Settings, database: Database) -> None:
    await database.fetch("update pg_index set indisvalid = false where indexrelid = 'clarion.jobs_pkey'::regclass")
    assert "invalid on: clarion.jobs" in await refusal(store, settings)


async def test_a_missing_table_is_refused(store: Store, settings: Settings, database: Database) -> None:
    await database.fetch("drop table clarion.attempts")
    assert "clarion.attempts" in await refusal(store, settings)


async def test_a_database_without_the_schema_is_refused(store: Store, settings: Settings, database: Database) -> None:
    await database.fetch("drop schema clarion cascade")
    assert "no Clarion schema yet: run `clarion migrate up`" in await refusal(store, settings)


async def test_an_older_schema_is_refused(store: Store, settings: Settings, database: Database) -> None:
    await database.fetch("delete from clarion.schema_migrations where version = $1", schema_version())
    said = await refusal(store, settings)
    assert f"at version {schema_version() - 1} and this Clarion needs {schema_version()}" in said
    assert "`clarion migrate up`" in said


async def test_a_schema_of_which_nothing_is_applied_is_refused(
    store: Store, settings: Settings, database: Database
) -> None:
    await database.fetch("truncate clarion.schema_migrations")
    assert "at version 0" in await refusal(store, settings)


async def test_a_newer_schema_is_refused(store: Store, settings: Settings, database: Database) -> None:
    await database.fetch("insert into clarion.schema_migrations (version, name, checksum) values (9999, 'x', 'x')")
    assert "at version 9999, newer than this Clarion understands" in await refusal(store, settings)


async def test_everything_that_is_wrong_is_said_at_once(store: Store, settings: Settings, database: Database) -> None:
    await database.fetch("alter table clarion.jobs drop constraint jobs_pkey")
    await database.fetch("alter table clarion.attempts set unlogged")
    await database.fetch("insert into clarion.schema_migrations (version, name, checksum) values (9999, 'x', 'x')")
    assert (await refusal(store, settings)).count("; ") == 2


# -- The faults a test server cannot have


def test_safe_ground_has_no_fault() -> None:
    assert find_faults(SAFE, ephemeral=False) == []


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"fsync": False}, "turn it on, or set CLARION_EPHEMERAL=true"),
        ({"server_version": 130012}, "PostgreSQL 13 is too old: 14 or newer"),
        ({"schema_version": None}, "run `clarion migrate up`"),
        ({"schema_version": 1}, "run `clarion migrate up`"),
        ({"schema_version": 10_000}, "upgrade Clarion"),
        ({"unlogged_tables": ["jobs", "attempts"]}, "clarion.jobs, clarion.attempts: `alter table … set logged`"),
        ({"missing_unique_indexes": ["jobs"]}, "missing or invalid on: clarion.jobs: restore it"),
    ],
)
def test_each_fault_names_its_fix(changes: dict[str, object], fix: str) -> None:
    (fault,) = find_faults(msgspec.structs.replace(SAFE, **changes), ephemeral=False)
    assert fix in fault


def test_data_to_throw_away_forgives_nothing_but_fsync() -> None:
    assert find_faults(msgspec.structs.replace(SAFE, fsync=False), ephemeral=True) == []
    assert len(find_faults(msgspec.structs.replace(SAFE, unlogged_tables=["jobs"]), ephemeral=True)) == 1


# -- Waiting


async def test_a_database_that_is_away_is_waited_for_and_said_to_be_away_once(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ground_module, "backoff_seconds", lambda _failures: 0.0)
    flaky = Flaky(database, failures=3)
    with capture_logs() as logs:
        await wait_for_ground(Store(flaky, settings), settings)
    assert flaky.failures == 0
    assert [(line["event"], line["step"]) for line in logs] == [("step.failed", "connect")]


async def test_unsafe_ground_is_not_waited_for(database: Database, settings: Settings) -> None:
    await database.fetch("drop schema clarion cascade")
    with pytest.raises(UnsafeGround):
        await wait_for_ground(Store(database, settings), settings)
