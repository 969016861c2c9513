"""Log lines: JSON, whole, in time."""

import json
import os
import select
import subprocess
import sys
from typing import Any

SETUP = """
import anyio, structlog
from clarion.log import configure_logging, written_together
from clarion.settings import Settings
configure_logging(Settings(log_format="json"))
log = structlog.get_logger()
"""


def lines_of(program: str) -> list[dict[str, Any]]:
    """What a program that logs writes to standard error."""
    run = subprocess.run(
        [sys.executable, "-c", SETUP + program], capture_output=True, check=True, timeout=30, env=dict(os.environ)
    )
    return [json.loads(line) for line in run.stderr.splitlines()]


def test_a_line_begins_with_its_time_its_level_and_its_event() -> None:
    (line,) = lines_of("log.bind(job=1).warning('tea.spilled', cups=2)")
    assert list(line) == ["time", "level", "event", "job", "cups"]
    assert (line["level"], line["event"], line["job"], line["cups"]) == ("warning", "tea.spilled", 1, 2)
    assert line["time"].endswith("Z")


def test_an_exception_is_logged_as_an_error_with_its_trace() -> None:
    (line,) = lines_of("""
try:
    1 / 0
except ZeroDivisionError:
    log.exception("division.failed")
""")
    assert line["level"] == "error"
    assert "ZeroDivisionError" in line["exception"]


def test_a_line_cannot_hide_when_it_was_said_or_how_loud() -> None:
    (line,) = lines_of("log.error('tea.spilled', time='never', level='debug')")
    assert line["level"] == "error"
    assert line["time"] != "never"


def test_what_is_no_unicode_is_logged_all_the_same() -> None:
    (line,) = lines_of(r"log.info('tea.spilled', name='\ud800')")
    assert "ud800" in line["fields"]


def test_lines_written_together_are_all_written_in_order() -> None:
    lines = lines_of("""
with written_together():
    for cup in range(1000):
        log.info("tea.spilled", cup=cup)
log.info("tea.over", cup=1000)
""")
    assert [line["cup"] for line in lines] == list(range(1001))


def test_lines_written_together_come_in_pieces_that_a_pipe_takes_whole() -> None:
    sizes = lines_of("""
import sys
sizes = []
class File:
    def write(self, data): sizes.append(len(data))
    def flush(self): pass
real = sys.stderr
sys.stderr = type("Stream", (), {"buffer": File(), "isatty": lambda self: False})()
configure_logging(Settings(log_format="json"))
with written_together():
    for cup in range(200):
        structlog.get_logger("pieces").info("tea.spilled", cup=cup, note="x" * (cup % 50))
sys.stderr = real
configure_logging(Settings(log_format="json"))
structlog.get_logger("sizes").info("sizes", sizes=sizes)
""")[0]["sizes"]
    assert max(sizes) <= select.PIPE_BUF
    assert len(sizes) < 20


def test_a_task_that_was_started_in_such_a_block_writes_at_once() -> None:
    lines = lines_of("""
async def later():
    await anyio.sleep(0)
    log.info("tea.later")

async def main():
    async with anyio.create_task_group() as group:
        with written_together():
            group.start_soon(later)

anyio.run(main)
""")
    assert [line["event"] for line in lines] == ["tea.later"]
