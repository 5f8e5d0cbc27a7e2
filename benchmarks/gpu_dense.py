"""A part of gpu.py: fine-tuning steps of the dense protocols as people run them, on drawn annotations of photos.

Seconds a step and memory at the published sizes and batches; the losses must be finite. Accuracies mean nothing here.
"""

import json
import math
import re
import time
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from gpu_parts import Job, peak_GiB, report
from PIL import Image, ImageDraw

from deepcluster.core.progress import Reporter
from deepcluster.evaluation.datasets.voc import CLASSES
from deepcluster.evaluation.protocols import evaluate

# Protocol, network, data, and settings of the published schedules but for the number of steps.
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("voc0712-detection", "resnet50", "voc", {"steps": 60}),
    ("coco-detection", "resnet50", "coco", {"steps": 40}),
    ("voc12-segmentation", "resnet50", "voc", {"steps": 60}),
    ("voc07-detection", "alexnet", "voc", {"steps": 60}),
    ("segmentation-linear", "resnet50", "voc", {}),
]
QUICK: dict[str, Any] = {"steps": 4, "batch_size": 2}
TRAIN, TEST = 96, 16
SIDES = (500, 375)


class Steps(Reporter):
    """Notes when the lines of steps came, and the losses in them."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.moments: list[tuple[float, int]] = []
        self.losses: list[float] = []

    def say(self, line: str) -> None:
        if found := re.match(r"step ([\d,]+)/\S+  loss (\S+)", line):
            self.moments.append((time.perf_counter(), int(found[1].replace(",", ""))))
            self.losses.append(float(found[2]))

    def seconds(self) -> float:
        """Return the seconds of a step, from the first line on."""
        (first, begun), (last, ended) = self.moments[0], self.moments[-1]
        return (last - first) / max(1, ended - begun)


def dense(job: Job) -> None:
    """Measure the steps of each case."""
    folder = Path(job.folder, "dense")
    draw_sets(folder, *((8, 2) if job.quick else (TRAIN, TEST)))
    for protocol, arch, data, settings in CASES:
        options = settings | (QUICK if job.quick and settings else {})
        reporter = Steps()
        peak_GiB(job.device)
        started = time.perf_counter()
        small = {"alexnet": "alexnet-small", "resnet50": "resnet18"}[arch] if job.quick else arch
        found = evaluate(
            protocol, f"untrained:{small}", folder / data, device=job.device, reporter=reporter, quick=job.quick, **options
        )
        row: dict[str, Any] = {"seconds": time.perf_counter() - started, "peak_GiB": peak_GiB(job.device)}
        if reporter.moments:
            row |= {"step_seconds": reporter.seconds(), "finite": all(map(math.isfinite, reporter.losses))}
            row |= {"batch": found.results.settings.get("batch_size", 0)}
        report(f"{protocol} {small}", **row)


def draw_sets(folder: Path, train: int, test: int) -> None:
    """Write a VOC devkit and COCO's files of the same drawn images: noise with up to five ellipses of some classes."""
    rng = np.random.default_rng(0)
    devkit = folder / "voc" / "VOCdevkit" / "VOC2007"
    for name in ("Annotations", "JPEGImages", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (devkit / name).mkdir(parents=True)
    lists = {"trainval": range(train), "test": range(train, train + test)}
    lists |= {"train": lists["trainval"], "val": lists["test"]}
    for kind in ("Main", "Segmentation"):
        for name, numbers in lists.items():
            (devkit / "ImageSets" / kind / f"{name}.txt").write_text("".join(f"{number:06}\n" for number in numbers))
    coco: dict[str, dict[str, Any]] = {
        part: {"images": [], "annotations": [], "categories": [{"id": n + 1, "name": c} for n, c in enumerate(CLASSES)]}
        for part in ("train", "val")
    }
    palette = [value for colour in np.random.default_rng(1).integers(0, 256, (256, 3)) for value in colour.tolist()]
    for number in range(train + test):
        part = "train" if number < train else "val"
        width, height = SIDES if number % 2 else SIDES[::-1]
        image = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize((width, height))
        mask, objects = Image.new("P", (width, height)), []
        mask.putpalette(palette)
        for _ in range(int(rng.integers(1, 6))):
            label, (w, h) = int(rng.integers(0, len(CLASSES))), (int(one) for one in rng.integers(60, 200, 2))
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            box = (x, y, x + w - 1, y + h - 1)
            ImageDraw.Draw(image).ellipse(box, fill=tuple(palette[3 * label : 3 * label + 3]))
            ImageDraw.Draw(mask).ellipse(box, fill=label + 1)
            corners = "".join(f"<{k}>{v + 1}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
            objects.append(
                f"<object><name>{escape(CLASSES[label])}</name><difficult>0</difficult><bndbox>{corners}</bndbox></object>"
            )
            angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            ring = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], 1)
            one = {"id": len(coco[part]["annotations"]) + 1, "image_id": number + 1, "category_id": label + 1, "iscrowd": 0}
            shape = {"bbox": [x, y, w, h], "area": math.pi * w * h / 4, "segmentation": [ring.ravel().round(2).tolist()]}
            coco[part]["annotations"].append(one | shape)
        image.save(devkit / "JPEGImages" / f"{number:06}.jpg")
        mask.save(devkit / "SegmentationClass" / f"{number:06}.png")
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        (devkit / "Annotations" / f"{number:06}.xml").write_text(f"<annotation>{size}{''.join(objects)}</annotation>")
        name = f"{number + 1:012}.jpg"
        coco[part]["images"].append({"id": number + 1, "file_name": name, "width": width, "height": height})
        place = folder / "coco" / f"{part}2017"
        place.mkdir(parents=True, exist_ok=True)
        (place / name).hardlink_to(devkit / "JPEGImages" / f"{number:06}.jpg")
    (folder / "coco" / "annotations").mkdir()
    for part, content in coco.items():
        (folder / "coco" / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
