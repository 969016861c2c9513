"""How many CPUs this process may use: fewer than the machine has where it is pinned, or where a container has a quota.

A quota does not hide CPUs, it makes a process wait when it has used its share; so it has to be looked up. It stands in
the control group of the process or in one above it: `cpu.max` (version 2), `cpu.cfs_quota_us` (version 1).
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
# Where version 1 keeps its CPU controller; the first is the mount, the second in most cases a link to it.
_V1_CONTROLLERS = ("cpu,cpuacct", "cpu")


def usable_cpus(*, membership: Path = _MEMBERSHIP, groups: Path = _GROUPS) -> int:
    """The CPUs this process may run on, or its quota rounded up where that is less; at least 1."""
    return max(1, min([_schedulable_cpus(), *_quotas(membership, groups)]))


def quota_cpus(cpu_max: str) -> int | None:
    """`150000 100000` (µs of CPU in so many µs of time) is 2, rounded up; None where there is no limit."""
    try:
        quota, period = (int(part) for part in cpu_max.split())
    except ValueError:  # `max 100000`
        return None
    return -(-quota // period) if quota > 0 and period > 0 else None


def _schedulable_cpus() -> int:
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _quotas(membership: Path, groups: Path) -> Iterator[int]:
    for directory in _groups_of_process(membership, groups):
        for limit in (_read(directory / "cpu.max"), _v1_limit(directory)):
            cpus = quota_cpus(limit)
            if cpus is not None:
                yield cpus


def _groups_of_process(membership: Path, groups: Path) -> Iterator[Path]:
    for line in _read(membership).splitlines():
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if not controllers:
            yield from _with_those_above(groups, path)
        elif "cpu" in controllers.split(","):
            for name in _V1_CONTROLLERS:
                yield from _with_those_above(groups / name, path)


def _with_those_above(root: Path, path: str) -> Iterator[Path]:
    """The group and all around it. A container may be told its path on the host, and see its own group as the root."""
    own = root / path.lstrip("/")
    yield from (group for group in (own, *own.parents) if group.is_relative_to(root))


def _v1_limit(directory: Path) -> str:
    return f"{_read(directory / 'cpu.cfs_quota_us')} {_read(directory / 'cpu.cfs_period_us')}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
