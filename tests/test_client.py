"""The Python clients: what they send, what they make of answers, and how they bear weather."""

import pickle
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from math import inf, nan
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx2
import msgspec
import pytest

from api_harness import claim, finish, listening, services_over
from clarion.api import representations
from clarion.api.app import create_app
from clarion.api.schemas import JobIn
from clarion.api.services import Services
from clarion.client import (
    ApiError,
    AsyncClient,
    Client,
    ClientOptions,
    IdempotencyMismatch,
    IllegalTransition,
    Invalid,
    JobCancelled,
    JobDead,
    JobOptions,
    JobRequest,
    NotFound,
    ServerUnavailable,
    Unauthenticated,
    UnexpectedResult,
    Unreachable,
    views,
)
from clarion.client.calls import BATCH_MAX_BYTES, Calls, in_batches
from clarion.client.errors import error_of, read_problem
from clarion.client.exchange import Answer, Ask, Done, Flow, Lost, Pause, Reply, Step, advance
from clarion.client.options import DEFAULT_URL, find_server
from clarion.errors import Problem, UsageError, problems
from clarion.execution import Failure
from clarion.job import DeadReason
from clarion.job_request import encode_request
from clarion.settings import Settings
from clarion.store import Store

URL = "http://clarion"
JOB_ID = UUID("01990000-0000-7000-8000-000000000000")
CALLS = Calls(URL, ClientOptions(retry_seconds=10.0, wait_seconds=20.0))
HASTY = Calls(URL, ClientOptions(retry_seconds=0.0))
AWAY = Lost("ConnectError: refused")


class Receipt(msgspec.Struct, frozen=True):
    """What some handler returns."""

    sent_at: datetime
    copies: dict[int, str]


@pytest.fixture
async def clarion(services: Services) -> AsyncIterator[AsyncClient]:
    """A client of the real API, in process."""
    async with AsyncClient(URL, transport=httpx2.ASGITransport(create_app(services))) as client:
        yield client


# -- Against the API


async def test_a_job_is_enqueued_by_the_name_of_its_task(clarion: AsyncClient) -> None:
    handle = await clarion.enqueue(
        "email.send", {"to": "ada"}, queue="mail", priority=3, delay=timedelta(hours=1), timeout="1.5m"
    )
    job = await handle.refresh()
    assert (job.id, job.task, job.queue, job.args) == (handle.id, "email.send", "mail", {"to": "ada"})
    assert (job.state, job.priority, job.timeout) == ("scheduled", 3, 90.0)
    assert job.run_at - job.created_at == timedelta(hours=1)


async def test_options_of_the_call_win_over_those_of_the_request(clarion: AsyncClient) -> None:
    request = JobRequest[None]("work", {}, {"queue": "mail", "priority": 3})
    job = await (await clarion.enqueue(request, priority=4)).refresh()
    assert (job.queue, job.priority) == ("mail", 4)
    assert request.options == {"queue": "mail", "priority": 3}


async def test_arguments_may_be_anything_that_json_can_express(clarion: AsyncClient) -> None:
    moment = datetime(2026, 1, 31, tzinfo=UTC)
    job = await (await clarion.enqueue("work", {"at": moment, "id": JOB_ID, "receipt": Receipt(moment, {})})).refresh()
    assert job.args == {
        "at": "2026-01-31T00:00:00Z",
        "id": str(JOB_ID),
        "receipt": {"sent_at": "2026-01-31T00:00:00Z", "copies": {}},
    }


async def test_a_result_is_read_as_what_the_handler_returns(
    clarion: AsyncClient, store: Store, worker_id: UUID
) -> None:
    receipt = Receipt(datetime(2026, 1, 31, tzinfo=UTC), {1: "ada"})
    handle = await clarion.enqueue(JobRequest[Receipt]("work", result_type=Receipt))
    await finish(store, worker_id, result=msgspec.json.encode(receipt).decode())
    assert await handle.result() == receipt
    assert await handle.result(type=dict[str, Any]) == {"sent_at": "2026-01-31T00:00:00Z", "copies": {"1": "ada"}}
    with pytest.raises(UnexpectedResult, match=r"cannot be read as .*int.*got `object`"):
        await handle.result(type=int)


