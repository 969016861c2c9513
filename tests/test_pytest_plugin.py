"""The fixtures that come with Clarion, in projects that know no more of it than README does: pytest really runs."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

from clarion_worker.testing import databases
from clarion_worker.testing.databases import shared_server

INI = """
[pytest]
filterwarnings = error
asyncio_default_fixture_loop_scope = function
"""

TASKS = """
from clarion_worker import Context, Discard, SyncContext, Worker

worker = Worker()


@worker.task("email.send", queue="mail")
async def send(ctx: Context, to: str, order_id: int) -> dict[str, object]:
    if to.endswith("@example.invalid"):
        raise Discard("no such domain")
    return {"sent_to": to, "attempt": ctx.attempt}


@worker.task("report.build")
def build(ctx: SyncContext, day: str) -> str:
    first_page = ctx.checkpoint or 0
    ctx.heartbeat(3)
    return f"the report of {day}, from page {first_page}"
"""

HANDLER_TESTS = """
import pytest

from clarion_worker.testing import Kit, run_handler
from tasks import build, send, worker

pytestmark = pytest.mark.asyncio


async def test_a_mail_is_sent() -> None:
    run = await run_handler(worker, send.job(to="ada@example.org", order_id=7), attempt=2)
    assert run.result == {"sent_to": "ada@example.org", "attempt": 2}


async def test_a_mail_to_nowhere_is_given_up() -> None:
    run = await run_handler(worker, send.job(to="ada@example.invalid", order_id=7))
    assert (run.state, run.dead_reason) == ("dead", "not_retryable")


async def test_a_report_goes_on_after_a_crash(clarion_kit: Kit) -> None:
    job_id = await clarion_kit.enqueue(build.job(day="2026-11-22"), delay="1h")
    await clarion_kit.assert_enqueued("report.build", {"day": "2026-11-22"}, count=1)
    await clarion_kit.make_due(job_id)
    await clarion_kit.crash(worker)
    await clarion_kit.expire_leases()
    (run,) = await clarion_kit.drain(worker)
    assert (run.attempt, run.result) == (2, "the report of 2026-11-22, from page 3")
"""

SHARED_TESTS = """
import pytest
from pathlib import Path


@pytest.mark.asyncio
async def test_the_server_is_noted(clarion_server_url, clarion_kit):
    await clarion_kit.refute_enqueued("report.build")
    with Path("servers").open("a") as file:
        file.write(clarion_server_url + "\\n")
"""

WRONG_TESTS = """
from tasks import build, worker


async def test_it_was_a_mail(clarion_kit):
    await clarion_kit.enqueue(build.job(day="2026-11-22"))
    await clarion_kit.assert_enqueued("email.send", {"order_id": 7})
"""

ALONE_TESTS = """
import anyio

from tasks import build, worker


async def test_a_job_is_left_behind(clarion_kit):
    await clarion_kit.enqueue(build.job(day="2026-11-22"))


async def test_the_jobs_of_other_tests_are_gone(clarion_kit, clarion_database_url):
    assert clarion_kit.database_url == clarion_database_url
    await clarion_kit.refute_enqueued("report.build")


def test_a_test_need_not_be_async(clarion_kit):
    clarion_kit.sync_client().enqueue(build.job(day="2026-11-22"))
    assert [run.outcome for run in anyio.run(clarion_kit.drain, worker)] == ["succeeded"]
