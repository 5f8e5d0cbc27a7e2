"""The test of a network for segmentation at the images' own size, as whole images or by sliding windows; pictures of it.

C classes, H and W pixels.
"""

from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import PurePath
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from deepcluster.core.errors import UnreadableImage
from deepcluster.core.work import Advance
from deepcluster.data.decode import decode
from deepcluster.data.survey import even_sample
from deepcluster.evaluation.datasets.dense import IGNORED
from deepcluster.evaluation.dense.pictures.compared import compared
from deepcluster.evaluation.dense.samples import MASK, Sample
from deepcluster.evaluation.dense.segmentation.task import Task, resized, samples_of
from deepcluster.evaluation.dense.segmentation.views import WholeImage
from deepcluster.evaluation.measures.confusion import confusion
from deepcluster.models.trunk import normalise
from deepcluster.run.model import Model

# Cityscapes: windows of 769 px, 513 px apart.
STRIDE = 513 / 769
PICTURES = 4


def test_span(model: Model, network: nn.Module, task: Task, span: range, advance: Advance) -> dict[str, Any]:
    """Return the counts of some images, and why others can't be read."""
    counts_CC, faults = torch.zeros(task.classes, task.classes, dtype=torch.int64), dict[int, str]()
    network.eval()
    with closing(samples_of(task.parts.test, WholeImage(task.scale)).in_order(model, span)) as batches:
        for batch in batches:
            faults |= batch.unreadable
            for one in batch.samples:
                counts_CC += confusion(one.target[MASK], predict(model, network, task, one), task.classes)
            advance(1)
    return {"counts": counts_CC, "unreadable": faults}


@torch.no_grad()
def predict(model: Model, network: nn.Module, task: Task, sample: Sample) -> Tensor:
    """Return the class of each pixel of an image (H, W), at its own size, on the CPU; the network is in eval mode."""
    machine = model.machine

    def scores(images_BCHW: Tensor) -> Tensor:
        with machine.autocast():
            map_BCHW = network(normalise(images_BCHW).to(machine.dtype))["out"]
        return resized(map_BCHW.float(), images_BCHW.shape[-2:], task.align_corners)

    image_1CHW = machine.put(sample.image_CHW)[None]
    side = task.crop if task.slides and task.crop is not None else max(image_1CHW.shape)
    scores_1CHW = slide(scores, image_1CHW, side)
    return resized(scores_1CHW, sample.size, task.align_corners).argmax(dim=1)[0].cpu()


def slide(scores: Callable[[Tensor], Tensor], image_1CHW: Tensor, side: int) -> Tensor:
    """Return the scores (1, C, H, W) of an image: of each pixel the mean over the windows that show it."""
    total: Any = 0
    height, width = image_1CHW.shape[-2:]
    counts_HW = image_1CHW.new_zeros(height, width, dtype=torch.float32)
    for rows in windows(height, side):
        for columns in windows(width, side):
            part_1CHW = scores(image_1CHW[..., rows, columns])
            if isinstance(total, int):
                total = part_1CHW.new_zeros(1, part_1CHW.shape[1], height, width)
            total[..., rows, columns] += part_1CHW
            counts_HW[rows, columns] += 1
    return total / counts_HW  # type: ignore[no-any-return]


def windows(length: int, window: int) -> list[slice]:
    """Return the windows along one side of an image: a stride apart, the last one at its end."""
    window, stride = min(window, length), round(STRIDE * window)
    last = length - window
    return [slice(first, first + window) for first in (*range(0, last, max(1, stride)), last)]


def pictures_of(model: Model, network: nn.Module, task: Task) -> dict[str, Image]:
    """Return pictures of the predictions on a few images to test on, spread evenly, by the name of the image."""
    data, pictures = task.parts.test, dict[str, Image]()
    samples = samples_of(data, WholeImage(task.scale))
    network.eval()
    for index in even_sample(range(len(data)), PICTURES):
        with suppress(UnreadableImage):
            image_HWC, one = decode(data.source.read(index)), samples.sample(index)
            truth_HW, predicted_HW = one.target[MASK], predict(model, network, task, one)
            counted_HW = truth_HW != IGNORED
            right = (truth_HW == predicted_HW)[counted_HW].float().mean()
            panels = {"truth": truth_HW, f"prediction, {right:.1%} of the pixels right": predicted_HW.to(torch.uint8)}
            name, masks = PurePath(data.source.name(index)).stem, {key: mask.numpy() for key, mask in panels.items()}
            pictures[name] = compared(image_HWC, masks, data.class_names, title=name)
    return pictures
