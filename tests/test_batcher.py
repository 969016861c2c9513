"""The coalescer on its own: who is flushed with whom, who gets which answer, and that nobody is left waiting."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest
from anyio import wait_all_tasks_blocked

from clarion.batcher import Batcher, Batchers
from clarion.db import Locked
from clarion.errors import ClarionError, Overloaded, Unavailable, Unstorable

Decide = Callable[[Sequence[int]], ClarionError | Exception | None]


class Statement:
    """A flush that waits at a gate and then answers every item with ten times itself, or raises what `decide` says."""

    def __init__(self, decide: Decide | None = None, *, is_open: bool = True, at_once: int = 1) -> None:
        self.batches: list[list[int]] = []
        self.running = 0
        self._at_once = at_once
        self._decide = decide
        self._gate = anyio.Event()
        if is_open:
            self._gate.set()

    def open(self) -> None:
        self._gate.set()

    def open_once(self) -> None:
        """For the flush that waits; the next one waits again."""
        self._gate.set()
        self._gate = anyio.Event()

    async def __call__(self, items: Sequence[int]) -> list[int]:
        assert self.running < self._at_once, "more flushes at once than wanted"
        self.batches.append(list(items))
        self.running += 1
        try:
            await self._gate.wait()
            error = self._decide(items) if self._decide else None
        finally:
            self.running -= 1
        if error is not None:
            raise error
        return [item * 10 for item in items]


class Callers:
    """Tasks that submit an item each; `outcomes` holds their answers, or the errors they met."""

    def __init__(self, batcher: Batcher[int, int], group: anyio.abc.TaskGroup) -> None:
        self.outcomes: dict[int, int | ClarionError] = {}
        self._batcher = batcher
        self._group = group

    async def submit(self, *items: int) -> None:
        """Starts callers, and returns when all of them wait, or are done."""
        for item in items:
            self._group.start_soon(self.submit_one, item)
        await wait_all_tasks_blocked()

    async def submit_one(self, item: int) -> None:
        try:
            self.outcomes[item] = await self._batcher.submit(item)
        except ClarionError as error:
            self.outcomes[item] = error

    def refused(self) -> dict[int, type[ClarionError]]:
        return {item: type(outcome) for item, outcome in self.outcomes.items() if isinstance(outcome, ClarionError)}

    def answered(self) -> dict[int, int]:
        return {item: outcome for item, outcome in self.outcomes.items() if isinstance(outcome, int)}


class Running:
    """Something that runs in a scope of its own; the test goes on when it is ended."""

    def __init__(self, run: Callable[[], Awaitable[None]]) -> None:
        self._run = run
        self._scope = anyio.CancelScope()

    async def __call__(self) -> None:
        with self._scope:
            await self._run()

    async def end(self) -> None:
        self._scope.cancel()
        await wait_all_tasks_blocked()


@asynccontextmanager
async def running(
    statement: Statement, *, batch_max: int = 100, buffer_max: int = 100
) -> AsyncIterator[tuple[Callers, Running]]:
    """A batcher that runs, and callers."""
    batcher = Batcher(statement, batch_max=batch_max, buffer_max=buffer_max)
    async with anyio.create_task_group() as group:
        runner = Running(batcher.run)
        group.start_soon(runner)
        await wait_all_tasks_blocked()
        yield Callers(batcher, group), runner
        await runner.end()


def raises_for(poison: set[int], error: type[ClarionError]) -> Decide:
    return lambda items: error("no") if poison & set(items) else None


# -- Who goes together


async def test_a_lone_item_is_flushed_at_once_and_alone() -> None:
    statement = Statement()
    async with running(statement) as (callers, _):
        for item in (1, 2):
            await callers.submit(item)
    assert statement.batches == [[1], [2]]
    assert callers.outcomes == {1: 10, 2: 20}


async def test_what_comes_while_a_flush_is_in_flight_goes_together_next_in_order() -> None:
    statement = Statement(is_open=False)
    async with running(statement) as (callers, _):
        await callers.submit(1)
        await callers.submit(5, 3)
        await callers.submit(4, 2)
        assert statement.batches == [[1]]
        statement.open()
        await wait_all_tasks_blocked()
    assert statement.batches == [[1], [5, 3, 4, 2]]
    assert callers.outcomes == {item: item * 10 for item in range(1, 6)}


async def test_no_flush_takes_more_than_its_most() -> None:
    statement = Statement(is_open=False)
    async with running(statement, batch_max=3) as (callers, _):
        await callers.submit(0)
        await callers.submit(*range(1, 8))
        statement.open()
        await wait_all_tasks_blocked()
    assert statement.batches == [[0], [1, 2, 3], [4, 5, 6], [7]]


async def test_items_from_before_the_start_are_flushed_together() -> None:
    statement = Statement()
    batcher = Batcher(statement, batch_max=10, buffer_max=10)
    async with anyio.create_task_group() as group:
        callers = Callers(batcher, group)
        await callers.submit(1, 2, 3)
        assert statement.batches == []
        group.start_soon(batcher.run)
        await wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert statement.batches == [[1, 2, 3]]
    assert callers.answered() == {1: 10, 2: 20, 3: 30}


async def test_nobody_is_answered_before_the_flush_has_returned() -> None:
    statement = Statement(is_open=False)
    async with running(statement) as (callers, _):
        await callers.submit(1, 2, 3)
        assert statement.running == 1
        assert callers.outcomes == {}
        statement.open()
        await wait_all_tasks_blocked()
        assert callers.outcomes == {1: 10, 2: 20, 3: 30}


async def test_a_caller_that_leaves_takes_nobody_along() -> None:
    statement = Statement(is_open=False)
    async with running(statement) as (callers, _):
        await callers.submit(1)
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(callers.submit_one, 2)
            await wait_all_tasks_blocked()
            await callers.submit(3)
            leaving.cancel_scope.cancel()
        statement.open()
        await wait_all_tasks_blocked()
    assert callers.outcomes == {1: 10, 3: 30}


async def test_a_caller_that_leaves_in_the_middle_of_its_flush_takes_nobody_along() -> None:
    statement = Statement(is_open=False)
    async with running(statement) as (callers, _):
        await callers.submit(0)
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(callers.submit_one, 1)
            await wait_all_tasks_blocked()
            await callers.submit(2)
            statement.open_once()
            await wait_all_tasks_blocked()
            assert statement.batches == [[0], [1, 2]]
            leaving.cancel_scope.cancel()
        statement.open()
        await wait_all_tasks_blocked()
        await callers.submit(3)
    assert callers.outcomes == {0: 0, 2: 20, 3: 30}


async def test_callers_of_one_flush_go_on_in_their_order() -> None:
    statement = Statement(is_open=False)
    async with running(statement) as (callers, _):
        await callers.submit(9)
        await callers.submit(5, 3, 7, 1)
        statement.open()
        await wait_all_tasks_blocked()
    assert list(callers.outcomes) == [9, 5, 3, 7, 1]


# -- The bound


async def test_past_its_bound_the_buffer_refuses_and_keeps_what_it_has() -> None:
    statement = Statement(is_open=False)
    async with running(statement, buffer_max=3) as (callers, _):
        await callers.submit(0)  # in flight, so no longer in the buffer
        await callers.submit(1, 2, 3, 4, 5)
        assert callers.refused() == {4: Overloaded, 5: Overloaded}
        statement.open()
        await wait_all_tasks_blocked()
        await callers.submit(6)
    assert callers.answered() == {0: 0, 1: 10, 2: 20, 3: 30, 6: 60}
    assert [item for batch in statement.batches for item in batch] == [0, 1, 2, 3, 6]


# -- Poison


@pytest.mark.parametrize("poison", [{0}, {7}, {15}, {3, 4}, {0, 15}, set(range(16))])
async def test_what_cannot_be_stored_is_sorted_out_and_its_neighbours_succeed(poison: set[int]) -> None:
    statement = Statement(raises_for(poison, Unstorable), is_open=False)
    async with running(statement) as (callers, _):
        await callers.submit(99)
        await callers.submit(*range(16))
        statement.open()
        await wait_all_tasks_blocked()
    assert callers.refused() == dict.fromkeys(sorted(poison), Unstorable)
    assert callers.answered().keys() == set(range(16)) - poison | {99}
    assert len(statement.batches) <= 2 + len(poison) * 2 * 4
    succeeded = [item for batch in statement.batches if not poison & set(batch) for item in batch]
    assert sorted(succeeded) == sorted(callers.answered()), "an item that succeeded was flushed again"


async def test_one_locked_row_costs_only_its_own_caller() -> None:
    statement = Statement(raises_for({5}, Locked), is_open=False)
    async with running(statement) as (callers, _):
        await callers.submit(99)
        await callers.submit(*range(16))
        statement.open()
        await wait_all_tasks_blocked()
    assert callers.refused() == {5: Locked}
    assert len(callers.answered()) == 16


async def test_when_both_halves_are_locked_nobody_waits_for_a_search() -> None:
    """Each flush takes as long as the lock timeout, so looking for all the locked rows could take minutes."""
    statement = Statement(raises_for({0, 15}, Locked), is_open=False)
    async with running(statement) as (callers, _):
        await callers.submit(99)
        await callers.submit(*range(16))
        statement.open()
        await wait_all_tasks_blocked()
    assert callers.refused() == dict.fromkeys(range(16), Locked)
    assert [len(batch) for batch in statement.batches] == [1, 16, 8, 8]


async def test_weather_is_everybodys_and_passes() -> None:
    statement = Statement(raises_for({2}, Unavailable), is_open=False)
    async with running(statement) as (callers, _):
        await callers.submit(1)
        await callers.submit(2, 3)
        statement.open()
        await wait_all_tasks_blocked()
        await callers.submit(4)
    assert callers.refused() == {2: Unavailable, 3: Unavailable}
    assert callers.answered() == {1: 10, 4: 40}
    assert statement.batches == [[1], [2, 3], [4]]


async def test_weather_during_the_search_is_told_to_those_it_met() -> None:
    def decide(items: Sequence[int]) -> ClarionError | None:
        if 0 in items and len(items) > 1:
            return Unstorable("no")
        return Unavailable("away") if 3 in items else None

    statement = Statement(decide, is_open=False)
    async with running(statement) as (callers, _):
        await callers.submit(99)
        await callers.submit(0, 1, 2, 3)
        statement.open()
        await wait_all_tasks_blocked()
    assert callers.refused() == {2: Unavailable, 3: Unavailable}
    assert callers.answered() == {99: 990, 0: 0, 1: 10}


# -- The end


async def test_at_the_end_nobody_is_left_waiting_and_nobody_may_come() -> None:
    statement = Statement(is_open=False)
    async with running(statement) as (callers, runner):
        await callers.submit(1)
        await callers.submit(2, 3)
        await runner.end()
        assert callers.refused() == {1: Unavailable, 2: Unavailable, 3: Unavailable}
        await callers.submit(4)
        assert callers.refused()[4] is Unavailable
    assert statement.batches == [[1]]


async def test_a_bug_in_the_flush_ends_it_and_leaves_nobody_waiting() -> None:
    statement = Statement(lambda items: ZeroDivisionError() if 2 in items else None, is_open=False)
    batcher = Batcher(statement, batch_max=2, buffer_max=10)
    async with anyio.create_task_group() as group:
        callers = Callers(batcher, group)
        await callers.submit(1, 2, 3, 4)
        statement.open()
        with pytest.raises(ZeroDivisionError):
            await batcher.run()
    assert callers.refused() == dict.fromkeys([1, 2, 3, 4], Unavailable)
    with pytest.raises(Unavailable):
        await batcher.submit(5)


async def test_a_bug_during_the_search_leaves_nobody_waiting() -> None:
    def decide(items: Sequence[int]) -> Exception | None:
        return Unstorable("no") if len(items) == 4 else ZeroDivisionError() if 3 in items else None

    batcher = Batcher(Statement(decide), batch_max=4, buffer_max=10)
    async with anyio.create_task_group() as group:
        callers = Callers(batcher, group)
        await callers.submit(1, 2, 3, 4, 5)
        with pytest.raises(ZeroDivisionError):
            await batcher.run()
    assert callers.answered() == {1: 10, 2: 20}
    assert callers.refused() == dict.fromkeys([3, 4, 5], Unavailable)


@pytest.mark.parametrize("answers", [[], [10], [10, 20, 30]])
async def test_answers_that_do_not_fit_the_items_are_a_bug(answers: list[int]) -> None:
    async def flush(_items: Sequence[int]) -> list[int]:
        return answers

    batcher = Batcher(flush, batch_max=10, buffer_max=10)
    async with anyio.create_task_group() as group:
        callers = Callers(batcher, group)
        await callers.submit(1, 2)
        with pytest.raises(ValueError, match="zip"):
            await batcher.run()
    assert len(callers.outcomes) == 2


async def test_a_batch_is_bounded_in_bytes_too() -> None:
    sizes: list[int] = []

    async def flush(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        return list(items)

    batcher: Batcher[int, int] = Batcher(flush, batch_max=100, buffer_max=100, weigh=lambda _item: 3 << 20)
    async with anyio.create_task_group() as group:
        for item in range(9):
            group.start_soon(batcher.submit, item)
        group.start_soon(batcher.run)
        while sum(sizes) < 9:
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    assert sizes == [3, 3, 3]


# -- Batching off


async def test_without_batching_each_call_is_a_flush_of_its_own_beside_the_others() -> None:
    statement = Statement(is_open=False, at_once=3)
    async with running(statement, batch_max=1) as (callers, _):
        await callers.submit(1, 2, 3)
        assert statement.running == 3
        statement.open()
        await wait_all_tasks_blocked()
    assert statement.batches == [[1], [2], [3]]
    assert callers.outcomes == {1: 10, 2: 20, 3: 30}


async def test_without_batching_an_error_is_its_own_callers() -> None:
    statement = Statement(raises_for({2}, Unavailable), is_open=False, at_once=3)
    async with running(statement, batch_max=1) as (callers, _):
        await callers.submit(1, 2, 3)
        statement.open()
        await wait_all_tasks_blocked()
    assert callers.refused() == {2: Unavailable}
    assert callers.answered() == {1: 10, 3: 30}


async def test_without_batching_the_calls_under_way_are_bounded() -> None:
    statement = Statement(is_open=False, at_once=2)
    async with running(statement, batch_max=1, buffer_max=2) as (callers, _):
        await callers.submit(1, 2, 3)
        assert callers.refused() == {3: Overloaded}
        statement.open()
        await wait_all_tasks_blocked()
        await callers.submit(4)
    assert callers.answered() == {1: 10, 2: 20, 4: 40}


async def test_without_batching_a_flush_comes_to_its_end_when_its_caller_is_cancelled() -> None:
    """Else what was committed would be told to nobody: whoever flushes rings afterwards."""
    ended = anyio.Event()
    gate = anyio.Event()

    async def flush(items: Sequence[int]) -> Sequence[int]:
        await gate.wait()
        ended.set()
        return items

    batcher = Batcher(flush, batch_max=1, buffer_max=10)
    async with anyio.create_task_group() as leaving:
        leaving.start_soon(batcher.submit, 1)
        await wait_all_tasks_blocked()
        leaving.cancel_scope.cancel()
        gate.set()
    assert ended.is_set()


async def test_without_batching_nobody_may_come_after_the_end() -> None:
    async with running(Statement(), batch_max=1) as (callers, runner):
        await runner.end()
        await callers.submit(1)
    assert callers.refused() == {1: Unavailable}


# -- A batcher for each kind


class Kinds:
    """Flushes of items by their first letter, each kind behind a gate of its own; the answer is the item twice."""

    def __init__(self, *closed: str, poison: str = "", error: type[ClarionError] = Unavailable) -> None:
        self.batches: list[tuple[str, list[str]]] = []
        self.outcomes: dict[str, str | ClarionError] = {}
        self._gates = {kind: anyio.Event() for kind in closed}
        self._poison = poison
        self._error = error

    async def __call__(self, kind: str, items: Sequence[str]) -> list[str]:
        self.batches.append((kind, list(items)))
        if kind in self._gates:
            await self._gates[kind].wait()
        if self._poison in items:
            raise self._error("no")
        return [item * 2 for item in items]

    def open(self, kind: str) -> None:
        self._gates[kind].set()

    async def submit_one(self, batchers: Batchers[str, str, str], item: str) -> None:
        try:
            self.outcomes[item] = await batchers.submit(item[0], item)
        except ClarionError as error:
            self.outcomes[item] = error

    @asynccontextmanager
    async def submitting(
        self, *, batch_max: int = 100, buffer_max: int = 100
    ) -> AsyncIterator[tuple[Callable[..., Awaitable[None]], Running]]:
        """Something to submit with, which returns once nothing moves any more; and the batchers that run."""
        batchers: Batchers[str, str, str] = Batchers(self, batch_max=batch_max, buffer_max=buffer_max)
        async with anyio.create_task_group() as group:

            async def submit(*items: str) -> None:
                for item in items:
                    group.start_soon(self.submit_one, batchers, item)
                await wait_all_tasks_blocked()

            await submit("early")
            runner = Running(batchers.run)
            group.start_soon(runner)
            await wait_all_tasks_blocked()
            yield submit, runner
            await runner.end()


async def test_a_set_holds_one_kind_and_no_kind_waits_for_another() -> None:
    kinds = Kinds("a")
    async with kinds.submitting() as (submit, _):
        await submit("a1", "b1", "a2", "b2", "a3")
        await submit("b3")
        assert kinds.outcomes.keys() == {"early", "b1", "b2", "b3"}
        kinds.open("a")
        await wait_all_tasks_blocked()
        await submit("a4")
    assert [items for kind, items in kinds.batches if kind == "a"] == [["a1", "a2", "a3"], ["a4"]]
    assert [items for kind, items in kinds.batches if kind == "b"] == [["b1", "b2"], ["b3"]]
    assert kinds.outcomes["a3"] == "a3a3"


async def test_what_comes_during_a_flush_of_its_kind_goes_together_next() -> None:
    kinds = Kinds("a")
    async with kinds.submitting() as (submit, _):
        await submit("a1")
        await submit("a2", "a3")
        kinds.open("a")
        await wait_all_tasks_blocked()
    assert [items for kind, items in kinds.batches if kind == "a"] == [["a1"], ["a2", "a3"]]


async def test_weather_of_one_kind_is_told_to_nobody_else() -> None:
    kinds = Kinds("a", poison="a1")
    async with kinds.submitting() as (submit, _):
        await submit("a1", "a2", "b1")
        kinds.open("a")
        await wait_all_tasks_blocked()
        await submit("a3")
    assert {item for item, outcome in kinds.outcomes.items() if isinstance(outcome, Unavailable)} == {"a1", "a2"}


async def test_the_bound_is_one_for_all_kinds() -> None:
    kinds = Kinds("a", "b")
    async with kinds.submitting(buffer_max=2) as (submit, _):
        await submit("a1", "b1", "c1")
        assert kinds.outcomes.keys() == {"early", "c1"}
        assert isinstance(kinds.outcomes["c1"], Overloaded)
        kinds.open("a")
        await submit()
        await submit("c2")
        kinds.open("b")
    assert kinds.outcomes["c2"] == "c2c2"


async def test_at_the_end_no_caller_of_any_kind_is_left_waiting() -> None:
    kinds = Kinds("a", "b")
    async with kinds.submitting() as (submit, runner):
        await submit("a1", "b1", "a2")
        await runner.end()
        await submit("c1")
    late = {"a1", "b1", "a2", "c1"}
    assert {item for item, outcome in kinds.outcomes.items() if isinstance(outcome, Unavailable)} == late


async def test_without_batching_kinds_make_no_difference() -> None:
    kinds = Kinds("a")
    async with kinds.submitting(batch_max=1) as (submit, _):
        await submit("a1", "a2", "b1")
        assert [items for _, items in kinds.batches] == [["early"], ["a1"], ["a2"], ["b1"]]
        kinds.open("a")
    assert len(kinds.outcomes) == 4
