"""What a type checker, and so an editor, knows of a job before it is enqueued."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Libraries whose types say nothing here are left out, which takes a third of the time.
CONFIG = f"""
[mypy]
strict = True
mypy_path = {ROOT / "app"}:{ROOT / "worker"}
[mypy-httpx2.*,asyncpg.*,structlog.*]
follow_imports = skip
"""

CODE = """
from clarion.client import AsyncClient, Client
from clarion_worker import Context, Worker

worker = Worker()

@worker.task("email.send")
async def send(ctx: Context, to: str, order_id: int = 0) -> dict[str, str]:
    return {"sent_to": to}

@worker.task("report.build")
def build(day: str) -> bytes:
    return day.encode()

async def right(client: AsyncClient, plain: Client) -> None:
    handle = await client.enqueue(send.job(to="ada@example.org", order_id=7), delay="5m", priority=3)
    reveal_type(await handle.result(timeout="20s"))
    reveal_type(await handle.result(type=int))
    reveal_type(plain.enqueue(build.job("today")).result())
    reveal_type((await client.enqueue_many([build.job("today")]))[0])
    reveal_type(await client.enqueue("by.name", {"n": 1}))
    reveal_type([job.finished_at async for job in client.list(state="dead")])

async def wrong(client: AsyncClient, plain: Client) -> None:
    send.job(to=7)
    send.job(too="ada@example.org")
    build.job()
    await client.enqueue(send.job("ada@example.org"), dellay="5m")
    await client.enqueue(build.job("today"), priority="high")
    plain.enqueue_many([build.job("today")], dellay="5m")
    plain.list(stat="dead")
"""

LINES = CODE.splitlines()
TOLD = re.compile(r"^<string>:(\d+): (?:error|note): (.+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The first thing that mypy says of each line that it has something to say of."""
    place = tmp_path_factory.mktemp("mypy")
    (place / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", ".", "-c", CODE]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, timeout=60)
    assert run.stderr == ""
    said = reversed(TOLD.findall(run.stdout))
    return {LINES[int(number) - 1].strip(): text for number, text in said}


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ('await handle.result(timeout="20s")', "dict[str, str]"),
        ("await handle.result(type=int)", "int"),
        ('plain.enqueue(build.job("today")).result()', "bytes"),
        ('(await client.enqueue_many([build.job("today")]))[0]', "clarion.client.asynchronous.AsyncJobHandle[bytes]"),
        ('await client.enqueue("by.name", {"n": 1})', "clarion.client.asynchronous.AsyncJobHandle[Any]"),
        (
            '[job.finished_at async for job in client.list(state="dead")]',
            "list[datetime.datetime | None]",
        ),
    ],
)
def test_a_result_has_the_type_that_the_handler_returns(told: dict[str, str], call: str, kind: str) -> None:
    assert told[f"reveal_type({call})"].replace("builtins.", "") == f'Revealed type is "{kind}"'


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ("send.job(to=7)", 'Argument "to" to "job" of "Task" has incompatible type "int"; expected "str"'),
        ('send.job(too="ada@example.org")', 'Unexpected keyword argument "too"'),
        ("build.job()", 'Missing positional argument "day"'),
        ('await client.enqueue(send.job("ada@example.org"), dellay="5m")', 'Unexpected keyword argument "dellay"'),
        ('await client.enqueue(build.job("today"), priority="high")', "No overload variant"),
        ('plain.enqueue_many([build.job("today")], dellay="5m")', 'Unexpected keyword argument "dellay"'),
        ('plain.list(stat="dead")', 'Unexpected keyword argument "stat"'),
    ],
)
def test_a_wrong_call_is_an_error_before_it_runs(told: dict[str, str], call: str, complaint: str) -> None:
    assert complaint in told[call]


def test_nothing_is_said_of_what_is_right(told: dict[str, str]) -> None:
    wrong = LINES[LINES.index("async def wrong(client: AsyncClient, plain: Client) -> None:") + 1 :]
    assert {line for line in told if not line.startswith("reveal_type(")} == {line.strip() for line in wrong}
