"""Heads: weights that the seed alone decides, ReLU first; losses and gradients against sums written out in float64.

B images, D features, K clusters, S super-classes.
"""

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import make_blobs
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.models.heads import ClusterHead, HierarchicalHead, owners_of


def test_weights_are_normal_with_deviation_a_hundredth_and_biases_zero() -> None:
    head = ClusterHead(512, 300, seed=0)
    weight = head.linear.weight.detach()
    assert weight.shape == (300, 512)
    assert abs(float(weight.mean())) < 5 * 0.01 / weight.numel() ** 0.5
    assert float(weight.std()) == pytest.approx(0.01, rel=0.01)
    # Normal, not uniform: 4.55 % lie beyond two deviations.
    assert float((weight.abs() > 0.02).double().mean()) == pytest.approx(0.0455, abs=0.003)
    assert torch.equal(head.linear.bias, torch.zeros(300))


def test_the_seed_alone_decides_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = ClusterHead(16, 8, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(ClusterHead(16, 8, seed=5).linear.weight, one.linear.weight)
    assert not torch.equal(ClusterHead(16, 8, seed=6).linear.weight, one.linear.weight)


def test_relu_comes_first() -> None:
    head = ClusterHead(16, 8, seed=0)
    features_BD = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    expected_BK = features_BD.clamp(min=0) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(features_BD), expected_BK)
    assert torch.equal(head(-features_BD.abs()), torch.zeros(5, 8))


def test_features_are_not_changed_and_all_weights_learn() -> None:
    head = ClusterHead(16, 8, seed=0)
    features_BD = torch.randn(5, 16)
    before_BD = features_BD.clone()
    head(features_BD).square().sum().backward()
    assert torch.equal(features_BD, before_BD)
    assert [name for name, weights in head.named_parameters() if weights.grad is not None] == [
        "linear.weight",
        "linear.bias",
    ]


def test_the_loss_is_the_cross_entropy_of_each_image() -> None:
    head = ClusterHead(16, 8, seed=0)
    features_BD, labels_B = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 7, 3, 3, 1])
    scores_BK = head(features_BD).double()
    expected_B = scores_BK.exp().sum(dim=1).log() - scores_BK[torch.arange(5), labels_B]
    torch.testing.assert_close(head.loss(features_BD, labels_B).double(), expected_B, rtol=1e-6, atol=1e-6)


# From means


def separable(n: int = 600, dim: int = 12, n_clusters: int = 7) -> tuple[Tensor, Tensor, Tensor, float]:
    """Features after a ReLU, their labels, means and mean squared distance to these."""
    features, labels = make_blobs(n, dim, centers=n_clusters, cluster_std=0.5, center_box=(0, 9), random_state=0)
    features_BD, labels_B = torch.from_numpy(features).clamp(min=0), torch.from_numpy(labels)
    means_KD = torch.stack([features_BD[labels_B == cluster].mean(dim=0) for cluster in range(n_clusters)])
    return features_BD, labels_B, means_KD, float((features_BD - means_KD[labels_B]).square().sum(dim=1).mean())


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_head_from_means_is_the_softmax_of_the_nearest_mean(offset: float) -> None:
    features_BD, _, means_KD, spread = separable()
    features_BD, means_KD = features_BD + offset, means_KD + offset
    expected_BK = (-torch.cdist(features_BD, means_KD).square() / (2 * spread)).log_softmax(dim=1)
    # The weights are rounded to float32, and an offset multiplies what that loses.
    head = ClusterHead.from_means(means_KD, spread)
    found_BK = head.double()(features_BD).log_softmax(dim=1)
    torch.testing.assert_close(found_BK, expected_BK, rtol=1e-5, atol=1e-5 if not offset else 1e-2)


@pytest.mark.parametrize("sharpness", [1, 12])
def test_a_head_from_means_begins_below_the_loss_of_chance(sharpness: int) -> None:
    features_BD, labels_B, means_KD, spread = separable()
    loss = ClusterHead.from_means(means_KD, spread / sharpness).loss(features_BD.float(), labels_B).mean().detach()
    assert float(loss) < 0.1 * log(7)
    assert float(ClusterHead(12, 7, seed=0).loss(features_BD.float(), labels_B).mean().detach()) > 0.9 * log(7)


