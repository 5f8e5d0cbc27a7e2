"""Thousands of spoiled files, in a process of its own: an image or a reason, no crash, no hang and no leak.

A seed that fails is tried alone by `python tests/test_decode_fuzz.py --first SEED --count 1`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from spoiled_images import GOOD, encode, picture, spoil

from deepcluster.core.errors import UnreadableImage
from deepcluster.data.decode import decode

# Headers may claim any size: this keeps an image that has been let through to a few MB.
MAX_PIXELS = 500_000
# The C libraries' pools and Python's own are full after so many cases.
WARM_UP = 400
MOST_LEAKED_MB = 40


def sound_files() -> list[bytes]:
    """Small files of all kinds, and more of those that hold more than pixels."""
    image = Image.fromarray(picture(1))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    files = [to_bytes(image) for _, to_bytes in GOOD.values()]
    files += [
        encode(image, "JPEG", **options) for options in ({"restart_marker_blocks": 2}, {"exif": exif}, {"comment": b"c"})
    ]
    files += [encode(image, "PNG", exif=exif), encode(image.convert("1"), "PNG"), encode(image, "WEBP", lossless=True)]
    files += [encode(image, "TIFF", compression=name) for name in ("raw", "tiff_deflate", "packbits", "jpeg")]
    grey = np.asarray(image.convert("L"))
    files += [encode(Image.fromarray(grey / np.float32(255)), "TIFF", compression=name) for name in ("raw", "tiff_lzw")]
    files += [encode(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF", compression="tiff_deflate", big_tiff=True)]
    files += [b"P5 48 40 4095\n" + (grey.astype(">u2") * 16).tobytes()]
    return [*files, encode(image, "WEBP", exif=exif), encode(image.quantize(8), "GIF", transparency=0)]


def check(sound: list[bytes], seed: int) -> str:
    """Decode one spoiled file, every other one at a smaller size, and say what came of it."""
    try:
        image = decode(spoil(sound, seed), MAX_PIXELS, shorter_side=16 if seed % 2 else None)
    except UnreadableImage as error:
        reason = str(error)
        assert 0 < len(reason) < 300, reason
        assert reason.isprintable(), f"more than a line: {reason!r}"
        return "refused"
    assert type(image) is np.ndarray, type(image)
    assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3), (image.dtype, image.shape)
    assert image.size > 0
    assert image.flags.c_contiguous
    return "decoded"


def resident_mb() -> float:
    """Memory of this process; 0 where it isn't known."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 / 2**20 if statm.exists() else 0.0


def run_cases(first: int, count: int) -> None:
    """Print the seed of each case before it is tried; at the end what came of all, and how many MB were not given back."""
    sound = sound_files()
    outcomes = {"decoded": 0, "refused": 0}
    warm = 0.0
    for seed in range(first, first + count):
        if seed == first + min(WARM_UP, count - 1):
            warm = resident_mb()
        print(seed, flush=True)
        outcomes[check(sound, seed)] += 1
    print(outcomes["decoded"], outcomes["refused"], round(resident_mb() - warm, 1))


def survives(first: int, count: int, seconds: float) -> tuple[int, int, float]:
    """Run the cases in a child process; return how many were decoded and refused, and the MB not given back."""
    command = [sys.executable, "-W", "error", __file__, "--first", str(first), "--count", str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, errors="replace")
    except subprocess.TimeoutExpired as error:
        last = (error.stdout or b"").decode().split()[-1:]
        pytest.fail(f"after {seconds} s still at seed {last}")
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"exit status {done.returncode} at seed {last}:\n{done.stderr[-3000:]}"
    decoded, refused, leaked = last[0].split()
    return int(decoded), int(refused), float(leaked)


def test_spoiled_files_of_all_formats_give_an_image_or_a_reason() -> None:
    decoded, refused, leaked = survives(0, 1500, seconds=120)
    assert decoded + refused == 1500
    assert min(decoded, refused) > 200
    assert leaked < MOST_LEAKED_MB


@pytest.mark.slow
def test_ten_thousand_more_of_them() -> None:
    decoded, refused, leaked = survives(1500, 10_000, seconds=900)
    assert decoded + refused == 10_000
    assert leaked < MOST_LEAKED_MB


@pytest.mark.parametrize("fault", ["import os; os.kill(os.getpid(), 11)", "1 / 0"])
def test_a_crash_names_its_seed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's way of telling, shown on a child that fails at seed 7."""
    script = tmp_path / "child.py"
    script.write_text(f"print(6, flush=True)\nprint(7, flush=True)\n{fault}\n")
    monkeypatch.setitem(globals(), "__file__", str(script))
    with pytest.raises(AssertionError, match=r"at seed \['7'\]"):
        survives(0, 10, seconds=60)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    options = parser.parse_args()
    run_cases(options.first, options.count)
