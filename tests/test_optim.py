"""One step of learning: rates over the run, clipping, which optimizer, and the step of 2018 against its formula."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import Machine
from deepcluster.core.distributed import ONE_PROCESS
from deepcluster.core.errors import TrainingError
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.sources import open_source
from deepcluster.data.views import DRAWS_ALIGNED
from deepcluster.models.heads import ClusterHead
from deepcluster.models.trunk import normalise
from deepcluster.run.features import make_run_trunk
from deepcluster.run.settings import Settings
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.lars import LARS, parameter_groups
from deepcluster.training.loop import LossMeter
from deepcluster.training.method import Step
from deepcluster.training.optim import Optimizers, learning_factor, make_optimizer

CPU = Machine.choose("cpu", "fp64")


# The rate over the run


@pytest.mark.parametrize("warmup", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_rises_then_falls_as_the_formula_says(schedule: str, warmup: float) -> None:
    """Of 8 epochs: r/w until the warm-up's end, then 1, or half of 1 + cos(pi (e - w) / (8 - w)), at epoch e."""
    settings = Settings(epochs=8, warmup_epochs=warmup, lr_schedule=schedule)
    for epoch in np.arange(0, 8, 0.25):
        after = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (8 - warmup))) if schedule == "cosine" else 1.0
        expected = epoch / warmup if epoch < warmup else after
        assert learning_factor(settings, epoch) == pytest.approx(expected, abs=1e-12)


def test_some_rates_by_hand() -> None:
    settings = Settings(epochs=10, warmup_epochs=2.0, lr_schedule="cosine")
    found = [learning_factor(settings, epoch) for epoch in (0, 1, 2, 6, 10)]
    np.testing.assert_allclose(found, [0, 0.5, 1, 0.5, 0], atol=1e-12)


@pytest.mark.parametrize("warmup", [4.0, 9.0])
def test_a_warm_up_of_the_whole_run_never_falls(warmup: float) -> None:
    settings = Settings(epochs=4, warmup_epochs=warmup, lr_schedule="cosine")
    found = [learning_factor(settings, epoch) for epoch in (0, 1, 2, 3)]
    np.testing.assert_allclose(found, np.arange(4) / warmup)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 63).map(lambda n: n / 64))
def test_a_cosine_that_begins_again_is_that_of_a_run_of_each_part(parts: list[int], place: float) -> None:
    """From a third of the rate, without a warm-up; the first part is what it is without the others."""
    ends = np.cumsum(parts)
    settings = Settings(epochs=int(ends[-1]), lr_restarts=tuple(ends[:-1].tolist()), lr_schedule="cosine", warmup_epochs=0.5)
    alone = Settings(epochs=parts[0], lr_schedule="cosine", warmup_epochs=0.5)
    assert learning_factor(settings, place * parts[0]) == learning_factor(alone, place * parts[0])
    for first, length in zip(ends[:-1], parts[1:], strict=True):
        expected = (1 + math.cos(math.pi * place)) / 6
        assert learning_factor(settings, first + place * length) == pytest.approx(expected, abs=1e-9)


@given(st.floats(0, 3), st.integers(1, 30), st.integers(1, 30), st.floats(0, 1))
def test_a_constant_rate_does_not_depend_on_the_epochs_to_come(warmup: float, few: int, more: int, place: float) -> None:
    short, long = (Settings(epochs=epochs, warmup_epochs=warmup) for epochs in (few, few + more))
    assert learning_factor(short, place * few) == learning_factor(long, place * few)


# Going down


def descend(
    loss: Tensor, optimizers: Sequence[torch.optim.Optimizer], rates: Sequence[float], *, clip_gradient: float = 0.0
) -> None:
    """One step down the gradient, as the methods take it."""
    together = Optimizers(optimizers, clip_gradient)
    together.start(rates)
    loss.backward()
    together.step()


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def sloped(network: nn.Module) -> Tensor:
    """A loss whose gradient is 1, 2, 3, … times 0.1 over the numbers of all weights."""
    weights = torch.cat([weight.flatten() for weight in network.parameters()])
    return (weights * 0.1 * torch.arange(1, len(weights) + 1)).sum()


