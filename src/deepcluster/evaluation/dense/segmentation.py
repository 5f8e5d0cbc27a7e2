"""What the protocols that fine-tune a network for segmentation share: training, and the test at the images' own size.

B batch, C classes, H and W pixels.
"""

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision import tv_tensors

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.text import count_of
from deepcluster.core.work import Advance
from deepcluster.data.decode import decode
from deepcluster.data.survey import even_sample
from deepcluster.evaluation.datasets.dense import IGNORED, MaskSet
from deepcluster.evaluation.datasets.masks import LAYOUTS, MaskParts, open_masks
from deepcluster.evaluation.dense.fcn import make_fcn
from deepcluster.evaluation.dense.fine_tuning import Schedule, fine_tune, set_batch_norms
from deepcluster.evaluation.dense.pictures import compared
from deepcluster.evaluation.dense.samples import Augment, Sample, SampleBatch, Samples, Target
from deepcluster.evaluation.dense.segmentation_options import FCN32, SegmentationOptions
from deepcluster.evaluation.dense.segmentation_views import MASK, Scale, TrainingCrop, WholeImage
from deepcluster.evaluation.dense.spans import Spans
from deepcluster.evaluation.measures.confusion import confusion, segmentation_scores
from deepcluster.evaluation.results import Results
from deepcluster.evaluation.trainer import Training
from deepcluster.evaluation.voc07_classification import fully_connected
from deepcluster.models.trunk import normalise
from deepcluster.run.model import Model, data_key
from deepcluster.run.resumable import ResumableState

# Of the losses of the scores, and of those of the head on layer3 where there is one.
SHARES = {"out": 1.0, "aux": 0.4}
# Cityscapes: windows of 769 px, 513 px apart.
STRIDE = 513 / 769
POWER, LOWEST = 0.9, 0.01
# So many masks tell whether the annotations are the same ones.
MASKS_IN_KEY = 64
PICTURES = 4


@dataclass(frozen=True)
class Task:
    """A protocol on data: how it trains and tests.

    Attributes:
        options: completed.
        recipe: "fcn32" or "fcn-d8".
        scale: of the images, before random scaling and at the test.
        slides: test by sliding windows of the size of a crop.
        align_corners: of the interpolation of scores, as `interpolate` takes it.
    """

    protocol: str
    parts: MaskParts
    options: SegmentationOptions
    recipe: str
    scale: Scale
    slides: bool = False
    align_corners: bool = False

    @property
    def crop(self) -> int | None:
        """Side of the crops; None where whole images are trained on."""
        return None if self.recipe == FCN32 else self.options.crop or self.scale.short

    @property
    def classes(self) -> int:
        """C, number of classes."""
        return len(self.parts.train.class_names)

    def key(self) -> list[object]:
        """Return what training and test depend on beside the model, the options and the images to train on."""
        return [self.recipe, _masks_key(self.parts.train)]


@dataclass(frozen=True)
class Segmentation:
    """A trained network and its test.

    Attributes:
        counts_CC: pixels by true class and predicted class, of all images.
        unreadable: why images to test on can't be read, by index.
    """

    training: Training[nn.Module]
    resumable: ResumableState
    spans: Spans
    counts_CC: Tensor
    unreadable: dict[int, str]

    def done(self) -> None:
        """Delete what is kept."""
        self.spans.done()
        self.resumable.done()


def open_layout(data: Path, layouts: Sequence[str], lists: str = "auto") -> MaskParts:
    """Return the images with masks in a folder of one of the layouts; `lists` as in `open_masks`.

    Raises:
        InputError: it has another layout, or what `open_masks` raises.
    """
    parts = open_masks(data, lists)
    if parts.layout not in layouts:
        wanted = " or ".join(LAYOUTS[one].wanted for one in layouts)
        raise InputError(f"{data} has masks of another data set ({parts.train.name}); looked for {wanted}")
    return parts


