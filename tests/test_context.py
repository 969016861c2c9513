"""What a handler may say and learn through its context; the worker runs in this process, on a real database."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import anyio
import anyio.to_thread
import asyncpg
import msgspec
import pytest
import structlog

from clarion.db import Database
from clarion.errors import UsageError
from clarion.execution import Heartbeat
from clarion.job import Job, NewJob
from clarion.settings import Settings
from clarion.store import Store
from clarion_worker import Cancelled, Context, Retry, SyncContext, Worker
from clarion_worker.leases import Held
from clarion_worker.lines import HandlerLog
from clarion_worker.service import WorkerService
from running import Client, client, in_one_task, running_worker

entered: list[str] = []


@asynccontextmanager
async def shared() -> AsyncIterator[dict[str, str]]:
    """What the handlers of these tests share."""
    entered.append("open")
    yield {"greeting": "hello"}
    entered.append("closed")


worker = Worker(lifespan=shared)
seen: dict[str, Any] = {}
started = threading.Event()


@worker.task("progress")
async def progress(*, ctx: Context) -> str:
    await ctx.progress(1, total=3, message="one of three")
    return "done"


@worker.task("sync-progress")
def sync_progress(*, ctx: SyncContext) -> str:
    ctx.progress(2, 4)
    ctx.heartbeat({"page": 7})
    return "done"


@worker.task("checkpoint", max_attempts=2, backoff="1ms")
async def checkpoint(*, ctx: Context) -> Any:
    if ctx.checkpoint is None:
        await ctx.heartbeat({"page": 41})
        raise RuntimeError("half-way")
    return ctx.checkpoint


@worker.task("talks")
async def talks(lines: int, *, ctx: Context) -> None:
    bound = ctx.log.bind(part="first")
    for n in range(lines):
        bound.info("line %d", n, odd=bool(n % 2))
    ctx.log.error("it went wrong", code=7)


@worker.task("odd-lines")
async def odd_lines(*, ctx: Context) -> None:
    ctx.log.warning("a NUL \x00 and half a pair \ud800", path="\x00", thing=object())
    ctx.log.info("large", text="x" * 100_000)


@worker.task("waits")
async def waits(*, ctx: Context) -> str:
    started.set()
    await anyio.sleep_forever()
    return "never"


@worker.task("last-words", timeout="50ms", max_attempts=1)
async def last_words(*, ctx: Context) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        ctx.log.info("I am being ended")


@worker.task("succeeds-all-the-same")
async def succeeds_all_the_same() -> str:
    started.set()
    try:
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        return "too late to stop"
    return "never"


@worker.task("waits-in-thread")
def waits_in_thread(*, ctx: SyncContext) -> str:
    started.set()
    try:
        while True:
            ctx.progress(0)
    except Cancelled:
        seen["cancelled"] = ctx.cancelled
        raise


@worker.task("leaves-a-task-behind")
async def leaves_a_task_behind(*, ctx: Context) -> None:
    await ctx.progress(1)
    seen["calls"] = ctx._calls  # as a task that outlives the handler has them


@worker.task("cleans-up")
async def cleans_up(*, ctx: Context) -> None:
    started.set()
    cancellations = 0
    try:
        while True:
            await ctx.progress(0)
    except asyncio.CancelledError:
        cancellations += 1
        try:
            with anyio.move_on_after(0.2):
                await anyio.sleep_forever()
        except asyncio.CancelledError:
            cancellations += 1
        seen["cancellations"] = cancellations
        raise


@worker.task("logs-anything")
async def logs_anything(*, ctx: Context) -> None:
    ctx.log.warning(ValueError("not a text"))


@worker.task("says-goodbye")
async def says_goodbye(*, ctx: Context) -> None:
    ctx.log.info("before the commit")
    connection = await asyncpg.connect(seen["database_url"])
    async with connection.transaction():
        await ctx.complete_in(connection)
    await connection.close()


@worker.task("falls-back")
async def falls_back(*, ctx: Context) -> str:
    connection = await asyncpg.connect(seen["database_url"])
    try:
        await ctx.complete_in(connection)
    except UsageError:
        return "returned instead"
    finally:
        await connection.close()
    return "committed"


@worker.task("state")
async def state(*, ctx: Context) -> Any:
    return ctx.state["greeting"]


@worker.task("retries", max_attempts=3)
async def retries(*, ctx: Context) -> int:
    if ctx.attempt == 1:
        raise Retry("1ms", "the quota is used up")
    return ctx.attempt


@worker.task("transfers", max_attempts=1)
async def transfers(mode: str, *, ctx: Context) -> str:
    connection = await asyncpg.connect(seen["database_url"])
    try:
        async with connection.transaction():
            await connection.execute("insert into effects (job_id) values ($1)", ctx.job.id)
            await ctx.complete_in(connection, {"mode": mode})
            if mode == "roll back":
                raise RuntimeError("after all not")
        if mode == "fail afterwards":
            raise RuntimeError("but it is done")
    except RuntimeError:
        if mode == "fail afterwards":
            raise
    finally:
        await connection.close()
    return "not the result"


@worker.task("outside", max_attempts=1)
async def outside(*, ctx: Context) -> None:
    connection = await asyncpg.connect(seen["database_url"])
    try:
        await ctx.complete_in(connection)
    finally:
        await connection.close()


@pytest.fixture
async def clarion(settings: Settings, database: Database) -> AsyncIterator[Client]:
    """A client and a worker on this file's database."""
    started.clear()
    seen.clear()
    entered.clear()
    seen["database_url"] = settings.database_url
    await database.fetch("create table if not exists public.effects (job_id uuid)")
    await database.fetch("truncate public.effects, clarion.job_logs, clarion.job_events")
    with_limit = msgspec.structs.replace(settings, job_log_max_lines=20)
    async with in_one_task(client(settings)) as inner, in_one_task(running_worker(worker, with_limit)):
        yield inner


