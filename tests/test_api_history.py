"""What happened to a job, and what its handlers said, over HTTP."""

from typing import Any
from uuid import UUID

import httpx2
import pytest

from api_harness import client_of, services_over
from clarion.db import Database
from clarion.execution import Completion
from clarion.job import DeadReason
from clarion.settings import Settings
from clarion.store import Store
from store_actions import Jobs, failure, line


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def history(client: httpx2.AsyncClient, job_id: UUID) -> Any:
    answer = await client.get(f"/v1/jobs/{job_id}/attempts")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def timeline(client: httpx2.AsyncClient, job_id: UUID) -> list[tuple[str, str]]:
    entries = (await history(client, job_id))["timeline"]
    assert [entry["at"] for entry in entries] == sorted(entry["at"] for entry in entries)
    return [(entry["event"], entry["state"]) for entry in entries]


# -- Attempts and timeline -------------------------------------------------------------------------------------------


async def test_a_job_that_simply_succeeds_was_enqueued_and_claimed(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    answer = await client.post("/v1/jobs", json={"task": "t"}, headers={"x-clarion-actor": "ada"})
    job_id = UUID(answer.json()["id"])
    (lease,) = await jobs.claim()
    await jobs.attempt("complete", lease)
    found = await history(client, job_id)
    job = (await client.get(f"/v1/jobs/{job_id}")).json()
    worker = f"worker:{jobs.worker_id}"
    common = {"generation": 1, "detail": None}
    assert found["timeline"] == [
        common | {"at": job["created_at"], "event": "enqueued", "actor": "api:ada", "state": "ready", "attempt": None},
        common | {"at": job["started_at"], "event": "claimed", "actor": worker, "state": "running", "attempt": 1},
        common | {"at": job["finished_at"], "event": "succeeded", "actor": worker, "state": "succeeded", "attempt": 1},
    ]
    assert found["attempts"] == [
        {
            "generation": 1, "attempt": 1, "outcome": "succeeded", "state": "succeeded", "worker": str(jobs.worker_id),
            "run_at": job["run_at"], "started_at": job["started_at"], "ended_at": job["finished_at"],
            "next_run_at": None, "reaped": False, "error": None,
        }
    ]  # fmt: skip


async def test_a_job_that_nobody_has_run_has_no_attempts(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(delay_seconds=60.0)
    found = await history(client, added.id)
    assert found["attempts"] == []
    assert [entry["event"] for entry in found["timeline"]] == ["enqueued"]


async def test_an_attempt_that_went_wrong_shows_its_error_and_its_trace(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.store.fail_jobs([failure(lease, error_trace="line 1\nline 2", retry_in_seconds=60.0)])
    [attempt] = (await history(client, lease.id))["attempts"]
    assert attempt["error"] == {"type": "Oops", "message": "no luck", "trace": "line 1\nline 2"}
    assert (attempt["outcome"], attempt["state"]) == ("failed", "scheduled")
    assert attempt["next_run_at"] > attempt["ended_at"]


async def test_a_running_attempt_is_shown(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    lease = await jobs.run()
    [attempt] = (await history(client, lease.id))["attempts"]
    assert (attempt["outcome"], attempt["state"], attempt["ended_at"]) == (None, "running", None)


async def test_a_whole_life_is_told_in_order(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(delay_seconds=3600.0)
    url = f"/v1/jobs/{added.id}"
    await client.patch(url, json={"priority": 1})
    await jobs.age(added.id, 3601)
    await jobs.fetch("update clarion.job_events set at = at - interval '3601 s' where job_id = $1", added.id)
    await jobs.store.promote_jobs()
    (lease,) = await jobs.claim()
    await jobs.attempt("release", lease)
    (lease,) = await jobs.claim()
    await jobs.expire(lease.id)
    await jobs.reaper.reap_jobs()
    (lease,) = await jobs.claim()
    await jobs.store.fail_jobs([failure(lease, dead_reason=DeadReason.NOT_RETRYABLE)])
    await client.post(f"{url}/retry", json={"reason": "mended"})
    await jobs.claim()
    await client.post(f"{url}/cancel")
    await jobs.expire(added.id)
    await jobs.reaper.reap_jobs()
    await client.post(f"{url}/retry")
    await client.post(f"{url}/cancel")
    entries = (await history(client, added.id))["timeline"]
    told = [(entry["event"], entry["actor"].partition(":")[0], entry["state"]) for entry in entries]
    assert told == [
        ("enqueued", "api", "scheduled"), ("changed", "api", "scheduled"), ("ready", "scheduler", "ready"),
        ("claimed", "worker", "running"), ("released", "worker", "ready"),
        ("claimed", "worker", "running"), ("lease_lost", "reaper", "ready"),
        ("claimed", "worker", "running"), ("failed", "worker", "dead"), ("dead", "worker", "dead"),
        ("retried", "api", "ready"), ("claimed", "worker", "running"), ("cancel_requested", "api", "running"),
        ("lease_lost", "reaper", "cancelled"), ("cancelled", "reaper", "cancelled"),
        ("retried", "api", "ready"), ("cancelled", "api", "cancelled"),
    ]  # fmt: skip
    assert [entry["generation"] for entry in entries] == [1] * 10 + [2] * 5 + [3] * 2


async def test_a_postponed_job_became_ready_when_it_was_due(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.attempt("snooze", lease)
    await jobs.make_due(lease.id)
    assert await timeline(client, lease.id) == [
        ("enqueued", "ready"), ("claimed", "running"), ("snoozed", "scheduled"), ("ready", "ready"),
    ]  # fmt: skip


async def test_a_job_that_expired_says_so(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(start_within_seconds=60.0)
    await jobs.age(added.id, 61)
    await jobs.store.expire_jobs()
    [*_, last] = (await history(client, added.id))["timeline"]
    assert (last["event"], last["actor"], last["state"], last["detail"]) == ("expired", "scheduler", "dead", "expired")


async def test_a_job_that_waited_and_was_cancelled_has_no_attempt(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    await client.post(f"/v1/jobs/{added.id}/cancel")
    assert await timeline(client, added.id) == [("enqueued", "ready"), ("cancelled", "cancelled")]


# -- Log lines -------------------------------------------------------------------------------------------------------


async def lines(client: httpx2.AsyncClient, job_id: UUID, query: str = "") -> Any:
    answer = await client.get(f"/v1/jobs/{job_id}/logs{query}")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_log_lines_come_in_order_to_the_letter(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.store.record_logs([line(lease, n) for n in (1, 2)])
    await jobs.store.record_logs([line(lease, 3, level="error", message="<b>é</b>", fields='{"n":1.10}')])
    answer = await client.get(f"/v1/jobs/{lease.id}/logs")
    found = answer.json()
    assert [(entry["n"], entry["message"]) for entry in found["lines"]] == [
        (1, "line 1"), (2, "line 2"), (3, "<b>é</b>"),
    ]  # fmt: skip
    [*_, last] = found["lines"]
    assert last | {"id": 0, "at": ""} == {
        "id": 0, "at": "", "generation": 1, "attempt": 1, "n": 3, "level": "error", "message": "<b>é</b>",
        "fields": {"n": 1.10},
    }  # fmt: skip
    assert '"fields":{"n":1.10}' in answer.text
    assert found["dropped"] == 0


async def test_pages_hold_every_line_once(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.store.record_logs([line(lease, n) for n in range(1, 6)])
    await jobs.store.complete_jobs([Completion(lease.id, lease.token)])
    found, query = [], "?limit=2"
    while query:
        page = await lines(client, lease.id, query)
        found.append([entry["n"] for entry in page["lines"]])
        query = f"?limit=2&after={page['next_cursor']}" if page["next_cursor"] else ""
    assert found == [[1, 2], [3, 4], [5]]


async def test_the_lines_of_a_running_job_can_be_followed(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.store.record_logs([line(lease, 1)])
    cursor = (await lines(client, lease.id))["next_cursor"]
    nothing_new = await lines(client, lease.id, f"?after={cursor}")
    assert (nothing_new["lines"], nothing_new["next_cursor"]) == ([], None)
    await jobs.store.record_logs([line(lease, 2)])
    assert [entry["n"] for entry in (await lines(client, lease.id, f"?after={cursor}"))["lines"]] == [2]


async def test_lines_beyond_the_limit_are_counted(
    database: Database, settings: Settings, jobs: Jobs, store: Store
) -> None:
    services = services_over(store, settings, job_log_max_lines=2)
    lease = await jobs.run()
    await Store(database, services.settings).record_logs([line(lease, n) for n in range(1, 6)])
    async with client_of(services) as client:
        page = await lines(client, lease.id)
    assert ([entry["n"] for entry in page["lines"]], page["dropped"]) == ([1, 2], 3)


async def test_a_job_that_said_nothing_has_no_lines(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    assert await lines(client, added.id) == {"lines": [], "dropped": 0, "next_cursor": None}


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("after=x", "after"),
        ("after=", "after"),
        ("after=7", "after"),
        ("after=AQAAAAAAAAAH", "after"),
        ("after=A___________", "after"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("cursor=x", "cursor"),
    ],
)
async def test_a_bad_parameter_is_named(client: httpx2.AsyncClient, jobs: Jobs, query: str, parameter: str) -> None:
    (added,) = await jobs.enqueue()
    answer = await client.get(f"/v1/jobs/{added.id}/logs?{query}")
    assert (answer.status_code, [error["parameter"] for error in answer.json()["errors"]]) == (422, [parameter])


@pytest.mark.parametrize("part", ["attempts", "logs"])
@pytest.mark.parametrize("job_id", [str(UUID(int=7)), "1", "%00"])
async def test_a_job_that_does_not_exist_has_no_history(client: httpx2.AsyncClient, part: str, job_id: str) -> None:
    answer = await client.get(f"/v1/jobs/{job_id}/{part}")
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found")
