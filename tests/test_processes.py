"""Handlers in processes of their own: real ones, which really crash, hang and are killed."""

import asyncio
import atexit
import contextvars
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import anyio.lowlevel
import msgspec
import pytest

from clarion.errors import UsageError
from clarion.execution import Completion, Failure, Lease, Snoozing
from clarion.job import DeadReason
from clarion.settings import Settings
from clarion_worker import Context, Discard, Snooze, Worker
from clarion_worker.context import SyncContext
from clarion_worker.demo import demo
from clarion_worker.frames import CallRefused, Target
from clarion_worker.processes import OnMessage, ProcessDied, Processes, open_processes, target_of
from postgres_processes import Watched

GRACE_SECONDS = 0.5

worker = Worker()
colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


# -- Handlers


@worker.task("add")
def add(a: int, b: int) -> int:
    return a + b


@worker.task("pid")
def pid() -> int:
    return os.getpid()


@worker.task("async")
async def in_a_loop(n: int) -> int:
    await anyio.lowlevel.checkpoint()
    return n


@worker.task("fail")
def fail(message: str) -> None:
    raise LookupError(message)


@worker.task("exit")
def leave(code: int) -> None:
    sys.exit(code)


@worker.task("cancels-itself")
async def cancels_itself() -> None:
    raise asyncio.CancelledError


@worker.task("snooze")
def snooze() -> None:
    raise Snooze("5m")


@worker.task("discard")
def discard() -> None:
    raise Discard("it never will")


@worker.task("large")
def large(characters: int) -> str:
    return '"' * characters


@worker.task("unstorable")
def unstorable() -> float:
    return float("nan")


@worker.task("dies")
def dies(how: str) -> None:
    match how:
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)


@worker.task("noisy")
def noisy() -> str:
    print("printed")
    os.write(1, b"\xff\xff\xff\xff written\n")
    subprocess.run(["echo", "by a child"], check=True)
    return sys.stdin.read()


@worker.task("meets")
def meets(*, ctx: SyncContext) -> int:
    """Tells the worker who it is, and waits for its answer."""
    ctx.progress(os.getpid())
    return os.getpid()


@worker.task("logs")
def logs(*, ctx: SyncContext) -> tuple[int, bool]:
    ctx.log.info("rendering", order=7, path=Path("/x"))
    return ctx.attempt, ctx.cancelled


@worker.task("refused")
def refused(*, ctx: SyncContext) -> str:
    try:
        ctx.progress(1)
    except CallRefused as refusal:
        return str(refusal)
    return "accepted"


@worker.task("spins")
def spins(*, ctx: SyncContext) -> None:
    ctx.progress(os.getpid())
    while True:
        pass


@worker.task("holds-the-lock")
def holds_the_lock(*, ctx: SyncContext) -> None:
    """No other thread of the process comes to run meanwhile."""
    ctx.progress(os.getpid())
    re.match(r"(a+)+$", "a" * 60 + "b")


@worker.task("looks")
def looks(*, ctx: SyncContext) -> str:
    ctx.progress(os.getpid())
    wait = threading.Event()
    while not ctx.cancelled:
        wait.wait(0.01)
    return "seen"


@worker.task("awaits")
async def awaits(*, ctx: Context) -> None:
    await ctx.progress(os.getpid())
    await anyio.sleep_forever()


@worker.task("rescues")
async def rescues(*, ctx: Context) -> str:
    try:
        await ctx.progress(os.getpid())
        await anyio.sleep_forever()
    except asyncio.CancelledError:
        return "rescued"
    return "left alone"


@worker.task("starts-another")
def starts_another(*, ctx: SyncContext) -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        ctx.progress(other.pid)


@worker.task("signals")
def signals() -> int:
    """Is told to end as a service manager tells every process; forks one that is told alone. How that one ended."""
    os.kill(os.getpid(), signal.SIGTERM)
    forked = os.fork()
    if forked == 0:
        signal.pause()
    os.kill(forked, signal.SIGTERM)
    return os.waitpid(forked, 0)[1]


@worker.task("says-goodbye")
def says_goodbye(path: str) -> None:
    atexit.register(Path(path).write_text, "goodbye")


worker.task("disk-usage")(shutil.disk_usage)


@worker.task("colours")
def colours() -> str:
    before = colour.get()
    colour.set("red")
    return before


# -- Whom they talk to


class Ears:
    """Hears what handlers say, and answers all the same."""

    def __init__(self, answer: str = "held") -> None:
        self.said: list[tuple[str, Any]] = []
        self.pids: list[int] = []
        self.heard = anyio.Event()
        self._answer = answer

    async def __call__(self, kind: str, content: object) -> object:
        self.said.append((kind, content))
        if kind == "beat" and isinstance(content, list):
            self.pids.append(int(msgspec.json.decode(content[0])["current"]))
        self.heard.set()
        return self._answer


