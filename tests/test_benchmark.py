"""The benchmark: what it makes of what it measured, and that it measures, on small sizes."""

import re
import signal
import sys
from pathlib import Path
from xml.etree import ElementTree

import anyio
import msgspec
import pytest

from benchmark import RUN_FILE, chosen, encode_run, parser, read_run
from benchmark_drain import CONCURRENCIES
from benchmark_measure import QUICK, Outcome, Round, Run, Sizes, Target, family
from benchmark_report import END_MARK, MARK, chart, markdown, number
from benchmark_soak import Sample, growth
from benchmark_workloads import WORKLOADS, Row, rows_of

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "benchmark.py"
MACHINE = {
    "cpu": "A & B",
    "cores": "2",
    "memory": "8 GB",
    "kernel": "6.1",
    "postgres": "18.0",
    "settings": "fsync = on",
    "python": "3.11.0",
    "clarion": "0.1.0",
    "date": "2026-01-01",
}


def rates(*values: float) -> list[Round]:
    return [Round({"rate": value}, postgres_cpu=0.05, our_cpu=0.1) for value in values]


DRAIN = Outcome(
    "drain",
    1.0,
    {
        "floor_100": rates(900, 1000, 1100),
        "floor_500": rates(1000, 800, 1300),
        "default": rates(700, 500, 900),
        "quiet": rates(600, 650, 660),
    },
)
CURVE = Outcome(
    "concurrency",
    1.0,
    {"floor_100": rates(20_000), "floor_500": rates(21_000)} | {str(n): rates(100 * n, 90 * n) for n in CONCURRENCIES},
)


