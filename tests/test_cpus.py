"""How many CPUs may be used, under the quotas of containers of both kinds."""

import os
from pathlib import Path

import pytest

from clarion.cpus import quota_cpus, usable_cpus


@pytest.mark.parametrize(
    ("cpu_max", "cpus"),
    [
        ("200000 100000\n", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("max 100000", None),
        ("-1 100000", None),
        ("100000 0", None),
        ("", None),
    ],
)
def test_a_quota_is_rounded_up_to_whole_cpus(cpu_max: str, cpus: int | None) -> None:
    assert quota_cpus(cpu_max) == cpus


def limit(directory: Path, cpu_max: str) -> None:
    """Gives a group of the second version a quota."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cpu.max").write_text(cpu_max)


def asked(root: Path, membership: str) -> int:
    """What a process of these groups finds below `root`."""
    (root / "membership").write_text(membership)
    return usable_cpus(membership=root / "membership", groups=root / "groups")


@pytest.fixture
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may run on eight CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)


@pytest.mark.usefixtures("many_cpus")
def test_the_quota_of_a_container_counts(tmp_path: Path) -> None:
    limit(tmp_path / "groups", "250000 100000")
    assert asked(tmp_path, "0::/\n") == 3


@pytest.mark.usefixtures("many_cpus")
def test_the_least_quota_of_all_groups_around_counts(tmp_path: Path) -> None:
    limit(tmp_path / "groups/pod/worker", "max 100000")
    limit(tmp_path / "groups/pod", "200000 100000")
    assert asked(tmp_path, "0::/pod/worker\n") == 2


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize("controller", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_the_first_version_counts(tmp_path: Path, controller: str) -> None:
    directory = tmp_path / "groups" / controller
    directory.mkdir(parents=True)
    (directory / "cpu.cfs_quota_us").write_text("400000\n")
    (directory / "cpu.cfs_period_us").write_text("100000\n")
    # A container is told its path on the host, where it has none such itself.
    assert asked(tmp_path, "5:memory:/elsewhere\n4:cpu,cpuacct:/docker/0123\n") == 4


@pytest.mark.usefixtures("many_cpus")
def test_without_a_quota_the_cpus_that_may_be_run_on_count(tmp_path: Path) -> None:
    assert asked(tmp_path, "0::/\n") == 8
    assert usable_cpus(membership=tmp_path / "absent", groups=tmp_path / "absent") == 8


def test_here_there_is_at_least_one() -> None:
    assert usable_cpus() >= 1
