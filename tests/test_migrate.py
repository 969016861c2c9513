"""The schema's numbered steps: each is applied once, whole, and in one text only."""

import os
import shutil
import subprocess
from collections.abc import Callable

import anyio
import asyncpg
import msgspec
import pytest

from clarion import migrate as migrate_module
from clarion.db import open_database
from clarion.errors import UnsafeGround
from clarion.migrate import migrate, migration_script, migration_status
from clarion.settings import Settings
from clarion.statements import Migration, migrations
from conftest import settings_for
from store_actions import BEATS, Jobs, with_token

VERSIONS = [step.version for step in migrations()]
LATEST = VERSIONS[-1]
# Everything about the schema that a statement could notice, one line each.
SCHEMA = """
    select 'column', format('%s.%s %s %s %s %s', c.relname, a.attname, format_type(a.atttypid, a.atttypmod),
        a.attnotnull, pg_get_expr(d.adbin, d.adrelid), a.attnum)
    from pg_attribute as a join pg_class as c on c.oid = a.attrelid
    left join pg_attrdef as d on d.adrelid = c.oid and d.adnum = a.attnum
    where c.relnamespace = 'clarion'::regnamespace and a.attnum > 0 and not a.attisdropped
    union all
    select 'relation', format('%s %s %s %s', c.relname, c.relkind, c.reloptions, pg_get_expr(c.relpartbound, c.oid))
    from pg_class as c where c.relnamespace = 'clarion'::regnamespace
    union all
    select 'constraint', format('%s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
    from pg_constraint where connamespace = 'clarion'::regnamespace
    union all
    select 'index', pg_get_indexdef(indexrelid) from pg_index as i join pg_class as c on c.oid = i.indexrelid
    where c.relnamespace = 'clarion'::regnamespace
    union all
    select 'function', pg_get_functiondef(oid) from pg_proc where pronamespace = 'clarion'::regnamespace
    union all
    select 'label', format('%s %s', enumtypid::regtype, enumlabel) from pg_enum
    union all
    select 'migration', format('%s %s %s', version, name, checksum) from clarion.schema_migrations
"""

# What a database of the first two migrations may hold: a job in every state that has one.
OLD_JOBS = """
    insert into clarion.jobs (task, state) values ('t', 'ready'), ('t', 'scheduled');
    insert into clarion.jobs (task, state, attempt, started_at, lease_token, lease_expires_at, worker_id)
    values ('t', 'running', 1, now(), gen_random_uuid(), now() + interval '1 min', gen_random_uuid());
    insert into clarion.jobs (task, state, attempt, errors, dead_reason, started_at, died_at)
    values ('t', 'dead', 1, 1, 'attempts_exhausted', now(), now());
    insert into clarion.attempts (job_id, lease_token, attempt, outcome, state, started_at)
    select id, gen_random_uuid(), 1, 'failed', 'dead', now() from clarion.jobs where state = 'dead';
    insert into clarion.job_history
      (id, created_at, run_at, state, priority, attempt, errors, crashes, snoozes, queue, task, args)
    values (clarion.new_id(), now(), now(), 'cancelled', 0, 1, 1, 0, 0, 'default', 'cancelled', '{}')
"""


@pytest.fixture
def migrated(new_database: Callable[[], str]) -> Settings:
    return settings_for(new_database())


@pytest.fixture
async def empty(migrated: Settings) -> Settings:
    """A database that Clarion has never seen."""
    await execute(migrated, "drop schema clarion cascade")
    return migrated


async def execute(settings: Settings, sql: str) -> list[asyncpg.Record]:
    """Runs a script, or one query for its rows, on a connection without any of Clarion's settings."""
    connection = await asyncpg.connect(settings.database_url)
    try:
        if sql.lstrip().startswith("select"):
            return await connection.fetch(sql)
        await connection.execute(sql)
        return []
    finally:
        await connection.close()


async def schema(settings: Settings) -> list[tuple[str, str]]:
    return sorted((str(row[0]), str(row[1])) for row in await execute(settings, SCHEMA))


async def applied(settings: Settings) -> list[int]:
    rows = await execute(settings, "select version from clarion.schema_migrations order by version")
    return [row["version"] for row in rows]


def with_broken_step(monkeypatch: pytest.MonkeyPatch, sql: str) -> None:
    """Adds a last migration that Postgres refuses half-way."""
    steps = (*migrations(), Migration(LATEST + 1, "broken", sql, "sha"))
    monkeypatch.setattr(migrate_module, "migrations", lambda: steps)


# -- Applying


async def test_an_empty_database_gets_every_migration_in_order(empty: Settings) -> None:
    assert [step.version for step in await migrate(empty)] == VERSIONS
    assert await applied(empty) == VERSIONS


async def test_a_migrated_database_is_left_as_it_is(migrated: Settings) -> None:
    before = await schema(migrated)
    assert await migrate(migrated) == []
    assert await schema(migrated) == before


