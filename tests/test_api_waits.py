"""`?wait=`: many requests that wait for jobs, for one query a tick and no connection each."""

import math
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx2
import msgspec
import pytest
import structlog

from api_harness import claim, client_of, finish, listening, services_over
from clarion.api.services import Services
from clarion.db import Database, open_database
from clarion.errors import Overloaded, Unavailable
from clarion.execution import Failure
from clarion.job import DeadReason, NewJob
from clarion.settings import Settings
from clarion.store import Store
from clarion.waits import Waits


class CountingStore(Store):
    """Says how often it was asked for finished jobs, and for how many; can have weather."""

    asked: list[int]
    weather = False

    async def find_finished(self, job_ids: Sequence[UUID]) -> set[UUID]:
        self.asked.append(len(job_ids))
        if self.weather:
            raise Unavailable("the database is away")
        return await super().find_finished(job_ids)


@pytest.fixture
def counting(database: Database, settings: Settings) -> CountingStore:
    counting = CountingStore(database, settings)
    counting.asked = []
    return counting


@asynccontextmanager
async def running(waits: Waits) -> AsyncIterator[None]:
    """The loop that answers, for the length of a block."""
    async with anyio.create_task_group() as group:
        group.start_soon(waits.run)
        yield
        group.cancel_scope.cancel()


async def waiters(waits: Waits, count: int) -> None:
    """Returns when so many wait."""
    while waits.waiting != count:
        await anyio.lowlevel.checkpoint()


async def new_ids(store: Store, count: int = 1) -> list[UUID]:
    return [added.id for added in await store.enqueue_jobs([NewJob(task="work")] * count)]


# -- Waits, step by step ---------------------------------------------------------------------------------------------


async def test_while_nobody_waits_there_is_no_query_and_no_timer(counting: CountingStore, settings: Settings) -> None:
    assert await Waits(counting, settings).step() == math.inf
    assert counting.asked == []


async def test_one_query_serves_everybody(counting: CountingStore, settings: Settings, worker_id: UUID) -> None:
    waits = Waits(counting, settings)
    done, other = await new_ids(counting, 2)
    answers: list[bool] = []

    async def wait(job_id: UUID) -> None:
        answers.append(await waits.wait(job_id, 60))

    async with anyio.create_task_group() as group:
        for job_id in [done, other] * 20:
            group.start_soon(wait, job_id)
        await waiters(waits, 40)
        assert await waits.step() == settings.wait_tick_seconds
        assert answers == []
        await finish(counting, worker_id)
        await waits.step()
        await waiters(waits, 20)
        assert answers == [True] * 20
        assert counting.asked == [2, 2]
        group.cancel_scope.cancel()


async def test_a_job_that_is_finished_gone_or_dead_is_found(store: Store, settings: Settings, worker_id: UUID) -> None:
    waits = Waits(store, settings)
    [finished] = await new_ids(store)
    await finish(store, worker_id)
    [dead] = await new_ids(store)
    lease = await claim(store, worker_id)
    failure = Failure(
        id=dead, token=lease.token, error_type="E", error_message="", dead_reason=DeadReason.NOT_RETRYABLE
    )
    await store.fail_jobs([failure])
    [ready] = await new_ids(store)
    with (
        waits.waiter(finished) as one,
        waits.waiter(dead) as two,
        waits.waiter(uuid4()) as three,
        waits.waiter(ready) as four,
    ):
        await waits.step()
        assert [event.is_set() for event in (one, two, three, four)] == [True, True, True, False]


async def test_when_the_time_is_up_the_waiter_is_dropped(store: Store, settings: Settings) -> None:
    waits = Waits(store, settings)
    assert await waits.wait(uuid4(), 0.001) is False
    assert waits.waiting == 0


async def test_closing_releases_those_who_wait_and_those_who_come_later(store: Store, settings: Settings) -> None:
    waits = Waits(store, settings)
    with waits.waiter(uuid4()) as event:
        waits.close()
        assert event.is_set()
    assert await waits.wait(uuid4(), 60) is True


async def test_the_number_of_waiters_is_bounded(store: Store, settings: Settings) -> None:
    waits = Waits(store, msgspec.structs.replace(settings, waiters_max=2))
    job_id = uuid4()
    with waits.waiter(job_id), waits.waiter(job_id), pytest.raises(Overloaded):
        await waits.wait(uuid4(), 60)
    with waits.waiter(job_id):
        assert waits.waiting == 1


async def test_weather_is_waited_out(counting: CountingStore, settings: Settings, worker_id: UUID) -> None:
    waits = Waits(counting, settings)
    [job_id] = await new_ids(counting)
    await finish(counting, worker_id)
    counting.weather = True
    with structlog.testing.capture_logs() as lines, waits.waiter(job_id) as event:
        async with running(waits):
            while len(counting.asked) < 2:
                await anyio.lowlevel.checkpoint()
            assert not event.is_set()
            counting.weather = False
            await event.wait()
            while len(lines) < 2:
                await anyio.lowlevel.checkpoint()
    assert [line["event"] for line in lines] == ["step.failed", "step.recovered"]


# -- Over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def services(counting: CountingStore, settings: Settings) -> Services:
    return services_over(counting, settings)


