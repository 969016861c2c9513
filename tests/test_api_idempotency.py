"""Enqueueing with idempotency keys: once per key, the same answer again, and what differs is named."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import anyio
import httpx2
import msgspec
import pytest

from api_harness import client_of, services_over
from clarion.api.idempotency import differences, fingerprint
from clarion.db import Database, connect_options, open_database
from clarion.enqueuer import Enqueuer
from clarion.errors import IdempotencyInFlight
from clarion.job import Enqueued, NewJob
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ringer
from recording import RecordingRinger, Rung
from running import in_one_task
from store_actions import Jobs, Session

BATCH = "/v1/jobs/batch"
NDJSON = {"content-type": "application/x-ndjson"}
HELD = "insert into clarion.idempotency_keys values ($1, clarion.new_id(), 'ready', now(), now(), '{}', 'infinity')"


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


@pytest.fixture
def key() -> str:
    """A key that nobody has used."""
    return uuid4().hex


class Counting(Store):
    """Counts the statements that enqueue."""

    statements = 0

    async def enqueue_jobs(self, jobs: Sequence[NewJob]) -> list[Enqueued]:
        self.statements += 1
        return await super().enqueue_jobs(jobs)


@pytest.fixture
async def store(database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Counting]:
    """One whose statements wait a short while for locks."""

    def impatient_options(settings: Settings, **options: Any) -> dict[str, Any]:
        found = connect_options(settings, **options)
        found["server_settings"]["lock_timeout"] = "100"
        return found

    monkeypatch.setattr("clarion.db.connect_options", impatient_options)
    async with open_database(settings, name="impatient") as impatient:
        yield Counting(impatient, settings)


@asynccontextmanager
async def enqueueing(store: Store, settings: Settings) -> AsyncIterator[Enqueuer]:
    """The real enqueuer, with its batchers running."""
    async with anyio.create_task_group() as group:
        enqueuer = Enqueuer(store, Ringer(store, settings), settings)
        group.start_soon(enqueuer.run)
        yield enqueuer
        group.cancel_scope.cancel()


@pytest.fixture
async def enqueuer(store: Store, settings: Settings) -> AsyncIterator[Enqueuer]:
    async with in_one_task(enqueueing(store, settings)) as enqueuer:
        yield enqueuer


@pytest.fixture
async def server(store: Store, settings: Settings, enqueuer: Enqueuer) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an application that enqueues as a server does."""
    async with client_of(services_over(store, settings, enqueuer=enqueuer)) as client:
        yield client


async def enqueue(client: httpx2.AsyncClient, key: str | None = None, **fields: Any) -> httpx2.Response:
    headers = {"idempotency-key": key} if key is not None else {}
    return await client.post("/v1/jobs", json={"task": "work"} | fields, headers=headers)


async def tasks(client: httpx2.AsyncClient) -> list[str]:
    """The task of every job that there is, oldest first."""
    return [job["task"] for job in (await client.get("/v1/jobs?limit=500")).json()["jobs"]][::-1]


def places(answer: httpx2.Response) -> list[str]:
    """Where a mismatch is."""
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/idempotency-mismatch"), answer.text
    return [error["pointer"] for error in answer.json()["errors"]]


# -- One job ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"delay": "1h", "args": {"n": 1.10}, "start_within": "5s", "timeout": 0.1}])
async def test_the_same_request_again_adds_nothing_and_gets_the_same_answer(
    client: httpx2.AsyncClient, key: str, fields: dict[str, Any]
) -> None:
    first, again = await enqueue(client, key, **fields), await enqueue(client, key, **fields)
    assert (again.status_code, again.content) == (first.status_code, first.content) == (201, first.content)
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert await tasks(client) == ["work"]


async def test_the_answer_is_the_first_one_s_also_when_the_job_has_moved_on(
    client: httpx2.AsyncClient, jobs: Jobs, key: str
) -> None:
    first = await enqueue(client, key)
    await jobs.fetch("delete from clarion.jobs")
    assert (await enqueue(client, key)).content == first.content
    assert await tasks(client) == []


async def test_the_header_and_the_field_are_the_same_key(client: httpx2.AsyncClient, key: str) -> None:
    first = await enqueue(client, key)
    assert first.content == (await enqueue(client, idempotency_key=key)).content
    assert first.content == (await enqueue(client, f'"{key}"')).content
    assert first.content == (await enqueue(client, key, idempotency_key=key)).content