async def run(clarion: Client, task: str, **args: Any) -> Job:
    return await clarion.run(NewJob(task=task, args=msgspec.json.encode(args).decode()))


async def cancel(clarion: Client, job_id: UUID) -> None:
    """Asks for a running job's end, as the API does."""
    await clarion.store.cancel_jobs([job_id], actor="api")
    clarion.ringer.mark(cancelled=[job_id])


async def test_progress_is_stored_with_the_job(clarion: Client) -> None:
    job = await run(clarion, "progress")
    assert job.state == "succeeded"
    assert msgspec.json.decode(job.progress or "") == {"current": 1, "total": 3, "message": "one of three"}


async def test_a_handler_in_a_thread_says_its_progress_too(clarion: Client) -> None:
    job = await run(clarion, "sync-progress")
    assert job.result == '"done"'
    assert msgspec.json.decode(job.progress or "")["current"] == 2


async def test_a_checkpoint_is_handed_to_the_next_attempt(clarion: Client) -> None:
    job = await run(clarion, "checkpoint")
    assert (job.result, job.attempt, job.errors) == ('{"page":41}', 2, 1)


async def test_what_a_handler_logs_is_kept_with_the_job_in_order(clarion: Client) -> None:
    job = await run(clarion, "talks", lines=2)
    lines = await clarion.store.list_logs(job.id, after=None, limit=100)
    assert [(line.n, line.level, line.message) for line in lines] == [
        (1, "info", "line 0"),
        (2, "info", "line 1"),
        (3, "error", "it went wrong"),
    ]
    assert msgspec.json.decode(lines[1].fields or "") == {"part": "first", "odd": True}
    assert msgspec.json.decode(lines[2].fields or "") == {"code": 7}


def test_an_exception_is_logged_with_its_traceback() -> None:
    kept: list[tuple[str, str, dict[str, Any]]] = []
    with structlog.testing.capture_logs():
        log = HandlerLog(structlog.get_logger().bind(), lambda *line: kept.append(line))
        try:
            raise ValueError("oops")
        except ValueError:
            log.exception("it went %s", "wrong")
    ((level, message, fields),) = kept
    assert (level, message) == ("error", "it went wrong")
    assert "ValueError: oops" in fields["exception"]


async def test_a_handler_that_talks_too_much_is_cut_short_and_it_shows(clarion: Client) -> None:
    job = await run(clarion, "talks", lines=100)
    lines = await clarion.store.list_logs(job.id, after=None, limit=100)
    assert (len(lines), lines[-1].message) == (20, "82 more lines of this attempt were not kept")


async def test_the_last_words_of_a_handler_that_is_ended_are_kept(clarion: Client) -> None:
    job = await run(clarion, "last-words")
    lines = await clarion.store.list_logs(job.id, after=None, limit=100)
    assert [line.message for line in lines] == ["I am being ended"]


async def test_lines_that_postgres_refuses_are_made_fit(clarion: Client) -> None:
    job = await run(clarion, "odd-lines")
    odd, large = await clarion.store.list_logs(job.id, after=None, limit=100)
    assert odd.message.startswith("a NUL \N{REPLACEMENT CHARACTER}")
    assert len(large.fields or "") < 5_000


@pytest.mark.parametrize("task", ["waits", "waits-in-thread"])
async def test_a_cancelled_job_ends_its_handler_at_once(clarion: Client, task: str) -> None:
    (job_id,) = await clarion.enqueue(NewJob(task=task))
    await anyio.to_thread.run_sync(started.wait)
    await cancel(clarion, job_id)
    job = await clarion.final(job_id)
    assert job.state == "cancelled"
    assert seen.get("cancelled", True)


