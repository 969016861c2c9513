"""What becomes of a job when a handler does this or that; the worker runs in this process, on a real database."""

import asyncio
import functools
import math
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Annotated, Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
from msgspec import Meta

from clarion.db import Database
from clarion.job import Job, NewJob
from clarion.settings import Settings
from clarion_worker import Context, Discard, Snooze, Worker
from running import Client, client, in_one_task, running_worker

worker = Worker()
seen: list[Any] = []


@dataclass
class Address:
    street: str
    number: int


@worker.task("greet", queue="greetings")
async def greet(name: str, times: Annotated[int, Meta(ge=1)] = 1, *, ctx: Context) -> dict[str, Any]:
    return {"greeting": f"hello {name}" * times, "attempt": ctx.attempt}


@worker.task("address")
async def address(to: Address, extra: list[int] | None = None) -> str:
    return f"{to.street} {to.number} {extra}"


@worker.task("anything")
async def anything(**values: object) -> dict[str, object]:
    return values


@worker.task("sync")
def sync(*, ctx: Context) -> bool:
    return threading.current_thread() is not threading.main_thread()


@worker.task("fail", max_attempts=2, backoff="1s")
async def fail(message: str = "no luck") -> None:
    raise RuntimeError(message)


@worker.task("discard")
async def discard() -> None:
    raise Discard("it never will")


@worker.task("snooze-once")
async def snooze_once(*, ctx: Context) -> int:
    if not seen:
        seen.append("snoozed")
        raise Snooze("50ms")
    return ctx.attempt


@worker.task("slow", timeout="100ms", max_attempts=1)
async def slow() -> None:
    await anyio.sleep_forever()


@worker.task("cancels-itself", max_attempts=1)
async def cancels_itself() -> None:
    raise anyio.get_cancelled_exc_class()


@worker.task("exits", max_attempts=1)
async def exits() -> None:
    raise SystemExit(3)


class Panic(BaseException):
    """As a library written in another language may raise."""


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit(7)


class Nowhere(tzinfo):
    """A time zone that knows nothing."""

    def utcoffset(self, _moment: datetime | None) -> None:
        raise KeyError("nowhere")

    def dst(self, _moment: datetime | None) -> None:
        raise KeyError("nowhere")

    def tzname(self, _moment: datetime | None) -> None:
        raise KeyError("nowhere")


@dataclass
class Picky:
    number: int

    def __post_init__(self) -> None:
        raise KeyError("never satisfied")


@worker.task("panics", max_attempts=1)
async def panics() -> None:
    raise Panic("in another language")


@worker.task("unprintable", max_attempts=1)
async def unprintable() -> None:
    raise Unprintable


@worker.task("picky", max_attempts=1)
async def picky(value: Picky) -> None: ...


@worker.task("cancels-its-task", max_attempts=1)
async def cancels_its_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await anyio.lowlevel.checkpoint()


@worker.task("swallows-a-cancel", max_attempts=1, timeout="100ms")
async def swallows_a_cancel() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    with suppress(asyncio.CancelledError):
        await anyio.lowlevel.checkpoint()
    await anyio.sleep_forever()


@worker.task("raises-when-ended", max_attempts=1, timeout="50ms")
async def raises_when_ended() -> None:
    try:
        await anyio.sleep_forever()
    finally:
        raise RuntimeError("while cleaning up")


@worker.task("wrapped")
@functools.wraps(anything.handler)
def wrapped(**values: object) -> Any:
    return anything(**values)


@worker.task("slow-behind-a-decorator", max_attempts=1, timeout="50ms")
@functools.wraps(slow.handler)
def slow_behind_a_decorator() -> Any:
    return slow()


@worker.task("result")
async def result(kind: str) -> object:
    return {
        "nan": math.nan,
        "inside": {"deep": [math.inf, None]},
        "nul": "a\x00b",
        "escaped": "a\\u0000b",
        "surrogate": "\ud800",
        "object": object(),
        "raw": {"a": msgspec.Raw(b"null")},
        "clock": {"at": datetime(2026, 1, 1, tzinfo=Nowhere())},
        "large": "x" * 2_000_000,
        "null": {"nothing": None, "number": 1.5},
        "none": None,
    }[kind]


