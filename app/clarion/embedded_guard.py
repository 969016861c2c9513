"""The process between Clarion and its embedded Postgres: it starts the server and stops it when its parent is gone.

Why a process: a parent that is SIGKILLed can tidy nothing. The guard holds one end of a socket whose other end only
the parent has, so the parent's death, however it comes, is an end of file here. It leads a session of its own: a
Ctrl-C in the terminal reaches the parent, which still needs Postgres to drain. Should the guard itself be killed, the
kernel sends the server SIGQUIT (Linux): an immediate shutdown is safe for the data, and the only one that cannot hang
now that nobody is left to insist. Every process of the server inherits the locked file, so the lock is free exactly
when the last of them is gone.

Run by its path, and only on the standard library: it is up in 25 ms and needs nothing of the virtual environment.
The parent sends one word or two (`start`, `stop fast`, `kill`), and waits for `ok` or what went wrong.
"""

import ctypes
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

POLL_SECONDS = 0.005
PARENT_CHECK_SECONDS = 1.0
START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 5.0
ORPHAN_TIMEOUT_SECONDS = 2.0
STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Launch(NamedTuple):
    """What to run, and where; paths are absolute."""

    binaries: str
    data: str
    options: dict[str, str]
    account: list[int] | None  # uid and gid; None: as the guard itself
    durable: bool
    lock_fd: int
    remove: list[str]  # directories that go when the server has gone


class ParentGoneError(Exception):
    """The other end of the channel is closed."""


class ServerFailedError(Exception):
    """Postgres did not do what was asked; the log says more."""


