"""What request handlers work with; `clarion/main.py` makes one and hands it to `create_app`."""

from collections.abc import Sequence
from typing import Protocol

import anyio
import msgspec

from clarion.api.requests import Bodies
from clarion.claims import Claims
from clarion.endings import Endings
from clarion.job import Enqueued, NewJob
from clarion.roster import Roster
from clarion.settings import Settings
from clarion.store import Store
from clarion.waits import Waits
from clarion.wake import Ringer


class Adder(Protocol):
    """Commits jobs and wakes whoever can run them."""

    async def enqueue_one(self, job: NewJob) -> Enqueued:
        """Adds one job, together with those of other requests; returns after its commit."""

    async def enqueue(self, jobs: Sequence[NewJob]) -> list[Enqueued]:
        """Adds all jobs or none; returns after the commit, in the order of the input."""


class Services(msgspec.Struct, frozen=True, kw_only=True):
    """One process's parts, shared by all requests. `draining` is set once, when shutdown begins."""

    store: Store
    enqueuer: Adder
    endings: Endings
    ringer: Ringer
    waits: Waits
    claims: Claims
    roster: Roster
    settings: Settings
    draining: anyio.Event
    bodies: Bodies = msgspec.field(default_factory=Bodies)
