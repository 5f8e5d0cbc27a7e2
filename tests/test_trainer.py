"""A step against autograd and arithmetic by hand; randomness that is a function of seeds; what the modes leave alone."""

from collections import OrderedDict
from collections.abc import Generator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deepcluster.core.device import Machine
from deepcluster.core.errors import TrainingError
from deepcluster.data.loader import Batch
from deepcluster.evaluation.classifier import Classifier, logits_of, step
from deepcluster.evaluation.trainer import (
    CHECK_STEPS,
    Diverged,
    Means,
    Training,
    fit,
    order_of,
    seed_of,
    seeded,
    sgd,
)
from deepcluster.models.archs import make_trunk
from deepcluster.models.trunk import normalise

CPU = Machine.choose("cpu", "fp32")


def images(count: int = 6, side: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def small_network(dropout: float = 0.0) -> nn.Sequential:
    """A linear layer on 4 x 4 pixels, with weights that are a function of nothing."""
    network = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.utils.skip_init(nn.Linear, 48, 3))
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1))
    return network


def copy_of(module: nn.Module) -> "OrderedDict[str, Tensor]":
    return OrderedDict((name, value.clone()) for name, value in module.state_dict().items())


def test_the_classifier_is_the_trunk_a_relu_and_a_linear_layer() -> None:
    trunk = make_trunk("alexnet-small", image_size=16, sobel=False, seed=1).eval()
    classifier = Classifier(trunk, 5, seed=2).eval()
    x_BCHW = normalise(images())
    weight, bias = classifier.head.linear.weight, classifier.head.linear.bias
    expected_BC = trunk(x_BCHW).clamp(min=0) @ weight.T + bias
    assert torch.allclose(classifier(x_BCHW), expected_BC, atol=1e-6)
    assert expected_BC.shape == (6, 5)
    again = Classifier(trunk, 5, seed=2)
    assert torch.equal(again.head.linear.weight, weight)
    assert not torch.equal(Classifier(trunk, 5, seed=3).head.linear.weight, weight)


def test_an_order_is_a_function_of_seed_and_epoch() -> None:
    first = order_of(1000, 7, 0)
    assert first.dtype == torch.int64
    assert first.sort().values.tolist() == list(range(1000))
    torch.manual_seed(5)
    assert torch.equal(order_of(1000, 7, 0), first)
    for other in (order_of(1000, 7, 1), order_of(1000, 8, 0)):
        # Two random orders agree at one place on average.
        assert int((other == first).sum()) < 12


def test_seeds_of_near_numbers_differ() -> None:
    seeds = {seed_of(a, b) for a in range(40) for b in range(40)}
    assert len(seeds) == 1600
    assert seed_of(3, 4) == seed_of(3, 4)


def test_seeded_draws_repeat_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    with seeded(1, torch.device("cpu")):
        first = torch.rand(4)
    with seeded(1, torch.device("cpu")):
        assert torch.equal(torch.rand(4), first)
    with seeded(2, torch.device("cpu")):
        assert not torch.equal(torch.rand(4), first)
    assert torch.equal(torch.rand(4), expected)