@asynccontextmanager
async def at_work(settings: Settings) -> AsyncIterator[Client]:
    async with client(settings) as clients, running_worker(worker, settings):
        yield clients


@pytest.fixture
async def jobs(database: Database, settings: Settings) -> AsyncIterator[Client]:
    """A client, with a worker of the tasks above running."""
    seen.clear()
    async with in_one_task(at_work(settings)) as clients:
        yield clients


async def test_a_handler_gets_its_arguments_and_its_result_is_stored(jobs: Client) -> None:
    job = await jobs.run(NewJob(task="greet", queue="greetings", args='{"name": "Ada", "times": 2}'))
    assert (job.state, job.result) == ("succeeded", '{"greeting":"hello Adahello Ada","attempt":1}')


async def test_arguments_are_converted_to_the_types_of_the_signature(jobs: Client) -> None:
    job = await jobs.run(NewJob(task="address", args='{"to": {"street": "Main", "number": 5}}'))
    assert job.result == '"Main 5 None"'


async def test_a_handler_with_keyword_arguments_takes_any_payload(jobs: Client) -> None:
    job = await jobs.run(NewJob(task="anything", args='{"a": [1, {"b": null}]}'))
    assert job.result == '{"a":[1,{"b":null}]}'


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ("{}", "missing required field `name`"),
        ('{"name": 5}', "Expected `str`"),
        ('{"name": "Ada", "times": 0}', "Expected `int` >= 1"),
        ('{"name": "Ada", "nmae": 1}', "unknown field `nmae`"),
    ],
)
async def test_a_payload_that_does_not_fit_is_dead_at_once_with_the_reason(
    jobs: Client, args: str, complaint: str
) -> None:
    job = await jobs.run(NewJob(task="greet", queue="greetings", args=args))
    assert (job.state, job.dead_reason, job.attempt) == ("dead", "undecodable_payload", 1)
    assert complaint in str(job.error_message)


async def test_a_type_that_refuses_its_value_makes_the_payload_unfit(jobs: Client) -> None:
    job = await jobs.run(NewJob(task="picky", args='{"value": {"number": 1}}'))
    assert (job.state, job.dead_reason) == ("dead", "undecodable_payload")


async def test_an_async_handler_behind_a_plain_decorator_runs(jobs: Client) -> None:
    job = await jobs.run(NewJob(task="wrapped", args='{"a": 1}'))
    assert job.result == '{"a":1}'


async def test_a_sync_handler_runs_in_a_thread(jobs: Client) -> None:
    job = await jobs.run(NewJob(task="sync"))
    assert job.result == "true"


async def test_a_failing_job_is_retried_after_its_backoff_and_dead_after_its_attempts(jobs: Client) -> None:
    (job_id,) = await jobs.enqueue(NewJob(task="fail"))
    waiting = await jobs.until(job_id, lambda job: job.errors == 1)
    assert waiting.state == "scheduled"
    await jobs.database.fetch("update clarion.jobs set run_at = now() where id = $1", job_id)
    job = await jobs.final(job_id)
    assert (job.state, job.dead_reason, job.attempt, job.errors) == ("dead", "attempts_exhausted", 2, 2)
    assert (job.error_type, job.error_message) == ("RuntimeError", "no luck")


async def test_an_error_that_postgres_cannot_store_is_stored_cleaned(jobs: Client) -> None:
    job = await jobs.run(NewJob(task="fail", args=r'{"message": "a\u0000b"}', max_attempts=1))
    assert job.error_message == "a\N{REPLACEMENT CHARACTER}b"


async def test_a_discarded_job_is_dead_at_once(jobs: Client) -> None:
    job = await jobs.run(NewJob(task="discard"))
    assert (job.state, job.dead_reason, job.error_message) == ("dead", "not_retryable", "it never will")


async def test_a_snoozed_job_runs_again_and_is_charged_nothing(jobs: Client) -> None:
    job = await jobs.run(NewJob(task="snooze-once"))
    assert (job.state, job.result, job.snoozes, job.errors) == ("succeeded", "1", 1, 0)


