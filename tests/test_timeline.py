"""The timeline of a job from its row, its attempts and its events; no database."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from clarion.execution import Attempt
from clarion.job import Happening, Job
from clarion.timeline import Entry, timeline

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
WORKER = UUID(int=7)
BY_WORKER = f"worker:{WORKER}"


def at(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)


def job(state: str, *, run_at: float = 0, **fields: Any) -> Job:
    given: dict[str, Any] = dict.fromkeys(Job.__struct_fields__) | {
        "id": UUID(int=1),
        "created_at": BEGIN,
        "state": state,
        "run_at": at(run_at),
        "generation": 1,
        "attempt": 0,
    }
    return Job(**given | fields)


def attempt(number: int, outcome: str | None, state: str, *, ran: tuple[float, float | None], **fields: Any) -> Attempt:
    """An attempt that ran from, to; it was due at 0 unless the fields say otherwise."""
    started, ended = ran
    given: dict[str, Any] = dict.fromkeys(Attempt.__struct_fields__) | {
        "generation": 1,
        "attempt": number,
        "outcome": outcome,
        "state": state,
        "worker_id": WORKER,
        "run_at": BEGIN,
        "started_at": at(started),
        "ended_at": None if ended is None else at(ended),
        "reaped": False,
    }
    return Attempt(**given | fields)


def event(name: str, seconds: float, state: str, **fields: Any) -> Happening:
    given: dict[str, Any] = {"actor": "api", "generation": 1, "detail": None}
    return Happening(at=at(seconds), event=name, state=state, **given | fields)


def brief(entries: list[Entry]) -> list[tuple[float, str, str | None]]:
    return [((entry.at - BEGIN).total_seconds(), entry.event, entry.state) for entry in entries]


def test_a_job_that_simply_succeeds_was_enqueued_and_claimed() -> None:
    entries = timeline(job("succeeded", enqueued_by="api:ada"), [attempt(1, "succeeded", "succeeded", ran=(1, 2))], [])
    assert entries == [
        Entry(at=at(0), event="enqueued", actor="api:ada", state="ready", generation=1),
        Entry(at=at(1), event="claimed", actor=BY_WORKER, state="running", generation=1, attempt=1),
        Entry(at=at(2), event="succeeded", actor=BY_WORKER, state="succeeded", generation=1, attempt=1),
    ]


def test_a_job_that_waits_has_only_been_enqueued() -> None:
    assert brief(timeline(job("ready"), [], [])) == [(0, "enqueued", "ready")]
    assert brief(timeline(job("scheduled", run_at=60), [], [])) == [(0, "enqueued", "scheduled")]


def test_a_job_whose_wait_is_over_became_ready_when_it_was_due() -> None:
    entries = timeline(job("ready", run_at=60), [], [])
    assert brief(entries) == [(0, "enqueued", "scheduled"), (60, "ready", "ready")]
    assert (entries[0].actor, entries[1].actor) == ("api", "scheduler")


def test_a_job_that_runs_is_not_over() -> None:
    entries = timeline(job("running", run_at=60), [attempt(1, None, "running", ran=(61, None), run_at=at(60))], [])
    assert brief(entries) == [(0, "enqueued", "scheduled"), (60, "ready", "ready"), (61, "claimed", "running")]


def test_every_attempt_is_there_with_the_waits_between() -> None:
    attempts = [
        attempt(1, "failed", "scheduled", ran=(1, 2), error_type="Oops", error_message="no luck"),
        attempt(2, "timeout", "scheduled", ran=(11, 12), run_at=at(10), error_type="AttemptTimeout"),
        attempt(3, "snoozed", "scheduled", ran=(21, 22), run_at=at(20)),
        attempt(3, "released", "ready", ran=(31, 32), run_at=at(30)),
        attempt(3, "succeeded", "succeeded", ran=(33, 34), run_at=at(30)),
    ]
    entries = timeline(job("succeeded", run_at=30), attempts, [])
    assert brief(entries) == [
        (0, "enqueued", "ready"),
        (1, "claimed", "running"), (2, "failed", "scheduled"), (10, "ready", "ready"),
        (11, "claimed", "running"), (12, "timeout", "scheduled"), (20, "ready", "ready"),
        (21, "claimed", "running"), (22, "snoozed", "scheduled"), (30, "ready", "ready"),
        (31, "claimed", "running"), (32, "released", "ready"),
        (33, "claimed", "running"), (34, "succeeded", "succeeded"),
    ]  # fmt: skip
    assert [entry.detail for entry in entries if entry.detail] == ["Oops: no luck", "AttemptTimeout"]
    assert [entry.attempt for entry in entries if entry.event == "claimed"] == [1, 2, 3, 3, 3]


def test_a_lost_lease_is_the_reaper_s_finding() -> None:
    attempts = [
        attempt(1, "lease_lost", "ready", ran=(1, 40), reaped=True, error_type="LeaseLost"),
        attempt(2, "lease_lost", "dead", ran=(41, 80), reaped=True, error_type="LeaseLost"),
    ]
    entries = timeline(job("dead", dead_reason="crash_loop"), attempts, [])
    assert [(entry.event, entry.actor) for entry in entries[1:]] == [
        ("claimed", BY_WORKER), ("lease_lost", "reaper"), ("claimed", BY_WORKER), ("lease_lost", "reaper"),
        ("dead", "reaper"),
    ]  # fmt: skip
    assert (entries[-1].state, entries[-1].detail, entries[-1].attempt) == ("dead", "crash_loop", 2)


def test_a_job_that_is_retried_begins_another_generation() -> None:
    attempts = [
        attempt(1, "failed", "dead", ran=(1, 2)),
        attempt(1, "failed", "dead", ran=(101, 102), run_at=at(100), generation=2),
    ]
    events = [event("retried", 90, "scheduled", generation=2, detail="mended", actor="api:ada")]
    entries = timeline(job("dead", generation=2, dead_reason="not_retryable", run_at=100), attempts, events)
    assert brief(entries) == [
        (0, "enqueued", "ready"), (1, "claimed", "running"), (2, "failed", "dead"), (2, "dead", "dead"),
        (90, "retried", "scheduled"), (100, "ready", "ready"),
        (101, "claimed", "running"), (102, "failed", "dead"), (102, "dead", "dead"),
    ]  # fmt: skip
    assert [entry.generation for entry in entries] == [1] * 4 + [2] * 5
    assert [entry.detail for entry in entries if entry.event in {"dead", "retried"}] == [
        None, "mended", "not_retryable",
    ]  # fmt: skip


def test_a_running_job_that_was_cancelled_ended_first() -> None:
    attempts = [attempt(1, "released", "cancelled", ran=(1, 3))]
    events = [
        event("cancel_requested", 2, "running", detail="no need"),
        event("cancelled", 3, "cancelled", actor=BY_WORKER),
    ]
    entries = timeline(job("cancelled"), attempts, events)
    assert brief(entries) == [
        (0, "enqueued", "ready"), (1, "claimed", "running"), (2, "cancel_requested", "running"),
        (3, "released", "cancelled"), (3, "cancelled", "cancelled"),
    ]  # fmt: skip


def test_a_success_that_came_before_the_cancel_stands() -> None:
    attempts = [attempt(1, "succeeded", "succeeded", ran=(1, 3))]
    entries = timeline(job("succeeded"), attempts, [event("cancel_requested", 2, "running")])
    assert [entry.event for entry in entries] == ["enqueued", "claimed", "cancel_requested", "succeeded"]


@pytest.mark.parametrize(
    ("run_at", "expected"),
    [
        (0, [(0, "enqueued", "ready"), (50, "cancelled", "cancelled")]),
        (60, [(0, "enqueued", "scheduled"), (50, "cancelled", "cancelled")]),
        (40, [(0, "enqueued", "scheduled"), (40, "ready", "ready"), (50, "cancelled", "cancelled")]),
    ],
)
def test_a_job_that_waited_is_cancelled(run_at: float, expected: list[Any]) -> None:
    assert brief(timeline(job("cancelled", run_at=run_at), [], [event("cancelled", 50, "cancelled")])) == expected


def test_a_job_that_was_too_late_has_expired() -> None:
    events = [event("expired", 50, "dead", actor="scheduler", detail="expired")]
    entries = timeline(job("dead", run_at=40, dead_reason="expired"), [], events)
    assert brief(entries) == [(0, "enqueued", "scheduled"), (40, "ready", "ready"), (50, "expired", "dead")]


def test_a_change_says_what_it_changed_in_the_words_of_the_api() -> None:
    events = [event("changed", 5, "scheduled", detail="delay_seconds, priority, timeout_seconds")]
    entries = timeline(job("scheduled", run_at=60), [], events)
    assert entries[-1].detail == "delay, priority, timeout"


def test_a_change_of_something_else_does_not_hide_the_wait() -> None:
    attempts = [attempt(1, None, "running", ran=(61, None), run_at=at(60))]
    entries = timeline(job("running", run_at=60), attempts, [event("changed", 5, "scheduled", detail="priority")])
    assert brief(entries) == [
        (0, "enqueued", "scheduled"), (5, "changed", "scheduled"), (60, "ready", "ready"), (61, "claimed", "running"),
    ]  # fmt: skip


def test_what_a_change_of_the_date_has_overwritten_is_not_made_up() -> None:
    attempts = [attempt(1, None, "running", ran=(61, None), run_at=at(60))]
    entries = timeline(job("running", run_at=60), attempts, [event("changed", 5, "scheduled", detail="run_at")])
    assert brief(entries) == [
        (0, "enqueued", None), (5, "changed", "scheduled"), (60, "ready", "ready"), (61, "claimed", "running"),
    ]  # fmt: skip


def test_a_wait_that_somebody_cut_short_has_no_end_of_its_own() -> None:
    attempts = [attempt(1, None, "running", ran=(31, None), run_at=at(30))]
    entries = timeline(job("running", run_at=30), attempts, [event("retried", 30, "ready")])
    assert brief(entries) == [(0, "enqueued", "scheduled"), (30, "retried", "ready"), (31, "claimed", "running")]


def test_a_parked_job_was_claimed_by_a_worker_that_has_no_name_any_more() -> None:
    events = [event("parked", 40, "dead", actor="reaper")]
    entries = timeline(job("dead", started_at=at(1), attempt=1), [], events)
    assert [(entry.event, entry.actor, entry.attempt) for entry in entries] == [
        ("enqueued", "api", None), ("claimed", "worker", 1), ("parked", "reaper", None),
    ]  # fmt: skip


def test_a_long_error_is_cut() -> None:
    attempts = [attempt(1, "failed", "dead", ran=(1, 2), error_type="E", error_message="x" * 5_000)]
    details = [entry.detail for entry in timeline(job("dead"), attempts, []) if entry.event == "failed"]
    assert [len(detail or "") for detail in details] == [201]


def test_an_attempt_from_before_dates_were_kept_leaves_its_wait_open() -> None:
    attempts = [attempt(1, "failed", "scheduled", ran=(1, 2), run_at=None)]
    entries = timeline(job("scheduled", run_at=60), attempts, [])
    assert brief(entries) == [(0, "enqueued", None), (1, "claimed", "running"), (2, "failed", "scheduled")]