async def test_a_result_is_waited_for(clarion: AsyncClient, services: Services, store: Store, worker_id: UUID) -> None:
    handle = await clarion.enqueue("work")
    results = []

    async def wait() -> None:
        results.append(await handle.result(timeout="30s"))

    async with anyio.create_task_group() as group:
        group.start_soon(services.waits.run)
        async with anyio.create_task_group() as waiting:
            waiting.start_soon(wait)
            while services.waits.waiting != 1:
                await anyio.lowlevel.checkpoint()
            await finish(store, worker_id, result="[7]")
        group.cancel_scope.cancel()
    assert results == [[7]]


async def test_a_result_that_does_not_come_in_time_is_a_timeout(clarion: AsyncClient) -> None:
    handle = await clarion.enqueue("work")
    with pytest.raises(TimeoutError, match=rf"job {handle.id} \(work\) was still ready after 0"):
        await handle.result(timeout=0)


async def test_a_dead_job_has_a_reason_and_an_error_instead_of_a_result(
    clarion: AsyncClient, store: Store, worker_id: UUID
) -> None:
    handle = await clarion.enqueue("work")
    lease = await claim(store, worker_id)
    reason = DeadReason.NOT_RETRYABLE
    failure = Failure(id=lease.id, token=lease.token, error_type="E", error_message="no", dead_reason=reason)
    await store.fail_jobs([failure])
    with pytest.raises(JobDead, match="is dead: not_retryable; its latest error is E: no") as caught:
        await handle.result()
    assert (caught.value.reason, caught.value.error) == (reason, views.ErrorView("E", "no"))
    assert caught.value.job == await handle.refresh()


async def test_a_retry_whose_answer_was_lost_is_done_once(services: Services, store: Store, worker_id: UUID) -> None:
    class Losing(httpx2.ASGITransport):
        """Carries out the first retry, and loses its answer after the job has died again."""

        lost = False

        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            response = await super().handle_async_request(request)
            if request.url.path.endswith("/retry") and not self.lost:
                self.lost = True
                await die()
                raise httpx2.ReadError("cut off")
            return response

    async def die() -> None:
        lease = await claim(store, worker_id)
        reason = DeadReason.NOT_RETRYABLE
        failure = Failure(id=lease.id, token=lease.token, error_type="E", error_message="no", dead_reason=reason)
        await store.fail_jobs([failure])

    async with AsyncClient(URL, transport=Losing(create_app(services))) as client:
        handle = await client.enqueue("work")
        await die()
        job = await client.retry(handle.id)
    assert (job.state, job.generation) == ("dead", 2)


async def test_many_jobs_are_enqueued_in_order_and_listed_newest_first(clarion: AsyncClient) -> None:
    handles = await clarion.enqueue_many((JobRequest[None]("work", {"n": n}) for n in range(250)), queue="mail")
    listed = [job async for job in clarion.list(queue="mail", created_after=datetime(2026, 1, 1, tzinfo=UTC))]
    assert [job.id for job in listed] == [handle.id for handle in reversed(handles)]
    assert [job async for job in clarion.list(state="dead")] == []


async def test_a_refused_request_names_every_field(clarion: AsyncClient) -> None:
    with pytest.raises(Invalid, match=r"Invalid request: /priority: .*\(HTTP 422, request ") as caught:
        await clarion.enqueue("work", priority=101, timeout="soon")
    assert [error.pointer for error in caught.value.errors] == ["/priority", "/timeout"]
    assert (caught.value.type, caught.value.retryable) == ("/problems/invalid", False)


@pytest.mark.parametrize("job_id", [uuid4(), "../workers", "a/b?c"])
async def test_a_job_that_is_not_there_is_not_found(clarion: AsyncClient, job_id: UUID | str) -> None:
    with pytest.raises(NotFound):
        await clarion.get(job_id)


