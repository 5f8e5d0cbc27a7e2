"""Heads: weights that depend only on the seed, ReLU first; losses and gradients against sums written out in float64.

B images, D features, K clusters, S super-classes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing import spawn

from deepcluster.core.distributed import ONE_PROCESS, Ranks, group
from deepcluster.core.errors import InputError
from deepcluster.models.heads import ClusterHead, HeadLoss, HierarchicalHead, make_head


def test_weights_are_normal_with_deviation_a_hundredth_and_biases_zero() -> None:
    head = ClusterHead(512, 300, seed=0)
    weight = head.linear.weight.detach()
    assert weight.shape == (300, 512)
    assert abs(float(weight.mean())) < 5 * 0.01 / weight.numel() ** 0.5
    assert float(weight.std()) == pytest.approx(0.01, rel=0.01)
    # Normal, not uniform: 4.55 % lie beyond two deviations.
    assert float((weight.abs() > 0.02).double().mean()) == pytest.approx(0.0455, abs=0.003)
    assert torch.equal(head.linear.bias, torch.zeros(300))


def test_only_the_seed_decides_and_the_global_generator_is_unchanged() -> None:
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


# A standardised input


def test_a_standardised_input_has_the_formula_in_float64_and_no_biases() -> None:
    head = ClusterHead(16, 8, norm=True, seed=0)
    features_BD = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) * 7 + 3
    positive_BD = features_BD.double().clamp(min=0)
    standard_BD = (positive_BD - positive_BD.mean(0)) / (positive_BD.var(0, correction=0) + 1e-5).sqrt()
    expected_BK = standard_BD / 4 @ head.linear.weight.double().T
    torch.testing.assert_close(head(features_BD).double(), expected_BK, rtol=1e-5, atol=1e-7)
    assert float(head.input(features_BD).square().sum(dim=1).mean()) == pytest.approx(1, rel=1e-3)
    assert [name for name, _ in head.named_parameters()] == ["linear.weight"]


@pytest.mark.parametrize("supers", [None, torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])])
def test_the_scale_of_the_features_does_not_change_what_a_standardised_head_learns(supers: Tensor | None) -> None:
    """Networks differ by 50 in the length of their features: at one rate, a head without it diverges or learns nothing."""
    features_BD = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).abs()
    labels_B = torch.arange(64) % 8
    ends = []
    for scale in (0.1, 1.0, 200.0):
        head = make_head(16, 8, supers, norm=True, seed=0)
        optimizer = torch.optim.SGD(head.parameters(), lr=4.0, momentum=0.9)
        for _ in range(50):
            optimizer.zero_grad()
            head.loss(scale * features_BD, labels_B).mean().backward()
            optimizer.step()
        ends.append(float(head.loss(scale * features_BD, labels_B).mean()))
    assert max(ends) - min(ends) < 0.01 < 0.2 < torch.tensor(8.0).log() - max(ends)


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


@pytest.mark.parametrize("supers", [[0, 1, 0], [-1, 0, 0], [0, 1, 5]])
def test_super_classes_out_of_order_are_reported(supers: list[int]) -> None:
    with pytest.raises(InputError, match="must ascend from 0 to at most 2"):
        HierarchicalHead(4, torch.tensor(supers), 3, seed=0)


# Heads over ranks


BATCH, DIM, STEPS = 24, 6, 3
SIZES = {"one layer": None, "hierarchical": (5, 0, 2, 7, 1)}


def train(kind: str, ranks: Ranks) -> dict[str, Any]:
    """A few steps of momentum on this rank's part of each batch; parts lack some super-classes, the last rank has no images.

    Returns:
        The head's state, its optimizer's, and the gradients of this rank's features.
    """
    sizes = SIZES[kind]
    super_of_cluster_K = None if sizes is None else torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    head = make_head(DIM, 15, super_of_cluster_K, seed=3).double()
    losses_of = ranks.data_parallel(HeadLoss(head))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    bounds = [BATCH * number // max(1, ranks.size - 1) for number in range(ranks.size)] + [BATCH]
    mine, slopes = slice(bounds[ranks.rank], bounds[ranks.rank + 1]), []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        labels_B = torch.randint(15, (BATCH,), generator=generator).sort().values[mine]
        features_BD = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)[mine].requires_grad_()
        optimizer.zero_grad()
        (losses_of(features_BD, labels_B).sum() / BATCH * ranks.size).backward()
        optimizer.step()
        assert features_BD.grad is not None
        slopes.append(features_BD.grad / ranks.size)
    return {"head": head.state_dict(), "optimizer": optimizer.state_dict()["state"], "slopes": slopes}


def work(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with group(dist.FileStore(str(folder / "store"), world), rank, world) as ranks:
        torch.save({kind: train(kind, ranks) for kind in SIZES}, folder / f"{rank}.pt")


def test_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    """Three ranks with different super-classes in their parts, the last without images: equal heads, momenta, gradients."""
    spawn(work, args=(3, tmp_path), nprocs=3)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for kind in SIZES:
        expected = train(kind, ONE_PROCESS)
        for rank in range(3):
            for what in ("head", "optimizer"):
                torch.testing.assert_close(found[rank][kind][what], expected[what])
        for step, slopes_BD in enumerate(expected["slopes"]):
            torch.testing.assert_close(torch.cat([each[kind]["slopes"][step] for each in found]), slopes_BD)
