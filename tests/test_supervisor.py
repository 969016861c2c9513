"""Several worker processes under one supervisor: real processes, real signals, and what becomes of each."""

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import anyio
import httpx2
import msgspec
import pytest

from clarion.db import Database
from clarion.job import Job, NewJob
from clarion.probes import ProcessState
from clarion.settings import Settings
from clarion_worker.supervisor import Launch, Supervisor, restart_seconds
from conftest import settings_for
from postgres_processes import Watched, children_of
from running import Client, client
from test_dev import dev, run_job
from test_worker_health import free_port, until_status
from verification import Child, clarion, running

# What holds the interpreter's lock lets no thread of its process run meanwhile; what it has started before did to its
# standard input what some programs do.
TASKS = """
import ctypes, pathlib, subprocess, sys
from clarion_worker import Worker
worker = Worker()

@worker.task("holds-the-lock")
async def holds_the_lock() -> None:
    subprocess.run([sys.executable, "-S", "-c", "import fcntl; fcntl.fcntl(0, fcntl.F_SETFL, 0)"], check=True)
    pathlib.Path("held").touch()
    ctypes.PyDLL(None).sleep(600)

@worker.task("reads-what-is-typed")
def reads_what_is_typed() -> str:
    return subprocess.run(["cat"], stdout=subprocess.PIPE, text=True, check=True, timeout=10).stdout
"""