async def test_the_token_is_sent_and_asked_for(store: Store, settings: Settings) -> None:
    transport = httpx2.ASGITransport(create_app(services_over(store, settings, api_token="sécret")))  # noqa: S106  not one
    async with AsyncClient(URL, " sécret\n", transport=transport) as client:
        await client.enqueue("work")
    async with AsyncClient(URL, "", transport=transport) as client:
        with pytest.raises(Unauthenticated, match=r"give the client the server's token.* CLARION_API_TOKEN"):
            await client.enqueue("work")


async def test_the_synchronous_client_does_the_same(services: Services, store: Store, worker_id: UUID) -> None:
    def use(port: int, finish_it: Callable[[], object]) -> None:
        with Client(f"http://127.0.0.1:{port}/") as client:
            handle = client.enqueue(JobRequest[Receipt]("work", {"n": 1}, result_type=Receipt))
            finish_it()
            assert handle.result(timeout="30s") == Receipt(datetime(2026, 1, 31, tzinfo=UTC), {})
            assert (handle.refresh().state, client.get(str(handle.id)).args) == ("succeeded", {"n": 1})
            many = client.enqueue_many([JobRequest[None]("more")] * 101)
            assert [job.id for job in client.list(task="more")] == [handle.id for handle in reversed(many)]
            with pytest.raises(TimeoutError):
                many[0].result(timeout="10ms")
            with pytest.raises(NotFound):
                client.handle(str(uuid4())).result()

    result = '{"sent_at": "2026-01-31T00:00:00Z", "copies": {}}'
    finishing = partial(anyio.from_thread.run, partial(finish, store, worker_id, result=result))
    async with listening(services) as port:
        await anyio.to_thread.run_sync(use, port, finishing)


# -- Against a script, step by step


def play(flow: Flow[Any], *replies: Reply) -> tuple[Any, list[Step]]:
    """What comes of a call that gets these replies, be it an error, and the steps that it took."""
    script = iter(replies)
    steps: list[Step] = []
    try:
        step = advance(flow, None)
        while not isinstance(step, Done):
            steps.append(step)
            step = advance(flow, next(script) if isinstance(step, Ask) else None)
    except (ApiError, Unreachable, JobCancelled, TimeoutError) as error:
        return error, steps
    assert next(script, None) is None, "not every reply was asked for"
    return step.value, steps


def answer(status: int, document: Any, **headers: str) -> Answer:
    return Answer(
        status, {name.replace("_", "-"): value for name, value in headers.items()}, msgspec.json.encode(document)
    )


def refusal(slug: str, **more: Any) -> Answer:
    [known] = [problem for problem in problems() if problem.slug == slug]
    return (
        answer(known.status, document_of(known) | more, retry_after="1")
        if known.retryable
        else answer(known.status, document_of(known) | more)
    )


def document_of(problem: Problem) -> dict[str, Any]:
    return {
        "type": f"/problems/{problem.slug}",
        "title": problem.title,
        "status": problem.status,
        "detail": "so it is",
        "instance": "/v1/jobs",
        "request_id": "r1",
        "retryable": problem.retryable,
        "errors": [],
    }


def job(**fields: Any) -> Answer:
    moment = "2026-01-31T00:00:00Z"
    known = {
        "id": str(JOB_ID), "queue": "default", "task": "work", "state": "ready", "priority": 0, "attempt": 0,
        "max_attempts": None, "errors": 0, "crashes": 0, "snoozes": 0, "created_at": moment, "run_at": moment,
        "started_at": None, "finished_at": None, "timeout": None, "worker": None, "dead_reason": None, "args": {},
        "result": None, "error": None, "invented_tomorrow": 1,
    }  # fmt: skip
    return answer(200, known | fields)


def asks(steps: list[Step]) -> list[Ask]:
    return [step for step in steps if isinstance(step, Ask)]


def bodies(steps: list[Step]) -> list[Any]:
    return [msgspec.json.decode(ask.body or b"null") for ask in asks(steps)]


def test_an_enqueue_is_repeated_with_the_key_that_it_had() -> None:
    enqueued, steps = play(CALLS.enqueue(JobRequest("work")), AWAY, refusal("unavailable"), job())
    assert enqueued.id == JOB_ID
    assert [type(step) for step in steps] == [Ask, Pause, Ask, Pause, Ask]
    first, second, third = bodies(steps)
    assert first == second == third == {"task": "work", "args": {}, "idempotency_key": first["idempotency_key"]}
    assert UUID(first["idempotency_key"]).version == 4


