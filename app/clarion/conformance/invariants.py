"""What holds for every request of every scenario, whatever the scenario is about."""

from collections.abc import Callable, Sequence

import msgspec

from clarion.api.lease_forms import HeartbeatIn
from clarion.conformance.script import Call
from clarion.conformance.trial import Trial, expect


class Invariant(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that holds always."""

    hold: Callable[[Sequence[Trial]], str]

    @property
    def name(self) -> str:
        """How `--only` and the report call it."""
        return self.hold.__name__.replace("_", "-")

    @property
    def expected(self) -> str:
        """What a worker has to do."""
        return (self.hold.__doc__ or "").strip()


def sends_what_the_protocol_knows(trials: Sequence[Trial]) -> str:
    """Every request has a route, and a body that follows the protocol to the letter."""
    calls = [call for trial in trials for call in trial.script.calls]
    faults = [f"{call.path}: {call.fault}" for call in calls if call.fault is not None]
    return _none_of(faults, calls)


def names_the_tokens_it_was_given(trials: Sequence[Trial]) -> str:
    """Every lease token, in paths and heartbeats, is one that came with a job, to the letter."""
    calls = [(trial, call) for trial in trials for call in trial.script.calls]
    faults = [
        f"{call.path} names {token!r}"
        for trial, call in calls
        for token in _tokens(call)
        if trial.script.claimed(token) is None
    ]
    return _none_of(faults, calls)


def shows_its_api_token(trials: Sequence[Trial]) -> str:
    """Every request carries `Authorization: Bearer` with CLARION_API_TOKEN, where that is set."""
    calls = [(trial.terms.token, call) for trial in trials for call in trial.script.calls if trial.terms.token]
    faults = [
        f"{call.path} with Authorization: {call.authorization}"
        for token, call in calls
        if call.authorization != f"Bearer {token}"
    ]
    return _none_of(faults, calls)


def _tokens(call: Call) -> list[str]:
    named = [lease.token for lease in call.form.leases] if isinstance(call.form, HeartbeatIn) else []
    return named if call.token is None else [*named, call.token]


def _none_of(faults: Sequence[str], calls: Sequence[object]) -> str:
    expect(calls, "there was no request at all")
    expect(not faults, f"{len(faults)} of {len(calls)} requests; the first: {faults[0] if faults else ''}")
    return f"{len(calls)} requests"


INVARIANTS = (
    Invariant(hold=sends_what_the_protocol_knows),
    Invariant(hold=names_the_tokens_it_was_given),
    Invariant(hold=shows_its_api_token),
)
