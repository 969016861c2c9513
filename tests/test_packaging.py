"""What people install: the wheel and the sdist, built offline with the hatchling of the development environment."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command that succeeds; what it printed is in the error otherwise."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(target: str, source: Path, out: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", out, cwd=source)
    (built,) = out.glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[target])
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one directory that the sdist holds."""
    directory = tmp_path_factory.mktemp("sdist")
    sdist = build("sdist", ROOT, directory)
    run("tar", "-xzf", sdist, cwd=directory)
    return directory / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel installed, and nothing of this repository in it."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    run(BIN / "uv", "venv", "--quiet", "--offline", "--no-project", "--python", sys.executable, venv, cwd=ROOT)
    install = ("pip", "install", "--quiet", "--offline", "--no-deps", "--python", venv / "bin" / "python")
    run(BIN / "uv", *install, wheel, cwd=venv)
    return venv / "bin"


def contents(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def tracked(*patterns: str) -> set[str]:
    found = (path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_both_packages_and_every_statement(wheel: Path) -> None:
    expected = {
        *(path.removeprefix("app/") for path in tracked("app/clarion/**/*")),
        *(path.removeprefix("worker/") for path in tracked("worker/clarion_worker/**/*")),
        *(f"clarion/{path}" for path in tracked("sql/**/*.sql")),
    }
    held = set(contents(wheel))
    assert expected <= held
    assert {"clarion/py.typed", "clarion_worker/py.typed", "clarion/sql/bootstrap.sql"} <= held
    assert "clarion/sql/queries/claim_jobs.sql" in held


def test_the_wheel_puts_nothing_else_into_an_environment(wheel: Path) -> None:
    top = {name.split("/")[0] for name in contents(wheel)}
    (metadata,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {"clarion", "clarion_worker", metadata}


def test_the_wheel_brings_the_command_and_the_licence(wheel: Path) -> None:
    files = contents(wheel)
    (entry_points,) = (name for name in files if name.endswith(".dist-info/entry_points.txt"))
    parser = ConfigParser()
    parser.read_string(files[entry_points].decode())
    assert dict(parser["console_scripts"]) == {"clarion": "clarion.cli:main"}
    assert [name for name in files if name.endswith(".dist-info/licenses/LICENSE")]


def test_the_sdist_builds_the_same_wheel(wheel: Path, unpacked_sdist: Path, tmp_path: Path) -> None:
    again = build("wheel", unpacked_sdist, tmp_path)
    assert contents(again) == contents(wheel)


def test_the_sdist_holds_what_its_tests_and_scripts_need(unpacked_sdist: Path) -> None:
    held = {path.relative_to(unpacked_sdist).as_posix() for path in unpacked_sdist.rglob("*") if path.is_file()}
    assert tracked("sql/**/*.sql", "tests/**/*.py", "scripts/*", "uv.lock", "Makefile", "LICENSE") <= held


def test_an_installed_clarion_finds_its_sql_from_anywhere(installed: Path, tmp_path: Path) -> None:
    script = "import clarion.statements as s; print(s.sql_directory(), len(s.migrations()), s.statement('claim_jobs'))"
    printed = run(installed / "python", "-c", script, cwd=tmp_path, PYTHONPATH=dependencies())
    where, count, statement = printed.split(" ", 2)
    assert Path(where).is_relative_to(installed.parent)
    assert int(count) == len(tracked("sql/migrations/*.sql"))
    assert statement.strip() == (ROOT / "sql/queries/claim_jobs.sql").read_text(encoding="utf-8").strip()


def test_the_installed_command_starts(installed: Path, tmp_path: Path) -> None:
    assert "Usage: clarion" in run(installed / "clarion", "--help", cwd=tmp_path, PYTHONPATH=dependencies())


def dependencies() -> str:
    """This environment's libraries; Clarion itself is in it by a .pth file, which PYTHONPATH does not read."""
    return sysconfig.get_path("purelib")
