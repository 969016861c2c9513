"""The house style, as far as a machine can check it: needs no database, only the text of the files.

Each test collects every offender, so that one run names all of them.
"""

import ast
import gc
import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import pytest

from clarion.events import Event
from clarion.execution import AttemptOutcome
from clarion.job import TRANSITIONS, DeadReason, JobEvent, JobState

ROOT = Path(__file__).resolve().parents[1]
LINES_MAX = 350

# Where `except Exception` may stand, once, and why; everywhere else a bug ends the process.
BLIND_EXCEPTS = {
    "app/clarion/api/middleware.py": "a bug in one request is answered with a 500 and logged; the others go on",
    "app/clarion/cli/worker.py": "a bug ends the process, also under handlers that will not end",
    "worker/clarion_worker/child.py": "whatever a handler raises is its attempt's failure",
    "worker/clarion_worker/outcomes.py": "an exception's own text may be code that raises",
    "worker/clarion_worker/runner.py": "whatever a handler raises is its attempt's failure",
}
# Where a task may be started outside a task group, and why.
LOOSE_TASKS = {"worker/clarion_worker/runner.py": "a task group could not let go of a handler that will not end"}
# Tests that may sleep, and why; the others age a row, await a step or wait for an event.
SLEEPERS = {"tests/test_event_loop.py": "blocks the event loop on purpose, to wake the detector"}

BANNED_NAMES = {"util", "utils", "common", "helper", "helpers", "manager", "managers", "base"}
# What asyncio offers to start or bound work outside a task group or a cancel scope.
UNSTRUCTURED = {"create_task", "ensure_future", "gather", "wait_for"}
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "fatal", "log", "msg"}
# The heading of a query that moves jobs: `-- Takes: running → scheduled, running → dead.`
TAKES = re.compile(r"^-- Takes: ([^.]+)\.", re.MULTILINE)
TAKES_NONE = re.compile(r"^-- Takes no edge\b", re.MULTILINE)


def files(*patterns: str) -> list[str]:
    """Paths below the root, the form in which every message names them."""
    found = (path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())
    return sorted({path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts})


PACKAGES = files("app/**/*.py", "worker/**/*.py")
TESTS = files("tests/**/*.py")
SCRIPTS = files("scripts/*")
PYTHON = [*PACKAGES, *TESTS, *files("scripts/*.py")]
MIGRATIONS = files("sql/migrations/*.sql")
QUERIES = {Path(path).stem: path for path in files("sql/queries/*.sql")}


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def nodes(path: str) -> Iterator[ast.AST]:
    # A collection in the midst of it may run finalizers, and Python 3.11 then loses count of its depth (gh-106905).
    gc.disable()
    try:
        return ast.walk(ast.parse(read(path), filename=path))
    finally:
        gc.enable()


def last_name(node: ast.expr | None) -> str:
    """`fetch` of `self._database.fetch`; empty for an expression without a name."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def calls_of(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Every call below whose first argument is a literal text: the name that is called, and the text."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and call.args:
            first = call.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield last_name(call.func), first.value


def words(name: str) -> set[str]:
    """`JobManager` and `job_manager` alike are `job` and `manager`."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def without_comments_and_quotes(sql: str) -> str:
    quoted = r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"[^\"]*\"|\$(\w*)\$.*?\$\1\$"
    return re.sub(quoted, " ", sql, flags=re.DOTALL)


# -- One statement, one file, one method, one name


def test_every_query_is_called_from_one_place() -> None:
    called = [text for path in PACKAGES for node in [ast.parse(read(path))] for _, text in calls_of(node)]
    assert not {name: called.count(name) for name in QUERIES if called.count(name) != 1}


def test_every_statement_that_is_called_has_a_file() -> None:
    called = {
        (path, text)
        for path in PACKAGES
        for name, text in calls_of(ast.parse(read(path)))
        if name in {"statement", "_fetch"}
    }
    assert called, "this test looks for the wrong calls"
    assert not {(path, text) for path, text in called if text not in QUERIES}


def test_a_store_method_has_the_name_of_its_query() -> None:
    store = files("app/clarion/store/*.py")
    methods = [node for path in store for node in nodes(path) if isinstance(node, ast.AsyncFunctionDef)]
    assert methods
    assert not {
        (method.name, text)
        for method in methods
        for _, text in calls_of(method)
        if text in QUERIES and text != method.name
    }


def test_a_query_file_opens_with_what_it_does() -> None:
    assert not [path for path in QUERIES.values() if not re.match(r"-- \S", read(path))]


def test_a_query_file_holds_one_statement() -> None:
    statements = {path: without_comments_and_quotes(read(path)).strip() for path in QUERIES.values()}
    assert not [path for path, sql in statements.items() if not sql or ";" in sql.removesuffix(";")]


# -- States


def sql_enum(name: str) -> list[str]:
    """The labels of an enum type as all migrations together leave it."""
    text = "\n".join(read(path) for path in MIGRATIONS)
    (created,) = re.findall(rf"create type clarion\.{name} as enum \(([^)]*)\)", text)
    added = re.findall(rf"alter type clarion\.{name} add value (?:if not exists )?'(\w+)'", text)
    return [*re.findall(r"'(\w+)'", created), *added]


@pytest.mark.parametrize(
    ("enum", "name"),
    [
        (JobState, "job_state"),
        (AttemptOutcome, "attempt_outcome"),
        (DeadReason, "dead_reason"),
        (JobEvent, "job_event"),
    ],
)
def test_python_and_postgres_have_the_same_names(enum: type[StrEnum], name: str) -> None:
    assert sorted(enum) == sorted(sql_enum(name))


