"""What a worker has to do, one behaviour a scenario: a name, what is expected as its docstring, and what was seen."""

import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from clarion.api.decoding import decode
from clarion.api.lease_forms import CompleteIn, ErrorIn, FailIn, HeartbeatIn, LeasesIn, Verdict
from clarion.conformance.forms import Verb
from clarion.conformance.script import Call, Refusal
from clarion.conformance.trial import QUEUES, TASKS, Terms, Trial, expect

# JSON that is easily hurt on its way; integers beyond 2^53 and floats without a fraction are left out, since many
# languages have no number to hold them.
DELICATE = {
    "text": 'naïve “quotes” "\\/\b\f\n\r\t ☃ 𝄞 \u2028 {[,:]} \\u0041',
    "token": "-not-the-token-",
    "numbers": [0, -1, 1.5, 0.1, 1e-7, 9_007_199_254_740_991],
    "others": [True, False, None, "", [], {}, [[]], {"": {"a b": 0}}, "true", "1"],
}
# How much later than it should something may be seen, on a machine with much to do.
_SLACK_SECONDS = 0.3
_STOP_ASKING_SECONDS = 1.0
_IDLE_EXIT_SECONDS = 5.0
# What a worker gets to begin a job, or to wait in its next request.
_SETTLE_SECONDS = 0.3


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One behaviour, and on which terms its worker is started."""

    play: Callable[[Trial], Awaitable[str]]
    terms: Terms = Terms()

    @property
    def name(self) -> str:
        """How `--only` and the report call it."""
        return self.play.__name__.replace("_", "-")

    @property
    def expected(self) -> str:
        """What a worker has to do."""
        return (self.play.__doc__ or "").strip()


async def asks_for_leases(trial: Trial) -> str:
    """Asks for leases with a UUID as its id, the queues and the token it was given, and a time to wait."""
    await trial.until(lambda: trial.script.calls_of(Verb.CLAIM), "a request for leases")
    call = trial.script.calls_of(Verb.CLAIM)[0]
    claim = call.form
    expect(isinstance(claim, LeasesIn), call.fault or "")
    assert isinstance(claim, LeasesIn)  # noqa: S101  for the type checker
    expect(sorted(claim.queues) == sorted(QUEUES), f"queues {claim.queues} instead of {list(QUEUES)}")
    expect(claim.wait_seconds > 0, "no wait: it would have to ask again and again")
    if claim.tasks is not None:
        expect(set(TASKS) <= set(claim.tasks), f"tasks {claim.tasks} without all of {', '.join(TASKS)}")
    expect(call.authorization == f"Bearer {trial.terms.token}", f"Authorization: {call.authorization}")
    return f"worker {claim.worker}, wait {claim.wait}, max {claim.max}"


async def works_without_a_token(trial: Trial) -> str:
    """Sends no Authorization where it was given no token."""
    await trial.until(lambda: trial.script.calls_of(Verb.CLAIM), "a request for leases")
    sent = trial.script.calls[0].authorization
    expect(sent is None, f"Authorization: {sent}")
    return "none was sent"


async def waits_in_its_requests(trial: Trial) -> str:
    """While there is no job it waits in its requests, and does not ask again and again."""
    trial.script.hold_seconds = 1.0
    await trial.until(lambda: trial.script.calls_of(Verb.CLAIM), "a request for leases")
    await trial.pass_time(3.0)
    calls = trial.script.calls_of(Verb.CLAIM)
    told = f"{len(calls)} requests in 3 s, each answered after 1 s"
    expect(all(isinstance(call.form, LeasesIn) and call.form.wait_seconds > 0 for call in calls), "no wait")
    expect(len(calls) <= 10, told)
    return told


async def completes(trial: Trial) -> str:
    """Completes a job with the result that its handler made, every value as it was."""
    call = await trial.completion_of(trial.echo(DELICATE))
    result = _result(call)
    expect(_canonical(result) == _canonical(DELICATE), f"result {result!r} instead of {DELICATE!r}")
    return "the arguments came back as they were"


async def survives_unknown_members(trial: Trial) -> str:
    """Ignores members of answers that it does not know; a later version of the server may send some."""
    trial.script.with_unknown_members = True
    slow = trial.sleep(1.5)
    await trial.completion_of(slow)
    expect(trial.script.beats_of(slow), "no heartbeat before the job ended")
    result = _result(await trial.completion_of(trial.echo()))
    expect(result == {"hello": "world"}, f"result {result!r}")
    return "two jobs done"


async def keeps_its_leases(trial: Trial) -> str:
    """Heartbeats name each lease it holds, more often than every half of the lease."""
    limit = trial.terms.lease_seconds / 2
    offers = [trial.sleep(2.5), trial.sleep(2.5)]
    gaps = []
    for offer in offers:
        began = await trial.claim_of(offer)
        ended = (await trial.completion_of(offer)).at
        times = [began, *(call.at for call in trial.script.beats_of(offer) if call.at < ended), ended]
        gaps.append(max(later - earlier for earlier, later in pairwise(times)))
    told = f"longest times without: {', '.join(f'{gap:.2f} s' for gap in gaps)}, of a lease of {2 * limit:g} s"
    expect(max(gaps) < limit, told)
    return told


async def takes_a_job_late(trial: Trial) -> str:
    """Runs a job that came after it had waited for longer than the lease: that began when the job came."""
    await trial.until(lambda: trial.script.calls_of(Verb.CLAIM), "a request for leases")
    await trial.pass_time(trial.terms.lease_seconds + 0.5)
    offer = trial.sleep(1.0)
    began = await trial.claim_of(offer)
    call = await trial.completion_of(offer)
    return f"completed {call.at - began:.1f} s after the claim"


async def reports_failures(trial: Trial) -> str:
    """Fails a job whose handler failed, with the type of the error and its message."""
    message = 'no "such" file: naïve\\☃ 𝄞'
    call = await trial.ending_of(trial.script.offer("demo.fail", {"message": message}))
    expect(isinstance(call.form, FailIn), f"instead of fail: {call}")
    assert isinstance(call.form, FailIn)  # noqa: S101  for the type checker
    error = decode(bytes(call.form.error), ErrorIn)
    expect(error.type and message in error.message, f"{error} instead of a type and {message!r}")
    expect(call.form.outcome is Verdict.FAILED, f"outcome {call.form.outcome}")
    return f"{error.type}: {error.message}"


async def ends_jobs_at_their_timeout(trial: Trial) -> str:
    """Ends a handler that runs longer than the job's timeout, and fails the job with the outcome `timeout`."""
    offer = trial.sleep(20.0, timeout_seconds=1.0)
    began = await trial.claim_of(offer)
    call = await trial.ending_of(offer)
    expect(isinstance(call.form, FailIn) and call.form.outcome is Verdict.TIMEOUT, str(call))
    told = f"{call.at - began:.1f} s after the claim"
    expect(0.8 <= call.at - began < 8, told)
    return told