"""


def project(directory: Path, **files: str) -> Path:
    """A project with tasks, a configuration and these test files."""
    for name, text in {"pytest.ini": INI, "tasks.py": TASKS, **{f"{name}.py": files[name] for name in files}}.items():
        (directory / name).write_text(text)
    return directory


def run_pytest(directory: Path, *arguments: str, **environment: str) -> str:
    """What pytest prints, in that directory, with nothing of this run in its environment but what is given."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "CLARION_", "COVERAGE"))
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=directory, env=inherited | environment, check=False, capture_output=True, text=True, timeout=100
    )
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run on the server that this run has."""
    directory = project(
        tmp_path_factory.mktemp("project"), test_tasks=HANDLER_TESTS, test_wrong=WRONG_TESTS, test_alone=ALONE_TESTS
    )
    server = {"CLARION_TEST_DATABASE_URL": os.environ["CLARION_TEST_DATABASE_URL"]}
    return run_pytest(directory, "-v", "-o", "asyncio_mode=auto", **server)


def test_the_tests_of_handlers_pass(printed: str) -> None:
    outcomes = re.findall(r"^test_(?:tasks|alone)\.py::\w+ (\w+)", printed, re.MULTILINE)
    assert outcomes == ["PASSED"] * 6, printed


def test_what_fails_shows_the_line_of_the_test_and_what_is_there_instead(printed: str) -> None:
    assert "1 failed, 6 passed" in printed
    told = [line[1:].strip() for line in printed.splitlines() if line.startswith(("E  ", ">  "))]
    assert told == [
        'await clarion_kit.assert_enqueued("email.send", {"order_id": 7})',
        'AssertionError: expected at least 1, found 0 waiting: email.send with {"order_id":7}. There is:',
        'report.build in default, ready, {"day":"2026-11-22"}: it is report.build',
    ]


def test_processes_of_one_run_share_an_embedded_server_that_ends_with_it(tmp_path: Path) -> None:
    project(tmp_path, test_one=SHARED_TESTS, test_two=SHARED_TESTS)
    output = run_pytest(tmp_path, "-n", "2", "--dist", "loadfile")
    assert "2 passed" in output, output
    (server, same) = (tmp_path / "servers").read_text().split()
    assert server == same
    (socket_directory,) = parse_qs(urlsplit(server).query)["host"]
    assert not Path(socket_directory).exists()


def test_the_plugin_imports_nothing_but_itself() -> None:
    script = (
        "import sys, pytest, importlib; before = set(sys.modules); import clarion_worker.testing.plugin;"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["clarion_worker", "clarion_worker.testing", "clarion_worker.testing.plugin"]


# -- Sharing a server, with events instead of one


class Visitor(threading.Thread):
    """Uses the server of a directory until it is told to leave."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self._directory = directory
        self.url = ""
        self.arrived, self.leaving = threading.Event(), threading.Event()
        self.start()
        assert self.arrived.wait(10)

    def run(self) -> None:
        with shared_server(self._directory) as self.url:
            self.arrived.set()
            self.leaving.wait()

    def leave(self) -> None:
        self.leaving.set()
        self.join(10)
        assert not self.is_alive()


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of the servers that run."""
    running: list[str] = []
    started = iter(("first", "second"))

    @contextmanager
    def start(_directory: None, *, options: object) -> Iterator[SimpleNamespace]:
        url = next(started)
        running.append(url)
        yield SimpleNamespace(url=url)
        running.remove(url)

    monkeypatch.setattr(databases, "running_postgres", start)
    return running


def test_a_server_runs_until_the_last_of_its_users_has_left(tmp_path: Path, servers: list[str]) -> None:
    owner, guest = Visitor(tmp_path), Visitor(tmp_path)
    assert (owner.url, guest.url) == ("first", "first")
    owner.leaving.set()
    late = Visitor(tmp_path)
    assert (late.url, servers) == ("first", ["first"])
    guest.leave()
    assert servers == ["first"]
    late.leave()
    owner.leave()
    assert servers == []


def test_who_comes_after_the_last_starts_another(tmp_path: Path, servers: list[str]) -> None:
    Visitor(tmp_path).leave()
    assert servers == []
    visitor = Visitor(tmp_path)
    assert visitor.url == "second"
    visitor.leave()


def test_a_guest_may_leave_before_the_owner(tmp_path: Path, servers: list[str]) -> None:
    owner, guest = Visitor(tmp_path), Visitor(tmp_path)
    guest.leave()
    assert servers == ["first"]
    owner.leave()
    assert servers == []
