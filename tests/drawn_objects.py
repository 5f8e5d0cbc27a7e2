"""A Pascal VOC devkit of drawn images: rectangles in the colour of their class on a grey ground."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"car": (220, 30, 30), "dog": (30, 200, 40), "sofa": (40, 60, 230)}


def write_devkit(root: Path, lists: Mapping[str, int], *, seed: int = 0, empty: int = 0) -> Path:
    """Write a devkit with so many images for each list; `empty` of each have no object. Returns its folder.

    Each image has one to three rectangles, of which those behind others stay whole; every fifth is marked difficult.
    """
    rng = np.random.default_rng(seed)
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True, exist_ok=True)
    drawn = 0
    for number, (name, count) in enumerate(lists.items()):
        names = [f"{number:02}{image:04}" for image in range(count)]
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(names) + "\n")
        for image in names:
            width, height = (int(side) for side in rng.integers(70, 130, 2))
            pixels = np.clip(128 + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
            picture = Image.fromarray(pixels)
            draw, objects = ImageDraw.Draw(picture), []
            for _ in range(0 if int(image[2:]) < empty else int(rng.integers(1, 4))):
                kind = str(rng.choice(list(COLOURS)))
                w, h = (int(side) for side in rng.integers(22, 50, 2))
                left, top = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
                draw.rectangle((left, top, left + w - 1, top + h - 1), COLOURS[kind])
                drawn += 1
                objects.append(
                    f"<object><name>{kind}</name><difficult>{int(drawn % 5 == 0)}</difficult><bndbox><xmin>{left + 1}</xmin>"
                    f"<ymin>{top + 1}</ymin><xmax>{left + w}</xmax><ymax>{top + h}</ymax></bndbox></object>"
                )
            picture.save(root / "JPEGImages" / f"{image}.jpg", quality=95)
            size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
            text = f"<annotation><filename>{image}.jpg</filename>{size}{''.join(objects)}</annotation>"
            (root / "Annotations" / f"{image}.xml").write_text(text)
    return root
