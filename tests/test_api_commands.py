"""Cancelling, retrying and changing jobs over HTTP."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx2
import msgspec
import pytest

from api_harness import client_of, services_over
from clarion.api import commands, dead, history
from clarion.api.access import Permission
from clarion.api.services import Services
from clarion.db import Database
from clarion.job import DeadReason, JobChange, Requeued
from clarion.settings import Settings
from clarion.store import Store
from recording import RecordingRinger, Rung
from store_actions import Jobs, failure

MERGE_PATCH = {"content-type": "application/merge-patch+json"}
ANY_VERSION = {"if-match": "*"}


@pytest.fixture
def ringer(store: Store, settings: Settings) -> RecordingRinger:
    return RecordingRinger(store, settings)


@pytest.fixture
def services(store: Store, settings: Settings, ringer: RecordingRinger) -> Services:
    return msgspec.structs.replace(services_over(store, settings), ringer=ringer)


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def in_state(jobs: Jobs, state: str, **options: Any) -> UUID:
    """A job that is in this state, through all that leads there."""
    if state in {"ready", "scheduled"}:
        (added,) = await jobs.enqueue(delay_seconds=3600.0 if state == "scheduled" else None, **options)
        return added.id
    if state == "cancelled":
        (added,) = await jobs.enqueue(**options)
        await jobs.cancel(added.id)
        return added.id
    lease = await jobs.run(**options)
    if state == "succeeded":
        await jobs.attempt("complete", lease)
    if state == "dead":
        await jobs.store.fail_jobs([failure(lease, dead_reason=DeadReason.NOT_RETRYABLE)])
    assert await jobs.state(lease.id) == state
    return lease.id


def problem(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["type"].removeprefix("/problems/")


def test_whoever_acts_on_jobs_needs_leave_to_operate_and_to_read_what_happened_leave_to_read() -> None:
    asked = {(operation.method, operation.permission) for operation in (*commands.OPERATIONS, *dead.OPERATIONS)}
    assert asked == {("POST", Permission.OPERATE), ("PATCH", Permission.OPERATE), ("GET", Permission.READ)}
    assert {operation.permission for operation in history.OPERATIONS} == {Permission.READ}


# -- Cancel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["ready", "scheduled", "dead"])
async def test_a_job_that_waits_or_is_dead_is_cancelled_at_once(
    client: httpx2.AsyncClient, jobs: Jobs, state: str
) -> None:
    job_id = await in_state(jobs, state)
    answer = await client.post(f"/v1/jobs/{job_id}/cancel", json={"reason": "no need"})
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert answer.json() == (await client.get(f"/v1/jobs/{job_id}")).json()
    [*_, last] = await jobs.store.list_events(job_id)
    assert (last.event, last.actor, last.detail) == ("cancelled", "api", "no need")


async def test_the_worker_of_a_running_job_is_asked_to_end_it(
    client: httpx2.AsyncClient, ringer: RecordingRinger, jobs: Jobs
) -> None:
    job_id = await in_state(jobs, "running")
    answer = await client.post(f"/v1/jobs/{job_id}/cancel", headers={"x-clarion-actor": "ada"})
    assert (answer.status_code, answer.json()["state"]) == (200, "running")
    assert answer.json()["cancel_requested_at"]
    assert await jobs.events(job_id) == [("cancel_requested", "api:ada", "running")]
    assert ringer.heard() == [Rung(cancelled=[job_id])]


@pytest.mark.parametrize("state", ["ready", "scheduled", "dead", "running"])
async def test_cancelling_twice_is_answered_alike_and_done_once(
    client: httpx2.AsyncClient, ringer: RecordingRinger, jobs: Jobs, state: str
) -> None:
    job_id = await in_state(jobs, state)
    first = await client.post(f"/v1/jobs/{job_id}/cancel")
    ringer.heard()
    events = await jobs.events(job_id)
    again = await client.post(f"/v1/jobs/{job_id}/cancel", json={"reason": "again"})
    assert (again.status_code, again.content) == (200, first.content)
    assert await jobs.events(job_id) == events
    assert ringer.heard() == []


async def test_a_succeeded_job_cannot_be_cancelled(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    job_id = await in_state(jobs, "succeeded")
    answer = await client.post(f"/v1/jobs/{job_id}/cancel")
    assert problem(answer) == (409, "illegal-transition")
    assert (answer.json()["detail"], answer.json()["state"]) == ("a succeeded job cannot be cancelled", "succeeded")


# -- Retry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["dead", "cancelled", "scheduled"])
async def test_a_job_is_run_again(client: httpx2.AsyncClient, ringer: RecordingRinger, jobs: Jobs, state: str) -> None:
    job_id = await in_state(jobs, state)
    answer = await client.post(f"/v1/jobs/{job_id}/retry", json={"reason": "mended"})
    assert (answer.status_code, answer.json()["state"], answer.json()["attempt"]) == (200, "ready", 0)
    assert answer.json()["generation"] == (1 if state == "scheduled" else 2)
    [*_, last] = await jobs.store.list_events(job_id)
    assert (last.event, last.actor, last.detail) == ("retried", "api", "mended")
    assert ringer.heard() == [Rung({"default": 1})]
    assert [lease.id for lease in await jobs.claim()] == [job_id]


async def test_retrying_twice_is_answered_alike_and_done_once(
    client: httpx2.AsyncClient, ringer: RecordingRinger, jobs: Jobs
) -> None:
    job_id = await in_state(jobs, "dead")
    first = await client.post(f"/v1/jobs/{job_id}/retry")
    ringer.heard()
    again = await client.post(f"/v1/jobs/{job_id}/retry")
    assert (again.status_code, again.content) == (200, first.content)
    assert [event for event, *_ in await jobs.events(job_id)] == ["retried"]
    assert ringer.heard() == [Rung({"default": 1})]  # claims may have skipped it meanwhile


@pytest.mark.parametrize("state", ["running", "succeeded"])
async def test_a_job_that_runs_or_has_succeeded_is_not_run_again(
    client: httpx2.AsyncClient, jobs: Jobs, state: str
) -> None:
    job_id = await in_state(jobs, state)
    before = await jobs.everything()
    answer = await client.post(f"/v1/jobs/{job_id}/retry")
    assert (*problem(answer), answer.json()["state"]) == (409, "illegal-transition", state)
    assert answer.json()["detail"].startswith(f"a {state} job cannot become ready")
    assert await jobs.everything() == before


# -- Both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["cancel", "retry"])
@pytest.mark.parametrize("job_id", [str(UUID(int=7)), "1", "x" * 500])
async def test_a_job_that_does_not_exist_is_not_found(client: httpx2.AsyncClient, verb: str, job_id: str) -> None:
    assert problem(await client.post(f"/v1/jobs/{job_id}/{verb}")) == (404, "not-found")


@pytest.mark.parametrize("verb", ["cancel", "retry"])
@pytest.mark.parametrize(
    "request_of",
    [
        {},
        {"content": b"", "headers": {"content-type": "application/x-www-form-urlencoded"}},
        {"content": b"", "headers": {"content-type": "application/json"}},
        {"json": {}},
        {"json": {"reason": None}},
        {"json": {"reason": "x" * 1000}},
        {"content": b'{"reason": ""}'},
    ],
)
async def test_a_command_needs_no_body(
    client: httpx2.AsyncClient, jobs: Jobs, verb: str, request_of: dict[str, Any]
) -> None:
    job_id = await in_state(jobs, "dead")
    assert (await client.post(f"/v1/jobs/{job_id}/{verb}", **request_of)).status_code == 200


@pytest.mark.parametrize("verb", ["cancel", "retry"])
@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        (b"{", 400, ""),
        (b"reason=x", 400, ""),
        (b"[]", 422, ""),
        (b'{"reason": 7}', 422, "/reason"),
        (b'{"reason": "a\\u0000b"}', 422, "/reason"),
        (b'{"reason": "\\ud800"}', 422, "/reason"),
        (b'{"reason": "' + b"x" * 1001 + b'"}', 422, "/reason"),
        (b'{"raeson": "x"}', 422, "/raeson"),
    ],
)
async def test_a_command_with_a_bad_body_changes_nothing(
    client: httpx2.AsyncClient, jobs: Jobs, verb: str, body: bytes, status: int, pointer: str
) -> None:
    job_id = await in_state(jobs, "dead")
    before = await jobs.everything()
    headers = {"content-type": "application/json"}
    answer = await client.post(f"/v1/jobs/{job_id}/{verb}", content=body, headers=headers)
    assert (answer.status_code, [error["pointer"] for error in answer.json()["errors"]]) == (status, [pointer])
    assert await jobs.everything() == before


@pytest.mark.parametrize("verb", ["cancel", "retry"])
async def test_a_form_is_told_what_to_send(client: httpx2.AsyncClient, jobs: Jobs, verb: str) -> None:
    job_id = await in_state(jobs, "dead")
    answer = await client.post(f"/v1/jobs/{job_id}/{verb}", data={"reason": "x"})
    assert problem(answer) == (415, "unsupported-media-type")


async def test_of_two_retries_at_once_one_begins_a_generation(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    job_id = await in_state(jobs, "cancelled")
    states: list[tuple[int, str]] = []

    async def retry() -> None:
        answer = await client.post(f"/v1/jobs/{job_id}/retry")
        states.append((answer.status_code, answer.json()["state"]))

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(retry)
    assert states == [(200, "ready")] * 5
    assert (await jobs.job(job_id)).generation == 2


# -- Change ----------------------------------------------------------------------------------------------------------


async def patch(client: httpx2.AsyncClient, job_id: UUID, **options: Any) -> httpx2.Response:
    return await client.patch(f"/v1/jobs/{job_id}", **options)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"queue": "mail"}, {"queue": "mail"}),
        ({"priority": -7}, {"priority": -7}),
        ({"max_attempts": 3}, {"max_attempts": 3}),
        ({"max_attempts": None}, {"max_attempts": None}),
        ({"timeout": "0.1s"}, {"timeout": 0.1}),
        ({"timeout": None}, {"timeout": None}),
        ({"total_timeout": None}, {"total_timeout": None, "finish_by": None}),
        ({"start_by": None}, {"start_by": None}),
        ({"start_by": "2190-01-01T00:00:00Z"}, {"start_by": "2190-01-01T00:00:00Z"}),
        ({"priority": 1, "queue": "q", "timeout": 5}, {"priority": 1, "queue": "q", "timeout": 5}),
    ],
)
@pytest.mark.parametrize("state", ["ready", "scheduled"])
@pytest.mark.parametrize("headers", [{}, MERGE_PATCH])
async def test_a_change_changes_what_it_names_and_nothing_else(
    client: httpx2.AsyncClient,
    jobs: Jobs,
    state: str,
    headers: dict[str, str],
    change: dict[str, Any],
    shown: dict[str, Any],
) -> None:
    job_id = await in_state(
        jobs,
        state,
        max_attempts=7,
        timeout_seconds=60.0,
        total_timeout_seconds=600.0,
        start_within_seconds=600.0,
        args='{"n": 1.10}',
    )
    before = (await client.get(f"/v1/jobs/{job_id}")).json()
    answer = await patch(client, job_id, json=change, headers=headers)
    assert (answer.status_code, answer.json()) == (200, before | shown)
    assert answer.json() == (await client.get(f"/v1/jobs/{job_id}")).json()
    [*_, last] = await jobs.store.list_events(job_id)
    assert (last.event, last.actor, last.state) == ("changed", "api", state)


async def test_a_backoff_is_changed(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    job_id = await in_state(jobs, "ready", backoff_seconds=1.0)
    await patch(client, job_id, json={"backoff": None, "backoff_cap": "1m"})
    row = await jobs.row(job_id)
    assert (row["backoff_seconds"], row["backoff_cap_seconds"]) == (None, 60)


async def test_a_job_is_postponed_and_brought_forward(
    client: httpx2.AsyncClient, ringer: RecordingRinger, jobs: Jobs
) -> None:
    job_id = await in_state(jobs, "ready")
    postponed = (await patch(client, job_id, json={"delay": "1h"})).json()
    assert postponed["state"] == "scheduled"
    assert ringer.heard() == [Rung(scheduled=True)]
    now = (await patch(client, job_id, json={"run_at": None})).json()
    assert (now["state"], now["run_at"] < postponed["run_at"]) == ("ready", True)
    assert ringer.heard() == [Rung({"default": 1})]


async def test_a_job_is_moved_to_another_date(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    job_id, run_at = await in_state(jobs, "ready"), datetime.now(UTC) + timedelta(days=1)
    job = (await patch(client, job_id, json={"run_at": run_at.isoformat()})).json()
    assert (job["state"], datetime.fromisoformat(job["run_at"])) == ("scheduled", run_at)
    assert (await patch(client, job_id, json={"run_at": "2190-01-01T00:00:00Z"})).status_code == 422


async def test_another_queue_is_rung(client: httpx2.AsyncClient, ringer: RecordingRinger, jobs: Jobs) -> None:
    job_id = await in_state(jobs, "ready")
    await patch(client, job_id, json={"queue": "mail"})
    assert ringer.heard() == [Rung({"mail": 1})]


async def test_the_total_timeout_moves_with_the_start(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    job_id = await in_state(jobs, "ready", total_timeout_seconds=60.0)
    job = (await patch(client, job_id, json={"delay": "1h"})).json()
    finish_by, run_at = datetime.fromisoformat(job["finish_by"]), datetime.fromisoformat(job["run_at"])
    assert finish_by - run_at == timedelta(seconds=60)


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"delay": "2h"}, "/delay"),
        ({"run_at": (datetime.now(UTC) + timedelta(hours=2)).isoformat()}, "/run_at"),
        ({"start_by": (datetime.now(UTC) - timedelta(seconds=1)).isoformat()}, "/start_by"),
        ({"start_by": (datetime.now(UTC) + timedelta(hours=1)).isoformat(), "delay": "2h"}, "/start_by"),
    ],
)
async def test_a_job_cannot_be_made_due_after_its_deadline(
    client: httpx2.AsyncClient, jobs: Jobs, change: dict[str, Any], pointer: str
) -> None:
    job_id = await in_state(jobs, "ready", start_within_seconds=3600.0)
    answer = await patch(client, job_id, json=change)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)


async def test_a_deadline_for_the_start_does_not_bind_a_job_that_has_started(
    client: httpx2.AsyncClient, jobs: Jobs
) -> None:
    lease = await jobs.run(start_within_seconds=3600.0)
    await jobs.attempt("fail", lease)
    assert (await patch(client, lease.id, json={"delay": "2h"})).status_code == 200


@pytest.mark.parametrize("state", ["running", "succeeded", "cancelled", "dead"])
async def test_a_job_that_does_not_wait_cannot_be_changed(client: httpx2.AsyncClient, jobs: Jobs, state: str) -> None:
    job_id = await in_state(jobs, state)
    before = await jobs.everything()
    answer = await patch(client, job_id, json={"priority": 1})
    assert (*problem(answer), answer.json()["state"]) == (409, "illegal-transition", state)
    assert answer.json()["detail"] == f"a {state} job cannot be changed: only scheduled and ready ones can"
    assert await jobs.everything() == before


async def test_a_job_that_does_not_exist_cannot_be_changed(client: httpx2.AsyncClient) -> None:
    assert problem(await patch(client, uuid4(), json={"priority": 1})) == (404, "not-found")


@pytest.mark.parametrize(
    ("body", "status", "pointers"),
    [
        (b"", 400, [""]),
        (b"{", 400, [""]),
        (b"[]", 422, [""]),
        (b"{}", 422, [""]),
        (b'{"task":"other"}', 422, ["/task"]),
        (b'{"state":"ready","priority":1}', 422, ["/state"]),
        (b'{"queue":null}', 422, ["/queue"]),
        (b'{"priority":null,"delay":null}', 422, ["/delay", "/priority"]),
        (b'{"priority":101,"timeout":"x","max_attempts":0}', 422, ["/max_attempts", "/priority", "/timeout"]),
        (b'{"run_at":"2026-01-01T00:00:00Z","delay":1}', 422, ["/delay"]),
        (b'{"run_at":"soon"}', 422, ["/run_at"]),
        (b'{"start_by":"2300-01-01T00:00:00Z"}', 422, ["/start_by"]),
        (b'{"args":null}', 422, ["/args"]),
        (b'{"args":{"a":["\\u0000"]}}', 422, ["/args/a/0"]),
    ],
)
async def test_a_bad_change_is_refused_with_its_places(
    client: httpx2.AsyncClient, jobs: Jobs, body: bytes, status: int, pointers: list[str]
) -> None:
    job_id = await in_state(jobs, "ready")
    before = await jobs.everything()
    headers = {"content-type": "application/json"} | ANY_VERSION
    answer = await patch(client, job_id, content=body, headers=headers)
    assert (answer.status_code, sorted(error["pointer"] for error in answer.json()["errors"])) == (status, pointers)
    assert await jobs.everything() == before


async def test_a_change_of_another_media_type_is_told_both(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    answer = await patch(client, await in_state(jobs, "ready"), data={"priority": "1"})
    assert problem(answer) == (415, "unsupported-media-type")
    assert "application/json or application/merge-patch+json" in answer.json()["detail"]


# -- Which version is meant ------------------------------------------------------------------------------------------


async def test_a_change_of_the_version_that_was_read_is_made(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    job_id = await in_state(jobs, "ready")
    tag = (await client.get(f"/v1/jobs/{job_id}")).headers["etag"]
    answer = await patch(client, job_id, json={"priority": 1}, headers={"if-match": f'"x", {tag}'})
    assert (answer.status_code, answer.json()["priority"]) == (200, 1)
    assert answer.headers["etag"] != tag
    assert answer.headers["etag"] == (await client.get(f"/v1/jobs/{job_id}")).headers["etag"]


@pytest.mark.parametrize("form", ["{0}", "W/{0}", '"0"', "0", ""])
async def test_a_change_of_another_version_is_not_made(client: httpx2.AsyncClient, jobs: Jobs, form: str) -> None:
    job_id = await in_state(jobs, "ready")
    tag = (await client.get(f"/v1/jobs/{job_id}")).headers["etag"]
    if form == "{0}":
        await jobs.change(job_id, priority=5)
    answer = await patch(client, job_id, json={"queue": "mail"}, headers={"if-match": form.format(tag)})
    assert problem(answer) == (412, "precondition-failed")
    assert (await jobs.job(job_id)).queue == "default"


@pytest.mark.parametrize("headers", [{}, MERGE_PATCH])
async def test_args_are_changed_only_by_who_says_which_version(
    client: httpx2.AsyncClient, jobs: Jobs, headers: dict[str, str]
) -> None:
    job_id = await in_state(jobs, "ready", args='{"n":1}')
    answer = await patch(client, job_id, json={"args": {"n": 2}}, headers=headers)
    assert problem(answer) == (428, "precondition-required")
    tag = (await client.get(f"/v1/jobs/{job_id}")).headers["etag"]
    answer = await patch(client, job_id, json={"args": {"n": 2}}, headers=headers | {"if-match": tag})
    assert (answer.status_code, answer.json()["args"]) == (200, {"n": 2})


async def test_args_are_replaced_to_the_letter(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    job_id = await in_state(jobs, "ready", args='{"old":true}')
    args = '{ "n":1.10, "n":' + "9" * 400 + ' ,"z":[1e400,null]}'
    answer = await patch(client, job_id, content='{"args": ' + args + "}", headers=ANY_VERSION)
    assert f'"args":{args},' in answer.text
    assert (await jobs.job(job_id)).args == args


@pytest.mark.parametrize(
    ("args", "change", "merged"),
    [
        ('{"a":1}', '{"b":2}', '{"a":1,"b":2}'),
        ('{"a":1,"b":2}', '{"a":null}', '{"b":2}'),
        ('{"a":{"x":1.10,"y":[ 1 ]}}', '{"a":{"x":null,"z":{"n":null}}}', '{"a":{"y":[ 1 ],"z":{}}}'),
        ('{"a":[1,2]}', '{"a":{"b":3}}', '{"a":{"b":3}}'),
        ('{"a":{"b":3}}', '{"a":[null,{"c":null}]}', '{"a":[null,{"c":null}]}'),
        ('{"n":123456789012345678901234567890,"e":1e400}', "{}", '{"n":123456789012345678901234567890,"e":1e400}'),
    ],
)
async def test_a_merge_patch_leaves_the_rest_of_args_as_it_is(
    client: httpx2.AsyncClient, jobs: Jobs, args: str, change: str, merged: str
) -> None:
    job_id = await in_state(jobs, "ready", args=args)
    answer = await patch(client, job_id, content=f'{{"args":{change}}}', headers=MERGE_PATCH | ANY_VERSION)
    assert answer.status_code == 200, answer.text
    assert (await jobs.job(job_id)).args == merged


async def test_args_do_not_outgrow_their_bound_patch_by_patch(jobs: Jobs, store: Store, settings: Settings) -> None:
    job_id = await in_state(jobs, "ready", args='{"a":"' + "x" * 600 + '"}')
    async with client_of(services_over(store, settings, body_max_bytes=1024)) as client:
        headers = MERGE_PATCH | ANY_VERSION
        answer = await patch(client, job_id, content='{"args":{"b":"' + "x" * 600 + '"}}', headers=headers)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/args")


class Meddling(Store):
    """Somebody else changes the job just before each of the first changes."""

    meddles = 0

    async def change_job(self, job_id: UUID, change: JobChange, *, version: str | None, actor: str) -> Requeued | None:
        if self.meddles:
            self.meddles -= 1
            await super().change_job(
                job_id, JobChange(names=frozenset({"priority"}), priority=9), version=None, actor="somebody"
            )
        return await super().change_job(job_id, change, version=version, actor=actor)


@pytest.fixture
async def meddled(database: Database, settings: Settings) -> AsyncIterator[tuple[Meddling, httpx2.AsyncClient]]:
    """A client, and the store in which somebody meddles."""
    store = Meddling(database, settings)
    async with client_of(services_over(store, settings)) as client:
        yield store, client


async def test_a_change_of_whatever_version_is_made_on_top_of_others(
    meddled: tuple[Meddling, httpx2.AsyncClient], jobs: Jobs
) -> None:
    store, client = meddled
    job_id = await in_state(jobs, "ready")
    store.meddles = 2
    answer = await patch(client, job_id, json={"queue": "mail"})
    assert (answer.status_code, answer.json()["queue"], answer.json()["priority"]) == (200, "mail", 9)


async def test_a_change_of_a_version_that_is_overtaken_is_not_made(
    meddled: tuple[Meddling, httpx2.AsyncClient], jobs: Jobs
) -> None:
    store, client = meddled
    job_id = await in_state(jobs, "ready")
    tag = (await client.get(f"/v1/jobs/{job_id}")).headers["etag"]
    store.meddles = 1
    answer = await patch(client, job_id, json={"queue": "mail"}, headers={"if-match": tag})
    assert problem(answer) == (412, "precondition-failed")


async def test_a_change_among_endless_others_is_made_in_the_end(
    meddled: tuple[Meddling, httpx2.AsyncClient], jobs: Jobs
) -> None:
    store, client = meddled
    job_id = await in_state(jobs, "ready")
    store.meddles = 100
    assert (await patch(client, job_id, json={"queue": "mail"})).json()["queue"] == "mail"
    answer = await patch(client, job_id, json={"args": {}}, headers=ANY_VERSION)
    assert problem(answer) == (503, "unavailable")


async def test_a_job_that_is_claimed_meanwhile_is_not_changed(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    job_id = await in_state(jobs, "ready")
    tag = (await client.get(f"/v1/jobs/{job_id}")).headers["etag"]
    await jobs.claim()
    assert problem(await patch(client, job_id, json={"priority": 1})) == (409, "illegal-transition")
    answer = await patch(client, job_id, json={"priority": 1}, headers={"if-match": tag})
    assert problem(answer) == (412, "precondition-failed")


async def test_a_retry_of_a_generation_can_be_repeated(client: httpx2.AsyncClient, store: Store, jobs: Jobs) -> None:
    lease = await jobs.run()
    await store.fail_jobs([failure(lease, dead_reason=DeadReason.NOT_RETRYABLE)])
    first = await client.post(f"/v1/jobs/{lease.id}/retry", json={"generation": 1})
    assert (first.status_code, first.json()["generation"], first.json()["state"]) == (200, 2, "ready")
    (again,) = await jobs.claim()
    await store.fail_jobs([failure(again, dead_reason=DeadReason.NOT_RETRYABLE)])
    repeated = await client.post(f"/v1/jobs/{lease.id}/retry", json={"generation": 1})
    assert (repeated.status_code, repeated.json()["generation"], repeated.json()["state"]) == (200, 2, "dead")


async def test_a_change_leaves_a_job_at_least_one_attempt(client: httpx2.AsyncClient, store: Store, jobs: Jobs) -> None:
    lease = await jobs.run()
    await store.fail_jobs([failure(lease)])
    refused = await client.patch(f"/v1/jobs/{lease.id}", json={"max_attempts": 1})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/max_attempts")
    assert (await client.patch(f"/v1/jobs/{lease.id}", json={"max_attempts": 2})).status_code == 200


async def test_a_total_timeout_that_is_over_is_refused(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    await jobs.age(added.id, 60)
    refused = await client.patch(f"/v1/jobs/{added.id}", json={"total_timeout": "30s"})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/total_timeout")
    assert (await client.patch(f"/v1/jobs/{added.id}", json={"total_timeout": "5m"})).status_code == 200
