"""Many jobs in one request: all or none as JSON, each for itself as a stream of lines."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2
import msgspec
import pytest

from api_harness import PlainEnqueuer, client_of, services_over
from clarion.api import intake
from clarion.api.services import Services
from clarion.errors import Overloaded, Unavailable
from clarion.job import Enqueued, NewJob
from clarion.settings import Settings
from clarion.store import Store

BATCH = "/v1/jobs/batch"
NDJSON = {"content-type": "application/x-ndjson"}


class MoodyEnqueuer(PlainEnqueuer):
    """Records the size of each set, and has weather from the `fails_from`-th on."""

    def __init__(self, store: Store, fails_from: int | None = None) -> None:
        super().__init__(store)
        self.sets: list[int] = []
        self._fails_from = fails_from

    async def enqueue(self, jobs: Sequence[NewJob]) -> list[Enqueued]:
        self.sets.append(len(jobs))
        if self._fails_from is not None and len(self.sets) >= self._fails_from:
            raise Unavailable("the database is away")
        return await super().enqueue(jobs)


@pytest.fixture
def enqueuer(store: Store) -> MoodyEnqueuer:
    return MoodyEnqueuer(store)


@pytest.fixture
def services(store: Store, settings: Settings, enqueuer: MoodyEnqueuer) -> Services:
    return services_over(store, settings, enqueuer=enqueuer, body_max_bytes=1024, batch_body_max_bytes=100_000)


async def stored(client: httpx2.AsyncClient) -> list[Any]:
    """All jobs, oldest first."""
    jobs: list[Any] = (await client.get("/v1/jobs?limit=500")).json()["jobs"]
    return jobs[::-1]


def lines_of(answer: httpx2.Response) -> list[Any]:
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
    assert not answer.content or answer.content.endswith(b"\n")
    return [msgspec.json.decode(line) for line in answer.content.splitlines()]


# -- JSON ----------------------------------------------------------------------------------------------------------


async def test_a_batch_is_answered_in_order(client: httpx2.AsyncClient, enqueuer: MoodyEnqueuer) -> None:
    jobs = [{"task": f"t{number}", "delay": number % 2, "args": {"n": number}} for number in range(100)]
    answer = await client.post(BATCH, json={"jobs": jobs})
    assert answer.status_code == 201
    added = answer.json()["jobs"]
    assert [job["state"] for job in added] == ["ready", "scheduled"] * 50
    assert [(job["id"], job["task"], job["run_at"]) for job in await stored(client)] == [
        (job["id"], f"t{number}", job["run_at"]) for number, job in enumerate(added)
    ]
    assert enqueuer.sets == [100]


async def test_an_empty_batch_is_answered_without_the_database(
    client: httpx2.AsyncClient, enqueuer: MoodyEnqueuer
) -> None:
    answer = await client.post(BATCH, json={"jobs": []})
    assert (answer.status_code, answer.json()) == (201, {"jobs": []})
    assert enqueuer.sets == []


async def test_one_bad_job_refuses_the_batch_and_every_error_is_listed(
    client: httpx2.AsyncClient, enqueuer: MoodyEnqueuer
) -> None:
    jobs: list[Any] = [{"task": "work"} for _ in range(20)]
    jobs[3] = {"queue": "q"}
    jobs[17] = {"task": "work", "priority": 1000, "args": {"a": "\x00"}}
    answer = await client.post(BATCH, json={"jobs": jobs})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid")
    assert [error["pointer"] for error in answer.json()["errors"]] == [
        "/jobs/3/task", "/jobs/17/priority", "/jobs/17/args/a",
    ]  # fmt: skip
    assert enqueuer.sets == []


@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        (b"", 400, ""),
        (b'{"jobs":[', 400, "/jobs/0"),
        (b"[]", 422, ""),
        (b'[{"task":"work"}]', 422, ""),
        (b"{}", 422, "/jobs"),
        (b'{"jobs":null}', 422, "/jobs"),
        (b'{"jobs":[null]}', 422, "/jobs/0"),
        (b'{"jobs":[{"task":"work","args":{"a":"\xff"}}]}', 400, "/jobs/0/args/a"),
        (b'{"jobs":[{"task":"w","args":' + b'{"a":' * 65 + b"1" + b"}" * 66 + b"]}", 422, "/jobs/0/args" + "/a" * 64),
        (b'{"jobs":' + b"[" * 90_000 + b"]" * 5, 422, "/jobs" + "/0" * 66),
    ],
)  # fmt: skip
async def test_a_bad_batch_is_refused_with_its_place(
    client: httpx2.AsyncClient, body: bytes, status: int, pointer: str
) -> None:
    answer = await client.post(BATCH, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, [error["pointer"] for error in answer.json()["errors"]]) == (status, [pointer])
    assert await stored(client) == []


async def test_the_number_of_jobs_in_a_batch_is_bounded(store: Store, settings: Settings) -> None:
    async with client_of(services_over(store, settings, batch_max_jobs=2)) as client:
        assert (await client.post(BATCH, json={"jobs": [{"task": "work"}] * 2})).status_code == 201
        answer = await client.post(BATCH, json={"jobs": [{"task": "work"}] * 3})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/jobs")
    assert "x-ndjson" in answer.json()["detail"]


async def test_a_batch_may_be_larger_than_a_single_job_and_has_its_own_bound(client: httpx2.AsyncClient) -> None:
    def job(size: int) -> bytes:
        return msgspec.json.encode({"jobs": [{"task": "work", "args": {"x": "x" * size}}]})

    assert (await client.post(BATCH, content=job(50_000))).status_code == 201
    assert (await client.post(BATCH, content=job(100_000))).status_code == 413
    assert (await client.post("/v1/jobs", content=b'{"task":"work"}' + b" " * 1009)).status_code == 201
    assert (await client.post("/v1/jobs", content=b'{"task":"work"}' + b" " * 1010)).status_code == 413


async def test_a_batch_of_another_media_type_is_told_both(client: httpx2.AsyncClient) -> None:
    answer = await client.post(BATCH, content=b"", headers={"content-type": "text/csv"})
    assert answer.status_code == 415
    assert "application/json or application/x-ndjson" in answer.json()["detail"]


async def test_in_bad_weather_a_batch_is_not_acknowledged(store: Store, settings: Settings) -> None:
    async with client_of(services_over(store, settings, enqueuer=MoodyEnqueuer(store, fails_from=1))) as client:
        answer = await client.post(BATCH, json={"jobs": [{"task": "work"}]})
    assert (answer.status_code, answer.json()["retryable"]) == (503, True)


# -- NDJSON --------------------------------------------------------------------------------------------------------


async def test_every_line_is_answered_in_order(client: httpx2.AsyncClient, enqueuer: MoodyEnqueuer) -> None:
    body = b"".join(b'{"task":"t%d","delay":%d}\n' % (number, number % 2) for number in range(2_345))
    answers = lines_of(await client.post(BATCH, content=body, headers=NDJSON))
    assert [answer["state"] for answer in answers] == ["ready", "scheduled"] * 1172 + ["ready"]
    assert all(set(answer) == {"id", "state"} for answer in answers)
    newest = [(job["id"], job["task"]) for job in await stored(client)]
    assert newest == [(answer["id"], f"t{number}") for number, answer in enumerate(answers)][-500:]
    assert enqueuer.sets == [1000, 1000, 345]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\n \t\r\n\n"])
async def test_blank_lines_and_line_ends_do_not_matter(client: httpx2.AsyncClient, end: bytes, last: bytes) -> None:
    body = end.join([b"", b'{"task":"a"}', b"  ", b'{"task":"b"}']) + last
    answers = lines_of(await client.post(BATCH, content=body, headers=NDJSON))
    assert [job["task"] for job in await stored(client)] == ["a", "b"]
    assert len(answers) == 2


@pytest.mark.parametrize("body", [b"", b"\n\n"])
async def test_nothing_is_answered_with_nothing(
    client: httpx2.AsyncClient, enqueuer: MoodyEnqueuer, body: bytes
) -> None:
    assert lines_of(await client.post(BATCH, content=body, headers=NDJSON)) == []
    assert enqueuer.sets == []


async def test_a_bad_line_costs_only_itself(client: httpx2.AsyncClient) -> None:
    lines = [
        b'{"task":"a"}',
        b"not json",
        b"",
        b'{"task":"b","priority":101,"x/y":1}',
        b'{"task":"c","args":{"x":["\\u0000"]}}',
        b'{"task":"\xff"}',
        b"[" * 1_000,
        b'{"task":"d"}',
    ]
    answers = lines_of(await client.post(BATCH, content=b"\n".join(lines), headers=NDJSON))
    assert [job["task"] for job in await stored(client)] == ["a", "d"]
    assert [answer.get("line") for answer in answers] == [None, 2, 4, 5, 6, 7, None]
    found = [[error["pointer"] for error in answer["error"]["errors"]] for answer in answers if "error" in answer]
    assert found == [[""], ["/priority", "/x~1y"], ["/args/x/0"], ["/task"], ["/0" * 67]]
    assert [answer["error"]["status"] for answer in answers if "error" in answer] == [400, 422, 422, 400, 422]


@pytest.mark.parametrize("size", [1025, 50_000, 3_000_000])
async def test_a_line_that_is_too_long_is_not_held_and_costs_only_itself(client: httpx2.AsyncClient, size: int) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b'{"task":"a"}\n{"task":"'
        for _ in range(size // 1_000):
            yield b"x" * 1_000
        yield b"x" * (size % 1_000) + b'"}\n{"task":"b"}'

    answers = lines_of(await client.post(BATCH, content=body(), headers=NDJSON))
    assert [job["task"] for job in await stored(client)] == ["a", "b"]
    assert (answers[1]["error"]["type"], answers[1]["line"]) == ("/problems/too-large", 2)


async def test_a_line_of_just_the_limit_is_taken(client: httpx2.AsyncClient) -> None:
    line = b'{"task":"a"}'
    body = line.ljust(1024) + b"\n" + line.ljust(1025) + b"\n" + line.ljust(1024)
    assert ["id" in answer for answer in lines_of(await client.post(BATCH, content=body, headers=NDJSON))] == [
        True, False, True,
    ]  # fmt: skip


async def test_lines_may_be_cut_anywhere_on_their_way(client: httpx2.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        for byte in '{"task":"a"}\r\n\n{"task":"b","args":{"é":"𝄞"}}\n'.encode():
            yield bytes([byte])

    assert len(lines_of(await client.post(BATCH, content=body(), headers=NDJSON))) == 2
    assert [job["task"] for job in await stored(client)] == ["a", "b"]


async def test_when_the_database_goes_away_the_rest_is_told_and_what_is_committed_stays(
    store: Store, settings: Settings
) -> None:
    enqueuer = MoodyEnqueuer(store, fails_from=2)
    async with client_of(services_over(store, settings, enqueuer=enqueuer)) as client:
        body = b'{"task":"work"}\n' * 1_000 + b"nonsense\n" + b'{"task":"work"}\n' * 2_499
        answers = lines_of(await client.post(BATCH, content=body, headers=NDJSON))
        assert len(answers) == 3_500
        assert {job["id"] for job in await stored(client)} <= {answer["id"] for answer in answers[:1000]}
    assert [answer["error"]["type"].rpartition("/")[2] for answer in answers[1000:]] == ["malformed"] + [
        "unavailable"
    ] * 2_499
    assert all(answer["error"]["retryable"] for answer in answers[1001:])
    # Once it is away, it is not asked again for each of the chunks that follow.
    assert enqueuer.sets == [1000, 999]


async def test_one_value_that_postgres_refuses_costs_only_its_line(store: Store, settings: Settings) -> None:
    class Careless(PlainEnqueuer):
        async def enqueue(self, jobs: Sequence[NewJob]) -> list[Enqueued]:
            return await super().enqueue(
                [msgspec.structs.replace(job, task="\x00") if job.task == "bad" else job for job in jobs]
            )

    async with client_of(services_over(store, settings, enqueuer=Careless(store))) as client:
        body = b'{"task":"good"}\n' * 5 + b'{"task":"bad"}\n' + b'{"task":"good"}\n' * 7
        answers = lines_of(await client.post(BATCH, content=body, headers=NDJSON))
        assert len(await stored(client)) == 12
    assert [number for number, answer in enumerate(answers, 1) if "error" in answer] == [6]
    assert answers[5]["error"]["type"] == "/problems/unstorable"


async def test_an_overload_in_the_middle_is_told_like_weather(store: Store, settings: Settings) -> None:
    class Full(PlainEnqueuer):
        async def enqueue(self, jobs: Sequence[NewJob]) -> list[Enqueued]:
            raise Overloaded("full")

    async with client_of(services_over(store, settings, enqueuer=Full(store))) as client:
        [answer] = lines_of(await client.post(BATCH, content=b'{"task":"a"}', headers=NDJSON))
    assert (answer["error"]["type"], answer["line"]) == ("/problems/overloaded", 1)


async def test_a_chunk_is_bounded_in_bytes_too(
    client: httpx2.AsyncClient, enqueuer: MoodyEnqueuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "CHUNK_MAX_BYTES", 100)
    await client.post(BATCH, content=(b'{"task":"work"}'.ljust(50) + b"\n") * 5, headers=NDJSON)
    assert enqueuer.sets == [2, 2, 1]


async def test_answers_that_outgrow_memory_go_to_a_file(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clarion.api.batch.SPOOL_MEMORY_BYTES", 100)
    answers = lines_of(await client.post(BATCH, content=b'{"task":"work"}\n' * 3_000, headers=NDJSON))
    assert len({answer["id"] for answer in answers}) == 3_000