def test_two_enqueues_have_two_keys_and_a_given_one_is_kept() -> None:
    keys = [
        bodies(play(CALLS.enqueue(request), job())[1])[0]["idempotency_key"]
        for request in (
            JobRequest("work"),
            JobRequest("work"),
            JobRequest[Any]("work", {}, {"idempotency_key": "mine"}),
        )
    ]
    assert keys[2] == "mine"
    assert len(set(keys)) == 3


def test_a_key_that_is_none_is_none_given() -> None:
    options = JobOptions(idempotency_key=None, delay=None)  # type: ignore[typeddict-item]
    _, steps = play(CALLS.enqueue(JobRequest("work", {}, options)), AWAY, job())
    first, second = bodies(steps)
    assert first == second == {"task": "work", "args": {}, "idempotency_key": first["idempotency_key"]}
    assert UUID(first["idempotency_key"]).version == 4


def test_a_pause_is_as_long_as_the_server_asks_for_and_never_the_same() -> None:
    def pause() -> float:
        busy = answer(503, {}, retry_after="7")
        return next(step.seconds for step in play(CALLS.get_job(JOB_ID), busy, job())[1] if isinstance(step, Pause))

    first, second = pause(), pause()
    assert first != second
    assert all(7 < seconds < 8 for seconds in (first, second))


@pytest.mark.parametrize(("least_seconds", "repeats"), [("9", 1), ("11", 0)])
def test_repeats_are_bounded_in_time(least_seconds: str, repeats: int) -> None:
    busy = answer(503, {}, retry_after=least_seconds)
    found, steps = play(CALLS.get_job(JOB_ID), busy, *[job()] * repeats)
    assert isinstance(found, ServerUnavailable if not repeats else views.JobView)
    assert len(asks(steps)) == 1 + repeats


def test_a_result_is_not_waited_for_beyond_its_timeout_while_nobody_answers() -> None:
    error, steps = play(CALLS.result(JOB_ID, "500ms", Any), answer(503, {}, retry_after="1"))
    assert isinstance(error, TimeoutError)
    assert isinstance(error.__cause__, ServerUnavailable)
    assert len(steps) == 1


def test_a_server_that_is_away_for_longer_than_a_client_tries_is_no_timeout() -> None:
    options = ClientOptions(retry_seconds=0.0)
    error, _ = play(Calls(URL, options).result(JOB_ID, "1h", Any), AWAY)
    assert isinstance(error, Unreachable)


async def test_a_result_is_not_waited_for_beyond_its_timeout_while_the_server_hangs() -> None:
    def hang(request: httpx2.Request) -> httpx2.Response:
        seconds.append(request.extensions["timeout"])
        raise httpx2.ReadTimeout("")

    seconds: list[dict[str, float]] = []
    async with AsyncClient(URL, transport=httpx2.MockTransport(hang)) as client:
        with pytest.raises(TimeoutError, match=r"in time: no answer from Clarion .* ReadTimeout"):
            await client.handle(JOB_ID).result(timeout="10ms")
    assert 1 <= max(seconds[0].values()) <= 1.01


@pytest.mark.parametrize("slug", ["invalid", "not-found", "idempotency-mismatch", "illegal-transition", "internal"])
def test_what_no_repeat_can_help_is_not_repeated(slug: str) -> None:
    error, steps = play(CALLS.cancel(JOB_ID, None), refusal(slug))
    assert isinstance(error, ApiError)
    assert (error.type, len(steps)) == (f"/problems/{slug}", 1)


def test_another_enqueue_with_the_key_in_flight_is_waited_for() -> None:
    enqueued, _ = play(CALLS.enqueue(JobRequest("work")), refusal("idempotency-in-flight"), job())
    assert enqueued.id == JOB_ID


