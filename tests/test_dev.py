"""`clarion dev` as a newcomer meets it: real processes, a real Postgres of its own, the printed curl pasted."""

import json
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx2
import pytest

from verification import Child, clarion, running

TASKS = """
from clarion_worker import Worker
worker = Worker()

@worker.task("own")
async def own(number: int = 1) -> int:
    return number + ADD
"""


@asynccontextmanager
async def dev(directory: Path, *flags: str) -> AsyncIterator[tuple[Child, str]]:
    """`clarion dev` once it has printed its banner, and its URL; ended by SIGINT, as Ctrl-C does."""
    command = [*clarion(), "dev", "--port", "0", *flags]
    async with running(command, cwd=directory, merge_output=True) as child:
        url = (await child.line_with("Clarion is ready:")).split()[-1]
        await child.line_with("Ctrl-C stops")
        yield child, url
        if child.process.returncode is None:
            child.process.send_signal(signal.SIGINT)
            assert await child.process.wait() == 0


def processes_of(directory: Path) -> list[str]:
    """Command lines of live processes that name the directory, or whose working directory it is."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                here = Path(os.readlink(entry / "cwd"))
            except OSError:
                continue
            if str(directory) in command or here.is_relative_to(directory):
                found.append(command)
    return found


async def until_gone(directory: Path) -> None:
    """Returns when no process of the directory lives; the test's own time limit is the only one."""
    poll = anyio.Event()
    while processes_of(directory):
        with anyio.move_on_after(0.05):
            await poll.wait()


async def run_job(url: str, **body: object) -> dict[str, object]:
    """Adds a job over HTTP and waits for it."""
    async with httpx2.AsyncClient(base_url=url) as http:
        added = await http.post("/v1/jobs", json=body)
        assert added.status_code == 201, added.text
        answer = await http.get(added.headers["location"], params={"wait": "20s"}, timeout=30)
        found: dict[str, object] = answer.json()
        return found


async def test_the_printed_curl_works_when_pasted(tmp_path: Path) -> None:
    async with dev(tmp_path, "--ephemeral") as (child, url):
        pasted = (await child.line_with("curl")).strip()
        answer = await anyio.run_process(["bash", "-c", pasted])
        job = json.loads(answer.stdout)
        assert job["task"] == "demo.echo"
        async with httpx2.AsyncClient(base_url=url) as http:
            done = (await http.get(f"/v1/jobs/{job['id']}?wait=20s", timeout=30)).json()
    assert (done["state"], done["result"]) == ("succeeded", {"hello": "world"})


async def test_ctrl_c_leaves_nothing_running_and_the_next_start_finds_the_data(tmp_path: Path) -> None:
    async with dev(tmp_path) as (child, url):
        where = (await child.line_with("Data:")).split()[-1]
        job = await run_job(url, task="demo.echo", args={"kept": True})
    assert not processes_of(tmp_path)
    assert await anyio.Path(where).is_dir()
    async with dev(tmp_path) as (_, url), httpx2.AsyncClient(base_url=url) as http:
        assert (await http.get(f"/v1/jobs/{job['id']}")).json()["result"] == {"kept": True}


async def test_a_kill_leaves_nothing_running(tmp_path: Path) -> None:
    async with dev(tmp_path, "--ephemeral") as (child, _):
        assert processes_of(tmp_path)
        child.process.kill()
        await child.process.wait()
        await until_gone(tmp_path)


async def test_a_second_dev_on_the_same_data_says_so(tmp_path: Path) -> None:
    async with dev(tmp_path) as (_, url):
        second = await anyio.run_process([*clarion(), "dev", "--port", "0"], cwd=tmp_path, check=False)
        assert second.returncode == 2
        assert b"in use by process" in second.stderr
        assert (await run_job(url, task="demo.echo"))["state"] == "succeeded"


async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    async with dev(tmp_path, "--ephemeral") as (_, url):
        port = url.rpartition(":")[2]
        second = await anyio.run_process([*clarion(), "dev", "--ephemeral", "--port", port], cwd=tmp_path, check=False)
    assert second.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}".encode() in second.stderr


async def test_reload_runs_the_handler_as_it_is_written_now(tmp_path: Path) -> None:
    tasks = tmp_path / "my_tasks.py"
    tasks.write_text(TASKS.replace("ADD", "1"))
    async with dev(tmp_path, "my_tasks:worker", "--ephemeral", "--reload") as (child, url):
        assert (await run_job(url, task="own"))["result"] == 2
        tasks.write_text(TASKS.replace("ADD", "100"))
        await child.line_with("worker.child_reloaded")
        result: object = 2
        while result == 2:
            result = (await run_job(url, task="own"))["result"]
        assert result == 101


async def test_reload_survives_a_file_that_does_not_even_parse(tmp_path: Path) -> None:
    tasks = tmp_path / "my_tasks.py"
    tasks.write_text("this is not Python")
    async with dev(tmp_path, "my_tasks:worker", "--ephemeral", "--reload") as (child, url):
        await child.line_with("worker.child_exited")
        tasks.write_text(TASKS.replace("ADD", "1"))
        assert (await run_job(url, task="own"))["result"] == 2


async def test_a_worker_child_that_dies_is_started_again(tmp_path: Path) -> None:
    async with dev(tmp_path, "--ephemeral") as (child, url):
        started = await child.line_with("worker.started")
        workers = [int(pid) for pid in _children_of(child.process.pid) if "worker" in _command(pid)]
        os.kill(workers[0], signal.SIGKILL)
        await child.line_with("worker.child_exited")
        assert (await run_job(url, task="demo.echo"))["state"] == "succeeded"
        assert re.search("worker.started", started)


def _children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _command(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])  # noqa: S104  refused is what is tested
def test_serving_other_machines_without_a_token_is_refused(host: str) -> None:
    command = [*clarion(), "serve", "--host", host, "--database-url", "postgresql://nowhere/none"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "CLARION_API_TOKEN" in refused.stderr
