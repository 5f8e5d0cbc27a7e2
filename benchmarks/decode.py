"""Decoding JPEGs: images per second of this package, next to bare simplejpeg and Pillow, on real photos.

    python benchmarks/decode.py --data FOLDER [--images 100] [--rounds 7]

JPEG photos of FOLDER are scaled to 32 x 32, 224 x 224, 500 x 375 and 4000 x 3000 and saved with quality 90. The programs
decode the same files in turn, in one thread. Prints the fastest of the rounds per second of wall time and of CPU time,
and the ratio of CPU time to bare simplejpeg. "to 160" reduces the shorter side: by `shorter_side`, after decoding all
pixels (bare simplejpeg), or after Pillow's draft mode; "off" is the mean difference from the first, of 255. Use an idle
machine.
"""

import argparse
import io
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from deepcluster.data.decode import decode
from deepcluster.data.resample import resize

Decoder = Callable[[bytes], NDArray[np.uint8]]
SIZES = {"32 x 32": (32, 32), "224 x 224": (224, 224), "500 x 375": (500, 375), "4000 x 3000": (4000, 3000)}


def by_simplejpeg(encoded: bytes) -> NDArray[np.uint8]:
    """Decode with nothing but simplejpeg."""
    image_HWC: NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, "RGB")
    return image_HWC


def by_pillow(encoded: bytes, shorter_side: int = 0) -> NDArray[np.uint8]:
    """Decode with Pillow; with `shorter_side`, at no more than the size needed."""
    image = Image.open(io.BytesIO(encoded))
    if shorter_side:
        image.draft(None, (shorter_side, shorter_side))
    return np.array(image.convert("RGB"))


def reducing(decoder: Decoder, shorter_side: int, sides: tuple[int, int], encoded: bytes) -> NDArray[np.uint8]:
    """Decode an image of `sides` (W, H), then reduce its shorter side."""
    size = sides[1] * shorter_side // min(sides), sides[0] * shorter_side // min(sides)
    reduced: NDArray[np.uint8] = resize(torch.from_numpy(decoder(encoded)), size).permute(1, 2, 0).numpy()
    return reduced


def scaled(path: Path, size: tuple[int, int]) -> bytes:
    """Return a photo at another size."""
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def table(title: str, files: list[bytes], programs: dict[str, Decoder], rounds: int) -> None:
    """Measure the programs in turn, and print a line for each."""
    best = {name: [float("inf")] * 2 for name in programs}
    repeats = max(1, 500_000 // sum(map(len, files)))  # for small images
    for _ in range(rounds):
        for name, program in programs.items():
            started = time.perf_counter(), time.process_time()
            for file in files * repeats:
                program(file)
            passed = time.perf_counter() - started[0], time.process_time() - started[1]
            best[name] = [min(pair) for pair in zip(best[name], passed, strict=True)]
    print(f"\n{title:24}{'per wall second':>16}{'per CPU-second':>16}{'ratio':>8}{'off':>8}")
    first, count = next(iter(programs)), len(files) * repeats
    for name, (wall, cpu) in best.items():
        off = np.mean([np.abs(programs[name](file).astype(int) - programs[first](file)).mean() for file in files])
        print(f"{name:24}{count / wall:>16,.1f}{count / cpu:>16,.1f}{best[first][1] / cpu:>8.2f}{off:>8.2f}")


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JPEG photos")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(path for path in options.data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise SystemExit(f"no .jpg or .jpeg files in {options.data}")
    for title, size in SIZES.items():
        count = options.images if max(size) < 1000 else max(1, options.images // 25)
        files = [scaled(path, size) for path in paths[:: max(1, len(paths) // count)][:count]]
        whole: dict[str, Decoder] = {"simplejpeg": by_simplejpeg, "ours": decode, "Pillow": by_pillow}
        table(title, files, whole, options.rounds)
        if size[0] >= 500:
            reduced: dict[str, Decoder] = {
                "simplejpeg, then reduced": partial(reducing, by_simplejpeg, 160, size),
                "ours, shorter_side=160": partial(decode, shorter_side=160),
                "Pillow's draft, reduced": partial(reducing, partial(by_pillow, shorter_side=160), 160, size),
            }
            table(f"{title} to 160", files, reduced, options.rounds)


if __name__ == "__main__":
    main()
