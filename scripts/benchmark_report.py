"""What a run is shown as: a table on the terminal, one in Markdown for README, and the chart."""

from html import escape
from math import log10

from rich.console import Console
from rich.table import Table

from benchmark_drain import CONCURRENCY_CURVE
from benchmark_measure import Outcome, Run
from benchmark_workloads import Row, rows_of

MARK, END_MARK = "<!-- benchmark -->", "<!-- /benchmark -->"
COLUMNS = (
    "workload", "unit", "Clarion", "min to max", "beside", "ratio", "target", "verdict",
    "Postgres CPU s/1,000", "our CPU s/1,000",
)  # fmt: skip
_COLOURS = {"ok": "green", "missed": "red"}


def cells(row: Row) -> list[str]:
    """A row of the table, without what stands beside it in words."""
    return [
        row.figure.name,
        row.figure.unit,
        number(row.median),
        f"{number(min(row.ours))} to {number(max(row.ours))}",
        number(row.beside_median),
        number(row.ratio, digits=2),
        str(row.figure.target or ""),
        row.verdict,
        number(row.postgres_cpu, digits=3),
        number(row.our_cpu, digits=3),
    ]


def number(value: float | None, *, digits: int | None = None) -> str:
    """A number with three places that say something, or with so many digits; empty for none."""
    if value is None:
        return ""
    if digits is None:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def show(run: Run) -> None:
    """The table, what was not measured, and where."""
    table = Table(*COLUMNS)
    for row in rows_of(run.outcomes):
        shown = cells(row)
        colour = _COLOURS.get(row.verdict)
        table.add_row(*(f"[{colour}]{cell}[/]" if colour and cell == row.verdict else cell for cell in shown))
    screen = Console()
    console = Console(width=None if screen.is_terminal else 190, soft_wrap=True)
    console.print(table)
    for outcome in run.outcomes:
        if outcome.skipped or outcome.failed:
            console.print(f"{outcome.name}: {missing(outcome)}", markup=False)
    console.print(
        f"{place(run)}; {run.mode} run of {run.machine['date']}, Clarion {run.machine['clarion']}", markup=False
    )


def missing(outcome: Outcome) -> str:
    """Why a workload has no rows."""
    return f"skipped: {outcome.skipped}" if outcome.skipped else f"FAILED: {outcome.failed}"


def place(run: Run) -> str:
    """The machine in one line."""
    machine = run.machine
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory']}, Linux {machine['kernel']}, "
        f"PostgreSQL {machine['postgres']}, Python {machine['python']}"
    )


def markdown(run: Run) -> str:
    """The block of README, its marks included; concurrencies are left to the chart."""
    rows = [row for row in rows_of(run.outcomes) if row.workload != CONCURRENCY_CURVE.name]
    lines = [
        MARK,
        "| workload | Clarion | min to max | measured beside it | ratio | target | | Postgres CPU | our CPU |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
        *(_markdown_row(row) for row in rows),
        "",
        f"Medians of a {run.mode} run on {run.machine['date']}, Clarion {run.machine['clarion']}: {place(run)}; "
        f"{run.machine['settings']}. CPU in seconds per 1,000 jobs or heartbeats; ours is that of all our processes.",
        END_MARK,
    ]
    return "\n".join(lines)


def _markdown_row(row: Row) -> str:
    name, unit, ours, spread, beside, ratio, target, verdict, postgres_cpu, our_cpu = cells(row)
    beside = f"{beside} ({row.figure.beside_is})" if beside else ""
    verdict = {"ok": "✓", "missed": "✗ missed"}.get(verdict, "")
    shown = (name, f"{ours} {unit}", spread, beside, ratio, target, verdict, postgres_cpu, our_cpu)
    return "| " + " | ".join(shown) + " |"


# -- The chart

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 120, 84, 60
_STEPS = (1, 2, 2.5, 5, 10)
_STYLE = """
    .card { fill: #ffffff; stroke: #d0d7de } .grid { stroke: #d8dee4 } .axis { stroke: #6e7781 }
    .ink { fill: #1f2328 } .soft { fill: #59636e } .ours { stroke: #0969da } .dot { fill: #0969da }
    .name { fill: #0969da } .floor { stroke: #9a6700; stroke-dasharray: 7 5 } .floor-name { fill: #9a6700 }
    @media (prefers-color-scheme: dark) {
      .card { fill: #0d1117; stroke: #3d444d } .grid { stroke: #2a313c } .axis { stroke: #9198a1 }
      .ink { fill: #f0f6fc } .soft { fill: #9198a1 } .ours { stroke: #4493f8 } .dot { fill: #4493f8 }
      .name { fill: #4493f8 } .floor { stroke: #d29922 } .floor-name { fill: #d29922 }
    }
    text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif }
    .title { font-size: 17px; font-weight: 600 } .small { font-size: 12px }
    .middle { text-anchor: middle } .end { text-anchor: end }
"""