async def test_success_wins_over_a_cancellation_that_was_under_way(clarion: Client) -> None:
    (job_id,) = await clarion.enqueue(NewJob(task="succeeds-all-the-same"))
    await anyio.to_thread.run_sync(started.wait)
    await cancel(clarion, job_id)
    job = await clarion.final(job_id)
    assert (job.state, job.result) == ("succeeded", '"too late to stop"')


async def test_handlers_share_what_the_lifespan_opened(clarion: Client) -> None:
    assert (await run(clarion, "state")).result == '"hello"'
    assert entered == ["open"]


async def test_the_lifespan_is_closed_after_the_last_handler(settings: Settings, database: Database) -> None:
    entered.clear()
    async with in_one_task(running_worker(worker, settings)) as service:
        while not entered:
            await anyio.lowlevel.checkpoint()
        assert service.stuck == 0
    assert entered == ["open", "closed"]


async def test_a_handler_may_say_when_the_next_attempt_is(clarion: Client) -> None:
    job = await run(clarion, "retries")
    assert (job.result, job.errors) == ("2", 1)
    (attempt, _) = await clarion.store.list_attempts(job.id)
    assert (attempt.error_type, attempt.error_message) == ("Retry", "the quota is used up")
    assert attempt.next_run_at is not None
    assert attempt.ended_at is not None
    assert (attempt.next_run_at - attempt.ended_at).total_seconds() < 1


async def effects(clarion: Client, job: Job) -> int:
    rows = await clarion.database.fetch("select count(*) from public.effects where job_id = $1", job.id)
    return int(rows[0]["count"])


async def test_an_effect_and_its_completion_are_committed_together(clarion: Client) -> None:
    job = await run(clarion, "transfers", mode="commit")
    assert (job.state, job.result, await effects(clarion, job)) == ("succeeded", '{"mode":"commit"}', 1)


async def test_a_transaction_that_is_rolled_back_takes_the_completion_with_it(clarion: Client) -> None:
    job = await run(clarion, "transfers", mode="roll back")
    assert (job.state, job.error_type, await effects(clarion, job)) == ("dead", "TransactionRolledBack", 0)


async def test_what_fails_after_the_commit_changes_nothing(clarion: Client) -> None:
    job = await run(clarion, "transfers", mode="fail afterwards")
    assert (job.state, await effects(clarion, job)) == ("succeeded", 1)


async def test_what_was_logged_before_a_completion_in_a_transaction_is_kept(clarion: Client) -> None:
    job = await run(clarion, "says-goodbye")
    assert job.state == "succeeded"
    assert [line.message for line in await clarion.store.list_logs(job.id, after=None, limit=9)] == [
        "before the commit"
    ]


async def test_a_completion_that_was_refused_leaves_the_result_to_the_handler(clarion: Client) -> None:
    job = await run(clarion, "falls-back")
    assert (job.state, job.result) == ("succeeded", '"returned instead"')


async def test_a_task_that_a_handler_leaves_behind_learns_that_it_is_over(clarion: Client) -> None:
    await run(clarion, "leaves-a-task-behind")
    assert await seen["calls"].beat(None, None) == "lost"


async def test_a_handler_is_cancelled_once_and_may_clean_up(clarion: Client) -> None:
    (job_id,) = await clarion.enqueue(NewJob(task="cleans-up"))
    await anyio.to_thread.run_sync(started.wait)
    await cancel(clarion, job_id)
    assert (await clarion.final(job_id)).state == "cancelled"
    assert seen["cancellations"] == 1


async def test_anything_may_be_logged(clarion: Client) -> None:
    job = await run(clarion, "logs-anything")
    assert [line.message for line in await clarion.store.list_logs(job.id, after=None, limit=9)] == ["not a text"]


@pytest.mark.parametrize(("committing", "renewed"), [(True, 5.0), (False, 1.0)])
async def test_a_row_that_its_own_transaction_locks_is_still_held(
    clarion: Client, committing: bool, renewed: float
) -> None:
    (job_id,) = await clarion.enqueue(NewJob(task="elsewhere", queue="elsewhere"))
    (lease,) = await clarion.store.claim_for(job_id, {"elsewhere": 1}, None, lease_seconds=30)
    held = Held(lease, valid_until=1.0)
    held.committing = committing
    locked = Heartbeat(lease.id, lease.token, extended=False, cancelled=False, lease_seconds=9.0)
    held.renew(locked, 5.0, 0.0)
    assert held.valid_until == renewed


async def test_complete_in_wants_an_open_transaction(clarion: Client) -> None:
    job = await run(clarion, "outside")
    assert (job.state, job.error_type) == ("dead", "UsageError")
    assert "transaction" in (job.error_message or "")


async def test_a_worker_that_is_told_to_drain_ends(settings: Settings, store: Store) -> None:
    quick = msgspec.structs.replace(settings, lease_seconds=1)
    service = WorkerService(worker, quick, stop=anyio.Event())

    async def tell() -> None:
        while not await store.drain_worker(service.id):
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(tell)
        assert await service.run() == 0