async def test_an_attempt_is_ended_at_its_timeout(jobs: Client) -> None:
    job = await jobs.run(NewJob(task="slow"))
    assert (job.state, job.error_type, job.crashes) == ("dead", "AttemptTimeout", 0)


@pytest.mark.parametrize(
    ("task", "error_type"),
    [
        ("cancels-itself", "CancelledError"),
        ("cancels-its-task", "CancelledError"),
        ("swallows-a-cancel", "AttemptTimeout"),
        ("raises-when-ended", "AttemptTimeout"),
        ("slow-behind-a-decorator", "AttemptTimeout"),
        ("exits", "SystemExit"),
        ("panics", "Panic"),
        ("unprintable", "Unprintable"),
    ],
)
async def test_a_handler_cannot_take_its_slot_or_the_worker_down(jobs: Client, task: str, error_type: str) -> None:
    dead = await jobs.run(NewJob(task=task))
    assert (dead.state, dead.error_type) == ("dead", error_type)
    assert (await jobs.run(NewJob(task="anything"))).state == "succeeded"


@pytest.mark.parametrize("kind", ["nan", "inside", "nul", "surrogate", "object", "large", "raw", "clock"])
async def test_a_result_that_cannot_be_stored_is_dead_as_such(jobs: Client, kind: str) -> None:
    job = await jobs.run(NewJob(task="result", args=f'{{"kind": "{kind}"}}'))
    assert (job.state, job.dead_reason) == ("dead", "result_unstorable")


@pytest.mark.parametrize(
    ("kind", "stored"), [("escaped", r'"a\\u0000b"'), ("null", '{"nothing":null,"number":1.5}'), ("none", None)]
)
async def test_a_result_that_only_looks_unstorable_is_stored(jobs: Client, kind: str, stored: str | None) -> None:
    job = await jobs.run(NewJob(task="result", args=f'{{"kind": "{kind}"}}'))
    assert (job.state, job.result) == ("succeeded", stored)


async def test_a_job_of_an_unknown_task_waits_for_a_worker_that_has_it(jobs: Client) -> None:
    (job_id,) = await jobs.enqueue(NewJob(task="of-another-worker"))
    assert (await jobs.run(NewJob(task="anything"))).state == "succeeded"
    job = await jobs.store.get_job(job_id)
    assert isinstance(job, Job)
    assert (job.state, job.attempt) == ("ready", 0)


async def test_more_jobs_than_slots_all_run(database: Database, settings: Settings) -> None:
    few_slots = msgspec.structs.replace(settings, concurrency=3)
    async with client(settings) as jobs, running_worker(worker, few_slots):
        ids = await jobs.enqueue(*[NewJob(task="anything") for _ in range(200)])
        for job_id in ids:
            assert (await jobs.final(job_id)).state == "succeeded"


async def test_a_scheduled_job_starts_at_its_moment(jobs: Client) -> None:
    job = await jobs.run(NewJob(task="anything", delay_seconds=0.5))
    assert job.started_at is not None
    assert job.started_at >= job.run_at


async def test_a_worker_on_other_queues_leaves_the_job_alone(database: Database, settings: Settings) -> None:
    async with client(settings) as jobs, running_worker(worker, settings, queues=["elsewhere"]):
        (job_id,) = await jobs.enqueue(NewJob(task="anything"))
        assert (await jobs.run(NewJob(task="anything", queue="elsewhere"))).state == "succeeded"
        job = await jobs.store.get_job(job_id)
        assert job is not None
        assert job.state == "ready"


async def test_a_worker_is_listed_while_it_runs_and_gone_when_it_stops(jobs: Client, settings: Settings) -> None:
    async with running_worker(worker, settings) as service:
        rows: list[Any] = []
        while not rows:
            rows = await jobs.database.fetch("select queues, tasks from clarion.workers where id = $1", service.id)
        assert rows[0]["queues"] == ["greetings", "default"]
        assert "greet" in rows[0]["tasks"]
    assert not await jobs.database.fetch("select from clarion.workers where id = $1", service.id)
