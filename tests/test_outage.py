"""Postgres stopped and started under load: nothing acknowledged is lost, and every process recovers by itself."""

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Literal
from uuid import UUID

import anyio
import anyio.to_thread
import httpx2
import pytest

from clarion.embedded import PostgresServer, running_postgres
from verification import Deployment, database, stack, worker

OUTAGES = 3


class Load:
    """Clients that enqueue single jobs without a pause, and remember what was acknowledged."""

    def __init__(self, target: Deployment) -> None:
        self._target = target
        self.acknowledged: list[UUID] = []
        self.statuses: Counter[int] = Counter()
        self.grown = anyio.Event()

    async def run(self) -> None:
        """Enqueues until cancelled."""
        async with self._target.client() as http, anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(self._enqueue, http)

    async def _enqueue(self, http: httpx2.AsyncClient) -> None:
        while True:
            answer = await http.post("/v1/jobs", json={"task": "demo.echo", "args": {"n": len(self.acknowledged)}})
            self.statuses[answer.status_code] += 1
            if answer.status_code == 201:
                self.acknowledged.append(UUID(answer.json()["id"]))
                self.grown.set()
            else:
                assert answer.headers["retry-after"]

    async def more(self, count: int) -> None:
        """Returns once so many more jobs were acknowledged."""
        goal = len(self.acknowledged) + count
        while len(self.acknowledged) < goal:
            self.grown = anyio.Event()
            await self.grown.wait()


@asynccontextmanager
async def everything(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Deployment]:
    """API, scheduler and worker as processes."""
    monkeypatch.setenv("CLARION_LEASE_SECONDS", "2")
    monkeypatch.setenv("CLARION_EPHEMERAL", "true")
    monkeypatch.setenv("CLARION_DATABASE_URL", server.url)
    async with stack(server.url) as target, worker(target):
        yield target


async def all_finished(target: Deployment, jobs: list[UUID]) -> None:
    """Returns when none of the jobs is live any more."""
    async with database(target) as connection:
        poll = anyio.Event()
        while await connection.fetchval("select count(*) from clarion.jobs where id = any($1)", jobs):
            with anyio.move_on_after(0.1):
                await poll.wait()


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server of this test's own, to stop."""
    with running_postgres(None) as server:
        yield server


@pytest.mark.parametrize("way", ["immediate", "fast", "kill"])
async def test_an_outage_under_load_loses_nothing_and_everything_recovers(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch, way: Literal["immediate", "fast", "kill"]
) -> None:
    async with everything(server, monkeypatch) as target:
        load = Load(target)
        async with anyio.create_task_group() as group:
            group.start_soon(load.run)
            for _ in range(OUTAGES):
                await load.more(100)
                await anyio.to_thread.run_sync(server.kill if way == "kill" else lambda: server.stop(way))
                await anyio.to_thread.run_sync(server.start)
            await load.more(100)
            group.cancel_scope.cancel()
        assert set(load.statuses) <= {201, 503}
        await all_finished(target, load.acknowledged)
        async with database(target) as connection:
            rows = await connection.fetch(
                "select id, state::text, count(*) over (partition by id) as finishes from clarion.job_history"
            )
        finished = {row["id"]: (row["state"], row["finishes"]) for row in rows}
        assert [finished.get(job) for job in load.acknowledged] == [("succeeded", 1)] * len(load.acknowledged)
