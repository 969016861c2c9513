"""Plays the scenarios, some at once, and says of each promise whether it was kept."""

from collections.abc import Callable, Sequence

import anyio
import msgspec

from clarion.conformance.invariants import INVARIANTS, Invariant
from clarion.conformance.scenarios import SCENARIOS, Scenario
from clarion.conformance.trial import NotAsPromised, Trial, trial
from clarion.errors import UsageError


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Whether one promise was kept, and what shows it; `last_words` are what a worker that broke it printed last."""

    name: str
    ok: bool
    expected: str
    seen: str
    last_words: Sequence[str] = ()


class Examination(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to examine, and how."""

    command: Sequence[str]
    only: Sequence[str] = ()
    timeout_seconds: float
    at_once: int


def check_names() -> list[str]:
    """The names of all checks, in the order of the report."""
    return [check.name for check in (*SCENARIOS, *INVARIANTS)]


async def examine(examination: Examination, tell: Callable[[Finding], None]) -> list[Finding]:
    """Every finding; each is told as soon as those before it are. Raises UsageError if the command cannot start."""
    scenarios = [check for check in SCENARIOS if _is_wanted(check, examination)]
    invariants = [check for check in INVARIANTS if _is_wanted(check, examination)]
    # What holds always is looked for in whatever is played; alone, in everything.
    played = scenarios or list(SCENARIOS)
    results: dict[str, tuple[Finding, Trial]] = {}
    told: list[Finding] = []
    limiter = anyio.CapacityLimiter(examination.at_once)

    def tell_finding(finding: Finding) -> None:
        told.append(finding)
        tell(finding)

    async def play(scenario: Scenario) -> None:
        async with limiter:
            results[scenario.name] = await _play(scenario, examination)
        while len(told) < len(scenarios) and scenarios[len(told)].name in results:
            tell_finding(results[scenarios[len(told)].name][0])

    async with anyio.create_task_group() as group:
        for scenario in played:
            group.start_soon(play, scenario)
    trials = [seen for _, seen in results.values()]
    for invariant in invariants:
        tell_finding(_judge(invariant, trials))
    return told


def _is_wanted(check: Scenario | Invariant, examination: Examination) -> bool:
    return not examination.only or check.name in examination.only


async def _play(scenario: Scenario, examination: Examination) -> tuple[Finding, Trial]:
    try:
        async with trial(examination.command, scenario.terms) as under_way:
            ok, seen = await _outcome(scenario, under_way, examination.timeout_seconds)
    except* OSError as errors:
        raise UsageError(f"cannot start {examination.command[0]!r}: {errors.exceptions[0]}") from None
    last_words = () if ok else tuple(under_way.worker.last_words)
    finding = Finding(name=scenario.name, ok=ok, expected=scenario.expected, seen=seen, last_words=last_words)
    return finding, under_way


async def _outcome(scenario: Scenario, under_way: Trial, timeout_seconds: float) -> tuple[bool, str]:
    """Whether the worker did as expected, and what was seen."""
    try:
        with anyio.fail_after(timeout_seconds):
            return True, await scenario.play(under_way)
    except NotAsPromised as different:
        return False, str(different)
    except TimeoutError:
        return False, f"after {timeout_seconds:g} s there was still not {under_way.awaiting}"


def _judge(invariant: Invariant, trials: Sequence[Trial]) -> Finding:
    try:
        ok, seen = True, invariant.hold(trials)
    except NotAsPromised as different:
        ok, seen = False, str(different)
    return Finding(name=invariant.name, ok=ok, expected=invariant.expected, seen=seen)