async def test_a_header_and_a_field_that_differ_are_refused(client: httpx2.AsyncClient, key: str) -> None:
    answer = await enqueue(client, key, idempotency_key="other")
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/idempotency_key")
    assert await tasks(client) == []


@pytest.mark.parametrize("path", ["/v1/jobs", BATCH])
@pytest.mark.parametrize("given", ["", "x" * 256, "é", '""'])
async def test_a_header_that_is_no_key_is_refused(client: httpx2.AsyncClient, path: str, given: str) -> None:
    body: dict[str, Any] = {"jobs": []} if path == BATCH else {"task": "work"}
    answer = await client.post(path, json=body, headers=[(b"idempotency-key", given.encode())])
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, "Idempotency-Key")


async def test_another_request_with_the_key_is_told_what_differs(client: httpx2.AsyncClient, key: str) -> None:
    await enqueue(client, key, args={"n": 1}, priority=3)
    answer = await enqueue(client, key, args={"n": 2}, queue="q", timeout="5s")
    assert places(answer) == ["/args", "/priority", "/queue", "/timeout"]
    assert await tasks(client) == ["work"]


async def test_a_request_that_is_refused_does_not_take_the_key(client: httpx2.AsyncClient, key: str) -> None:
    assert (await enqueue(client, key, priority=101)).status_code == 422
    answer = await enqueue(client, key, priority=100)
    assert answer.status_code == 201
    assert "idempotency-replayed" not in answer.headers


async def test_a_key_whose_time_is_over_is_new_again(client: httpx2.AsyncClient, jobs: Jobs, key: str) -> None:
    first = await enqueue(client, key)
    await jobs.fetch("update clarion.idempotency_keys set expires_at = now() where key = $1", key)
    second = await enqueue(client, key, priority=1)
    assert second.status_code == 201
    assert second.json()["id"] != first.json()["id"]


async def test_requests_without_a_key_are_all_different(client: httpx2.AsyncClient) -> None:
    assert (await enqueue(client)).json()["id"] != (await enqueue(client)).json()["id"]


async def test_a_repetition_whose_deadline_has_passed_meanwhile_gets_its_answer(
    client: httpx2.AsyncClient, jobs: Jobs, key: str
) -> None:
    soon = datetime.now(UTC) - timedelta(seconds=10)
    first = await enqueue(client, key, start_by=soon.isoformat())
    assert first.status_code == 201
    assert (await enqueue(client, key, start_by=soon.isoformat())).content == first.content
    long_ago = (soon - timedelta(hours=1)).isoformat()
    assert (await enqueue(client, key, start_by=long_ago)).json()["type"] == "/problems/invalid"


async def test_a_large_payload_is_compared_too(client: httpx2.AsyncClient, key: str) -> None:
    first = await enqueue(client, key, args={"a": "x" * 100_000, "b": 1})
    again = await enqueue(client, key, args={"b": 1, "a": "x" * 100_000})
    assert (first.status_code, again.json()["id"]) == (201, first.json()["id"])
    assert places(await enqueue(client, key, args={"a": "x" * 99_999 + "y", "b": 1})) == ["/args"]


# -- What is the same request ----------------------------------------------------------------------------------------


def of(**fields: Any) -> str:
    return fingerprint(NewJob(**{"task": "t"} | fields))


MOMENT = datetime(2030, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"args": "{ }", "queue": "default", "priority": 0, "run_at": None}),
        ({"args": '{"a":1,"b":[{"c":"é"}]}'}, {"args": ' { "b" : [{"c":"\\u00e9"}], "a":1 }'}),
        ({"args": '{"a":{"x":1,"y":2}}'}, {"args": '{"a":{"y":2,"x":1}}'}),
        ({"run_at": MOMENT}, {"run_at": datetime.fromisoformat("2030-01-01T14:00:00+02:00")}),
        ({"enqueued_by": "api:ada"}, {"enqueued_by": None}),
    ],
)
def test_the_same_said_otherwise_is_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert of(**one) == of(**other)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("args", '{"a":1}', '{"a":"1"}'),
        ("args", '{"a":1}', '{"a":1.0}'),
        ("args", '{"a":1}', '{"a":{"number":"1"}}'),
        ("args", '{"a":[]}', '{"a":{}}'),
        ("args", '{"a":[1,2]}', '{"a":[2,1]}'),
        ("args", '{"a":1e400}', '{"a":1e401}'),
        ("args", '{"a":' + "9" * 5_000 + "}", '{"a":' + "9" * 4_999 + "8}"),
        ("args", '{"a":1,"a":2}', '{"a":2,"a":1}'),
        ("args", '{"a":null}', "{}"),
        ("task", "t", "T"),
        ("delay_seconds", 0.25, 0.5),
        ("run_at", MOMENT, MOMENT + timedelta(microseconds=1)),
        ("start_by", MOMENT, None),
        ("total_timeout_seconds", None, 5.0),
    ],
)
def test_another_value_is_another_request(name: str, one: Any, other: Any) -> None:
    found = differences(of(**{name: one}), of(**{name: other}))
    assert [error.pointer for error in found] == [f"/{name.removesuffix('_seconds')}"]


