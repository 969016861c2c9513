"""Which account the embedded Postgres runs as: Postgres refuses root, so root lends it an existing account."""

import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from clarion.errors import UsageError

# Tried in this order. None is ours alone, so whatever only root may write stays root's.
UNPRIVILEGED = ("nobody", "postgres", "daemon")


class Account(msgspec.Struct, frozen=True):
    """The account of a process: the caller's own, or as root one that is given up to."""

    uid: int
    gid: int
    borrowed: bool

    def identity(self) -> dict[str, Any]:
        """Arguments of `subprocess` that start a command as this account."""
        return {"user": self.uid, "group": self.gid, "extra_groups": ()} if self.borrowed else {}

    def can(self, *command: str | Path) -> bool:
        """Whether the command succeeds as this account: the kernel is asked, so ACLs and noexec count too."""
        return self.output(*command) is not None

    def output(self, *command: str | Path) -> str | None:
        """What the command prints as this account; None if it cannot be run or fails."""
        try:
            ran = subprocess.run(
                command, check=False, cwd="/", env=clean_environment(),
                stdin=subprocess.DEVNULL, capture_output=True, text=True, **self.identity(),
            )  # fmt: skip
        except OSError:
            return None
        return ran.stdout if ran.returncode == 0 else None

    def can_enter(self, directory: Path) -> bool:
        """Whether this account can reach what is in `directory`, or would be once it is created."""
        existing = next(place for place in (directory, *directory.parents) if place.is_dir())
        return not self.borrowed or self.can_execute(existing)

    def can_execute(self, path: Path) -> bool:
        """Whether this account may run the program, or pass through the directory."""
        return self.can("/bin/sh", "-c", 'test -x "$0"', path)

    def own(self, directory: Path) -> None:
        """Creates the directory if need be and makes it readable by this account (and root) alone."""
        directory.mkdir(mode=0o700, exist_ok=True)
        if self.borrowed:
            os.chown(directory, self.uid, self.gid, follow_symlinks=False)


def clean_environment() -> dict[str, str]:
    """Nothing of the caller's: neither its PG* and LC_* variables nor its secrets, which the account could read."""
    passed_on = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    return {"LC_ALL": "C", "TZ": "UTC"} | {name: os.environ[name] for name in passed_on if name in os.environ}


def current_account() -> Account:
    """The account of this process."""
    return Account(os.geteuid(), os.getegid(), borrowed=False)


def choose_account(data: Path) -> Account:
    """For root the owner of existing `data`, else the first of UNPRIVILEGED that works; for others themselves."""
    if os.geteuid() != 0:
        return current_account()
    if data.exists():
        owner = data.stat()
        return Account(owner.st_uid, owner.st_gid, borrowed=True)
    for account in _unprivileged():
        # A sandbox may list accounts that its root cannot change to.
        if account.can("/bin/sh", "-c", ":"):
            return account
    raise UsageError(
        f"Postgres does not run as root, and none of the accounts {', '.join(UNPRIVILEGED)} can be used instead. "
        "Run Clarion as another user, or give --database-url."
    )


def _unprivileged() -> Iterator[Account]:
    for name in UNPRIVILEGED:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        yield Account(entry.pw_uid, entry.pw_gid, borrowed=True)
