"""Where a claim begins to look: how it stays flat while dead index entries pile up at the head of the line.

As long as any session holds a snapshot, the index entries of jobs claimed long ago cannot be removed, and a claim from
the start walks them all: a claim of one took 0.3 ms, and 4.8 ms after 24,000 jobs behind one held snapshot; a drain
fell from 12,400 to 6,200 jobs/s after 50,000. So each process remembers, per queue and set of tasks, the place in line
up to which it has claimed, and passes it as the lower bound of its next claim.

That is right until a job becomes ready before the mark: of a higher priority, released, or committed late. Whoever
makes one ready rings, the ring names the earliest sort_key, and that lowers the mark. Rings also come while a claim is
under way, which may have looked too early to see that job: so a claim never moves the mark past what was rung since it
was begun.

A claim skips what is locked, and passes it. So whatever locks a ready row and leaves it ready must ring afterwards: a
change does, and a retry, which changes nothing. Claims, cancels and expiries take what they lock out of the line.

Where no ring comes, the mark is wrong: one was lost; a transaction that had locked ready rows was undone, as of a claim
in another process that came to nothing; or a statement came for a row as it had been, and held it, ready by then, until
its own end, as of a stale worker's completion that waited for the reaper. So the mark is only a hint, forgotten at each
sweep and each reconnect, and the next claim looks from the start.
"""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from clarion.execution import Lease, Place

# The tasks that somebody takes; None: any, or always the same.
_Tasks = frozenset[str] | None

# Beyond it everything is forgotten, which costs a claim from the start for each.
_MARKS_MAX = 10_000
# Before all jobs that have the same sort_key.
_FIRST_ID = UUID(int=0)


class Look:
    """One claim under way in one queue; `earliest` is the place to look from, None: from the start."""

    __slots__ = ("_limit", "_rung", "_void", "earliest", "queue", "tasks")

    def __init__(self, queue: str, tasks: _Tasks, earliest: Place | None, rung: Place | None) -> None:
        self.queue = queue
        self.tasks = tasks
        self.earliest = earliest
        self._rung = rung
        self._limit: Place | None = None
        self._void = False

    def limit_to(self, earliest: Place) -> None:
        """A job became ready there, and this claim may have missed it."""
        self._limit = earliest if self._limit is None else min(self._limit, earliest)

    def make_void(self) -> None:
        """The mark was forgotten: this claim, begun before, is not to bring it back."""
        self._void = True

    def reached(self, taken: Sequence[Lease], asked: int) -> Place | None:
        """Up to which place nothing is left, as far as this claim can tell."""
        places = [lease.place_in_line for lease in taken]
        if len(taken) < asked and self._rung is not None:
            # Nothing is left at all. So what the last ring named is gone too, and whoever comes late to every job does
            # not stay behind.
            places.append(self._rung)
        if self._void or not places:
            return None
        return max(places) if self._limit is None else min(max(places), self._limit)


class Watermarks:
    """The marks of one process, by queue and, where it claims for several sets of tasks, by tasks.

    `begin`, and then either `end` or `lose`, stand around each claim; claims of one queue may overlap.
    """

    def __init__(self) -> None:
        self._marks: dict[str, dict[_Tasks, Place]] = {}
        self._count = 0
        self._looks: set[Look] = set()
        self._rung: dict[str, Place] = {}

    def heard(self, queue: str, earliest: datetime) -> None:
        """A ring: jobs became ready in the queue, the first of them at this sort_key."""
        marks, place = self._marks.get(queue), (earliest, _FIRST_ID)
        if marks:
            self._rung[queue] = place
            for tasks, mark in marks.items():
                marks[tasks] = min(mark, place)
        for look in self._looks:
            if look.queue == queue:
                look.limit_to(place)

    def forget(self) -> None:
        """Rings may have been missed: the next claims look from the start."""
        self._marks.clear()
        self._count = 0
        self._rung.clear()
        for look in self._looks:
            look.make_void()

    def begin(self, queue: str, tasks: _Tasks = None) -> Look:
        """To be called before the claim is sent."""
        mark = self._marks.get(queue, {}).get(tasks)
        look = Look(queue, tasks, mark, self._rung.get(queue))
        self._looks.add(look)
        return look

    def end(self, look: Look, taken: Sequence[Lease], asked: int) -> None:
        """The claim was answered: these leases of the queue, where `asked` were wanted."""
        self._looks.discard(look)
        reached = look.reached(taken, asked)
        if reached is None:
            return
        marks = self._marks.setdefault(look.queue, {})
        if look.tasks not in marks:
            self._count += 1
        marks[look.tasks] = max(reached, marks.get(look.tasks, reached))
        if self._count > _MARKS_MAX:
            self.forget()

    def lose(self, look: Look) -> None:
        """The claim has no answer: what it took may be ready again, at any time and without a ring."""
        self._looks.discard(look)
        self._count -= len(self._marks.pop(look.queue, ()))
        for other in self._looks:
            if other.queue == look.queue:
                other.make_void()
