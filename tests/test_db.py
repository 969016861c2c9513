"""The pool: whose connections serve which statements, and what happens to them when something goes wrong."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import asyncpg
import msgspec
import pytest

from clarion import db
from clarion.db import Database, open_database
from clarion.errors import Overloaded, Unstorable
from clarion.settings import Settings

NAME = "test pool"
PID = "select pg_backend_pid() as pid"


@pytest.fixture
async def onlooker(settings: Settings) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(settings.database_url)
    yield connection
    await connection.close()


def small(settings: Settings, pool_max: int, **changes: Any) -> Settings:
    return msgspec.structs.replace(settings, pool_max=pool_max, **changes)


async def pid_of(database: Database) -> int:
    (row,) = await database.fetch(PID)
    return int(row["pid"])


async def connections(onlooker: "asyncpg.Connection[asyncpg.Record]") -> set[int]:
    rows = await onlooker.fetch(
        "select pid from pg_stat_activity where application_name like $1 and datname = current_database()", f"%{NAME}"
    )
    return {row["pid"] for row in rows}


async def is_asleep(onlooker: "asyncpg.Connection[asyncpg.Record]") -> bool:
    rows = await onlooker.fetch(
        "select from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database()"
    )
    return bool(rows)


async def test_statements_one_after_the_other_are_served_by_one_connection(
    settings: Settings, onlooker: "asyncpg.Connection[asyncpg.Record]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "_RETURN_EVERY", 7)
    async with open_database(settings, name=NAME) as database:
        assert len({await pid_of(database) for _ in range(30)}) == 1
        assert len(await connections(onlooker)) == 1


async def test_many_at_once_are_served_by_as_many_as_there_may_be(
    settings: Settings, onlooker: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    pids: list[int] = []
    async with open_database(small(settings, 6), name=NAME) as database:

        async def ask() -> None:
            pids.append(await pid_of(database))

        for _ in range(3):
            async with anyio.create_task_group() as group:
                for _ in range(50):
                    group.start_soon(ask)
        assert len(pids) == 150
        assert set(pids) == await connections(onlooker)
        assert len(set(pids)) <= 6
    while await connections(onlooker):
        pass


async def test_one_connection_serves_all_who_wait_for_it(settings: Settings) -> None:
    async with open_database(small(settings, 1), name=NAME) as database:
        pids: set[int] = set()

        async def ask() -> None:
            for _ in range(5):
                pids.add(await pid_of(database))

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(ask)
        assert len(pids) == 1


async def test_a_connection_that_was_closed_meanwhile_is_replaced(
    settings: Settings, onlooker: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    async with open_database(small(settings, 1), name=NAME) as database:
        first = await pid_of(database)
        assert await onlooker.fetchval("select pg_terminate_backend($1, 5000)", first)
        while await connections(onlooker):
            pass
        assert await pid_of(database) != first


async def test_a_statement_that_fails_costs_no_connection(settings: Settings) -> None:
    async with open_database(small(settings, 1), name=NAME) as database:
        for _ in range(3):
            with pytest.raises(Unstorable):
                await database.fetch("select 1 / 0")
        assert await pid_of(database)


async def test_a_statement_that_nobody_waits_for_any_more_costs_no_connection(settings: Settings) -> None:
    async with open_database(small(settings, 1), name=NAME) as database:
        for _ in range(3):
            with anyio.move_on_after(0.05) as scope:
                await database.fetch("select pg_sleep(60)")
            assert scope.cancelled_caught
        assert await pid_of(database)


async def test_where_every_connection_is_busy_the_next_is_told_so(
    settings: Settings, onlooker: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    async with (
        open_database(small(settings, 1, acquire_timeout_seconds=0.05), name=NAME) as database,
        anyio.create_task_group() as group,
    ):
        await pid_of(database)
        group.start_soon(database.fetch, "select pg_sleep(60)")
        while not await is_asleep(onlooker):
            pass
        with pytest.raises(Overloaded):
            await database.fetch(PID)
        group.cancel_scope.cancel()
