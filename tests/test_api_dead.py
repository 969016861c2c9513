"""Dead letters over HTTP: listed, grouped, run again."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx2
import msgspec
import pytest

from api_harness import client_of, services_over
from clarion.api import dead
from clarion.api.services import Services
from clarion.db import Database
from clarion.job import Requeued
from clarion.settings import Settings
from clarion.store import Store
from recording import RecordingRinger, Rung
from store_actions import Jobs

# Jobs that died one after the other, a second apart, the first of them at BEGIN.
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
INSERT = """
    insert into clarion.jobs (task, queue, state, dead_reason, died_at, error_type, attempt)
    select $1, $2, 'dead', $3::text::clarion.dead_reason, $4::timestamptz + n * interval '1 s', $5, 3
    from generate_series(0, $6::integer - 1) as n
    returning id, died_at
"""
NOT_AN_ID = "0191e7a0-0000-7000-8000-000000000000"


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


@pytest.fixture
def ringer(store: Store, settings: Settings) -> RecordingRinger:
    return RecordingRinger(store, settings)


@pytest.fixture
def services(store: Store, settings: Settings, ringer: RecordingRinger) -> Services:
    return msgspec.structs.replace(services_over(store, settings), ringer=ringer)


async def bury(jobs: Jobs, count: int = 1, *, after: float = 0, **of: Any) -> list[str]:
    """The ids of jobs that died, the first of them so many seconds after BEGIN."""
    of = {"task": "t", "queue": "default", "dead_reason": "not_retryable", "error_type": "Oops"} | of
    begin = BEGIN + timedelta(seconds=after)
    rows = await jobs.fetch(INSERT, of["task"], of["queue"], of["dead_reason"], begin, of["error_type"], count)
    return [str(row["id"]) for row in sorted(rows, key=lambda row: (row["died_at"], row["id"]))]


async def listed(client: httpx2.AsyncClient, query: str = "") -> list[str]:
    answer = await client.get(f"/v1/dead?{query}")
    assert answer.status_code == 200, answer.text
    return [job["id"] for job in answer.json()["jobs"]]


async def redrive(client: httpx2.AsyncClient, **wish: Any) -> Any:
    answer = await client.post("/v1/dead/redrive", json=wish)
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- Lists -----------------------------------------------------------------------------------------------------------


async def test_those_that_died_first_are_listed_first(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    late, early = await bury(jobs, after=100), await bury(jobs, 2)
    await jobs.enqueue()
    assert await listed(client) == [*early, *late]


async def test_a_dead_job_is_listed_as_in_other_lists(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    await bury(jobs)
    page = (await client.get("/v1/dead")).json()
    assert page == (await client.get("/v1/jobs?state=dead")).json()
    assert (page["jobs"][0]["finished_at"], page["next_cursor"]) == ("2026-01-01T00:00:00Z", None)


async def test_pages_hold_every_job_once(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    ids = [*await bury(jobs, 3), *await bury(jobs, 2, after=1), *await bury(jobs, after=2)]
    ordered, found, path = await listed(client), [], "/v1/dead?limit=2&task=t"
    while path:
        answer = await client.get(path)
        found.append([job["id"] for job in answer.json()["jobs"]])
        assert bool(answer.json()["next_cursor"]) == ("link" in answer.headers)
        path = answer.headers.get("link", "").removeprefix("<").partition(">")[0]
    assert [len(page) for page in found] == [2, 2, 2]
    assert [job_id for page in found for job_id in page] == ordered
    assert sorted(ordered) == sorted(ids)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "abcd"),
        ("queue=q", "b"),
        ("task=c", "c"),
        ("error_type=Other", "d"),
        ("error_type=none", ""),
        ("dead_reason=expired", "a"),
        ("dead_reason=crash_loop", ""),
        ("died_after=2026-01-01T00:00:20Z", "cd"),
        ("died_before=2026-01-01T00:00:20Z", "ab"),
        ("died_after=2026-01-01T00:00:10Z&died_before=2026-01-01T01:00:20%2B01:00&task=b", "b"),
    ],
)
async def test_a_list_holds_what_its_filters_name(
    client: httpx2.AsyncClient, jobs: Jobs, query: str, expected: str
) -> None:
    ids = {
        (await bury(jobs, task="a", dead_reason="expired", error_type=None))[0]: "a",
        (await bury(jobs, task="b", queue="q", after=10))[0]: "b",
        (await bury(jobs, task="c", after=20))[0]: "c",
        (await bury(jobs, task="d", error_type="Other", after=30))[0]: "d",
    }
    assert "".join(ids[job_id] for job_id in await listed(client, query)) == expected


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("cursor=x", "cursor"),
        ("cursor=", "cursor"),
        ("cursor=AQAAAAAAAAAAAAAAAAAAAAAA", "cursor"),
        ("cursor=Av__________AAAAAAAAAAAAAAAAAAAAAA", "cursor"),
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("dead_reason=boredom", "dead_reason"),
        ("error_type=%00", "error_type"),
        ("error_type=" + "x" * 201, "error_type"),
        ("died_after=2026", "died_after"),
        ("died_before=1969-01-01T00:00:00Z", "died_before"),
        ("queue=a%20b", "queue"),
        ("state=dead", "state"),
    ],
)
async def test_a_bad_parameter_is_named(client: httpx2.AsyncClient, query: str, parameter: str) -> None:
    answer = await client.get(f"/v1/dead?{query}")
    assert (answer.status_code, [error["parameter"] for error in answer.json()["errors"]]) == (422, [parameter])


# -- Groups ----------------------------------------------------------------------------------------------------------


async def test_dead_jobs_are_grouped_by_what_they_died_of(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    many = await bury(jobs, 3)
    [other] = await bury(jobs, queue="q", error_type=None, dead_reason="expired")
    groups = (await client.get("/v1/dead/groups")).json()["groups"]
    assert groups == [
        {"task": "t", "error_type": "Oops", "dead_reason": "not_retryable", "jobs": 3,
         "first_died_at": "2026-01-01T00:00:00Z", "last_died_at": "2026-01-01T00:00:02Z", "latest_id": many[2]},
        {"task": "t", "error_type": None, "dead_reason": "expired", "jobs": 1,
         "first_died_at": "2026-01-01T00:00:00Z", "last_died_at": "2026-01-01T00:00:00Z", "latest_id": other},
    ]  # fmt: skip
    assert (await client.get("/v1/dead/groups?queue=q")).json()["groups"] == groups[1:]
    assert (await client.get("/v1/dead/groups?limit=1")).json()["groups"] == groups[:1]


async def test_without_dead_jobs_there_are_no_groups(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    await jobs.enqueue()
    assert (await client.get("/v1/dead/groups")).json() == {"groups": []}


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "queue=%00", "task=t"])
async def test_a_bad_parameter_of_groups_is_refused(client: httpx2.AsyncClient, query: str) -> None:
    assert (await client.get(f"/v1/dead/groups?{query}")).status_code == 422


# -- Redrive ---------------------------------------------------------------------------------------------------------


async def test_dead_jobs_are_run_again_in_the_order_of_their_deaths(
    client: httpx2.AsyncClient, jobs: Jobs, ringer: RecordingRinger
) -> None:
    late, early = await bury(jobs, after=100, queue="q"), await bury(jobs, 2)
    answer = await redrive(client)
    assert answer == {"matched": 3, "redriven": 3, "dry_run": False, "jobs": [*early, *late]}
    assert [lease.id for lease in await jobs.claim(2)] == [UUID(job_id) for job_id in early]
    assert ringer.heard() == [Rung({"default": 2, "q": 1})]
    job = await jobs.job(UUID(late[0]))
    assert (job.state, job.generation, job.attempt, job.dead_reason) == ("ready", 2, 0, None)
    assert await jobs.events(job.id) == [("retried", "api", "ready")]


async def test_who_redrove_is_recorded(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    [job_id] = await bury(jobs)
    await client.post("/v1/dead/redrive", json={}, headers={"x-clarion-actor": "ada"})
    assert await jobs.events(UUID(job_id)) == [("retried", "api:ada", "ready")]


async def test_only_those_that_are_meant_are_run_again(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    kind: dict[str, Any] = {"task": "a", "queue": "q", "error_type": "E", "dead_reason": "crash_loop"}
    [meant] = await bury(jobs, after=10, **kind)
    for other in ({"task": "b"}, {"queue": "r"}, {"error_type": "F"}, {"dead_reason": "expired"}):
        await bury(jobs, after=10, **kind | other)
    await bury(jobs, **kind)
    answer = await redrive(client, died_after="2026-01-01T00:00:10Z", died_before="2026-01-01T00:00:11Z", **kind)
    assert answer["jobs"] == [meant]
    assert len(await listed(client)) == 5


async def test_the_oldest_are_taken_up_to_the_limit(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    ids = await bury(jobs, 5)
    assert (await redrive(client, limit=2))["jobs"] == ids[:2]
    assert await listed(client) == ids[2:]


async def test_a_dry_run_says_what_would_happen_and_changes_nothing(
    client: httpx2.AsyncClient, jobs: Jobs, ringer: RecordingRinger
) -> None:
    ids = await bury(jobs, 3)
    before = await jobs.everything()
    answer = await redrive(client, dry_run=True, per_second=1, limit=2)
    assert answer == {"matched": 2, "redriven": 0, "dry_run": True, "jobs": ids[:2]}
    assert await jobs.everything() == before
    assert ringer.heard() == []


async def test_the_pace_is_kept_across_chunks(
    client: httpx2.AsyncClient, jobs: Jobs, ringer: RecordingRinger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead, "CHUNK_JOBS", 2)
    ids = await bury(jobs, 5)
    assert (await redrive(client, per_second=0.5))["redriven"] == 5
    found = [await jobs.job(UUID(job_id)) for job_id in ids]
    assert [job.state for job in found] == ["ready"] + ["scheduled"] * 4
    waits = [(job.run_at - found[0].run_at).total_seconds() for job in found]
    assert waits == pytest.approx([0, 2, 4, 6, 8], abs=1)
    assert ringer.heard() == [Rung({"default": 1}, scheduled=True), Rung(scheduled=True), Rung(scheduled=True)]


async def test_many_are_counted_and_a_hundred_are_shown(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    ids = await bury(jobs, 1_201)
    answer = await redrive(client, limit=1_200)
    assert (answer["matched"], answer["redriven"], answer["jobs"]) == (1_200, 1_200, ids[:100])
    assert await listed(client) == ids[1_200:]


class Hopeless(Store):
    """Every job that is run again is dead again at once, and sometimes somebody is faster."""

    async def retry_jobs(
        self, job_ids: Sequence[UUID], delays_seconds: Sequence[float], **options: Any
    ) -> list[Requeued]:
        await super().retry_jobs(job_ids[:1], [0], actor="somebody")
        answers = await super().retry_jobs(job_ids, delays_seconds, **options)
        await self._database.fetch(
            "update clarion.jobs set state = 'dead', dead_reason = 'crash_loop', died_at = clock_timestamp()"
        )
        return answers


async def test_a_job_that_dies_again_is_not_run_again_by_the_same_call(
    database: Database, settings: Settings, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead, "CHUNK_JOBS", 3)
    ids = await bury(jobs, 7)
    async with client_of(services_over(Hopeless(database, settings), settings)) as client:
        answer = await redrive(client)
    # Of each chunk, the first is not dead any more when it is its turn.
    assert (answer["matched"], answer["redriven"]) == (7, 4)
    assert answer["jobs"] == [ids[place] for place in (1, 2, 4, 5)]


@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        (b"", 400, ""),
        (b"limit=5", 400, ""),
        (b"[]", 422, ""),
        (b'{"limit":0}', 422, "/limit"),
        (b'{"limit":10001}', 422, "/limit"),
        (b'{"limit":"5"}', 422, "/limit"),
        (b'{"per_second":0}', 422, "/per_second"),
        (b'{"per_second":true}', 422, "/per_second"),
        (b'{"dry_run":"yes"}', 422, "/dry_run"),
        (b'{"dead_reason":"boredom"}', 422, "/dead_reason"),
        (b'{"error_type":"\\u0000"}', 422, "/error_type"),
        (b'{"died_after":"2300-01-01T00:00:00Z"}', 422, "/died_after"),
        (b'{"dryrun":true}', 422, "/dryrun"),
        (b'{"ids":["' + NOT_AN_ID.encode() + b'"]}', 422, "/ids"),
    ],
)
async def test_a_bad_wish_changes_nothing(
    client: httpx2.AsyncClient, jobs: Jobs, body: bytes, status: int, pointer: str
) -> None:
    await bury(jobs)
    before = await jobs.everything()
    answer = await client.post("/v1/dead/redrive", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, [error["pointer"] for error in answer.json()["errors"]]) == (status, [pointer])
    assert await jobs.everything() == before


async def test_a_form_is_told_what_to_send(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    await bury(jobs)
    assert (await client.post("/v1/dead/redrive", data={"limit": "1"})).status_code == 415
    assert (await client.post("/v1/dead/redrive")).status_code == 400
