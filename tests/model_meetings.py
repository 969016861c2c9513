"""Two calls at one moment: the first in an open transaction, the second made before that ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import asyncpg
import msgspec
import pytest

from clarion.db import close_connection, connect, translated_errors
from clarion.settings import Settings
from clarion.store import Store
from model_twins import Call, Twins, World


class Party:
    """A connection of its own, of which can be asked whether it waits for a lock."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncIterator[Party]:
        connection = await connect(settings, name="party")
        try:
            yield cls(connection)
        finally:
            await close_connection(connection)

    async def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        with translated_errors():
            return await self._connection.fetch(sql, *args)

    @asynccontextmanager
    async def transaction(self, *, commit: bool) -> AsyncIterator[None]:
        """What is called inside is seen by others at its end, or never."""
        transaction = self._connection.transaction()
        await transaction.start()
        try:
            yield
        except BaseException:
            await transaction.rollback()
            raise
        await (transaction.commit() if commit else transaction.rollback())

    async def waits(self, watcher: Party) -> bool:
        """Whether it waits for a lock at this moment."""
        waiting = "select wait_event_type = 'Lock' as waiting from pg_stat_activity where pid = $1"
        (row,) = await watcher.fetch(waiting, self._connection.get_server_pid())
        return bool(row["waiting"])


class Met(msgspec.Struct, frozen=True):
    """What the two were answered, and whether the second had to wait."""

    first: Any
    second: Any
    waited: bool


class Parties(msgspec.Struct, frozen=True):
    """Whom a meeting takes: two who call, and one who looks whether the second waits for the first."""

    first: Party
    second: Party
    watcher: Party
    settings: Settings

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncIterator[Parties]:
        async with Party.open(settings) as first, Party.open(settings) as second, Party.open(settings) as watcher:
            yield cls(first, second, watcher, settings)

    async def meet(
        self, first: Call, second: Call, *, commit: bool, meanwhile: Callable[[], Awaitable[None]] | None = None
    ) -> Met:
        """Makes the second call while the first is not committed; then commits that, or undoes it."""
        answers: list[Any] = []
        done = anyio.Event()

        async def call_second() -> None:
            answers.append(await second.make(Store(self.second, self.settings)))
            done.set()

        async with anyio.create_task_group() as group, self.first.transaction(commit=commit):
            answer = await first.make(Store(self.first, self.settings))
            group.start_soon(call_second)
            waited = await self._second_waits(done)
            if meanwhile is not None:
                await meanwhile()
        return Met(answer, answers[0], waited)

    async def _second_waits(self, done: anyio.Event) -> bool:
        """Returns when the second waits for a lock, or is done without."""
        while not done.is_set():
            if await self.second.waits(self.watcher):
                return True
        return False


async def settle(twins: Twins, *orders: Sequence[tuple[Call, Any]]) -> None:
    """The model goes the way of the first order that explains every answer and every row."""
    reasons = []
    for order in orders:
        world = twins.world.copy()
        foretold = [(call, call.foretell(world, answer), answer) for call, answer in order]
        wrong = [f"{call.name} would be answered {is_to}" for call, is_to, answer in foretold if is_to != answer]
        wrong = wrong or await twins.differences(world)
        if not wrong:
            twins.world = world
            return
        reasons.append(f"{[call.name for call, _ in order]}: {'; '.join(wrong)}")
    pytest.fail("no order of the calls explains this:\n" + "\n".join(reasons))


def has_effect(world: World, call: Call, answer: Any) -> bool:
    """Whether the call, made first, changes something."""
    after = world.copy()
    call.foretell(after, answer)
    return after != world


def moves(world: World, call: Call, answer: Any) -> bool:
    """Whether the call, made first, moves a job between the tables."""
    after = world.copy()
    call.foretell(after, answer)
    return any(job.is_over != world.jobs[job_id].is_over for job_id, job in after.jobs.items() if job_id in world.jobs)
