"""The projection and the loss of DeepCluster-v2 against formulas in float64 NumPy and naive loops."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepcluster.models.archs import make_trunk
from deepcluster.models.heads import CropPoints, Projection, prototype_losses

Floats = NDArray[np.float64]


def formula(projection: Projection, rows_BD: Floats) -> Floats:
    """Linear, BatchNorm of the batch, ReLU, linear, unit length."""
    first, norm, _, last = (
        {name: value.detach().numpy() for name, value in layer.named_parameters()} for layer in projection.layers
    )
    hidden_BH = rows_BD @ first["weight"].T + first["bias"]
    hidden_BH = (hidden_BH - hidden_BH.mean(axis=0)) / np.sqrt(hidden_BH.var(axis=0) + 1e-5)
    hidden_BH = np.maximum(hidden_BH * norm["weight"] + norm["bias"], 0)
    points_BP = hidden_BH @ last["weight"].T + last["bias"]
    lengths_B1: Floats = np.sqrt((points_BP**2).sum(axis=1, keepdims=True))
    return points_BP / lengths_B1


def random_projection(seed: int = 0) -> Projection:
    """In float64, with scales and biases of the norm that are not those of the start."""
    projection = Projection(5, 7, 3, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in projection.layers[1].parameters():
            weight.normal_(generator=generator)
    return projection


def rows(count: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_rows(count: int, width: int, seed: int) -> Tensor:
    return nn.functional.normalize(rows(count, width, seed))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_projection_is_that_of_the_formula(seed: int) -> None:
    projection, rows_BD = random_projection(seed), rows(11, 5)
    np.testing.assert_allclose(projection(rows_BD).detach().numpy(), formula(projection, rows_BD.numpy()), atol=1e-13)


def test_only_the_seed_decides_the_weights_and_the_global_generator_is_unchanged() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = Projection(5, 7, 3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    same, other = Projection(5, 7, 3, seed=1), Projection(5, 7, 3, seed=2)
    for name, value in one.state_dict().items():
        assert torch.equal(same.state_dict()[name], value)
    assert not torch.equal(other.layers[0].weight, one.layers[0].weight)  # type: ignore[arg-type]


def test_points_of_half_precision_are_scaled_in_float32() -> None:
    projection = Projection(5, 7, 3, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        points_BP = projection(rows(6, 5).float())
    assert points_BP.dtype == torch.float32
    torch.testing.assert_close(points_BP.norm(dim=1), torch.ones(6), rtol=0, atol=1e-6)
    assert random_projection()(rows(6, 5)).dtype == torch.float64


def test_crops_of_a_size_pass_together_and_the_projection_takes_all() -> None:
    """Two crops of 32 and one of 16 pixels of three images; statistics are those of a size, then those of all crops."""
    trunk = make_trunk("alexnet-small", image_size=32, seed=0).train()
    projection = Projection(trunk.dim, 7, 3, seed=0).train()
    large, small = torch.randn(6, 3, 32, 32), torch.randn(3, 3, 16, 16)
    points_NP = CropPoints(trunk, projection)([large, small])
    assert points_NP.shape == (9, 3)
    expected_NP = projection(torch.cat([trunk(large), trunk(small)]))
    torch.testing.assert_close(points_NP, expected_NP)


def naive_losses(points_VBP: Floats, prototypes: list[Floats], labels_HB: NDArray[np.int64], temperature: float) -> Floats:
    """The mean over heads and crops of -log of the softmax at the image's cluster, number by number."""
    n_views, n_images, _ = points_VBP.shape
    losses_B = np.zeros(n_images)
    for image in range(n_images):
        for head, prototypes_KP in enumerate(prototypes):
            label = labels_HB[head, image]
            for view in range(n_views):
                scores = [float(points_VBP[view, image] @ prototype_P) / temperature for prototype_P in prototypes_KP]
                if label >= 0:
                    losses_B[image] += math.log(sum(math.exp(score) for score in scores)) - scores[label]
    return losses_B / (n_views * len(prototypes))


@pytest.mark.parametrize("n_views", [1, 2, 5])
@pytest.mark.parametrize("clusters", [(4,), (4, 6, 3)], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_losses_are_those_of_naive_loops(n_views: int, clusters: tuple[int, ...], temperature: float) -> None:
    points_VBP = unit_rows(n_views * 7, 5, seed=2).view(n_views, 7, 5)
    prototypes = [unit_rows(count, 5, seed=10 + head) for head, count in enumerate(clusters)]
    rng = np.random.default_rng(0)
    labels_HB = np.stack([rng.integers(-1, count, 7) for count in clusters])
    losses_B = prototype_losses(points_VBP, prototypes, torch.from_numpy(labels_HB), temperature=temperature)
    expected_B = naive_losses(points_VBP.numpy(), [one.numpy() for one in prototypes], labels_HB, temperature)
    assert losses_B.dtype == torch.float64
    np.testing.assert_allclose(losses_B.numpy(), expected_B, rtol=1e-12, atol=1e-13)


def test_by_hand() -> None:
    """One crop on the first of two prototypes at right angles: log(1 + e^(-1/T))."""
    points_VBP = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    losses_B = prototype_losses(points_VBP, [torch.eye(2)], torch.tensor([[0, 1]]), temperature=0.5)
    torch.testing.assert_close(losses_B, torch.tensor([math.log1p(math.exp(-2)), math.log1p(math.exp(2))]))


def test_an_image_without_a_label_has_no_loss_and_no_gradient() -> None:
    points_VBP = unit_rows(6, 4, seed=3).view(2, 3, 4).requires_grad_()
    labels_HB = torch.tensor([[0, -1, 2], [1, -1, -1]])
    prototypes = [unit_rows(3, 4, seed=4), unit_rows(5, 4, seed=5)]
    losses_B = prototype_losses(points_VBP, prototypes, labels_HB, temperature=0.1)
    losses_B.sum().backward()
    assert points_VBP.grad is not None
    assert losses_B[1] == 0 and (losses_B[[0, 2]] > 0).all()
    assert (points_VBP.grad[:, 1] == 0).all()
    assert (points_VBP.grad[:, [0, 2]] != 0).any(dim=2).all()
    # Of the last image the second head says nothing: what is left is half the first one's loss.
    first_B = prototype_losses(points_VBP.detach(), prototypes[:1], labels_HB[:1], temperature=0.1)
    torch.testing.assert_close(losses_B[2].detach(), first_B[2] / 2)


def test_gradients_are_those_of_finite_differences() -> None:
    points_VBP = unit_rows(4, 3, seed=6).view(2, 2, 3).requires_grad_()
    prototypes, labels_HB = [unit_rows(4, 3, seed=7), unit_rows(2, 3, seed=8)], torch.tensor([[3, 0], [1, -1]])
    assert torch.autograd.gradcheck(
        lambda given: prototype_losses(given, prototypes, labels_HB, temperature=0.3), (points_VBP,)
    )


def test_prototypes_that_are_all_the_same_give_the_loss_of_chance() -> None:
    prototypes_KP = unit_rows(1, 4, seed=0).expand(9, 4)
    losses_B = prototype_losses(unit_rows(10, 4, 1).view(2, 5, 4), [prototypes_KP], torch.arange(5)[None], temperature=0.1)
    torch.testing.assert_close(losses_B, torch.full((5,), math.log(9), dtype=torch.float64))
