#!/usr/bin/env python3
"""How fast Clarion is, beside the floor: the same statements driven by a bare connection, in the same run.

Absolute figures mean little on a shared machine; the ratio to what was measured beside them does. The sides of a
workload take turns, so that a noisy neighbour hits all of them. Shown are the median of several rounds, the least and
the most, and the CPU seconds that Postgres and all processes of ours spent on 1,000 jobs.

A full run takes about 20 minutes, of which `soak` takes 2; --quick takes under 90 seconds and leaves `soak` out.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import asyncpg
import httpx2
import msgspec

from benchmark_machine import describe_machine
from benchmark_measure import QUICK, Outcome, Round, Run, Sizes, SkippedError, Workload
from benchmark_report import chart, markdown, missing, show
from benchmark_stack import Bench, opened
from benchmark_workloads import WORKLOADS
from clarion.embedded import running_postgres
from clarion.errors import ClarionError
from clarion.settings import Settings
from verification import SCRIPTS, ProgressBar, VerificationError, console, progress_bar

# Where the published run and its chart lie.
RUN_FILE, CHART_FILE = SCRIPTS / "benchmark.json", SCRIPTS / "benchmark.svg"

# Nothing of an ephemeral server's haste: it waits for its disk, as one that matters does. Counting statements is off
# but for the workload that needs it.
_POSTGRES = {
    "fsync": "on",
    "full_page_writes": "on",
    "max_connections": "500",
    "shared_preload_libraries": "pg_stat_statements",
    "pg_stat_statements.track": "none",
    # A soak takes little longer than the minute after which autovacuum would come by: it must be seen at work.
    "autovacuum_naptime": "10s",
}
_FAILURES = (VerificationError, ClarionError, asyncpg.PostgresError, asyncpg.InterfaceError, httpx2.HTTPError, OSError)


def chosen(options: argparse.Namespace) -> list[tuple[Workload, int]]:
    """The workloads to run, and how many rounds each."""
    workloads = [each for each in WORKLOADS if each.name in options.only] if options.only else WORKLOADS
    return [
        (each, options.rounds or (each.quick_rounds if options.quick else each.full_rounds))
        for each in workloads
        if options.only or not (options.quick and each.full_only)
    ]


async def measure(options: argparse.Namespace, database_url: str, keep: Callable[[Run], None]) -> Run:
    """All rounds of all workloads; `keep` is handed what there is after each workload."""
    sizes = (QUICK if options.quick else Sizes()).scaled(options.scale)
    mode = ("quick" if options.quick else "full") + ("" if options.scale == 1 else f", sizes times {options.scale:g}")
    settings = Settings(database_url=database_url, ephemeral=True)
    plan = chosen(options)
    with (
        tempfile.TemporaryDirectory(prefix="clarion-benchmark-") as logs,
        progress_bar("rounds", sum(rounds for _, rounds in plan)) as bar,
    ):
        async with opened(settings, sizes, Path(logs)) as bench:
            run = Run(await describe_machine(bench.connection), mode, [])
            done = 0
            for workload, rounds in plan:
                run.outcomes.append(await outcome_of(workload, bench, Rounds(rounds, bar, done)))
                done += rounds
                keep(run)
    return run


class Rounds(msgspec.Struct, frozen=True):
    """How many rounds to run, and the bar that shows how far they are, with what was done before."""

    count: int
    bar: ProgressBar
    done: int


async def outcome_of(workload: Workload, bench: Bench, rounds: Rounds) -> Outcome:
    """Runs a workload; what goes wrong costs the others nothing."""
    started = time.monotonic()
    try:
        measured = await rounds_of(workload, bench, rounds)
    except SkippedError as error:
        outcome = Outcome(workload.name, time.monotonic() - started, skipped=str(error))
    except _FAILURES as error:
        outcome = Outcome(workload.name, time.monotonic() - started, failed=str(error) or type(error).__name__)
    except ExceptionGroup as group:
        if group.split(_FAILURES)[1] is not None:
            raise
        outcome = Outcome(workload.name, time.monotonic() - started, failed=str(group.exceptions[0]))
    else:
        return Outcome(workload.name, time.monotonic() - started, measured)
    console.print(f"{workload.name}: {missing(outcome)}", markup=False)
    rounds.bar.update(rounds.done + rounds.count)
    return outcome


async def rounds_of(workload: Workload, bench: Bench, rounds: Rounds) -> dict[str, list[Round]]:
    """Every side in turn, round after round."""
    measured: dict[str, list[Round]] = {}
    rounds.bar.name(f"{workload.name}: getting ready")
    async with workload.sides(bench) as sides:
        for n in range(rounds.count):
            for name, side in sides.items():
                rounds.bar.name(f"{workload.name}: {name}")
                measured.setdefault(name, []).append(await side())
            rounds.bar.update(rounds.done + n + 1)
    return measured


def parser() -> argparse.ArgumentParser:
    """The flags."""
    names = "".join(f"\n  {each.name:13} {each.what}" for each in WORKLOADS)
    made = argparse.ArgumentParser(
        description=f"{__doc__}\nworkloads:{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--dsn", help="a database that may be emptied; default: an ephemeral Postgres, fsync on")
    made.add_argument("--quick", action="store_true", help="fewer jobs and rounds: under 90 seconds")
    known = [each.name for each in WORKLOADS]
    made.add_argument("--only", action="append", metavar="NAME", choices=known, help="only this; may be repeated")
    made.add_argument("--rounds", type=int, help="rounds of each workload (default: 3, fewer of what takes long)")
    made.add_argument("--scale", type=float, default=1, help="how many of all jobs, rows, requests (default: 1)")
    made.add_argument("--json", metavar="FILE", nargs="?", type=Path, const=RUN_FILE, help="keep all rounds there")
    made.add_argument("--chart", metavar="FILE", nargs="?", type=Path, const=CHART_FILE, help="draw throughput there")
    made.add_argument(
        "--from-json",
        metavar="FILE",
        nargs="?",
        type=Path,
        const=RUN_FILE,
        help="show a run that was kept, measure nothing",
    )
    made.add_argument("--readme", action="store_true", help="print the table as README holds it")
    return made


def measured_run(options: argparse.Namespace) -> Run:
    """A run on the database that the flags name, or on one of our own."""

    def keep(run: Run) -> None:
        if options.json:
            options.json.write_bytes(encode_run(run))

    def run_on(url: str) -> Run:
        return anyio.run(measure, options, url, keep, backend_options={"use_uvloop": True})

    if options.dsn:
        return run_on(options.dsn)
    with running_postgres(None, options=_POSTGRES) as server:
        return run_on(server.url)


def encode_run(run: Run) -> bytes:
    """JSON, a line for each workload."""
    head = {"machine": run.machine, "mode": run.mode}
    lines = b",\n".join(map(msgspec.json.encode, run.outcomes))
    return msgspec.json.encode(head).removesuffix(b"}") + b',"outcomes":[\n' + lines + b"\n]}\n"


def read_run(file: Path) -> Run:
    """A run that was kept."""
    return msgspec.json.decode(file.read_bytes(), type=Run)


def main() -> None:
    """Measures, or reads what was measured; prints and draws it."""
    options = parser().parse_args()
    # Ended as Ctrl-C ends it, so that nothing that it started outlives it.
    # Shells start what is to run in their background with Ctrl-C ignored, and so this would be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        run = read_run(options.from_json) if options.from_json else measured_run(options)
    except KeyboardInterrupt:
        sys.exit(130)
    if options.readme:
        print(markdown(run))
    else:
        show(run)
    if options.chart:
        drawn = chart(run)
        if drawn is None:
            sys.exit("there is no chart without the workload `concurrency`")
        options.chart.write_text(drawn, encoding="utf-8")
    sys.exit(1 if any(outcome.failed for outcome in run.outcomes) else 0)


if __name__ == "__main__":
    main()