@pytest.mark.parametrize(("longest", "scale"), [(0.0, 1.0), (1e6, 1.0), (0.5, None)], ids=["off", "longer", "shorter"])
def test_the_gradient_over_all_weights_is_scaled_down_to_its_longest(longest: float, scale: float | None) -> None:
    """Of two optimizers at their own rates: w - rate g min(1, longest / |g|)."""
    network = two_layers()
    parts = [list(network[0].parameters()), [*network[1].parameters(), *network[2].parameters()]]
    before = [weight.detach().clone() for weight in network.parameters()]
    n_numbers = sum(weight.numel() for weight in before)
    gradient = 0.1 * np.arange(1, n_numbers + 1)
    optimizers = [torch.optim.SGD(part, lr=9.0) for part in parts]
    descend(sloped(network), optimizers, [0.3, 0.7], clip_gradient=longest)
    if scale is None:
        scale = longest / np.sqrt((gradient**2).sum())
    first = 0
    for number, (weight, old) in enumerate(zip(network.parameters(), before, strict=True)):
        slopes = scale * gradient[first : first + old.numel()].reshape(old.shape)
        rate = 0.3 if number < 2 else 0.7
        # torch divides by |g| + 1e-6.
        np.testing.assert_allclose(weight.detach().numpy(), old.numpy() - rate * slopes, rtol=1e-6, atol=1e-9)
        first += old.numel()


