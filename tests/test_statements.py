"""Every statement against the migrated schema: it prepares, and its columns are those its caller decodes.

Which struct or which columns a caller wants is read from its source, so nothing here needs to be kept up to date.
"""

from __future__ import annotations

import ast
import re
import types
from collections.abc import AsyncIterator
from datetime import datetime
from enum import StrEnum
from inspect import getsource
from typing import Any, get_args, get_origin, get_type_hints
from uuid import UUID

import asyncpg
import msgspec
import pytest

from clarion import migrate, wake
from clarion.db import connect_options
from clarion.execution import AttemptOutcome, Directive, WorkerRecord
from clarion.job import DeadReason, JobEvent, JobState
from clarion.settings import Settings
from clarion.statements import sql_directory, statement
from clarion.store import commands, execution, reading, upkeep

CALLERS = (commands, execution, reading, upkeep, migrate, wake)
QUERIES = sorted(path.stem for path in (sql_directory() / "queries").glob("*.sql"))
# What asyncpg makes of a column.
DECODED: dict[str, Any] = {
    "uuid": UUID,
    "text": str,
    "json": str,
    "int2": int,
    "int4": int,
    "int8": int,
    "float4": float,
    "float8": float,
    "bool": bool,
    "timestamptz": datetime,
    "text[]": list[str],
}
ENUMS: dict[str, type[StrEnum]] = {
    "job_state": JobState,
    "attempt_outcome": AttemptOutcome,
    "dead_reason": DeadReason,
    "job_event": JobEvent,
}


class Wanted(msgspec.Struct, frozen=True):
    """What the code does with a statement's rows."""

    structs: frozenset[type[msgspec.Struct]]
    columns: frozenset[str]


def wanted(name: str) -> Wanted:
    """The structs made of whole rows, and the columns looked up, by the one function that runs the statement."""
    for module in CALLERS:
        for function in ast.walk(ast.parse(getsource(module))):
            if isinstance(function, ast.AsyncFunctionDef) and name in texts_of(function):
                return Wanted(frozenset(structs_of(function, module)), frozenset(columns_of(function)))
    raise AssertionError(f"nobody runs {name}")


def texts_of(function: ast.AsyncFunctionDef) -> set[object]:
    """The literals with which it calls `_fetch` and `statement`."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and node.args]
    return {
        call.args[0].value
        for call in calls
        if isinstance(call.args[0], ast.Constant) and ast.unparse(call.func) in {"self._fetch", "statement"}
    }


def structs_of(function: ast.AsyncFunctionDef, module: types.ModuleType) -> set[type[msgspec.Struct]]:
    """`Lease(*row)` and `Job(*rows[0])`."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {
        getattr(module, ast.unparse(call.func))
        for call in calls
        if any(isinstance(arg, ast.Starred) and ast.unparse(arg.value) in {"row", "rows[0]"} for arg in call.args)
    }


def columns_of(function: ast.AsyncFunctionDef) -> set[str]:
    """`row["state"]` and `rows[0]["present"]`."""
    subscripts = [node for node in ast.walk(function) if isinstance(node, ast.Subscript)]
    return {
        str(subscript.slice.value)
        for subscript in subscripts
        if ast.unparse(subscript.value) in {"row", "rows[0]"}
        and isinstance(subscript.slice, ast.Constant)
        and isinstance(subscript.slice.value, str)
    }


def without_none(annotation: Any) -> Any:
    """`int` of `int | None`; strings for enums, which travel as text."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return kinds[0] if get_origin(annotation) is types.UnionType else annotation


@pytest.fixture
async def connection(settings: Settings) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection as the pool opens them."""
    opened = await asyncpg.connect(**connect_options(settings, name="test"))
    yield opened
    await opened.close()


@pytest.mark.parametrize("name", QUERIES)
async def test_the_columns_are_those_that_are_decoded(
    connection: asyncpg.Connection[asyncpg.Record], name: str
) -> None:
    attributes = (await connection.prepare(statement(name))).get_attributes()
    columns = {attribute.name: DECODED.get(attribute.type.name) for attribute in attributes}
    caller = wanted(name)
    assert len(columns) == len(attributes), "two columns have one name"
    assert caller.columns <= columns.keys()
    for struct in caller.structs:
        hints = get_type_hints(struct)
        assert list(columns) == list(struct.__struct_fields__)
        assert columns == {field: without_none(hints[field]) for field in struct.__struct_fields__}


@pytest.mark.parametrize("name", QUERIES)
async def test_a_statement_does_not_depend_on_the_search_path(
    connection: asyncpg.Connection[asyncpg.Record], name: str
) -> None:
    await connection.execute("set search_path = ''")
    await connection.prepare(statement(name))


@pytest.mark.parametrize("name", QUERIES)
async def test_every_parameter_is_explained_and_used(connection: asyncpg.Connection[asyncpg.Record], name: str) -> None:
    sql = statement(name)
    heading = "\n".join(line for line in sql.splitlines() if line.startswith("--"))
    explained = {int(number) for number in re.findall(r"\$(\d+)", heading)}
    for first, last in re.findall(r"\$(\d+) to \$(\d+)", heading):
        explained |= set(range(int(first), int(last) + 1))
    parameters = (await connection.prepare(sql)).get_parameters()
    assert explained >= set(range(1, len(parameters) + 1))


async def test_a_worker_is_recorded_field_by_field(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    parameters = (await connection.prepare(statement("record_workers"))).get_parameters()
    fields = [str if kind == list[str] else kind for kind in get_type_hints(WorkerRecord).values()]  # lists as JSON
    assert [DECODED[parameter.name.removesuffix("[]")] for parameter in parameters] == fields


def test_most_statements_are_decoded_by_somebody() -> None:
    """So that a change of style in the callers cannot make the other tests see nothing."""
    structs = {struct.__name__ for name in QUERIES for struct in wanted(name).structs}
    assert structs >= {"_Added", "Claimed", "Heartbeat", "Reaped", "Job", "JobSummary", "Ground", "Applied", "Ended"}
    assert wanted("release_jobs").columns == {"state", "queue", "sort_key"}
    assert wanted("record_logs").columns == {"kept"}


async def test_the_enums_of_postgres_are_those_of_python(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    rows = await connection.fetch("""
        select t.typname as name, array_agg(e.enumlabel::text order by e.enumsortorder) as labels
        from pg_enum as e join pg_type as t on t.oid = e.enumtypid
        where t.typnamespace = 'clarion'::regnamespace group by t.typname
    """)
    assert {row["name"]: row["labels"] for row in rows} == {name: list(enum) for name, enum in ENUMS.items()}


async def test_a_worker_can_be_told_what_it_understands(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    check = await connection.fetchval("""
        select pg_get_constraintdef(oid) from pg_constraint
        where conrelid = 'clarion.workers'::regclass and pg_get_constraintdef(oid) like '%directive%'
    """)
    assert set(re.findall(r"'(\w+)'", check)) == set(Directive)


def test_the_reaper_and_its_search_mean_the_same_jobs() -> None:
    def condition(name: str, grace: str) -> list[str]:
        after = statement(name).split("where\n", 1)[1].split("order by j.id", 1)[0].replace(grace, "$grace")
        lines = [" ".join(line.split()) for line in after.splitlines()]
        return [line for line in lines if line and "$7" not in line]

    assert condition("reap_jobs", "$6") == condition("find_expired", "$2")