async def repeats_after_503(trial: Trial) -> str:
    """Says how a job ended once more when the server was unavailable, not before Retry-After."""
    offer = trial.echo()
    offer.refuse(Verb.COMPLETE, Refusal(status=503, retry_after_seconds=1))
    first, second = [await trial.completion_of(offer, count=count) for count in (1, 2)]
    expect(_canonical(_result(second)) == _canonical(_result(first)), f"{second} after {first}")
    told = f"the same again after {second.at - first.at:.1f} s"
    expect(second.at - first.at >= 1 - _SLACK_SECONDS, told)
    return told


async def repeats_after_a_cut(trial: Trial) -> str:
    """Says how a job ended once more when the answer was cut off: with the same token and body."""
    offer = trial.echo()
    offer.refuse(Verb.COMPLETE, Refusal(cut=True))
    first, second = [await trial.completion_of(offer, count=count) for count in (1, 2)]
    expect(_canonical(_result(second)) == _canonical(_result(first)), f"{second} after {first}")
    return f"the same again after {second.at - first.at:.1f} s"


async def drops_a_fenced_job(trial: Trial) -> str:
    """Drops a job whose completion is answered with 409, and goes on with the next."""
    fenced = trial.echo()
    fenced.refuse(Verb.COMPLETE, *[Refusal(status=409)] * 10)
    await trial.completion_of(fenced)
    await trial.completion_of(trial.echo())
    await trial.pass_time(1.0)
    expect(len(trial.script.endings_of(fenced)) == 1, f"said again: {_said(trial.script.endings_of(fenced))}")
    return "not said again, and the next one done"


