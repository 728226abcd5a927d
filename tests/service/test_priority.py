"""How many threads there are to use."""

import os

import pytest

from service.priority import cpu_count

ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("name", "content", "cores"),
    [
        ("cpu.max", "max 100000\n", ALL),
        ("cpu.max", "50000 100000\n", 1),
        ("cpu.max", "100000 100000\n", 1),
        ("cpu.max", "150000 100000\n", min(2, ALL)),
        ("cpu.max", "100000000 100000\n", ALL),
        ("cpu/cpu.cfs_quota_us", "50000\n", 1),
        ("cpu/cpu.cfs_quota_us", "-1\n", ALL),
        ("other", "", ALL),
    ],
)
def test_a_containers_quota_bounds_the_threads(name, content, cores, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    if name.startswith("cpu/"):
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_count(0, tmp_path) == cores


def test_the_number_that_was_asked_for_is_taken(tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cpu_count(7, tmp_path) == 7
