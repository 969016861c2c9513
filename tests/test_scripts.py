"""The verifications and the benchmark run as they lie in `scripts/`, on stacks of their own."""

import json
from pathlib import Path

import anyio
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
VERIFICATIONS = sorted(path.stem.removeprefix("verify_") for path in SCRIPTS.glob("verify_*.py"))


@pytest.fixture(autouse=True)
def no_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a fresh shell: no database is named."""
    monkeypatch.delenv("CLARION_DATABASE_URL", raising=False)
    monkeypatch.delenv("CLARION_EPHEMERAL", raising=False)


async def test_verify_e2e_proves_that_a_killed_worker_loses_nothing() -> None:
    # The time to take over is checked by CI in a run of its own; here the machine is shared with the other tests.
    command = [SCRIPTS / "verify_e2e.py", "--json", "--files", "1500", "--takeover-seconds", "60"]
    done = await anyio.run_process([str(part) for part in command], check=False)
    assert done.stdout, done.stderr.decode()
    report = json.loads(done.stdout)
    assert report["ok"], report
    assert [check["ok"] for check in report["checks"]] == [True] * 5
    assert report["checks"][0]["evidence"] == "1500 of 1500 digests agree"
    assert done.returncode == 0


async def test_verify_e2e_of_a_deployment_needs_its_database() -> None:
    command = [str(SCRIPTS / "verify_e2e.py"), "--url", "http://127.0.0.1:1"]
    done = await anyio.run_process(command, check=False)
    assert done.returncode == 1
    assert b"--url needs --database-url" in done.stderr


async def run_verify(*flags: str) -> tuple[int, str]:
    """Runs `scripts/verify`; its exit code and its standard output."""
    done = await anyio.run_process([str(SCRIPTS / "verify"), *flags], check=False)
    return done.returncode, done.stdout.decode()


async def test_verify_lists_every_verification_and_what_it_proves() -> None:
    code, said = await run_verify("--list")
    listed = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert code == 0
    assert sorted(listed) == VERIFICATIONS
    assert {claim.split()[0] for claim in listed.values()} == {"Proves"}


async def test_every_verification_can_be_run_alone_and_against_a_deployment() -> None:
    texts: dict[str, str] = {}

    async def ask(name: str) -> None:
        done = await anyio.run_process([str(SCRIPTS / f"verify_{name}.py"), "--help"])
        texts[name] = done.stdout.decode()

    async with anyio.create_task_group() as group:
        for name in VERIFICATIONS:
            group.start_soon(ask, name)
    flags = ("--url", "--database-url", "--token", "--json")
    assert not {(name, flag) for name, text in texts.items() for flag in flags if flag not in text}


async def test_verify_shows_what_was_proven_in_one_table() -> None:
    code, said = await run_verify("--only", "idempotency")
    [row] = [line for line in said.splitlines() if "verify_idempotency" in line]
    held, of, total = row.split("│")[2].split()
    assert (code, held, of) == (0, total, "of"), said
    assert "proven" in row


async def test_verify_goes_on_after_a_failure() -> None:
    code, said = await run_verify("--json", "--url", "http://127.0.0.1:1", "--only", "idempotency", "zombie")
    report = json.loads(said)
    results = {outcome["script"]: outcome["result"] for outcome in report["scripts"]}
    assert results == {"verify_idempotency": "COULD NOT RUN", "verify_zombie": "COULD NOT RUN"}
    assert (code, report["ok"]) == (1, False)
