"""The command line: what it prints, what it refuses, and with which exit code."""

import json
from collections.abc import Callable, Iterator

import anyio
import asyncpg
import pytest
from click.testing import CliRunner, Result

from clarion.cli import cli, main
from clarion.cli.worker import load_worker
from clarion.errors import UsageError
from clarion.settings import Settings, load_settings, unknown_variables
from conftest import settings_for


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command in this process; CLARION_ variables are unset."""
    monkeypatch.delenv("CLARION_DATABASE_URL", raising=False)
    return lambda *arguments: CliRunner().invoke(cli, arguments)


def test_help_lists_every_command_without_importing_the_service(run: Callable[..., Result]) -> None:
    shown = run("--help").output
    assert all(name in shown for name in ("dev", "serve", "worker", "scheduler", "migrate", "settings"))


@pytest.mark.parametrize("name", ["dev", "serve", "worker", "scheduler", "migrate", "settings"])
def test_every_command_explains_itself(run: Callable[..., Result], name: str) -> None:
    shown = run(name, "--help")
    assert shown.exit_code == 0
    assert "Usage:" in shown.output


def test_settings_show_what_is_in_force(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLARION_LEASE_SECONDS", "12.5")
    monkeypatch.setenv("CLARION_API_TOKEN", "do not print")
    shown = json.loads(run("settings", "--json").output)
    assert shown["CLARION_LEASE_SECONDS"] == 12.5
    assert "do not print" not in shown.values()


def test_a_flag_wins_over_the_environment() -> None:
    environ = {"CLARION_LEASE_SECONDS": "10", "CLARION_CONCURRENCY": "3"}
    settings = load_settings({"lease_seconds": "20", "concurrency": None}, environ)
    assert (settings.lease_seconds, settings.concurrency) == (20, 3)


def test_every_wrong_setting_is_named_at_once() -> None:
    environ = {"CLARION_LEASE_SECONDS": "soon", "CLARION_CONCURRENCY": "0", "CLARION_LOG_FORMAT": "xml"}
    with pytest.raises(UsageError) as caught:
        load_settings({}, environ)
    assert all(name in str(caught.value) for name in environ)


def test_a_variable_that_no_setting_reads_is_pointed_out_but_no_error() -> None:
    # Kubernetes sets this one by itself for a service called clarion.
    environ = {"CLARION_PORT": "tcp://10.0.0.1:80"}
    assert load_settings({}, environ) == Settings()
    assert unknown_variables(environ) == ["CLARION_PORT"]


@pytest.mark.parametrize("command", [("serve",), ("scheduler",), ("worker", "--demo"), ("migrate", "up")])
def test_without_a_database_a_command_says_how_to_name_one(run: Callable[..., Result], command: tuple[str]) -> None:
    refused = run(*command)
    assert isinstance(refused.exception, UsageError)
    assert "CLARION_DATABASE_URL" in str(refused.exception)


def test_an_unreachable_database_ends_a_migration_with_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLARION_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(SystemExit) as ended:
        main(["migrate", "up"])
    assert ended.value.code == 5
    assert capsys.readouterr().err.startswith("clarion: the database is unavailable")


@pytest.mark.parametrize("url", ["somewhere", "mysql://host/name", "postgresql://host:port/name"])
def test_a_database_url_that_is_none_is_refused(run: Callable[..., Result], url: str) -> None:
    refused = run("migrate", "up", "--database-url", url)
    assert isinstance(refused.exception, UsageError)
    assert "postgresql://user:password@host:5432/name" in str(refused.exception)


def test_a_database_that_does_not_exist_is_named(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLARION_DATABASE_URL", settings_for("not_there").database_url)
    with pytest.raises(SystemExit) as ended:
        main(["scheduler"])
    assert ended.value.code == 1
    assert 'database "not_there" does not exist' in capsys.readouterr().err


def test_migrate_up_status_and_sql(run: Callable[..., Result], empty_database: str) -> None:
    assert "pending" in run("migrate", "status", "--database-url", empty_database).output
    assert "applied 0001 jobs" in run("migrate", "up", "--database-url", empty_database).output
    assert "nothing to do" in run("migrate", "up", "--database-url", empty_database).output
    steps = json.loads(run("migrate", "status", "--json", "--database-url", empty_database).output)
    assert all(step["applied_at"] for step in steps)
    assert "create table clarion.jobs" in run("migrate", "sql").output


def test_a_worker_module_is_found_in_the_current_directory(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    with open("handlers_here.py", "w") as file:
        file.write("from clarion_worker import Worker\nworker = Worker()\n")
    assert load_worker("handlers_here:worker").tasks == {}


@pytest.fixture
def empty_database() -> Iterator[str]:
    """The URL of a database that was never migrated."""
    name = "clarion_test_cli_empty"

    async def make() -> None:
        connection = await asyncpg.connect(settings_for("postgres").database_url)
        await connection.execute(f'drop database if exists "{name}" with (force)')
        await connection.execute(f'create database "{name}"')
        await connection.close()

    async def drop() -> None:
        connection = await asyncpg.connect(settings_for("postgres").database_url)
        await connection.execute(f'drop database "{name}" with (force)')
        await connection.close()

    anyio.run(make)
    yield settings_for(name).database_url
    anyio.run(drop)