@pytest.fixture(autouse=True)
def no_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a fresh shell: no database is named."""
    monkeypatch.delenv("CLARION_DATABASE_URL", raising=False)


def row(name: str, *outcomes: Outcome) -> Row:
    (found,) = [each for each in rows_of(outcomes) if each.figure.name == name]
    return found


# -- What is made of what was measured


def test_the_better_floor_of_each_round_counts() -> None:
    assert row("drain", DRAIN).beside == [1000, 1000, 1300]


def test_the_ratio_is_that_of_the_medians() -> None:
    assert row("drain", DRAIN).ratio == 0.7


@pytest.mark.parametrize(("name", "verdict"), [("drain", "ok"), ("drain_quiet", "missed")])
def test_a_verdict_says_whether_the_target_was_reached(name: str, verdict: str) -> None:
    assert row(name, DRAIN).verdict == verdict


@pytest.mark.parametrize(
    ("target", "ratio", "value", "met"),
    [
        (Target(at_least=0.6), 0.6, 1.0, True),
        (Target(at_least=0.6), 0.59, 1.0, False),
        (Target(at_most=1.5), 1.5, 9.0, True),
        (Target(at_most=1.5), 1.51, 0.1, False),
        (Target(at_most=4, of_value=True), None, 3.9, True),
        (Target(at_most=4, of_value=True), 0.1, 4.1, False),
        (Target(at_least=2), None, 9.0, None),
    ],
)
def test_a_target_is_met_at_its_bound_and_not_beyond(
    target: Target, ratio: float | None, value: float, met: bool | None
) -> None:
    assert target.is_met(ratio=ratio, value=value) is met


def test_of_smaller_and_better_floors_the_smaller_counts() -> None:
    rounds = [Round({"p50": 3.0, "p99": 9.0})]
    latency = Outcome("latency", 1.0, {"floor": [Round({"p50": 2.0, "p99": 2.0})], "worker": rounds})
    assert (row("latency, p50", latency).verdict, row("latency, p99", latency).verdict) == ("ok", "missed")


def test_a_skipped_workload_has_no_row() -> None:
    assert not list(rows_of([Outcome("herd", 0.1, skipped="too few connections")]))


def test_every_workload_that_was_asked_for_is_there_with_its_target() -> None:
    targets = {each.name: [str(figure.target) for figure in each.figures] for each in WORKLOADS}
    assert targets | {"concurrency": [], "due": []} == {
        "drain": ["≥ 0.6 times", "≥ 0.75 times"],
        "drain2": ["≥ 1.3 times"],
        "enqueue": ["≥ 0.9 times", "≥ 2 times"],
        "bulk": ["≥ 0.5 times", "≥ 0.5 times"],
        "latency": ["≤ 1.5 times", "≤ 3 times"],
        "due": [],
        "http_workers": ["≥ 2 times"],
        "herd": ["≥ 0.6 times"],
        "herd_claims": ["≤ 4"],
        "backlog": ["≥ 0.9 times"],
        "snapshot": ["≥ 0.9 times"],
        "heartbeat": ["≤ 1.2 times", "≥ 0.95"],
        "retention": ["≤ 1", "≥ 0.9 times", "None"],
        "concurrency": [],
        "soak": ["≥ 0.95 times", "≤ 1.1", "≤ 1.1"],
    }


def test_a_quick_run_leaves_the_soak_out_unless_it_is_named() -> None:
    quick = [workload.name for workload, _ in chosen(parser().parse_args(["--quick"]))]
    named = [workload.name for workload, _ in chosen(parser().parse_args(["--quick", "--only", "soak"]))]
    assert quick == [each.name for each in WORKLOADS if each.name != "soak"]
    assert named == ["soak"]


def test_a_quick_run_is_smaller_in_everything_but_the_herd_and_what_is_held() -> None:
    full, quick = msgspec.structs.asdict(Sizes()), msgspec.structs.asdict(QUICK)
    assert {name for name in full if quick[name] >= full[name]} == {"herd_workers", "heartbeat_jobs"}


def test_a_tiny_run_still_has_something_to_do() -> None:
    assert min(msgspec.structs.astuple(QUICK.scaled(0.00001))) >= 3


def test_memory_that_grows_is_seen_in_the_worst_process() -> None:
    samples = [Sample({1: 1000, 2: 1000 + 10 * n}, 8192) for n in range(100)]
    assert growth(samples)["rss"] == pytest.approx(1945 / 1145, rel=0.01)


def test_a_hot_table_that_grows_is_seen() -> None:
    samples = [Sample({1: 1000}, 8192 * (1 + n // 70)) for n in range(100)]
    assert growth(samples)["table"] == 2


# -- What it is shown as


@pytest.mark.parametrize(
    ("value", "shown"), [(None, ""), (0.274, "0.27"), (17.31, "17.3"), (123.4, "123"), (16034.2, "16,034")]
)
def test_a_number_is_shown_with_the_places_that_say_something(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_markdown_holds_each_figure_with_what_stands_beside_it() -> None:
    text = markdown(Run(MACHINE, "full", [DRAIN, CURVE]))
    assert text.startswith(MARK)
    assert text.endswith(END_MARK)
    assert "| drain | 700 jobs/s | 500 to 900 | 1,000 (bare claim/complete loop" in text
    assert "A & B, 2 cores, 8 GB" in text
    assert "concurrency 1" not in text


def test_the_chart_is_an_image_that_says_what_it_shows() -> None:
    drawn = chart(Run(MACHINE, "full", [DRAIN, CURVE]))
    assert drawn is not None
    texts = [element.text or "" for element in ElementTree.fromstring(drawn).iter() if element.text]  # noqa: S314  ours
    for shown in ("9,500", "47,500", "throughput in jobs/s", *map(str, CONCURRENCIES)):
        assert shown in texts, shown
    assert any(text.startswith("A & B, 2 cores") for text in texts)
    assert "prefers-color-scheme: dark" in drawn


def test_a_run_is_kept_whole_with_a_line_for_each_workload(tmp_path: Path) -> None:
    run = Run(MACHINE, "full", [DRAIN, CURVE])
    kept = tmp_path / "run.json"
    kept.write_bytes(encode_run(run))
    assert read_run(kept) == run
    assert len(kept.read_text().splitlines()) == 2 + len(run.outcomes)


def test_there_is_no_chart_of_what_was_not_measured() -> None:
    assert chart(Run(MACHINE, "full", [DRAIN])) is None


def test_readme_shows_the_published_run() -> None:
    blocks = re.findall(f"{MARK}.*?{END_MARK}", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks == [markdown(read_run(RUN_FILE))]


# -- That it measures


async def run(*flags: str) -> str:
    """Runs the script; its standard output."""
    done = await anyio.run_process([sys.executable, str(SCRIPT), *flags], check=False)
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()
    return done.stdout.decode()


async def test_a_tiny_run_measures_each_side_and_can_be_shown_again(tmp_path: Path) -> None:
    kept = tmp_path / "run.json"
    names = ("drain", "enqueue", "http_workers")
    sizes = ("--quick", "--scale", "0.02", "--rounds", "1")
    shown = await run(*sizes, *(f"--only={name}" for name in names), f"--json={kept}")
    outcomes = read_run(kept).outcomes
    assert [outcome.name for outcome in outcomes] == list(names)
    rounds = [each for outcome in outcomes for side in outcome.rounds.values() for each in side]
    assert all(value > 0 for each in rounds for value in each.values.values())
    assert all(each.postgres_cpu is not None for each in rounds)
    assert await run(f"--from-json={kept}") == shown


async def test_an_interrupted_run_leaves_no_process_behind() -> None:
    # More rounds than it will ever come to.
    flags = ("--quick", "--scale", "0.02", "--only", "concurrency", "--rounds", "1000")
    # As a shell starts it in its background: with Ctrl-C ignored.
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, str(SCRIPT), *flags]
    async with await anyio.open_process(command, start_new_session=True) as process:
        began: set[int] = set()
        # Postgres, a scheduler, an API, and some of the workers.
        while len(began) < 12 and process.returncode is None:
            began = set(family(process.pid))
            with anyio.move_on_after(0.05):
                await process.wait()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
    assert not family(*began)