@asynccontextmanager
async def pool(processes_max: int = 1, *, result_max_bytes: int = 1_000_000) -> AsyncIterator[Processes]:
    settings = Settings(result_max_bytes=result_max_bytes)
    async with open_processes(settings, processes_max=processes_max, grace_seconds=GRACE_SECONDS) as processes:
        yield processes


def lease_of(task: str, args: str) -> Lease:
    now = datetime.now(UTC)
    return Lease(
        id=uuid4(), token=uuid4(), queue="default", task=task, args=args, priority=0, attempt=1, max_attempts=None,
        generation=1, errors=0, crashes=0, timeout_seconds=None, checkpoint=None,
        created_at=now, run_at=now, started_at=now, sort_key=now,
    )  # fmt: skip


async def outcome_of(
    processes: Processes, task: str, /, on_message: OnMessage | None = None, **args: Any
) -> Completion | Failure | Snoozing:
    lease = lease_of(task, msgspec.json.encode(args).decode())
    outcome = await processes.run(target_of(worker.tasks[task]), lease, on_message or Ears())
    assert (outcome.id, outcome.token) == (lease.id, lease.token)
    return outcome


async def result_of(processes: Processes, task: str, /, on_message: OnMessage | None = None, **args: Any) -> Any:
    outcome = await outcome_of(processes, task, on_message, **args)
    assert isinstance(outcome, Completion)
    return None if outcome.result is None else msgspec.json.decode(outcome.result)


async def failure_of(processes: Processes, task: str, /, **args: Any) -> Failure:
    outcome = await outcome_of(processes, task, **args)
    assert isinstance(outcome, Failure)
    return outcome


async def started(processes: Processes, task: str) -> tuple[asyncio.Task[Any], int]:
    """The attempt, once its handler has told who it is, and that."""
    ears = Ears()
    attempt = asyncio.create_task(result_of(processes, task, ears))
    attempt.add_done_callback(lambda _: ears.heard.set())
    await ears.heard.wait()
    if attempt.done():
        await attempt
    return attempt, ears.pids[0]


# -- Outcomes


async def test_a_result_comes_back() -> None:
    async with pool() as processes:
        assert await result_of(processes, "add", a=1, b=2) == 3


async def test_an_async_handler_runs_on_a_loop_of_its_own() -> None:
    async with pool() as processes:
        assert await result_of(processes, "async", n=5) == 5


async def test_an_exception_comes_back_with_its_trace() -> None:
    async with pool() as processes:
        failure = await failure_of(processes, "fail", message="lone \ud800 and \0".encode("utf-8", "replace").decode())
    assert (failure.error_type, failure.error_message) == ("LookupError", "lone ? and \N{REPLACEMENT CHARACTER}")
    assert failure.error_trace is not None
    assert "raise LookupError(message)" in failure.error_trace
    assert failure.dead_reason is None


async def test_wishes_come_back_as_such() -> None:
    async with pool() as processes:
        snoozing = await outcome_of(processes, "snooze")
        assert isinstance(snoozing, Snoozing)
        assert snoozing.delay_seconds == 300
        assert (await failure_of(processes, "discard")).dead_reason is DeadReason.NOT_RETRYABLE


async def test_a_payload_that_does_not_fit_and_a_result_that_cannot_be_stored_are_told_apart() -> None:
    async with pool(result_max_bytes=100) as processes:
        assert (await failure_of(processes, "add", a="x")).dead_reason is DeadReason.UNDECODABLE_PAYLOAD
        assert (await failure_of(processes, "unstorable")).dead_reason is DeadReason.RESULT_UNSTORABLE
        too_large = await failure_of(processes, "large", characters=101)
        assert too_large.dead_reason is DeadReason.RESULT_UNSTORABLE
        assert (await failure_of(processes, "fail", message="x")).dead_reason is None


async def test_a_large_result_comes_back_whole() -> None:
    async with pool(result_max_bytes=10_000_000) as processes:
        assert await result_of(processes, "large", characters=4_000_000) == '"' * 4_000_000


async def test_exit_in_a_handler_is_its_failure_and_the_process_stays() -> None:
    async with pool() as processes:
        before = await result_of(processes, "pid")
        assert (await failure_of(processes, "exit", code=3)).error_type == "SystemExit"
        assert (await failure_of(processes, "cancels-itself")).error_message == "the handler cancelled itself"
        assert await result_of(processes, "pid") == before


