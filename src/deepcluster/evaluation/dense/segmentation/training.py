"""Fine-tuning of a network for segmentation.

B batch, C classes, H and W pixels.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.data.survey import even_sample
from deepcluster.evaluation.datasets.dense import IGNORED
from deepcluster.evaluation.dense.fine_tuning import Schedule, fine_tune, set_batch_norms
from deepcluster.evaluation.dense.samples import MASK, SampleBatch, Samples
from deepcluster.evaluation.dense.segmentation.fcn import make_fcn
from deepcluster.evaluation.dense.segmentation.options import FCN32, SegmentationOptions
from deepcluster.evaluation.dense.segmentation.task import Task, resized, samples_of
from deepcluster.evaluation.trainer import Training, seed_of, seeded
from deepcluster.models.trunk import normalise
from deepcluster.run.model import Model
from deepcluster.run.resumable import ResumableState

# Of the losses of the scores, and of those of the head on layer3 where there is one.
SHARES = {"out": 1.0, "aux": 0.4}
POWER, LOWEST = 0.9, 0.01
# Of so many images the statistics of an untrained network's BatchNorm are estimated.
ESTIMATED_ON = 32


def train(model: Model, task: Task) -> tuple[Training[nn.Module], ResumableState]:
    """Fine-tune a copy of the model, or continue where an earlier call was stopped."""
    options, machine = task.options, model.machine
    network = make_network(model, task)
    samples = samples_of(task.parts.train, task.training_view())
    _estimate_statistics(model, network, samples)

    def losses(batch: SampleBatch) -> dict[str, Tensor]:
        images_BCHW = torch.stack([one.image_CHW for one in batch.samples])
        truth_BHW = machine.put(torch.stack([one.target[MASK] for one in batch.samples])).long()
        maps = network(normalise(machine.put(images_BCHW)).to(machine.dtype))
        return {
            name: SHARES[name] * pixel_loss(resized(map_BCHW, truth_BHW.shape[1:], task.align_corners), truth_BHW)
            for name, map_BCHW in maps.items()
        }

    return fine_tune(
        model,
        task.protocol,
        network,
        _groups(network, options, task.recipe),
        samples,
        losses,
        schedule_of(options),
        options,
        batch_size=options.batch_size or 1,
        seed=options.seed,
        at_once=1 if task.crop is None else None,
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
    is_frozen = options.batchnorm == "frozen"
    network = set_batch_norms(network, "auto" if is_frozen else options.batchnorm, model.work.ranks)
    if is_frozen:  # Those of new layers have no statistics yet.
        set_batch_norms(trunk, "frozen", model.work.ranks)
    if options.finetune == "fc6-8":
        trunk.convolutions().eval().requires_grad_(False)
    return network


@torch.no_grad()
def _estimate_statistics(model: Model, network: nn.Module, samples: Samples) -> None:
    """Give the frozen BatchNorm layers of an untrained network, which have no statistics, those of some training images."""
    trunk: Any = network.trunk
    layers = [one for one in trunk.modules() if isinstance(one, _BatchNorm) and not one.training]
    layers = [one for one in layers if one.num_batches_tracked is not None and not one.num_batches_tracked]
    momenta = [one.momentum for one in layers]
    for layer in layers:
        layer.train().momentum = None  # The mean over all images.
    for index in even_sample(range(len(samples.data)), ESTIMATED_ON if layers else 0):
        seed = seed_of(0, index)
        with suppress(UnreadableImage), seeded(seed, model.machine.device), model.machine.autocast():
            image_1CHW = model.machine.put(samples.sample(index, seed).image_CHW)[None]
            trunk.stage(normalise(image_1CHW).to(model.machine.dtype), trunk.last_map)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.eval().momentum = momentum


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
