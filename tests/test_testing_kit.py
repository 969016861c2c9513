"""The kit that people who write handlers test them with: one handler alone, and jobs on a database of their own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import date
from functools import partial
from typing import Any, Literal, get_args

import anyio
import asyncpg
import msgspec
import pytest

from clarion.client import AsyncClient, Invalid
from clarion.db import Database
from clarion.errors import UsageError
from clarion.job_request import JobRequest
from clarion.settings import Settings
from clarion_worker import Context, Discard, Retry, Snooze, SyncContext, Worker
from clarion_worker import runner as runner_module
from clarion_worker.testing import HandlerRun, Kit, Line, NoResult, Progress, run_handler
from clarion_worker.testing.databases import database_on

How = Literal["succeed", "fail", "retry", "discard", "snooze", "time out", "return what nobody can store"]

entered: list[str] = []


@asynccontextmanager
async def opened() -> AsyncIterator[dict[str, str]]:
    """What the handlers of these tests share."""
    entered.append("open")
    yield {"greeting": "hello"}
    entered.append("closed")


# -- Handlers

worker = Worker(lifespan=opened)


class Order(msgspec.Struct):
    id: int
    placed_on: date


@worker.task("place", queue="orders")
async def place(order: Order) -> Order:
    return Order(order.id + 1, order.placed_on)


@worker.task("speak", max_attempts=2)
async def speak(ctx: Context, how: How = "succeed") -> dict[str, Any]:
    ctx.log.info("asked", how=how)
    await ctx.progress(1, total=3, message="begun")
    await ctx.heartbeat({"page": 7})
    await ctx.progress(2)
    match how:
        case "fail":
            raise LookupError("no such page")
        case "retry":
            raise Retry("10m", "the quota is used up")
        case "discard":
            raise Discard("no use")
        case "snooze":
            raise Snooze("5m")
        case "time out":
            await anyio.sleep_forever()
        case "return what nobody can store":
            return {"text": "\x00"}
    return {"how": how}


@worker.task("speak.sync")
def speak_in_thread(ctx: SyncContext) -> str:
    ctx.log.warning("in a thread")
    ctx.progress(1)
    ctx.heartbeat(["half"])
    return "done"


@worker.task("speak.process", runs_in="process")
def speak_in_process(ctx: SyncContext, n: int) -> int:
    ctx.progress(n)
    return n + 1


@worker.task("find")
async def find(ctx: Context) -> list[Any]:
    return [ctx.attempt, ctx.checkpoint, ctx.state, str(ctx.job.id)]


@worker.task("wait")
async def wait(ctx: Context) -> str:
    ctx.state["began"].set()
    try:
        await anyio.sleep_forever()
    finally:
        ctx.state["ended"].set()
    return "never"


@worker.task("stay")
async def stay(ctx: Context) -> None:
    began, released = ctx.state
    while not released.is_set():
        with suppress(asyncio.CancelledError):
            began.set()
            await released.wait()


@worker.task("promise")
async def promise() -> int:
    return "not a number"  # type: ignore[return-value]


@worker.task("fan-out", queue="orders")
async def fan_out(ctx: Context, days: list[str]) -> None:
    client: AsyncClient = ctx.state
    for day in days:
        await client.enqueue(report.job(day))


@worker.task("report")
def report(day: str) -> str:
    return f"the report of {day}"


@worker.task("again")
async def again(ctx: Context) -> None:
    raise Snooze(0)


@worker.task("give-up")
async def give_up(ctx: Context) -> None:
    client: AsyncClient = ctx.state
    await client.cancel(ctx.job.id)
    await ctx.progress(1)


@worker.task("transfer", max_attempts=1)
async def transfer(ctx: Context, mode: str) -> None:
    connection = await asyncpg.connect(ctx.state)
    try:
        async with connection.transaction():
            await ctx.complete_in(connection, {"mode": mode})
            if mode == "roll back":
                raise RuntimeError("after all not")
    finally:
        await connection.close()


# -- One handler alone


async def test_a_handler_is_run_as_a_worker_runs_it() -> None:
    run = await run_handler(worker, place.job(Order(7, date(2026, 11, 22))))
    assert run.result == Order(8, date(2026, 11, 22))
    assert (run.task, run.attempt, run.outcome, run.state) == ("place", 1, "succeeded", "succeeded")


async def test_what_a_handler_says_is_noted() -> None:
    run = await run_handler(worker, speak.job())
    assert run.progress == [Progress(1, 3, "begun"), Progress(2)]
    assert run.checkpoint == {"page": 7}
    assert run.lines == [Line("info", "asked", {"how": "succeed"})]


async def test_what_a_handler_in_a_thread_says_is_noted_too() -> None:
    run = await run_handler(worker, speak_in_thread.job())
    assert (run.result, run.progress, run.checkpoint) == ("done", [Progress(1)], ["half"])
    assert run.lines == [Line("warning", "in a thread")]


async def test_a_handler_in_a_process_of_its_own_runs_in_one() -> None:
    run = await run_handler(worker, speak_in_process.job(n=1))
    assert (run.result, run.progress) == (2, [Progress(1)])


async def test_a_payload_that_does_not_fit_is_dead_at_once() -> None:
    run: HandlerRun[Any] = await run_handler(worker, JobRequest("place", {"order": {"id": "seven"}}))
    assert (run.state, run.dead_reason) == ("dead", "undecodable_payload")
    assert "Expected `int`" in (run.error_message or "")


async def test_an_attempt_finds_what_the_test_puts_there() -> None:
    run = await run_handler(worker, find.job(), attempt=3, checkpoint={"page": 9}, state="a fake")
    assert run.result == [3, {"page": 9}, "a fake", str(run.job_id)]


async def test_the_workers_lifespan_is_entered_unless_there_is_a_state_instead() -> None:
    entered.clear()
    run = await run_handler(worker, find.job())
    assert (run.result[2], entered) == ({"greeting": "hello"}, ["open", "closed"])
    await run_handler(worker, find.job(), state=None)
    assert entered == ["open", "closed"]


async def test_a_state_that_no_handler_would_see_is_a_mistake() -> None:
    plain = Worker()
    task = plain.task("plain")(lambda: None)
    with pytest.raises(UsageError, match="lifespan"):
        await run_handler(plain, task.job(), state="a fake")


async def test_a_task_that_the_worker_does_not_have_is_a_mistake() -> None:
    with pytest.raises(UsageError, match=r"no task 'speek'; it has again, .* speak"):
        await run_handler(worker, JobRequest("speek"))


async def test_a_job_that_no_server_would_take_is_refused() -> None:
    with pytest.raises(Exception, match="max_attempts"):
        await run_handler(worker, report.job("today").having(max_attempts=0))


async def test_a_timeout_ends_the_handler() -> None:
    run = await run_handler(worker, speak.job("time out").having(timeout="50ms"))
    assert (run.outcome, run.state, run.error_type) == ("timeout", "scheduled", "AttemptTimeout")


@pytest.mark.parametrize("call", [1, 2, 3])
async def test_a_cancellation_reaches_a_handler_in_the_call_that_the_test_says(call: int) -> None:
    run = await run_handler(worker, speak.job(), cancelled_after_progress=call)
    assert (run.outcome, run.state) == ("released", "cancelled")
    assert (len(run.progress), run.checkpoint) == [(1, None), (1, {"page": 7}), (2, {"page": 7})][call - 1]


async def test_a_cancellation_reaches_a_handler_in_a_thread() -> None:
    run = await run_handler(worker, speak_in_thread.job(), cancelled_after_progress=1)
    assert (run.state, run.checkpoint) == ("cancelled", None)


async def test_a_cancellation_reaches_a_handler_that_only_waits() -> None:
    began, ended = anyio.Event(), anyio.Event()
    run = await run_handler(worker, wait.job(), state={"began": began, "ended": ended}, cancelled_by=began)
    assert (run.state, run.stuck, ended.is_set()) == ("cancelled", False, True)


async def test_a_handler_that_does_not_end_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "CANCEL_GRACE_SECONDS", 0.05)
    began, released = anyio.Event(), anyio.Event()
    run = await run_handler(worker, stay.job(), state=[began, released], cancelled_by=began)
    released.set()
    assert (run.state, run.stuck) == ("cancelled", True)


async def test_a_handler_whose_test_is_cancelled_ends_with_it() -> None:
    began, ended = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(partial(run_handler, worker, wait.job(), state={"began": began, "ended": ended}))
        await began.wait()
        group.cancel_scope.cancel()
    await ended.wait()


async def test_the_result_of_a_handler_that_failed_is_its_traceback() -> None:
    run = await run_handler(worker, speak.job("fail"))
    with pytest.raises(NoResult, match=r'(?s)ended as failed.*raise LookupError\("no such page"\)'):
        _ = run.result


async def test_a_result_that_breaks_the_signatures_promise_is_told() -> None:
    run = await run_handler(worker, promise.job())
    with pytest.raises(NoResult, match="\"not a number\", which cannot be read as <class 'int'>"):
        _ = run.result


# -- Jobs on a database


@pytest.fixture
def kit(settings: Settings, database: Database) -> Kit:
    """A kit on this file's database, whose jobs are gone before each test."""
    return Kit(settings.database_url)


