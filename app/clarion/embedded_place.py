"""Where an embedded Postgres lives on disk, and the lock that keeps a second one out.

A directory holds `clarion.lock`, `postgres.log`, `data/` and `socket/`. As root the directory stays root's and only the
last two belong to the account of Postgres, so no other process of that account can plant a link that root follows.
No mode or owner of a directory that was there before is changed: where the account cannot get in, the data lives
elsewhere.
"""

import fcntl
import hashlib
import os
import tempfile
import time
from pathlib import Path
from secrets import token_hex

import msgspec

from clarion.errors import UsageError
from clarion.postgres_account import Account, choose_account
from clarion.postgres_binaries import create_directory

# Where root's data goes if the account of Postgres cannot enter the directory that was asked for.
STATE = Path("/var/lib/clarion")
# The shorter bound of the two: 104 bytes with the final NUL on macOS and the BSDs, 108 on Linux.
SOCKET_PATH_MAX_BYTES = 103
LOG_MAX_BYTES = 10 * 1024 * 1024
# How long to wait for the lock: a living holder may be about to let go, a dead one's server is shutting down.
HELD_PATIENCE_SECONDS = 0.5
DYING_PATIENCE_SECONDS = 15.0


class Place(msgspec.Struct, frozen=True):
    """The directory of one server, the account that runs it, and whether it is thrown away."""

    directory: Path
    account: Account
    durable: bool

    @property
    def data(self) -> Path:
        """What Postgres calls its data directory."""
        return self.directory / "data"

    @property
    def lock(self) -> Path:
        """Locked while any process of the server lives; holds the pid of the process that started it."""
        return self.directory / "clarion.lock"

    @property
    def log(self) -> Path:
        """The output of the server and its guard."""
        return self.directory / "postgres.log"


def choose_place(requested: Path | None) -> Place:
    """Where a server for `requested` lives; None: a new temporary directory. Nothing is created yet."""
    directory = _temporary_directory() if requested is None else requested.expanduser().resolve()
    account = choose_account(directory / "data")
    if not account.can_enter(directory):
        digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:8]
        directory = STATE / f"{directory.name}-{digest}"
        account = choose_account(directory / "data")
    return Place(directory, account, durable=requested is not None)


def create_place(place: Place) -> None:
    """Creates the directory if need be; UsageError if it holds something else."""
    # Root's directories let the account of Postgres through, to what belongs to it.
    create_directory(place.directory, mode=0o711 if place.account.borrowed else 0o700)
    if any(place.directory.iterdir()) and not place.lock.exists():
        raise UsageError(f"{place.directory} holds files that are not Clarion's. Give a new or empty directory.")


def create_socket_directory(place: Place) -> Path:
    """A private directory for the socket: in the server's own, or in /tmp if that path cannot be in a URL."""
    directory = place.directory / "socket"
    too_long = len(os.fsencode(directory / ".s.PGSQL.5432")) > SOCKET_PATH_MAX_BYTES
    if too_long or "," in str(directory):  # to libpq and asyncpg a comma starts the next host, however it is quoted
        directory = Path(tempfile.mkdtemp(prefix="clarion-", dir="/tmp"))  # TMPDIR may be long itself
    place.account.own(directory)
    return directory


def lock_place(place: Place) -> int:
    """The descriptor of the locked `clarion.lock`: the lock holds until its last copy is closed, in any process.

    Waits for a server that is shutting down; UsageError if another process uses the directory.
    """
    fd = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _wait_for_lock(fd, place.directory)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_log(place: Place) -> int:
    """A descriptor that appends to the log, which starts anew if it has grown over its bound."""
    fd = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if os.fstat(fd).st_size > LOG_MAX_BYTES:
        os.ftruncate(fd, 0)
    return fd


def _wait_for_lock(fd: int, directory: Path) -> None:
    started = time.monotonic()
    while not _try_lock(fd):
        holder = os.pread(fd, 20, 0).decode().strip()
        lives = bool(holder) and _lives(int(holder))
        if time.monotonic() - started > (HELD_PATIENCE_SECONDS if lives else DYING_PATIENCE_SECONDS):
            raise UsageError(
                f"{directory} is in use by process {holder}. Stop that one, or run with --ephemeral or another --db."
                if lives
                else f"The server that used {directory} is still shutting down. Try again, or run with --ephemeral."
            )
        time.sleep(0.01)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _temporary_directory() -> Path:
    return Path(tempfile.gettempdir()).resolve() / f"clarion-ephemeral-{token_hex(4)}"