def test_a_payload_is_not_stored_a_second_time() -> None:
    assert len(of(args=msgspec.json.encode({"secret": "x" * 10_000}).decode())) < 100


# -- Many at once ----------------------------------------------------------------------------------------------------


async def test_fifty_requests_with_one_key_make_one_job(server: httpx2.AsyncClient, key: str) -> None:
    answers: list[httpx2.Response] = []

    async def post() -> None:
        answers.append(await enqueue(server, key))

    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(post)
    assert await tasks(server) == ["work"]
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 49


async def test_of_different_requests_with_one_key_the_first_wins_and_the_others_are_told(
    server: httpx2.AsyncClient, key: str
) -> None:
    answers: list[httpx2.Response] = []

    async def post(number: int) -> None:
        answers.append(await enqueue(server, key, args={"n": number}))

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(post, number)
    assert sorted(answer.status_code for answer in answers) == [201] + [422] * 19


async def test_a_mismatch_costs_only_itself_among_those_it_was_enqueued_with(enqueuer: Enqueuer, key: str) -> None:
    first = await enqueuer.enqueue_one(keyed(key))
    answers: dict[str, Enqueued] = {}

    async def enqueue_one(name: str, job: NewJob) -> None:
        answers[name] = await enqueuer.enqueue_one(job)

    async with anyio.create_task_group() as group:
        # All of them wait for the batcher, and go together.
        for number in range(5):
            group.start_soon(enqueue_one, f"new {number}", keyed(f"{key} {number}"))
        group.start_soon(enqueue_one, "other", keyed(key, priority=1))
        group.start_soon(enqueue_one, "same", keyed(key))
    assert {answer.state for answer in answers.values()} == {"ready"}
    assert {name for name, answer in answers.items() if answer.request is None} == {f"new {n}" for n in range(5)}
    assert answers["other"].id == answers["same"].id == first.id


def keyed(key: str, **fields: Any) -> NewJob:
    job = NewJob(task="work", key=key, **fields)
    return msgspec.structs.replace(job, request=fingerprint(job))


async def test_a_replay_rings_nobody(store: Store, settings: Settings, key: str) -> None:
    ringer = RecordingRinger(store, settings)
    enqueuer = Enqueuer(store, ringer, settings)
    await enqueuer.enqueue([keyed(key), keyed(key)])
    assert ringer.heard() == [Rung({"default": 1})]
    await enqueuer.enqueue([keyed(key)])
    assert ringer.heard() == []


# -- In flight -------------------------------------------------------------------------------------------------------


@pytest.fixture
async def other(settings: Settings) -> AsyncIterator[Session]:
    """Another session, in the middle of its transaction."""
    async with Session.open(settings) as session:
        yield session


async def test_a_key_that_another_session_is_committing_is_in_flight(
    server: httpx2.AsyncClient, other: Session, key: str
) -> None:
    await other.fetch(HELD, key)
    answer = await enqueue(server, key)
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/idempotency-in-flight")
    assert (answer.headers["retry-after"], answer.json()["retryable"]) == ("1", True)
    await other.rollback()
    assert (await enqueue(server, key)).status_code == 201


async def test_whoever_waits_for_one_key_in_flight_is_told_together(
    enqueuer: Enqueuer, store: Counting, other: Session, key: str
) -> None:
    await other.fetch(HELD, key)
    refused: list[str] = []

    async def enqueue_one() -> None:
        with pytest.raises(IdempotencyInFlight):
            await enqueuer.enqueue_one(keyed(key))
        refused.append(key)

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(enqueue_one)
    assert (len(refused), store.statements) == (10, 1)