def told(runs: list[HandlerRun[Any]]) -> list[tuple[str, str]]:
    return [(run.outcome, run.state) for run in runs]


@pytest.mark.parametrize("max_attempts", [1, 2])
@pytest.mark.parametrize("how", get_args(How))
async def test_without_a_database_a_run_ends_as_it_does_with_one(kit: Kit, how: How, max_attempts: int) -> None:
    request = speak.job(how).having(timeout="200ms" if how == "time out" else "30s", max_attempts=max_attempts)
    job_id = await kit.enqueue(request)
    (run,) = await kit.drain(worker)
    assert plain(await run_handler(worker, request, job_id=job_id)) == plain(run)


def plain(run: HandlerRun[Any]) -> dict[str, Any]:
    """What must be the same: all but the traceback, and the type that only a request brings."""
    return {name: getattr(run, name) for name in run.__struct_fields__ if name not in {"error_trace", "result_type"}}


async def test_jobs_run_in_order_and_what_they_enqueue_runs_too(kit: Kit) -> None:
    await kit.enqueue(report.job("last"))
    await kit.enqueue(report.job("first"), priority=5)
    await kit.enqueue(fan_out.job(["b", "a"]))
    runs = await kit.drain(worker, state=kit.client())
    assert [run.task for run in runs] == ["fan-out", "report", "report", "report", "report"]
    assert [run.result for run in runs[1:]] == [f"the report of {day}" for day in ("first", "last", "b", "a")]


