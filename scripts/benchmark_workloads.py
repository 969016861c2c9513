"""The workloads in the order in which they are run, and the rows that their rounds make."""

import statistics
from collections.abc import Iterator, Sequence

import msgspec

from benchmark_drain import CONCURRENCY_CURVE, DRAIN, DRAIN2, SNAPSHOT
from benchmark_enqueue import BULK, ENQUEUE, HTTP_WORKERS
from benchmark_heartbeat import HEARTBEAT
from benchmark_herd import HERD, HERD_CLAIMS
from benchmark_life import BACKLOG, RETENTION
from benchmark_measure import Figure, Outcome, Round, Target
from benchmark_soak import SOAK
from benchmark_wake import DUE, LATENCY

WORKLOADS = (
    DRAIN, DRAIN2, ENQUEUE, BULK, LATENCY, DUE, HTTP_WORKERS, HERD, HERD_CLAIMS,
    BACKLOG, SNAPSHOT, HEARTBEAT, RETENTION, CONCURRENCY_CURVE, SOAK,
)  # fmt: skip


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A figure with what was measured: all rounds of ours, and of what stands beside it."""

    workload: str
    figure: Figure
    ours: list[float]
    beside: list[float]
    postgres_cpu: float | None
    our_cpu: float | None

    @property
    def median(self) -> float:
        """Ours."""
        return statistics.median(self.ours)

    @property
    def beside_median(self) -> float | None:
        """What stands beside it; None where nothing does."""
        return statistics.median(self.beside) if self.beside else None

    @property
    def ratio(self) -> float | None:
        """Ours to what stands beside it, of the medians."""
        return self.median / self.beside_median if self.beside_median else None

    @property
    def verdict(self) -> str:
        """Whether the target was reached: `ok` or `missed`; empty where there is none."""
        target = self.figure.target
        met = None if target is None else target.is_met(ratio=self.ratio, value=self.median)
        return {None: "", True: "ok", False: "missed"}[met]


def rows_of(outcomes: Sequence[Outcome]) -> Iterator[Row]:
    """Every figure for which there are rounds, in the order of the workloads."""
    measured = {outcome.name: outcome.rounds for outcome in outcomes if outcome.rounds}
    for workload in WORKLOADS:
        for figure in workload.figures if workload.name in measured else ():
            yield row_of(workload.name, figure, measured[workload.name])


def row_of(workload: str, figure: Figure, rounds: dict[str, list[Round]]) -> Row:
    """A figure, from the rounds of its sides."""
    ours = rounds[figure.ours.partition(".")[0]]
    return Row(
        workload=workload,
        figure=figure,
        ours=_values(rounds, figure.ours),
        beside=[_best(each, figure) for each in zip(*(_values(rounds, path) for path in figure.beside), strict=True)],
        postgres_cpu=_median([each.postgres_cpu for each in ours]),
        our_cpu=_median([each.our_cpu for each in ours]),
    )


def _values(rounds: dict[str, list[Round]], path: str) -> list[float]:
    side, _, value = path.partition(".")
    return [each.values[value] for each in rounds[side]]


def _best(values: Sequence[float], figure: Figure) -> float:
    """The better of several floors; of what is better when it is smaller, the smaller."""
    target = figure.target or Target(at_least=0)
    return max(values) if target.at_most is None else min(values)


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