async def test_only_what_is_missing_is_applied(empty: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(migrate_module, "migrations", lambda: migrations()[:1])
        assert [step.version for step in await migrate(empty)] == VERSIONS[:1]
    assert [step.version for step in await migrate(empty)] == VERSIONS[1:]


async def test_jobs_from_before_a_job_had_the_rest_of_its_life_live_on(
    empty: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(migrate_module, "migrations", lambda: migrations()[:2])
        await migrate(empty)
    await execute(empty, OLD_JOBS)
    await migrate(empty)
    async with open_database(empty, name="test") as database:
        jobs = Jobs(database, empty)
        rows = await jobs.fetch("select id, state::text, lease_token from clarion.jobs")
        found = {row["state"]: row["id"] for row in rows}
        (ready,) = await jobs.claim()
        assert (ready.id, ready.generation) == (found["ready"], 1)
        (token,) = [row["lease_token"] for row in rows if row["state"] == "running"]
        running = with_token(msgspec.structs.replace(ready, id=found["running"]), token)
        for verb in (*BEATS, "complete"):
            assert await jobs.attempt(verb, running)
        assert (await jobs.cancel(found["scheduled"])).state == "cancelled"
        (cancelled,) = await jobs.fetch("select id from clarion.job_history where task = 'cancelled'")
        for job_id in (found["dead"], cancelled["id"]):
            assert (await jobs.job(job_id)).generation == 1
            assert (await jobs.retry(job_id)).state == "ready"
            assert (await jobs.row(job_id))["generation"] == 2
        (attempt,) = await jobs.store.list_attempts(found["dead"])
        assert (attempt.generation, attempt.run_at, attempt.outcome) == (1, None, "failed")


async def test_several_migrators_at_once_apply_each_migration_once(empty: Settings) -> None:
    done: list[int] = []

    async def run() -> None:
        done.extend(step.version for step in await migrate(empty))

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(run)
    assert done == VERSIONS
    assert await applied(empty) == VERSIONS


async def test_a_migration_that_fails_leaves_nothing_half_applied(
    empty: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        with_broken_step(broken, "create table clarion.half (); select * from missing; create table clarion.whole ();")
        with pytest.raises(asyncpg.UndefinedTableError):
            await migrate(empty)
    assert await applied(empty) == VERSIONS
    assert not await execute(empty, "select from pg_class where relname in ('half', 'whole')")
    assert await migrate(empty) == []


async def test_after_a_failure_others_may_migrate(empty: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with_broken_step(monkeypatch, "select * from missing")
    with pytest.raises(asyncpg.UndefinedTableError):
        await migrate(empty)
    with_broken_step(monkeypatch, "create table clarion.mended ()")
    assert [step.name for step in await migrate(empty)] == ["broken"]


# -- Refusing


async def test_a_migration_that_was_applied_with_another_text_is_refused(migrated: Settings) -> None:
    await execute(migrated, "update clarion.schema_migrations set checksum = 'another' where version = 1")
    before = await schema(migrated)
    for refused in (migrate, migration_status):
        with pytest.raises(UnsafeGround, match=r"migration 0001 \(jobs\) was applied with another text.*restore"):
            await refused(migrated)
    assert await schema(migrated) == before


async def test_a_schema_from_a_newer_clarion_is_refused(migrated: Settings) -> None:
    await execute(
        migrated, "insert into clarion.schema_migrations (version, name, checksum) values (9999, 'from_the_future', '')"
    )
    for refused in (migrate, migration_status):
        with pytest.raises(UnsafeGround, match=r"9999 \(from_the_future\).*does not know: run the newer Clarion"):
            await refused(migrated)


async def test_a_schema_with_a_gap_is_refused(migrated: Settings) -> None:
    await execute(migrated, "delete from clarion.schema_migrations where version = 1")
    with pytest.raises(UnsafeGround, match=r"lacks migration 0001 \(jobs\) though it has a later one"):
        await migrate(migrated)


# -- Status


async def test_the_status_of_an_empty_database_is_all_pending_and_changes_nothing(empty: Settings) -> None:
    status = await migration_status(empty)
    assert [(step.version, step.applied_at) for step in status] == [(version, None) for version in VERSIONS]
    assert not await execute(empty, "select from pg_namespace where nspname = 'clarion'")


async def test_the_status_says_when_each_migration_was_applied(migrated: Settings) -> None:
    await execute(migrated, f"delete from clarion.schema_migrations where version = {LATEST}")
    *done, pending = await migration_status(migrated)
    assert [step.version for step in done] == VERSIONS[:-1]
    assert all(step.applied_at is not None and step.applied_at.tzinfo for step in done)
    assert (pending.version, pending.applied_at) == (LATEST, None)


# -- By hand


async def test_the_script_makes_the_schema_that_migrating_makes(empty: Settings) -> None:
    await migrate(empty)
    by_migrating = await schema(empty)
    await execute(empty, "drop schema clarion cascade")
    await execute(empty, migration_script())
    assert await schema(empty) == by_migrating
    assert await migrate(empty) == []
    assert all(step.applied_at for step in await migration_status(empty))


def test_psql_runs_the_script(empty: Settings) -> None:
    if shutil.which("psql") is None:
        if os.environ.get("CLARION_TEST_REQUIRE_TOOLS") == "1":
            pytest.fail("psql is not installed")
        pytest.skip("psql is not installed")
    command = ["psql", empty.database_url, "--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1"]
    ran = subprocess.run(command, input=migration_script(), capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert anyio.run(migrate, empty) == []


async def test_the_script_applied_twice_changes_nothing_the_second_time(empty: Settings) -> None:
    await execute(empty, migration_script())
    before = await schema(empty)
    with pytest.raises(asyncpg.PostgresError, match="already exists"):
        await execute(empty, migration_script())
    assert await schema(empty) == before


# -- What ships


def test_versions_count_up_from_one_without_a_gap() -> None:
    assert list(range(1, LATEST + 1)) == VERSIONS


def test_a_migration_takes_no_transaction_of_its_own() -> None:
    """Each runs inside the migrator's, with the row that records it."""
    words = ("begin;", "commit;", "rollback;", " concurrently ")
    assert not [step.name for step in migrations() if any(word in step.sql.lower() for word in words)]
