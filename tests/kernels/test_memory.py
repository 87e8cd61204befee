"""How much memory is free: of the machine, or of the tightest control group."""

import os
from pathlib import Path

import pytest
import torch

from kernels.memory import free_bytes, peak_bytes
from tests.simulated_gpu import simulated_gpu

CPU = torch.device("cpu")
MACHINE = "MemTotal: 9 kB\nMemAvailable: 8192 kB\n"
MACHINE_BYTES = 8192 * 1024


def test_this_machine_has_some_memory_left() -> None:
    free = free_bytes(CPU)
    assert free is not None
    assert 2**20 < free < 2**50


def system(root: Path, groups: str = "", meminfo: str = MACHINE) -> Path:
    """A root with MACHINE_BYTES available. groups: of this process, as /proc/self/cgroup lists them."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(meminfo)
    (root / "proc/self/cgroup").write_text(groups)
    return root


def make_v2(root: Path, path: str, limit: str, used: int, inactive_file: int = 0) -> None:
    group = root / "sys/fs/cgroup" / path
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 7\nfile 8\ninactive_file {inactive_file}\nactive_file 9\n")


def make_v1(root: Path, path: str, limit: int, used: int, inactive_file: int = 0) -> None:
    group = root / "sys/fs/cgroup/memory" / path
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {inactive_file}\n")


@pytest.mark.parametrize("groups", ["", "0::/\n", "0::/a.slice\n", "3:cpuset:/a\n4:memory:/a\n0::/\n"])
def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path, groups: str) -> None:
    assert free_bytes(CPU, system(tmp_path, groups)) == MACHINE_BYTES


def test_a_cgroup_that_leaves_more_than_the_machine_has_does_not_count(tmp_path: Path) -> None:
    make_v2(tmp_path, "", str(2 * MACHINE_BYTES), 1)
    assert free_bytes(CPU, system(tmp_path, "0::/\n")) == MACHINE_BYTES


@pytest.mark.parametrize(
    ("limit", "used", "inactive_file", "left"),
    [
        ("3000", 1000, 0, 2000),
        ("3000", 2900, 2400, 2500),  # page cache that is not in use is as good as free
        ("3000", 100, 400, 3000),  # the two files are not read at the same moment
        ("3000", 4000, 0, 0),
        ("max", 1000, 0, MACHINE_BYTES),
    ],
)
def test_a_cgroup_leaves_its_limit_but_for_its_working_set(
    tmp_path: Path, limit: str, used: int, inactive_file: int, left: int
) -> None:
    make_v2(tmp_path, "", limit, used, inactive_file)
    assert free_bytes(CPU, system(tmp_path, "0::/\n")) == left


def test_a_cgroup_of_version_1_counts_too(tmp_path: Path) -> None:
    make_v1(tmp_path, "docker/abc", 3000, 2900, 2400)
    make_v1(tmp_path, "", 2**63 - 4096, 10**9)
    assert free_bytes(CPU, system(tmp_path, "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")) == 2500


def test_a_container_finds_its_limit_at_the_mount_though_its_path_is_the_hosts(tmp_path: Path) -> None:
    make_v1(tmp_path, "", 3000, 1000)
    assert free_bytes(CPU, system(tmp_path, "4:memory:/docker/abc\n")) == 2000


@pytest.mark.parametrize(("slice_limit", "scope_limit", "left"), [("2500", "9000", 1500), ("9000", "2500", 1600)])
def test_of_nested_cgroups_the_tightest_limit_wins(
    tmp_path: Path, slice_limit: str, scope_limit: str, left: int
) -> None:
    make_v2(tmp_path, "user.slice", slice_limit, 1000)
    make_v2(tmp_path, "user.slice/session.scope", scope_limit, 900)
    make_v2(tmp_path, "user.slice/another.scope", "100", 90)
    assert free_bytes(CPU, system(tmp_path, "0::/user.slice/session.scope\n")) == left


def test_without_meminfo_it_is_the_pages_that_are_unused(tmp_path: Path) -> None:
    free = free_bytes(CPU, tmp_path)
    assert free is not None
    assert 2**20 < free < 2**50


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(os.sysconf_names, "SC_AVPHYS_PAGES")
    assert free_bytes(CPU, tmp_path) is None


def test_what_torch_keeps_of_a_gpu_for_later_is_free() -> None:
    with simulated_gpu() as gpu:
        held = torch.zeros(1000, dtype=torch.uint8, device="cuda")
        torch.zeros(5000, dtype=torch.uint8, device="cuda")
        assert free_bytes(gpu.device) == gpu.total_bytes - held.nbytes


def test_a_peak_is_what_lived_at_once_beside_what_was_there() -> None:
    def work() -> None:
        for _ in range(3):
            torch.zeros(2000, dtype=torch.uint8, device="cuda")[:10].add_(torch.zeros((), device="cuda").byte())

    with simulated_gpu() as gpu:
        held = torch.zeros(10_000, dtype=torch.uint8, device="cuda")
        found = peak_bytes(gpu.device, work)
        assert found is not None
        assert 2000 <= found < 2100
        assert held.is_cuda
    assert peak_bytes(CPU, work) is None
