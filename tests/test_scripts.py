"""The verifications and the benchmark run as they lie in `scripts/`, on stacks of their own."""

import json
from pathlib import Path

import anyio
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def no_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a fresh shell: no database is named."""
    monkeypatch.delenv("CLARION_DATABASE_URL", raising=False)
    monkeypatch.delenv("CLARION_EPHEMERAL", raising=False)


async def test_verify_e2e_proves_that_a_killed_worker_loses_nothing() -> None:
    # The time to take over is checked by CI in a run of its own; here the machine is shared with the other tests.
    command = [SCRIPTS / "verify_e2e.py", "--json", "--files", "1500", "--takeover-seconds", "60"]
    done = await anyio.run_process([str(part) for part in command], check=False)
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


async def test_the_benchmark_measures_each_workload_beside_its_floor(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [str(SCRIPTS / "benchmark.py"), "--quick", "--rounds", "1", "--json", str(results)]
    done = await anyio.run_process(command, check=False)
    assert done.returncode == 0, done.stderr.decode()
    measured = json.loads(results.read_text())
    assert [result["name"] for result in measured] == ["drain", "enqueue", "latency", "due"]
    assert all(each["value"] > 0 for result in measured for each in [*result["ours"], *result["floor"]])