def train_and_test(model: Model, task: Task) -> Segmentation:
    """Fine-tune a copy of the model and test it, or find what an earlier call kept; all ranks together.

    Raises:
        InputError: images, masks or sizes can't be used.
        TrainingError: the loss is no longer a finite number.
        Interrupted: what was done is kept; the same call continues to exactly the result it would have had.
    """
    images = f"{count_of(len(task.parts.train), 'image')}, testing on {len(task.parts.test):,}"
    model.work.reporter.say(f"{task.protocol} ({task.recipe}): {task.options.steps:,} steps on {images}")
    training, resumable = train(model, task)
    test = task.parts.test
    facts = (task.protocol, task.key(), sorted(task.options.as_dict().items()), data_key(task.parts.train.source))
    spans = Spans(model, len(test), *facts, data_key(test.source), _masks_key(test))

    def of_span(span: range, advance: Advance) -> dict[str, Any]:
        return _tested(model, training.network, task, span, advance)

    found = spans.compute("testing", of_span)
    counts_CC = torch.stack([one["counts"] for one in found]).sum(dim=0)
    unreadable = {index: why for one in found for index, why in one["unreadable"].items()}
    return Segmentation(training, resumable, spans, counts_CC, unreadable)


def evaluate_task(model: Model, task: Task) -> Results:
    """Train and test, measure, and delete what was kept.

    Raises:
        InputError: as `train_and_test`, or no pixel of the images to test on has a class.
    """
    made, (train_set, test_set) = train_and_test(model, task), (task.parts.train, task.parts.test)
    if not made.counts_CC.any():
        raise InputError(f"{test_set.name}: no image that can be read has a pixel with a class")
    scores = segmentation_scores(made.counts_CC, test_set.class_names)
    notes = list(task.parts.notes)
    if scores.absent:
        notes.append(f"no image to test on shows {', '.join(scores.absent)}: in the mean, as 0, only where predicted")
    if task.options.finetune == "fc6-8" and not fully_connected(model.trunk):
        notes.append(f"{model.trunk.arch} has no fully connected layers: only the new layers are trained")
    notes += train_set.left_out(made.training.unreadable) + test_set.left_out(made.unreadable)
    about = {**task.parts.describe(), "test_images": len(test_set) - len(made.unreadable)}
    settings = {**task.options.as_dict(), "recipe": task.recipe, "crop": task.crop}
    results = {"mIoU": scores.miou, "pixel accuracy": scores.pixel_accuracy, "mean accuracy": scores.mean_accuracy}
    pictures = pictures_of(model, made.training.network, task)
    found = Results(task.protocol, about, settings, {**results, "IoU": scores.iou}, ("mIoU",), notes, pictures)
    made.done()
    return found


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


def train(model: Model, task: Task) -> tuple[Training[nn.Module], ResumableState]:
    """Fine-tune a copy of the model, or continue where an earlier call was stopped."""
    options, machine = task.options, model.machine
    network = make_network(model, task)

    def losses(batch: SampleBatch) -> dict[str, Tensor]:
        images_BCHW = torch.stack([one.image_CHW for one in batch.samples])
        truth_BHW = machine.put(torch.stack([one.target[MASK] for one in batch.samples])).long()
        maps = network(normalise(machine.put(images_BCHW)).to(machine.dtype))
        return {
            name: SHARES[name] * pixel_loss(resized(map_BCHW, truth_BHW.shape[1:], task.align_corners), truth_BHW)
            for name, map_BCHW in maps.items()
        }

    whole = task.crop is None
    view = WholeImage(task.scale, mask_too=True) if whole else TrainingCrop(task.scale, task.crop or 0)
    return fine_tune(
        model,
        task.protocol,
        network,
        _groups(network, options, task.recipe),
        samples_of(task.parts.train, view),
        losses,
        schedule_of(options),
        options,
        batch_size=options.batch_size or 1,
        seed=options.seed,
        at_once=1 if whole else None,
        facts=task.key(),
    )


