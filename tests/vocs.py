"""VOC devkits for tests: small images in the colours of what they show."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"cat": (220, 30, 30), "dog": (30, 220, 30), "bird": (30, 30, 220)}


def write_voc(root: Path, splits: Mapping[str, Mapping[str, Sequence[str]]], *, side: int = 24, seed: int = 0) -> Path:
    """A devkit in `root`: lists by split, each of images with the classes of their objects; `!cat` is a difficult one.

    An empty `trainval` has the images of train and val.
    """
    rng = np.random.default_rng(seed)
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        both = [*splits.get("train", {}), *splits.get("val", {})]
        listed = both if split == "trainval" and not images else list(images)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in listed))
        for name, objects in images.items():
            write_image(root, name, objects, side, rng)
    return root


def write_image(root: Path, name: str, objects: Sequence[str], side: int, rng: np.random.Generator) -> None:
    """A grey image with a stripe of noisy colour for each object, and its annotation."""
    pixels = np.full((side, side, 3), 110.0)
    for number, one in enumerate(objects):
        low, high = side * number // len(objects), side * (number + 1) // len(objects)
        pixels[:, low:high] = COLOURS.get(one.lstrip("!"), (200, 200, 200))
    pixels = np.clip(pixels + rng.normal(0, 20, pixels.shape), 0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
    inner = "".join(
        f"<object><name>{one.lstrip('!')}</name><difficult>{int(one.startswith('!'))}</difficult></object>\n"
        for one in objects
    )
    (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>\n{inner}</annotation>\n")