def test_gradients_of_the_step_before_are_forgotten() -> None:
    network = two_layers()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    before = network[0].weight.detach().clone()  # type: ignore[union-attr]
    for _ in range(3):
        descend(sloped(network), [optimizer], [1.0])
    expected = before - 3 * 0.1 * torch.arange(1, 13).view(4, 3)
    torch.testing.assert_close(network[0].weight.detach(), expected)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_weight_decay_is_kept_off_norms_and_biases(name: str) -> None:
    """Without a gradient a step changes what decays alone."""
    network = two_layers()
    settings = Settings(optimizer=name, weight_decay=0.1, lr=1.0)
    optimizer = make_optimizer(parameter_groups(network, 0.1), settings, CPU, momentum=0.0)
    assert type(optimizer) is (LARS if name == "lars" else torch.optim.SGD)
    before = {key: value.detach().clone() for key, value in network.named_parameters()}
    descend(0 * sloped(network), [optimizer], [1.0])
    for key, value in network.named_parameters():
        decays = key in ("0.weight", "2.weight")
        torch.testing.assert_close(value.detach(), before[key] * (0.9 if decays else 1.0))
    groups = [len(group["params"]) for group in optimizer.param_groups]
    assert groups == [2, 4] and [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_momentum_and_decay_of_sgd_are_those_of_the_formula() -> None:
    """v = m v + g + d w, w = w - r v, over three steps of other rates."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    optimizer = make_optimizer([weight], Settings(weight_decay=0.2), CPU, momentum=0.9)
    w, v = np.array([[1.0, -2.0]]), np.zeros((1, 2))
    for rate in (0.1, 0.3, 0.05):
        descend((weight**2).sum(), [optimizer], [rate])
        v = 0.9 * v + 2 * w + 0.2 * w
        w = w - rate * v
        np.testing.assert_allclose(weight.detach().numpy(), w, rtol=1e-12)


# The step of 2018


@pytest.fixture(scope="module")
def black(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of nine images that are never read."""
    path = tmp_path_factory.mktemp("arrays") / "black.npy"
    np.save(path, np.zeros((9, 16, 16, 3), np.uint8))
    return path


def small_method(black: Path, **options: Any) -> DeepCluster:
    """A method in float64 whose images have the labels 0, 3, none, 1, 1, 2, 0, 1, 2, with a sharp head."""
    settings = Settings.from_dict({"arch": "alexnet-small", "image_size": 16, "pca": 8, "dropout": 0.0, **options})
    trunk = make_run_trunk(settings)
    method = DeepCluster(trunk, Loader(DecodedImages(open_source(black)), workers=0), settings, CPU)
    labels_N = torch.tensor([0, 3, -1, 1, 1, 2, 0, 1, 2])
    method.make_labels((Assignment(labels_N, torch.zeros(9), torch.randn(4, 8)), Whitening(8)), epoch=1)
    assert isinstance(method.head, ClusterHead)
    with torch.no_grad():
        method.head.linear.weight.mul_(30)
    for network in method.networks:
        network.train()
    return method


def batch_of(indices: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randint(0, 256, (len(indices), 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Batch((images_BCHW,), torch.tensor(indices), np.full((len(indices), DRAWS_ALIGNED), 0.5))


def test_a_step_is_that_of_cross_entropy_over_the_images_with_a_label(black: Path) -> None:
    """Loss and the head's new weights against NumPy, from the features that the trunk gives; one image has no label."""
    method, rate = small_method(black, weight_decay=0.0, lr=0.0, head_lr=0.5), 0.5
    head, batch = method.head, batch_of([0, 1, 2, 3, 4, 5])
    assert isinstance(head, ClusterHead)
    labels_B = method.current.labels_N[batch.indices_B]
    features_BD = method.trunk(normalise(batch.images_BCHW).double()).detach().numpy()
    weight_KD, bias_K = (weight.detach().numpy().copy() for weight in head.linear.parameters())
    seen_BD = np.maximum(features_BD, 0)
    scores_BK = seen_BD @ weight_KD.T + bias_K
    shares_BK = np.exp(scores_BK) / np.exp(scores_BK).sum(axis=1, keepdims=True)
    known_B = labels_B.numpy() >= 0
    wanted_BK = np.eye(4)[labels_B.clamp(min=0).numpy()]
    loss = -(np.log(shares_BK) * wanted_BK).sum(axis=1)[known_B].sum() / 8
    slopes_BK = (shares_BK - wanted_BK) * known_B[:, None] / 8

    found = method.train_step(batch, Step(1, slice(0, 6), 1.0, 0, n_images=8))
    assert float(found) == pytest.approx(loss, rel=1e-10)
    weight, bias = (value.detach().numpy() for value in head.linear.parameters())
    np.testing.assert_allclose(weight, weight_KD - rate * slopes_BK.T @ seen_BD, rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(bias, bias_K - rate * slopes_BK.sum(axis=0), rtol=1e-8, atol=1e-11)


def test_a_batch_without_any_label_changes_no_weight(black: Path) -> None:
    method = small_method(black, weight_decay=0.0, lr=1.0)
    before = [value.detach().clone() for network in method.networks for value in network.parameters()]
    assert method.train_step(method.blank_batch(), Step(1, slice(0, 1), 1.0, 0, n_images=5)) == 0
    after = [value for network in method.networks for value in network.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# The mean loss


def test_the_mean_loss_is_weighted_by_images() -> None:
    meter = LossMeter()
    for loss, images in ((2.0, 30), (4.0, 10)):
        meter.add(torch.tensor(loss), images, str)
    assert meter.settle(str) == pytest.approx(2.5)
    assert meter.over_ranks(ONE_PROCESS) == (100.0, 40)
    meter = LossMeter(*meter.over_ranks(ONE_PROCESS))
    meter.add(torch.tensor(0.0), 10, str)
    assert meter.settle(str) == pytest.approx(2.0)
    assert LossMeter().settle(str) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_told_with_what_to_try(value: float) -> None:
    words = f"the loss became {value} at epoch 3, batch 7. Try a lower --lr (a third of it), or --precision fp32"
    with pytest.raises(TrainingError, match=re.escape(words)):
        LossMeter().add(torch.tensor(value), 4, lambda: "epoch 3, batch 7")