async def drops_a_lost_job(trial: Trial) -> str:
    """Ends the handler of a job that a heartbeat calls lost, says nothing more about it, and goes on with the next."""
    # It would end well before the worker's own clock ends its lease.
    lost = trial.sleep(2.0)
    lost.lease_status = "lost"
    began = await trial.claim_of(lost)
    told_at = (await trial.beat_of(lost)).at
    await trial.completion_of(trial.echo())
    await trial.pass_time(began + 3 - time.monotonic())
    said = trial.script.endings_of(lost)
    expect(not said, f"{_said(said)} {said[-1].at - told_at:.1f} s later" if said else "")
    return "nothing more was said, and the next one done"


async def stops_past_its_lease(trial: Trial) -> str:
    """Ends a handler once its lease is over by the worker's own clock, while heartbeats go unanswered."""
    trial.script.heartbeats_fail = True
    offer = trial.sleep(3.5)
    began = await trial.claim_of(offer)
    await trial.pass_time(began + 5 - time.monotonic())
    said = trial.script.calls_of(Verb.COMPLETE, offer=offer)
    expect(not said, f"complete {said[0].at - began:.1f} s after a claim of 2 s" if said else "")
    trial.script.heartbeats_fail = False
    await trial.completion_of(trial.echo())
    return "it did not complete, and the next one was done"


async def releases_a_cancelled_job(trial: Trial) -> str:
    """Ends the handler of a job that is to be cancelled, and releases it before the lease is over."""
    offer = trial.sleep(20.0)
    offer.lease_status = "cancel"
    began = await trial.claim_of(offer)
    call = await trial.ending_of(offer)
    expect(call.verb is Verb.RELEASE, str(call))
    told = f"released {call.at - began:.1f} s after the claim"
    expect(call.at - began < trial.terms.lease_seconds, told)
    await trial.completion_of(trial.echo())
    return f"{told}, and the next one done"


async def survives_a_restart(trial: Trial) -> str:
    """Outlives a server that refuses connections for a while: the job it held is completed, and then others."""
    held = trial.sleep(1.0)
    began = await trial.claim_of(held)
    await trial.pass_time(_SETTLE_SECONDS)
    await trial.be_away(2.5)
    call = await trial.completion_of(held)
    await trial.completion_of(trial.echo())
    return f"completed {call.at - began:.1f} s after the claim, and the next one done"


async def has_a_fresh_id(trial: Trial) -> str:
    """Is another worker after each start of its process, and the same one until then."""
    await trial.completion_of(trial.echo())
    await trial.replace_worker()
    await trial.completion_of(trial.echo())
    first, second = _ids(trial, 1), _ids(trial, 2)
    told = f"{', '.join(sorted(first))}; after another start {', '.join(sorted(second))}"
    expect(len(first) == len(second) == 1 and first != second, told)
    return told


async def stops_when_idle(trial: Trial) -> str:
    """On SIGTERM without a job it stops asking within 1 s, also where it waits in a request, and exits 0."""
    await trial.until(lambda: trial.script.calls_of(Verb.CLAIM), "a request for leases")
    await trial.pass_time(_SETTLE_SECONDS)
    return await _stop(trial, within_seconds=_IDLE_EXIT_SECONDS)


async def finishes_when_stopped(trial: Trial) -> str:
    """On SIGTERM it stops asking within 1 s, completes or releases the job that runs, and exits 0."""
    offer = trial.sleep(2.0)
    await trial.claim_of(offer)
    await trial.pass_time(_SETTLE_SECONDS)
    told = await _stop(trial, within_seconds=2 + _IDLE_EXIT_SECONDS)
    said = trial.script.endings_of(offer)
    expect(said, f"{told}, and no word about the job")
    expect(said[0].verb in {Verb.COMPLETE, Verb.RELEASE}, str(said[0]))
    return f"{_said(said)}; {told}"


