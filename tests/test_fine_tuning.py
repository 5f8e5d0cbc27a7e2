"""A step against autograd and arithmetic by hand; randomness that is a function of seeds; what the modes leave alone."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from models_helper import make_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError, TrainingError
from deepcluster.evaluation.learners.fine_tuning import (
    LOOK_STEPS,
    Classifier,
    RunningLoss,
    crop_size,
    fully_connected,
    logits_of,
    make_anew,
    order_of,
    seed_of,
    seeded,
    sgd,
    step,
)
from deepcluster.models.make import make_trunk
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


def test_running_losses() -> None:
    losses = RunningLoss()
    assert losses.settle("the start") == 0
    for value in range(LOOK_STEPS):
        losses.add(torch.tensor(float(value)), f"step {value}")
    assert (losses.total, losses.count) == (LOOK_STEPS * (LOOK_STEPS - 1) / 2, LOOK_STEPS)
    goes_on = RunningLoss(losses.total, losses.count)
    goes_on.add(torch.tensor(1.0), "the end")
    assert goes_on.settle("the end") == (losses.total + 1) / (LOOK_STEPS + 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_told(value: float) -> None:
    losses = RunningLoss()
    losses.add(torch.tensor(value), "step 3")
    with pytest.raises(TrainingError, match=r"the loss became (nan|inf) at step 9; try a lower learning rate"):
        losses.settle("step 9")


def test_layers_made_anew() -> None:
    layers = [nn.Linear(400, 500), nn.Linear(500, 20)]
    make_anew([layer.requires_grad_(False) for layer in layers], deviation=0.01, bias=0.1, seed=4)
    for layer in layers:
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.03)
        assert float(layer.weight.detach().mean()) == pytest.approx(0, abs=4e-4)
        assert (layer.bias == 0.1).all()
        assert layer.weight.requires_grad and layer.bias.requires_grad
    again = nn.Linear(400, 500)
    make_anew([again], deviation=0.01, bias=0.1, seed=4)
    assert torch.equal(again.weight, layers[0].weight)
    assert not torch.equal(layers[0].weight.flatten()[:100], layers[1].weight.flatten()[:100])


def test_fully_connected_layers_by_architecture() -> None:
    widths = [layer.out_features for layer in fully_connected(make_trunk("alexnet", image_size=64))]
    assert widths == [4096, 4096]
    assert fully_connected(make_trunk("alexnet-small", image_size=16)) == []
    assert fully_connected(make_trunk("resnet18-small", image_size=16)) == []


def test_the_size_of_crops(tmp_path: Path) -> None:
    """Trunks without fully connected layers take any size; AlexNet those whose last map is as wide."""
    model = make_model(tmp_path)
    assert [crop_size(model, asked) for asked in (None, 16, 40)] == [16, 16, 40]
    with pytest.raises(InputError, match="image_size=2 does not fit this alexnet-small, which takes images of 16 px"):
        crop_size(make_model(tmp_path, arch="alexnet-small"), 2)
    model = make_model(tmp_path, arch="alexnet", image_size=64)
    assert crop_size(model, 66) == 66
    with pytest.raises(InputError, match=r"image_size=128 .* alexnet, which takes images of 64 px \(its fully connected"):
        crop_size(model, 128)
