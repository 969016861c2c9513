"""While somebody holds a snapshot, what is done cannot be cleaned up; claims must cost no more for that."""

import json
from typing import Any
from uuid import uuid4

import asyncpg
import msgspec
import pytest

from clarion.db import Database
from clarion.execution import Completion, Lease
from clarion.joint_claims import JointClaims, Want
from clarion.settings import Settings
from clarion.store import Store
from store_actions import TASK, Jobs, Session

DRAINED = 4_000
# Jobs of one enqueue stand at one place in line, so that is what a claim from the mark may have to walk over.
SET = 100
# The place of the marks among the claim's parameters.
EARLIEST = 2


class Noting:
    """An Executor that notes the last claim, as Postgres was asked for it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.claim: tuple[str, list[Any]] = "", []

    async def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        if "claim_max" in sql:
            self.claim = sql, list(args)
        return await self._database.fetch(sql, *args)


async def blocks_read(session: Session, sql: str, args: list[Any]) -> int:
    """How many blocks, in memory or not, a statement looks at; what it does is undone."""
    ((plan,),) = await session.fetch(f"explain (analyze, buffers, format json) {sql}", *args)
    (top,) = json.loads(plan)
    return int(top["Plan"]["Shared Hit Blocks"] + top["Plan"]["Shared Read Blocks"])


@pytest.fixture
def noting(database: Database) -> Noting:
    return Noting(database)


async def test_claims_behind_a_held_snapshot_read_as_little_as_ever(
    database: Database, settings: Settings, noting: Noting
) -> None:
    jobs = Jobs(database, settings)
    joint = JointClaims(Store(noting, settings), msgspec.structs.replace(settings, batch_max=1))

    async def take(most: int) -> list[Lease]:
        want = Want(worker_id=uuid4(), claim_max={"default": most}, lease_seconds=30)
        return await joint.claim(frozenset({TASK}), want)

    async def drain() -> tuple[int, int]:
        """Makes and finishes many jobs; what a claim of one then reads from its mark, and from the start."""
        for _ in range(DRAINED // SET):
            await jobs.enqueue(SET)
        while leases := await take(SET):
            await jobs.store.complete_jobs([Completion(lease.id, lease.token) for lease in leases])
        await jobs.enqueue(2)
        assert len(await take(1)) == 1
        sql, args = noting.claim
        async with jobs.session() as session:
            from_the_mark = await blocks_read(session, sql, args)
        async with jobs.session() as session:
            args[EARLIEST] = [None]
            return from_the_mark, await blocks_read(session, sql, args)

    async with jobs.session() as holder:
        await holder.connection.execute("set transaction isolation level repeatable read")
        await holder.fetch("select from clarion.jobs")
        first = await drain()
        from_the_mark, from_the_start = await drain()
    assert from_the_mark <= first[0] + 10
    assert from_the_start > first[1] + DRAINED / 100
    assert from_the_start > 3 * from_the_mark