def test_a_result_is_asked_for_until_it_is_there() -> None:
    result, steps = play(
        CALLS.result(JOB_ID, None, Any),
        job(state="ready"),
        AWAY,
        job(state="running"),
        job(state="succeeded", result=7),
    )
    assert result == 7
    assert {ask.query["wait"] for ask in asks(steps)} == {"20.000s"}
    # The server answered long before the wait was over, as one does that is about to stop: it is not hurried.
    assert [type(step) for step in steps] == [Ask, Pause, Ask, Pause, Ask, Pause, Ask]


def test_a_wait_is_no_longer_than_what_is_left_of_the_timeout() -> None:
    _, steps = play(CALLS.result(JOB_ID, timedelta(seconds=5), Any), job(state="succeeded"))
    (ask,) = asks(steps)
    assert 4 < float(ask.query["wait"].removesuffix("s")) <= 5
    assert 5 < ask.timeout_seconds <= 6


def test_a_cancelled_job_has_no_result() -> None:
    error, _ = play(CALLS.result(JOB_ID, None, Any), job(state="cancelled"))
    assert isinstance(error, JobCancelled)
    assert (error.job.id, str(error)) == (JOB_ID, f"job {JOB_ID} (work) is cancelled")


def test_a_batch_is_split_and_every_job_of_it_has_a_key() -> None:
    def refs(count: int) -> Answer:
        ref = {"id": str(JOB_ID), "state": "ready", "run_at": "2026-01-31T00:00:00Z"}
        return answer(201, {"jobs": [ref] * count})

    enqueued, steps = play(
        CALLS.enqueue_many(JobRequest("work", {"n": n}) for n in range(2_100)),
        refs(1_000),
        AWAY,
        refs(1_000),
        refs(100),
    )
    assert len(enqueued) == 2_100
    first, lost, again, last = [body["jobs"] for body in bodies(steps)]
    assert lost == again
    sent = [*first, *again, *last]
    assert [one["args"]["n"] for one in sent] == list(range(2_100))
    assert len({one["idempotency_key"] for one in sent}) == 2_100