async def test_a_module_that_cannot_be_imported_fails_each_attempt_by_name() -> None:
    async with pool() as processes:
        for _ in range(2):
            outcome = await processes.run(Target("nowhere", "worker", "x"), lease_of("x", "{}"), Ears())
            assert isinstance(outcome, Failure)
            assert (outcome.error_type, outcome.error_message) == ("ModuleNotFoundError", "No module named 'nowhere'")


# -- Death


@pytest.mark.parametrize(
    ("how", "cause"), [("exit", "exit code 3"), ("kill", "killed by SIGKILL"), ("segfault", "killed by SIGSEGV")]
)
async def test_a_process_that_dies_fails_its_own_attempt_only(how: str, cause: str) -> None:
    async with pool(2) as processes:
        neighbour, its_pid = await started(processes, "looks")
        with pytest.raises(ProcessDied, match=cause):
            await outcome_of(processes, "dies", how=how)
        assert await result_of(processes, "pid") != its_pid
        neighbour.cancel()
        assert await neighbour == "seen"


async def test_a_process_that_dies_idle_is_replaced() -> None:
    async with pool() as processes:
        first = await result_of(processes, "pid")
        watched = Watched(first)
        os.kill(first, signal.SIGKILL)
        watched.await_death()
        while processes._idle:
            await anyio.lowlevel.checkpoint()
        assert await result_of(processes, "pid") != first


async def test_a_process_that_cannot_start_fails_the_attempt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("clarion_worker.processes._START_SECONDS", 0.1)
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nexec sleep 600")
    hangs.chmod(0o755)
    async with pool() as processes:
        for executable, cause in [
            ("/bin/false", "ended with exit code 1"),
            (str(tmp_path / "missing"), "could not be started"),
            (str(hangs), "did not start within 0.1 s"),
        ]:
            monkeypatch.setattr(sys, "executable", executable)
            with pytest.raises(ProcessDied, match=cause):
                await result_of(processes, "pid")
        monkeypatch.undo()
        assert await result_of(processes, "add", a=1, b=1) == 2


# -- Cancellation


@pytest.mark.parametrize("task", ["spins", "holds-the-lock"])
async def test_a_handler_that_does_not_end_is_killed_after_its_grace(task: str) -> None:
    async with pool() as processes:
        attempt, its_pid = await started(processes, task)
        watched = Watched(its_pid)
        cancelled_at = anyio.current_time()
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        assert GRACE_SECONDS <= anyio.current_time() - cancelled_at < GRACE_SECONDS + 2
        watched.await_death()
        assert await result_of(processes, "pid") != its_pid


async def test_a_second_cancellation_does_not_wait_for_the_grace() -> None:
    async with open_processes(Settings(), processes_max=1, grace_seconds=600) as processes:
        attempt, its_pid = await started(processes, "spins")
        attempt.cancel()
        await anyio.lowlevel.checkpoint()
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        Watched(its_pid).await_death()


async def test_an_outcome_within_the_grace_counts() -> None:
    async with pool() as processes:
        for task, result in [("looks", "seen"), ("rescues", "rescued")]:
            attempt, its_pid = await started(processes, task)
            attempt.cancel()
            assert await attempt == result
        assert await result_of(processes, "pid") == its_pid


async def test_an_async_handler_that_ends_when_told_keeps_its_process() -> None:
    async with pool() as processes:
        attempt, its_pid = await started(processes, "awaits")
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        assert await result_of(processes, "pid") == its_pid


async def test_what_a_killed_handler_started_is_killed_with_it() -> None:
    async with pool() as processes:
        attempt, started_pid = await started(processes, "starts-another")
        watched = Watched(started_pid)
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        watched.await_death()


async def test_a_wait_for_a_free_process_can_be_cancelled() -> None:
    async with pool() as processes:
        busy, its_pid = await started(processes, "looks")
        with anyio.move_on_after(0.05):
            await result_of(processes, "pid")
        busy.cancel()
        assert await busy == "seen"
        assert await result_of(processes, "pid") == its_pid


async def test_a_cancelled_start_leaves_a_process_for_the_next_attempt() -> None:
    async with pool() as processes:
        with anyio.move_on_after(0.01):
            await result_of(processes, "pid")
        assert await result_of(processes, "pid") == await result_of(processes, "pid")


# -- What is said meanwhile


async def test_a_handler_hears_the_workers_answer() -> None:
    ears = Ears()
    async with pool() as processes:
        assert [await result_of(processes, "meets", ears)] == ears.pids
        with pytest.raises(asyncio.CancelledError):
            await result_of(processes, "meets", Ears("cancelled"))


