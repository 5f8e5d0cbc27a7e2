"""Limits of containers and jobs, on trees of files as the kernel shows them, and on processes that are limited."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from deepcluster.core.limits import free_memory, usable_cores
from deepcluster.core.shared_memory import SharedFile, map_file

GIB = 1 << 30
UNLIMITED = "9223372036854771712"  # of version 1
V1_MOUNTS = r"""
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:10 - cgroup cgroup rw,memory
"""
V2_MOUNT = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot"
# Files below the root, by name, and the memory in GiB and the processors that are left, of 64 and all.
TREES: dict[str, tuple[Mapping[str, str], float, int]] = {
    "no groups": ({}, 64, 99),
    "v2 of a container": (
        {"sys/fs/cgroup/memory.max": str(2 * GIB), "sys/fs/cgroup/memory.current": str(GIB // 2)}, 1.5, 99,
    ),
    "v2 nested, as Slurm has it": (
        {
            "proc/self/mountinfo": V2_MOUNT,
            "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_1/step_0/user/task_0",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_1/memory.max": str(2 * GIB),
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_1/memory.current": str(GIB),
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_1/step_0/user/task_0/memory.max": "max",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_1/step_0/user/task_0/memory.current": str(GIB),
            "sys/fs/cgroup/system.slice/cpu.max": "400000 100000",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_1/cpu.max": "150000 100000",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_2/memory.max": "1",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_2/memory.current": "0",
        },
        1, 2,
    ),
    "v2 where the outer group is fuller than the inner one": (
        {
            "proc/self/cgroup": "0::/outer/inner",
            "sys/fs/cgroup/outer/memory.max": str(8 * GIB),
            "sys/fs/cgroup/outer/memory.current": str(7 * GIB),
            "sys/fs/cgroup/outer/inner/memory.max": str(4 * GIB),
            "sys/fs/cgroup/outer/inner/memory.current": str(GIB),
        },
        1, 99,
    ),
    "v2 slowed down before it is full": (
        {
            "sys/fs/cgroup/memory.max": "max",
            "sys/fs/cgroup/memory.high": str(3 * GIB),
            "sys/fs/cgroup/memory.current": str(GIB),
        },
        2, 99,
    ),
    "v2 full of cached files": (
        {
            "sys/fs/cgroup/memory.max": str(4 * GIB),
            "sys/fs/cgroup/memory.current": str(4 * GIB),
            "sys/fs/cgroup/memory.stat": f"anon 1\nfile {3 * GIB}\ninactive_file {3 * GIB}\nactive_file 0\n",
        },
        3, 99,
    ),
    "v2 over its limit": ({"sys/fs/cgroup/memory.max": "100", "sys/fs/cgroup/memory.current": "200"}, 0, 99),
    "v2 mounted elsewhere": (
        {
            "proc/self/mountinfo": "29 23 0:26 / /mnt/control\\040groups rw - cgroup2 none rw",
            "proc/self/cgroup": "0::/a:b",
            "mnt/control groups/a:b/memory.max": str(GIB),
            "mnt/control groups/a:b/memory.current": "0",
            "mnt/control groups/a:b/cpu.max": "100000 100000",
        },
        1, 1,
    ),
    "v2 seen from a container that is not told of its own place": (
        {
            "proc/self/mountinfo": V2_MOUNT,
            "proc/self/cgroup": "0::/../../kubepods/pod1",
            "sys/fs/cgroup/memory.max": str(GIB),
            "sys/fs/cgroup/memory.current": "0",
        },
        1, 99,
    ),
    "v1 of a container whose group has another name outside": (
        {
            "proc/self/mountinfo": V1_MOUNTS.replace("0:32 /", "0:32 /docker/abc").replace("0:29 /", "0:29 /docker/abc"),
            "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc/sub\n0::/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
            "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 0\n",
            "sys/fs/cgroup/cpu,cpuacct/sub/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/sub/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        1, 1,
    ),
    "v1 nested": (
        {
            "proc/self/mountinfo": V1_MOUNTS,
            "proc/self/cgroup": "9:memory:/slurm/uid_0/job_1/step_0\n1:cpu,cpuacct:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(40 * GIB),
            "sys/fs/cgroup/memory/slurm/uid_0/job_1/memory.limit_in_bytes": str(3 * GIB),
            "sys/fs/cgroup/memory/slurm/uid_0/job_1/memory.usage_in_bytes": str(2 * GIB),
            "sys/fs/cgroup/memory/slurm/uid_0/job_1/step_0/memory.limit_in_bytes": UNLIMITED,
            "sys/fs/cgroup/memory/slurm/uid_0/job_1/step_0/memory.usage_in_bytes": str(2 * GIB),
        },
        1, 99,
    ),
    "v1 for memory beside v2 for processors": (
        {
            "proc/self/mountinfo": V1_MOUNTS.replace("cpu,cpuacct", "pids")
            + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw",
            "proc/self/cgroup": "4:memory:/a\n0::/b",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(GIB),
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "0",
            "sys/fs/cgroup/memory/b/memory.limit_in_bytes": "1",
            "sys/fs/cgroup/memory/b/memory.usage_in_bytes": "0",
            "sys/fs/cgroup/unified/b/cpu.max": "100000 100000",
            "sys/fs/cgroup/unified/a/cpu.max": "1 100000",
        },
        1, 1,
    ),
    "files of another kernel": (
        {
            "proc/self/mountinfo": "a b\n - cgroup2\n\n" + V2_MOUNT,
            "proc/self/cgroup": "nonsense",
            "sys/fs/cgroup/memory.max": "1e9",
            "sys/fs/cgroup/memory.current": "",
            "sys/fs/cgroup/cpu.max": "max",
        },
        64, 99,
    ),
}  # fmt: skip


@pytest.mark.parametrize("tree", TREES)
def test_the_smallest_limit_of_all_groups_counts(tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, gibibytes, processors = TREES[tree]
    for name, text in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {64 << 20} kB\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert free_memory(tmp_path) == gibibytes * GIB
    mine = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path) == min(processors, mine)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    assert usable_cores(tmp_path) == 1


def test_a_process_keeps_to_its_affinity_and_its_ulimit() -> None:
    code = """
import os, resource
from deepcluster.core.limits import free_memory, usable_cores
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
before, size = free_memory(), int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
print(usable_cores(), before, free_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cores, before, after = map(int, done.stdout.split())
    assert cores == 1
    assert after <= min(before, 64 << 20)


def test_shared_memory_is_a_file_where_the_system_forbids_the_other_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def memfd_create(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "memfd_create", memfd_create)
    shared = SharedFile(1 << 16)
    map_file(shared.path)[:] = 7
    assert Path(shared.path).stat().st_blocks * 512 >= 1 << 16  # The disk has room for all of it.
    assert map_file(shared.path).sum() == 7 << 16
    shared.close()
    assert not Path(shared.path).exists()
