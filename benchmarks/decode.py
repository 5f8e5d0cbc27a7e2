"""Decoding: images per CPU-second of this package, next to Pillow and other libraries, on real photos.

    python benchmarks/decode.py --data FOLDER [--images 100] [--rounds 7] [--threads 1,2,4]

JPEG photos of FOLDER are decoded as they are, and scaled to 500 x 375, to 4000 x 3000 (a few of them) and down to 32 px,
saved as JPEG of quality 90; "to 256" reduces the shorter side to 256. All programs decode the same images in turn, in one
process and thread. Prints medians of rounds, ratios to Pillow, and the mean difference from Pillow's pixels, of 255;
then images per second of wall time with several threads: a decoder that holds Python's lock gains nothing. simplejpeg and
OpenCV are left out if they are not installed. Use an idle machine.
"""

import argparse
import importlib.util
import io
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from deepcluster.data.decode import decode
from deepcluster.data.resample import resize

Decoder = Callable[[bytes], NDArray[np.uint8]]
REDUCED = 256


def by_pillow(encoded: bytes) -> NDArray[np.uint8]:
    """Decode with Pillow, as most programs do."""
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def by_torchvision(encoded: bytes) -> NDArray[np.uint8]:
    """Decode with torchvision's public JPEG decoder."""
    from torchvision.io import ImageReadMode, decode_jpeg

    image: NDArray[np.uint8] = decode_jpeg(
        torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB
    ).numpy()
    return image.transpose(1, 2, 0)


def by_simplejpeg(encoded: bytes) -> NDArray[np.uint8]:
    """Decode with simplejpeg, which refuses images for which libjpeg prints a warning."""
    import simplejpeg

    image: NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, "RGB")
    return image


def by_opencv(encoded: bytes) -> NDArray[np.uint8]:
    """Decode with OpenCV, with its channels reordered."""
    import cv2

    image: NDArray[np.uint8] = cv2.cvtColor(
        cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
    )
    return image


def reducing(decoder: Decoder, encoded: bytes) -> NDArray[np.uint8]:
    """Decode at full size, then reduce the shorter side."""
    image_HWC = decoder(encoded)
    sides = image_HWC.shape[:2]
    size = sides[0] * REDUCED // min(sides), sides[1] * REDUCED // min(sides)
    reduced: NDArray[np.uint8] = resize(torch.from_numpy(image_HWC.copy()), size).permute(1, 2, 0).numpy()
    return reduced


def decoders() -> dict[str, Decoder]:
    """Return the installed decoders, Pillow first."""
    found: dict[str, Decoder] = {"Pillow": by_pillow, "ours": decode, "torchvision": by_torchvision}
    if importlib.util.find_spec("simplejpeg"):
        found["simplejpeg"] = by_simplejpeg
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        found["OpenCV"] = by_opencv
    return found


def scaled(files: list[bytes], size: tuple[int, int]) -> list[bytes]:
    """Return the photos at another size, as JPEG of quality 90."""
    encoded = []
    for file in files:
        buffer = io.BytesIO()
        image = Image.open(io.BytesIO(file)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        image.save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def table(title: str, files: list[bytes], programs: dict[str, Decoder], rounds: int) -> None:
    """Measure the programs in turn, and print a line for each."""
    sizes = [by_pillow(file).size / 3 for file in files]
    print(f"\n{title}: {len(files)} photos, median {statistics.median(map(len, files)) / 1024:.0f} KiB, "
          f"{statistics.median(sizes) / 1e6:.3f} megapixels")  # fmt: skip
    first = next(iter(programs))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            started = time.process_time()
            for file in files:
                program(file)
            seconds[name].append(time.process_time() - started)
    print(f"{'':24}{'images per CPU-second':>24}{'ratio':>8}{'difference':>12}")
    for name, program in programs.items():
        off = [np.abs(program(file).astype(int) - programs[first](file)).mean() for file in files]
        median = statistics.median(seconds[name])
        # The ratio per round, since the machine's speed changes between rounds.
        ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[name], strict=True))
        print(f"{name:24}{len(files) / median:>24.0f}{ratio:>8.2f}{np.mean(off):>12.3f}")


def with_threads(files: list[bytes], programs: dict[str, Decoder], counts: list[int], rounds: int) -> None:
    """Print images per second of wall time by number of threads."""
    print(f"\nimages per second of wall time{''.join(f'{count:>12} threads' for count in counts)}")
    for name, program in programs.items():
        rates = []
        for count in counts:
            with ThreadPoolExecutor(count) as pool:
                times = []
                for _ in range(rounds):
                    started = time.perf_counter()
                    list(pool.map(program, files))
                    times.append(time.perf_counter() - started)
            rates.append(len(files) / statistics.median(times))
        print(f"{name:30}{''.join(f'{rate:>20.0f}' for rate in rates)}")


def photos(folder: Path, count: int) -> list[bytes]:
    """Return up to `count` JPEG files of a folder and its subfolders, spread evenly."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise SystemExit(f"no .jpg or .jpeg files in {folder}")
    return [path.read_bytes() for path in paths[:: max(1, len(paths) // count)][:count]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JPEG photos")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", default="1,2,4", help="numbers of threads, in turn")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*TorchVision are deprecated", category=DeprecationWarning)
    torch.set_num_threads(1)
    files, programs = photos(options.data, options.images), decoders()
    middle, large = scaled(files, (500, 375)), scaled(files[:: max(1, len(files) // 4)][:4], (4000, 3000))
    table("as they are", files, programs, options.rounds)
    table("scaled to 500 x 375", middle, programs, options.rounds)
    table("scaled to 4000 x 3000", large, programs, options.rounds)
    table("scaled down to 32 x 32", scaled(files, (32, 32)), programs, options.rounds)
    to_256: dict[str, Any] = {
        "Pillow, then reduced": partial(reducing, by_pillow),
        "ours, then reduced": partial(reducing, decode),
        f"ours, shorter_side={REDUCED}": partial(decode, shorter_side=REDUCED),
    }
    table("500 x 375 to 256", middle, to_256, options.rounds)
    table("4000 x 3000 to 256", large, to_256, options.rounds)
    with_threads(middle, programs, [int(count) for count in options.threads.split(",")], options.rounds)


if __name__ == "__main__":
    main()
