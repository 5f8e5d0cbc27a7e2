"""What this process may use of its machine: memory and processors, within the limits of its container or job.

Limits are those of control groups (cgroup v1, v2 and both; a group is bounded by all groups around it), of the affinity of
the process, of `ulimit -v`, and of Slurm. Each function takes the root of the file system, for tests.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from math import ceil
from pathlib import Path

_ROOT = Path("/")
# Where control groups are mounted as a rule; /proc/self/mountinfo knows other places.
_USUAL = "sys/fs/cgroup"
# Versions 2 and 1: the files of the limits of a group, its use, and the line of memory.stat of what can be dropped.
_MEMORY_FILES = (
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(root: Path = _ROOT) -> int:
    """Return the bytes of memory that this process and others of its job may still take."""
    free = 4 << 30
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if found:
        free = int(found[1]) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limits = [left for group in _groups("memory", root) for left in _memory_left(group)]
    return max(0, min([free, *limits, *_address_space_left(root)]))


def usable_cores(root: Path = _ROOT) -> int:
    """Return the number of processors that this process may use, at least 1; a share of one counts as one."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # cpusets, taskset, Slurm
        cores = len(os.sched_getaffinity(0))
    shares = [share for group in _groups("cpu", root) for share in _processor_share(group)]
    of_job = (os.environ.get(name, "") for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"))
    slurm = next((int(number) for number in of_job if number.isdecimal()), cores)
    return max(1, min([cores, slurm, *map(ceil, shares)]))


def _memory_left(group: Path) -> Iterator[int]:
    for limits, use, cache in _MEMORY_FILES:
        used = _number(group / use)
        found = re.search(rf"^{cache} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
        for limit in limits:
            if used is not None and (most := _number(group / limit)) is not None:
                yield most - used + (int(found[1]) if found else 0)


def _address_space_left(root: Path) -> Iterator[int]:
    """Yield what `ulimit -v` leaves, which some schedulers set."""
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            yield most - int(_text(root / "proc/self/statm").split()[0]) * resource.getpagesize()


def _processor_share(group: Path) -> Iterator[float]:
    quota, period = (*_text(group / "cpu.max").split(), "", "")[:2]
    for number, of in ((quota, period), (_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))):
        with suppress(ValueError, ZeroDivisionError):  # "max", or no such file
            if int(number) > 0:  # -1: no limit
                yield int(number) / int(of)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups of this process that may limit a controller, and of those around them."""
    paths: dict[str, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        paths |= dict.fromkeys(names.split(","), path)  # Version 2 has no name.
    seen = set[Path]()
    for name, place, inside in _mounts(controller, root):
        path = paths.get(name, "/")
        if inside != "/" and (path + "/").startswith(inside + "/"):  # A container sees a part of the tree.
            path = path[len(inside) :]
        group = place / path.lstrip("/")
        if ".." in group.parts or not group.is_dir():
            group = place
        while group not in seen:
            seen.add(group)
            yield group
            if group == place:
                break
            group = group.parent


def _mounts(controller: str, root: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield the name in /proc/self/cgroup, the folder, and which part of the tree of groups it shows."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, *_, options) = before.split(), (*after.split(), "", "")[:3]
        is_ours = kind == "cgroup2" or (kind == "cgroup" and controller in options.split(","))
        if is_ours and len(fields) > 4:
            inside, place = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field) for field in fields[3:5])
            yield "" if kind == "cgroup2" else controller, root / place.lstrip("/"), inside
    for name, place in (("", _USUAL), ("", f"{_USUAL}/unified"), (controller, f"{_USUAL}/{controller}")):
        yield name, root / place, "/"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None