async def test_what_failed_is_scheduled_and_not_run_again(kit: Kit) -> None:
    job_id = await kit.enqueue(speak.job("fail"), backoff="1ms")
    assert told(await kit.drain(worker)) == [("failed", "scheduled")]
    job = await kit.job(job_id)
    assert (job.state, job.errors, job.error and job.error.message) == ("scheduled", 1, "no such page")


async def test_when_time_flies_a_job_is_tried_to_its_end(kit: Kit) -> None:
    await kit.enqueue(speak.job("fail"), delay="1d")
    runs = await kit.drain(worker, include_scheduled=True)
    assert told(runs) == [("failed", "scheduled"), ("failed", "dead")]
    assert runs[-1].dead_reason == "attempts_exhausted"


async def test_when_time_flies_it_flies_in_order(kit: Kit) -> None:
    for day, delay in {"later": "3h", "sooner": "1h", "between": "2h", "now": "0s"}.items():
        await kit.enqueue(report.job(day), delay=delay)
    runs = await kit.drain(worker, include_scheduled=True)
    assert [run.result.rpartition(" ")[2] for run in runs] == ["now", "sooner", "between", "later"]


async def test_a_job_that_never_ends_ends_the_test(kit: Kit) -> None:
    await kit.enqueue(again.job())
    with pytest.raises(AssertionError, match=r"still work after 5 runs; the last was .*'again'"):
        await kit.drain(worker, include_scheduled=True, runs_max=5)


async def test_a_worker_takes_jobs_of_its_tasks_from_its_queues(kit: Kit) -> None:
    await kit.enqueue("report", {"day": "today"}, queue="elsewhere")
    await kit.enqueue("unknown")
    assert await kit.drain(worker) == []
    (run,) = await kit.drain(worker, queues=["elsewhere"])
    assert run.task == "report"


async def test_a_job_whose_time_has_come_is_run_once_it_is_made_due(kit: Kit) -> None:
    job_id = await kit.enqueue(report.job("today"), delay="5m")
    assert await kit.drain(worker) == []
    await kit.make_due(job_id)
    assert told(await kit.drain(worker)) == [("succeeded", "succeeded")]
    with pytest.raises(AssertionError, match="this report is succeeded"):
        await kit.make_due(job_id)


async def test_a_job_whose_deadline_is_over_is_dead_instead_of_run(kit: Kit) -> None:
    job_id = await kit.enqueue(report.job("today"), start_within="1ms")
    assert await kit.drain(worker) == []
    assert (await kit.job(job_id)).dead_reason == "expired"


async def test_a_job_survives_the_crash_of_its_worker(kit: Kit) -> None:
    job_id = await kit.enqueue(report.job("today"))
    crashed = await kit.crash(worker)
    assert (crashed.result, crashed.state) == ("the report of today", "running")
    assert [job.state for job in await kit.expire_leases()] == ["ready"]
    (run,) = await kit.drain(worker)
    job = await kit.job(job_id)
    assert (run.attempt, job.state, job.crashes) == (2, "succeeded", 1)


async def test_a_crash_needs_a_job(kit: Kit) -> None:
    with pytest.raises(AssertionError, match="no job of this worker is ready"):
        await kit.crash(worker)


async def test_a_job_that_is_cancelled_while_it_runs_ends_its_handler(kit: Kit) -> None:
    await kit.enqueue(give_up.job())
    assert told(await kit.drain(worker, state=kit.client())) == [("released", "cancelled")]