def test_a_batch_of_large_jobs_is_split_by_its_bytes() -> None:
    large = b"x" * (BATCH_MAX_BYTES // 2)
    assert [len(batch) for batch in in_batches([large, b"x", large, large + large, b"x"])] == [2, 1, 1, 1]


def test_cancel_and_retry_say_why() -> None:
    _, cancelling = play(CALLS.cancel(JOB_ID, "typo"), AWAY, job(state="cancelled"))
    _, retrying = play(CALLS.retry(JOB_ID, "fixed"), job(), job())
    assert [(ask.method, ask.path) for ask in asks(cancelling + retrying)] == [
        ("POST", f"/v1/jobs/{JOB_ID}/cancel"),
        ("POST", f"/v1/jobs/{JOB_ID}/cancel"),
        ("GET", f"/v1/jobs/{JOB_ID}"),
        ("POST", f"/v1/jobs/{JOB_ID}/retry"),
    ]
    assert bodies(cancelling + retrying) == [{"reason": "typo"}] * 2 + [None, {"reason": "fixed", "generation": 1}]


def test_a_retry_is_repeated_for_the_generation_that_was_read_first() -> None:
    dead, again = job(state="dead", generation=7), job(state="ready", generation=8)
    retried, steps = play(CALLS.retry(JOB_ID, None), dead, AWAY, refusal("unavailable"), again)
    assert (retried.state, retried.generation) == ("ready", 8)
    assert bodies(steps) == [None, *[{"generation": 7}] * 3]


def test_attempts_and_timeline_are_read() -> None:
    moment = "2026-01-31T00:00:00Z"
    error = {"type": "E", "message": "no", "trace": "…"}
    attempt = {"attempt": 1, "generation": 1, "outcome": "failed", "state": "scheduled", "error": error}
    entry = {"at": moment, "event": "retried", "actor": "api:ada", "state": "ready", "generation": 2, "detail": None}
    found, _ = play(CALLS.attempts(JOB_ID), answer(200, {"attempts": [attempt], "timeline": [entry]}))
    assert found.attempts[0].error == views.ErrorView("E", "no", "…")
    assert (found.timeline[0].event, found.timeline[0].actor) == ("retried", "api:ada")


def test_log_lines_are_read_page_after_page() -> None:
    def page(*numbers: int, cursor: Any) -> Answer:
        known = {"at": "2026-01-31T00:00:00Z", "generation": 1, "attempt": 1, "level": "info", "fields": None}
        lines = [known | {"id": n, "n": n, "message": f"line {n}"} for n in numbers]
        return answer(200, {"lines": lines, "dropped": 5, "next_cursor": cursor})

    logs, steps = play(CALLS.logs(JOB_ID, None), page(1, 2, cursor="c2"), page(3, cursor=None))
    assert ([line.message for line in logs.lines], logs.dropped) == (["line 1", "line 2", "line 3"], 5)
    assert [dict(ask.query) for ask in asks(steps)] == [{}, {"after": "c2"}]


@pytest.mark.parametrize("number", ["1e400", "-1e400", "9" * 400, "0.5"])
def test_numbers_of_a_payload_may_be_beyond_what_a_float_can_hold(number: str) -> None:
    payload = msgspec.Raw(f'{{"n":{number}}}'.encode())
    fields = {"args": payload, "result": payload, "checkpoint": payload}
    found, _ = play(CALLS.get_job(JOB_ID), job(state="succeeded", timeout=1.5, **fields))
    assert found.args == found.result == found.checkpoint == {"n": Decimal(number)}
    assert (type(found.args["n"]) is float, found.timeout) == (number == "0.5", 1.5)


# -- Errors


def test_each_problem_has_an_exception_that_says_all_of_it() -> None:
    error, _ = play(CALLS.cancel(JOB_ID, None), refusal("illegal-transition", state="succeeded"))
    assert isinstance(error, IllegalTransition)
    assert str(error) == "Illegal transition: so it is (HTTP 409, request r1)"
    assert (error.status, error.title, error.detail, error.state) == (
        409,
        "Illegal transition",
        "so it is",
        "succeeded",
    )
    mismatch, _ = play(CALLS.cancel(JOB_ID, None), refusal("idempotency-mismatch", errors=[{"detail": "differs"}]))
    assert isinstance(mismatch, IdempotencyMismatch)
    assert [field.detail for field in mismatch.errors] == ["differs"]


def test_the_answer_of_somebody_else_is_told_as_what_it_is() -> None:
    error, _ = play(HASTY.get_job(JOB_ID), Answer(502, {}, b"<h1>Bad\n gateway</h1>"))
    assert str(error) == "Not an answer of Clarion's: <h1>Bad gateway</h1> (HTTP 502)"
    assert error.retryable
    error, steps = play(CALLS.get_job(JOB_ID), Answer(200, {}, b"<h1>Hello</h1>"))
    assert "what answers at http://clarion is not Clarion's API" in str(error)
    assert len(steps) == 1


async def test_a_server_that_is_not_there_is_named_with_what_to_do() -> None:
    async with AsyncClient("http://127.0.0.1:1", options=ClientOptions(retry_seconds=0)) as client:
        with pytest.raises(Unreachable, match=r"at http://127.0.0.1:1: .*`clarion serve`.* CLARION_URL"):
            await client.get(JOB_ID)


async def test_no_answer_names_what_the_transport_met() -> None:
    def refuse(request: httpx2.Request) -> httpx2.Response:
        raise refused

    refused = httpx2.ConnectError("refused")
    options = ClientOptions(retry_seconds=0)
    async with AsyncClient(URL, options=options, transport=httpx2.MockTransport(refuse)) as client:
        with pytest.raises(Unreachable) as caught:
            await client.get(JOB_ID)
    assert caught.value.__cause__ is refused


async def test_what_http_cannot_express_is_no_weather() -> None:
    def refuse(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        raise httpx2.LocalProtocolError("Illegal header value")

    sent: list[httpx2.Request] = []
    async with AsyncClient(URL, transport=httpx2.MockTransport(refuse)) as client:
        with pytest.raises(UsageError, match="Illegal header value"):
            await client.get(JOB_ID)
    assert len(sent) == 1


async def test_a_client_waits_and_sends_again() -> None:
    sent: list[httpx2.Request] = []

    def answer_the_second(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        if len(sent) == 1:
            raise httpx2.ReadError("cut off")
        return httpx2.Response(200, content=job().body)

    options = ClientOptions(actor="Jörg")
    async with AsyncClient(URL, "secret", options=options, transport=httpx2.MockTransport(answer_the_second)) as client:
        assert (await client.cancel(JOB_ID)).id == JOB_ID
    assert [request.headers.raw for request in sent] == [sent[0].headers.raw] * 2
    headers = dict(sent[0].headers.raw)
    assert (headers[b"authorization"], headers[b"x-clarion-actor"]) == (b"Bearer secret", "Jörg".encode("latin-1"))


def test_exceptions_survive_pickling() -> None:
    found: list[Exception] = [play(CALLS.result(JOB_ID, None, Any), job(state="cancelled"))[0]]
    found += [play(HASTY.get_job(JOB_ID), reply)[0] for reply in (refusal("not-found"), AWAY)]
    for error in found:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301  our own
        assert (type(copy), str(copy)) == (type(error), str(error))


# -- What is written twice is the same


def test_a_view_has_the_fields_that_the_api_answers_with() -> None:
    for view, out in [
        (views.JobView, representations.JobOut),
        (views.JobSummaryView, representations.JobSummaryOut),
        (views.JobRef, representations.JobRef),
        (views.JobPage, representations.JobListOut),
    ]:
        assert set(view.__struct_fields__) == set(out.__struct_fields__)


def test_an_enqueue_may_say_all_that_the_api_takes() -> None:
    assert {"task", "args", *JobOptions.__annotations__} == set(JobIn.__struct_fields__)


def test_every_problem_becomes_an_error_of_the_api() -> None:
    for problem in problems():
        error = error_of(read_problem(problem.status, msgspec.json.encode(document_of(problem)), ""))
        assert error.type == f"/problems/{problem.slug}"
        assert error.problem.slug in {problem.slug, "internal", "unavailable"}


# -- Requests and settings


def test_arguments_that_json_cannot_express_are_refused() -> None:
    with pytest.raises(TypeError, match="unsupported"):
        encode_request(JobRequest("work", {"what": object()}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_request(JobRequest("work", {"how_much": float("nan")}))
    assert msgspec.json.decode(encode_request(JobRequest("work", {"nothing": None})))["args"] == {"nothing": None}


@pytest.mark.parametrize(("name", "value"), [("delay", inf), ("timeout", nan), ("backoff", -inf)])
def test_an_option_that_json_cannot_express_is_refused_by_name(name: Any, value: float) -> None:
    with pytest.raises(ValueError, match=f"option {name} is {value}"):
        encode_request(JobRequest("work", {}, {name: value}))  # type: ignore[misc]


async def test_a_request_takes_no_other_arguments(clarion: AsyncClient) -> None:
    with pytest.raises(TypeError, match="has its arguments already"):
        await clarion.enqueue(JobRequest[None]("work"), {"n": 1})  # type: ignore[call-overload]


def test_the_address_comes_from_the_call_or_the_environment() -> None:
    environ = {"CLARION_URL": "https://jobs.example.org/clarion/", "CLARION_API_TOKEN": "secret\n"}
    assert msgspec.structs.astuple(find_server(None, None, environ)) == ("https://jobs.example.org/clarion", "secret")
    assert msgspec.structs.astuple(find_server("http://[::1]:80", "", environ)) == ("http://[::1]:80", "")
    assert find_server(None, None, {}).url == DEFAULT_URL


@pytest.mark.parametrize("url", ["localhost:8080", "/v1", "ftp://x", "http://", "http://x?y=1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="CLARION_URL"):
        AsyncClient(url)


def test_a_token_that_no_header_can_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="CLARION_API_TOKEN"):
        Client(URL, "two\nlines")


@pytest.mark.parametrize("actor", ["a\x00b", "a\x1bb", "a\x7fb"])
def test_an_actor_that_no_header_can_hold_is_refused(actor: str) -> None:
    with pytest.raises(UsageError, match="actor"):
        AsyncClient(URL, options=ClientOptions(actor=actor))
