"""Time to find a million images: `python benchmarks/scan.py --files 1000000 --folders 1000`

Creates empty files in class folders, and deletes them at the end. Measures in turn, each in its own process:
`find` (the system's own time), torchvision's ImageFolder, and this package.
Prints the median seconds of the call, the ratio to `find`, the peak memory of the process, and its growth during the
call. Directory entries are in the system's cache from the first round on, for `find` as well.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MEASURE = """
import re, sys, time
from pathlib import Path
{imports}
folder = Path(sys.argv[1])
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
before, begun = peak(), time.perf_counter()
found = {call}
print(time.perf_counter() - begun, peak(), peak() - before, len(found))
"""
OURS = ("from deepcluster.data.sources.folders import open_folder", "open_folder(folder)")
IMAGE_FOLDER = ("from torchvision.datasets import ImageFolder", "ImageFolder(str(folder))")


def make(folder: Path, files: int, folders: int) -> None:
    """Fill `folder` with empty files, spread evenly over the class folders."""
    for number in range(folders):
        inner = folder / f"class {number:06}"
        inner.mkdir(parents=True)
        for image in range(number * files // folders, (number + 1) * files // folders):
            os.close(os.open(f"{inner}/image-{image:09}.jpg", os.O_CREAT | os.O_WRONLY))


def find(folder: Path, *output: str) -> list[float]:
    """Return the seconds of the system's `find`, peak MB (at least that of this process, its parent), growth, files."""
    begun = time.perf_counter()
    counted = subprocess.Popen(["wc", "-l"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen(["find", folder, "-type", "f", *output], stdout=counted.stdin)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    lines = int(counted.communicate()[0])
    return [time.perf_counter() - begun, usage.ru_maxrss / 1024, 0.0, lines]


def python(code: tuple[str, str], folder: Path) -> list[float]:
    """Return the seconds of a call, peak MB of its process, its growth during the call, and the number of files."""
    script = MEASURE.format(imports=code[0], call=code[1])
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def compare(folder: Path, repeats: int) -> None:
    """Run all in turn and print the table."""
    ways: dict[str, Callable[[], list[float]]] = {
        "find -type f": lambda: find(folder),
        "find -printf size, time": lambda: find(folder, "-printf", "%s %T@ %P\n"),
        "torchvision ImageFolder": lambda: python(IMAGE_FOLDER, folder),
        "ours": lambda: python(OURS, folder),
    }
    measured: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            measured[name].append(way())
    print(f"{'':<26}{'files':>10}{'seconds':>10}{'to find':>10}{'peak MB':>10}{'growth MB':>10}")
    base = statistics.median(row[0] for row in measured["find -type f"])
    for name, rows in measured.items():
        seconds, peak, growth, files = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:<26}{files:>10,.0f}{seconds:>10.2f}{seconds / base:>10.2f}{peak:>10.0f}{growth:>10.0f}")


def main() -> None:
    """Create the files, compare, and delete them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="an existing folder for the files; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        make(Path(temporary, "images"), options.files, options.folders)
        compare(Path(temporary, "images"), options.repeats)


if __name__ == "__main__":
    main()