def test_clusters_without_images_or_without_spread() -> None:
    features_BD, labels_B, means_KD, spread = separable()
    with_empty_KD = torch.cat([means_KD, torch.full((1, 12), torch.nan)])
    head = ClusterHead.from_means(with_empty_KD, spread)
    assert not bool((head(features_BD.float()).argmax(dim=1) == 7).any())
    narrow = ClusterHead.from_means(means_KD, 0.0)
    assert bool(narrow.loss(features_BD.float(), labels_B).isfinite().all())
    assert torch.equal(narrow(features_BD.float()).argmax(dim=1), labels_B)
    equal = ClusterHead.from_means(means_KD[:1].repeat(3, 1), 0.0)
    torch.testing.assert_close(equal.loss(features_BD.float(), labels_B % 3), torch.full((600,), log(3)))


@pytest.mark.parametrize("spread", [-1.0, float("nan"), float("inf")])
def test_a_spread_that_makes_no_sense_is_told(spread: float) -> None:
    with pytest.raises(InputError, match="spread="):
        ClusterHead.from_means(torch.eye(3), spread)
    with pytest.raises(InputError, match="at least one of the means"):
        ClusterHead.from_means(torch.full((3, 2), torch.nan), 1.0)


# The hierarchical head


def layers_of(head: HierarchicalHead) -> list[nn.Linear]:
    """The layers of the super-classes that have clusters, in their order."""
    return [head.layers[str(number)] for number, size in enumerate(head.sizes) if size]  # type: ignore[misc]


def naive_loss(head: HierarchicalHead, features_BD: Tensor, labels_B: Tensor) -> Tensor:
    """Image by image, of the definition: -log p(super-class) - log p(cluster among those of the super-class)."""
    losses = []
    for features_D, label in zip(features_BD, labels_B.tolist(), strict=True):
        positive_D, number = features_D.clamp(min=0), int(head.super_of_cluster_K[label])
        scores_S = head.supers.linear.weight @ positive_D + head.supers.linear.bias
        scores_K = torch.cat([layer.weight for layer in layers_of(head)]) @ positive_D
        scores_K = scores_K + torch.cat([layer.bias for layer in layers_of(head)])
        others_G = scores_K[head.super_of_cluster_K == number]
        losses.append(scores_S.exp().sum().log() - scores_S[number] + others_G.exp().sum().log() - scores_K[label])
    return torch.stack(losses)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    dim=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 10_000),
)
def test_loss_and_gradients_are_those_of_the_formula(n: int, dim: int, sizes: list[int], seed: int) -> None:
    """Any sizes of super-classes, also none and one; batches in which some of them do not occur."""
    generator = torch.Generator().manual_seed(seed)
    super_of_cluster_K = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    head = HierarchicalHead(dim, super_of_cluster_K, len(sizes), seed=seed).double()
    with torch.no_grad():
        for weights in head.parameters():
            weights.copy_(torch.randn(weights.shape, generator=generator))
    features_BD = torch.randn(n, dim, dtype=torch.float64, generator=generator, requires_grad=True)
    labels_B = torch.randint(sum(sizes), (n,), generator=generator)
    factors_B = torch.rand(n, dtype=torch.float64, generator=generator)
    wanted = [features_BD, *head.parameters()]
    found_B, expected_B = head.loss(features_BD, labels_B), naive_loss(head, features_BD, labels_B)
    torch.testing.assert_close(found_B, expected_B)
    found = torch.autograd.grad(found_B @ factors_B, wanted)
    for one, two in zip(found, torch.autograd.grad(expected_B @ factors_B, wanted), strict=True):
        torch.testing.assert_close(one, two)


