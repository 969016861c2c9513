#!/usr/bin/env python3
"""Proves that the tests can fail: makes each mistake of `defects*.toml` in a copy of the tree, and runs its tests.

A defect is caught when its tests pass without it and fail with it. One that survives, or no longer applies, is an
error.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from rich.console import Console
from rich.table import Table

from clarion.embedded import running_postgres

ROOT = Path(__file__).resolve().parents[1]
CATALOGS = ("defects.toml", "defects_of_running.toml", "defects_of_waking.toml")
COPIED = ("app", "worker", "sql", "tests", "scripts", "pyproject.toml")
TIMEOUT_SECONDS = 180
# What the tests of the copy import, and read: to be sure that it is the copy's.
WHERE = """
import clarion, clarion_worker
from clarion.statements import sql_directory
print(clarion.__file__, clarion_worker.__file__, sql_directory(), sep="\\n")
"""

console = Console(stderr=True)


class DefectError(Exception):
    """The proof could not even be tried; the text says why."""


class Edit(msgspec.Struct, frozen=True):
    """A text that stands in a file once, and what a mistake puts there."""

    file: str
    before: str
    after: str

    def applied(self, text: str) -> str:
        """The file's text with the mistake in it."""
        if text.count(self.before) != 1 or self.before == self.after:
            raise DefectError(f"{self.file} holds this {text.count(self.before)} times, not once:\n{self.before}")
        return text.replace(self.before, self.after)


class Defect(msgspec.Struct, frozen=True):
    """A mistake, what it would break, and the tests that have to notice."""

    name: str
    breaks: str
    tests: list[str]
    edit: list[Edit]

    def applied(self, read: Callable[[str], str]) -> dict[str, str]:
        """The files that it changes, and their texts then; raises DefectError if it does not apply any more."""
        texts: dict[str, str] = {}
        for edit in self.edit:
            try:
                texts[edit.file] = edit.applied(texts.get(edit.file) or read(edit.file))
            except DefectError as error:
                raise DefectError(f"the defect {self.name} no longer applies: {error}") from error
        return texts


class Verdict(msgspec.Struct, frozen=True):
    """What came of a defect; `caught_by` is the test that failed, None if none did."""

    name: str
    breaks: str
    caught_by: str | None
    seconds: float


def catalog() -> list[Defect]:
    """Every defect, in the order of the files."""
    texts = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in CATALOGS]
    return msgspec.convert([defect for text in texts for defect in tomllib.loads(text)["defect"]], list[Defect])


class Copy:
    """A copy of the tree, where the tests run on a server of their own."""

    def __init__(self, directory: Path, server_url: str) -> None:
        self._directory = directory
        source_roots = [str(directory / "app"), str(directory / "worker")]
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CLARION_")},
            "CLARION_TEST_DATABASE_URL": server_url,
            # Before the paths of the environment, where the tree itself is installed.
            "PYTHONPATH": os.pathsep.join(source_roots),
            # Two texts of one file may have the same size and the same second.
            "PYTHONDONTWRITEBYTECODE": "1",
            # Hypothesis draws the same examples each time.
            "CI": "true",
        }

    @classmethod
    @contextmanager
    def made(cls) -> Iterator["Copy"]:
        """A copy that is gone with this context."""
        with TemporaryDirectory(prefix="clarion-defects-") as name, running_postgres(None) as server:
            directory = Path(name).resolve()
            for part in COPIED:
                if (ROOT / part).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
                    shutil.copytree(ROOT / part, directory / part, ignore=ignored)
                else:
                    shutil.copy2(ROOT / part, directory / part)
            copy = cls(directory, server.url)
            copy._check_imports()
            yield copy

    def _check_imports(self) -> None:
        done = self._run(["-c", WHERE])
        strangers = [path for path in done.stdout.split() if not Path(path).is_relative_to(self._directory)]
        if done.returncode or strangers:
            raise DefectError(f"the copy's code is not what its tests import: {strangers} {done.stderr}")

    @contextmanager
    def having(self, defect: Defect) -> Iterator[None]:
        """The copy with this mistake in it."""
        texts = defect.applied(self._read)
        whole = {path: self._read(path) for path in texts}
        self._write(texts)
        try:
            yield
        finally:
            self._write(whole)

    def first_failure(self, tests: Sequence[str]) -> str | None:
        """The first of the tests that fails; None when they pass. Raises DefectError when they cannot be run."""
        options = ["-x", "-q", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
        done = self._run(["-m", "pytest", *options, *tests])
        if done.returncode == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        if done.returncode != 1 or failed is None:
            raise DefectError(f"pytest {' '.join(tests)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return failed[1]

    def _run(self, arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self._directory,
            env=self._environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )

    def _read(self, path: str) -> str:
        return (self._directory / path).read_text(encoding="utf-8")

    def _write(self, texts: dict[str, str]) -> None:
        for path, text in texts.items():
            (self._directory / path).write_text(text, encoding="utf-8")


def judge(copy: Copy, defect: Defect) -> Verdict:
    """Whether the tests of a defect notice it."""
    started = time.monotonic()
    with copy.having(defect):
        caught_by = copy.first_failure(defect.tests)
    verdict = Verdict(defect.name, defect.breaks, caught_by, round(time.monotonic() - started, 1))
    console.print(f"{verdict.name}: {'caught' if caught_by else 'SURVIVED'} ({verdict.seconds} s)", highlight=False)
    return verdict


def prove(defects: Sequence[Defect]) -> list[Verdict]:
    """Makes each of the defects in turn, after a look whether their tests pass without."""
    with Copy.made() as copy:
        for defect in defects:
            with copy.having(defect):
                pass  # one that no longer applies is told before anything is run
        failure = copy.first_failure(sorted({test for defect in defects for test in defect.tests}))
        if failure is not None:
            raise DefectError(f"{failure} fails without any defect")
        return [judge(copy, defect) for defect in defects]


def show(verdicts: Sequence[Verdict], *, as_json: bool) -> None:
    """The table on standard output, or one JSON object."""
    if as_json:
        print(msgspec.json.encode({"survived": survivors(verdicts), "defects": verdicts}).decode())
        return
    table = Table("", "defect", "what it breaks", title="Deliberate defects")
    table.add_column("caught by", overflow="fold")
    table.add_column("s", justify="right")
    for verdict in verdicts:
        mark = "[green]✓[/]" if verdict.caught_by else "[red]✗[/]"
        caught_by = (verdict.caught_by or "nothing").removeprefix("tests/").replace("::", "\n").replace("[", "\\[")
        table.add_row(mark, verdict.name, verdict.breaks, caught_by, f"{verdict.seconds:.1f}")
    screen = Console()
    Console(width=None if screen.is_terminal else 150).print(table)


def survivors(verdicts: Sequence[Verdict]) -> list[str]:
    """The defects that no test noticed."""
    return [verdict.name for verdict in verdicts if verdict.caught_by is None]


def main() -> None:
    """Runs the proof; exits 1 when a defect survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="this defect; may be given more than once")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    defects = [defect for defect in catalog() if not options.only or defect.name in options.only]
    unknown = set(options.only or []) - {defect.name for defect in defects}
    if unknown:
        parser.error(f"there is no defect {', '.join(sorted(unknown))}; see --list")
    if options.list:
        for defect in defects:
            print(f"{defect.name}: {defect.breaks}")
        return
    try:
        verdicts = prove(defects)
    except (DefectError, subprocess.TimeoutExpired) as error:
        sys.exit(f"cannot prove: {error}")
    show(verdicts, as_json=options.json)
    sys.exit(1 if survivors(verdicts) else 0)


if __name__ == "__main__":
    main()
