"""Where a claim begins to look: the mark goes up with claims, down with rings, and is forgotten when in doubt."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import msgspec
import pytest

from clarion.execution import Lease
from clarion.watermark import Look, Watermarks

NOBODY = UUID(int=0)
START = datetime(2026, 1, 1, tzinfo=UTC)


def at(second: int) -> datetime:
    return START + timedelta(seconds=second)


def lease(second: int) -> Lease:
    """A job whose place in line is at that second."""
    return Lease(
        id=NOBODY, token=NOBODY, queue="a", task="t", args="{}", priority=0, attempt=1, max_attempts=None,
        generation=1, errors=0, crashes=0, timeout_seconds=None, checkpoint=None,
        created_at=START, run_at=START, started_at=START, sort_key=at(second),
    )  # fmt: skip


def seen_from(marks: Watermarks, queue: str = "a", tasks: frozenset[str] | None = None) -> datetime | None:
    """Where a claim would look from now."""
    look = marks.begin(queue, tasks)
    marks.end(look, [], 0)
    return None if look.earliest is None else look.earliest[0]


def end(marks: Watermarks, look: Look, *seconds: int, asked: int | None = None) -> None:
    """Ends the claim with jobs at these seconds; with all that it asked for, unless told otherwise."""
    marks.end(look, [lease(second) for second in seconds], len(seconds) if asked is None else asked)


@pytest.fixture
def marks() -> Watermarks:
    """Marks of a process that has claimed up to the tenth second of its queue."""
    marks = Watermarks()
    end(marks, marks.begin("a"), 9, 10)
    return marks


def test_the_first_claim_looks_from_the_start() -> None:
    assert seen_from(Watermarks()) is None


def test_the_next_claim_looks_from_the_last_job_that_was_claimed(marks: Watermarks) -> None:
    assert seen_from(marks) == at(10)


def test_of_jobs_that_came_together_the_next_claim_looks_from_the_last_one(marks: Watermarks) -> None:
    together = [msgspec.structs.replace(lease(11), id=UUID(int=number)) for number in (3, 5, 4)]
    marks.end(marks.begin("a"), together, 3)
    assert marks.begin("a").earliest == (at(11), UUID(int=5))


def test_a_ring_lowers_the_mark_to_before_all_jobs_of_its_moment(marks: Watermarks) -> None:
    marks.end(marks.begin("a"), [msgspec.structs.replace(lease(11), id=UUID(int=5))], 1)
    marks.heard("a", at(11))
    assert marks.begin("a").earliest == (at(11), UUID(int=0))


@pytest.mark.parametrize("order", [(12, 14, 13), (14, 12, 13)])
def test_the_order_of_the_leases_does_not_matter(marks: Watermarks, order: tuple[int, ...]) -> None:
    end(marks, marks.begin("a"), *order)
    assert seen_from(marks) == at(14)


def test_a_claim_that_found_nothing_leaves_the_mark(marks: Watermarks) -> None:
    end(marks, marks.begin("a"), asked=5)
    assert seen_from(marks) == at(10)


def test_a_claim_that_found_less_than_it_asked_for_moves_the_mark_to_what_it_found(marks: Watermarks) -> None:
    end(marks, marks.begin("a"), 11, 12, asked=5)
    assert seen_from(marks) == at(12)


def test_whoever_comes_late_to_every_job_does_not_stay_behind(marks: Watermarks) -> None:
    marks.heard("a", at(50))
    end(marks, marks.begin("a"), asked=1)
    assert seen_from(marks) == at(50)


def test_a_full_claim_stops_short_of_what_was_rung_and_may_be_there_yet(marks: Watermarks) -> None:
    marks.heard("a", at(50))
    end(marks, marks.begin("a"), 11)
    assert seen_from(marks) == at(11)


def test_queues_and_sets_of_tasks_have_marks_of_their_own(marks: Watermarks) -> None:
    end(marks, marks.begin("a", frozenset("t")), 20)
    end(marks, marks.begin("b"), 30)
    assert seen_from(marks) == at(10)
    assert seen_from(marks, "a", frozenset("t")) == at(20)
    assert seen_from(marks, "a", frozenset("u")) is None
    assert seen_from(marks, "b") == at(30)


# -- Rings


def test_a_ring_for_an_earlier_job_lowers_the_mark(marks: Watermarks) -> None:
    marks.heard("a", at(3))
    assert seen_from(marks) == at(3)


def test_a_ring_for_a_later_job_leaves_the_mark(marks: Watermarks) -> None:
    marks.heard("a", at(30))
    assert seen_from(marks) == at(10)


def test_a_ring_lowers_the_marks_of_its_own_queue_for_all_tasks(marks: Watermarks) -> None:
    end(marks, marks.begin("a", frozenset("t")), 20)
    end(marks, marks.begin("b"), 20)
    marks.heard("a", at(3))
    assert seen_from(marks) == seen_from(marks, "a", frozenset("t")) == at(3)
    assert seen_from(marks, "b") == at(20)


def test_a_claim_does_not_move_the_mark_past_what_was_rung_since_it_was_begun(marks: Watermarks) -> None:
    look = marks.begin("a")
    marks.heard("a", at(12))
    marks.heard("a", at(15))
    end(marks, look, 11, 20)
    assert seen_from(marks) == at(12)


def test_a_claim_that_was_begun_after_the_ring_may_pass_it(marks: Watermarks) -> None:
    marks.heard("a", at(12))
    end(marks, marks.begin("a"), 12, 20)
    assert seen_from(marks) == at(20)


def test_the_first_claim_too_minds_a_ring_that_comes_while_it_looks() -> None:
    marks = Watermarks()
    look = marks.begin("a")
    marks.heard("a", at(3))
    end(marks, look, 11, 20)
    assert seen_from(marks) == at(3)


def test_a_ring_before_the_first_claim_is_no_mark() -> None:
    marks = Watermarks()
    marks.heard("a", at(3))
    assert seen_from(marks) is None


# -- Claims at once


def test_of_two_claims_at_once_the_further_one_counts(marks: Watermarks) -> None:
    one, other = marks.begin("a"), marks.begin("a")
    end(marks, other, 13, 14)
    end(marks, one, 11, 12)
    assert seen_from(marks) == at(14)


def test_of_two_claims_at_once_only_the_one_begun_after_the_ring_may_pass_it(marks: Watermarks) -> None:
    before = marks.begin("a")
    marks.heard("a", at(3))
    after = marks.begin("a")
    end(marks, before, 11, 20)
    assert seen_from(marks) == at(3)
    end(marks, after, 3, 15)
    assert seen_from(marks) == at(15)


def test_a_claim_without_an_answer_has_the_next_one_look_from_the_start(marks: Watermarks) -> None:
    marks.lose(marks.begin("a"))
    assert seen_from(marks) is None


def test_a_claim_without_an_answer_cannot_be_undone_by_one_that_skipped_its_jobs(marks: Watermarks) -> None:
    lost, same, other = marks.begin("a"), marks.begin("a"), marks.begin("a", frozenset("t"))
    marks.lose(lost)
    end(marks, same, 14)
    end(marks, other, 15)
    assert seen_from(marks) is None
    assert seen_from(marks, "a", frozenset("t")) is None
    end(marks, marks.begin("a"), 20)
    assert seen_from(marks) == at(20)


# -- Forgetting


def test_after_a_sweep_the_next_claim_looks_from_the_start(marks: Watermarks) -> None:
    marks.forget()
    assert seen_from(marks) is None
    end(marks, marks.begin("a"), 5)
    assert seen_from(marks) == at(5)


def test_a_claim_begun_before_the_sweep_does_not_stand_for_it(marks: Watermarks) -> None:
    look = marks.begin("a")
    marks.forget()
    end(marks, look, 20)
    assert seen_from(marks) is None


def test_the_number_of_marks_is_bounded(marks: Watermarks) -> None:
    for number in range(10_000):
        end(marks, marks.begin(f"q{number}"), 1)
    assert seen_from(marks) is None
    end(marks, marks.begin("a"), 20)
    assert seen_from(marks) == at(20)
