"""The list of workers, and telling one to stop."""

from uuid import UUID, uuid4

import httpx2
import pytest

from clarion.execution import Directive, WorkerRecord
from clarion.store import Store


def record(worker_id: UUID, *, name: str = "box:1") -> WorkerRecord:
    return WorkerRecord(
        id=worker_id,
        name=name,
        version="0.1.0",
        queues=["default"],
        tasks=["a", "b"],
        concurrency=20,
        running=3,
        state="running",
    )


async def test_workers_are_listed_the_youngest_first(client: httpx2.AsyncClient, store: Store) -> None:
    old, young = uuid4(), uuid4()
    await store.record_worker(record(old))
    await store.record_worker(record(young, name="box:2"))
    workers = (await client.get("/v1/workers")).json()["workers"]
    assert [worker["id"] for worker in workers] == [str(young), str(old)]
    assert workers[1] == {
        "id": str(old),
        "name": "box:1",
        "version": "0.1.0",
        "queues": ["default"],
        "tasks": ["a", "b"],
        "concurrency": 20,
        "running": 3,
        "state": "running",
        "directive": "ok",
        "started_at": workers[1]["started_at"],
        "seen_at": workers[1]["seen_at"],
    }


async def test_nobody_is_listed_while_nobody_works(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/v1/workers")).json() == {"workers": []}


async def test_the_list_is_as_long_as_asked(client: httpx2.AsyncClient, store: Store) -> None:
    for _ in range(3):
        await store.record_worker(record(uuid4()))
    assert len((await client.get("/v1/workers?limit=2")).json()["workers"]) == 2


@pytest.mark.parametrize("limit", ["0", "1001", "x", ""])
async def test_a_limit_out_of_bounds_is_refused(client: httpx2.AsyncClient, limit: str) -> None:
    answer = await client.get(f"/v1/workers?limit={limit}")
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, "limit")


async def test_a_worker_is_told_to_drain_with_its_next_heartbeat(client: httpx2.AsyncClient, store: Store) -> None:
    worker, other = uuid4(), uuid4()
    for worker_id in (worker, other):
        await store.record_worker(record(worker_id))
    for _ in range(2):
        answer = await client.post(f"/v1/workers/{worker}/drain")
        assert (answer.status_code, answer.json()) == (200, {"id": str(worker), "directive": "drain"})
    assert await store.record_worker(record(worker)) is Directive.DRAIN
    assert await store.record_worker(record(other)) is Directive.OK


@pytest.mark.parametrize("worker_id", [str(UUID(int=7)), "x", "{00000000-0000-0000-0000-000000000000}", "%00"])
async def test_a_worker_that_does_not_exist_is_not_found(client: httpx2.AsyncClient, worker_id: str) -> None:
    answer = await client.post(f"/v1/workers/{worker_id}/drain")
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("POST", "/v1/workers", "GET, HEAD"), ("GET", f"/v1/workers/{UUID(int=7)}/drain", "POST")],
)
async def test_other_methods_are_not_allowed(client: httpx2.AsyncClient, method: str, path: str, allowed: str) -> None:
    answer = await client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