@pytest.fixture(autouse=True)
def ephemeral(monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
    """The tests' Postgres does without fsync, which worker processes would refuse; each test begins without jobs."""
    monkeypatch.setenv("CLARION_EPHEMERAL", "true")
    monkeypatch.setenv("CLARION_SWEEP_SECONDS", "0.2")
    monkeypatch.setenv("CLARION_DRAIN_TIMEOUT_SECONDS", "0.5")


@asynccontextmanager
async def two_processes(settings: Settings, jobs: Client, *flags: str, cwd: Path | None = None) -> AsyncIterator[Child]:
    """A supervisor whose two processes both work, one job at a time each."""
    command = [*clarion(), "worker", "--demo", "--processes", "2", "--concurrency", "1", "--log-format", "json"]
    async with running([*command, "--database-url", settings.database_url, *flags], cwd=cwd) as child:
        await until_seen(jobs, lambda seen: len(seen) == 2)
        yield child


async def until_seen(jobs: Client, condition: Callable[[dict[int, UUID]], bool]) -> dict[int, UUID]:
    """The ids of the workers that have said that they run, by their pids, once they are as wanted."""
    poll = anyio.Event()
    while True:
        seen = {
            int(worker.name.rpartition(":")[2]): worker.id
            for worker in await jobs.store.list_workers(limit=10)
            if worker.state == "running"
        }
        if condition(seen):
            return seen
        with anyio.move_on_after(0.02):
            await poll.wait()


async def until_there(path: Path) -> None:
    """Returns once the file is there; the test's own time limit is the only one."""
    poll = anyio.Event()
    while not await anyio.Path(path).exists():
        with anyio.move_on_after(0.02):
            await poll.wait()


async def both_busy(jobs: Client) -> list[Job]:
    """Two jobs that would sleep for long, each in a process of its own."""
    ids = await jobs.enqueue(*[NewJob(task="demo.sleep", args='{"seconds": 600}')] * 2)
    found = [await jobs.until(job_id, lambda job: job.state == "running") for job_id in ids]
    assert len({job.worker_id for job in found}) == 2
    return found


async def handed_back(jobs: Client, found: list[Job]) -> bool:
    """Whether all were released with their attempts, as only those do that drain."""
    now = [await jobs.store.get_job(job.id) for job in found]
    return all(job and (job.state, job.attempt, job.crashes) == ("ready", 0, 0) for job in now)


async def test_the_processes_share_a_queue_and_one_signal_drains_them_all(settings: Settings) -> None:
    async with client(settings) as jobs, two_processes(settings, jobs) as child:
        found = await both_busy(jobs)
        child.process.send_signal(signal.SIGTERM)
        assert await child.process.wait() == 0
        assert await handed_back(jobs, found)


async def test_a_signal_to_every_process_at_once_is_one_drain(settings: Settings) -> None:
    async with client(settings) as jobs, two_processes(settings, jobs) as child:
        found = await both_busy(jobs)
        for pid in (*children_of(child.process.pid), child.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert await child.process.wait() == 0
        assert await handed_back(jobs, found)


async def test_a_second_signal_ends_all_at_once(settings: Settings) -> None:
    flags = ("--drain-timeout-seconds", "600")
    async with client(settings) as jobs, two_processes(settings, jobs, *flags) as child:
        await both_busy(jobs)
        watched = Watched(*children_of(child.process.pid))
        child.process.send_signal(signal.SIGINT)
        await child.line_with("worker.drain_started")
        child.process.send_signal(signal.SIGINT)
        assert await child.process.wait() == 1
        await anyio.to_thread.run_sync(watched.await_death)


async def test_a_killed_process_is_replaced_and_its_job_runs_again(settings: Settings) -> None:
    async with client(settings) as jobs, two_processes(settings, jobs, "--lease-seconds", "1") as child:
        seen = await until_seen(jobs, lambda seen: len(seen) == 2)
        job, _ = await both_busy(jobs)
        (victim,) = [pid for pid, worker_id in seen.items() if worker_id == job.worker_id]
        os.kill(victim, signal.SIGKILL)
        exited = msgspec.json.decode(await child.line_with("worker.child_exited"))
        assert (exited["cause"], exited["pid"]) == ("SIGKILL", victim)
        again = await jobs.until(job.id, lambda job: (job.state, job.attempt) == ("running", 2))
        now = await until_seen(jobs, lambda now: bool(now.keys() - seen.keys()))
        assert (again.crashes, again.worker_id) == (1, now[(now.keys() - seen.keys()).pop()])
        child.process.send_signal(signal.SIGTERM)
        assert await child.process.wait() == 0


async def test_no_process_outlives_a_killed_supervisor(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "own_tasks.py").write_text(TASKS)
    async with (
        client(settings) as jobs,
        two_processes(settings, jobs, "own_tasks:worker", cwd=tmp_path) as child,
    ):
        await jobs.enqueue(NewJob(task="holds-the-lock"))
        await until_there(tmp_path / "held")
        watched = Watched(*children_of(child.process.pid))
        child.process.send_signal(signal.SIGKILL)
        await anyio.to_thread.run_sync(watched.await_death)


async def test_what_a_handler_starts_finds_nothing_on_standard_input(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "own_tasks.py").write_text(TASKS)
    async with client(settings) as jobs, two_processes(settings, jobs, "own_tasks:worker", cwd=tmp_path):
        job = await jobs.run(NewJob(task="reads-what-is-typed", max_attempts=1))
    assert (job.state, job.result) == ("succeeded", '""')


async def test_what_a_handler_starts_finds_nothing_on_standard_input_under_dev_either(tmp_path: Path) -> None:
    (tmp_path / "own_tasks.py").write_text(TASKS)
    async with dev(tmp_path, "own_tasks:worker", "--ephemeral") as (_, url):
        job = await run_job(url, task="reads-what-is-typed", max_attempts=1)
    assert (job["state"], job["result"]) == ("succeeded", "")


async def test_a_module_that_does_not_import_ends_the_command_and_is_said_once(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "raising.py").write_text("raise RuntimeError('at import')")
    command = [*clarion(), "worker", "raising:worker", "--processes", "3", "--database-url", settings.database_url]
    done = await anyio.run_process(command, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.decode().count("RuntimeError: at import")) == (2, 1)


async def test_a_database_without_a_schema_ends_the_command_and_is_said_once() -> None:
    url = settings_for("postgres").database_url
    done = await anyio.run_process(
        [*clarion(), "worker", "--demo", "--processes", "2", "--database-url", url], check=False
    )
    assert (done.returncode, done.stderr.decode().count("clarion migrate up")) == (1, 1)


async def test_when_every_process_was_drained_from_afar_the_supervisor_ends_too(settings: Settings) -> None:
    async with client(settings) as jobs, two_processes(settings, jobs, "--lease-seconds", "1") as child:
        for worker_id in (await until_seen(jobs, lambda seen: len(seen) == 2)).values():
            assert await jobs.store.drain_worker(worker_id)
        assert await child.process.wait() == 0


async def test_one_port_answers_for_all_processes(settings: Settings) -> None:
    port = free_port()
    flags = ("--health-port", str(port), "--hang-after-seconds", "2", "--drain-timeout-seconds", "1")
    async with (
        client(settings) as jobs,
        two_processes(settings, jobs, *flags) as child,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        ready = await until_status(http, "/readyz", 200)
        pids = [process["pid"] for process in ready.json()["processes"]]
        assert sorted(pids) == sorted(children_of(child.process.pid))
        assert (await http.get("/startupz")).status_code == 200

        os.kill(pids[0], signal.SIGSTOP)
        hung = await until_status(http, "/livez", 503)
        assert hung.json()["faults"] == [f"process {pids[0]} is hung"]
        os.kill(pids[0], signal.SIGCONT)
        await until_status(http, "/livez", 200)

        await both_busy(jobs)
        child.process.send_signal(signal.SIGTERM)
        draining = await until_status(http, "/readyz", 503)
        assert {process["state"] for process in draining.json()["processes"]} == {"draining"}
        assert (await http.get("/livez")).status_code == 200
        assert await child.process.wait() == 0


# -- With processes that are up at once, and do what a test wants


# The n-th life of the place executes the n-th script, the last one again and again.
LIFE = """
import os, signal, sys
here, fd = sys.argv[1:]
life = sum(name.startswith("life") for name in os.listdir(here))
open(f"{here}/life{life}", "x").close()
scripts = sorted(name for name in os.listdir(here) if name.startswith("script"))
exec(open(f"{here}/{scripts[min(life, len(scripts) - 1)]}").read())
"""
STARTS = """os.write(int(fd), b'{"state": "running"}\\n'); """
DRAINS = """os.write(int(fd), b'{"state": "draining"}\\n'); """


def supervisor_of(
    directory: Path, *scripts: str, stop: anyio.Event, count: int = 1, drain_max_seconds: float = 60
) -> Supervisor:
    """A supervisor of processes that are no workers."""
    for number, script in enumerate(scripts):
        (directory / f"script{number}").write_text(script)
    launch = Launch(
        command=[sys.executable, "-S", "-c", LIFE, str(directory)],
        environment={},
        drain_max_seconds=drain_max_seconds,
    )
    return Supervisor(launch, Settings(), count=count, stop=stop)


def lives(directory: Path) -> int:
    return len(list(directory.glob("life*")))


async def until_state(supervisor: Supervisor, state: ProcessState, *, restarts: int = 0) -> None:
    """Returns once the first process is so; the test's own time limit is the only one."""
    poll = anyio.Event()
    while (health := supervisor.look()[0]).state != state or health.restarts < restarts or health.pid is None:
        with anyio.move_on_after(0.01):
            await poll.wait()


async def test_a_process_that_dies_again_and_again_is_replaced_each_time(tmp_path: Path) -> None:
    stop = anyio.Event()
    supervisor = supervisor_of(
        tmp_path, STARTS + "sys.exit(3)", STARTS + "sys.exit(1)", STARTS + "signal.pause()", stop=stop
    )
    async with anyio.create_task_group() as group:
        group.start_soon(supervisor.run)
        await until_state(supervisor, ProcessState.RUNNING, restarts=2)
        stop.set()
    assert lives(tmp_path) == 3


async def test_what_keeps_the_first_process_from_starting_ends_them_all(tmp_path: Path) -> None:
    supervisor = supervisor_of(tmp_path, "sys.exit(7)", stop=anyio.Event(), count=3)
    assert (await supervisor.run(), lives(tmp_path)) == (7, 1)


async def test_a_first_process_that_ends_well_before_it_has_started_has_failed(tmp_path: Path) -> None:
    supervisor = supervisor_of(tmp_path, "sys.exit(0)", stop=anyio.Event(), count=3)
    assert (await supervisor.run(), lives(tmp_path)) == (1, 1)


async def test_a_replacement_that_cannot_start_is_tried_again(tmp_path: Path) -> None:
    supervisor = supervisor_of(tmp_path, STARTS + "sys.exit(2)", "sys.exit(2)", STARTS + DRAINS, stop=anyio.Event())
    assert (await supervisor.run(), lives(tmp_path)) == (0, 3)


async def test_a_process_that_ends_well_unasked_is_replaced(tmp_path: Path) -> None:
    supervisor = supervisor_of(tmp_path, STARTS + "os._exit(0)", STARTS + DRAINS, stop=anyio.Event())
    assert (await supervisor.run(), lives(tmp_path)) == (0, 2)


async def test_a_process_that_ends_well_when_it_was_told_to_stop_has_drained(tmp_path: Path) -> None:
    stop = anyio.Event()
    ends_well = "signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); "
    supervisor = supervisor_of(tmp_path, ends_well + STARTS + "signal.pause()", stop=stop)
    codes = []
    async with anyio.create_task_group() as group:

        async def run() -> None:
            codes.append(await supervisor.run())

        group.start_soon(run)
        await until_state(supervisor, ProcessState.RUNNING)
        stop.set()
    assert (codes, supervisor.look()[0].state) == ([0], ProcessState.DRAINED)


async def test_what_a_process_leaves_behind_that_ends_unasked_is_killed(tmp_path: Path) -> None:
    locks = "import fcntl; lock = open(f'{here}/lock', 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
    leaves_its_lock = locks + "os.fork() or signal.pause(); " + STARTS + "os._exit(0)"
    supervisor = supervisor_of(tmp_path, leaves_its_lock, locks + STARTS + DRAINS, stop=anyio.Event())
    assert (await supervisor.run(), lives(tmp_path)) == (0, 2)


def test_the_pause_before_a_replacement_doubles_to_half_a_minute() -> None:
    assert restart_seconds(0) == 0
    assert all(0.8 * wait <= restart_seconds(deaths) <= 1.2 * wait for deaths, wait in ((1, 0.1), (2, 0.2), (6, 3.2)))
    assert all(24 <= restart_seconds(deaths) <= 36 for deaths in (10, 20, 10_000))


async def test_a_process_that_is_killed_before_it_has_started_is_replaced(tmp_path: Path) -> None:
    supervisor = supervisor_of(tmp_path, "os.kill(0, signal.SIGKILL)", STARTS + DRAINS, stop=anyio.Event())
    assert (await supervisor.run(), lives(tmp_path)) == (0, 2)


async def test_a_process_that_reports_nonsense_does_not_end_the_supervisor(tmp_path: Path) -> None:
    nonsense = """os.write(int(fd), b'x' * 60_000 + b'\\n{\\n\\xff\\n{"state": "gone"}\\n'); """
    supervisor = supervisor_of(tmp_path, nonsense + STARTS + "sys.exit(3)", STARTS + DRAINS, stop=anyio.Event())
    assert (await supervisor.run(), lives(tmp_path)) == (0, 2)


async def test_the_others_wait_until_the_first_has_started(tmp_path: Path) -> None:
    stop = anyio.Event()
    supervisor = supervisor_of(tmp_path, "signal.pause()", stop=stop, count=2)
    codes = []
    async with anyio.create_task_group() as group:

        async def run() -> None:
            codes.append(await supervisor.run())

        group.start_soon(run)
        await until_state(supervisor, ProcessState.STARTING)
        assert supervisor.look()[1].pid is None
        stop.set()
    assert codes == [0], "what had not started had nothing to drain"


async def test_a_process_that_does_not_drain_in_time_is_killed_with_what_it_started(tmp_path: Path) -> None:
    stop = anyio.Event()
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); pid = os.fork(); "
    deaf += f"pid and open('{tmp_path}/forked', 'w').write(str(pid)); pid and {STARTS.strip('; ')}; signal.pause()"
    supervisor = supervisor_of(tmp_path, deaf, stop=stop, drain_max_seconds=0.05)
    codes = []
    async with anyio.create_task_group() as group:

        async def run() -> None:
            codes.append(await supervisor.run())

        group.start_soon(run)
        await until_state(supervisor, ProcessState.RUNNING)
        watched = Watched(int((tmp_path / "forked").read_text()))
        stop.set()
    assert codes == [1]
    await anyio.to_thread.run_sync(watched.await_death)


async def test_what_cannot_be_started_for_now_is_tried_again(tmp_path: Path) -> None:
    stop = anyio.Event()
    absent = tmp_path / "interpreter"
    launch = Launch(command=[str(absent)], environment={}, drain_max_seconds=60)
    supervisor = Supervisor(launch, Settings(), count=1, stop=stop)
    codes = []
    async with anyio.create_task_group() as group:

        async def run() -> None:
            codes.append(await supervisor.run())

        group.start_soon(run)
        while supervisor.look()[0].restarts == 0:
            await anyio.lowlevel.checkpoint()
        absent.write_text("""#!/bin/sh\necho '{"state": "draining"}' > /dev/fd/$1\n""")
        absent.chmod(0o755)
    assert codes == [0]


# It gets what its processes leave behind, as the first process of a container does. PR_SET_CHILD_SUBREAPER is 36.
REAPER = """
import ctypes, sys, anyio
from clarion.settings import Settings
from clarion_worker.supervisor import Launch, Supervisor

async def main():
    launch = Launch(command=sys.argv[1:], environment={}, drain_max_seconds=60)
    return await Supervisor(launch, Settings(), count=1, stop=anyio.Event(), reaps_orphans=True).run()

assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0
sys.exit(anyio.run(main, backend_options={"use_uvloop": True}))
"""
# What it forks leads a session of its own, which nobody ends with it.
LEAVES_ORPHAN = """
pid = os.fork()
if not pid:
    os.setsid()
    signal.pause()
while os.getsid(pid) != pid:
    pass
open(f"{here}/orphan", "w").write(str(pid))
"""
WAITS_FOR_SIGTERM = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open(f"{here}/waits", "w").close()
signal.sigwait([signal.SIGTERM])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives orphans to another process than the first")
async def test_a_supervisor_that_inherits_orphans_reaps_them_and_still_hears_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "script0").write_text(STARTS + LEAVES_ORPHAN + "sys.exit(3)")
    (tmp_path / "script1").write_text(STARTS + WAITS_FOR_SIGTERM + DRAINS)
    command = [sys.executable, "-c", REAPER, sys.executable, "-S", "-c", LIFE, str(tmp_path)]
    async with running(command) as child:
        await until_there(tmp_path / "waits")
        orphan = int((tmp_path / "orphan").read_text())
        (own,) = set(children_of(child.process.pid)) - {orphan}
        os.kill(orphan, signal.SIGKILL)
        poll = anyio.Event()
        while await anyio.Path(f"/proc/{orphan}").exists():
            with anyio.move_on_after(0.02):
                await poll.wait()
        os.kill(own, signal.SIGTERM)
        assert await child.process.wait() == 0
