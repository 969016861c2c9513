"""Whom a ring means: how it wakes few of the idle workers instead of all, with nobody to decide for them.

Measured: with 100 idle workers each ring cost 100 claims, of which 99 found nothing. So every worker learns with its
heartbeats how many live workers hear the rings of each of its queues, and its own rank among them. Only those of its
own release and with the same tasks count: of others, some might be meant who cannot run the job. A ring carries a
random point; the max(2, k) ranks that follow it are meant by a ring for k jobs, and claim at once. Two at least, since
one of them may be gone. Up to four workers are all meant: there a claim too many costs little, and it matters to nobody
who else is alive.

What can go wrong, and what starts the job then:

- The first of those meant has no room: it passes the ring on, to twice as many, at most three times.
- All of those meant are gone, or busy, or believe in other ranks (beats are a third of a lease apart): each of the
  others that has room makes sure after about 1 s, with such a chance that about one of them does.
- None of these took it, or the ring was lost: each worker sweeps. With m idle workers some sweep comes within
  sweep_seconds / (m + 1) on average: the more workers, the sooner.
- A worker without room remembers the queue, and looks there when a slot frees.
- There are more jobs than were rung for: who filled its slots and got more than its share calls others, as many as it
  got jobs.

So every job starts within the sweep of any worker that has room for it, whatever is lost, and usually within
milliseconds.

Budget, for 100 idle workers and 50 rings a second for one job each: 2 claims a job by those who are meant, and one more
by who took it, if that filled its slots. To make sure, each worker chooses one ring in 100, waits 1 s and looks once
for all rings of that time: 0.7 claims a job for all. The sweeps, one in 5 s: 0.4 a job. Together 3.1, or 4.1 for those
of one slot, of which some coincide. The median wait is 3 ms, and 11 ms while 90 of the 100 have no room.

Passing on and calling others backs off: in a backlog, where everybody is busy, a worker rings once in sweep_seconds. It
starts anew when a claim has found the queue empty or, since who is full of long jobs claims nothing, after as long
without a call. With 90 of 100 workers full of long jobs and one ring a second, 95 % of the jobs stay taken at once;
without that it was 80 % after some minutes. With 50 rings a second passing on is mostly suppressed, and the rings and
doubts for other jobs find these too: simulated, half of the jobs wait 15 ms and one in 20 over 0.1 s, or 0.1 and 0.4 s
while 98 of the 100 are full. Workers over HTTP are woken by the API's own claims hub.
"""

import random
import time
from collections.abc import Iterable

import msgspec

from clarion.execution import Ready, Standing
from clarion.settings import Settings
from clarion.wake import HOPS_MAX, Ring, Ringer

_MEANT_MIN = 2
# So few workers are all meant by every ring.
_FEW = 4
# Of those that are not meant, so many look a little later, on average.
_DOUBTERS = 1
_FIRST_PAUSE_SECONDS = 0.1
_DOUBLINGS_MAX = 10


class _Called(msgspec.Struct, frozen=True):
    """How often others were called since the queue was last found empty, and the monotonic time of the next call."""

    times: int
    again_at: float


class Peers:
    """The workers that hear the same rings; while nothing is known of them, this worker is meant by each ring."""

    def __init__(self, ringer: Ringer, settings: Settings) -> None:
        self._ringer = ringer
        self._pause_max_seconds = settings.sweep_seconds
        self._standings: dict[str, Standing] = {}
        self._called: dict[str, _Called] = {}

    def learn(self, standings: Iterable[Standing]) -> None:
        """What the last heartbeat found out."""
        self._standings = {standing.queue: standing for standing in standings}

    def is_meant(self, queue: str, ring: Ring) -> bool:
        """Whether this worker is among those who are to claim at once."""
        standing = self._standings.get(queue)
        return standing is None or standing.workers <= _FEW or _place(standing, ring) < _meant(queue, ring)

    def is_to_pass_on(self, queue: str, ring: Ring) -> bool:
        """Whether this worker is the one that has to find others for the jobs, if it has no room for them."""
        standing = self._standings.get(queue)
        if standing is None or ring.hops >= HOPS_MAX or standing.workers <= max(_FEW, _meant(queue, ring)):
            return False
        return _place(standing, ring) == 0

    def share(self, queue: str, ring: Ring) -> float:
        """How many of the jobs this worker may expect, if all that are meant take as many."""
        standing, jobs = self._standings.get(queue), ring.queues[queue].jobs
        return jobs if standing is None else jobs / max(1, min(standing.workers, _meant(queue, ring)))

    def doubts(self, queue: str) -> bool:
        """Whether this worker, which is not meant, is one of the few that make sure a little later."""
        standing = self._standings[queue]
        return random.random() * max(1, standing.idle) < _DOUBTERS  # noqa: S311  who looks is no secret

    def call(self, queue: str, ready: Ready, *, hops: int = 0) -> None:
        """Rings for jobs that this worker has no room for, if there is anybody else and it did not just do so."""
        standing = self._standings.get(queue)
        now = time.monotonic()
        called = self._called.get(queue)
        if called is None or now >= called.again_at + self._pause_max_seconds:
            called = _Called(0, 0.0)
        if standing is None or standing.workers <= 1 or now < called.again_at:
            return
        pause_seconds = _FIRST_PAUSE_SECONDS * 2 ** min(called.times, _DOUBLINGS_MAX)
        self._called[queue] = _Called(called.times + 1, now + min(self._pause_max_seconds, pause_seconds))
        self._ringer.mark({queue: ready}, hops=hops)

    def note_empty(self, queue: str) -> None:
        """The queue had less than was asked for: what comes now is worth a call at once."""
        self._called.pop(queue, None)


def _place(standing: Standing, ring: Ring) -> int:
    """How far the worker's rank follows the point, from 0."""
    return (standing.rank - int(ring.point * standing.workers)) % standing.workers


def _meant(queue: str, ring: Ring) -> int:
    """How many ranks are meant: twice as many with each hop, since those before had no room."""
    return max(_MEANT_MIN, ring.queues[queue].jobs) << ring.hops
