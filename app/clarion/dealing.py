"""How the jobs that somebody may take are dealt out among queues."""

from collections.abc import Collection


def deal(jobs: int, queues: Collection[str], *, turn: int) -> dict[str, int]:
    """So many jobs to the queues in equal shares; who gets the odd ones, or any, changes with the turn."""
    names = sorted(queues)
    first = turn % len(names)
    order = [*names[first:], *names[:first]][:jobs]
    each, odd = divmod(jobs, len(order))
    return {queue: each + (place < odd) for place, queue in enumerate(order)}
