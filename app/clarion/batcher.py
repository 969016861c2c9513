"""The coalescer: while one flush is in flight, callers queue; the next flush takes all of them in one statement.

There is no timer: an idle service answers at the speed of one statement, and a busy one commits in groups
(measured with 32 clients: 2,900 requests/s against 1,290 without). Only after its own commit is a caller answered.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import anyio

from clarion.db import Locked
from clarion.errors import ClarionError, Overloaded, Unavailable, Unstorable
from clarion.loops import Signal

_BATCH_MAX_BYTES = 8 << 20

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class _Waiting(Generic[Item, Answer]):
    """One caller's item, and later its answer or its error."""

    __slots__ = ("answer", "done", "error", "item")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.done = anyio.Event()
        self.answer: Answer | None = None
        self.error: ClarionError | None = None

    def fail(self, error: ClarionError) -> None:
        self.error = error
        self.done.set()


class Batcher(Generic[Item, Answer]):
    """Turns single calls into sets. `flush` takes items and answers in their order, or raises and has done nothing.

    A set has at most `batch_max` items, and not many more than 8 MiB as far as `weigh` tells an item's bytes.

    An item that Postgres refuses is bisected out: it gets `Unstorable`, its neighbours succeed. The same goes for
    an item whose row is locked by another session, unless both halves are.
    """

    def __init__(
        self,
        flush: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]],
        *,
        batch_max: int,
        buffer_max: int,
        weigh: Callable[[Item], int] = lambda _item: 0,
    ) -> None:
        self._flush = flush
        self._batch_max = batch_max
        self._buffer_max = buffer_max
        self._weigh = weigh
        self._waiting: deque[_Waiting[Item, Answer]] = deque()
        self._filled = Signal()
        self._ended = False

    async def submit(self, item: Item) -> Answer:
        """The item's own answer, after the commit that holds it.

        Raises Overloaded when the buffer is full; Unavailable when the outcome is unknown.
        """
        if self._ended:
            raise Unavailable("this process is stopping")
        if len(self._waiting) >= self._buffer_max:
            raise Overloaded(f"{self._buffer_max} items wait for a commit already")
        waiting: _Waiting[Item, Answer] = _Waiting(item)
        self._waiting.append(waiting)
        self._filled.set()
        await waiting.done.wait()
        if waiting.error is not None:
            raise waiting.error
        return waiting.answer  # type: ignore[return-value]  # set by _send before `done`

    async def run(self) -> None:
        """Flushes for ever, one batch at a time. Ended from outside, it leaves no caller waiting."""
        batch: list[_Waiting[Item, Answer]] = []
        try:
            while True:
                await self._filled.wait()
                while self._waiting:
                    batch = self._next_batch()
                    await self._send_or_split(batch)
        finally:
            self._ended = True
            for waiting in [*batch, *self._waiting]:
                if not waiting.done.is_set():
                    waiting.fail(Unavailable("stopped before the commit was confirmed"))
            self._waiting.clear()

    def _next_batch(self) -> list[_Waiting[Item, Answer]]:
        """The next items, as many as one statement may hold, and one at least."""
        batch, batch_bytes = [self._waiting.popleft()], 0
        while self._waiting and len(batch) < self._batch_max:
            batch_bytes += self._weigh(batch[-1].item)
            if batch_bytes >= _BATCH_MAX_BYTES:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _send_or_split(self, batch: list[_Waiting[Item, Answer]]) -> None:
        error = await self._send(batch)
        if error is not None:
            await self._split(batch, error)

    async def _split(self, batch: list[_Waiting[Item, Answer]], error: ClarionError) -> None:
        if len(batch) == 1 or not isinstance(error, Unstorable | Locked):
            _fail(batch, error)
            return
        middle = len(batch) // 2
        halves = [(half, await self._send(half)) for half in (batch[:middle], batch[middle:])]
        if all(isinstance(half_error, Locked) for _, half_error in halves):
            _fail(batch, error)
            return
        for half, half_error in halves:
            if half_error is not None:
                await self._split(half, half_error)

    async def _send(self, batch: list[_Waiting[Item, Answer]]) -> ClarionError | None:
        try:
            answers = await self._flush([waiting.item for waiting in batch])
        except ClarionError as error:
            return error
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.answer = answer
            waiting.done.set()
        return None


def _fail(batch: Sequence[_Waiting[Item, Answer]], error: ClarionError) -> None:
    for waiting in batch:
        waiting.fail(error)
