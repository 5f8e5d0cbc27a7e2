"""LARS against its formula in float64 NumPy; which weights decay."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepcluster.training.lars import LARS, parameter_groups

SHAPES = [(4, 3, 3, 3), (5, 4), (5,), ()]


def weights(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def put_gradients(given: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for weight in given:
        weight.grad = (10.0**step * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def formula(
    w: NDArray[np.float64], v: NDArray[np.float64], g: NDArray[np.float64], rate: float, **settings: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Algorithm 1 of the paper for one layer."""
    momentum, decay, trust = settings["momentum"], settings["weight_decay"], settings["trust"]
    local = 1.0
    length, steep = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
    if settings["adapt"] and w.ndim > 1 and length > 0 and steep > 0:
        local = trust * length / (steep + decay * length)
    v = momentum * v + rate * local * (g + decay * w)
    return w - v, v


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_the_formula(adapt: bool, weight_decay: float, momentum: float) -> None:
    settings = {"momentum": momentum, "weight_decay": weight_decay, "trust": 0.02, "adapt": adapt}
    given = weights()
    optimizer = LARS(given, lr=1.0, **settings)
    expected = [(weight.detach().numpy().copy(), np.zeros(weight.shape)) for weight in given]
    for step in range(4):
        rate = 0.3 / (step + 1)
        optimizer.param_groups[0]["lr"] = rate
        put_gradients(given, step)
        gradients = [weight.grad.numpy() for weight in given if weight.grad is not None]
        expected = [formula(w, v, g, rate, **settings) for (w, v), g in zip(expected, gradients, strict=True)]
        optimizer.step()
        for weight, (w, v) in zip(given, expected, strict=True):
            np.testing.assert_allclose(weight.detach().numpy(), w, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(optimizer.state[weight]["momentum_buffer"].numpy(), v, rtol=1e-12, atol=1e-12)


def test_by_hand() -> None:
    """|w| = 5, |g| = 10: local rate 0.1 * 5 / (10 + 0.5 * 5) = 0.04; step 0.04 * 2 * (g + 0.5 w)."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    weight.grad = torch.tensor([[10.0, 0.0]])
    LARS([weight], lr=2.0, momentum=0.9, weight_decay=0.5, trust=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[3 - 0.08 * 11.5, 4 - 0.08 * 2]]))


def test_a_layer_of_zeros_and_a_gradient_of_zeros_move_as_by_sgd() -> None:
    for value, slope in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        weight = nn.Parameter(torch.full((2, 2), value))
        weight.grad = torch.full((2, 2), slope)
        LARS([weight], lr=0.5, weight_decay=0.2).step()
        torch.testing.assert_close(weight.detach(), torch.full((2, 2), value - 0.5 * (slope + 0.2 * value)))


def test_without_rates_of_layers_it_is_torchs_sgd_at_a_constant_rate() -> None:
    ours, theirs = weights(), weights()
    optimizers = (
        LARS(ours, lr=0.1, momentum=0.9, weight_decay=0.05, adapt=False),
        torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.05),
    )
    for step in range(3):
        for given, optimizer in zip((ours, theirs), optimizers, strict=True):
            put_gradients(given, step)
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_a_layers_step_does_not_depend_on_the_gradients_scale() -> None:
    moved = []
    for factor in (1.0, 1000.0):
        given = weights()
        put_gradients(given, 0)
        for weight in given:
            assert weight.grad is not None
            weight.grad *= factor
        LARS(given, lr=1.0, momentum=0.0).step()
        moved.append(given[0].detach())
        before = weights()[0].detach()
        torch.testing.assert_close((given[0].detach() - before).norm(), 0.001 * before.norm(), rtol=1e-9, atol=0)
    torch.testing.assert_close(*moved, rtol=1e-12, atol=1e-12)


def test_a_run_goes_on_from_its_saved_state() -> None:
    given = weights(torch.float32)
    optimizer = LARS(given, lr=0.1, weight_decay=0.01)
    for step in range(2):
        put_gradients(given, step)
        optimizer.step()
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    resumed = copy.deepcopy(given)
    other = LARS(resumed, lr=9.0)
    other.load_state_dict(state)
    for weights_now, moving in ((given, optimizer), (resumed, other)):
        put_gradients(weights_now, 2)
        moving.step()
    assert all(torch.equal(a, b) for a, b in zip(given, resumed, strict=True))


def test_weights_without_gradients_stay_and_a_closure_is_called() -> None:
    given = weights()
    before = [weight.detach().clone() for weight in given]
    optimizer = LARS(given, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (given[1] ** 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == (before[1] ** 2).sum()
    changed = [not torch.equal(weight, old) for weight, old in zip(given, before, strict=True)]
    assert changed == [False, True, False, False]
    optimizer.zero_grad()
    LARS(given, lr=0.1).step()


def test_norms_and_biases_do_not_decay() -> None:
    network = nn.ModuleDict(
        {
            "convolution": nn.Conv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "images": nn.LayerNorm([4, 2, 2]),
            "attention": nn.MultiheadAttention(4, 2),
            "groups": nn.GroupNorm(2, 4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    network["again"] = network["convolution"]
    network.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 4)))
    network.register_parameter("scale", nn.Parameter(torch.ones(4)))
    groups = parameter_groups(network, 1e-4)
    names = {id(weight): name for name, weight in network.named_parameters()}
    assert [[names[id(weight)] for weight in group["params"]] for group in groups] == [
        ["token", "convolution.weight", "attention.in_proj_weight", "attention.out_proj.weight"],
        ["scale", "convolution.bias", "norm.weight", "norm.bias", "images.weight", "images.bias",
         "attention.in_proj_bias", "attention.out_proj.bias", "groups.weight", "groups.bias"],
    ]  # fmt: skip
    assert [(group["weight_decay"], group["adapt"]) for group in groups] == [(1e-4, True), (0.0, False)]
    optimizer = LARS(groups, lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
    assert parameter_groups(nn.ReLU(), 0.1) == [
        {"params": [], "weight_decay": 0.1, "adapt": True},
        {"params": [], "weight_decay": 0.0, "adapt": False},
    ]