async def test_a_log_line_arrives_before_the_outcome() -> None:
    ears = Ears()
    async with pool() as processes:
        assert await result_of(processes, "logs", ears) == [1, False]
    ((kind, line),) = ears.said
    assert (kind, line[:2], line[2]["order"]) == ("line", ["info", "rendering"], 7)
    assert "/x" in line[2]["path"]


async def test_what_the_worker_refuses_is_raised_in_the_handler() -> None:
    async def refuse(kind: str, content: object) -> object:
        raise ValueError(f"no {kind} now")

    async with pool() as processes:
        assert await result_of(processes, "refused", refuse) == "no beat now"


async def test_what_a_handler_prints_does_not_reach_the_worker() -> None:
    async with pool() as processes:
        assert await result_of(processes, "noisy") == ""
        assert await result_of(processes, "add", a=1, b=2) == 3


async def test_signals_are_for_the_worker_and_for_what_a_handler_forks() -> None:
    async with pool() as processes:
        assert await result_of(processes, "signals") == signal.SIGTERM
        assert await result_of(processes, "add", a=1, b=2) == 3


# -- The pool


async def test_a_process_is_used_again_without_the_traces_of_the_attempt_before() -> None:
    async with pool(2) as processes:
        assert await result_of(processes, "pid") == await result_of(processes, "pid")
        assert await result_of(processes, "colours") == await result_of(processes, "colours") == "none"


async def test_no_more_than_processes_max_at_once() -> None:
    both, ears = anyio.Event(), Ears()

    async def meet(kind: str, content: object) -> object:
        await ears(kind, content)
        if len(ears.said) == 2:
            both.set()
        await both.wait()
        return "held"

    async with pool(2) as processes, anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(result_of, processes, "meets", meet)
    assert len(ears.said) == 6
    assert len(set(ears.pids)) == 2


async def test_the_end_of_the_pool_leaves_no_process() -> None:
    async with pool(2) as processes:
        busy, busy_pid = await started(processes, "holds-the-lock")
        idle_pid = await result_of(processes, "pid")
        watched = Watched(busy_pid, idle_pid)
    watched.await_death()
    with pytest.raises(ProcessDied):
        await busy


async def test_a_process_that_is_not_needed_any_more_leaves_in_good_order(tmp_path: Path) -> None:
    async with pool() as processes:
        assert await result_of(processes, "says-goodbye", path=str(tmp_path / "said")) is None
    assert (tmp_path / "said").read_text() == "goodbye"


# -- Where handlers are found


def test_a_task_is_found_by_its_own_name_or_by_that_of_its_worker() -> None:
    assert target_of(worker.tasks["add"]) == Target(__name__, "worker", "add")
    assert target_of(demo.tasks["demo.echo"]) == Target("clarion_worker.demo", "demo", "demo.echo")


async def test_a_handler_of_another_module_is_found_where_it_was_registered() -> None:
    assert target_of(worker.tasks["disk-usage"]) == Target(__name__, "worker", "disk-usage")
    async with pool() as processes:
        assert await result_of(processes, "disk-usage", path="/")


def test_a_handler_that_no_process_could_import_is_refused() -> None:
    def handler() -> None:
        """Nothing."""

    task = Worker().task("local")(handler)
    with pytest.raises(UsageError, match=f"looks for it in the module '{__name__}'"):
        target_of(task)
    handler.__module__ = "__main__"
    with pytest.raises(UsageError, match="move the handler to a module"):
        target_of(task)


# -- The death of the worker

# Starts the handler named, and says who runs it; with `forks` a child that holds all it has open outlives it.
WORKER = """
import asyncio, os, signal, sys
import test_processes as ours

async def main():
    async with ours.pool() as processes:
        _, pid = await ours.started(processes, sys.argv[1])
        forked = os.fork() if sys.argv[2:] == ["forks"] else -1
        if forked == 0:
            signal.pause()
        print(pid, forked, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@contextmanager
def worker_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """The process, what its handler has told, and what the process has forked."""
    command = [sys.executable, "-c", WORKER, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            pid, _, forked = process.stdout.readline().partition(" ")
            yield process, int(pid), int(forked)
        finally:
            process.kill()


@pytest.mark.parametrize("task", ["awaits", "looks", "spins", "holds-the-lock", "starts-another"])
def test_a_killed_worker_leaves_no_process(task: str) -> None:
    with worker_process(task) as (process, pid, _):
        watched = Watched(pid)
        process.kill()
        watched.await_death()


def test_what_a_killed_worker_has_forked_keeps_no_process() -> None:
    with worker_process("spins", "forks") as (process, pid, forked):
        watched = Watched(pid)
        process.kill()
        watched.await_death()
        os.kill(forked, signal.SIGKILL)