def edges(text: str) -> set[tuple[JobState | None, JobState]]:
    """`running → dead, → ready` as pairs; None stands for "no job yet"."""
    pairs = [[state.strip() for state in edge.split("→")] for edge in text.replace("\n-- ", " ").split(",")]
    return {(JobState(before) if before else None, JobState(after)) for before, after in pairs}


def test_the_queries_that_move_jobs_are_those_of_the_table_of_transitions() -> None:
    assert {name for name, path in QUERIES.items() if TAKES.search(read(path))} == set(TRANSITIONS)


@pytest.mark.parametrize("name", TRANSITIONS)
def test_a_query_says_which_edges_it_takes(name: str) -> None:
    heading = TAKES.search(read(QUERIES[name]))
    assert heading, f"{QUERIES[name]} has no line `-- Takes: …`"
    assert edges(heading[1]) == TRANSITIONS[name]


def test_a_query_that_writes_jobs_says_which_edges_it_takes() -> None:
    writes = re.compile(r"\b(?:insert into|update|delete from) clarion\.jobs\b")
    writing = {path for path in QUERIES.values() if writes.search(without_comments_and_quotes(read(path)))}
    saying = {path for path in QUERIES.values() if TAKES.search(read(path)) or TAKES_NONE.search(read(path))}
    assert writing == saying


# -- Events


def test_every_event_is_used() -> None:
    attributes = [node for path in PACKAGES for node in nodes(path) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if last_name(node.value) == "Event"}
    assert not set(Event.__members__) - used


def test_an_event_is_a_noun_and_what_happened_to_it() -> None:
    assert not [event for event in Event if not re.fullmatch(r"[a-z_]+\.[a-z_]+", event)]
    assert not [event for event in Event if event.name != event.replace(".", "_").upper()]


def is_log_call(node: ast.AST) -> bool:
    """A line of Clarion's own; those of a handler, `ctx.log.info("rendering")`, are worded by its author."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    logger = node.func.value
    is_handlers_own = isinstance(logger, ast.Attribute) and last_name(logger.value) == "ctx"
    is_logger = bool(re.fullmatch(r"_?log(ger)?", last_name(logger)))
    return node.func.attr in LOG_METHODS and is_logger and not is_handlers_own


def test_no_log_line_has_an_event_of_its_own() -> None:
    calls = [
        (path, node) for path in PACKAGES for node in nodes(path) if isinstance(node, ast.Call) and is_log_call(node)
    ]
    assert calls, "this test looks for the wrong calls"
    assert not [f"{path}:{call.lineno}" for path, call in calls if any(map(is_text, call.args))]


# -- Sizes and names


def test_modules_are_short() -> None:
    lengths = {path: len(read(path).splitlines()) for path in [*PACKAGES, *SCRIPTS, *MIGRATIONS, *QUERIES.values()]}
    assert not {path: length for path, length in lengths.items() if length > LINES_MAX}


def test_modules_are_named_for_what_they_hold() -> None:
    assert not [path for path in [*PYTHON, *SCRIPTS] if words(Path(path).stem) & BANNED_NAMES]


def test_classes_are_named_for_what_they_do() -> None:
    classes = [(path, node.name) for path in PYTHON for node in nodes(path) if isinstance(node, ast.ClassDef)]
    assert not [(path, name) for path, name in classes if words(name) & BANNED_NAMES]


def test_nothing_is_left_for_later() -> None:
    everything = files("*", "app/**/*", "worker/**/*", "sql/**/*", "tests/**/*", "scripts/*", "docker/**/*")
    texts = [path for path in everything if Path(path).suffix in {".py", ".sql", ".md", ".toml", ".yaml", ""}]
    later = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
    assert not [path for path in texts if later.search(read(path))]


# -- Concurrency and errors


def taken_from(modules: set[str], path: str) -> set[str]:
    """What a file takes from these modules: by `from asyncio import sleep`, or as `asyncio.sleep`."""
    imported = [node for node in nodes(path) if isinstance(node, ast.ImportFrom) and node.module in modules]
    attributes = [node for node in nodes(path) if isinstance(node, ast.Attribute) and last_name(node.value) in modules]
    return {alias.name for node in imported for alias in node.names} | {node.attr for node in attributes}


def test_tests_do_not_sleep() -> None:
    assert {path for path in TESTS if "sleep" in taken_from({"anyio", "asyncio", "time"}, path)} == set(SLEEPERS)


def test_concurrency_is_structured() -> None:
    assert {path for path in PACKAGES if UNSTRUCTURED & taken_from({"asyncio", "loop"}, path)} == set(LOOSE_TASKS)


def is_blind(node: ast.AST) -> bool:
    """Whether it swallows what nobody thought of."""
    if isinstance(node, ast.Call) and last_name(node.func) == "suppress":
        caught: list[ast.expr | None] = [*node.args]
    elif isinstance(node, ast.ExceptHandler) and not any(isinstance(inner, ast.Raise) for inner in node.body):
        caught = [*node.type.elts] if isinstance(node.type, ast.Tuple) else [node.type]
    else:
        return False
    return any(error is None or last_name(error) in {"Exception", "BaseException"} for error in caught)


def test_only_the_handler_is_caught_blindly() -> None:
    found = [path for path in PACKAGES for node in nodes(path) if is_blind(node)]
    assert found == sorted(BLIND_EXCEPTS)
