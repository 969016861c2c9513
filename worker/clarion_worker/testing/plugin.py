"""Clarion's fixtures for pytest, which finds them by itself where Clarion is installed.

`clarion_kit` is a Kit on a database that holds no jobs, `clarion_database_url` the address of that database. The
databases are made on the server that CLARION_TEST_DATABASE_URL names, beside the database in it, by a role that may
create some; or else on a private Postgres, `pip install 'clarion-jobs[embedded]'`, which all processes of pytest-xdist
share. Each test file has a database of its own, and each test finds it empty of jobs.

Everything is imported where it is used: pytest loads this in every run, also where nobody asks for a fixture.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from clarion_worker.testing import Kit

_VARIABLE = "CLARION_TEST_DATABASE_URL"


@pytest.fixture(scope="session")
def clarion_server_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The server that tests may create databases on; override it to use another."""
    if _VARIABLE in os.environ:
        return os.environ[_VARIABLE]
    from clarion.errors import UsageError
    from clarion_worker.testing.databases import shared_server

    is_one_of_many = hasattr(request.config, "workerinput")  # a process of pytest-xdist
    directory = tmp_path_factory.getbasetemp()
    # Not left in the fixture's teardown, which counts to the last test: it may have to wait for other processes.
    stack = ExitStack()
    request.config.add_cleanup(stack.close)
    try:
        return stack.enter_context(shared_server(directory.parent if is_one_of_many else directory))
    except UsageError as error:
        error.add_note(f"Tests may use another Postgres: set {_VARIABLE}.")
        raise


@pytest.fixture(scope="session")
def _clarion_template_url(clarion_server_url: str) -> Iterator[str]:
    from clarion_worker.testing.databases import database_on, migrate_database

    with database_on(clarion_server_url) as url:
        migrate_database(url)
        yield url


@pytest.fixture(scope="module")
def _clarion_file_database_url(clarion_server_url: str, _clarion_template_url: str) -> Iterator[str]:
    from clarion_worker.testing.databases import database_on

    with database_on(clarion_server_url, template_url=_clarion_template_url) as url:
        yield url


@pytest.fixture
def clarion_database_url(_clarion_file_database_url: str) -> str:
    """A database with Clarion's tables, and no jobs in them; the tables of the test file's own are left alone."""
    from clarion_worker.testing.databases import forget_jobs

    forget_jobs(_clarion_file_database_url)
    return _clarion_file_database_url


@pytest.fixture
def clarion_kit(clarion_database_url: str) -> "Kit":
    """A Kit on that database."""
    from clarion_worker.testing import Kit

    return Kit(clarion_database_url)
