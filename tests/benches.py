"""A workbench for tests of the protocols: a small untrained trunk on the CPU, and classes that are easy to tell apart."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepcluster.device import Machine
from deepcluster.interruption import Interruption
from deepcluster.models.trunk import Trunk, make_trunk
from deepcluster.progress import Reporter
from deepcluster.workbench.bench import Workbench


def make_bench(
    cache: Path, *, arch: str = "alexnet-small", image_size: int = 16, seed: int = 3, **changes: Any
) -> Workbench:
    """A workbench of random weights in float32, quiet, with its own cache folder."""

    def new_trunk(new_seed: int) -> Trunk:
        return make_trunk(arch, image_size=image_size, sobel=False, seed=new_seed)

    parts: dict[str, Any] = {
        "model": f"untrained:{arch}",
        "trunk": new_trunk(seed).eval(),
        "new_trunk": new_trunk,
        "image_size": image_size,
        "reduce_to": 0,
        "machine": Machine.choose("cpu", "fp32"),
        "workers": 2,
        "reporter": Reporter(quiet=True),
        "interruption": Interruption(advice="the same command goes on"),
        "cache": cache,
    }
    return Workbench(**{**parts, **changes})


def write_classes(folder: Path, images_a_class: int, *, classes: int = 3, side: int = 20, seed: int = 0) -> Path:
    """PNG images of `classes` colours with some noise, in a folder for each class: easy to tell apart."""
    rng = np.random.default_rng(seed)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40], [40, 200, 200]])[:classes]
    for number, colour in enumerate(colours):
        (folder / f"class{number}").mkdir(parents=True, exist_ok=True)
        for image in range(images_a_class):
            pixels = np.clip(colour + rng.normal(0, 25, (side, side, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{number}" / f"{image:03}.png")
    return folder
