"""Worker processes that are killed, frozen, drained and started wrongly: real processes, real signals."""

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import anyio
import asyncpg
import msgspec
import pytest

from clarion.db import Database
from clarion.execution import Attempt
from clarion.job import NewJob
from clarion.settings import Settings
from running import Client, client
from verification import Child, Deployment, WorkerProcess, clarion, running, worker

STUBBORN = """
import threading, time, anyio
from clarion_worker import Worker
worker = Worker()

@worker.task("stubborn")
async def stubborn() -> None:
    while True:
        try:
            await anyio.sleep_forever()
        except BaseException:
            pass

@worker.task("stubborn-thread")
def stubborn_thread() -> None:
    while True:
        time.sleep(0.1)

@worker.task("blocks")
async def blocks(seconds: float) -> str:
    time.sleep(seconds)
    return "done"
"""


@asynccontextmanager
async def demo_worker(settings: Settings, *flags: str) -> AsyncIterator[WorkerProcess]:
    """A `clarion worker --demo` on the test's database."""
    async with worker(Deployment("", settings.database_url), *flags) as process:
        yield process


@asynccontextmanager
async def own_worker(settings: Settings, directory: Path, *flags: str) -> AsyncIterator[Child]:
    """A `clarion worker` with the handlers above, once it has started."""
    (directory / "own_tasks.py").write_text(STUBBORN)
    command = [*clarion(), "worker", "own_tasks:worker", "--database-url", settings.database_url, *flags]
    async with running(command, cwd=directory) as child:
        await child.line_with("worker.started")
        yield child


async def running_on(jobs: Client, job: NewJob) -> UUID:
    """Adds the job and waits until it runs; its id."""
    (job_id,) = await jobs.enqueue(job)
    await jobs.until(job_id, lambda job: job.state == "running")
    return job_id