def by_hand(network: nn.Sequential, pixels_BCHW: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the mean cross-entropy of a linear layer, in float64: (softmax - one-hot)ᵀ x / B."""
    x_BD = normalise(pixels_BCHW).double().flatten(1)
    layer = network.state_dict()
    scores_BC = x_BD @ layer["2.weight"].double().T + layer["2.bias"].double()
    error_BC = (scores_BC.softmax(1) - nn.functional.one_hot(target_B, 3)) / len(x_BD)
    return error_BC.T @ x_BD, error_BC.sum(0)


@pytest.mark.parametrize("clip", [None, 0.5, 1e9])
def test_a_step_equals_one_by_hand(clip: float | None) -> None:
    network, target_B = small_network(), torch.tensor([0, 2, 1, 1, 0, 2])
    pixels_BCHW = images(side=4)
    weight_gradient, bias_gradient = by_hand(network, pixels_BCHW, target_B)
    norm = float((weight_gradient.square().sum() + bias_gradient.square().sum()).sqrt())
    assert norm > 0.6
    scale = clip / norm if clip == 0.5 else 1.0
    before = copy_of(network)
    optimizer = sgd(network.parameters(), CPU, lr=0.1, momentum=0.9, weight_decay=0.0)
    loss = step(network, optimizer, pixels_BCHW, target_B, cross_entropy, CPU, seed=0, clip=clip)
    scores_BC = normalise(pixels_BCHW).flatten(1) @ before["2.weight"].T + before["2.bias"]
    assert float(loss) == pytest.approx(float(cross_entropy(scores_BC, target_B)), rel=1e-5)
    assert not loss.requires_grad
    for name, gradient in (("2.weight", weight_gradient), ("2.bias", bias_gradient)):
        moved = before[name].double() - network.state_dict()[name].double()
        assert torch.allclose(moved, 0.1 * scale * gradient, rtol=1e-3, atol=1e-6)


def test_dropout_is_a_function_of_the_seed_and_disturbs_nothing() -> None:
    def loss_with(seed: int) -> float:
        network = small_network(dropout=0.5)
        optimizer = sgd(network.parameters(), CPU, lr=0.1, momentum=0.0, weight_decay=0.0)
        return float(step(network, optimizer, images(side=4), torch.zeros(6).long(), cross_entropy, CPU, seed=seed))

    state = torch.get_rng_state()
    first = loss_with(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert loss_with(1) == first
    assert loss_with(2) != first


def test_a_step_leaves_modes_as_they_are() -> None:
    """BatchNorm in eval mode keeps its statistics, that in training mode moves them."""
    trunk = make_trunk("alexnet-small", image_size=16, sobel=False, seed=1)
    classifier = Classifier(trunk, 3, seed=2).train()
    norms = [module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].eval()
    before = [norm.state_dict()["running_mean"].clone() for norm in norms]
    optimizer = sgd(classifier.parameters(), CPU, lr=0.1, momentum=0.0, weight_decay=0.0)
    step(classifier, optimizer, images(), torch.zeros(6).long(), cross_entropy, CPU, seed=0)
    after = [norm.state_dict()["running_mean"] for norm in norms]
    assert [torch.equal(new, old) for new, old in zip(after, before, strict=True)] == [True] + [False] * 4
    assert [norm.training for norm in norms] == [False] + [True] * 4


def test_scores_are_those_of_eval_mode() -> None:
    trunk = make_trunk("alexnet-small", image_size=16, sobel=True, seed=1)
    classifier = Classifier(trunk, 3, seed=2).train()
    before = copy_of(classifier)
    scores_BC = logits_of(classifier, images(), CPU)
    assert not scores_BC.requires_grad
    assert not any(module.training for module in classifier.modules())
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(scores_BC, classifier(normalise(images())))


def test_scores_are_float32_whatever_the_precision() -> None:
    classifier = Classifier(make_trunk("alexnet-small", image_size=16, sobel=False, seed=1), 3, seed=2)
    assert logits_of(classifier, images(), Machine(torch.device("cpu"), "bf16")).dtype == torch.float32


def test_means_of_named_values() -> None:
    means = Means()
    assert means.settle("the start") == {}
    for value in range(CHECK_STEPS):
        means.add({"loss": torch.tensor(float(value)), "top-1": torch.tensor(0.5)}, f"step {value}")
    assert (means.totals["loss"], means.count) == (CHECK_STEPS * (CHECK_STEPS - 1) / 2, CHECK_STEPS)
    resumed = Means(means.totals, means.count)
    total = means.totals["loss"]
    resumed.add({"loss": torch.tensor(1.0), "top-1": torch.tensor(0.5)}, "the end")
    assert resumed.settle("the end") == {"loss": (total + 1) / (CHECK_STEPS + 1), "top-1": 0.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(value: float) -> None:
    means = Means()
    means.add({"conv1": torch.tensor(value)}, "step 3")
    with pytest.raises(Diverged, match=r"the loss of conv1 became (nan|inf) at step 9; try a lower learning rate") as caught:
        means.settle("step 9")
    assert isinstance(caught.value, TrainingError) and caught.value.name == "conv1"
    assert means.settle("step 10") == {}


# The trainer


@dataclass
class Stop(Exception):
    """Raised in the place of a request to stop."""

    state: dict[str, Any]


BATCHES = [torch.arange(2), torch.arange(2, 4), torch.arange(4, 4)]


def run(kept: dict[str, Any] | None = None, stop: int = 0, steps: int = 8) -> tuple[Training[nn.Sequential], list[Any]]:
    """A training of batches of two, two and no images per epoch; `stop` steps in this call raise `Stop`."""
    network = small_network(dropout=0.5)
    training = Training(network, sgd(network.parameters(), CPU, lr=0.1, momentum=0.9, weight_decay=0.0), steps)
    if kept is not None:
        training.load(kept)
    seen: list[Any] = []

    def batches(epoch: int, first: int) -> Generator[Batch, None, None]:
        order = order_of(4, 5, epoch)
        for places in BATCHES[first:]:
            yield Batch((images(side=4)[order[places]],), order[places], np.empty((len(places), 0)))

    def learn(batch: Batch, number: int) -> dict[str, Tensor]:
        target_B, optimizer = batch.indices_B % 3, training.optimizer
        seen.append((number, batch.indices_B.tolist(), optimizer.param_groups[0]["lr"]))
        return {"": step(network, optimizer, batch.images_BCHW, target_B, cross_entropy, CPU, seed=number)}

    def advance(units: int) -> None:
        assert units == 1
        if stop and training.step == stop:
            raise Stop(deepcopy(training.state()))

    reports: list[Any] = []
    fit(
        training,
        batches,
        learn,
        steps_per_epoch=3,
        rates=lambda number: [0.1 * 0.5**number],
        reports=(4, lambda means: reports.append((training.step, means[""]))),
        advance=advance,
    )
    return training, [seen, reports]


def test_every_step_has_its_batch_and_its_rate() -> None:
    training, (seen, reports) = run()
    assert [number for number, *_ in seen] == [0, 1, 3, 4, 6, 7], "the last batch of each epoch has no image"
    assert [rate for *_, rate in seen] == [0.1 * 0.5**number for number, *_ in seen]
    for epoch in range(2):
        assert [one for number, ones, _ in seen if number // 3 == epoch for one in ones] == order_of(4, 5, epoch).tolist()
    assert [number for number, _ in reports] == [4, 8]
    assert training.where == "step 8/8"


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_stop_at_any_step_continues_to_the_same_bits(stop: int) -> None:
    whole, (seen, reports) = run()
    with pytest.raises(Stop) as caught:
        run(stop=stop)
    resumed, (seen_after, reports_after) = run(caught.value.state)
    assert seen_after == [one for one in seen if one[0] >= stop]
    assert reports_after == [one for one in reports if one[0] > stop]
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name])


def test_a_rate_that_is_too_high_diverges() -> None:
    network = small_network()
    training = Training(network, sgd(network.parameters(), CPU, lr=1.0, momentum=0.0, weight_decay=0.0), steps=3)
    batch = Batch((images(side=4),), torch.arange(6), np.empty((6, 0)))
    with pytest.raises(Diverged, match="the loss became nan at step 3/3"):
        fit(
            training,
            lambda epoch, first: (batch for _ in range(1)),
            lambda batch, number: {"": torch.tensor(float("nan") if number == 2 else 1.0)},
            steps_per_epoch=1,
            rates=lambda number: [1.0],
        )