@asynccontextmanager
async def waiting(
    services: Services, job_ids: Collection[UUID], wait: str = "60s"
) -> AsyncIterator[list[dict[str, Any]]]:
    """Requests that wait, from the moment they all do; at the end all of them have been answered."""
    answers: list[dict[str, Any]] = []

    async def get(job_id: UUID) -> None:
        answer = await client.get(f"/v1/jobs/{job_id}?wait={wait}", timeout=None)
        assert answer.status_code == 200, answer.text
        answers.append(answer.json())

    async with running(services.waits), client_of(services) as client, anyio.create_task_group() as group:
        for job_id in job_ids:
            group.start_soon(get, job_id)
        await waiters(services.waits, len(job_ids))
        yield answers


async def test_a_request_is_answered_within_a_tick_of_the_finish(services: Services, worker_id: UUID) -> None:
    job_ids = await new_ids(services.store)
    async with waiting(services, job_ids) as answers:
        await finish(services.store, worker_id, result="7")
        finished = anyio.current_time()
    assert anyio.current_time() - finished < 1
    assert [(job["state"], job["result"]) for job in answers] == [("succeeded", 7)]


@pytest.mark.parametrize("wait", ["1ms", "0.001", "0", "0s"])
async def test_when_the_time_is_up_the_current_state_is_the_answer(services: Services, wait: str) -> None:
    [job_id] = await new_ids(services.store)
    async with client_of(services) as client:
        answer = await client.get(f"/v1/jobs/{job_id}?wait={wait}")
    assert (answer.status_code, answer.json()["state"]) == (200, "ready")
    assert services.waits.waiting == 0


async def test_for_a_finished_job_nobody_waits(services: Services, counting: CountingStore, worker_id: UUID) -> None:
    [job_id] = await new_ids(services.store)
    await finish(services.store, worker_id)
    async with client_of(services) as client:
        answer = await client.get(f"/v1/jobs/{job_id}?wait=60s")
    assert answer.json()["state"] == "succeeded"
    assert counting.asked == []


async def test_for_a_job_that_does_not_exist_nobody_waits(services: Services) -> None:
    async with client_of(services) as client:
        assert (await client.get(f"/v1/jobs/{uuid4()}?wait=60s")).status_code == 404


@pytest.mark.parametrize("wait", ["61s", "60.001", "-1", "", "x", "1e2", "NaN", "inf", "%00", "2m&wait=1"])
async def test_a_wait_out_of_bounds_is_refused(services: Services, wait: str) -> None:
    [job_id] = await new_ids(services.store)
    async with client_of(services) as client:
        answer = await client.get(f"/v1/jobs/{job_id}?wait={wait}")
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, "wait")


async def test_beyond_the_bound_a_request_is_told_to_come_back(store: Store, settings: Settings) -> None:
    services = services_over(store, settings, waiters_max=1)
    [job_id] = await new_ids(store)
    async with client_of(services) as client:
        with services.waits.waiter(job_id):
            answer = await client.get(f"/v1/jobs/{job_id}?wait=60s")
    assert (answer.status_code, answer.json()["type"]) == (503, "/problems/overloaded")


async def test_at_shutdown_everybody_is_answered_with_the_current_state(services: Services) -> None:
    job_ids = await new_ids(services.store, 3)
    async with waiting(services, job_ids) as answers:
        services.draining.set()
        services.waits.close()
    assert [job["state"] for job in answers] == ["ready"] * 3


async def test_two_hundred_requests_wait_on_a_pool_of_two(settings: Settings, store: Store, worker_id: UUID) -> None:
    small = msgspec.structs.replace(settings, pool_max=2)
    async with open_database(small, name="small") as database:
        services = services_over(Store(database, small), small)
        job_ids = await new_ids(store, 200)
        async with waiting(services, job_ids) as answers:
            # All wait, and the pool still has room for others.
            async with client_of(services) as client:
                assert len((await client.get("/v1/jobs?limit=3")).json()["jobs"]) == 3
            for _ in job_ids:
                await finish(store, worker_id)
    assert {(job["id"], job["state"]) for job in answers} == {(str(job_id), "succeeded") for job_id in job_ids}


async def test_a_client_that_hangs_up_is_no_longer_waited_for(services: Services) -> None:
    [job_id] = await new_ids(services.store)
    with structlog.testing.capture_logs() as lines:
        async with listening(services) as port:
            stream = await anyio.connect_tcp("127.0.0.1", port)
            await stream.send(f"GET /v1/jobs/{job_id}?wait=60s HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            await waiters(services.waits, 1)
            await stream.aclose()
            await waiters(services.waits, 0)
    assert [(line["status"], line["log_level"]) for line in lines] == [(499, "info")]


async def test_a_server_that_stops_answers_those_who_wait(services: Services) -> None:
    [job_id] = await new_ids(services.store)
    answers: list[httpx2.Response] = []

    async def get(port: int) -> None:
        async with httpx2.AsyncClient() as client:
            answers.append(await client.get(f"http://127.0.0.1:{port}/v1/jobs/{job_id}?wait=60s", timeout=None))

    async with anyio.create_task_group() as group, listening(services) as port:
        group.start_soon(partial(get, port))
        await waiters(services.waits, 1)
    assert [(answer.status_code, answer.json()["state"]) for answer in answers] == [(200, "ready")]