async def test_a_key_in_flight_costs_only_its_own_request(enqueuer: Enqueuer, other: Session, key: str) -> None:
    await other.fetch(HELD, key)
    done: list[Enqueued] = []

    async def enqueue_one(job: NewJob) -> None:
        done.append(await enqueuer.enqueue_one(job))

    async with anyio.create_task_group() as group:
        group.start_soon(enqueue_one, keyed(f"{key} 1"))
        group.start_soon(enqueue_one, keyed(f"{key} 2"))
        with pytest.raises(IdempotencyInFlight):
            await enqueuer.enqueue_one(keyed(key))
    assert [answer.state for answer in done] == ["ready", "ready"]


async def test_who_has_no_key_does_not_wait_for_one_in_flight(
    database: Database, settings: Settings, other: Session, key: str
) -> None:
    await other.fetch(HELD, key)
    ended: list[str] = []

    async def enqueue_one(name: str, job: NewJob) -> None:
        await patient.enqueue_one(job)
        ended.append(name)

    async with enqueueing(Store(database, settings), settings) as patient, anyio.create_task_group() as group:
        group.start_soon(enqueue_one, "keyed", keyed(key))
        await other.until_it_blocks_another()
        await enqueue_one("keyless", NewJob(task="work"))
        await other.rollback()
    assert ended == ["keyless", "keyed"]


async def test_a_request_that_is_committed_meanwhile_is_the_first(
    database: Database, settings: Settings, other: Session, key: str
) -> None:
    [first] = await other.store.enqueue_jobs([keyed(key)])
    answers: list[Enqueued] = []

    async def enqueue_one() -> None:
        answers.append(await patient.enqueue_one(keyed(key)))

    async with enqueueing(Store(database, settings), settings) as patient, anyio.create_task_group() as group:
        group.start_soon(enqueue_one)
        await other.until_it_blocks_another()
        await other.commit()
    assert [(answer.id, answer.request) for answer in answers] == [(first.id, keyed(key).request)]


# -- Batches ---------------------------------------------------------------------------------------------------------


async def post_batch(client: httpx2.AsyncClient, jobs: list[Any], key: str | None = None) -> httpx2.Response:
    headers = {"idempotency-key": key} if key is not None else {}
    return await client.post(BATCH, json={"jobs": jobs}, headers=headers)


def ids(answer: httpx2.Response) -> list[str]:
    assert answer.status_code == 201, answer.text
    return [job["id"] for job in answer.json()["jobs"]]


async def test_a_batch_again_adds_nothing(client: httpx2.AsyncClient, key: str) -> None:
    jobs = [{"task": "a"}, {"task": "a"}, {"task": "b", "delay": "1h"}]
    first, again = await post_batch(client, jobs, key), await post_batch(client, jobs, key)
    assert again.json()["jobs"] == [job | {"replayed": True} for job in first.json()["jobs"]]
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert await tasks(client) == ["a", "a", "b"]


async def test_each_job_of_a_batch_has_its_place_as_part_of_its_key(client: httpx2.AsyncClient, key: str) -> None:
    [first, second] = ids(await post_batch(client, [{"task": "a"}, {"task": "b"}], key))
    assert (await enqueue(client, f"{key}/1", task="b")).json()["id"] == second
    assert ids(await post_batch(client, [{"task": "a"}], key)) == [first]


async def test_a_key_of_its_own_stands_before_that_of_the_batch(client: httpx2.AsyncClient, key: str) -> None:
    own = {"task": "a", "idempotency_key": f"{key} own"}
    first = ids(await post_batch(client, [{"task": "b"}, own], key))
    assert ids(await post_batch(client, [own])) == first[1:]


async def test_a_batch_of_new_and_known_jobs_says_which_are_which(client: httpx2.AsyncClient, key: str) -> None:
    known = {"task": "a", "idempotency_key": key}
    await post_batch(client, [known])
    answer = await post_batch(client, [{"task": "b"}, known, known])
    assert [job.get("replayed", False) for job in answer.json()["jobs"]] == [False, True, True]
    assert "idempotency-replayed" not in answer.headers
    assert await tasks(client) == ["a", "b"]


