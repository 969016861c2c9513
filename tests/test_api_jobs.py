"""Enqueueing, showing and listing jobs over HTTP."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx2
import msgspec
import pytest

from api_harness import claim, client_of, finish, services_over
from clarion.db import Database, open_database
from clarion.execution import Failure
from clarion.job import DeadReason
from clarion.settings import Settings
from clarion.store import Store

JSON = {"content-type": "application/json"}


async def enqueue(client: httpx2.AsyncClient, **fields: Any) -> Any:
    """Enqueues a job; what was answered."""
    answer = await client.post("/v1/jobs", json={"task": "work"} | fields)
    assert answer.status_code == 201, answer.text
    return answer.json()


# -- Enqueueing ----------------------------------------------------------------------------------------------------


async def test_a_job_is_answered_with_its_address_and_its_whole_representation(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/v1/jobs", json={"task": "work", "args": {"n": 1}})
    job = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["created_at"] == job["run_at"]
    assert job["created_at"].endswith("Z")
    assert job == {
        "id": job["id"], "queue": "default", "task": "work", "state": "ready", "priority": 0, "args": {"n": 1},
        "result": None, "attempt": 0, "max_attempts": None, "errors": 0, "crashes": 0, "snoozes": 0,
        "generation": 1, "created_at": job["created_at"], "run_at": job["run_at"], "started_at": None,
        "finished_at": None, "timeout": None, "total_timeout": None, "start_by": None, "finish_by": None,
        "cancel_requested_at": None, "worker": None, "dead_reason": None, "error_type": None, "error": None,
        "progress": None, "checkpoint": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"queue": "mail", "priority": -7, "max_attempts": 3},
        {"delay": "1.5h"},
        {"delay": 0.25},
        {"delay": 0},
        {"run_at": "2026-01-01T00:00:00+02:00"},
        {"timeout": "0.1s"},
        {"timeout": 12345.678, "backoff": "1ms", "backoff_cap": 0},
        {"start_within": "90s", "total_timeout": "1.5h"},
        {"delay": "1h", "start_within": 0.25, "total_timeout": 12345.678},
        {"start_by": "2190-01-01T00:00:00+02:00"},
    ],
)
async def test_what_is_answered_is_what_is_read_back(client: httpx2.AsyncClient, fields: dict[str, Any]) -> None:
    job = await enqueue(client, **fields)
    assert (await client.get(f"/v1/jobs/{job['id']}")).json() == job
    assert {name: job[name] for name in fields.keys() & {"queue", "priority", "max_attempts"}} == {
        name: value for name, value in fields.items() if name in {"queue", "priority", "max_attempts"}
    }


async def test_a_delay_counts_from_the_database_s_now(client: httpx2.AsyncClient) -> None:
    job = await enqueue(client, delay="90s")
    assert job["state"] == "scheduled"
    assert datetime.fromisoformat(job["run_at"]) - datetime.fromisoformat(job["created_at"]) == timedelta(seconds=90)


async def test_deadlines_count_from_the_moment_at_which_the_job_is_due(client: httpx2.AsyncClient) -> None:
    job = await enqueue(client, delay="60s", start_within="10s", total_timeout="5m")
    due, start_by, finish_by = (datetime.fromisoformat(job[name]) for name in ("run_at", "start_by", "finish_by"))
    assert (start_by - due, finish_by - due) == (timedelta(seconds=10), timedelta(minutes=5))
    assert job["total_timeout"] == 300


@pytest.mark.parametrize("seconds", [-1, 59])
async def test_a_deadline_before_the_job_is_due_is_refused(client: httpx2.AsyncClient, seconds: int) -> None:
    start_by = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
    answer = await client.post("/v1/jobs", json={"task": "work", "delay": "60s", "start_by": start_by})
    assert (answer.status_code, [error["pointer"] for error in answer.json()["errors"]]) == (422, ["/start_by"])
    assert (await client.get("/v1/jobs")).json()["jobs"] == []


async def test_a_deadline_just_after_the_job_is_due_is_kept(client: httpx2.AsyncClient) -> None:
    start_by = datetime.now(UTC) + timedelta(seconds=90)
    job = await enqueue(client, delay="60s", start_by=start_by.isoformat())
    assert datetime.fromisoformat(job["start_by"]) == start_by


@pytest.mark.parametrize(("headers", "by"), [({}, None), ({"x-clarion-actor": "ada"}, "api:ada")])
async def test_who_enqueued_a_job_is_kept(
    client: httpx2.AsyncClient, store: Store, headers: dict[str, str], by: str | None
) -> None:
    answer = await client.post("/v1/jobs", json={"task": "work"}, headers=headers)
    job = await store.get_job(UUID(answer.json()["id"]))
    assert job is not None
    assert job.enqueued_by == by


async def test_a_start_in_the_past_is_now(client: httpx2.AsyncClient) -> None:
    job = await enqueue(client, run_at="1970-01-01T00:00:00Z")
    assert (job["state"], job["run_at"]) == ("ready", job["created_at"])


@pytest.mark.parametrize(
    "args",
    [
        b"{}",
        b'{ "b" : 1.10 ,\n\t"a":1E+2, "b":2}',
        b'{"n":' + b"9" * 5_000 + b"}",
        b'{"n":[1e400,-1e-400,-0,0.1000000000000000055511151231257827]}',
        '{"é":"\u2028 \x7f 𝄞 e\u0301"}'.encode(),
        b'{"a":"\\ud834\\udd1e \\u00e9 \\/ \\\\u0000"}',
        b'{"q":"\'; drop table clarion.jobs; --","h":"<script>alert(1)</script>","$1":"%s {0}"}',
        b'{"a":' + b"[" * 63 + b"]" * 63 + b"}",
        b'{"":{"":""}}',
        b'{"big":"' + b"x" * 500_000 + b'"}',
    ],
)
async def test_args_come_back_to_the_letter(client: httpx2.AsyncClient, args: bytes) -> None:
    answer = await client.post("/v1/jobs", content=b'{"task":"work","args":  ' + args + b" }", headers=JSON)
    assert answer.status_code == 201
    read = await client.get(answer.headers["location"])
    assert b'"args":' + args + b"," in answer.content
    assert b'"args":' + args + b"," in read.content


@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        (b"", 400, ""),
        (b"{", 400, ""),
        (b"task=work", 400, ""),
        (b'{"task":"work","args":{"a":NaN}}', 400, "/args/a"),
        (b'{"task":"work","args":{"a":[-Infinity]}}', 400, "/args/a/0"),
        (b'{"task":"work","args":{"a":"\xff"}}', 400, "/args/a"),
        (b'{"task":"work","args":{"a":"\xed\xa0\x80"}}', 400, "/args/a"),
        (b"[]", 422, ""),
        (b"{}", 422, "/task"),
        (b'{"task":"work","args":null}', 422, "/args"),
        (b'{"task":"work","args":{"a":"\\u0000"}}', 422, "/args/a"),
        (b'{"task":"work","args":{"a":{"\\u0000":1}}}', 422, "/args/a"),
        (b'{"task":"work","args":{"a":"\\ud800"}}', 422, "/args/a"),
        (b'{"task":"work","args":{"\\udc00":1}}', 422, "/args"),
        (b'{"task":"work","args":{"a":' + b"[" * 64 + b"]" * 64 + b"}}", 422, "/args/a" + "/0" * 63),
        (b'{"task":"work","args":{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}}", 422, "/args/a" + "/0" * 65),
        (b'{"task":"work","priority":1e400}', 422, "/priority"),
        (b'{"task":"work","priority":101}', 422, "/priority"),
        (b'{"task":"work","run_at":"2026-01-01T00:00:00"}', 422, "/run_at"),
        (b'{"task":"work","run_at":"infinity"}', 422, "/run_at"),
        (b'{"task":"work","run_at":"294276-01-01T00:00:00Z"}', 422, "/run_at"),
        (b'{"task":"work","run_at":"9999-12-31T23:59:59-23:59"}', 422, "/run_at"),
        (b'{"task":"work","delay":"-1s"}', 422, "/delay"),
        (b'{"task":"","queue":"default"}', 422, "/task"),
        (b'{"task":"work","queue":"a b"}', 422, "/queue"),
        (b'{"task":"work","unknown":1}', 422, "/unknown"),
    ],
)
async def test_bad_input_is_refused_with_its_place_and_leaves_no_row(
    client: httpx2.AsyncClient, body: bytes, status: int, pointer: str
) -> None:
    answer = await client.post("/v1/jobs", content=body, headers=JSON)
    problem = answer.json()
    assert (answer.status_code, [error["pointer"] for error in problem["errors"]]) == (status, [pointer])
    assert not problem["retryable"]
    assert (await client.get("/v1/jobs")).json() == {"jobs": [], "next_cursor": None}


@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON; charset=utf-8", None])
async def test_json_is_read_with_or_without_its_name(client: httpx2.AsyncClient, media_type: str | None) -> None:
    headers = {"content-type": media_type} if media_type else {}
    assert (await client.post("/v1/jobs", content=b'{"task":"work"}', headers=headers)).status_code == 201


@pytest.mark.parametrize(
    "media_type",
    ["application/x-www-form-urlencoded", "text/plain", "application/xml", "application/x-ndjson", "json", ""],
)
async def test_any_other_media_type_is_told_what_to_send(client: httpx2.AsyncClient, media_type: str) -> None:
    answer = await client.post("/v1/jobs", content=b'{"task":"work"}', headers={"content-type": media_type})
    assert answer.status_code == 415
    assert "-H 'content-type: application/json'" in answer.json()["detail"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "gzip, identity", "zip-bomb"])
async def test_a_compressed_body_is_not_inflated(client: httpx2.AsyncClient, encoding: str) -> None:
    answer = await client.post("/v1/jobs", content=b"\x1f\x8b", headers=JSON | {"content-encoding": encoding})
    assert (answer.status_code, answer.json()["type"]) == (415, "/problems/unsupported-media-type")


# -- One job -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job_id",
    ["1", "x" * 5_000, "%00", "0191e7a0000070008000000000000000", "{0191e7a0-0000-7000-8000-000000000000}",
     "urn:uuid:0191e7a0-0000-7000-8000-000000000000", "0191e7a0-0000-7000-8000-00000000000g", "'--"],
)  # fmt: skip
async def test_an_id_that_is_no_uuid_is_not_found_and_says_why(client: httpx2.AsyncClient, job_id: str) -> None:
    answer = await client.get(f"/v1/jobs/{job_id}")
    assert answer.status_code == 404
    assert "UUID" in answer.json()["detail"]


async def test_a_job_that_does_not_exist_is_not_found(client: httpx2.AsyncClient) -> None:
    assert (await client.get(f"/v1/jobs/{uuid4()}")).json()["type"] == "/problems/not-found"


async def test_an_id_in_upper_case_is_the_same_id(client: httpx2.AsyncClient) -> None:
    job = await enqueue(client)
    assert (await client.get(f"/v1/jobs/{job['id'].upper()}")).json() == job


async def test_a_running_job_shows_who_runs_it(client: httpx2.AsyncClient, store: Store, worker_id: UUID) -> None:
    job = await enqueue(client)
    await claim(store, worker_id)
    shown = (await client.get(f"/v1/jobs/{job['id']}")).json()
    assert (shown["state"], shown["attempt"], shown["worker"]) == ("running", 1, str(worker_id))
    assert shown["started_at"]


async def test_a_finished_job_shows_its_result_to_the_letter(
    client: httpx2.AsyncClient, store: Store, worker_id: UUID
) -> None:
    job = await enqueue(client, args={"n": 1})
    result = '{"n": 1.10, "n":' + "9" * 400 + "}"
    await finish(store, worker_id, result=result)
    shown = await client.get(f"/v1/jobs/{job['id']}")
    assert f'"result":{result},' in shown.text
    assert (shown.json()["state"], shown.json()["args"], shown.json()["error"]) == ("succeeded", {"n": 1}, None)
    assert shown.json()["finished_at"] > job["created_at"]


async def test_a_dead_job_shows_why(client: httpx2.AsyncClient, store: Store, worker_id: UUID) -> None:
    job = await enqueue(client)
    lease = await claim(store, worker_id)
    failure = Failure(
        id=lease.id,
        token=lease.token,
        error_type="ValueError",
        error_message="<b>no</b>",
        dead_reason=DeadReason.NOT_RETRYABLE,
    )
    await store.fail_jobs([failure])
    shown = (await client.get(f"/v1/jobs/{job['id']}")).json()
    assert (shown["state"], shown["dead_reason"], shown["errors"]) == ("dead", "not_retryable", 1)
    assert shown["error"] == {"type": "ValueError", "message": "<b>no</b>"}
    assert shown["error_type"] == "ValueError"


# -- Versions ------------------------------------------------------------------------------------------------------


async def test_a_job_has_an_etag_that_every_write_changes(
    client: httpx2.AsyncClient, store: Store, worker_id: UUID
) -> None:
    url = f"/v1/jobs/{(await enqueue(client))['id']}"
    tags = [(await client.get(url)).headers["etag"], (await client.get(url)).headers["etag"]]
    await claim(store, worker_id)
    tags.append((await client.get(url)).headers["etag"])
    assert tags[0] == tags[1] != tags[2]
    assert all(tag.startswith('"') and tag.endswith('"') for tag in tags)


@pytest.mark.parametrize("form", ["{0}", "W/{0}", '"x", {0}', "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_version_that_is_known_is_not_sent_again(client: httpx2.AsyncClient, method: str, form: str) -> None:
    url = f"/v1/jobs/{(await enqueue(client))['id']}"
    tag = (await client.get(url)).headers["etag"]
    answer = await client.request(method, url, headers={"if-none-match": form.format(tag)})
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)


@pytest.mark.parametrize("known", ['"0"', "0", "", "W/", '"'])
async def test_any_other_version_is_answered_whole(client: httpx2.AsyncClient, known: str) -> None:
    job = await enqueue(client)
    answer = await client.get(f"/v1/jobs/{job['id']}", headers={"if-none-match": known})
    assert (answer.status_code, answer.json()) == (200, job)


# -- Weather ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/jobs"), ("GET", f"/v1/jobs/{UUID(int=7)}"), ("POST", "/v1/jobs")]
)
async def test_without_the_database_a_request_is_told_to_come_back(method: str, path: str) -> None:
    settings = Settings(database_url="postgresql://nobody@127.0.0.1:1/none")
    async with (
        open_database(settings, name="test") as database,
        client_of(services_over(Store(database, settings), settings)) as client,
    ):
        answer = await client.request(method, path, json={"task": "work"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["retryable"] is True


async def test_a_stored_row_never_breaks_a_list(client: httpx2.AsyncClient, database: Database) -> None:
    await database.fetch(
        "insert into clarion.jobs (task, queue, args, run_at, timeout_seconds, state)"
        " values (e'a\\n\\'\"<', '', '[\"\\u0000\\ud800\"]', '2199-12-31', 1e9, 'scheduled')"
    )
    listed = await client.get("/v1/jobs")
    assert listed.status_code == 200
    [job] = msgspec.json.decode(listed.content)["jobs"]
    assert (await client.get(f"/v1/jobs/{job['id']}")).status_code == 200