def test_scores_of_super_classes_and_of_all_clusters() -> None:
    head = HierarchicalHead(16, torch.tensor([0, 0, 2, 2, 2]), 4, seed=1)
    features_BD = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    super_BS, scores_BK = head(features_BD)
    assert (super_BS.shape, scores_BK.shape) == ((6, 4), (6, 5))
    labels_B = torch.tensor([0, 1, 2, 3, 4, 4])
    expected_B = -super_BS.log_softmax(dim=1)[torch.arange(6), head.super_of_cluster_K[labels_B]]
    expected_B[:2] -= scores_BK[:2, :2].log_softmax(dim=1)[torch.arange(2), labels_B[:2]]
    expected_B[2:] -= scores_BK[2:, 2:].log_softmax(dim=1)[torch.arange(4), labels_B[2:] - 2]
    torch.testing.assert_close(head.loss(features_BD, labels_B), expected_B)


def test_one_super_class_is_the_plain_head() -> None:
    plain, head = ClusterHead(16, 8, seed=0), HierarchicalHead(16, torch.zeros(8, dtype=torch.int64), seed=1)
    layers_of(head)[0].load_state_dict(plain.linear.state_dict())
    features_BD, labels_B = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 8
    torch.testing.assert_close(head.loss(features_BD, labels_B), plain.loss(features_BD, labels_B))


@pytest.mark.parametrize(
    "make", [lambda: ClusterHead(64, 12, seed=0), lambda: HierarchicalHead(64, torch.arange(12) // 3, seed=0)]
)
def test_losses_are_float32_in_bf16_arithmetic(make: type[ClusterHead]) -> None:
    head, features_BD = make(), 9 * torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    labels_B = torch.arange(30) % 12
    expected_B = head.loss(features_BD, labels_B)
    with torch.autocast("cpu", torch.bfloat16):
        found_B = head.loss(features_BD.bfloat16(), labels_B)
    assert found_B.dtype == torch.float32
    torch.testing.assert_close(found_B, expected_B, rtol=0, atol=0.1)
    assert not torch.equal(found_B, expected_B)


def test_the_seed_decides_the_weights_of_a_hierarchical_head() -> None:
    one, two, other = (HierarchicalHead(16, torch.arange(300) // 9, seed=seed) for seed in (0, 0, 1))
    states = [head.state_dict() for head in (one, two, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    weights = [torch.cat([layer.weight.detach() for layer in layers_of(head)]) for head in (one, other)]
    assert not torch.equal(*weights)
    assert float(weights[0].std()) == pytest.approx(0.01, rel=0.05)
    assert (
        len({float(layer.weight.detach()[0, 0]) for layer in layers_of(one)}) == len(layers_of(one)) == 34
    )  # No two are alike.
    assert not any(bool(value.any()) for name, value in states[0].items() if name.endswith("bias"))


def test_layers_of_which_a_batch_has_no_image_get_no_gradient_but_zero() -> None:
    head = HierarchicalHead(4, torch.tensor([0, 0, 1, 1]), seed=0)
    head.loss(torch.randn(3, 4), torch.tensor([2, 3, 2])).sum().backward()
    assert torch.equal(layers_of(head)[0].weight.grad, torch.zeros(2, 4))
    assert bool(layers_of(head)[1].bias.grad.any())


@given(sizes=st.lists(st.integers(0, 50), max_size=20), ranks=st.integers(1, 9))
def test_layers_are_dealt_so_that_ranks_have_about_as_many_clusters_each(sizes: list[int], ranks: int) -> None:
    owners = owners_of(sizes, ranks)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == number) for number in range(ranks)]
    assert sum(loads) == sum(sizes) and all(0 <= owner < ranks for owner in owners)
    # The last that was given to the fullest rank was given when it had least.
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_few_layers_lie_on_ranks_far_apart() -> None:
    assert owners_of([5, 0, 9, 7, 6], 64) == [48, 48, 0, 16, 32]  # One that has no cluster has no layer.


@pytest.mark.parametrize("supers", [[0, 1, 0], [-1, 0, 0], [0, 1, 5]])
def test_super_classes_out_of_order_are_told(supers: list[int]) -> None:
    with pytest.raises(InputError, match="must ascend from 0 to at most 2"):
        HierarchicalHead(4, torch.tensor(supers), 3, seed=0)