async def releases_what_does_not_end(trial: Trial) -> str:
    """On SIGTERM it releases a job that does not end within CLARION_DRAIN_SECONDS, and exits 0."""
    offer = trial.sleep(20.0)
    await trial.claim_of(offer)
    await trial.pass_time(_SETTLE_SECONDS)
    told = await _stop(trial, within_seconds=trial.terms.drain_seconds + _IDLE_EXIT_SECONDS)
    said = trial.script.endings_of(offer)
    expect([call.verb for call in said] == [Verb.RELEASE], f"{_said(said)}; {told}")
    return f"released; {told}"


async def drains_when_told(trial: Trial) -> str:
    """On the directive `drain` it asks for no more leases, finishes what runs, and exits 0."""
    offer = trial.sleep(2.5)
    await trial.claim_of(offer)
    trial.script.directive = "drain"
    trial.script.change()
    told_at = (await trial.beat_of(offer)).at
    await trial.completion_of(offer)
    code, seconds = await trial.exit_after()
    _expect_silence(trial, told_at)
    told = f"exited with {code} {seconds:.1f} s after the end of its job"
    expect(code == 0 and seconds < _IDLE_EXIT_SECONDS, told)
    return told


async def _stop(trial: Trial, *, within_seconds: float) -> str:
    """Sends SIGTERM, and expects that the worker asks no more and exits 0 in time; what was seen."""
    asked_at = time.monotonic()
    code, seconds = await trial.exit_after(signal.SIGTERM)
    _expect_silence(trial, asked_at)
    told = f"exited with {code} after {seconds:.1f} s"
    expect(code == 0 and seconds < within_seconds, told)
    return told


def _expect_silence(trial: Trial, since: float) -> None:
    late = [call.at - since for call in trial.script.calls_of(Verb.CLAIM) if call.at > since + _STOP_ASKING_SECONDS]
    expect(not late, f"asked for leases {late[0]:.1f} s later" if late else "")


def _ids(trial: Trial, start: int) -> set[str]:
    forms = [call.form for call in trial.script.calls if call.start == start]
    return {str(form.worker) for form in forms if isinstance(form, LeasesIn | HeartbeatIn)}


def _said(calls: Sequence[Call]) -> str:
    return ", ".join(str(call.verb) for call in calls) or "nothing said"


def _result(call: Call) -> Any:
    assert isinstance(call.form, CompleteIn)  # noqa: S101  it is a completion without a fault
    text = call.form.result_text
    return None if text is None else msgspec.json.decode(text)


def _canonical(value: Any) -> bytes:
    """Equal for the same JSON only: to Python, True is 1."""
    return msgspec.json.encode(value, order="sorted")


SCENARIOS = (
    Scenario(play=asks_for_leases),
    Scenario(play=works_without_a_token, terms=Terms(token=None)),
    Scenario(play=waits_in_its_requests),
    Scenario(play=completes),
    Scenario(play=survives_unknown_members, terms=Terms(lease_seconds=2)),
    Scenario(play=keeps_its_leases, terms=Terms(lease_seconds=3)),
    Scenario(play=takes_a_job_late, terms=Terms(lease_seconds=2)),
    Scenario(play=reports_failures),
    Scenario(play=ends_jobs_at_their_timeout),
    Scenario(play=repeats_after_503),
    Scenario(play=repeats_after_a_cut),
    Scenario(play=drops_a_fenced_job),
    Scenario(play=drops_a_lost_job, terms=Terms(lease_seconds=3)),
    Scenario(play=stops_past_its_lease, terms=Terms(lease_seconds=2)),
    Scenario(play=releases_a_cancelled_job, terms=Terms(lease_seconds=3)),
    Scenario(play=survives_a_restart),
    Scenario(play=has_a_fresh_id),
    Scenario(play=stops_when_idle),
    Scenario(play=finishes_when_stopped),
    Scenario(play=releases_what_does_not_end, terms=Terms(drain_seconds=1)),
    Scenario(play=drains_when_told, terms=Terms(lease_seconds=3)),
)