@pytest.fixture(autouse=True)
def ephemeral(monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
    """The tests' Postgres does without fsync, which worker processes would refuse; each test begins without jobs."""
    monkeypatch.setenv("CLARION_EPHEMERAL", "true")


async def test_a_killed_workers_job_runs_again_elsewhere(settings: Settings) -> None:
    async with client(settings) as jobs, demo_worker(settings, "--lease-seconds", "1") as victim:
        job_id = await running_on(jobs, NewJob(task="demo.sleep", args='{"seconds": 0.5}'))
        victim.signal(signal.SIGKILL)
        async with demo_worker(settings, "--lease-seconds", "1") as other:
            job = await jobs.final(job_id)
    assert (job.state, job.attempt, job.crashes, job.worker_id) == ("succeeded", 2, 1, other.id)


async def test_a_worker_frozen_past_its_lease_cannot_finish_the_job_it_lost(settings: Settings) -> None:
    async with client(settings) as jobs, demo_worker(settings, "--lease-seconds", "1") as zombie:
        job_id = await running_on(jobs, NewJob(task="demo.sleep", args='{"seconds": 0.2}'))
        zombie.signal(signal.SIGSTOP)
        async with demo_worker(settings, "--lease-seconds", "1") as other:
            job = await jobs.final(job_id)
            zombie.signal(signal.SIGCONT)
            zombie.signal(signal.SIGTERM)
            await zombie.process.wait()
            assert await jobs.final(job_id) == job
    assert job.worker_id == other.id


async def test_sigterm_lets_running_jobs_end_and_claims_no_more(settings: Settings) -> None:
    async with client(settings) as jobs, demo_worker(settings, "--concurrency", "1") as process:
        job_id = await running_on(jobs, NewJob(task="demo.sleep", args='{"seconds": 0.5}'))
        process.signal(signal.SIGTERM)
        (late,) = await jobs.enqueue(NewJob(task="demo.echo"))
        assert await process.process.wait() == 0
        assert (await jobs.final(job_id)).state == "succeeded"
        untouched = await jobs.store.get_job(late)
        assert untouched is not None
        assert (untouched.state, untouched.attempt) == ("ready", 0)


async def test_what_does_not_end_in_time_is_handed_back_with_its_attempt(settings: Settings) -> None:
    async with client(settings) as jobs, demo_worker(settings, "--drain-timeout-seconds", "0.1") as process:
        job_id = await running_on(jobs, NewJob(task="demo.sleep", args='{"seconds": 600}'))
        process.signal(signal.SIGTERM)
        assert await process.process.wait() == 0
        job = await jobs.store.get_job(job_id)
        assert job is not None
        assert (job.state, job.attempt, job.errors, job.crashes) == ("ready", 0, 0, 0)


async def test_a_second_signal_ends_the_worker_at_once(settings: Settings) -> None:
    async with client(settings) as jobs, demo_worker(settings) as process:
        await running_on(jobs, NewJob(task="demo.sleep", args='{"seconds": 600}'))
        process.signal(signal.SIGTERM)
        await process.child.line_with("worker.drain_started")
        process.signal(signal.SIGTERM)
        assert await process.process.wait() == 1


@pytest.mark.parametrize("task", ["stubborn", "stubborn-thread"])
async def test_a_handler_that_ignores_its_end_cannot_hold_the_process(
    settings: Settings, tmp_path: Path, task: str
) -> None:
    flags = ("--drain-timeout-seconds", "0.1", "--queues", "default")
    async with client(settings) as jobs, own_worker(settings, tmp_path, *flags) as child:
        job_id = await running_on(jobs, NewJob(task=task))
        child.process.send_signal(signal.SIGTERM)
        assert await child.process.wait() == 0
        job = await jobs.store.get_job(job_id)
        assert job is not None
        assert (job.state, job.attempt) == ("ready", 0)


async def test_a_handler_that_blocks_the_loop_for_longer_than_the_lease_keeps_it(
    settings: Settings, tmp_path: Path
) -> None:
    async with client(settings) as jobs, own_worker(settings, tmp_path, "--lease-seconds", "1"):
        job = await jobs.run(NewJob(task="blocks", args='{"seconds": 2.5}'))
    assert (job.state, job.attempt, job.result) == ("succeeded", 1, '"done"')


async def test_a_worker_hung_for_longer_than_hang_after_loses_its_jobs(settings: Settings, tmp_path: Path) -> None:
    flags = ("--lease-seconds", "1", "--hang-after-seconds", "1")
    async with client(settings) as jobs, own_worker(settings, tmp_path, *flags) as child:
        (job_id,) = await jobs.enqueue(NewJob(task="blocks", args='{"seconds": 600}'))
        job = await jobs.until(job_id, lambda job: job.crashes == 1)
        assert job.state == "ready"
        assert "worker.hung" in await child.line_with("worker.hung")


@pytest.mark.parametrize("task", ["stubborn", "stubborn-thread"])
async def test_a_stuck_handler_frees_its_slot_and_does_not_run_twice_at_once(
    settings: Settings, tmp_path: Path, task: str
) -> None:
    flags = ("--concurrency", "2")
    async with client(settings) as jobs, own_worker(settings, tmp_path, *flags) as child:
        (job_id,) = await jobs.enqueue(NewJob(task=task, timeout_seconds=0.1, backoff_seconds=0.1))
        assert "attempt.stuck" in await child.line_with("attempt.stuck")
        put_off: list[Attempt] = []
        while not put_off:
            put_off = [each for each in await jobs.store.list_attempts(job_id) if each.outcome == "snoozed"]
        again = await jobs.until(job_id, lambda job: job.errors == 1)
        assert again.snoozes == 0, "the worker's own wish is not charged to the job"
        for _ in range(5):
            assert (await jobs.run(NewJob(task="blocks", args='{"seconds": 0}'))).state == "succeeded"
        child.process.send_signal(signal.SIGTERM)
        assert await child.process.wait() == 0


async def test_a_worker_whose_slots_are_all_stuck_ends_to_be_replaced(settings: Settings, tmp_path: Path) -> None:
    flags = ("--concurrency", "1", "--drain-timeout-seconds", "0")
    async with client(settings) as jobs, own_worker(settings, tmp_path, *flags) as child:
        await jobs.enqueue(NewJob(task="stubborn", timeout_seconds=0.1))
        assert await child.process.wait() == 1


async def test_a_second_signal_is_obeyed_under_a_handler_that_blocks(settings: Settings, tmp_path: Path) -> None:
    async with client(settings) as jobs, own_worker(settings, tmp_path) as child:
        await running_on(jobs, NewJob(task="blocks", args='{"seconds": 600}'))
        child.process.send_signal(signal.SIGTERM)
        child.process.send_signal(signal.SIGINT)
        assert await child.process.wait() == 1


async def test_a_result_that_cannot_be_recorded_in_time_is_not_released(settings: Settings) -> None:
    async with client(settings) as jobs, demo_worker(settings, "--drain-timeout-seconds", "0") as process:
        job_id = await running_on(jobs, NewJob(task="demo.sleep", args='{"seconds": 0.3}'))
        async with locked(settings, job_id):
            await process.child.line_with("outcome.retried")
            process.signal(signal.SIGTERM)
            await process.child.line_with("worker.drain_started")
        assert (await jobs.final(job_id)).state == "succeeded"
        assert await process.process.wait() == 0


@asynccontextmanager
async def locked(settings: Settings, job_id: UUID) -> AsyncIterator[None]:
    """Another session's lock on the job's row."""
    connection = await asyncpg.connect(settings.database_url)
    try:
        async with connection.transaction():
            await connection.execute("select from clarion.jobs where id = $1 for update", job_id)
            yield
    finally:
        await connection.close()


async def test_sigterm_while_the_database_is_away_ends_the_worker(settings: Settings) -> None:
    away = msgspec.structs.replace(settings, database_url="postgresql://nobody@127.0.0.1:1/none")
    async with running([*clarion(), "worker", "--demo", "--database-url", away.database_url]) as child:
        await child.line_with("step.failed")
        child.process.send_signal(signal.SIGTERM)
        assert await child.process.wait() == 0


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("nowhere:worker", "there is no module 'nowhere'"),
        ("own_tasks:missing", "no clarion_worker.Worker called 'missing'"),
        ("own_tasks", "write MODULE:NAME"),
        ("broken", "SyntaxError"),
        ("raising", "RuntimeError: at import"),
    ],
)
async def test_a_worker_that_cannot_be_found_says_what_to_write(
    settings: Settings, tmp_path: Path, target: str, complaint: str
) -> None:
    (tmp_path / "own_tasks.py").write_text(STUBBORN)
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "raising.py").write_text("raise RuntimeError('at import')")
    target = target if ":" in target or target == "own_tasks" else f"{target}:worker"
    command = [*clarion(), "worker", target, "--database-url", settings.database_url]
    done = await anyio.run_process(command, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr.decode()
