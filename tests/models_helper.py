"""Models for tests of the protocols and pictures: a small untrained trunk on the CPU, and classes easy to separate."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepcluster.core.device import Machine
from deepcluster.core.progress import Reporter
from deepcluster.core.work import Interruption, Work
from deepcluster.models.trunk import Trunk
from deepcluster.run.features import make_run_trunk
from deepcluster.run.model import Model
from deepcluster.run.settings import Settings


def make_model(
    cache: Path,
    *,
    trunk: Trunk | None = None,
    reporter: Reporter | None = None,
    interruption: Interruption | None = None,
    workers: int = 2,
    machine: Machine | None = None,
    **settings: Any,
) -> Model:
    """Return a model of random weights in float32 with a cache folder of its own; `settings` are those of its run."""
    small: dict[str, Any] = {"arch": "alexnet-small", "image_size": 16, "sobel": False, "seed": 3, "precision": "fp32"}
    chosen = Settings(**{**small, **settings})
    return Model(
        name=f"untrained:{chosen.arch}",
        trunk=(trunk or make_run_trunk(chosen)).eval(),
        settings=chosen,
        machine=machine or Machine.choose("cpu", "fp32"),
        workers=workers,
        work=Work(reporter, interruption or Interruption(advice="the same command continues")),
        cache=cache,
    )


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