async def test_a_transaction_of_the_handlers_own_decides(kit: Kit) -> None:
    await kit.enqueue(transfer.job("commit"))
    await kit.enqueue(transfer.job("roll back"))
    committed, rolled_back = await kit.drain(worker, state=kit.database_url)
    assert (committed.state, committed.result) == ("succeeded", {"mode": "commit"})
    assert (rolled_back.state, rolled_back.error_type) == ("dead", "RuntimeError")


async def test_the_lifespan_is_entered_once_for_all_jobs_of_a_drain(kit: Kit) -> None:
    await kit.enqueue(find.job())
    await kit.enqueue(find.job())
    entered.clear()
    runs = await kit.drain(worker)
    assert [run.result[2] for run in runs] == [{"greeting": "hello"}] * 2
    assert entered == ["open", "closed"]


async def test_jobs_that_wait_are_found_by_some_of_their_arguments(kit: Kit) -> None:
    await kit.enqueue(place.job(Order(7, date(2026, 11, 22))))
    await kit.enqueue(report.job("today"), delay="5m")
    assert [job.task for job in await kit.jobs()] == ["place", "report"]
    (job,) = await kit.assert_enqueued("report", {"day": "today"}, queue="default", count=1)
    assert job.state == "scheduled"
    await kit.assert_enqueued("report")
    await kit.assert_enqueued(place.job(Order(7, date(2026, 11, 22))))
    await kit.refute_enqueued(place.job(Order(8, date(2026, 11, 22))))
    await kit.refute_enqueued("report", queue="orders")


async def test_a_job_that_has_run_waits_no_more(kit: Kit) -> None:
    await kit.enqueue(report.job("today"))
    await kit.drain(worker)
    await kit.refute_enqueued("report")
    with pytest.raises(AssertionError, match=r"report in default, succeeded, .*: it is succeeded"):
        await kit.assert_enqueued("report")


async def test_what_is_not_there_is_told_together_with_what_is(kit: Kit) -> None:
    await kit.enqueue("report", {"day": "yesterday"}, queue="slow")
    await kit.enqueue("place", {"day": "today"})
    with pytest.raises(AssertionError) as caught:
        await kit.assert_enqueued("report", {"day": "today", "pages": 3}, queue="default")
    assert str(caught.value).splitlines() == [
        'expected at least 1, found 0 waiting: report with {"day":"today","pages":3} in queue default. There is:',
        '  report in slow, ready, {"day":"yesterday"}: its queue is slow, its day is "yesterday", it has no pages',
        '  place in default, ready, {"day":"today"}: it is place',
    ]


async def test_a_count_that_is_wrong_is_told(kit: Kit) -> None:
    with pytest.raises(AssertionError, match=r"expected 2, found 0 waiting: report\. There are no jobs at all\."):
        await kit.assert_enqueued("report", count=2)
    await kit.enqueue(report.job("today"))
    with pytest.raises(AssertionError, match="expected 0, found 1 waiting: report"):
        await kit.refute_enqueued("report")


async def test_many_jobs_are_told_shortly(kit: Kit) -> None:
    await kit.client().enqueue_many([report.job("x" * 1_000)] * 12)
    with pytest.raises(AssertionError, match=r"(?s)x….*  and 2 more$"):
        await kit.assert_enqueued("place")


async def test_code_under_test_has_a_client(kit: Kit) -> None:
    client = kit.client()
    handle = await client.enqueue(report.job("today"), idempotency_key="once")
    again = await client.enqueue(report.job("today"), idempotency_key="once")
    assert again.id == handle.id
    await kit.drain(worker)
    assert await handle.result() == "the report of today"


def test_a_test_that_is_not_async_has_one_too_and_a_kit_belongs_to_no_loop(kit: Kit) -> None:
    handle = kit.sync_client().enqueue(report.job("today"))
    anyio.run(kit.drain, worker)
    assert handle.result() == "the report of today"
    asyncio.run(kit.refute_enqueued("report"))


async def test_a_job_that_the_server_refuses_is_refused(kit: Kit) -> None:
    with pytest.raises(Invalid, match="priority"):
        await kit.enqueue(report.job("today"), priority=1_000)


def test_a_kit_makes_its_tables_in_an_empty_database(settings: Settings) -> None:
    with database_on(settings.database_url) as url:
        anyio.run(Kit(url).migrate)
        assert anyio.run(Kit(url).jobs) == []


async def test_a_job_that_does_not_exist_is_told(kit: Kit) -> None:
    run = await run_handler(worker, promise.job())
    with pytest.raises(AssertionError, match=f"there is no job {run.job_id}"):
        await kit.job(run.job_id)