async def test_one_mismatch_refuses_the_whole_batch(client: httpx2.AsyncClient, key: str) -> None:
    known = {"task": "a", "idempotency_key": key}
    await post_batch(client, [known])
    others = [{"task": "b"}, {"task": "c", "idempotency_key": f"{key} new"}]
    answer = await post_batch(client, [*others, known | {"priority": 1, "args": {"x": 1}}])
    assert places(answer) == ["/jobs/2/args", "/jobs/2/priority"]
    assert await tasks(client) == ["a"]
    # The keys of the others are still free.
    assert ids(await post_batch(client, [*others, known]))
    assert await tasks(client) == ["a", "b", "c"]


async def test_one_key_for_two_different_jobs_of_a_batch_is_refused(client: httpx2.AsyncClient, key: str) -> None:
    answer = await post_batch(
        client, [{"task": "a", "idempotency_key": key}, {"task": "b", "idempotency_key": key}, {"task": "c"}]
    )
    assert places(answer) == ["/jobs/1/task"]
    assert await tasks(client) == []


async def test_a_batch_with_a_key_in_flight_is_refused_as_a_whole(
    server: httpx2.AsyncClient, other: Session, key: str
) -> None:
    await other.fetch(HELD, f"{key}/1")
    answer = await post_batch(server, [{"task": "a"}, {"task": "b"}], key)
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
    assert await tasks(server) == []


async def test_deadlines_that_are_over_are_found_in_a_batch(client: httpx2.AsyncClient) -> None:
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    answer = await post_batch(client, [{"task": "a"}, {"task": "b", "start_by": past}])
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/jobs/1/start_by")


# -- Streams ---------------------------------------------------------------------------------------------------------


async def stream(client: httpx2.AsyncClient, lines: list[bytes], key: str | None = None) -> list[Any]:
    headers = NDJSON | ({"idempotency-key": key} if key is not None else {})
    answer = await client.post(BATCH, content=b"\n".join(lines), headers=headers)
    assert answer.status_code == 200, answer.text
    return [msgspec.json.decode(line) for line in answer.content.splitlines()]


async def test_a_stream_again_adds_nothing_and_says_so_line_by_line(client: httpx2.AsyncClient, key: str) -> None:
    lines = [b'{"task":"a"}', b"nonsense", b"", b'{"task":"b"}']
    first = await stream(client, lines, key)
    # The bad line has its place, too: mended, it is the only new one.
    again = await stream(client, [b'{"task":"a"}', b'{"task":"new"}', b'{"task":"b"}'], key)
    assert again == [first[0] | {"replayed": True}, again[1], first[2] | {"replayed": True}]
    assert set(again[1]) == {"id", "state"}
    assert await tasks(client) == ["a", "b", "new"]


async def test_a_mismatch_in_a_stream_costs_only_its_line(client: httpx2.AsyncClient, key: str) -> None:
    await stream(client, [b'{"task":"a"}', b'{"task":"b"}'], key)
    answers = await stream(client, [b'{"task":"a"}', b'{"task":"x"}', b'{"task":"c"}'], key)
    assert [answer.get("replayed", False) for answer in answers] == [True, False, False]
    assert (answers[1]["error"]["status"], answers[1]["line"]) == (422, 2)
    assert [error["pointer"] for error in answers[1]["error"]["errors"]] == ["/task"]
    assert await tasks(client) == ["a", "b", "c"]


async def test_a_key_in_flight_costs_only_its_line(server: httpx2.AsyncClient, other: Session, key: str) -> None:
    await other.fetch(HELD, f"{key}/2")
    answers = await stream(server, [*[b'{"task":"%d"}' % number for number in range(4)], b"nonsense"], key)
    assert [answer.get("error", {}).get("status") for answer in answers] == [None, None, 409, None, 400]
    assert (answers[2]["error"]["retryable"], answers[2]["line"]) == (True, 3)
    assert await tasks(server) == ["0", "1", "3"]


async def test_a_stream_with_many_keys_in_flight_does_not_wait_for_each(
    server: httpx2.AsyncClient, store: Counting, other: Session, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clarion.api.intake.IN_FLIGHT_MAX", 3)
    for number in range(8):
        await other.fetch(HELD, f"{key}/{number}")
    answers = await stream(server, [b'{"task":"a"}'] * 8, key)
    assert [answer["error"]["status"] for answer in answers] == [409] * 8
    assert store.statements == 3
