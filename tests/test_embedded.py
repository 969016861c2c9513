"""The embedded Postgres as its user sees it: real servers, one shared directory where a fresh one is not the point."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from clarion import embedded_place
from clarion.embedded import running_postgres
from clarion.errors import UsageError
from clarion.postgres_account import current_account
from clarion.postgres_binaries import find_binaries
from postgres_processes import (
    Watched,
    ask,
    children_of,
    environment_of,
    owner_of,
    postmaster,
    reachable_directory,
    socket_of,
)


@pytest.fixture
def ground() -> Iterator[Path]:
    with reachable_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def used() -> Iterator[Path]:
    """A directory that has held a server before."""
    with reachable_directory() as directory:
        with running_postgres(directory / "pg"):
            pass
        yield directory / "pg"


def test_a_first_start_creates_the_database(ground: Path) -> None:
    with running_postgres(ground / "missing" / "pg") as server:
        assert ask(server, "select current_user || ' ' || current_database()") == "clarion clarion"
        assert ask(server, "select current_setting('server_encoding')") == "UTF8"
        assert server.directory == ground / "missing" / "pg"
    assert not (server.directory / "data" / "postmaster.pid").exists()


def test_data_is_found_again(used: Path) -> None:
    with running_postgres(used) as server:
        ask(server, "create table found_again as select 1 as n")
        assert ask(server, "select current_setting('fsync')") == "on"
    with running_postgres(used) as server:
        assert ask(server, "select n from found_again") == 1


def test_an_ephemeral_server_does_not_wait_for_the_disk_and_leaves_nothing() -> None:
    with running_postgres(None) as server:
        assert ask(server, "select current_setting('fsync')") == "off"
        assert socket_of(server).is_dir()
    assert not server.directory.exists()
    assert not socket_of(server).exists()


def test_it_listens_on_its_private_socket_only(used: Path) -> None:
    with running_postgres(used) as server:
        assert ask(server, "select current_setting('listen_addresses')") == ""
        assert stat.S_IMODE(socket_of(server).stat().st_mode) == 0o700


def test_the_environment_of_the_caller_changes_nothing(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("LC_ALL", "xx_YY.UTF-8")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("CLARION_API_TOKEN", "a secret")
    with running_postgres(used) as server:
        assert ask(server, "select current_setting('lc_messages') || current_setting('timezone')") == "CUTC"
        assert b"a secret" not in environment_of(postmaster(server.directory))


@pytest.mark.parametrize("name", ['with "quotes" & 100 % ütf', "with, a comma"])
def test_psql_understands_the_url_of_any_path(ground: Path, name: str) -> None:
    psql = find_binaries(current_account()).directory / "psql"
    with running_postgres(ground / name) as server:
        assert subprocess.check_output([psql, server.url, "-Atc", "select 1"], text=True) == "1\n"


def test_a_long_path_keeps_the_socket_short(ground: Path) -> None:
    with running_postgres(ground / ("long" * 30)) as server:
        assert len(os.fsencode(socket_of(server) / ".s.PGSQL.5432")) < 107
        assert stat.S_IMODE(socket_of(server).stat().st_mode) == 0o700
        assert ask(server, "select 1") == 1
    assert not socket_of(server).exists()
    assert server.directory.exists()


def test_options_reach_the_server(used: Path) -> None:
    with running_postgres(used, options={"max_connections": "23"}) as server:
        assert ask(server, "select current_setting('max_connections')") == "23"
    with running_postgres(used) as server:
        assert ask(server, "select current_setting('max_connections')") == "200"


def test_an_option_that_postgres_refuses_is_explained_by_its_log(used: Path) -> None:
    refused = pytest.raises(UsageError, match=r"(?s)The end of its log:.*unrecognized configuration parameter")
    with refused, running_postgres(used, options={"no_such_setting": "1"}):
        pass
    with running_postgres(used):
        pass


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_a_stopped_server_starts_again_with_its_data(used: Path, mode: Literal["smart", "fast", "immediate"]) -> None:
    with running_postgres(used) as server:
        ask(server, "create table if not exists stopped (mode text)")
        ask(server, "insert into stopped values ($1)", mode)
        server.stop(mode)
        server.stop(mode)
        with pytest.raises(OSError, match="No such file"):
            ask(server, "select 1")
        server.start()
        server.start()
        assert ask(server, "select count(*) from stopped where mode = $1", mode) == 1


def test_a_killed_server_starts_again_with_what_was_committed(used: Path) -> None:
    with running_postgres(used) as server:
        ask(server, "create table killed as select 1 as n")
        pid = postmaster(server.directory)
        watched = Watched(pid, *children_of(pid))
        server.kill()
        watched.await_death()
        server.start()
        assert ask(server, "select n from killed") == 1


def test_a_second_start_on_the_same_data_is_refused_and_names_the_holder(used: Path) -> None:
    with running_postgres(used) as server:
        pid = postmaster(server.directory)
        with pytest.raises(UsageError) as refusal, running_postgres(used):
            pass
        for part in (str(used), f"process {os.getpid()}", "--ephemeral", "another --db"):
            assert part in str(refusal.value)
        assert postmaster(server.directory) == pid


def test_data_of_another_version_is_refused_with_ways_out(used: Path) -> None:
    version = used / "data" / "PG_VERSION"
    ours = version.read_text()
    version.write_text("9.6\n")
    refused = pytest.raises(UsageError, match=r"of PostgreSQL 9\.6, the programs .* are \d+.*--database-url.*--db")
    with refused, running_postgres(used):
        pass
    version.write_text(ours)


def test_a_directory_with_other_files_is_left_alone(ground: Path) -> None:
    (ground / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not Clarion's"), running_postgres(ground):
        pass
    assert os.listdir(ground) == ["thesis.tex"]


def test_a_file_in_place_of_the_directory_is_refused(ground: Path) -> None:
    (ground / "pg").touch()
    with pytest.raises(UsageError, match="Not a directory"), running_postgres(ground / "pg"):
        pass


def test_a_log_over_its_bound_starts_anew(used: Path) -> None:
    os.truncate(used / "postgres.log", embedded_place.LOG_MAX_BYTES + 1)
    with running_postgres(used):
        assert (used / "postgres.log").stat().st_size < embedded_place.LOG_MAX_BYTES


def test_the_server_is_unprivileged_and_no_parent_directory_changes(ground: Path) -> None:
    parents = [ground, *ground.parents]
    before = [(place.stat().st_mode, place.stat().st_uid) for place in parents]
    with running_postgres(ground / "pg") as server:
        uid = owner_of(postmaster(server.directory))
        assert uid != 0
        assert uid == (server.directory / "data").stat().st_uid == socket_of(server).stat().st_uid
        assert server.directory.stat().st_uid == os.geteuid()
    assert [(place.stat().st_mode, place.stat().st_uid) for place in parents] == before


def test_what_root_wants_in_a_private_directory_lives_elsewhere(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_place, "STATE", ground / "state")
    private = ground / "private"
    private.mkdir(mode=0o700)
    # Only root's Postgres runs as another account, which cannot enter.
    home = ground / "state" if os.geteuid() == 0 else private
    with running_postgres(private / "pg") as server:
        ask(server, "create table kept as select 1 as n")
        assert server.directory.parent == home
    with running_postgres(private / "pg") as server:
        assert ask(server, "select n from kept") == 1
    assert [place.name[:2] for place in home.iterdir()] == ["pg"]
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
