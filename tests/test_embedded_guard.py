"""What is left of an embedded Postgres when somebody is killed: nothing. Real processes, real SIGKILLs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clarion.embedded import running_postgres
from clarion.errors import ClarionError
from postgres_processes import (
    DEATH_TIMEOUT_SECONDS,
    Watched,
    ask,
    children_of,
    parent_of,
    postmaster,
    reachable_directory,
    watch_server,
)

# Keeps a server until standard input ends; says where it lives and, if it has forked a child, who that is.
PARENT = """
import os, signal, sys
from pathlib import Path
from clarion.embedded import running_postgres

with running_postgres(Path(sys.argv[2]) if len(sys.argv) > 2 else None) as server:
    forked = os.fork() if sys.argv[1] == "forks" else -1
    if forked == 0:
        signal.pause()
    print(forked, server.directory, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def ground() -> Iterator[Path]:
    with reachable_directory() as directory:
        yield directory


@contextmanager
def parent_process(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PARENT, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def started(process: subprocess.Popen[str]) -> tuple[int, Path]:
    """The child that PARENT has forked and the directory of its server, once that runs."""
    assert process.stdout is not None
    forked, _, directory = process.stdout.readline().strip().partition(" ")
    return int(forked), Path(directory)


def test_a_killed_parent_leaves_no_process_and_no_directory() -> None:
    with parent_process("waits") as process:
        _, directory = started(process)
        watched = watch_server(directory)
        process.kill()
        watched.await_death()
    assert not directory.exists()


def test_a_forked_child_of_a_killed_parent_does_not_keep_the_server() -> None:
    with parent_process("forks") as process:
        forked, directory = started(process)
        watched = watch_server(directory)
        process.kill()
        watched.await_death()
        os.kill(forked, signal.SIGKILL)
    assert not directory.exists()


def test_a_forked_child_does_not_keep_the_parent_from_ending() -> None:
    with parent_process("forks") as process:
        forked, directory = started(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(DEATH_TIMEOUT_SECONDS) == 0
        os.kill(forked, signal.SIGKILL)
    assert not directory.exists()


def test_the_start_after_a_killed_parent_waits_for_its_server(ground: Path) -> None:
    with parent_process("waits", ground / "pg") as process:
        started(process)
        process.kill()  # and not waited for: its zombie still has the pid that the lock names
        with running_postgres(ground / "pg") as server:
            assert ask(server, "select 1") == 1


def test_a_killed_guard_takes_the_server_along() -> None:
    with running_postgres(None) as server:
        watched = watch_server(server.directory)
        os.kill(parent_of(postmaster(server.directory)), signal.SIGKILL)
        watched.await_death()
        with pytest.raises(ClarionError, match="guard process has ended"):
            server.stop()
    assert not server.directory.exists()


def test_an_ephemeral_server_that_was_killed_leaves_no_shared_memory() -> None:
    with running_postgres(None) as server:
        mapped = Path(f"/proc/{postmaster(server.directory)}/maps").read_text()
        (segment,) = {Path(line.split()[-1]) for line in mapped.splitlines() if "/dev/shm/PostgreSQL." in line}  # noqa: S108
        assert segment.exists()
        server.kill()
    assert not segment.exists()
    assert not server.directory.exists()


def test_a_ctrl_c_in_the_terminal_does_not_reach_the_server() -> None:
    with running_postgres(None) as server:
        pid = postmaster(server.directory)
        assert os.getsid(parent_of(pid)) != os.getsid(0)
        assert os.getsid(pid) != os.getsid(0)


@pytest.mark.parametrize("victim", ["parent", "guard", "initdb"])
def test_an_interrupted_initdb_is_done_anew(ground: Path, victim: str) -> None:
    with parent_process("waits", ground / "pg") as process:
        aside = ground / "pg" / "data.new"
        while not (aside / "base").exists():
            assert process.poll() is None
        (guard,) = children_of(process.pid)
        (initdb,) = children_of(guard)
        watched = Watched(initdb, guard)
        os.kill({"parent": process.pid, "guard": guard, "initdb": initdb}[victim], signal.SIGKILL)
        watched.await_death()
    assert not (ground / "pg" / "data").exists()
    with running_postgres(ground / "pg") as server:
        assert ask(server, "select 1") == 1
    assert not aside.exists()
