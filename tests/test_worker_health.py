"""What a worker answers to probes: alive, ready, started; for one process, and for several."""

import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import asyncpg
import httpx2
import msgspec
import pytest
from anyio.abc import ByteStream

from clarion.api import health_port
from clarion.api.health_port import answering_probes, bind_health_port, create_app
from clarion.db import Database
from clarion.job import NewJob
from clarion.probes import ProcessHealth, ProcessState, Vitals, WatchedProcess, live_faults, ready_faults
from clarion.settings import Settings
from clarion_worker.demo import demo
from clarion_worker.service import WorkerService
from running import client, running_worker
from verification import clarion, running

TASKS = """
import time
from clarion_worker import Worker
worker = Worker()

@worker.task("blocks")
async def blocks(seconds: float) -> None:
    time.sleep(seconds)
"""

CUT_OFF = """
    select pg_terminate_backend(pid) from pg_stat_activity
    where application_name = 'clarion listener' and datname = current_database()
"""
WELL = ProcessHealth(pid=1, state=ProcessState.RUNNING, running=0, restarts=0, started=True)


def processes(*states: ProcessState) -> list[ProcessHealth]:
    """Processes in these states, each with its place as its pid."""
    return [msgspec.structs.replace(WELL, pid=place, state=state) for place, state in enumerate(states, start=1)]


@pytest.mark.parametrize(
    ("states", "lives", "is_ready"),
    [
        ([ProcessState.RUNNING, ProcessState.RUNNING], True, True),
        ([ProcessState.RUNNING, ProcessState.STARTING], True, False),
        ([ProcessState.RUNNING, ProcessState.RESTARTING], True, False),
        ([ProcessState.RUNNING, ProcessState.HUNG], False, False),
        ([ProcessState.RUNNING, ProcessState.CUT_OFF], True, False),
        ([ProcessState.DRAINING, ProcessState.DRAINED], True, False),
        ([ProcessState.RESTARTING, ProcessState.RESTARTING], False, False),
    ],
)
def test_all_live_unless_one_hangs_and_are_ready_when_each_claims(
    states: list[ProcessState], lives: bool, is_ready: bool
) -> None:
    found = processes(*states)
    assert (not live_faults(found), not ready_faults(found)) == (lives, is_ready)


def test_a_process_that_says_nothing_hangs_once_it_has_started() -> None:
    watched = WatchedProcess(hang_after_seconds=0)
    assert watched.health().state is ProcessState.STARTING
    watched.hear(Vitals(ProcessState.RUNNING))
    assert watched.health().state is ProcessState.HUNG


def test_a_process_that_is_replaced_has_started_all_the_same() -> None:
    watched = WatchedProcess(hang_after_seconds=60)
    assert not watched.health().started
    watched.hear(Vitals(ProcessState.RUNNING, 3))
    assert watched.health() == ProcessHealth(None, ProcessState.RUNNING, running=3, restarts=0, started=True)
    watched.hear(Vitals(ProcessState.RESTARTING))
    assert watched.health().started


async def test_a_probe_answers_with_every_process_and_what_is_wrong() -> None:
    found = processes(ProcessState.RUNNING, ProcessState.DRAINING)
    transport = httpx2.ASGITransport(create_app(lambda: found))
    async with httpx2.AsyncClient(transport=transport, base_url="http://worker") as http:
        ready, live = await http.get("/readyz"), await http.get("/livez")
        assert (ready.status_code, ready.json()["faults"]) == (503, ["process 2 is draining"])
        assert (live.status_code, live.json()["status"]) == (200, "ok")
        assert live.json()["processes"][0] == {
            "pid": 1,
            "state": "running",
            "running": 0,
            "restarts": 0,
            "started": True,
        }
        assert (await http.head("/startupz")).status_code == 200
        assert (await http.get("/metrics")).status_code == 404