class Guard:
    """One server, which may be stopped and started again, and the channel to the parent."""

    def __init__(self, launch: Launch, channel: socket.socket) -> None:
        self._launch = launch
        self._channel = channel
        self._parent_pid = os.getppid()
        self._server: subprocess.Popen[bytes] | None = None

    def serve(self) -> None:
        """Answers the parent until it is gone, then leaves nothing behind."""
        try:
            while True:
                self._answer(self._next_request())
        except ParentGoneError:
            os.ftruncate(self._launch.lock_fd, 0)  # whoever waits for the lock sees that it will be free soon
        finally:
            self._stop("fast")
            self._reap_orphans(ORPHAN_TIMEOUT_SECONDS)
            self._remove()

    def _next_request(self) -> list[str]:
        while not select.select([self._channel], [], [], PARENT_CHECK_SECONDS)[0]:
            # A forked child of the parent can hold the channel open beyond the parent's life.
            if os.getppid() != self._parent_pid:
                raise ParentGoneError
        try:
            request = self._channel.recv(100).decode().split()
        except OSError:
            request = []
        if not request:
            raise ParentGoneError
        return request

    def _answer(self, request: list[str]) -> None:
        try:
            match request:
                case ["start"]:
                    self._start()
                case ["stop", mode]:
                    self._stop(mode)
                case ["kill"]:
                    self._kill()
            answer = "ok"
        except (ServerFailedError, OSError) as error:
            self._stop("immediate")
            answer = str(error)
        try:
            self._channel.sendall(answer.encode())
        except OSError as error:
            raise ParentGoneError from error

    def _start(self) -> None:
        if self._server and self._server.poll() is None:
            return
        self._reap_orphans(ORPHAN_TIMEOUT_SECONDS)
        if not Path(self._launch.data).exists():
            self._create()
        self._server = self._spawn("postgres", "-D", self._launch.data, *self._settings())
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not self._ready(self._server.pid):
            if self._server.poll() is not None:
                raise ServerFailedError("postgres has exited")
            if time.monotonic() > deadline:
                raise ServerFailedError(f"postgres is not ready after {START_TIMEOUT_SECONDS:g} s")
            self._pause()

    def _create(self) -> None:
        """A new cluster with its database. Made aside and renamed: what bears the final name is whole."""
        aside = Path(f"{self._launch.data}.new")
        _remove_tree(str(aside))
        aside.mkdir(mode=0o700)
        if self._launch.account:
            os.chown(aside, *self._launch.account)
        self._run(
            "initdb", "-D", str(aside), "--username=clarion", "--auth=trust", "--encoding=UTF8", "--locale=C",
            "--no-instructions", *([] if self._launch.durable else ["--no-sync"]),
        )  # fmt: skip
        self._run(
            "postgres", "--single", "-D", str(aside), *self._settings(), "-c", "exit_on_error=on", "postgres",
            stdin=b"create database clarion\n",
        )  # fmt: skip
        aside.rename(self._launch.data)
        _sync_directory(aside.parent)

    def _run(self, program: str, *arguments: str, stdin: bytes = b"") -> None:
        """Runs to the end; killed if the parent goes first."""
        reading, writing = os.pipe()
        os.write(writing, stdin)  # a pipe holds far more than a statement, so this does not wait for the reader
        os.close(writing)
        child = self._spawn(program, *arguments, stdin=reading)
        os.close(reading)
        try:
            while child.poll() is None:
                self._pause()
        except ParentGoneError:
            child.kill()
            child.wait()
            self._reap_orphans(0)
            raise
        if child.returncode != 0:
            raise ServerFailedError(f"{program} ended with {child.returncode}")

    def _spawn(self, program: str, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        account = self._launch.account
        uid, gid = account or (None, None)
        return subprocess.Popen(
            [f"{self._launch.binaries}/{program}", *arguments],
            stdin=stdin,
            cwd="/",
            user=uid,
            group=gid,
            extra_groups=() if account else None,
            pass_fds=[self._launch.lock_fd],
            # The guard has one thread, so a function between fork and exec is safe here.
            preexec_fn=functools.partial(_die_with, os.getpid()),  # noqa: PLW1509  it only calls prctl
        )

    def _settings(self) -> list[str]:
        return [part for name, value in self._launch.options.items() for part in ("-c", f"{name}={value}")]

    def _ready(self, pid: int) -> bool:
        """The server writes its state into the eighth line of postmaster.pid; the first tells whose state it is."""
        try:
            lines = (Path(self._launch.data) / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    def _pause(self) -> None:
        """Waits a little. The parent says nothing until it is answered, so what comes now is its end."""
        if select.select([self._channel], [], [], POLL_SECONDS)[0] or os.getppid() != self._parent_pid:
            raise ParentGoneError

    def _stop(self, mode: str) -> None:
        """Down for certain when this returns; `smart` waits for the clients for as long as the parent lives."""
        server = self._server
        if server is None or server.poll() is not None:
            return
        if mode == "smart":
            server.send_signal(STOP_SIGNALS[mode])
            while server.poll() is None:
                self._pause()
            return
        for insistence in dict.fromkeys((mode, "immediate")):
            server.send_signal(STOP_SIGNALS[insistence])
            if _exits(server, STOP_TIMEOUT_SECONDS):
                return
        self._kill()

    def _kill(self) -> None:
        """The server and its children, as a crash of the machine would."""
        if self._server:
            self._server.kill()
            self._server.wait()
        self._reap_orphans(0)

    def _reap_orphans(self, timeout_seconds: float) -> None:
        """Waits for what a dead server left (on Linux all of it became the guard's), then kills the rest."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0 and time.monotonic() >= deadline:
                for orphan in _children(os.getpid()):
                    os.kill(orphan, signal.SIGKILL)
            if pid == 0:
                time.sleep(POLL_SECONDS)

    def _remove(self) -> None:
        if self._launch.remove and Path(self._launch.data, "postmaster.pid").exists():
            # Killed: its shared memory outlives it, until a start on the same data frees it.
            self._spawn("postgres", "--single", "-D", self._launch.data, *self._settings(), "postgres").wait()
        for directory in self._launch.remove:
            _remove_tree(directory)


def _sync_directory(directory: Path) -> None:
    """Makes a rename in it durable: else what is found after a power loss may bear the name of a half cluster."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_tree(directory: str) -> None:
    import shutil  # 10 ms that only those pay who remove something

    shutil.rmtree(directory, ignore_errors=True)


def _exits(process: subprocess.Popen[bytes], timeout_seconds: float) -> bool:
    try:
        process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _children(pid: int) -> list[int]:
    """From /proc: the parent's pid is the second field after the command in parentheses."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _LIBC.prctl(option, value, 0, 0, 0)


_LIBC = ctypes.CDLL(None)


def _die_with(guard_pid: int) -> None:
    """For the child, after it has changed its account (which would undo this) and before it becomes Postgres."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)
    if os.getppid() != guard_pid:
        os._exit(1)


def main() -> None:
    """Serves the parent over the socket that is standard input; the launch is the only argument, as JSON."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Only the parent decides; a service manager signals every process while the parent still drains.
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent that ignores it would hide here how programs end
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    with socket.socket(fileno=0) as channel:
        Guard(Launch(**json.loads(sys.argv[1])), channel).serve()


if __name__ == "__main__":
    main()
