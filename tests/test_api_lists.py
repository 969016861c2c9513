"""Lists of jobs over HTTP: pages, filters, cursors."""

from typing import Any
from uuid import UUID

import httpx2
import pytest

from api_harness import finish
from clarion.api.app import create_app
from clarion.api.services import Services
from clarion.store import Store

JSON = {"content-type": "application/json"}


async def enqueue(client: httpx2.AsyncClient, **fields: Any) -> Any:
    """Enqueues a job; what was answered."""
    answer = await client.post("/v1/jobs", json={"task": "work"} | fields)
    assert answer.status_code == 201, answer.text
    return answer.json()


async def ids_of_pages(client: httpx2.AsyncClient, path: str) -> list[list[str]]:
    """The ids of every page, following the links."""
    pages = []
    while path:
        answer = await client.get(path)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        pages.append([job["id"] for job in page["jobs"]])
        link = answer.headers.get("link", "")
        assert bool(link) == bool(page["next_cursor"])
        path = link.removeprefix("<").partition(">")[0]
    return pages


async def test_pages_hold_every_job_once_newest_first_live_and_finished(
    client: httpx2.AsyncClient, store: Store, worker_id: UUID
) -> None:
    ids = [(await enqueue(client))["id"] for _ in range(3)]
    await finish(store, worker_id)
    await finish(store, worker_id)
    ids += [(await enqueue(client, task="other"))["id"] for _ in range(2)]
    newest_first = ids[::-1]
    assert await ids_of_pages(client, "/v1/jobs?limit=2") == [newest_first[:2], newest_first[2:4], newest_first[4:]]
    assert await ids_of_pages(client, "/v1/jobs?limit=5") == [newest_first]
    assert await ids_of_pages(client, "/v1/jobs") == [newest_first]


async def test_a_page_stays_right_while_jobs_come_and_finish(
    client: httpx2.AsyncClient, store: Store, worker_id: UUID
) -> None:
    ids = [(await enqueue(client))["id"] for _ in range(4)]
    first = await client.get("/v1/jobs?limit=2")
    await enqueue(client)
    await finish(store, worker_id)
    second = await client.get("/v1/jobs", params={"cursor": first.json()["next_cursor"], "limit": "2"})
    assert [job["id"] for page in (first, second) for job in page.json()["jobs"]] == ids[::-1]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ["c", "b", "a"]),
        ("state=ready", ["c", "b"]),
        ("state=succeeded", ["a"]),
        ("state=cancelled", []),
        ("queue=q", ["c"]),
        ("queue=none", []),
        ("task=b", ["b"]),
        ("state=ready&queue=default", ["b"]),
        ("created_after=2026-01-01T00:00:00Z", ["c", "b", "a"]),
        ("created_after=2199-01-01T00:00:00Z", []),
        ("created_before=2026-01-01T00:00:00Z", []),
        ("created_after=1970-01-01T00:00:00Z&created_before=2199-01-01T00:00:00Z", ["c", "b", "a"]),
    ],
)
async def test_a_list_holds_what_its_filters_name(
    client: httpx2.AsyncClient, store: Store, worker_id: UUID, query: str, expected: list[str]
) -> None:
    await enqueue(client, task="a")
    await finish(store, worker_id, task="a")
    await enqueue(client, task="b")
    await enqueue(client, task="c", queue="q")
    listed = (await client.get(f"/v1/jobs?{query}")).json()["jobs"]
    assert [job["task"] for job in listed] == expected


async def test_a_list_is_cut_at_the_moment_a_job_was_created(client: httpx2.AsyncClient) -> None:
    first, second = await enqueue(client), await enqueue(client)
    after = await client.get("/v1/jobs", params={"created_after": second["created_at"]})
    before = await client.get("/v1/jobs", params={"created_before": second["created_at"]})
    assert [job["id"] for job in after.json()["jobs"]] == [second["id"]]
    assert [job["id"] for job in before.json()["jobs"]] == [first["id"]]


async def test_a_list_leaves_payloads_out(client: httpx2.AsyncClient) -> None:
    job = await enqueue(client, args={"secret": "x"})
    [listed] = (await client.get("/v1/jobs")).json()["jobs"]
    left_out = {"args", "result", "error", "progress", "checkpoint"}
    assert listed == {name: value for name, value in job.items() if name not in left_out}


async def test_the_next_page_keeps_the_filters(client: httpx2.AsyncClient) -> None:
    for _ in range(2):
        await enqueue(client, queue="q:1/x")
    await enqueue(client)
    pages = await ids_of_pages(client, "/v1/jobs?limit=1&queue=q:1/x&state=ready")
    assert [len(page) for page in pages] == [1, 1]


@pytest.mark.parametrize("cursor", ["x", "AQ", "%00", "AQAAAAAAAAAAAAAAAAAAAAAA"])
async def test_a_cursor_that_is_not_ours_is_refused(client: httpx2.AsyncClient, cursor: str) -> None:
    answer = await client.get(f"/v1/jobs?cursor={cursor}")
    assert (answer.status_code, [error["parameter"] for error in answer.json()["errors"]]) == (422, ["cursor"])


async def test_behind_a_prefix_addresses_carry_it(services: Services) -> None:
    transport = httpx2.ASGITransport(create_app(services), root_path="/queue")
    async with httpx2.AsyncClient(transport=transport, base_url="http://clarion") as client:
        answer = await client.post("/queue/v1/jobs", json={"task": "work"})
        assert answer.headers["location"] == f"/queue/v1/jobs/{answer.json()['id']}"
        await client.post("/queue/v1/jobs", json={"task": "work"})
        assert "</queue/v1/jobs?" in (await client.get("/queue/v1/jobs?limit=1")).headers["link"]