def make_network(model: Model, task: Task) -> nn.Module:
    """Return the network, in the mode in which it is trained, on the model's device.

    With `--finetune fc6-8` the convolutions of the trunk keep their weights and the statistics of their BatchNorm.
    """
    options, trunk = task.options, model.copy_of_trunk()
    network = make_fcn(trunk, task.recipe, task.classes, seed=options.seed)
    network = network.to(model.machine.device, model.machine.dtype)
    if task.crop is not None:
        _check_crop(model, network, task.crop)
    network = set_batch_norms(network, options.batchnorm, model.work.ranks)
    if options.finetune == "fc6-8":
        trunk.convolutions().eval().requires_grad_(False)
    return network


def schedule_of(options: SegmentationOptions) -> Schedule:
    """Return the learning rates of completed options."""
    steps = options.steps or 1
    rates = {
        "fixed": lambda step: 1.0,
        "thirds": lambda step: 0.1 ** (3 * step // steps),
        "poly": lambda step: (1 - LOWEST) * (1 - step / steps) ** POWER + LOWEST,
    }
    return Schedule(steps, rates[options.schedule], options.momentum, options.weight_decay)


def pixel_loss(scores_BCHW: Tensor, truth_BHW: Tensor) -> Tensor:
    """Return the mean cross-entropy over the pixels that have a class; 0 where none has."""
    total = cross_entropy(scores_BCHW.float(), truth_BHW, ignore_index=IGNORED, reduction="sum")
    return total / (truth_BHW != IGNORED).sum().clamp(min=1)


def samples_of(data: MaskSet, view: Augment) -> Samples:
    """Return images with their masks."""

    def read_target(index: int, height: int, width: int) -> Target:
        return {MASK: tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(data.read_mask(index))))}

    return Samples(data, read_target, view)


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


def resized(map_BCHW: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Return scores at a size, interpolated."""
    if tuple(map_BCHW.shape[-2:]) == tuple(size):
        return map_BCHW
    return interpolate(map_BCHW, size=tuple(size), mode="bilinear", align_corners=align_corners)


def windows(length: int, window: int) -> list[slice]:
    """Return the windows along one side of an image: a stride apart, the last one at its end."""
    window, stride = min(window, length), round(STRIDE * window)
    last = length - window
    return [slice(first, first + window) for first in (*range(0, last, max(1, stride)), last)]


@torch.no_grad()
def _check_crop(model: Model, network: nn.Module, crop: int) -> None:
    """Raise `InputError` where crops are too small for the network."""
    blank_1CHW = torch.zeros(1, 3, crop, crop, dtype=torch.uint8)
    try:
        network.eval()(normalise(model.machine.put(blank_1CHW)).to(model.machine.dtype))
    except (RuntimeError, ValueError) as fault:
        raise InputError(f"--crop {crop}: too small for {model.trunk.arch}; use larger crops") from fault


def _groups(network: nn.Module, options: SegmentationOptions, recipe: str) -> list[dict[str, object]]:
    """Return the trainable weights; in FCN-32s biases have twice the rate and no weight decay."""
    trained = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
    biases = [weight for name, weight in trained if recipe == FCN32 and name.rpartition(".")[2] == "bias"]
    biases_ids = {id(weight) for weight in biases}
    others = [weight for _, weight in trained if id(weight) not in biases_ids]
    groups: list[dict[str, object]] = [{"params": others, "lr": options.lr}]
    return groups + ([{"params": biases, "lr": 2 * (options.lr or 0), "weight_decay": 0.0}] if biases else [])


def _masks_key(data: MaskSet) -> str:
    """Return digits that change with the masks, judging by some of them, and with the classes."""
    digest = sha256(repr(data.class_names).encode())
    for index in even_sample(range(len(data)), MASKS_IN_KEY):
        digest.update(data.read_mask(index).tobytes())
    return digest.hexdigest()


def _tested(model: Model, network: nn.Module, task: Task, span: range, advance: Advance) -> dict[str, Any]:
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