def chart(run: Run) -> str | None:
    """An SVG image of throughput against concurrency; None if that was not measured."""
    rows = [row for row in rows_of(run.outcomes) if row.workload == CONCURRENCY_CURVE.name]
    if not rows:
        return None
    floor = rows[0].beside_median or 0.0
    plot = _Plot([int(row.figure.name.split()[-1]) for row in rows], max(floor, *(max(row.ours) for row in rows)))
    points = [(plot.x(slots), plot.y(row.median)) for slots, row in zip(plot.slots, rows, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    end_x, end_y = points[-1]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="t d">',
        '<title id="t">Throughput of one worker against its concurrency</title>',
        f'<desc id="d">{escape(_spoken(plot.slots, rows, floor))}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{_HEIGHT - 1}" rx="8"/>',
        _text(24, 32, "One worker process: no-op jobs a second against its concurrency", "ink title"),
        _text(24, 54, place(run), "soft small"),
        *plot.axes(),
        f'<path class="floor" fill="none" stroke-width="2" d="M{_LEFT},{plot.y(floor):.1f}H{_WIDTH - _RIGHT}"/>',
        _text(_WIDTH - _RIGHT + 10, plot.y(floor) - 2, "floor: the bare", "floor-name small"),
        _text(_WIDTH - _RIGHT + 10, plot.y(floor) + 14, "statements", "floor-name small"),
        *(plot.whisker(slots, row) for slots, row in zip(plot.slots, rows, strict=True)),
        f'<polyline class="ours" fill="none" stroke-width="2.5" stroke-linejoin="round" points="{line}"/>',
        *(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>' for x, y in points),
        *(_text(x + 8, y - 12, number(row.median), "ink small end") for (x, y), row in zip(points, rows, strict=True)),
        _text(end_x + 10, _beside(end_y, plot.y(floor)), "Clarion", "name"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Plot:
    """Where a concurrency and a throughput lie: the one on a logarithmic axis, the other from zero."""

    def __init__(self, slots: list[int], highest: float) -> None:
        self.slots = slots
        self._step = _round_step(highest / 4)
        self._top = self._step * (int(highest * 1.05 / self._step) + 1)

    def x(self, slots: int) -> float:
        """From the left edge."""
        share = log10(slots / self.slots[0]) / log10(self.slots[-1] / self.slots[0])
        return _LEFT + 24 + share * (_WIDTH - _LEFT - _RIGHT - 48)

    def y(self, rate: float) -> float:
        """From the upper edge."""
        return _HEIGHT - _BOTTOM - rate / self._top * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> list[str]:
        """Grid lines, numbers, and what they count."""
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        rates = [self._step * n for n in range(round(self._top / self._step) + 1)]
        middle = (_TOP + bottom) / 2
        return [
            *(f'<path class="grid" d="M{_LEFT},{self.y(rate):.1f}H{right}"/>' for rate in rates),
            *(_text(_LEFT - 10, self.y(rate) + 4, f"{rate:,.0f}", "soft small end") for rate in rates),
            f'<path class="axis" d="M{_LEFT},{bottom}H{right}"/>',
            *(_text(self.x(slots), bottom + 20, str(slots), "soft small middle") for slots in self.slots),
            _text((_LEFT + right) / 2, bottom + 44, "concurrency: jobs that run at once (logarithmic)", "ink middle"),
            f'<g transform="rotate(-90 20 {middle})">{_text(20, middle + 4, "throughput in jobs/s", "ink middle")}</g>',
        ]

    def whisker(self, slots: int, row: Row) -> str:
        """From the least to the most of all rounds."""
        low, high = self.y(min(row.ours)), self.y(max(row.ours))
        return f'<path class="ours" stroke-width="1.5" opacity="0.6" d="M{self.x(slots):.1f},{low:.1f}V{high:.1f}"/>'


def _round_step(least: float) -> float:
    power: float = 10 ** int(log10(max(least, 1)))
    return next(step * power for step in _STEPS if step * power >= least)


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _beside(y: float, floor_y: float) -> float:
    """Where the name of the curve stands: at its end, and clear of the two lines that name the floor."""
    return max(y + 4, floor_y + 34) if y >= floor_y else min(y + 4, floor_y - 20)


def _spoken(slots: list[int], rows: list[Row], floor: float) -> str:
    measured = ", ".join(f"{row.median:,.0f} at {each}" for each, row in zip(slots, rows, strict=True))
    return f"Jobs per second by concurrency: {measured}. The floor, bare statements on one connection: {floor:,.0f}."
