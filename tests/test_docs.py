"""README is code: its commands run, its examples work, its table is the settings."""

import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from clarion.cli.settings import markdown_table
from clarion.db import Database
from clarion.job import TRANSITIONS, JobState, NewJob
from clarion.settings import Settings, describe_settings
from running import client, running_worker
from verification import clarion, running

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()


def section(title: str) -> str:
    """The part of README under a heading of the second level."""
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a text: language and content."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@asynccontextmanager
async def dev(directory: Path, *arguments: str) -> AsyncIterator[str]:
    """A throw-away `clarion dev`; its URL."""
    async with running(
        [*clarion(), "dev", "--ephemeral", "--port", "0", *arguments], cwd=directory, merge_output=True
    ) as child:
        await child.line_with("worker.started")
        yield (await child.line_with("Clarion is ready:")).split()[-1]


async def test_the_tour_works_as_printed() -> None:
    tour = blocks(section("Five minutes"))
    assert len(tour) > 8
    async with dev(ROOT) as url:
        said = ""
        for language, content in tour:
            if language == "text":
                assert content.strip() in said
                continue
            script = content.replace("http://127.0.0.1:8080", url)
            done = await anyio.run_process(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT)
            said = done.stdout.decode()
            assert said


def python_blocks() -> list[str]:
    """The handlers, those with a lifespan, and the client; as README shows them."""
    return [content for language, content in blocks(section("Your own handlers")) if language == "python"]


async def test_the_handlers_of_the_readme_run(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(python_blocks()[0])
    async with dev(tmp_path, "tasks:worker") as url, httpx2.AsyncClient(base_url=url, timeout=30) as http:

        async def run(**job: object) -> dict[str, object]:
            added = await http.post("/v1/jobs", json=job)
            answer = await http.get(added.headers["location"], params={"wait": "20s"})
            found: dict[str, object] = answer.json()
            return found

        mail = {"task": "email.send", "queue": "mail"}
        sent = await run(**mail, args={"to": "ada@example.org", "order_id": 7})
        assert sent["result"] == {"sent_to": "ada@example.org", "attempt": 1}
        logs = await http.get(f"/v1/jobs/{sent['id']}/logs")
        assert [line["message"] for line in logs.json()["lines"]] == ["rendering"]
        refused = await run(**mail, args={"to": "ada@example.invalid", "order_id": 7})
        assert (refused["state"], refused["dead_reason"]) == ("dead", "not_retryable")
        assert (await run(task="report.build", args={"day": "2026-11-21"}))["result"] == "the report of 2026-11-21"
        assert (await run(task="video.encode", args={"path": "a.mov"}))["result"] == "A.MOV"

        script = tmp_path / "enqueue.py"
        script.write_text(python_blocks()[2].replace("http://127.0.0.1:8080", url))
        done = await anyio.run_process([sys.executable, str(script)], cwd=tmp_path)
        assert done.stdout.decode().strip() == str({"sent_to": "ada@example.org", "attempt": 1})


async def test_the_tests_of_the_readme_pass(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(python_blocks()[0])
    (tmp_path / "test_tasks.py").write_text(python_blocks()[3])
    done = await anyio.run_process([sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, check=False)
    assert b"3 passed" in done.stdout, done.stdout.decode()


async def test_the_shared_pool_and_the_transaction_of_the_readme_work(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLARION_DATABASE_URL", settings.database_url)
    names: dict[str, Any] = {}
    exec(python_blocks()[1], names)  # noqa: S102  README's own example
    await database.fetch("create table public.accounts (id integer, balance integer)")
    await database.fetch("insert into public.accounts values (1, 10)")
    async with client(settings) as inner, running_worker(names["worker"], settings):
        job = await inner.run(NewJob(task="account.credit", args='{"account": 1, "amount": 5}'))
    assert (job.state, job.result) == ("succeeded", '{"credited":5}')
    rows = await database.fetch("select balance from public.accounts")
    assert [row["balance"] for row in rows] == [15]


def test_the_table_of_settings_is_the_settings() -> None:
    table = README.split("--markdown` -->\n", 1)[1].split("\n<!-- /settings", 1)[0]
    assert table == markdown_table(describe_settings()), "run `clarion settings --markdown` and put it into README.md"


def test_the_commands_of_the_readme_exist() -> None:
    shell = "\n".join(content for language, content in blocks(README) if language == "sh")
    scripts = set(re.findall(r"^(scripts/\w+(?:\.py)?)", shell, re.MULTILINE))
    named = {
        "scripts/dev", "scripts/test", "scripts/verify", "scripts/verify_e2e.py", "scripts/defects.py",
        "scripts/benchmark.py",
    }  # fmt: skip
    assert scripts == named
    assert all((ROOT / script).stat().st_mode & 0o111 for script in scripts)


def test_the_diagram_of_the_states_shows_every_edge_and_no_other() -> None:
    diagram = next(content for language, content in blocks(ARCHITECTURE) if "stateDiagram" in content)
    drawn = {
        (None if source == "[*]" else JobState(source), JobState(target), verb)
        for source, target, verbs in re.findall(r"^\s*(\S+) --> (\w+): (.+)$", diagram, re.MULTILINE)
        for verb in verbs.split(", ")
    }
    stated = {
        (source, target, re.sub("_jobs?$", "", name)) for name, edges in TRANSITIONS.items() for source, target in edges
    }
    assert drawn == stated


def test_every_file_that_the_architecture_names_exists() -> None:
    named = set(re.findall(r"`((?:app|worker|sql|scripts|tests)/[\w./-]+)`", ARCHITECTURE))
    assert len(named) > 30
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