@asynccontextmanager
async def probed(host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A port that answers for one process, which is well."""
    with bind_health_port(host, 0) as listening:
        async with answering_probes(listening, lambda: [WELL]):
            yield listening.getsockname()[1]


async def hangs_up(connection: ByteStream) -> bool:
    """Whether the other side says nothing and closes it; waits until it does either."""
    try:
        await connection.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return True
    return False


async def test_idle_connections_keep_no_probe_out() -> None:
    async with probed() as port, AsyncExitStack() as held:
        idle = [await held.enter_async_context(await anyio.connect_tcp("127.0.0.1", port)) for _ in range(100)]
        for _ in range(10):
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
                assert (await http.get("/livez")).status_code == 200
        assert await hangs_up(idle[0]), "the oldest make room"


async def test_a_probe_keeps_no_connection() -> None:
    async with probed() as port, await anyio.connect_tcp("127.0.0.1", port) as connection:
        for request in (b"GET /livez HTTP/1.1\r\n", b"host: worker\r\n\r\n"):
            await connection.send(request)
        answer = b"".join([chunk async for chunk in connection]).lower()
        assert answer.startswith(b"http/1.1 200 ")
        assert b"\r\nconnection: close\r\n" in answer


async def test_a_request_that_is_never_completed_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_port, "_CONNECTION_SECONDS", 0.1)
    async with probed() as port, await anyio.connect_tcp("127.0.0.1", port) as connection:
        await connection.send(b"GET /livez HTTP/1.1\r\n")
        assert await hangs_up(connection)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this system has no sockets for both")
async def test_every_ipv6_address_is_every_address() -> None:
    async with probed("::") as port:
        for host in ("127.0.0.1", "[::1]"):
            async with httpx2.AsyncClient(base_url=f"http://{host}:{port}") as http:
                assert (await http.get("/livez")).status_code == 200


def free_port() -> int:
    """A port on which nobody listens, a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


async def until_status(http: httpx2.AsyncClient, path: str, status: int) -> httpx2.Response:
    """The first such answer; the test's own time limit is the only one."""
    poll = anyio.Event()
    while True:
        try:
            answer = await http.get(path)
        except httpx2.TransportError:
            answer = None
        if answer is not None and answer.status_code == status:
            return answer
        with anyio.move_on_after(0.02):
            await poll.wait()


async def test_a_worker_of_one_process_answers_for_itself_also_while_a_handler_blocks_it(
    settings: Settings, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLARION_EPHEMERAL", "true")
    (tmp_path / "blocking_tasks.py").write_text(TASKS)
    port = free_port()
    command = [*clarion(), "worker", "blocking_tasks:worker", "--health-port", str(port), "--hang-after-seconds", "2"]
    command += ["--database-url", settings.database_url, "--concurrency", "1"]
    async with (
        client(settings) as jobs,
        running(command, cwd=tmp_path) as child,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        assert (await until_status(http, "/readyz", 200)).json()["processes"][0]["pid"] == child.process.pid
        assert (await http.get("/startupz")).status_code == 200
        (job_id,) = await jobs.enqueue(NewJob(task="blocks", args='{"seconds": 600}'))
        await jobs.until(job_id, lambda job: job.state == "running")
        assert (await http.get("/livez")).status_code == 200
        hung = await until_status(http, "/livez", 503)
        assert hung.json()["faults"] == [f"process {child.process.pid} is hung"]
        child.process.send_signal(signal.SIGKILL)


async def test_a_worker_that_cannot_hear_the_database_is_not_ready_until_it_can(
    database: Database, settings: Settings
) -> None:
    async with running_worker(demo, settings, queues=["default"]) as service:
        await until(service, ProcessState.RUNNING)
        async with no_connections(settings):
            await database.fetch(CUT_OFF)
            await until(service, ProcessState.CUT_OFF)
        await until(service, ProcessState.RUNNING)


async def until(service: WorkerService, state: ProcessState) -> None:
    while service.vitals.state is not state:
        await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def no_connections(settings: Settings) -> AsyncIterator[None]:
    """The database takes no new connections meanwhile."""
    inside = await asyncpg.connect(settings.database_url)
    name = await inside.fetchval("select quote_ident(current_database())")
    await inside.close()
    outside = await asyncpg.connect(settings.database_url, database="postgres")
    try:
        await outside.execute(f"alter database {name} allow_connections false")
        yield
    finally:
        await outside.execute(f"alter database {name} allow_connections true")
        await outside.close()


async def test_a_port_that_is_taken_is_named(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [*clarion(), "worker", "--demo", "--database-url", settings.database_url]
        command += ["--health-host", "127.0.0.1", "--health-port", where.rpartition(":")[2]]
        for processes_flag in ("1", "2"):
            done = await anyio.run_process([*command, "--processes", processes_flag], check=False)
            assert done.returncode == 2
            assert f"cannot answer probes on {where}" in done.stderr.decode()
